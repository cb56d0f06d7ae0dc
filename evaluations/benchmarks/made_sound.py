"""Sound made in the code, what a codec of it is trained on and how far off it is."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SOUND_RATE, SOUND_LENGTH = 8000, 2048  # Hz, samples


def sounds(count: int, seed: int) -> Tensor:
    """Harmonic tones that swell and die away, with noise: (count, 1, SOUND_LENGTH), peaks at 1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=generator)

    time = torch.arange(SOUND_LENGTH) / SOUND_RATE  # s
    number = torch.arange(1, 9)[:, None]
    pitch = 80 * 10 ** draw(0, 1)  # Hz
    strength = number ** -draw(0.5, 2.0) * (number * pitch < SOUND_RATE / 2)
    phase = 2 * math.pi * torch.rand(count, 8, 1, generator=generator)
    tone = (strength * torch.sin(2 * math.pi * number * pitch * time + phase)).sum(1, keepdim=True)
    since = time - draw(-0.05, 0.15)
    envelope = (since / draw(0.002, 0.03)).clamp(0, 1) * torch.exp(-since.clamp(min=0) / draw(0.02, 0.4))
    noise = 10 ** draw(-2.5, -0.7) * torch.randn(count, 1, SOUND_LENGTH, generator=generator)
    sound = tone * envelope + noise
    return sound / sound.abs().amax(-1, keepdim=True)


def log_spectra(x: Tensor) -> list[Tensor]:
    """Sound (B, 1, T) -> log10 magnitudes (B, bins, frames) at three scales; a full-scale sine is 0, the floor -2."""
    found = []
    for size in (64, 256, 1024):
        window = torch.hann_window(size)
        spectrum = torch.stft(x[:, 0], size, size // 4, window=window, return_complex=True).abs() / (window.sum() / 2)
        found.append((spectrum.square() + 1e-4).log10() / 2)
    return found


def objective(y: Tensor, x: Tensor) -> Tensor:
    """Log-spectral plus waveform error of sound (B, 1, T): []."""
    spectral = torch.stack([F.l1_loss(a, b) for a, b in zip(log_spectra(y), log_spectra(x), strict=True)])
    return spectral.mean() + F.l1_loss(y, x)


def spectral_error(y: Tensor, x: Tensor) -> Tensor:
    """Of each window (B,), in dB: mean over scales, frames and bins."""
    scales = [(a - b).abs().mean((1, 2)) for a, b in zip(log_spectra(y), log_spectra(x), strict=True)]
    return 20 * torch.stack(scales).mean(0)
