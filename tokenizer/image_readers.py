"""Random access to stored images: decoding, and a reader for each way of storing them.

A source can be sent to worker processes both ways. After a fork the shared file descriptors are harmless, because reads
are positional (`os.pread` moves no file offset). When pickled for spawn the descriptors stay behind and are reopened.
Names are kept in one byte string, not in a million Python objects, so forked workers share the index copy-on-write.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

# Pillow guesses the format from the content. Without this list a PostScript file named .jpg would start an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_MAX_OPEN_FILES = 64  # per process; a set of shards may be larger than the usual limit of 1024 descriptors
_READ_ERRORS = (OSError, struct.error, zlib.error)


class UnreadableImage(Exception):
    """One image cannot be read or decoded; the text names it and says why."""


class _Strings:
    """Immutable list of strings in one byte string."""

    def __init__(self, strings: Iterable[str]):
        encoded = [s.encode("utf-8", "surrogateescape") for s in strings]
        self.blob = b"".join(encoded)
        self.ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> str:
        i = range(len(self))[i]  # normalises negative numbers, raises IndexError
        start = int(self.ends[i - 1]) if i else 0
        return self.blob[start : int(self.ends[i])].decode("utf-8", "surrogateescape")


class PackedFiles:
    """Positional reads from a few large files (one thread per process; a least-recently-used set stays open)."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = [os.path.abspath(p) for p in paths]
        self.open: dict[int, int] = {}  # file number -> descriptor, most recently used last

    def read(self, file: int, offset: int, size: int) -> bytes:
        descriptor = self.open.pop(file, None)
        if descriptor is None:
            if len(self.open) >= _MAX_OPEN_FILES:
                os.close(self.open.pop(next(iter(self.open))))
            descriptor = os.open(self.paths[file], os.O_RDONLY)
        self.open[file] = descriptor
        data = os.pread(descriptor, size, offset)
        if len(data) != size:
            raise OSError(f"{self.paths[file]} ends after {len(data)} of {size} bytes at offset {offset}")
        return data

    def __getstate__(self) -> dict:
        return {"paths": self.paths, "open": {}}

    def __del__(self):
        for descriptor in getattr(self, "open", {}).values():
            os.close(descriptor)


# ---------------------------------------------------------------------------------------------------------------------
# decoding


def _deep_to_8_bit(image: Image.Image) -> Image.Image:
    """Pixels wider than 8 bits -> mode L, by a fixed scale: 65535 -> 255 (integers) or 1.0 -> 255 (floating point).

    Pillow's own conversion clips at 255. The scale never depends on the picture, so brightness stays comparable.
    Raises ValueError when the values do not fit that scale.
    """
    pixels = np.asarray(image).astype(np.float64)  # (H, W)
    top = 1.0 if image.mode == "F" else 65535.0
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= top):  # also refuses NaN
        raise ValueError(f"mode {image.mode} with values in [{low:g}, {high:g}], expected [0, {top:g}]")
    return Image.fromarray(np.rint(pixels * (255.0 / top)).astype(np.uint8))


