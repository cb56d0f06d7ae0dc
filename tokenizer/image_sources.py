"""Which images a data path means: folders, archives, WebDataset shards, CIFAR-10, lists of files and digits.

`open_images` picks the source, sorts out names, order and labels, and returns a random-access reader. Nothing is ever
unpacked: members of archives are read at their byte offset. Opening reads names (and shard labels) only, no pixels.
"""

from __future__ import annotations

import itertools
import json
import os
import posixpath
import re
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from tokenizer.image_readers import (
    MODES,
    ArrayImages,
    FileImages,
    ImageSource,
    Member,
    PackedFiles,
    TarImages,
    ZipImages,
)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
SHARD_EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # of a WebDataset sample; the first one present is the image
ACCEPTED = (
    "a folder of images or of class folders, a .tar or .zip of such a folder, WebDataset shards "
    "('shards/train-{000000..000146}.tar' or a folder of .tar files), a folder with cifar-10-batches-py, "
    "'cifar10' (downloaded into data/), a .txt/.csv list of image paths, or nothing (scikit-learn's digits); "
    f"images: {' '.join(EXTENSIONS)}"
)
_COMPRESSED_SUFFIXES = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst")
_UNDO_COMPRESSION = {  # first bytes of the file -> command; a compressed archive may well be named .tar
    b"\x1f\x8b": "gunzip -k",
    b"BZh": "bunzip2 -k",
    b"\xfd7zXZ\x00": "unxz -k",
    b"\x28\xb5\x2f\xfd": "unzstd",
}
_MAX_LABEL = 1_000_000


# ---------------------------------------------------------------------------------------------------------------------
# names -> order and classes


def _is_image(name: str) -> bool:
    """Image extension and no hidden part (macOS archives carry `._x.jpg` and `__MACOSX/`, which are no images)."""
    return name.lower().endswith(EXTENSIONS) and not any(p[:1] == "." or p == "__MACOSX" for p in name.split("/"))


def _sort_into_classes(names: list[str], where: str) -> tuple[list[int], np.ndarray, list[str]]:
    """Order, labels and class names as torchvision's ImageFolder gives them; flat names are one class with label 0.

    names: posix, relative. Returns (positions into names, (N,) int64 labels in that order, class names).
    Raises ValueError when there is no image, or images lie both inside and beside class folders.
    """
    if not names:
        raise ValueError(f"data path {where}: no images in it. Accepted: {ACCEPTED}")
    flat = [name for name in names if "/" not in name]
    if flat and len(flat) < len(names):
        raise ValueError(
            f"data path {where}: {len(flat)} images (such as {flat[0]}) lie beside {len(names) - len(flat)} images in "
            "sub-folders, so their class is unclear; move them into a folder or out of it"
        )

    def key(i: int) -> tuple[str, str, str]:
        folder, _, base = names[i].rpartition("/")
        return folder.split("/", 1)[0], folder, base

    order = sorted(range(len(names)), key=key)
    if flat:
        return order, np.zeros(len(names), dtype=np.int64), ["all"]
    of_image = [names[i].split("/", 1)[0] for i in order]
    classes = sorted(set(of_image))
    number = {name: label for label, name in enumerate(classes)}
    return order, np.array([number[name] for name in of_image], dtype=np.int64), classes


def _strip_outer_folder(names: list[str]) -> list[str]:
    """Drop leading folders that hold everything, as long as some folder level is left to be the class."""
    while names and all(name.count("/") >= 1 for name in names) and any(name.count("/") >= 2 for name in names):
        if len({name.split("/", 1)[0] for name in names}) > 1:
            break
        names = [name.split("/", 1)[1] for name in names]
    return names


