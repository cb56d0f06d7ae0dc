"""Pixel metrics between two batches of images: arrays in, one number per image out. No model, no file access.

Everything is computed in float64 and per image, so the mean over a data set does not depend on how it was batched (the
PSNR of a batch's pooled error is *not* the mean PSNR of its images).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SSIM_WINDOW = 7  # side of the uniform window, scikit-image's default
SSIM_K1, SSIM_K2 = 0.01, 0.03  # Wang et al., "Image quality assessment", IEEE TIP 2004, equation 13


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error over channels and pixels, in squared units of the images.

    x, y: (N, C, H, W), any real dtype. Returns (N,) float64 on their device.
    ValueError: shapes differ or are not 4-D, or an image has no pixels.
    """
    x, y = _as_pair(x, y)
    return (x - y).square().mean(dim=(1, 2, 3))


def psnr(x: Tensor, y: Tensor, data_range: float) -> Tensor:
    """Peak signal-to-noise ratio in dB, 10 log10(data_range^2 / mse).

    x, y: (N, C, H, W) in [0, data_range], any real dtype; data_range: 1.0 for floats in [0, 1], 255 for bytes.
    Returns (N,) float64; `inf` for an image that equals its reference, so a mean over images is `inf` as soon as one
    of them is reproduced exactly.
    ValueError: as `mse`, or data_range is not positive.
    """
    _check_data_range(data_range)
    return 10.0 * torch.log10(data_range**2 / mse(x, y))


def ssim(x: Tensor, y: Tensor, data_range: float) -> Tensor:
    """Structural similarity, in [-1, 1], 1 for equal images: scikit-image's `structural_similarity` with its defaults.

    That is: 7x7 uniform window, sample (co)variances, K1 = 0.01, K2 = 0.03, mean over channels and over the windows
    that lie wholly inside the image. LlamaGen's evaluation passes data_range 2 for images in [0, 1], which reads a
    little high; give the range that the images really have.

    x, y: (N, C, H, W) in [0, data_range], any real dtype. Returns (N,) float64.
    ValueError: as `psnr`, or the images are smaller than 7x7.
    """
    _check_data_range(data_range)
    x, y = _as_pair(x, y)
    height, width = x.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"ssim needs images of at least {SSIM_WINDOW}x{SSIM_WINDOW} pixels, got {height}x{width}")
    c1, c2 = (SSIM_K1 * data_range) ** 2, (SSIM_K2 * data_range) ** 2
    to_sample = SSIM_WINDOW**2 / (SSIM_WINDOW**2 - 1)  # the window mean is the population moment

    mean_x, mean_y = _window_mean(x), _window_mean(y)  # (N, C, H-6, W-6)
    var_x = to_sample * (_window_mean(x * x) - mean_x * mean_x)
    var_y = to_sample * (_window_mean(y * y) - mean_y * mean_y)
    cov_xy = to_sample * (_window_mean(x * y) - mean_x * mean_y)
    luminance = (2 * mean_x * mean_y + c1) / (mean_x * mean_x + mean_y * mean_y + c1)
    contrast_structure = (2 * cov_xy + c2) / (var_x + var_y + c2)
    return (luminance * contrast_structure).mean(dim=(1, 2, 3))


def to_uint8(x: Tensor) -> Tensor:
    """Bytes of images in [-1, 1]: clamp(127.5 x + 128, 0, 255), truncated, the rule that LlamaGen writes PNGs with.

    x: any shape, floating; values outside [-1, 1] saturate. Returns uint8 of the same shape.
    ValueError: x is not floating point.
    """
    if not x.is_floating_point():
        raise ValueError(f"to_uint8 takes floating-point images in [-1, 1], got {x.dtype}")
    # Half precision cannot hold 127.5 x + 128 to the byte, so it is widened first.
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (127.5 * wide + 128.0).clamp(0.0, 255.0).to(torch.uint8)


def from_uint8(x: Tensor) -> Tensor:
    """Bytes of any shape -> float32 in [-1, 1], x / 127.5 - 1: bit for bit torchvision ToTensor, Normalize(.5, .5).

    ValueError: x is not uint8.
    """
    if x.dtype != torch.uint8:
        raise ValueError(f"from_uint8 takes the bytes of images, got {x.dtype}")
    return x.float().div_(127.5).sub_(1)


def _window_mean(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, C, H-6, W-6): mean of each 7x7 window that lies inside the image."""
    return F.avg_pool2d(x, SSIM_WINDOW, stride=1)


def _as_pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape != y.shape:
        raise ValueError(f"the two batches of images differ in shape: {tuple(x.shape)} and {tuple(y.shape)}")
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"images must be (N, C, H, W) with at least one pixel, got shape {tuple(x.shape)}")
    return x.double(), y.double()


def _check_data_range(data_range: float) -> None:
    if not data_range > 0:
        raise ValueError(f"data_range is the width of the pixel scale and must be positive, got {data_range}")
