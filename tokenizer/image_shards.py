"""Tar archives, which are read in place: of class folders, or shards of a WebDataset."""

from __future__ import annotations

import itertools
import json
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from tokenizer.image_classes import (
    EXTENSIONS,
    empty_classes,
    is_image,
    numbered_classes,
    sort_into_classes,
    strip_outer_folder,
)
from tokenizer.image_names import to_line
from tokenizer.image_readers import ImageOptions, ImageSource, Member, PackedFiles, TarImages

SHARD_EXTENSIONS = ("jpg", "jpeg", "png", "webp")  # of a WebDataset sample
_MAX_SHARDS = 100_000
_MAX_LABEL_BYTES = 2**24  # of a .cls or .json
_BLOCK = tarfile.BLOCKSIZE
# To a multiple of these sizes writers pad: tar's own, and the powers of two that --blocking-factor is used with.
_RECORDS = (tarfile.RECORDSIZE, *(2**k for k in range(10, 23)))
_UNDO_COMPRESSION = {  # first bytes of the file -> command; a compressed archive may well be named .tar
    b"\x1f\x8b": "gunzip -k",
    b"BZh": "bunzip2 -k",
    b"\xfd7zXZ\x00": "unxz -k",
    b"\x28\xb5\x2f\xfd": "unzstd",
}


class DamagedArchive(ValueError):
    """A tar that does not hold what its writer put in."""


# ---------------------------------------------------------------------------------------------------------------------
# members


def _entries(path: Path) -> Iterator[tarfile.TarInfo]:
    """Headers of a tar to its end. DamagedArchive: it is no tar, or it ends otherwise than with an end marker."""
    try:
        with open(path, "rb") as file, tarfile.open(
            fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape"
        ) as archive:
            end = 0
            for info in archive:
                if info.size < 0 or archive.offset <= end:  # on which tarfile would go round in circles
                    raise DamagedArchive(f"a header at byte {info.offset:,} that points backwards")
                end = archive.offset
                yield info
            wrong = _after_the_end(file, archive.offset)
            if wrong:
                raise DamagedArchive(wrong)
    except Exception as error:  # tarfile's own, the two above, and whatever damaged headers make it raise
        if isinstance(error, OSError) and error.filename is not None:  # it cannot be opened: not about its content
            raise
        reason = str(error) or type(error).__name__
        raise DamagedArchive(f"data path {path}: not a readable tar archive ({reason})") from error


def _after_the_end(file: BinaryIO, offset: int) -> str:
    """What is wrong from the byte on at which tarfile, which takes any odd header for the end, stopped; or "".

    An archive ends with two blocks of zeros (one, some writers), and zeros up to a record. A damaged region of zeros
    looks like the end, but for more behind it.
    """
    size = os.fstat(file.fileno()).st_size
    tail = size - offset
    if tail < _BLOCK:
        return f"it ends at byte {size:,} without an end marker: it is cut short"
    file.seek(offset)
    if file.read(_BLOCK).strip(b"\0"):
        return f"no header at byte {offset:,}"
    if tail > 2 * _BLOCK and not any(size % record == 0 and tail - 2 * _BLOCK < record for record in _RECORDS):
        return (f"zeros at byte {offset:,} end it, and {tail - _BLOCK:,} bytes follow, more than padding: a region is "
                "lost, or archives were joined with cat")
    if file.read(tail - _BLOCK).strip(b"\0"):
        return f"zeros at byte {offset:,} end it, and data follow: a region is lost, or archives were joined with cat"
    return ""


