"""Arrays in .npy files, mapped into memory: processes share them, and only what is looked at is read."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenizer.runtime.parsing import reason, require_file


def map_array(path: Path, shape: tuple[int, ...], dtype: npt.DTypeLike, again: str) -> npt.NDArray[Any]:
    """Read-only view of a file of this shape and dtype. again: how to make the file once more, for messages.

    ValueError naming the file: absent, damaged, cut short, longer than its header says, another shape or dtype.
    """
    try:
        require_file(path)  # a pipe would be waited for
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap):
            raise ValueError("an archive of arrays")
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; {again}") from error
    except Exception as error:  # whatever a header makes numpy throw, see parsing.py
        raise ValueError(f"{path} is damaged or cut short ({reason(error)}); {again}") from error
    if path.stat().st_size != array.offset + array.nbytes:
        raise ValueError(f"{path} is longer than its header says; {again}")
    if array.shape != shape or array.dtype != np.dtype(dtype):
        raise ValueError(f"{path} holds {array.dtype} {array.shape}, the manifest says {np.dtype(dtype)} {shape}")
    return np.asarray(array)  # still of the mapped file, without memmap's slow slicing
