"""What may be added to a quantizer or to its curriculum, beyond the paper. Without an option, nothing here is called.

Sizes: N tokens, D latent channels, K codes. Everything is for one process: a sum that several would have to add up is
marked as such.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.provq import EMAVectorQuantizer, LinearVectorQuantizer, ProVQ, ProVQOutput, VectorQuantizer, kmeans

RESTART_EVERY = 50  # optimizer steps between two looks for dead codes
MIN_SPREAD = 1e-6  # of a channel that no longer varies


def forget(parameters: Iterable[nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Drop what the optimizers gathered about these parameters (Adam: moments and step count)."""
    for parameter in parameters:
        for optimizer in optimizers:
            optimizer.state.pop(parameter, None)


@torch.no_grad()
def recluster(
    provq: ProVQ, latents: Tensor, *, optimizers: Sequence[torch.optim.Optimizer], iters: int = 20, seed: int = 0,
) -> dict[str, float]:
    """Set the codes to the k-means centroids of latents (N, D) again, and make the optimizers forget the old codes.

    While the transition runs, latents contract and codes lag: a ring of codes ends up outside the cloud, where no token
    chooses them. A new clustering puts every code back to use. Returns inertia, iterations and tokens. RuntimeError:
    there is no codebook yet. ValueError: see `kmeans`.
    """
    if not provq.has_codebook:
        raise RuntimeError("recluster() before init_codebook(): there are no codes yet")
    quantizer = provq.quantizer
    result = kmeans(quantizer.latent(latents), quantizer.num_codes, iters=iters, seed=seed,
                    spherical=quantizer.l2_norm)
    quantizer.set_codebook_(result.centroids, result.counts)
    forget(quantizer.codebook_parameters(), optimizers)
    return {"inertia": result.inertia, "iterations": result.iterations, "tokens": int(result.counts.sum())}


class FollowingVectorQuantizer(VectorQuantizer):
    """Codes that follow the latents' drift: codes = m + s * table, the table being what is trained.

    m, s (D,): running mean and standard deviation of the latents' channels (affine reparametrisation, Huh et al. 2023).
    A code that no token chose goes where all latents go, and one Adam step moves a code by lr times the spread. A fresh
    table is ~ N(0, 1), in units of the spread. A training forward only gathers sums; `update_()` moves m and s, once
    per optimizer step (ProVQ.set_step calls it). m and s are constants to the gradient. No l2_norm: on the unit sphere
    there is no scale to follow.
    """

    mean: Tensor  # (D,)
    spread: Tensor  # (D,)
    state: Tensor  # int64 []: FRESH, PLACED or FOLLOWING
    FRESH, PLACED, FOLLOWING = 0, 1, 2  # no statistics yet, but table drawn; the same, but codes set; statistics

    def __init__(self, num_codes: int, dim: int, *, decay: float = 0.9, **options: Any):
        if not 0.0 <= decay < 1.0 or options.get("l2_norm"):
            raise ValueError(f"need 0 <= decay < 1 and no l2_norm, got {decay=} {options=}")
        super().__init__(num_codes, dim, **options)
        self.decay = decay

    def _init_table(self) -> None:
        self.embedding = nn.Embedding(self.num_codes, self.dim)  # ~ N(0, 1)
        self.register_buffer("mean", torch.zeros(self.dim))
        self.register_buffer("spread", torch.ones(self.dim))
        self.register_buffer("state", torch.tensor(self.FRESH))
        self._pending = torch.zeros(3, self.dim, dtype=torch.float64)  # tokens, their sum and their squares' sum

    def _table(self) -> Tensor:
        return self.mean + self.spread * self.embedding.weight

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:
        """Make centroids (K, D) the codes, exactly; the next update only expresses them in the latents' units."""
        weight = torch.ones(self.num_codes) if counts is None else counts
        moments = _moments(self._checked(centroids).double(), weight.to(centroids).double())
        self._express(centroids, *moments)
        self.state.fill_(self.PLACED)
        self._pending.zero_()

    def _express(self, codes: Tensor, mean: Tensor, spread: Tensor) -> None:
        self.mean.copy_(mean)
        self.spread.copy_(spread)
        self.embedding.weight.copy_((codes - self.mean) / self.spread)

    @torch.no_grad()
    def _observe(self, latent: Tensor, indices: Tensor) -> None:  # noqa: ARG002
        self._pending = self._pending.to(latent.device)
        x = latent.double()
        self._pending += torch.stack([torch.full_like(x[0], len(x)), x.sum(0), x.square().sum(0)])

    @torch.no_grad()
    def update_(self) -> None:
        """Move m and s by what the training forwards since the last call gathered (over all ranks, if several)."""
        tokens, total, squares = self._pending
        if not tokens[0]:
            return
        mean = total / tokens
        spread = (squares / tokens - mean.square()).clamp_min(0).sqrt().clamp_min(MIN_SPREAD)
        if self.state == self.PLACED:
            self._express(self._table(), mean, spread)
        else:
            decay = self.decay if self.state == self.FOLLOWING else 0.0
            self.mean.lerp_(mean.to(self.mean.dtype), 1.0 - decay)
            self.spread.lerp_(spread.to(self.spread.dtype), 1.0 - decay)
        self.state.fill_(self.FOLLOWING)
        self._pending.zero_()

    @torch.no_grad()
    def folded(self) -> VectorQuantizer:
        """The same codes as a plain table, bit for bit: what an export holds."""
        plain = VectorQuantizer(self.num_codes, self.dim, beta=self.beta, rotation=self.rotation)
        plain = plain.to(self.mean.device).train(self.training)
        plain.set_codebook_(self.codebook())
        return plain


