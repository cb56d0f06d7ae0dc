"""Settings that every training run has, and what makes no sense among them. No torch: see command.py."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tokenizer.runtime import config
from tokenizer.runtime.config import Given, arg
from tokenizer.runtime.files import require_writable
from tokenizer.runtime.ranks import is_main

LR_SCHEDULES = ("constant", "cosine", "linear")


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
    wandb: str | None = arg(None, "project of Weights & Biases that gets all that TensorBoard does; needs wandb")
    max_steps: int | None = arg(None, "optimizer steps; excludes --epochs")
    epochs: int | None = arg(None, "passes over the training data; excludes --max-steps")
    gradient_accumulation_steps: int = arg(1, "micro-batches that a global batch is computed in")
    max_grad_norm: float = arg(1.0, "clip the gradient norm of a network; 0: off; LlamaGen, StructTokenBench: 1")
    ema: bool = arg(False, "keep, validate and export an exponential moving average of the weights; LlamaGen: no")
    ema_decay: float = arg(0.9999, "decay of that average per step; LlamaGen: 0.9999")
    tf32: bool = arg(True, "on GPUs, float32 convolutions, and matrix products of GPTs and protein models, in TF32; "
                           "distances to codes and geometry stay exact; LlamaGen: yes")


# What may differ when a run is resumed: its length (but see length_sets_rate), its cadence, its machine. Else it would
# be another experiment.
RESUMABLE_RUN = frozenset({"results_dir", "device", "log_every", "ckpt_every", "val_every", "keep_checkpoints",
                           "dry_run", "wandb", "max_steps", "epochs", "gradient_accumulation_steps"})


class Effect(NamedTuple):
    """When a flag has an effect: a row of the table that `require_effects` takes."""

    when: Callable[[Any], Any]  # of a configuration, decided
    why: str                    # not, otherwise: "--flag value has no effect <why>"
    fix: str = ""               # what gives it one, if that is anything else than leaving out what `why` names


# Flags that do nothing unless others say so, of every trainer: field -> Effect. A trainer adds its own; other commands
# have a table of their own. Not among them: what is idle on this machine only (--tf32 on a CPU) or with these data, so
# that one command is for all of them.
EFFECTS_RUN = {
    "ema_decay": Effect(lambda cfg: cfg.ema, "without an average of the weights", "add --ema"),
    "min_lr": Effect(lambda cfg: cfg.lr_schedule != "constant", "with --lr-schedule constant",
                     "give --lr-schedule cosine or linear, which fall to it"),
}


def require_effects(cfg: Any, given: Given, effects: Mapping[str, Effect]) -> None:
    """ValueError, naming flag, value and fix, for what the user said and nothing in cfg would come of.

    Values that would hold unsaid pass; so does what the run in the results_dir of cfg, if it has one, has recorded,
    which an earlier version let begin: the same command resumes it.
    """
    for name, value in given.values.items():
        if name not in effects or value in given.unsaid[name] or effects[name].when(cfg):
            continue
        if not hasattr(cfg, "results_dir") or recorded(cfg).get(name) != value:
            fix = f"{effects[name].fix}, or " if effects[name].fix else ""
            raise ValueError(f"{given.shown(name)} has no effect {effects[name].why}: {fix}leave it out")


def check_run(cfg: Any, world_size: int) -> None:
    """Raise ValueError, naming flag, value and fix, for settings of RunConfig that cannot work, and for a
    global_batch_size that does not split evenly.
    """
    config.require_at_least(cfg, 1, "log_every ckpt_every val_every keep_checkpoints gradient_accumulation_steps "
                            "max_steps epochs global_batch_size")
    config.require_at_least(cfg, 0, "global_seed max_grad_norm")
    config.require_at_most(cfg, 2**20, "gradient_accumulation_steps global_batch_size")
    config.require_fraction(cfg, "ema_decay")
    if cfg.wandb and find_spec("wandb") is None:
        raise ValueError(f"--wandb {cfg.wandb} needs a package: pip install wandb")
    if (cfg.max_steps is None) == (cfg.epochs is None):
        raise ValueError(f"give one of --max-steps and --epochs; got {cfg.max_steps} and {cfg.epochs}")
    if Path(cfg.results_dir).exists() and not Path(cfg.results_dir).is_dir():
        raise ValueError(f"--results-dir {cfg.results_dir} is a file; name a folder")
    if is_main():  # the one that writes
        require_writable(cfg.results_dir, "--results-dir")
    parts = world_size * cfg.gradient_accumulation_steps
    if cfg.global_batch_size % parts:
        raise ValueError(f"--global-batch-size {cfg.global_batch_size} must be a multiple of {parts}: {world_size} "
                         f"processes x --gradient-accumulation-steps {cfg.gradient_accumulation_steps}")


def with_max_steps(cfg: Any, samples: int) -> Any:
    """cfg with max_steps decided, of --epochs over so many training samples if that is what it says."""
    if cfg.max_steps is not None:
        return cfg
    return replace(cfg, max_steps=math.ceil(cfg.epochs * samples / cfg.global_batch_size))


def recorded(cfg: Any) -> dict[str, Any]:
    """Settings of the run that is in the folder of cfg already, by name; empty: none that could be read.

    What would be refused of a new run must not keep one from resuming that an earlier version let begin.
    """
    try:
        return config.load(Path(cfg.results_dir) / "config.json")
    except (ValueError, OSError):  # a damaged one is for what resumes the run to name
        return {}


def length_sets_rate(cfg: Any) -> bool:
    """Whether learning rates are functions of max_steps: a run of another length has others from its first step on."""
    return str(getattr(cfg, "lr_schedule", "constant")) != "constant"


def check_optimizer(cfg: Any) -> None:
    """ValueError, naming flag, value and fix, for settings of `build_adamw` and `learning_rate` that cannot work."""
    config.require_at_least(cfg, 0, "lr_warmup_steps min_lr weight_decay")
    config.require_fraction(cfg, "beta1 beta2")
    config.require_positive(cfg, "lr")
    if length_sets_rate(cfg) and cfg.min_lr > cfg.lr:  # a constant rate falls to none
        raise ValueError(f"--lr is {cfg.lr} with --min-lr {cfg.min_lr}; lr must not be below min_lr")
