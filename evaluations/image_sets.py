"""Sets of images to score: ADM's .npz files and every image source of the trainers, their features, and a cache.

A set is read in chunks of CHUNK images in a fixed order. Ranks take chunks in turn and every rank ends up with all
features in the order of the set, so numbers do not depend on the number of processes. Chunks are cached by the hash of
their pixels: what an interrupted evaluation has computed is not computed again, and a changed image is noticed.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from evaluations.distribution import Gaussian, gaussian_statistics
from evaluations.features import Extractor, Features, open_extractor
from tokenizer.data import ImageDataset, consecutive, describe_source, make_loader
from tokenizer.image_names import to_line
from tokenizer.image_readers import DEFAULTS, ImageOptions, ImageSource, UnreadableImage
from tokenizer.image_sources import open_images
from tokenizer.runtime import distributed
from tokenizer.runtime.files import atomic_write
from tokenizer.runtime.npz import Header, Npz
from tokenizer.runtime.parsing import parsing

T = TypeVar("T", Features, Gaussian)

CHUNK = 250          # images; of 256 x 256 pixels 49 MB
MAX_SIDE = 2048      # pixels of an .npz's images: a chunk of them has 3 GB
MAX_WIDTH = 8192     # features of stored statistics: a covariance of 0.5 GB
MAX_FORTRAN = 2**32  # bytes of an array that has to be read as a whole


class ImageSet(ABC):
    """Images of one size in a fixed order. name: the file's or folder's, without its path."""

    name: str
    count: int  # of images, may be 0
    size: str   # of an image, "HEIGHTxWIDTH"
    statistics: dict[str, Gaussian]  # "pooled" and "spatial" as stored beside the images; ADM's references have both
    ordered: bool  # whether the order is of the sampling, as in ADM's .npz files, not of the files' names

    @abstractmethod
    def chunks(self, mine: Callable[[int], bool]) -> Iterator[tuple[int, Tensor]]:
        """(number, uint8 (n, 3, H, W)) of the chunks whose number is `mine`, n = CHUNK but for the last."""


class NpzSet(ImageSet):
    """ADM's layout: `arr_0` uint8 (N, H, W, 3), and/or `mu`, `sigma` and `mu_s`, `sigma_s`. Streamed, not loaded; only
    an arr_0 in Fortran's order, whose images lie scattered, is.

    ValueError, naming file and key, for a file that is no .npz, is cut short, or holds something else.
    """

    ordered = True

    def __init__(self, path: Path):
        self.path, self.name, self.count, self.statistics = path, path.name, 0, {}
        with Npz(path) as file:
            for kind, keys in (("pooled", ("mu", "sigma")), ("spatial", ("mu_s", "sigma_s"))):
                if file.names.issuperset(keys):
                    self.statistics[kind] = Gaussian(*(self._array(file, key) for key in keys))
            if "arr_0" in file.names:
                self.header = file.header("arr_0")
                self._check_images(self.header)
                self.count, self.size = self.header.shape[0], "{}x{}".format(*self.header.shape[1:3])
            if not self.count and "pooled" not in self.statistics:
                found = ", ".join(sorted(file.names)[:20]) or "nothing"
                raise ValueError(f"{path} holds {found}; expected arr_0 with images, or mu and sigma")

    def _check_images(self, header: Header) -> None:
        shape = header.shape
        if header.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not all(shape[1:3]):
            raise ValueError(f"{self.path}: arr_0 must be uint8 (N, H, W, 3), it is {header}")
        if max(shape[1:3]) > MAX_SIDE:
            raise ValueError(f"{self.path}: arr_0 has images of {shape[1]}x{shape[2]} pixels; at most {MAX_SIDE} on a "
                             "side are read")
        if header.nbytes > header.room:
            raise ValueError(f"{self.path}: arr_0 ends before image {header.room // math.prod(shape[1:])}")
        if header.nbytes < header.room:
            raise ValueError(f"{self.path}: arr_0 is longer than its header says: {header}")
        if header.fortran and header.nbytes > MAX_FORTRAN:
            raise ValueError(f"{self.path}: arr_0 is stored in Fortran's order, which cannot be read image by image; "
                             "save np.ascontiguousarray(arr_0)")

    def _array(self, file: Npz, key: str) -> Tensor:
        header = file.header(key)
        if header.dtype.kind != "f":
            raise ValueError(f"{self.path}: {key} must hold floating-point numbers, it is {header.dtype}")
        if len(header.shape) > 2 or max(header.shape, default=0) > MAX_WIDTH:
            raise ValueError(f"{self.path}: {key} {header.shape} is no statistics of at most {MAX_WIDTH} features")
        array = file.array(key)
        if not np.isfinite(array).all():
            raise ValueError(f"{self.path}: {key} has values that are not finite")
        return torch.from_numpy(array.astype(np.float64))

    def chunks(self, mine: Callable[[int], bool]) -> Iterator[tuple[int, Tensor]]:
        if not self.count:
            return
        with Npz(self.path) as file:
            parts = _slices(file.array("arr_0")) if self.header.fortran else file.rows("arr_0", CHUNK)
            for number, pixels in enumerate(parts):
                if mine(number):
                    yield number, torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).contiguous()


def _slices(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[i : i + CHUNK] for i in range(0, len(array), CHUNK))


class SourceSet(ImageSet):
    """An image source, center-cropped to image_size, or as it is when all its images have one size (None).

    ValueError: images of other sizes, or one that cannot be read.
    """

    ordered = False

    def __init__(self, source: ImageSource, name: str, image_size: int | None, num_workers: int = 0):
        self.source, self.name, self.count, self.statistics = source, name, len(source), {}
        self.num_workers = num_workers
        if image_size is None:
            self.dataset: ImageDataset = _UncroppedImages(source, name)
        else:
            self.dataset = ImageDataset(source, image_size)
        self.size = f"{self.dataset.image_size}x{self.dataset.image_size}"

    def chunks(self, mine: Callable[[int], bool]) -> Iterator[tuple[int, Tensor]]:
        chunks = [(i, rows) for i, rows in enumerate(consecutive(self.count, CHUNK)) if mine(i)]
        loader = make_loader(self.dataset, [rows for _, rows in chunks], num_workers=self.num_workers)
        for (number, _), batch in zip(chunks, loader, strict=True):
            if batch["bad"]:
                raise ValueError(f"{self.name}: {to_line(batch['bad'][0])} cannot be read; all images are scored, so "
                                 "replace or remove it")
            yield number, in_colour(batch["image"])


class _UncroppedImages(ImageDataset):
    def __init__(self, source: ImageSource, name: str):
        try:
            width, height = source.read(0).size
        except UnreadableImage as error:
            raise ValueError(f"{name}: {error}") from error
        if width != height:
            raise ValueError(f"{name}: {to_line(source.name(0))} has {width}x{height} pixels, not a square; give "
                             "--image-size to crop all images")
        super().__init__(source, width)
        self.where = name

    def _transform(self, image: Image.Image, rng) -> Image.Image:  # noqa: ARG002
        if image.size != (self.image_size, self.image_size):
            raise ValueError(f"{self.where}: images of {image.width}x{image.height} and of {self.image_size}x"
                             f"{self.image_size} pixels; give --image-size to crop all alike")
        return image


def in_colour(x: Tensor) -> Tensor:
    """Bytes (B, 1 or 3, S, S) -> (B, 3, S, S)."""
    return x.expand(-1, 3, -1, -1).contiguous()


def pixel_hash(images: Tensor) -> str:
    """Of bytes (n, 3, H, W) on the CPU, 64 hex digits."""
    return hashlib.sha256(repr(tuple(images.shape)).encode() + images.numpy().tobytes()).hexdigest()


def open_set(
    path: str, image_size: int | None = None, num_workers: int = 0, options: ImageOptions = DEFAULTS
) -> ImageSet:
    """An ADM .npz, or whatever tokenizer.image_sources.open_images takes ("digits": scikit-learn's).

    image_size: center-crop to it (not for .npz files, whose images are final). options: how images are read.
    ValueError and FileNotFoundError name the path and what is wrong; so do folders of sample_c2i.py, whose grid.png is
    no sample.
    """
    folder = Path(path).expanduser()
    for settings in sorted([*folder.glob("settings.json"), *folder.glob("*/settings.json")]):
        if (settings.parent / "images").is_dir():
            raise ValueError(f"{path}: {settings.parent} was written by sample_c2i.py and holds more than samples; "
                             f"name {settings.with_name('samples.npz')}")
    if path.endswith(".npz"):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file")
        return NpzSet(Path(path))
    source = open_images(None if path == "digits" else path, options=options)
    for line in describe_source(source):
        distributed.print0(f"{Path(path).name}: {line}")
    return SourceSet(source, Path(path).name, image_size, num_workers)


# ---------------------------------------------------------------------------------------------------------------------
# features


class FeatureCache:
    """Features and statistics on disk, by the hash of what they were computed from. folder None: nothing is kept."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def features(self, extractor: Extractor, images: Tensor, device: torch.device) -> tuple[Features, str]:
        """images uint8 (n, 3, H, W), on the CPU -> their features, on the CPU, and the hash of their pixels."""
        digest = pixel_hash(images)

        def compute() -> Features:
            pooled, logits, spatial = extractor(images.to(device))
            return Features(pooled.cpu(), None if logits is None else logits.cpu(),
                            None if spatial is None else spatial.cpu())

        return self._cached(extractor, f"features-{digest[:40]}", Features, compute), digest

    def gaussian(self, extractor: Extractor, digest: str, kind: str, features: Tensor) -> Gaussian:
        """The Gaussian of a set's features (N, D); digest: of the set's pixels; kind: "pooled" or "spatial"."""
        return self._cached(extractor, f"{kind}-{digest[:40]}", Gaussian, lambda: gaussian_statistics(features))

    def _cached(self, extractor: Extractor, name: str, form: type[T], compute: Callable[[], T]) -> T:
        """A named tuple of tensors, or None."""
        if self.folder is None:
            return compute()
        path = self.folder / extractor.sha256[:16] / f"{name}.npz"
        if path.exists():
            try:
                with parsing(path), np.load(path) as file:
                    kept = dict(file)
                    if str(kept.pop(_DIGEST, None)) != _digest(kept):
                        raise ValueError("other contents than were written")
                    return form(**{key: torch.from_numpy(value) for key, value in kept.items()})
            except ValueError as error:
                print(f"computing again what the cache should hold: {error}", file=sys.stderr)  # noqa: T201
        found = compute()
        arrays: dict[str, Any] = {key: value.numpy() for key, value in found._asdict().items() if value is not None}
        arrays[_DIGEST] = _digest(arrays)
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: np.savez(file, **arrays))
        return found


