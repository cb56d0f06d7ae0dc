"""protein/structure_io.py on small files written here, on damaged ones, and on real ones where they are at hand.

`Row`s are atoms; `pdb_text`, `cif_text` and `bcif_bytes` write them without the module's help.
"""

import dataclasses
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest
from biotite.structure.io import pdbx

from protein import structure_io
from protein.structure_io import (
    ATOMS,
    Chain,
    Failure,
    find_structures,
    iterate_folder,
    read_folder,
    read_structure,
    structure_name,
    write_structure,
)

PROTEINS = Path(__file__).resolve().parents[2] / "shared" / "data" / "proteins"
LOCAL = np.array([[0, 0, 0], [1.2, 0.8, 0.1], [2.3, -0.1, 0.2], [2.4, -1.3, 0.3], [1.1, 1.7, 1.3]])  # of ATOMS
STEP = np.array([3.4, 0.2, 0])  # from residue to residue: C to the next N is 1.15 Angstrom


@dataclasses.dataclass
class Row:
    atom: str
    residue: str
    chain: str
    number: int
    xyz: object  # three numbers, or three strings to be written as they are
    code: str = ""
    altloc: str = ""
    occupancy: float = 1.0
    bfactor: float = 20.0
    record: str = "ATOM"
    model: int = 1
    label_chain: str = ""  # of mmCIF


def residue(place, name="ALA", chain="A", number=None, atoms=ATOMS, **options):
    """Rows of one residue at a place along a chain that bends nowhere."""
    return [Row(atom, name, chain, place + 1 if number is None else number, LOCAL[ATOMS.index(atom)] + place * STEP,
                **options) for atom in atoms]


def peptide(*names, **options):
    return [row for place, name in enumerate(names) for row in residue(place, name, **options)]


def numbers_of(row, digits):
    return [value if isinstance(value, str) else f"{value:.{digits}f}" for value in row.xyz]


def pdb_text(rows):
    lines, models = [], len({row.model for row in rows})
    for serial, row in enumerate(rows, start=1):
        if models > 1 and (serial == 1 or row.model != rows[serial - 2].model):
            lines += ["ENDMDL"] * (serial > 1) + [f"MODEL     {row.model:4d}"]
        x, y, z = numbers_of(row, 3)
        name = row.atom if len(row.atom) == 4 else f" {row.atom:<3}"
        lines.append(f"{row.record:<6}{serial:5d} {name}{row.altloc or ' '}{row.residue:>3} {row.chain or ' '}"
                     f"{row.number:4d}{row.code or ' '}   {x:>8}{y:>8}{z:>8}{row.occupancy:6.2f}{row.bfactor:6.2f}"
                     f"          {row.atom[0]:>2}")
    return "\n".join([*lines, "END", ""])


def cif_text(rows, left_out=()):
    columns = {"group_PDB": [], "id": [], "type_symbol": [], "label_atom_id": [], "label_alt_id": [],
               "label_comp_id": [], "label_asym_id": [], "label_entity_id": [], "label_seq_id": [],
               "pdbx_PDB_ins_code": [], "Cartn_x": [], "Cartn_y": [], "Cartn_z": [], "occupancy": [],
               "B_iso_or_equiv": [], "auth_seq_id": [], "auth_comp_id": [], "auth_asym_id": [], "auth_atom_id": [],
               "pdbx_PDB_model_num": []}
    for serial, row in enumerate(rows, start=1):
        values = [row.record, serial, row.atom[0], row.atom, row.altloc or ".", row.residue,
                  row.label_chain or row.chain, 1, row.number, row.code or "?", *numbers_of(row, 4), row.occupancy,
                  row.bfactor, row.number, row.residue, row.chain, row.atom, row.model]
        for column, value in zip(columns.values(), values, strict=True):
            column.append(str(value))
    kept = {name: values for name, values in columns.items() if name not in left_out}
    lines = ["data_TEST", "#", "loop_", *(f"_atom_site.{name}" for name in kept)]
    lines += [" ".join(values) for values in zip(*kept.values(), strict=True)]
    return "\n".join([*lines, "#", ""])


