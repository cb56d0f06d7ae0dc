"""Settings of tokenizer/train_provq.py: one field per flag, the presets, and what makes no sense together.

The defaults are the paper's ImageNet recipe (section 5.1.2, and LlamaGen's where the paper follows it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenizer.curriculum import CurriculumConfig, check_curriculum, kmeans_batches, with_codes_kept
from tokenizer.data import AUGMENTATIONS, ImageSource, open_images, split_holdout, spread
from tokenizer.image_readers import ImageOptions
from tokenizer.image_sources import absolute_path
from tokenizer.init_from import HELP as INIT_FROM
from tokenizer.losses import GENERATOR_LOSSES, RECONSTRUCTION_LOSSES
from tokenizer.runtime import config
from tokenizer.runtime.config import arg, flag_name
from tokenizer.runtime.run import RESUMABLE_RUN
from tokenizer.vq_model import ARCHITECTURES
from tokenizer.weights import CONFIG_FILE, read_checkpoint, require_keys


@dataclass(frozen=True)
class TrainConfig(CurriculumConfig):
    # data
    preset: str = arg("auto", "set of defaults, below; auto: imagenet256 with --data-path, else digits",
                      choices=("auto", "digits", "cifar10", "imagenet256", "imagenet384"))
    data_path: str | None = arg(None, "training images: folder, .tar, .zip, shards-{000..099}.tar, list in .txt or "
                                      ".csv, or the word cifar10 to download it; none: scikit-learn's digits; paper: "
                                      "ImageNet")
    val_path: str | None = arg(None, "validation images; none: --val-size are held out of the training images")
    val_size: int = arg(1000, "images held out (of --data-path at most a tenth), or taken of --val-path; 0: all of "
                              "it; paper: ImageNet's 50000")
    image_size: int = arg(256, "side of the square images in pixels; paper: 256 and 384")
    image_channels: int = arg(3, "1 grey, 3 RGB, 4 RGBA; paper: 3", choices=(1, 3, 4))
    augment: str = arg("auto", "training augmentation; auto: none for digits, flip for images that are small already, "
                               "else crop-flip as LlamaGen", choices=("auto", *AUGMENTATIONS))
    image_key: str | None = arg(None, "of WebDataset samples with several images: the extension to read, such as "
                                      "input.jpg")
    bit_depth: int = arg(16, "bits in use of 16-bit images, 8 to 16; 12 of many cameras and microscopes")
    max_image_mb: int = arg(512, "largest image in MiB: as a file, and as pixels of 3 bytes")
    max_bad_images: int = arg(100, "unreadable images and damaged shards to skip before the run stops")
    num_workers: int = arg(4, "data-loading processes per rank")
    # model
    init_from: str | None = arg(None, INIT_FROM.format("a .pt of LlamaGen's"))
    vq_model: str = arg("VQ-16", "architecture, the number is the down-sampling factor; VQ-4 and VQ-16-S are small; "
                                 "paper: VQ-16",
                        choices=tuple(ARCHITECTURES))
    dropout_p: float = arg(0.0, "dropout in residual blocks; LlamaGen: 0")
    # losses
    reconstruction_loss: str = arg("l2", "pixel loss; LlamaGen: l2", choices=tuple(RECONSTRUCTION_LOSSES))
    reconstruction_weight: float = arg(1.0, "weight of the pixel loss; LlamaGen: 1")
    perceptual_weight: float = arg(1.0, "weight of LPIPS; 0: off, needs no VGG weights; LlamaGen: 1")
    lpips_vgg_weights: str | None = arg(None, "file vgg16-397923af.pth of torchvision; none: in torch hub's cache")
    disc_weight: float = arg(0.5, "weight of the adversarial loss; 0: no discriminator; LlamaGen: 0.5")
    disc_start: int = arg(20_000, "first step, counted from 1, with the discriminator; LlamaGen: 20000")
    disc_loss: str = arg("hinge", "adversarial loss; LlamaGen: hinge", choices=tuple(GENERATOR_LOSSES))
    disc_adaptive_weight: bool = arg(False, "scale the adversarial loss by the ratio of gradient norms; LlamaGen: no")
    sync_batchnorm: bool = arg(False, "the discriminator's batch norm over all processes, on GPUs; a wait for the "
                                      "others in every layer; LlamaGen: no")
    # optimization
    global_batch_size: int = arg(128, "images per optimizer step over all ranks; paper: 128")
    lr: float = arg(1e-4, "learning rate of both Adams, constant; LlamaGen: 1e-4")
    beta1: float = arg(0.9, "Adam's first moment; LlamaGen: 0.9")
    beta2: float = arg(0.95, "Adam's second moment; LlamaGen: 0.95")
    mixed_precision: str = arg("bf16", "autocast; quantizer and losses stay float32; LlamaGen: bf16",
                               choices=("none", "bf16", "fp16"))
    low_precision_norms: bool = arg(False, "group norm in the dtype of --mixed-precision, its statistics in float32: "
                                           "half the memory traffic of a step that is not compiled; LlamaGen: no")
    compile: bool = arg(False, "torch.compile the tokenizer: minutes at the start, then a fraction of the memory "
                               "traffic; imagenet256, imagenet384: yes; LlamaGen: an option, off")


_SMALL = {"vq_model": "VQ-4", "image_size": 32, "perceptual_weight": 0.0, "disc_weight": 0.0, "mixed_precision": "none",
          "lr": 1e-3, "num_workers": 0}
PRESETS: dict[str, dict[str, Any]] = {
    "digits": _SMALL | {  # 24 images can be split over 1, 2, 3, 4, 6, 8 and 12 processes
        "image_channels": 1, "codebook_size": 128, "global_batch_size": 24, "max_steps": 360, "warmup_steps": 120,
        "transition_steps": 120, "val_size": 297, "log_every": 20, "val_every": 60, "ckpt_every": 60,
    },
    "cifar10": _SMALL | {
        "codebook_size": 512, "max_steps": 10_000, "warmup_steps": 2500, "transition_steps": 2500, "val_size": 2000,
        "val_every": 1000, "ckpt_every": 1000, "kmeans_batches": 16,
    },
    "imagenet256": {"epochs": 40, "compile": True},
    "imagenet384": {"epochs": 40, "compile": True, "image_size": 384},
}

# What may differ when a run is resumed: its length, its cadence, its machine. Anything else would be another
# experiment. Data may move: the sources' fingerprints are compared, not their paths.
RESUMABLE = RESUMABLE_RUN | {"preset", "data_path", "val_path", "num_workers", "compile", "max_bad_images",
                             "lpips_vgg_weights", "stop_after", "image_key", "max_image_mb"}


def pick_preset(given: dict[str, Any]) -> str:
    """The preset that the explicit flags ask for: --preset, else the paper's when there are data, else the digits."""
    if given.get("preset", "auto") != "auto":
        return given["preset"]
    return "imagenet256" if given.get("data_path") else "digits"


