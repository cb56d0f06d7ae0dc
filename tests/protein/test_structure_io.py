"""protein/structure_io.py reads small files written here, refuses damaged ones, and reads real ones, if any."""

import dataclasses
import functools
import json

import msgpack
import numpy as np
import pytest
from places import PROTEINS, needs_proteins
from structure_files import (
    LOCAL,
    STEP,
    WRITERS,
    Row,
    bcif_bytes,
    cif_text,
    pdb_text,
    peptide,
    random_chain,
    residue,
    same,
    save_structure,
)

from protein.structure_io import read_structure, write_structure

ALL_FORMATS = pytest.mark.parametrize("extension", WRITERS)


@pytest.fixture
def save(tmp_path):
    return functools.partial(save_structure, tmp_path)


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
    free = residue(40, "GLU", number=301, record="HETATM", label_number=".")  # the amino acid as a ligand
    water = [Row("O", "HOH", "A", 401, (80, 0, 0), record="HETATM")]
    calcium = [Row("CA", "CA", "A", 402, (90, 0, 0), record="HETATM")]
    path = save(rows + free + water + calcium, f"x{extension}")
    assert read_structure(path)[0].sequence == "AMSA"
    (without,) = read_structure(path, modified_residues=False)
    assert without.sequence == "AA"
    assert without.breaks.tolist() == [False, True]
    assert without.residue_index().tolist() == [0, 3]


@ALL_FORMATS
def test_modified_residues_between_unobserved_ones(save, extension):
    """No bond tells whose they are, but their place: MSE 3 of 1, 3, 5 is of the chain; 9, and 300 before 5, are not."""
    rows = [*residue(0, number=1), *residue(2, "MSE", number=3, record="HETATM", label_number="."),
            *residue(4, number=5)]
    assert read_structure(save(rows, f"x{extension}"))[0].sequence == "AMA"
    assert read_structure(save(rows, f"x{extension}"), modified_residues=False)[0].sequence == "AA"
    end = [*rows, *residue(8, "MSE", number=9, record="HETATM", label_number=".")]
    assert read_structure(save(end, f"x{extension}"))[0].sequence == "AMA"
    ligand = residue(30, "GLU", number=300, record="HETATM", label_number=".")
    assert read_structure(save(rows[:5] + ligand + rows[5:], f"x{extension}"))[0].sequence == "AMA"


def test_a_chromophore_made_of_three_residues_is_one_unknown(save):
    rows = [*residue(0), *residue(1, "CRO", record="HETATM"), *residue(2)]
    assert read_structure(save(rows))[0].sequence == "AXA"


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
    assert [chain.sequence for chain in read_structure(path, chains=["C", "A"])] == ["W", "V"]
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
    rows = [*residue(0, number=5), *residue(1.6, number=6)]  # cut: nearest neighbours 3.2 Angstrom apart
    (chain,) = read_structure(save(rows))
    assert chain.breaks.tolist() == [False, True]
    assert chain.residue_index().tolist() == [0, 33]
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


@pytest.mark.parametrize("size", [2**31 - 1, 2**40, -1, None])
def test_binary_arrays_that_say_they_are_huge_are_refused(save, size):
    content = msgpack.unpackb(bcif_bytes(peptide("ALA", "SER")))
    columns = next(c for c in content["dataBlocks"][0]["categories"] if c["name"] == "_atom_site")["columns"]
    lengths = [step for column in columns for step in column["data"]["encoding"] if step["kind"] == "RunLength"]
    if not lengths:  # as biotite writes it
        encoding = columns[0]["data"]["encoding"]
        encoding.insert(0, {"kind": "RunLength", "srcType": 3})
        lengths = encoding[:1]
    lengths[0]["srcSize"] = size
    refused(save(msgpack.packb(content), "x.bcif"), r"an array of .* values; at most 33554432")


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
    path = save("data_X\n_entry.id X\n", "x.cif")
    refused(path, r"holds no atoms \(no _atom_site\)")
    with pytest.raises(ValueError, match="holds no atoms") as error:
        read_structure(path)
    assert "truncated" not in str(error.value)


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
# real files


@needs_proteins
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


@needs_proteins
def test_bonds_along_real_chains():
    paths = sorted((PROTEINS / "structures").glob("*.pdb.gz"))[::71]
    for (chain,) in map(read_structure, paths):
        follows = ~chain.breaks[1:]
        steps = np.linalg.norm(np.diff(chain.coords[:, 1], axis=0), axis=-1)[follows]
        assert abs(np.nanmedian(steps) - 3.8) < 0.05, chain.label
