"""Settings of tokenizer/train_provq.py: one field per flag, the presets, and what makes no sense together.

The defaults are the paper's ImageNet recipe (section 5.1.2, and LlamaGen's where the paper follows it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenizer.data import AUGMENTATIONS, ImageSource, open_images, split_holdout, spread
from tokenizer.losses import GENERATOR_LOSSES, RECONSTRUCTION_LOSSES
from tokenizer.provq import QUANTIZERS, SCHEDULES
from tokenizer.runtime import config
from tokenizer.runtime.config import arg, flag_name
from tokenizer.vq_model import ARCHITECTURES


@dataclass(frozen=True)
class TrainConfig:
    # data
    preset: str = arg("auto", "set of defaults, below; auto: imagenet256 with --data-path, else digits",
                      choices=("auto", "digits", "cifar10", "imagenet256", "imagenet384"))
    data_path: str | None = arg(None, "training images: folder, .tar, .zip, shards-{000..099}.tar, list in .txt or "
                                      ".csv, or cifar10; none: scikit-learn's digits; paper: ImageNet")
    val_path: str | None = arg(None, "validation images; none: --val-size are held out of the training images")
    val_size: int = arg(1000, "images held out (of --data-path at most a tenth), or taken of --val-path; 0: all of "
                              "it; paper: ImageNet's 50000")
    image_size: int = arg(256, "side of the square images in pixels; paper: 256 and 384")
    image_channels: int = arg(3, "1 grey, 3 RGB, 4 RGBA; paper: 3", choices=(1, 3, 4))
    augment: str = arg("auto", "training augmentation; auto: none for digits, flip for images that are small already, "
                               "else crop-flip as LlamaGen", choices=("auto", *AUGMENTATIONS))
    max_bad_images: int = arg(100, "unreadable images to skip before the run stops")
    num_workers: int = arg(4, "data-loading processes per rank")
    # run
    results_dir: str = arg("", "the run's folder, resumed if it holds a run; empty: runs/PRESET")
    global_seed: int = arg(0, "seed of weights, data order, augmentation and k-means")
    device: str = arg("auto", "auto, cpu or cuda", choices=("auto", "cpu", "cuda"))
    log_every: int = arg(100, "steps between rows of metrics.jsonl")
    ckpt_every: int = arg(5000, "steps between checkpoints")
    val_every: int = arg(5000, "steps between validations")
    keep_checkpoints: int = arg(2, "numbered checkpoints that stay on disk, besides best.pt")
    dry_run: bool = arg(False, "check everything, print the configuration, stop")
    # model
    vq_model: str = arg("VQ-16", "architecture, the number is the down-sampling factor; VQ-4 is small; paper: VQ-16",
                        choices=tuple(ARCHITECTURES))
    codebook_size: int = arg(16384, "codes, K; paper: 16384")
    codebook_embed_dim: int = arg(8, "channels of a code, D; paper: 8")
    codebook_l2_norm: bool = arg(False, "unit-norm latents and codes, LlamaGen's baseline; paper's ProVQ: no")
    quantizer: str = arg("vq", "vq: trained table; simvq, aminoaseed: frozen table, trained linear map; ema: running "
                               "means; paper: vq", choices=tuple(QUANTIZERS))
    rotation: bool = arg(False, "rotation trick instead of straight-through gradients; paper: no")
    codebook_ema_decay: float = arg(0.99, "ema quantizer: decay of the running means per step; VQ-VAE-2: 0.99")
    codebook_restart_below: float = arg(0.0, "ema quantizer: restart codes used less than this fraction of the mean")
    commit_loss_beta: float = arg(0.25, "weight of the commitment loss, beta; LlamaGen: 0.25")
    dropout_p: float = arg(0.0, "dropout in residual blocks; LlamaGen: 0")
    # curriculum
    warmup_steps: int = arg(50_000, "stage 1, plain autoencoder, in optimizer steps; paper: 50000")
    transition_steps: int = arg(20_000, "stage 2, soft transition, in optimizer steps; paper: 20000")
    transition: str = arg("cosine", "schedule of alpha in stage 2; paper: cosine", choices=tuple(SCHEDULES))
    loss_lambda: float = arg(0.5, "weight of the quantization loss when stage 2 begins, lambda; paper: 0.5")
    adaptive_warmup_patience: int = arg(0, "end stage 1 after this many validations without a lower error, at "
                                           "--warmup-steps at the latest; 0: there; paper: 0")
    adaptive_warmup_min_steps: int = arg(0, "adaptive warm-up: never end before this step")
    codebook_init: str = arg("auto", "when stage 1 is over: kmeans of latents, or none; auto: kmeans after a warm-up "
                                     "and for aminoaseed; paper: kmeans", choices=("auto", "kmeans", "none"))
    kmeans_batches: int = arg(0, "global batches whose latents are clustered; 0: 32 latents per code, in at most 16 "
                                 "batches if those give every code one; paper: one batch")
    kmeans_iters: int = arg(20, "Lloyd iterations at most; paper: not given")
    kmeans_start: str = arg("kmeans++", "first centroids of k-means; paper: not given", choices=("kmeans++", "random"))
    # losses
    reconstruction_loss: str = arg("l2", "pixel loss; LlamaGen: l2", choices=tuple(RECONSTRUCTION_LOSSES))
    reconstruction_weight: float = arg(1.0, "weight of the pixel loss; LlamaGen: 1")
    perceptual_weight: float = arg(1.0, "weight of LPIPS; 0: off, needs no VGG weights; LlamaGen: 1")
    lpips_vgg_weights: str | None = arg(None, "file vgg16-397923af.pth of torchvision; none: in torch hub's cache")
    disc_weight: float = arg(0.5, "weight of the adversarial loss; 0: no discriminator; LlamaGen: 0.5")
    disc_start: int = arg(20_000, "first step, counted from 1, with the discriminator; LlamaGen: 20000")
    disc_loss: str = arg("hinge", "adversarial loss; LlamaGen: hinge", choices=tuple(GENERATOR_LOSSES))
    disc_adaptive_weight: bool = arg(False, "scale the adversarial loss by the ratio of gradient norms; LlamaGen: no")
    # optimization
    global_batch_size: int = arg(128, "images per optimizer step over all ranks; paper: 128")
    gradient_accumulation_steps: int = arg(1, "micro-batches that a global batch is computed in; LlamaGen: 1")
    max_steps: int | None = arg(None, "optimizer steps; excludes --epochs")
    epochs: int | None = arg(None, "passes over the training images; excludes --max-steps; LlamaGen: 40")
    lr: float = arg(1e-4, "learning rate of both Adams, constant; LlamaGen: 1e-4")
    beta1: float = arg(0.9, "Adam's first moment; LlamaGen: 0.9")
    beta2: float = arg(0.95, "Adam's second moment; LlamaGen: 0.95")
    max_grad_norm: float = arg(1.0, "clip the gradient norm of either network; 0: off; LlamaGen: 1")
    mixed_precision: str = arg("bf16", "autocast; quantizer and losses stay float32; LlamaGen: bf16",
                               choices=("none", "bf16", "fp16"))
    ema: bool = arg(False, "keep, validate and export an exponential moving average of the weights; LlamaGen: no")
    ema_decay: float = arg(0.9999, "decay of that average per step; LlamaGen: 0.9999")
    compile: bool = arg(False, "torch.compile the tokenizer; LlamaGen: yes")


_SMALL = {"vq_model": "VQ-4", "image_size": 32, "perceptual_weight": 0.0, "disc_weight": 0.0, "mixed_precision": "none",
          "lr": 1e-3, "num_workers": 0}
PRESETS: dict[str, dict[str, Any]] = {
    "digits": _SMALL | {  # 48 images can be split over 1, 2, 3, 4, 6, 8, 12 and 16 processes
        "image_channels": 1, "codebook_size": 128, "global_batch_size": 48, "max_steps": 450, "warmup_steps": 150,
        "transition_steps": 150, "val_size": 297, "log_every": 25, "val_every": 75, "ckpt_every": 75,
    },
    "cifar10": _SMALL | {
        "codebook_size": 512, "max_steps": 10_000, "warmup_steps": 2500, "transition_steps": 2500, "val_size": 2000,
        "val_every": 1000, "ckpt_every": 1000, "kmeans_batches": 16,
    },
    "imagenet256": {"epochs": 40},
    "imagenet384": {"epochs": 40, "image_size": 384},
}

# What may differ when a run is resumed: its length, its cadence, its machine. Anything else would be another
# experiment. Data may move: the sources' fingerprints are compared, not their paths.
RESUMABLE = frozenset({
    "preset", "data_path", "val_path", "results_dir", "gradient_accumulation_steps", "max_steps", "epochs", "log_every",
    "ckpt_every", "val_every",
    "keep_checkpoints", "dry_run", "num_workers", "device", "compile", "max_bad_images", "lpips_vgg_weights",
})


def pick_preset(given: dict[str, Any]) -> str:
    """The preset that the explicit flags ask for: --preset, else the paper's when there are data, else the digits."""
    if given.get("preset", "auto") != "auto":
        return given["preset"]
    return "imagenet256" if given.get("data_path") else "digits"


