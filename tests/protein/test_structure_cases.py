"""Files that were once misread: those beside the checkout by their table, and small ones made here."""

import dataclasses
import functools
import gzip
import warnings

import numpy as np
import pytest
from places import CASES, PROTEINS, needs_cases, needs_proteins
from structure_files import LOCAL, STEP, Row, cif_text, pdb_text, peptide, residue, same, save_structure

from protein.structure_io import StructureWarning, read_structure

STRUCTURES = CASES / "structures"
PLAIN = "TEFGSELKSFPE"  # its first residue has no N


@pytest.fixture
def save(tmp_path):
    return functools.partial(save_structure, tmp_path)


@pytest.fixture
def plain():
    (chain,) = read_structure(STRUCTURES / "plain.pdb")
    return chain


# ---------------------------------------------------------------------------------------------------------------------
# the folder of cases


@needs_cases
@pytest.mark.parametrize("name", [
    "altblocks.pdb", "altblocks.cif", "altend.pdb", "sidechains_last.pdb", "authq.cif", "nogroup.cif", "noelement.cif",
    "restraints.cif", "wat_star.pdb", "wat_hex.pdb", "esd.cif", "mixedfirst.pdb", "nomodelend.pdb"])
def test_cases_that_read_as_the_plain_file(name, plain):
    (chain,) = read_structure(STRUCTURES / name)
    assert plain.sequence == PLAIN
    assert plain.mask.sum() == 11
    assert same(chain, plain, names=False)


@needs_cases
@pytest.mark.parametrize(("name", "ids"), [
    ("segid.pdb", ["PROA", "PROB"]), ("twoletter.pdb", ["AA", "BA"]), ("chain_47.pdb", ["/"]),
    ("spacechain.cif", ["A B"])])
def test_cases_of_chain_ids(name, ids, plain):
    chains = read_structure(STRUCTURES / name)
    assert [chain.chain_id for chain in chains] == ids
    assert [chain.sequence for chain in chains] == [PLAIN] * len(ids)
    assert same(chains[0], plain, names=False)
    assert [chain.chain_id for chain in read_structure(STRUCTURES / name, chains=ids[-1:])] == ids[-1:]


@needs_cases
def test_the_other_cases(plain):
    with pytest.warns(StructureWarning, match=r"repeatchain\.pdb: chain 'B' repeats the numbers of 12 of its 24"):
        (twice,) = read_structure(STRUCTURES / "repeatchain.pdb")
    assert twice.sequence == PLAIN * 2
    assert twice.residue_index()[12] == 11 + 33
    (unknown,) = read_structure(STRUCTURES / "unknown_hetatm.pdb")
    assert unknown.sequence == "TEFGSXLKSFPE"
    np.testing.assert_array_equal(unknown.coords, plain.coords)
    (end,) = read_structure(STRUCTURES / "mse_gap_end.cif")
    assert (end.sequence, end.residue_numbers[-1], end.mask[-1]) == ("TEFGSELKSFM", 15, True)
    (zeros,) = read_structure(STRUCTURES / "zeros.pdb")
    assert zeros.sequence == PLAIN
    assert zeros.mask.sum() == 10
    assert np.isnan(zeros.coords[2]).all()
    with pytest.raises(ValueError, match=r"water\.cif: holds no protein") as error:
        read_structure(STRUCTURES / "water.cif")
    assert "damaged" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# residues whose atoms stand apart


@pytest.mark.parametrize("extension", [".pdb", ".cif"])
def test_atoms_of_a_residue_may_stand_apart(save, extension):
    rows = peptide("ALA", "SER", "TRP")
    together = read_structure(save(rows, f"x{extension}"))[0]
    hydrogens = [Row("H", row.residue, "A", row.number, row.xyz + 1) for row in rows if row.atom == "N"]
    assert same(read_structure(save(rows + hydrogens, f"x{extension}"))[0], together)
    backbone, rest = [row for row in rows if row.atom in ("N", "CA", "C")], [r for r in rows if r.atom in ("O", "CB")]
    assert same(read_structure(save(backbone + rest, f"x{extension}"))[0], together)


