"""Generated protein backbones: data for runs and tests where no structure file is at hand.

A chain grows element by element (helices and strands), each a rigid body behind a connection: of many connections the
one is kept that packs the element best without a clash. Bonds and angles are ideal, only torsions vary, and every
residue follows from the last as in NeRF. Secondary structure, lengths and packing are those of small domains, but the
radius of gyration is a fifth larger, sheets are made of hairpins only, and there is no evolution in it: a model trained
on this is no model of proteins.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protein.geometry import Frames, backbone_dihedrals, backbone_frames, place_atom, virtual_cb
from protein.structure_io import ATOMS, Chain

MIN_LENGTH, MAX_LENGTH = 40, 160  # residues

# Angstrom and degrees; Engh and Huber, International Tables for Crystallography F, 2001
N_CA, CA_C, C_N, C_O = 1.458, 1.525, 1.329, 1.231
N_CA_C, CA_C_N, C_N_CA, CA_C_O = 111.0, 117.2, 121.7, 120.1

_BANK = 1024  # elements drawn of each kind, and connections for each pair of kinds and number of residues between
_CANDIDATES = 192  # connections tried at a time
_SHORTLIST = 48  # of them, those nearest to the chain's centre or best bonded
_FINALISTS = 4  # of them, those with the most contacts, whose atoms are looked at
_ATTEMPTS = 100  # to grow a chain of MIN_LENGTH
_ATOM_CLASH = 2.6  # Angstrom between atoms of residues that are not neighbours; a hydrogen bond has 2.9
_CA_CLASH = 4.2  # between CAs of the chain and of what is added, more than 2 residues apart
_CONTACT = 9.0  # between CAs that touch
_AHEAD = 2  # residues behind an element for which it must leave room

# phi, psi and the standard deviation about both, in degrees, of residues by their kind
_TORSIONS = {
    "helix": (-63, -42, 2),
    "strand": (-123, 116, 4),
    # Between the strands of a hairpin: a type I' turn, and a residue of each strand beside it. About these means, found
    # by minimisation, all hydrogen bonds between the strands are 2.9 to 3.3 Angstrom long.
    "approach": (-146, 130, 8),
    "turn1": (70, 38, 8),
    "turn2": (79, -3, 8),
    "return": (-81, 136, 8),
}
_LOOP_TORSIONS = ((-65, -40, 12), (-120, 130, 12), (-70, 145, 12), (57, 40, 12))  # each residue has one of them
_LOOP_WEIGHTS = (0.3, 0.25, 0.35, 0.1)
_OMEGA, _OMEGA_SPREAD = 180, 2
_HAIRPIN = ("approach", "turn1", "turn2", "return")
_LONGEST = {"helix": 22, "strand": 8}  # residues, without those of a strand that a hairpin brings

# Per mille of amino acids in helices, strands and elsewhere, and wherever phi is positive: unbound structures of
# Docking Benchmark 5, secondary structure by biotite's annotate_sse.
_AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
_HELIX = (101, 16, 50, 84, 39, 28, 20, 61, 75, 117, 29, 37, 17, 57, 57, 51, 49, 66, 14, 30)
_STRAND = (54, 29, 32, 49, 56, 27, 20, 93, 53, 107, 20, 27, 31, 35, 40, 56, 74, 126, 17, 53)
_ELSEWHERE = (69, 25, 74, 61, 36, 40, 24, 44, 59, 74, 16, 55, 70, 38, 43, 85, 70, 61, 16, 39)
_POSITIVE_PHI = (18, 7, 58, 30, 11, 588, 11, 4, 42, 15, 7, 100, 0, 27, 29, 24, 8, 5, 3, 11)
_FREQUENCIES = {"helix": _HELIX, "strand": _STRAND, "approach": _STRAND, "return": _STRAND}


class _Unit(NamedTuple):
    """A helix or strand, and the residues that lead to it: from the last one, or from the chain's start."""

    lead: tuple[str, ...]
    kind: str
    length: int

    @property
    def kinds(self) -> list[str]:
        return [*self.lead, *[self.kind] * self.length]


