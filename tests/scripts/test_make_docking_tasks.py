"""The converter of docking benchmarks: labels, scores, pairs, and paths from another folder; rows that lack a field."""

import json
import subprocess
import sys

import numpy as np
import pytest
from helices import write_helix
from places import ROOT

from protein.benchmark.sensitivity import read_pairs
from protein.benchmark.tasks import read_task

SCRIPT = ROOT / "scripts" / "make_docking_tasks.py"


def changed(source, number, **changes):
    """The file with other values in one row."""
    lines = source.read_text().splitlines()
    lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | changes)
    source.write_text("\n".join(lines) + "\n")
    return source


def convert(source, out):
    command = [sys.executable, str(SCRIPT), str(source), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def source(tmp_path):
    rows = []
    for i, split in enumerate(("train", "train", "valid", "test")):
        unbound = write_helix(tmp_path / "proteins" / "s", f"{i}u", 6, seed=i)
        write_helix(tmp_path / "proteins" / "s", f"{i}b", 6, seed=i + 10)
        rows.append({"id": str(i), "split": split, "unbound": f"s/{i}u.pdb", "bound": f"s/{i}b.pdb",
                     "residues": ["1", "2", "3", "4", "5", "6"], "interface": [1, 0, -1, 0, 1, -1],
                     "bfactor": [9.0] * 6 if i == 1 else unbound.bfactors.tolist()})
    path = tmp_path / "proteins" / "benchmark.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_tasks_and_pairs(source, tmp_path):
    done = convert(source, tmp_path / "elsewhere" / "tasks")
    assert done.stdout == ("interface.jsonl: 4, bfactor.jsonl: 3, pairs.jsonl: 4\n"
                           "bfactor.jsonl is without 1, whose B-factors are all alike: 1\n")
    interface = read_task(tmp_path / "elsewhere" / "tasks" / "interface.jsonl")
    assert {split: len(examples) for split, examples in interface.splits.items()} == {"train": 2, "valid": 1, "test": 1}
    np.testing.assert_array_equal(interface.splits["train"][0].labels, [1, 0, np.nan, 0, 1, np.nan])
    bfactor = read_task(tmp_path / "elsewhere" / "tasks" / "bfactor.jsonl")
    assert [e.id for e in bfactor.splits["train"]] == ["0"], "all B-factors of 1 are alike"
    example = bfactor.splits["test"][0]
    expected = (example.chain.bfactors - example.chain.bfactors.mean()) / example.chain.bfactors.std()
    np.testing.assert_allclose(example.labels, expected, atol=1e-4)
    name, pairs = read_pairs(tmp_path / "elsewhere" / "tasks" / "pairs.jsonl")
    assert name == "Unbound-bound"
    assert [(pair.first.name, pair.second.name) for pair in pairs] == [(f"{i}u", f"{i}b") for i in range(4)]


def test_the_split_as_folders(source, tmp_path):
    out = tmp_path / "tasks"
    for _ in range(2):  # the same again changes nothing
        assert convert(source, out).returncode == 0
        found = {part: {file.name: file.read_text() for file in (out / part).iterdir()} for part in ("train", "val")}
        assert [sorted(files) for files in found.values()] == [["0b.pdb", "0u.pdb", "1b.pdb", "1u.pdb"],
                                                               ["2b.pdb", "2u.pdb", "3b.pdb", "3u.pdb"]]
        assert found["val"]["3u.pdb"] == (source.parent / "s" / "3u.pdb").read_text()
    moved = convert(changed(source, 2, split="test"), out)
    assert moved.stderr.strip().endswith(f"{out / 'train' / '1b.pdb'} is not of this split; remove it, or give another "
                                         f"folder than {out}")
    assert len(list((out / "val").iterdir())) == 4
    write_helix(source.parent / "other", "0u", 6, seed=5)
    same = convert(changed(source, 2, split="train", bound="other/0u.pdb"), tmp_path / "new")
    assert "have one name; in" in same.stderr
    assert not (tmp_path / "new").exists()


def test_a_row_without_a_field_is_named(source, tmp_path):
    source.write_text(source.read_text().replace('"interface"', '"surface"', 1))
    failed = convert(source, tmp_path / "tasks")
    assert failed.returncode == 1
    assert "make_docking_tasks.py: error: " in failed.stderr
    assert failed.stderr.strip().endswith("benchmark.jsonl, line 1: no field interface")


def test_an_unknown_bfactor_costs_its_residue_only(source, tmp_path):
    changed(source, 3, bfactor=[1.0, None, 3.0, 1.0, 3.0, None])
    changed(source, 4, bfactor=[None] * 6)
    done = convert(source, tmp_path / "tasks")
    assert done.stdout.splitlines()[1] == "bfactor.jsonl is without 2, whose B-factors are all alike: 1, 3"
    rows = [json.loads(line) for line in (tmp_path / "tasks" / "bfactor.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows[1:]] == ["0", "2"]
    assert rows[2]["labels"] == [-1, None, 1, -1, 1, None]


@pytest.mark.parametrize(("changes", "message"), [
    ({"interface": [1, 0, None, 0, 1, -1]}, "interface[2]: None is not 1, 0 or -1"),
    ({"interface": [1, 0, 2, 0, 1, -1]}, "interface[2]: 2 is not 1, 0 or -1"),
    ({"interface": [1, 0, True, 0, 1, -1]}, "interface[2]: True is not 1, 0 or -1"),
    ({"interface": [1, 0]}, "interface: 2 for 6 residues"),
    ({"interface": "10"}, "interface: must be a list with an entry per residue, got '10'"),
    ({"bfactor": [1.0, 2.0]}, "bfactor: 2 for 6 residues"),
    ({"bfactor": [1.0, float("nan"), 2.0, 3.0, 4.0, 5.0]}, "bfactor[1]: nan is not a finite number or null"),
    ({"bfactor": ["1"] * 6}, "bfactor[0]: '1' is not a finite number or null"),
    ({"residues": [1, 2, 3, 4, 5, 6]}, "residues[0]: 1 is not a word"),
    ({"id": 7}, "id: 7 is not a word"),
    ({"split": ""}, "split: '' is not a word"),
    ({"id": "0"}, "id: '0' is there twice in split train"),
    ({"unbound": "s/none.pdb"}, "unbound: no file {folder}/s/none.pdb"),
    ({"bound": "s"}, "bound: no file {folder}/s"),
])
def test_rows_that_do_not_fit_are_named(source, tmp_path, changes, message):
    failed = convert(changed(source, 2, **changes), tmp_path / "tasks")
    assert failed.returncode == 1
    assert failed.stderr.strip() == (f"scripts/make_docking_tasks.py: error: {source}, line 2: "
                                     + message.format(folder=source.parent))
    assert not (tmp_path / "tasks").exists()


def test_lines_that_are_no_rows(source, tmp_path):
    lines = source.read_text().splitlines()
    source.write_text("\n\n".join(lines))
    assert convert(source, tmp_path / "tasks").stdout.startswith("interface.jsonl: 4,"), "blank lines are skipped"
    for line, message in (('{"id": ', "line 3: not JSON (Expecting value)"),
                          ("[1]", "line 3: holds a list, not an object {...}")):
        source.write_text("\n".join([lines[0], "", line, *lines[1:]]))
        assert convert(source, tmp_path / "tasks").stderr.strip().endswith(f"benchmark.jsonl, {message}")
    source.write_text("\n")
    assert convert(source, tmp_path / "tasks").stderr.strip().endswith("benchmark.jsonl: no rows")
