# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The ProVQ authors
"""Codes that keep up with their latents, beyond the paper: copy this file and provq.py, if you want one of these.

    from provq_codes import DeadCodeRestart, FollowingVectorQuantizer

    provq = ProVQ(FollowingVectorQuantizer(num_codes=64, dim=8), Curriculum(warmup_steps=20, transition_steps=20))
    restart = DeadCodeRestart(provq.quantizer, below=0.1)
    for step in range(60):
        ...                                             # as in provq.py, to the optimizer's step
        restart.step(optimizers=[opt])                  # every 50 calls: codes that hardly any token chooses
        provq.set_step(step + 1)
    plain = provq.quantizer.folded()                    # a VectorQuantizer with the same codes, bit for bit

The third of these options, k-means once more, is `ProVQ.recluster`. Sizes: N tokens, D latent channels, K codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Sequence

import torch
from torch import Tensor, nn, optim

if TYPE_CHECKING or __package__:  # the provq.py beside this file, in a package of any name
    from . import provq
else:
    import provq

__version__ = "0.3.0"
__all__ = ["RESTART_EVERY", "DeadCodeRestart", "FollowingVectorQuantizer", "place_codes_"]

if getattr(provq, "__version__", None) != __version__:
    raise ImportError(f"provq_codes.py is of version {__version__}, but {provq.__file__} of version "
                      f"{getattr(provq, '__version__', None)}: copy both, provq*.py, from one release")

RESTART_EVERY = 50  # optimizer steps between two looks for dead codes
MIN_SPREAD = 1e-6  # of a channel that no longer varies
COPIES = ("lookahead_slow_buff", "slow_buffer", "z", "master_param", "ax")  # optimizers' own copies of what they train


class FollowingVectorQuantizer(provq.VectorQuantizer):
    """Codes that follow the latents' drift: codes = m + s * table, the table being what is trained.

    m, s (D,): running mean and standard deviation of the latents' channels (affine reparametrisation, Huh et al. 2023,
    arXiv 2305.08842), over all ranks. A code that no token chose goes where all latents go, and one Adam step moves a
    code by lr times the spread. A fresh table is ~ N(0, 1), in units of the spread. A training forward only gathers
    sums of finite tokens; `update_()` moves m and s, once per optimizer step (ProVQ.set_step calls it). m and s are
    constants to the gradient. ValueError: l2_norm, since on the unit sphere there is no scale to follow; decay outside
    [0, 1).

    Set codes are exact, k-means' in units of the latents that it clustered. Those of `set_codebook_`, which knows no
    latents, are in units of their own until the first update: while `placed`, an average of the weights must take the
    table over instead of averaging it with the one in the old units.
    """

    mean: Tensor  # (D,)
    spread: Tensor  # (D,)
    state: Tensor  # int64 []: FRESH, PLACED or FOLLOWING
    FRESH, PLACED, FOLLOWING = 0, 1, 2  # no statistics yet, but table drawn; the same, but codes set; statistics
    placed: bool  # state is PLACED: known without a wait for the device

    def __init__(self, num_codes: int, dim: int, *, decay: float = 0.9, **options: Any):
        if not 0.0 <= decay < 1.0 or options.get("l2_norm"):
            raise ValueError(f"need 0 <= decay < 1 and no l2_norm, got {decay=} {options=}")
        super().__init__(num_codes, dim, **options)
        self.decay, self.placed = decay, False

    def _init_table(self) -> None:
        self.embedding = nn.Embedding(self.num_codes, self.dim)  # ~ N(0, 1)
        self.register_buffer("mean", torch.zeros(self.dim))
        self.register_buffer("spread", torch.ones(self.dim))
        self.register_buffer("state", torch.tensor(self.FRESH))
        # A plain tensor, not a buffer: DistributedDataParallel would overwrite other ranks' sums with rank 0's.
        self._pending = torch.zeros(3, self.dim, dtype=torch.float64)  # tokens, their sum and their squares' sum

    def _table(self) -> Tensor:
        return self.mean + self.spread * self.embedding.weight

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:
        """Make centroids (K, D) the codes, up to rounding; the next update only expresses them in other units."""
        weight = torch.ones(self.num_codes) if counts is None else counts
        moments = _moments(self._checked(centroids).double(), weight.to(centroids).double())
        self._express(centroids, *moments)
        self.state.fill_(self.PLACED)
        self.placed = True
        self._pending.zero_()

    @torch.no_grad()
    def fit_codebook_(self, x: Tensor, **options: Any) -> dict[str, float]:
        """Codes := k-means of tokens x (N_rank, D); m and s := theirs, so that no single batch sets the scale."""
        info = super().fit_codebook_(x, **options)
        codes = self._table()
        self._observe(self.latent(x), torch.zeros(0))
        mean, spread, _ = self._gathered()
        self._express(codes, mean, spread)
        self.state.fill_(self.FOLLOWING)
        self.placed = False
        return info

    def _express(self, codes: Tensor, mean: Tensor, spread: Tensor) -> None:
        self.mean.copy_(mean)
        self.spread.copy_(spread)
        self.embedding.weight.copy_((codes - self.mean) / self.spread)

    @torch.no_grad()
    def _observe(self, latent: Tensor, indices: Tensor) -> None:  # noqa: ARG002
        if self._pending.device != latent.device:
            self._pending = self._pending.to(latent.device)
        finite = latent.isfinite().all(1, keepdim=True)  # a step that a gradient scaler skips must not stay in m and s
        x = torch.where(finite, latent.double(), 0.0)
        tokens = finite.sum(0).double().expand(self.dim)
        self._pending.add_(torch.stack([tokens, x.sum(0), x.square().sum(0)]))

    @torch.no_grad()
    def update_(self) -> None:
        """Move m and s by what the training forwards since the last call gathered, over all ranks. Collective."""
        mean, spread, tokens = self._gathered()
        if self.placed:
            if not tokens[0]:
                return
            # Of centroids the mean is that of the latents, and the spread less: a batch with less is no sample of them.
            self._express(self._table(), self.mean, spread.maximum(self.spread.double()))
            self.placed = False
        else:
            # Decided on the device: without tokens nothing moves, and the first statistics replace the initial ones.
            share = torch.where(self.state == self.FOLLOWING, 1.0 - self.decay, 1.0)
            share = torch.where(tokens[0] > 0, share, 0.0).to(self.mean.dtype)
            self.mean.lerp_(mean.to(self.mean.dtype), share)
            self.spread.lerp_(spread.to(self.spread.dtype), share)
        self.state.copy_(torch.where(tokens[0] > 0, self.FOLLOWING, self.state))

    def _gathered(self) -> tuple[Tensor, Tensor, Tensor]:
        """Collective. Mean, spread and number (D,) of the latents seen since the last call."""
        tokens, total, squares = provq._all_reduce(self._pending.to(self.mean.device, copy=True))
        mean = total / tokens.clamp_min(1)
        spread = (squares / tokens.clamp_min(1) - mean.square()).clamp_min(0).sqrt().clamp_min(MIN_SPREAD)
        self._pending.zero_()
        return mean, spread, tokens

    @torch.no_grad()
    def folded(self) -> provq.VectorQuantizer:
        """The same codes as a plain table, bit for bit: what an export holds."""
        codes = self.codebook()
        plain = provq.VectorQuantizer(self.num_codes, self.dim, beta=self.beta, rotation=self.rotation)
        plain = plain.to(codes).train(self.training)  # of their dtype, too
        plain.set_codebook_(codes)
        return plain

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.placed = int(self.state) == self.PLACED
        self._pending.zero_()


def _moments(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation (D,) of rows x (N, D)."""
    weight = weight[:, None] / weight.sum()
    mean = (weight * x).sum(0)
    return mean, (weight * (x - mean).square()).sum(0).sqrt().clamp_min(MIN_SPREAD)


