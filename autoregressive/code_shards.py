"""Codes of images on disk: a few memory-mapped shards and a manifest, or LlamaGen's folders of one file per image.

    CODES/manifest.json                sizes, classes, the tokenizer's hash, how images were cropped, the shards
    CODES/codes-00000-of-00008.npy     (images, views, tokens) in the smallest unsigned type that holds the codebook
    CODES/labels.npy                   (images,) int32
    CODES/names.txt                    the images' names in their source, a line each (tokenizer/image_names.py)

Views are crops and mirror images of one image; training draws one of them anew in every epoch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from tokenizer.data import spread
from tokenizer.image_classes import MAX_LABEL
from tokenizer.image_names import write_names
from tokenizer.runtime import config
from tokenizer.runtime.command import CannotContinue
from tokenizer.runtime.files import atomic_write, atomic_write_json
from tokenizer.runtime.mapped import map_array
from tokenizer.runtime.npz import read_npy
from tokenizer.runtime.seeding import fold
from tokenizer.stored import require_code_folder

FORMAT = "provq-codes-1"
AGAIN = "extract the codes again"  # what mends a damaged folder
MANIFEST, LABELS, NAMES = "manifest.json", "labels.npy", "names.txt"
# What codes of one data set have in common; mixing others would train one model on two languages.
COMMON = ("num_tokens", "codebook_size", "num_classes", "tokenizer_hash")


def code_dtype(codebook_size: int) -> np.dtype:
    """The smallest unsigned integer type that holds 0 .. codebook_size - 1."""
    return np.min_scalar_type(codebook_size - 1)


def shard_name(number: int, count: int) -> str:
    return f"codes-{number:05d}-of-{count:05d}.npy"


def file_hash(path: Path) -> str:
    """SHA-256 of a file, 64 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(
    folder: Path, description: Mapping[str, Any], shards: Sequence[Mapping[str, Any]], labels: Sequence[int],
    names: Sequence[str],
) -> None:
    """Finish a folder whose shard files lie there already; the manifest comes last and makes it readable.

    description: COMMON, views, and whatever else a reader should know. shards: file, images and sha256 of each.
    """
    atomic_write(folder / LABELS, lambda file: np.save(file, np.asarray(labels, dtype=np.int32)))
    write_names(folder / NAMES, names)
    manifest = {"format": FORMAT, "num_images": len(labels), **description, "shards": list(shards)}
    atomic_write_json(folder / MANIFEST, manifest)


@dataclass(frozen=True)
class CodeFiles:
    """One folder, opened. arrays: (images, views, tokens), memory-mapped; labels (images,)."""

    path: Path
    arrays: list[np.ndarray]
    labels: np.ndarray
    views: int
    num_tokens: int
    codebook_size: int
    num_classes: int
    tokenizer_hash: str  # "": unknown, in LlamaGen's folders
    fingerprint: str     # of the content, as the manifest has it
    shards: list[tuple[Path, str]] = field(default_factory=list)  # file and SHA-256 of each; none in LlamaGen's folders

    @cached_property
    def _starts(self) -> list[int]:
        """Number of the first image of each shard; an empty one is never found."""
        return [0, *itertools.accumulate(len(array) for array in self.arrays[:-1])]

    def damage(self, mine: Callable[[int], bool] = lambda number: True) -> list[str]:  # noqa: ARG005
        """Read the shards whose number is `mine` to the end -> what is wrong with them, a sentence each."""
        found = []
        for number, (path, sha256) in enumerate(self.shards):
            if not mine(number):
                continue
            if file_hash(path) != sha256:
                found.append(f"{path} is not the file that the manifest describes (another SHA-256)")
            elif self.arrays[number].max(initial=0) >= self.codebook_size:
                found.append(f"{path} has codes up to {self.arrays[number].max()}, the codebook has "
                             f"{self.codebook_size}")
        return found

    def codes(self, image: int, view: int) -> np.ndarray:
        """(tokens,) int64. CannotContinue: a code beyond the codebook, in a file that has changed since `damage`."""
        shard = bisect_right(self._starts, image) - 1
        image -= self._starts[shard]
        found = self.arrays[shard][image, view].astype(np.int64)
        if found.max() >= self.codebook_size or found.min() < 0:
            raise CannotContinue(f"{self.path}: image {image} of shard {shard} has codes in [{found.min()}, "
                                 f"{found.max()}], the codebook has {self.codebook_size}; {AGAIN}")
        return found


