"""Losses of the structure tokenizer as pure functions, and the residue alphabet of the last one.

    terms = structure_losses(model(coords, mask, residue_index), coords, sequence, residue_index)
    (sum(terms.values()) + out.quantized.loss).backward()

The five terms of StructTokenBench (Yuan et al., ICML 2025), which the paper keeps (Sec. 5.1.3); ESM3 introduced them
(Hayes et al., Science 2025, appendix A.1.7). Coordinates are (B, L, >= 3, 3) in Angstrom, N, CA and C first; mask is
(B, L) bool, True = residue that counts. What lies at masked places, NaN too, changes neither values nor gradients;
padding changes nothing. Every value is float32 (float64 if given), whatever the autocast state; inputs do not change.

Each term is a mean over the entries of a chain (pairs, or residues), then over the chains that have any. So the weight
of a chain does not depend on the batch it is in, and the mean over micro-batches or processes, each weighed by its
`contributing_chains`, is the mean over all their chains. StructTokenBench takes one mean over all pairs of the batch:
there a chain of 512 residues has 100 times the weight of one of 51, more or less of it depending on the batching and
on the number of processes.

as_coded=True computes what StructTokenBench's code does instead, for comparison with its numbers: that mean, and
  distance          the mask is laid out atom by atom, the atoms residue by residue: wrong pairs if there is padding
  direction         residues next to padding or to a break count, with vectors to a neighbour that is none
  binned distance   distances are compared with squared edges, so most of the bins stay empty; C-betas come from
                    vectors normalised over the chain instead of over x, y, z
  binned direction  the dot products that vanish by construction fall into either bin next to 0 by rounding
  inverse folding   unknown residues are a class to be learnt
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from protein.geometry import virtual_cb
from protein.structure_decoder import DIRECTION_BINS, DISTANCE_BINS
from protein.structure_model import SEQUENCE_VOCABULARY, StructureOutput
from tokenizer.runtime.precision import exact_float32

MAX_DISTANCE_ERROR = 25.0   # Angstrom^2: a pair of atoms costs no more
MAX_DIRECTION_ERROR = 20.0  # Angstrom^4 or more, of a pair of vectors
FIRST_EDGE, BIN_WIDTH = 2.3125, 0.3075  # Angstrom: where the second distance bin begins, and how wide it is

# ESM's letters: <cls> <pad> <eos> <unk>, these, <mask>.
_LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO.-|"
PADDING, UNKNOWN = 1, 4 + _LETTERS.index("X")
_IDS = {letter: 4 + i for i, letter in enumerate(_LETTERS[: _LETTERS.index(".")])}

# Elements of an L x L matrix that are worked on at a time: on a CPU what its caches bear.
_CPU_ELEMENTS, _GPU_ELEMENTS = 2**18, 2**26


TERMS = ("distance", "direction", "binned_distance", "binned_direction", "inverse_folding")  # of `structure_losses`


def sequence_ids(sequence: str) -> Tensor:
    """One-letter codes -> ESM's token ids, int64 (L,). ValueError: a letter that is no amino acid, nor X."""
    try:
        return torch.tensor([_IDS[letter] for letter in sequence], dtype=torch.int64)
    except KeyError as error:
        raise ValueError(f"{error.args[0]!r} at position {sequence.index(error.args[0])} is none of the amino acids "
                         f"{''.join(_IDS)}") from None


def sequence_letters(ids: npt.NDArray[np.uint8]) -> str:
    """The way back: ids (L,) of amino acids -> one-letter codes."""
    return "".join(_LETTERS[i - 4] for i in ids.tolist())


def structure_losses(
    output: StructureOutput,
    coords: Tensor,
    sequence: Tensor,
    residue_index: Tensor | None = None,
    *,
    as_coded: bool = False,
) -> dict[str, Tensor]:
    """All five terms, float32 [] each with gradient; StructTokenBench adds them with weight 1.

    coords (B, L, >= 3, 3) are the true ones, sequence (B, L) int64 as from `sequence_ids`, PADDING where unknown,
    residue_index as in `direction_loss`. Residues count where output.mask says so.
    ValueError: shapes that do not fit.
    """
    mask, predicted = output.mask, output.decoded.coords
    return {
        "distance": distance_loss(predicted, coords, mask, as_coded=as_coded),
        "direction": direction_loss(predicted, coords, mask, residue_index, as_coded=as_coded),
        "binned_distance": binned_distance_loss(output.pairs.distance, coords, mask, as_coded=as_coded),
        "binned_direction": binned_direction_loss(output.pairs.direction, coords, mask, as_coded=as_coded),
        "inverse_folding": inverse_folding_loss(output.sequence_logits, sequence, mask, as_coded=as_coded),
    }


