"""Sizes of the structure tokenizers, and the settings that rebuild one. No torch, see tokenizer/runtime/command.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizer.quantizer_config import MAX_LAYERS, MAX_WIDTH, ModelConfig, check_quantizer, require_between


@dataclass(frozen=True)
class StructureModelConfig(ModelConfig):
    """Rebuilds a structure tokenizer; defaults are StructTokenBench's sizes. ValueError: impossible values."""

    LATER = {**ModelConfig.LATER, "codebook_l2_norm": False, "rotation": False}  # noqa: RUF012  # since version 0.3

    encoder_width: int = 1024       # channels of a slot
    encoder_heads: int = 128        # vector heads of geometric attention
    encoder_layers: int = 2         # geometric blocks
    neighbours: int = 16            # residues of a neighbourhood, itself among them
    decoder_width: int = 1024       # channels of a token
    decoder_heads: int = 16         # attention heads
    decoder_layers: int = 8         # transformer blocks
    codebook_size: int = 512
    codebook_embed_dim: int = 1024

    def __post_init__(self) -> None:
        check_quantizer(self)
        require_between(self, 1, MAX_WIDTH, "encoder_width encoder_heads neighbours decoder_width decoder_heads")
        require_between(self, 1, MAX_LAYERS, "encoder_layers decoder_layers")
        if self.decoder_width % (2 * self.decoder_heads):
            raise ValueError(f"decoder_width={self.decoder_width} must be an even multiple of "
                             f"decoder_heads={self.decoder_heads}")


PRESETS: dict[str, dict[str, Any]] = {
    # For generated backbones and tests: 1 M parameters.
    "tiny": {"encoder_width": 64, "encoder_heads": 16, "decoder_width": 128, "decoder_heads": 4, "decoder_layers": 3,
             "codebook_size": 64, "codebook_embed_dim": 16},
    # This project's own: trains on a CPU, 5.7 M parameters.
    "small": {"encoder_width": 256, "encoder_heads": 32, "decoder_width": 256, "decoder_heads": 4, "decoder_layers": 4,
              "codebook_size": 512, "codebook_embed_dim": 64},
    "paper": {},  # the defaults: 138.9 M parameters
}