def read_folder(path: Path) -> CodeFiles:
    """Open a folder that has a manifest. ValueError: names the file that is absent, cut short or of another kind."""
    require_code_folder(path)
    if not (path / MANIFEST).is_file():
        raise ValueError(f"{path} has no {MANIFEST}: it is not finished, or no folder of codes. Run the command that "
                         "made it again, or autoregressive/extract_codes.py")
    manifest = config.load(path / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path / MANIFEST} has format {manifest.get('format')!r}, expected {FORMAT!r}")
    try:
        arrays = []
        for shard in manifest["shards"]:
            expected = (shard["images"], manifest["views"], manifest["num_tokens"])
            arrays.append(map_array(path / shard["file"], expected, code_dtype(manifest["codebook_size"]), AGAIN))
        labels = map_array(path / LABELS, (manifest["num_images"],), np.int32, AGAIN)
        if sum(len(array) for array in arrays) != len(labels):
            raise ValueError(f"{path / MANIFEST}: the shards hold {sum(map(len, arrays))} images, there are "
                             f"{len(labels)} labels")
        if len(labels) and not 0 <= labels.min() <= labels.max() < manifest["num_classes"]:
            raise ValueError(f"{path / LABELS} spans [{labels.min()}, {labels.max()}], the manifest says "
                             f"{manifest['num_classes']} classes; make the folder again")
        fingerprint = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode() + labels.tobytes()).hexdigest()
        return CodeFiles(path, arrays, labels, manifest["views"], **{k: manifest[k] for k in COMMON},
                         fingerprint=fingerprint, shards=[(path / s["file"], s["sha256"]) for s in manifest["shards"]])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / MANIFEST}: {error} is missing or of another kind") from error


