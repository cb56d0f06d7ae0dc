"""Random access to stored images: decoding, and a reader for each way of storing them.

A source can be sent to worker processes both ways. After a fork the shared file descriptors are harmless, because reads
are positional (`os.pread` moves no file offset). When pickled for spawn the descriptors stay behind and are reopened.
Names are kept in one byte string, not in a million Python objects, so forked workers share the index copy-on-write.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import stat
import struct
import sys
import tempfile
import warnings
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from tokenizer.image_classes import EXTENSIONS
from tokenizer.image_names import to_line

# Pillow guesses the format from the content. Without this list a PostScript file named .jpg would start an interpreter.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_MAX_OPEN_FILES = 64  # per process; a set of shards may be larger than the usual limit of 1024 descriptors
_READ_ERRORS = (OSError, struct.error, zlib.error)
_DEEP_EXTENSIONS = (".png", ".tif", ".tiff", ".ppm", ".pgm")  # of files that may hold more than 8 bits
_OTHER_BYTE = {";16B": ";16L", ";16L": ";16B", ";16N": ";16B" if sys.byteorder == "little" else ";16L"}
# How lines of libtiff begin: its name for what Pillow holds in memory, or one of its functions.
_LIBTIFF = re.compile(
    r"(?:tempfile\.tif|_?TIFF\w*|\w*(?:Decode|Strip|Strile|Tile|Directory|Field|Required|Chop|IFD|Offsets|Conversion|Diff|"
    r"Acc|Map|Samples|DoubleTo|DumpMode|JPEG|jpeg_|LZW|LZMA|ZIP|ZSTD|WebP|LERC|PackBits|Log|Fax|Thunder|NeXT|Predict|gt)"
    r"\w*): "
)
_UNDECODED = re.compile(r"\w*Decode\w*: (?!Warning)")  # of these, what is wrong with pixels and not with some tag
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")  # a line for each odd tag,
logging.getLogger("PIL").addHandler(logging.NullHandler())  # and others for those that it does not read


class UnreadableImage(Exception):
    """One image cannot be read or decoded; the text names it and says why."""


@dataclass(frozen=True)
class ImageOptions:
    """How stored images are read; the fields are flags. ValueError names the flag that is out of range.

    image_key: of samples with several images in WebDataset shards, the extension of the one to read ("input.jpg").
    bit_depth: bits in use of images of 16 bits per channel, of which the largest value is white.
    max_image_mb: MiB of the largest image: as a file, and as pixels of 3 bytes. At 512, Pillow's own limit of pixels.
    remap_labels: number the labels that occur 0, 1 and so on, and leave out class folders without images.
    max_bad_images: damaged shards to leave out of several, each of which counts as an unreadable image.
    """

    image_key: str | None = None
    bit_depth: int = 16
    max_image_mb: int = 512
    remap_labels: bool = False
    max_bad_images: int = 0

    def __post_init__(self) -> None:
        if not 8 <= self.bit_depth <= 16:
            raise ValueError(f"--bit-depth is {self.bit_depth}; it must lie between 8 and 16")
        if self.max_image_mb < 1:
            raise ValueError(f"--max-image-mb is {self.max_image_mb}; it must be at least 1")
        if self.image_key is not None and not f".{self.image_key.lower()}".endswith(EXTENSIONS):
            raise ValueError(f"--image-key {self.image_key} is no extension of an image, such as input.jpg")

    @classmethod
    def of(cls, settings: Any) -> ImageOptions:
        """From a configuration or parsed flags; what it does not have, or is None, keeps its default."""
        found = {field.name: getattr(settings, field.name, None) for field in fields(cls)}
        return cls(**{name: value for name, value in found.items() if value is not None})

    @property
    def max_bytes(self) -> int:
        return self.max_image_mb * 2**20

    def require_size(self, size: int) -> None:
        """UnreadableImage: a file of so many bytes is larger than allowed."""
        if size > self.max_bytes:
            raise UnreadableImage(f"{size / 2**20:,.0f} MiB, --max-image-mb allows {self.max_image_mb}")


DEFAULTS = ImageOptions()


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


def _deep_to_8_bit(image: Image.Image, bit_depth: int = 16) -> Image.Image:
    """Pixels wider than 8 bits -> mode L, by a fixed scale: 2^bit_depth - 1 -> 255 (integers), 1.0 -> 255 (floats).

    Pillow's own conversion clips at 255. The scale never depends on the picture, so brightness stays comparable.
    Raises ValueError when the values do not fit that scale.
    """
    pixels = np.asarray(image).astype(np.float64)  # (H, W)
    top = 1.0 if image.mode == "F" else 2.0**bit_depth - 1
    return Image.fromarray(_scaled(pixels, top, f"mode {image.mode}"))


def _scaled(pixels: np.ndarray, top: float, what: str) -> np.ndarray:
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= 0 and high <= top):  # also refuses NaN
        raise ValueError(f"{what} with values in [{low:g}, {high:g}], expected [0, {top:g}]")
    return np.rint(pixels * (255.0 / top)).astype(np.uint8)


def _raw_mode(image: ImageFile.ImageFile) -> str:
    """How the file stores its pixels, such as "RGB;16B". Only of an image that is not loaded yet."""
    arguments = image.tile[0][3] if image.tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) else arguments)


def _is_deep_colour(image: Image.Image) -> bool:
    """Whether the file has 16 bits in each of several channels, of which Pillow keeps the upper 8."""
    return isinstance(image, ImageFile.ImageFile) and ";16" in _raw_mode(image) and not image.mode.startswith("I")


def _lower_bytes(image: ImageFile.ImageFile) -> Image.Image:
    """The other half of a picture with 16 bits per channel: read as if its bytes came in the other order."""
    raw = _raw_mode(image)
    if image.mode not in ("RGB", "RGBA") or raw[:2] == "LA" or raw[-4:] not in _OTHER_BYTE:
        raise UnreadableImage(f"16 bits per channel, stored as {raw}: --bit-depth below 16 is not possible for it")
    swapped = raw[:-4] + _OTHER_BYTE[raw[-4:]]
    tiles: list[Any] = image.tile
    for i, tile in enumerate(tiles):
        arguments = (swapped, *tile[3][1:]) if isinstance(tile[3], tuple) else swapped
        tiles[i] = getattr(tile, "_make", tuple)((*tile[:3], arguments))  # a NamedTuple in newer versions
    _load(image)
    return image


def _deep_colour_to_8_bit(image: Image.Image, lower: Image.Image, bit_depth: int) -> Image.Image:
    """Upper and lower halves of 16-bit RGB or RGBA -> 8 bits, colours by the fixed scale of _deep_to_8_bit."""
    upper = np.array(image)  # (H, W, 3 or 4) uint8; alpha counts to 65535, whatever the colours
    pixels = upper[..., :3].astype(np.float64) * 256 + np.asarray(lower)[..., :3]
    upper[..., :3] = _scaled(pixels, 2.0**bit_depth - 1, "16 bits per channel")
    return Image.fromarray(upper)


def _load(image: Image.Image) -> None:
    """Decode the pixels. OSError: also when libtiff, which then goes on, says that it could not."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile or image.tile[0][0] != "libtiff":
        image.load()
        return
    with _libtiff_aside() as said:
        image.load()
    undecoded = next((line for line in said if _UNDECODED.match(line)), None)
    if undecoded is not None:
        raise OSError(undecoded)