@pytest.mark.parametrize("extension", [".pdb", ".cif"])
def test_residues_are_in_the_order_of_their_backbones(save, extension):
    """A glycine has no side chain that could come first with the others."""
    rows = peptide("ALA", "GLY", "TRP", "GLY", "SER")
    rows = [row for row in rows if (row.residue, row.atom) != ("GLY", "CB")]
    together = read_structure(save(rows, f"x{extension}"))[0]
    side, backbone = [row for row in rows if row.atom == "CB"], [row for row in rows if row.atom != "CB"]
    apart = read_structure(save(side + backbone, f"x{extension}"))[0]
    assert apart.sequence == "AGWGS"
    assert same(apart, together)


@pytest.mark.parametrize("extension", [".pdb", ".cif"])
def test_a_byte_order_mark_hides_no_atom(save, extension):
    path = save(peptide("ALA", "SER"), f"x{extension}")
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(
        line for line in path.read_text().splitlines() if not line.startswith("#")).encode())
    assert read_structure(path)[0].mask.tolist() == [True, True]


def test_further_structures_of_a_file_are_named(save):
    both = cif_text(peptide("ALA", "SER")) + cif_text(peptide("TRP")).replace("data_TEST", "data_OTHER")
    with pytest.warns(StructureWarning, match=r"first data block are read, and not those of 'OTHER' \(1 in all\)"):
        (chain,) = read_structure(save(both, "x.cif"))
    assert chain.sequence == "AS"


@pytest.mark.parametrize("extension", [".pdb", ".cif"])
def test_a_copy_with_fewer_atoms_is_a_copy_as_a_whole(save, extension):
    """Residue 2 lacks N, CA and C; its copy's must not complete it."""
    rows = [*residue(0), *residue(1, atoms=("O", "CB")), *residue(2)]
    again = [dataclasses.replace(row, xyz=row.xyz + 50) for row in
             (*residue(0), *residue(1, atoms=("N", "CA", "C")), *residue(2))]
    with pytest.warns(StructureWarning, match=r"repeats the numbers of 3 of its 6 residues, first at ALA 1;"):
        (chain,) = read_structure(save(rows + again, f"x{extension}"))
    assert chain.mask.tolist() == [True, False, True, True, True, True]