def parse_config(argv: list[str] | None = None, description: str = "") -> TrainConfig:
    """Flags -> configuration with preset and folder decided. SystemExit(2) names the flag that is wrong."""
    cfg = config.parse(TrainConfig, argv, presets=PRESETS, pick_preset=pick_preset, exclusive=("max_steps", "epochs"),
                       description=description, prog="tokenizer/train_provq.py")
    cfg = with_codes_kept(cfg)
    preset = pick_preset({"preset": cfg.preset, "data_path": cfg.data_path})
    # Evaluations and extract_codes.py open the recorded paths, from wherever they are started.
    return replace(cfg, preset=preset, results_dir=cfg.results_dir or f"runs/{preset}",
                   data_path=absolute_path(cfg.data_path), val_path=absolute_path(cfg.val_path))


def check(cfg: TrainConfig, world_size: int) -> None:
    """Raise ValueError, naming flag, value and fix, for settings that cannot work. Reads no data."""
    check_curriculum(cfg, world_size)
    config.require_at_least(cfg, 0, "val_size max_bad_images num_workers reconstruction_weight perceptual_weight "
                            "disc_weight disc_start")
    config.require_at_most(cfg, 2**14, "image_size")
    config.require_at_most(cfg, 2**10, "num_workers")
    config.require_fraction(cfg, "beta1 beta2 dropout_p")
    ImageOptions.of(cfg)  # raises
    for name in ("data_path", "val_path"):
        if getattr(cfg, name) == "":
            raise ValueError(f"{flag_name(name)} is empty; leave it out, or for the current folder write a dot")
    if cfg.lr <= 0:
        raise ValueError(f"--lr is {cfg.lr}; it must be positive")
    if cfg.reconstruction_weight == cfg.perceptual_weight == 0:
        raise ValueError("--reconstruction-weight and --perceptual-weight are both 0: nothing would be learned")
    if cfg.preset != "digits" and not cfg.data_path:
        word = ": a folder with cifar-10-batches-py, or the word cifar10 to download it into data/"
        raise ValueError(f"--preset {cfg.preset} needs --data-path{word if cfg.preset == 'cifar10' else ''}")
    if cfg.sync_batchnorm and not cfg.disc_weight:
        raise ValueError("--sync-batchnorm needs a discriminator: --disc-weight above 0")
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
    kmeans_batches(cfg, tokens_per_batch(cfg))  # raises