def bcif_bytes(rows):
    text = pdbx.CIFFile.read(io.StringIO(cif_text(rows)))
    columns = {name: pdbx.BinaryCIFColumn(pdbx.BinaryCIFData(column.as_array(float if "Cartn" in name else str)))
               for name, column in text.block["atom_site"].items()}
    block = pdbx.BinaryCIFBlock({"atom_site": pdbx.BinaryCIFCategory(columns)})
    file = io.BytesIO()
    pdbx.BinaryCIFFile({"TEST": block}).write(file)
    return file.getvalue()


WRITERS = {".pdb": lambda rows: pdb_text(rows).encode(), ".cif": lambda rows: cif_text(rows).encode(),
           ".bcif": bcif_bytes}
ALL_FORMATS = pytest.mark.parametrize("extension", WRITERS)


@pytest.fixture
def save(tmp_path):
    def save(rows_or_content, name="test.pdb"):
        content = rows_or_content
        if isinstance(content, list):
            content = WRITERS[Path(name.removesuffix(".gz")).suffix](content)
        content = content.encode() if isinstance(content, str) else content
        path = tmp_path / name
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return save


def same(a, b, atol=0.0, names=True):
    """Whether two chains are equal but for `atol` Angstrom."""
    return (a.sequence == b.sequence and a.insertion_codes == b.insertion_codes
            and np.array_equal(a.residue_numbers, b.residue_numbers)
            and np.allclose(a.coords, b.coords, rtol=0, atol=atol, equal_nan=True)
            and np.allclose(a.bfactors, b.bfactors, rtol=0, atol=atol, equal_nan=True)
            and (not names or (a.name, a.chain_id) == (b.name, b.chain_id)))


