"""encode.py, decode.py and evaluate.py on files: round trips, processes, metrics against the model, and garbage."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import training_runs
from places import PROTEINS, ROOT, needs_proteins
from training_runs import to_words

from protein import decode, encode, evaluate, train_provq
from protein.backbones import generate_backbones
from protein.benchmark.baselines import open_tokenizer
from protein.inference import length_batches, padded_chains
from protein.pretrained import load_structure_tokenizer
from protein.structure_io import read_structure, write_structure
from protein.token_files import TokenChain, read_tokens, write_tokens

CPU = torch.device("cpu")
RUN = {"encoder_width": 32, "encoder_heads": 4, "decoder_width": 32, "decoder_heads": 2, "decoder_layers": 1,
       "codebook_embed_dim": 8, "codebook_size": 16, "ideal_chains": 12, "max_length": 32, "global_batch_size": 4,
       "max_steps": 4, "warmup_steps": 2, "transition_steps": 0, "val_size": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run, and five generated structures in two formats and a subfolder."""
    base = tmp_path_factory.mktemp("commands")
    train_provq.main(to_words(RUN | {"results_dir": base / "run"}))
    (base / "structures" / "more").mkdir(parents=True)
    for i, chain in enumerate(generate_backbones(5, seed=3)):
        write_structure(base / "structures" / ("more" if i > 2 else "") / f"s{i}.{'cif' if i % 2 else 'pdb'}", chain)
    encode.main([str(base / "structures"), "--ckpt", str(base / "run"), "--out", str(base / "tokens.fasta"),
                 "--device", "cpu"])
    return base


def test_tokens_are_the_models(base):
    entries = read_tokens(base / "tokens.fasta")
    assert [entry.name for entry in entries] == ["more/s3", "more/s4", "s0", "s1", "s2"]
    tokenizer = load_structure_tokenizer(base / "run", CPU)
    for entry in entries:
        path = next(p for p in (base / "structures").rglob(f"{Path(entry.name).name}.*"))
        (chain,) = read_structure(path)
        assert (entry.sequence, len(entry.tokens)) == (chain.sequence, len(chain))
        alone = tokenizer.encode(*padded_chains([chain], CPU))[0].numpy()
        assert entry.tokens.tolist() == alone.tolist()
        assert entry.tokenizer == tokenizer.hash()


@pytest.mark.parametrize("kind", ["jsonl", "npz"])
def test_formats_and_batches_hold_the_same_tokens(base, tmp_path, kind):
    out = tmp_path / f"tokens.{kind}"
    encode.main([str(base / "structures"), "--ckpt", str(base / "run"), "--out", str(out), "--max-residues", "1",
                 "--device", "cpu"])
    for one, other in zip(read_tokens(base / "tokens.fasta"), read_tokens(out), strict=True):
        assert (one.label, one.tokens.tolist(), one.numbers) == (other.label, other.tokens.tolist(), other.numbers)


def test_two_processes_write_the_same_file(base, tmp_path):
    words = [str(base / "structures"), "--ckpt", str(base / "run"), "--out", str(tmp_path / "two.fasta"), "--device",
             "cpu"]
    process = training_runs.start(ROOT / "protein" / "encode.py", words, processes=2)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert (tmp_path / "two.fasta").read_bytes() == (base / "tokens.fasta").read_bytes()


@pytest.mark.parametrize("form", ["pdb", "cif"])
def test_decoded_structures_can_be_read_back(base, tmp_path, form):
    decode.main([str(base / "tokens.fasta"), "--ckpt", str(base / "run"), "--out", str(tmp_path), "--format", form,
                 "--reference", str(base / "structures"), "--device", "cpu"])
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["chains"] == 5
    for entry in read_tokens(base / "tokens.fasta"):
        (chain,) = read_structure(tmp_path / f"{entry.label}.{form}")
        assert chain.sequence == entry.sequence
        assert chain.mask.all()
        numbers, _ = entry.residue_numbers()
        assert chain.residue_numbers.tolist() == numbers.tolist()
        # Ideal geometry inside a residue, whatever the decoder has learnt: |N - CA| of its local frame.
        assert np.linalg.norm(chain.coords[:, 0] - chain.coords[:, 1], axis=-1) == pytest.approx(1.459, abs=0.01)
        assert report["of_each_chain"][entry.label]["rmsd"] > 0
    each = [row["rmsd"] for row in report["of_each_chain"].values()]
    assert report["mean"]["rmsd"] == pytest.approx(np.mean(each), rel=1e-6)


