# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The ProVQ authors
"""ProVQ: progressive vector quantization, in one file that needs only torch.

A VQ tokenizer collapses when it discretizes before its encoder has found the data manifold. ProVQ wraps a quantizer
and moves it along a curriculum (arXiv 2603.22304, section 4): (1) a plain autoencoder; once, k-means of the latents;
(2) z~ = alpha z + (1 - alpha) z_q with alpha falling from 1 to 0; (3) the plain quantizer. Copy this file:

    import torch
    from provq import Curriculum, ProVQ, VectorQuantizer

    encoder, decoder = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.ConvTranspose2d(8, 3, 4, 4)
    provq = ProVQ(VectorQuantizer(num_codes=64, dim=8), Curriculum(warmup_steps=20, transition_steps=20))
    opt = torch.optim.Adam([*encoder.parameters(), *decoder.parameters(), *provq.parameters()], 1e-2)
    for step in range(60):
        provq.set_step(step)                                        # 1. the loop owns the step count
        x = torch.rand(16, 3, 32, 32)
        if provq.needs_init:                                        # 2. once, when the warm-up ends
            with torch.no_grad():
                provq.init_codebook(encoder(x).movedim(1, -1).reshape(-1, 8), optimizers=[opt])
        out = provq(encoder(x))                                     # 3. z (B, D, h, w), or channel_dim=-1
        loss = (decoder(out.quantized) - x).square().mean() + out.loss  # out.loss is already weighted
        opt.zero_grad(), loss.backward(), opt.step()
    tokens = provq.encode(encoder(x))                               # (B, h, w) int64; provq.decode(tokens) -> codes

Inside a repository whose model, loss and checkpoints stay as they are (LlamaGen, taming-transformers, SimVQ,
vector-quantize-pytorch, diveq, ESM; the lines for each are under `attach`; for anything else, `adapt`):

    provq = attach(model.quantize, Curriculum(warmup_steps=50_000, transition_steps=20_000))
    for step in ...:
        provq.set_step(step)
        provq.maybe_init_codebook(optimizers=[opt])                 # from the latents of the warm-up's last steps

Sizes: N tokens, D latent channels, K codes. Distances, losses and statistics are float32 or better under any autocast.
Every collective is a no-op in one process. Checkpoints: `state_dict()` holds tensors only.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import operator
from typing import Any, Callable, NamedTuple, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

__version__ = "0.2.0"

# Public since torch 2.3, there since 2.1.
_is_compiling = getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling

# Before torch 2.4 a compiled graph has no guards on a module's attributes: that of the warm-up would silently serve all
# stages. There, the quantizer runs eagerly inside a compiled model.
_guarded = torch.compiler.disable if torch.__version__ < "2.4" else lambda forward: forward

# Elements of the N x K distance matrix that exist at a time. 2 MiB of float32 stays in a CPU core's cache (3x faster
# than one large matrix, see evaluations/benchmarks/code_search.py); a GPU wants fewer, larger launches (128 MiB).
CPU_SEARCH_ELEMENTS, GPU_SEARCH_ELEMENTS = 2**19, 2**25

# ProVQ.collect keeps this many tokens per code, over all ranks, of at least this many calls.
RESERVOIR_TOKENS_PER_CODE, RESERVOIR_CALLS = 16, 16


# ------------------------------------------------------------------------------------------------ collectives

def _world() -> int:
    # Read at every call: a module may be built before init_process_group.
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all_reduce(t: Tensor) -> Tensor:
    if _world() > 1:
        dist.all_reduce(t)
    return t


def _broadcast(t: Tensor) -> Tensor:
    if _world() > 1:
        dist.broadcast(t, src=0)
    return t


# ------------------------------------------------------------------------------------------------- curriculum

# alpha as a function of u = t / T in [0, 1). "cosine" is Eq. 3; "hard" holds 1 and drops to 0 at u = 1 (Table 6).
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda u: 0.5 * (1.0 + math.cos(math.pi * u)),
    "linear": lambda u: 1.0 - u,
    "exp": lambda u: (math.exp(-5.0 * u) - math.exp(-5.0)) / (1.0 - math.exp(-5.0)),
    "hard": lambda u: 1.0,  # noqa: ARG005
}


@dataclasses.dataclass(frozen=True)
class Curriculum:
    """When to be continuous and when discrete: pure functions of the optimizer step (Eq. 3 and 4), no state.

    A stage of length 0 is skipped: (0, 0) is the plain quantizer, (0, T) "+ soft transition", (W, 0) "+ manifold
    warm-up" and (W, T) ProVQ, the rows of Table 5. ValueError: a length that is no int >= 0, loss_floor outside
    [0, 1], unknown schedule, schedule value outside [0, 1].
    """

    warmup_steps: int  # stage 1 in optimizer steps (paper: 50,000 on ImageNet, 20,000 on proteins)
    transition_steps: int  # stage 2, T_trans, in optimizer steps (paper: 20,000 and 10,000)
    schedule: str | Callable[[float], float] = "cosine"  # a name in SCHEDULES, or u in [0, 1) -> alpha in [0, 1]
    loss_floor: float = 0.5  # lambda of Eq. 4 (paper: 0.5 on ImageNet, 1.0 on proteins)

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "transition_steps"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ValueError(f"{name} must be an int >= 0, in optimizer steps, got {getattr(self, name)!r}")
        if not 0.0 <= self.loss_floor <= 1.0:
            raise ValueError(f"loss_floor (lambda of Eq. 4) must lie in [0, 1], got {self.loss_floor}")
        if not callable(self.schedule) and self.schedule not in SCHEDULES:
            raise ValueError(f"unknown schedule {self.schedule!r}; choose one of {', '.join(SCHEDULES)}, or a callable")

    def stage(self, step: int) -> int:
        """1 continuous, 2 transition, 3 discrete."""
        return 1 if step < self.warmup_steps else 2 if step < self.warmup_steps + self.transition_steps else 3

    def alpha(self, step: int) -> float:
        """Share of the continuous latent, Eq. 3: 1 in stage 1, 0 in stage 3."""
        stage = self.stage(step)
        if stage != 2:
            return 1.0 if stage == 1 else 0.0
        schedule = self.schedule if callable(self.schedule) else SCHEDULES[self.schedule]
        value = float(schedule((step - self.warmup_steps) / self.transition_steps))
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"schedule gave alpha = {value} at step {step}; it must lie in [0, 1]")
        return value

    def omega(self, step: int) -> float:
        """Weight of the quantization loss, Eq. 4: 0 in stage 1 (there is no codebook yet), 1 in stage 3."""
        if self.stage(step) == 1:
            return 0.0
        return self.loss_floor + (1.0 - self.loss_floor) * (1.0 - self.alpha(step))


@dataclasses.dataclass(frozen=True)
class AdaptiveWarmup:
    """Ends the warm-up once a validation score stops improving: the *best* warm-up of Table 5 without hand-tuning.

    `ProVQ.observe(score)` counts scores since the last improvement; the Curriculum's warmup_steps stays the upper
    bound. The decision lives in ProVQ's state dict. ValueError: patience < 1, min_steps < 0, unknown mode.
    """

    patience: int = 3  # validations in a row without improvement
    min_steps: int = 0  # never leave before this optimizer step
    min_delta: float = 0.0  # an improvement is larger than this, in units of the score
    mode: str = "min"  # "min": lower is better (a loss, rFID); "max": higher is better (PSNR)

    def __post_init__(self) -> None:
        if self.patience < 1 or self.min_steps < 0 or self.mode not in ("min", "max"):
            raise ValueError(f"need patience >= 1, min_steps >= 0 and mode 'min' or 'max', got {self}")


# ------------------------------------------------------------------------------------ nearest codes and k-means

def _search(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest row of codes (K, D) for each row of x (N, D): squared distances (N,), indices (N,) int64."""
    # Inside a compiled region the process-wide precision is the host's: changing it there would break the graph.
    if not x.is_cuda or _is_compiling():
        return _search_blocks(x, codes)
    matmul = torch.backends.cuda.matmul  # torch 2.9 renamed the switch, and refuses a mixture of both names
    switch, exact = ("fp32_precision", "ieee") if hasattr(matmul, "fp32_precision") else ("allow_tf32", False)
    saved = getattr(matmul, switch)
    setattr(matmul, switch, exact)
    try:
        return _search_blocks(x, codes)
    finally:
        setattr(matmul, switch, saved)


