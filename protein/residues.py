"""Which atoms are one residue, which of its conformations is kept, and which residues are a chain's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from protein.atom_files import ATOMS, BACKBONE, Atoms, amino_acids, runs

ALTLOCS = ("first", "occupancy")
MAX_BOND = 2.0  # Angstrom between C and the next N; a peptide bond has 1.33, the next closest pair of a chain over 3
_MAX_COORDINATE = 1e6  # Angstrom; ESM3 takes larger numbers as absent, so they are absent here


class Residues(NamedTuple):
    """R residues, one conformation each, in the file's order."""

    name: npt.NDArray[np.str_]
    chain: npt.NDArray[np.str_]
    number: npt.NDArray[np.int64]
    code: npt.NDArray[np.str_]
    coords: npt.NDArray[np.float32]   # (R, 5, 3) of ATOMS, NaN where absent
    bfactor: npt.NDArray[np.float32]  # of CA, NaN without it
    hetero: npt.NDArray[np.bool_]
    polymer: npt.NDArray[np.bool_]    # see Atoms
    repeated: npt.NDArray[np.bool_]   # its chain has had this number before, and no atoms were missing there

    def rows(self, which: npt.NDArray[np.int64]) -> Residues:
        columns: tuple[npt.NDArray[Any], ...] = self
        return Residues(*(column[which] for column in columns))


def assemble(atoms: Atoms, altloc: str) -> Residues:
    """altloc: "first" or "occupancy", see structure_io.read_structure."""
    slot, repeats = residue_slots(atoms)
    kept = _one_conformation(atoms, slot, altloc)
    atoms, slot = atoms.rows(kept), slot[kept]
    order = np.argsort(slot, kind="stable")
    atoms, slot = atoms.rows(order), slot[order]
    used, first, place = np.unique(slot, return_index=True, return_inverse=True)
    coords = np.full((len(used), len(ATOMS), 3), np.nan, dtype=np.float32)
    bfactor = np.full(len(used), np.nan, dtype=np.float32)
    for column, name in enumerate(ATOMS):
        here = np.flatnonzero(atoms.atom == name)[::-1]  # of repeated atoms the first one wins: it comes last
        coords[place[here], column] = atoms.xyz[here]
        if name == "CA":
            bfactor[place[here]] = atoms.bfactor[here]
    coords[~((np.abs(coords) < _MAX_COORDINATE).all(-1))] = np.nan  # NaN and infinities as well
    _drop_coinciding(coords)
    return Residues(atoms.residue[first], atoms.chain[first], atoms.number[first], atoms.code[first], coords, bfactor,
                    atoms.hetero[first], atoms.polymer[first], np.isin(used, list(repeats)))


def _drop_coinciding(coords: npt.NDArray[np.float32]) -> None:
    """In place: N, CA and C in one point, such as the origin, are placeholders, and so are atoms that share it."""
    n, ca, c = coords[:, 0], coords[:, 1], coords[:, 2]
    for one, other in ((n, ca), (ca, c), (n, c)):
        same = (one == other).all(-1)  # NaN is not
        if same.any():
            point = np.where(same[:, None], one, np.nan)
            coords[(coords == point[:, None]).all(-1)] = np.nan


# ---------------------------------------------------------------------------------------------------------------------
# atoms -> residues


