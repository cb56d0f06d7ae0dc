"""Small structure files for tests: `Row`s are atoms, written as PDB, mmCIF and BinaryCIF without the project's help."""

import dataclasses
import gzip
import io
from pathlib import Path

import numpy as np
from biotite.structure.io import pdbx

from protein.structure_io import ATOMS, Chain

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
    label_number: str = ""  # of mmCIF, as it is written; "." for what is no part of a polymer


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
                  row.label_chain or row.chain, 1, row.label_number or row.number, row.code or "?",
                  *numbers_of(row, 4), row.occupancy,
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


def save_structure(folder, rows_or_content, name="test.pdb"):
    """Write rows, in the format that the name's extension asks for, or the given bytes or text. Returns the path."""
    content = rows_or_content
    if isinstance(content, list):
        content = WRITERS[Path(name.removesuffix(".gz")).suffix](content)
    content = content.encode() if isinstance(content, str) else content
    path = folder / name
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


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