def random_chain(length, seed=0, chain_id="A", name="test"):
    """Far from a protein, but full of odd things: gaps, insertion codes, absent atoms and B-factors."""
    rng = np.random.default_rng(seed)
    places = (np.arange(length) % 1000)[:, None, None] * STEP + (np.arange(length) // 1000)[:, None, None] * [0, 50, 0]
    coords = places + LOCAL + 0.1 * rng.normal(size=(length, 5, 3))
    coords[rng.random((length, 5)) < 0.1] = np.nan
    coords[:, 0][np.isnan(coords).all((1, 2))] = 0.5
    numbers = np.cumsum(rng.integers(1, 3, size=length)) - 7
    bfactors = np.where(np.isnan(coords[:, 1, 0]), np.nan, rng.uniform(0, 99, size=length))
    return Chain(
        name=name,
        chain_id=chain_id,
        sequence="".join(rng.choice(list("ACDEFGHIKLMNPQRSTVWYX"), size=length)),
        coords=coords.astype(np.float32),
        residue_numbers=numbers.astype(np.int64),
        insertion_codes=tuple(rng.choice(["", "A", "B"], size=length).tolist()),
        bfactors=bfactors.astype(np.float32),
    )


# ---------------------------------------------------------------------------------------------------------------------
# what a good file says


@ALL_FORMATS
@pytest.mark.parametrize("gz", ["", ".gz"])
def test_reads_coordinates_sequence_numbers_and_bfactors(save, extension, gz):
    rows = peptide("MET", "GLY", "TRP", "UNK")
    for row in rows:
        row.bfactor = 10.0 + row.number + (row.atom == "CA") * 50
    rows = [row for row in rows if (row.residue, row.atom) != ("GLY", "CB")]
    rows += [Row("O", "HOH", "A", 101, (50, 50, 50), record="HETATM"), Row("P", "DA", "B", 1, (60, 60, 60))]
    (chain,) = read_structure(save(rows, f"1abc{extension}{gz}"))
    assert (chain.name, chain.chain_id, chain.label, chain.sequence) == ("1abc", "A", "1abc_A", "MGWX")
    assert len(chain) == 4
    assert chain.coords.dtype == np.float32
    expected = np.arange(4)[:, None, None] * STEP + LOCAL
    expected[1, 4] = np.nan
    np.testing.assert_allclose(chain.coords, expected, atol=5e-4)
    assert chain.residue_numbers.tolist() == [1, 2, 3, 4]
    assert chain.bfactors.tolist() == [61, 62, 63, 64]
    assert chain.insertion_codes == ("",) * 4
    assert chain.mask.all()
    assert not chain.breaks.any()


@ALL_FORMATS
def test_missing_atoms_mask_the_residue_and_keep_it(save, extension):
    rows = [*residue(0), *residue(1, atoms=("N", "CA", "O")), *residue(2), *residue(3, atoms=("CB",)), *residue(4)]
    rows.insert(-5, Row("CG", "ASP", "A", 44, (1, 2, 3)))  # a residue of which only a side chain is seen
    (chain,) = read_structure(save(rows, f"x{extension}"))
    assert chain.sequence == "AAAADA"
    assert chain.mask.tolist() == [True, False, True, False, False, True]
    assert np.isnan(chain.coords[1, [2, 4]]).all()
    assert np.isfinite(chain.coords[1, [0, 1, 3]]).all()
    assert np.isnan(chain.coords[4]).all()
    assert np.isnan(chain.bfactors[[3, 4]]).all()


@ALL_FORMATS
def test_one_residue_is_a_chain(save, extension):
    (chain,) = read_structure(save(residue(0, "TYR"), f"x{extension}"))
    assert (chain.sequence, chain.breaks.tolist(), chain.residue_index().tolist()) == ("Y", [False], [0])


@ALL_FORMATS
def test_insertion_codes_are_residues_of_their_own(save, extension):
    rows = [*residue(0, "SER", number=52), *residue(1, "THR", number=52, code="A"),
            *residue(2, "THR", number=52, code="B"), *residue(3, "VAL", number=53)]
    (chain,) = read_structure(save(rows, f"x{extension}"))
    assert chain.sequence == "STTV"
    assert chain.residue_numbers.tolist() == [52, 52, 52, 53]
    assert chain.insertion_codes == ("", "A", "B", "")
    assert chain.residue(1) == "THR 52A"
    assert not chain.breaks.any()


@ALL_FORMATS
def test_one_conformation_of_each_residue(save, extension):
    second = [dataclasses.replace(row, altloc=altloc, occupancy=occupancy, xyz=row.xyz + shift)
              for row in residue(1, "SER", atoms=("N", "CA", "C"))
              for altloc, occupancy, shift in (("A", 0.3, 0.0), ("B", 0.7, 0.2))]
    second += residue(1, "SER", atoms=("O", "CB"))
    rows = [*residue(0), *second, *residue(2)]
    path = save(rows, f"x{extension}")
    for altloc, shift in (("first", 0.0), ("occupancy", 0.2)):
        (chain,) = read_structure(path, altloc=altloc)
        assert chain.sequence == "ASA"
        np.testing.assert_allclose(chain.coords[1, :3], LOCAL[:3] + STEP + shift, atol=5e-4)
        np.testing.assert_allclose(chain.coords[1, 3:], LOCAL[3:] + STEP, atol=5e-4)
    with pytest.raises(ValueError, match=r"altloc 'B' is none of first, occupancy"):
        read_structure(path, altloc="B")


@ALL_FORMATS
@pytest.mark.parametrize("interleaved", [False, True])
def test_alternatives_may_be_different_amino_acids(save, extension, interleaved):
    serine = residue(1, "SER", altloc="A", occupancy=0.4)
    threonine = residue(1, "THR", altloc="B", occupancy=0.6)
    both = [row for pair in zip(serine, threonine, strict=True) for row in pair] if interleaved else serine + threonine
    path = save([*residue(0), *both, *residue(2)], f"x{extension}")
    assert [read_structure(path, altloc=altloc)[0].sequence for altloc in ("first", "occupancy")] == ["ASA", "ATA"]


@ALL_FORMATS
def test_modified_residues_count_as_their_parents(save, extension):
    rows = [*residue(0), *residue(1, "MSE", record="HETATM"), *residue(2, "SEP", record="HETATM"), *residue(3)]
    free = residue(40, "GLU", number=301, record="HETATM")  # the amino acid as a ligand
    water = [Row("O", "HOH", "A", 401, (80, 0, 0), record="HETATM")]
    calcium = [Row("CA", "CA", "A", 402, (90, 0, 0), record="HETATM")]
    path = save(rows + free + water + calcium, f"x{extension}")
    assert read_structure(path)[0].sequence == "AMSA"
    (without,) = read_structure(path, modified_residues=False)
    assert without.sequence == "AA"
    assert without.breaks.tolist() == [False, True]
    assert without.residue_index().tolist() == [0, 3]


@ALL_FORMATS
def test_models_are_counted_in_the_order_of_the_file(save, extension):
    rows = [dataclasses.replace(row, model=model, xyz=row.xyz + shift)
            for model, shift in ((1, 0.0), (5, 100.0)) for row in peptide("ALA", "CYS")]
    path = save(rows, f"x{extension}")
    first, second = (read_structure(path, model=model)[0] for model in (1, 2))
    np.testing.assert_allclose(second.coords - first.coords, 100, atol=1e-3)
    for model in (0, -1, 3):
        with pytest.raises(ValueError, match=rf"x{extension}: no model {model}; the file has 2"):
            read_structure(path, model=model)


@ALL_FORMATS
def test_chains_by_name_in_the_order_asked_for(save, extension):
    rows = [row for chain, place in (("B", 0), ("A", 50), ("c", 90)) for row in residue(place, chain=chain, number=1)]
    rows += residue(120, chain="D", atoms=("CA",))
    rows += [Row("P", "DA", "N", 1, (60, 60, 60))]
    path = save(rows, f"x{extension}")
    assert [chain.chain_id for chain in read_structure(path)] == ["B", "A", "c"]
    assert [chain.chain_id for chain in read_structure(path, chains=["c", "B"])] == ["c", "B"]
    with pytest.raises(ValueError, match=rf"x{extension}: no protein chain 'C'; there is chain 'B', 'A', 'c', 'D'"):
        read_structure(path, chains=["A", "C"])
    with pytest.raises(ValueError, match=r"no protein chain 'N'"):
        read_structure(path, chains=["N"])
    with pytest.raises(ValueError, match=r"chain 'D' has no residue with N, CA and C"):
        read_structure(path, chains=["D"])


@pytest.mark.parametrize("extension", [".cif", ".bcif"])
def test_author_ids_of_mmcif_come_before_label_ids(save, extension):
    rows = [*residue(0, "GLY", chain="B", number=11, label_chain="A"),
            *residue(40, "VAL", chain="A", number=21, label_chain="B"),
            *residue(80, "TRP", chain="H", number=31, label_chain="C")]
    path = save(rows, f"x{extension}")
    assert {chain.chain_id: chain.sequence for chain in read_structure(path)} == {"B": "G", "A": "V", "H": "W"}
    assert [chain.sequence for chain in read_structure(path, chains=["A", "B"])] == ["V", "G"]
    (by_label,) = read_structure(path, chains=["C"])
    assert (by_label.chain_id, by_label.sequence) == ("C", "W")
    assert by_label.residue_numbers.tolist() == [31]


@pytest.mark.parametrize("column", ["label_alt_id", "pdbx_PDB_ins_code", "B_iso_or_equiv", "occupancy",
                                    "pdbx_PDB_model_num", "label_asym_id", "auth_asym_id", "auth_seq_id"])
def test_columns_that_mmcif_may_lack(save, column):
    (chain,) = read_structure(save(cif_text(residue(0, "GLY", bfactor=7.0), left_out=[column]), "x.cif"))
    assert chain.sequence == "G"
    assert chain.mask.all()
    assert np.isnan(chain.bfactors).all() == (column == "B_iso_or_equiv")


def test_pdb_without_occupancy_and_bfactors(save):
    text = pdb_text(peptide("ALA", "SER"))
    (bare,) = read_structure(save("\n".join(line[:54] for line in text.splitlines())))
    assert bare.sequence == "AS"
    assert bare.mask.all()
    assert np.isnan(bare.bfactors).all()
    blank = [line[:54] + " " * 12 + line[66:] if " CA " in line else line for line in text.splitlines()]
    (some,) = read_structure(save("\n".join(blank)), altloc="occupancy")
    assert some.mask.all()
    assert np.isnan(some.bfactors).all()  # they are CA's


def test_line_ends_encodings_and_blank_chain_ids(save):
    rows = peptide("ALA", "SER", chain="")
    text = "REMARK   1 AUTH   J.PÉREZ\n" + pdb_text(rows)
    plain, crlf, latin = (read_structure(save(content))[0] for content in (
        text, text.replace("\n", "\r\n"), text.encode("latin-1")))
    assert plain.chain_id == ""
    assert plain.label == "test"
    assert same(plain, crlf)
    assert same(plain, latin)


def test_repeated_atoms_count_once(save):
    rows = [*residue(0), Row("CA", "ALA", "A", 1, (9, 9, 9), bfactor=1.0), *residue(1)]
    (chain,) = read_structure(save(rows))
    np.testing.assert_allclose(chain.coords[0], LOCAL, atol=5e-4)
    assert chain.bfactors.tolist() == [20, 20]


def test_breaks_and_residue_index(save):
    rows = [*residue(0, number=5), *residue(1, number=6),  # bonded
            *residue(4, number=9), *residue(5, number=20),  # three are missing; bonded, whatever the numbers say
            *residue(30, number=21),  # far from its neighbour in number
            *residue(60, number=3),  # starts again
            *residue(61, number=4, atoms=("CA", "C")), *residue(62, number=7)]  # no N: by number
    (chain,) = read_structure(save(rows))
    assert chain.breaks.tolist() == [False, False, True, False, True, True, False, False]
    assert chain.residue_index().tolist() == [0, 1, 4, 5, 38, 71, 72, 73]
    rows = [*residue(0, number=5), *residue(1, number=5, code="A", atoms=("CA",)), *residue(2, number=8)]
    (chain,) = read_structure(save(rows))
    assert chain.breaks.tolist() == [False, False, True]
    assert chain.residue_index().tolist() == [0, 1, 4]


def test_three_thousand_residues(tmp_path):
    chain = random_chain(3000, seed=3, name="big")
    write_structure(tmp_path / "big.pdb", chain)
    assert same(chain, read_structure(tmp_path / "big.pdb")[0], atol=6e-3)


# ---------------------------------------------------------------------------------------------------------------------
# files that say nothing, or something wrong


def refused(path, match, **options):
    with pytest.raises(ValueError, match=match) as error:
        read_structure(path, **options)
    assert path.name in str(error.value)


@pytest.mark.parametrize("extension", [".pdb", ".cif", ".bcif", ".pdb.gz", ".cif.gz"])
@pytest.mark.parametrize("content", [b"", b" \n\n"])
def test_empty_files(save, extension, content):
    refused(save(content, f"x{extension}"), "empty file")


@pytest.mark.parametrize("cut", [1, 5, 12, 40])
@pytest.mark.parametrize("extension", [".pdb", ".cif", ".bcif"])
def test_truncated_gzip(save, extension, cut):
    path = save(peptide("ALA", "SER", "TRP"), f"x{extension}.gz")
    path.write_bytes(path.read_bytes()[:-cut])
    refused(path, "truncated or damaged gzip")


def test_damaged_gzip_and_files_that_only_claim_to_be_gzip(save):
    path = save(peptide(*["ALA"] * 20), "x.pdb.gz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    refused(path, "truncated or damaged gzip")
    path.write_bytes(pdb_text(peptide("ALA")).encode())
    refused(path, "not compressed by gzip")


def test_a_pdb_file_cut_off_anywhere_in_a_line(save):
    rows = peptide("ALA", "SER")
    text = pdb_text(rows)
    start = text.index("ATOM      9")  # the oxygen of serine
    for columns in range(6, 66):
        path = save(text[: start + columns])
        refused(path, rf"line 9 \(chain {'A' if columns > 21 else ''!r}, residue .*\) is cut off after \d+ columns")
    refused(save(text[: start + 50]), r"residue SER 2\) is cut off")
    assert read_structure(save(text[: start + 66]))[0].sequence == "AS"


@pytest.mark.parametrize(("start", "value"), [(30, "   1.2.3"), (38, "********"), (46, "        "), (60, "******")])
def test_pdb_with_something_else_than_numbers(save, start, value):
    lines = pdb_text(peptide("ALA", "SER")).splitlines()
    lines[6] = lines[6][:start] + value + lines[6][start + len(value):]
    refused(save("\n".join(lines)), r"line 7 \(chain 'A', residue SER 2\) has .* instead of")


def test_pdb_without_a_residue_number(save):
    lines = pdb_text(peptide("ALA", "SER")).splitlines()
    lines[6] = lines[6][:22] + "    " + lines[6][26:]
    refused(save("\n".join(lines)), r"line 7 \(chain 'A', residue SER\) has no residue number but '    '")


def test_text_mmcif_cut_off_within_a_row(save):
    text = cif_text(peptide("ALA", "SER"))
    row = text.rindex("ATOM")
    for columns in (7, 20, 35, 50):
        refused(save(text[: row + columns], "x.cif"), "cannot be read as mmCIF")


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.95])
def test_truncated_binary_cif(save, keep):
    content = bcif_bytes(peptide("ALA", "SER"))
    refused(save(content[: int(keep * len(content))], "x.bcif"), "cannot be read as BinaryCIF")


