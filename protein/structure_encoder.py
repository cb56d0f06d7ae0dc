"""Structure encoder of ESM3: one latent per residue from the frames of its 16 nearest residues.

Architecture and state-dict keys are those of the encoder of ESM3 (Hayes et al., Science 2025, appendix A.1.7), which
StructTokenBench (Yuan et al., ICML 2025) and the paper (Sec. 5.1.3) train from scratch. Every residue is encoded from a
neighbourhood of S slots, slot 0 being itself, that sees relative positions and relative frames only; so latents do not
change when the structure is rotated or moved, and no attention ever spans the chain.

The published code spends about twice the arithmetic. Here:
- the first block's input is a row of a table with 66 rows, so its projections are made for 66 rows, not for N S slots;
- only slot 0 of the last block is read, so the last block computes no other queries and no other feed-forward rows;
- padding and residues without coordinates form no neighbourhoods.

Sizes: B chains, L residues, N residues that have coordinates, S slots, Q <= S query slots, H heads, d width. Angstrom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protein.geometry import backbone_frames, knn_graph, valid_residues
from tokenizer.runtime.precision import exact_float32

REACH = 32  # relative positions are clamped to +-REACH
ENCODER_RATIO = 4.0  # of the feed-forward layers' width to the encoder's

# Numbers of the feed-forward layers' hidden slots that exist at a time. On a CPU larger tensors cost page faults and
# smaller ones synchronisation of threads; a GPU wants few, large launches. Memory is bounded by this only when nothing
# is kept for a backward.
CPU_HIDDEN_ELEMENTS, GPU_HIDDEN_ELEMENTS = 2**23, 2**29


class _PairDistance(torch.autograd.Function):
    """Autograd through `pair_distance`: keeps one (..., Q, S) tensor; the chain of elementary operations keeps six."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        distance: Tensor | None = None
        for x, y in zip(a, b, strict=True):
            difference = x.unsqueeze(-1) - y.unsqueeze(-2)
            distance = difference.square_() if distance is None else distance.addcmul_(difference, difference)
        assert distance is not None
        distance.sqrt_()
        ctx.save_for_backward(a, b, distance)
        return distance

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        a, b, distance = ctx.saved_tensors
        slope = torch.where(distance > 0, grad / distance, 0.0)  # the subgradient 0 where points coincide
        # The gradient of a is the sum of slope (a - b) over b: two moments, by one matrix product.
        by_a, by_b = (slope @ _with_ones(b)).movedim(-1, 0), (slope.transpose(-1, -2) @ _with_ones(a)).movedim(-1, 0)
        return a * by_a[3] - by_a[:3], b * by_b[3] - by_b[:3]


def _with_ones(points: Tensor) -> Tensor:
    """(3, ..., S) -> (..., S, 4)"""
    return torch.stack([*points, torch.ones_like(points[0])], dim=-1)


