"""Protein chains from PDB, mmCIF and BinaryCIF files, and back to PDB and mmCIF. The formats are biotite's work.

A residue is what a file says about it: all alternatives but one of a disordered residue are left out, modified amino
acids count as their parents (MSE as MET), and what a file does not give is NaN, never invented.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import multiprocessing
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tokenizer.runtime.checkpoint import atomic_write_text
from tokenizer.runtime.parsing import parsing, require_file

ATOMS = ("N", "CA", "C", "O", "CB")  # second axis of Chain.coords
EXTENSIONS = (".pdb", ".ent", ".cif", ".mmcif", ".bcif")  # each also with .gz
ALTLOCS = ("first", "occupancy")

_LETTERS = {
    "ALA": "A", "ARG": "R", "ASN": "N", "ASP": "D", "CYS": "C", "GLN": "Q", "GLU": "E", "GLY": "G", "HIS": "H",
    "ILE": "I", "LEU": "L", "LYS": "K", "MET": "M", "PHE": "F", "PRO": "P", "SER": "S", "THR": "T", "TRP": "W",
    "TYR": "Y", "VAL": "V", "SEC": "U", "PYL": "O", "ASX": "B", "GLX": "Z", "UNK": "X",
}
_NAMES = {letter: name for name, letter in _LETTERS.items()}
# Protonation states as force fields name them; where the PDB's dictionary knows such a name, it is another compound.
_FORCE_FIELD = {"HSD": "H", "HSE": "H", "HSP": "H", "HID": "H", "HIE": "H", "HIP": "H", "CYX": "C", "CYM": "C",
                "ASH": "D", "GLH": "E", "LYN": "K"}
MAX_INFLATED = 2**29  # bytes that a gzipped file is inflated to
_NONE = (".", "?", " ", "")  # as altloc and insertion code
_RESIDUE_NUMBER = re.compile(r" *-?\d+ *|[A-Za-z][0-9A-Za-z]{3}")  # of PDB; hybrid-36 above 9999
_MAX_BOND = 2.0  # Angstrom between C and the next N; a peptide bond has 1.33, the next closest pair of a chain over 3
_MAX_COORDINATE = 1e6  # Angstrom; ESM3 takes larger numbers as absent, so they are absent here
_UNLINKED = 33  # residues between parts of unknown distance: one more than ESM3's encoder distinguishes


# ---------------------------------------------------------------------------------------------------------------------
# a chain


@dataclass(frozen=True, eq=False)
class Chain:
    """One protein chain of L >= 1 residues, in the order of the file.

    name:             of the structure: its file's name without extension
    chain_id:         as the file has it, "" if blank
    sequence:         L one-letter codes; X is unknown, B, Z, U and O as usual
    coords:           float32 (L, 5, 3), Angstrom, of ATOMS; NaN for an atom that is absent
    residue_numbers:  int64 (L,), the author's; need neither be unique nor ascend
    insertion_codes:  L strings, "" for none
    bfactors:         float32 (L,) of CA, in the file's unit (pLDDT in predictions); NaN without CA

    Raises ValueError, naming the chain, for arrays that do not fit together.
    """

    name: str
    chain_id: str
    sequence: str
    coords: npt.NDArray[np.float32]
    residue_numbers: npt.NDArray[np.int64]
    insertion_codes: tuple[str, ...]
    bfactors: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        n = len(self.sequence)
        if n < 1:
            raise ValueError(f"{self.label}: a chain without residues")
        arrays = {"coords": ((n, len(ATOMS), 3), np.float32), "residue_numbers": ((n,), np.int64),
                  "bfactors": ((n,), np.float32)}
        wrong = []
        for name, (shape, dtype) in arrays.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != dtype:
                wrong.append(f"{name} {array.shape} {array.dtype}, not {shape} {np.dtype(dtype)}")
        if len(self.insertion_codes) != n:
            wrong.append(f"{len(self.insertion_codes)} insertion codes")
        if wrong:
            raise ValueError(f"{self.label}: {n} residues, but {'; '.join(wrong)}")

    def __len__(self) -> int:
        return len(self.sequence)

    @property
    def label(self) -> str:
        """NAME_CHAIN, or NAME alone when the chain id is blank."""
        return f"{self.name}_{self.chain_id}" if self.chain_id else self.name

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """bool (L,): N, CA and C are all there."""
        return np.all(np.isfinite(self.coords[:, :3]), axis=(1, 2))

    @property
    def breaks(self) -> npt.NDArray[np.bool_]:
        """bool (L,): residue i does not follow i - 1 along the chain; False for the first.

        C and N are farther apart than 2 Angstrom; where one of them is absent, the numbers are neither consecutive nor
        equal (but for the insertion code).
        """
        return ~_linked(self.coords, self.residue_numbers)

    def residue_index(self) -> npt.NDArray[np.int64]:
        """int64 (L,) from 0: positions along the chain, for models that embed differences of positions.

        +1 from residue to residue. Over a break: the difference of the residue numbers, if that is 2 or more, else
        33 (renumbered, or another chain under the same id), which ESM3's encoder takes as "far".
        """
        gaps = np.diff(self.residue_numbers)
        gaps = np.where(gaps > 1, gaps, _UNLINKED)
        return np.cumsum(np.where(self.breaks, np.concatenate([[0], gaps]), 1)) - 1

    def residue(self, i: int) -> str:
        """How messages name residue i: 'THR 52A'."""
        return f"{_NAMES.get(self.sequence[i], self.sequence[i])} {self.residue_numbers[i]}{self.insertion_codes[i]}"


def _linked(coords: npt.NDArray[np.float32], numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """bool (L,): residue i follows i - 1, see Chain.breaks. True for the first."""
    bond = np.linalg.norm(coords[1:, 0] - coords[:-1, 2], axis=-1)  # (L - 1,), NaN where an atom is absent
    linked = np.where(np.isnan(bond), np.isin(np.diff(numbers), (0, 1)), bond < _MAX_BOND)
    return np.concatenate([[True], linked])


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_structure(
    path: str | Path,
    *,
    chains: Sequence[str] | None = None,
    model: int = 1,
    altloc: str = "first",
    modified_residues: bool = True,
    name: str | None = None,
) -> list[Chain]:
    """Protein chains of one file, in the file's order. Nucleic acids, ligands and water are left out.

    chains:  ids to read, in this order; None: all that have a residue with N, CA and C. Ids of mmCIF are the
        author's; one that does not exist is looked up among the label ids, as StructTokenBench does (residue numbers
        stay the author's).
    model:   which one of several in the file's order, from 1, whatever numbers they have.
    altloc:  of a residue in several conformations (or of several kinds) keep the one named first in the file, or the
        one of the highest occupancy.
    modified_residues:  keep amino acids stored as HETATM when bonds link them to a residue that is not, or when they
        stand between two such residues, in the file as by number (one at an end without a bond is taken for a ligand).
        False leaves all HETATM out, as StructTokenBench does: selenomethionines then are gaps.
    name:    Chain.name; None: the file's name without extension.

    Raises FileNotFoundError, and ValueError naming the file and, as far as known, chain and residue: extension not
    among EXTENSIONS, damaged or truncated, no such model or chain, no residue with N, CA and C. Text that was cut off
    between two lines cannot be told from whole text.
    """
    path = Path(path)
    if altloc not in ALTLOCS:
        raise ValueError(f"altloc {altloc!r} is none of {', '.join(ALTLOCS)}")
    kind = _extension(path)
    atoms = _parse(path, kind, _read_bytes(path), model)
    name = _stem(path) if name is None else name
    found = _chains(atoms, name, altloc, modified_residues)
    if chains is None:
        kept = [chain for chain in found.values() if chain.mask.any()]
        if not kept:
            what = "no amino acids" if not found else "no residue with N, CA and C in " + _listed(found)
            raise ValueError(f"{path}: {what}; nothing to read")
        return kept
    if kind != ".pdb" and any(chain_id not in found for chain_id in chains):
        atoms.chain_id = atoms.label_asym_id
        found = _chains(atoms, name, altloc, modified_residues) | found
    for chain_id in chains:
        if chain_id not in found:
            raise ValueError(f"{path}: no protein chain {chain_id!r}; there is {_listed(found)}")
        if not found[chain_id].mask.any():
            raise ValueError(f"{path}: chain {chain_id!r} has no residue with N, CA and C")
    return [found[chain_id] for chain_id in chains]


def _listed(found: dict[str, Chain]) -> str:
    return "chain " + ", ".join(repr(chain_id) for chain_id in found) if found else "none"


def _extension(path: Path) -> str:
    """'.pdb', '.cif' or '.bcif'. ValueError for others."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    if not suffixes or suffixes[-1] not in EXTENSIONS:
        raise ValueError(f"{path}: not the name of a structure file; known are {' '.join(EXTENSIONS)}, also with .gz")
    return {".ent": ".pdb", ".mmcif": ".cif"}.get(suffixes[-1], suffixes[-1])


