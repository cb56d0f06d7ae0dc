"""All tasks of StructTokenBench, read from miniature archives in the formats of their databases; and from damaged ones.
"""

import functools
import gzip
import json
import re
import shutil
import sys

import numpy as np
import pytest
from helices import helix
from mini_archive import CHAINS, START, MiniArchive, chain, code, write

from protein.benchmark import task_archives
from protein.benchmark.archive_files import parse_biolip_residues, parse_scop_residues, read_obsolete, read_pdbtosp
from protein.benchmark.task_archives import HOMO_FOLDS, Archive, read_chains, read_raw
from protein.benchmark.tasks import STRUCTTOKENBENCH

CATH_SPLITS = ("train", "valid", "Fold", "SupFam")


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    archive = MiniArchive(tmp_path_factory.mktemp("archive"))
    for fill in (archive.interpro, archive.biolip, archive.proteinshake, archive.epitopes, archive.atlas,
                 archive.homology):
        fill()
    return archive


@pytest.fixture(scope="module")
def archive(mini):
    return Archive.open(mini.root, mini.pdb)


@functools.cache
def read(archive, name):
    return read_raw(archive, name)


@pytest.fixture
def fresh(tmp_path, request, monkeypatch):
    """An archive with one source, to be damaged. Structures are not written: the damage is found before."""
    monkeypatch.setattr("mini_archive.write_structure", lambda *_: None)
    archive = MiniArchive(tmp_path)
    getattr(archive, request.param)()
    return archive


def number(example):
    """Which of the archive's chains it is of."""
    return int(example.chain.name[2:4])


def labels_of(task):
    return {number(e): e.labels for examples in task.splits.values() for e in examples}


@pytest.mark.parametrize("name", STRUCTTOKENBENCH)
def test_every_task_has_its_splits(archive, name):
    task = read(archive, name)
    assert task.spec == STRUCTTOKENBENCH[name]
    assert list(task.splits) == ["train", "valid", *task.spec.tests]
    assert all(task.splits.values())
    assert task.filtered().splits.keys() == task.splits.keys()
    for examples in task.splits.values():
        for e in examples:
            np.testing.assert_array_equal(e.chain.coords, chain(number(e)).coords)
    if tuple(task.splits) == CATH_SPLITS:
        codes = {split: {code(number(e)) for e in task.splits[split]} for split in CATH_SPLITS}
        assert not codes["Fold"] & codes["train"]
        assert codes["SupFam"] <= codes["train"]


@pytest.mark.parametrize(("name", "more"), [("BindInt", 1), ("CatInt", 0), ("Con", 0), ("Rep", 0)])
def test_interpro_marks_the_range_of_the_fragment(archive, name, more):
    task = read(archive, name)
    found = labels_of(task)
    assert sorted(found) == list(range(CHAINS))
    for i, labels in found.items():
        np.testing.assert_array_equal(np.flatnonzero(labels), np.array([6, 7, 8]) - START, err_msg=str(i))
    assert task.left_out == ({"no annotated residue in the structure": more} if more else {})


def test_pdbtosp_lists_several_accessions_per_entry(mini):
    found = read_pdbtosp(mini.local / "interpro" / "pdbtosp.txt")
    assert found["P00059"] == found["O11111"] == found["P11111"] == ["1a59"]
    assert len(found) == CHAINS + 2


def test_biolip_marks_residues_by_number(archive):
    """Binding: places 1 and 4 (insertion code or not), number 999 is not there. Catalysis: place 2, whatever letter."""
    binding, catalysis = read(archive, "BindBio"), read(archive, "CatBio")
    for task, places in ((binding, [1, 4]), (catalysis, [2])):
        found = labels_of(task)
        assert sorted(found) == list(range(CHAINS))
        assert all(np.flatnonzero(labels).tolist() == places for labels in found.values())
        assert sum(map(len, task.splits.values())) == CHAINS
    assert binding.left_out == {"not in CATH, or not clearly one of its domains": 1, "a rare ligand": 2,
                                "no binding residues": 1}


