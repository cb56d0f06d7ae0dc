"""The loop that every training run of this project goes through: steps, logs, validation, checkpoints, exact resume.

A run is a subclass of TrainingRun that says what one step is. The number of steps done is the only hidden state of the
loop: data order, augmentation and random numbers are functions of it (see seeding.py), so a run that continues from a
checkpoint repeats what an uninterrupted one would have done.
"""

import json
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tokenizer.runtime import config, distributed
from tokenizer.runtime.checkpoint import Checkpointer, atomic_write_text, load_file, require_writable
from tokenizer.runtime.command import CannotContinue
from tokenizer.runtime.config import arg
from tokenizer.runtime.metrics import JsonlFile, MetricLogger
from tokenizer.runtime.seeding import StepSampler, seed_step

DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of --mixed-precision


@dataclass(frozen=True)
class RunConfig:
    """Settings that every run has. A run's own settings subclass it, and may give a field another default."""

    # run
    results_dir: str = arg("", "the run's folder, resumed if it holds a run; empty: a folder in runs/, named by what "
                               "is trained")
    global_seed: int = arg(0, "seed of weights, data order, and all that is drawn")
    device: str = arg("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    log_every: int = arg(100, "steps between rows of metrics.jsonl")
    ckpt_every: int = arg(5000, "steps between checkpoints")
    val_every: int = arg(5000, "steps between validations")
    keep_checkpoints: int = arg(2, "numbered checkpoints that stay on disk, besides best.pt")
    dry_run: bool = arg(False, "check everything, print the configuration, stop")
    max_steps: int | None = arg(None, "optimizer steps; excludes --epochs")
    epochs: int | None = arg(None, "passes over the training data; excludes --max-steps")
    gradient_accumulation_steps: int = arg(1, "micro-batches that a global batch is computed in")
    max_grad_norm: float = arg(1.0, "clip the gradient norm of a network; 0: off; LlamaGen, StructTokenBench: 1")
    ema: bool = arg(False, "keep, validate and export an exponential moving average of the weights; LlamaGen: no")
    ema_decay: float = arg(0.9999, "decay of that average per step; LlamaGen: 0.9999")


# What may differ when a run is resumed: its length, its cadence, its machine. Else it would be another experiment.
RESUMABLE_RUN = frozenset({"results_dir", "device", "log_every", "ckpt_every", "val_every", "keep_checkpoints",
                           "dry_run", "max_steps", "epochs", "gradient_accumulation_steps"})


def check_run(cfg: Any, world_size: int) -> None:
    """Raise ValueError, naming flag, value and fix, for settings of RunConfig that cannot work, and for a
    global_batch_size that does not split evenly.
    """
    config.require_at_least(cfg, 1, "log_every ckpt_every val_every keep_checkpoints gradient_accumulation_steps "
                            "max_steps epochs global_batch_size")
    config.require_at_least(cfg, 0, "global_seed max_grad_norm")
    config.require_fraction(cfg, "ema_decay")
    if (cfg.max_steps is None) == (cfg.epochs is None):
        raise ValueError(f"give one of --max-steps and --epochs; got {cfg.max_steps} and {cfg.epochs}")
    if Path(cfg.results_dir).exists() and not Path(cfg.results_dir).is_dir():
        raise ValueError(f"--results-dir {cfg.results_dir} is a file; name a folder")
    if distributed.is_main():  # the one that writes
        require_writable(cfg.results_dir, "--results-dir")
    parts = world_size * cfg.gradient_accumulation_steps
    if cfg.global_batch_size % parts:
        raise ValueError(f"--global-batch-size {cfg.global_batch_size} must be a multiple of {parts}: {world_size} "
                         f"processes x --gradient-accumulation-steps {cfg.gradient_accumulation_steps}")


def check_optimizer(cfg: Any) -> None:
    """ValueError, naming flag, value and fix, for settings of `build_adamw` and `learning_rate` that cannot work."""
    config.require_at_least(cfg, 0, "lr_warmup_steps min_lr weight_decay")
    config.require_fraction(cfg, "beta1 beta2")
    if cfg.lr <= 0 or cfg.min_lr > cfg.lr:
        raise ValueError(f"--lr is {cfg.lr} with --min-lr {cfg.min_lr}; lr must be positive and not below min_lr")


def build_adamw(model: nn.Module, cfg: Any) -> torch.optim.AdamW:
    """AdamW with cfg.lr, beta1, beta2; cfg.weight_decay on matrices and embeddings only: not on norms and biases."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)


LR_SCHEDULES = ("constant", "cosine", "linear")


def learning_rate(cfg: Any, step: int) -> float:
    """Of the update that is step number `step`, counted from 0: a pure function, so there is nothing to resume.

    Rises linearly over cfg.lr_warmup_steps, then stays (cfg.lr_schedule "constant"), or falls to cfg.min_lr at
    cfg.max_steps along half a cosine or a line.
    """
    if step < cfg.lr_warmup_steps:
        return float(cfg.lr * (step + 1) / cfg.lr_warmup_steps)
    if cfg.lr_schedule == "constant":
        return float(cfg.lr)
    progress = (step - cfg.lr_warmup_steps) / max(cfg.max_steps - cfg.lr_warmup_steps, 1)
    height = 1 - progress if cfg.lr_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return float(cfg.min_lr + (cfg.lr - cfg.min_lr) * height)


def set_learning_rate(optimizer: torch.optim.Optimizer, cfg: Any, step: int) -> None:
    """`learning_rate` into all groups."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(cfg, step)


class Stateful(Protocol):
    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Any, /) -> object: ...