def tar_members(path: Path) -> tuple[list[Member], set[str]]:
    """Regular files of an uncompressed tar in stored order, without leading './', and the names of its folders.

    Links give the data they point to. A name stored twice counts once, with the later content, as when unpacking.
    Raises ValueError naming the file, DamagedArchive when it is damaged.
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
    folders: set[str] = set()
    for info in _entries(path):
        name = posixpath.normpath(info.name)
        if info.issparse():
            raise ValueError(f"data path {path}: {to_line(name)} is stored sparse; pack again without --sparse")
        if info.isreg():
            found[name] = Member(name, info.offset_data, info.size)
        elif info.isdir():
            folders.add(name)
        elif info.islnk() or info.issym():
            base = posixpath.dirname(name) if info.issym() else ""
            target = found.get(posixpath.normpath(posixpath.join(base, info.linkname)))
            if target is not None:
                found[name] = target._replace(name=name)
            elif is_image(name):
                raise ValueError(
                    f"data path {path}: {to_line(name)} is a link to {to_line(info.linkname)}, which does not come "
                    "before it in the archive; pack again with --dereference --hard-dereference"
                )
    return list(found.values()), folders


# ---------------------------------------------------------------------------------------------------------------------
# WebDataset


def _split_stem(name: str) -> tuple[str, str]:
    """WebDataset's rule: the stem ends at the first dot of the file name. 'a/b.c.jpg' -> ('a/b', 'c.jpg')."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def _samples(members: list[Member]) -> list[dict[str, Member]]:
    """Members of one stem, as WebDataset groups them: {extension: member} of those that hold an image."""
    samples: dict[str, dict[str, Member]] = {}
    for member in members:
        stem, extension = _split_stem(member.name)
        if extension in ("cls", "json") or f".{extension}".endswith(EXTENSIONS):
            samples.setdefault(stem, {})[extension] = member
    return [parts for parts in samples.values() if _image_keys(parts)]


def _image_keys(parts: dict[str, Member]) -> list[str]:
    """Extensions of a sample's images. Beside a plain one ("jpg") those with more in front ("seg.png") do not count."""
    images = [key for key, member in parts.items() if key not in ("cls", "json") and is_image(member.name)]
    plain = [key for key in images if key in SHARD_EXTENSIONS]
    return plain or images


def _choose_image(parts: dict[str, Member], image_key: str | None, where: str) -> str:
    """Extension of the image of a sample. ValueError: it has several, or not the one of --image-key."""
    keys = _image_keys(parts)
    if image_key is not None:
        wanted = image_key.lower()
        if wanted not in parts:
            raise ValueError(f"{where}: the sample of {to_line(parts[keys[0]].name)} has no {wanted}; --image-key must "
                             f"name what all samples have, here {' or '.join(keys)}")
        return wanted
    if len(keys) > 1:
        names = ", ".join(to_line(parts[key].name) for key in keys)
        raise ValueError(f"{where}: {len(keys)} images in one sample ({names}); say which to read, such as with "
                         f"--image-key {keys[0]}")
    return keys[0]


def _is_shard(path: Path, members: list[Member]) -> bool:
    """Whether a tar is one shard of a WebDataset: files beside its images label them, or could and no folder does."""
    samples = [parts for parts in _samples(members) if parts.keys() & {"cls", "json"}]
    plain = [parts for parts in samples if parts.keys() & set(SHARD_EXTENSIONS)]
    names = strip_outer_folder([m.name for m in members if is_image(m.name)])
    if plain and len({name.split("/", 1)[0] for name in names if "/" in name}) < 2:
        return True
    reader = PackedFiles([path])  # class folders may well hold a .json that is no label
    return any(_shard_label(reader, 0, parts) is not None for parts in plain or samples if "cls" in parts or plain)


def _shard_label(reader: PackedFiles, file: int, parts: dict[str, Member]) -> int | None:
    """Label of one WebDataset sample: its .cls, else "cls" or "label" of its .json, else None."""
    member = parts.get("cls") or parts.get("json")
    if member is None:
        return None
    where = f"data path {reader.paths[file]}: {to_line(member.name)}"
    if member.size > _MAX_LABEL_BYTES:
        raise ValueError(f"{where} has {member.size:,} bytes, too many for a label")
    content = reader.read(file, member.offset, member.size)
    if "cls" in parts:
        if not re.fullmatch(rb"\s*[+-]?[0-9]{1,18}\s*", content):
            raise ValueError(f"{where} holds {content[:40]!r}, no integer")
        return int(content)
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error})") from error
    label = next((values[k] for k in ("cls", "label") if k in values), None) if isinstance(values, dict) else None
    if label is not None and type(label) is not int:
        raise ValueError(f"{where} has the label {str(label)[:40]!r}, no integer")
    return label


# ---------------------------------------------------------------------------------------------------------------------
# opening


def open_tar(path: Path, channels: int, options: ImageOptions) -> ImageSource:
    """A tar of class folders or of images, or one shard. ValueError naming it."""
    members, folders = tar_members(path)
    if options.image_key is not None or _is_shard(path, members):
        return open_shards([path], channels, options)
    members = [m for m in members if is_image(m.name)]
    names = strip_outer_folder([m.name for m in members])
    order, labels, classes = sort_into_classes(names, str(path))
    notes = notes_on_folders([m.name for m in members], names, folders)
    members = [members[i]._replace(name=names[i]) for i in order]
    source = TarImages([path], [0] * len(members), members, labels, classes, channels)
    source.notes += notes
    return source


