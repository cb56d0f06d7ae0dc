"""Structures for training: sources, cache, entries held out, crops, batches; generated chains, and real names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from helices import helix, write_helix
from places import PROTEINS, ROOT, needs_proteins

from protein import prepare_structures
from protein.losses import PADDING, sequence_ids, structure_losses
from protein.structure_cache import read_cache, structure_set, write_cache
from protein.structure_data import (
    StructureBatchSampler,
    StructureDataset,
    collate,
    entry,
    hold_out_entries,
    open_structures,
    usable_chains,
)
from protein.structure_io import write_structure
from protein.structure_model import StructureModelConfig, StructureVQModel
from tokenizer.data import make_loader
from tokenizer.runtime.seeding import StepSampler

LENGTHS = (12, 30, 7, 25, 18)


def chains(lengths=LENGTHS):
    """Helices of different entries; the second with a gap in its numbers, the fourth with an incomplete residue."""
    out = [helix(f"{i + 1}abc", length, seed=i) for i, length in enumerate(lengths)]
    out[1].residue_numbers[10:] += 5
    out[1].coords[10:] += 30.0
    out[3].coords[4, 2] = np.nan
    return out


@pytest.fixture
def folder(tmp_path):
    """Structure files, one with two chains and one in a subfolder."""
    path = tmp_path / "pdb"
    write_helix(path, "1abc", 12)
    write_structure(path / "2abc.cif", [helix("2abc", 30, chain_id="A"), helix("2abc", 9, chain_id="B", seed=3)])
    write_helix(path / "deep", "3abc", 7, seed=4)
    return path


# ------------------------------------------------------------------------------------------------- sources and cache


def assert_equal_sets(a, b):
    assert (a.names, a.chain_ids, a.fingerprint()) == (b.names, b.chain_ids, b.fingerprint())
    np.testing.assert_array_equal(a.offsets, b.offsets)
    np.testing.assert_array_equal(a.observed, b.observed)
    for left, right in zip(a.arrays, b.arrays, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


def test_a_set_holds_what_its_chains_hold():
    made = chains()
    found = structure_set(made)
    assert len(found) == len(made)
    assert found.lengths.tolist() == list(LENGTHS)
    assert found.observed.tolist() == [12, 30, 7, 24, 18]
    for i, (chain, arrays) in enumerate(zip(made, found, strict=True)):
        np.testing.assert_array_equal(arrays.coords, chain.coords)
        np.testing.assert_array_equal(arrays.mask, chain.mask)
        np.testing.assert_array_equal(arrays.residue_index, chain.residue_index())
        np.testing.assert_array_equal(arrays.bfactors, chain.bfactors)
        assert arrays.sequence.tolist() == sequence_ids(chain.sequence).tolist()
        np.testing.assert_array_equal(found.residues(i, 2, 6).coords, chain.coords[2:6])
    for wrong in (-1, 5):
        with pytest.raises(IndexError):
            found[wrong]
    with pytest.raises(ValueError, match="no chains"):
        structure_set([])


def test_fingerprint_notices_every_change():
    def changed(change):
        made = chains()
        if change:
            change(made)
        return structure_set(made).fingerprint()

    changes = [
        None,
        lambda c: c.pop(),
        lambda c: c.reverse(),
        lambda c: c[0].coords.__setitem__((0, 0, 0), 1.0),
        lambda c: c[2].bfactors.__setitem__(0, 1.0),
        lambda c: c[1].residue_numbers.__iadd__(np.arange(30) // 10),
        lambda c: c.__setitem__(0, helix("9abc", 12)),
        lambda c: c.__setitem__(0, helix("1abc", 12, chain_id="B")),
        lambda c: c.__setitem__(0, helix("1abc", 12, sequence="A" * 12)),
    ]
    assert len({changed(change) for change in changes}) == len(changes) == 9
    assert changed(None) == changed(None)


def test_folder_and_its_cache_are_the_same_set(folder, tmp_path, capsys):
    opened = open_structures(folder)
    assert opened.names == ["1abc", "2abc", "2abc", "deep/3abc"]
    assert opened.chain_ids == ["A", "A", "B", "A"]
    (folder / "broken.pdb").write_text("ATOM  nothing\n")
    prepare_structures.main([str(folder), "--out", str(tmp_path / "cache"), "--num-workers", "0"])
    printed = capsys.readouterr()
    assert "4 chains of 3 files, 58 residues, 0 of them without N, CA or C; 1 files skipped" in printed.out
    assert f"skipped {folder / 'broken.pdb'}" in printed.err
    assert_equal_sets(open_structures(tmp_path / "cache"), opened)
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert manifest["files"] == 4
    assert len(manifest["skipped"]) == 1
    assert not list(tmp_path.glob(".cache*"))
    cached = read_cache(tmp_path / "cache")
    assert not cached.arrays.coords.flags.writeable  # mapped, not read


def test_unreadable_files_are_named_and_counted(folder, capsys):
    for name in ("bad1.pdb", "bad2.pdb"):
        (folder / name).write_text("")
    with pytest.raises(ValueError, match=r"1 unreadable structure file.*bad1\.pdb"):
        open_structures(folder)
    assert len(open_structures(folder, max_bad=2)) == 4
    printed = capsys.readouterr().out
    assert printed.count("skipped") == 2
    assert str(folder / "bad2.pdb") in printed


def test_paths_that_are_no_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_structures(tmp_path / "absent")
    with pytest.raises(ValueError, match="no structure files"):
        open_structures(tmp_path)
    write_helix(tmp_path, "1abc")
    with pytest.raises(ValueError, match="is a file; name the folder"):
        open_structures(tmp_path / "1abc.pdb")


def test_generated_backbones_can_be_divided():
    generated = open_structures(None, ideal_chains=5, seed=1)
    assert len(generated) == 5
    assert generated.fingerprint() == open_structures(None, ideal_chains=5, seed=1).fingerprint()
    assert generated.fingerprint() != open_structures(None, ideal_chains=5, seed=2).fingerprint()
    train, held_out = hold_out_entries(generated, np.arange(5), 0.4, 0)
    assert len(train) == 3
    assert len(held_out) == 2


@pytest.mark.parametrize(("file", "damage", "message"), [
    ("coords.npy", lambda p: p.unlink(), "missing"),
    ("coords.npy", lambda p: os.truncate(p, 1000), "cut short"),
    ("sequence.npy", lambda p: p.write_bytes(b""), "cut short"),
    ("bfactors.npy", lambda p: np.save(p, np.zeros(92)), "float64"),
    ("residue_index.npy", lambda p: np.save(p, np.zeros(91, dtype=np.int32)), r"\(91,\)"),
    ("observed.npy", lambda p: np.save(p, np.zeros(4, dtype=np.int32)), r"\(4,\)"),
    ("offsets.npy", lambda p: np.save(p, np.array([0, 12, 42, 40, 74, 92])), "does not divide"),
    ("offsets.npy", lambda p: np.save(p, np.array([0, 12, 42, 49, 74, 91])), "does not divide"),
    ("names.json", lambda p: p.write_text('{"names": ["1abc"], "chain_ids": ["A"]}'), "names of 5 chains"),
    ("names.json", lambda p: p.write_text('{"names": 3}'), "names of 5 chains"),
    ("names.json", lambda p: p.write_text('{"names": [1, 2, 3, 4, 5], "chain_ids": ["A", "A", "A", "A", "A"]}'),
     "names of 5 chains"),
    ("names.json", lambda p: p.unlink(), "no such file"),
    ("manifest.json", lambda p: p.write_text('{"format": "provq-structures-0"}'), "expected 'provq-structures-1'"),
    ("manifest.json", lambda p: p.write_text('{"format": "provq-structures-1"}'), "lacks"),
    ("manifest.json", lambda p: os.truncate(p, 20), "not JSON"),
    ("manifest.json", lambda p: p.unlink(), "prepare_structures.py; run it again"),
])
def test_a_damaged_cache_says_which_file(tmp_path, file, damage, message):
    cache = tmp_path / "cache"
    assert_equal_sets(write_cache(cache, chains(), {}), structure_set(chains()))
    damage(cache / file)
    with pytest.raises(ValueError, match=message) as error:
        open_structures(cache)
    assert file in str(error.value)


def test_a_cache_appears_whole_or_not_at_all(tmp_path):
    def stopped():
        yield chains()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cache(tmp_path / "cache", stopped(), {})
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="no chains"):
        write_cache(tmp_path / "cache", [], {})
    assert not list(tmp_path.iterdir())
    (tmp_path / ".cache.tmp").mkdir()  # of a killed run
    (tmp_path / ".cache.tmp" / "coords.npy").write_text("half")
    write_cache(tmp_path / "cache", chains(), {})
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    with pytest.raises(ValueError, match="exists already"):
        write_cache(tmp_path / "cache", chains(), {})


def test_command_line(folder, tmp_path):
    def run(*words):
        script = ROOT / "protein" / "prepare_structures.py"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        return subprocess.run([sys.executable, str(script), *words], cwd="/", env=environment, capture_output=True,
                              text=True, timeout=120)

    done = run(str(folder), "--out", str(tmp_path / "cache"), "--num-workers", "1")
    assert done.returncode == 0, done.stderr
    assert "4 chains of 3 files" in done.stdout
    assert len(open_structures(tmp_path / "cache")) == 4


@pytest.mark.parametrize(("words", "message"), [
    (["{folder}", "--out", "{folder}"], "exists already"),
    (["{folder}/absent", "--out", "{folder}/new"], "no such file or folder"),
    (["{folder}", "--out", "{folder}/new", "--num-workers", "-1"], "--num-workers is -1; it must be at least 0"),
    (["{folder}", "--out", "{folder}/new", "--num-workers", "0", "--max-bad-structures", "0"], "bad.pdb"),
])
def test_mistakes_on_the_command_line(folder, words, message, capsys):
    (folder / "bad.pdb").write_text("")
    with pytest.raises(SystemExit) as error:
        prepare_structures.main([word.format(folder=folder) for word in words])
    assert message in str(error.value) + capsys.readouterr().err
    assert not (folder / "new").exists()


# ------------------------------------------------------------------------------------------------- which chains


def test_chains_too_short_and_too_long():
    found = structure_set(chains())  # of 12, 30, 7, 25 residues with one incomplete, and 18
    assert usable_chains(found, min_length=8, max_length=20) == (pytest.approx([0, 1, 3, 4]), 1, 0)
    assert usable_chains(found, min_length=25, max_length=20) == (pytest.approx([1]), 4, 0)
    assert usable_chains(found, min_length=8, max_length=25, overlong="drop") == (pytest.approx([0, 3, 4]), 1, 1)
    with pytest.raises(ValueError, match=r"none of 5 chains is left: 4 have fewer than 25 .* 1 more than 20"):
        usable_chains(found, min_length=25, max_length=20, overlong="drop")
    with pytest.raises(ValueError, match="overlong 'cut' is none of crop, drop"):
        usable_chains(found, min_length=1, max_length=20, overlong="cut")


@pytest.mark.parametrize(("names", "expected"), [
    (["1abc", "1ABC_A", "1abc-assembly1", "x/ab/pdb1abc", "pdb_00001abc", "1abcA01", "d1abca_", "1abc_l_u"], "1abc"),
    (["AF-P12345-F1-model_v4", "AF-P12345-F12-model_v4", "up/AF-P12345-F1-model_v6"], "AF-P12345"),
    (["pdb_12345abc", "pdb_12345abc_xyz-enrich"], "12345abc"),
    (["BAAD_l_b", "BAAD_r_u", "folder/BAAD"], "BAAD"),
    (["T1024", "T1024_D1"], "T1024"),
    (["1914_A", "x/1914"], "1914"),  # all digits: a number, or a PDB id
    (["19140", "19140_relaxed"], "19140"),
    (["MGYP000911143359"], "MGYP000911143359"),
    (["design", "design_12"], "design"),
])
def test_entry(names, expected):
    assert {entry(name) for name in names} == {expected}


@needs_proteins
def test_entries_of_real_files_are_their_complexes():
    for line in (PROTEINS / "benchmark.jsonl").read_text().splitlines():
        row = json.loads(line)
        for form in ("unbound", "bound"):
            name = Path(row[form]).name.removesuffix(".pdb.gz")
            assert entry(name).lower() == row["complex"].lower()


def test_entries_are_held_out_whole():
    names = [f"{i:02d}ab_{chain}" for i in range(50) for chain in "xyz"]
    found = structure_set(helix(name, 3) for name in names)
    indices = np.arange(0, 150, 2)
    train, held_out = hold_out_entries(found, indices, 0.2, seed=0)
    assert sorted([*train, *held_out]) == indices.tolist()
    assert len({names[i][:4] for i in held_out}) == 10
    assert not {names[i][:4] for i in held_out} & {names[i][:4] for i in train}
    assert (np.diff(train) > 0).all()
    assert (np.diff(held_out) > 0).all()
    assert not np.array_equal(held_out, hold_out_entries(found, indices, 0.2, seed=1)[1])
    # The same on every machine, and few change sides when others join.
    assert sorted({names[i][:4] for i in held_out})[:3] == ["08ab", "09ab", "13ab"]
    more = structure_set(helix(name, 3) for name in [*names, "99zz"])
    assert np.array_equal(hold_out_entries(more, indices, 0.2, seed=0)[1], held_out)
    assert len({names[i][:4] for i in hold_out_entries(found, indices, 0.001, 0)[1]}) == 1
    nothing = hold_out_entries(found, indices, 0.0, 0)
    assert (len(nothing[0]), len(nothing[1])) == (75, 0)
    with pytest.raises(ValueError, match=r"cannot hold out 1 of 1 entries .*04ab.* folder of its own"):
        hold_out_entries(found, np.array([12, 13]), 0.1, 0)


# ------------------------------------------------------------------------------------------------- items and batches


@pytest.fixture(scope="module")
def dataset():
    return StructureDataset(structure_set(chains()), [4, 1, 3, 0], max_length=20, seed=7)


def test_an_item_is_a_chain_about_its_centre(dataset):
    chain = chains()[0]
    item = dataset[3]
    assert item["index"] == 0
    assert item["coords"].shape == (12, 3, 3)
    np.testing.assert_allclose(item["coords"][:, 1].mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(np.diff(item["coords"], axis=0), np.diff(chain.coords[:, :3], axis=0), atol=1e-5)
    assert item["sequence"].tolist() == sequence_ids(chain.sequence).tolist()
    assert item["residue_index"].tolist() == list(range(12))
    assert {key: value.dtype for key, value in item.items() if key != "index"} == {
        "coords": torch.float32, "residue_index": torch.int64, "sequence": torch.int64}
    # An incomplete residue keeps what it has, and does not move the centre.
    incomplete = StructureDataset(structure_set(chains()), [3], max_length=99)[0]["coords"]
    assert incomplete.isfinite().all(-1).all(-1).tolist() == [i != 4 for i in range(25)]
    assert incomplete[4, :2].isfinite().all()
    np.testing.assert_allclose(incomplete[np.arange(25) != 4, 1].mean(0), 0, atol=1e-5)


def test_crops_are_contiguous_and_a_function_of_seed_epoch_and_index(dataset):
    made = chains()[1]  # 30 residues with a break; crops have 20
    index = made.residue_index()
    starts = []
    for epoch in range(200):
        item = dataset[epoch, 1]
        start = int(np.flatnonzero(index == item["residue_index"][0].item())[0])
        assert item["residue_index"].tolist() == index[start : start + 20].tolist()
        assert item["sequence"].tolist() == sequence_ids(made.sequence)[start : start + 20].tolist()
        steps_between = np.diff(made.coords[start : start + 20, :3], axis=0)
        np.testing.assert_allclose(np.diff(item["coords"], axis=0), steps_between, atol=2e-5)
        np.testing.assert_allclose(item["coords"][:, 1].mean(0), 0, atol=1e-5)
        starts.append(start)
    assert set(starts) == set(range(11))
    other = StructureDataset(dataset.structures, [1], max_length=20, seed=7)  # another subset, the same crop
    for epoch in range(5):
        assert torch.equal(other[epoch, 0]["residue_index"], dataset[epoch, 1]["residue_index"])
    assert torch.equal(dataset[1]["coords"], dataset[0, 1]["coords"])
    again = StructureDataset(dataset.structures, [1], max_length=20, seed=8)
    assert any(again[e, 0]["residue_index"][0] != dataset[e, 1]["residue_index"][0] for e in range(5))


def test_a_chain_without_whole_residues_is_still_an_item():
    chain = helix("1abc", 5)
    chain.coords[:, 0] = np.nan
    item = StructureDataset(structure_set([chain]), [0], max_length=9)[0]
    np.testing.assert_array_equal(item["coords"], chain.coords[:, :3])


@pytest.mark.parametrize(("indices", "max_length"), [([], 5), ([5], 5), ([-1], 5), ([0], 0)])
def test_subsets_that_do_not_fit(indices, max_length):
    with pytest.raises(ValueError, match=r"empty|must be positive"):
        StructureDataset(structure_set(chains()), indices, max_length=max_length)


def test_a_batch_is_padded(dataset):
    items = [dataset[i] for i in (3, 2)]
    batch = collate(items)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in batch.items()} == {
        "coords": (torch.float32, (2, 20, 3, 3)), "residue_index": (torch.int64, (2, 20)),
        "sequence": (torch.int64, (2, 20)), "mask": (torch.bool, (2, 20)), "index": (torch.int64, (2,)),
        "length": (torch.int64, (2,)), "places": (torch.int64, (len(batch["places"]),)),
    }
    known = batch["coords"].isfinite().all(-1).all(-1).flatten()
    assert batch["places"].tolist() == [i for i in range(40) if known[i]]
    assert batch["mask"].sum(1).tolist() == batch["length"].tolist() == [12, 20]
    assert batch["index"].tolist() == [0, 3]
    assert batch["coords"][0, 12:].isnan().all()
    assert (batch["sequence"][0, 12:] == PADDING).all()
    assert (batch["residue_index"][0, 12:] == 0).all()
    for row, item in enumerate(items):
        for key in ("coords", "residue_index", "sequence"):
            found = batch[key][row, : len(item[key])]
            torch.testing.assert_close(found, item[key], rtol=0, atol=0, equal_nan=True)


def test_batches_do_not_depend_on_workers(dataset):
    sampler = StructureBatchSampler(dataset.lengths, 2, seed=0, end_step=5)
    expected = list(make_loader(dataset, sampler, collate=collate))
    found = list(make_loader(dataset, sampler, num_workers=2, collate=collate))
    assert len(expected) == len(found) == 5
    for a, b in zip(expected, found, strict=True):
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=0, equal_nan=True)


def test_a_batch_trains_a_model(dataset):
    torch.manual_seed(0)
    batch = collate([dataset[i] for i in range(4)])
    config = StructureModelConfig(encoder_width=32, encoder_heads=4, encoder_layers=1, decoder_width=32,
                                  decoder_heads=2, decoder_layers=1, codebook_size=8, codebook_embed_dim=8)
    out = StructureVQModel(config)(batch["coords"], batch["mask"], batch["residue_index"])
    assert out.mask.sum(1).tolist() == [18, 20, 19 if batch["coords"][2].isnan().any() else 20, 12]
    terms = structure_losses(out, batch["coords"], batch["sequence"], batch["residue_index"])
    sum(terms.values()).backward()
    assert all(value.isfinite() for value in terms.values())


# ------------------------------------------------------------------------------------------------- order of batches


RNG = np.random.default_rng(0)
MANY = RNG.integers(20, 513, 203)


def steps(end=60, **options):
    return list(StructureBatchSampler(MANY, 8, seed=3, end_step=end, **{"window": 8, **options}))


def test_every_chain_once_per_epoch():
    batches = steps(8 * 203)  # the first windows that end with an epoch, the 64th
    assert all(len(batch) == 8 for batch in batches)
    counted = Counter(key for batch in batches for key in batch)
    assert counted == Counter((epoch, i) for epoch in range(64) for i in range(203))
    seen = [key[0] for batch in batches for key in batch]
    assert max(abs(epoch - position // 203) for position, epoch in enumerate(seen)) == 1  # windows reach over an end
    assert steps(203) == batches[:203]
    assert list(StructureBatchSampler(MANY, 8, seed=4, window=8, end_step=203)) != batches[:203]


@pytest.mark.parametrize(("world", "micro_batches"), [(2, 1), (1, 4), (2, 2), (8, 1)])
def test_rows_of_a_step_do_not_depend_on_processes(world, micro_batches):
    whole = steps(20)
    parts = [steps(20, rank=rank, world=world, micro_batches=micro_batches) for rank in range(world)]
    for step in range(20):
        rows = [key for micro in range(micro_batches) for part in parts for key in part[step * micro_batches + micro]]
        assert rows == whole[step]


@pytest.mark.parametrize("start", [1, 7, 8, 9, 24, 25, 26, 59])
def test_resumed_at_any_step(start):
    assert steps(start_step=start) == steps()[start:]


def padding(batches):
    lengths = [MANY[[i for _, i in batch]] for batch in batches]
    return 1 - sum(x.sum() for x in lengths) / sum(len(x) * x.max() for x in lengths)


def test_batches_hold_similar_lengths_in_any_order():
    plain = list(StepSampler(203, 8, seed=3, end_step=60))
    assert padding(plain) > 0.3
    assert padding(steps()) < 0.5 * padding(plain)
    assert padding(steps(window=25)) < 0.25 * padding(plain)
    assert steps(window=1) == [sorted(batch, key=lambda key: MANY[key[1]]) for batch in plain]
    assert steps(window=10**6) == steps(window=25)  # not beyond an epoch
    longest = [max(MANY[i] for _, i in batch) for batch in steps()]
    rises = np.diff(longest) > 0
    assert 0.25 < rises.mean() < 0.75  # batches are shuffled
    assert len(set(np.argmax(np.reshape(longest[:56], (7, 8)), axis=1))) > 2  # in each window anew


def test_few_chains_for_large_batches():
    batches = list(StructureBatchSampler([5, 9, 7], 8, seed=0, end_step=3))
    assert Counter(key for batch in batches for key in batch) == Counter((e, i) for e in range(8) for i in range(3))


def test_samplers_that_make_no_sense():
    with pytest.raises(ValueError, match="window 0"):
        StructureBatchSampler(MANY, 8, seed=0, window=0)
    with pytest.raises(ValueError, match="empty"):
        StructureBatchSampler([], 8, seed=0)
    with pytest.raises(ValueError, match="not divisible"):
        StructureBatchSampler(MANY, 8, seed=0, world=3)
