"""Tasks from JSONL files: labels on the right residues, garbage by name, what is left out, prepared files."""

import json
import os
import re
from collections import Counter

import numpy as np
import pytest
from helices import helix, write_helix

from protein.benchmark.tasks import (
    STRUCTTOKENBENCH,
    Example,
    Task,
    TaskSpec,
    align_ids,
    load_prepared,
    read_task,
    residue_ids,
    save_prepared,
    task_identity,
)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def binary_rows(**changes):
    """A header and one example per split, all of the same structure of five residues."""
    rows = [{"task": "toy", "kind": "binary"}]
    for split in ("train", "valid", "test", "other"):
        rows.append({"id": "a", "split": split, "structure": "pdb/one.pdb", "labels": [0, 1, None, 1, 0]})
    rows[1] |= changes
    return [{k: v for k, v in row.items() if v is not ...} for row in rows]


@pytest.fixture
def folder(tmp_path):
    write_helix(tmp_path / "pdb", "one", 5, numbers=[7, 8, 8, 9, 11], codes=["", "", "A", "", ""])
    return tmp_path


def test_the_benchmark_has_12_tasks_and_24_test_splits():
    assert len(STRUCTTOKENBENCH) == 12
    assert sum(len(spec.tests) for spec in STRUCTTOKENBENCH.values()) == 24
    kinds = Counter(spec.kind for spec in STRUCTTOKENBENCH.values())
    assert kinds == {"binary": 8, "regression": 3, "classification": 1}


def test_labels_in_the_order_of_the_structure(folder):
    task = read_task(write_rows(folder / "t.jsonl", binary_rows()))
    assert task.spec == TaskSpec("toy", "binary", "Own tasks", ("test", "other"))
    assert list(task.splits) == ["train", "valid", "test", "other"]
    example = task.splits["train"][0]
    np.testing.assert_array_equal(example.labels, [0, 1, np.nan, 1, 0])
    assert residue_ids(example.chain) == ["7", "8", "8A", "9", "11"]
    assert all(examples[0].chain is example.chain for examples in task.splits.values()), "one file is read once"


def test_labels_by_residue_numbers(folder):
    """Listed in any order; residue 100 is not in the structure, 7 and 9 are not in the list."""
    rows = binary_rows(residues=["11", "8A", "100", "8"], labels=[1, 0, 1, None])
    labels = read_task(write_rows(folder / "t.jsonl", rows)).splits["train"][0].labels
    np.testing.assert_array_equal(labels, [np.nan, np.nan, 0, np.nan, 1])


def test_repeated_residue_numbers_are_aligned_in_order():
    """The longest common subsequence: a gap costs nothing, a mismatch is never taken."""
    assert align_ids(["1", "2", "2", "3"], ["2", "2", "3", "9"]).tolist() == [-1, 0, 1, 2]
    assert align_ids(["5", "5"], ["4", "5", "6", "5", "7"]).tolist() == [1, 3]
    assert align_ids(["1", "1"], ["2", "3"]).tolist() == [-1, -1]


def test_classes_are_the_sorted_labels_of_training(folder):
    rows = [{"task": "folds", "kind": "classification", "category": "Mine"}]
    for split, label in (("train", "b"), ("train", "a"), ("valid", "a"), ("test", "b")):
        rows.append({"id": label, "split": split, "structure": "pdb/one.pdb", "label": label})
    rows[1]["residues"] = ["8", "8A", "9"]
    task = read_task(write_rows(folder / "t.jsonl", rows))
    assert task.classes == ("a", "b")
    assert task.spec.category == "Mine"
    np.testing.assert_array_equal(task.splits["train"][0].labels, [np.nan, 1, 1, 1, np.nan])
    np.testing.assert_array_equal(task.splits["train"][1].labels, np.zeros(5))
    rows[-1]["label"] = "c"
    with pytest.raises(ValueError, match=r"t.jsonl, line 5: label: 'c' does not occur in the training split"):
        read_task(write_rows(folder / "t.jsonl", rows))
    rows[-1]["label"] = None
    with pytest.raises(ValueError, match="line 5: label: None is neither a word nor an integer"):
        read_task(write_rows(folder / "t.jsonl", rows))


def test_integer_classes_are_ordered_by_value(folder):
    rows = [{"task": "folds", "kind": "classification"}]
    rows += [{"id": str(i), "split": "train", "structure": "pdb/one.pdb", "label": i} for i in (10, 9)]
    rows += [{"id": "x", "split": split, "structure": "pdb/one.pdb", "label": 10} for split in ("valid", "test")]
    assert read_task(write_rows(folder / "t.jsonl", rows)).classes == ("9", "10")


@pytest.mark.parametrize(("changes", "message"), [
    ({"labels": [0, 1, 2, 1, 0]}, r"line 2: labels\[2\]: 2 is neither 0, 1 nor null"),
    ({"labels": [0, True, 0, 1, 0]}, r"line 2: labels\[1\]: True is neither"),
    ({"labels": [0, 1]}, "line 2: labels: 2 for 5 residues of the structure"),
    ({"residues": ["7"], "labels": [0, 1]}, "line 2: labels: 2 for 1 residues of the field residues"),
    ({"residues": [7], "labels": [0]}, "line 2: residues: must be a list of words"),
    ({"labels": "01010"}, "line 2: labels: must be a list, got str"),
    ({"split": ...}, "line 2: split: None is not a word"),
    ({"id": 3}, "line 2: id: 3 is not a word"),
    ({"structure": "pdb/two.pdb"}, "line 2: structure: no file .*two.pdb"),
    ({"structure": "t.jsonl"}, "line 2: structure: .*not the name of a structure file"),
    ({"chain": "B"}, r"line 2: chain: 'B'; .*one.pdb has 'A'"),
    ({"split": "valid"}, "id: 'a' is there twice in split valid|no example of split train"),
])
def test_garbage_is_named(folder, changes, message):
    with pytest.raises(ValueError, match=r"t\.jsonl.*") as error:
        read_task(write_rows(folder / "t.jsonl", binary_rows(**changes)))
    assert re.search(message, str(error.value)), str(error.value)


