"""Every arm at its own best: the same points for all, chosen on search seeds, reported on others."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from evaluations.evidence.arms import Arm
from evaluations.evidence.setting import Setting
from evaluations.evidence.store import Result, Run


class Point(NamedTuple):
    """What is searched of an arm, by the names of its fields."""

    lr: float
    code_lr_scale: float
    beta: float


# Equal for all arms, in the order of preference between equals. Faster codes and a lower beta at one learning rate
# only: the whole product would cost twice as many runs of every arm.
POINTS = (
    *(Point(lr, scale, 0.25) for scale in (1.0, 10.0) for lr in (1e-3, 2e-3, 4e-3)),
    Point(2e-3, 30.0, 0.25), Point(2e-3, 10.0, 0.05), Point(2e-3, 30.0, 0.05),
)
FINALISTS = 3  # points that every search seed sees: the winner on one seed is lucky on it
SEARCH_SEEDS = (100, 101)
FINAL_SEEDS = (0, 1, 2, 3, 4)


class Seeds(NamedTuple):
    """Which seeds choose, the first of them among all points, and which are reported."""

    search: tuple[int, ...]
    final: tuple[int, ...]


def seeds(search: Sequence[int], final: Sequence[int]) -> Seeds:
    """Of --search-seeds and --seeds. ValueError, naming the flag: one is there twice, or in both."""
    for flag, values in (("--search-seeds", search), ("--seeds", final)):
        for value in values:
            if values.count(value) > 1:
                raise ValueError(f"{flag} names {value} twice; a run is of one seed")
    if set(final) & set(search):
        raise ValueError(f"--seeds and --search-seeds share {sorted(set(final) & set(search))}: what is reported must "
                         "not have chosen")
    return Seeds(tuple(search), tuple(final))


def grid(arm: Arm) -> list[Arm]:
    """The arm at each of POINTS. What its quantizer does not have is left as it is: no run would differ."""
    points = [{name: value for name, value in point._asdict().items() if name not in arm.idle} for point in POINTS]
    return list(dict.fromkeys(dataclasses.replace(arm, **point) for point in points))


def score(arm: Arm, setting: Setting, seeds: Sequence[int], results: Mapping[Run, Result]) -> float:
    """Mean PSNR over seeds; -inf if one of them diverged. KeyError: a run is missing."""
    metrics = [results[Run(arm, setting, seed)].metrics for seed in seeds]
    return -math.inf if None in metrics else statistics.fmean(m["psnr"] for m in metrics if m)


def ranked(
    arms: Sequence[Arm], setting: Setting, seeds: Sequence[int], results: Mapping[Run, Result]
) -> list[Arm]:
    """By mean PSNR, the best first; of equals, the one that comes first in `arms`. KeyError: a run is missing."""
    return sorted(arms, key=lambda arm: score(arm, setting, seeds, results), reverse=True)


def finalists(arm: Arm, setting: Setting, seed: int, results: Mapping[Run, Result]) -> list[Arm]:
    """The FINALISTS best points of the arm on the first search seed. KeyError: a run is missing."""
    return ranked(grid(arm), setting, [seed], results)[:FINALISTS]


def edges(chosen: Arm) -> list[str]:
    """Fields whose chosen value is the least or the largest of POINTS: a wider grid might find a better one.

    Of two values both are, and nothing is said.
    """
    return [name for name, values in zip(Point._fields, zip(*POINTS, strict=True), strict=True)
            if name not in chosen.idle and len(set(values)) > 2 and getattr(chosen, name) in (min(values), max(values))]
