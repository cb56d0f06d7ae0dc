"""Validation of an image tokenizer on held-out images: the same numbers for the trainer and for reconstruct.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from tokenizer import pixels
from tokenizer.code_meter import CodeMeter
from tokenizer.data import BadImageCounter, ImageDataset, ImageSource, make_loader
from tokenizer.pixels import from_uint8
from tokenizer.runtime import distributed
from tokenizer.vq_model import VQModel

MAX_PSNR = 100.0  # dB, of a picture that is reproduced exactly: its infinity would swallow the mean


def channels_last(z: Tensor) -> Tensor:
    """(B, D, h, w) -> tokens (B h w, D) in the order of the codes."""
    return z.movedim(1, -1).flatten(0, -2)


class ReconstructionMeter:
    """Exact means over all images of all ranks, whatever their batches.

    Pictures follow LlamaGen's protocol: the reconstruction is rounded to bytes, the reference is not; both in [0, 1].
    SSIM is scikit-image's with data range 1 (LlamaGen passes 2 and reads higher).
    """

    def __init__(self, num_codes: int, dim: int, device: torch.device, lpips: nn.Module | None = None):
        self.lpips = lpips
        self.sums = torch.zeros(5, dtype=torch.float64, device=device)  # images, mse, psnr, ssim, lpips
        self.codes = CodeMeter(num_codes, dim, device)

    @torch.no_grad()
    def add(self, x: Tensor, x_hat: Tensor, latents: Tensor, codes: Tensor | None, indices: Tensor | None) -> None:
        """x, x_hat (B, C, H, W) in [-1, 1]; latents, codes (N, D); indices int64, any shape. None: no codebook yet."""
        reference = (x.float() + 1) / 2
        picture = pixels.to_uint8(x_hat).float() / 255
        per_image = [
            torch.ones(len(x), dtype=torch.float64, device=x.device),
            pixels.mse(x, x_hat.float()),
            pixels.psnr(picture, reference, 1.0).clamp(max=MAX_PSNR),
            pixels.ssim(picture, reference, 1.0),
            torch.zeros(len(x), device=x.device) if self.lpips is None else self.lpips(x, x_hat).flatten(),
        ]
        self.sums += torch.stack([v.sum(dtype=torch.float64) for v in per_image])
        self.codes.add(latents, codes, indices)

    def result(self, codebook: Tensor | None) -> dict[str, Any]:
        """Collective. images; mse (of images in [-1, 1]); psnr (dB, at most MAX_PSNR per image); ssim; lpips if a
        network was given; and CodeMeter's.
        """
        images, *sums = distributed.all_reduce_(self.sums).tolist()
        names = ("mse", "psnr", "ssim", "lpips")
        out: dict[str, Any] = {"images": int(images), **{n: s / images for n, s in zip(names, sums, strict=True)}}
        if self.lpips is None:
            del out["lpips"]
        return out | self.codes.result(codebook)


@torch.no_grad()
def validate(
    model: VQModel, batches: Iterable[dict[str, Any]], device: torch.device, lpips: nn.Module | None = None
) -> dict[str, Any]:
    """Reconstruct this rank's share of the images; numbers of ReconstructionMeter over all ranks. Collective."""
    was_training = model.training
    model.eval()
    meter = ReconstructionMeter(model.quantize.num_codes, model.quantize.dim, device, lpips)
    for batch in batches:
        x = from_uint8(batch["image"].to(device, non_blocking=True))
        z = model.encode_latents(x)
        out = model.quantize(z)
        latents = model.quantize.quantizer.latent(channels_last(z))
        codes = None if out.indices is None else channels_last(out.quantized)
        meter.add(x, model.decode_latents(out.quantized), latents, codes, out.indices)
    model.train(was_training)
    return meter.result(model.quantize.codebook() if model.quantize.has_codebook else None)


class Reconstruction(NamedTuple):
    """One batch of images that could be read, through the codes."""

    images: list[int]  # their places in the source
    x: Tensor          # (B, C, S, S) float32 in [-1, 1], center crops
    x_hat: Tensor      # (B, C, S, S), decoded from the codes alone
    latents: Tensor    # (B h w, D), as compared with codes
    codes: Tensor      # (B h w, D)
    indices: Tensor    # (B, h, w) int64


@torch.no_grad()
def reconstructions(
    model: VQModel, source: ImageSource, image_size: int, *, batches: Sequence[list[int]], num_workers: int,
    bad: BadImageCounter, device: torch.device,
) -> Iterator[Reconstruction]:
    """Encode and decode images of a source in the given order; unreadable ones are left out and counted in `bad`.

    model: in eval mode. batches: of places in the source. ValueError: the tokenizer has no codes yet, or the size does
    not fit it.
    """
    if not model.quantize.has_codebook:
        raise ValueError("the tokenizer is still in its continuous warm-up: it has no codes yet; train it further")
    if image_size % model.downsample:
        raise ValueError(f"--image-size {image_size} must be a multiple of {model.downsample}, the tokenizer's factor")
    loader = make_loader(ImageDataset(source, image_size), batches, num_workers=num_workers)
    for batch in tqdm(loader, unit="batch", disable=None if distributed.is_main() else True):
        bad.add(batch["bad"])
        # The loader puts another image in an unreadable one's place, which is for training: here it is left out.
        keep = [source.name(i) not in bad.names for i in batch["index"].tolist()]
        if not any(keep):
            continue
        x = from_uint8(batch["image"][keep].to(device))
        z = model.encode_latents(x)
        codes = model.quantize.encode(z)
        quantized = model.quantize.decode(codes)  # from the codes alone, as their reader would
        yield Reconstruction(
            batch["index"][keep].tolist(), x, model.decode_latents(quantized),
            model.quantize.quantizer.latent(channels_last(z)), channels_last(quantized), codes,
        )
