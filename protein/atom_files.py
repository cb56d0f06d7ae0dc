"""The atoms of one model of a PDB, mmCIF or BinaryCIF file, as columns: what the file says, before anything is chosen.

PDB's columns are cut here: chain ids of two letters, segment ids and odd lines, which programs write, are no part of
the format that libraries read. mmCIF and BinaryCIF are biotite's work.
"""

from __future__ import annotations

import functools
import io
import math
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tokenizer.runtime.parsing import brief, parsing

ATOMS = ("N", "CA", "C", "O", "CB")  # second axis of Chain.coords
BACKBONE = ATOMS[:3]
NONE = (".", "?", " ", "")  # as altloc, insertion code, number
PLDDT_SOURCES = ("b_factor", "qa_metric")
MAX_ROWS = 2**25  # of a table of BinaryCIF; the largest structures of the PDB have some five million atoms

LETTERS = {
    "ALA": "A", "ARG": "R", "ASN": "N", "ASP": "D", "CYS": "C", "GLN": "Q", "GLU": "E", "GLY": "G", "HIS": "H",
    "ILE": "I", "LEU": "L", "LYS": "K", "MET": "M", "PHE": "F", "PRO": "P", "SER": "S", "THR": "T", "TRP": "W",
    "TYR": "Y", "VAL": "V", "SEC": "U", "PYL": "O", "ASX": "B", "GLX": "Z", "UNK": "X",
}
# Protonation states as force fields name them; where the PDB's dictionary knows such a name, it is another compound.
FORCE_FIELD = {"HSD": "H", "HSE": "H", "HSP": "H", "HID": "H", "HIE": "H", "HIP": "H", "CYX": "C", "CYM": "C",
               "ASH": "D", "GLH": "E", "LYN": "K"}
# Names of four letters, whose last one stands where others have the first letter of a chain id.
_FOUR_LETTERS = {"HISA", "HISB", "HISD", "HISE", "HISH", "HISP", "HIS1", "HIS2", "ASPH", "ASPP", "GLUH", "GLUP", "LYSH",
                 "LYSN", "LYSP", "ARGN", "CYSH", "CYSX", "CYSM", "CYS1", "CYS2", "TYRM", "SERP", "THRP", "TYRP"}
_WATER = ("HOH", "DOD", "WAT", "SOL", "TIP")
_RESIDUE_NUMBER = re.compile(r" *-?\d+ *|[A-Za-z][0-9A-Za-z]{3}")  # of PDB; hybrid-36 above 9999
_UNCERTAINTY = re.compile(r"\(\d+\)$")  # 28.437(12)
_TAG = re.compile(r"^(_\w+\.\S+|loop_|data_(?=\S))", re.IGNORECASE | re.MULTILINE)


class Atoms(NamedTuple):
    """n atoms in the file's order: of each residue those of ATOMS, and one more so that no residue is lost."""

    atom: npt.NDArray[np.str_]
    altloc: npt.NDArray[np.str_]       # "" for none
    residue: npt.NDArray[np.str_]
    chain: npt.NDArray[np.str_]        # the author's
    label_chain: npt.NDArray[np.str_]  # of mmCIF; "" in PDB
    number: npt.NDArray[np.int64]      # the author's, label_seq_id where there is none
    code: npt.NDArray[np.str_]         # "" for none
    xyz: npt.NDArray[np.float64]       # (n, 3) Angstrom, NaN: not given
    occupancy: npt.NDArray[np.float64]
    bfactor: npt.NDArray[np.float64]   # NaN: not given
    hetero: npt.NDArray[np.bool_]
    polymer: npt.NDArray[np.bool_]     # mmCIF has given it a place in a polymer; always False in PDB

    def rows(self, which: Any) -> Atoms:
        return Atoms(*(column[which] for column in self))


class FileFacts(NamedTuple):
    """What a file says about itself; None where it does not."""

    resolution: float | None = None  # Angstrom
    r_free: float | None = None
    method: str | None = None        # of an experiment, such as X-RAY DIFFRACTION
    unread: tuple[str, ...] = ()     # data blocks with atoms beside the first


class ParsedFile(NamedTuple):
    atoms: Atoms
    facts: FileFacts


@functools.cache
def amino_acids() -> frozenset[str]:
    """Names of residues that are amino acids."""
    from biotite.structure.info import amino_acid_names

    return frozenset((*amino_acid_names(), *LETTERS, *FORCE_FIELD))


