"""Convolutional VQ autoencoders (VQ-4, VQ-8, VQ-16, VQ-16-S) around a ProVQ quantizer.

The paper (Sec. 4.1) keeps the tokenizer of its image baseline, LlamaGen, and changes the quantizer only. VQ-8 and VQ-16
below follow that architecture down to the state-dict keys, so weights move between the two code bases (pretrained.py).
VQ-4 and VQ-16-S are this project's own small models, for 28..64 pixel images and for larger ones: the same blocks at
widths that train on a CPU.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.provq import AdaptiveWarmup, Curriculum, ProVQ, ProVQOutput
from tokenizer.quantizers import build_quantizer
from tokenizer.vq_config import ARCHITECTURES, Architecture, VQModelConfig


def _conv3(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)


class GroupNorm(nn.GroupNorm):
    """Under autocast in float32, on every device, as CUDA's autocast has it; or, if `low_precision`, in the dtype of
    what comes in, with statistics in float32: half the memory traffic where nothing fuses the norm with its neighbours.
    """

    low_precision = False

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            x = x if self.low_precision else x.float()
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def _norm(channels: int) -> GroupNorm:
    return GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """Pre-activation residual block, (B, in, h, w) -> (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, dropout_p: float):
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = _conv3(in_channels, out_channels)
        self.norm2 = _norm(out_channels)
        self.dropout = nn.Dropout(dropout_p)
        self.conv2 = _conv3(out_channels, out_channels)
        self.nin_shortcut: nn.Module = nn.Identity()  # holds no weights: the identity adds no state-dict key
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))                # (B, out, h, w)
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))  # (B, out, h, w)
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all h*w positions with a residual connection, shape preserving."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = _norm(channels)
        self.q = nn.Conv2d(channels, channels, kernel_size=1)
        self.k = nn.Conv2d(channels, channels, kernel_size=1)
        self.v = nn.Conv2d(channels, channels, kernel_size=1)
        self.proj_out = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(conv(h), "b c h w -> b 1 (h w) c") for conv in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)  # one head, scale C^-0.5
        return x + self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Stride-2 convolution, (B, C, 2h, 2w) -> (B, C, h, w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only: published weights expect this alignment


class Upsample(nn.Module):
    """Nearest-neighbour doubling and a convolution, (B, C, h, w) -> (B, C, 2h, 2w)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """One resolution: residual blocks, each followed by attention if asked for, then an optional resampling layer."""

    def __init__(self, in_channels: int, channels: int, blocks: int, attention: bool, dropout_p: float):
        super().__init__()
        widths = ([in_channels] + [channels] * blocks)[:blocks]
        self.res = nn.ModuleList(ResBlock(width, channels, dropout_p) for width in widths)
        self.attn = nn.ModuleList(AttnBlock(channels) if attention else nn.Identity() for _ in widths)

    def forward(self, x: Tensor) -> Tensor:
        for res, attn in zip(self.res, self.attn, strict=True):
            x = attn(res(x))
        return x


class EncoderLevel(Level):
    def __init__(self, in_channels: int, channels: int, blocks: int, last: bool, dropout_p: float):
        super().__init__(in_channels, channels, blocks, attention=last, dropout_p=dropout_p)
        self.downsample = nn.Identity() if last else Downsample(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(super().forward(x))


class DecoderLevel(Level):
    def __init__(self, in_channels: int, channels: int, blocks: int, first: bool, last: bool, dropout_p: float):
        super().__init__(in_channels, channels, blocks, attention=first, dropout_p=dropout_p)
        self.upsample = nn.Identity() if last else Upsample(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(super().forward(x))


def _middle(channels: int, dropout_p: float) -> nn.Sequential:
    return nn.Sequential(
        ResBlock(channels, channels, dropout_p), AttnBlock(channels), ResBlock(channels, channels, dropout_p)
    )


class Encoder(nn.Module):
    """Image (B, in_channels, H, W) -> features (B, z_channels, H/f, W/f)."""

    def __init__(self, arch: Architecture, in_channels: int, dropout_p: float):
        super().__init__()
        widths = arch.widths
        inputs = [arch.channels, *widths[:-1]]
        last = len(widths) - 1
        self.conv_in = _conv3(in_channels, arch.channels)
        self.conv_blocks = nn.ModuleList(
            EncoderLevel(inputs[i], widths[i], arch.encoder_blocks[i], last=i == last, dropout_p=dropout_p)
            for i in range(len(widths))
        )
        self.mid = _middle(widths[-1], dropout_p)
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv3(widths[-1], arch.z_channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)  # (B, channels, H, W)
        for level in self.conv_blocks:
            h = level(h)
        h = self.mid(h)  # (B, widths[-1], H/f, W/f)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Features (B, z_channels, h, w) -> image (B, out_channels, h*f, w*f); unbounded, no tanh at the end."""

    def __init__(self, arch: Architecture, out_channels: int, dropout_p: float):
        super().__init__()
        widths, blocks = arch.widths[::-1], arch.decoder_blocks[::-1]  # deepest first: execution order
        inputs = [widths[0], *widths[:-1]]
        last = len(widths) - 1
        self.conv_in = _conv3(arch.z_channels, widths[0])
        self.mid = _middle(widths[0], dropout_p)
        self.conv_blocks = nn.ModuleList(
            DecoderLevel(inputs[i], widths[i], blocks[i], first=i == 0, last=i == last, dropout_p=dropout_p)
            for i in range(len(widths))
        )
        self.norm_out = _norm(widths[-1])
        self.conv_out = _conv3(widths[-1], out_channels)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))  # (B, widths[0], h, w)
        for level in self.conv_blocks:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))  # (B, out_channels, h*f, w*f)


