"""What training runs on the ProVQ curriculum share, whatever they tokenize (paper, section 4): the start of the
codebook, and what is looked at between steps. Their settings are in curriculum_config.py.

A tokenizer's trainer subclasses CurriculumTrainer and its settings subclass CurriculumConfig.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from tokenizer import provq
from tokenizer.choices import GRIDS
from tokenizer.code_meter import PaceMeter
from tokenizer.curriculum_config import CurriculumConfig, codebook_init, pace_flag, require_early_end
from tokenizer.init_from import load_tokenizer_weights
from tokenizer.provq import AdaptiveWarmup, Curriculum, ProVQ, code_statistics
from tokenizer.provq_codes import DeadCodeRestart
from tokenizer.runtime import distributed
from tokenizer.runtime.command import CannotContinue
from tokenizer.runtime.ema import EMA
from tokenizer.runtime.optim import autocast
from tokenizer.runtime.run import Run, Stateful
from tokenizer.snapshots import save_snapshot

MORE_BATCHES = 8  # times as many at most, when those for the codebook's start hold fewer latents than codes


def build_curriculum(cfg: CurriculumConfig) -> tuple[Curriculum, AdaptiveWarmup | None]:
    """What the settings say, as ProVQ takes it."""
    adaptive = None
    if cfg.adaptive_warmup_patience:
        adaptive = AdaptiveWarmup(cfg.adaptive_warmup_patience, cfg.adaptive_warmup_min_steps)
    return Curriculum(cfg.warmup_steps, cfg.transition_steps, cfg.transition, cfg.loss_lambda), adaptive


def choose_code_search(how: str, device: torch.device) -> None:
    """Let provq.py search as --code-search says, in this process. ValueError: no GPU or no Triton for it."""
    provq.fused_search = lambda *_: None
    if how == "blocks" or (how == "auto" and device.type != "cuda"):
        return
    try:
        from tokenizer import provq_triton
    except ImportError as error:
        raise ValueError(f"--code-search {how} needs Triton, which cannot be imported ({error}): install it, or use "
                         "--code-search blocks") from error
    if device.type != "cuda":
        raise ValueError(f"--code-search {how} is a kernel for GPUs, and --device is {device.type}; leave it out")
    provq_triton.use_triton_search(*([] if how == "auto" else [1]))


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

    def resume(self, parts: Mapping[str, Stateful | None]) -> None:
        """Run.resume. ValueError also: of a warm-up that is not over, see require_early_end."""
        self.run.resume(parts)
        if self.run.start < self.quantize.curriculum.warmup_steps:  # the one in force
            require_early_end(self.cfg, to_come=True)

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
        pending = any(step <= at for at in (*cfg.recluster_at, *[self._transition_end()] * cfg.recluster))  # the cure
        why = self.drift.behind(pace, used, cfg.log_every) if moves and used is not None and not pending else None
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
        if done == self.run.end:
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


def code_usage(row: dict[str, Any]) -> dict[str, float | None]:
    """usage and perplexity of the codes looked up since the last log row, by all ranks; None in stage 1: none are."""
    counts = row["code_counts"]
    return dict(code_statistics(counts)) if counts.any() else {"usage": None, "perplexity": None}
