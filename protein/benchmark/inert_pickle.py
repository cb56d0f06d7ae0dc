"""Reads pickles of others as data: nothing they name is imported or called, but for what builds NumPy arrays.

Published protein data sets come as pickles, among them objects of packages that few people have installed. Every class
and function in them becomes an `Inert` here, which only remembers what it was made with.
"""

from __future__ import annotations

import codecs
import io
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from numpy._core.multiarray import _reconstruct, scalar  # type: ignore[attr-defined]
from numpy._core.numeric import _frombuffer  # type: ignore[attr-defined]

from tokenizer.runtime.parsing import parsing, require_file

_PLAIN = {
    **{(f"numpy.{core}.{module}", name): value for core in ("core", "_core")  # of NumPy 1 and 2
       for module, name, value in (("multiarray", "_reconstruct", _reconstruct), ("multiarray", "scalar", scalar),
                                   ("numeric", "_frombuffer", _frombuffer))},
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,  # how protocol 2 writes the bytes of an array
    ("collections", "OrderedDict"): OrderedDict,
}


class Inert:
    """Stands for an object of a class that is not imported. args: of its construction; attributes: of its state."""

    qualified_name = ""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        self = super().__new__(cls)
        self.args, self.kwargs, self.state = args, kwargs, None
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """An attribute. KeyError: the object has no such one."""
        parts = self.state if isinstance(self.state, tuple) else (self.state,)
        for part in parts:
            if isinstance(part, dict) and name in part:
                return part[name]
        raise KeyError(name)

    # A pickle may fill the object as if it was a list or a dict.
    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _PLAIN:
            return _PLAIN[module, name]
        return type(name.rpartition(".")[2], (Inert,), {"qualified_name": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> Any:
        return Inert(pid)  # a tensor's storage in a file of torch.save


def loads(content: bytes, source: str) -> Any:
    """ValueError, starting with source, for bytes that are no pickle."""
    try:
        return _Unpickler(io.BytesIO(content)).load()
    except Exception as error:  # damaged pickles fail in any way; all of them mean the same here
        raise ValueError(f"{source}: damaged, or no pickle ({type(error).__name__}: {error})") from error


def load_file(path: str | Path) -> Any:
    """The object in a pickle or in a file of torch.save (torch >= 1.6). ValueError naming the file: neither."""
    path = Path(path)
    require_file(path)
    if not zipfile.is_zipfile(path):
        return loads(path.read_bytes(), str(path))
    with parsing(path, "damaged, or no file of torch.save"), zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        content = archive.read(names[0]) if len(names) == 1 else None
    if content is None:
        raise ValueError(f"{path}: a zip file, but not one of torch.save")
    return loads(content, str(path))