@torch.inference_mode()
def ideal_backbone(seed: int, index: int) -> Chain:
    """One chain of 40 to 160 residues: helices, strands (most in hairpins), or both. A pure function of its arguments.

    Named "ideal_SEED_INDEX", chain A, residues from 1; all atoms are there but CB of glycine; B-factors are unknown.
    """
    rng = np.random.default_rng((seed, index))
    for _ in range(_ATTEMPTS):
        frames, kinds = _grow(_plan(rng), rng)
        length = len(kinds)
        if length >= MIN_LENGTH:
            break
    else:
        raise RuntimeError(f"no chain without clashes in {_ATTEMPTS} attempts for seed {seed}, index {index}")
    atoms = _atoms(frames)[0]  # (L, 5, 3)
    coords = (atoms - atoms.mean((0, 1))).numpy()
    sequence = _sequence(kinds, backbone_dihedrals(atoms)[:, 0], rng)
    coords[np.array(list(sequence)) == "G", ATOMS.index("CB")] = np.nan
    return Chain(
        name=f"ideal_{seed}_{index}",
        chain_id="A",
        sequence=sequence,
        coords=coords,
        residue_numbers=np.arange(1, length + 1),
        insertion_codes=("",) * length,
        bfactors=np.full(length, np.nan, dtype=np.float32),
    )


def generate_backbones(count: int, seed: int = 0) -> list[Chain]:
    """ideal_backbone(seed, 0), ..., ideal_backbone(seed, count - 1)."""
    return [ideal_backbone(seed, index) for index in range(count)]


# ---------------------------------------------------------------------------------------------------------------------
# what follows what


def _plan(rng: np.random.Generator) -> list[_Unit]:
    """Units of MIN_LENGTH to MAX_LENGTH residues in all."""
    menu = (("helix",), ("strand",), ("helix", "strand", "strand"))[rng.integers(3)]
    target = rng.integers(MIN_LENGTH, MAX_LENGTH + 1)
    units: list[_Unit] = []
    total = 0
    while True:
        kind = menu[rng.integers(len(menu))]
        if not units:
            lead = ("loop",) * int(rng.integers(1, 4))
        elif kind == units[-1].kind == "strand" and rng.random() < 0.75:
            lead = _HAIRPIN
        else:
            lead = ("loop",) * int(rng.integers(3, 6))
        # An even number of residues between two turns: then the next strand has the far side, and sheets grow.
        unit = _Unit(lead, kind, int(rng.integers(9, 23) if kind == "helix" else rng.choice((4, 6, 6, 8))))
        more = total + len(unit.kinds)
        if more > MAX_LENGTH or (more > target and total >= MIN_LENGTH):
            return units
        units.append(unit)
        total = more


def _sequence(kinds: Sequence[str], phi: Tensor, rng: np.random.Generator) -> str:
    rows = [_POSITIVE_PHI if angle > 0 else _FREQUENCIES.get(kind, _ELSEWHERE)
            for kind, angle in zip(kinds, phi.tolist(), strict=True)]
    upto = np.cumsum(rows, axis=1)  # (L, 20)
    drawn = rng.random((len(kinds), 1)) * upto[:, -1:]
    return "".join(_AMINO_ACIDS[i] for i in (drawn >= upto).sum(1))


# ---------------------------------------------------------------------------------------------------------------------
# growth


def _grow(plan: Sequence[_Unit], rng: np.random.Generator) -> tuple[Frames, list[str]]:
    """Frames (1, L) of the residues, and their kinds. A chain that comes to a dead end stops there."""
    before, *rest = plan
    kinds = before.kinds
    starts = _path(kinds, 32, rng)  # nine of ten have no clash
    frames = _pick(starts, (~_clash(_atoms(starts), 0)).nonzero()[:1, 0])
    for unit in rest:
        # Where a hairpin finds no room a loop may.
        for choice in (unit, *[unit._replace(lead=("loop",) * len(unit.lead))] * 2):
            longer = _place(frames, before, choice, rng)
            if longer is not None:
                break
        else:
            break
        frames, before, kinds = longer, choice, kinds + choice.kinds
    return frames, kinds