def _search_blocks(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    # Distances do not change, but a common offset would cancel catastrophically in |e|^2 - 2xe. (Not the mean: one code
    # far out would drag it along.)
    # (On a GPU the median has no deterministic form, for use_deterministic_algorithms.)
    centre = codes.sort(0).values[(len(codes) - 1) // 2] if codes.is_cuda else codes.median(0).values
    x, codes = x - centre, codes - centre
    sq = codes.square().sum(1)
    rows = max(1, (CPU_SEARCH_ELEMENTS if x.device.type == "cpu" else GPU_SEARCH_ELEMENTS) // max(1, len(codes)))
    # Results go into two allocated tensors: small ones that outlive their block would pin its freed memory behind them.
    value, index = x.new_empty(len(x)), torch.empty(len(x), dtype=torch.int64, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            value[part], index[part] = torch.addmm(sq, x[part], codes.t(), alpha=-2.0).min(1)
    return (value + x.square().sum(1)).clamp_min_(0.0), index


@torch.no_grad()
def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the Euclidean nearest code: x (N, D), codebook (K, D) -> (N,) int64; of equal distances the lower index.

    Computed in float32 (float64 if given) outside autocast and, in eager mode, outside TF32, in blocks: the N x K
    matrix never exists whole.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return _search(x.to(dtype), codebook.to(dtype))[1]


class KMeansResult(NamedTuple):
    centroids: Tensor  # (K, D) float32, equal on every rank; unit rows if spherical
    counts: Tensor  # (K,) int64: tokens of all ranks nearest to each centroid
    inertia: float  # mean squared distance to the nearest centroid, over the tokens of all ranks
    iterations: int  # Lloyd iterations done; fewer than asked for when a fixed point was reached


@torch.no_grad()
def kmeans(
    x: Tensor, num_codes: int, *, iters: int = 20, start: str = "kmeans++", spherical: bool = False, seed: int = 0,
    order: Tensor | None = None,
) -> KMeansResult:
    """Lloyd's k-means over the tokens of all ranks. Collective; how they are spread is irrelevant but for rounding.

    x (N_rank, D) float, this rank's tokens. order (N_rank,) int64: each token's position among the tokens of all ranks,
    by which seeds are drawn (default: rank 0's tokens first), so that 1 and 8 processes start from the same points.
    start: "kmeans++" (Arthur & Vassilvitskii 2007, on a random subset of max(4 K, 4096) tokens) or "random" tokens.
    iters = 0 returns the start. Sums and counts are all-reduced in float64. An empty cluster moves to the token that
    is farthest from its centroid. ValueError, on every rank alike: fewer tokens than codes, non-finite tokens.
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"k-means needs floating-point tokens (N, D), got {tuple(x.shape)} {x.dtype}")
    if start not in ("kmeans++", "random") or iters < 0 or num_codes < 1:
        raise ValueError("need start 'kmeans++' or 'random', iters >= 0 and num_codes >= 1; "
                         f"got {start=} {iters=} {num_codes=}")
    x = x.float()
    rank = dist.get_rank() if _world() > 1 else 0
    sizes = torch.zeros(_world() + 1, dtype=torch.int64, device=x.device)
    sizes[rank], sizes[-1] = len(x), (~x.isfinite()).sum()
    *per_rank, bad = _all_reduce(sizes).tolist()
    total = sum(per_rank)
    if bad:
        raise ValueError(f"k-means got {bad} non-finite values in its tokens: training diverged before the codebook")
    if total < num_codes:
        raise ValueError(f"k-means needs at least num_codes = {num_codes} tokens over all ranks, got {total}: "
                         "collect more batches, or use a smaller codebook")
    if spherical:
        x = F.normalize(x, dim=1)
    if order is None:
        order = torch.arange(len(x), device=x.device) + sum(per_rank[:rank])
    order = order.to(x.device)

    generator = torch.Generator().manual_seed(seed)
    sample = num_codes if start == "random" else min(total, max(4 * num_codes, 4096))
    picks = torch.randperm(total, generator=generator)[:sample].to(x.device)
    slot = torch.full((total,), -1, dtype=torch.int64, device=x.device)
    slot[picks] = torch.arange(sample, device=x.device)
    valid = order.shape == x.shape[:1] and bool(((order >= 0) & (order < total)).all())
    mine = slot[order] if valid else slot.new_full((len(x),), -1)  # then all ranks raise below, not this one alone
    points = x.new_zeros(sample, x.shape[1] + 1)  # each row is filled by the one rank that has it
    points[mine[mine >= 0]] = F.pad(x, (0, 1), value=1.0)[mine >= 0]
    _all_reduce(points)
    if not bool((points[:, -1] == 1).all()):
        raise ValueError("order must number the tokens of all ranks 0 .. N-1 without gaps or repeats")
    points = points[:, :-1]
    centroids = _kmeans_plus_plus(points, num_codes, generator) if start == "kmeans++" else points
    centroids = _broadcast(centroids.contiguous())

    done = 0
    for _ in range(iters):
        sums, counts, far = _assign(x, centroids)
        new = torch.where(counts[:, None] > 0, (sums / counts.clamp_min(1)[:, None]).float(), centroids)
        if spherical:
            new = F.normalize(new, dim=1)
        new = _reseed_empty(new, counts, x, far, order, rank)
        done += 1
        moved = not torch.equal(_broadcast(new), centroids)
        centroids = new
        if not moved:
            break
    _, counts, far = _assign(x, centroids)
    inertia = _all_reduce(far.sum(dtype=torch.float64)).item() / total
    return KMeansResult(centroids, counts.long(), inertia, done)


def _kmeans_plus_plus(points: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    # Each next seed is drawn with probability proportional to its squared distance from the seeds so far.
    draws = torch.rand(num_codes, generator=generator, dtype=torch.float64).to(points.device)
    seeds = torch.zeros(num_codes, dtype=torch.int64, device=points.device)
    nearest = points.new_full((len(points),), math.inf)
    for k in range(num_codes):
        if k == 0:
            seeds[0] = (draws[0] * len(points)).long()
        else:
            cumulative = nearest.cumsum(0, dtype=torch.float64)
            drawn = torch.searchsorted(cumulative, draws[k : k + 1] * cumulative[-1], right=True)[0]
            seeds[k] = drawn.clamp(max=len(points) - 1)
        torch.minimum(nearest, (points - points[seeds[k]]).square().sum(1), out=nearest)
    return points[seeds]


def _assign(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums (K, D) and counts (K,) float64 over all ranks; this rank's squared distances (N_rank,) float32."""
    stats = torch.zeros(len(centroids), x.shape[1] + 1, dtype=torch.float64, device=x.device)
    far = []
    for part in torch.split(x, 2**16):  # bounds the float64 copy of the tokens
        distance, index = _search(part, centroids)
        stats.index_add_(0, index, F.pad(part.double(), (0, 1), value=1.0))
        far.append(distance)
    _all_reduce(stats)
    return stats[:, :-1], stats[:, -1], torch.cat(far) if far else x.new_zeros(0)


def _reseed_empty(centroids: Tensor, counts: Tensor, x: Tensor, far: Tensor, order: Tensor, rank: int) -> Tensor:
    empty = (counts == 0).nonzero()[:, 0]  # equal on every rank, and so is its length: no rank waits alone
    if not len(empty):
        return centroids
    by_order = order.argsort()  # a stable sort then breaks ties alike, however the tokens are stored
    top = by_order[far[by_order].argsort(descending=True, stable=True)][: len(empty)]
    # Each rank offers its farthest tokens as rows (distance, order, token); float64 holds an order exactly.
    offers = torch.zeros(_world(), len(empty), x.shape[1] + 2, dtype=torch.float64, device=x.device)
    offers[rank, : len(top)] = torch.cat([far[top, None].double(), order[top, None].double(), x[top].double()], 1)
    offers = _all_reduce(offers).flatten(0, 1)
    offers = offers[offers[:, 1].argsort()]  # the same order whatever the ranks, then ties keep it
    offers = offers[offers[:, 0].argsort(descending=True, stable=True)][: len(empty)]
    offers = offers[offers[:, 0] > 0]  # a token at distance 0 would only duplicate a centroid
    centroids = centroids.clone()
    centroids[empty[: len(offers)]] = offers[:, 2:].float()
    return centroids


# ------------------------------------------------------------------------------------------------- statistics

def code_statistics(counts: Tensor) -> dict[str, float]:
    """counts (K,) of each code -> usage, the fraction used, in [0, 1]; perplexity exp(H) in codes, 0 without counts."""
    p = counts.double() / counts.sum().clamp_min(1)
    entropy = -torch.xlogy(p, p).sum()
    return {"usage": (counts > 0).double().mean().item(), "perplexity": entropy.exp().item() if counts.any() else 0.0}


@torch.no_grad()
def mean_pairwise_distance(codebook: Tensor) -> float:
    """Mean Euclidean distance over the K (K - 1) / 2 pairs of codes (K, D): "Euc dist." of Tables 1 and 4."""
    codes, total = codebook.detach().float(), 0.0
    if len(codes) < 2:
        return 0.0
    for part in torch.split(codes, max(1, 2**22 // len(codes))):  # without the matmul shortcut: exact for near pairs
        total += torch.cdist(part, codes, compute_mode="donot_use_mm_for_euclid_dist").sum(dtype=torch.float64).item()
    return total / (len(codes) * (len(codes) - 1))


@torch.no_grad()
def second_moments(latents: Tensor) -> Tensor:
    """Sum of [1, z]^T [1, z] over tokens (N, D) -> (D+1, D+1) float64: add these over batches and ranks."""
    z = F.pad(latents.detach().double(), (1, 0), value=1.0)
    return z.t() @ z


def effective_rank(moments: Tensor) -> float:
    """exp(entropy of the normalised singular values) of the centred latents, in dimensions (Roy & Vetterli 2007).

    moments (D+1, D+1) from `second_moments`. Between 1 (a line) and D (a ball); 0 for fewer than two tokens.
    """
    n = moments[0, 0].clamp_min(1)
    mean = moments[0, 1:] / n
    eigenvalues = torch.linalg.eigvalsh(moments[1:, 1:] / n - torch.outer(mean, mean)).clamp_min(0)
    # Rounding leaves about 1e-15 of the raw second moment in directions that the latents do not use at all.
    eigenvalues = torch.where(eigenvalues > 1e-13 * moments[1:, 1:].diagonal().sum() / n, eigenvalues, 0.0)
    if not bool(eigenvalues.any()):
        return 0.0
    p = eigenvalues.sqrt() / eigenvalues.sqrt().sum()
    return (-torch.xlogy(p, p).sum()).exp().item()


@torch.no_grad()
def drift(before: Tensor, after: Tensor) -> float:
    """How far points (N, D) moved, in units of their spread: RMS displacement / RMS distance of `before` to its mean.

    0 = stagnant, 1 = moved by as much as they are apart. Of codes and of the latents of fixed images per interval, it
    shows the deadlock of section 3: latents that follow codes that do not move.
    """
    before, after = before.double(), after.double()
    spread = (before - before.mean(0)).square().sum(1).mean().sqrt()
    return ((after - before).square().sum(1).mean().sqrt() / spread.clamp_min(1e-12)).item()


# -------------------------------------------------------------------------------------------------- quantizers

class Quantized(NamedTuple):
    """What a quantizer returns for tokens x (N, D)."""

    codes: Tensor  # (N, D): exactly the code in value, with a gradient estimator to x
    indices: Tensor  # (N,) int64
    losses: dict[str, Tensor]  # float32 [] each, beta applied; their sum is L_VQ + beta L_commit of Eq. 4


def _recomputing() -> bool:
    # Activation checkpointing runs forward again inside backward; statistics must count each token once. A compiled
    # graph cannot ask: there usage counts double (the same fractions) when the checkpoint is around compiled code.
    return not _is_compiling() and torch._C._current_graph_task_id() != -1


class VectorQuantizer(nn.Module):
    """Nearest-code quantizer with a trained table (van den Oord et al. 2017). Usable alone: no curriculum inside.

    ProVQ's default is Euclidean; l2_norm=True puts latents and codes on the unit sphere (LlamaGen's baseline).
    The code term and beta x the commitment term are means over all N x D elements (Eq. 4). rotation=True replaces the
    straight-through gradient by the rotation trick (Fifty et al. 2024, arXiv 2410.06424).
    """

    def __init__(self, num_codes: int, dim: int, *, l2_norm: bool = False, beta: float = 0.25, rotation: bool = False):
        super().__init__()
        if num_codes < 1 or dim < 1 or beta < 0:
            raise ValueError(f"need num_codes >= 1, dim >= 1, beta >= 0; got {num_codes=} {dim=} {beta=}")
        self.num_codes, self.dim, self.l2_norm, self.beta, self.rotation = num_codes, dim, l2_norm, beta, rotation
        self._init_table()

    def _init_table(self) -> None:
        self.embedding = nn.Embedding(self.num_codes, self.dim)
        nn.init.uniform_(self.embedding.weight, -1.0 / self.num_codes, 1.0 / self.num_codes)
        if self.l2_norm:
            self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=1)

    def _table(self) -> Tensor:
        """Codes (K, D) before normalisation, differentiable."""
        return self.embedding.weight

    def codebook(self) -> Tensor:
        """Effective codes (K, D), differentiable; unit rows when l2_norm."""
        return F.normalize(self._table(), dim=1) if self.l2_norm else self._table()

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:  # noqa: ARG002
        """Make centroids (K, D) the codes. counts (K,), their cluster sizes, are what EMA starts from."""
        self.embedding.weight.copy_(self._checked(centroids))

    def _checked(self, centroids: Tensor) -> Tensor:
        if tuple(centroids.shape) != (self.num_codes, self.dim):
            raise ValueError(f"centroids must be (K, D) = {(self.num_codes, self.dim)}, got {tuple(centroids.shape)}")
        return centroids

    def latent(self, x: Tensor) -> Tensor:
        """x (N, D) as it is compared with codes: x in float32 (or better), or x / |x| when l2_norm."""
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.normalize(x, dim=1) if self.l2_norm else x

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes of int64 indices (...) -> (..., D): equal to what forward returned for them, bit for bit."""
        return F.embedding(indices, self.codebook())

    def forward(self, x: Tensor) -> Quantized:
        """Quantize x (N, D), any float dtype; see `Quantized`."""
        with torch.autocast(x.device.type, enabled=False):
            latent = self.latent(x)
            codebook = self.codebook()
            indices = nearest_code(latent.detach(), codebook.detach())
            code = F.embedding(indices, codebook)
            if self.training and not _recomputing():
                self._observe(latent.detach(), indices)
            return Quantized(self._estimate(latent, code.detach()), indices, self._losses(latent, code))

    def _losses(self, latent: Tensor, code: Tensor) -> dict[str, Tensor]:
        return {"codebook": F.mse_loss(code, latent.detach().to(code.dtype)),
                "commit": self.beta * F.mse_loss(latent, code.detach().to(latent.dtype))}

    def _estimate(self, latent: Tensor, code: Tensor) -> Tensor:
        if not self.rotation:
            return code + (latent - latent.detach())  # the bracket is exactly 0, so the value is exactly the code
        # q = (|e| / |z|) R z, R the rotation that takes z / |z| to e / |e|, both held constant (their section 4.2).
        with torch.no_grad():
            z_norm, e_norm = latent.norm(dim=1, keepdim=True), code.norm(dim=1, keepdim=True)
            u, q = latent / z_norm.clamp_min(1e-6), code / e_norm.clamp_min(1e-6)
            r = F.normalize(u + q, dim=1, eps=1e-6)
            scale = e_norm / z_norm.clamp_min(1e-6)
        turned = latent - 2 * r * (r * latent).sum(1, keepdim=True) + 2 * q * (u * latent).sum(1, keepdim=True)
        turned = scale * turned
        return code + (turned - turned.detach())

    def _observe(self, latent: Tensor, indices: Tensor) -> None:
        """Gather statistics in a training forward; the trained table needs none."""


class LinearVectorQuantizer(VectorQuantizer):
    """Frozen table times one trained linear map: codes = table W^T + b, so that every code moves in every step.

    SimVQ (Zhu et al. 2025) keeps the table of the constructor, ~ N(0, 1/D). AminoAseed (Yuan et al. 2025) sets it from
    data, once, by `set_codebook_`, which makes the map the identity: codes start as centroids. One class does both;
    ProVQ's k-means turns the first into the second.
    """

    table: Tensor  # (K, D)

    def _init_table(self) -> None:
        # A buffer: low-precision optimizers keep a float32 master of every Parameter and write it back, frozen or not.
        self.register_buffer("table", torch.randn(self.num_codes, self.dim) / math.sqrt(self.dim))
        self.map = nn.Linear(self.dim, self.dim)

    def _table(self) -> Tensor:
        with torch.autocast(self.table.device.type, enabled=False):
            return self.map(self.table)

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:  # noqa: ARG002
        """Table := centroids (K, D), W := I, b := 0."""
        self.table.copy_(self._checked(centroids))
        nn.init.eye_(self.map.weight)
        nn.init.zeros_(self.map.bias)


class EMAVectorQuantizer(VectorQuantizer):
    """Codes are running means of the latents assigned to them (VQ-VAE-2, SoundStream, ESM3); no gradient, no code loss.

    A training forward only gathers sums; `update_()` applies them, once per optimizer step (ProVQ.set_step calls it),
    so that accumulated micro-batches and recomputed activations give the update of one large batch. Counts are
    relative, with mean 1 whatever the batch size, and Laplace-smoothed by eps. restart_below > 0: a code whose running
    count is under that restarts at a random latent of the last batch (Jukebox, whose threshold is absolute).
    """

    codes: Tensor  # (K, D)
    ema_sums: Tensor  # (K, D)
    ema_counts: Tensor  # (K,)

    def __init__(self, num_codes: int, dim: int, *, decay: float = 0.99, eps: float = 1e-5, restart_below: float = 0.0,
                 **options: Any):
        if not 0.0 <= decay < 1.0 or restart_below < 0:
            raise ValueError(f"need 0 <= decay < 1 and restart_below >= 0, got {decay=} {restart_below=}")
        super().__init__(num_codes, dim, **options)
        self.decay, self.eps, self.restart_below = decay, eps, restart_below

    def _init_table(self) -> None:
        codes = torch.empty(self.num_codes, self.dim).uniform_(-1.0 / self.num_codes, 1.0 / self.num_codes)
        codes = F.normalize(codes, dim=1) if self.l2_norm else codes
        self.register_buffer("codes", codes)
        self.register_buffer("ema_sums", codes.clone())
        self.register_buffer("ema_counts", torch.ones(self.num_codes))
        # Plain tensors, not buffers: DistributedDataParallel would overwrite other ranks' sums with rank 0's.
        self._pending = torch.zeros(self.num_codes, self.dim + 1, dtype=torch.float64)
        self._last = torch.zeros(1, self.dim)

    def _table(self) -> Tensor:
        return self.codes

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:
        """Codes := centroids (K, D); running counts := counts (K,) scaled to mean 1, or 1."""
        self.codes.copy_(self._checked(centroids))
        weight = torch.ones_like(self.ema_counts) if counts is None else counts / counts.float().mean()
        self.ema_counts.copy_(weight.clamp_min(max(self.restart_below, 1e-3)))
        self.ema_sums.copy_(self.codes * self._smoothed()[:, None])
        self._pending.zero_()

    def _losses(self, latent: Tensor, code: Tensor) -> dict[str, Tensor]:
        return {"commit": self.beta * F.mse_loss(latent, code.to(latent.dtype))}

    @torch.no_grad()
    def _observe(self, latent: Tensor, indices: Tensor) -> None:
        if self._pending.device != latent.device:
            self._pending, self._last = self._pending.to(latent.device), self._last.to(latent.device)
        self._pending.index_add_(0, indices, F.pad(latent.double(), (0, 1), value=1.0))
        if self.restart_below > 0:
            self._last = latent.float()

    @torch.no_grad()
    def update_(self) -> None:
        """Fold what the training forwards since the last call gathered, over all ranks, into the codes. Collective."""
        device = self.codes.device
        stats = _all_reduce(self._pending.to(device))
        stats = (stats * (self.num_codes / stats[:, -1].sum().clamp_min(1))).float()  # mean count 1, as at the start
        sums, counts = stats[:, :-1], stats[:, -1]
        decay = torch.where(counts.sum() > 0, self.decay, 1.0)  # without tokens nothing decays; decided on the device
        self.ema_sums.mul_(decay).add_(sums * (1.0 - decay))
        self.ema_counts.mul_(decay).add_(counts * (1.0 - decay))
        self._pending.zero_()
        if self.restart_below > 0:
            floor = self.restart_below * self.ema_counts.mean()
            last = self._last.to(device)
            rows = _broadcast(last[torch.randint(len(last), (self.num_codes,), device=device)].contiguous())
            dead = ((self.ema_counts < floor) & (counts.sum() > 0))[:, None]
            self.ema_counts.copy_(torch.where(dead[:, 0], floor, self.ema_counts))
            self.ema_sums.copy_(torch.where(dead, rows * floor, self.ema_sums))
        self.codes.copy_(self.ema_sums / self._smoothed()[:, None])

    def _smoothed(self) -> Tensor:
        total = self.ema_counts.sum()
        return (self.ema_counts + self.eps) * total / (total + self.num_codes * self.eps)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._pending.zero_()


QUANTIZERS: dict[str, type[VectorQuantizer]] = {
    "vq": VectorQuantizer, "simvq": LinearVectorQuantizer, "aminoaseed": LinearVectorQuantizer,
    "ema": EMAVectorQuantizer,
}


def make_quantizer(name: str, num_codes: int, dim: int, **options: Any) -> VectorQuantizer:
    """The quantizer called `name` in QUANTIZERS. ValueError lists the names if there is none."""
    if name not in QUANTIZERS:
        raise ValueError(f"unknown quantizer {name!r}; choose one of {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name](num_codes, dim, **options)


# ------------------------------------------------------------------------------------------------------- ProVQ

class ProVQOutput(NamedTuple):
    quantized: Tensor  # z~ of Eq. 2, shape and dtype of z; 0 where masked
    indices: Tensor | None  # int64, z's shape without channels; -1 where masked; None in stage 1
    loss: Tensor  # float32 []: omega x the quantizer's losses (in eval() without omega); add as it is
    losses: dict[str, Tensor]  # float32 [] each, unweighted and detached, for logging; empty in stage 1, without tokens


class ProVQ(nn.Module):
    """A quantizer on the curriculum of the paper (section 4).

    Training: stage 1 passes latents through and never calls the quantizer; stage 2 mixes (Eq. 2) and weights the losses
    (Eq. 4); stage 3 is the quantizer. eval(): discrete as soon as there is a codebook, continuous before, whatever the
    step. A (0, 0) curriculum is the bare quantizer bit for bit, and after training `provq.quantizer` alone suffices.

    Call `set_step(step)` before the forwards of a step and, so that a checkpoint holds all of it, `set_step(step + 1)`
    after the optimizer's. The state dict adds step, initialised, warmup_end, best_score and stale_checks, and while
    `collect` holds latents, those; where an adaptive warm-up ended, a loaded warmup_end overrides the constructor's.
    Keep the module in float32 (use autocast): in half precision alpha and running means would lose small changes.
    """

    REQUIRED: tuple[str, ...] = ("codebook", "set_codebook_", "latent", "lookup", "num_codes", "dim")  # of quantizers

    quantizer: Any  # typed by its methods
    step: Tensor  # int64 []: optimizer steps done
    initialised: Tensor  # float32 []: not 0 once init_codebook was called. A float, so that averages of models follow
    warmup_end: Tensor  # int64 []: first step of stage 2 where an adaptive warm-up ended, else -1; 0: none, codes train
    best_score: Tensor  # float64 []
    stale_checks: Tensor  # int64 []
    _alpha: Tensor
    _omega: Tensor

    def __init__(self, quantizer: nn.Module, curriculum: Curriculum, *, channel_dim: int = 1,
                 adaptive: AdaptiveWarmup | None = None):
        """quantizer: a VectorQuantizer or a module with its methods. channel_dim: 1 for z (B, D, ...), -1 (B, ..., D).

        TypeError: a quantizer without the methods. ValueError: channel_dim; adaptive without a warm-up to end.
        """
        super().__init__()
        missing = [m for m in self.REQUIRED if not hasattr(quantizer, m)]
        if missing:
            raise TypeError(f"{type(quantizer).__name__} lacks {', '.join(missing)}, which ProVQ needs of a quantizer "
                            "(a foreign module: adapt() it, or attach() to it)")
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim must be 1 (B, D, ...) or -1 (B, ..., D), got {channel_dim}")
        if adaptive and curriculum.warmup_steps == 0:
            raise ValueError("adaptive needs a warm-up to end: give the curriculum warmup_steps > 0")
        if adaptive and adaptive.min_steps > curriculum.warmup_steps:
            raise ValueError(f"adaptive min_steps {adaptive.min_steps} > warmup_steps {curriculum.warmup_steps}, "
                             "which is its upper bound")
        self.quantizer, self.adaptive, self.channel_dim = quantizer, adaptive, channel_dim
        self._full_curriculum = curriculum
        self.register_buffer("step", torch.tensor(0))
        self.register_buffer("initialised", torch.tensor(0.0))
        self.register_buffer("warmup_end", torch.tensor(-1 if curriculum.warmup_steps else 0))
        self.register_buffer("best_score", torch.tensor(torch.finfo(torch.float64).max, dtype=torch.float64))
        self.register_buffer("stale_checks", torch.tensor(0))
        # 0-d tensors, not floats: torch.compile makes one graph per stage, not one per value of alpha.
        self.register_buffer("_alpha", torch.tensor(0.0), persistent=False)
        self.register_buffer("_omega", torch.tensor(0.0), persistent=False)
        counted = getattr(quantizer, "indices_at", True)  # a grid of codes that keeps its indices has billions of them
        self._counts = torch.zeros(self.num_codes if counted else 0, dtype=torch.int64)  # per rank: no buffer (see EMA)
        self._loaded_alone = False  # a host's weights came without a curriculum, and no step has been set since
        self._empty_reservoir()
        self._mirror()

    def _mirror(self) -> None:
        # Python copies of the state: forward must not synchronise with the device to know its stage.
        self._step, self._initialised = int(self.step), bool(self.initialised)
        end, longest = int(self.warmup_end), self._full_curriculum.warmup_steps
        warmup = min(end, longest) if end > 0 else longest
        self._curriculum = dataclasses.replace(self._full_curriculum, warmup_steps=warmup)
        self._from_start = end == longest == 0  # the codes trained without a warm-up; not so a warm-up's checkpoint
        self._stage = self._curriculum.stage(self._step)
        self._alpha.fill_(self._curriculum.alpha(self._step))
        self._omega.fill_(self._curriculum.omega(self._step))

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> nn.Module:
        super()._apply(fn, *args)
        for name in ("reservoir", "reservoir_state", "_counts"):  # no buffers, but they move along
            setattr(self, name, getattr(self, name).to(self.step.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if len(self.reservoir):
            destination[prefix + "reservoir"] = self.reservoir
            destination[prefix + "reservoir_state"] = self.reservoir_state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._empty_reservoir()
        if prefix + "reservoir" in state_dict:  # popped: they come and go, and strict loading must not mind
            self.reservoir = state_dict.pop(prefix + "reservoir").to(self.step.device, copy=True)
            self.reservoir_state = state_dict.pop(prefix + "reservoir_state").to(self.step.device, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._mirror()

    @property
    def curriculum(self) -> Curriculum:
        """The curriculum in force: warmup_steps is the adaptive decision once there is one."""
        return self._curriculum

    @property
    def stage(self) -> int:
        return self._stage

    @property
    def alpha(self) -> float:
        return self._curriculum.alpha(self._step)

    @property
    def omega(self) -> float:
        return self._curriculum.omega(self._step)

    @property
    def num_codes(self) -> int:
        return self.quantizer.num_codes

    @property
    def dim(self) -> int:
        return self.quantizer.dim

    @property
    def codebook(self) -> Tensor:
        """Effective codes (K, D), differentiable."""
        return self.quantizer.codebook()

    @property
    def has_codebook(self) -> bool:
        """Whether codes mean anything yet: initialised from data, or trained from the start (no warm-up)."""
        if not (self._initialised or self.training or _is_compiling()):
            self._initialised = bool(self.initialised)  # averages of models (EMA, SWA) are written to directly
        return self._initialised or self._loaded_alone or self._from_start

    @property
    def needs_init(self) -> bool:
        """Whether the warm-up has ended and `init_codebook` has not been called."""
        return self._stage > 1 and not self.has_codebook

    def set_step(self, step: int) -> None:
        """Steps < step are done. Going forward also applies a pending EMA update (collective then).

        TypeError: not an int. ValueError: negative. RuntimeError: back into the warm-up of an initialised codebook.
        """
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"step must be a Python int (a tensor would synchronise), got {type(step).__name__}")
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        if self.training and step < self._step and self._initialised and self._curriculum.stage(step) == 1:
            raise RuntimeError(f"step {step} is in the warm-up, but the codebook was initialised by step {self._step}: "
                               "train on with Curriculum(0, 0), or load the weights without the curriculum's state "
                               "(host_state_dict, or the quantizer's own) for a warm-up from the start")
        if step > self._step and self._stage > 1 and hasattr(self.quantizer, "update_"):
            self.quantizer.update_()
        self._step, self._loaded_alone = step, False
        self._stage = self._curriculum.stage(step)
        self.step.fill_(step)
        self._alpha.fill_(self._curriculum.alpha(step))
        self._omega.fill_(self._curriculum.omega(step))

    def observe(self, score: float) -> bool:
        """Report a validation score in stage 1; True if that ended the warm-up (see AdaptiveWarmup).

        Collective: rank 0's score decides. RuntimeError: no AdaptiveWarmup given. ValueError: a non-finite score.
        """
        if self.adaptive is None:
            raise RuntimeError("observe() needs ProVQ(..., adaptive=AdaptiveWarmup(...))")
        score = float(_broadcast(torch.tensor(score, dtype=torch.float64, device=self.step.device)))
        if not math.isfinite(score):
            raise ValueError(f"the validation score must be finite, got {score}")
        if self._stage != 1:
            return False
        signed = score if self.adaptive.mode == "min" else -score
        if signed < float(self.best_score) - self.adaptive.min_delta:
            self.best_score.fill_(signed)
            self.stale_checks.zero_()
        else:
            self.stale_checks.add_(1)
        ended = int(self.stale_checks) >= self.adaptive.patience and self._step >= max(1, self.adaptive.min_steps)
        if ended:
            self.warmup_end.fill_(self._step)
            self._mirror()
        return ended

    def _empty_reservoir(self) -> None:
        # Plain tensors, not buffers: DistributedDataParallel would overwrite other ranks' latents with rank 0's.
        self.reservoir = torch.zeros(0, self.quantizer.dim, device=self.step.device)
        self.reservoir_state = torch.zeros(2, dtype=torch.int64, device=self.step.device)  # tokens: taken, last call's

    def _size_reservoir(self) -> None:
        """Make room for this rank's share. With another number of ranks than before, the latest tokens stay."""
        size = max(-(-RESERVOIR_TOKENS_PER_CODE * self.num_codes // _world()), 2 * RESERVOIR_CALLS)
        if len(self.reservoir) == size:
            return
        taken, old = (int(self.reservoir_state[0]), self.reservoir) if len(self.reservoir) else (0, self.reservoir)
        stay = torch.arange(max(0, taken - min(len(old), size)), taken, device=old.device)
        self.reservoir = torch.zeros(size, self.dim, device=old.device)
        self.reservoir[: len(stay)] = old[stay % max(1, len(old))]
        self.reservoir_state[0] = len(stay)

    @torch.no_grad()
    def collect(self, latents: Tensor) -> None:
        """Keep a sample of latents (N, D), this rank's valid tokens, for `maybe_init_codebook`. Call it in the warm-up.

        Bounded: RESERVOIR_TOKENS_PER_CODE x K tokens over all ranks, the latest, and of no call more than a 16th of
        that: the encoder moves, so old latents are dropped, and one batch alone would be too uniform. Draws no random
        numbers and does not synchronise. ValueError: latents are not (N, D).
        """
        self._check_tokens(latents)
        if not len(latents):
            return
        if not len(self.reservoir):
            self._size_reservoir()
        size, n = len(self.reservoir), len(latents)
        take = min(n, -(-size // RESERVOIR_CALLS))  # rounded up: one call of all ranks may have to do
        # One row of each of `take` equal parts of the batch. Where in its part is a hash (Knuth's) of a running number,
        # in whole numbers: a fixed stride would see the same places of every image.
        i = torch.arange(take, device=latents.device)
        taken = self.reservoir_state[0]
        within = (taken + i) * 2654435769 % 2**32
        rows = (i * n + (within * n >> 32)) // take
        self.reservoir[(taken + i) % size] = latents[rows].float()
        self.reservoir_state[0] += take
        self.reservoir_state[1] = n

    def _check_tokens(self, latents: Tensor) -> None:
        if latents.ndim != 2 or latents.shape[1] != self.dim:
            raise ValueError(f"latents must be (N, D = {self.dim}), got {tuple(latents.shape)}")

    def maybe_init_codebook(self, *, copies: Sequence[nn.Module] = (), **options: Any) -> dict[str, float] | None:
        """Once, when the warm-up has ended: `init_codebook` from what `collect` kept. Else None. Collective then.

        Call it in every step after set_step. options: those of `init_codebook`, above all `optimizers`. copies: moving
        averages of the quantizer (same state-dict keys), which take the new codes over at once. RuntimeError: `collect`
        was never called.
        """
        if not self.needs_init:
            return None
        kept = self.reservoir[: int(self.reservoir_state[0])]
        if not _all_reduce(self.reservoir_state[:1].clone()):  # of all ranks: none may raise while others wait
            raise RuntimeError("the warm-up has ended, and no latents were collected in it. Were weights loaded without"
                               " the curriculum's state? Then call init_codebook(None): codes stay as they are")
        info = self.init_codebook(kept, **options)
        state = self._owner().state_dict()
        for copy in [copies] if isinstance(copies, nn.Module) else copies:
            # Without the reservoir, which is empty now: loading empties the copy's.
            copy.load_state_dict({name: state[name] for name in copy.state_dict() if name in state})
        return info

    def _owner(self) -> nn.Module:
        """The module that stands in the model."""
        return self

    @torch.no_grad()
    def init_codebook(
        self, latents: Tensor | None, *, iters: int = 20, start: str = "kmeans++", seed: int = 0,
        order: Tensor | None = None, optimizers: Sequence[torch.optim.Optimizer] = (),
    ) -> dict[str, float]:
        """Set the codes to the k-means centroids of latents (N_rank, D), valid tokens only. Once; collective.

        None keeps the codes as they are (an ablation). optimizers: forget what they gathered about the codebook: zero
        gradients of the warm-up have already advanced Adam's step count. Other arguments: see `kmeans`. Returns
        inertia, iterations, tokens and empty (codes). RuntimeError: a second call. ValueError: see `kmeans`.
        """
        if self._initialised:
            raise RuntimeError("init_codebook was called before: the codebook is initialised once")
        optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        info: dict[str, float] = {}
        if latents is not None:
            self._check_tokens(latents)
            latents = latents.to(getattr(self.quantizer, "latent_dtype", latents.dtype))
            rest, info = self.quantizer.latent(latents), {"empty": 0}
            # A residual quantizer has levels: each gets the centroids of what those before it left over.
            levels = getattr(self.quantizer, "levels", (self.quantizer,))
            for level in levels:
                result = kmeans(rest, level.num_codes, iters=iters, start=start, seed=seed, order=order,
                                spherical=getattr(level, "l2_norm", False))
                level.set_codebook_(result.centroids, self._per_batch(result.counts))
                if len(levels) > 1:
                    rest = rest - F.embedding(nearest_code(rest, result.centroids), result.centroids)
                info = {"inertia": result.inertia, "iterations": result.iterations, "tokens": int(result.counts.sum()),
                        "empty": info["empty"] + int((result.counts == 0).sum())}
        parameters = getattr(self.quantizer, "codebook_parameters", self.quantizer.parameters)
        for optimizer in optimizers:
            for parameter in parameters():
                optimizer.state.pop(parameter, None)
        self.initialised.fill_(1.0)
        self._initialised = True
        self._empty_reservoir()
        return info

    def _per_batch(self, counts: Tensor) -> Tensor:
        # Running means of a foreign quantizer count tokens of one rank's batches, not those of the whole sample; alike
        # on all ranks, or their codebooks would drift apart.
        batch = _all_reduce(self.reservoir_state[1].double()) / _world()
        return counts * (batch / counts.sum()) if batch else counts

    def _flatten(self, z: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[int, ...]]:
        """z -> its valid tokens (N, D) and its shape without channels."""
        if not z.is_floating_point():
            raise TypeError(f"latents must be floating point, got {z.dtype}")
        if z.ndim < 2 or z.shape[self.channel_dim] != self.dim:
            raise ValueError(f"latents need {self.dim} channels in dimension {self.channel_dim}, got {tuple(z.shape)}")
        last = z.movedim(self.channel_dim, -1)
        if mask is None:
            return last.reshape(-1, self.dim), tuple(last.shape[:-1])
        if mask.dtype != torch.bool or mask.shape != last.shape[:-1]:
            raise ValueError(f"mask must be bool {tuple(last.shape[:-1])}, got {mask.dtype} {tuple(mask.shape)}")
        return last[mask], tuple(last.shape[:-1])

    def _restore(self, tokens: Tensor, shape: tuple[int, ...], mask: Tensor | None) -> Tensor:
        if mask is not None:
            full = tokens.new_zeros(*shape, self.dim)  # padding leaks nothing, not even a NaN
            full[mask] = tokens
            tokens = full
        return tokens.reshape(*shape, self.dim).movedim(-1, self.channel_dim)

    def _restore_indices(self, indices: Tensor, shape: tuple[int, ...], mask: Tensor | None) -> Tensor:
        if mask is None:
            return indices.reshape(shape)
        full = indices.new_full(shape, -1)
        full[mask] = indices
        return full

    @_guarded
    def forward(self, z: Tensor, mask: Tensor | None = None) -> ProVQOutput:
        """z (B, D, ...) or (B, ..., D) float; mask (B, ...) bool, True = valid. See ProVQOutput.

        TypeError: z not floating point. ValueError: channels or mask shape. RuntimeError: training past the warm-up
        without `init_codebook`.
        """
        tokens, shape = self._flatten(z, mask)
        if self.training and self.needs_init:
            raise RuntimeError(f"step {self._step} is past the warm-up: first call init_codebook(latents, ...)")
        continuous = self._stage == 1 if self.training else not self.has_codebook
        if continuous or not len(tokens):
            # 0 x every parameter: DistributedDataParallel sees the codebook used, without find_unused_parameters.
            loss = sum((0.0 * p.float().sum() for p in self.quantizer.parameters() if p.requires_grad),
                       torch.zeros((), device=z.device))
            quantized = self._restore(self._smooth(tokens).to(z.dtype), shape, mask)
            indices = None if continuous else torch.full(shape, -1, dtype=torch.int64, device=z.device)
            return ProVQOutput(quantized, indices, loss, {})

        out = self.quantizer(tokens)
        mixed, loss = out.codes, torch.zeros((), device=z.device)
        if out.losses:
            loss = torch.stack([v.float() for v in out.losses.values()]).sum()
        if self.training:
            if self._stage == 2:
                alpha = self._alpha.clone()  # backward needs it, and set_step may come before backward
                mixed = alpha * self._smooth(tokens) + (1.0 - alpha) * out.codes  # Eq. 2
                loss = self._omega.clone() * loss  # Eq. 4
            self._count(out.indices)
        return ProVQOutput(
            quantized=self._restore(mixed.to(z.dtype), shape, mask),
            indices=self._restore_indices(out.indices, shape, mask),
            loss=loss,
            losses={name: value.detach() for name, value in out.losses.items()},
        )

    def _smooth(self, tokens: Tensor) -> Tensor:
        """What the decoder sees at alpha = 1, (N, D)."""
        latent = self.quantizer.latent(tokens)
        return self.quantizer.output(latent) if isinstance(self.quantizer, Adapter) else latent

    def _count(self, indices: Tensor) -> None:
        if _recomputing():
            return
        if self._counts.device != indices.device:
            self._counts = self._counts.to(indices.device)
        self._counts.index_add_(0, indices.clamp_min(0), (indices >= 0).long())

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Codes of z: int64, z's shape without channels, -1 where masked. RuntimeError: there is no codebook yet."""
        if not self.has_codebook:
            raise RuntimeError("encode() before init_codebook(): the warm-up has not ended, there are no codes yet")
        tokens, shape = self._flatten(z, mask)
        return self._restore_indices(nearest_code(self.quantizer.latent(tokens), self.codebook), shape, mask)

    def decode(self, indices: Tensor) -> Tensor:
        """Codes of int64 indices (B, ...) in z's layout; 0 where negative (masked). RuntimeError: no codebook yet."""
        if not self.has_codebook:
            raise RuntimeError("decode() before init_codebook(): the warm-up has not ended, there are no codes yet")
        codes = self.quantizer.lookup(indices.clamp_min(0))
        return torch.where((indices >= 0)[..., None], codes, 0.0).movedim(-1, self.channel_dim)

    @torch.no_grad()
    def pop_counts(self) -> Tensor:
        """This rank's code counts (K,) int64 of the training forwards since the last call, and start over."""
        counts = self._counts.clone()
        self._counts.zero_()
        return counts

    def usage(self) -> dict[str, Any]:
        """usage, perplexity and counts (K,) of all ranks' training forwards since the last call. Collective."""
        counts = _all_reduce(self.pop_counts().to(self.step.device))
        return {**code_statistics(counts), "counts": counts}

    def extra_repr(self) -> str:
        return f"{self._full_curriculum}, {self.adaptive}, channel_dim={self.channel_dim}"


# --------------------------------------------------------------------------------------- other people's quantizers

Path = tuple[int, ...]  # where something is in a host's return value: (1, 0) is out[1][0]


def _get(out: Any, path: Path) -> Any:
    return functools.reduce(operator.getitem, path, out)


def _put(out: Any, path: Path, value: Any) -> Any:
    """out, a tuple of tuples (or of named ones), with value in that place."""
    if not path:
        return value
    items = list(out)
    items[path[0]] = _put(out[path[0]], path[1:], value)
    return type(out)(*items) if hasattr(out, "_fields") else tuple(items)


def _beside(module: nn.Module, name: str) -> Any:
    """What is called `name` in the file of the module's class, or of the nearest base whose file has it."""
    scopes = (vars(cls)["forward"].__globals__ for cls in type(module).__mro__ if "forward" in vars(cls))
    found = next((scope[name] for scope in scopes if name in scope), None)
    if found is None:
        raise TypeError(f"{type(module).__name__}: no {name} beside its class: a version that is not supported?")
    return found


class Adapter(nn.Module):
    """A foreign quantizer, `.module`, in the terms of ProVQ; `adapt` picks the subclass.

    One more host is one more subclass: what it calls its sizes, where its z has channels, where its return value has
    what, which options are not supported, and how codes are set. Only `set_codebook_` changes the host (and LlamaGen's
    usage meter, see there).
    """

    classes: tuple[str, ...]  # class names that "auto" recognises, if the attributes are there as well
    sizes = ("n_e", "e_dim")  # attributes of the host: K and D
    needs: tuple[str, ...]  # further attributes
    supports: dict[str, Any] = {}  # noqa: RUF012  # option of the host -> the only value that is supported
    accepts: tuple[str, ...] = ()  # what its forward may be given besides z, by keyword
    settable = True  # whether there are codes to set

    channel_dim = 1  # of z: 1 (B, D, ...) or -1 (B, ..., D)
    spatial = 2  # dimensions of z besides batch and channels
    ndims: Path = (4,)  # of z that the host takes; (): any
    flat_indices = False  # (B h w,) instead of (B, h, w)
    index_dtype = torch.int64
    trailing: Path = ()  # shape of indices beyond that
    loss_shape: Path = ()
    l2_norm = False  # codes and latents on the unit sphere

    template: Any = (None, None, None)  # the return value, of a host that has not been called
    quantized_at: Path = (0,)
    indices_at: Path | None = (1,)
    losses_at: dict[str, Path] = {"vq": (2,)}  # noqa: RUF012

    def __init__(self, module: Any):
        super().__init__()
        self.module = module
        parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]
        self.defaults = {p.name: p.default for p in parameters}  # of what the host's forward takes besides z, in order
        self.num_codes, self.dim = (getattr(module, name, 0) for name in self.sizes)
        for option, value in self.supports.items():
            got = module
            for name in option.split("."):
                got = getattr(got, name, value)  # an option that this version of the host lacks is not set
            if got != value:
                raise ValueError(f"{type(module).__name__}: {option} = {got!r} is not supported, only {value!r}")

    def latent(self, x: Tensor) -> Tensor:
        """Tokens (..., D) as the host compares them with its codes."""
        return F.normalize(x, dim=-1) if self.l2_norm else x

    def output(self, codes: Tensor) -> Tensor:
        """Codes, or latents in their place, as the host hands them to the decoder: (..., D)."""
        return codes

    def channels(self, z: Tensor) -> int:
        """Channel dimension of this z."""
        return -1 if z.ndim == 2 else self.channel_dim

    def codebook_parameters(self) -> list[nn.Parameter]:
        """What optimizers must forget when codes are set. Projections go on as they are."""
        return [p for name, p in self.module.named_parameters() if not name.startswith("project_")]

    def countable(self, indices: Tensor) -> Tensor:
        """Indices of the host as indices into the counts of `ProVQ.usage`; negative: not counted."""
        return indices

    def silent(self, z: Tensor, quantized: Tensor) -> Any:
        """The host's return value in the warm-up: losses 0, indices -1."""
        out = _put(self.template, self.quantized_at, quantized)
        if self.indices_at:
            lead = z.movedim(self.channels(z), -1).shape[:-1]
            shape = (lead.numel(),) if self.flat_indices else (*lead, *self.trailing)
            out = _put(out, self.indices_at, torch.full(shape, -1, dtype=self.index_dtype, device=z.device))
        for path in self.losses_at.values():
            out = _put(out, path, torch.zeros(self.loss_shape, device=z.device))
        return out

    def forward(self, x: Tensor) -> Quantized:
        """Quantize tokens x (N, D) by the host; see `Quantized`. Used by ProVQ(adapt(module), ...), not by `attach`."""
        z = x.contiguous()[None]
        if self.channel_dim == 1:
            z = z.movedim(-1, 1).reshape(1, self.dim, -1, *[1] * (self.spatial - 1))
        out = self.module(z)
        losses = {name: _get(out, path) for name, path in self.losses_at.items()}
        codes = _get(out, self.quantized_at).movedim(self.channel_dim, -1).reshape(-1, self.dim)
        return Quantized(codes, _get(out, self.indices_at or ()).reshape(-1).long(),
                         {name: loss for name, loss in losses.items() if loss is not None})


class TableAdapter(Adapter):
    """A host with one table of codes: it has all that ProVQ needs of a quantizer."""

    def table(self) -> Tensor:
        """Codes (K, C) as the host has them, differentiable; C is D but where the host projects."""
        return self.module.embedding.weight

    def codebook(self) -> Tensor:
        return F.normalize(self.table(), dim=-1) if self.l2_norm else self.table()

    def lookup(self, indices: Tensor) -> Tensor:
        return self.output(F.embedding(indices, self.codebook()))

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:  # noqa: ARG002
        self.table().data.copy_(centroids)


class LlamaGenAdapter(TableAdapter):
    """LlamaGen's VectorQuantizer. Its losses are None in eval(); the entropy loss is weighted like the others."""

    classes, flat_indices = ("VectorQuantizer",), True
    needs = ("embedding", "l2_norm", "entropy_loss_ratio", "show_usage")
    template, indices_at = (None, (None, None, None, 0), (None, None, None)), (2, 2)
    losses_at = {"codebook": (1, 0), "commit": (1, 1), "entropy": (1, 2)}  # noqa: RUF012

    def __init__(self, module: Any):
        super().__init__(module)
        self.l2_norm = module.l2_norm
        if module.show_usage:  # a Parameter that the host writes to: raises on a CPU, and on a GPU its graph grows
            module._buffers["codebook_used"] = module.codebook_used.detach()

    def silent(self, z: Tensor, quantized: Tensor) -> Any:
        out = super().silent(z, quantized)
        return out if self.module.training else _put(out, (1,), self.template[1])


class TamingAdapter(TableAdapter):
    """taming-transformers' VectorQuantizer2 and its copies (latent-diffusion, ...). Its legacy beta stays as it is."""

    classes: tuple[str, ...] = ("VectorQuantizer2",)
    needs: tuple[str, ...] = ("embedding", "legacy", "sane_index_shape")
    supports = {"remap": None}  # noqa: RUF012
    template: Any = (None, None, (None, None, None))
    indices_at, losses_at = (2, 2), {"vq": (1,)}

    def __init__(self, module: Any):
        super().__init__(module)
        self.flat_indices = not getattr(module, "sane_index_shape", False)


def _running_means(centroids: Tensor, counts: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """cluster_size (K,) and embed_avg (K, C) of which the hosts' smoothed quotient gives the centroids back."""
    size = centroids.new_ones(len(centroids)) if counts is None else counts.to(centroids.dtype)
    total = size.sum()
    return size, centroids * ((size + eps) * total / (total + len(size) * eps))[:, None]


class TamingEMAAdapter(TamingAdapter):
    """taming-transformers' EMAVectorQuantizer (of copies that run: the original's constructor raises NameError)."""

    classes, sizes = ("EMAVectorQuantizer",), ("num_tokens", "codebook_dim")
    needs = ("embedding.weight", "embedding.cluster_size", "embedding.embed_avg")

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:
        table = self.module.embedding
        size, average = _running_means(centroids, counts, table.eps)
        for target, value in ((table.weight, centroids), (table.cluster_size, size), (table.embed_avg, average)):
            target.data.copy_(value)

    def silent(self, z: Tensor, quantized: Tensor) -> Any:
        out = super().silent(z, quantized)  # perplexity 0, and no code in the one-hot rows
        return _put(_put(out, (2, 0), z.new_zeros(())), (2, 1), z.new_zeros(z.numel() // self.dim, self.num_codes))


class SimVQAdapter(TamingAdapter):
    """youngsheen/SimVQ: SimVQ (images), SimVQ1D (audio). Codes are set in the frozen table, its map to the identity."""

    classes, needs = ("SimVQ", "SimVQ1D"), ("embedding", "embedding_proj", "sane_index_shape")
    quantized_at, indices_at, losses_at = (0, 0), (0, 2), {"commitment": (1, 2)}

    def __init__(self, module: Any):
        super().__init__(module)
        self.spatial = 1 if type(module).__name__.endswith("1D") else 2
        self.ndims = (self.spatial + 2,)
        breakdown = _beside(module, "LossBreakdown")  # the named tuple of its file
        self.template = ((None, torch.tensor(0.0), None), breakdown(*[torch.tensor(0.0)] * 4))

    def table(self) -> Tensor:
        return self.module.embedding_proj(self.module.embedding.weight)

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:  # noqa: ARG002
        self.module.embedding.weight.data.copy_(centroids)
        _make_identity(self.module.embedding_proj)


def _make_identity(linear: nn.Linear) -> None:
    nn.init.eye_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


class EMACodebookAdapter(TableAdapter):
    """ESM's EMACodebook. Its EMA update is not released, so the codebook must be frozen: it stays at the centroids."""

    classes, sizes, channel_dim, ndims = ("EMACodebook",), ("n_codes", "embedding_dim"), -1, (3,)
    needs, supports = ("embeddings", "N", "z_avg", "freeze_codebook"), {"freeze_codebook": True}

    def table(self) -> Tensor:
        return self.module.embeddings

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:  # noqa: ARG002
        self.module.embeddings.copy_(centroids)
        self.module.z_avg.copy_(centroids)
        self.module.N.fill_(1.0)
        self.module._need_init = False


class DiVeQAdapter(TableAdapter):
    """diveq's DIVEQ and DIVEQDetach: z (N, D); no loss, codes learn through z~. `inference` is not intercepted."""

    classes, sizes, channel_dim, ndims = ("DIVEQ", "DIVEQDetach"), ("num_embeddings", "embedding_dim"), -1, (2,)
    needs, template = ("codebook", "codebook_usage", "replacement_iters"), (None, None, 0.0)  # perplexity is last
    losses_at = {}  # noqa: RUF012

    def table(self) -> Tensor:
        return self.module.codebook

    def forward(self, x: Tensor) -> Quantized:
        codes, indices, _ = self.module(x)
        return Quantized(codes, indices, {})


class _Projected(Adapter):
    """vector-quantize-pytorch: linear maps into and out of the space of the codes, or identities."""

    sizes, channel_dim = ("codebook_size", "dim"), -1
    ndims: Path = (2, 3)

    @property
    def latent_dtype(self) -> torch.dtype:
        """Of tokens that `latent` takes: latents are collected in float32, whatever the host was cast to."""
        return next((p.dtype for p in self.module.project_in.parameters()), torch.float32)

    def latent(self, x: Tensor) -> Tensor:
        return self.module.project_in(x)

    def output(self, codes: Tensor) -> Tensor:
        return self.module.project_out(codes)


class VectorQuantizeAdapter(_Projected, TableAdapter):
    """vector-quantize-pytorch's VectorQuantize: EMA, learned or cosine codes. Instead of its kmeans_init, ProVQ's."""

    classes: tuple[str, ...] = ("VectorQuantize",)
    accepts: tuple[str, ...] = ("mask",)
    needs = ("_codebook.embed", "_codebook.initted", "_codebook.use_ddp", "accept_3d_fmap", "project_in", "project_out")
    supports = {"heads": 1, "_codebook.affine_param": False, "_codebook.vq_bridge": None,  # noqa: RUF012
                "return_zeros_for_masked_padding": True}

    def __init__(self, module: Any):
        super().__init__(module)
        self.l2_norm = module.use_cosine_sim
        self.spatial = 2 if module.accept_image_fmap else 3 if module.accept_3d_fmap else 1
        self.channel_dim = -1 if self.spatial == 1 and module.channel_last else 1
        if self.spatial > 1:
            self.ndims, self.accepts = (self.spatial + 2,), ()

    def table(self) -> Tensor:
        return self.module._codebook.embed[0]

    def latent(self, x: Tensor) -> Tensor:
        return self.module._codebook.transform_input(super().latent(x))

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:
        book = self.module._codebook
        if counts is not None and book.use_ddp:
            counts = counts * _world()  # it adds up the batches of all ranks
        size, average = _running_means(centroids, counts, book.eps)
        for target, value in ((book.embed, centroids), (book.cluster_size, size), (book.embed_avg, average)):
            target.data.copy_(value[None])
        book.initted.data.fill_(True)


class ResidualVQAdapter(_Projected):
    """vector-quantize-pytorch's ResidualVQ, set level by level. It has no single codebook: `attach` takes it only."""

    classes, accepts = ("ResidualVQ",), ("mask", "rand_quantize_dropout_fixed_seed")
    needs = ("layers.0.accept_3d_fmap", "layers.0._codebook.use_ddp", "num_quantizers", "project_in", "project_out")
    supports = {"shared_codebook": False, "implicit_neural_codebook": False, "accept_image_fmap": False,  # noqa: RUF012
                "return_zeros_for_masked_padding": True}

    def __init__(self, module: Any):
        super().__init__(module)
        self.levels = [VectorQuantizeAdapter(layer) for layer in module.layers]
        if any(level.l2_norm for level in self.levels):
            raise ValueError("ResidualVQ: use_cosine_sim = True is not supported: a sum of unit codes is no latent")
        self.num_codes = sum(level.num_codes for level in self.levels)
        self.dim = getattr(module.project_in, "in_features", module.codebook_dim)
        self.trailing = self.loss_shape = (len(self.levels),)

    def countable(self, indices: Tensor) -> Tensor:
        first = torch.tensor([0, *[level.num_codes for level in self.levels]], device=indices.device).cumsum(0)[:-1]
        return torch.where(indices < 0, indices, indices + first)


class LucidrainsSimVQAdapter(TableAdapter):
    """vector-quantize-pytorch's SimVQ. Codes are set in the frozen codebook, its map to the identity."""

    classes, spatial, ndims = ("SimVQ",), 1, ()
    needs = ("frozen_codebook", "code_transform", "channel_first")

    def __init__(self, module: Any):
        super().__init__(module)
        linear = module.code_transform
        if not isinstance(linear, nn.Linear) or linear.in_features != linear.out_features:
            raise ValueError("SimVQ: a codebook_transform, or frozen_codebook_dim != dim, is not supported: only a "
                             "square nn.Linear can become the identity")
        self.num_codes, self.dim = module.codebook_size, linear.out_features
        self.channel_dim = 1 if module.channel_first else -1

    def table(self) -> Tensor:
        return self.module.codebook

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:  # noqa: ARG002
        self.module.frozen_codebook.copy_(centroids)
        _make_identity(self.module.code_transform)


class _Grid(_Projected):
    """Codes on a fixed grid: warm-up and mix are all there is to do, by `attach` only."""

    settable, supports, ndims = False, {"orthogonal_rotation": False}, ()

    def __init__(self, module: Any):
        super().__init__(module)
        self.trailing = (module.num_codebooks,) if module.keep_num_codebooks_dim else ()

    def channels(self, z: Tensor) -> int:
        return 1 if z.ndim >= 4 or self.module.channel_first else -1

    def bounded(self, z: Tensor) -> Tensor:
        """Projected latents (..., codebooks, C) just before they are rounded."""
        raise NotImplementedError

    def latent(self, x: Tensor) -> Tensor:
        return self.bounded(super().latent(x).unflatten(-1, (self.module.num_codebooks, -1))).flatten(-2)


class FSQAdapter(_Grid):
    """vector-quantize-pytorch's FSQ: the warm-up is its bounded latent without the rounding."""

    classes, template, losses_at, index_dtype = ("FSQ",), (None, None), {}, torch.int32
    needs = ("_levels", "preserve_symmetry", "bound_hard_clamp", "return_indices", "project_in", "project_out")

    def __init__(self, module: Any):
        super().__init__(module)
        self.num_codes = int(module._levels.prod())
        self.indices_at = (1,) if module.return_indices else None

    def bounded(self, z: Tensor) -> Tensor:
        hard, levels = self.module.bound_hard_clamp, self.module._levels
        half, offset = (levels - 1) * (1 + 1e-3) / 2, torch.where(levels % 2 == 0, 0.5, 0.0)
        if self.module.preserve_symmetry:
            half, offset, levels = torch.ones_like(half), torch.zeros_like(half), torch.full_like(levels, 2)
        shift = offset / half
        wide = (z + shift).clamp(-1.0, 1.0) if hard else torch.tanh(z + torch.atanh(shift))
        return ((wide * half - offset) / (levels // 2)).to(z.dtype)


class LFQAdapter(_Grid):
    """vector-quantize-pytorch's LFQ, and BSQ (spherical): the warm-up is the latent whose signs it takes."""

    classes, needs = ("LFQ",), ("codebook_scale", "maybe_l2norm", "soft_clamp_input_value", "project_in", "project_out")

    def __init__(self, module: Any):
        super().__init__(module)
        self.template = _beside(module, "Return")(None, None, None)  # the named tuple of its file

    def bounded(self, z: Tensor) -> Tensor:
        clamp = self.module.soft_clamp_input_value
        return self.module.maybe_l2norm(z if clamp is None else (z / clamp).tanh() * clamp)


class CustomAdapter(TableAdapter):
    """Any module, by functions that get it as first argument. For ProVQ(adapt(...)) only: its tuple is unknown."""

    def __init__(
        self, module: nn.Module, *, call: Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]],
        codebook: Callable[..., Tensor], set_codebook: Callable[..., None],
        lookup: Callable[..., Tensor] | None = None, latent: Callable[..., Tensor] | None = None,
    ):
        """Of tokens x (N, D), codes (K, D), indices (...) int64 and cluster sizes (K,) or None:

        call(module, x) -> codes (N, D), indices (N,), weighted losses by name; codebook(module) -> (K, D);
        set_codebook(module, centroids, counts); lookup(module, indices) -> (..., D), by default rows of the codebook;
        latent(module, x) -> (N, D) comparable with codes, by default x.
        """
        super().__init__(module)
        self._call, self._set = functools.partial(call, module), functools.partial(set_codebook, module)
        for name, function in {"table": codebook, "lookup": lookup, "latent": latent}.items():
            if function is not None:
                self.__dict__[name] = functools.partial(function, module)  # in front of the method
        self.num_codes, self.dim = self.table().shape

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:
        self._set(centroids, counts)

    def forward(self, x: Tensor) -> Quantized:
        return Quantized(*self._call(x))


ADAPTERS: dict[str, type[Adapter]] = {
    "llamagen": LlamaGenAdapter, "taming": TamingAdapter, "taming-ema": TamingEMAAdapter, "simvq": SimVQAdapter,
    "esm": EMACodebookAdapter, "diveq": DiVeQAdapter, "lucidrains": VectorQuantizeAdapter,
    "lucidrains-residual": ResidualVQAdapter, "lucidrains-simvq": LucidrainsSimVQAdapter, "lucidrains-fsq": FSQAdapter,
    "lucidrains-lfq": LFQAdapter,
}


def _missing(module: Any, adapter: type[Adapter]) -> list[str]:
    """Attributes that the adapter needs and the module has not."""
    missing = []
    for path in adapter.needs:
        owner = module
        for name in path.split("."):
            owner = getattr(owner, name, _missing)  # a stand-in for "nothing": None is a value
        if owner is _missing:
            missing.append(path)
    return missing


def adapt(module: nn.Module, kind: str = "auto", **callables: Any) -> Adapter:
    """A foreign quantizer for ProVQ(adapt(module), curriculum). kind: a name in ADAPTERS, "custom" or "auto".

    "auto" goes by class name and attributes, a kind by attributes alone (for renamed copies). "custom" takes the
    callables of `CustomAdapter`. TypeError: not recognised, or attributes are missing. ValueError: an option of the
    host that is not supported, by name; unknown kind.
    """
    if kind == "custom":
        return CustomAdapter(module, **callables)
    if callables:
        raise TypeError(f"{', '.join(callables)}: only kind='custom' takes callables")
    name = type(module).__name__
    if kind == "auto":
        named = [kind for cls in type(module).__mro__ for kind, adapter in ADAPTERS.items()  # the nearest class first
                 if cls.__name__ in adapter.classes]
        found = [kind for kind in named if not _missing(module, ADAPTERS[kind])]
        if found:
            return ADAPTERS[found[0]](module)
        lacks = "; ".join(f"for {kind} it lacks {', '.join(_missing(module, ADAPTERS[kind]))}" for kind in named)
        known = "; ".join(f"{kind}: {' or '.join(adapter.classes)}" for kind, adapter in ADAPTERS.items())
        raise TypeError(f"{name} is none of the quantizers that adapt() knows ("
                        + (f"{lacks}: a version of its package that is not supported?" if named else known)
                        + "): give kind=, or kind='custom' and callables")
    if kind not in ADAPTERS:
        raise ValueError(f"unknown kind {kind!r}; choose one of auto, custom, {', '.join(ADAPTERS)}")
    missing = _missing(module, ADAPTERS[kind])
    if missing:
        raise TypeError(f"{name} is no {kind} quantizer: it lacks {', '.join(missing)}")
    return ADAPTERS[kind](module)


# ---------------------------------------------------------------------------------------------------- drop-in mode

class Attached(ProVQ):
    """The curriculum of a host's quantizer where it stands: what `attach` returns, and the quantizer's child `provq`.

    All of ProVQ but the call (and what needs one table of codes, where there is none). The host is called as ever and
    returns its own tuple, with quantized mixed (Eq. 2) and losses weighted (Eq. 4). In the warm-up its forward does not
    run: quantized is the latent, losses are 0, indices -1. In stage 3, and in eval() once there is a codebook, the
    tuple is the host's, untouched. Weights of the host alone may be loaded: eval() then uses their codes until the
    first `set_step`.
    """

    REQUIRED = ("latent", "output", "num_codes", "dim")

    def __init__(self, adapter: Adapter, curriculum: Curriculum, adaptive: AdaptiveWarmup | None = None):
        super().__init__(adapter, curriculum, channel_dim=adapter.channel_dim, adaptive=adaptive)
        # Known, but no child: the host holds this module, and a module tree must have no cycle.
        self.__dict__["quantizer"] = self._modules.pop("quantizer")
        self._make_room()

    def _make_room(self) -> None:
        # At once, not in the first forward: then torch.compile would trace the warm-up twice, and a copy of the model
        # made in between would not have the entry that the model's state dict has.
        if self._stage == 1 and not self._initialised and self.quantizer.settable:
            self._size_reservoir()

    def _owner(self) -> nn.Module:
        return self.quantizer.module

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A checkpoint of the host alone says nothing of the curriculum, which then stays as it is.
        self._loaded_alone = not any(name.startswith(prefix) for name in state_dict)
        if not self._loaded_alone:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def set_step(self, step: int) -> None:
        super().set_step(step)
        self._make_room()

    def maybe_init_codebook(self, *, copies: Sequence[nn.Module] = (), **options: Any) -> dict[str, float] | None:
        if self.needs_init and not self.quantizer.settable:
            return self.init_codebook(None)
        return super().maybe_init_codebook(copies=copies, **options)

    @_guarded
    def forward(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The host's forward, on the curriculum. `usage` counts calls with no arguments that change the host's tuple.

        TypeError: such arguments before stage 3. ValueError: dimensions or channels. RuntimeError: training past the
        warm-up without `maybe_init_codebook`.
        """
        adapter, module = self.quantizer, self.quantizer.module
        if self.training and self.needs_init:
            raise RuntimeError(f"step {self._step} is past the warm-up: call maybe_init_codebook() after set_step()")
        given = {**dict(zip(adapter.defaults, args)), **kwargs}  # noqa: B905  # strict= is of Python 3.10
        unknown = [name for name, value in given.items() if name not in adapter.accepts
                   and value is not adapter.defaults.get(name) and value is not None and value is not False]
        continuous = self._stage == 1 if self.training else not self.has_codebook
        if not continuous and (self._stage == 3 or not self.training):
            out = type(module).forward(module, z, *args, **kwargs)
            if self.training and not unknown:
                self._count_host(out)
            return out

        if unknown:
            raise TypeError(f"{type(module).__name__}: {', '.join(unknown)} in a call is not supported before stage 3")
        if adapter.ndims and z.ndim not in adapter.ndims:
            dimensions = " or ".join(map(str, adapter.ndims))
            raise ValueError(f"{type(module).__name__} takes latents of {dimensions} dimensions, got {tuple(z.shape)}")
        dim, mask = adapter.channels(z), given.get("mask")
        if z.shape[dim] != self.dim:
            raise ValueError(f"latents need {self.dim} channels in dimension {dim}, got {tuple(z.shape)}")
        tokens = z.movedim(dim, -1)
        smooth = adapter.output(adapter.latent(tokens))
        if mask is not None:
            smooth = torch.where(mask[..., None], smooth, 0.0)  # like the host
        smooth = smooth.movedim(-1, dim)
        if continuous:
            if self.training:
                if adapter.settable and not self._initialised and not _recomputing():
                    self.collect((tokens if mask is None else tokens[mask]).detach().reshape(-1, self.dim))
                for parameter in module.parameters():  # then DistributedDataParallel sees the codebook used
                    if parameter.requires_grad:
                        smooth = smooth + 0.0 * parameter.float().sum()
            return adapter.silent(z, smooth)

        out = type(module).forward(module, z, *args, **kwargs)
        self._count_host(out)
        quantized = _get(out, adapter.quantized_at)
        alpha, omega = self._alpha.clone(), self._omega.clone()  # backward needs them, after the next set_step
        mixed = alpha * smooth + (1.0 - alpha) * quantized
        out = _put(out, adapter.quantized_at, mixed.to(quantized.dtype))
        for path in adapter.losses_at.values():
            out = _put(out, path, omega * _get(out, path))
        return out

    def _count_host(self, out: Any) -> None:
        if self.quantizer.indices_at:
            indices = self.quantizer.countable(_get(out, self.quantizer.indices_at))
            self._count(indices.reshape(-1).long())


def _attached_forward(module: nn.Module, z: Tensor, *args: Any, **kwargs: Any) -> Any:
    return module.get_submodule("provq")(z, *args, **kwargs)


def attach(
    module: nn.Module, curriculum: Curriculum, *, kind: str = "auto", adaptive: AdaptiveWarmup | None = None,
) -> Attached:
    """Put a host's quantizer on the curriculum where it stands; returns the handle, which is also `module.provq`.

    module keeps its class, attributes, methods, parameters and state-dict keys, and gains the entries `provq.*`, the
    state of ProVQ. kind: see `adapt`, whose errors this has as well; no "custom". RuntimeError: attached before. Attach
    before DistributedDataParallel and torch.compile; not for nn.DataParallel, whose replicas would share this module.
    A moving average of the model needs the codes at once: maybe_init_codebook(..., copies=[average.quantize]).

    LlamaGen, tokenizer/tokenizer_image/vq_train.py: after `vq_model = vq_model.to(device)`, and first in the loop,
        provq = attach(vq_model.quantize, Curriculum(warmup_steps=50_000, transition_steps=20_000))
            provq.set_step(train_steps)
            provq.maybe_init_codebook(optimizers=[optimizer])       # with --ema: copies=[ema.quantize]
    taming-transformers, SimVQ: in the model's __init__ after `self.quantize = ...`, and first in training_step,
        attach(self.quantize, Curriculum(warmup_steps=50_000, transition_steps=20_000))
        self.quantize.provq.set_step(self.global_step)
        self.quantize.provq.maybe_init_codebook(optimizers=self.trainer.optimizers)
    vector-quantize-pytorch (vq = VectorQuantize(...), ResidualVQ, SimVQ, FSQ, LFQ), diveq (vq = DIVEQ(...)), ESM
    (vq = EMACodebook(...); vq.freeze_codebook = True): before the loop, and first in it,
        provq = attach(vq, Curriculum(warmup_steps=50_000, transition_steps=20_000))
            provq.set_step(step)
            provq.maybe_init_codebook(optimizers=[optimizer])
    """
    if kind == "custom":
        raise ValueError("attach(kind='custom'): of an unknown return value only ProVQ(adapt(module, 'custom', ...))")
    if "forward" in module.__dict__ or hasattr(module, "provq"):
        raise RuntimeError(f"{type(module).__name__}: forward is replaced already; attach once, before others do that")
    attached = Attached(adapt(module, kind), curriculum, adaptive)
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    module.add_module("provq", attached.to(device).train(module.training))
    module.forward = functools.partial(_attached_forward, module)  # unlike a closure, it survives deepcopy and pickle
    return attached


def detach(model: nn.Module) -> nn.Module:
    """Undo every `attach` inside model, in place: the host as it was, with the codes that it has now."""
    for module in [m for m in model.modules() if isinstance(m._modules.get("provq"), Attached)]:
        del module.forward, module._modules["provq"]
    return model


def host_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of a model with attached quantizers, without ProVQ's entries: loads strictly into the host alone."""
    return {name: value for name, value in state_dict.items() if name.split(".")[-2:-1] != ["provq"]}