def residue_slots(atoms: Atoms) -> tuple[npt.NDArray[np.int64], set[int]]:
    """(n,) residue of each atom, numbered as their backbones appear (without one: as they do), which is their order
    also where side chains come before; and the residues that repeat a number of their chain.

    A residue is a run of lines of one chain, number, insertion code and name. Where a number comes again, its atoms
    belong to the residue that has it if they complete that one (hydrogens at the end of the file) or are marked as
    alternatives to it (conformers, one after the other). If one residue of a stretch of them does neither, the whole
    stretch is a copy.
    """
    run = runs(atoms.chain, atoms.number, atoms.code, atoms.residue)
    first = np.flatnonzero(np.diff(run, prepend=-1))
    keys = list(zip(atoms.chain[first].tolist(), atoms.number[first].tolist(), atoms.code[first].tolist(),
                    strict=True))
    if len(set(keys)) == len(keys):
        return run, set()
    names = atoms.residue[first].tolist()
    marks = list(zip(atoms.atom.tolist(), atoms.altloc.tolist(), strict=True))
    parts = [marks[start:end] for start, end in zip(first, [*first[1:], len(run)], strict=True)]
    slots: list[dict[str, set[tuple[str, str]]]] = []  # name -> its atoms
    latest: dict[tuple[str, int, str], int] = {}
    of_run, repeats = [0] * len(parts), set()
    for block, again in _blocks(keys):
        copy = again and not all(_joins(slots[latest[keys[i]]], names[i], parts[i]) for i in block)
        own: dict[tuple[str, int, str], int] = {}  # slots of this block
        for i in block:
            known = (own if copy else latest).get(keys[i])
            if known is None or (not (again and not copy) and not _joins(slots[known], names[i], parts[i])):
                known = len(slots)
                slots.append({})
                if copy:
                    repeats.add(known)
            slots[known].setdefault(names[i], set()).update(parts[i])
            own[keys[i]] = latest[keys[i]] = of_run[i] = known
    slot = np.array(of_run, dtype=np.int64)[run]
    place = _first(slot, np.arange(len(slot)), len(slots))
    backbone = np.flatnonzero(np.isin(atoms.atom, BACKBONE))
    begin = _first(slot[backbone], backbone, len(slots))
    place = np.where(begin < len(slot), begin, place)
    rank = np.argsort(np.argsort(place))
    return rank[slot], set(rank[sorted(repeats)].tolist())


