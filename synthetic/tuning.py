"""The scan behind both views of TopoDisc: all arms at all learning rates, widths and codebook sizes, on seeds apart.

A cell is a JSON-able dict: method, lr, width, num_codes, disk_mse and triangle_mse (one value per seed), and curves,
the logged meters averaged over seeds ({"epochs": [...], METER: [...]}, None where a meter has no meaning).
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from synthetic.settings import FINAL_SEEDS, FINALISTS, FIRST_SEED, Setting
from synthetic.topodisc import METERS, train_jobs

LOG_EVERY = 25
PAPER_TRIANGLE_PCT, PAPER_DISK_PCT = 33.1, 11.9  # Figure 2 (c): ProVQ's triangle, and the disk figure it gives

Cell = dict[str, Any]


def scan(
    methods: Sequence[str], setting: Setting, *, lrs: Sequence[float], widths: Sequence[int], codebooks: Sequence[int],
    seeds: int, workers: int = 1,
) -> Iterator[Cell]:
    """Train every method at every combination, `seeds` seeds from FIRST_SEED on; yields each cell as it is done."""
    jobs = [(method, dataclasses.replace(setting, num_codes=num_codes, lr=lr, width=width))
            for num_codes, lr, width, method in itertools.product(codebooks, lrs, widths, methods)]
    yield from _cells(jobs, range(FIRST_SEED, FIRST_SEED + seeds), workers)


def finals(
    cells: Sequence[Cell], methods: Sequence[str], setting: Setting, *, seeds: int, workers: int = 1,
) -> Iterator[Cell]:
    """Train each method's FINALISTS best cells at setting.num_codes again, on FINAL_SEEDS times the scan's seeds.

    They are fresh seeds. The winner of a scan is lucky on the scan's seeds, and at learning rates where one seed in
    twenty diverges it takes more than a handful to see that.
    """
    jobs = []
    for method in methods:
        ranked = sorted((c for c in cells if c["method"] == method and c["num_codes"] == setting.num_codes), key=error)
        jobs += [(method, dataclasses.replace(setting, lr=c["lr"], width=c["width"])) for c in ranked[:FINALISTS]]
    first = FIRST_SEED + seeds
    yield from _cells(jobs, range(first, first + FINAL_SEEDS * seeds), workers)


def _cells(jobs: Sequence[tuple[str, Setting]], seeds: Sequence[int], workers: int) -> Iterator[Cell]:
    runs = train_jobs(jobs, seeds, log_every=LOG_EVERY, workers=workers)
    for (method, setting), run in zip(jobs, runs, strict=True):
        curves: dict[str, list[Any]] = {"epochs": run.epochs}
        for name in METERS:
            curves[name] = [None if math.isnan(v) else v for v in run.meters[name].mean(1).tolist()]
        yield {"method": method, "lr": setting.lr, "width": setting.width, "num_codes": setting.num_codes,
               "disk_mse": run.final("disk_mse").tolist(), "triangle_mse": run.final("triangle_mse").tolist(),
               "curves": curves}


def error(cell: Cell) -> float:
    """What tuning minimises: the mean over seeds of disk_mse + triangle_mse; inf if any seed diverged."""
    total = float(np.mean(cell["disk_mse"]) + np.mean(cell["triangle_mse"]))
    return total if math.isfinite(total) else math.inf


def best(cells: Sequence[Cell], method: str) -> Cell:
    """The cell of a method with the least error."""
    return min((cell for cell in cells if cell["method"] == method), key=error)


def paper_views(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The settings where all arms alike show what the paper reports, the one with the best vanilla first.

    They are those where ProVQ gains at least PAPER_TRIANGLE_PCT and PAPER_DISK_PCT over vanilla and soft alone gains on
    both. Among them the strongest baseline makes the least of the cure: no straw man.
    """
    groups: dict[tuple[float, int, int], dict[str, Cell]] = {}
    for cell in cells:
        groups.setdefault((cell["lr"], cell["width"], cell["num_codes"]), {})[cell["method"]] = cell
    found = []
    for (lr, width, num_codes), arms in groups.items():
        mean = {(method, part): float(np.mean(arm[f"{part}_mse"]))
                for method, arm in arms.items() for part in ("disk", "triangle")}
        gains = {(method, part): 100 * (1 - mean[method, part] / mean["vanilla", part])
                 for method in ("soft", "provq") for part in ("disk", "triangle")}
        if (gains["provq", "triangle"] >= PAPER_TRIANGLE_PCT and gains["provq", "disk"] >= PAPER_DISK_PCT
                and gains["soft", "triangle"] > 0 and gains["soft", "disk"] > 0):
            found.append({"lr": lr, "width": width, "num_codes": num_codes, "vanilla_error": error(arms["vanilla"]),
                          **{f"{method}_{part}_pct": gain for (method, part), gain in gains.items()}})
    return sorted(found, key=lambda view: view["vanilla_error"])
