"""What the benchmarks against another code base share: loading its modules from a checkout, and paired timing."""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from tokenizer.runtime.files import atomic_write_json


def load_module(checkout: Path, file: str) -> ModuleType:
    """A module of the checkout by its file, under a name of its own: its package may be called like one of ours.

    ValueError: the file is not there.
    """
    path = checkout / file
    if not path.is_file():
        raise ValueError(f"--peer {checkout} has no {file}; name a checkout of the peer's repository")
    if str(checkout) not in sys.path:
        sys.path.append(str(checkout))  # for what the module imports itself; ours come first
    name = "peer_" + path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def clock_of(device: torch.device) -> Callable[[], float]:
    """On a CPU the seconds of the process's threads together: other work on the machine counts for little."""
    return time.perf_counter if device.type == "cuda" else time.process_time


def seconds(function: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = clock()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - began


def matmul_gflops(device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """What large float32 matrix products reach here, the bound for everything else."""
    a = torch.randn(2048, 2048, device=device)
    torch.mm(a, a)
    return 2 * 2048**3 / 1e9 / min(seconds(lambda: torch.mm(a, a), clock) for _ in range(10))


def compare(ours: Callable[[], object], theirs: Callable[[], object], repeats: int,
            clock: Callable[[], float] = time.perf_counter) -> tuple[list[float], list[float]]:
    """Seconds of both, after one warm-up of each. Who goes first alternates: the first of a pair tends to be slower."""
    seconds(ours, clock)
    seconds(theirs, clock)
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(repeats):
        for which in (0, 1) if repeat % 2 == 0 else (1, 0):
            times[which].append(seconds((ours, theirs)[which], clock))
    return times


def report(what: str, unit: str, amount: float, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    """A line each, in `unit` per second of `amount` units per call, and the ratio: medians, and the range. Returns the
    row of it for --out.
    """
    rates = [sorted(amount / t for t in times) for times in (ours, theirs)]
    for name, found in zip(("ours", "peer"), rates, strict=True):
        print(f"{name:6s} {statistics.median(found):10.2f} {unit}/s   ({found[0]:.2f} to {found[-1]:.2f})")  # noqa: T201
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    print(f"ratio  {statistics.median(ratios):10.2f}   ({ratios[0]:.2f} to {ratios[-1]:.2f})")  # noqa: T201
    return {"what": what, "unit": unit, "ours": statistics.median(rates[0]), "peer": statistics.median(rates[1]),
            "ratio": statistics.median(ratios), "ratio_least": ratios[0], "ratio_most": ratios[-1]}


def keep(out: Path | None, rows: list[dict[str, Any]]) -> None:
    if out is not None:
        atomic_write_json(out, rows)
