"""The files of StructTokenBench's archive, each as its database publishes it. Files in, rows out.

Errors are FileNotFoundError, ValueError naming the file, the line or entry and the field, and ImportError.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protein.benchmark import inert_pickle
from tokenizer.runtime.parsing import brief, parsing, read_json, read_text, require_file, text_lines

BIOLIP_COLUMNS = 21
Row = tuple[str, Mapping[str, Any]]  # where it is, for messages, and what it holds


def read_table(path: Path, needed: Sequence[str], delimiter: str = ",") -> Iterator[tuple[str, dict[str, str]]]:
    """Rows of a table with a header. ValueError: a column of `needed` is missing, or a row too short for it."""
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    with parsing(path, "no table"):
        names, found = rows.fieldnames or [], [(f"{path}, line {rows.line_num}", row) for row in rows]
    absent = [name for name in needed if name not in names]
    if absent:
        raise ValueError(f"{path}, line 1: no column {', '.join(absent)}")
    for where, row in found:
        for name in needed:
            if row[name] is None:
                raise ValueError(f"{where}: {name}: no value; the line is cut off")
        yield where, row


def read_pdbtosp(path: Path) -> dict[str, list[str]]:
    """UniProt's list of PDB entries -> accession -> PDB ids in lower case, in the order of the file.

        102L  X-ray     1.74 A      ENLYS_BPT4  (P00720)
        1A02  X-ray     2.70 A      FOS_HUMAN   (P01100), JUN_HUMAN   (P05412),
                                    NFAC2_HUMAN (Q13469)

    The text around the list is skipped.
    """
    found: dict[str, list[str]] = {}
    pdb_id, continues = "", False
    for where, line in text_lines(path):
        match = re.match(r"([0-9][0-9A-Za-z]{3})\s+\S+\s+(?:-|[\d.]+ A)\s+(.*)", line)
        if match and not continues:
            pdb_id, names = match[1], match[2]
        elif continues:
            names = line
        else:
            continue
        for name in names.strip().rstrip(",").split(","):
            accession = re.fullmatch(r"\s*\S+\s+\((\w+)\)\s*", name)
            if not accession:
                raise ValueError(f"{where}: entry {pdb_id}: {brief(name.strip())} is not NAME (ACCESSION)")
            found.setdefault(accession[1], []).append(pdb_id.lower())
        continues = line.rstrip().endswith(",")
    if not found:
        raise ValueError(f"{path}: no line of an entry such as '102L  X-ray  1.74 A  ENLYS_BPT4 (P00720)'")
    return found


def read_biolip(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Columns of BioLiP's lines: 0 PDB id, 1 chain, 4 ligand, 7 binding and 9 catalytic residues, 20 sequence."""
    for where, line in text_lines(path, errors="replace"):
        columns = line.split("\t")
        if len(columns) != BIOLIP_COLUMNS:
            raise ValueError(f"{where}: {len(columns)} columns, BioLiP has {BIOLIP_COLUMNS}")
        yield where, columns


def parse_biolip_residues(text: str, where: str) -> list[tuple[str, int]]:
    """"D10 E25A" -> [("D", 10), ("E", 25)]: insertion codes are dropped. where: file, line and field, for the error."""
    residues = []
    for word in text.split():
        match = re.fullmatch(r"([A-Za-z])(-?\d+)\D?", word)
        if not match:
            raise ValueError(f"{where}: {brief(word)} is no residue such as D10 or E25A")
        residues.append((match[1].upper(), int(match[2])))
    return residues


def read_proteinshake(folder: Path) -> Iterator[Row]:
    """Proteins of ProteinShake's ProteinLigandInterfaceDataset.residue, .avro or a .json list, also with .gz."""
    stem = folder / "ProteinLigandInterfaceDataset.residue"
    found = [path for kind in (".json", ".json.gz", ".avro", ".avro.gz") if (path := Path(f"{stem}{kind}")).exists()]
    if not found:
        raise FileNotFoundError(f"{stem}.avro: no such file, nor .json, nor either with .gz")
    path = found[0]
    require_file(path)
    read = json.load if ".json" in path.suffixes else _avro(path)
    with parsing(path), gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        rows = list(read(file))
    yield from _objects(path, "protein", rows)


def _avro(path: Path) -> Any:
    try:
        from fastavro import reader
    except ImportError as error:
        raise ImportError(f"{path}: reading it needs the package fastavro (pip install fastavro)") from error
    return reader


