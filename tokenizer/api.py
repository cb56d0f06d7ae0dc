"""An image tokenizer in a few lines of Python.

    tokenizer = provq.load("runs/digits")         # see tokenizer/hub.py
    codes = tokenizer.encode("cat.png")           # (h, w) int64
    tokenizer.decode(codes).show()                # a PIL image
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from tokenizer.data import center_crop_arr, image_to_tensor
from tokenizer.hub import Pretrained
from tokenizer.image_readers import UnreadableImage, decode_image, to_channels
from tokenizer.pixels import to_uint8
from tokenizer.pretrained import load_tokenizer, save_pretrained, tokenizer_hash
from tokenizer.runtime.parsing import require_file
from tokenizer.vq_model import VQModel

BATCH = 32  # images at a time

Picture = str | Path | Image.Image
Pictures = Picture | npt.NDArray[Any] | Tensor | Sequence[Picture]


class ImageTokenizer(Pretrained):
    """An image tokenizer: images to codes and back.

    Where images are asked for: a path or PIL image, or a list of these; a uint8 array (H, W), (H, W, C) or
    (N, H, W, C); a tensor (C, H, W) or (N, C, H, W), uint8 or floating point in [0, 1], or in [-1, 1] if
    `value_range=(-1, 1)` says so (arrays of floats likewise). Paths and PIL images are resized and centre-cropped to
    `size` pixels, by default those of the training; arrays and tensors are taken as they are. One image gives one
    result, several give a batch.

    ValueError: what cannot be images, an image or size that does not fit; FileNotFoundError: no such file.
    """

    def __init__(self, model: VQModel):
        self.model = model.eval()

    @classmethod
    def open(
        cls, path: Path, device: torch.device, weights: str, *, codebook_l2_norm: bool | None = None
    ) -> ImageTokenizer:
        """See `load_tokenizer`. ValueError: also a run in its warm-up, which has no codes yet."""
        model = load_tokenizer(path, device, weights, codebook_l2_norm=codebook_l2_norm)
        if not model.quantize.has_codebook:
            raise ValueError(f"{path} is still in its continuous warm-up: it has no codes yet; train on, or name a "
                             "later checkpoint")
        return cls(model)

    def write(self, folder: Path) -> None:
        save_pretrained(self.model, folder)

    @property
    def sizes(self) -> Mapping[str, Any]:
        return {**self.model.config.to_dict(), "tokenizer_hash": tokenizer_hash(self.model)}

    def codebook(self) -> Tensor:
        """Effective codes (K, D)."""
        return self.model.quantize.codebook().detach()

    @property
    def num_codes(self) -> int:
        return self.model.quantize.num_codes

    @torch.inference_mode()
    def encode(
        self, images: Pictures, *, size: int | None = None, value_range: tuple[float, float] = (0, 1)
    ) -> Tensor:
        """-> codes (h, w) or (N, h, w) int64, on the model's device."""
        x, single = self._tensor(images, size, value_range)
        codes = torch.cat([self.model.encode(part) for part in x.split(BATCH)])
        return codes[0] if single else codes

    @torch.inference_mode()
    def latents(
        self, images: Pictures, *, size: int | None = None, value_range: tuple[float, float] = (0, 1)
    ) -> Tensor:
        """-> latents before quantization (D, h, w) or (N, D, h, w)."""
        x, single = self._tensor(images, size, value_range)
        latents = torch.cat([self.model.encode_latents(part) for part in x.split(BATCH)])
        return latents[0] if single else latents

    @torch.inference_mode()
    def decode(self, codes: Tensor | npt.NDArray[Any]) -> Any:
        """Codes (h, w) or (N, h, w), integers -> a PIL image, or a list of them. ValueError: no codes of this model."""
        if not isinstance(codes, Tensor):
            array = np.asarray(codes)  # torch has no uint16, in which codes are written
            codes = torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array.astype(np.float64))
        if codes.is_floating_point() or codes.dtype == torch.bool or codes.ndim not in (2, 3) or not codes.numel():
            raise ValueError(f"codes must be integers (h, w) or (N, h, w), got {codes.dtype} {tuple(codes.shape)}")
        low, high = int(codes.min()), int(codes.max())
        if low < 0 or high >= self.num_codes:
            raise ValueError(f"codes span [{low}, {high}]; this tokenizer has 0 to {self.num_codes - 1}")
        single = codes.ndim == 2
        codes = (codes[None] if single else codes).to(self.codebook().device, torch.int64)
        pictures = [_to_pil(pixels) for part in codes.split(BATCH) for pixels in to_uint8(self.model.decode_code(part))]
        return pictures[0] if single else pictures

    def reconstruct(self, images: Pictures, *, size: int | None = None) -> Any:
        """decode(encode(images))."""
        return self.decode(self.encode(images, size=size))

    def _tensor(self, images: Pictures, size: int | None, value_range: tuple[float, float]) -> tuple[Tensor, bool]:
        """-> (N, C, H, W) float32 in [-1, 1] on the model's device; whether it was one image."""
        channels = self.model.config.image_channels
        if isinstance(images, Tensor | np.ndarray):
            if size is not None:
                raise ValueError("size is for paths and PIL images; arrays and tensors are taken as they are")
            x, single = _from_numbers(images, channels, value_range)
        else:
            if tuple(value_range) != (0, 1):
                raise ValueError("value_range is for arrays and tensors; pictures have a range of their own")
            single = isinstance(images, str | Path | Image.Image)
            pictures: Any = [images] if single else images
            if not isinstance(pictures, Sequence) or not pictures:
                raise ValueError("no images: give a path, PIL image, array or tensor, or a list of paths and PIL "
                                 f"images, not {type(images).__name__}")
            side = self.model.config.image_size if size is None else size
            if side < 1 or side % self.model.downsample:
                raise ValueError(f"size {side} must be a multiple of {self.model.downsample}, the tokenizer's factor")
            x = torch.stack([image_to_tensor(center_crop_arr(_picture(p, channels), side)) for p in pictures])
        return x.to(self.codebook().device), single


