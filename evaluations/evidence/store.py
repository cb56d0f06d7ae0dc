"""Results of runs: one JSON object a line, appended whole, read back by what the run was."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from evaluations.evidence.arms import Arm
from evaluations.evidence.setting import Setting
from tokenizer.runtime.command import require_out_file
from tokenizer.runtime.files import located
from tokenizer.runtime.parsing import from_json, read_text

ROOT = Path(__file__).resolve().parents[2]
HEAD = '{"arm": '  # what a line begins with, see result_line


class Run(NamedTuple):
    """What a result line is the result of."""

    arm: Arm
    setting: Setting
    seed: int


class Result(NamedTuple):
    """A line of a results file."""

    run: Run
    name: str  # of the arm
    metrics: dict[str, float] | None  # None: the run diverged
    line: dict[str, Any]  # all of it
    where: str = ""  # FILE:NUMBER


def read(path: Path) -> list[Result]:
    """Results in the file's order; none if there is no file. Of an append that was cut off, nothing.

    Settings that a line lacks are newer than it is, and have their defaults. ValueError, naming file and line: no JSON
    of a result, numbers that are not finite, settings that this version does not know, a run that is there twice with
    other numbers.
    """
    results = []
    *lines, end = read_text(path).split("\n") if path.exists() else [""]
    for number, text in enumerate([*lines, *([] if not end or _is_cut_off(end) else [end])], 1):
        where = f"{path}:{number}"
        try:
            results.append(_result(text, where))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: no result of a run ({error!r}); remove the line, or name another file"
                             ) from error
    return unique(results)


def read_all(paths: Iterable[Path]) -> list[Result]:
    """Of several files, which must exist; a run that is in two of them counts once. ValueError: as `read`."""
    found = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such results file")
        found += read(path)
    return unique(found)


def unique(results: Iterable[Result]) -> list[Result]:
    """Each run once. ValueError, naming both lines: one is there twice with other numbers."""
    found: dict[Run, Result] = {}
    for result in results:
        other = found.setdefault(result.run, result)
        ours, theirs = result.metrics or {}, other.metrics or {}
        if bool(ours) != bool(theirs) or any(ours[name] != theirs[name] for name in ours.keys() & theirs.keys()):
            raise ValueError(f"{result.where} and {other.where} are of one run, with other numbers: keep one of them")
    return list(found.values())


def _result(text: str, where: str) -> Result:
    line = from_json(text, where)
    json.dumps(line, allow_nan=False)  # Python's JSON has NaN: ValueError
    run = Run(Arm(**line["options"]), Setting(**line["setting"]), line["seed"])
    name, metrics = line["arm"], line["metrics"]
    hash(run)
    if type(run.seed) is not int or not isinstance(name, str):
        raise TypeError(f"seed {run.seed!r}, arm {name!r}")
    for metric in () if metrics is None else ("psnr", *metrics):
        if type(metrics[metric]) not in (int, float):
            raise TypeError(f"{metric} is {metrics[metric]!r}")
    return Result(run, name, metrics, line, where)


def _is_cut_off(text: str) -> bool:
    """Whether a file's last line, without a newline, is the beginning of one that `Writer` wrote."""
    if not (text.startswith(HEAD) or HEAD.startswith(text)):
        return False
    try:
        from_json(text, "")
    except ValueError:
        return True
    return False  # the newline alone is missing, as editors leave it out


class Writer:
    """The one writer of a results file."""

    def __init__(self, descriptor: int, path: Path):
        self._descriptor, self.path = descriptor, path

    def append(self, line: dict[str, Any]) -> None:
        """A whole line, on disk when this returns. OSError names the file, such as of a full disk."""
        content = (json.dumps(line, allow_nan=False) + "\n").encode()
        with located(self.path):
            while content:  # a disk that is nearly full takes a part
                content = content[os.write(self._descriptor, content) :]
            os.fsync(self._descriptor)


@contextmanager
def writing(path: Path) -> Iterator[Writer]:
    """Open a results file to append to it; cuts off what an interrupted append left.

    ValueError, and nothing is changed: another run has it, or it is something else.
    """
    require_out_file(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"--out {path}: another process is writing to it; wait, or name another file") from error
        try:
            read(path)
        except ValueError as error:
            raise ValueError(f"--out {error}") from error
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content) and not _is_cut_off(content[whole:].decode()):
            os.write(descriptor, b"\n")
        else:
            os.ftruncate(descriptor, whole)
        yield Writer(descriptor, path)
    finally:
        os.close(descriptor)


def result_line(name: str, run: Run, outcome: dict[str, Any]) -> dict[str, Any]:
    """What is stored of a run: outcome is what Trainer.run returned, or {"metrics": None, "diverged": why}.

    Numbers that were measured have six digits, settings all.
    """
    return {"arm": name, "options": dataclasses.asdict(run.arm), "setting": dataclasses.asdict(run.setting),
            "seed": run.seed, **_rounded(outcome)}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def machine() -> dict[str, Any]:
    """Where and with what runs of this process are made: commit (+ if files differ from it; None outside git), torch,
    numpy, cpu."""
    import numpy
    import torch

    commit = _git("rev-parse", "HEAD")
    if commit and _git("status", "--porcelain", "--untracked-files=no", "--", "*.py"):
        commit += "+"
    return {"commit": commit, "torch": torch.__version__, "numpy": numpy.__version__, "cpu": _cpu()}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