def pair_distance(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (..., Q, S) between points given by coordinate planes a (3, ..., Q) and b (3, ..., S).

    By differences, so without cancellation far from the origin; gradient 0 where two points coincide.
    """
    return _PairDistance.apply(a, b)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input only; autograd would keep the SiLU as well, and join the two halves of the gradient by a copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gate, value = x.chunk(2, dim=-1)
        ctx.save_for_backward(x)
        return F.silu(gate).mul_(value)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gate, value = x.chunk(2, dim=-1)
        out = torch.empty_like(x)
        grad_gate, grad_value = out.chunk(2, dim=-1)
        torch.mul(grad, F.silu(gate), out=grad_value)
        torch.ops.aten.silu_backward.grad_input(grad * value, gate, grad_input=grad_gate)
        return out


class SwiGLU(nn.Module):
    """(..., 2F) -> (..., F): SiLU of the first half times the second (Shazeer 2020)."""

    def forward(self, x: Tensor) -> Tensor:
        return _SwiGLU.apply(x)


def hidden_size(width: int, ratio: float) -> int:
    """ratio x width, rounded up to a multiple of 256."""
    return int((ratio * width + 255) // 256 * 256)


def feed_forward(width: int, ratio: float, bias: bool) -> nn.Sequential:
    """Pre-normalised SwiGLU layer, (..., width) -> (..., width)."""
    hidden = hidden_size(width, ratio)
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 2 * hidden, bias=bias), SwiGLU(), nn.Linear(hidden, width, bias=bias)
    )


class GeometricAttention(nn.Module):
    """Attention whose queries, keys and values are vectors in space, one per head, given in each residue's frame.

    logit_ij = softplus(w_rot) q_i . k_j / sqrt(3) - softplus(w_dist) |p_i - r_j| / sqrt(3), with directions q, k
    rotated and points p, r rotated and moved into the common frame; the result goes back to residue i's frame (ESM3,
    appendix A.1.6; the distance is not squared, whatever the published docstring says).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.s_norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, 15 * heads)  # rows: q, k, value, p, r; in each (head, xyz)
        self.out_proj = nn.Linear(3 * heads, width)
        self.distance_scale_per_head = nn.Parameter(torch.zeros(heads))
        self.rotation_scale_per_head = nn.Parameter(torch.zeros(heads))

    def _vectors(self, s: Tensor, rows: list[int]) -> Tensor:
        """Rows of proj as coordinate planes: (..., d) -> (..., 3 * len(rows) * H), xyz slowest.

        Planes, because rotating them multiplies 3 x 3 by 3 x (2..3 H), which a matrix unit does far better than its
        transpose.
        """
        weights = self.proj.weight.view(5, self.heads, 3, -1).unbind()  # not [rows], which are copied to the device
        biases = self.proj.bias.view(5, self.heads, 3).unbind()
        weight = torch.stack([weights[row] for row in rows]).permute(2, 0, 1, 3).flatten(0, 2)
        bias = torch.stack([biases[row] for row in rows]).permute(2, 0, 1).flatten()
        return F.linear(s, weight, bias)

    def project(self, x: Tensor, queries: int) -> tuple[Tensor, Tensor]:
        """x (N, S, d) -> planes for the first `queries` slots (N, Q, 6 H) and for all (N, S, 9 H)."""
        s = self.s_norm(x)
        return self._vectors(s[:, :queries], [0, 3]), self._vectors(s, [1, 2, 4])

    def project_table(self, table: Tensor, index: Tensor, queries: int) -> tuple[Tensor, Tensor]:
        """The same for x = table[index]: table (rows, d), index (N, S) int64."""
        s = self.s_norm(table)
        return (F.embedding(index[:, :queries], self._vectors(s, [0, 3])),
                F.embedding(index, self._vectors(s, [1, 2, 4])))

    def attend(self, q: Tensor, k: Tensor, rotation: Tensor, origin: Tensor, near: Tensor) -> Tensor:
        """Planes from project, rotation (N, S, 3, 3), origin (N, S, 3), near (N, S) bool -> (N, Q, d)."""
        queries = q.shape[1]
        with exact_float32(q.device):
            q = rotation[:, :queries] @ q.float().unflatten(-1, (3, 2 * self.heads))  # (N, Q, 3, 2H)
            k = rotation @ k.float().unflatten(-1, (3, 3 * self.heads))               # (N, S, 3, 3H)
            q_direction, q_point = q.unflatten(-1, (2, self.heads)).unbind(-2)
            k_direction, value, k_point = k.unflatten(-1, (3, self.heads)).unbind(-2)
            q_point, k_point = q_point + origin[:, :queries, :, None], k_point + origin[..., None]
            turn = F.softplus(self.rotation_scale_per_head.float()) / math.sqrt(3)
            reach = F.softplus(self.distance_scale_per_head.float()) / math.sqrt(3)
            # Scaling the points scales their distances, and is a pass over 3 (Q + S) numbers instead of Q S.
            distance = pair_distance((q_point * reach).permute(2, 0, 3, 1).contiguous(),
                                     (k_point * reach).permute(2, 0, 3, 1).contiguous())  # (N, H, Q, S)
            logits = (q_direction * turn).permute(0, 3, 1, 2) @ k_direction.permute(0, 3, 2, 1) - distance
            logits = logits.masked_fill(~near[:, None, None, :], -math.inf)  # slot 0 is always near: no empty row
            out = logits.softmax(-1) @ value.permute(0, 3, 1, 2)             # (N, H, Q, 3)
            out = out.transpose(1, 2) @ rotation[:, :queries]                # (N, Q, H, 3): R^T, written from the right
        return self.out_proj(out.flatten(-2))


class GeometricBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.geom_attn = GeometricAttention(width, heads)
        self.ffn = feed_forward(width, ENCODER_RATIO, bias=True)


class _Blocks(nn.Module):
    """Only there for its name in the state dict, transformer.blocks."""

    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.blocks = nn.ModuleList(GeometricBlock(width, heads) for _ in range(layers))


class RelativePosition(nn.Module):
    """Table with a row for each clamped offset -32..32; row 0 is unused, as in ESM3."""

    def __init__(self, width: int):
        super().__init__()
        self.embedding = nn.Embedding(2 * REACH + 2, width)
        nn.init.normal_(self.embedding.weight, std=0.02)


class StructureEncoder(nn.Module):
    """Backbone coordinates -> latents, see the head of this file. State-dict keys are ESM3's without its codebook's.

    width: d; heads: vector heads per block; layers: blocks; dim: channels of a latent; neighbours: slots at most.
    """

    def __init__(self, width: int, heads: int, layers: int, dim: int, neighbours: int = 16):
        super().__init__()
        self.neighbours, self.hidden = neighbours, 2 * hidden_size(width, ENCODER_RATIO)
        self.transformer = _Blocks(width, heads, layers)
        self.pre_vq_proj = nn.Linear(width, dim)
        self.relative_positional_embedding = RelativePosition(width)

    def forward(self, coords: Tensor, mask: Tensor | None = None, residue_index: Tensor | None = None,
                places: Tensor | None = None) -> Tensor:
        """coords (B, L, 3, 3) float, mask (B, L) bool or None, residue_index (B, L) int or None -> latents (B, L, D)
        float32.

        coords: N, CA, C in Angstrom; anything, NaN too, where mask is False. residue_index: position in the sequence,
        by default in the array. Residues that are not `valid_residues` get pre_vq_proj.bias. places (N,) int64: of the
        valid residues among all B L, in order; None: they are found, for which the host waits.
        """
        valid = valid_residues(coords, mask)
        coords = torch.where(valid[..., None, None], coords, 0.0).float()
        edges, near = knn_graph(coords[:, :, 1], valid, self.neighbours)
        rotation, origin = backbone_frames(coords)
        places = valid.flatten().nonzero()[:, 0] if places is None else places
        chain = places // valid.shape[1]                                 # (N,)
        slots, near = edges.flatten(0, 1)[places], near.flatten(0, 1)[places]  # (N, S)
        number = slots if residue_index is None else residue_index[chain[:, None], slots]
        offset = (number - number[:, :1]).clamp(-REACH, REACH) + REACH + 1
        rotation, origin = rotation[chain[:, None], slots], origin[chain[:, None], slots]
        origin = origin - origin[:, :1]  # only differences matter, and near zero they keep their digits

        elements = CPU_HIDDEN_ELEMENTS if coords.device.type == "cpu" else GPU_HIDDEN_ELEMENTS
        size = max(1, elements // (slots.shape[1] * self.hidden))
        parts = zip(*(t.split(size) for t in (offset, rotation, origin, near)), strict=True)
        encoded = torch.cat([self._neighbourhoods(*part) for part in parts])  # (N, d)
        full = encoded.new_zeros(valid.numel(), encoded.shape[-1]).index_copy(0, places, encoded)
        full = full.unflatten(0, valid.shape)
        with exact_float32(full.device):  # codes are chosen by distances between latents
            return self.pre_vq_proj(full.float())

    def _neighbourhoods(self, offset: Tensor, rotation: Tensor, origin: Tensor, near: Tensor) -> Tensor:
        """offset (N, S) rows of the table, rotation (N, S, 3, 3), origin (N, S, 3), near (N, S) -> slot 0, (N, d)."""
        table = self.relative_positional_embedding.embedding.weight
        blocks = cast("Sequence[GeometricBlock]", self.transformer.blocks)
        x = F.embedding(offset, table)  # (N, S, d)
        for depth, block in enumerate(blocks):
            queries = 1 if depth == len(blocks) - 1 else x.shape[1]
            if depth == 0:
                q, k = block.geom_attn.project_table(table, offset, queries)
            else:
                q, k = block.geom_attn.project(x, queries)
            x = x[:, :queries] + block.geom_attn.attend(q, k, rotation, origin, near)
            x = x + block.ffn(x)
        return x[:, 0]
