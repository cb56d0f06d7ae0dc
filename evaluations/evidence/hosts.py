"""Hosts as rows of a table: what scripts/train_hosts.py wrote of each, bare and with ProVQ."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from evaluations.benchmarks.host_flags import ATTACHED, BARE
from tokenizer.runtime.over_seeds import shown
from tokenizer.runtime.parsing import from_json, read_text

ERRORS = {"images": "RMSE (% of the range)", "sound": "log-spectral error (dB)"}  # what a host is trained on -> heading


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What a table is made of."""
    parser.add_argument("results", type=Path, nargs=1, help="file that train_hosts.py wrote")
    parser.add_argument("--data", choices=ERRORS, required=True, help="only hosts that were trained on it")


def markdown(document: dict[str, Any], data: str) -> str:
    """A row for each host, over the seeds that both its curricula have. ValueError: one has none."""
    lines = [f"| `kind=` | class | codes | used, {BARE} | {ATTACHED} | {ERRORS[data]}, {BARE} | {ATTACHED} |",
             "|---|---|---|---|---|---|---|"]
    for name, about in document["hosts"].items():
        if about["data"] != data:
            continue
        by = {label: {run["seed"]: run for run in document["runs"] if (run["host"], run["curriculum"]) == (name, label)}
              for label in (BARE, ATTACHED)}
        seeds = sorted(by[BARE].keys() & by[ATTACHED].keys())
        if not seeds:
            raise ValueError(f"no seed of {name} has both a bare run and one with ProVQ")
        cells = [shown([found[seed][key] for seed in seeds], digits)
                 for key, digits in (("codes", 0), ("error", 2)) for found in by.values()]
        lines.append(f"| `{name}` | {about['source']} | {about['codes']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def render(args: argparse.Namespace) -> str:
    """In Markdown. FileNotFoundError; ValueError, naming the file: it is no such file, or a run is missing."""
    path = args.results[0]
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such results file")
    try:
        return markdown(from_json(read_text(path), path), args.data)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: no file of train_hosts.py ({error!r})") from error
