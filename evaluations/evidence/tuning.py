"""Every arm at its own best: the same grid for all, chosen on search seeds, reported on others."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

from evaluations.evidence.arms import Arm
from evaluations.evidence.setting import Setting
from evaluations.evidence.store import Result, Run

GRID: dict[str, tuple[float, ...]] = {  # equal for all arms, in the order of preference between equals
    "lr": (1e-3, 5e-4, 2e-3),
    "code_lr_scale": (1.0, 10.0, 30.0),
    "beta": (0.25, 0.1, 1.0),
}
SEARCH_SEEDS = (100, 101)
FINAL_SEEDS = (0, 1, 2, 3, 4)


def grid(arm: Arm) -> list[Arm]:
    """The arm at every point of GRID. What its quantizer does not have is left as it is: no run would differ."""
    axes = [(getattr(arm, name),) if name in arm.idle else values for name, values in GRID.items()]
    return [dataclasses.replace(arm, **dict(zip(GRID, point, strict=True))) for point in itertools.product(*axes)]


def score(arm: Arm, setting: Setting, seeds: Sequence[int], results: Mapping[Run, Result]) -> float:
    """Mean PSNR over seeds; -inf if one of them diverged. KeyError: a run is missing."""
    metrics = [results[Run(arm, setting, seed)].metrics for seed in seeds]
    return -math.inf if None in metrics else statistics.fmean(m["psnr"] for m in metrics if m)


def best(arm: Arm, setting: Setting, seeds: Sequence[int], results: Mapping[Run, Result]) -> Arm:
    """The point of the arm's grid with the highest mean PSNR; of equals, the first."""
    return max(grid(arm), key=lambda point: score(point, setting, seeds, results))


def edges(chosen: Arm) -> list[str]:
    """Fields whose chosen value is the least or the largest of GRID: a wider grid might find a better one."""
    return [name for name, values in GRID.items()
            if name not in chosen.idle and getattr(chosen, name) in (min(values), max(values))]