def to_channels(image: Image.Image, channels: int) -> Image.Image:
    """Any PIL image -> mode L, RGB or RGBA for 1, 3 or 4 channels, 8 bits each.

    16-bit grey is scaled, not clipped. Alpha that does not fit is dropped, as torchvision's ImageFolder does, never
    blended over a colour. EXIF orientation is ignored, as in LlamaGen. Raises ValueError for pixels without a defined
    8-bit scale.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_to_8_bit(image)
    elif "transparency" in image.info and image.mode in ("P", "L", "RGB", "1"):
        image = image.convert("RGBA")  # resolves the transparent colour now; converting a palette directly warns
    mode = MODES[channels]
    return image if image.mode == mode else image.convert(mode)


def decode_image(data: bytes, channels: int) -> Image.Image:
    """File content -> PIL image in the mode of `channels`. Raises UnreadableImage, which says why, but not which."""
    # Another library may have switched this on for the whole process; half a picture filled with grey must not train.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        image.load()
        return to_channels(image, channels)
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"none of {' '.join(FORMATS)}") from error
    except Exception as error:  # damaged bytes can make Pillow's decoders raise anything, such as TypeError
        raise UnreadableImage(str(error) or type(error).__name__) from error


# ---------------------------------------------------------------------------------------------------------------------
# sources


class ImageSource(ABC):
    """N images with a fixed order. Subclasses provide `_image`.

    Attributes: labels (N,) int64; classes: names, indexed by label; channels 1, 3 or 4; flippable: whether the mirror
    image is still an example of its class.
    """

    flippable = True

    def __init__(self, names: Iterable[str], labels: np.ndarray, classes: list[str], channels: int):
        self.names = _Strings(names)
        self.labels = np.asarray(labels, dtype=np.int64)  # (N,)
        self.classes = classes
        self.channels = channels
        assert len(self.names) == len(self.labels) > 0, (len(self.names), len(self.labels))

    def __len__(self) -> int:
        return len(self.labels)

    def label(self, i: int) -> int:
        return int(self.labels[i])

    def name(self, i: int) -> str:
        """Name of image i relative to the source (posix), e.g. 'n01440764/n01440764_1775.JPEG'."""
        return self.names[i]

    def read(self, i: int) -> Image.Image:
        """Image i as PIL L, RGB or RGBA. Raises UnreadableImage naming it when it cannot be read or decoded."""
        i = range(len(self))[i]
        try:
            return self._image(i)
        except (UnreadableImage, *_READ_ERRORS) as error:
            raise UnreadableImage(f"{self.name(i)}: {error}") from error

    def fingerprint(self) -> str:
        """16 hex digits over names and labels in order; not over pixels, not over where the source lies.

        A folder and a .tar or .zip of it give the same one. File sizes are left out: asking for a million of them takes
        minutes on network storage.
        """
        digest = hashlib.sha256(self.names.blob)
        for numbers in (self.names.ends, self.labels):
            digest.update(np.ascontiguousarray(numbers, dtype="<i8").tobytes())
        return digest.hexdigest()[:16]

    @abstractmethod
    def _image(self, i: int) -> Image.Image:
        """Image i as it is stored, decoded."""


class FileImages(ImageSource):
    """Single files; names are paths relative to `root`."""

    def __init__(self, root: Path, names: list[str], labels: np.ndarray, classes: list[str], channels: int):
        super().__init__(names, labels, classes, channels)
        self.root = os.path.abspath(root)

    def _image(self, i: int) -> Image.Image:
        return decode_image(Path(self.root, self.name(i)).read_bytes(), self.channels)


class Member(NamedTuple):
    """Where one archive member lies."""

    name: str
    offset: int  # bytes; tar: of the data, zip: of the local header
    size: int  # bytes, uncompressed


class TarImages(ImageSource):
    """Members of one or more uncompressed tar files: image i is `members[i]` of file `files[i]`."""

    def __init__(
        self,
        paths: Sequence[Path],
        files: Sequence[int],
        members: Sequence[Member],
        labels: np.ndarray,
        classes: list[str],
        channels: int,
    ):
        super().__init__((m.name for m in members), labels, classes, channels)
        self.reader = PackedFiles(paths)
        self.where = np.array([(f, m.offset, m.size) for f, m in zip(files, members, strict=True)], dtype=np.int64)

    def _image(self, i: int) -> Image.Image:
        return decode_image(self.reader.read(*map(int, self.where[i])), self.channels)


class ZipImages(ImageSource):
    """Members of one zip file, stored or deflated. `where`: header offset, packed size, size, method, CRC."""

    def __init__(self, path: Path, names: list[str], where: np.ndarray, labels, classes: list[str], channels: int):
        super().__init__(names, labels, classes, channels)
        self.reader = PackedFiles([path])
        self.where = where  # (N, 5) int64

    def _image(self, i: int) -> Image.Image:
        header, compressed, size, method, crc = map(int, self.where[i])
        # The local header repeats the name and has an extra field of its own, of a length that the directory omits.
        magic, name_length, extra_length = struct.unpack("<4s22xHH", self.reader.read(0, header, 30))
        if magic != b"PK\x03\x04":
            raise OSError("no local header where the zip directory says")
        data = self.reader.read(0, header + 30 + name_length + extra_length, compressed)
        if method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(wbits=-15).decompress(data, size + 1)
        if len(data) != size or zlib.crc32(data) != crc:
            raise OSError("wrong length or checksum in the zip archive")
        return decode_image(data, self.channels)


class ArrayImages(ImageSource):
    """Pictures held in memory: uint8 (N, H, W) or (N, H, W, 3)."""

    def __init__(
        self,
        pixels: np.ndarray,
        labels: np.ndarray,
        classes: list[str],
        channels: int,
        *,
        stem: str,
        flippable: bool = True,
    ):
        super().__init__((f"{stem}/{i:05d}" for i in range(len(pixels))), labels, classes, channels)
        self.pixels = pixels
        self.flippable = flippable

    def _image(self, i: int) -> Image.Image:
        return to_channels(Image.fromarray(self.pixels[i]), self.channels)
