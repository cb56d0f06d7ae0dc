"""Images for training and evaluation: crops, augmentation, deterministic batches.

Everything random about an item is a function of (seed, epoch, index), never of a worker, a rank or the batch it is in;
so a resumed run, a run on more processes and a run with other workers see the same pictures. The sources themselves are
opened by `tokenizer.image_sources` and read by `tokenizer.image_readers`.
"""

from __future__ import annotations

import atexit
import math
import multiprocessing
import random
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from tokenizer.choices import AUGMENTATIONS
from tokenizer.image_classes import describe_classes
from tokenizer.image_names import to_line
from tokenizer.image_readers import ImageSource, UnreadableImage
from tokenizer.image_sources import open_images
from tokenizer.pixels import from_uint8
from tokenizer.runtime import distributed
from tokenizer.runtime.command import CannotContinue
from tokenizer.runtime.seeding import fold

__all__ = [
    "BadImageCounter",
    "ImageDataset",
    "ImageSource",
    "UnreadableImage",
    "center_crop_arr",
    "collate",
    "consecutive",
    "default_augment",
    "describe_source",
    "image_to_bytes",
    "image_to_tensor",
    "make_loader",
    "open_images",
    "random_crop_arr",
    "split_holdout",
    "spread",
]

_MAX_RESIZED_PIXELS = 2**27  # a 1 x 20,000 picture at 256 would grow to 1.3 gigapixels before it is cropped
_MAX_BAD_IN_A_ROW = 1000  # then the disk is gone, not the picture
_PROBED = 16  # images whose range of values is looked at


# ---------------------------------------------------------------------------------------------------------------------
# crops (definitions of ADM and LlamaGen, facts/llamagen.md section 2)


def _resize_shorter_side(image: Image.Image, target: int) -> Image.Image:
    """Shorter side -> target pixels: halve with BOX while at least twice too large, then BICUBIC (up or down)."""
    if max(image.size) * target * target > _MAX_RESIZED_PIXELS * min(image.size):
        raise UnreadableImage(f"{image.width}x{image.height} pixels are too elongated to be resized to {target}")
    while min(image.size) >= 2 * target:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = target / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


def _crop(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))