def parse_config(argv: list[str] | None = None, description: str = "") -> TrainConfig:
    """Flags -> configuration with preset, data and folder decided. SystemExit(2) names the flag that is wrong."""
    cfg = config.parse(TrainConfig, argv, presets=PRESETS, pick_preset=pick_preset, exclusive=("max_steps", "epochs"),
                       description=description, prog="tokenizer/train_provq.py")
    preset = pick_preset({"preset": cfg.preset, "data_path": cfg.data_path})
    data = cfg.data_path or ("cifar10" if preset == "cifar10" else None)
    return replace(cfg, preset=preset, data_path=data, results_dir=cfg.results_dir or f"runs/{preset}")


def check(cfg: TrainConfig, world_size: int) -> None:
    """Raise ValueError, naming flag, value and fix, for settings that cannot work. Reads no data."""
    config.require_at_least(cfg, 1, "log_every ckpt_every val_every keep_checkpoints global_batch_size codebook_size "
                            "codebook_embed_dim gradient_accumulation_steps max_steps epochs")
    config.require_at_least(cfg, 0, "val_size max_bad_images num_workers kmeans_batches kmeans_iters "
                            "reconstruction_weight perceptual_weight disc_weight disc_start max_grad_norm "
                            "adaptive_warmup_patience adaptive_warmup_min_steps global_seed commit_loss_beta "
                            "codebook_restart_below warmup_steps transition_steps")
    for name in ("beta1", "beta2", "ema_decay", "codebook_ema_decay", "dropout_p"):
        if not 0 <= getattr(cfg, name) < 1:
            raise ValueError(f"{flag_name(name)} is {getattr(cfg, name)}; it must lie in [0, 1)")
    if not 0 <= cfg.loss_lambda <= 1:
        raise ValueError(f"--loss-lambda is {cfg.loss_lambda}; it must lie in [0, 1]")
    if cfg.lr <= 0:
        raise ValueError(f"--lr is {cfg.lr}; it must be positive")
    if (cfg.max_steps is None) == (cfg.epochs is None):
        raise ValueError(f"give one of --max-steps and --epochs; got {cfg.max_steps} and {cfg.epochs}")
    if cfg.reconstruction_weight == cfg.perceptual_weight == 0:
        raise ValueError("--reconstruction-weight and --perceptual-weight are both 0: nothing would be learned")
    if cfg.preset.startswith("imagenet") and not cfg.data_path:
        raise ValueError(f"--preset {cfg.preset} needs --data-path")
    if Path(cfg.results_dir).exists() and not Path(cfg.results_dir).is_dir():
        raise ValueError(f"--results-dir {cfg.results_dir} is a file; name a folder")
    if cfg.disc_adaptive_weight and cfg.mixed_precision == "fp16":
        raise ValueError("--disc-adaptive-weight compares gradients that vanish in --mixed-precision fp16; use bf16")
    for name, low in (("disc_weight", 24), ("perceptual_weight", 16), ("image_size", 7)):
        if getattr(cfg, name) and cfg.image_size < low:
            why = "SSIM" if name == "image_size" else f"{flag_name(name)} above 0"
            raise ValueError(f"--image-size {cfg.image_size} is too small: {why} needs at least {low}")
    if cfg.perceptual_weight and cfg.image_channels == 4:
        raise ValueError("--perceptual-weight: LPIPS takes 1 or 3 channels, not --image-channels 4; pass 0")
    factor = ARCHITECTURES[cfg.vq_model].downsample
    if cfg.image_size < factor or cfg.image_size % factor:
        raise ValueError(f"--image-size {cfg.image_size} must be a multiple of {factor}, the factor of {cfg.vq_model}")
    parts = world_size * cfg.gradient_accumulation_steps
    if cfg.global_batch_size % parts:
        raise ValueError(f"--global-batch-size {cfg.global_batch_size} must be a multiple of {parts}: {world_size} "
                         f"processes x --gradient-accumulation-steps {cfg.gradient_accumulation_steps}")
    if cfg.adaptive_warmup_patience and cfg.adaptive_warmup_min_steps > cfg.warmup_steps:
        raise ValueError(f"--adaptive-warmup-min-steps {cfg.adaptive_warmup_min_steps} is beyond --warmup-steps "
                         f"{cfg.warmup_steps}, the latest end")
    if not cfg.adaptive_warmup_patience and cfg.adaptive_warmup_min_steps:
        raise ValueError("--adaptive-warmup-min-steps needs --adaptive-warmup-patience above 0")
    tokens = kmeans_batches(cfg) * _tokens_per_batch(cfg)
    if uses_kmeans(cfg) and tokens < cfg.codebook_size:
        raise ValueError(f"k-means would see {tokens} latents for --codebook-size {cfg.codebook_size}: raise "
                         f"--kmeans-batches {cfg.kmeans_batches}, or use fewer codes")