def test_missing_residues_stay_missing(base, tmp_path):
    (chain,) = generate_backbones(1, seed=9)
    chain.coords[4, 2] = np.nan
    write_structure(tmp_path / "gap.cif", chain)
    encode.main([str(tmp_path / "gap.cif"), "--ckpt", str(base / "run"), "--out", str(tmp_path / "t.npz"), "--device",
                 "cpu"])
    (entry,) = read_tokens(tmp_path / "t.npz")
    assert (entry.tokens < 0).nonzero()[0].tolist() == [4]
    decode.main([str(tmp_path / "t.npz"), "--ckpt", str(base / "run"), "--out", str(tmp_path), "--device", "cpu"])
    (decoded,) = read_structure(tmp_path / f"{entry.label}.pdb")
    assert len(decoded) == len(chain) - 1


def test_evaluation(base, tmp_path, capsys):
    out = tmp_path / "metrics.json"
    evaluate.main([str(base / "structures"), "--ckpt", str(base / "run"), "--out", str(out), "--device", "cpu"])
    assert "normalized_perplexity" in capsys.readouterr().out
    found = json.loads(out.read_text())["tokenizers"][str(base / "run")]
    tokens = [entry.tokens for entry in read_tokens(base / "tokens.fasta")]
    counts = np.stack([np.bincount(t, minlength=16) for t in tokens])
    used = [(row > 0).mean() for row in counts]
    assert found["step"] == json.loads((base / "run" / "summary.json").read_text())["step"]
    assert open_tokenizer(str(base / "run"), CPU).step == found["step"]  # which probes record
    assert found["usage"] == pytest.approx((counts.sum(0) > 0).mean())
    assert found["usage_per_chain"] == pytest.approx(np.mean(used))

    def perplexity(row):
        p = row[row > 0] / row.sum()
        return np.exp(-(p * np.log(p)).sum())

    assert found["perplexity"] == pytest.approx(perplexity(counts.sum(0)), rel=1e-5)
    assert found["normalized_perplexity_per_chain"] == pytest.approx(
        np.mean([perplexity(row) for row in counts]) / 16, rel=1e-5)
    codes = load_structure_tokenizer(base / "run", CPU).codebook().float().detach()
    assert found["code_distance"] == pytest.approx(torch.pdist(codes).mean().item(), rel=1e-4)
    decode.main([str(base / "tokens.fasta"), "--ckpt", str(base / "run"), "--out", str(tmp_path / "d"), "--reference",
                 str(base / "structures"), "--device", "cpu"])
    means = json.loads((tmp_path / "d" / "metrics.json").read_text())["mean"]
    assert {name: found[name] for name in means} == pytest.approx(means, rel=1e-4)
    process = training_runs.start(ROOT / "protein" / "evaluate.py", [
        str(base / "structures"), "--ckpt", str(base / "run"), "--out", str(tmp_path / "two.json"), "--device", "cpu"],
        processes=2)
    log, _ = process.communicate()
    assert process.returncode == 0, log
    two = json.loads((tmp_path / "two.json").read_text())["tokenizers"][str(base / "run")]
    assert two.pop("tokenizer_hash") == found.pop("tokenizer_hash")
    assert two == pytest.approx(found, rel=1e-6)


@pytest.mark.filterwarnings("error")
def test_what_cannot_be_averaged_is_null(base, tmp_path):
    (chain,) = generate_backbones(1, seed=9)
    chain.coords[2:] = np.nan
    write_structure(tmp_path / "two.cif", chain)
    out = tmp_path / "metrics.json"
    evaluate.main([str(tmp_path / "two.cif"), "--ckpt", str(base / "run"), "--out", str(out), "--device", "cpu"])
    (found,) = json.loads(out.read_text(), parse_constant=never)["tokenizers"].values()
    assert [found[name] for name in ("rmsd", "lddt", "tm", "rmsd_median")] == [None] * 4
    assert found["tokens"] == 2


def test_length_batches_cover_everything_once():
    lengths = [5, 100, 1, 40, 40, 3000, 7]
    batches = list(length_batches(lengths, max_residues=120))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 120 for b in batches)


def fails(module, words):
    with pytest.raises(SystemExit) as stopped:
        module.main([*map(str, words), "--device", "cpu"])
    assert stopped.value.code not in (0, None)
    return str(stopped.value)