@pytest.mark.parametrize(("text", "message"), [
    ("", "empty"),
    ("[1]\n", "line 1: holds a list"),
    ('{"task": "a", "kind": "binry"}\n', "line 1: kind: 'binry' is none of binary, regression, classification"),
    ('{"task": "a", "kind": "binary", "colour": 1}\n', "line 1: unknown field colour"),
    ('{"task": "a", "kind": "binary", "modified_residues": "true"}\n',
     "line 1: modified_residues: 'true' is neither true nor false"),
    ('{"task": "a", "kind": "binary", "modified_residues": null}\n', "line 1: modified_residues: None is neither"),
    ('{"task": "a", "kind": "binary", "min_plddt": "70"}\n', "line 1: min_plddt: '70' is no number of at least 0"),
    ('{"task": "a", "kind": "binary", "plddt_from": "x"}\n', "line 1: plddt_from: 'x' is none of b_factor, qa_metric"),
    ('{"task": "a", "kind": "binary"}\n{"id": \n', "line 2: not JSON"),
    ('{"task": "a", "kind": "binary"}\n', "no example of split train"),
])
def test_garbage_files_are_named(tmp_path, text, message):
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"t.jsonl.*{message}"):
        read_task(path)


def test_the_identity_of_a_task_is_its_file_and_its_structures(folder):
    path = write_rows(folder / "t.jsonl", binary_rows())
    before = task_identity(path)
    assert task_identity(path) == before
    structure = folder / "pdb" / "one.pdb"
    text, stat = structure.read_text(), structure.stat()
    structure.write_text(text.replace(" 1.00 ", " 0.50 ", 1))
    os.utime(structure, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert structure.stat().st_size == stat.st_size
    assert task_identity(path) != before, "neither size nor time tells"
    structure.write_text(text)
    assert task_identity(path) == before
    write_rows(path, binary_rows(labels=[1, 1, None, 1, 0]))
    assert task_identity(path) != before
    structure.unlink()
    with pytest.raises(ValueError, match=r"t.jsonl, line 2: structure: no file .*one.pdb"):
        task_identity(path)
    write_rows(path, binary_rows(structure=None))
    with pytest.raises(ValueError, match=r"t.jsonl, line 2: structure: None is not a word"):
        task_identity(path)


def example(name, length, labels=None, known=None):
    values = np.zeros(length, np.float32) if labels is None else np.array(labels, np.float32)
    if known is not None:
        values[known:] = np.nan
    return Example(name, helix(name, length), values)


def test_long_and_unlabelled_examples_are_left_out_and_counted():
    spec = TaskSpec("toy", "binary", "c", ("test",))
    splits = {"train": [example("a", 10), example("b", 11), example("c", 5, known=0)], "valid": [example("d", 10)],
              "test": [example("e", 3)]}
    task = Task(spec, splits).filtered(max_length=10)
    assert [e.id for e in task.splits["train"]] == ["a"]
    assert task.left_out == {"more than 10 residues": 1, "no label": 1}
    with pytest.raises(ValueError, match=r"no examples in train, valid; left out: more than 4 residues \(3\), no"):
        Task(spec, splits).filtered(max_length=4)


def test_classification_counts_the_residues_that_are_looked_at():
    spec = TaskSpec("toy", "classification", "c", ("test",))
    splits = {name: [example(name, 30, known=10)] for name in ("train", "valid", "test")}
    assert Task(spec, splits).filtered(max_length=10).left_out == {}
    with pytest.raises(ValueError, match="a chain of more than 20 residues"):
        Task(spec, splits).filtered(max_length=10, max_chain=20)


def test_prepared_tasks_come_back_as_they_were(tmp_path):
    shared = helix("shared", 6, codes=["", "A", "", "", "", ""])
    spec = TaskSpec("toy", "regression", "c", ("test",))
    task = Task(spec, {"train": [Example("a", shared, np.array([1, np.nan, 3, 4, 5, 6], np.float32)), example("b", 4)],
                       "valid": [Example("a", shared, np.ones(6, np.float32))], "test": [example("t", 3)]},
                ("x", "y"), Counter({"lost": 2}))
    save_prepared(task, tmp_path / "toy.npz", "version 1")
    again = load_prepared(tmp_path / "toy.npz", "version 1")
    assert (again.spec, again.classes, again.left_out) == (spec, ("x", "y"), {"lost": 2})
    assert again.splits["train"][0].chain is again.splits["valid"][0].chain
    for split, examples in task.splits.items():
        for before, after in zip(examples, again.splits[split], strict=True):
            assert before.id == after.id
            np.testing.assert_array_equal(before.labels, after.labels)
            for name, value in vars(before.chain).items():
                np.testing.assert_array_equal(getattr(after.chain, name), value)
    assert load_prepared(tmp_path / "toy.npz", "version 2") is None
    assert load_prepared(tmp_path / "other.npz", "version 1") is None
    (tmp_path / "toy.npz").write_bytes((tmp_path / "toy.npz").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"toy\.npz: damaged"):
        load_prepared(tmp_path / "toy.npz", "version 1")