_DIGEST = "sha256"  # of the other arrays of a file


def _digest(arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    """Names, types and sizes as well: zip's checksums do not notice an array that was exchanged."""
    digest = hashlib.sha256()
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


class SetFeatures(NamedTuple):
    """Features of a whole set in its order, and the hash of its pixels (64 hex digits)."""

    features: Features
    sha256: str

    @classmethod
    def join(cls, parts: dict[int, tuple[Features, str]]) -> SetFeatures:
        """Chunks of this rank by number -> the set on every rank. Collective."""
        everywhere: dict[int, tuple[Features, str]] = {}
        for found in distributed.gather_objects(parts):
            everywhere.update(found)
        ordered = [everywhere[number] for number in sorted(everywhere)]
        pooled, logits, spatial = zip(*(features for features, _ in ordered), strict=True)
        others = (None if column[0] is None else torch.cat(column) for column in (logits, spatial))
        joined = Features(torch.cat(pooled), *others)
        return cls(joined, hashlib.sha256("".join(digest for _, digest in ordered).encode()).hexdigest())


def extract(images: ImageSet, extractor: Extractor, device: torch.device, cache: FeatureCache) -> SetFeatures:
    """Features of all images of a set, on every rank. Collective."""
    rank, world = distributed.rank(), distributed.world_size()
    chunks = images.chunks(lambda number: number % world == rank)
    total = len(range(rank, len(consecutive(images.count, CHUNK)), world))
    shown = tqdm(chunks, desc=images.name, unit=f"x{CHUNK}", total=total, disable=None if rank == 0 else True)
    return SetFeatures.join({number: cache.features(extractor, pixels, device) for number, pixels in shown})


# ---------------------------------------------------------------------------------------------------------------------
# what the flags of extractor_flags.py mean


def extractor_of_flags(args: argparse.Namespace, device: torch.device) -> tuple[Extractor | None, str]:
    """The extractor that the flags ask for, or None and why it cannot be had. Its default place may be empty; a file
    that the user named must be there (FileNotFoundError, ValueError).
    """
    try:
        return open_extractor(args.features, args.inception_weights).to(device), ""
    except FileNotFoundError as error:
        if args.features != "inception" or args.inception_weights is not None:
            raise
        return None, str(error)


def cache_of_flags(args: argparse.Namespace) -> FeatureCache:
    return FeatureCache(None if args.no_cache else args.cache_dir)
