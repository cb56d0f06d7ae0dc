"""What training runs on the ProVQ curriculum share, whatever they tokenize (paper, section 4): settings, the start of
the codebook, and what is looked at between steps.

A tokenizer's trainer subclasses CurriculumTrainer and its settings subclass CurriculumConfig.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenizer.code_meter import PaceMeter
from tokenizer.grid_quantizers import GRIDS
from tokenizer.init_from import load_tokenizer_weights
from tokenizer.provq import SCHEDULES, AdaptiveWarmup, Curriculum, ProVQ, code_statistics
from tokenizer.provq_codes import DeadCodeRestart
from tokenizer.quantizer_config import QuantizerConfig, check_quantizer
from tokenizer.runtime import config, distributed
from tokenizer.runtime.command import CannotContinue
from tokenizer.runtime.config import arg, flag_name
from tokenizer.runtime.ema import EMA
from tokenizer.runtime.optim import autocast
from tokenizer.runtime.run import Run, RunConfig, check_run, with_max_steps
from tokenizer.snapshots import save_snapshot

MORE_BATCHES = 8  # times as many at most, when those for the codebook's start hold fewer latents than codes
CODEBOOK_INITS = ("auto", "kmeans", "latents", "none")


@dataclass(frozen=True)
class CurriculumConfig(QuantizerConfig, RunConfig):
    """Settings of run, quantizer and curriculum; defaults are the paper's for ImageNet."""

    warmup_steps: int = arg(50_000, "stage 1, plain autoencoder, in optimizer steps, or a fraction of all steps such "
                                    "as 0.25; paper: 50000", fraction=True)
    transition_steps: int = arg(20_000, "stage 2, soft transition, likewise; paper: 20000", fraction=True)
    transition: str = arg("cosine", "schedule of alpha in stage 2; paper: cosine", choices=tuple(SCHEDULES))
    loss_lambda: float = arg(0.5, "weight of the quantization loss when stage 2 begins, lambda; paper: 0.5")
    stop_after: str | None = arg(None, "stage that the run ends with, without a discrete tokenizer; none: it reaches "
                                       "stage 3, or is refused", choices=("warmup", "transition"))
    adaptive_warmup_patience: int = arg(0, "end stage 1 after this many validations without a lower error, at "
                                           "--warmup-steps at the latest; 0: there; paper: 0")
    adaptive_warmup_min_steps: int = arg(0, "adaptive warm-up: never end before this step")
    codebook_init: str = arg("auto", "when stage 1 is over: kmeans of latents, latents drawn at random, or none; auto: "
                                     "kmeans after a warm-up, else latents for aminoaseed, else none, as for fsq and "
                                     "lfq; paper: kmeans", choices=CODEBOOK_INITS)
    kmeans_batches: int = arg(0, "global batches whose latents are clustered; 0: 32 latents per code, in at most 16 "
                                 "batches if those give every code one; paper: one batch")
    kmeans_iters: int = arg(20, "Lloyd iterations at most; paper: not given")
    kmeans_start: str = arg("kmeans++", "first centroids of k-means; paper: not given", choices=("kmeans++", "random"))
    recluster: bool = arg(False, "k-means again where the transition ends; ours, not in the paper")
    recluster_at: tuple[int, ...] = arg((), "k-means again at these steps; ours, not in the paper")
    codebook_lr_scale: float = arg(1.0, "learning rate of the codes, in units of --lr; ours, not in the paper: 1")


