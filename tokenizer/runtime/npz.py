"""Arrays of an .npz file, read one by one and only when asked for; what a header promises is checked before it is read.

numpy's own reader believes headers (an array of 10^12 numbers is allocated, then read), and inflates what nobody needs.
"""

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tokenizer.runtime.parsing import parsing, require_file

PIECE = 2**24  # bytes that are inflated at a time


class Header(NamedTuple):
    """Of one array. room: bytes of it that the file really has."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fortran: bool
    room: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.dtype} {self.shape}"


def read_npy(path: str | Path) -> npt.NDArray[Any]:
    """The array in an .npy file. FileNotFoundError; ValueError naming the file: damaged, or something else."""
    return np.array(map_npy(path))


def map_npy(path: str | Path) -> "np.memmap[Any, Any]":
    """The same, mapped into memory: what its header promises must be there."""
    require_file(path)
    with parsing(path, "damaged, cut short, or no .npy file"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap):
            raise ValueError("several arrays")
    return array


class Npz:
    """An .npz file that is open. FileNotFoundError; ValueError, naming file and array, for what is damaged.

        with Npz(path) as file:
            if "mu" in file.names and file.header("mu").shape == (2048,):
                mu = file.array("mu")
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        require_file(self.path)
        with parsing(self.path, "damaged, or no .npz file"):
            with self.path.open("rb") as file:
                if file.read(6) == b"\x93NUMPY":
                    raise ValueError("a single array")
            self._archive = zipfile.ZipFile(self.path)
        self.names = {name[:-4] for name in self._archive.namelist() if name.endswith(".npy")}

    def __enter__(self) -> "Npz":
        return self

    def __exit__(self, *_: object) -> None:
        self._archive.close()

    def header(self, name: str) -> Header:
        """What an array is said to be. ValueError: no array of plain numbers or texts."""
        file, header = self._open(name)
        file.close()
        return header

    def _open(self, name: str) -> tuple[IO[bytes], Header]:
        """The file at the array's first byte."""
        with parsing(self.path, f"{name} is no array of numpy's"):
            file = self._archive.open(f"{name}.npy")
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(file)
            room = self._archive.getinfo(f"{name}.npy").file_size - file.tell()
        if dtype.kind not in "biufcSUV" or dtype.names is not None or dtype.hasobject or not dtype.itemsize:
            raise ValueError(f"{self.path}: {name} is no array of numbers or texts, but of {dtype}")
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{self.path}: {name} is no array of numpy's (its shape is {shape})")
        return file, Header(shape, dtype, fortran, room)

    def array(self, name: str) -> npt.NDArray[Any]:
        """The whole array; ask for its size before. ValueError: cut short."""
        file, header = self._open(name)
        with file:
            self._require_whole(name, header)
            data = self._read(file, name, header.nbytes)
        return np.ndarray(header.shape, header.dtype, data, order="F" if header.fortran else "C")

    def rows(self, name: str, count: int) -> Iterator[npt.NDArray[Any]]:
        """A C-ordered array in parts of `count` along its first axis, the last one smaller. ValueError: cut short."""
        file, header = self._open(name)
        with file:
            self._require_whole(name, header)
            assert not header.fortran or len(header.shape) == 1, "its rows lie scattered"
            assert header.nbytes, "no rows, or empty ones"
            row = header.nbytes // header.shape[0]
            for start in range(0, header.shape[0], count):
                part = min(count, header.shape[0] - start)
                yield np.ndarray((part, *header.shape[1:]), header.dtype, self._read(file, name, part * row))

    def _require_whole(self, name: str, header: Header) -> None:
        """Read to its end, an array's checksum is compared: a shape that was damaged must not end it early."""
        if header.nbytes > header.room:
            raise ValueError(f"{self.path}: {name} is cut short: {header} has {header.nbytes} bytes, {header.room} are "
                             "there")
        if header.nbytes < header.room:
            raise ValueError(f"{self.path}: {name} is longer than its header says: {header}")

    def _read(self, file: IO[bytes], name: str, count: int) -> bytearray:
        """In pieces: what a zip's directory promises need not be there either."""
        data = bytearray()
        with parsing(self.path, f"{name} is damaged"):
            while len(data) < count:
                piece = file.read(min(count - len(data), PIECE))
                if not piece:
                    raise EOFError("its data end early")
                data += piece
        return data
