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
from tokenizer.runtime.parsing import from_json, read_text

ROOT = Path(__file__).resolve().parents[2]


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


def read(path: Path) -> list[Result]:
    """Results in the file's order; none if there is no file. An end without a newline is an append that was cut off.

    Settings that a line lacks are newer than it is, and have their defaults. ValueError, naming file and line: no JSON
    of a result, or settings that this version does not know.
    """
    if not path.exists():
        return []
    results = []
    for number, text in enumerate(read_text(path).split("\n")[:-1], 1):
        try:
            line = from_json(text, path)
            run = Run(Arm(**line["options"]), Setting(**line["setting"]), line["seed"])
            results.append(Result(run, line["arm"], line["metrics"], line))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: no result of a run ({error!r}); remove the line") from error
    return results


def read_all(paths: Iterable[Path]) -> list[Result]:
    """Of several files, which must exist; a run that is in two of them counts once, the first time."""
    results: dict[Run, Result] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such results file")
        for result in read(path):
            results.setdefault(result.run, result)
    return list(results.values())


class Writer:
    """The one writer of a results file."""

    def __init__(self, descriptor: int, path: Path):
        self._descriptor, self.path = descriptor, path

    def append(self, line: dict[str, Any]) -> None:
        """One write of one whole line, on disk when this returns."""
        os.write(self._descriptor, (json.dumps(line, allow_nan=False) + "\n").encode())
        os.fsync(self._descriptor)


@contextmanager
def writing(path: Path) -> Iterator[Writer]:
    """Open a results file to append to it; cuts off what an interrupted append left. ValueError: another run has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"--out {path}: another process is writing to it; wait, or name another file") from error
        text = path.read_bytes()
        os.ftruncate(descriptor, text.rfind(b"\n") + 1)
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