def center_crop_arr(image: Image.Image, size: int) -> Image.Image:
    """Resize the shorter side to `size` and cut the central square. Smaller pictures are enlarged (BICUBIC).

    image: mode L, RGB or RGBA (alpha weights the colours while resizing). Returns size x size in the same mode.
    """
    image = _resize_shorter_side(image, size)
    return _crop(image, (image.width - size) // 2, (image.height - size) // 2, size)


def random_crop_arr(
    image: Image.Image, size: int, rng: random.Random, min_frac: float = 0.8, max_frac: float = 1.0
) -> Image.Image:
    """Cut a random square that covers min_frac to max_frac of the shorter side, as size x size pixels.

    Draws three numbers from rng, in LlamaGen's order: resized shorter side, top, left.
    """
    shorter = rng.randrange(math.ceil(size / max_frac), math.ceil(size / min_frac) + 1)
    image = _resize_shorter_side(image, shorter)
    top = rng.randrange(image.height - size + 1)
    left = rng.randrange(image.width - size + 1)
    return _crop(image, left, top, size)


def image_to_bytes(image: Image.Image) -> Tensor:
    """PIL L, RGB or RGBA -> uint8 (C, H, W)."""
    pixels = np.array(image, dtype=np.uint8)  # (H, W) or (H, W, C); a copy, because PIL's own memory is read-only
    pixels = pixels.reshape(image.height, image.width, -1)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def image_to_tensor(image: Image.Image) -> Tensor:
    """PIL L, RGB or RGBA -> float32 (C, H, W) in [-1, 1], see from_uint8."""
    return from_uint8(image_to_bytes(image))


# ---------------------------------------------------------------------------------------------------------------------
# dataset


def default_augment(source: ImageSource, image_size: int) -> str:
    """The augmentation for training on `source`: a key of AUGMENTATIONS.

    'none' for digits, 'flip' when at least half of the readable images among 64, evenly spaced, are no larger than
    image_size on their shorter side (a crop would only blur them), else 'crop-flip'. Raises ValueError when none of
    them is readable.
    """
    if not source.flippable:
        return "none"
    small = []
    for i in spread(len(source), 64):
        try:
            small.append(min(source.read(i).size) <= image_size)
        except UnreadableImage:
            continue  # training will meet and report it
    if not small:
        raise ValueError(f"none of {min(len(source), 64)} images can be read, from {to_line(source.name(0))} on")
    return "flip" if 2 * sum(small) >= len(small) else "crop-flip"


def describe_source(source: ImageSource) -> list[str]:
    """Lines to print when work on a source begins: its classes, what was left out of it, and pictures that would come
    out nearly black.
    """
    lines = [describe_classes(source.labels, source.classes), *(f"note: {note}" for note in source.notes)]
    lines += [f"left out a damaged shard: {line}" for line in source.damaged]
    deep = [value for i in spread(len(source), _PROBED) if (value := source.largest_value(i)) is not None]
    top, depth = max(deep, default=0), source.options.bit_depth
    bits = max(8, top.bit_length())
    if deep and bits <= depth - 2:  # less than a quarter of the scale
        lines.append(f"note: {len(deep)} of {min(len(source), _PROBED)} images that were looked at have 16 bits per "
                     f"channel and values up to {top}; on the scale of --bit-depth {depth}, up to {2**depth - 1}, they "
                     f"are nearly black. If that is their brightest, pass --bit-depth {bits}")
    return lines


class ImageDataset(Dataset):
    """Image items by (epoch, position), or by position alone, which is epoch 0.

    source: what `open_images` returned. image_size: S, in pixels. augment: a key of AUGMENTATIONS. seed: of the
    augmentation. indices: optional subset of the source, e.g. one half of `split_holdout`; positions count within it.
    Raises ValueError for an unknown augmentation, one that would mirror digits, or indices outside the source.
    """

    def __init__(
        self,
        source: ImageSource,
        image_size: int,
        *,
        augment: str = "none",
        seed: int = 0,
        indices: Sequence[int] | np.ndarray | None = None,
    ):
        if augment not in AUGMENTATIONS:
            raise ValueError(f"augment {augment!r} is none of {', '.join(AUGMENTATIONS)}")
        if augment != "none" and not source.flippable:
            raise ValueError(
                f"augment {augment!r} mirrors images, but the mirror image of a digit is no digit; use 'none'"
            )
        if image_size < 1:
            raise ValueError(f"image size {image_size} is not positive")
        self.source = source
        self.image_size = image_size
        self.augment = augment
        self.seed = seed
        self.indices = np.arange(len(source)) if indices is None else np.array(indices, dtype=np.int64)  # (n,)
        if not len(self.indices):
            raise ValueError("the subset of images is empty")
        if self.indices.min() < 0 or self.indices.max() >= len(source):
            raise ValueError(
                f"subset indices span [{self.indices.min()}, {self.indices.max()}], the source has {len(source)} images"
            )

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        """image uint8 (C, S, S), label int, index int (in the source), bad: names of unreadable images.

        Bytes, because they are a quarter of what floats would be, between processes and to the device: see from_uint8.
        An unreadable image is replaced by the next readable one of the subset, (position + 1) % n and so on, together
        with its label; `index` stays the one asked for, so that every index occurs. TooManyBadImages when 1,000
        images in a row, or all, are unreadable.
        """
        epoch, position = key if isinstance(key, tuple) else (0, key)
        n = len(self.indices)
        asked = int(self.indices[position])
        bad: list[str] = []
        for step in range(min(n, _MAX_BAD_IN_A_ROW)):
            used = int(self.indices[(position + step) % n])
            try:
                image = self._transform(self.source.read(used), random.Random(fold(self.seed, epoch, asked)))
            except UnreadableImage:
                bad.append(self.source.name(used))
                continue
            return {"image": image_to_bytes(image), "label": self.source.label(used), "index": asked, "bad": bad}
        raise TooManyBadImages(f"{len(bad)} images in a row cannot be read, from {to_line(bad[0])} to "
                               f"{to_line(bad[-1])}")

    def _transform(self, image: Image.Image, rng: random.Random) -> Image.Image:
        if self.augment == "crop-flip":
            image = random_crop_arr(image, self.image_size, rng)
        else:
            image = center_crop_arr(image, self.image_size)
        if self.augment != "none" and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return image


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Items -> each of their entries stacked, such as image (B, C, S, S); bad: list of names (of all items)."""
    batch = {key: default_collate([item[key] for item in items]) for key in items[0] if key != "bad"}
    batch["bad"] = [name for item in items for name in item["bad"]]
    return batch


def _ignore_sigterm(_worker: int) -> None:
    # Schedulers and torchrun signal the whole process group; the workers must outlive the checkpoint that follows.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _kill_workers() -> None:
    """At exit, before multiprocessing's own handler: that one sends SIGTERM, which they ignore, and waits for them."""
    if hasattr(signal, "SIGCHLD"):  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as crashed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def make_loader(
    dataset: Dataset,
    batch_sampler: Iterable[list],
    *,
    num_workers: int = 0,
    pin_memory: bool = False,
    collate: Callable[[list[Any]], Any] = collate,
) -> DataLoader:
    """DataLoader over batches of keys (StepSampler, or a plain list of lists). Batches do not depend on num_workers.

    Workers persist between iterations and compute with one thread each (PyTorch's own setting in a worker).
    """
    if num_workers < 0:
        raise ValueError(f"num_workers {num_workers} is negative")
    # Fork shares the index of the images with the workers and starts at once; they touch neither CUDA nor a shared file
    # offset. Elsewhere (no fork on Windows, unsafe on macOS) the platform's default pickles the dataset instead.
    forks = num_workers > 0 and sys.platform.startswith("linux")
    if num_workers:
        # Exit handlers run last in, first out; multiprocessing's came with the import of DataLoader. Once is enough.
        atexit.unregister(_kill_workers)
        atexit.register(_kill_workers)
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=num_workers,
        pin_memory=pin_memory,
        collate_fn=collate,
        persistent_workers=num_workers > 0,
        multiprocessing_context="fork" if forks else None,
        # Otherwise opening an iterator would draw from the global generator, and a resumed run opens one more.
        generator=torch.Generator(),
        worker_init_fn=_ignore_sigterm,
    )


