"""Settings of training runs on the ProVQ curriculum, whatever they tokenize (paper, section 4), and what makes no sense
among them. A tokenizer's settings subclass CurriculumConfig. No torch, see runtime/command.py.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from tokenizer.choices import GRIDS, TRANSITIONS
from tokenizer.quantizer_config import QuantizerConfig, check_quantizer
from tokenizer.runtime import config
from tokenizer.runtime.config import arg, flag_name
from tokenizer.runtime.ranks import print0
from tokenizer.runtime.run_config import EFFECTS_RUN, Effect, RunConfig, check_run, recorded, with_max_steps

CODEBOOK_INITS = ("auto", "kmeans", "latents", "none")
CODE_SEARCHES = ("blocks", "triton", "auto")
INIT_FROM = ("weights to begin with, of a run, an export or {}: under a new optimizer, from step 0; codes stay where "
             "nothing places them; none: drawn by --global-seed")


@dataclass(frozen=True)
class CurriculumConfig(QuantizerConfig, RunConfig):
    """Settings of run, quantizer and curriculum; defaults are the paper's for ImageNet."""

    warmup_steps: int = arg(50_000, "stage 1, plain autoencoder, in optimizer steps, or a fraction of all steps such "
                                    "as 0.25; paper: 50000", fraction=True)
    transition_steps: int = arg(20_000, "stage 2, soft transition, likewise; paper: 20000", fraction=True)
    transition: str = arg("cosine", "schedule of alpha in stage 2; paper: cosine", choices=TRANSITIONS)
    loss_lambda: float = arg(0.5, "weight of the quantization loss when stage 2 begins, lambda; paper: 0.5")
    stop_after: str | None = arg(None, "stage that the run ends with, without a discrete tokenizer, on the schedules "
                                       "of the whole; none: it reaches stage 3, or is refused",
                                 choices=("warmup", "transition"))
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
    code_search: str = arg("blocks", "nearest codes on a GPU: blocks of distances, or triton, one kernel, which no GPU "
                                     "has timed yet; auto: triton from 65536 codes on", choices=CODE_SEARCHES)


def _reclusters(cfg: CurriculumConfig) -> bool:
    return cfg.recluster or bool(cfg.recluster_at)


_TRANSITION = "with --transition-steps 0", "give the transition steps"
_KMEANS = "without k-means", "give --warmup-steps, --codebook-init kmeans or --recluster-at"
EFFECTS_CURRICULUM = EFFECTS_RUN | {  # see run_config.py
    "transition": Effect(lambda cfg: cfg.transition_steps, *_TRANSITION),
    "loss_lambda": Effect(lambda cfg: cfg.transition_steps or cfg.loss_lambda == 1, *_TRANSITION),  # stage 3 has 1
    "kmeans_batches": Effect(lambda cfg: codebook_init(cfg) != "none" or _reclusters(cfg), *_KMEANS),
    "kmeans_iters": Effect(lambda cfg: codebook_init(cfg) == "kmeans" or _reclusters(cfg), *_KMEANS),
    "kmeans_start": Effect(lambda cfg: codebook_init(cfg) == "kmeans" or _reclusters(cfg), *_KMEANS),
}


def check_curriculum(cfg: CurriculumConfig, world_size: int) -> None:
    """Raise ValueError, naming flag, value and fix, for settings of CurriculumConfig that cannot work."""
    check_run(cfg, world_size)
    check_quantizer(cfg, flags=True)
    shares = _fractions(cfg)
    if len(shares) == 2 and sum(shares.values()) > 1:
        raise ValueError(" and ".join(f"{flag_name(name)} {share}" for name, share in shares.items())
                         + " of the run are more than all of it; give fractions of at most 1 together")
    if cfg.max_steps is not None:
        cfg = with_whole_stages(cfg, cfg.max_steps)
    if cfg.quantizer in GRIDS:
        for flag, asked in (("--codebook-init", codebook_init(cfg) != "none"), ("--recluster", cfg.recluster),
                            ("--recluster-at", bool(cfg.recluster_at)),
                            ("--codebook-lr-scale", cfg.codebook_lr_scale != 1),
                            ("--code-search", cfg.code_search != "blocks")):
            if asked:
                raise ValueError(f"{flag}: the codes of --quantizer {cfg.quantizer} lie on a fixed grid, which nothing "
                                 "places, trains or searches; leave it out")
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
    if len(set(cfg.recluster_at)) < len(cfg.recluster_at):
        raise ValueError(f"--recluster-at {' '.join(map(str, cfg.recluster_at))} names a step twice")
    if not _fractions(cfg):  # else with_length knows
        _require_order(cfg)
    if not isinstance(cfg.warmup_steps, float):  # likewise
        require_early_end(cfg)
    if cfg.max_steps is not None:
        _require_all_stages(cfg, cfg.max_steps, f"--max-steps {cfg.max_steps}", rounded=bool(shares))