@pytest.mark.parametrize(("extension", "word"), [(".pdb", "no ATOM records"), (".cif", "cannot be read as mmCIF"),
                                                 (".bcif", "cannot be read as BinaryCIF")])
def test_other_content(save, extension, word):
    for content in (b"not a structure\n", bytes(range(256)) * 8, b"\x89PNG\r\n\x1a\n"):
        refused(save(content, f"x{extension}"), word)


def test_pdb_under_the_name_of_mmcif_and_the_other_way_round(save):
    rows = peptide("ALA", "SER")
    for first_line in ("", "HEADER    TEST\n", "REMARK   1\n", "MODEL        1\n"):
        refused(save(first_line + pdb_text(rows), "x.cif"), r"holds PDB, not mmCIF; name it \.pdb")
    refused(save(cif_text(rows), "x.pdb"), r"holds mmCIF, not PDB; name it \.cif")
    refused(save(cif_text(rows), "x.bcif"), "cannot be read as BinaryCIF")
    refused(save(bcif_bytes(rows), "x.cif"), "cannot be read as mmCIF")


def test_mmcif_without_atoms(save):
    refused(save("data_X\n_entry.id X\n", "x.cif"), r"cannot be read as mmCIF \(.*atom_site")


@ALL_FORMATS
def test_atoms_that_are_no_backbone(save, extension):
    refused(save([*residue(0, atoms=("CA",)), *residue(1, atoms=("CA",))], f"x{extension}"),
            "no residue with N, CA and C in chain 'A'; nothing to read")
    refused(save([Row("P", "DA", "A", 1, (1, 2, 3)), Row("O", "HOH", "A", 2, (1, 2, 3), record="HETATM")],
                 f"x{extension}"), "no amino acids; nothing to read")


