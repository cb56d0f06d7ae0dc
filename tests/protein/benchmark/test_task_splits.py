"""Splits by CATH: StructTokenBench's own, to the entry, and the strict ones."""

import json

import pytest
from places import GOLDEN

from protein.benchmark.task_splits import Cath, Label, Ratios, split_entries

SPLITS = GOLDEN / "structtokenbench_splits.json"


@pytest.mark.parametrize("case", json.loads(SPLITS.read_text()), ids=["default ratios", "ratios of Ept"])
def test_released_splits_are_those_of_the_public_code(case):
    labels = [Label((1, 10, fold, family), "A")
              for fold, family in zip(case["folds"], case["superfamilies"], strict=True)]
    found = split_entries(labels, ["x"] * len(labels), Ratios(*case["ratios"]), "released", "here")
    assert found == {name: case[name] for name in ("train", "valid", "Fold", "SupFam")}


def labelled(codes, repeats=1):
    """Entries of chains 0, 1, ..., each `repeats` times."""
    labels = [Label(code, "A") for code in codes for _ in range(repeats)]
    return labels, [str(i) for i in range(len(codes)) for _ in range(repeats)]


def test_strict_splits_keep_chains_and_superfamilies_together():
    labels, chains = labelled([(1, a, 10, h) for a in (10, 20) for h in (10, 20, 30, 40, 50) for _ in range(8)], 3)
    found = split_entries(labels, chains, Ratios(), "strict", "here")
    assert sorted(i for part in found.values() for i in part) == list(range(len(labels)))
    split_of = {}
    for name, part in found.items():
        for i in part:
            assert split_of.setdefault(chains[i], name) == name, "entries of a chain share a split"
    codes = {name: {labels[i].code for i in part} for name, part in found.items()}
    assert not codes["Fold"] & (codes["train"] | codes["SupFam"])
    assert codes["SupFam"] <= codes["train"]
    assert {code[1] for code in codes["Fold"]} == {10, 20}, "each architecture's fold is split by itself"
    released = split_entries(labels, chains, Ratios(), "released", "here")
    straddling = {chains[i] for i in released["SupFam"]} & {chains[i] for i in released["train"]}
    assert straddling, "in the released splits a chain may be in training and test: the data can tell"


def test_bare_numbers_merge_unrelated_folds():
    """Two folds 1.10.10 and 3.40.10 with one superfamily each: nothing can be held out. As one fold "10", it can."""
    labels, chains = labelled([(1, 10, 10, 5)] * 9 + [(3, 40, 10, 7)] * 9 + [(2, 20, 20, h) for h in (1, 2, 3)] * 3)
    held = {mode: {labels[i].code[:3] for i in split_entries(labels, chains, Ratios(0.5), mode, "x")["Fold"]}
            for mode in ("released", "strict")}
    assert held["strict"] == {(2, 20, 20)}
    assert held["released"] > held["strict"]


def test_too_few_entries_are_said():
    labels, chains = labelled([(1, 10, 10, 5)] * 4)
    with pytest.raises(ValueError, match="here: 0 of 4 entries are in the test of folds, too few to take a val"):
        split_entries(labels, chains, Ratios(), "released", "here")


SEQUENCES = {"1abcA01": "MKVLAAGIVGLCAKAYEDW", "1abcA02": "MKVISAGWVGLCGKAYEDF", "1abcB00": "GSTPQRNDEHHWYFILMVK",
             "2xyzA00": "MKVLAAGIVGLCAKAYEDW", "2xyzB00": "MKVLAAGIVGLCAKAYEDW"}


@pytest.fixture
def cath(tmp_path):
    for folder in ("cath-classification-data", "sequence-data"):
        (tmp_path / folder).mkdir()
    lines = ["# comment", *(f"{name} 1 {10 + i} 20 {30 + i} 1 1 1 1 1 19 1.500" for i, name in enumerate(SEQUENCES))]
    (tmp_path / "cath-classification-data" / "cath-domain-list.txt").write_text("\n".join(lines) + "\n")
    fasta = "".join(f">cath|4_3_0|{name}/1-19\n{sequence}\n" for name, sequence in SEQUENCES.items())
    (tmp_path / "sequence-data" / "cath-domain-seqs.fa").write_text(fasta)
    return tmp_path


def test_the_most_similar_domain_stands_for_an_entry(cath):
    found = Cath(cath)
    assert found.label("1abc", "A", "MKVLAAGIVGLCAKAYEDW") == ((1, 10, 20, 30), "A")
    assert found.label("1abc", "A", "MKVISAGWVGLCGKAYED") == ((1, 11, 20, 31), "A")
    assert found.label("2xyz", None, "MKVLAAGIVGLCAKAYED") == ((1, 13, 20, 33), "A")
    assert found.label("1abc", "C", "MKVLAAGIVGLCAKAYEDW") is None
    assert found.label("1abc", None, "MKVLAAGIVGLCAKAYEDW") is None, "one of the domains is less alike than chance"


def test_without_a_sequence_all_domains_of_the_entry_must_be_alike(cath):
    found = Cath(cath)
    assert found.label("1abc", None, None) is None
    assert found.label("2xyz", None, None) == ((1, 13, 20, 33), "A")


@pytest.mark.parametrize(("file", "old", "new", "message"), [
    ("cath-classification-data/cath-domain-list.txt", "1abcA01 1 10", "1abcA01 x 10", "line 2: needs a domain"),
    ("cath-classification-data/cath-domain-list.txt", " 19 1.500", "", "list.txt, line 2: needs a domain, four"),
    ("sequence-data/cath-domain-seqs.fa", "1abcA02", "9zzzA02", "line 3: domain 1abcA02 has no sequence"),
    ("sequence-data/cath-domain-seqs.fa", ">cath|4_3_0|1abcA02/1-19", ">1abcA02", "seqs.fa, line 3: .* is no header"),
    ("sequence-data/cath-domain-seqs.fa", ">cath|4_3_0|1abcA02/1-19\n", "", "seqs.fa, line 3: a sequence without"),
])
def test_damaged_files_are_named(cath, file, old, new, message):
    path = cath / file
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        Cath(cath)
