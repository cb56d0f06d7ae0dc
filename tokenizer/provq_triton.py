# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The ProVQ authors
"""The nearest code as one GPU kernel, for very many codes: copy this file and provq.py, and have Triton.

    import provq_triton
    provq_triton.use_triton_search()    # from here on provq.py finds codes with it, on GPUs and from 65,536 codes on

provq.py writes distances to memory in blocks and reads them back; with many codes of few channels that traffic is most
of the search. Here a distance never leaves the registers: each lane of a program keeps the least it has seen, and lanes
meet once, at the end. Float32 throughout, no TF32. A token's codes may be shared among several programs, so that few
tokens fill a GPU too. Sizes: N tokens, D latent channels, K codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING or __package__:  # the provq.py beside this file, in a package of any name
    from . import provq
else:
    import provq

__version__ = "0.3.0"
__all__ = ["nearest", "use_triton_search"]

if getattr(provq, "__version__", None) != __version__:
    raise ImportError(f"provq_triton.py is of version {__version__}, but {provq.__file__} of version "
                      f"{getattr(provq, '__version__', None)}: copy both, provq*.py, from one release")

LEAST_CODES = 65_536  # with fewer, the search is too small a part of a step to matter
TOKENS, CODES = 32, 128  # of a program, at a time; with four warps a thread keeps 32 pairs, each in two registers
FEW_CHANNELS = 16  # at most so many are multiplied one by one; a matrix product would fill them up with zeros
CHANNELS = 32  # of a matrix product at a time
PROGRAMS = 512  # about four for each multiprocessor of an H100, if there are codes for them
NO_CODE = tl.constexpr(2**31 - 1)


@triton.jit
def _nearest_kernel(x, codes, squares, least, index, tokens, num_codes, share, channels: tl.constexpr,
                    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, FEW: tl.constexpr):
    # x (N, D), codes (K, D), squares (K,) float32 -> least, index (S, N): of |e|^2 - 2 x e over a share of codes each.
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    lane = tl.arange(0, BLOCK_K)
    begin = tl.program_id(1) * share
    end = tl.minimum(begin + share, num_codes)
    best = tl.full((BLOCK_N, BLOCK_K), float("inf"), tl.float32)
    which = tl.zeros((BLOCK_N, BLOCK_K), tl.int32) + begin + lane[None, :]
    for start in range(begin, end, BLOCK_K):
        code = start + lane
        product = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        if FEW:
            for d in tl.static_range(channels):
                a = tl.load(x + row * channels + d, mask=row < tokens, other=0.0)
                b = tl.load(codes + code.to(tl.int64) * channels + d, mask=code < end, other=0.0)
                product += a[:, None] * b[None, :]
        else:
            for first in tl.static_range(0, channels, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D)
                a = tl.load(x + row[:, None] * channels + d[None, :],
                            mask=(row < tokens)[:, None] & (d < channels)[None, :], other=0.0)
                b = tl.load(codes + code.to(tl.int64)[None, :] * channels + d[:, None],
                            mask=(code < end)[None, :] & (d < channels)[:, None], other=0.0)
                product += tl.dot(a, b, input_precision="ieee")
        distance = tl.load(squares + code, mask=code < end, other=float("inf"))[None, :] - 2.0 * product
        # Strictly less, so that of equals the first stays; what is no number goes in, and stays.
        better = (distance < best) | ((distance != distance) & (best == best))
        best = tl.where(better, distance, best)
        which = tl.where(better, code[None, :], which)
    unknown = best != best
    anywhere = tl.max(unknown.to(tl.int32), axis=1)[:, None] > 0
    value = tl.min(tl.where(unknown, float("inf"), best), axis=1)
    candidate = tl.where(anywhere, unknown, best == value[:, None])
    place = tl.program_id(1) * tokens + row
    tl.store(least + place, tl.where(tl.max(unknown.to(tl.int32), axis=1) > 0, float("nan"), value), mask=row < tokens)
    tl.store(index + place, tl.min(tl.where(candidate, which, NO_CODE), axis=1), mask=row < tokens)


def nearest(x: Tensor, codes: Tensor, squares: Tensor, *, shares: int | None = None) -> tuple[Tensor, Tensor]:
    """Least |e|^2 - 2 x e of tokens x (N, D) over codes e (K, D), with squares = |e|^2 (K,), and where: (N,) float32,
    (N,) int64, of equals the lower index. A distance that is no number is the least.

    float32 on one GPU (or, with TRITON_INTERPRET=1 set before Triton is imported, on a CPU); 0 < K < 2^31. shares:
    among how many programs the codes are shared, about; None: as many as fill the GPU.
    """
    (tokens, channels), num_codes = x.shape, len(codes)
    x, codes, squares = x.contiguous(), codes.contiguous(), squares.contiguous()
    groups = triton.cdiv(tokens, TOKENS)
    if shares is None:
        shares = max(1, min(PROGRAMS // max(groups, 1), num_codes // (16 * CODES)))
    share = triton.cdiv(triton.cdiv(num_codes, shares), CODES) * CODES
    shares = triton.cdiv(num_codes, share)
    least = x.new_empty(shares, tokens)
    index = torch.empty(shares, tokens, dtype=torch.int32, device=x.device)
    if tokens:
        _nearest_kernel[(groups, shares)](x, codes, squares, least, index, tokens, num_codes, share, channels, TOKENS,
                                          CODES, CHANNELS, channels <= FEW_CHANNELS)
    value, first = least.min(0)  # of equal shares the first, whose codes come first
    return value, index.gather(0, first[None])[0].long()


def use_triton_search(least_codes: int = LEAST_CODES) -> None:
    """Let provq.py search with `nearest` on GPUs, from least_codes codes on; anything else is searched as before, and
    so is what is exported or traced. For the whole process. RuntimeError: there is no GPU."""
    if not torch.cuda.is_available():
        raise RuntimeError("the Triton search needs a GPU, and torch sees none; leave it out")

    def search(x: Tensor, codes: Tensor, squares: Tensor) -> tuple[Tensor, Tensor] | None:
        traced = torch.jit.is_tracing() or provq._is_exporting()
        if traced or not x.is_cuda or x.dtype != torch.float32 or len(codes) < least_codes:
            return None
        return nearest(x, codes, squares)

    provq.fused_search = search