def parse_atoms(path: Path, kind: str, content: bytes, model: int, plddt_from: str = "b_factor") -> ParsedFile:
    """One model, from 1 in the file's order. kind: '.pdb', '.cif' or '.bcif'.

    plddt_from: "qa_metric" puts mmCIF's _ma_qa_metric_local, pLDDT of each residue, where the B-factors are.

    ValueError naming the file, and where it can line, chain and residue: damaged or truncated, of another kind, without
    atoms, no such model, no such metric.
    """
    if plddt_from not in PLDDT_SOURCES:
        raise ValueError(f"plddt_from {plddt_from!r} is none of {', '.join(PLDDT_SOURCES)}")
    # Authors' names are in any encoding; a byte order mark must not hide the first record.
    text = "" if kind == ".bcif" else content.decode("utf-8-sig", errors="replace")
    if kind == ".pdb":
        if plddt_from == "qa_metric":
            raise ValueError(f"{path}: PDB has no qa_metric; take pLDDT from b_factor, or read the .cif")
        return _parse_pdb(path, text, model)
    if text.startswith(("HEADER", "ATOM  ", "HETATM", "REMARK", "CRYST1", "MODEL ", "TITLE ", "COMPND")):
        raise ValueError(f"{path}: holds PDB, not mmCIF; name it .pdb")
    form = {".cif": "mmCIF", ".bcif": "BinaryCIF"}[kind]
    # Damaged files make the parsers fail in any way; all of them mean the same here.
    with parsing(path, f"cannot be read as {form}, truncated or damaged"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        block, unread = _block_with_atoms(kind, content, text)
        site = None if block is None else _columns(block, "atom_site")
        atoms = {} if site is None else {name: _strings(site, name) for name in site if name not in _NUMBERS}
        numbers = {} if site is None else {name: _floats(site, name) for name in _NUMBERS if name in site}
        facts = FileFacts() if block is None else _cif_facts(block)._replace(unread=unread)
        plddt = _qa_metric(block) if block is not None and plddt_from == "qa_metric" else None
    if block is None:
        raise ValueError(f"{path}: holds no atoms (no _atom_site); not a file of a structure")
    if plddt_from == "qa_metric" and plddt is None:
        raise ValueError(f"{path}: no pLDDT in _ma_qa_metric_local; take it from b_factor")
    return ParsedFile(_cif_atoms(path, atoms, numbers, model, plddt), facts)


def runs(*columns: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """(n,) number of the run of equal rows that each row is in, from 0."""
    changes = np.zeros(max(len(columns[0]) - 1, 0), dtype=bool)
    for column in columns:
        changes |= column[1:] != column[:-1]
    return np.concatenate([[0], np.cumsum(changes)]) if len(columns[0]) else np.zeros(0, dtype=np.int64)


# ---------------------------------------------------------------------------------------------------------------------
# PDB


def _parse_pdb(path: Path, text: str, model: int) -> ParsedFile:
    """A line that cannot be read is refused where a backbone needs it, and left out otherwise (waters numbered ****).

    Absent occupancies become 1, absent B-factors NaN. Atoms between ENDMDL and the next MODEL are of no model; ENDMDL
    alone, without MODEL, divides models as well.
    """
    if text.lstrip().startswith("data_"):
        raise ValueError(f"{path}: holds mmCIF, not PDB; name it .cif")

    def place() -> str:
        residue = f"{line[17:20].strip()} {line[22:27].strip()}".strip()
        return f"{path}: line {number} (chain {line[20:22].strip()!r}, residue {residue})"

    from biotite.structure.io.pdb.hybrid36 import decode_hybrid36

    known = amino_acids()
    rows: list[tuple[Any, ...]] = []
    residue = None
    any_atom = any_bfactor = has_models = ended = False
    current = 1  # model that lines are of
    facts: dict[str, Any] = {}
    for number, line in enumerate(lines := text.splitlines(), start=1):
        record = line[:6]
        if record not in ("ATOM  ", "HETATM"):
            if record.startswith("MODEL"):
                if not has_models:  # atoms before the first one are of none
                    rows, current = [], 0
                current, has_models, ended, residue = current + 1, True, False, None
            elif record == "ENDMDL":
                current, ended = (current, True) if has_models else (current + 1, False)
            elif record in ("REMARK", "EXPDTA"):
                _pdb_fact(line, facts)
            continue
        line = line.rstrip()
        any_atom = True
        occupancy, bfactor = line[54:60].strip(), line[60:66].strip()
        any_bfactor |= bool(bfactor)
        if len(line) < 54 or 60 < len(line) < 66 or (number == len(lines) and any_bfactor and not bfactor):
            raise ValueError(f"{place()} is cut off after {len(line)} columns; the file is truncated or damaged")
        if current != model or ended:
            continue
        atom, segment = line[12:16].strip(), line[72:76].strip()
        if line[17:27] + segment == residue and atom not in ATOMS:
            continue
        needed = line[17:20].strip() in known or (record == "ATOM  " and atom in BACKBONE)
        if _RESIDUE_NUMBER.fullmatch(line[22:26]) is None:
            if not needed:
                continue
            raise ValueError(f"{place()} has no residue number but {line[22:26]!r}")
        try:
            values = [float(line[30:38]), float(line[38:46]), float(line[46:54]), float(occupancy or 1),
                      float(bfactor or "nan")]
        except ValueError as error:
            if not needed:
                continue
            raise ValueError(f"{place()} has {line[30:66]!r} instead of three coordinates, occupancy and B-factor"
                             ) from error
        residue = line[17:27] + segment
        rows.append((atom, line[16].strip(), line[17:20].strip(), line[21].strip(), line[20].strip(), segment,
                     decode_hybrid36(line[22:26]), line[26].strip(), record == "HETATM", *values))
    if not any_atom:
        raise ValueError(f"{path}: no ATOM records; empty, or not a PDB file")
    models = _pdb_models(lines)
    if not 1 <= model <= models:
        raise ValueError(f"{path}: no model {model}; the file has {models}")
    return ParsedFile(_pdb_atoms(rows), FileFacts(**facts))


def _pdb_models(lines: list[str]) -> int:
    """Models of a file: its MODEL records, or the parts that ENDMDL alone divides it into."""
    models = sum(line.startswith("MODEL") for line in lines)
    if models:
        return models
    parts, atoms = 0, False
    for line in lines:
        if line.startswith(("ATOM  ", "HETATM")):
            parts += not atoms
            atoms = True
        elif line.startswith("ENDMDL"):
            atoms = False
    return parts


def _pdb_fact(line: str, facts: dict[str, Any]) -> None:
    if line.startswith("EXPDTA"):
        method = line[10:79].strip()
        facts.setdefault("method", method if method and "MODEL" not in method else None)
    elif found := re.match(r"REMARK   2 RESOLUTION\. +([\d.]+)", line):
        facts.setdefault("resolution", _float(found[1]))
    elif found := re.match(r"REMARK   3 +FREE R VALUE +(?:\([^)]*\) +)?: +([\d.]+)", line):
        facts.setdefault("r_free", _float(found[1]))


def _float(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _pdb_atoms(rows: list[tuple[Any, ...]]) -> Atoms:
    names = ("atom", "altloc", "residue", "chain", "extra", "segment", "number", "code", "hetero")
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    text = {name: np.array(columns[name], dtype=np.str_) for name in names if name not in ("number", "hetero")}
    values = np.array([row[len(names):] for row in rows], dtype=np.float64).reshape(-1, 5)
    amino = np.isin(text["residue"], list(amino_acids()))
    chain = text["chain"]
    # Column 21 is no part of the format: a second letter of the chain id for some programs, of the name for others.
    words = set(np.char.add(text["residue"], text["extra"])[amino & (text["extra"] != "")].tolist())
    if words - _FOUR_LETTERS:
        chain = np.char.add(text["extra"], chain)
    # Old files repeat the entry's id in the columns of segments; only several of them tell chains apart.
    blank = chain == ""
    if len(set(text["segment"][blank & amino].tolist()) - {""}) > 1:
        chain = np.where(blank, text["segment"], chain)
    return Atoms(text["atom"], text["altloc"], text["residue"], chain, np.full(len(rows), "", dtype="<U1"),
                 np.array(columns["number"], dtype=np.int64), text["code"], values[:, :3], values[:, 3], values[:, 4],
                 np.array(columns["hetero"], dtype=bool), np.zeros(len(rows), dtype=bool))


# ---------------------------------------------------------------------------------------------------------------------
# mmCIF and BinaryCIF

_NUMBERS = ("cartn_x", "cartn_y", "cartn_z", "occupancy", "b_iso_or_equiv")


def _block_with_atoms(kind: str, content: bytes, text: str) -> tuple[Any, tuple[str, ...]]:
    """The first data block that has atoms (restraints of ligands are blocks as well), None if none has; and the names
    of others that have.
    """
    from biotite.structure.io import pdbx

    if kind == ".bcif":
        import msgpack

        found = msgpack.unpackb(content)
        _check_lengths(found)
        file: Any = pdbx.BinaryCIFFile.deserialize(found)
    else:
        if "_atom_site." not in text:  # tags are case-insensitive, biotite's names are not
            text = _TAG.sub(lambda found: found[0].lower(), text)
        file = pdbx.CIFFile.read(io.StringIO(text))
    if not len(file):
        raise ValueError("no data block")
    found = {name: block for name, block in file.items() if "atom_site" in {category.lower() for category in block}}
    return next(iter(found.values()), None), tuple(found)[1:]


def _check_lengths(value: Any) -> None:
    """ValueError: a BinaryCIF array that says it is longer than MAX_ROWS; a few bytes could ask for all memory."""
    if isinstance(value, list):
        for item in value:
            _check_lengths(item)
    elif isinstance(value, dict):
        if value.get("kind") in ("RunLength", "IntegerPacking"):  # the encodings that make arrays longer
            size = value.get("srcSize")
            if type(size) is not int or not 0 <= size <= MAX_ROWS:
                raise ValueError(f"an array of {brief(size)} values; at most {MAX_ROWS} (atom_files.MAX_ROWS)")
        for item in value.values():
            _check_lengths(item)


def _columns(block: Any, category: str) -> dict[str, Any]:
    """Lower-case name -> column; {} where the block has no such category."""
    found = next((name for name in block if name.lower() == category), None)
    return {} if found is None else {name.lower(): column for name, column in block[found].items()}


def _strings(columns: dict[str, Any], name: str) -> npt.NDArray[np.str_]:
    return np.asarray(columns[name].as_array(np.str_))


def _floats(columns: dict[str, Any], name: str) -> npt.NDArray[np.float64]:
    """float64, NaN where unknown; a standard uncertainty, as in 28.437(12), is cut off."""
    try:
        return np.asarray(columns[name].as_array(np.float64, np.nan))
    except ValueError:
        values = [_UNCERTAINTY.sub("", value) for value in _strings(columns, name).tolist()]
        return np.array([np.nan if value in NONE else float(value) for value in values])


def _cif_facts(block: Any) -> FileFacts:
    def first(category: str, column: str) -> float | None:
        columns = _columns(block, category)
        values = [value for value in (_strings(columns, column).tolist() if column in columns else [])
                  if value not in NONE]
        return _float(_UNCERTAINTY.sub("", values[0])) if values else None

    exptl = _columns(block, "exptl")
    methods = [value for value in (_strings(exptl, "method").tolist() if "method" in exptl else [])
               if value not in NONE and "MODEL" not in value.upper()]
    resolution = first("refine", "ls_d_res_high")
    return FileFacts(first("em_3d_reconstruction", "resolution") if resolution is None else resolution,
                     first("refine", "ls_r_factor_r_free"), "; ".join(methods) or None)


def _qa_metric(block: Any) -> dict[tuple[str, str], float] | None:
    """(label_asym_id, label_seq_id) -> pLDDT, of the first model; None: the file has none."""
    local, kinds = _columns(block, "ma_qa_metric_local"), _columns(block, "ma_qa_metric")
    if not local:
        return None
    wanted = None
    if "id" in kinds:
        modes = _strings(kinds, "mode").tolist() if "mode" in kinds else ["local"] * len(_strings(kinds, "id"))
        texts = zip(*(_strings(kinds, name).tolist() for name in ("name", "type") if name in kinds), strict=True)
        wanted = {number for number, mode, text in zip(_strings(kinds, "id").tolist(), modes, texts, strict=True)
                  if mode.lower() == "local" and any("plddt" in word.lower() for word in text)}
        if not wanted:
            return None
    values = _floats(local, "metric_value").tolist()
    ids = _strings(local, "metric_id").tolist() if "metric_id" in local else [""] * len(values)
    keys = zip(_strings(local, "label_asym_id").tolist(), _strings(local, "label_seq_id").tolist(), strict=True)
    found: dict[tuple[str, str], float] = {}
    for key, value, metric in zip(keys, values, ids, strict=True):
        if wanted is None or metric in wanted:
            found.setdefault(key, value)
    return found


def _cif_atoms(path: Path, text: dict[str, npt.NDArray[np.str_]], values: dict[str, npt.NDArray[np.float64]],
               model: int, plddt: dict[tuple[str, str], float] | None) -> Atoms:
    """text, values: columns of atom_site by their names in lower case."""
    n = len(next(iter((text | values).values()))) if text or values else 0
    if not n:
        raise ValueError(f"{path}: holds no atoms (an empty _atom_site); not a file of a structure")
    filled = np.full(n, "?", dtype="<U1")

    def column(*names: str, default: npt.NDArray[np.str_] | None = None) -> npt.NDArray[np.str_]:
        """The first of the columns that is there, unknown values from the next."""
        there = [text[name] for name in names if name in text] + ([] if default is None else [default])
        if not there:
            raise ValueError(f"{path}: its atoms have no {' or '.join(names)}, which backbones need")
        out = there[0]
        for other in there[1:]:
            out = np.where(np.isin(out, NONE), other, out)
        return out

    models = column("pdbx_pdb_model_num", default=filled)
    listed = list(dict.fromkeys(models.tolist()))
    if not 1 <= model <= len(listed):
        raise ValueError(f"{path}: no model {model}; the file has {len(listed)}")
    absent = [name for name in _NUMBERS[:3] if name not in values]
    if absent:
        raise ValueError(f"{path}: its atoms have no {absent[0]}, which backbones need")
    labels = column("label_asym_id", default=filled)
    seq = column("label_seq_id", default=filled)
    atom, residue = column("auth_atom_id", "label_atom_id"), column("auth_comp_id", "label_comp_id")
    chain = _blank(column("auth_asym_id", "label_asym_id", default=filled))
    group = column("group_pdb", default=filled)
    hetero = group == "HETATM" if "group_pdb" in text else ~np.isin(residue, list(LETTERS))
    needed = np.isin(residue, list(amino_acids())) | (~hetero & np.isin(atom, BACKBONE))
    number, numbered = _residue_numbers(path, column("auth_seq_id", "label_seq_id", default=filled),
                                        text.get("auth_seq_id", filled), seq, chain, needed)
    code = _blank(column("pdbx_pdb_ins_code", default=filled))
    placed = ~np.isin(seq, NONE)
    # Programs that give waters and ligands a label_seq_id as well say nothing about polymers by it.
    trusted = not (placed & np.isin(residue, _WATER)).any()
    bfactor = values.get("b_iso_or_equiv", np.full(n, np.nan))
    if plddt is not None:
        bfactor = np.array([plddt.get(key, np.nan) for key in zip(labels.tolist(), seq.tolist(), strict=True)])
    occupancy = values.get("occupancy", np.ones(n))
    atoms = Atoms(atom, _blank(column("label_alt_id", default=filled)), residue, chain, _blank(labels), number, code,
                  np.stack([values[name] for name in _NUMBERS[:3]], axis=-1),
                  np.where(np.isfinite(occupancy), occupancy, 1.0), bfactor, hetero, placed & trusted)
    atoms = atoms.rows((models == listed[model - 1]) & numbered)
    run = runs(atoms.chain, atoms.number, atoms.code, atoms.residue)
    return atoms.rows(np.isin(atoms.atom, ATOMS) | (np.diff(run, prepend=-1) > 0))


def _blank(column: npt.NDArray[np.str_]) -> npt.NDArray[np.str_]:
    return np.where(np.isin(column, NONE), "", column)


def _residue_numbers(
    path: Path, first: npt.NDArray[np.str_], author: npt.NDArray[np.str_], label: npt.NDArray[np.str_],
    chain: npt.NDArray[np.str_], needed: npt.NDArray[np.bool_],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Numbers (n,), and which atoms have one. A chain in which the author's are unknown has label_seq_id throughout:
    numbers of both kinds in one chain would collide.
    """
    without = needed & np.isin(author, NONE)
    mixed = np.isin(chain, np.unique(chain[without])) & ~np.isin(label, NONE) if without.any() else without
    texts = np.where(mixed, label, first)
    known, place = np.unique(texts, return_inverse=True)
    parsed, valid = [], []
    for value in known.tolist():
        valid.append(re.fullmatch(r"-?\d{1,18}", value) is not None)
        parsed.append(int(value) if valid[-1] else 0)
    number, numbered = np.array(parsed, dtype=np.int64)[place], np.array(valid)[place]
    if (needed & ~numbered).any():
        where = int(np.argmax(needed & ~numbered))
        raise ValueError(f"{path}: atom {where + 1} (chain {str(chain[where])!r}) has no residue number but "
                         f"{str(texts[where])!r}")
    return number, numbered