def _moments(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation (D,) of rows x (N, D)."""
    weight = weight[:, None] / weight.sum()
    mean = (weight * x).sum(0)
    return mean, (weight * (x - mean).square()).sum(0).sqrt().clamp_min(MIN_SPREAD)


class DeadCodeRestart:
    """Restarts codes that hardly any token chooses at latents of the last batch (Jukebox), for any table of codes.

    `observe` every training forward, `apply` after optimizer steps: codes chosen less than `below` times the mean since
    the last call start again at random latents, and optimizers forget those rows. EMA codes have their own restart.
    """

    def __init__(self, quantizer: VectorQuantizer, below: float):
        if not 0.0 < below < 1.0 or isinstance(quantizer, EMAVectorQuantizer):
            raise ValueError(f"need 0 < below < 1, and codes that are trained (EMA has restart_below), got {below} for "
                             f"{type(quantizer).__name__}")
        self.quantizer, self.below = quantizer, below
        self.counts = torch.zeros(quantizer.num_codes)
        self.latents = torch.zeros(0, quantizer.dim)

    @torch.no_grad()
    def observe(self, latents: Tensor, indices: Tensor) -> None:
        """latents (N, D) and the codes (N,) that they were given."""
        self.counts += torch.bincount(indices, minlength=len(self.counts))
        self.latents = self.quantizer.latent(latents.detach())

    @torch.no_grad()
    def apply(self, optimizers: Sequence[torch.optim.Optimizer]) -> int:
        """-> codes restarted. Draws from torch's global generator."""
        dead = (self.counts < self.below * self.counts.mean()).nonzero()[:, 0]
        self.counts.zero_()
        if len(dead):
            place_codes_(self.quantizer, dead, self.latents[torch.randint(len(self.latents), (len(dead),))], optimizers)
        return len(dead)


@torch.no_grad()
def place_codes_(
    quantizer: VectorQuantizer, rows: Tensor, codes: Tensor, optimizers: Sequence[torch.optim.Optimizer],
) -> None:
    """Make codes (n, D) those of rows (n,) int64. TypeError: a quantizer whose rows cannot be set."""
    if isinstance(quantizer, FollowingVectorQuantizer):
        quantizer.embedding.weight[rows] = (codes - quantizer.mean) / quantizer.spread
    elif isinstance(quantizer, LinearVectorQuantizer):
        linear = quantizer.map  # codes = table W^T + b; the table is frozen, so no optimizer knows it
        quantizer.table[rows] = torch.linalg.lstsq(linear.weight, (codes - linear.bias).t()).solution.t()
        return
    elif type(quantizer)._table is VectorQuantizer._table:
        quantizer.embedding.weight[rows] = codes
    else:
        raise TypeError(f"the codes of {type(quantizer).__name__} are no rows that can be set one by one")
    for optimizer in optimizers:
        for value in optimizer.state.get(quantizer.embedding.weight, {}).values():
            if value.shape == quantizer.embedding.weight.shape:
                value[rows] = 0.0


class TokenMixProVQ(ProVQ):
    """A transition that draws instead of mixing: a token is z with probability alpha, else z_q, which is Eq. 2 on
    average. The decoder sees codes from the first step of the transition on, whole ones. Otherwise as ProVQ."""

    def forward(self, z: Tensor, mask: Tensor | None = None) -> ProVQOutput:
        if not self.training or self.stage != 2 or self.needs_init:
            return super().forward(z, mask)
        if mask is not None:
            raise ValueError("TokenMixProVQ takes no mask")
        last = z.movedim(self.channel_dim, -1)
        tokens = last.reshape(-1, self.dim)
        out = self.quantizer(tokens)
        continuous = torch.rand(len(tokens), 1, device=z.device) < self.alpha
        mixed = torch.where(continuous, self.quantizer.latent(tokens), out.codes).to(z.dtype)
        losses = {name: loss.float() for name, loss in out.losses.items()}
        return ProVQOutput(
            quantized=mixed.reshape(last.shape).movedim(-1, self.channel_dim),
            indices=out.indices.reshape(last.shape[:-1]),
            loss=self.omega * torch.stack([torch.zeros((), device=z.device), *losses.values()]).sum(),
            losses={name: loss.detach() for name, loss in losses.items()},
        )


def spread(x: Tensor) -> float:
    """Standard deviation of a channel of rows x (N, D), root mean square over channels."""
    return x.double().var(0, unbiased=False).mean().sqrt().item()


def moved(before: Tensor, after: Tensor) -> float:
    """How far rows (N, D) moved, root mean square over tokens and channels, in the units of `spread`."""
    return F.mse_loss(after.double(), before.double()).sqrt().item()