class DataSplit(NamedTuple):
    """What a run trains and validates on: two sources, often the same one, and indices into each, sorted."""

    source: ImageSource
    train_indices: Sequence[int] | np.ndarray
    val_source: ImageSource
    val_indices: Sequence[int] | np.ndarray


def open_split(cfg: TrainConfig) -> DataSplit:
    """Open --data-path and --val-path. ValueError names the flag: nothing there, unreadable, nothing to validate on."""
    source = _open("--data-path", cfg.data_path, cfg.image_channels)
    if cfg.val_path:
        val_source = _open("--val-path", cfg.val_path, cfg.image_channels)
        train = range(len(source))
        val = spread(len(val_source), cfg.val_size or len(val_source))
    else:
        size = min(cfg.val_size, max(1, len(source) // 10)) if cfg.data_path else cfg.val_size
        val_source, (train, val) = source, split_holdout(len(source), size, cfg.global_seed)
    if not len(val):
        raise ValueError("no image is held out for validation: give --val-path, or --val-size above 0")
    return DataSplit(source, train, val_source, val)


def _open(flag: str, path: str | None, channels: int) -> ImageSource:
    try:
        return open_images(path, channels=channels)
    except (ValueError, OSError) as error:
        raise ValueError(f"{flag}: {error}") from error


def kmeans_batches(cfg: TrainConfig) -> int:
    """Global batches that are clustered, --kmeans-batches or what its 0 stands for."""
    def batches(latents: int) -> int:
        return -(-latents // _tokens_per_batch(cfg))  # rounded up

    return cfg.kmeans_batches or max(batches(cfg.codebook_size), min(16, batches(32 * cfg.codebook_size)))


def _tokens_per_batch(cfg: TrainConfig) -> int:
    return cfg.global_batch_size * (cfg.image_size // ARCHITECTURES[cfg.vq_model].downsample) ** 2


def uses_kmeans(cfg: TrainConfig) -> bool:
    """Whether the codebook starts from data (--codebook-init)."""
    auto = cfg.warmup_steps > 0 or cfg.quantizer == "aminoaseed"
    return cfg.codebook_init == "kmeans" or (cfg.codebook_init == "auto" and auto)


assert RESUMABLE <= {field.name for field in fields(TrainConfig)}
