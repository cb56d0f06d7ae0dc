"""Arms at the points that the search of tuning.py chooses from results files, as a table.

A row is what the rule gives, whoever ran the points: a search that is not whole has no row.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluations.evidence import comparison, store, tuning
from evaluations.evidence.arms import ARMS, Arm
from evaluations.evidence.setting import Setting
from evaluations.evidence.store import Result, Run
from evaluations.evidence.tuning import Seeds

METRICS = [metric for metric in comparison.METRICS if metric != "rfid"]  # that depends on the extractor


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What the table is made of."""
    parser.add_argument("results", type=Path, nargs="+", help="files with all points of the arms' searches")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", required=True, help="rows; the first is the "
                        "baseline")
    parser.add_argument("--search-seeds", type=int, nargs="+", default=list(tuning.SEARCH_SEEDS), help="as of tune.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(tuning.FINAL_SEEDS), help="as of tune.py")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, metavar="METRIC",
                        default=["psnr", "codes_used", "perplexity"])


def render(args: argparse.Namespace) -> str:
    """In Markdown. ValueError, OSError: files and flags; a point of a search was not run, or none of them trains."""
    seeds = tuning.seeds(args.search_seeds, args.seeds)
    found = store.unique(result._replace(run=result.run._replace(setting=dataclasses.replace(
        result.run.setting, features=None))) for result in store.read_all(args.results))  # what scores changes no run
    settings = {result.run.setting for result in found}
    if len(settings) != 1:
        raise ValueError(f"a search has one setting, these files have {len(settings)}: name those of one "
                         f"({comparison.differing(settings)})")
    comparison.require_same_images(found)
    setting, = settings
    results = {result.run: result for result in found}
    rows, searches = [], []
    for name in dict.fromkeys(args.arms):
        chosen = _chosen(name, setting, seeds, results)
        row, = comparison.rows([_of(name, chosen, setting, seed, seeds, results) for seed in seeds.final])
        rows.append(row)
        scores = [_of(name, chosen, setting, seed, seeds, results).metrics for seed in seeds.search]
        searches.append([str(len(tuning.grid(ARMS[name]))), _scores([m["psnr"] for m in scores if m])])
    comparison.require_measured(rows, args.metrics, "psnr")
    heading, rule, *lines = comparison.markdown(rows, rows[0], args.metrics).splitlines()
    heading = heading.replace(f"against {rows[0].label}", f"against {args.arms[0]}")  # its row says at which point
    return "\n".join([_with(heading, ["points", f"seeds {_listed(seeds.search)} (dB)"]), rule + "---|---|",
                      *map(_with, lines, searches)]) + "\n"


def _chosen(name: str, setting: Setting, seeds: Seeds, results: Mapping[Run, Result]) -> Arm:
    first, *others = seeds.search
    for point in tuning.grid(ARMS[name]):
        _of(name, point, setting, first, seeds, results)
    finalists = tuning.finalists(ARMS[name], setting, first, results)
    for seed in others:
        for point in finalists:
            _of(name, point, setting, seed, seeds, results)
    chosen = tuning.ranked(finalists, setting, seeds.search, results)[0]
    if tuning.score(chosen, setting, seeds.search, results) == -math.inf:
        raise ValueError(f"{name}: each of its best points diverged on a search seed, so none is chosen: leave it out "
                         "of --arms")
    return chosen


def _of(name: str, arm: Arm, setting: Setting, seed: int, seeds: Seeds, results: Mapping[Run, Result]) -> Result:
    """The result under this name: a point may have been run as a variant of another arm. ValueError: there is none."""
    run = Run(arm, setting, seed)
    if run not in results:
        raise ValueError(f"no result of {comparison.label(name, arm)}, seed {seed}: the search is not whole, which "
                         f"takes all points on seed {seeds.search[0]}, the best {tuning.FINALISTS} on "
                         f"{' '.join(map(str, seeds.search))}, and what is chosen on "
                         f"{' '.join(map(str, seeds.final))}")
    return results[run]._replace(name=name)


def _scores(values: Sequence[float]) -> str:
    """Two as they are, more as mean and standard deviation."""
    if len(values) > 2:
        return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"
    return " ".join(f"{value:.2f}" for value in values)


def _listed(seeds: Sequence[int]) -> str:
    """Such as "100 and 101", or "100 to 104"."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]} to {seeds[-1]}"
    return " and ".join(map(str, seeds))


def _with(line: str, cells: list[str]) -> str:
    """A row of a Markdown table with further cells after its first."""
    _, first, rest = line.split("|", 2)
    return f"|{first}| {' | '.join(cells)} |{rest}"
