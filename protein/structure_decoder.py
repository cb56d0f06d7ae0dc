"""Structure decoder of ESM3: a transformer over residue tokens that ends in one backbone frame per residue.

Architecture and state-dict keys are those of ESM3's decoder (Hayes et al., Science 2025, appendix A.1.7): blocks that
normalise first, with rotary positions and normalised queries and keys, a 6-D rotation head (Zhou et al., CVPR 2019), a
pairwise head and a pLDDT head. StructTokenBench (Yuan et al., ICML 2025) and the paper (Sec. 5.1.3) put a linear layer
on the quantized vectors in place of the token embedding and train a smaller one.

Sizes: B chains, L residues (tokens), d width, H heads. Angstrom.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from protein.geometry import gram_schmidt
from protein.structure_encoder import feed_forward
from tokenizer.runtime.precision import exact_float32

# N and C in the frame of their residue, CA being its origin: bond lengths 1.46 and 1.53 Angstrom, angle 111 degrees.
IDEAL_N, IDEAL_C = (0.5256, 1.3612), -1.5251

DISTANCE_BINS, DIRECTION_DOTS, DIRECTION_BINS, PAE_BINS, PLDDT_BINS = 64, 6, 16, 64, 50
PAIR_WIDTH = 128  # of the pairwise head; half of it are queries, half keys
# Numbers of hidden pair features that exist at a time, chosen like those of structure_encoder.
CPU_PAIR_ELEMENTS, GPU_PAIR_ELEMENTS = 2**21, 2**26
TRANSLATION_SCALE = 10.0  # Angstrom per unit of the frame head's output
MAX_PAE = 31.0  # Angstrom
ESM3_CODES, ESM3_SPECIAL_TOKENS = 4096, 5  # MASK, EOS, BOS, PAD, CHAINBREAK follow the codes


class Decoded(NamedTuple):
    """Of B chains padded to L residues; 0 where masked."""

    coords: Tensor       # (B, L, 3, 3) float32: N, CA, C
    rotation: Tensor     # (B, L, 3, 3) float32, see geometry.backbone_frames
    origin: Tensor       # (B, L, 3) float32: CA
    plddt: Tensor        # (B, L) float32 in [0, 1]: predicted lDDT, meaningless before its head is trained
    hidden: Tensor       # (B, L, d), what the heads read


class PairLogits(NamedTuple):
    """Of residue pairs (i, j); pairs with a masked residue hold arbitrary finite numbers."""

    distance: Tensor     # (B, L, L, 64): bins of the C-beta distance
    direction: Tensor    # (B, L, L, 6, 16): bins of six dot products between the residues' backbone vectors
    pae: Tensor | None   # (B, L, L, 64): bins of the aligned error, for `predicted_aligned_error`; None: not asked for


def _rotary_tables(length: int, dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin (L, dim) float32 for positions 0 .. L-1, base 10,000."""
    frequency = 10000.0 ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + dim/2}) of x (B, H, L, dim) by the tables' angles (Su et al. 2021)."""
    first, second = x.float().chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.layernorm_qkv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 3 * width, bias=False))
        self.out_proj = nn.Linear(width, width, bias=False)
        self.q_ln = nn.LayerNorm(width, bias=False)
        self.k_ln = nn.LayerNorm(width, bias=False)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], keys: Tensor | None) -> Tensor:
        """x (B, L, d), rotary tables, keys (B, 1, 1, L) bool or None -> (B, L, d)."""
        q, k, v = self.layernorm_qkv(x).chunk(3, dim=-1)
        q, k = self.q_ln(q).to(v.dtype), self.k_ln(k).to(v.dtype)  # autocast leaves a norm's output in float32
        q, k, v = (rearrange(t, "b l (h d) -> b h l d", h=self.heads) for t in (q, k, v))
        out = F.scaled_dot_product_attention(_rotate(q, *tables), _rotate(k, *tables), v, attn_mask=keys)
        return self.out_proj(rearrange(out, "b h l d -> b l (h d)"))


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ffn = feed_forward(width, ratio=8 / 3, bias=False)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor], keys: Tensor | None) -> Tensor:
        x = x + self.attn(x, tables, keys)
        return x + self.ffn(x)