def part(where: str, row: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object within an object."""
    if not isinstance(row.get(name), dict):
        raise ValueError(f"{where}: {name}: a {type(row.get(name)).__name__} instead of an object")
    return row[name]


def column(where: str, row: Mapping[str, Any], name: str, kind: type) -> list[Any]:
    """A list of words (str) or of finite numbers (float)."""
    values = row.get(name)

    def good(value: Any) -> bool:
        if kind is str:
            return isinstance(value, str)
        return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max  # false for NaN

    if not isinstance(values, list) or not all(map(good, values)):
        raise ValueError(f"{where}: {name}: must be a list of {'words' if kind is str else 'finite numbers'}")
    return values


def read_atlas(path: Path, name: str) -> tuple[str, npt.NDArray[np.float32]]:
    """Sequence and a column of ATLAS's ID_per_residue_labels.csv; NaN where it is empty."""
    letters, values = [], []
    for where, row in read_table(path, ("seq", name)):
        try:
            values.append(float(row[name] or "nan"))
        except ValueError as error:
            raise ValueError(f"{where}: {name}: {brief(row[name])} is no number") from error
        letters.append(row["seq"])
    return "".join(letters), np.array(values, dtype=np.float32)


def read_scop(path: Path) -> dict[str, tuple[str, str]]:
    """SCOP's dir.cla file: domain -> PDB id and residues, such as ("1dlw", "A:1-20,A:40-60")."""
    found = {}
    for where, line in text_lines(path):
        if line.startswith("#") or not line.strip():
            continue
        columns = line.split("\t")
        if len(columns) != 6:
            raise ValueError(f"{where}: {len(columns)} columns, SCOP's classification has 6")
        found[columns[0]] = (columns[1], columns[2])
    return found


def parse_scop_residues(text: str, where: str) -> tuple[str, list[tuple[int, int]]]:
    """"A:1-20,A:40-60" -> chain "A", [(1, 20), (40, 60)]; insertion codes are dropped. "A:" -> the whole chain, [].

    ValueError: several chains, or another form.
    """
    chains, ranges = set(), []
    for place in text.split(","):
        chain_id, colon, residues = place.rpartition(":")
        match = re.fullmatch(r"(-?\d+)[A-Za-z]?-(-?\d+)[A-Za-z]?", residues)
        if not match and residues != ("" if colon else "-"):
            raise ValueError(f"{where}: {brief(place)} is no range of residues such as A:1-20")
        chains.add(chain_id)
        if match:
            ranges.append((int(match[1]), int(match[2])))
    if len(chains) > 1:
        raise ValueError(f"{where}: {brief(text)} is of several chains")
    return chains.pop(), ranges


def read_obsolete(path: Path) -> dict[str, str]:
    """The PDB's obsolete.dat: withdrawn id -> its successor, in lower case; those with none or several are left out.

        OBSLTE    31-JUL-94 116L     216L
    """
    found = {}
    for _, line in text_lines(path):
        words = line.split()
        if words[:1] == ["OBSLTE"] and len(words) == 4:
            found[words[2].lower()] = words[3].lower()
    return found


def read_tape(stem: Path) -> Iterator[Row]:
    """Items of a data set of TAPE: the database STEM.lmdb, or STEM.json, a list of objects."""
    path = Path(f"{stem}.json")
    if path.exists():
        yield from _objects(path, "item", read_json(path))
        return
    path = Path(f"{stem}.lmdb")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such database, nor {stem}.json")
    try:
        import lmdb
    except ImportError as error:
        raise ImportError(f"{path}: reading it needs the package lmdb (pip install lmdb); or put TAPE's data in JSON "
                           f"form at {stem}.json") from error
    with parsing(path, "damaged, or no LMDB database"):
        environment = lmdb.open(str(path), readonly=True, lock=False, subdir=path.is_dir())
    with environment, environment.begin() as transaction:
        def entry(name: str) -> Any:
            with parsing(path):
                content = transaction.get(name.encode())
            if content is None:
                raise ValueError(f"{path}: no entry {name}")
            return inert_pickle.loads(content, f"{path}, entry {name}")

        count = entry("num_examples")
        if type(count) is not int:
            raise ValueError(f"{path}, entry num_examples: {brief(count)} is no number of entries")
        yield from _objects(path, "entry", (entry(str(i)) for i in range(count)))


def _objects(path: Path, what: str, rows: Iterable[Any]) -> Iterator[Row]:
    if not isinstance(rows, Iterable) or isinstance(rows, (dict, str)):
        raise ValueError(f"{path}: holds a {type(rows).__name__}, not a list")
    for i, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {what} {i}: holds a {type(row).__name__}, not an object")
        yield f"{path}, {what} {i}", row