@pytest.mark.parametrize("extension", [".pdb", ".cif"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "2000000"])
def test_impossible_coordinates_are_absent(save, extension, value):
    rows = peptide("ALA", "SER", "TRP")
    rows[6].xyz = (value, "1.0", "2.0")  # CA of serine
    (chain,) = read_structure(save(rows, f"x{extension}"))
    assert chain.mask.tolist() == [True, False, True]
    assert np.isnan(chain.coords[1, 1]).all()
    assert np.isfinite(chain.coords[1, 0]).all()


def test_unknown_coordinates_in_mmcif_are_absent(save):
    rows = peptide("ALA", "SER", "TRP")
    rows[6].xyz = ("?", "?", "?")
    rows[11].xyz = (".", "1.0", "2.0")
    (chain,) = read_structure(save(rows, "x.cif"))
    assert chain.mask.tolist() == [True, False, False]


@pytest.mark.parametrize("name", ["x.txt", "x", "x.gz", "x.pdb.zip", "x.pdbx"])
def test_names_of_other_files(tmp_path, name):
    with pytest.raises(ValueError, match=r"not the name of a structure file; known are \.pdb"):
        read_structure(tmp_path / name)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.pdb"):
        read_structure(tmp_path / "gone.pdb")


# ---------------------------------------------------------------------------------------------------------------------
# Chain