def test_of_residues_with_one_number_the_letter_decides():
    twins = helix(length=4, numbers=[5, 5, 5, 6], codes=["", "A", "B", ""], sequence="GKKW")
    assert task_archives._residue_labels([("K", 5), ("A", 6)])(twins).tolist() == [0, 1, 0, 1]
    assert task_archives._residue_labels([("W", 5)])(twins) == "an annotated residue is another one in the structure"
    assert parse_biolip_residues("D10 E-25A", "here") == [("D", 10), ("E", -25)]


def test_proteinshake_keeps_single_chains_that_lie_where_they_should(archive):
    task = read(archive, "BindShake")
    assert {split: [number(e) for e in examples] for split, examples in task.splits.items()} == {
        "train": [0, 6, 9], "valid": [1, 7, 10], "Org": [2, 5, 8, 11]}  # 3 was moved, 4 has two chains
    assert task.left_out == {"coordinates differ from the annotation's": 1}
    assert all(np.flatnonzero(labels).tolist() == [0] for labels in labels_of(task).values())


def test_residues_that_proteinshake_does_not_have_are_unknown():
    labels = task_archives._placed_labels(chain(0).coords[:4, 1].astype(float), np.ones(4, np.float32))
    np.testing.assert_array_equal(labels(chain(0)), [1] * 4 + [np.nan] * 6)


@pytest.mark.parametrize("suffix", [".avro", ".avro.gz", ".json.gz"])
def test_proteinshakes_file_in_other_forms(tmp_path, archive, suffix, monkeypatch):
    monkeypatch.setattr("mini_archive.write_structure", lambda *_: None)
    mini = MiniArchive(tmp_path)
    proteins = mini.proteinshake()
    path = mini.local / "proteinshake_bindingsite" / f"ProteinLigandInterfaceDataset.residue{suffix}"
    path.with_name("ProteinLigandInterfaceDataset.residue.json").unlink()
    opened = gzip.open if suffix.endswith(".gz") else open
    if "avro" in suffix:
        fastavro = pytest.importorskip("fastavro")
        kinds = {"protein": dict.fromkeys(proteins[0]["protein"], "string"),
                 "residue": {k: {"type": "array", "items": {int: "int", str: "string", float: "float"}[type(v[0])]}
                             for k, v in proteins[0]["residue"].items()}}
        schema = {"name": "Protein", "type": "record", "fields": [
            {"name": part, "type": {"name": part, "type": "record",
                                    "fields": [{"name": k, "type": v} for k, v in fields.items()]}}
            for part, fields in kinds.items()]}
        with opened(path, "wb") as file:
            fastavro.writer(file, schema, proteins)
    else:
        with opened(path, "wt") as file:
            json.dump(proteins, file)
    task = read_raw(Archive(mini.data, archive.pdb), "BindShake")
    assert [number(e) for e in task.splits["train"]] == [0, 6, 9]
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=re.escape(f"{path}: damaged")):
        read_raw(Archive(mini.data, archive.pdb), "BindShake")


def test_epitopes_are_aligned_to_the_structure(archive):
    """The annotation begins at the chain's second residue, and its second is the epitope: place 2 of the chain."""
    task = read(archive, "Ept")
    found = labels_of(task)
    assert sorted(found) == list(range(CHAINS))
    assert all(np.flatnonzero(labels).tolist() == [2] for labels in found.values())
    assert task.left_out == {"an antigen of several chains": 2}


def test_flexibility_is_scaled(archive):
    for name, expected in (("FlexRMSF", [0.5, 1.5, 2.5]), ("FlexBFactor", [0, 0.1, 0.2]),
                           ("FlexNEQ", [0.1, 0.2, np.nan])):
        for i, labels in labels_of(read(archive, name)).items():
            np.testing.assert_allclose(labels[:3], expected, rtol=1e-6)
            assert len(labels) == len(chain(i))