def _first(slot: npt.NDArray[np.int64], rows: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """(count,) the least of the rows of each slot; beyond all rows where it has none."""
    out = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(out, slot, rows)
    return out


def _blocks(keys: list[tuple[str, int, str]]) -> Iterator[tuple[list[int], bool]]:
    """Stretches of runs, and whether their keys have all been left before: where a chain is written again."""
    seen: set[tuple[str, int, str]] = set()
    block: list[int] = []
    again = False
    for i, key in enumerate(keys):
        follows = bool(block) and keys[block[-1]] == key  # names that alternate within a residue
        now = again if follows else key in seen
        if block and (now != again or keys[block[-1]][0] != key[0]):
            yield block, again
            block = []
        block.append(i)
        again = now
        if not again:
            seen.add(key)
    if block:
        yield block, again


def _joins(slot: dict[str, set[tuple[str, str]]], name: str, part: list[tuple[str, str]]) -> bool:
    """Whether atoms (name, altloc) of a residue called `name` belong to a residue that has some already."""
    own = slot.get(name, set())
    if any(mark in own for mark in part):
        return False
    here = {atom for atom, _ in own}
    if any(atom in here and not (altloc and all(mark[1] for mark in own if mark[0] == atom)) for atom, altloc in part):
        return False
    others = [mark for kind, marks in slot.items() if kind != name for mark in marks]
    return not others or (all(altloc for _, altloc in part) and all(altloc for _, altloc in others))


def _one_conformation(atoms: Atoms, slot: npt.NDArray[np.int64], altloc: str) -> npt.NDArray[np.bool_]:
    """(n,) bool: atoms without altloc, and those of one altloc of each residue, chosen alike along its chain.

    "first": by the order in which the chain names them; "occupancy": by their sum over a stretch of neighbours that
    have alternatives. Of a residue only those count that have most of its backbone.
    """
    keep = atoms.altloc == ""
    marked = np.flatnonzero(~keep)
    if not len(marked):
        return keep
    marked = marked[np.argsort(slot[marked], kind="stable")]
    groups = np.split(marked, np.flatnonzero(np.diff(slot[marked])) + 1)
    ranks: dict[str, dict[str, int]] = {}
    for i in np.sort(marked).tolist():
        rank = ranks.setdefault(str(atoms.chain[i]), {})
        rank.setdefault(str(atoms.altloc[i]), len(rank))
    for stretch in _stretches(atoms, slot, groups):
        weight: dict[str, float] = {}
        if altloc == "occupancy":
            for rows in stretch:
                for label in set(atoms.altloc[rows].tolist()):
                    mean = float(atoms.occupancy[rows][atoms.altloc[rows] == label].mean())
                    weight[label] = weight.get(label, 0.0) + round(mean, 6)
        for rows in stretch:
            labels = atoms.altloc[rows]
            backbone = np.isin(atoms.atom[rows], BACKBONE)
            count = {label: int((backbone & (labels == label)).sum()) for label in set(labels.tolist())}
            rank = ranks[str(atoms.chain[rows[0]])]
            chosen = min((label for label in count if count[label] == max(count.values())),
                         key=lambda label: (-weight.get(label, 0.0), rank[label]))
            keep[rows[labels == chosen]] = True
    return keep


def _stretches(atoms: Atoms, slot: npt.NDArray[np.int64], groups: list[npt.NDArray[np.int64]]
               ) -> Iterator[list[npt.NDArray[np.int64]]]:
    """The groups of neighbours along a chain together."""
    stretch: list[npt.NDArray[np.int64]] = []
    for rows in groups:
        if stretch:
            before = stretch[-1]
            if slot[rows[0]] != slot[before[0]] + 1 or atoms.chain[rows[0]] != atoms.chain[before[0]]:
                yield stretch
                stretch = []
        stretch.append(rows)
    yield stretch


# ---------------------------------------------------------------------------------------------------------------------
# residues -> chains


def chain_rows(residues: Residues, modified_residues: bool) -> dict[str, npt.NDArray[np.int64]]:
    """Chain id -> its residues, by their places.

    HETATM are modified residues, but also amino acids and peptides among the ligands. A place in a polymer (mmCIF) or
    bonds tell them apart, and next to unobserved residues, where there are none, a place inside the chain. One of an
    unknown kind needs bonds on both sides.
    """
    whole = np.asarray(np.isfinite(residues.coords[:, :3]).all((1, 2)))
    known = np.isin(residues.name, list(amino_acids()))
    # Force fields have names that the PDB does not.
    candidate = known | whole if modified_residues else known & ~residues.hetero
    ids = dict.fromkeys(residues.chain[candidate & (known | ~residues.hetero)].tolist())
    found = {}
    for chain_id in ids:
        rows = np.flatnonzero(candidate & (residues.chain == chain_id))
        bonded = _bonded(residues, rows)
        both = np.zeros(len(rows), dtype=bool)
        both[1:-1] = bonded[1:] & bonded[:-1]
        sure = residues.polymer[rows] & whole[rows]
        rows = rows[known[rows] | ~residues.hetero[rows] | both | sure]
        hetero, part = residues.hetero[rows], np.concatenate([[0], np.cumsum(~_bonded(residues, rows))])
        kept = (~hetero | np.isin(part, part[~hetero]) | residues.polymer[rows]
                | (_inside(residues.number[rows], ~hetero) & known[rows]))
        if kept.any():
            found[chain_id] = _with_bonded(residues, rows[kept], rows[~kept & whole[rows]])
    return found


def _bonded(residues: Residues, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """(R - 1,) bool: from residue to residue."""
    return _near(residues.coords[rows[:-1], 2], residues.coords[rows[1:], 0])


def _near(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Whether C and N, (..., 3), have a bond; not where one of them is absent."""
    return np.asarray(np.linalg.norm(one - other, axis=-1) < MAX_BOND)


def _inside(numbers: npt.NDArray[np.int64], linked: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """(R,) bool: between two linked residues of a chain, in the file as by number. Ligands come after the chain."""
    place, among = np.arange(len(numbers)), np.flatnonzero(linked)
    after = np.searchsorted(among, place)
    inside = (after > 0) & (after < len(among))
    before, behind = numbers[among[after[inside] - 1]], numbers[among[after[inside]]]
    inside[inside] = (before <= numbers[inside]) & (numbers[inside] <= behind)
    return inside


def _with_bonded(residues: Residues, rows: npt.NDArray[np.int64], others: npt.NDArray[np.int64]
                 ) -> npt.NDArray[np.int64]:
    """rows, and of the others, which stand elsewhere in the file, those that bonds put between two neighbours."""
    for other in others.tolist():
        places = np.flatnonzero(_near(residues.coords[rows[:-1], 2], residues.coords[other, 0])
                                & _near(residues.coords[other, 2], residues.coords[rows[1:], 0]))
        if len(places) == 1:
            rows = np.insert(rows, places[0] + 1, other)
    return rows
