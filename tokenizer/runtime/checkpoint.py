"""Checkpoints that survive a kill at any moment, hold only data, and are checked when they are read.

A file appears under its final name only when all of its bytes are on disk, so every numbered file is complete unless
the disk itself failed. Files hold tensors and Python primitives: nothing is executed by loading one.
"""

import argparse
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from tokenizer.runtime import distributed
from tokenizer.runtime.files import atomic_write
from tokenizer.runtime.parsing import parsing, reason, require_file

_NUMBERED = re.compile(r"(\d{7,})\.pt")
_PRIMITIVES = (int, float, bool, str, type(None))
_TENSORS = (torch.Tensor, torch.nn.Parameter)


def load_file(path: str | Path, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Read one checkpoint: ours, or a LlamaGen .pt. Executes nothing from the file, and takes about its size in memory.

    Raises FileNotFoundError, and ValueError naming the file when it is no regular file, truncated, damaged or no
    torch.save file, has compressed records, holds objects other than tensors, primitives and argparse.Namespace, or
    holds something other than a dict.
    """
    require_file(path, "checkpoint")
    with parsing(path, "damaged, or not a checkpoint"):
        whole = zipfile.is_zipfile(path)  # the archive's directory is at its end, so this also finds truncation
    if not whole:
        raise ValueError(f"{path}: truncated, or not a file of torch.save (torch >= 1.6)")
    with parsing(path, "damaged, or not a checkpoint"):
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            stored = all(record.compress_type == zipfile.ZIP_STORED for record in records)
            stored = stored and sum(record.file_size for record in records) <= os.path.getsize(path)
            damaged = archive.testzip() if stored else None  # torch.load does not compare checksums
    if not stored:  # a few megabytes could inflate to any size
        raise ValueError(f"{path}: its records are compressed or overlap, which torch.save never does; save it again")
    if damaged is not None:
        raise ValueError(f"{path}: damaged, the checksum of {damaged} is wrong")
    # LlamaGen checkpoints carry their command line as a Namespace: a bag of attributes that runs no code when it is
    # built. Registered for the process, as the scoped form does not exist in torch 2.4; and before every file, as that
    # form, in another library (timm's load_checkpoint), takes back what it did not bring.
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        state = torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        untrusted = re.search(r"GLOBAL (\S+)", str(error))  # the rest of torch's message advises to load it anyway
        why = f"refused, it refers to {untrusted[1]}" if untrusted else "refused, its pickle is not a plain one"
        raise ValueError(f"{path}: {why}; a checkpoint holds tensors and primitives only") from error
    except Exception as error:  # a parser's, see parsing.py
        raise ValueError(f"{path}: damaged, or not a checkpoint ({reason(error)})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, a checkpoint is a dict")
    return state


class Checkpointer:
    """Numbered checkpoints of one run, `FOLDER/0000400.pt` meaning "the steps below 400 are done".

    keep_last: how many numbered files stay on disk; files saved by name stay always.

    `save`, `save_named` and `load_latest` are collective: call them on every rank.
    """

    def __init__(self, folder: str | Path, keep_last: int = 2) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last {keep_last}: at least one checkpoint has to stay on disk")
        self.folder = Path(folder)
        self.keep_last = keep_last

    def steps(self) -> list[int]:
        """Steps of the numbered files on disk, ascending."""
        if not self.folder.is_dir():
            return []
        matches = (_NUMBERED.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write the numbered file, then remove those beyond keep_last. Rank 0's state is what is written.

        Raises TypeError, naming the entry, for anything but tensors, primitives, dicts, lists and tuples, OSError as
        `atomic_write`; on the other ranks OtherRankFailed when rank 0 could not write.
        """
        path = self._numbered(step)
        self._write(path, state, prune_to=step)
        return path

    def save_named(self, name: str, state: dict[str, Any]) -> Path:
        """Write `FOLDER/name.pt`, for example "best". Same guarantees and errors as `save`; never removed."""
        assert re.fullmatch(r"[a-z][a-z0-9_-]*", name), f"checkpoint name {name!r}: use lower-case letters and digits"
        path = self.folder / f"{name}.pt"
        self._write(path, state, prune_to=None)
        return path

    def load_latest(
        self, map_location: str | torch.device = "cpu", main_only: Collection[str] = ()
    ) -> dict[str, Any] | None:
        """State of the newest readable numbered file; None when there is no file.

        main_only: entries that only rank 0 needs. Then nobody else reads the file: others get {} in their place.

        An unreadable file (damaged, a link to nothing, a failing disk, another user's) is skipped with a message that
        names it. Raises ValueError when files exist and none can be read (starting over would overwrite the run),
        RuntimeError when the ranks do not find the same file.
        """
        if main_only:
            state, found = self._read_newest(map_location) if distributed.is_main() else (None, -1)
            shared = state and {name: {} if name in main_only else value for name, value in state.items()}
            found, shared = distributed.gather_objects((found, shared))[0]
            if found == -2:
                raise self._none_readable()
            return state if distributed.is_main() else shared
        state, found = self._read_newest(map_location)
        # The ranks agree before anyone raises: one that left alone would keep the others waiting.
        lowest = int(distributed.all_reduce_(torch.tensor(found), op="min"))
        highest = int(distributed.all_reduce_(torch.tensor(found), op="max"))
        if lowest == highest == -2:
            raise self._none_readable()
        if lowest != highest:
            raise RuntimeError(
                f"{self.folder}: ranks found different checkpoints (rank {distributed.rank()}: step {found}); "
                "every node needs the same folder, on a shared file system"
            )
        return state

    def _read_newest(self, map_location: str | torch.device) -> tuple[dict[str, Any] | None, int]:
        """State and step of the newest readable file; None and -1 without any file, -2 without a readable one."""
        steps = self.steps()
        for step in reversed(steps):
            try:
                return load_file(self._numbered(step), map_location), step
            except (ValueError, OSError) as error:
                path = self._numbered(step)
                reason = str(error) if str(path) in str(error) else f"{path}: {error}"
                distributed.print0(f"skipping a checkpoint that cannot be read: {reason}")
        return None, -2 if steps else -1

    def _none_readable(self) -> ValueError:
        return ValueError(f"{self.folder}: none of the {len(self.steps())} checkpoint(s) can be read; "
                          "move them away to start this run from the beginning")

    def _numbered(self, step: int) -> Path:
        return self.folder / f"{step:07d}.pt"

    def _write(self, path: Path, state: dict[str, Any], prune_to: int | None) -> None:
        failed = True
        try:
            if distributed.is_main():
                _check_plain(state, "state")
                self.folder.mkdir(parents=True, exist_ok=True)
                for stale in self.folder.glob(".*.tmp"):  # left by a killed process; the run is this one's
                    stale.unlink(missing_ok=True)
                atomic_write(path, lambda file: torch.save(state, file))
                if prune_to is not None:
                    self.prune(prune_to)
            failed = False
        finally:
            distributed.wait_for_all()  # slow storage takes its time
            any_failed = distributed.any_rank(failed)  # doubles as the barrier: afterwards every rank sees the file
        if any_failed:
            raise distributed.OtherRankFailed(f"{path}: rank 0 could not write this checkpoint; its own error says why")

    def prune(self, step: int) -> None:
        """Remove what `save` of this step would: for a start after a kill just before it could. Only on rank 0."""
        # Newer files do not count: they were unreadable when this run resumed, and must not displace readable ones.
        older = [other for other in self.steps() if other <= step]
        for other in older[: -self.keep_last]:
            self._numbered(other).unlink()


def _check_plain(value: object, where: str) -> None:
    """Raise TypeError for an entry that torch.load(weights_only=True) would refuse: found now, not at the resume."""
    kind = type(value)
    if kind in _PRIMITIVES or kind in _TENSORS:
        return
    if isinstance(value, dict) and kind in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"key {key!r} of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)) and kind in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    else:
        raise TypeError(f"{where} is a {kind.__module__}.{kind.__name__}: checkpoints hold tensors and primitives only")