@contextmanager
def _libtiff_aside() -> Iterator[list[str]]:
    """libtiff prints to file descriptor 2 itself, thousands of lines for one file. They are collected; what others
    print meanwhile goes where it should.
    """
    said: list[str] = []
    sys.stderr.flush()
    terminal = os.dup(2)
    # In memory where that is possible: a full disk must not make pictures unreadable.
    memory = open(os.memfd_create("libtiff"), "w+b") if hasattr(os, "memfd_create") else tempfile.TemporaryFile()
    with memory as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            sys.stderr.flush()
            os.dup2(terminal, 2)
            file.seek(0)
            for line in file:
                text = line.decode("utf-8", "replace")
                if _LIBTIFF.match(text):
                    said.append(text.strip())
                else:
                    os.write(terminal, line)
            os.close(terminal)


def to_channels(image: Image.Image, channels: int, bit_depth: int = 16) -> Image.Image:
    """Any PIL image -> mode L, RGB or RGBA for 1, 3 or 4 channels, 8 bits each.

    16-bit grey is scaled, not clipped. Alpha that does not fit is dropped, as torchvision's ImageFolder does, never
    blended over a colour. EXIF orientation is ignored, as in LlamaGen. Raises ValueError for pixels without a defined
    8-bit scale.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image = _deep_to_8_bit(image, bit_depth)
    elif "transparency" in image.info and image.mode in ("P", "L", "RGB", "1"):
        image = image.convert("RGBA")  # resolves the transparent colour now; converting a palette directly warns
    mode = MODES[channels]
    return image if image.mode == mode else image.convert(mode)


def _open(data: bytes, options: ImageOptions) -> ImageFile.ImageFile:
    """Header only. UnreadableImage: more pixels than allowed."""
    # Another library may have switched this on for the whole process; half a picture filled with grey must not train.
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    Image.MAX_IMAGE_PIXELS = None  # its warning would come at half of what the flag allows
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if 3 * image.width * image.height > options.max_bytes:
        raise UnreadableImage(f"{image.width}x{image.height} pixels, --max-image-mb allows "
                              f"{options.max_bytes // 3:,} of them")
    return image


def decode_image(data: bytes, channels: int, options: ImageOptions = DEFAULTS) -> Image.Image:
    """File content -> PIL image in the mode of `channels`. Raises UnreadableImage, which says why, but not which."""
    try:
        image: Image.Image = _open(data, options)
        deep_colour = _is_deep_colour(image)
        _load(image)
        if deep_colour and options.bit_depth < 16:
            image = _deep_colour_to_8_bit(image, _lower_bytes(_open(data, options)), options.bit_depth)
        return to_channels(image, channels, options.bit_depth)
    except UnreadableImage:
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(f"none of {' '.join(FORMATS)}") from error
    except Exception as error:  # damaged bytes can make Pillow's decoders raise anything, such as TypeError
        raise UnreadableImage(str(error) or type(error).__name__) from error


def largest_value(data: bytes, options: ImageOptions = DEFAULTS) -> int | None:
    """Of a picture with 16 bits per channel, its largest value, alpha aside; None for others. UnreadableImage."""
    try:
        image = _open(data, options)
        deep_colour = _is_deep_colour(image)
        if not (deep_colour or image.mode.startswith("I")):
            return None
        _load(image)
        pixels = np.asarray(image)
        return int(pixels[..., :3].max()) * 256 + 255 if deep_colour else int(pixels.max())
    except UnreadableImage:
        raise
    except Exception as error:  # as in decode_image
        raise UnreadableImage(str(error) or type(error).__name__) from error


# ---------------------------------------------------------------------------------------------------------------------
# sources


class ImageSource(ABC):
    """N images with a fixed order. Subclasses provide `_image`.

    Attributes: labels (N,) int64; classes: names, indexed by label; channels 1, 3 or 4; flippable: whether the mirror
    image is still an example of its class; options: how images are read; notes: a sentence each on what was left out;
    damaged: a line for each shard that was left out because it is damaged.
    """

    flippable = True
    has_samples = False  # of a WebDataset, which --image-key is about

    def __init__(self, names: Iterable[str], labels: np.ndarray, classes: list[str], channels: int):
        self.names = _Strings(names)
        self.labels = np.asarray(labels, dtype=np.int64)  # (N,)
        self.classes = classes
        self.channels = channels
        self.options = DEFAULTS
        self.notes: list[str] = []
        self.damaged: list[str] = []
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
            raise UnreadableImage(f"{to_line(self.name(i))}: {error}") from error

    def largest_value(self, i: int) -> int | None:  # noqa: ARG002
        """The largest value of image i if it has 16 bits per channel, None for others and for unreadable ones."""
        return None

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


class EncodedImages(ImageSource):
    """Images in files of their formats. Subclasses provide `_bytes`."""

    def _image(self, i: int) -> Image.Image:
        return decode_image(self._bytes(i), self.channels, self.options)

    def largest_value(self, i: int) -> int | None:
        if not self.name(i).lower().endswith(_DEEP_EXTENSIONS):
            return None
        try:
            return largest_value(self._bytes(i), self.options)
        except (UnreadableImage, *_READ_ERRORS):
            return None

    @abstractmethod
    def _bytes(self, i: int) -> bytes:
        """The file of image i."""


def _open_at_once(path: str, flags: int) -> int:
    """Where a pipe has no writer, without waiting for one."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # which Windows does not have