def _fractions(cfg: Any) -> dict[str, float]:
    """Lengths of stages that are still fractions of the run."""
    lengths = {name: getattr(cfg, name) for name in ("warmup_steps", "transition_steps")}
    return {name: value for name, value in lengths.items() if isinstance(value, float)}


def with_whole_stages(cfg: Any, steps: int) -> Any:
    """cfg with fractions as lengths of stages replaced by the steps that they are of so many, at least one."""
    return replace(cfg, **{name: max(1, round(share * steps)) for name, share in _fractions(cfg).items()})


def require_early_end(cfg: CurriculumConfig, *, to_come: bool = False) -> None:
    """ValueError: no validation could end the warm-up early, which --adaptive-warmup-patience asks for.

    to_come: the warm-up is known not to be over. Else that of a run to resume may be, which its checkpoint says.
    """
    patience, every, warmup = cfg.adaptive_warmup_patience, cfg.val_every, cfg.warmup_steps
    if not patience:
        return
    if not warmup:
        raise ValueError(f"--adaptive-warmup-patience {patience}: there is no warm-up to end early with "
                         "--warmup-steps 0; give the most steps that it may take, or leave it out")

    def first(every: int) -> int:  # step of the first that may: one sets the error that `patience` do not lower
        return every * max(patience + 1, -(-cfg.adaptive_warmup_min_steps // every))

    if first(every) < warmup:
        return
    names = ["adaptive_warmup_patience", "adaptive_warmup_min_steps", "warmup_steps", *["val_every"] * to_come]
    if all(recorded(cfg).get(name) == getattr(cfg, name) for name in names):
        return
    often = (warmup - 1) // (patience + 1)
    fix = f"give --val-every {often} or less" if often and first(often) < warmup else "lengthen the warm-up"
    raise ValueError(f"--adaptive-warmup-patience {patience} could never end the warm-up early: with --val-every "
                     f"{every} the first validation that may is after step {first(every)}, and --warmup-steps is "
                     f"{warmup}; {fix}, or leave it out")


def _require_order(cfg: CurriculumConfig) -> None:
    if cfg.adaptive_warmup_patience and cfg.adaptive_warmup_min_steps > cfg.warmup_steps:
        raise ValueError(f"--adaptive-warmup-min-steps {cfg.adaptive_warmup_min_steps} is beyond --warmup-steps "
                         f"{cfg.warmup_steps}, the latest end")
    for step in cfg.recluster_at:
        if step <= cfg.warmup_steps:
            raise ValueError(f"--recluster-at {step} is not after --warmup-steps {cfg.warmup_steps}, where the first "
                             "k-means is; before it there are no codes")
    end = cfg.warmup_steps + cfg.transition_steps
    if cfg.recluster and end in cfg.recluster_at and not cfg.adaptive_warmup_patience:
        raise ValueError(f"--recluster-at {end} is the end of the transition, where --recluster is; leave one of them "
                         "out")


def with_length(cfg: Any, samples: int) -> Any:
    """cfg with max_steps decided, of --epochs over so many training samples; stages that are fractions of it become
    steps. It is the planned length, also with --stop-after (see last_step): learning rates are functions of it.

    ValueError: the run ends before stage 3, which nobody said.
    """
    planned = with_max_steps(cfg, samples)
    shares = _fractions(planned)
    cfg = planned = with_whole_stages(planned, planned.max_steps)
    if shares:
        print0(", ".join(f"{flag_name(name)} {share} of {planned.max_steps} steps: {getattr(planned, name)}"
                                     for name, share in shares.items()))
        _require_order(planned)
        require_early_end(planned)
    if cfg.stop_after:
        return planned
    length = f"--max-steps {cfg.max_steps}" if cfg.epochs is None else f"--epochs {cfg.epochs} of {samples} samples"
    _require_all_stages(planned, planned.max_steps, length, rounded=bool(shares))
    if planned.max_steps < cfg.warmup_steps + cfg.transition_steps:
        print0(f"note: these {planned.max_steps} steps reach stage 3 only if the adaptive warm-up ends "
                           f"before step {planned.max_steps - cfg.transition_steps}")
    return planned


def last_step(cfg: Any) -> int:
    """Steps that are done when the run ends: max_steps, or fewer if --stop-after says so. cfg: of with_length."""
    ends = {"warmup": cfg.warmup_steps, "transition": cfg.warmup_steps + cfg.transition_steps}
    return int(min(cfg.max_steps, ends[cfg.stop_after])) if cfg.stop_after else int(cfg.max_steps)


def _require_all_stages(cfg: Any, steps: int, what: str, rounded: bool = False) -> None:
    """rounded: lengths were fractions of these steps."""
    warmup, transition = cfg.warmup_steps, cfg.transition_steps
    if cfg.adaptive_warmup_patience:  # it may end early
        warmup = min(warmup, max(1, cfg.adaptive_warmup_min_steps))
    least = warmup + max(transition, 1)  # the codebook starts with the first step after the warm-up
    late = [step for step in cfg.recluster_at if step >= steps]
    if late and cfg.stop_after is None:
        raise ValueError(f"--recluster-at {late[0]} never comes, {what}: the run ends after {steps} steps")
    if cfg.recluster and cfg.stop_after is None and warmup + transition >= steps >= least:
        fix = "give shorter stages" if rounded else "give one more step"
        raise ValueError(f"--recluster comes after step {warmup + transition}, {what}: the run ends there; {fix}, or "
                         "leave --recluster out")
    if cfg.stop_after is None and steps < least:
        stage = "warmup" if steps <= warmup else "transition"
        lengths = f"--warmup-steps {warmup} + --transition-steps {transition}"
        fix = (f"Rounded, these are {lengths}: give more steps, shorter stages" if rounded else
               f"Give at least {least} steps ({lengths}), shorten these (fractions such as 0.25 will do)")
        raise ValueError(f"{what}: the run would end after {steps} steps, before stage 3, with no discrete tokenizer. "
                         f"{fix}, or say --stop-after {stage}")


def with_codes_kept(cfg: Any) -> Any:
    """cfg of a command line: --init-from without a warm-up keeps the codes, unless --codebook-init says otherwise.

    Its path becomes absolute, as a run records it.
    """
    if cfg.init_from is None:
        return cfg
    keep = cfg.codebook_init == "auto" and not cfg.warmup_steps
    return replace(cfg, init_from=os.path.abspath(os.path.expanduser(cfg.init_from)),
                   codebook_init="none" if keep else cfg.codebook_init)


def pace_flag(cfg: Any) -> str | None:
    """The next thing to try against codes that fall behind, as a flag with its value, which a run of these settings
    takes; None: a grid's codes do not move. cfg: a trainer's, its length decided."""
    if cfg.quantizer in GRIDS:
        return None
    if cfg.quantizer == "ema" and cfg.codebook_ema_decay > 0.9:
        return "--codebook-ema-decay 0.9"
    if cfg.quantizer != "ema" and cfg.codebook_lr_scale < 10:
        return "--codebook-lr-scale 10"
    end, last = cfg.warmup_steps + cfg.transition_steps, last_step(cfg)
    if cfg.transition_steps and not cfg.recluster and end < last and end not in cfg.recluster_at:
        return "--recluster"
    later = min(end + (cfg.transition_steps or cfg.warmup_steps or last // 3), (end + last) // 2)
    if end < later and later not in cfg.recluster_at:
        return f"--recluster-at {later}"
    return f"--lr {cfg.lr / 2:g}"


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
    if codebook_init(cfg) == "none" and not _reclusters(cfg):
        return 0

    def batches(latents: int) -> int:
        return -(-latents // tokens_per_batch)  # rounded up

    count = cfg.kmeans_batches or max(batches(cfg.codebook_size), min(16, batches(32 * cfg.codebook_size)))
    if count * tokens_per_batch < cfg.codebook_size:
        raise ValueError(f"the codebook would start from {count * tokens_per_batch} latents for --codebook-size "
                         f"{cfg.codebook_size}: raise --kmeans-batches {cfg.kmeans_batches}, or use fewer codes")
    return count
