"""Exports that cannot lie: what a model encodes and decodes, the model read back from its export has to as well.

Most exports write a quantizer as the table of its codes. That is the same quantizer only if its latents are compared as
they are (or on the unit sphere); one that bounds or projects them first would get other codes, without an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.provq import ProVQ, VectorQuantizer, nearest_code

TOKENS = 512      # of each scale
TOLERANCE = 1e-3  # of the largest value: kernels and devices round differently
TIE = 1e-5        # of squared lengths: two codes at the same distance


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """eval() and no gradients inside; every module's own mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def probe_images(count: int, channels: int, size: int) -> Tensor:
    """(count, channels, size, size) in [-1, 1], smooth and rough, always the same, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, channels, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=True)
    return (0.6 * smooth + 0.1 * torch.randn(count, channels, size, size, generator=generator)).clamp(-1, 1)


def probe_tokens(latents: Tensor) -> Tensor:
    """Latents (N, D), and others around them and around 0: (N + 2 TOKENS, D)."""
    generator = torch.Generator().manual_seed(1)
    around, wide = torch.randn(2, TOKENS, latents.shape[1], generator=generator).to(latents)
    if len(latents) < 2:
        return torch.cat([latents, around, 4 * wide])
    return torch.cat([latents, latents.mean(0) + 2 * latents.std(0) * around, 4 * wide])


def require_same(what: str, mine: Tensor, theirs: Tensor) -> None:
    """ValueError: the tensors are not equal up to rounding."""
    limit = TOLERANCE * float(mine.abs().max().clamp_min(1e-6))
    largest = float((mine.float() - theirs.float()).abs().max()) if mine.shape == theirs.shape else torch.inf
    if not largest <= limit:
        raise ValueError(f"not exported: the model read back from the export gives other {what}, by up to {largest:.3g}"
                         "; keep the checkpoint, which every command here reads")


def require_table_shape(quantize: ProVQ) -> None:
    """ValueError: the quantizer's codes are no (K, D) of latents."""
    expected = (quantize.num_codes, quantize.dim)
    if (shape := tuple(quantize.codebook().shape)) != expected:
        raise ValueError(f"not exported: the codes of {type(quantize.quantizer).__name__} are "
                         f"{shape}, no table (K, D) of {expected}; keep the checkpoint, which every command here "
                         "reads")


def require_same_codes(mine: ProVQ, theirs: ProVQ, latents: Tensor) -> None:
    """ValueError: of latents (N, D) and others, one gets another code, or a code is another vector. Both in eval()."""
    tokens = probe_tokens(latents.float())
    others = differing(mine.quantizer, theirs.quantizer, tokens)
    if others:
        kind = type(mine.quantizer).__name__
        raise ValueError(f"not exported: {kind} is no table of codes that latents are compared with as they are; of "
                         f"{len(tokens)} probe tokens the model read back from the export gives {others} another code. "
                         "Keep the checkpoint, which every command here reads")


def differing(mine: Any, theirs: Any, tokens: Tensor) -> int:
    """Tokens (N, D) that the two quantizers, in eval mode, do not give the same code and the same vector.

    Both ways of `mine` to a code count: forward, and the nearest to `latent`. Of two codes at the same distance, either
    is right.
    """
    latent, codebook = mine.latent(tokens), mine.codebook()
    indices = nearest_code(theirs.latent(tokens), theirs.codebook())
    wrong = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for own in (mine(tokens).indices, nearest_code(latent, codebook)):
        # In float64 and from the difference: the gap between two near codes must survive a large latent.
        found, meant = ((latent.double() - codebook[i].double()).square().sum(1) for i in (indices, own))
        tie = (found - meant).abs() <= TIE * (latent.double().square().sum(1) + codebook[own].double().square().sum(1))
        wrong |= (indices != own) & ~tie
    here, there = mine.lookup(indices), theirs.lookup(indices)
    if here.shape != there.shape:
        return len(tokens)
    wrong |= (here - there).abs().amax(1) > TOLERANCE * here.abs().max().clamp_min(1e-6)
    return int(wrong.sum())


def is_table(quantize: ProVQ, l2_norm: bool) -> bool:
    """Whether a plain table of its effective codes encodes as this quantizer does. It must have a codebook."""
    with evaluating(quantize):
        codes = quantize.codebook()
        if tuple(codes.shape) != (quantize.num_codes, quantize.dim):
            return False
        table = VectorQuantizer(quantize.num_codes, quantize.dim, l2_norm=l2_norm).to(codes).eval()
        table.set_codebook_(codes)
        # At the scale of the codes, so that tokens fall among them.
        return differing(quantize.quantizer, table, probe_tokens(codes[:TOKENS].float())) == 0


def quantizer_identity(quantize: ProVQ, l2_norm: bool) -> tuple[dict[str, str], dict[str, Tensor]]:
    """What a tokenizer's hash says of its quantizer beyond the table of codes: nothing, for those that are one."""
    if is_table(quantize, l2_norm):
        return {}, {}
    quantizer: Any = quantize.quantizer
    return ({"quantizer": type(quantizer).__name__},
            {f"quantize.quantizer.{key}": value for key, value in quantizer.state_dict().items()})
