"""Which images a data path means: folders, archives, WebDataset shards, CIFAR-10, lists of files and digits.

`open_images` picks the source, sorts out names, order and labels, and returns a random-access reader. Nothing is ever
unpacked: members of archives are read at their byte offset. Opening reads names (and shard labels) only, no pixels.
"""

from __future__ import annotations

import argparse
import os
import posixpath
import stat
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenizer.image_classes import (
    ACCEPTED,
    OF_FILE_SYSTEMS,
    empty_classes,
    is_hidden,
    is_image,
    sort_into_classes,
    strip_outer_folder,
)
from tokenizer.image_lists import open_list
from tokenizer.image_names import to_line
from tokenizer.image_readers import DEFAULTS, MODES, ArrayImages, FileImages, ImageOptions, ImageSource, ZipImages
from tokenizer.image_shards import expand_braces, notes_on_folders, open_shards, open_tar
from tokenizer.runtime.command import as_flag_errors

_COMPRESSED_SUFFIXES = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst")
_SHOWN = 5  # names in a note
_MOST = 2**62  # bytes that a zip's directory may speak of; much more does not fit an int64


def _open_digits(channels: int) -> ImageSource:
    from sklearn.datasets import load_digits  # here because scikit-learn takes a second to import

    digits = load_digits()
    pixels = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)  # (1797, 8, 8), 0..16 -> 0..255
    classes = [str(name) for name in digits.target_names]
    return ArrayImages(pixels, digits.target, classes, channels, stem="digits", flippable=False)


def _open_cifar10(folder: Path, channels: int, *, download: bool = False) -> ImageSource:
    from torchvision.datasets import CIFAR10

    odd = [p for p in sorted(folder.glob("cifar-10-batches-py/*")) if not p.is_file()]
    if odd:
        raise ValueError(f"data path {folder}: {odd[0]} is no regular file, so cifar-10-batches-py is incomplete")
    try:
        cifar = CIFAR10(str(folder), train=True, download=download)
    except (OSError, RuntimeError) as error:
        if not download:
            raise ValueError(f"data path {folder}: cifar-10-batches-py is incomplete or damaged ({error})") from error
        raise FileNotFoundError(
            f"data path 'cifar10': could not download CIFAR-10 into {folder.absolute()} ({error}). Put the unpacked "
            "cifar-10-batches-py into a folder yourself and give that folder as data path"
        ) from error
    return ArrayImages(cifar.data, np.array(cifar.targets), list(cifar.classes), channels, stem="cifar10-train")


