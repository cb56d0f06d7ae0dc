"""Numbers over seeds, for tables: mean, spread, and which row is clearly best."""

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy.typing as npt


class Merged(NamedTuple):
    """A number over seeds."""

    mean: float
    deviation: float | None   # sample standard deviation; None: one seed
    seeds: int                # that have the number


def merge(values: Sequence[float | None]) -> Merged | None:
    """Mean and standard deviation (n - 1) of the values that are there; None: there are none."""
    present = [value for value in values if value is not None]
    if not present:
        return None
    return Merged(statistics.fmean(present), statistics.stdev(present) if len(present) > 1 else None, len(present))


def shown(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; of one seed without. ValueError: no values."""
    found = merge(values)
    if found is None:
        raise ValueError("no values")
    spread = "" if found.deviation is None else f" ± {found.deviation:.{digits}f}"
    return f"{found.mean:.{digits}f}{spread}"


def mean_interval(values: npt.NDArray[Any]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1) and 95 % Student t interval of the mean of values (S >= 2,)."""
    from scipy import stats  # here because it takes a second to import

    mean, std = float(values.mean()), float(values.std(ddof=1))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * std / math.sqrt(len(values))
    return {"mean": mean, "std": std, "ci95": [mean - half, mean + half]}


def clear_best(column: Sequence[Merged | None], higher_is_better: bool) -> int | None:
    """Row whose mean is better than every other's by more than the two standard deviations together, or None.

    Without a spread (one seed) on either side nothing is clear.
    """
    present = {i: value for i, value in enumerate(column) if value is not None}
    if len(present) < 2:
        return None
    sign = 1 if higher_is_better else -1
    row, best = max(present.items(), key=lambda item: sign * item[1].mean)
    for i, other in present.items():
        if i == row:
            continue
        if best.deviation is None or other.deviation is None:
            return None
        if sign * (best.mean - other.mean) <= best.deviation + other.deviation:
            return None
    return row