def _numbered_classes(labels: list[int | None], describe: Callable[[int], str]) -> tuple[np.ndarray, list[str]]:
    """Labels given as numbers -> ((N,) int64, class names '0'...). All absent: zeros. `describe(i)` names item i.

    Raises ValueError when only some are given, or one is outside [0, 1000000).
    """
    missing = [i for i, label in enumerate(labels) if label is None]
    if missing and len(missing) < len(labels):
        raise ValueError(f"{describe(missing[0])}: no label, though others have one; give all images a label or none")
    numbers = [label or 0 for label in labels]
    for i, label in enumerate(numbers):
        if not 0 <= label < _MAX_LABEL:
            raise ValueError(f"{describe(i)}: label {label} is not in [0, {_MAX_LABEL})")
    return np.array(numbers, dtype=np.int64), [str(c) for c in range(max(numbers) + 1)]


# ---------------------------------------------------------------------------------------------------------------------
# opening


def _open_digits(channels: int) -> ImageSource:
    from sklearn.datasets import load_digits  # here because scikit-learn takes a second to import

    digits = load_digits()
    pixels = np.rint(digits.images * (255.0 / 16.0)).astype(np.uint8)  # (1797, 8, 8), 0..16 -> 0..255
    classes = [str(name) for name in digits.target_names]
    return ArrayImages(pixels, digits.target, classes, channels, stem="digits", flippable=False)


def _open_cifar10(folder: Path, channels: int, *, download: bool = False) -> ImageSource:
    from torchvision.datasets import CIFAR10

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