def _download_cifar10(channels: int) -> ImageSource:
    import fcntl  # not on Windows, where only this literal is then unavailable

    folder = Path("data")
    folder.mkdir(exist_ok=True)
    # All ranks of a run come here at once; one downloads, the others find the files when the lock is theirs.
    with open(folder / ".cifar10.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _open_cifar10(folder, channels, download=True)


class _Tree(NamedTuple):
    """What a folder holds."""

    images: list[str]        # names relative to it, posix
    top_folders: set[str]    # right in it, but for links that are not followed
    notes: list[str]         # on what was left out


def _walk(root: Path) -> _Tree:
    """Links to folders are followed, but each real folder is visited once: a link may lead back up, or twice to one
    place. ValueError: a folder that cannot be listed.
    """
    images: list[str] = []
    top_folders: set[str] = set()
    special: list[str] = []   # pipes, sockets, devices
    repeated: list[str] = []  # folders that are visited under another name
    labels = 0
    real_root = os.path.realpath(root)
    visited: set[str] = set()

    def is_above(real: str) -> bool:
        return real_root.startswith(real.rstrip("/") + "/")

    # Real folders first: which of several names a folder is visited under does not depend on the order on disk.
    waiting = [("", real_root)]
    while waiting:
        links: list[tuple[str, str]] = []
        while waiting:
            prefix, real = waiting.pop()
            if real in visited or (prefix and is_above(real)):
                repeated.append(prefix)
                continue
            visited.add(real)
            top_folders |= {prefix} if prefix and "/" not in prefix else set()
            for entry in _entries(root, prefix):
                name = f"{prefix}/{entry.name}" if prefix else entry.name
                kind = _kind(entry)
                if kind == "folder" and not is_hidden(entry.name):
                    here = os.path.join(real, entry.name)
                    (links if entry.is_symlink() else waiting).append((name, here))
                elif kind != "folder" and is_image(name):
                    (images if kind == "file" else special).append(name)
                elif kind == "file" and name.endswith(".cls"):
                    labels += 1
        waiting = [(name, os.path.realpath(here)) for name, here in sorted(links, reverse=True)]
    notes = [f"{len(names)} {what}: {_some(names)}" for names, what in (
        (special, "pipes, sockets or devices are left out"),
        (repeated, "links to folders that are read under another name, or that hold the data path, are not followed"),
    ) if names]
    if labels:
        notes.append(f"{labels} .cls files are not read; labels come from class folders, lists, or .tar shards")
    return _Tree(images, top_folders, notes)


def _entries(root: Path, prefix: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root / prefix) as entries:
            return list(entries)
    except OSError as error:
        if prefix in OF_FILE_SYSTEMS:  # root's own
            return []
        raise ValueError(f"data path {root}: the folder {to_line(prefix or '.')} cannot be listed ({error.strerror})"
                         ) from error


def _kind(entry: os.DirEntry[str]) -> str:
    """folder, file or special, of what a link points to. A link to nothing counts as a file that cannot be read."""
    try:
        if entry.is_dir():
            return "folder"
        return "file" if entry.is_file() or not os.path.exists(entry.path) else "special"
    except OSError:  # a link to itself
        return "file"


def _some(names: list[str]) -> str:
    return ", ".join(map(to_line, sorted(names)[:_SHOWN])) + (", ..." if len(names) > _SHOWN else "")


def _open_folder(folder: Path, channels: int, options: ImageOptions) -> ImageSource:
    tree = _walk(folder)
    order, labels, classes = sort_into_classes(tree.images, str(folder))
    empty = empty_classes(tree.images, tree.top_folders)
    if empty and not options.remap_labels:
        # Leaving such a class out would shift the labels of all that follow.
        raise ValueError(f"data path {folder}: no images in the class folder {to_line(empty[0])!r}; remove it or fill "
                         "it")
    source = FileImages(folder, [tree.images[i] for i in order], labels, classes, channels)
    source.notes += tree.notes
    return source


class _Zipped(NamedTuple):
    """What a zip holds: its files by name, and its folders."""

    files: dict[str, zipfile.ZipInfo]
    folders: set[str]


def _read_zip(path: Path) -> _Zipped:
    """Names with backslashes, as some programs on Windows write them, are paths like others. ValueError: no zip."""
    files: dict[str, zipfile.ZipInfo] = {}
    folders: set[str] = set()
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                stored = info.filename.replace("\\", "/")
                name = posixpath.normpath(stored)
                if max(info.header_offset, info.compress_size, info.file_size) > _MOST:
                    raise ValueError(f"{to_line(name)} has more bytes than there can be")
                if stored.endswith("/"):
                    folders.add(name)
                else:
                    files[name] = info
    except Exception as error:  # zipfile's own, and whatever a damaged directory makes it raise
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"data path {path}: not a readable zip archive ({error or type(error).__name__})") from error
    return _Zipped(files, folders)


def _open_zip(path: Path, channels: int) -> ImageSource:
    infos, folders = _read_zip(path)
    entries = {name: info for name, info in infos.items() if is_image(name)}
    for name, info in entries.items():
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"data path {path}: {to_line(name)} is encrypted or uses a method other than store and deflate; pack "
                "again with `zip -0 -r`"
            )
    stored = list(entries)
    names = strip_outer_folder(stored)
    order, labels, classes = sort_into_classes(names, str(path))
    rows = [(e.header_offset, e.compress_size, e.file_size, e.compress_type, e.CRC) for e in entries.values()]
    where = np.array(rows, dtype=np.int64)[order]  # (N, 5)
    source = ZipImages(path, [names[i] for i in order], where, labels, classes, channels)
    source.notes += notes_on_folders(stored, names, folders)
    labels_beside = sum(name.endswith(".cls") for name in infos)
    if labels_beside:
        source.notes.append(f"{labels_beside} .cls files are not read; pack a WebDataset as .tar")
    return source


def _open_directory(path: Path, channels: int, options: ImageOptions) -> ImageSource:
    if (path / "cifar-10-batches-py").is_dir():
        return _open_cifar10(path, channels)
    entries = [e for e in _entries(path, "") if not e.name.startswith(".")]
    shards = sorted(e.name for e in entries if e.name.lower().endswith(".tar"))
    others = (e for e in entries if e.name not in OF_FILE_SYSTEMS)
    if shards and not any(_kind(e) == "folder" or is_image(e.name) for e in others):
        return open_shards([path / name for name in shards], channels, options)
    return _open_folder(path, channels, options)