def check_curriculum(cfg: CurriculumConfig, world_size: int) -> None:
    """Raise ValueError, naming flag, value and fix, for settings of CurriculumConfig that cannot work."""
    check_run(cfg, world_size)
    check_quantizer(cfg, flags=True)
    if cfg.max_steps is not None:
        cfg = with_whole_stages(cfg, cfg.max_steps)
    if cfg.quantizer in GRIDS:
        for flag, asked in (("--codebook-init", codebook_init(cfg) != "none"), ("--recluster", cfg.recluster),
                            ("--recluster-at", bool(cfg.recluster_at)),
                            ("--codebook-lr-scale", cfg.codebook_lr_scale != 1)):
            if asked:
                raise ValueError(f"{flag}: the codes of --quantizer {cfg.quantizer} lie on a fixed grid, which nothing "
                                 "places or trains; leave it out")
    config.require_at_least(cfg, 0, "kmeans_batches kmeans_iters adaptive_warmup_patience adaptive_warmup_min_steps "
                            "warmup_steps transition_steps")
    config.require_positive(cfg, "codebook_lr_scale")
    config.require_at_most(cfg, 2**20, "codebook_lr_scale")
    if cfg.quantizer == "ema" and cfg.codebook_lr_scale != 1.0:
        raise ValueError(f"--codebook-lr-scale {cfg.codebook_lr_scale}: no optimizer trains the codes of --quantizer "
                         "ema; for faster codes lower --codebook-ema-decay")
    config.require_at_most(cfg, 2**24, "codebook_size")
    config.require_at_most(cfg, 2**20, "kmeans_batches")
    config.require_at_most(cfg, 2**16, "codebook_embed_dim")
    if not 0 <= cfg.loss_lambda <= 1:
        raise ValueError(f"--loss-lambda is {cfg.loss_lambda}; it must lie in [0, 1]")
    if not cfg.adaptive_warmup_patience and cfg.adaptive_warmup_min_steps:
        raise ValueError("--adaptive-warmup-min-steps needs --adaptive-warmup-patience above 0")
    if cfg.stop_after and cfg.adaptive_warmup_patience:
        raise ValueError(f"--stop-after {cfg.stop_after} needs to know where stages end; with "
                         "--adaptive-warmup-patience nobody does")
    if cfg.stop_after and not getattr(cfg, f"{cfg.stop_after}_steps"):
        raise ValueError(f"--stop-after {cfg.stop_after}: there is no such stage with --{cfg.stop_after}-steps 0")
    if cfg.recluster and not cfg.transition_steps:
        raise ValueError("--recluster is for the end of the transition, and there is none with --transition-steps 0; "
                         "give --recluster-at STEP")
    config.require_at_least(cfg, 0, "recluster_at")
    if not _fractions(cfg):  # else with_length knows
        _require_order(cfg)
    if cfg.max_steps is not None:
        _require_all_stages(cfg, cfg.max_steps, f"--max-steps {cfg.max_steps}")


def _fractions(cfg: Any) -> dict[str, float]:
    """Lengths of stages that are still fractions of the run."""
    lengths = {name: getattr(cfg, name) for name in ("warmup_steps", "transition_steps")}
    return {name: value for name, value in lengths.items() if isinstance(value, float)}


def with_whole_stages(cfg: Any, steps: int) -> Any:
    """cfg with fractions as lengths of stages replaced by the steps that they are of so many, at least one."""
    return replace(cfg, **{name: max(1, round(share * steps)) for name, share in _fractions(cfg).items()})


def _require_order(cfg: CurriculumConfig) -> None:
    if cfg.adaptive_warmup_patience and cfg.adaptive_warmup_min_steps > cfg.warmup_steps:
        raise ValueError(f"--adaptive-warmup-min-steps {cfg.adaptive_warmup_min_steps} is beyond --warmup-steps "
                         f"{cfg.warmup_steps}, the latest end")
    for step in cfg.recluster_at:
        if step <= cfg.warmup_steps:
            raise ValueError(f"--recluster-at {step} is not after --warmup-steps {cfg.warmup_steps}, where the first "
                             "k-means is; before it there are no codes")


def with_length(cfg: Any, samples: int) -> Any:
    """cfg with max_steps decided: of --epochs over so many training samples, and at most up to what --stop-after says;
    stages that are fractions of it become steps.

    ValueError: the run ends before stage 3, which nobody said.
    """
    planned = with_max_steps(cfg, samples)
    shares = _fractions(planned)
    cfg = planned = with_whole_stages(planned, planned.max_steps)
    if shares:
        distributed.print0(", ".join(f"{flag_name(name)} {share} of {planned.max_steps} steps: {getattr(planned, name)}"
                                     for name, share in shares.items()))
        _require_order(planned)
    if cfg.stop_after:
        ends = {"warmup": cfg.warmup_steps, "transition": cfg.warmup_steps + cfg.transition_steps}
        return replace(planned, max_steps=min(planned.max_steps, ends[cfg.stop_after]))
    length = f"--max-steps {cfg.max_steps}" if cfg.epochs is None else f"--epochs {cfg.epochs} of {samples} samples"
    _require_all_stages(cfg, planned.max_steps, length)
    if planned.max_steps < cfg.warmup_steps + cfg.transition_steps:
        distributed.print0(f"note: these {planned.max_steps} steps reach stage 3 only if the adaptive warm-up ends "
                           f"before step {planned.max_steps - cfg.transition_steps}")
    return planned


