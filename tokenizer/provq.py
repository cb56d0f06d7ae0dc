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

For a repository whose model, loss and checkpoints stay as they are, copy provq_attach.py as well: its `attach` puts the
model's quantizer on the curriculum. Beyond the paper: provq_codes.py. Sizes: N tokens, D latent channels, K codes.
Distances, losses and statistics are float32 or better under any autocast; collectives are no-ops in one process.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import math
import numbers
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Iterable, NamedTuple, Protocol, Sequence, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn, optim

__version__ = "0.3.0"
__all__ = ["QUANTIZERS", "SCHEDULES", "AdaptiveWarmup", "Curriculum", "EMAVectorQuantizer", "KMeansResult",
           "LinearVectorQuantizer", "ProVQ", "ProVQOutput", "Quantized", "Quantizer", "VectorQuantizer",
           "code_statistics", "kmeans", "make_quantizer", "nearest_code"]

# Distances that exist at a time: on a CPU, per thread, as many as its cache holds, or twice that; on a GPU 128 MiB.
CPU_SEARCH_ELEMENTS, GPU_SEARCH_ELEMENTS = 2**19, 2**25
fused_search: Callable[..., tuple[Tensor, Tensor] | None] = lambda *_: None  # noqa: E731 - for provq_triton.py
_is_compiling = getattr(torch.compiler, "is_compiling", None) or torch._utils.is_compiling  # public since torch 2.3
# Before torch 2.5 a compiled graph need not see attributes change, and the warm-up's would serve all stages: no graph.
_guarded = torch.compiler.disable if torch.__version__ < "2.5" else lambda forward: forward
_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7


