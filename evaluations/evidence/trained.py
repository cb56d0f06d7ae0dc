"""Runs of the trainers as rows of a table: what collect.py gathered from their folders."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evaluations.evidence import comparison
from evaluations.report_runs import number
from tokenizer.runtime.parsing import from_json, read_text

METRICS = comparison.METRICS | {  # a trainer's last validation, and under a report's name what the report says
    "usage": ("usage", 2), "perplexity": ("perplexity", 1), "normalized_perplexity": ("perplexity / K", 3),
    "code_distance": ("code distance", 2), "reconstruction.rfid": ("rFID", 2), "val_loss": ("validation loss", 3),
    "generation.fid": ("gFID", 2), "generation.sfid": ("sFID", 2), "generation.inception_score": ("IS", 2),
    "generation.precision": ("precision", 3), "generation.recall": ("recall", 3),
    "rmsd": ("RMSD (Å)", 2), "lddt": ("lDDT", 3), "tm": ("TM", 3),
    "structures.usage": ("usage, whole chains", 3), "structures.perplexity": ("perplexity, whole chains", 1),
    "structures.normalized_perplexity": ("perplexity / K, whole chains", 3),
    "structures.usage_per_chain": ("usage per chain", 3), "structures.rmsd": ("RMSD (Å), whole chains", 2),
    "structures.lddt": ("lDDT, whole chains", 3), "structures.tm": ("TM, whole chains", 3),
    "probe.interface": ("interface, AUROC (%)", 1), "probe.bfactor": ("B-factor, Spearman (%)", 1),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What a table is made of."""
    parser.add_argument("results", type=Path, nargs=1, help="file that collect.py wrote")
    add_table_flags(parser)


def add_table_flags(parser: argparse.ArgumentParser) -> None:
    """How it looks."""
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="these, in this order; default: all")
    parser.add_argument("--baseline", metavar="ROW", help="default: the first row")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, metavar="METRIC", required=True,
                        help=f"of {' '.join(METRICS)}")
    parser.add_argument("--compared", choices=METRICS, metavar="METRIC", help="of the last column; default: the first")


def read(path: Path) -> list[dict[str, Any]]:
    """The runs. FileNotFoundError; ValueError, naming the file: it is no such file."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such results file")
    try:
        runs = from_json(read_text(path), path)["runs"]
        for run in runs:
            wrong = [metric for metric in run.keys() & METRICS.keys() if number(run[metric]) is None]
            if wrong or not isinstance(run["run"], str) or type(run["seed"]) is not int:
                raise TypeError(f"{wrong[0] if wrong else 'name or seed'} of {run['run']}, seed {run['seed']}")
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no file of collect.py ({error!r})") from error
    return list(runs)


def rows(runs: Sequence[Mapping[str, Any]]) -> list[comparison.Row]:
    """In the runs' order. ValueError: a row has a seed twice."""
    found: dict[str, comparison.Row] = {}
    seen: set[tuple[str, int]] = set()
    for run in runs:
        name, seed = run["run"], run["seed"]
        if (name, seed) in seen:
            raise ValueError(f"two runs of the row {name} have the seed {seed}: name one of them")
        seen.add((name, seed))
        row = found.setdefault(name, comparison.Row(name, {}, 0))
        for metric in run.keys() & METRICS.keys():
            row.values.setdefault(metric, {})[seed] = run[metric]
    return list(found.values())


def render(args: argparse.Namespace) -> str:
    """In Markdown."""
    return table(read(args.results[0]), args)


def table(runs: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> str:
    """In Markdown, as `add_table_flags` says. ValueError names the flag that asks for what no run has."""
    found = rows(runs)
    if args.rows:
        found = [comparison.find(found, name, "--rows") for name in args.rows]
    baseline = comparison.find(found, args.baseline, "--baseline") if args.baseline else found[0]
    compared = args.compared or args.metrics[0]
    comparison.require_measured(found, args.metrics, compared)
    return comparison.markdown(found, baseline, args.metrics, compared, METRICS)
