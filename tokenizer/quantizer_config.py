"""The settings of a quantizer and what makes no sense among them: one owner for every model and every trainer.

No torch, see runtime/command.py: quantizers.py builds what the settings describe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, TypeVar

from tokenizer.choices import GRIDS, QUANTIZERS
from tokenizer.runtime import config
from tokenizer.runtime.config import arg, flag_name

MAX_CODES = 2**31 - 1  # tokens are kept as int32
MAX_WIDTH = 2**20      # channels: a matrix of so many rows and columns has 4 TB
MAX_LAYERS = 1024

Config = TypeVar("Config", bound="ModelConfig")


@dataclass(frozen=True, kw_only=True)
class QuantizerConfig:
    """Defaults are the paper's for images. Configurations of models and of training runs subclass it."""

    quantizer: str = arg("vq", "vq: trained table; simvq, aminoaseed: frozen table, trained linear map; ema: running "
                               "means; fsq, lfq: fixed grid, no k-means; paper: vq", choices=(*QUANTIZERS, *GRIDS))
    codebook_size: int = arg(16384, "codes, K; paper: 16384")
    codebook_embed_dim: int = arg(8, "channels of a code, D; paper: 8")
    codebook_l2_norm: bool = arg(False, "unit-norm latents and codes, LlamaGen's baseline; paper's ProVQ: no")
    rotation: bool = arg(False, "rotation trick instead of straight-through gradients; paper: no")
    commit_loss_beta: float = arg(0.25, "weight of the commitment loss, beta; LlamaGen: 0.25")
    codebook_ema_decay: float = arg(0.99, "ema quantizer: decay of the running means per step; VQ-VAE-2: 0.99")
    codebook_restart_below: float = arg(0.0, "restart codes used less than this fraction of the mean at latents "
                                             "(Jukebox); not in the paper: 0, never")
    codebook_follow: bool = arg(False, "vq quantizer: codes follow the latents' running mean and spread; ours, not in "
                                       "the paper: no")


@dataclass(frozen=True)
class ModelConfig(QuantizerConfig):
    """Everything that rebuilds a model's modules; the curriculum belongs to training and is passed separately."""

    # fields that older files do not have -> the value that they had then
    LATER: ClassVar[Mapping[str, Any]] = {"codebook_follow": False}

    @classmethod
    def from_dict(cls: type[Config], values: Mapping[str, Any], source: str = "tokenizer configuration") -> Config:
        """Pick this class's fields out of a larger configuration (a training config names them alike).

        ValueError, starting with source: absent fields, values of another type or beyond sense.
        """
        return config.pick(cls, {**cls.LATER, **values} if isinstance(values, Mapping) else values, source)

    def to_dict(self) -> dict[str, str | int | float | bool]:
        """JSON-ready primitives; inverse of from_dict."""
        return asdict(self)


def require_between(cfg: Any, low: float, high: float, names: str) -> None:
    """ValueError, naming field and value, for a setting among names (separated by spaces) outside [low, high]."""
    for name in names.split():
        value = getattr(cfg, name)
        if not value >= low:  # so that NaN is refused
            raise ValueError(f"{name}={value!r} must be at least {low}")
        if value > high:
            raise ValueError(f"{name}={value!r} must be at most {high}")


def check_quantizer(cfg: QuantizerConfig, *, flags: bool = False) -> None:
    """Raise ValueError for settings that cannot work, named as fields or as flags of a command line."""
    def said(name: str) -> str:
        value = getattr(cfg, name)
        return f"{flag_name(name)} is {value}; it" if flags else f"{name}={value!r}"

    if cfg.quantizer not in (*QUANTIZERS, *GRIDS):
        raise ValueError(f"{said('quantizer')} is unknown; choose one of {', '.join((*QUANTIZERS, *GRIDS))}")
    limits = {"codebook_size": (1, MAX_CODES), "codebook_embed_dim": (1, MAX_WIDTH),
              "commit_loss_beta": (0, math.inf), "codebook_restart_below": (0, 1)}
    for name, (low, high) in limits.items():
        if not getattr(cfg, name) >= low:  # so that NaN is refused
            raise ValueError(f"{said(name)} must be at least {low}")
        if getattr(cfg, name) > high:
            raise ValueError(f"{said(name)} must be at most {high}")
    if not 0 <= cfg.codebook_ema_decay < 1:
        raise ValueError(f"{said('codebook_ema_decay')} must lie in [0, 1)")
    for name, needed in (("codebook_ema_decay", "ema"), ("codebook_follow", "vq")):
        if cfg.quantizer != needed and getattr(cfg, name) != getattr(QuantizerConfig, name):
            only = f"{flag_name('quantizer')} {needed}" if flags else f"quantizer={needed!r}"
            raise ValueError(f"{said(name)} has an effect with {only} only, got {cfg.quantizer!r}")
    if cfg.quantizer in GRIDS:
        _check_grid(cfg, said)
    if cfg.codebook_follow and cfg.codebook_l2_norm:
        other = flag_name("codebook_l2_norm") if flags else "codebook_l2_norm"
        raise ValueError(f"{said('codebook_follow')} needs latents with a spread, and {other} gives them unit norm")
    if cfg.quantizer != "ema" and cfg.codebook_restart_below >= 1:
        raise ValueError(f"{said('codebook_restart_below')} must be below 1: it is a fraction of the mean use")


def fsq_levels(num_codes: int) -> list[int]:
    """Levels of FSQ with exactly num_codes codes: eights, and fours for what remains. ValueError: not 2^n >= 4."""
    bits = int(math.log2(num_codes))
    if bits < 2 or 2**bits != num_codes:
        raise ValueError(f"FSQ and LFQ at equal bits need a codebook size 2^n >= 4, got {num_codes}")
    fours = -bits % 3  # 3 a + 2 b = bits with the fewest fours
    return [8] * ((bits - 2 * fours) // 3) + [4] * fours


def grid_channels(name: str, num_codes: int) -> int:
    """Channels of a code, which the number of codes decides. ValueError: see fsq_levels."""
    levels = fsq_levels(num_codes)  # LFQ has the same sizes
    return len(levels) if name == "fsq" else int(math.log2(num_codes))


def _check_grid(cfg: QuantizerConfig, said: Callable[[str], str]) -> None:
    try:
        channels = grid_channels(cfg.quantizer, cfg.codebook_size)
    except ValueError as error:
        raise ValueError(f"{said('codebook_size')} does not fit {cfg.quantizer}: {error}") from error
    if cfg.codebook_embed_dim != channels:
        raise ValueError(f"{said('codebook_embed_dim')} must be {channels}, the channels of {cfg.quantizer} with "
                         f"{cfg.codebook_size} codes")
    idle = ["codebook_l2_norm", "rotation", "codebook_restart_below"]
    for name in (*idle, "commit_loss_beta") if cfg.quantizer == "fsq" else idle:
        if getattr(cfg, name) != getattr(QuantizerConfig, name):
            raise ValueError(f"{said(name)} has no effect on the fixed grid of {cfg.quantizer}; leave it out")
