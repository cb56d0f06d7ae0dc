"""Sizes of the image tokenizers, and the settings that rebuild one. No torch, see runtime/command.py."""

from __future__ import annotations

from dataclasses import dataclass

from tokenizer.quantizer_config import MAX_WIDTH, ModelConfig, check_quantizer, require_between
from tokenizer.runtime.parsing import brief

MAX_IMAGE_SIZE = 2**14  # pixels of a side; Pillow refuses larger images as well


@dataclass(frozen=True)
class Architecture:
    """Numbers that fix encoder and decoder. Tuples hold one entry per resolution, finest (image) to coarsest (latent).

    Every width, channels * mult, must divide into 32 normalisation groups; a resolution without residual blocks cannot
    change the width.
    """

    channels: int                     # width that channel_mult multiplies
    channel_mult: tuple[int, ...]     # len - 1 halvings
    encoder_blocks: tuple[int, ...]   # residual blocks
    decoder_blocks: tuple[int, ...]
    z_channels: int                   # width between encoder/decoder and the two 1x1 convolutions around the quantizer

    @property
    def widths(self) -> list[int]:
        return [self.channels * mult for mult in self.channel_mult]

    @property
    def downsample(self) -> int:
        """Image pixels per latent cell along one side."""
        return 2 ** (len(self.channel_mult) - 1)


ARCHITECTURES = {  # VQ-8 and VQ-16 are LlamaGen's: 70.1 M and 71.9 M parameters with a 16384 x 8 codebook
    # No residual block at full resolution: they would take most of the time and gain nothing (CIFAR-10, PSNR).
    "VQ-4": Architecture(32, (1, 1, 2), encoder_blocks=(0, 2, 2), decoder_blocks=(0, 2, 2), z_channels=64),
    "VQ-8": Architecture(128, (1, 2, 2, 4), encoder_blocks=(2,) * 4, decoder_blocks=(3,) * 4, z_channels=256),
    "VQ-16": Architecture(128, (1, 1, 2, 2, 4), encoder_blocks=(2,) * 5, decoder_blocks=(3,) * 5, z_channels=256),
    # Ours: 16x down-sampling for CPUs and small GPUs, 3.6 M parameters with a 1024 x 8 codebook.
    "VQ-16-S": Architecture(32, (1, 1, 2, 2, 4), encoder_blocks=(0, 1, 1, 1, 2), decoder_blocks=(0, 1, 1, 1, 2),
                            z_channels=64),
}


@dataclass(frozen=True)
class VQModelConfig(ModelConfig):
    """Rebuilds an image tokenizer. ValueError: unknown names, impossible values."""

    vq_model: str = "VQ-16"   # key of ARCHITECTURES
    image_channels: int = 3   # input and output
    image_size: int = 256     # side in pixels that it is trained at; it runs at any multiple of its factor
    dropout_p: float = 0.0    # inside residual blocks

    def __post_init__(self) -> None:
        check_quantizer(self)
        if self.vq_model not in ARCHITECTURES:
            raise ValueError(f"vq_model={brief(self.vq_model)} is unknown; choose one of {', '.join(ARCHITECTURES)}")
        for name, most in (("image_channels", MAX_WIDTH), ("image_size", MAX_IMAGE_SIZE)):
            require_between(self, 1, most, name)
        if not 0.0 <= self.dropout_p < 1.0:
            raise ValueError(f"dropout_p={self.dropout_p} must lie in [0, 1)")