def _picture(picture: Any, channels: int) -> Image.Image:
    """A path or PIL image -> the channels of the model."""
    name = "the PIL image"
    try:
        if isinstance(picture, Image.Image):
            return to_channels(picture, channels)
        if not isinstance(picture, str | Path):
            raise ValueError(f"a list holds paths and PIL images, not {type(picture).__name__}: stack arrays, tensors")
        name = str(picture)
        require_file(name, "image")
        return decode_image(Path(picture).read_bytes(), channels)
    except UnreadableImage as error:
        raise ValueError(f"{name} cannot be read: {error}") from error


def _from_numbers(
    images: npt.NDArray[Any] | Tensor, channels: int, value_range: tuple[float, float]
) -> tuple[Tensor, bool]:
    if isinstance(images, np.ndarray):  # channels last, as pictures are
        layout, numbers = "(H, W), (H, W, C) or (N, H, W, C)", images[..., None] if images.ndim == 2 else images
        if numbers.ndim not in (3, 4) or numbers.dtype.kind not in "uif":
            raise ValueError(f"an array of images is {layout}, got {images.dtype} {images.shape}")
        if numbers.dtype.kind != "f" and numbers.dtype != np.uint8:
            raise ValueError(f"pixels are uint8 or floating point, got {images.dtype}; convert with astype(np.uint8)")
        x = torch.from_numpy(numbers.astype(np.float32 if numbers.dtype.kind == "f" else np.uint8)).movedim(-1, -3)
    else:
        layout, x = "(C, H, W) or (N, C, H, W)", images.detach()
        if x.ndim not in (3, 4):
            raise ValueError(f"a tensor of images is {layout}, got {tuple(x.shape)}")
    single = x.ndim == 3
    x = x[None] if single else x
    if x.shape[1] != channels or not x.numel():
        raise ValueError(f"the tokenizer takes {channels} channels, images are {layout}, got {tuple(images.shape)}")
    if x.dtype == torch.uint8:
        return x.float().div_(127.5).sub_(1), single
    if not x.is_floating_point():
        raise ValueError(f"pixels are uint8 or floating point, got {images.dtype}; convert with .to(torch.uint8)")
    x = x.float()
    low, high = float(x.min()), float(x.max())
    if tuple(value_range) not in ((0, 1), (-1, 1)):
        raise ValueError(f"value_range is (0, 1) or (-1, 1), got {value_range}")
    if not (low >= value_range[0] and high <= value_range[1]):  # so that NaN is refused
        hint = ("; for 0 to 255 convert to uint8" if high > 1.5 else
                "; for images in [-1, 1] give value_range=(-1, 1)" if low < 0 else "")
        raise ValueError(f"pixels span [{low:.4g}, {high:.4g}], beyond value_range {tuple(value_range)}{hint}")
    return (x if tuple(value_range) == (-1, 1) else x * 2 - 1), single


def _to_pil(pixels: Tensor) -> Image.Image:
    """uint8 (C, H, W) -> L, RGB or RGBA."""
    array = pixels.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array)
