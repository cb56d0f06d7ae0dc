"""Settings of tokenizer/train_provq.py: one field per flag, the presets, and what makes no sense together.

The defaults are the paper's ImageNet recipe (section 5.1.2, and LlamaGen's where the paper follows it).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from tokenizer.choices import ADVERSARIAL_LOSSES, AUGMENTATIONS, RECONSTRUCTION_LOSSES
from tokenizer.curriculum_config import (
    EFFECTS_CURRICULUM,
    INIT_FROM,
    CurriculumConfig,
    check_curriculum,
    kmeans_batches,
    with_codes_kept,
)
from tokenizer.image_readers import ImageOptions
from tokenizer.image_sources import absolute_path, path_mode
from tokenizer.runtime import config
from tokenizer.runtime.config import arg, flag_name
from tokenizer.runtime.run_config import RESUMABLE_RUN, Effect, require_effects
from tokenizer.vq_config import ARCHITECTURES


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
    reconstruction_loss: str = arg("l2", "pixel loss; LlamaGen: l2", choices=RECONSTRUCTION_LOSSES)
    reconstruction_weight: float = arg(1.0, "weight of the pixel loss; LlamaGen: 1")
    perceptual_weight: float = arg(1.0, "weight of LPIPS; 0: off, needs no VGG weights; LlamaGen: 1")
    lpips_vgg_weights: str | None = arg(None, "file vgg16-397923af.pth of torchvision; none: in torch hub's cache")
    disc_weight: float = arg(0.5, "weight of the adversarial loss; 0: no discriminator; LlamaGen: 0.5")
    disc_start: int = arg(20_000, "first step, counted from 1, with the discriminator; LlamaGen: 20000")
    disc_loss: str = arg("hinge", "adversarial loss; LlamaGen: hinge", choices=ADVERSARIAL_LOSSES)
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
                             "lpips_vgg_weights", "stop_after", "image_key", "max_image_mb", "code_search"}

EFFECTS = EFFECTS_CURRICULUM | {
    "reconstruction_loss": Effect(lambda cfg: cfg.reconstruction_weight, "with --reconstruction-weight 0"),
    "lpips_vgg_weights": Effect(lambda cfg: cfg.perceptual_weight, "with --perceptual-weight 0"),
    **{name: Effect(lambda cfg: cfg.disc_weight, "without a discriminator", "give --disc-weight above 0")
       for name in ("disc_start", "disc_loss", "disc_adaptive_weight")},
    "low_precision_norms": Effect(lambda cfg: cfg.mixed_precision != "none", "with --mixed-precision none"),
    **{name: Effect(lambda cfg: cfg.data_path or cfg.val_path, "on the digits, which are no files", "give --data-path")
       for name in ("image_key", "bit_depth", "max_image_mb", "max_bad_images")},
}


def pick_preset(given: dict[str, Any]) -> str:
    """The preset that the explicit flags ask for: --preset, else the paper's when there are data, else the digits."""
    if given.get("preset", "auto") != "auto":
        return given["preset"]
    return "digits" if given.get("data_path") in (None, "digits") else "imagenet256"


def parse_config(argv: list[str] | None = None, description: str = "") -> TrainConfig:
    """Flags -> configuration with preset and folder decided.

    SystemExit(2) names the flag that is wrong, ValueError one that has no effect.
    """
    cfg, given = config.parse_given(TrainConfig, argv, presets=PRESETS, pick_preset=pick_preset,
                                    exclusive=("max_steps", "epochs"), description=description,
                                    prog="tokenizer/train_provq.py")
    cfg = with_codes_kept(cfg)
    preset = pick_preset({"preset": cfg.preset, "data_path": cfg.data_path})
    # Evaluations and extract_codes.py open the recorded paths, from wherever they are started.
    data = None if (preset, cfg.data_path) == ("digits", "digits") else absolute_path(cfg.data_path)
    cfg = replace(cfg, preset=preset, results_dir=cfg.results_dir or f"runs/{preset}", data_path=data,
                  val_path=absolute_path(cfg.val_path))
    require_effects(cfg, given, EFFECTS)
    return cfg


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


def check_data(cfg: TrainConfig) -> None:
    """ValueError names the flag: there is nothing at --data-path or --val-path. Opens neither."""
    for name in ("data_path", "val_path"):
        path = getattr(cfg, name)
        try:
            if path is not None:
                path_mode(path)
        except (ValueError, OSError) as error:
            raise ValueError(f"{flag_name(name)}: {error}") from error


def tokens_per_batch(cfg: TrainConfig) -> int:
    """Tokens of a global batch."""
    return cfg.global_batch_size * (cfg.image_size // ARCHITECTURES[cfg.vq_model].downsample) ** 2


assert RESUMABLE <= {field.name for field in fields(TrainConfig)}