def _require_all_stages(cfg: Any, steps: int, what: str) -> None:
    warmup, transition = cfg.warmup_steps, cfg.transition_steps
    if cfg.adaptive_warmup_patience:  # it may end early
        warmup = min(warmup, max(1, cfg.adaptive_warmup_min_steps))
    least = warmup + max(transition, 1)  # the codebook starts with the first step after the warm-up
    late = [step for step in cfg.recluster_at if step >= steps]
    if late and cfg.stop_after is None:
        raise ValueError(f"--recluster-at {late[0]} never comes, {what}: the run ends after {steps} steps")
    if cfg.recluster and cfg.stop_after is None and warmup + transition >= steps >= least:
        raise ValueError(f"--recluster comes after step {warmup + transition}, {what}: the run ends there; give one "
                         "more step, or leave --recluster out")
    if cfg.stop_after is None and steps < least:
        stage = "warmup" if steps <= warmup else "transition"
        raise ValueError(f"{what}: the run would end after {steps} steps, before stage 3, with no discrete tokenizer. "
                         f"Give at least {least} steps (--warmup-steps {warmup} + --transition-steps {transition}), "
                         f"shorten these, or say --stop-after {stage}")


def with_codes_kept(cfg: Any) -> Any:
    """cfg of a command line: --init-from without a warm-up keeps the codes, unless --codebook-init says otherwise.

    Its path becomes absolute, as a run records it.
    """
    if cfg.init_from is None:
        return cfg
    keep = cfg.codebook_init == "auto" and not cfg.warmup_steps
    return replace(cfg, init_from=os.path.abspath(os.path.expanduser(cfg.init_from)),
                   codebook_init="none" if keep else cfg.codebook_init)


def build_curriculum(cfg: CurriculumConfig) -> tuple[Curriculum, AdaptiveWarmup | None]:
    """What the settings say, as ProVQ takes it."""
    adaptive = None
    if cfg.adaptive_warmup_patience:
        adaptive = AdaptiveWarmup(cfg.adaptive_warmup_patience, cfg.adaptive_warmup_min_steps)
    return Curriculum(cfg.warmup_steps, cfg.transition_steps, cfg.transition, cfg.loss_lambda), adaptive


def codebook_init(cfg: CurriculumConfig) -> str:
    """--codebook-init, or what its "auto" stands for."""
    if cfg.codebook_init != "auto":
        return cfg.codebook_init
    if cfg.quantizer in GRIDS:
        return "none"
    return "kmeans" if cfg.warmup_steps else "latents" if cfg.quantizer == "aminoaseed" else "none"


