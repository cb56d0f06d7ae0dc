"""Protein chains from PDB, mmCIF and BinaryCIF files, and back to PDB and mmCIF.

A residue is what a file says about it: all alternatives but one of a disordered residue are left out, modified amino
acids count as their parents (MSE as MET), and what a file does not give is NaN, never invented.
"""

from __future__ import annotations

import functools
import gzip
import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protein.atom_files import ATOMS, FORCE_FIELD, LETTERS, Atoms, FileFacts, parse_atoms
from protein.residues import ALTLOCS, MAX_BOND, Residues, assemble, chain_rows
from tokenizer.runtime.files import atomic_write_text
from tokenizer.runtime.parsing import brief, parsing, require_file

EXTENSIONS = (".pdb", ".ent", ".pdb1", ".cif", ".mmcif", ".bcif")  # each also with .gz
MAX_INFLATED = 2**29  # bytes that a gzipped file is inflated to
MAX_PLDDT = 100
_NAMES = {letter: name for name, letter in LETTERS.items()}
_UNLINKED = 33  # residues between parts of unknown distance: one more than ESM3's encoder distinguishes


class StructureWarning(UserWarning):
    """A file was read, but there is something about it that its reader should know; the message names the file."""


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
    linked = np.where(np.isnan(bond), np.isin(np.diff(numbers), (0, 1)), bond < MAX_BOND)
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
    min_plddt: float | None = None,
    plddt_from: str = "b_factor",
    max_resolution: float | None = None,
    max_r_free: float | None = None,
) -> list[Chain]:
    """Protein chains of one file, in the file's order. Nucleic acids, ligands and water are left out.

    chains:  ids to read, in this order; None: all that have a residue with N, CA and C. Ids of mmCIF are the
        author's; one that does not exist is looked up among the label ids, as StructTokenBench does (residue numbers
        stay the author's). Of PDB they are column 22, with column 21 where that is a second letter, or the segment ids
        of chains without one.
    model:   which one of several in the file's order, from 1, whatever numbers they have. The copies of a chain in a
        biological assembly (.pdb1) are models.
    altloc:  of residues in several conformations (or of several kinds) keep the one that their chain names first, or
        the one of the highest occupancy along a stretch of such residues.
    modified_residues:  keep amino acids stored as HETATM when mmCIF gives them a place in a polymer (label_seq_id),
        when bonds link them to a residue that is not HETATM, or when they stand between two such residues, in the file
        as by number (one at an end without a bond is taken for a ligand); those of unknown kinds with a place or bonds
        on both sides, as X. False leaves all HETATM out, as StructTokenBench does: selenomethionines then are gaps.
    name:    Chain.name; None: the file's name without extension.
    min_plddt, plddt_from:  see mask_plddt; "b_factor", or "qa_metric" (of mmCIF's _ma_qa_metric_local), which then is
        in Chain.bfactors.
    max_resolution, max_r_free:  Angstrom, and a share; files that say to be above are refused as `Filtered`.

    StructureWarning: a chain whose numbering repeats, which may be several chains under one id; further data blocks
    with atoms, which are not read.

    Raises FileNotFoundError, and ValueError naming the file and, as far as known, chain and residue: extension not
    among EXTENSIONS, damaged or truncated, no such model or chain, no residue with N, CA and C. Text that was cut off
    between two lines cannot be told from whole text.
    """
    path = Path(path)
    return read_content(path, _read_bytes, chains=chains, model=model, altloc=altloc,
                        modified_residues=modified_residues, name=name, min_plddt=min_plddt, plddt_from=plddt_from,
                        max_resolution=max_resolution, max_r_free=max_r_free)


class Filtered(ValueError):
    """A file that is whole, but that a filter leaves out."""


def read_content(
    path: Path,
    load: Callable[[Path], bytes],
    *,
    chains: Sequence[str] | None = None,
    model: int = 1,
    altloc: str = "first",
    modified_residues: bool = True,
    name: str | None = None,
    min_plddt: float | None = None,
    plddt_from: str = "b_factor",
    max_resolution: float | None = None,
    max_r_free: float | None = None,
) -> list[Chain]:
    """read_structure for what is no file of its own: load gives the bytes, path what messages and formats go by."""
    if altloc not in ALTLOCS:
        raise ValueError(f"altloc {altloc!r} is none of {', '.join(ALTLOCS)}")
    kind = _extension(path)
    atoms, facts = parse_atoms(path, kind, _inflated(path, load(path)), model, plddt_from)
    _check_facts(path, facts, max_resolution, max_r_free, min_plddt if plddt_from == "b_factor" else None)
    name = file_stem(path) if name is None else name
    found = _chains(path, atoms, name, altloc, modified_residues)
    if chains is None:
        kept = [chain for chain in found.values() if chain.mask.any()]
        if not kept:
            what = "no amino acids" if not found else "no residue with N, CA and C in " + _listed(found)
            raise ValueError(f"{path}: holds no protein: {what}; nothing to read")
    else:
        if any(chain_id not in found for chain_id in chains) and atoms.label_chain.any():
            by_label = atoms._replace(chain=atoms.label_chain)
            found = _chains(path, by_label, name, altloc, modified_residues) | found
        for chain_id in chains:
            if chain_id not in found:
                raise ValueError(f"{path}: no protein chain {chain_id!r}; there is {_listed(found)}")
            if not found[chain_id].mask.any():
                raise ValueError(f"{path}: chain {chain_id!r} has no residue with N, CA and C")
        kept = [found[chain_id] for chain_id in chains]
    if min_plddt is None:
        return kept
    try:
        masked = [mask_plddt(chain, min_plddt) for chain in kept]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    confident = [chain for chain in masked if chain.mask.any()]
    if not confident:
        highest = max(float(np.nanmax(chain.bfactors, initial=-np.inf)) for chain in kept)
        scale = "; pLDDT from 0 to 1? then so is the threshold" if min_plddt > 1 and 0 <= highest <= 1 else ""
        raise Filtered(f"{path}: no residue with a pLDDT of at least {min_plddt:g}, the highest is {highest:g}{scale}")
    return confident