class Transformer(nn.Module):
    """x (B, L, d), mask (B, L) bool or None -> (B, L, d). Masked tokens are no keys, so valid ones never see them."""

    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.head_width = width // heads
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        tables = _rotary_tables(x.shape[1], self.head_width, x.device)
        # A chain without any valid token looks at itself: a softmax over nothing is NaN.
        keys = None if mask is None else (mask | ~mask.any(1, keepdim=True))[:, None, None, :]
        for block in self.blocks:
            x = block(x, tables, keys)
        return self.norm(x)


class FrameHead(nn.Module):
    """Hidden states (B, L, d) -> rotations (B, L, 3, 3) and origins (B, L, 3), float32 under autocast.

    Translation and two axes, made orthonormal. Of the 23 outputs the last 14 were ESM3's torsion angles and are unused.
    """

    def __init__(self, width: int):
        super().__init__()
        self.ffn1 = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, 23)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with exact_float32(x.device):  # a translation of 50 Angstrom has 0.25 resolution in bf16
            h = self.norm(F.gelu(self.ffn1(x.float())))
            origin, u, w = F.linear(h, self.proj.weight[:9], self.proj.bias[:9]).split(3, dim=-1)
            u, w = (v / (torch.linalg.vector_norm(v, dim=-1, keepdim=True) + 1e-5) for v in (u, w))
            return gram_schmidt(-u, w), origin * TRANSLATION_SCALE