def _place(frames: Frames, before: _Unit, unit: _Unit, rng: np.random.Generator) -> Frames | None:
    """The chain (1, L) with one more unit, (1, L + N); None if that clashes wherever it was tried."""
    bank = _connections(before.kind, unit.lead, unit.kind)
    lead = _last(frames).compose(_pick(bank, rng.integers(len(bank.origin), size=_CANDIDATES)))  # (K, P)
    # As seen from its first residue, which is a lead's last one.
    element = _element(unit.kind, unit.length + _AHEAD, rng)  # (1, M + A)
    start = _last(lead)  # (K, 1)
    ca = torch.cat([lead.origin, start.apply(element.origin[:, 1:])], dim=1)  # (K, N, 3)
    cost = 3 * (ca - frames.origin.mean(1)).norm(dim=-1).mean(1)  # (K,)
    old = frames.origin.shape[1]
    if unit.lead == _HAIRPIN:
        # From the residues beside the turn on, every other pair of residues has two hydrogen bonds.
        steps = torch.arange(1, min(unit.length, before.length), 2)
        amide = _residue()[[0, 4]]  # N and O
        here, there = _part(element, steps), _part(frames, old - 1 - steps)  # (1, S)
        n1, o1 = start.apply(_apply(here, amide).flatten(1, 2)).unflatten(1, (-1, 2)).unbind(2)  # (K, S, 3)
        n2, o2 = _apply(there, amide).unbind(2)  # (1, S, 3)
        bonds = torch.cat([n1 - o2, o1 - n2], dim=1).norm(dim=-1)
        cost = cost + 500 * (bonds - 2.95).abs().mean(1)
    best = cost.topk(_SHORTLIST, largest=False).indices
    distance = _distances(ca[best], frames.origin.expand(_SHORTLIST, -1, -1))  # (S, N, L)
    apart = old + torch.arange(ca.shape[1])[:, None] - torch.arange(old)  # (N, L), residues
    clash = ((distance < _CA_CLASH) & (apart > 2)).flatten(1).any(1)
    cost = (cost[best] - torch.sigmoid(_CONTACT - distance).sum((1, 2))).masked_fill(clash, math.inf)
    best = best[cost.argsort()[: min(_FINALISTS, int(cost.isfinite().sum()))]]
    lead = _pick(lead, best)
    chains = _cat(_pick(frames, torch.zeros_like(best)), lead)
    chains = _cat(chains, _last(lead).compose(_part(element, slice(1, unit.length))))  # (F, L + P + M - 1)
    whole = (~_clash(_atoms(chains), old)).nonzero()[:1, 0]
    return _pick(chains, whole) if len(whole) else None


def _element(kind: str, length: int, rng: np.random.Generator) -> Frames:
    """Frames (1, L) of a helix or strand as seen from its first residue."""
    bank = _elements(kind)
    return _part(_pick(bank, rng.integers(len(bank.origin), size=1)), slice(length))


@functools.cache
def _elements(kind: str) -> Frames:
    """Frames (B, M) of helices or strands of the greatest length, without clashes, as seen from their first residue."""
    frames = _path([kind] * (_LONGEST[kind] + _AHEAD), _BANK, np.random.default_rng(0))
    return _pick(frames, ~_clash(_atoms(frames), 0))


@functools.cache
def _connections(before: str, lead: tuple[str, ...], after: str) -> Frames:
    """Frames (B, P) of a lead and the first residue of the next element, as seen from the last residue before.

    Only those that clash neither with themselves nor with the ends of the two elements.
    """
    ends = 5  # residues
    frames = _path([*[before] * ends, *lead, *[after] * ends], _BANK, np.random.default_rng(0))
    frames = _pick(frames, ~_clash(_atoms(frames), 0))
    return _part(frames, slice(ends - 1, ends)).inverse().compose(_part(frames, slice(ends, ends + len(lead) + 1)))


