"""Sizes of the GPTs, and the settings that rebuild one. No torch, see tokenizer/runtime/command.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tokenizer.quantizer_config import MAX_CODES, MAX_LAYERS, MAX_WIDTH, require_between
from tokenizer.runtime.config import pick

MULTIPLE_OF = 256       # hidden widths of the feed-forward layers
MAX_BLOCK_SIZE = 2**16  # codes per image: the rotary table grows with them, and no weight tells their number


@dataclass(frozen=True)
class GPTConfig:
    """Sizes and regularisation; the defaults are GPT-B on 16 x 16 ImageNet codes. ValueError: sizes that do not fit."""

    n_layer: int = 12
    n_head: int = 12
    dim: int = 768
    vocab_size: int = 16384
    block_size: int = 256            # codes per image, a square number
    num_classes: int = 1000
    class_dropout_prob: float = 0.1  # chance that training replaces a class by "none", for guidance
    token_dropout_p: float = 0.1
    resid_dropout_p: float = 0.1     # after the attention
    ffn_dropout_p: float = 0.1
    drop_path_rate: float = 0.0      # of the last block, rising linearly; above 0 it replaces the two above
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        require_between(self, 1, MAX_WIDTH, "n_head dim")
        require_between(self, 1, MAX_LAYERS, "n_layer")
        require_between(self, 1, MAX_CODES, "vocab_size num_classes")
        require_between(self, 1, MAX_BLOCK_SIZE, "block_size")
        require_between(self, 0, 1, "class_dropout_prob token_dropout_p resid_dropout_p ffn_dropout_p drop_path_rate "
                        "norm_eps initializer_range")
        require_between(self, 1, math.inf, "rope_base")
        if math.isqrt(self.block_size) ** 2 != self.block_size:
            raise ValueError(f"block_size {self.block_size} is no square number; codes must form a square grid")
        if self.dim % self.n_head or self.head_dim % 4:
            raise ValueError(f"dim {self.dim} / n_head {self.n_head} must be a multiple of 4 for 2-D rotary tables")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> GPTConfig:
        """What a checkpoint or an export says. ValueError, starting with source: absent fields, impossible values."""
        return pick(cls, values, source)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> GPTConfig:
        """One of GPT_PRESETS with other fields changed. ValueError: an unknown name."""
        if name not in GPT_PRESETS:
            raise ValueError(f"{name!r} is none of {', '.join(GPT_PRESETS)}")
        return replace(GPT_PRESETS[name], **changes)

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_head

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward layers: 8/3 dim, rounded up to a multiple of 256."""
        return -(-int(8 * self.dim / 3) // MULTIPLE_OF) * MULTIPLE_OF

    @property
    def num_parameters(self) -> int:
        block = 4 * self.dim**2 + 3 * self.dim * self.hidden_dim + 2 * self.dim
        return self.n_layer * block + self.dim * (2 * self.vocab_size + self.num_classes + 1 + 1)


GPT_PRESETS = {
    "GPT-tiny": GPTConfig(4, 4, 128),
    "GPT-B": GPTConfig(12, 12, 768),
    "GPT-L": GPTConfig(24, 16, 1024),
    "GPT-XL": GPTConfig(36, 20, 1280),
    "GPT-XXL": GPTConfig(48, 24, 1536),
    "GPT-3B": GPTConfig(24, 32, 3200),
}
