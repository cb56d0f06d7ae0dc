"""Settings of autoregressive/train_c2i.py: one field per flag, the presets, and what makes no sense together.

The defaults are LlamaGen's protocol for class-conditional ImageNet, which the paper follows (section 5.1.2).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from autoregressive.gpt_config import GPT_PRESETS
from tokenizer.runtime import config
from tokenizer.runtime.config import arg, flag_name
from tokenizer.runtime.run_config import (
    EFFECTS_RUN,
    RESUMABLE_RUN,
    Effect,
    RunConfig,
    check_optimizer,
    check_run,
    require_effects,
)
from tokenizer.stored import require_code_folder

FSDP_FROM = 700e6  # parameters: GPT-XL and larger are sharded by default


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    # data
    preset: str = arg("auto", "set of defaults; auto: c2i with --code-path, else digits",
                      choices=("auto", "c2i", "digits"))
    code_path: str | None = arg(None, "codes of the training images: a folder of extract_codes.py or LlamaGen's, or "
                                      "several, comma-separated, of the same images (crops drawn from all alike)")
    val_code_path: str | None = arg(None, "codes to validate on; none: --val-size images are held out of --code-path")
    val_size: int = arg(1000, "images held out (at most a tenth), or taken of --val-code-path; 0: all of it")
    codebook_size: int = arg(16384, "of LlamaGen's code folders, which do not record it; LlamaGen: 16384")
    vq_ckpt: str | None = arg(None, "the tokenizer of the codes, to draw samples while training; none: no pictures")
    vq_weights: str = arg("auto", "which of its weights made the codes; auto: the EMA if there is one",
                          choices=("auto", "model", "ema"))
    codebook_l2_norm: bool | None = arg(None, "of a --vq-ckpt of LlamaGen's, which does not record it; none: yes, as "
                                              "there")
    other_tokenizer: bool = arg(False, "go on although the codes are not of the tokenizer --vq-ckpt, or "
                                         "--init-from was trained on those of another")
    num_workers: int = arg(0, "data-loading processes per rank; codes are memory-mapped, 0 is fast enough")
    # pictures
    sample_every: int = arg(5000, "steps between pictures of samples, with --vq-ckpt; 0: none")
    sample_cfg_scale: float = arg(2.0, "guidance of these samples; LlamaGen-B and -L: 2; 1 if "
                                         "--class-dropout-prob is 0")
    # model
    init_from: str | None = arg(None, "weights to begin with, of a run, an export or LlamaGen's: under a new "
                                      "optimizer, from step 0; none: drawn by --global-seed")
    gpt_model: str = arg("GPT-B", "architecture; paper: GPT-B and GPT-L", choices=tuple(GPT_PRESETS))
    class_dropout_prob: float = arg(0.1, "chance to replace the class by none, for guidance; LlamaGen: 0.1")
    dropout_p: float = arg(0.1, "dropout after attention and feed-forward; LlamaGen: 0.1")
    token_dropout_p: float = arg(0.1, "dropout of the embedded tokens; LlamaGen: 0.1")
    drop_path_rate: float = arg(0.0, "stochastic depth, replaces --dropout-p if above 0; LlamaGen: 0")
    # optimization
    global_batch_size: int = arg(256, "images per optimizer step over all ranks; LlamaGen: 256")
    lr: float = arg(1e-4, "learning rate of AdamW; LlamaGen: 1e-4")
    lr_schedule: str = arg("constant", "after the warm-up; LlamaGen: constant",
                           choices=("constant", "cosine", "linear"))
    lr_warmup_steps: int = arg(0, "steps in which the learning rate rises from 0; LlamaGen: 0")
    min_lr: float = arg(0.0, "learning rate at the end of cosine and linear schedules")
    weight_decay: float = arg(0.05, "of matrices and embeddings, not of norms; LlamaGen: 0.05")
    beta1: float = arg(0.9, "AdamW's first moment; LlamaGen: 0.9")
    beta2: float = arg(0.95, "AdamW's second moment; LlamaGen: 0.95")
    mixed_precision: str = arg("bf16", "autocast, or parameters in FSDP; logits and loss float32; LlamaGen: bf16",
                               choices=("none", "bf16", "fp16"))
    compile: bool = arg(True, "torch.compile the transformer; LlamaGen: yes")
    activation_checkpointing: bool = arg(False, "recompute the blocks in the backward pass, to save memory")
    data_parallel: str = arg("auto", "ddp, or fsdp (sharded parameters, gradients, optimizer); auto: fsdp on several "
                                     "processes for GPT-XL and larger", choices=("auto", "ddp", "fsdp"))


PRESETS: dict[str, dict[str, Any]] = {
    "c2i": {"epochs": 300},
    "digits": {
        "code_path": "runs/digits/codes", "vq_ckpt": "runs/digits", "gpt_model": "GPT-tiny", "max_steps": 1000,
        "global_batch_size": 16, "lr": 1e-3, "lr_schedule": "cosine", "lr_warmup_steps": 50, "val_size": 150,
        "log_every": 100, "val_every": 250, "ckpt_every": 250, "sample_every": 500, "mixed_precision": "none",
        "compile": False,
    },
}
# What may differ when a run is resumed: its length, its cadence, its machine. Data and tokenizer may move: what they
# hold is compared, not where.
RESUMABLE = RESUMABLE_RUN | {"preset", "code_path", "val_code_path", "vq_ckpt", "vq_weights", "codebook_l2_norm",
                             "other_tokenizer", "sample_every", "sample_cfg_scale", "num_workers", "compile",
                             "activation_checkpointing", "data_parallel"}

_TOKENIZER = "without the tokenizer of the codes", "give --vq-ckpt"
EFFECTS = EFFECTS_RUN | {
    "vq_weights": Effect(lambda cfg: cfg.vq_ckpt, *_TOKENIZER),
    "codebook_l2_norm": Effect(lambda cfg: cfg.vq_ckpt, *_TOKENIZER),
    "other_tokenizer": Effect(lambda cfg: cfg.vq_ckpt or cfg.init_from, "with neither --vq-ckpt nor --init-from"),
    "sample_every": Effect(lambda cfg: cfg.vq_ckpt or not cfg.sample_every, *_TOKENIZER),
    "sample_cfg_scale": Effect(lambda cfg: cfg.vq_ckpt and cfg.sample_every, "where no pictures are drawn",
                               "give --vq-ckpt, and --sample-every above 0"),
    "dropout_p": Effect(lambda cfg: not cfg.drop_path_rate, "with --drop-path-rate above 0, which replaces it"),
}


def pick_preset(given: dict[str, Any]) -> str:
    """The preset that the explicit flags ask for: --preset, else the paper's when there are codes, else the digits."""
    if given.get("preset", "auto") != "auto":
        return given["preset"]
    return "c2i" if given.get("code_path") else "digits"