def test_a_ligand_may_have_the_number_of_a_residue(save):
    ligand = [Row("C1", "PLP", "A", 2, (30, 0, 0), record="HETATM")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_structure(save(ligand + peptide("ALA", "SER", "TRP")))[0].sequence == "ASW"


@pytest.mark.parametrize("extension", [".pdb", ".cif"])
def test_conformers_alike_along_a_chain(save, extension):
    def pair(place, name, order, occupancies=(0.5, 0.5), number=None):
        shift = {"A": 0.0, "B": np.array([0, 0, 3.0])}
        return [dataclasses.replace(row, altloc=letter, occupancy=dict(zip("AB", occupancies, strict=True))[letter],
                                    xyz=row.xyz + shift[letter])
                for letter in order for row in residue(place, name, number=number)]

    rows = [*residue(0), *pair(1, "SER", "AB"), *pair(2, "THR", "BA"), *residue(3)]
    (chain,) = read_structure(save(rows, f"x{extension}"))
    assert chain.sequence == "ASTA"
    np.testing.assert_allclose(chain.coords, np.arange(4)[:, None, None] * STEP + LOCAL, atol=5e-4)
    # Of two neighbours one prefers A a little, the other B by far: both are B.
    rows = [*residue(0), *pair(1, "SER", "AB", (0.55, 0.45)), *pair(2, "THR", "AB", (0.2, 0.8)), *residue(3),
            *pair(4, "TRP", "AB", (0.7, 0.3))]
    (chain,) = read_structure(save(rows, f"x{extension}"), altloc="occupancy")
    assert chain.coords[:, 0, 2] == pytest.approx([0, 3, 3, 0, 0], abs=1e-3)
    assert not chain.breaks[[2]].any()


@pytest.mark.parametrize("extension", [".pdb", ".cif"])
def test_conformer_blocks_of_different_kinds(save, extension):
    first = [*residue(1, "SER", altloc="A"), *residue(2, "TRP", altloc="A")]
    second = [*residue(1, "THR", altloc="B"), *residue(2, "TRP", altloc="B")]
    path = save([*residue(0), *first, *second, *residue(3)], f"x{extension}")
    assert read_structure(path)[0].sequence == "ASWA"
    assert read_structure(save([*residue(0), *first, *residue(3), *second], f"x{extension}"))[0].sequence == "ASWA"


def test_modified_residues_at_the_end_of_the_file_go_where_bonds_put_them(save):
    rows = [*residue(0), *residue(2), *residue(3), *residue(1, "MSE", record="HETATM"),
            *residue(30, "GLU", number=9, record="HETATM")]
    (chain,) = read_structure(save(rows))
    assert chain.sequence == "AMAA"
    assert chain.residue_numbers.tolist() == [1, 2, 3, 4]


# ---------------------------------------------------------------------------------------------------------------------
# HETATM


@pytest.mark.parametrize("extension", [".pdb", ".cif"])
def test_hetatm_of_unknown_kinds_need_bonds_on_both_sides(save, extension):
    options = {"record": "HETATM", "label_number": "."}
    inside = [*residue(0), *residue(1, "ZZZ", **options), *residue(2, "ZZY", **options), *residue(3)]
    assert read_structure(save(inside, f"x{extension}"))[0].sequence == "AXXA"
    end = [*residue(0), *residue(1), *residue(2, "ZZZ", **options)]
    assert read_structure(save(end, f"x{extension}"))[0].sequence == "AA"
    apart = [*residue(0), *residue(40, "ZZZ", **options), *residue(1, number=2)]
    assert read_structure(save(apart, f"x{extension}"))[0].sequence == "AA"
    assert read_structure(save(inside, f"x{extension}"), modified_residues=False)[0].sequence == "AA"


def test_a_place_in_a_polymer_keeps_hetatm(save):
    rows = [*residue(0), *residue(8, "MSE", number=9, record="HETATM"),
            *residue(20, "ZZZ", number=12, record="HETATM")]
    assert read_structure(save(rows, "x.cif"))[0].sequence == "AMX"
    # A program that numbers water as well says nothing by it.
    water = [Row("O", "HOH", "A", 401, (80, 0, 0), record="HETATM")]
    assert read_structure(save(rows + water, "x.cif"))[0].sequence == "A"


# ---------------------------------------------------------------------------------------------------------------------
# what backbones do not need, and what is nobody's


def test_tags_in_upper_case(save):
    rows = peptide("ALA", "SER")
    lines = [line.upper() if line.startswith(("_", "loop_")) else line for line in cif_text(rows).splitlines()]
    assert same(read_structure(save("\n".join([*lines, ""]), "x.cif"))[0], read_structure(save(rows, "y.cif"))[0],
                names=False)


def test_atoms_after_endmdl_are_of_no_model(save):
    lines = pdb_text(peptide("ALA", "SER")).splitlines()[:-1]
    extra = pdb_text(residue(9, "TRP", number=9)).splitlines()[:-1]
    path = save("\n".join(["MODEL        1", *lines, "ENDMDL", *extra, "END", ""]))
    assert read_structure(path)[0].sequence == "AS"
    with pytest.raises(ValueError, match="no model 2; the file has 1"):
        read_structure(path, model=2)
    path = save("\n".join([*lines, "ENDMDL", *extra, "ENDMDL", "END", ""]))  # without MODEL
    assert [read_structure(path, model=model)[0].sequence for model in (1, 2)] == ["AS", "W"]


def test_residue_numbers_of_mmcif(save):
    rows = peptide("ALA", "SER")
    some = cif_text(rows).splitlines()
    first = next(i for i, line in enumerate(some) if line.startswith("ATOM"))
    words = some[first].split()
    words[15] = "?"  # auth_seq_id of one atom
    some[first] = " ".join(words)
    assert read_structure(save("\n".join([*some, ""]), "x.cif"))[0].residue_numbers.tolist() == [1, 2]
    nothing = [" ".join([*(words := line.split())[:8], ".", *words[9:15], "?", *words[16:]])
               if line.startswith("ATOM") else line for line in cif_text(rows).splitlines()]
    with pytest.raises(ValueError, match=r"x\.cif: atom 1 \(chain 'A'\) has no residue number but"):
        read_structure(save("\n".join([*nothing, ""]), "x.cif"))
    with pytest.raises(ValueError, match=r"its atoms have no cartn_x"):
        read_structure(save(cif_text(rows, left_out=["Cartn_x"]), "x.cif"))


def test_odd_lines_are_refused_where_a_backbone_needs_them(save):
    lines = pdb_text(peptide("ALA", "SER")).splitlines()
    water = pdb_text([Row("O", "HOH", "W", 1, (50, 50, 50), record="HETATM")]).splitlines()[0]
    for odd in (water[:22] + "****" + water[26:], water[:30] + "********" + water[38:]):
        assert read_structure(save("\n".join([*lines[:-1], odd, "END", ""])))[0].sequence == "AS"
    with pytest.raises(ValueError, match="has no residue number but"):
        read_structure(save("\n".join([lines[0][:22] + "****" + lines[0][26:], *lines[1:], ""])))


def test_names_of_four_letters_are_no_chain_ids(save):
    lines = [line[:20] + "D" + line[21:] if "HIS" in line else line
             for line in pdb_text(peptide("ALA", "HIS", "SER")).splitlines()]
    (chain,) = read_structure(save("\n".join([*lines, ""])))
    assert (chain.chain_id, chain.sequence) == ("A", "AHS")


def test_one_segment_id_is_no_chain_id(save):
    lines = [line.ljust(72)[:72] + "1ABC" if line.startswith("ATOM") else line
             for line in pdb_text(peptide("ALA", "SER", chain="")).splitlines()]
    assert read_structure(save("\n".join([*lines, ""])))[0].chain_id == ""


@pytest.mark.parametrize("name", ["1abc.pdb1", "1abc.pdb1.gz"])
def test_biological_assemblies(save, name):
    rows = [dataclasses.replace(row, model=model, xyz=row.xyz + shift) for model, shift in ((1, 0.0), (2, 40.0))
            for row in peptide("ALA", "CYS")]
    path = save(pdb_text(rows), name)
    (chain,) = read_structure(path)
    assert (chain.name, chain.sequence, chain.coords[0, 0, 0]) == ("1abc", "AC", 0)
    assert read_structure(path, model=2)[0].coords[0, 0, 0] == 40


# ---------------------------------------------------------------------------------------------------------------------
# an independent reader


def gemmi_chains(gemmi, path):
    """Chain id -> (letter, CA) of each amino acid whose backbone is whole; alternatives but the first are left out."""
    if path.name.endswith(".cif"):
        structure = gemmi.read_structure(str(path))
    else:  # without elements and charges: programs write serial numbers there, which gemmi refuses
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
        structure = gemmi.read_pdb_string("\n".join(line[:66] for line in text.splitlines()))
    structure.setup_entities()
    found = {}
    for chain in structure[0]:
        for group in chain.first_conformer():
            atoms = [group.find_atom(name, "*") for name in ("N", "CA", "C")]
            info = gemmi.find_tabulated_residue(group.name)
            if not all(atoms) or not (info.is_amino_acid() or group.het_flag != "H"):
                continue
            letter = info.one_letter_code.upper()
            key = chain.name
            found.setdefault(key, []).append((letter if letter.isalpha() else "X", atoms[1].pos.tolist()))
    return found


def assert_agrees(gemmi, path):
    expected = gemmi_chains(gemmi, path)
    for chain in read_structure(path):
        other = expected[chain.chain_id]
        assert "".join(letter for letter, _ in other) == "".join(np.array(list(chain.sequence))[chain.mask]), path.name
        np.testing.assert_allclose(chain.coords[chain.mask, 1], [xyz for _, xyz in other], atol=1e-4)


@needs_cases
@pytest.mark.parametrize("name", ["plain.pdb", "altblocks.pdb", "altblocks.cif", "altend.pdb",
                                  "sidechains_last.pdb", "chain_47.pdb", "spacechain.cif", "twoletter.pdb",
                                  "nogroup.cif", "restraints.cif", "esd.cif", "mse_gap_end.cif", "wat_hex.pdb"])
def test_cases_agree_with_gemmi(name):
    assert_agrees(pytest.importorskip("gemmi"), STRUCTURES / name)


@needs_proteins
def test_real_structures_agree_with_gemmi():
    gemmi = pytest.importorskip("gemmi")
    for path in sorted((PROTEINS / "structures").glob("*.pdb.gz"))[::31]:
        assert_agrees(gemmi, path)
