"""Many structures at once: archives, caches and databases as sources, shards that resume, and what is left out."""

import gzip
import io
import json
import shutil
import signal
import tarfile
import time
import warnings

import numpy as np
import pytest
import torch
import training_runs
from places import CASES, PROTEINS, ROOT, needs_cases, needs_proteins
from structure_files import pdb_text, peptide, residue, save_structure
from structure_models import build

from protein import decode, encode, evaluate, prepare_structures
from protein.backbones import generate_backbones
from protein.inference import embed_chains
from protein.pretrained import load_structure_tokenizer, save_pretrained
from protein.structure_cache import read_cache
from protein.structure_io import StructureWarning, read_structure, write_structure
from protein.structure_sources import list_sources, read_sources
from protein.token_files import TokenChain, read_tokens, write_tokens
from protein.token_shards import iterate_tokens, read_embeddings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An exported tokenizer and a folder of 7 structures."""
    base = tmp_path_factory.mktemp("bulk")
    save_pretrained(build(), base / "tokenizer")
    (base / "pdb").mkdir()
    for i, chain in enumerate(generate_backbones(7, seed=3)):
        write_structure(base / "pdb" / f"s{i}.{'cif' if i % 2 else 'pdb'}", chain)
    return base


@pytest.fixture
def run(base):
    def call(module, *words):
        module.main([*map(str, words), "--ckpt", str(base / "tokenizer"), "--device", "cpu"])

    return call


def fails(run, *words):
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    assert stopped.value.code not in (0, None)
    return str(stopped.value)


def by_label(chains):
    return {entry.label: (entry.tokens.tolist(), entry.sequence, entry.numbers) for entry in chains}


def of_folder(path):
    return by_label(entry for part in iterate_tokens([path]) for entry in part)


# ---------------------------------------------------------------------------------------------------------------------
# sources


def make_tar(path, folder, *, both=False):
    """As AlphaFold DB has them: gzipped members, each entry as .cif and .pdb, and files that are no structures."""
    with tarfile.open(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            for name in {file.name} | ({f"{file.stem}.pdb"} if both else set()):
                content = gzip.compress(file.read_bytes())
                info = tarfile.TarInfo(f"{name}.gz")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo("s0-predicted_aligned_error.json.gz")
        info.size = 4
        archive.addfile(info, io.BytesIO(b"nope"))


def test_an_archive_is_read_where_it_lies(base, run, tmp_path):
    make_tar(tmp_path / "all.tar", base / "pdb")
    run(encode, tmp_path / "all.tar", "--out", tmp_path / "tar.npz")
    run(encode, base / "pdb", "--out", tmp_path / "folder.npz")
    assert by_label(read_tokens(tmp_path / "tar.npz")) == by_label(read_tokens(tmp_path / "folder.npz"))
    make_tar(tmp_path / "both.tar", base / "pdb", both=True)
    with pytest.warns(StructureWarning, match=r"several formats of 3 entries; s1\.cif\.gz, for one, is read"):
        sources = list_sources([tmp_path / "both.tar"])
    assert [source.member for source in sources[:2]] == ["s0.pdb.gz", "s1.cif.gz"]
    (tmp_path / "cut.tar").write_bytes((tmp_path / "all.tar").read_bytes()[:3000])
    assert "cut.tar" in fails(run, encode, tmp_path / "cut.tar", "--out", tmp_path / "cut.npz")
    (tmp_path / "x.tar.gz").touch()
    assert "unpack this one" in fails(run, encode, tmp_path / "x.tar.gz", "--out", tmp_path / "cut.npz")


def test_of_members_of_one_name_the_last_counts(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for names in (("ALA", "SER"), ("TRP", "VAL", "GLY")):
            path = save_structure(tmp_path, peptide(*names))
            archive.add(path, "./test.pdb")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (reading,) = read_sources(list_sources([tmp_path / "x.tar"]))
    assert [chain.sequence for chain in reading.chains] == ["WVG"]


def test_what_prepare_structures_made_gives_the_same_tokens(base, run, tmp_path):
    prepare_structures.main([str(base / "pdb"), "--out", str(tmp_path / "cache"), "--num-workers", "0"])
    run(encode, tmp_path / "cache", "--out", tmp_path / "cache.jsonl")
    run(encode, base / "pdb", "--out", tmp_path / "folder.jsonl")
    assert (tmp_path / "cache.jsonl").read_bytes() == (tmp_path / "folder.jsonl").read_bytes()
    assert "pass --altloc to prepare_structures.py" in fails(
        run, encode, tmp_path / "cache", "--out", tmp_path / "x.jsonl", "--altloc", "occupancy")
    for name in ("numbers.npy", "insertion_codes.npy"):  # as it was made before
        (tmp_path / "cache" / name).unlink()
    run(encode, tmp_path / "cache", "--out", tmp_path / "old.jsonl")
    assert by_label(read_tokens(tmp_path / "old.jsonl")) == by_label(read_tokens(tmp_path / "folder.jsonl"))
    scores = []
    for source in (base / "pdb", tmp_path / "cache"):
        run(evaluate, source, "--out", tmp_path / "scores.json", "--no-tm")
        scores += json.loads((tmp_path / "scores.json").read_text())["tokenizers"].values()
    assert scores[0] == scores[1]
    assert scores[0]["tm"] is None
    assert scores[0]["rmsd"] > 0


def test_a_cache_beside_its_files_is_named(base, tmp_path):
    """Every chain would be there twice, under one name."""
    prepare_structures.main([str(base / "pdb"), "--out", str(tmp_path / "cache")])
    for places in ([tmp_path / "cache", base / "pdb"], [base / "pdb", tmp_path / "cache"], [tmp_path / "cache"] * 2):
        with pytest.raises(ValueError, match="would both be called s0; "):
            list_sources(places)


def test_residue_numbers_and_insertion_codes_survive_a_cache(tmp_path):
    rows = [*residue(0, "SER", number=52), *residue(1, "THR", number=52, code="A"), *residue(2, "VAL", number=57)]
    path = save_structure(tmp_path, rows)
    prepare_structures.main([str(path), "--out", str(tmp_path / "cache"), "--num-workers", "0"])
    (expected,), found = read_structure(path), read_cache(tmp_path / "cache").chain(0)
    assert (found.name, found.chain_id, found.sequence, found.insertion_codes) == ("test", "A", "STV", ("", "A", ""))
    assert found.residue_numbers.tolist() == [52, 52, 57]
    np.testing.assert_array_equal(found.coords, expected.coords)


def test_foldcomp_databases(base, run, tmp_path):
    foldcomp = pytest.importorskip("foldcomp")
    parts = [foldcomp.compress(name, (base / "pdb" / f"{name}.pdb").read_text()) for name in ("s0", "s2")]
    (tmp_path / "db").write_bytes(b"".join(part + b"\0" for part in parts))
    (tmp_path / "db.index").write_text(f"0\t0\t{len(parts[0]) + 1}\n1\t{len(parts[0]) + 1}\t{len(parts[1]) + 1}\n")
    (tmp_path / "db.lookup").write_text("0\ts0.pdb\t0\n1\ts2.pdb\t1\n")
    (tmp_path / "db.dbtype").write_bytes(bytes(4))
    run(encode, tmp_path / "db", "--out", tmp_path / "t.npz")
    found = read_tokens(tmp_path / "t.npz")
    assert [entry.name for entry in found] == ["s0", "s2"]
    assert found[0].sequence == read_structure(base / "pdb" / "s0.pdb")[0].sequence


def test_a_list_of_ids(base, run, tmp_path):
    ids = tmp_path / "ids.txt"
    ids.write_text("# of interest\ns3\ns1_A\n\ns4 A\n")
    run(encode, base / "pdb", "--out", tmp_path / "t.fasta", "--ids", ids)
    assert [entry.label for entry in read_tokens(tmp_path / "t.fasta")] == ["s1_A", "s3_A", "s4_A"]
    ids.write_text("s3\ns9\nt1_A\n")
    assert "2 of its lines name nothing that is there: s9, t1_A" in fails(
        run, encode, base / "pdb", "--out", tmp_path / "t.fasta", "--ids", ids)


def test_reading_by_processes_keeps_the_order(base):
    sources = list_sources([base / "pdb"])
    alone, shared = list(read_sources(sources)), list(read_sources(sources, num_workers=1))
    assert [r.source.name for r in shared] == [r.source.name for r in alone] == [f"s{i}" for i in range(7)]
    assert [r.chains[0].sequence for r in shared] == [r.chains[0].sequence for r in alone]


# ---------------------------------------------------------------------------------------------------------------------
# shards


def test_shards_hold_what_a_file_holds(base, run, tmp_path):
    run(encode, base / "pdb", "--out", tmp_path / "all.npz")
    for kind in ("npz", "jsonl", "fasta"):
        run(encode, base / "pdb", "--out", tmp_path / kind, "--format", kind, "--shard-size", "3")
        assert of_folder(tmp_path / kind) == by_label(read_tokens(tmp_path / "all.npz"))
        manifest = json.loads((tmp_path / kind / "manifest.json").read_text())
        assert [shard["chains"] for shard in manifest["shards"]] == [3, 3, 1]
        assert manifest["chains"] == 7
        assert not list(tmp_path.glob(".*"))
    run(decode, tmp_path / "npz", "--out", tmp_path / "back")
    assert len(list((tmp_path / "back").iterdir())) == 7


def test_a_resumed_folder_equals_an_uninterrupted_one(base, run, tmp_path, monkeypatch):
    words = [base / "pdb", "--format", "jsonl", "--shard-size", "2", "--out"]
    run(encode, *words, tmp_path / "whole")
    done = []

    def until_the_second(tokenizer, chains, device, **options):
        done.append(len(chains))
        if len(done) == 3:
            raise training_runs.Killed
        return real(tokenizer, chains, device, **options)

    real = encode.encode_chains
    monkeypatch.setattr(encode, "encode_chains", until_the_second)
    with pytest.raises(training_runs.Killed):
        run(encode, *words, tmp_path / "part")
    assert not (tmp_path / "part" / "manifest.json").exists()
    assert "run it again" in fails(run, decode, tmp_path / "part", "--out", tmp_path / "back")
    run(encode, *words, tmp_path / "part")
    assert done == [2, 2, 2, 2, 1]  # the first two were not done again
    files = sorted(p.name for p in (tmp_path / "whole").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "part").iterdir())
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "part" / name).read_bytes() for name in files)
    said = fails(run, encode, *words, tmp_path / "part", "--renumber")
    assert "was begun with other settings (renumber: False, now True)" in said
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").touch()
    assert "holds other files" in fails(run, encode, *words, tmp_path / "other")


def test_a_killed_command_goes_on_with_another_number_of_processes(base, tmp_path):
    many = tmp_path / "many"
    many.mkdir()
    for i in range(60):
        shutil.copy(base / "pdb" / "s0.pdb", many / f"c{i:02d}.pdb")
    words = [str(many), "--ckpt", str(base / "tokenizer"), "--device", "cpu", "--shard-size", "1", "--out"]
    process = training_runs.start(ROOT / "protein" / "encode.py", [*words, str(tmp_path / "out")])
    for _ in range(2400):
        if len(list((tmp_path / "out").glob("shard-*.json"))) >= 3 or process.poll() is not None:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("shard-*.json")}
    assert len(finished) >= 3
    process = training_runs.start(ROOT / "protein" / "encode.py", [*words, str(tmp_path / "out")], processes=2)
    log, _ = process.communicate()
    assert process.returncode == 0, log
    tokens = of_folder(tmp_path / "out")
    assert list(tokens) == [f"c{i:02d}_A" for i in range(60)]
    assert len({tuple(found) for found, *_ in tokens.values()}) == 1
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == when for name, when in finished.items())


# ---------------------------------------------------------------------------------------------------------------------
# what is left out


def test_offenders_are_counted_and_named_at_once(base, run, tmp_path, monkeypatch, capsys):
    shutil.copytree(base / "pdb", tmp_path / "pdb")
    (tmp_path / "pdb" / "bad1.pdb").write_text("ATOM      1  N   ALA A   1      11.1")
    (tmp_path / "pdb" / "s9.pdb").write_text("nothing")
    save_structure(tmp_path / "pdb", peptide("ALA", "SER", "TRP"), "two words.pdb")
    words = [tmp_path / "pdb", "--out", tmp_path / "t.fasta", "--shard-size", "2"]
    with monkeypatch.context() as patch:
        calls = []
        real = encode.encode_chains
        patch.setattr(encode, "encode_chains", lambda *a, **k: calls.append(a) or real(*a, **k))
        said = fails(run, encode, *words, "--max-bad-structures", "1")
    assert "3 structure(s) or chain(s) cannot be encoded, --max-bad-structures 1 are tolerated" in said
    assert all(name in said for name in ("bad1.pdb", "s9.pdb", "two words"))
    assert not (tmp_path / "t.fasta").exists()
    assert capsys.readouterr().err.count("left out: ") == 3
    run(encode, *words, "--max-bad-structures", "3")
    assert len(read_tokens(tmp_path / "t.fasta")) == 7


@needs_cases
@pytest.mark.parametrize(("name", "form"), [("chain_47.pdb", "pdb"), ("spacechain.cif", "cif")])
def test_odd_chain_ids_end_in_files(run, tmp_path, name, form):
    path = CASES / "structures" / name
    for kind in ("jsonl", "npz"):
        run(encode, path, "--out", tmp_path / f"t.{kind}")
        run(decode, tmp_path / f"t.{kind}", "--out", tmp_path / kind, "--format", form, "--reference", path)
        (file,) = (tmp_path / kind).glob(f"*.{form}")
        assert [chain.chain_id for chain in read_structure(file)] == [chain.chain_id for chain in read_structure(path)]


def test_decoding_counts_what_it_cannot_write(run, tmp_path, capsys):
    twice = TokenChain("twice", "A", np.array([3, 4, 5]), "MMM", ("7", "7", "8"))
    good = TokenChain("good", "A", np.array([3, 4, 5]), "MKV", ("1", "2", "3"))
    empty = TokenChain("empty", "A", np.array([-1, -1]), "MK", ("1", "2"))
    write_tokens(tmp_path / "t.jsonl", [twice, good, empty])
    words = [decode, tmp_path / "t.jsonl", "--out", tmp_path / "out"]
    said = fails(run, *words)
    assert "2 chain(s) cannot be decoded" in said
    assert "pass --renumber" in said
    assert "empty_A has no tokens at all" in said
    assert not (tmp_path / "out").exists()
    run(*words, "--max-bad-structures", "2")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["good_A.pdb"]
    run(*words, "--max-bad-structures", "1", "--renumber")
    assert read_structure(tmp_path / "out" / "twice_A.pdb")[0].residue_numbers.tolist() == [1, 2, 3]
    assert "left out" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# predicted structures


def predicted(path, plddt, **files):
    rows = peptide(*["ALA", "SER", "TRP", "VAL"])
    for row in rows:
        row.bfactor = plddt[row.number - 1]
    return save_structure(path, rows, **files)


def test_residues_of_a_low_plddt_are_masked_and_plddt_is_kept(run, tmp_path):
    path = predicted(tmp_path, [90, 40, 70, 69.9])
    (chain,) = read_structure(path, min_plddt=70)
    assert chain.mask.tolist() == [True, False, True, False]
    assert chain.bfactors.tolist() == pytest.approx([90, 40, 70, 69.9])
    with pytest.raises(ValueError, match=r"no residue with a pLDDT of at least 95, the highest is 90"):
        read_structure(path, min_plddt=95)
    for kind in ("fasta", "jsonl", "npz"):
        run(encode, path, "--out", tmp_path / f"t.{kind}", "--min-plddt", "70")
        (entry,) = read_tokens(tmp_path / f"t.{kind}")
        assert (entry.tokens >= 0).tolist() == [True, False, True, False]
        assert entry.plddt.tolist() == pytest.approx([90, 40, 70, 69.9])
    run(decode, tmp_path / "t.npz", "--out", tmp_path / "out")
    assert read_structure(tmp_path / "out" / "test_A.pdb")[0].bfactors.tolist() == [90, 70]
    run(encode, path, "--out", tmp_path / "plain.npz")
    assert read_tokens(tmp_path / "plain.npz")[0].plddt is None
    prepare_structures.main([str(path), "--out", str(tmp_path / "cache"), "--num-workers", "0"])
    run(encode, tmp_path / "cache", "--out", tmp_path / "c.npz", "--min-plddt", "70")
    assert (read_tokens(tmp_path / "c.npz")[0].tokens >= 0).tolist() == [True, False, True, False]
    masked = read_cache(tmp_path / "cache").masked(70)
    assert masked.observed.tolist() == [2]
    assert masked[0].mask.tolist() == [True, False, True, False]
    assert masked.fingerprint() != read_cache(tmp_path / "cache").fingerprint()


def test_plddt_of_a_qa_metric(tmp_path):
    path = predicted(tmp_path, [1, 1, 1, 1], name="x.cif")
    metric = ["loop_", "_ma_qa_metric.id", "_ma_qa_metric.mode", "_ma_qa_metric.name", "1 global pLDDT",
              "2 local pLDDT", "#", "loop_", *(f"_ma_qa_metric_local.{name}" for name in (
                  "label_asym_id", "label_seq_id", "metric_id", "metric_value")),
              *(f"A {i} 2 {value}" for i, value in enumerate((90, 40, 80, 30), start=1)), "#", ""]
    with pytest.raises(ValueError, match="no pLDDT in _ma_qa_metric_local"):
        read_structure(path, plddt_from="qa_metric")
    path.write_text(path.read_text() + "\n".join(metric))
    (chain,) = read_structure(path, min_plddt=70, plddt_from="qa_metric")
    assert chain.mask.tolist() == [True, False, True, False]
    assert chain.bfactors.tolist() == [90, 40, 80, 30]
    with pytest.raises(ValueError, match="PDB has no qa_metric"):
        read_structure(predicted(tmp_path, [1] * 4), plddt_from="qa_metric")


def test_bfactors_that_no_plddt_can_be_are_refused(run, tmp_path):
    """Of a file that says nothing of an experiment, and of a cache, which does not know."""
    path = predicted(tmp_path, [90, 40, 100.5, 30])
    said = r"chain test_A has 100\.5 where pLDDT should be"
    with pytest.raises(ValueError, match=rf"test\.pdb: {said}"):
        read_structure(path, min_plddt=70)
    prepare_structures.main([str(path), "--out", str(tmp_path / "cache"), "--num-workers", "0"])
    with pytest.raises(ValueError, match=said):
        read_cache(tmp_path / "cache").masked(70)
    assert "where pLDDT should be" in fails(run, encode, tmp_path / "cache", "--out", tmp_path / "c.npz",
                                            "--min-plddt", "70")
    assert read_structure(predicted(tmp_path, [90, 40, 100, 30]), min_plddt=70)[0].mask.sum() == 2


def test_bfactors_of_experiments_are_no_plddt_and_filters(base, run, tmp_path, capsys):
    remarks = ["EXPDTA    X-RAY DIFFRACTION", "REMARK   2 RESOLUTION.    2.80 ANGSTROMS.",
               "REMARK   3   FREE R VALUE                     : 0.310"]
    shutil.copytree(base / "pdb", tmp_path / "pdb")
    path = save_structure(tmp_path / "pdb", "\n".join([*remarks, pdb_text(peptide("ALA", "SER", "TRP"))]))
    with pytest.raises(ValueError, match=r"an experimental structure \(X-RAY DIFFRACTION\), whose B-factors are no"):
        read_structure(path, min_plddt=70)
    with pytest.raises(ValueError, match=r"resolution 2.8 is above 2.5"):
        read_structure(path, max_resolution=2.5)
    with pytest.raises(ValueError, match=r"R-free 0.31 is above 0.3"):
        read_structure(path, max_r_free=0.3)
    assert read_structure(path, max_resolution=2.8, max_r_free=0.31)[0].sequence == "ASW"
    prepare_structures.main([str(tmp_path / "pdb"), "--out", str(tmp_path / "cache"), "--num-workers", "0",
                             "--max-resolution", "2.5", "--max-bad-structures", "0"])
    assert "7 chains of 7 files" in (said := capsys.readouterr().out)
    assert "1 filtered out" in said
    run(encode, tmp_path / "pdb", "--out", tmp_path / "t.npz", "--max-resolution", "2.5")
    assert len(read_tokens(tmp_path / "t.npz")) == 7


# ---------------------------------------------------------------------------------------------------------------------
# embeddings and exports


@pytest.mark.parametrize("kind", ["npz", "safetensors"])
def test_embeddings(base, run, tmp_path, kind):
    tokenizer = load_structure_tokenizer(base / "tokenizer", CPU)
    chains = [read_structure(base / "pdb" / f"s{i}.{'cif' if i % 2 else 'pdb'}")[0] for i in range(7)]
    chains[2].coords[4, 1] = np.nan
    write_structure(base / "pdb" / "s2.pdb", chains[2])
    for what in ("quantized", "continuous"):
        words = [base / "pdb", "--embeddings", what, "--embeddings-format", kind, "--shard-size", "3", "--out"]
        run(encode, *words, tmp_path / f"{what}.npz")
        run(encode, *words, tmp_path / what)
        one = read_embeddings(tmp_path / f"{what}.embeddings.{kind}")
        shards = {}
        for path in sorted((tmp_path / what).glob(f"*.embeddings.{kind}")):
            shards |= read_embeddings(path)
        assert list(one) == list(shards) == [(f"s{i}", "A") for i in range(7)]
        entries = {(entry.name, entry.chain): entry for entry in read_tokens(tmp_path / f"{what}.npz")}
        for key, chain in zip(one, chains, strict=True):
            np.testing.assert_array_equal(one[key], shards[key])
            ((tokens, vectors),) = embed_chains(tokenizer, [chain], CPU, what)
            np.testing.assert_allclose(one[key], vectors, atol=1e-4)
            assert entries[key].tokens.tolist() == tokens.tolist()
            assert np.isnan(vectors).all(1).tolist() == (tokens < 0).tolist()
            if what == "quantized":
                expected = tokenizer.codebook().detach().numpy()[tokens[tokens >= 0]]
                np.testing.assert_array_equal(vectors[tokens >= 0], expected)


def test_export_from_the_command_line(base, run, tmp_path):
    run(encode, "--export-hf", tmp_path / "hf")
    one, other = (load_structure_tokenizer(path, CPU).hash() for path in (base / "tokenizer", tmp_path / "hf"))
    assert one == other
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {"config.json", "model.safetensors"}


@needs_proteins
def test_tm_scores_by_processes(run, tmp_path):
    files = sorted((PROTEINS / "structures").iterdir())[:2]
    for words in (["--num-workers", "0"], ["--num-workers", "1"]):
        run(evaluate, *files, "--out", tmp_path / f"{words[1]}.json", *words)
    scores = [json.loads((tmp_path / f"{n}.json").read_text())["tokenizers"] for n in (0, 1)]
    assert scores[0] == scores[1]
    assert next(iter(scores[0].values()))["tm"] > 0
