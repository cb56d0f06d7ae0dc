"""The converter of docking benchmarks: labels, scores, pairs, and paths from another folder; rows that lack a field."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helices import write_helix

from protein.sensitivity import read_pairs
from protein.tasks import read_task

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "make_docking_tasks.py"


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
    assert done.stdout == "interface.jsonl: 4, bfactor.jsonl: 3, pairs.jsonl: 4\n"
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


def test_a_row_without_a_field_is_named(source, tmp_path):
    source.write_text(source.read_text().replace('"interface"', '"surface"', 1))
    failed = convert(source, tmp_path / "tasks")
    assert failed.returncode == 1
    assert "make_docking_tasks.py: error: " in failed.stderr
    assert failed.stderr.strip().endswith("benchmark.jsonl, line 1: no field interface")