def notes_on_folders(stored: list[str], names: list[str], folders: set[str]) -> list[str]:
    """A note on the class folders of an archive that have no images: they are no classes.

    stored: names of the images in it; names: the same without an outer folder; folders: names as stored.
    """
    outer = stored[0][: len(stored[0]) - len(names[0])]
    empty = empty_classes(names, {name[len(outer) :].split("/", 1)[0] for name in folders if name.startswith(outer)})
    return [f"folders without images are no classes: {', '.join(map(to_line, empty))}"] if empty else []


def expand_braces(pattern: str) -> list[str]:
    """Shell brace expansion of '{000..146}' (zero padding kept) and '{a,b}', not nested; several groups multiply.

    ValueError: a range that runs backwards, or more than 100,000 paths.
    """
    parts: list[Sequence[str]] = []
    count = 1
    for part in re.split(r"(\{[^{}]*\})", pattern):
        numbers = re.fullmatch(r"\{(\d{1,18})\.\.(\d{1,18})\}", part, re.ASCII)
        choices: Iterator[str] = iter([part])
        size = 1
        if numbers:
            first, last = numbers.groups()
            if int(last) < int(first):
                raise ValueError(f"data path {pattern}: the range {part} runs backwards")
            size = int(last) - int(first) + 1
            choices = (f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1))
        elif part.startswith("{") and "," in part:
            size = part.count(",") + 1
            choices = iter(part[1:-1].split(","))
        count *= size
        if count > _MAX_SHARDS:
            raise ValueError(f"data path {pattern} means {count:,} or more shards; at most {_MAX_SHARDS:,} can be read")
        parts.append(list(choices))
    return ["".join(choice) for choice in itertools.product(*parts)]


def open_shards(paths: Sequence[Path], channels: int, options: ImageOptions) -> ImageSource:
    """Shards of a WebDataset in the order given. Up to options.max_bad_images of them may be damaged: left out.

    FileNotFoundError: a shard is not there. ValueError: too many are damaged, no image, several images in a sample, a
    label that is no number, or only some have one.
    """
    absent = [str(p) for p in paths if not os.path.isfile(p)]
    if absent:
        raise FileNotFoundError(
            f"data path: {len(absent)} of {len(paths)} shards do not exist, the first is {absent[0]}"
        )
    reader = PackedFiles(paths)
    files: list[int] = []
    images: list[Member] = []
    labels: list[int | None] = []
    damaged: list[str] = []
    first_key = ""
    for file, path in enumerate(paths):
        try:
            samples = _samples(tar_members(path)[0])
        except DamagedArchive as error:
            damaged.append(str(error))
            if len(damaged) > options.max_bad_images or len(damaged) == len(paths):
                raise _too_many(damaged, len(paths), options) from error
            continue
        for parts in samples:
            key = _choose_image(parts, options.image_key, f"data path {path}")
            image = parts[key]
            first_key = first_key or key
            if ("." in key) != ("." in first_key):
                raise ValueError(f"data path {path}: {to_line(image.name)} is the only image of its sample, an {key}, "
                                 f"while others have a {first_key}; name one that all have with --image-key")
            files.append(file)
            images.append(image._replace(name=f"{path.name}/{image.name}"))
            labels.append(_shard_label(reader, file, parts))
    if not images:
        raise ValueError(f"data path: no images ({' '.join(SHARD_EXTENSIONS)}) in {paths[0]} and {len(paths) - 1} more")
    numbers, classes = numbered_classes(
        labels, lambda i: f"data path {paths[files[i]]}: {to_line(images[i].name)}", options.remap_labels
    )
    source = TarImages(paths, files, images, numbers, classes, channels)
    source.damaged = damaged
    source.has_samples = True
    return source


def _too_many(damaged: list[str], shards: int, options: ImageOptions) -> ValueError:
    text = "; ".join(damaged[:20])
    if shards > 1:
        text += (f". {len(damaged)} of {shards} shards are damaged, of which --max-bad-images allows "
                 f"{options.max_bad_images} to be left out")
    return ValueError(text)