def _pair_features(q: Tensor, k: Tensor, mixing: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """q (J, 64), k (L, 64) of one chain -> features (L, J, 128) of the pairs (i, j): k of i, q of j.

    The first layer, P (q_j * k_i) + D (q_j - k_i), is made as (P diag(q_j) - D) k_i + D q_j: one matrix product over
    64 channels that never holds the 128 pair features.
    """
    product, difference = mixing.chunk(2, dim=-1)                                            # (128, 64) each
    per_key = (q[:, None, :] * product - difference).flatten(0, 1)                           # (J * 128, 64)
    pairs = torch.addmm(F.linear(q, difference).flatten(), k, per_key.to(k.dtype).t())       # (L, J * 128)
    return F.layer_norm(F.gelu(pairs.unflatten(-1, (-1, PAIR_WIDTH))), (PAIR_WIDTH,), scale, shift)


class _PairLogits(torch.autograd.Function):
    """q, k (B, L, 64) -> logits (B, L, L, C) for each matrix (C, 128) among outputs, block by block.

    Nothing of the size of the pairs is kept, or written but the logits: backward makes the features again, for a tenth
    more arithmetic. Autograd would keep three tensors (B, L, L, 128).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        device = q.device.type
        ctx.save_for_backward(q, k, *weights)
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        hidden, outputs = weights[:3], weights[3:]
        logits = [q.new_empty(*q.shape[:2], q.shape[1], len(output)) for output in outputs]
        for chain, part in _pair_blocks(q):
            features = _pair_features(q[chain, part], k[chain], *hidden)
            for values, output in zip(logits, outputs, strict=True):
                values[chain, :, part] = F.linear(features, output)
        return tuple(logits)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, *weights = ctx.saved_tensors
        hidden, outputs = [weight.detach().requires_grad_() for weight in weights[:3]], weights[3:]
        totals = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (q, k, *weights)]
        for chain, part in _pair_blocks(q):
            leaves = [q[chain, part].detach().requires_grad_(), k[chain].detach().requires_grad_(), *hidden]
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                features = _pair_features(*leaves)
                flat, slope = features.detach().flatten(0, 1), torch.zeros((), device=q.device)
                for grad, output, total in zip(grads, outputs, totals[5:], strict=True):
                    rows = grad[chain, :, part].flatten(0, 1)  # (L * J, C)
                    slope = slope + rows @ output
                    total += rows.t() @ flat
            found = torch.autograd.grad(features, leaves, slope.to(features.dtype).view_as(features))
            totals[0][chain, part] = found[0]
            totals[1][chain] += found[1]
            for total, value in zip(totals[2:5], found[2:], strict=True):
                total += value
        return tuple(total.to(t.dtype) for total, t in zip(totals, (q, k, *weights), strict=True))


def _pair_blocks(q: Tensor) -> Iterator[tuple[int, slice]]:
    batch, length, _ = q.shape
    elements = CPU_PAIR_ELEMENTS if q.device.type == "cpu" else GPU_PAIR_ELEMENTS
    step = max(1, elements // (length * PAIR_WIDTH))
    return ((chain, slice(start, start + step)) for chain in range(batch) for start in range(0, length, step))


class PairwiseHead(nn.Module):
    """Logits of residue pairs. (i, j) is scored from [q_j * k_i, q_j - k_i] by two linear layers."""

    def __init__(self, width: int):
        super().__init__()
        self.downproject = nn.Linear(width, PAIR_WIDTH, bias=False)
        self.linear1 = nn.Linear(PAIR_WIDTH, PAIR_WIDTH, bias=False)
        self.norm = nn.LayerNorm(PAIR_WIDTH)
        outputs = DISTANCE_BINS + DIRECTION_DOTS * DIRECTION_BINS + PAE_BINS
        self.linear2 = nn.Linear(PAIR_WIDTH, outputs, bias=False)

    def forward(self, x: Tensor, pae: bool) -> PairLogits:
        """x (B, L, d) -> see `PairLogits`."""
        q, k = self.downproject(x).chunk(2, dim=-1)  # (B, L, 64) each
        sizes = [DISTANCE_BINS, DIRECTION_DOTS * DIRECTION_BINS, PAE_BINS]
        outputs = self.linear2.weight.split(sizes)[: 3 if pae else 2]  # training never reads the last
        distance, direction, *rest = _PairLogits.apply(
            q, k, self.linear1.weight, self.norm.weight, self.norm.bias, *outputs
        )
        direction = direction.unflatten(-1, (DIRECTION_DOTS, DIRECTION_BINS))
        return PairLogits(distance, direction, rest[0] if rest else None)


class RegressionHead(nn.Module):
    """(..., width) -> (..., outputs) through one hidden layer."""

    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.norm(F.gelu(self.dense(x))))


class StructureDecoder(nn.Module):
    """Token vectors (B, L, d) -> structure. Subclasses turn codes into token vectors.

    pLDDT and PAE heads carry ESM3's weights. Neither StructTokenBench nor the paper trains them, so they are frozen: no
    loss reaches them, and DistributedDataParallel would wait for their gradients.
    """

    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        if width % heads or width // heads % 2:
            raise ValueError(f"decoder width {width} must be an even multiple of its {heads} heads (rotary pairs)")
        self.decoder_stack = Transformer(width, heads, layers)
        self.affine_output_projection = FrameHead(width)
        self.pairwise_classification_head = PairwiseHead(width)
        self.plddt_head = RegressionHead(width, PLDDT_BINS)
        self.plddt_head.requires_grad_(False)

    def decode_vectors(self, x: Tensor, mask: Tensor | None = None) -> Decoded:
        """x (B, L, d), mask (B, L) bool, True = valid, or None for all -> see `Decoded`."""
        hidden = self.decoder_stack(x, mask)
        rotation, origin = self.affine_output_projection(hidden)
        with torch.autocast(x.device.type, enabled=False):
            coords = backbone(rotation, origin)
            plddt = expected_plddt(self.plddt_head(hidden.detach().float()))
        if mask is None:
            return Decoded(coords, rotation, origin, plddt, hidden)
        return Decoded(*(torch.where(mask.view(*mask.shape, *[1] * (t.ndim - 2)), t, 0.0)
                         for t in (coords, rotation, origin, plddt, hidden)))

    def pair_logits(self, hidden: Tensor, pae: bool = False) -> PairLogits:
        """Hidden states (B, L, d) of `Decoded` -> see `PairLogits`. Costs L x L; coordinates do not need it."""
        return self.pairwise_classification_head(hidden, pae)


class VectorDecoder(StructureDecoder):
    """Decodes quantized vectors (B, L, dim), as in StructTokenBench: state-dict keys are those of its decoder."""

    def __init__(self, dim: int, width: int, heads: int, layers: int):
        super().__init__(width, heads, layers)
        self.post_vq_proj = nn.Linear(dim, width)

    def forward(self, z: Tensor, mask: Tensor | None = None) -> Decoded:
        """z (B, L, dim) float, mask (B, L) bool or None -> see `Decoded`."""
        if mask is not None:
            z = torch.where(mask[..., None], z, 0.0)  # attention gives masked tokens weight 0, but 0 x NaN is NaN
        return self.decode_vectors(self.post_vq_proj(z), mask)


class ESM3Decoder(StructureDecoder):
    """ESM3's own decoder (618.6 M parameters), which reads token numbers: state-dict keys are those of its release.

    Tokens are 0 .. 4095, then MASK 4096, EOS 4097, BOS 4098, PAD 4099, CHAINBREAK 4100; a chain is BOS ... EOS PAD ....
    """

    def __init__(self, width: int = 1280, heads: int = 20, layers: int = 30):
        super().__init__(width, heads, layers)
        self.embed = nn.Embedding(ESM3_CODES + ESM3_SPECIAL_TOKENS, width)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Decoded:
        """tokens (B, T) int64, mask (B, T) bool, True = not PAD -> see `Decoded`; BOS and EOS have rows too."""
        return self.decode_vectors(self.embed(tokens), mask)


def backbone(rotation: Tensor, origin: Tensor) -> Tensor:
    """Rotations (..., 3, 3) and origins (..., 3) of residues -> N, CA, C of ideal geometry (..., 3, 3), Angstrom."""
    x, y = rotation[..., 0], rotation[..., 1]
    return torch.stack([origin + IDEAL_N[0] * x + IDEAL_N[1] * y, origin, origin + IDEAL_C * x], dim=-2)


# ------------------------------------------------------------------------------------------- confidence, from logits

def expected_plddt(logits: Tensor) -> Tensor:
    """Logits (..., bins) over equal bins of [0, 1] -> expectation (...) over their centres, float32."""
    bins = logits.shape[-1]
    centres = (torch.arange(bins, device=logits.device, dtype=torch.float32) + 0.5) / bins
    return logits.float().softmax(-1) @ centres


def _pae_centres(device: torch.device) -> Tensor:
    """Bin centres (64,) of the aligned error: 62 equal bins of [0, 31] Angstrom, and two beyond, as ESM3 has them."""
    step = MAX_PAE / (PAE_BINS - 2)
    return (torch.arange(PAE_BINS, device=device, dtype=torch.float32) + 0.5) * step


def predicted_aligned_error(logits: Tensor, mask: Tensor) -> Tensor:
    """PAE logits (B, L, L, 64), residues mask (B, L) bool -> (B, L, L) float32 Angstrom; NaN where a residue is masked.

    Entry (i, j): expected error of residue j's position when residue i's frame is superposed (Jumper et al. 2021).
    """
    error = logits.float().softmax(-1) @ _pae_centres(logits.device)
    return torch.where(mask[:, :, None] & mask[:, None, :], error, torch.nan)


def predicted_tm(logits: Tensor, mask: Tensor) -> Tensor:
    """PAE logits (B, L, L, 64), residues mask (B, L) bool -> pTM (B,) float32 in [0, 1] (Jumper et al. 2021, 1.9.7).

    max over frames i of the mean over residues j of E[1 / (1 + (error / d0)^2)]; 0 for a chain without residues.
    """
    length = mask.sum(-1)
    d0 = 1.24 * (length.clamp_min(19) - 15) ** (1 / 3) - 1.8                              # (B,)
    score = 1.0 / (1.0 + (_pae_centres(logits.device) / d0[:, None]).square())            # (B, 64)
    expected = (logits.float().softmax(-1) * score[:, None, None, :]).sum(-1)             # (B, L, L)
    pairs = mask[:, :, None] & mask[:, None, :]
    mean = torch.where(pairs, expected, 0.0).sum(-1) / length.clamp_min(1)[:, None]       # (B, L)
    return mean.amax(-1)
