"""Geometry of protein backbones: frames, neighbours, dihedrals, superposition, and how alike two structures are.

Everything is batched (leading dimensions "..." are free, equal for all arguments) and masked: what lies at masked
places, NaN included, changes nothing. Autocast is off inside, and no product goes through a matrix multiplication that
TF32 could shorten: float32 in, float32 out, whatever the surroundings. Angstrom and radians.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

MAX_COORDINATE = 1e6  # ESM3 takes larger numbers for absent atoms
NEIGHBOURS = 16
LDDT_RADIUS = 15.0
LDDT_THRESHOLDS = (0.5, 1.0, 2.0, 4.0)
_PAIRS_AT_ONCE = 2**24  # of the L x L distances that exist at a time: 64 MiB in float32

_P = ParamSpec("_P")
_R = TypeVar("_R")


def _without_autocast(function: Callable[_P, _R]) -> Callable[_P, _R]:
    @functools.wraps(function)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        device = next(arg.device for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor))
        if not torch.is_autocast_enabled(device.type):
            return function(*args, **kwargs)
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapped


def _check(mask: Tensor, **points: Tensor) -> None:
    """ValueError unless all points have one shape and the mask is bool of its leading dimensions."""
    (first, shape), *others = ((name, value.shape) for name, value in points.items())
    for name, other in others:
        if other != shape:
            raise ValueError(f"{name} {tuple(other)} and {first} {tuple(shape)} must have one shape")
    if mask.dtype != torch.bool or mask.shape != shape[: mask.ndim] or mask.ndim >= len(shape) or shape[-1] != 3:
        raise ValueError(f"{first} {tuple(shape)} with mask {tuple(mask.shape)} of {mask.dtype}: the mask must be bool "
                         f"and have the leading dimensions of the points, whose last one must be 3")


# ---------------------------------------------------------------------------------------------------------------------
# frames


class Frames(NamedTuple):
    """Rigid motions x -> R x + t: from a residue's own coordinate system to the common one.

    rotation: float32 (..., 3, 3), columns are the axes. origin: float32 (..., 3).
    """

    rotation: Tensor
    origin: Tensor

    def apply(self, points: Tensor) -> Tensor:
        """Local points (..., 3) -> common coordinates (..., 3)."""
        return rotate(self.rotation, points) + self.origin.float()

    def inverse(self) -> Frames:
        """The motion back, such that inverse().apply(apply(x)) is x."""
        back = self.rotation.transpose(-1, -2)
        return Frames(back, -rotate(back, self.origin))

    def compose(self, inner: Frames) -> Frames:
        """compose(inner).apply(x) is apply(inner.apply(x))."""
        columns = [rotate(self.rotation, column) for column in inner.rotation.unbind(-1)]
        return Frames(torch.stack(columns, dim=-1), self.apply(inner.origin))

    def flat(self) -> Tensor:
        """(..., 12) as ESM3 stores them: nine numbers of the rotation row by row, then the origin."""
        return torch.cat([self.rotation.flatten(-2), self.origin], dim=-1)


@_without_autocast
def rotate(rotation: Tensor, vectors: Tensor) -> Tensor:
    """R v: rotation (..., 3, 3), vectors (..., 3) -> float32 (..., 3). Leading dimensions broadcast."""
    return (rotation.float() * vectors.float().unsqueeze(-2)).sum(-1)


@_without_autocast
def gram_schmidt(x_axis: Tensor, xy_plane: Tensor, eps: float = 1e-10) -> Tensor:
    """Vectors (..., 3) each -> rotations float32 (..., 3, 3) with columns e_x, e_y, e_z = e_x cross e_y.

    e_x points along x_axis, e_y towards xy_plane. Lengths are sqrt(sum of squares + eps), as in AlphaFold 2
    (algorithm 21) and ESM3: finite, with finite gradients, for vectors that vanish or are parallel.
    """
    x_axis, xy_plane = x_axis.float(), xy_plane.float()
    e_x = x_axis / (x_axis.square().sum(-1, keepdim=True) + eps).sqrt()
    e_y = xy_plane - e_x * (e_x * xy_plane).sum(-1, keepdim=True)
    e_y = e_y / (e_y.square().sum(-1, keepdim=True) + eps).sqrt()
    return torch.stack([e_x, e_y, torch.linalg.cross(e_x, e_y)], dim=-1)


def valid_residues(coords: Tensor, mask: Tensor | None = None) -> Tensor:
    """bool (..., L): residues whose N, CA and C, coords (..., L, >= 3, 3), are finite and below 1e6; and in mask."""
    valid = (coords[..., :3, :].abs() < MAX_COORDINATE).all(-1).all(-1)  # NaN compares false
    return valid if mask is None else valid & mask


@_without_autocast
def backbone_frames(coords: Tensor, valid: Tensor | None = None) -> Frames:
    """Frames (..., L) of N, CA, C, coords (..., L, >= 3, 3): x from C to CA, N in the xy plane, origin CA (ESM3).

    valid: bool (..., L). Other residues get the frame of the mean N, CA and C of the valid ones, or, where none is
    valid, the identity at the origin of coordinates; so ESM3's "mean" frame. None: all are valid.
    """
    atoms = coords[..., :3, :].float()
    if valid is None:
        n, ca, c = atoms.unbind(-2)
        return Frames(gram_schmidt(ca - c, n - ca), ca)
    _check(valid, coords=atoms)
    atoms = torch.where(valid[..., None, None], atoms, 0.0)
    count = valid.sum(-1)[..., None, None]  # (..., 1, 1)
    mean = backbone_frames((atoms.sum(-3) / (count + 1e-8)).unsqueeze(-3))  # (..., 1), the constant is ESM3's
    identity = torch.eye(3, device=atoms.device)
    mean_rotation = torch.where(count.unsqueeze(-1) > 0, mean.rotation, identity)
    frames = backbone_frames(atoms)
    return Frames(
        torch.where(valid[..., None, None], frames.rotation, mean_rotation),
        torch.where(valid[..., None], frames.origin, mean.origin),
    )


# ---------------------------------------------------------------------------------------------------------------------
# neighbours


@torch.no_grad()
@_without_autocast
def knn_graph(
    ca: Tensor, valid: Tensor, k: int = NEIGHBOURS, present: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each residue and its nearest ones: index int64 (B, L, S) and near bool (B, L, S), S = min(k, L); ESM3's order.

    ca: (B, L, 3). valid: bool (B, L), residues with coordinates. present: bool (B, L), residues that are no padding;
    None: all. near: neighbour and residue are both valid and present.

    Slot 0 is the residue itself. Then by CA distance where both residues are valid; then, where one is not, by the
    distance |i - j| along the array; padding last. Equal distances: the lower index first (ESM3 leaves that open).
    Memory is bounded: the L x L matrix never exists whole.

    Raises ValueError for shapes that do not fit or k < 1.
    """
    _check(valid, ca=ca)
    if ca.ndim != 3 or k < 1:
        raise ValueError(f"ca {tuple(ca.shape)} must be (B, L, 3) and k {k} at least 1")
    if present is not None:
        _check(present, ca=ca)
        valid = valid & present
    batch, length, _ = ca.shape
    k = min(k, length)
    ca = torch.where(valid[..., None], ca.float(), 0.0)
    position = torch.arange(length, device=ca.device)
    index = torch.empty(batch, length, k, dtype=torch.int64, device=ca.device)
    near = torch.empty(batch, length, k, dtype=torch.bool, device=ca.device)
    rows = max(1, _PAIRS_AT_ONCE // (batch * length))
    for start in range(0, length, rows):
        part = slice(start, start + rows)
        both = valid[:, part, None] & valid[:, None, :]  # (B, rows, L)
        distance = torch.cdist(ca[:, part], ca, compute_mode="donot_use_mm_for_euclid_dist")
        # Nothing valid comes after something that is not, even between proteins a megametre apart.
        distance.clamp_(max=0.999 * MAX_COORDINATE)
        along = MAX_COORDINATE + 100.0 * (position[part, None] - position).abs()  # (rows, L)
        distance = torch.where(both, distance, along)
        if present is not None:
            distance.masked_fill_(~(present[:, part, None] & present[:, None, :]), math.inf)
        # Non-negative floats sort like their bits; below them go the bits of the index, which makes the order total.
        key = (distance.view(torch.int32).long() << 32) | position
        key.diagonal(offset=start, dim1=1, dim2=2).copy_(position[part] - 2**32)  # itself, even where CAs coincide
        chosen = key.topk(k, dim=-1, largest=False).values & 0xFFFF_FFFF
        index[:, part] = chosen
        near[:, part] = both.gather(-1, chosen)
    return index, near


# ---------------------------------------------------------------------------------------------------------------------
# dihedrals and the placement of atoms


@_without_autocast
def dihedral(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Torsion angle about b-c, points (..., 3) -> (...) in (-pi, pi]; 0 is cis, IUPAC's sign. Keeps float64."""
    axis = c - b
    n1 = torch.linalg.cross(b - a, axis)
    n2 = torch.linalg.cross(axis, d - c)
    y = (torch.linalg.cross(n1, n2) * axis).sum(-1) / axis.norm(dim=-1)
    return torch.atan2(y, (n1 * n2).sum(-1))


def backbone_dihedrals(coords: Tensor) -> Tensor:
    """phi, psi, omega of each residue, coords (..., L, >= 3, 3) -> (..., L, 3); NaN where a neighbour is missing.

    phi: C N CA C, psi: N CA C N, omega: CA C N CA of residue i and i + 1. Neighbours are those in the array.
    """
    n, ca, c = coords[..., :3, :].unbind(-2)
    phi = dihedral(c[..., :-1, :], n[..., 1:, :], ca[..., 1:, :], c[..., 1:, :])  # (..., L - 1)
    psi = dihedral(n[..., :-1, :], ca[..., :-1, :], c[..., :-1, :], n[..., 1:, :])
    omega = dihedral(ca[..., :-1, :], c[..., :-1, :], n[..., 1:, :], ca[..., 1:, :])
    nan = torch.full_like(n[..., :1, 0], math.nan)
    columns = [torch.cat([nan, phi], -1), torch.cat([psi, nan], -1), torch.cat([omega, nan], -1)]
    return torch.stack(columns, dim=-1)


@_without_autocast
def place_atom(
    a: Tensor, b: Tensor, c: Tensor, length: Tensor | float, angle: Tensor | float, torsion: Tensor | float
) -> Tensor:
    """d (..., 3) with |d - c| = length, angle b c d and torsion a b c d; each a number or (...). Keeps float64.

    Source: Parsons et al., Practical conversion from torsion space to Cartesian space (NeRF), J. Comput. Chem. 2005.
    """
    length, angle, torsion = (  # a number is filled in on the device, not copied there
        (value.to(c) if isinstance(value, Tensor) else torch.full((), value, dtype=c.dtype, device=c.device))[..., None]
        for value in (length, angle, torsion))
    along = torch.nn.functional.normalize(c - b, dim=-1)
    normal = torch.nn.functional.normalize(torch.linalg.cross(b - a, along), dim=-1)
    plane = torch.linalg.cross(normal, along)
    return c + length * (angle.sin() * (torsion.cos() * plane + torsion.sin() * normal) - angle.cos() * along)


def virtual_cb(coords: Tensor) -> Tensor:
    """Where CB is, or would be in glycine: coords (..., >= 3, 3) of N, CA, C -> (..., 3).

    1.522 Angstrom from CA, angle N CA CB 1.927, torsion C N CA CB -2.143 (trRosetta's and ESM3's constants).
    """
    n, ca, c = coords[..., :3, :].unbind(-2)
    return place_atom(c, n, ca, 1.522, 1.927, -2.143)


# ---------------------------------------------------------------------------------------------------------------------
# superposition


@torch.no_grad()
@_without_autocast
def kabsch(mobile: Tensor, target: Tensor, mask: Tensor) -> Frames:
    """The motion of mobile onto target, points (..., P, 3) where mask (..., P), of the least squared distance.

    A proper rotation always: a mirror image stays one. Two points or points in a line leave a rotation open; any of
    the best is returned. No points: no motion. Computed in float64. No gradient flows through the motion, which at
    the optimum it need not: the gradient of `rmsd` is exact.
    Source: Kabsch, Acta Cryst. A 1976 and 1978.
    Raises ValueError for shapes that do not fit.
    """
    _check(mask, mobile=mobile, target=target)
    weight = mask[..., None].double()
    count = weight.sum(-2, keepdim=True).clamp(min=1)  # (..., 1, 1)
    x, y = (torch.where(mask[..., None], points.double(), 0.0) for points in (mobile, target))
    x_mean, y_mean = x.sum(-2, keepdim=True) / count, y.sum(-2, keepdim=True) / count
    covariance = (weight * (y - y_mean)).transpose(-1, -2) @ (x - x_mean)  # (..., 3, 3), float64: no TF32
    u, _, v = torch.linalg.svd(covariance)
    signs = torch.ones_like(u[..., 0])
    signs[..., 2] = torch.linalg.det(u @ v).sign()
    rotation = (u * signs.unsqueeze(-2)) @ v
    origin = y_mean.squeeze(-2) - (rotation @ x_mean.transpose(-1, -2)).squeeze(-1)
    return Frames(rotation.float(), origin.float())


@_without_autocast
def superpose(mobile: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """mobile (..., P, 3) moved onto target by `kabsch`, float32; points outside the mask move along."""
    motion = kabsch(mobile, target, mask)
    return Frames(motion.rotation.unsqueeze(-3), motion.origin.unsqueeze(-2)).apply(mobile)


@_without_autocast
def rmsd(mobile: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Root of the mean squared distance after superposition: points (..., P, 3), mask (..., P) -> float32 (...).

    NaN where the mask is empty, with a gradient of zero; so is that of structures that agree exactly.
    Mirror images are not alike.
    """
    # About target's centre: float32 has few digits left for points far from the origin.
    _check(mask, mobile=mobile, target=target)
    safe = [torch.where(mask[..., None], points.float(), 0.0) for points in (mobile, target)]
    count = mask.sum(-1)
    x, y = (torch.where(mask[..., None], p - p.sum(-2, keepdim=True) / count.clamp(min=1)[..., None, None], 0.0)
            for p in safe)
    difference = torch.where(mask[..., None], superpose(x, y, mask) - y, 0.0)
    return torch.linalg.vector_norm(difference, dim=(-2, -1)) / count.sqrt()


def backbone_rmsd(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """`rmsd` over N, CA and C: coords (..., L, >= 3, 3), mask (..., L) of residues -> float32 (...)."""
    x, y = (coords[..., :3, :].flatten(-3, -2) for coords in (predicted, target))  # (..., 3 L, 3), residue by residue
    return rmsd(x, y, mask.repeat_interleave(3, dim=-1))


# ---------------------------------------------------------------------------------------------------------------------
# similarity without superposition, and with one of its own


@_without_autocast
def lddt(
    predicted: Tensor, target: Tensor, mask: Tensor, *, radius: float = LDDT_RADIUS, per_residue: bool = False
) -> Tensor:
    """Local distance difference test in [0, 1]: coords (..., L, A, 3), mask (..., L) -> float32 (...), or (..., L).

    Of all pairs of atoms of different residues that are closer than `radius` in the target: the fraction whose
    distance differs by less than 0.5, 1, 2 and 4 Angstrom, averaged over the four. Per residue: of the pairs with an
    atom in that residue. NaN where there is no pair. Mirror images are alike to this measure.
    CA-lDDT: coords[..., 1:2, :]; of the backbone: coords[..., :3, :].
    Source: Mariani et al., Bioinformatics 2013. Has no gradient: it counts.
    Raises ValueError for shapes that do not fit.
    """
    _check(mask, predicted=predicted, target=target)
    if predicted.ndim != mask.ndim + 2:
        raise ValueError(f"predicted {tuple(predicted.shape)} must have two dimensions more than mask "
                         f"{tuple(mask.shape)}: atoms and xyz")
    *leading, length, atoms, _ = predicted.shape
    x, y = (torch.where(mask[..., None, None], coords.detach().float(), 0.0).reshape(-1, length * atoms, 3)
            for coords in (predicted, target))
    there = mask.reshape(-1, length).repeat_interleave(atoms, dim=-1)  # (B, P), P = L A
    residue = torch.arange(length, device=mask.device).repeat_interleave(atoms)  # (P,)
    kept, pairs = torch.zeros(2, *there.shape, device=mask.device)  # (B, P) each
    rows = max(1, _PAIRS_AT_ONCE // max(1, there.numel()))
    for start in range(0, length * atoms, rows):
        part = slice(start, start + rows)
        distance, reference = (torch.cdist(p[:, part], p, compute_mode="donot_use_mm_for_euclid_dist") for p in (x, y))
        counted = (reference < radius) & there[:, part, None] & there[:, None] & (residue[part, None] != residue)
        error = (distance - reference).abs_()  # (B, rows, P)
        for threshold in LDDT_THRESHOLDS:
            kept[:, part] += ((error < threshold) & counted).sum(-1)
        pairs[:, part] += counted.sum(-1)
    shape = (-1, length, atoms) if per_residue else (-1, 1, length * atoms)
    kept, pairs = (value.double().reshape(shape).sum(-1) for value in (kept, pairs))
    score = (kept / (len(LDDT_THRESHOLDS) * pairs)).float()
    return score.reshape(*leading, length) if per_residue else score.reshape(leading)


def tm_score(predicted: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """TM-score in (0, 1] of CA positions (..., L, 3) where mask (..., L), residue i onto residue i -> float32 (...).

    Normalised by the number of residues in the mask. The superposition that maximises the score is searched for by
    TM-align (tmtools) with the correspondence held fixed. NaN where fewer than 3 residues are in the mask.
    Source: Zhang and Skolnick, Proteins 2004; Nucleic Acids Research 2005. On the CPU, chain by chain.
    Raises ValueError for shapes that do not fit or coordinates in the mask that are not finite.
    """
    from tmtools import tm_align

    _check(mask, predicted=predicted, target=target)
    length = mask.shape[-1]
    scores = []
    for x, y, m in zip(predicted.reshape(-1, length, 3), target.reshape(-1, length, 3), mask.reshape(-1, length),
                       strict=True):
        x, y = (points[m].detach().double().cpu() for points in (x, y))
        if not (x.isfinite().all() and y.isfinite().all()):
            raise ValueError("tm_score: coordinates inside the mask are not finite")
        sequence = "A" * len(x)  # only its length matters once the alignment is given
        scores.append(math.nan if len(x) < 3 else
                      tm_align(x.numpy(), y.numpy(), sequence, sequence, [sequence, sequence]).tm_norm_chain2)
    return torch.tensor(scores, device=predicted.device).reshape(mask.shape[:-1])