class TooManyBadImages(CannotContinue):
    """More unreadable images than were tolerated."""


class BadImageCounter:
    """Collects the names of unreadable images and stops the run when there are too many.

    limit: how many distinct ones are tolerated; 0 stops at the first.
    """

    def __init__(self, limit: int):
        if limit < 0:
            raise ValueError(f"limit of unreadable images {limit} is negative")
        self.limit = limit
        self.names: set[str] = set()

    def add(self, names: Iterable[str]) -> None:
        """Count names (repeats count once). TooManyBadImages lists up to 20 of them when they exceed the limit."""
        self.names.update(names)
        if len(self.names) > self.limit:
            shown = [to_line(name) for name in sorted(self.names)[:20]]
            more = f" and {len(self.names) - len(shown)} more" if len(self.names) > len(shown) else ""
            raise TooManyBadImages(
                f"{len(self.names)} unreadable images, {self.limit} are tolerated: {', '.join(shown)}{more}. Replace "
                "or remove them, or raise --max-bad-images"
            )

    def everywhere(self) -> list[str]:
        """Collective. The names that any rank has met, sorted."""
        return sorted(set().union(*distributed.gather_objects(self.names)))

    def agree(self) -> None:
        """Collective. Count what other ranks have met: all ranks raise TooManyBadImages together."""
        self.add(self.everywhere())

    def state_dict(self) -> list[str]:
        """Collective."""
        return self.everywhere()

    def load_state_dict(self, names: Iterable[str]) -> None:
        self.names.update(names)


def split_holdout(n: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split range(n) at random into training and held-out indices, a function of the arguments alone.

    Returns (train (n - size,), held out (size,)), sorted int64. Raises ValueError unless 0 <= size < n.
    """
    if not 0 <= size < n:
        raise ValueError(f"cannot hold out {size} of {n} images: at least one must remain for training")
    # Raw doubles of PCG64, because numpy may change Generator.permutation between versions.
    held_out = np.zeros(n, dtype=bool)
    held_out[np.argsort(np.random.Generator(np.random.PCG64(fold(seed, n))).random(n), kind="stable")[:size]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def spread(n: int, count: int) -> list[int]:
    """At most count of range(n), evenly spaced: images are often sorted by class."""
    count = min(n, count)
    return [i * n // count for i in range(count)]


def consecutive(n: int, batch_size: int) -> list[list[int]]:
    """range(n) in order, in batches; the last one may be smaller."""
    return [list(range(i, min(i + batch_size, n))) for i in range(0, n, batch_size)]