class FileImages(EncodedImages):
    """Single files; names are paths relative to `root`."""

    def __init__(self, root: Path, names: list[str], labels: np.ndarray, classes: list[str], channels: int):
        super().__init__(names, labels, classes, channels)
        self.root = os.path.abspath(root)

    def _bytes(self, i: int) -> bytes:
        with open(os.path.join(self.root, self.name(i)), "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableImage("not a regular file")
            self.options.require_size(status.st_size)
            return file.read()


class Member(NamedTuple):
    """Where one archive member lies."""

    name: str
    offset: int  # bytes; tar: of the data, zip: of the local header
    size: int  # bytes, uncompressed


class TarImages(EncodedImages):
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

    def _bytes(self, i: int) -> bytes:
        file, offset, size = map(int, self.where[i])
        self.options.require_size(size)
        return self.reader.read(file, offset, size)


class ZipImages(EncodedImages):
    """Members of one zip file, stored or deflated. `where`: header offset, packed size, size, method, CRC."""

    def __init__(
        self, path: Path, names: list[str], where: np.ndarray, labels: np.ndarray, classes: list[str], channels: int
    ):
        super().__init__(names, labels, classes, channels)
        self.reader = PackedFiles([path])
        self.where = where  # (N, 5) int64

    def _bytes(self, i: int) -> bytes:
        header, compressed, size, method, crc = map(int, self.where[i])
        self.options.require_size(max(size, compressed))
        # The local header repeats the name and has an extra field of its own, of a length that the directory omits.
        magic, name_length, extra_length = struct.unpack("<4s22xHH", self.reader.read(0, header, 30))
        if magic != b"PK\x03\x04":
            raise OSError("no local header where the zip directory says")
        data = self.reader.read(0, header + 30 + name_length + extra_length, compressed)
        if method == zipfile.ZIP_DEFLATED:
            data = zlib.decompressobj(wbits=-15).decompress(data, size + 1)
        if len(data) != size or zlib.crc32(data) != crc:
            raise OSError("wrong length or checksum in the zip archive")
        return data


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