def open_images(data_path: str | None, *, channels: int = 3, options: ImageOptions = DEFAULTS) -> ImageSource:
    """Open any accepted image source for random access, in place.

    data_path: None = scikit-learn's 1,797 digits (8x8 grey); else see ACCEPTED. A folder or archive is ordered as by
    torchvision's ImageFolder; shards and lists keep their own order. channels: 1 (L), 3 (RGB) or 4 (RGBA). options: how
    images are read; the result's notes say what was left out.
    Raises FileNotFoundError or ValueError naming the path, what is wrong and what is accepted.
    """
    if channels not in MODES:
        raise ValueError(f"channels {channels} is none of {sorted(MODES)}")
    source = _open_digits(channels) if data_path is None else _open_path(data_path, channels, options)
    source.options = options
    if options.image_key is not None and not source.has_samples:
        source.notes.append(f"--image-key {options.image_key} is about WebDataset shards, which these are not")
    return source


def open_images_or_one(data_path: str | None, *, channels: int = 3, options: ImageOptions = DEFAULTS) -> ImageSource:
    """`open_images`, or a single image file: what a command looks at need not be a data set."""
    path = Path(os.path.expanduser(data_path)) if data_path else None
    if path is None or not is_image(path.name) or not path.is_file():
        return open_images(data_path, channels=channels, options=options)
    source = FileImages(path.parent, [path.name], np.zeros(1, dtype=np.int64), ["all"], channels)
    source.options = options
    return source


def path_mode(data_path: str) -> int | None:
    """st_mode of what a data path names; None: it is no path, but the word cifar10 or a pattern of shards.

    ValueError: it is empty. FileNotFoundError: nothing is there.
    """
    if not data_path.strip():
        raise ValueError(f"the data path is empty ({data_path!r}); for the current folder write a dot")
    try:
        return Path(os.path.expanduser(data_path)).stat().st_mode
    except (OSError, ValueError) as error:  # the second: a null byte
        if data_path == "cifar10" or "{" in data_path:
            return None
        if isinstance(error, PermissionError):
            raise
        raise FileNotFoundError(f"data path {to_line(data_path)}: no such file or folder. Accepted: {ACCEPTED}"
                                ) from error


def _open_path(data_path: str, channels: int, options: ImageOptions) -> ImageSource:
    mode, path = path_mode(data_path), Path(os.path.expanduser(data_path))
    if mode is None:
        if data_path == "cifar10":
            return _download_cifar10(channels)
        return open_shards([Path(p) for p in expand_braces(str(path))], channels, options)
    if stat.S_ISDIR(mode):
        return _open_directory(path, channels, options)
    if not stat.S_ISREG(mode):
        raise ValueError(f"data path {data_path} is a pipe, socket or device, not a file or folder")
    suffix = path.suffix.lower()
    if suffix == ".tar" or suffix in _COMPRESSED_SUFFIXES:
        return open_tar(path, channels, options)
    if suffix == ".zip":
        return _open_zip(path, channels)
    if suffix in (".txt", ".csv"):
        return open_list(path, channels, options)
    raise ValueError(f"data path {data_path}: the extension {suffix or '(none)'} is not known. Accepted: {ACCEPTED}")


def absolute_path(data_path: str | None) -> str | None:
    """A data path as a run records it: the same from any folder. The word cifar10 and no path stay."""
    if not data_path or (data_path == "cifar10" and not Path(data_path).exists()):
        return data_path
    return os.path.abspath(os.path.expanduser(data_path))


# ---------------------------------------------------------------------------------------------------------------------
# flags


def add_image_flags(parser: argparse.ArgumentParser, *, remap_labels: bool = False) -> None:
    """--image-key, --bit-depth and --max-image-mb, for ImageOptions.of; on request --remap-labels, where labels count.

    None: not given.
    """
    add = parser.add_argument
    add("--image-key", metavar="EXT", help="of WebDataset samples with several images: the extension to read, such as "
                                           "input.jpg")
    add("--bit-depth", type=int, metavar="BITS", help="bits in use of 16-bit images, 8 to 16; 12 of many cameras and "
                                                      "microscopes (default: 16)")
    add("--max-image-mb", type=int, metavar="MIB", help="largest image: as a file, and as pixels of 3 bytes "
                                                        "(default: 512)")
    if remap_labels:
        add("--remap-labels", action="store_true", default=None, help="number the labels that occur 0, 1 and so on, "
                                                                      "and leave out class folders without images")


def require_image_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with status 2, naming flag and value, for flags of `add_image_flags` that cannot work."""
    with as_flag_errors(parser):
        ImageOptions.of(args)