class VQModel(nn.Module):
    """Encoder -> 1x1 conv -> ProVQ -> 1x1 conv -> decoder.

    Args:
        config: architecture and quantizer.
        curriculum: training schedule of the quantizer; None means discrete from the first step, which is the plain
            baseline.
        adaptive: ends the warm-up by validation scores, see provq.AdaptiveWarmup.

    The convolutions may run under autocast; ProVQ leaves autocast by itself for its distances and losses.
    """

    def __init__(
        self, config: VQModelConfig, curriculum: Curriculum | None = None, *, adaptive: AdaptiveWarmup | None = None
    ):
        super().__init__()
        arch = ARCHITECTURES[config.vq_model]
        self.config = config
        self.downsample = arch.downsample
        self.encoder = Encoder(arch, config.image_channels, config.dropout_p)
        self.decoder = Decoder(arch, config.image_channels, config.dropout_p)
        self.quantize = ProVQ(
            build_quantizer(config), Curriculum(0, 0) if curriculum is None else curriculum, channel_dim=1,
            adaptive=adaptive,
        )
        self.quant_conv = nn.Conv2d(arch.z_channels, config.codebook_embed_dim, kernel_size=1)
        self.post_quant_conv = nn.Conv2d(config.codebook_embed_dim, arch.z_channels, kernel_size=1)

    def set_norm_precision(self, low: bool) -> VQModel:
        """Of all group norms under autocast, see GroupNorm. No part of the state dict."""
        for module in self.modules():
            if isinstance(module, GroupNorm):
                module.low_precision = low
        return self

    @property
    def last_layer(self) -> Tensor:
        """Weight of the final convolution, where losses.adaptive_weight compares gradients."""
        return self.decoder.conv_out.weight

    def forward(self, x: Tensor) -> tuple[Tensor, ProVQOutput]:
        """x (B, C, H, W) float in [-1, 1] -> reconstruction (B, C, H, W) and the quantizer's output.

        Raises ValueError if x does not have image_channels channels or H or W is not divisible by `downsample`.
        """
        out = self.quantize(self.encode_latents(x))
        return self.decode_latents(out.quantized), out

    def encode_latents(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> latents before quantisation (B, D, H/f, W/f); raises like forward."""
        self._check_image(x)
        return self.quant_conv(self.encoder(x))

    def encode(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> indices (B, H/f, W/f) int64; raises like forward."""
        return self.quantize.encode(self.encode_latents(x))

    def decode_code(self, indices: Tensor) -> Tensor:
        """indices (B, h, w) integer -> image (B, C, h*f, w*f).

        Raises ValueError if indices is not a 3-dimensional integer tensor.
        """
        if indices.dim() != 3 or indices.is_floating_point():
            raise ValueError(f"indices must be integers shaped (B, h, w), got {indices.dtype} {tuple(indices.shape)}")
        return self.decode_latents(self.quantize.decode(indices))

    def decode_latents(self, latents: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(latents))  # (B, D, h, w) -> (B, C, h*f, w*f)

    def _check_image(self, x: Tensor) -> None:
        channels, factor = self.config.image_channels, self.downsample
        if x.dim() != 4 or x.shape[1] != channels:
            raise ValueError(
                f"{self.config.vq_model} with image_channels={channels} needs images (B, {channels}, H, W), "
                f"got {tuple(x.shape)}"
            )
        height, width = x.shape[2:]
        if height % factor or width % factor:
            raise ValueError(
                f"image height {height} and width {width} must both be divisible by the {self.config.vq_model} "
                f"downsampling factor {factor}; resize or crop first"
            )