# ----------------------------------------------------------------------------------------------------------- curriculum

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

    Table 5, with stages of length 0 skipped: (0, 0) the plain quantizer, (0, T) "+ soft transition", (W, 0) "+ manifold
    warm-up", (W, T) ProVQ. ValueError: a length no int >= 0; loss_floor or alpha outside [0, 1]; unknown schedule.
    """

    warmup_steps: int  # stage 1 in optimizer steps (paper: 50,000 on ImageNet, 20,000 on proteins)
    transition_steps: int  # stage 2, T_trans, in optimizer steps (paper: 20,000 and 10,000)
    schedule: str | Callable[[float], float] = "cosine"  # a name in SCHEDULES, or u in [0, 1) -> alpha in [0, 1]
    loss_floor: float = 0.5  # lambda of Eq. 4 (paper: 0.5 on ImageNet, 1.0 on proteins)

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "transition_steps"):
            if not isinstance(getattr(self, name), numbers.Integral) or getattr(self, name) < 0:
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
        if self.stage(step) != 2:
            return 1.0 if self.stage(step) == 1 else 0.0
        schedule = self.schedule if callable(self.schedule) else SCHEDULES[self.schedule]
        value = float(schedule((step - self.warmup_steps) / self.transition_steps))
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"schedule gave alpha = {value} at step {step}; it must lie in [0, 1]")
        return value

    def omega(self, step: int) -> float:
        """Weight of the quantization loss, Eq. 4: 0 in stage 1 (there is no codebook yet), 1 in stage 3."""
        return 0.0 if self.stage(step) == 1 else self.loss_floor + (1.0 - self.loss_floor) * (1.0 - self.alpha(step))


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


# ---------------------------------------------------------------------------------------------------------------- ProVQ

class Quantized(NamedTuple):
    """What a quantizer returns for tokens x (N, D)."""

    codes: Tensor  # (N, D): exactly the code in value, with a gradient estimator to x
    indices: Tensor  # (N,) int64
    losses: dict[str, Tensor]  # float32 [] each, beta applied; their sum is L_VQ + beta L_commit of Eq. 4


class Quantizer(Protocol):
    """What ProVQ asks of a quantizer, a module of tokens x (N, D) -> `Quantized`: subclass VectorQuantizer.

    A module without that base needs the names of ProVQ.REQUIRED. Methods with a body are defaults for what it lacks.
    """

    num_codes: int  # K
    dim: int  # D
    l2_norm: bool  # codes and latents on the unit sphere; False if it is absent
    placements: int = 0  # how often ProVQ has set the codes since the program began
    @abc.abstractmethod
    def __call__(self, x: Tensor) -> Quantized: ...
    @abc.abstractmethod
    def codebook(self) -> Tensor: ...  # effective codes (K, D), differentiable
    @abc.abstractmethod
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None: ...  # (K, D), cluster sizes (K,)
    @abc.abstractmethod
    def latent(self, x: Tensor) -> Tensor: ...  # x (N, D) as it is compared with codes
    @abc.abstractmethod
    def lookup(self, indices: Tensor) -> Tensor: ...  # int64 (...) -> codes (..., D), as forward returns them

    def output(self, latent: Tensor) -> Tensor:  # what the decoder gets of a latent (N, D) in place of a code
        return latent

    def fit_codebook_(self, x: Tensor, **options: Any) -> dict[str, float]:  # codes := k-means of tokens x (N, D)
        result = kmeans(self.latent(x), self.num_codes, spherical=getattr(self, "l2_norm", False), **options)
        _require_distinct(result.centroids)
        self.set_codebook_(result.centroids, result.counts)
        return result.info()

    def codebook_parameters(self) -> Iterable[nn.Parameter]:  # which optimizers must forget when codes are set
        return cast(nn.Module, self).parameters()

    def update_(self) -> None:  # called after an optimizer step past the warm-up, on all ranks
        return None


def _require_distinct(codes: Tensor, scale: float = 0.0, what: str = "latents") -> None:
    """Warn of equal ones of centroids (K, C), to a millionth of scale or of the largest. ValueError: all are equal."""
    distinct = len((codes / (1e-6 * max(scale, float(codes.abs().max())) or 1.0)).round().unique(dim=0))
    if distinct < min(2, len(codes)):
        raise ValueError(f"k-means: all {what} are equal (a collapsed encoder, or as few tokens as codes)")
    if distinct < len(codes):
        warnings.warn(f"k-means gave {distinct} distinct codes of {len(codes)}: {what} have few values", stacklevel=5)


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
    after the optimizer's. The state dict adds step, initialised, warmup_end, best_score and stale_checks; the end of an
    adaptive warm-up is loaded, too. Keep the module in float32 (use autocast): half precision loses small changes.
    """

    REQUIRED: tuple[str, ...] = ("codebook", "set_codebook_", "latent", "lookup", "num_codes", "dim")  # of quantizers
    FORWARDS_OF_A_STEP, _watched = 1000, (-1, 0)  # in training, until a warning; a step, and how many it has had

    quantizer: Quantizer
    curriculum: Curriculum  # the one in force: warmup_steps is the adaptive decision once there is one
    stage: int  # 1 continuous, 2 transition, 3 discrete
    alpha: float  # share of the continuous latent
    omega: float  # weight of the losses
    step: Tensor  # int64 []: optimizer steps done
    initialised: Tensor  # float32 []: not 0 once init_codebook was called. A float, so that averages of models follow
    warmup_end: Tensor  # int64 []: first step of stage 2 where an adaptive warm-up ended, else -1; 0: none, codes train
    best_score: Tensor  # float64 []
    stale_checks: Tensor  # int64 []

    def __init__(self, quantizer: nn.Module, curriculum: Curriculum, *, channel_dim: int = 1,
                 adaptive: AdaptiveWarmup | None = None):
        """quantizer: see `Quantizer`. channel_dim: 1 for z (B, D, ...), -1 for z (B, ..., D).

        TypeError: a quantizer without the methods. ValueError: channel_dim; adaptive without a warm-up to end.
        """
        super().__init__()
        if missing := [m for m in self.REQUIRED if not hasattr(quantizer, m)]:
            raise TypeError(f"{type(quantizer).__name__} lacks {', '.join(missing)}, which ProVQ needs of a quantizer "
                            "(a foreign module: adapt() it, or attach() to it, see provq_attach.py)")
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim must be 1 (B, D, ...) or -1 (B, ..., D), got {channel_dim}")
        if adaptive and not 0 < curriculum.warmup_steps >= adaptive.min_steps:
            raise ValueError("adaptive needs a warm-up to end: give the curriculum warmup_steps > 0 and no less than "
                             f"min_steps {adaptive.min_steps}, not {curriculum.warmup_steps}")
        self.quantizer, self.adaptive, self.channel_dim = cast(Quantizer, quantizer), adaptive, channel_dim
        self._full_curriculum, self.num_codes, self.dim = curriculum, self.quantizer.num_codes, self.quantizer.dim
        self.register_buffer("step", torch.tensor(0))
        self.register_buffer("initialised", torch.tensor(0.0))
        self.register_buffer("warmup_end", torch.tensor(-1 if curriculum.warmup_steps else 0))
        self.register_buffer("best_score", torch.tensor(torch.finfo(torch.float64).max, dtype=torch.float64))
        self.register_buffer("stale_checks", torch.tensor(0))
        self._shapes = [p.shape for p in self._ask("codebook_parameters")]
        self._counts = self._new_counts()
        self._mirror()

    def _mirror(self) -> None:
        # Python copies of the state: forward must not synchronise with the device to know its stage.
        self._initialised = bool(share := float(self.initialised))
        if 0.01 < 1 - share < 1:
            warnings.warn(f"an average of models whose codes are to {1 - share:.0%} those of before k-means: give it "
                          "the quantizer's state dict as soon as codes are set (see init_codebook)", stacklevel=5)
        end, most = int(self.warmup_end), self._full_curriculum.warmup_steps
        self.curriculum = dataclasses.replace(self._full_curriculum, warmup_steps=min(end, most) if end > 0 else most)
        self._from_start = end == most == 0  # the codes trained without a warm-up; not so a warm-up's checkpoint
        self._enter(int(self.step))

    def _enter(self, step: int) -> None:
        self._step, self.stage = int(step), self.curriculum.stage(step)
        self.alpha, self.omega = self.curriculum.alpha(step), self.curriculum.omega(step)
        # No floats, which would be compiled anew at each value; no buffers, which DDP overwrites before backward.
        with torch.inference_mode(False):  # made while looking, they train as well
            self._alpha, self._omega = (torch.full((), v, device=self.step.device) for v in (self.alpha, self.omega))

    @_guarded
    def forward(self, z: Tensor, mask: Tensor | None = None) -> ProVQOutput:
        """z (B, D, ...) or (B, ..., D) float; mask (B, ...) bool, True = valid. See ProVQOutput.

        TypeError: z not floating point. ValueError: channels, mask. RuntimeError: past the warm-up, without a codebook.
        """
        tokens, shape, places = self._flatten(z, mask)
        if self.training and self.needs_init:
            raise RuntimeError(f"step {self._step} is past the warm-up: first call init_codebook(latents, ...)")
        self._watch(z, self.channel_dim)
        continuous = self.stage == 1 if self.training else not self.has_codebook
        if continuous or not len(tokens):
            # 0 x every parameter: DistributedDataParallel sees the codebook used, without find_unused_parameters.
            loss = sum((0.0 * p.float().sum() for p in self.parameters() if p.requires_grad),
                       torch.zeros((), device=z.device))
            quantized = _unmasked(self._smooth(tokens).to(z.dtype), shape, places, 0.0).movedim(-1, self.channel_dim)
            indices = None if continuous else torch.full(shape, -1, dtype=torch.int64, device=z.device)
            return ProVQOutput(quantized, indices, loss, {})

        out = self.quantizer(tokens)
        terms, mixed = [value.float() for value in out.losses.values()], out.codes
        loss = torch.stack(terms).sum() if terms else torch.zeros((), device=z.device)
        if self.training:
            if self.stage == 2:
                mixed = self._alpha * self._smooth(tokens) + (1.0 - self._alpha) * out.codes  # Eq. 2
                loss = self._omega * loss  # Eq. 4
            self._count(out.indices)
        quantized = _unmasked(mixed.to(z.dtype), shape, places, 0.0).movedim(-1, self.channel_dim)
        losses = {name: value.detach() for name, value in out.losses.items()}
        return ProVQOutput(quantized, _unmasked(out.indices, shape, places, -1), loss, losses)

    def _watch(self, z: Tensor, channel_dim: int) -> None:
        if self.training and self._watched[0] < 0 and z.ndim == 3 and z.shape[1] == z.shape[2]:
            warnings.warn(f"latents {tuple(z.shape)} are taken as {'(B, L, D)' if channel_dim == -1 else '(B, D, L)'}, "
                          "and the other way round would train, too, and mean nothing", stacklevel=5)
        if self.training and not (_is_compiling() or _recomputing()):  # a compiler would trace anew at every count
            self._watched = self._step, self._watched[1] + 1 if self._watched[0] == self._step else 1
            updates = getattr(type(self.quantizer), "update_", Quantizer.update_) is not Quantizer.update_
            if self._watched[1] == self.FORWARDS_OF_A_STEP and (self.stage < 3 or updates):
                warnings.warn(f"{self._watched[1]} training forwards at step {self._step}: without set_step in every "
                              "step, stages never end and codes that are running means never move", stacklevel=5)

    def _smooth(self, tokens: Tensor) -> Tensor:  # what the decoder sees at alpha = 1, (N, D)
        return self._ask("output", self.quantizer.latent(tokens))

    def _ask(self, method: str, *args: Any, **options: Any) -> Any:
        """Call the quantizer's method. If it has what is REQUIRED only, the default in `Quantizer`."""
        own = getattr(self.quantizer, method, None)
        return getattr(Quantizer, method)(self.quantizer, *args, **options) if own is None else own(*args, **options)

    def set_step(self, step: int) -> None:
        """Steps < step are done. Going forward also applies a pending EMA update (collective then).

        TypeError: not an int. ValueError: negative. RuntimeError: into the warm-up of codes that are set, or sharded.
        """
        if isinstance(step, bool) or not isinstance(step, numbers.Integral):  # a number of NumPy will do
            raise TypeError(f"step must be an int (a tensor would synchronise), got {type(step).__name__}")
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        if self.training and step < self._step and self._initialised and self.curriculum.stage(step) == 1:
            raise RuntimeError(f"step {step} is in the warm-up, but the codebook was initialised by step {self._step}: "
                               "train on with Curriculum(0, 0), or load weights alone (see host_state_dict)")
        if _world() > 1 and self.curriculum.warmup_steps and not self._initialised and self._shapes != [
                p.shape for p in self._ask("codebook_parameters") if not hasattr(p, "device_mesh")]:
            raise RuntimeError("codes are sharded (FSDP), and k-means cannot set them: use DistributedDataParallel")
        if step > self._step and self.stage > 1:
            self._ask("update_")
        first, length = self.curriculum.warmup_steps, self.curriculum.transition_steps
        if self.training and self._step <= first < first + length <= step != self._step + 1:
            warnings.warn(f"set_step({step}) after {self._step} skips all of stage 2: {self.curriculum}", stacklevel=2)
        self.step.fill_(int(step))
        self._enter(step)

    @property
    def needs_init(self) -> bool:
        """Whether the warm-up has ended and `init_codebook` has not been called."""
        return self.stage > 1 and not self.has_codebook

    @property
    def has_codebook(self) -> bool:
        """Whether codes mean anything yet: initialised from data, or trained from the start (no warm-up)."""
        if not (self._initialised or self._from_start or self.training or _is_exporting()):
            (torch.compiler.disable(self._mirror) if _is_compiling() else self._mirror)()  # averages (EMA) bypass us
        return self._initialised or self._from_start

    def init_codebook(self, latents: Tensor | None, *, iters: int = 20, start: str = "kmeans++", seed: int = 0,
                      order: Tensor | None = None, optimizers: Sequence[optim.Optimizer] = ()) -> dict[str, float]:
        """Set the codes to the k-means centroids of latents (N_rank, D), valid tokens only. Once; collective.

        None keeps the codes (an ablation). optimizers: forget what they gathered of the codebook: zero gradients have
        advanced Adam's step count. A moving average would mix old codes with these: load state_dict() into its ProVQ
        next. Returns inertia, iterations, tokens, empty (codes). RuntimeError: a second call. ValueError: see `kmeans`.
        """
        if self._initialised:
            raise RuntimeError("init_codebook was called before: the codebook is initialised once")
        info = self._place(latents, optimizers, iters=iters, start=start, seed=seed, order=order)
        self.initialised.fill_(1.0)
        self._initialised = True
        return info

    def recluster(self, latents: Tensor, *, optimizers: Sequence[optim.Optimizer] = (), **options: Any,
                  ) -> dict[str, float]:
        """`init_codebook` again, at any later step: ours, not in the paper. RuntimeError: there are no codes yet."""
        if not self.has_codebook:
            raise RuntimeError("recluster() before init_codebook(): there are no codes yet")
        return self._place(latents, optimizers, **options)

    @torch.no_grad()
    def _place(self, latents: Tensor | None, optimizers: Any = (), **options: Any) -> dict[str, float]:
        every = _unwrapped(optimizers)
        info = {} if latents is None else self._fit(self._checked(latents), **options)
        for each in every:  # LBFGS has one state of all its parameters together, under the first of them
            for parameter in [*each.state] if isinstance(each, optim.LBFGS) else self._ask("codebook_parameters"):
                each.state.pop(parameter, None)
        self.quantizer.placements = getattr(self.quantizer, "placements", 0) + 1
        return info

    def _fit(self, latents: Tensor, **options: Any) -> dict[str, float]:
        return self._ask("fit_codebook_", latents, **options)

    def _checked(self, latents: Tensor) -> Tensor:
        if latents.ndim != 2 or latents.shape[1] != self.dim:
            raise ValueError(f"latents must be (N, D = {self.dim}), got {tuple(latents.shape)}")
        return latents

    def observe(self, score: float) -> bool:
        """Report a validation score in stage 1; True if that ended the warm-up (see AdaptiveWarmup).

        Collective: rank 0's score decides. If the model is compiled, call set_step(step + 1) before: what trained at a
        step is not seen then. RuntimeError: no AdaptiveWarmup given. ValueError: a non-finite score.
        """
        if self.adaptive is None:
            raise RuntimeError("observe() needs ProVQ(..., adaptive=AdaptiveWarmup(...))")
        score = float(_broadcast(torch.tensor(score, dtype=torch.float64, device=self.step.device)))
        if not math.isfinite(score):
            raise ValueError(f"the validation score must be finite, got {score}")
        if self.stage != 1:
            return False
        signed = score if self.adaptive.mode == "min" else -score
        self.stale_checks.add_(1)
        if signed < float(self.best_score) - self.adaptive.min_delta:
            self.best_score.fill_(signed)
            self.stale_checks.zero_()
        if ended := int(self.stale_checks) >= self.adaptive.patience and self._step >= max(1, self.adaptive.min_steps):
            self.warmup_end.fill_(self._step + (self._watched[0] == self._step))  # what has trained is of stage 1
            self._mirror()
        return ended

    @torch.no_grad()
    def encode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """Codes of z: int64, z's shape without channels, -1 where masked. RuntimeError: there is no codebook yet."""
        if not self.has_codebook:
            raise RuntimeError("encode() before init_codebook(): the warm-up has not ended, there are no codes yet")
        tokens, shape, places = self._flatten(z, mask)
        return _unmasked(nearest_code(self.quantizer.latent(tokens), self.codebook()), shape, places, -1)

    def decode(self, indices: Tensor) -> Tensor:
        """Codes of int64 indices (B, ...) in z's layout; 0 where negative (masked). RuntimeError: no codebook yet."""
        if not self.has_codebook:
            raise RuntimeError("decode() before init_codebook(): the warm-up has not ended, there are no codes yet")
        codes = self.quantizer.lookup(indices.clamp_min(0))
        return torch.where((indices >= 0)[..., None], codes, 0.0).movedim(-1, self.channel_dim)

    def pop_counts(self) -> Tensor:
        """This rank's code counts (K,) int64 of the training forwards since the last call, and start over."""
        counts = self._counts.clone()
        self._counts.zero_()
        return counts

    def usage(self) -> dict[str, Any]:
        """usage, perplexity and counts (K,) of all ranks' training forwards since the last call. Collective."""
        counts = _all_reduce(self.pop_counts().to(self.step.device))
        return {**code_statistics(counts), "counts": counts}

    def codebook(self) -> Tensor:
        """Effective codes (K, D), differentiable."""
        return self.quantizer.codebook()

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> nn.Module:
        super()._apply(fn, *args)
        self._counts = self._counts.to(self.step.device)  # no buffer, but it moves along
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in ("reservoir", "reservoir_state"):  # of version 0.2; strict loading must not mind
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._mirror()

    def _new_counts(self) -> Tensor:
        return torch.zeros(self.num_codes, dtype=torch.int64)  # per rank: no buffer (see EMAVectorQuantizer)

    def _count(self, indices: Tensor) -> None:
        if _recomputing():
            return
        self._counts = self._counts.to(indices.device).index_add_(0, indices.clamp_min(0), (indices >= 0).long())

    def _flatten(self, z: Tensor, mask: Tensor | None) -> tuple[Tensor, tuple[int, ...], Tensor | None]:
        """z -> its valid tokens (N, D), its shape without channels, and with a mask their places in it (N,)."""
        if not z.is_floating_point():
            raise TypeError(f"latents must be floating point, got {z.dtype}")
        if z.ndim < 2 or z.shape[self.channel_dim] != self.dim:
            raise ValueError(f"latents need {self.dim} channels in dimension {self.channel_dim}, got {tuple(z.shape)}")
        last = z.movedim(self.channel_dim, -1)
        if mask is not None and (mask.dtype != torch.bool or mask.shape != last.shape[:-1]):
            raise ValueError(f"mask must be bool {tuple(last.shape[:-1])}, got {mask.dtype} {tuple(mask.shape)}")
        tokens, shape = last.reshape(-1, self.dim), tuple(last.shape[:-1])
        places = None if mask is None else mask.flatten().nonzero()[:, 0]  # once: indexing by a mask waits for a GPU
        return tokens if places is None else tokens.index_select(0, places), shape, places

    def extra_repr(self) -> str:
        return f"{self._full_curriculum}, {self.adaptive}, channel_dim={self.channel_dim}"