def contributing_chains(mask: Tensor, sequence: Tensor, residue_index: Tensor | None = None) -> dict[str, Tensor]:
    """Chains that have entries of each term of `structure_losses`, int64 []: what its mean over them weighs in the mean
    of a larger batch. Arguments as there; mask (B, L) is that of its output.
    """
    some = mask.any(1).sum()
    return {"distance": some, "direction": _inner(mask, residue_index, as_coded=False).any(1).sum(),
            "binned_distance": some, "binned_direction": some,
            "inverse_folding": _known(sequence, mask, as_coded=False).any(1).sum()}


# ---------------------------------------------------------------------------------------------------------------------
# coordinates


def distance_loss(predicted: Tensor, target: Tensor, mask: Tensor, *, as_coded: bool = False) -> Tensor:
    """Error of the distances between N, CA and C atoms, squared, at most 25 Angstrom^2 -> []. Mirror images are alike.

    Over all ordered pairs, an atom with itself included. The gradient is 0 where two predicted atoms coincide.
    """
    predicted, target = _backbone(predicted, mask), _backbone(target, mask)
    atoms = mask.repeat(1, 3) if as_coded else mask.repeat_interleave(3, dim=1)  # (B, 3 L)
    sums = _sums(_PairErrors, predicted.flatten(1, 2), target.flatten(1, 2), atoms, MAX_DISTANCE_ERROR, False)
    return _mean(sums, atoms.sum(-1).square(), as_coded)


def direction_loss(
    predicted: Tensor, target: Tensor, mask: Tensor, residue_index: Tensor | None = None, *, as_coded: bool = False
) -> Tensor:
    """Error of the dot products between backbone vectors, squared, at most 20 -> []. Tells mirror images apart.

    Six vectors of each residue: N to CA, CA to C, C to the next N, and the normals of the planes that these and the
    bond from the previous C span. Over all ordered pairs of vectors of residues whose neighbours in the array are both
    valid and bonded to it: their residue_index (B, L) int differs by 1. None: no breaks.
    """
    vectors = _inner(mask, residue_index, as_coded).repeat(1, 6)  # (B, 6 L)
    predicted, target = (_directions(_backbone(coords, mask)) for coords in (predicted, target))
    sums = _sums(_PairErrors, predicted, target, vectors, MAX_DIRECTION_ERROR, True)
    return _mean(sums, vectors.sum(-1).square(), as_coded)


def _inner(mask: Tensor, residue_index: Tensor | None, as_coded: bool) -> Tensor:
    """bool (B, L): the residues of `direction_loss`."""
    inner = mask.clone()
    inner[:, :1] = inner[:, -1:] = False
    if not as_coded:
        linked = mask[:, 1:] & mask[:, :-1]  # (B, L - 1)
        if residue_index is not None:
            if residue_index.shape != mask.shape:
                raise ValueError(f"residue_index {tuple(residue_index.shape)} must be {tuple(mask.shape)}")
            linked &= residue_index.diff(dim=1) == 1
        inner[:, 1:] &= linked
        inner[:, :-1] &= linked
    return inner


def _backbone(coords: Tensor, mask: Tensor) -> Tensor:
    """N, CA, C (B, L, 3, 3) in float32 or float64, 0 where masked."""
    if coords.ndim != 4 or coords.shape[2] < 3 or coords.shape[3] != 3:
        raise ValueError(f"coordinates {tuple(coords.shape)} must be (B, L, A >= 3, 3)")
    if mask.dtype != torch.bool or mask.shape != coords.shape[:2]:
        raise ValueError(f"mask {tuple(mask.shape)} {mask.dtype} must be bool {tuple(coords.shape[:2])}, "
                         "as the coordinates are")
    return torch.where(mask[..., None, None], _real(coords[:, :, :3]), 0.0)


