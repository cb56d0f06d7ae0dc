"""Which runs of results files a table shows, and the table."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from evaluations.evidence import comparison, store
from evaluations.evidence.arms import Arm
from evaluations.evidence.setting import Setting
from evaluations.evidence.store import Result
from tokenizer.runtime.command import require_flags_at_least
from tokenizer.runtime.config import flag_name

FIELDS = [field.name for field in dataclasses.fields(Setting) if field.name not in ("data", "model", "features")]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """What a table is made of."""
    parser.add_argument("results", type=Path, nargs="+", help="files that run.py and tune.py wrote")
    parser.add_argument("--arms", nargs="+", metavar="LABEL", help="these rows, in this order; default: all")
    parser.add_argument("--baseline", help="an arm's label in the table; default: its first row")
    parser.add_argument("--seeds", type=int, nargs="+", help="only these; default: all")
    parser.add_argument("--metrics", nargs="+", choices=comparison.METRICS, metavar="METRIC",
                        default=["psnr", "codes_used", "perplexity"], help=f"of {' '.join(comparison.METRICS)}")
    parser.add_argument("--compared", choices=comparison.METRICS, default="psnr", help="metric of the last column")
    for name in FIELDS:
        parser.add_argument(flag_name(name), type=int, help="only runs of this setting")


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with status 2, naming the flag: a number of no run."""
    require_flags_at_least(parser, args, 0, " ".join(["seeds", *FIELDS]))


def chosen(args: argparse.Namespace) -> list[Result]:
    """The runs of the seeds and the setting that the flags ask for. ValueError, OSError: files and flags."""
    wanted = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    results = [result for result in store.read_all(args.results)
               if (args.seeds is None or result.run.seed in args.seeds)
               and all(getattr(result.run.setting, name) == value for name, value in wanted.items())]
    if not results:
        raise ValueError(f"no result in {' '.join(map(str, args.results))} is of these seeds and setting")
    return results


def mixture(results: Sequence[Result]) -> str | None:
    """What else than their settings sets the runs apart, where they recorded it: commits, versions of torch, machines.

    Each rounds in its own way, and then the same seed is another draw.
    """
    found = {name: dict.fromkeys(str(result.line[name]) for result in results if result.line.get(name))
             for name in ("commit", "torch", "cpu")}
    apart = [f"{name} ({', '.join(value[:12] if name == 'commit' else value for value in values)})"
             for name, values in found.items() if len(values) > 1]
    return f"the runs shown are of more than one {', '.join(apart)}, and may round differently" if apart else None


def shown(args: argparse.Namespace) -> list[Result]:
    """The runs that the table shows: `chosen`, each once, of --arms. ValueError, OSError: files and flags."""
    results = chosen(args)
    if "rfid" not in (args.compared, *args.metrics):  # what is scored changes no run
        results = store.unique(result._replace(run=result.run._replace(setting=dataclasses.replace(
            result.run.setting, features=None))) for result in results)
    if not args.arms:
        return results
    labels: dict[Arm, str] = {}  # as of comparison.rows: a row has the name of its first run
    for result in results:
        labels.setdefault(result.run.arm, comparison.label(result.name, result.run.arm))
    for name in args.arms:
        if name not in labels.values():
            comparison.find(comparison.rows(results), name, "--arms")
    return [result for result in results if labels[result.run.arm] in args.arms]


def rows(args: argparse.Namespace) -> tuple[list[comparison.Row], comparison.Row]:
    """The rows that the flags ask for, and which of them is the baseline. ValueError, OSError: files and flags."""
    found = comparison.rows(shown(args))
    if args.arms:
        found = [comparison.find(found, name, "--arms") for name in args.arms]
    if any(row.values for row in found):  # else all have diverged
        comparison.require_measured(found, args.metrics, args.compared)
    return found, comparison.find(found, args.baseline, "--baseline") if args.baseline else found[0]


def render(args: argparse.Namespace) -> str:
    """In Markdown."""
    found, baseline = rows(args)
    return comparison.markdown(found, baseline, args.metrics, args.compared)