def _unmasked(tokens: Tensor, shape: tuple[int, ...], places: Tensor | None, padding: float) -> Tensor:
    """Valid tokens (N, ...) -> (*shape, ...). Padding leaks nothing, not even a NaN."""
    if places is not None:
        full = tokens.new_full((math.prod(shape), *tokens.shape[1:]), padding)
        tokens = full.index_copy(0, places, tokens)
    return tokens.reshape(*shape, *tokens.shape[1:])


# ----------------------------------------------------------------------------------------------------------- quantizers

class VectorQuantizer(nn.Module, Quantizer):
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
            latent, codebook = self.latent(x), self.codebook()
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
        moved = scale * (latent - 2 * r * (r * latent).sum(1, keepdim=True) + 2 * q * (u * latent).sum(1, keepdim=True))
        return code + (moved - moved.detach())

    def _observe(self, latent: Tensor, indices: Tensor) -> None:
        """Gather statistics in a training forward; the trained table needs none."""


class LinearVectorQuantizer(VectorQuantizer):
    """Frozen table times one trained linear map: codes = table W^T + b, so that every code moves in every step.

    SimVQ (Zhu et al. 2025) keeps the table of the constructor, ~ N(0, 1/D). AminoAseed (Yuan et al. 2025) sets it from
    data, once, by `set_codebook_`, with the identity as map. ProVQ's k-means turns the first into the second.
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
        if not 0.0 <= decay < 1.0 or not 0.0 <= restart_below <= 1.0:
            raise ValueError(f"need 0 <= decay < 1 and 0 <= restart_below <= 1, got {decay=} {restart_below=}")
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
        self._last = torch.zeros(0, self.dim)

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
        self._pending = self._pending.to(latent.device)  # not _last, by whose size a compiler would know this call
        finite = latent.isfinite().all(1, keepdim=True)  # one inf, as a gradient scaler meets, would stay in the sums
        self._pending.index_add_(0, indices, torch.where(finite, F.pad(latent.double(), (0, 1), value=1.0), 0.0))
        if self.restart_below > 0:
            self._last = latent.float()

    @torch.no_grad()
    def update_(self) -> None:
        """Fold what the training forwards since the last call gathered, over all ranks, into the codes. Collective."""
        stats = _all_reduce(self._pending.to(self.codes.device))
        stats = (stats * (self.num_codes / stats[:, -1].sum().clamp_min(1))).float()  # mean count 1, as at the start
        sums, counts = stats[:, :-1], stats[:, -1]
        decay = torch.where(counts.sum() > 0, self.decay, 1.0)  # without tokens nothing decays; decided on the device
        self.ema_sums.mul_(decay).add_(sums * (1.0 - decay))
        self.ema_counts.mul_(decay).add_(counts * (1.0 - decay))
        self._pending.zero_()
        if self.restart_below > 0:
            floor = self.restart_below * self.ema_counts.mean()
            rows, dead = _restarts((self.ema_counts < floor) & (counts.sum() > 0), self._last.to(stats.device))
            self.ema_counts.copy_(torch.where(dead, floor, self.ema_counts))
            self.ema_sums.copy_(torch.where(dead[:, None], rows * floor, self.ema_sums))
        self.codes.copy_(self.ema_sums / self._smoothed()[:, None])

    def _smoothed(self) -> Tensor:
        total = self.ema_counts.sum()
        return (self.ema_counts + self.eps) * total / (total + self.num_codes * self.eps)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._pending.zero_()


def _restarts(dead: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """For dead codes (K,) bool distinct latents of all ranks' last (N_rank, D): (K, D), and for which there is one."""
    place, world, rank = dead.cumsum(0) - 1, _world(), dist.get_rank() if _world() > 1 else 0
    mine, at = dead & (place % world == rank) & (place // world < len(last)), place.clamp_min(0) // world
    rows = last.new_zeros(len(dead), last.shape[1] + 1)
    if len(last):  # else this rank's batch was masked altogether
        drawn = last[torch.randperm(len(last), device=last.device)[at.clamp_max(len(last) - 1)]]
        rows = torch.where((mine & drawn.isfinite().all(1))[:, None], F.pad(drawn, (0, 1), value=1.0), rows)
    rows = _all_reduce(rows)
    return rows[:, :-1], rows[:, -1] > 0


QUANTIZERS: dict[str, type[VectorQuantizer]] = {"vq": VectorQuantizer, "simvq": LinearVectorQuantizer,
                                                "aminoaseed": LinearVectorQuantizer, "ema": EMAVectorQuantizer}


def make_quantizer(name: str, num_codes: int, dim: int, **options: Any) -> VectorQuantizer:
    """The quantizer called `name` in QUANTIZERS. ValueError lists the names if there is none."""
    if name not in QUANTIZERS:
        raise ValueError(f"unknown quantizer {name!r}; choose one of {', '.join(QUANTIZERS)}")
    return QUANTIZERS[name](num_codes, dim, **options)


def code_statistics(counts: Tensor) -> dict[str, float]:
    """counts (K,) of each code -> usage, the fraction used, in [0, 1]; perplexity exp(H) in codes, 0 without counts."""
    p = counts.double() / counts.sum().clamp_min(1)
    entropy = -torch.xlogy(p, p).sum()
    return {"usage": (counts > 0).double().mean().item(), "perplexity": entropy.exp().item() if counts.any() else 0.0}


# -------------------------------------------------------------------------------------------- nearest codes and k-means

@torch.no_grad()
def nearest_code(x: Tensor, codebook: Tensor) -> Tensor:
    """Index of the Euclidean nearest code: x (N, D), codebook (K, D) -> (N,) int64; the lower of two that round alike.

    In float32 (float64 if given), outside autocast and (eager) TF32, and in blocks: there is never an N x K matrix.
    Squared distances are exact to 1e-6 of those across all codes: k-means warns of latents for which that is little.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return _search(x.to(dtype), codebook.to(dtype))[1]


def _search(x: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest row of codes (K, D) for each row of x (N, D): squared distances (N,), indices (N,) int64."""
    # Inside a compiled region process-wide settings are the host's: changing them there would break the graph.
    traced = _is_compiling() or torch.jit.is_tracing()
    if not traced and x.device.type == "cpu" and (n := torch.get_num_threads()) > 1 and len(x) * len(codes) >= 2**15:
        # A share of the tokens for each thread: if all met after every block, they would wait for one another wherever
        # cores are busy. set_num_threads is for the calling thread, and for those that begin later.
        shares = x.detach().chunk(max(1, min(n, len(x) * len(codes) * (x.shape[1] + 16) // 2**28)))  # of 5 ms or more
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(n) as pool:
                at_once = pool.map if len(shares) > 1 else map
                found = list(at_once(lambda share: _search_blocks(share, codes.detach()), shares))
        finally:
            torch.set_num_threads(n)
        return torch.cat([part[0] for part in found]), torch.cat([part[1] for part in found])
    if traced or not x.is_cuda:
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
    # Distances stay, but a common offset would cancel catastrophically in |e|^2 - 2xe. A median of some codes: one far
    # out would drag the mean along, and all take long. (On a GPU it has no deterministic form, hence the sort.)
    some = codes[:: -(-len(codes) // 64)]
    centre = some.sort(0).values[(len(some) - 1) // 2] if codes.is_cuda else some.median(0).values
    x, codes = x - centre, codes - centre
    sq, few = codes.square().sum(1), x.device.type != "cpu" or len(codes) <= 256 or len(x) * len(codes) < 2**18
    codes = codes.where(sq[:, None] != math.inf, 0.0)  # infinitely far: not nearest, by the NaN of inf - inf
    with torch.autocast(x.device.type, enabled=False):
        value, index = fused_search(x, codes, sq) or (_search_whole if few else _search_groups)(x, codes, sq)
    return (value + x.square().sum(1)).clamp_min_(0.0), index


# Both: least |e|^2 - 2xe of x (N, D) over codes e (K, D) with squares sq (K,), and its index. Results go into two
# allocated tensors: small ones that outlive their block would pin its freed memory behind them.
def _search_whole(x: Tensor, codes: Tensor, sq: Tensor) -> tuple[Tensor, Tensor]:
    rows = max(1, (CPU_SEARCH_ELEMENTS if x.device.type == "cpu" else GPU_SEARCH_ELEMENTS) // max(1, len(codes)))
    if len(x) <= rows:  # a graph of this serves batches of any size
        return torch.addmm(sq, x, codes.t(), alpha=-2.0).min(1)
    value, index = x.new_empty(len(x)), torch.empty(len(x), dtype=torch.int64, device=x.device)
    for start in range(0, len(x), rows):
        part = slice(start, start + rows)
        value[part], index[part] = torch.addmm(sq, x[part], codes.t(), alpha=-2.0).min(1)
    return value, index


def _search_groups(x: Tensor, codes: Tensor, sq: Tensor) -> tuple[Tensor, Tensor]:
    # A CPU finds a minimum with its index by scalars, without it by vectors: first of each group, then of one group.
    width = max(64, int(len(codes) ** 0.5) // 64 * 64)
    pad, rows = -len(codes) % width, min(len(x), max(128, 2 * CPU_SEARCH_ELEMENTS // len(codes)))
    sq = F.pad(sq, (0, pad), value=math.inf).view(-1, 1, width)
    groups = F.pad(codes, (0, 0, 0, pad)).view(len(sq), width, -1).transpose(1, 2)
    many, row = max(1, min(len(sq), 2 * CPU_SEARCH_ELEMENTS // (rows * width))), torch.arange(rows)
    value, index = x.new_full((len(x),), math.inf), torch.zeros(len(x), dtype=torch.int64)
    block = x.new_empty(many * rows * width)  # used again and again: to map new memory takes as long as the product
    for start in range(0, len(x), rows):
        part, least, at = (t[start : start + rows] for t in (x, value, index))
        for first in range(0, len(sq), many):
            bias, table = sq[first : first + many], groups[first : first + many]
            out = block[: len(bias) * len(part) * width].view(len(bias), len(part), width)
            torch.baddbmm(bias, part.expand(len(bias), -1, -1), table, alpha=-2.0, out=out)
            found, group = out.amin(2).min(0)
            near = out.flatten(0, 1).index_select(0, group * len(part) + row[: len(part)]).min(1).indices
            closer = ~((found >= least) | least.isnan())  # of equals the first, and of NaN
            least[:] = torch.where(closer, found, least)
            at[:] = torch.where(closer, (first + group) * width + near, at)
    return value, index


class KMeansResult(NamedTuple):
    centroids: Tensor  # (K, D) float32, equal on every rank; unit rows if spherical
    counts: Tensor  # (K,) int64: tokens of all ranks nearest to each centroid
    inertia: float  # mean squared distance to the nearest centroid, over the tokens of all ranks
    iterations: int  # Lloyd iterations done; fewer than asked for when a fixed point was reached

    def info(self) -> dict[str, float]:
        return {"inertia": self.inertia, "iterations": self.iterations, "tokens": int(self.counts.sum()),
                "empty": int((self.counts == 0).sum())}


@torch.no_grad()
def kmeans(x: Tensor, num_codes: int, *, iters: int = 20, start: str = "kmeans++", spherical: bool = False,
           seed: int = 0, order: Tensor | None = None) -> KMeansResult:
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
        raise ValueError(f"start: kmeans++ or random; iters >= 0, num_codes >= 1; got {start=} {iters=} {num_codes=}")
    x, rank = x.float(), dist.get_rank() if _world() > 1 else 0
    sizes = torch.zeros(_world() + 1, dtype=torch.int64, device=x.device)
    sizes[rank], sizes[-1] = len(x), (~x.isfinite()).sum()
    *per_rank, bad = _all_reduce(sizes).tolist()
    total = sum(per_rank)
    if bad:
        raise ValueError(f"k-means got {bad} non-finite values in its tokens: training diverged before the codebook")
    if total < num_codes:
        raise ValueError(f"k-means needs at least num_codes = {num_codes} tokens over all ranks, got {total}: "
                         "collect more batches, or use a smaller codebook")
    x = F.normalize(x, dim=1) if spherical else x
    order = (torch.arange(len(x)) + sum(per_rank[:rank]) if order is None else order).to(x.device)

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
    centroids = points[:, :-1] if start == "random" else _kmeans_plus_plus(points[:, :-1], num_codes, generator)
    centroids = _broadcast(centroids.contiguous())

    for done in range(iters + 1):
        sums, counts, far = _assign(x, centroids)
        if done == iters:
            break
        new = torch.where(counts[:, None] > 0, (sums / counts.clamp_min(1)[:, None]).float(), centroids)
        new = F.normalize(new, dim=1) if spherical else new
        new = _broadcast(_reseed_empty(new, counts, x, far, order, rank))
        if torch.equal(new, centroids):
            break
        centroids = new
    inertia = _all_reduce(far.sum(dtype=torch.float64)).item() / total
    if 0 < inertia < 3e-6 * float(centroids.var(0, correction=0).sum()):
        warnings.warn("tokens lie in clusters hundreds of times their size apart: among the codes of one a search in "
                      "float32 errs (see nearest_code). Normalise the latents", stacklevel=2)
    return KMeansResult(centroids, counts.long(), inertia, min(done + 1, iters))


def _kmeans_plus_plus(points: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    # Each next seed is drawn with probability proportional to its squared distance from the seeds. In blocks, by
    # rejection: a candidate stays if those that stay before it leave it more than a uniform share of its distance.
    place, share = torch.rand(2, 1, generator=generator, dtype=torch.float64).to(points.device)
    seeds = points[(place * len(points)).long()]
    nearest = (points - seeds).square().sum(1)
    while len(seeds) < num_codes:
        size = 2, min(len(seeds), 1024)
        place, share = torch.rand(size, generator=generator, dtype=torch.float64).to(points.device)
        cumulative = nearest.cumsum(0, dtype=torch.float64)
        drawn = torch.searchsorted(cumulative, place * cumulative[-1], right=True).clamp_(max=len(points) - 1)
        new = points[drawn]
        apart = torch.cdist(new, new, compute_mode="donot_use_mm_for_euclid_dist").square()
        blocks, stays, before = (apart < (share * nearest[drawn])[:, None]).tril(-1), drawn >= 0, None
        while before is None or not torch.equal(stays, before):  # at most a pass for each candidate; mostly 2 to 4
            before, stays = stays, ~(blocks & stays).any(1)
        seeds, new = torch.cat([seeds, new[stays]]), new[stays]
        torch.minimum(nearest, (points - new[_search(points, new)[1]]).square().sum(1), out=nearest)
    return seeds[:num_codes]


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
    return centroids.index_put((empty[: len(offers)],), offers[:, 2:].float())


# ------------------------------------------------------------------------------------------ processes and recomputation

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


def _unwrapped(optimizers: Any) -> list[optim.Optimizer]:
    """One or several optimizers, and those inside with the state: ZeroRedundancyOptimizer, timm's Lookahead, SAM."""
    found = [optimizers] if isinstance(optimizers, optim.Optimizer) else list(optimizers)
    for each in found:  # grows meanwhile
        inside = [getattr(each, name, None) for name in ("optim", "_base_optimizer", "base_optimizer")]
        found += [one for one in inside if isinstance(one, optim.Optimizer) and one not in found]
    return found


def _recomputing() -> bool:
    # Activation checkpointing runs forward again inside backward; statistics must count each token once. A compiled
    # graph cannot ask: there usage counts double (the same fractions) when the checkpoint is around compiled code.
    return not _is_compiling() and torch._C._current_graph_task_id() != -1


# What was in this file in version 0.2, adapters too, and `load`, the repository's: imported when asked for.
_ELSEWHERE = ("ADAPTERS", "Attached", "adapt", "attach", "detach", "host_state_dict", "load")


def __getattr__(name: str) -> Any:
    if not (name in _ELSEWHERE or name.startswith("RESERVOIR_") or name.endswith("Adapter")):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    companion, hint = f"{__package__}.provq_attach" if __package__ else "provq_attach", "copy it beside provq.py"
    if name == "load":
        companion, hint = "tokenizer.hub", "run in a checkout of ProVQ, which has models too, or put it on PYTHONPATH"
    try:
        return getattr(importlib.import_module(companion), name)
    except ModuleNotFoundError as error:
        if error.name not in (companion, companion.partition(".")[0]):
            raise
        raise ImportError(f"{name} is in {companion.rpartition('.')[2]}.py: {hint}") from None