def _real(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _directions(coords: Tensor) -> Tensor:
    """The six vectors (B, 6 L, 3) of `direction_loss`, vector by vector; bonds beyond the ends are 0."""
    n, ca, c = coords.unbind(2)
    n_ca, ca_c, c_n = ca - n, c - ca, n[:, 1:] - c[:, :-1]
    following, previous = F.pad(c_n, (0, 0, 0, 1)), F.pad(c_n, (0, 0, 1, 0))
    normals = [torch.linalg.cross(ca_c, n_ca), torch.linalg.cross(previous, n_ca), torch.linalg.cross(ca_c, following)]
    return torch.cat([n_ca, ca_c, following, *normals], dim=1)


class _PairErrors(torch.autograd.Function):
    """Sum over ordered pairs of min(error^2, most) for points (B, P, 3), valid (B, P) bool -> (B,).

    The error of a pair is that of its dot product, or of its distance. The gradient is made along with the value, in
    blocks of rows, because it is (B, P, 3); autograd would keep several P x P matrices to make it later. By
    differences, so exact for near points wherever they lie.
    """

    @staticmethod
    def forward(ctx: Any, predicted: Tensor, target: Tensor, valid: Tensor, most: float, dots: bool) -> Tensor:
        weight = valid.to(predicted.dtype)[..., None]  # (B, P, 1)
        count = weight.sum(1, keepdim=True).clamp(min=1)
        if not dots:  # about the centre: products below have few digits left for points far from it
            predicted = predicted - (predicted * weight).sum(1, keepdim=True) / count
        gradient = torch.zeros_like(predicted) if ctx.needs_input_grad[0] else None
        sums = predicted.new_zeros(len(predicted))
        both = torch.cat([predicted, target], dim=-1)
        opposite = torch.cat([predicted, -target], dim=-1).transpose(1, 2)
        rows = _rows(predicted, predicted.shape[0] * predicted.shape[1])
        for start in range(0, predicted.shape[1], rows):
            part = slice(start, start + rows)
            with exact_float32(predicted.device):
                if dots:
                    error = both[:, part] @ opposite  # (B, rows, P)
                else:
                    distance = _distances(predicted, part)
                    error = distance - _distances(target, part)
                squared = error.square().clamp_(max=most)
                sums += ((squared @ weight) * weight[:, part]).sum((1, 2))
                if gradient is None:
                    continue
                counts = squared < most
                if dots:
                    slope = error.mul_(counts)
                    gradient[:, part] = slope @ (predicted * weight)
                else:
                    slope = error.div_(distance).masked_fill_(~counts.logical_and_(distance > 0), 0.0)
                    gradient[:, part] = predicted[:, part] * (slope @ weight) - slope @ (predicted * weight)
        if gradient is not None:
            ctx.save_for_backward(gradient.mul_(4 * weight))  # 2 of the square, 2 because (i, j) is (j, i)
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.saved_tensors[0] * grad[:, None, None], None, None, None, None


def _distances(points: Tensor, part: slice) -> Tensor:
    """Euclidean distances (B, rows, P) of points[:, part] to all points (B, P, 3)."""
    total: Tensor | None = None
    for axis in points.unbind(-1):
        difference = axis[:, part, None] - axis[:, None, :]
        total = difference.square_() if total is None else total.addcmul_(difference, difference)
    assert total is not None
    return total.sqrt_()


def _sums(function: type[torch.autograd.Function], x: Tensor, *others: Any) -> Tensor:
    return function.apply(x if torch.is_grad_enabled() else x.detach(), *others)  # else it would make the gradient


def _rows(like: Tensor, row_elements: int) -> int:
    return max(1, (_CPU_ELEMENTS if like.device.type == "cpu" else _GPU_ELEMENTS) // max(1, row_elements))


def _mean(sums: Tensor, counts: Tensor, as_coded: bool) -> Tensor:
    """Sums and numbers of entries (B,) -> mean; 0 when there are none."""
    if as_coded:
        return sums.sum() / counts.sum().clamp(min=1)
    return (sums / counts.clamp(min=1)).sum() / (counts > 0).sum().clamp(min=1)


# ---------------------------------------------------------------------------------------------------------------------
# classes


def binned_distance_loss(logits: Tensor, target: Tensor, mask: Tensor, *, as_coded: bool = False) -> Tensor:
    """Cross entropy of 64 bins of the C-beta distance: logits (B, L, L, 64) -> [].

    Over all ordered pairs. Bins begin at 0, 2.3125, then every 0.3075 Angstrom; the last one, from 21.3775 on, is open.
    C-betas are those of ideal geometry, so glycine has one too.
    """
    backbone = _backbone(target, mask)
    with torch.no_grad():
        labels = _distance_bins(_c_beta_as_coded(backbone) if as_coded else virtual_cb(backbone), as_coded)
    return _pair_cross_entropy(logits, labels, mask, as_coded)


def _distance_bins(c_beta: Tensor, as_coded: bool) -> Tensor:
    """(B, L, 3) -> (B, L, L) int64."""
    edges = FIRST_EDGE + BIN_WIDTH * torch.arange(DISTANCE_BINS - 1, device=c_beta.device, dtype=c_beta.dtype)
    return torch.bucketize(_distances(c_beta, slice(None)), edges.square() if as_coded else edges, right=True)


def _c_beta_as_coded(backbone: Tensor) -> Tensor:
    n, ca, c = backbone.unbind(2)
    axis = list(n.shape).index(3)  # the batch's, when it has three chains
    along = F.normalize(n - ca, dim=1)
    normal = F.normalize(torch.linalg.cross(n - c, along, dim=axis), dim=1)
    length, angle, torsion = 1.522, 1.927, -2.143
    return ca + length * (math.cos(angle) * along - math.sin(angle) * math.sin(torsion) * normal
                          + math.sin(angle) * math.cos(torsion) * torch.linalg.cross(normal, along, dim=axis))


def binned_direction_loss(logits: Tensor, target: Tensor, mask: Tensor, *, as_coded: bool = False) -> Tensor:
    """Cross entropy of 16 bins of six dot products: logits (B, L, L, 6, 16) -> [].

    Over all ordered pairs (i, j), i = j included. Unit vectors of a residue: a from CA to C, b from CA to N, c along
    a x b. Products of residue i's with residue j's: ab, ac, ba, bc, ca, cb. Bins of width 1/8 from -1 on.
    """
    backbone = _backbone(target, mask)
    with torch.no_grad():
        labels = _direction_bins(backbone, as_coded)
    return _pair_cross_entropy(logits, labels, mask, as_coded)


def _direction_bins(backbone: Tensor, as_coded: bool) -> Tensor:
    """(B, L, 3, 3) -> (B, L, L, 6) int64."""
    n, ca, c = backbone.unbind(2)
    a, b = F.normalize(c - ca, dim=-1), F.normalize(n - ca, dim=-1)
    normal = F.normalize(torch.linalg.cross(c - ca, n - ca), dim=-1)
    with exact_float32(backbone.device):
        dots = torch.stack([first @ second.transpose(1, 2) for first, second in
                            ((a, b), (a, normal), (b, a), (b, normal), (normal, a), (normal, b))], dim=-1)
    if not as_coded:
        # A residue's normal is orthogonal to its own a and b, and 0 is an edge: rounding must not choose the bin.
        own = dots.diagonal(dim1=1, dim2=2)  # (B, 6, L)
        own[:, 1] = own[:, 3:] = 0.0
    half = DIRECTION_BINS // 2
    return (dots * half).floor().long().add_(half).clamp_(0, DIRECTION_BINS - 1)


def inverse_folding_loss(logits: Tensor, sequence: Tensor, mask: Tensor, *, as_coded: bool = False) -> Tensor:
    """Cross entropy of the residues' letters: logits (B, L, 33), sequence (B, L) int64 of ESM's ids -> [].

    Over residues that are known: neither UNKNOWN nor PADDING.
    """
    if logits.ndim != 3 or not logits.shape[:2] == sequence.shape == mask.shape:
        raise ValueError(f"logits {tuple(logits.shape)}, sequence {tuple(sequence.shape)} and mask {tuple(mask.shape)} "
                         f"must be (B, L, {SEQUENCE_VOCABULARY}), (B, L) and (B, L)")
    known = _known(sequence, mask, as_coded)
    sums = _sums(_CrossEntropy, logits, torch.where(known, sequence, 0), known)
    return _mean(sums, known.sum(-1), as_coded)


def _known(sequence: Tensor, mask: Tensor, as_coded: bool) -> Tensor:
    """bool (B, L): the residues of `inverse_folding_loss`."""
    known = mask & (sequence != PADDING)
    return known if as_coded else known & (sequence != UNKNOWN)


def _pair_cross_entropy(logits: Tensor, labels: Tensor, mask: Tensor, as_coded: bool) -> Tensor:
    """Logits (B, L, L, ..., bins) and labels (B, L, L, ...) of the pairs of residues in mask (B, L) -> []."""
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} must be {tuple(labels.shape)} and a last dimension of bins")
    pairs = mask[:, :, None] & mask[:, None, :]
    pairs = pairs.view(*pairs.shape, *[1] * (labels.ndim - 3)).expand_as(labels)
    sums = _sums(_CrossEntropy, logits.flatten(1, -2), labels.flatten(1), pairs.flatten(1))
    return _mean(sums, pairs.flatten(1).sum(-1), as_coded)


class _CrossEntropy(torch.autograd.Function):
    """Sum over rows of -log softmax(logits)[label] for logits (B, R, C), labels and valid (B, R) -> (B,).

    The gradient is made along with the value, in blocks of rows that stay in a CPU's caches: nothing else of the size
    of the logits is written or kept.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        shape = logits.shape
        logits, labels, valid = logits.flatten(0, 1), labels.flatten()[:, None], valid.flatten()[:, None]
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        losses = torch.empty_like(labels, dtype=_real(logits[:0]).dtype)  # (B R, 1)
        rows = _rows(logits, shape[-1])
        for start in range(0, len(logits), rows):
            part = slice(start, start + rows)
            label = labels[part]
            log_p = torch.where(valid[part], _real(logits[part]), 0.0).log_softmax(-1)
            losses[part] = log_p.gather(1, label).neg_().masked_fill_(~valid[part], 0.0)
            if gradient is not None:
                p = log_p.exp_().scatter_add_(1, label, torch.full_like(label, -1, dtype=log_p.dtype))
                gradient[part] = p.mul_(valid[part])
        if gradient is not None:
            ctx.save_for_backward(gradient.view(shape))
        return losses.view(shape[:2]).sum(-1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None, None].to(gradient.dtype), None, None