class TrainingRun(ABC):
    """One run in one folder. A subclass builds its parts in __init__, calls `resume`, and provides the methods below.

    RUN/config.json, metrics.jsonl, validation.jsonl, tensorboard/, checkpoints/ and, at the end, summary.json.

    cfg: a RunConfig, checked, with max_steps decided, that also has global_batch_size and mixed_precision (a key of
        DTYPES). Steps are optimizer updates.
    resumable: names of the settings that may differ when a run is resumed.
    inputs: what the run is fed with, such as fingerprints of data; must not differ either.
    """

    def __init__(
        self, cfg: Any, device: torch.device, *, resumable: frozenset[str], inputs: Mapping[str, Any]
    ) -> None:
        self.cfg: Any = cfg
        self.device = device
        self.run_dir = Path(cfg.results_dir)
        self.checkpoints = Checkpointer(self.run_dir / "checkpoints", keep_last=cfg.keep_checkpoints)
        self.last_validation: dict[str, Any] = {}
        self.start = 0
        self._resumable, self._inputs = resumable, dict(inputs)
        self._resumed_metrics: Mapping[str, Any] | None = None

    # ------------------------------------------------------------------------------------- what a subclass provides

    @abstractmethod
    def stateful(self) -> dict[str, Stateful | None]:
        """Name in the checkpoint -> what saves and loads itself; None for a part that this run does without."""

    @abstractmethod
    def batches(self, start: int, end: int) -> Iterator[Any]:
        """This rank's micro-batches of steps [start, end), cfg.gradient_accumulation_steps of them per step."""

    @abstractmethod
    def train_step(self, batches: Iterator[Any], step: int) -> dict[str, Tensor]:
        """Take the micro-batches of `step` and update the model -> detached values to log."""

    @abstractmethod
    def validate(self, step: int) -> dict[str, Any]:
        """Collective. Validate after `step` steps -> a row of validation.jsonl, without step."""

    def values(self) -> dict[str, Any]:
        """Collective. More state, of tensors and primitives."""
        return {}

    def load_values(self, state: Mapping[str, Any]) -> None:
        """Take back what `values` gave."""

    def before_step(self, step: int) -> None:
        """Not timed; called with the random state of the step."""

    def labels(self) -> dict[str, Any]:
        """Entries of the log row that hold for the step about to be done."""
        return {}

    def after_step(self, done: int) -> None:
        """After the update, when `done` steps are done."""

    def before_flush(self) -> None:
        """Collective. Before a row is written."""

    def derive(self, row: dict[str, Any]) -> Mapping[str, Any]:  # noqa: ARG002
        """More entries of a row, from its reduced entries (see MetricLogger.flush)."""
        return {}

    def after_validation(self, done: int) -> None:
        """Not timed; called after every step, before a checkpoint."""

    def summary(self) -> dict[str, Any]:
        """Collective, at the end: entries of summary.json besides step, seconds and the last validation."""
        return {}

    # ---------------------------------------------------------------------------------------------------- state

    def identity(self) -> dict[str, Any]:
        """What a checkpoint records of the settings."""
        return config.to_dict(self.cfg) | self._inputs

    def state(self, step: int) -> dict[str, Any]:
        """Collective. All that the steps from `step` on depend on."""
        parts = {name: part and part.state_dict() for name, part in self.stateful().items()}
        return {"step": step, **parts, "metrics": self.metrics.state_dict(), "last_validation": self.last_validation,
                **self.values(), "config": self.identity()}

    def resume(self) -> None:
        """Load the newest checkpoint, if there is one, and set `start`. Writes nothing.

        ValueError: the folder holds a run with other settings, one that is further than max_steps, or something else.
        """
        state = self.checkpoints.load_latest()  # on the CPU: there Adam's step counts stay, and cost no device sync
        if state is None:
            if (self.run_dir / "metrics.jsonl").exists() and not (self.run_dir / "config.json").exists():
                raise ValueError(f"--results-dir {self.run_dir} holds the metrics.jsonl of something else; use another")
            self._require_nothing_lost()
            return
        changed = [d for d in config.diff(state["config"], self.identity()) if d[0] not in self._resumable]
        if changed:
            what = "; ".join(f"{name}: {old!r} there, {new!r} now" for name, old, new in changed)
            fix = "Use its settings"
            if all(name in self._inputs for name, _, _ in changed):
                what, fix = f"its data have changed since; {what}", "Restore the data"
            raise ValueError(f"--results-dir {self.run_dir} holds a run with other settings ({what}). {fix} to resume "
                             "it, or use another --results-dir")
        if state["step"] > self.cfg.max_steps:
            raise ValueError(f"--results-dir {self.run_dir} is at step {state['step']}, beyond --max-steps "
                             f"{self.cfg.max_steps}")
        for name, part in self.stateful().items():
            if part is not None:
                part.load_state_dict(state[name])
        self.load_values(state)
        self.start, self.last_validation = state["step"], state["last_validation"]
        self._resumed_metrics = state["metrics"]
        distributed.print0(f"resuming {self.run_dir} at step {self.start}")

    def _require_nothing_lost(self) -> None:
        """ValueError: there is no checkpoint to resume, but the run got further than to where starting over is right.

        A run that was killed before its first checkpoint starts over, and may well have validated by then.
        """
        best = self.checkpoints.folder / "best.pt"
        lost = [self.run_dir / "summary.json"] if (self.run_dir / "summary.json").exists() else []
        if best.exists():
            state = load_file(best)
            changed = {d[0] for d in config.diff(state["config"], self.identity())} - self._resumable
            if changed or state["step"] > state["config"]["ckpt_every"]:
                lost.append(best)
        if lost:
            raise ValueError(f"--results-dir {self.run_dir} holds a run without a numbered checkpoint to resume, and "
                             f"starting over would replace its {' and '.join(path.name for path in lost)}. Use another "
                             "--results-dir, or move this folder away")

    def _open_logs(self) -> None:
        """Rows of steps that will be done again go; sums since the last row come back."""
        self.metrics = MetricLogger(self.run_dir, total_steps=self.cfg.max_steps, device=self.device,
                                    resume_step=self.start)
        self.validations = JsonlFile(self.run_dir / "validation.jsonl", resume_step=self.start)
        if self._resumed_metrics is not None:
            self.metrics.load_state_dict(self._resumed_metrics)
        if distributed.is_main():
            config.save(self.cfg, self.run_dir / "config.json")
            if self.start < self.cfg.max_steps:
                (self.run_dir / "summary.json").unlink(missing_ok=True)  # of a shorter run that is now extended

    # ----------------------------------------------------------------------------------------------------- loop

    def run(self) -> None:
        """Train to max_steps; on SIGTERM save and return early."""
        cfg = self.cfg
        stop = _StopSignal()
        try:
            self._open_logs()
        except (ValueError, OSError) as error:  # a damaged log, a full disk
            raise CannotContinue(str(error)) from error
        batches = self.batches(self.start, cfg.max_steps)
        began = time.monotonic()
        for step in range(self.start, cfg.max_steps):
            seed_step(cfg.global_seed, distributed.rank(), step)  # what is drawn in a step depends on the step alone
            with self.metrics.untimed():
                self.before_step(step)
            labels = self.labels()
            self.metrics.add(self.train_step(batches, step))
            self.metrics.add_samples(cfg.global_batch_size // distributed.world_size())
            done = step + 1
            self.after_step(done)
            if done % cfg.log_every == 0 or done == cfg.max_steps:
                self.before_flush()
                self.metrics.flush(done, labels, derive=self.derive)
            stopping = distributed.any_rank(stop.asked)
            with self.metrics.untimed(), _naming(done):
                if done % cfg.val_every == 0 or done == cfg.max_steps:
                    self.last_validation = self.validate(done)
                self.after_validation(done)
                if done % cfg.ckpt_every == 0 or done == cfg.max_steps or stopping:
                    self.checkpoints.save(done, self.state(done))
            if stopping and done < cfg.max_steps:
                self.metrics.close()
                distributed.print0(f"stopped by a signal at step {done}; the same command resumes")
                return
        self.metrics.close()
        summary = {"step": cfg.max_steps, **self.summary(),
                   "seconds_since_start_or_resume": round(time.monotonic() - began, 1), **self.last_validation}
        if distributed.is_main():
            atomic_write_text(self.run_dir / "summary.json", json.dumps(summary, indent=1) + "\n")
        shown = " ".join(f"{k} {v:.4g}" for k, v in self.last_validation.items() if isinstance(v, (int, float)))
        distributed.print0(f"finished {self.run_dir} at step {cfg.max_steps}: {shown}")

    # ------------------------------------------------------------------------------------------- for subclasses

    def sampler(self, num_samples: int, start: int, end: int) -> StepSampler:
        """This rank's micro-batches of steps [start, end) over a data set, as lists of (epoch, index)."""
        return StepSampler(
            num_samples, self.cfg.global_batch_size, seed=self.cfg.global_seed, start_step=start, end_step=end,
            rank=distributed.rank(), world=distributed.world_size(),
            micro_batches=self.cfg.gradient_accumulation_steps,
        )

    def micro_batch(self) -> int:
        """Samples of one forward on one rank."""
        return int(self.cfg.global_batch_size // (distributed.world_size() * self.cfg.gradient_accumulation_steps))

    def autocast(self) -> torch.autocast:
        """The context of --mixed-precision."""
        return torch.autocast(self.device.type, dtype=DTYPES[self.cfg.mixed_precision],
                              enabled=self.cfg.mixed_precision != "none")

    def update(self, optimizer: torch.optim.Optimizer, module: nn.Module, scaler: torch.amp.GradScaler) -> Tensor:
        """Clip to --max-grad-norm, step, clear -> gradient norm before clipping; 0 for a step that fp16 skips."""
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(module.parameters(), self.cfg.max_grad_norm or math.inf)
        if isinstance(norm, DTensor):  # of sharded parameters
            norm = norm.full_tensor()
        scaler.step(optimizer)
        optimizer.zero_grad(set_to_none=True)
        return torch.where(norm.isfinite(), norm, 0.0) if scaler.is_enabled() else norm


@contextmanager
def _naming(step: int) -> Iterator[None]:
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"step {step}: {error}") from error


@contextmanager
def accumulating(module: nn.Module, more: bool) -> Iterator[None]:
    """Gradients of DDP and FSDP modules are reduced with the last micro-batch only; `more`: this is not the last."""
    if isinstance(module, DistributedDataParallel) and more:
        with module.no_sync():
            yield
    else:
        set_sync = getattr(module, "set_requires_gradient_sync", None)  # fully_shard adds it
        if set_sync is not None:
            set_sync(not more)
        yield


class _StopSignal:
    """SIGTERM (a scheduler's warning, torchrun's shutdown) asks for a checkpoint at the end of the step."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, *_: Any) -> None:
        self.asked = True


def launch(prog: str, build: Callable[[], TrainingRun]) -> None:
    """The main of a training script: build the run, then train, or with --dry-run print its configuration.

    ValueError and OSError while building are mistakes in flags, files or data: rank 0 says so in one line, without a
    traceback, and all ranks exit with a failure. So are CannotContinue and divergence while training.
    """
    try:
        run = build()
    except (ValueError, OSError) as error:
        raise SystemExit(f"{prog}: error: {error}" if distributed.is_main() else 2) from error
    if run.cfg.dry_run:
        distributed.print0(json.dumps(config.to_dict(run.cfg), indent=1))
    else:
        try:
            run.run()
        except CannotContinue as error:
            raise SystemExit(f"{prog}: error: {error}") from error
        except FloatingPointError as error:  # on all ranks at once
            fix = f"lower --lr (it is {run.cfg.lr}), in another --results-dir"
            raise SystemExit(f"{prog}: error: {error}: {fix}" if distributed.is_main() else 2) from error
    distributed.finalize()  # after an exception just exit: torchrun then ends the other ranks