def _stem(path: Path) -> str:
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    return name.rpartition(".")[0]


def _read_bytes(path: Path) -> bytes:
    require_file(path)
    content = path.read_bytes()
    zipped = content[:2] == b"\x1f\x8b"
    if path.suffix.lower() == ".gz" and not zipped:
        raise ValueError(f"{path}: not compressed by gzip, whatever its name says")
    if zipped:
        with parsing(path, "truncated or damaged gzip file"), gzip.open(io.BytesIO(content)) as file:
            content = file.read(MAX_INFLATED + 1)
        if len(content) > MAX_INFLATED:  # its parser would take several times as much
            raise ValueError(f"{path}: inflates to more than {MAX_INFLATED} bytes; gunzip it yourself to read it")
    if not content.strip():
        raise ValueError(f"{path}: empty file")
    return content


def _parse(path: Path, kind: str, content: bytes, model: int) -> Any:
    """One model as biotite's AtomArray with b_factor (NaN: not given), occupancy, altloc_id and, but for PDB,
    label_asym_id: of each residue the atoms of ATOMS and the first one, so that no residue is lost.

    Errors: read_structure.
    """
    from biotite.structure.io import pdb, pdbx

    text = "" if kind == ".bcif" else content.decode("utf-8", errors="replace")  # authors' names: in any encoding
    if kind == ".pdb":
        text = _pdb_records(path, text)
    elif text.startswith(("HEADER", "ATOM  ", "HETATM", "REMARK", "CRYST1", "MODEL ", "TITLE ", "COMPND")):
        raise ValueError(f"{path}: holds PDB, not mmCIF; name it .pdb")
    fields = ["b_factor", "occupancy"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of elements guessed from names, which nobody reads here
            if kind == ".pdb":
                file = pdb.PDBFile.read(io.StringIO(text))
                models = file.get_model_count()
                read = file.get_structure
            else:
                file = (pdbx.BinaryCIFFile.read(io.BytesIO(content)) if kind == ".bcif" else
                        pdbx.CIFFile.read(io.StringIO(text)))
                _complete(file.block["atom_site"])
                models = pdbx.get_model_count(file)
                fields.append("label_asym_id")
                read = functools.partial(pdbx.get_structure, file)
            atoms = read(model=model, altloc="all", extra_fields=fields) if 1 <= model <= models else None
    except Exception as error:  # damaged files make the parsers fail in any way; all of them mean the same here
        form = {".pdb": "PDB", ".cif": "mmCIF", ".bcif": "BinaryCIF"}[kind]
        raise ValueError(f"{path}: cannot be read as {form} ({type(error).__name__}: {error}); truncated or damaged, "
                         "unless the message says otherwise") from error
    if atoms is None:
        raise ValueError(f"{path}: no model {model}; the file has {models}")
    residue = _runs(atoms.chain_id, atoms.res_id, atoms.ins_code, atoms.res_name)
    return atoms[np.isin(atoms.atom_name, ATOMS) | (np.diff(residue, prepend=-1) > 0)]


def _complete(atom_site: Any) -> None:
    """Add the columns of mmCIF's atoms that programs leave out, and make unknown numbers NaN: biotite's are 0."""
    for column, value in {"label_alt_id": "?", "pdbx_PDB_ins_code": "?", "B_iso_or_equiv": "?", "label_asym_id": "?",
                          "occupancy": "1.0", "pdbx_PDB_model_num": "1"}.items():
        if column not in atom_site:
            atom_site[column] = np.full(atom_site.row_count, value)
    for column in ("Cartn_x", "Cartn_y", "Cartn_z", "B_iso_or_equiv"):
        atom_site[column] = atom_site[column].as_array(np.float64, np.nan)


def _pdb_records(path: Path, text: str) -> str:
    """Those lines of a PDB file that `_parse` needs; biotite's reader takes its time, line by line.

    Absent occupancies become 1, absent B-factors NaN.

    Raises ValueError naming line, chain and residue for a line that is cut off or has no numbers where they must be.
    """
    if text.lstrip().startswith("data_"):
        raise ValueError(f"{path}: holds mmCIF, not PDB; name it .cif")

    def place() -> str:
        residue = f"{line[17:20].strip()} {line[22:27].strip()}".strip()
        return f"{path}: line {number} (chain {line[21:22].strip()!r}, residue {residue})"

    records = []
    residue = None
    any_bfactor = False
    for number, line in enumerate(lines := text.splitlines(), start=1):
        if line.startswith("MODEL"):
            records.append(line)
        if not line.startswith(("ATOM  ", "HETATM")):
            continue
        line = line.rstrip()
        occupancy, bfactor = line[54:60].strip(), line[60:66].strip()
        any_bfactor |= bool(bfactor)
        if len(line) < 54 or 60 < len(line) < 66 or (number == len(lines) and any_bfactor and not bfactor):
            raise ValueError(f"{place()} is cut off after {len(line)} columns; the file is truncated or damaged")
        if _RESIDUE_NUMBER.fullmatch(line[22:26]) is None:
            raise ValueError(f"{place()} has no residue number but {line[22:26]!r}")
        if line[17:27] == residue and line[12:16].strip() not in ATOMS:
            continue
        residue = line[17:27]
        line = f"{line[:54]}{occupancy or '1.00':>6}{bfactor or 'nan':>6}{line[66:]}"
        try:
            float(line[30:38]), float(line[38:46]), float(line[46:54]), float(line[54:60]), float(line[60:66])
        except ValueError as error:
            raise ValueError(f"{place()} has {line[30:66]!r} instead of three coordinates, occupancy and B-factor"
                             ) from error
        records.append(line)
    if residue is None:
        raise ValueError(f"{path}: no ATOM records; empty, or not a PDB file")
    return "\n".join(records)


def _runs(*columns: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """(n,) number of the run of equal rows that each row is in, from 0."""
    changes = np.zeros(max(len(columns[0]) - 1, 0), dtype=bool)
    for column in columns:
        changes |= column[1:] != column[:-1]
    return np.concatenate([[0], np.cumsum(changes)]) if len(columns[0]) else np.zeros(0, dtype=np.int64)


def _chains(atoms: Any, name: str, altloc: str, modified_residues: bool) -> dict[str, Chain]:
    """Chain id -> amino acids, in the file's order."""
    from biotite.structure.info import amino_acid_names

    atoms = atoms[_one_conformation(atoms, altloc)]
    if not len(atoms):
        return {}
    run = _runs(atoms.chain_id, atoms.res_id, atoms.ins_code, atoms.res_name)
    first = np.flatnonzero(np.diff(run, prepend=-1))  # (R,) each residue's first atom
    coords = np.full((len(first), len(ATOMS), 3), np.nan, dtype=np.float32)
    bfactors = np.full(len(first), np.nan, dtype=np.float32)
    for column, atom_name in enumerate(ATOMS):
        here = np.flatnonzero(atoms.atom_name == atom_name)[::-1]  # of repeated atoms the first one wins: it comes last
        coords[run[here], column] = atoms.coord[here]
        if atom_name == "CA":
            bfactors[run[here]] = atoms.b_factor[here]
    coords[~((np.abs(coords) < _MAX_COORDINATE).all(-1))] = np.nan  # NaN and infinities as well
    names, hetero = atoms.res_name[first], atoms.hetero[first]
    numbers, chain_ids = atoms.res_id[first].astype(np.int64), atoms.chain_id[first]

    known = np.isin(names, amino_acid_names())
    whole = np.isfinite(coords[:, :3]).all((1, 2))
    amino_acid = known | (~hetero & whole)  # force fields have names that the PDB does not
    if not modified_residues:
        amino_acid = known & ~hetero
    chains = {}
    for chain_id in dict.fromkeys(chain_ids[amino_acid].tolist()):
        rows = np.flatnonzero(amino_acid & (chain_ids == chain_id))
        # HETATM are modified residues, but also amino acids and peptides among the ligands: bonds tell them apart, and
        # next to unobserved residues, where there are none, a place inside the chain.
        bonded = np.linalg.norm(coords[rows[1:], 0] - coords[rows[:-1], 2], axis=-1) < _MAX_BOND  # (R' - 1,)
        part = np.concatenate([[0], np.cumsum(~bonded)])  # (R',) number of the bonded stretch
        rows = rows[~hetero[rows] | np.isin(part, part[~hetero[rows]]) | _inside(numbers[rows], ~hetero[rows])]
        if len(rows):
            chains[chain_id] = Chain(
                name=name,
                chain_id=chain_id,
                sequence="".join(_letter(names[i]) for i in rows),
                coords=coords[rows],
                residue_numbers=numbers[rows],
                insertion_codes=tuple("" if code in _NONE else code for code in atoms.ins_code[first[rows]].tolist()),
                bfactors=bfactors[rows],
            )
    return chains


def _inside(numbers: npt.NDArray[np.int64], linked: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(R,) bool: between two linked residues of a chain, in the file as by number. Ligands come after the chain."""
    place, among = np.arange(len(numbers)), np.flatnonzero(linked)
    after = np.searchsorted(among, place)
    inside = (after > 0) & (after < len(among))
    before, behind = numbers[among[after[inside] - 1]], numbers[among[after[inside]]]
    inside[inside] = (before <= numbers[inside]) & (numbers[inside] <= behind)
    return inside


def _one_conformation(atoms: Any, altloc: str) -> npt.NDArray[np.bool_]:
    """(atoms,) bool: atoms without altloc and those of one altloc per residue.

    Alternatives may also be of different kinds (SER or THR, atoms interleaved), so a residue is a number here.
    """
    keep = np.isin(atoms.altloc_id, _NONE)
    marked = np.flatnonzero(~keep)
    place = _runs(atoms.chain_id, atoms.res_id, atoms.ins_code)[marked]
    for rows in np.split(marked, np.flatnonzero(np.diff(place)) + 1) if len(marked) else []:
        first = rows[np.argmax(atoms.occupancy[rows])] if altloc == "occupancy" else rows[0]
        keep[rows[atoms.altloc_id[rows] == atoms.altloc_id[first]]] = True
    return keep


@functools.cache
def _letter(residue_name: str) -> str:
    letter = _LETTERS.get(residue_name) or _FORCE_FIELD.get(residue_name)
    if letter is None:
        from biotite.structure.info import one_letter_code

        letter = one_letter_code(residue_name)
    return letter if letter in _NAMES else "X"  # a chromophore's "TYG" stands for several residues


# ---------------------------------------------------------------------------------------------------------------------
# folders


class Failure(NamedTuple):
    path: Path
    reason: str  # starts with the path


class FolderContents(NamedTuple):
    """chains: of all readable files, in the order of the files' names; failures: the files that gave none."""

    chains: list[Chain]
    failures: list[Failure]


def find_structures(folder: str | Path) -> list[Path]:
    """Structure files in a folder and its subfolders, sorted by path. Hidden files and folders are skipped.

    Raises FileNotFoundError, and ValueError when there are none or two differ in the extension only.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    names: dict[str, Path] = {}
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in files:
            base = file.lower().removesuffix(".gz")
            if not file.startswith(".") and base.endswith(EXTENSIONS):
                path = Path(root, file)
                same = names.setdefault(structure_name(path, folder), path)
                if same != path:
                    raise ValueError(f"{path} and {same} would have the same name; keep one of them")
    if not names:
        raise ValueError(f"{folder}: no structure files ({' '.join(EXTENSIONS)}, also with .gz)")
    return [names[name] for name in sorted(names)]


def structure_name(path: Path, folder: Path) -> str:
    """Chain.name of a file found in a folder: its path from there, without extension."""
    return (path.parent.relative_to(folder) / _stem(path)).as_posix()


def iterate_folder(
    folder: str | Path, *, max_failures: int = 0, num_workers: int = 0, **options: Any
) -> Iterator[list[Chain] | Failure]:
    """One entry per file of `find_structures`, in its order: chains, or why there are none.

    max_failures: how many are tolerated; 0 stops at the first. num_workers: processes that read; 0: this one.
    options: of `read_structure`. Raises ValueError with the first 20 reasons when there are more failures.
    """
    folder = Path(folder)
    paths = find_structures(folder)
    read = functools.partial(_read_or_fail, folder=folder, options=options)
    failures: list[Failure] = []
    with contextlib.ExitStack() as stack:
        if num_workers:
            # Not fork: the caller may have threads, which a forked child would find in the middle of something.
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(num_workers))
            results: Iterator[list[Chain] | Failure] = pool.imap(read, paths, chunksize=16)
        else:
            results = map(read, paths)
        for result in results:
            if isinstance(result, Failure):
                failures.append(result)
                if len(failures) > max_failures:
                    reasons = "; ".join(failure.reason for failure in failures[:20])
                    raise ValueError(f"{len(failures)} unreadable structure file(s), {max_failures} are tolerated: "
                                     f"{reasons}")
            yield result


def _read_or_fail(path: Path, folder: Path, options: dict[str, Any]) -> list[Chain] | Failure:
    try:
        return read_structure(path, name=structure_name(path, folder), **options)
    except (ValueError, OSError) as error:
        return Failure(path, str(error))


def read_folder(folder: str | Path, *, max_failures: int = 0, num_workers: int = 0, **options: Any) -> FolderContents:
    """All chains of a folder's structure files. Arguments and errors: `iterate_folder`."""
    contents = FolderContents([], [])
    for result in iterate_folder(folder, max_failures=max_failures, num_workers=num_workers, **options):
        if isinstance(result, Failure):
            contents.failures.append(result)
        else:
            contents.chains.extend(result)
    return contents


# ---------------------------------------------------------------------------------------------------------------------
# writing


def write_structure(path: str | Path, chains: Chain | Sequence[Chain]) -> None:
    """Write chains as one model, .pdb or .cif by the extension, atomically. Absent atoms are left out.

    PDB keeps three decimals of coordinates and two of B-factors, mmCIF all digits of float32. B-factors of CA go to
    the whole residue, 0 where unknown. A residue without any atom does not appear.

    Raises ValueError, naming file, chain and residue, for what the format cannot hold, and for another extension.
    """
    from biotite.structure.io import pdb, pdbx

    path = Path(path)
    chains = [chains] if isinstance(chains, Chain) else list(chains)
    if path.suffix.lower() not in (".pdb", ".cif"):
        raise ValueError(f"{path}: structures are written as .pdb or .cif")
    ids = [chain.chain_id for chain in chains]
    if not ids or len(set(ids)) < len(ids):
        raise ValueError(f"{path}: chains {ids}; write at least one, each under its own id")
    for chain in chains:
        check_writable(path, chain)
    if path.suffix.lower() == ".pdb" and sum(np.isfinite(chain.coords).all(-1).sum() for chain in chains) > 99_999:
        raise ValueError(f"{path}: more than the 99,999 atoms that PDB can number; write .cif")
    atoms = _atoms(chains)
    text = io.StringIO()
    if path.suffix.lower() == ".pdb":
        file = pdb.PDBFile()
        file.set_structure(atoms)
        file.lines.append("END")  # so that a reader can tell a file that was cut off
        file.write(text)
    else:
        cif = pdbx.CIFFile()
        pdbx.set_structure(cif, atoms, data_block=re.sub(r"[^!-~]", "_", chains[0].name) or "structure")
        cif.write(text)
    atomic_write_text(path, text.getvalue())


def check_writable(path: Path, chain: Chain) -> None:
    """ValueError, naming file, chain and residue: what .pdb or .cif, by the extension of path, cannot hold."""
    where = f"{path}: chain {chain.chain_id!r}"
    is_pdb = path.suffix.lower() == ".pdb"
    if is_pdb and len(chain.chain_id) > 1:
        raise ValueError(f"{where}: its id is longer than the one letter of PDB; write .cif")
    if not is_pdb and not chain.chain_id.strip():
        raise ValueError(f"{where}: mmCIF needs a chain id")
    there = np.all(np.isfinite(chain.coords), axis=-1)  # (L, 5)
    if not there.any():
        raise ValueError(f"{where} has no atoms")
    coords = np.where(there[..., None], chain.coords, 0)
    bfactors = np.nan_to_num(chain.bfactors)
    names = list(zip(chain.residue_numbers.tolist(), chain.insertion_codes, chain.sequence, strict=True))
    rules: list[tuple[str, Sequence[bool] | npt.NDArray[np.bool_]]] = [
        ("is of an unknown kind", [letter in _NAMES for letter in chain.sequence]),
        ("has the number and kind of the one before, so they would be read as one",
         [True, *(one != other for one, other in pairwise(names))]),
    ]
    if is_pdb:
        rules += [
            ("has a number of too many digits for PDB; write .cif",
             (chain.residue_numbers > -1000) & (chain.residue_numbers < 10_000)),
            ("has an insertion code longer than the one letter of PDB; write .cif",
             [len(code) <= 1 for code in chain.insertion_codes]),
            ("has a coordinate of too many digits for PDB; write .cif",
             np.all((coords > -999.9995) & (coords < 9999.9995), axis=(1, 2))),
            ("has a B-factor of too many digits for PDB; write .cif", (bfactors > -99.995) & (bfactors < 999.995)),
        ]
    for complaint, holds in rules:
        if not np.all(holds):
            raise ValueError(f"{where}, residue {chain.residue(int(np.argmin(holds)))} {complaint}")


def _atoms(chains: Sequence[Chain]) -> Any:
    """biotite's AtomArray of the atoms that are there."""
    from biotite.structure import AtomArray, concatenate

    parts = []
    for chain in chains:
        residue, column = np.nonzero(np.isfinite(chain.coords).all(-1))  # each (atoms,), in the file's order
        atoms = AtomArray(len(residue))
        atoms.coord = chain.coords[residue, column]
        atoms.chain_id = np.full(len(residue), chain.chain_id)  # filling the array would cut the id to 4 letters
        atoms.res_id = chain.residue_numbers[residue]
        atoms.ins_code = np.array(chain.insertion_codes)[residue]
        atoms.res_name = np.array([_NAMES[letter] for letter in chain.sequence])[residue]
        atoms.atom_name = np.array(ATOMS)[column]
        atoms.element = np.array([atom[0] for atom in ATOMS])[column]
        atoms.set_annotation("b_factor", np.nan_to_num(chain.bfactors)[residue])
        atoms.set_annotation("occupancy", np.ones(len(residue)))
        parts.append(atoms)
    return concatenate(parts)