def test_mistakes_of_encoding(base, tmp_path):
    ckpt, out = ["--ckpt", base / "run"], ["--out", tmp_path / "t.fasta"]
    assert "no such file or folder" in fails(encode, [tmp_path / "none.pdb", *ckpt, *out])
    assert "tokens are kept in" in fails(encode, [base / "structures", *ckpt, "--out", tmp_path / "t.txt"])
    assert "nowhere" in fails(encode, [base / "structures", "--ckpt", tmp_path / "nowhere", *out])
    (tmp_path / "bad.pdb").write_text("ATOM      1  N   ALA A   1      11.1")
    assert "bad.pdb" in fails(encode, [base / "structures", tmp_path / "bad.pdb", *ckpt, *out])
    assert not (tmp_path / "t.fasta").exists()
    encode.main([str(base / "structures"), str(tmp_path / "bad.pdb"), *map(str, ckpt + out), "--max-bad-structures",
                 "1", "--device", "cpu"])
    assert len(read_tokens(tmp_path / "t.fasta")) == 5
    assert "would both be called s0" in fails(
        encode, [base / "structures" / "s0.pdb", base / "structures", *ckpt, *out])


def never(*_, **__):
    raise AssertionError("the mistake was found too late")


def test_encoding_checks_the_output_before_the_work(base, tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "encode_chains", never)
    (chain,) = generate_backbones(1, seed=9)
    write_structure(tmp_path / "two words.cif", chain)
    words = [tmp_path / "two words.cif", "--ckpt", base / "run", "--out"]
    assert "cannot hold a name with spaces; use .jsonl or .npz" in fails(encode, [*words, tmp_path / "t.fasta"])
    (tmp_path / "folder.npz").mkdir()
    assert "folder.npz is a folder" in fails(encode, [*words, tmp_path / "folder.npz"])
    below_a_file = tmp_path / "two words.cif" / "t.npz"
    assert "two words.cif: no files can be written there" in fails(encode, [*words, below_a_file])
    monkeypatch.setattr(evaluate, "measure", never)
    assert "folder.npz is a folder" in fails(evaluate, [*words, tmp_path / "folder.npz"])


def test_the_readmes_pair_of_commands(base, tmp_path):
    """A file and a folder, encoded together, are a reference together; what else lies there does not matter."""
    (tmp_path / "predictions" / "more").mkdir(parents=True)
    one, two = generate_backbones(2, seed=9)
    write_structure(tmp_path / "1abc.pdb", one)
    write_structure(tmp_path / "predictions" / "more" / "x_y.cif", two)
    (tmp_path / "predictions" / "bad.pdb").write_text("ATOM      1  N   ALA A   1      11.1")
    files = [tmp_path / "1abc.pdb", tmp_path / "predictions"]
    encode.main([*map(str, files), "--ckpt", str(base / "run"), "--out", str(tmp_path / "t.fasta"),
                 "--max-bad-structures", "1", "--device", "cpu"])
    decode.main([str(tmp_path / "t.fasta"), "--ckpt", str(base / "run"), "--out", str(tmp_path / "out"),
                 "--reference", *map(str, files), "--device", "cpu"])
    assert sorted(json.loads((tmp_path / "out" / "metrics.json").read_text())["of_each_chain"]) == [
        f"1abc_{one.chain_id}", f"more/x_y_{two.chain_id}"]


def test_references_are_checked_before_the_work(base, tmp_path, monkeypatch):
    monkeypatch.setattr(decode, "decode_tokens", never)
    words = [base / "tokens.fasta", "--ckpt", base / "run", "--out", tmp_path / "out", "--reference"]
    assert "chain more/s3_A is not there" in fails(decode, [*words, base / "structures" / "s0.pdb"])
    assert "no such file or folder" in fails(decode, [*words, tmp_path / "nothing"])
    (chain,) = read_structure(base / "structures" / "s0.pdb")
    write_tokens(tmp_path / "short.jsonl", [TokenChain("s0", chain.chain_id, np.array([3, 4]), "MK", ("1", "2"))])
    words[0] = tmp_path / "short.jsonl"
    assert f"has {len(chain)} residues, not 2" in fails(decode, [*words, base / "structures"])
    (tmp_path / "file").touch()
    words[4] = tmp_path / "file"
    assert "file: no files can be written there" in fails(decode, [*words, base / "structures"])