def parse_config(argv: list[str] | None = None, description: str = "") -> TrainConfig:
    """Flags -> configuration with preset and folder decided.

    SystemExit(2) names the flag that is wrong, ValueError one that has no effect.
    """
    explicit: dict[str, str] = {}

    def pick(given: dict[str, Any]) -> str:
        explicit["preset"] = pick_preset(given)
        return explicit["preset"]

    cfg, given = config.parse_given(TrainConfig, argv, presets=PRESETS, pick_preset=pick,
                                    exclusive=("max_steps", "epochs"), description=description,
                                    prog="autoregressive/train_c2i.py")
    preset = explicit["preset"]
    folder = cfg.results_dir or ("runs/digits-gpt" if preset == "digits" else f"runs/{cfg.gpt_model}")
    cfg = replace(cfg, preset=preset, results_dir=folder,
                  init_from=cfg.init_from and os.path.abspath(os.path.expanduser(cfg.init_from)))
    require_effects(cfg, given, EFFECTS)
    return cfg


def check(cfg: TrainConfig, world_size: int) -> None:
    """Raise ValueError, naming flag, value and fix, for settings that cannot work. Reads no data."""
    check_run(cfg, world_size)
    check_optimizer(cfg)
    config.require_at_least(cfg, 0, "val_size num_workers sample_every")
    config.require_at_least(cfg, 1, "sample_cfg_scale codebook_size")
    config.require_at_most(cfg, 2**24, "codebook_size")
    config.require_at_most(cfg, 2**10, "num_workers")
    config.require_fraction(cfg, "class_dropout_prob dropout_p token_dropout_p drop_path_rate")
    if not cfg.code_path:
        raise ValueError("--preset c2i needs --code-path: the folder that autoregressive/extract_codes.py wrote")
    if shards(cfg, world_size) and world_size == 1:
        raise ValueError("--data-parallel fsdp shards over processes; start at least 2 with torchrun")
    if shards(cfg, world_size) and cfg.mixed_precision == "fp16":
        raise ValueError("--mixed-precision fp16 does not go with --data-parallel fsdp; use bf16")


def check_data(cfg: TrainConfig) -> None:
    """ValueError names the flag: there is no folder at --code-path or --val-code-path. Opens neither."""
    for name in ("code_path", "val_code_path"):
        for path in filter(str.strip, (getattr(cfg, name) or "").split(",")):
            try:
                require_code_folder(Path(path.strip()))
            except ValueError as error:
                raise ValueError(f"{flag_name(name)}: {error}") from error


def shards(cfg: TrainConfig, world_size: int) -> bool:
    """Whether parameters are sharded (FSDP) rather than replicated (DDP)."""
    if cfg.data_parallel == "auto":
        return world_size > 1 and GPT_PRESETS[cfg.gpt_model].num_parameters >= FSDP_FROM
    return cfg.data_parallel == "fsdp"


assert RESUMABLE <= {field.name for field in fields(TrainConfig)}