Indices = Sequence[int] | np.ndarray


class DataSplit(NamedTuple):
    """What a run trains and validates on: two sources, often the same one, and indices into each, sorted."""

    source: ImageSource
    train_indices: Indices
    val_source: ImageSource
    val_indices: Indices

    def fingerprints(self) -> dict[str, str]:
        """As a run records them."""
        return {"data_fingerprint": self.source.fingerprint(), "val_fingerprint": self.val_source.fingerprint()}


def open_split(cfg: TrainConfig) -> DataSplit:
    """Open --data-path and --val-path. ValueError names the flag: nothing there, unreadable, nothing to validate on."""
    source = _open("--data-path", cfg.data_path, cfg)
    if cfg.val_path:
        val_source = _open("--val-path", cfg.val_path, cfg)
        train: Indices = range(len(source))
        val: Indices = spread(len(val_source), cfg.val_size or len(val_source))
    else:
        size = min(cfg.val_size, max(1, len(source) // 10)) if cfg.data_path else cfg.val_size
        try:
            val_source, (train, val) = source, split_holdout(len(source), size, cfg.global_seed)
        except ValueError as error:
            raise ValueError(f"--val-size {cfg.val_size}: {error}") from error
    if not len(val):
        raise ValueError("no image is held out for validation: give --val-path, or --val-size above 0")
    return DataSplit(source, train, val_source, val)


def recorded_settings(run: str | Path) -> dict[str, Any]:
    """What the run in this folder recorded in config.json, with data paths that hold from anywhere. ValueError.

    Older runs recorded these paths as they were given. Where their --results-dir was relative as well, it tells the
    folder that both count from.
    """
    settings = config.load(Path(run) / CONFIG_FILE)
    folder, given = Path(run).resolve(), Path(settings.get("results_dir") or "/")
    if given.is_absolute() or folder.parts[-len(given.parts) :] != given.parts:
        return settings
    started_in = Path(*folder.parts[: -len(given.parts)])
    found = {name: settings[name] for name in ("data_path", "val_path") if settings.get(name) not in (None, "cifar10")}
    return settings | {name: str(started_in / data_path) for name, data_path in found.items()}


def open_run_split(run: str | Path) -> DataSplit:
    """The split that the run in this folder was trained on.

    ValueError: as `open_split`, or the images are not those that the run's checkpoint records, so that the split would
    be another one. FileNotFoundError: no checkpoint.
    """
    cfg = config.from_dict(TrainConfig, recorded_settings(run), str(Path(run) / CONFIG_FILE))
    split = open_split(cfg)
    where, saved = read_checkpoint(Path(run))
    require_keys(saved, ["config"], where)
    recorded = saved["config"]
    require_keys(recorded, [], where)
    for name, found in split.fingerprints().items():
        if recorded.get(name, found) != found:
            data = cfg.val_path if cfg.val_path and name == "val_fingerprint" else cfg.data_path
            raise ValueError(f"{data} has changed since {run} was trained on it ({name} {recorded[name]} then, {found} "
                             "now): images that it was trained on would count as held out. Restore the data as they "
                             "were, or give images of your own with --data-path")
    return split


def _open(flag: str, path: str | None, cfg: TrainConfig) -> ImageSource:
    try:
        return open_images(path, channels=cfg.image_channels, options=ImageOptions.of(cfg))
    except (ValueError, OSError) as error:
        raise ValueError(f"{flag}: {error}") from error


def tokens_per_batch(cfg: TrainConfig) -> int:
    """Tokens of a global batch."""
    return cfg.global_batch_size * (cfg.image_size // ARCHITECTURES[cfg.vq_model].downsample) ** 2


assert RESUMABLE <= {field.name for field in fields(TrainConfig)}