class DeadCodeRestart:
    """Restarts codes that hardly any token chooses at latents of the last batch (Jukebox), for any trained codes.

    Watches the quantizer's training forwards. `step` after each optimizer step: every `every` calls, codes chosen less
    than `below` times the mean since then start again at random latents, and optimizers forget those rows. k-means
    (ProVQ.init_codebook, recluster) begins the count anew. There are at most as many as the batch has latents.

    Its state is what a resume needs, so save it with the model. Build it after the copy for a moving average is made,
    and before torch.compile. ValueError: below outside (0, 1), every < 1. TypeError: EMA codes, which have a restart of
    their own (restart_below); a quantizer that is none of provq.py and this file.
    """

    def __init__(self, quantizer: nn.Module, below: float, *, every: int = RESTART_EVERY):
        if not 0.0 < below < 1.0 or every < 1:
            raise ValueError(f"need 0 < below < 1 and every >= 1, got {below=} {every=}")
        if isinstance(quantizer, provq.EMAVectorQuantizer):
            raise TypeError("EMAVectorQuantizer restarts its codes by itself: restart_below")
        if not isinstance(quantizer, provq.VectorQuantizer):
            raise TypeError(f"{type(quantizer).__name__}: only codes of provq.py and provq_codes.py can be placed "
                            "one by one")
        self.quantizer, self.below, self.every = quantizer, below, every
        self.counts = torch.zeros(quantizer.num_codes, dtype=torch.int64)  # this rank's, since the last look for dead
        self.steps, self._placements = 0, quantizer.placements  # since then
        self.latents = torch.zeros(0, quantizer.dim)
        quantizer.register_forward_hook(self._watch)

    @torch.no_grad()
    def _watch(self, module: nn.Module, args: tuple[Tensor, ...], out: provq.Quantized) -> None:
        if not module.training or provq._recomputing():
            return
        self.counts = self.counts.to(out.indices.device)
        self.counts.index_add_(0, out.indices, torch.ones_like(out.indices))
        self.latents = self.quantizer.latent(args[0].detach())

    @property
    def due(self) -> bool:
        """Whether the next `step` looks for dead codes."""
        return self.steps + 1 >= self.every

    @torch.no_grad()
    def step(self, optimizers: Sequence[optim.Optimizer] = (), copies: Sequence[nn.Module] = ()) -> int:
        """-> codes restarted. Collective where a restart is due; draws from torch's global generator.

        copies: the quantizer in moving averages of the model, where these codes restart as well.
        """
        if self._placements != self.quantizer.placements:  # k-means: how often the codes before were chosen is past
            self.counts.zero_()
            self.steps, self._placements = 0, self.quantizer.placements
        if not self.due:
            self.steps += 1
            return 0
        counts = self._all_counts().float()
        rows, restart = provq._restarts(counts < self.below * counts.mean(), self.latents.float().to(counts.device))
        self.counts.zero_()
        self.steps = 0
        dead = restart.nonzero()[:, 0]
        if len(dead):
            place_codes_(self.quantizer, dead, rows[dead], optimizers)
            for copy in copies:
                for name, value in copy.named_parameters():
                    if name == "embedding.weight":  # a frozen table is a buffer, which averages copy
                        value[dead] = dict(self.quantizer.named_parameters())[name][dead].to(value)
        return len(dead)

    def _all_counts(self) -> Tensor:
        """Collective. Of all ranks, on the device of the codes, which alone a process group may serve."""
        return provq._all_reduce(self.counts.to(self.quantizer.codebook().device, copy=True))

    def state_dict(self) -> dict[str, Any]:
        """Collective. Counts of all ranks."""
        return {"counts": self._all_counts().cpu(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rank 0 takes the counts of all ranks that saved them. ValueError: of another number of codes."""
        if tuple(state["counts"].shape) != tuple(self.counts.shape):
            raise ValueError(f"counts {tuple(state['counts'].shape)} of {len(self.counts)} codes")
        main = provq._world() == 1 or torch.distributed.get_rank() == 0
        self.counts = state["counts"].clone() if main else torch.zeros_like(state["counts"])
        self.steps = int(state["steps"])


@torch.no_grad()
def place_codes_(
    quantizer: nn.Module, rows: Tensor, codes: Tensor, optimizers: Sequence[optim.Optimizer] = (),
) -> None:
    """Make codes (n, D) those of rows (n,) int64; optimizers forget what they know of these rows.

    TypeError: a quantizer whose rows cannot be set.
    """
    if isinstance(quantizer, provq.LinearVectorQuantizer):
        # codes = table W^T + b; the table is frozen, so no optimizer knows it. lstsq has no half precision.
        weight, bias = (p.to(torch.promote_types(p.dtype, torch.float32)) for p in quantizer.map.parameters())
        solved = torch.linalg.lstsq(weight, (codes.to(weight) - bias).t()).solution.t()
        quantizer.table[rows] = solved.to(quantizer.table)
        return
    if isinstance(quantizer, FollowingVectorQuantizer):
        codes = (codes - quantizer.mean) / quantizer.spread
    elif not isinstance(quantizer, provq.VectorQuantizer) or type(quantizer)._table is not provq.VectorQuantizer._table:
        raise TypeError(f"the codes of {type(quantizer).__name__} are no rows that can be set one by one")
    table = quantizer.embedding.weight
    table[rows] = codes.to(table)
    for optimizer in provq._unwrapped(optimizers):
        if isinstance(optimizer, optim.LBFGS):  # one flat state of all parameters: begun anew, it knows of no rows
            optimizer.state.clear()
        for name, value in optimizer.state.get(table, {}).items():
            if isinstance(value, Tensor) and value.shape == table.shape:
                value[rows] = codes.to(value) if name in COPIES else 0.0  # else a moment
                if name == "step_size":  # Rprop's, which multiplies it: of 0 the code would never move again
                    value[rows] = next(g["lr"] for g in optimizer.param_groups if any(p is table for p in g["params"]))
