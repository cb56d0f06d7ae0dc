"""Arms at the points that the search of tuning.py chooses from results files, as a table.

A row is what the rule gives, whoever ran the points: a search that is not whole has no row.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path

from evaluations.evidence import comparison, store, tuning
from evaluations.evidence.arms import ARMS, Arm
from evaluations.evidence.setting import Setting
from evaluations.evidence.store import Result, Run


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What the table is made of."""
    parser.add_argument("results", type=Path, nargs="+", help="files with all points of the arms' searches")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", required=True, help="rows; the first is the "
                        "baseline")
    parser.add_argument("--metrics", nargs="+", choices=comparison.METRICS, metavar="METRIC",
                        default=["psnr", "codes_used", "perplexity"])


def render(args: argparse.Namespace) -> str:
    """In Markdown. ValueError, OSError: files and flags; a point of a search was not run."""
    found = store.read_all(args.results)
    # What is scored changes no run.
    settings = {dataclasses.replace(result.run.setting, features=None) for result in found}
    if len(settings) != 1:
        raise ValueError(f"one search has one setting, these results have {len(settings)}: "
                         f"{comparison.differing(settings)}")
    setting, = settings
    results = {result.run._replace(setting=setting): result for result in found}
    rows, searches = [], []
    for name in args.arms:
        chosen = _chosen(name, setting, results)
        row, = comparison.rows([_of(name, chosen, setting, seed, results) for seed in tuning.FINAL_SEEDS])
        rows.append(row)
        scores = [_of(name, chosen, setting, seed, results).metrics for seed in tuning.SEARCH_SEEDS]
        searches.append([str(len(tuning.grid(ARMS[name]))), " ".join(f"{m['psnr']:.2f}" if m else "-" for m in scores)])
    heading, rule, *lines = comparison.markdown(rows, rows[0], args.metrics).splitlines()
    seeds = " and ".join(map(str, tuning.SEARCH_SEEDS))
    return "\n".join([_with(heading, ["points", f"seeds {seeds} (dB)"]), rule + "---|---|",
                      *map(_with, lines, searches)]) + "\n"


def _chosen(name: str, setting: Setting, results: Mapping[Run, Result]) -> Arm:
    first, *others = tuning.SEARCH_SEEDS
    for point in tuning.grid(ARMS[name]):
        _of(name, point, setting, first, results)
    finalists = tuning.finalists(ARMS[name], setting, first, results)
    for seed in others:
        for point in finalists:
            _of(name, point, setting, seed, results)
    return tuning.ranked(finalists, setting, tuning.SEARCH_SEEDS, results)[0]


def _of(name: str, arm: Arm, setting: Setting, seed: int, results: Mapping[Run, Result]) -> Result:
    """The result under this name: a point may have been run as a variant of another arm. ValueError: there is none."""
    run = Run(arm, setting, seed)
    if run not in results:
        raise ValueError(f"no result of {comparison.label(name, arm)}, seed {seed}: the search is not whole")
    return results[run]._replace(name=name, run=run)


def _with(line: str, cells: list[str]) -> str:
    """A row of a Markdown table with further cells after its first."""
    _, first, rest = line.split("|", 2)
    return f"|{first}| {' | '.join(cells)} |{rest}"
