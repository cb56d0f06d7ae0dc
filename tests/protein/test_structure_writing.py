"""protein/structure_io.py: chains written and read back, what the formats cannot hold, and folders of files."""

import dataclasses
import functools
import gzip
import io

import numpy as np
import pytest
from biotite.structure.io import pdbx
from structure_files import peptide, random_chain, same, save_structure

from protein.atom_files import ATOMS
from protein.structure_io import Chain, StructureWarning, read_structure, write_structure
from protein.structure_sources import Failure, find_structures, iterate_folder, read_folder, structure_name


@pytest.fixture
def save(tmp_path):
    return functools.partial(save_structure, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# folders


def test_folder_in_order_with_names_from_its_root(save, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden").mkdir()
    rows = peptide("ALA", "SER")
    for name in ("b.cif", "a.PDB.gz".lower(), "sub/c.v2.bcif", ".hidden/d.pdb", ".e.pdb"):
        save(rows, name)
    save("x", "notes.txt")
    assert [path.name for path in find_structures(tmp_path)] == ["a.pdb.gz", "b.cif", "c.v2.bcif"]
    assert [chain.name for chain in read_folder(tmp_path).chains] == ["a", "b", "sub/c.v2"]
    assert structure_name(tmp_path / "sub/c.v2.bcif", tmp_path) == "sub/c.v2"
    save(rows, "b.pdb")
    save(rows, "a.pdb")
    with pytest.warns(StructureWarning, match=r"of 2 entries; a\.pdb, for one, is read, and not a\.pdb\.gz"):
        assert [path.name for path in find_structures(tmp_path)] == ["a.pdb", "b.cif", "c.v2.bcif"]


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone: no such folder"):
        find_structures(tmp_path / "gone")
    with pytest.raises(ValueError, match="no structure files"):
        find_structures(tmp_path)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_files_are_counted_and_named(save, tmp_path, num_workers):
    for name in ("a", "c", "d"):
        save(peptide("ALA", "SER"), f"{name}.pdb")
    save(b"", "b.pdb")
    save("ATOM      1  N", "e.pdb")
    entries = []
    with pytest.raises(ValueError, match=r"2 unreadable structure file\(s\), 1 are tolerated: .*b\.pdb: empty file; "):
        entries.extend(iterate_folder(tmp_path, max_failures=1, num_workers=num_workers))
    assert [isinstance(entry, Failure) for entry in entries] == [False, True, False, False]
    contents = read_folder(tmp_path, max_failures=2)
    assert [chain.name for chain in contents.chains] == ["a", "c", "d"]
    assert [failure.path.name for failure in contents.failures] == ["b.pdb", "e.pdb"]
    assert all(str(failure.path) in failure.reason for failure in contents.failures)
    with pytest.raises(ValueError, match=r"1 unreadable structure file\(s\), 0 are tolerated: .*b\.pdb: empty file"):
        read_folder(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# writing


@pytest.mark.parametrize("extension", [".pdb", ".cif"])
def test_what_is_written_is_read_back(tmp_path, extension):
    path = tmp_path / f"test{extension}"
    chains = [random_chain(80, seed=1), random_chain(30, seed=2, chain_id="B")]
    write_structure(path, chains)
    for chain, back in zip(chains, read_structure(path), strict=True):
        present = ~np.isnan(chain.coords[:, 1, 0])
        assert same(dataclasses.replace(chain, bfactors=np.where(present, chain.bfactors, np.float32(np.nan))), back,
                    atol=5.1e-3 if extension == ".pdb" else 0.0)
        np.testing.assert_allclose(chain.coords, back.coords, atol=5.1e-4 if extension == ".pdb" else 0.0, rtol=0)
    write_structure(path, chains[0])  # over the old file
    assert len(read_structure(path)) == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("smaller", [False, True])
def test_binary_cif_as_biotite_writes_it(tmp_path, smaller):
    chain = random_chain(80, seed=6)
    write_structure(tmp_path / "test.cif", chain)
    binary = pdbx.BinaryCIFFile()
    atoms = pdbx.get_structure(pdbx.CIFFile.read(tmp_path / "test.cif"), model=1, extra_fields=["b_factor"])
    pdbx.set_structure(binary, atoms, data_block="test")
    binary = pdbx.compress(binary) if smaller else binary
    file = io.BytesIO()
    binary.write(file)
    (tmp_path / "test.bcif.gz").write_bytes(gzip.compress(file.getvalue()))
    assert same(read_structure(tmp_path / "test.cif")[0], read_structure(tmp_path / "test.bcif.gz")[0], atol=1e-2)


def test_written_pdb_columns_are_those_of_the_format(tmp_path):
    chain = random_chain(12, seed=4)
    write_structure(tmp_path / "x.pdb", chain)
    lines = (tmp_path / "x.pdb").read_text().splitlines()
    assert lines[-1] == "END"
    residues, columns = np.nonzero(np.isfinite(chain.coords).all(-1))
    for line, i, column in zip(lines[:-1], residues, columns, strict=True):
        assert len(line) == 80
        assert line[:6] == "ATOM  "
        assert line[12:16] == f" {ATOMS[column]:<3}"
        assert line[21] == "A"
        assert int(line[22:26]) == chain.residue_numbers[i]
        assert line[26].strip() == chain.insertion_codes[i]
        assert [float(line[a : a + 8]) for a in (30, 38, 46)] == pytest.approx(chain.coords[i, column], abs=5.1e-4)
        assert line[76:78].strip() == ATOMS[column][0]


def test_long_ids_in_mmcif(tmp_path):
    chains = [random_chain(5, chain_id="LongName"), random_chain(5, seed=1, chain_id="a b'c"),
              random_chain(5, seed=2, chain_id="A")]
    write_structure(tmp_path / "x.cif", chains)
    assert [chain.chain_id for chain in read_structure(tmp_path / "x.cif")] == ["LongName", "a b'c", "A"]


@pytest.mark.parametrize(("extension", "change", "word"), [
    (".pdb", {"chain_id": "AB"}, "longer than the one letter of PDB"),
    (".pdb", {"residue_numbers": np.array([1, 2, 10_000])}, "residue ALA 10000 has a number of too many digits"),
    (".pdb", {"residue_numbers": np.array([1, -1000, 3])}, "residue ALA -1000 has a number of too many digits"),
    (".pdb", {"insertion_codes": ("", "AB", "")}, "residue ALA 2AB has an insertion code longer"),
    (".pdb", {"coords": np.full((3, 5, 3), 12_345, np.float32)}, "residue ALA 1 has a coordinate of too many digits"),
    (".pdb", {"bfactors": np.array([1, 2, 1000], np.float32)}, "residue ALA 3 has a B-factor of too many digits"),
    (".cif", {"chain_id": ""}, "mmCIF needs a chain id"),
    (".cif", {"coords": np.full((3, 5, 3), np.nan, np.float32)}, "has no atoms"),
    (".cif", {"sequence": "AJA"}, r"residue J 2 is of an unknown kind"),
    (".cif", {"residue_numbers": np.array([1, 1, 2])}, "residue ALA 1 has the number and kind of the one before"),
])
def test_what_a_format_cannot_hold_is_refused_and_leaves_the_old_file(tmp_path, extension, change, word):
    good = Chain("test", "A", "AAA", np.ones((3, 5, 3), np.float32), np.arange(1, 4), ("",) * 3,
                 np.zeros(3, np.float32))
    path = tmp_path / f"x{extension}"
    write_structure(path, good)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"x{extension}: chain .*{word}"):
        write_structure(path, dataclasses.replace(good, **change))
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_other_ways_to_write_nothing(tmp_path):
    chain = random_chain(4)
    with pytest.raises(ValueError, match=r"x\.bcif: structures are written as \.pdb or \.cif"):
        write_structure(tmp_path / "x.bcif", chain)
    with pytest.raises(ValueError, match="write at least one, each under its own id"):
        write_structure(tmp_path / "x.pdb", [])
    with pytest.raises(ValueError, match="each under its own id"):
        write_structure(tmp_path / "x.pdb", [chain, chain])
    many = [random_chain(9000, chain_id=chain_id) for chain_id in "ABC"]
    numbers = np.arange(9000)
    with pytest.raises(ValueError, match="more than the 99,999 atoms"):
        write_structure(tmp_path / "x.pdb", [dataclasses.replace(chain, residue_numbers=numbers) for chain in many])


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.pdb"
    write_structure(path, random_chain(4))
    before = path.read_bytes()

    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("tokenizer.runtime.checkpoint.os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_structure(path, random_chain(5))
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