def _open_folder(folder: Path, channels: int) -> ImageSource:
    names = []
    for path, _, files in os.walk(folder, followlinks=True):
        prefix = Path(path).relative_to(folder).as_posix()
        names += [f if prefix == "." else f"{prefix}/{f}" for f in files]
    names = [name for name in names if _is_image(name)]
    order, labels, classes = _sort_into_classes(names, str(folder))
    folders = {e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")}
    if "/" in names[0] and (empty := sorted(folders - set(classes))):
        # Leaving such a class out would shift the labels of all that follow.
        raise ValueError(f"data path {folder}: no images in the class folder {empty[0]!r}; remove it or fill it")
    return FileImages(folder, [names[i] for i in order], labels, classes, channels)


def _tar_members(path: Path) -> list[Member]:
    """Regular files of an uncompressed tar in stored order, without leading './'; links give the data they point to.

    A name stored twice counts once, with the later content, as when unpacking. Raises ValueError naming the file.
    """
    with open(path, "rb") as file:
        head = file.read(8)
    for magic, command in _UNDO_COMPRESSION.items():
        if head.startswith(magic):
            raise ValueError(
                f"data path {path}: a compressed tar cannot be read in place; decompress it once with "
                f"`{command} {path}` and give the .tar (the images inside are compressed already)"
            )
    found: dict[str, Member] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for info in archive:
                name = posixpath.normpath(info.name)
                if info.issparse():
                    raise ValueError(f"data path {path}: {name} is stored sparse; pack again without --sparse")
                if info.isreg():
                    found[name] = Member(name, info.offset_data, info.size)
                elif info.islnk() or info.issym():
                    base = posixpath.dirname(name) if info.issym() else ""
                    target = found.get(posixpath.normpath(posixpath.join(base, info.linkname)))
                    if target is not None:
                        found[name] = target._replace(name=name)
                    elif _is_image(name):
                        raise ValueError(
                            f"data path {path}: {name} is a link to {info.linkname}, which does not come before it in "
                            "the archive; pack again with --dereference --hard-dereference"
                        )
    except tarfile.TarError as error:
        raise ValueError(f"data path {path}: not a readable tar archive ({error})") from error
    return list(found.values())


def _split_stem(name: str) -> tuple[str, str]:
    """WebDataset's rule: the stem ends at the first dot of the file name. 'a/b.c.jpg' -> ('a/b', 'c.jpg')."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _samples(members: list[Member]) -> list[dict[str, Member]]:
    """Images with the .cls and .json of the same stem, as WebDataset groups them: {extension: member} of each."""
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        stem, extension = _split_stem(member.name)
        if extension in SHARD_EXTENSIONS or extension in ("cls", "json"):
            samples.setdefault(stem, {})[extension] = member
    return [parts for parts in samples.values() if parts.keys() & set(SHARD_EXTENSIONS)]


def _is_shard(path: Path, members: list[Member]) -> bool:
    """Whether a tar is one shard of a WebDataset: files beside its images label them, or could and no folder does."""
    samples = [parts for parts in _samples(members) if parts.keys() & {"cls", "json"}]
    names = _strip_outer_folder([m.name for m in members if _is_image(m.name)])
    if not samples or len({name.split("/", 1)[0] for name in names if "/" in name}) < 2:
        return bool(samples)
    reader = PackedFiles([path])  # class folders may well hold a .json that is no label
    return any(_shard_label(reader, 0, parts) is not None for parts in samples)


def _open_tar(path: Path, channels: int) -> ImageSource:
    members = _tar_members(path)
    if _is_shard(path, members):
        return _open_shards([path], channels)
    members = [m for m in members if _is_image(m.name)]
    names = _strip_outer_folder([m.name for m in members])
    order, labels, classes = _sort_into_classes(names, str(path))
    members = [members[i]._replace(name=names[i]) for i in order]
    return TarImages([path], [0] * len(members), members, labels, classes, channels)


def _open_zip(path: Path, channels: int) -> ImageSource:
    try:
        with zipfile.ZipFile(path) as archive:
            infos = {posixpath.normpath(info.filename): info for info in archive.infolist() if not info.is_dir()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"data path {path}: not a readable zip archive ({error})") from error
    entries = {name: info for name, info in infos.items() if _is_image(name)}
    for info in entries.values():
        if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"data path {path}: {info.filename} is encrypted or uses a method other than store and deflate; pack "
                "again with `zip -0 -r`"
            )
    names = _strip_outer_folder(list(entries))
    order, labels, classes = _sort_into_classes(names, str(path))
    rows = [(e.header_offset, e.compress_size, e.file_size, e.compress_type, e.CRC) for e in entries.values()]
    where = np.array(rows, dtype=np.int64)[order]  # (N, 5)
    return ZipImages(path, [names[i] for i in order], where, labels, classes, channels)


def expand_braces(pattern: str) -> list[str]:
    """Shell brace expansion of '{000..146}' (zero padding kept) and '{a,b}', not nested; several groups multiply."""
    parts: list[list[str]] = []
    for part in re.split(r"(\{[^{}]*\})", pattern):
        numbers = re.fullmatch(r"\{(\d+)\.\.(\d+)\}", part)
        if numbers:
            first, last = numbers.groups()
            if int(last) < int(first):
                raise ValueError(f"data path {pattern}: the range {part} runs backwards")
            parts.append([f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)])
        elif part.startswith("{") and "," in part:
            parts.append(part[1:-1].split(","))
        else:
            parts.append([part])
    return ["".join(choice) for choice in itertools.product(*parts)]


def _shard_label(reader: PackedFiles, file: int, parts: dict[str, Member]) -> int | None:
    """Label of one WebDataset sample: its .cls, else "cls" or "label" of its .json, else None."""
    if "cls" in parts:
        member = parts["cls"]
        text = reader.read(file, member.offset, member.size)
        try:
            return int(text.decode("ascii"))
        except ValueError as error:
            raise ValueError(
                f"data path {reader.paths[file]}: {member.name} holds {text[:40]!r}, no integer"
            ) from error
    if "json" in parts:
        member = parts["json"]
        try:
            fields = json.loads(reader.read(file, member.offset, member.size))
        except ValueError as error:
            raise ValueError(f"data path {reader.paths[file]}: {member.name} is not JSON ({error})") from error
        label = next((fields[k] for k in ("cls", "label") if k in fields), None) if isinstance(fields, dict) else None
        if label is not None and type(label) is not int:
            raise ValueError(f"data path {reader.paths[file]}: {member.name} has the label {label!r}, no integer")
        return label
    return None


def _open_shards(paths: Sequence[Path], channels: int) -> ImageSource:
    absent = [str(p) for p in paths if not p.is_file()]
    if absent:
        raise FileNotFoundError(
            f"data path: {len(absent)} of {len(paths)} shards do not exist, the first is {absent[0]}"
        )
    reader = PackedFiles(paths)
    files: list[int] = []
    images: list[Member] = []
    labels: list[int | None] = []
    for file, path in enumerate(paths):
        for parts in _samples(_tar_members(path)):
            image = next((parts[e] for e in SHARD_EXTENSIONS if e in parts and _is_image(parts[e].name)), None)
            if image is not None:
                files.append(file)
                images.append(image._replace(name=f"{path.name}/{image.name}"))
                labels.append(_shard_label(reader, file, parts))
    if not images:
        raise ValueError(f"data path: no images ({' '.join(SHARD_EXTENSIONS)}) in {paths[0]} and {len(paths) - 1} more")
    numbers, classes = _numbered_classes(labels, lambda i: f"data path {paths[files[i]]}: {images[i].name}")
    return TarImages(paths, files, images, numbers, classes, channels)


def _open_manifest(path: Path, channels: int) -> ImageSource:
    names: list[str] = []
    labels: list[int | None] = []
    lines: list[int] = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"data path {path}: a list of images must be UTF-8 text ({error})") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        parts = re.fullmatch(r"(.*?)\s*(?:[\t,]\s*(-?\d+))?", line.strip())
        assert parts, line  # both groups may be empty
        name, label = parts.groups()
        file = path.parent / name
        if not file.is_file():
            raise FileNotFoundError(
                f"data path {path}, line {number}: no file {file} (paths count from the list's folder)"
            )
        if not name.lower().endswith(EXTENSIONS):
            raise ValueError(f"data path {path}, line {number}: {name} is none of {' '.join(EXTENSIONS)}")
        # An absolute path in the list becomes relative, so that moving list and images together changes nothing.
        names.append(Path(os.path.relpath(file, path.parent) if os.path.isabs(name) else name).as_posix())
        labels.append(None if label is None else int(label))
        lines.append(number)
    if not names:
        raise ValueError(f"data path {path}: the list is empty; write one image path per line")
    numbers, classes = _numbered_classes(labels, lambda i: f"data path {path}, line {lines[i]}")
    return FileImages(path.parent, names, numbers, classes, channels)


def _open_directory(path: Path, channels: int) -> ImageSource:
    if (path / "cifar-10-batches-py").is_dir():
        return _open_cifar10(path, channels)
    entries = [e for e in os.scandir(path) if not e.name.startswith(".")]
    shards = sorted(e.name for e in entries if e.name.lower().endswith(".tar"))
    if shards and not any(e.is_dir() or _is_image(e.name) for e in entries):
        return _open_shards([path / name for name in shards], channels)
    return _open_folder(path, channels)


def open_images(data_path: str | None, *, channels: int = 3) -> ImageSource:
    """Open any accepted image source for random access, in place.

    data_path: None = scikit-learn's 1,797 digits (8x8 grey); else see ACCEPTED. A folder or archive is ordered as by
    torchvision's ImageFolder; shards and lists keep their own order. channels: 1 (L), 3 (RGB) or 4 (RGBA).
    Raises FileNotFoundError or ValueError naming the path, what is wrong and what is accepted.
    """
    if channels not in MODES:
        raise ValueError(f"channels {channels} is none of {sorted(MODES)}")
    if data_path is None:
        return _open_digits(channels)
    path = Path(data_path).expanduser()
    if not path.exists():
        if str(data_path) == "cifar10":
            return _download_cifar10(channels)
        if "{" in str(data_path):
            return _open_shards([Path(p) for p in expand_braces(str(path))], channels)
        raise FileNotFoundError(f"data path {data_path}: no such file or folder. Accepted: {ACCEPTED}")
    if path.is_dir():
        return _open_directory(path, channels)
    suffix = path.suffix.lower()
    if suffix == ".tar" or suffix in _COMPRESSED_SUFFIXES:
        return _open_tar(path, channels)
    if suffix == ".zip":
        return _open_zip(path, channels)
    if suffix in (".txt", ".csv"):
        return _open_manifest(path, channels)
    raise ValueError(f"data path {data_path}: the extension {suffix or '(none)'} is not known. Accepted: {ACCEPTED}")