def test_homology_looks_at_the_residues_of_the_domain(archive):
    task = read(archive, "Homo")
    assert len(task.classes) == len(HOMO_FOLDS) == 45
    assert list(task.splits) == ["train", "valid", "Fold", "SupFam", "Fam"]
    found = labels_of(task)
    for i, labels in found.items():
        assert task.classes[int(np.nanmax(labels))] == str((13, 26)[i // 5 % 2])
        known = np.flatnonzero(~np.isnan(labels)).tolist()
        assert known == (list(range(len(labels))) if i % 2 else [1, 2, 3, 5])
    assert sorted(found) == list(range(50)), "also 7: SCOP's 9xyz is 1a07 now"
    assert task.left_out == {"not in SCOP": 5, "a fold with few proteins": 5}


def test_homology_from_tapes_databases(tmp_path, archive, monkeypatch):
    lmdb = pytest.importorskip("lmdb")
    monkeypatch.setattr("mini_archive.write_structure", lambda *_: None)
    mini = MiniArchive(tmp_path)
    mini.homology(lmdb)
    task, expected = read_raw(Archive(mini.data, archive.pdb), "Homo"), read(archive, "Homo")
    for split, examples in expected.splits.items():
        for e, other in zip(examples, task.splits[split], strict=True):
            assert e.id == other.id
            np.testing.assert_array_equal(e.labels, other.labels)
    path = mini.data / "structural" / "remote_homology" / "remote_homology_valid.lmdb"
    with lmdb.open(str(path)) as base, base.begin(write=True) as transaction:
        transaction.put(b"3", b"no pickle")
    with pytest.raises(ValueError, match=r"remote_homology_valid.lmdb, entry 3: damaged, or no pickle"):
        read_raw(Archive(mini.data, archive.pdb), "Homo")


@pytest.mark.parametrize(("text", "expected"), [
    ("A:", ("A", [])), ("A:1-20", ("A", [(1, 20)])), ("A:-5-20A,A:30B-40", ("A", [(-5, 20), (30, 40)])),
    ("-", ("", [])), ("12-20", ("", [(12, 20)])), ("1:3-4", ("1", [(3, 4)])), ("A:-9--2", ("A", [(-9, -2)])),
])
def test_residues_of_scop(text, expected):
    assert parse_scop_residues(text, "here") == expected


@pytest.mark.parametrize(("text", "message"), [("A:1", "'A:1' is no range"), ("A:1-5,B:6-9", "is of several chains")])
def test_garbage_residues_of_scop(text, message):
    with pytest.raises(ValueError, match=f"here: .*{message}"):
        parse_scop_residues(text, "here")


def test_withdrawn_entries_with_one_successor(mini):
    assert read_obsolete(mini.pdb / "obsolete.dat") == {"9xyz": "1a07"}


def test_strict_splits_keep_chains_together(archive):
    task = read_raw(archive, "BindInt", "strict")
    assert task.origin.endswith("strict splits")
    assert {split for split, examples in task.splits.items() if number(examples[0]) is not None} == set(CATH_SPLITS)
    codes = {split: {code(number(e)) for e in examples} for split, examples in task.splits.items()}
    assert not codes["Fold"] & codes["train"]


# --------------------------------------------------------------------------------------------------------- structures

def test_what_cannot_be_read_is_counted(tmp_path, archive):
    (tmp_path / "bad.cif").write_text("data_x\nloop_\n")
    good = archive.structure("1a00")
    bad, absent = tmp_path / "bad.cif", tmp_path / "no.cif"
    found = read_chains([(good, "A"), (good, "Z"), (good, None), (absent, "A"), (bad, "A")])
    assert found[good, "A"].sequence == found[good, None].sequence == chain(0).sequence
    assert found[good, "Z"] == "no such chain in the structure"
    assert found[absent, "A"] == "no structure file"
    assert found[bad, "A"] == "a structure file without readable chains"
    assert read_chains([(good, "A"), (good, "Z")], num_workers=1)[good, "Z"] == "no such chain in the structure"


def test_a_missing_mirror_is_said(mini, tmp_path):
    with pytest.raises(ValueError, match="this needs structures of the PDB: give --pdb-data"):
        read_raw(Archive.open(mini.root, None), "BindBio")
    (tmp_path / "mmcif_files").mkdir()
    empty = read_raw(Archive.open(mini.data, tmp_path), "CatBio")
    with pytest.raises(ValueError, match=r"CatBio: no examples in train, .*no structure file \(60\)"):
        empty.filtered()


@pytest.mark.parametrize("flags", [("--data", "x"), ("--pdb-data", "y")])
def test_folders_that_are_something_else(mini, tmp_path, flags):
    name, value = flags
    places = {"--data": mini.root, "--pdb-data": mini.pdb} | {name: tmp_path / value}
    with pytest.raises(FileNotFoundError, match=f"{name} .*{value}: no folder"):
        Archive.open(places["--data"], places["--pdb-data"])


# ------------------------------------------------------------------------------------------------------------ garbage

LOCAL = "functional/local"
DAMAGE = [
    ("interpro", "BindInt", f"{LOCAL}/interpro/InterPro_parsed_r7_nofilter.tsv", "ipr_type", "kind",
     "nofilter.tsv, line 1: no column ipr_type"),
    ("interpro", "BindInt", f"{LOCAL}/interpro/InterPro_parsed_r7_nofilter.tsv", "6-8-S", "6 to 8",
     "nofilter.tsv, line 2: residue_fragments: '6 to 8' is no range"),
    ("interpro", "BindInt", f"{LOCAL}/interpro/InterPro_parsed_r7_nofilter.tsv", "\t6-8-S", "",
     "nofilter.tsv, line 2: residue_fragments: no value; the line is cut off"),
    ("interpro", "Rep", f"{LOCAL}/interpro/pdbtosp.txt", "(P00003)", "P00003",
     r"pdbtosp.txt, line \d+: entry 1A03: 'PROT3_ECOLI  P00003' is not NAME \(ACCESSION\)"),
    ("biolip", "BindBio", f"{LOCAL}/biolip2/BioLiP_updated_set/BioLiP_nr.txt", "ATP\t", "",
     r"BioLiP_nr.txt, line 1: 20 columns, BioLiP has 21"),
    ("biolip", "CatBio", f"{LOCAL}/biolip2/BioLiP_updated_set/BioLiP_nr.txt", "X7", "seven",
     r"BioLiP_nr.txt, line 1: catalytic residues: 'seven' is no residue"),
    ("proteinshake", "BindShake", f"{LOCAL}/proteinshake_bindingsite/ProteinLigandInterfaceDataset.residue.json",
     '"train"', '"training"', r"residue.json, protein 0: protein: .* structure_split_0.7 'training'"),
    ("proteinshake", "BindShake", f"{LOCAL}/proteinshake_bindingsite/ProteinLigandInterfaceDataset.residue.json",
     '"binding_site": [1,', '"binding_site": [', r"residue.json, protein 0: residue: .*must be equally long"),
    ("proteinshake", "BindShake", f"{LOCAL}/proteinshake_bindingsite/ProteinLigandInterfaceDataset.residue.json",
     '"x": [', '"x": ["a", ', r"residue.json, protein 0: x: must be a list of finite numbers"),
    ("proteinshake", "BindShake", f"{LOCAL}/proteinshake_bindingsite/ProteinLigandInterfaceDataset.residue.json",
     '"residue": {', '"atom": {', r"residue.json, protein 0: residue: a NoneType instead of an object"),
    ("epitopes", "Ept", f"{LOCAL}/proteinglue_epitoperegion/Dset48.csv", "AliSeq", "Seq",
     "Dset48.csv, line 1: no column AliSeq"),
    ("epitopes", "Ept", f"{LOCAL}/proteinglue_epitoperegion/HM_479_testing.csv", "H_1A01,0", "H_1A01,2",
     "HM_479_testing.csv, line 2: AliSeq '.' must be a letter and Interface '2' 0 or 1"),
    ("atlas", "FlexRMSF", "physicochemical/atlas/2022_06_13_ATLAS_pdb.txt", "1a02_A", "1a02A",
     "ATLAS_pdb.txt, line 3: '1a02A' is no chain"),
    ("atlas", "FlexRMSF", "physicochemical/atlas/analysis/1a02_A/1a02_A_per_residue_labels.csv", ",0.5,", ",high,",
     "1a02_A_per_residue_labels.csv, line 2: RMSF: 'high' is no number"),
    ("atlas", "FlexNEQ", "physicochemical/atlas/analysis/1a02_A/1a02_A_per_residue_labels.csv", "Neq", "NEQ",
     "1a02_A_per_residue_labels.csv, line 1: no column Neq"),
    ("homology", "Homo", "structural/remote_homology/dir.cla.scop.1.75.txt", "\tcl=1", "",
     "dir.cla.scop.1.75.txt, line 2: 5 columns, SCOP's classification has 6"),
    ("homology", "Homo", "structural/remote_homology/dir.cla.scop.1.75.txt", "A:6-8", "A:6to8",
     "dir.cla.scop.1.75.txt: domain d1a00a_: residues: 'A:6to8' is no range"),
    ("homology", "Homo", "structural/remote_homology/remote_homology_train.json", '"fold_label": 13', '"fold": 13',
     "remote_homology_train.json, item 0: id is 'd1a00a_' and fold_label None"),
    ("homology", "Homo", "structural/remote_homology/remote_homology_valid.json", "]", "",
     "remote_homology_valid.json, line 1: not JSON"),
]


@pytest.mark.parametrize(("fresh", "name", "file", "old", "new", "message"), DAMAGE, indirect=["fresh"])
def test_damage_is_named_by_file_entry_and_field(fresh, name, file, old, new, message):
    path = fresh.data / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read_raw(Archive.open(fresh.root, fresh.pdb), name)


@pytest.mark.parametrize(("fresh", "name", "file"), [
    ("interpro", "Con", f"{LOCAL}/interpro/pdbtosp.txt"), ("homology", "Homo", "structural/remote_homology/"
     "remote_homology_train.json"), ("proteinshake", "BindShake", f"{LOCAL}/proteinshake_bindingsite/"
     "ProteinLigandInterfaceDataset.residue.json"), ("biolip", "CatBio", "CATH/sequence-data/cath-domain-seqs.fa"),
], indirect=["fresh"])
def test_missing_files_are_named(fresh, name, file):
    (fresh.data / file).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape((fresh.data / file).stem)):
        read_raw(Archive.open(fresh.root, fresh.pdb), name)


def test_atlas_sequences_must_be_those_of_the_structures(tmp_path, mini):
    shutil.copytree(mini.data, tmp_path / "data")
    path = tmp_path / "data/physicochemical/atlas/analysis/1a00_A/1a00_A_per_residue_labels.csv"
    write(path, path.read_text() + "\nW,1,1,1")
    with pytest.raises(ValueError, match=r"1a00_A_per_residue_labels.csv: seq: its 11 letters are not those of the 10"):
        read_raw(Archive.open(tmp_path, None), "FlexRMSF")


def test_absent_packages_are_named(fresh_packages, tmp_path):
    for suffix, name, task in ((".lmdb", "lmdb", "Homo"), (".avro", "fastavro", "BindShake")):
        fresh_packages(suffix)
        with pytest.raises(ImportError, match=rf"{suffix}: reading it needs the package {name} \(pip install {name}\)"):
            read_raw(Archive.open(tmp_path, tmp_path / "pdb"), task)


@pytest.fixture
def fresh_packages(tmp_path, monkeypatch):
    """Files of formats whose packages are not installed."""
    homology = tmp_path / "structural" / "remote_homology"
    shake = tmp_path / "functional" / "local" / "proteinshake_bindingsite"
    write(homology / "dir.cla.scop.1.75.txt", "")
    write(tmp_path / "pdb" / "obsolete.dat", "")
    (tmp_path / "pdb" / "mmcif_files").mkdir()

    def make(suffix):
        monkeypatch.setitem(sys.modules, {".lmdb": "lmdb", ".avro": "fastavro"}[suffix], None)
        write(homology / "remote_homology_train.lmdb" if suffix == ".lmdb" else
              shake / "ProteinLigandInterfaceDataset.residue.avro", "x")
    return make