def load_array(path: Path) -> np.ndarray:
    """A small .npy file. ValueError: it is missing, no array, or damaged."""
    try:
        array: np.ndarray = read_npy(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    return array


def is_llamagen(path: Path) -> bool:
    """Whether a folder is LlamaGen's: NAME_codes and NAME_labels inside, or itself NAME_codes."""
    return bool(_llamagen_pair(path))


def read_llamagen(path: Path, codebook_size: int) -> CodeFiles:
    """Read LlamaGen's folders, of one (1, views, tokens) file and one (1,) file per image, into memory.

    path: with NAME_codes/ and NAME_labels/ inside, or NAME_codes itself. ValueError: files that are absent, damaged, of
    other shapes or types, codes beyond the codebook, negative labels.
    """
    pair = _llamagen_pair(path)
    if pair is None:
        raise ValueError(f"{path} holds no pair of folders NAME_codes and NAME_labels")
    codes, labels = pair
    numbers = sorted(int(p.stem) for p in codes.glob("*.npy") if re.fullmatch("[0-9]+", p.stem))
    if not numbers or numbers != list(range(len(numbers))):
        raise ValueError(f"{codes} must hold 0.npy, 1.npy and so on; it holds {len(numbers)} numbered files")
    rows: list[np.ndarray] = []
    classes: list[int] = []
    for number in numbers:
        row, label = (load_array(folder / f"{number}.npy") for folder in (codes, labels))
        if row.ndim != 3 or len(row) != 1 or label.shape != (1,) or (rows and row.shape[1:] != rows[0].shape):
            raise ValueError(f"{codes / f'{number}.npy'} has shape {row.shape} and its label {label.shape}; expected "
                             "(1, views, tokens) alike for all images, and (1,)")
        for what, value in ((codes, row), (labels, label)):
            if value.dtype.kind not in "iu":
                raise ValueError(f"{what / f'{number}.npy'} holds {value.dtype}, expected whole numbers")
        if not 0 <= label[0] < MAX_LABEL:
            raise ValueError(f"{labels / f'{number}.npy'} has the label {label[0]}; labels count from 0 and are below "
                             f"{MAX_LABEL}")
        if row.min() < 0 or row.max() >= codebook_size:
            raise ValueError(f"{codes / f'{number}.npy'} has codes in [{row.min()}, {row.max()}], the codebook "
                             f"{codebook_size}; give the right --codebook-size")
        rows.append(row[0].astype(code_dtype(codebook_size)))
        classes.append(int(label[0]))
    array, classes_array = np.stack(rows), np.array(classes, dtype=np.int32)
    fingerprint = hashlib.sha256(array.tobytes() + classes_array.tobytes()).hexdigest()
    return CodeFiles(path, [array], classes_array, array.shape[1], array.shape[2], codebook_size,
                     int(classes_array.max()) + 1, "", fingerprint)


def _llamagen_pair(path: Path) -> tuple[Path, Path] | None:
    # Itself first; yet what holds the pairs may be called ..._codes as well.
    for candidates in ([path] if path.name.endswith("_codes") else [], sorted(path.glob("*_codes"))):
        pairs = [(p, p.with_name(re.sub("_codes$", "_labels", p.name))) for p in candidates]
        if found := [pair for pair in pairs if pair[0].is_dir() and pair[1].is_dir()]:
            break
    if len(found) > 1:
        raise ValueError(f"{path} holds several data sets: {', '.join(p.name for p, _ in found)}; name one of them")
    return found[0] if found else None


class CodeDataset(Dataset):
    """Codes of images from one folder, or several of the same images, whose views are put together.

    Items by (epoch, position) or position: codes int64 (tokens,), label int, index int (of the image). With a seed, the
    view is drawn anew for every epoch and image, as a function of the three; without (None), it is the first.
    """

    def __init__(self, files: Sequence[CodeFiles], indices: Sequence[int] | np.ndarray | None = None,
                 seed: int | None = None):
        first = files[0]
        for other in files[1:]:
            _require_alike(first, other)
            if not np.array_equal(first.labels, other.labels):
                raise ValueError(f"{other.path} holds other images than {first.path}: their labels differ")
        self.files = list(files)
        self.path, self.num_tokens, self.codebook_size = first.path, first.num_tokens, first.codebook_size
        self.num_classes, self.tokenizer_hash = first.num_classes, first.tokenizer_hash
        self.views = sum(f.views for f in files)
        self.labels = first.labels
        self.indices = np.arange(len(first.labels)) if indices is None else np.asarray(indices, dtype=np.int64)
        self.seed = seed

    @property
    def fingerprint(self) -> str:
        """Of the folders' content, 64 hex digits; a subset has its folders'."""
        return hashlib.sha256("".join(f.fingerprint for f in self.files).encode()).hexdigest()

    def subset(self, indices: Sequence[int] | np.ndarray, seed: int | None) -> CodeDataset:
        """The images at these places of this data set."""
        return CodeDataset(self.files, self.indices[np.asarray(indices, dtype=np.int64)], seed)

    def used_codes(self) -> tuple[int, int]:
        """How many codes occur in how many tokens: of all images, or of enough that every code would be likely to."""
        enough = 16 * self.codebook_size // (self.num_tokens * self.views) + 1
        counts = np.zeros(self.codebook_size, dtype=np.int64)
        for place in spread(len(self), min(len(self), enough)):
            for files in self.files:
                for view in range(files.views):
                    counts += np.bincount(files.codes(int(self.indices[place]), view), minlength=self.codebook_size)
        return int(np.count_nonzero(counts)), int(counts.sum())

    def require_like(self, other: CodeDataset) -> None:
        """ValueError: codes of another tokenizer, grid or set of classes."""
        _require_alike(other.files[0], self.files[0])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        epoch, position = key if isinstance(key, tuple) else (0, key)
        image = int(self.indices[position])
        view = 0 if self.seed is None else fold(self.seed, epoch, image) % self.views
        for files in self.files:
            if view < files.views:
                break
            view -= files.views
        return {"codes": files.codes(image, view), "label": int(self.labels[image]), "index": image, "bad": []}


def _require_alike(first: CodeFiles, other: CodeFiles) -> None:
    for name in COMMON:
        a, b = getattr(first, name), getattr(other, name)
        if a != b and "" not in (a, b):  # LlamaGen's folders do not know their tokenizer
            raise ValueError(f"{other.path} has {name} {b}, {first.path} has {a}: they do not go together")


def open_codes(paths: str, codebook_size: int = 16384) -> CodeDataset:
    """Codes at a path, or at several of the same images, comma-separated (as LlamaGen's two ten-crop folders).

    codebook_size: of LlamaGen's folders, which do not record it. ValueError: see read_folder and read_llamagen.
    """
    files = []
    for part in paths.split(","):
        if not part.strip():
            raise ValueError(f"{paths!r}: an empty path; for the current folder write a dot")
        path = Path(part.strip())
        manifest = (path / MANIFEST).is_file()
        files.append(read_llamagen(path, codebook_size) if not manifest and is_llamagen(path) else read_folder(path))
    return CodeDataset(files)
