"""The map of pace: what a soft transition gains over a hard switch, against how far Adam can move a code meanwhile.

Pace = codes' learning rate x transition steps / spread of a latent channel after k-means. A run is compared with the
hard switch (schedule hard, or no transition) of the same seed, rates and number of steps.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluations.evidence import comparison, store
from tokenizer.runtime.files import atomic_write

METRICS = ("psnr", "codes_used")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")


class Point(NamedTuple):
    """A run with a soft transition, beside its hard switch."""

    transition_steps: int
    code_lr_scale: float
    seed: int
    pace: float
    gain: dict[str, float]  # of METRICS, from the hard switch


def points(results: Sequence[store.Result]) -> list[Point]:
    """Of the results, those that have a hard switch to be compared with.

    ValueError: none has, one has two, they differ in more than a map shows, or are of other images.
    """
    comparison.require_same_images(results)
    hard: dict[object, store.Result] = {}
    for result in results:
        if _is_hard(result) and result.metrics and hard.setdefault(_shared(result), result) is not result:
            raise ValueError(f"{hard[_shared(result)].where} and {result.where} are both the hard switch of the same "
                             "runs: leave out the files of one")
    found, kinds = [], {}
    for result in results:
        other = hard.get(_shared(result))
        if result.run.arm.curriculum != "provq" or _is_hard(result) or not result.metrics or not other:
            continue
        arm, setting = result.run.arm, result.run.setting
        kinds[dataclasses.replace(arm, code_lr_scale=1.0), dataclasses.replace(setting, transition_steps=0)] = result
        try:
            spread = next(row["latent_spread"] for row in result.line["trace"] if row["step"] >= setting.warmup_steps)
            pace = arm.lr * arm.code_lr_scale * setting.transition_steps / spread
            gain = {metric: result.metrics[metric] - (other.metrics or {})[metric] for metric in METRICS}
        except (KeyError, TypeError, StopIteration, ZeroDivisionError) as error:
            raise ValueError(f"{result.where}, or its hard switch {other.where}, lacks what a map shows ({error!r})"
                             ) from error
        found.append(Point(setting.transition_steps, arm.code_lr_scale, result.run.seed, pace, gain))
    if not found:
        raise ValueError("no run with a soft transition has a hard switch of its seed, rates and number of steps: run "
                         "run.py with --arms provq-hard --transition-steps 0, and otherwise equal")
    if len(kinds) > 1:
        one, another, *_ = kinds.values()
        raise ValueError(f"{one.where} and {another.where} differ in more than their seed, transition's length and "
                         "codes' learning rate: no map can show both; leave out the files of one")
    return found


def _is_hard(result: store.Result) -> bool:
    return result.run.arm.curriculum == "provq" and (
        result.run.arm.schedule == "hard" or not result.run.setting.transition_steps)


def _shared(result: store.Result) -> tuple[object, ...]:
    """What a run and its hard switch have in common."""
    return (dataclasses.replace(result.run.arm, schedule="cosine"),
            dataclasses.replace(result.run.setting, transition_steps=0), result.run.seed)


def markdown(found: Sequence[Point], metric: str = "psnr") -> str:
    """Rows: codes' learning rate; columns: lengths of the transition; cells: mean gain and pace."""
    lengths = sorted({point.transition_steps for point in found})
    heading, digits = comparison.METRICS[metric]
    lines = ["| codes' learning rate | " + " | ".join(f"{length} steps" for length in lengths) + " |",
             "|---" * (len(lengths) + 1) + "|"]
    for scale in sorted({point.code_lr_scale for point in found}):
        cells = []
        for length in lengths:
            here = [p for p in found if (p.transition_steps, p.code_lr_scale) == (length, scale)]
            cells.append(f"{np.mean([p.gain[metric] for p in here]):+.{digits}f} "
                         f"({np.mean([p.pace for p in here]):.2g})" if here else "-")
        lines.append(f"| x{scale:g} | {' | '.join(cells)} |")
    return f"{heading} over the hard switch (pace):\n\n" + "\n".join(lines) + "\n"


def figure(found: Sequence[Point], path: Path) -> None:
    """A panel per metric, a dot per run, a colour per length of the transition; lines are means over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here because tables and --help need no figure
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(4.2 * len(METRICS), 3.2), dpi=140, layout="constrained")
    for axes, metric in zip(drawing.subplots(1, len(METRICS)), METRICS, strict=True):
        for i, length in enumerate(sorted({point.transition_steps for point in found})):
            colour = COLOURS[i % len(COLOURS)]
            here = [point for point in found if point.transition_steps == length]
            axes.plot([p.pace for p in here], [p.gain[metric] for p in here], "o", color=colour, markersize=3.5,
                      alpha=0.7)
            scales = sorted({point.code_lr_scale for point in here})
            mean = [np.mean([(p.pace, p.gain[metric]) for p in here if p.code_lr_scale == s], axis=0) for s in scales]
            axes.plot(*np.transpose(mean), color=colour, linewidth=1.3, label=f"{length} steps")
        axes.axhline(0.0, color="#7d7d7d", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_xlabel("pace: codes' lr x transition steps / latents' spread", fontsize=8)
        axes.set_title(f"{comparison.METRICS[metric][0]} over the hard switch", loc="left", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, title="transition", title_fontsize=8)
    FigureCanvasAgg(drawing)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: drawing.savefig(file, format="png"))


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", type=Path, nargs="+", help="files that run.py wrote")
    parser.add_argument("--metric", choices=METRICS, default="psnr", help="of the table")


def render(args: argparse.Namespace) -> str:
    """In Markdown. ValueError, OSError: files."""
    return markdown(points(store.read_all(args.results)), args.metric)