@pytest.mark.parametrize(("field", "value", "word"), [
    ("sequence", "", "a chain without residues"),
    ("sequence", "AC", r"2 residues, but coords \(3, 5, 3\) float32, not \(2, 5, 3\) float32; residue_numbers"),
    ("coords", np.zeros((3, 5, 3)), "float64, not"),
    ("coords", np.zeros((3, 4, 3), np.float32), r"\(3, 4, 3\)"),
    ("residue_numbers", np.zeros(2, np.int64), r"residue_numbers \(2,\)"),
    ("insertion_codes", ("", ""), "2 insertion codes"),
    ("bfactors", np.zeros((3, 1), np.float32), r"bfactors \(3, 1\)"),
])
def test_chain_refuses_what_does_not_fit(field, value, word):
    chain = random_chain(3)
    with pytest.raises(ValueError, match=rf"test_A: .*{word}"):
        dataclasses.replace(chain, **{field: value})


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
    with pytest.raises(ValueError, match=r"b\.(cif|pdb) and .*b\.(pdb|cif) would have the same name"):
        find_structures(tmp_path)


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


# ---------------------------------------------------------------------------------------------------------------------
# real files


@pytest.mark.skipif(not PROTEINS.exists(), reason="no real structures here")
def test_real_structures_agree_with_the_benchmark_that_was_made_from_them(tmp_path):
    rows = [json.loads(line) for line in (PROTEINS / "benchmark.jsonl").read_text().splitlines()][::24]
    for row in rows:
        # Made without HETATM, and of residues with N, CA and C only.
        (chain,) = read_structure(PROTEINS / row["unbound"], modified_residues=False)
        assert "".join(np.array(list(chain.sequence))[chain.mask]) == row["sequence"], row["id"]
        np.testing.assert_allclose(chain.bfactors[chain.mask], row["bfactor"], atol=6e-3)
        for extension in (".pdb", ".cif"):
            path = tmp_path / f"{chain.name}{extension}"
            write_structure(path, chain)
            kept = ~np.isnan(chain.coords).all((1, 2))
            (back,) = read_structure(path)
            np.testing.assert_array_equal(back.coords, chain.coords[kept])
            assert "".join(np.array(list(chain.sequence))[kept]) == back.sequence


@pytest.mark.skipif(not PROTEINS.exists(), reason="no real structures here")
def test_bonds_along_real_chains():
    paths = sorted((PROTEINS / "structures").glob("*.pdb.gz"))[::71]
    for (chain,) in map(read_structure, paths):
        follows = ~chain.breaks[1:]
        steps = np.linalg.norm(np.diff(chain.coords[:, 1], axis=0), axis=-1)[follows]
        assert abs(np.nanmedian(steps) - 3.8) < 0.05, chain.label
        assert structure_io._linked(chain.coords, chain.residue_numbers)[0]