def kmeans_batches(cfg: Any, tokens_per_batch: int) -> int:
    """Global batches whose latents are clustered: --kmeans-batches, or what its 0 stands for; 0: k-means never comes.

    ValueError: they hold fewer latents than there are codes.
    """
    if codebook_init(cfg) == "none" and not (cfg.recluster or cfg.recluster_at):
        return 0

    def batches(latents: int) -> int:
        return -(-latents // tokens_per_batch)  # rounded up

    count = cfg.kmeans_batches or max(batches(cfg.codebook_size), min(16, batches(32 * cfg.codebook_size)))
    if count * tokens_per_batch < cfg.codebook_size:
        raise ValueError(f"the codebook would start from {count * tokens_per_batch} latents for --codebook-size "
                         f"{cfg.codebook_size}: raise --kmeans-batches {cfg.kmeans_batches}, or use fewer codes")
    return count


class CurriculumTrainer(ABC):
    """A trainer that moves `raw.quantize`, a ProVQ, along the curriculum.

    A subclass's __init__ sets the attributes below and its `train` is the loop; it provides the abstract methods.
    """

    best_metric: ClassVar[str]     # of a validation: best.pt has the best of all discrete models
    higher_is_better: ClassVar[bool]
    warmup_metric: ClassVar[str]   # an error: an adaptive warm-up ends when it no longer falls
    shown: ClassVar[tuple[str, ...]]  # what the console shows of a validation

    cfg: Any
    run: Run
    device: torch.device
    raw: Any                          # the bare model
    optimizer: torch.optim.Optimizer  # has the codebook
    ema: EMA | None
    drift: PaceMeter
    restart: DeadCodeRestart | None   # see build_restart
    kmeans_batches: int               # see the function of this name

    # ------------------------------------------------------------------------------------- what a subclass provides

    @abstractmethod
    def batches(self, start: int, end: int) -> Iterator[Any]:
        """This rank's micro-batches of steps [start, end), cfg.gradient_accumulation_steps of them per step."""

    @abstractmethod
    def evaluate(self, model: Any) -> dict[str, Any]:
        """Collective. Metrics of a model on the validation samples."""

    @abstractmethod
    def latents(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Of a training batch: tokens (N, D) in the order of the samples, and tokens per sample (B,) int64, CPU."""

    @abstractmethod
    def probe(self, model: Any) -> Tensor:
        """Latents (N, D) of a few fixed validation samples, equal on all ranks. The model is in eval mode."""

    @abstractmethod
    def count_codes(self, model: Any) -> Tensor:
        """Collective. How often the validation samples look up each code, (K,) int64. The model is in eval mode."""

    @abstractmethod
    def save_examples(self, model: Any, stem: str) -> None:
        """Reconstructions of a few validation samples as files named by the stem. Rank 0; the model is in eval mode."""

    # ------------------------------------------------------------------------------------------ around the quantizer

    def begin_from(self, path: str, other: Any) -> None:
        """Take the weights of `other`, stored at path, see --init-from. For a run that nothing was resumed for.

        ValueError: they do not fit, each setting or tensor named.
        """
        keep = codebook_init(self.cfg) == "none"
        load_tokenizer_weights(self.raw, other, path, keep_codes=keep)
        if self.ema:
            self.ema.copy_(self.raw)
        distributed.print0(f"--init-from {path}: its weights, {'with' if keep else 'without'} its codes")

    @property
    def quantize(self) -> ProVQ:
        quantize: ProVQ = self.raw.quantize
        return quantize

    def evaluated(self) -> Any:
        """The model that is validated and exported: the average, if there is one."""
        return self.ema.module if self.ema else self.raw

    def autocast(self) -> torch.autocast:
        return autocast(self.device, self.cfg.mixed_precision)

    def position(self) -> dict[str, Any]:
        """Where on the curriculum the step about to be done is: entries of its log row."""
        return {"stage": self.quantize.stage, "alpha": self.quantize.alpha, "omega": self.quantize.omega}

    def start_codebook(self, step: int) -> None:
        """Once: set the codes to k-means centroids of the latents of the batches that come next (section 4.1).

        When the warm-up has ended; without one before the first step, if --codebook-init says so. Else does nothing,
        but where --recluster and --recluster-at, which are not in the paper, say so: k-means again.
        """
        cfg, quantize, init = self.cfg, self.quantize, codebook_init(self.cfg)
        from_start = init != "none" and step == 0 and quantize.stage > 1  # without a warm-up
        if quantize.needs_init or from_start:
            self._set_codes(step, quantize.init_codebook, init, "initialised")
        elif step in cfg.recluster_at or (cfg.recluster and step == self._transition_end()):
            self._set_codes(step, quantize.recluster, "kmeans", "reclustered")

    def _transition_end(self) -> int:
        curriculum = self.quantize.curriculum  # the one in force: an adaptive warm-up may have ended early
        return curriculum.warmup_steps + curriculum.transition_steps

    def _set_codes(self, step: int, place: Callable[..., dict[str, float]], init: str, what: str) -> None:
        cfg, quantize = self.cfg, self.quantize
        with self.run.metrics.untimed():
            latents, order = self._collect_latents(step) if init != "none" else (None, None)
            iters, start = (cfg.kmeans_iters, cfg.kmeans_start) if init == "kmeans" else (0, "random")
            try:
                info = place(latents, iters=iters, start=start, seed=cfg.global_seed, order=order,
                             optimizers=[self.optimizer])
            except ValueError as error:  # of latents, such as those of a collapsed encoder: flags were looked at before
                raise CannotContinue(f"step {step}: {error}; lower --lr (it is {cfg.lr}), or mend the data, in another "
                                     "--results-dir") from error
            self.drift.start(self._probed(), quantize.codebook())
            if self.ema:
                self.ema.copy_(self.raw, "quantize.")  # an average with codes from before k-means would mean nothing
            distributed.print0(f"codebook {what} at step {step}: {info or 'kept as it was'}")
            self.save_boundary(step, f"codebook_{what}", quantize.stage)

    @torch.no_grad()
    def _collect_latents(self, step: int) -> tuple[Tensor, Tensor]:
        """Latents (N_rank, D) of the next batches and the place of each among all ranks' (see provq.kmeans).

        How many of a batch's tokens are masked, nobody knows before: further batches follow while latents are too few.
        """
        rank, world, codes = distributed.rank(), distributed.world_size(), self.quantize.num_codes
        latents: list[Tensor] = []
        rows: list[Tensor] = []
        counts: list[Tensor] = []
        done, end, found = 0, self.kmeans_batches, 0
        self.raw.eval()
        while done < end:
            for batch in self.batches(step + done, step + end):
                with self.autocast():
                    tokens, lengths = self.latents(batch)
                # Micro-batch m of rank r holds rows [(m W + r) b, +b) of its global batch (StepSampler).
                rows.append(torch.arange(len(lengths)) + (len(rows) * world + rank) * self.run.micro_batch())
                latents.append(tokens.float())
                counts.append(lengths)
            done = end
            found = int(distributed.all_reduce_(torch.tensor(sum(map(len, latents)), device=self.device)))
            if found < codes:
                end = min(2 * done, MORE_BATCHES * self.kmeans_batches)
        if done > self.kmeans_batches:
            distributed.print0(f"note: the codebook starts from {found} latents of {done} batches; "
                               f"{self.kmeans_batches} held too few for {codes} codes")
        self.raw.train()
        if distributed.any_rank(not all(bool(tokens.isfinite().all()) for tokens in latents)):
            raise FloatingPointError(f"latents are not finite at step {step}: the run has diverged")
        mine, lengths = torch.cat(rows), torch.cat(counts)
        sizes = torch.zeros(done * self.cfg.global_batch_size, dtype=torch.int64)  # tokens of each sample
        sizes[mine] = lengths
        sizes = distributed.all_reduce_(sizes.to(self.device)).cpu()
        starts = (sizes.cumsum(0) - sizes)[mine]
        within = torch.arange(int(lengths.sum())) - (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        return torch.cat(latents), (starts.repeat_interleave(lengths) + within).to(self.device)

    def finish_step(self, step: int) -> None:
        """Collective, when the optimizer has done its step: set_step(step + 1), and what follows the weights and codes.

        With --codebook-restart-below dead codes restart. The average moves after the codes of an ema quantizer.
        """
        quantize = self.quantize
        if self.restart:
            average: Any = self.ema.module if self.ema and self.restart.due else None
            self.restart.step([self.optimizer], [] if average is None else [average.quantize.quantizer])
        placed = getattr(quantize.quantizer, "placed", False)
        quantize.set_step(step + 1)
        if self.ema:
            self.ema.update(self.raw, step + 1)
            if placed:
                self.ema.copy_(self.raw, "quantize.")  # following codes: their table has other units from here on

    # --------------------------------------------------------------------------------------------- between steps

    def with_pace(self, step: int, usage: dict[str, float | None]) -> dict[str, float | None]:
        """Of a log row: usage (see code_usage) and, once there are codes, entries of PaceMeter.row.

        Once in a run it says in a line what to do against codes that fall behind.
        """
        cfg, quantize = self.cfg, self.quantize
        if not quantize.has_codebook:
            return usage
        with self.run.untimed():
            pace = self.drift.row(self._probed(), quantize.codebook())
        # The last row may be of fewer steps, and then of fewer codes.
        moves, used = cfg.quantizer not in GRIDS and step % cfg.log_every == 0, usage["usage"]
        why = self.drift.behind(pace, used) if moves and used is not None else None
        if why:
            distributed.print0(f"advice: step {step}: {why}. Codes that keep pace: {pace_flag(cfg)}, in another "
                               "--results-dir (tokenizer/README.md, Codes that keep pace; not in the paper)")
        return usage | pace

    @torch.no_grad()
    def _probed(self) -> Tensor:
        """Latents of `probe`, of the model that is trained, as they are compared with codes."""
        with torch.random.fork_rng(devices=[]):  # loaders draw
            return self.quantize.quantizer.latent(self._in_eval_mode(self.raw, self.probe))

    def validate(self) -> None:
        """Collective. One row of validation.jsonl; reports to the adaptive warm-up, keeps the best discrete model."""
        run, model = self.run, self.evaluated()
        result = self.evaluate(model)
        result |= self.drift.update(code=self.quantize.codebook(), latent=self._in_eval_mode(model, self.probe))
        run.record(result, shown=self.shown, stage=self.quantize.stage)
        if self.quantize.adaptive and self.quantize.stage == 1 and self.quantize.observe(result[self.warmup_metric]):
            patience = self.cfg.adaptive_warmup_patience
            distributed.print0(f"warm-up ends at step {run.done}: no lower error in {patience} validations")
        if self.quantize.has_codebook:  # a continuous autoencoder always reconstructs better: it does not compete
            run.keep_best(result[self.best_metric], higher_is_better=self.higher_is_better)

    def save_stage_end(self, stage: int) -> None:
        """Collective. What `stage`, that of the step just done, leaves behind, if it ended with that step."""
        done, now = self.run.done, self.quantize.stage
        if now != stage:
            self.save_boundary(done, f"stage{stage}_end", stage)
        if done == self.cfg.max_steps:
            self.save_boundary(done, f"stage{now}_final", now)

    @torch.no_grad()
    def save_boundary(self, step: int, name: str, stage: int) -> None:
        """Collective. The examples and RUN/latents/STEP_name.npz."""
        model = self.evaluated()
        stem = f"{step:07d}_{name}"
        # The model in eval mode draws nothing, but loaders do: looking must not change the training.
        with torch.random.fork_rng(devices=[]):
            counts = self._in_eval_mode(model, self.count_codes) if model.quantize.has_codebook else None
            if counts is not None:
                self.run.metrics.show_histogram(step, "uses_of_a_code", counts)
            if distributed.is_main():
                self._in_eval_mode(model, lambda m: self.save_examples(m, stem))
                save_snapshot(self.run.folder / "latents" / f"{stem}.npz", model.quantize,
                              self._in_eval_mode(model, self.probe), counts, step=step, stage=stage)

    @torch.no_grad()
    def _in_eval_mode(self, model: Any, look: Callable[[Any], Any]) -> Any:
        was_training = model.training
        model.eval()
        result = look(model)
        model.train(was_training)
        return result

    def summary(self) -> dict[str, Any]:
        """Entries of summary.json."""
        return {
            "stage": self.quantize.stage,
            "warmup_steps": self.quantize.curriculum.warmup_steps,  # where an adaptive warm-up ended
            "parameters": sum(p.numel() for p in self.raw.parameters()),
            f"best_{self.best_metric}": self.run.best,
        }


def pace_flag(cfg: QuantizerConfig) -> str:
    """The next thing to try against codes that fall behind, as a flag with its value. cfg: a CurriculumConfig."""
    assert isinstance(cfg, CurriculumConfig)
    if cfg.quantizer == "ema" and cfg.codebook_ema_decay > 0.9:
        return "--codebook-ema-decay 0.9"
    if cfg.quantizer != "ema" and cfg.codebook_lr_scale < 10:
        return "--codebook-lr-scale 10"
    if cfg.transition_steps and not cfg.recluster:
        return "--recluster"
    return f"--recluster-at {cfg.warmup_steps + cfg.transition_steps + max(1, cfg.transition_steps)}"


def code_usage(row: dict[str, Any]) -> dict[str, float | None]:
    """usage and perplexity of the codes looked up since the last log row, by all ranks; None in stage 1: none are."""
    counts = row["code_counts"]
    return dict(code_statistics(counts)) if counts.any() else {"usage": None, "perplexity": None}