def test_references_of_another_model_and_conformation(base, tmp_path):
    """--model and --altloc mean the same to encode.py and decode.py: then both see the same atoms."""
    lines = []
    for model, (chain, (stays, goes)) in enumerate(zip(generate_backbones(2, seed=9), ("AB", "BA"), strict=True), 1):
        write_structure(tmp_path / "x.pdb", chain)
        atoms = [line for line in (tmp_path / "x.pdb").read_text().splitlines() if line.startswith("ATOM")]
        # The occupied conformation comes second, and is all that the last residue has of C.
        last = atoms[-1][22:26]
        lines += [f"MODEL     {model:4d}"]
        for line in atoms:
            if line[22:26] == last:
                if line[12:16] != " C  ":
                    lines.append(f"{line[:16]}{goes}{line[17:54]}  0.30{line[60:]}")
                lines.append(f"{line[:16]}{stays}{line[17:54]}  0.70{line[60:]}")
            else:
                lines.append(line)
        lines += ["ENDMDL"]
    (tmp_path / "x.pdb").write_text("\n".join([*lines, "END", ""]))
    same = [str(tmp_path / "x.pdb"), "--model", "2", "--altloc", "occupancy", "--device", "cpu"]
    ckpt = ["--ckpt", str(base / "run")]
    encode.main([*same, *ckpt, "--out", str(tmp_path / "t.npz")])
    (entry,) = read_tokens(tmp_path / "t.npz")
    decode.main([str(tmp_path / "t.npz"), *ckpt, "--out", str(tmp_path / "out"), "--reference", *same])
    (found,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["of_each_chain"].values()
    assert found["residues"] == len(entry.tokens) == len(chain)
    said = fails(decode, [tmp_path / "t.npz", *ckpt, "--out", tmp_path / "out", "--reference", tmp_path / "x.pdb"])
    assert "--model or --altloc" in said


def test_what_a_format_cannot_hold_is_said_before_the_work(base, tmp_path, monkeypatch):
    entries = [TokenChain("long", "AB", np.array([3, 4]), "MK", ("1", "2")),
               TokenChain("blank", "", np.array([3, -1, 4]), "MKM", ("1", "2", "3")),
               TokenChain("far", "A", np.array([3, 4]), "MK", ("1", "12000"))]
    words = ["--ckpt", base / "run", "--out", tmp_path / "out"]
    with monkeypatch.context() as patch:
        patch.setattr(decode, "decode_tokens", never)
        for entry in entries[::2]:
            write_tokens(tmp_path / "t.jsonl", [entries[1], entry])
            said = fails(decode, [tmp_path / "t.jsonl", *words])
            assert f"{entry.label}.pdb" in said
            assert "pass --format cif" in said
        write_tokens(tmp_path / "t.jsonl", [TokenChain("odd", "A", np.array([3]), "m", ("1",))])
        assert "of an unknown kind" in fails(decode, [tmp_path / "t.jsonl", *words, "--format", "cif"])
    write_tokens(tmp_path / "t.jsonl", entries)
    decode.main([str(tmp_path / "t.jsonl"), *map(str, words), "--format", "cif", "--device", "cpu"])
    assert [read_structure(tmp_path / "out" / f"{name}.cif")[0].chain_id for name in ("long_AB", "blank", "far_A")] == [
        "AB", "A", "A"]


@pytest.mark.parametrize(("change", "said"), [
    ({"tokenizer": "ab" * 32}, "of another tokenizer"),
    ({"tokens": np.array([3, 16])}, "token 16, but"),
    ({"tokens": np.array([-1, -1])}, "no tokens at all"),
    ({"name": "../../elsewhere"}, "lead out of --out"),
    ({"name": "/elsewhere"}, "lead out of --out"),
])
def test_mistakes_of_decoding(base, tmp_path, change, said):
    fields = {"name": "x", "chain": "A", "tokens": np.array([3, 4]), "sequence": "MK", "numbers": ("1", "2")} | change
    write_tokens(tmp_path / "t.jsonl", [TokenChain(**fields)])
    assert said in fails(decode, [tmp_path / "t.jsonl", "--ckpt", base / "run", "--out", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


def test_another_tokenizers_tokens_on_request(base, tmp_path):
    write_tokens(tmp_path / "t.jsonl", [TokenChain("x", "A", np.array([3, 4]), "MK", ("1", "2"), "ab")])
    decode.main([str(tmp_path / "t.jsonl"), "--ckpt", str(base / "run"), "--out", str(tmp_path), "--other-tokenizer",
                 "--device", "cpu"])
    assert (tmp_path / "x_A.pdb").exists()


@needs_proteins
def test_real_structures(base, tmp_path):
    files = [str(path) for path in sorted((PROTEINS / "structures").iterdir())[:3]]
    encode.main([*files, "--ckpt", str(base / "run"), "--out", str(tmp_path / "t.npz"), "--device", "cpu"])
    decode.main([str(tmp_path / "t.npz"), "--ckpt", str(base / "run"), "--out", str(tmp_path / "out"), "--reference",
                 *files, "--device", "cpu"])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["chains"] >= 3
