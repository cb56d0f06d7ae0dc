"""From images to codes, a shard at a time: the work of extract_codes.py without its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from autoregressive.code_shards import code_dtype
from tokenizer.data import BadImageCounter, ImageDataset, make_loader
from tokenizer.pixels import from_uint8
from tokenizer.runtime.optim import DTYPES
from tokenizer.vq_model import VQModel


def make_views(x: Tensor, size: int, flip: bool, ten: bool) -> Tensor:
    """Crops (B, C, S', S') -> views (B, V, C, size, size). S' is larger than size for ten crops, else equal."""
    if ten:
        from torchvision.transforms.functional import ten_crop  # here because torchvision takes a second to import

        return torch.stack(ten_crop(x, [size, size]), dim=1)
    return torch.stack([x, x.flip(-1)] if flip else [x], dim=1)


def default_batch_size(image_size: int, device: torch.device) -> int:
    """Images at a time. On a CPU few large ones: their feature maps should stay in its caches, and in memory."""
    return 64 if device.type == "cuda" else max(1, 64 * 32 * 32 // image_size**2)


@torch.inference_mode()
def extract_shard(
    model: VQModel, dataset: ImageDataset, batches: Sequence[list[int]], *, image_size: int, flip: bool = False,
    ten: bool = False, precision: str = "none", num_workers: int = 0, device: torch.device, bad: BadImageCounter,
    progress: Callable[[int], object] | None = None, encode: Callable[[Tensor], Tensor] | None = None,
    fill_to: int = 0,
) -> tuple[np.ndarray, list[int]]:
    """Encode all views of the images at `batches` of places.

    dataset: of image_size, or for ten crops of the larger size that they are cut from. precision: a key of DTYPES.
    progress: called with the number of images done, per batch. encode: model.encode_latents (the default) or its
    compiled form, which the caller keeps from shard to shard. fill_to: images that smaller batches are filled up to for
    it, as each new size would be compiled anew, for minutes. Unreadable images are left out and counted in `bad`.
    Returns codes (n, V, tokens) in the smallest unsigned type and the places of the n images.
    """
    rows, places = [], []
    # Wide convolutions run faster with channels innermost (VQ-16 on a CPU: by 15 %); VQ-4's narrow ones run slower.
    layout = torch.channels_last if model.encoder.conv_in.out_channels >= 128 else torch.contiguous_format
    model.encoder.to(memory_format=layout)
    for batch in make_loader(dataset, batches, num_workers=num_workers, pin_memory=device.type == "cuda"):
        bad.add(batch["bad"])
        x = make_views(from_uint8(batch["image"].to(device, non_blocking=True)), image_size, flip, ten)
        missing = fill_to - len(x)
        given = torch.cat([x, x.new_zeros(missing, *x.shape[1:])]) if missing > 0 else x
        with torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "none"):
            z = (encode or model.encode_latents)(given.flatten(0, 1).contiguous(memory_format=layout))
            codes = model.quantize.encode(z[: x.shape[0] * x.shape[1]])
        codes = codes.view(*x.shape[:2], -1)
        # The loader puts another image in an unreadable one's place, which is for training: here it is left out.
        keep = [dataset.source.name(i) not in bad.names for i in batch["index"].tolist()]
        rows.append(codes.cpu().numpy()[keep].astype(code_dtype(model.quantize.num_codes)))
        places += [i for i, kept in zip(batch["index"].tolist(), keep, strict=True) if kept]
        if progress is not None:
            progress(len(keep))
    return np.concatenate(rows), places