def _check_facts(path: Path, facts: FileFacts, max_resolution: float | None, max_r_free: float | None,
                 min_plddt: float | None) -> None:
    """Filtered: what the file says of itself is beyond a limit. What it does not say is no reason to leave it out.
    StructureWarning: it holds more structures.
    """
    for what, value, limit in (("resolution", facts.resolution, max_resolution), ("R-free", facts.r_free, max_r_free)):
        if value is not None and limit is not None and value > limit:
            raise Filtered(f"{path}: {what} {value:g} is above {limit:g}")
    if facts.unread:
        warnings.warn(f"{path}: the atoms of its first data block are read, and not those of {brief(facts.unread[0])} "
                      f"({len(facts.unread)} in all); give each structure a file of its own", StructureWarning,
                      stacklevel=4)
    if min_plddt is not None and facts.method is not None:
        raise ValueError(f"{path}: an experimental structure ({facts.method}), whose B-factors are no pLDDT")


def mask_plddt(chain: Chain, min_plddt: float) -> Chain:
    """The chain with the atoms of residues left out (NaN) whose pLDDT, in bfactors, is below min_plddt or unknown.

    ValueError: see require_plddt.
    """
    require_plddt(chain.label, chain.bfactors)
    low = ~(chain.bfactors >= min_plddt)
    return replace(chain, coords=np.where(low[:, None, None], np.float32(np.nan), chain.coords))


def require_plddt(label: str, values: npt.NDArray[np.float32]) -> None:
    """ValueError, naming the chain: values that pLDDT cannot have. Not every experiment is said to be one."""
    highest = float(np.nanmax(values, initial=-np.inf))
    if highest > MAX_PLDDT:
        raise ValueError(f"chain {label} has {highest:g} where pLDDT should be, which ends at {MAX_PLDDT}: are these "
                         "the B-factors of an experiment?")


def _listed(found: dict[str, Chain]) -> str:
    return "chain " + ", ".join(repr(chain_id) for chain_id in found) if found else "none"


def _extension(path: Path) -> str:
    """'.pdb', '.cif' or '.bcif'. ValueError for others."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    if not suffixes or suffixes[-1] not in EXTENSIONS:
        raise ValueError(f"{path}: not the name of a structure file; known are {' '.join(EXTENSIONS)}, also with .gz")
    return {".ent": ".pdb", ".pdb1": ".pdb", ".mmcif": ".cif"}.get(suffixes[-1], suffixes[-1])


def file_stem(path: Path) -> str:
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    return name.rpartition(".")[0]


def _read_bytes(path: Path) -> bytes:
    require_file(path)
    return path.read_bytes()


def _inflated(path: Path, content: bytes) -> bytes:
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


def _chains(path: Path, atoms: Atoms, name: str, altloc: str, modified_residues: bool) -> dict[str, Chain]:
    """Chain id -> amino acids, in the file's order."""
    residues = assemble(atoms, altloc)
    chains = {}
    for chain_id, rows in chain_rows(residues, modified_residues).items():
        part = residues.rows(rows)
        chains[chain_id] = Chain(
            name=name,
            chain_id=chain_id,
            sequence="".join(map(_letter, part.name.tolist())),
            coords=part.coords,
            residue_numbers=part.number,
            insertion_codes=tuple(part.code.tolist()),
            bfactors=part.bfactor,
        )
        again = _repeated(part)
        if again.any():
            warnings.warn(f"{path}: chain {chain_id!r} repeats the numbers of {int(again.sum())} of its {len(rows)} "
                          f"residues, first at {chains[chain_id].residue(int(np.argmax(again)))}; if these are several "
                          "chains under one id, rename them", StructureWarning, stacklevel=4)
    return chains


def _repeated(part: Residues) -> npt.NDArray[np.bool_]:
    """(R,) bool: another residue of the chain, not just a ligand under its id, has had this number before."""
    first: dict[tuple[int, str], int] = {}
    place = [first.setdefault(key, i) for i, key in enumerate(zip(part.number.tolist(), part.code.tolist(),
                                                                  strict=True))]
    return part.repeated & (np.array(place) < np.arange(len(place)))


@functools.cache
def _letter(residue_name: str) -> str:
    letter = LETTERS.get(residue_name) or FORCE_FIELD.get(residue_name)
    if letter is None:
        from biotite.structure.info import one_letter_code

        letter = one_letter_code(residue_name)
    return letter if letter in _NAMES else "X"  # a chromophore's "TYG" stands for several residues


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