def _path(kinds: Sequence[str], draws: int, rng: np.random.Generator) -> Frames:
    """Frames (draws, L) of residues as seen from the first, with torsions drawn anew each time."""
    loops = np.array(_LOOP_TORSIONS)[rng.choice(len(_LOOP_TORSIONS), size=(draws, len(kinds)), p=_LOOP_WEIGHTS)]
    fixed = np.array([_TORSIONS.get(kind, (0, 0, 0)) for kind in kinds])  # (L, 3)
    phi, psi, spread = np.where(np.array(kinds)[:, None] == "loop", loops, fixed).transpose(2, 0, 1)  # (draws, L) each
    a, b, c = rng.standard_normal((3, draws, len(kinds)))
    degrees = np.stack([phi + spread * a, psi + spread * b, _OMEGA + _OMEGA_SPREAD * c])
    phi, psi, omega = torch.from_numpy(np.radians(degrees)).float()
    n, ca, c, *_ = _residue().expand(draws, len(kinds) - 1, 5, 3).unbind(-2)
    next_n = place_atom(n, ca, c, C_N, math.radians(CA_C_N), psi[:, :-1])
    next_ca = place_atom(ca, c, next_n, N_CA, math.radians(C_N_CA), omega[:, :-1])
    next_c = place_atom(c, next_n, next_ca, CA_C, math.radians(N_CA_C), phi[:, 1:])
    start = Frames(torch.eye(3).expand(draws, 1, 3, 3), torch.zeros(draws, 1, 3))
    frames = _cat(start, backbone_frames(torch.stack([next_n, next_ca, next_c], dim=-2)))  # seen from the one before
    reach = 1
    while reach < len(kinds):  # seen from the one `reach` before, or from the first
        longer = _part(frames, slice(-reach)).compose(_part(frames, slice(reach, None)))
        frames = _cat(_part(frames, slice(reach)), longer)
        reach *= 2
    return frames


def _pick(frames: Frames, rows: Tensor | npt.NDArray[np.int64]) -> Frames:
    return Frames(frames.rotation[rows], frames.origin[rows])


def _part(frames: Frames, columns: slice | Tensor) -> Frames:
    return Frames(frames.rotation[:, columns], frames.origin[:, columns])


def _last(frames: Frames) -> Frames:
    return _part(frames, slice(-1, None))


def _cat(first: Frames, second: Frames) -> Frames:
    """(B, L) and (B, N) -> (B, L + N)"""
    return Frames(*(torch.cat(both, dim=1) for both in zip(first, second, strict=True)))


# ---------------------------------------------------------------------------------------------------------------------
# atoms


@functools.cache
def _residue() -> Tensor:
    """N, CA, C, CB and, of one in a strand, O (5, 3) in the residue's own frame: CA at 0, C on the negative x axis."""
    angle = math.radians(N_CA_C)
    backbone = torch.tensor([[-N_CA * math.cos(angle), N_CA * math.sin(angle), 0], [0, 0, 0], [-CA_C, 0, 0]])
    psi = _TORSIONS["strand"][1]
    n, ca, c = backbone
    o = place_atom(n, ca, c, C_O, math.radians(CA_C_O), math.radians(psi - 180))
    return torch.stack([*backbone, virtual_cb(backbone), o])


def _apply(frames: Frames, points: Tensor) -> Tensor:
    """Points (P, 3) of each residue's own frame: (B, L) -> (B, L, P, 3)."""
    return Frames(frames.rotation[:, :, None], frames.origin[:, :, None]).apply(points)


def _atoms(frames: Frames) -> Tensor:
    """float32 (B, L, 5, 3) of ATOMS. O is in the plane of CA, C and the next N; after the last C, that of a strand."""
    n, ca, c, cb, o = _apply(frames, _residue()).unbind(2)
    o[:, :-1] = place_atom(n[:, 1:], ca[:, :-1], c[:, :-1], C_O, math.radians(CA_C_O), math.pi)
    return torch.stack([n, ca, c, o, cb], dim=2)


def _clash(atoms: Tensor, start: int) -> Tensor:
    """bool (B,): an atom, of (B, L, A, 3), of a residue from `start` on is too close to one that is no neighbour's."""
    start = max(start - 1, 0)  # O of the residue before has moved with what follows it
    length, count = atoms.shape[1:3]
    residue = torch.arange(length).repeat_interleave(count)
    apart = (residue[start * count :, None] - residue).abs()
    distance = _distances(atoms[:, start:].flatten(1, 2), atoms.flatten(1, 2))
    return ((distance < _ATOM_CLASH) & (apart > 1)).flatten(1).any(1)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """(B, N, 3) and (B, M, 3) -> (B, N, M), without matrix products: their last digits depend on the machine."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
