"""Runs of several arms as one table: means over seeds, and paired differences from a baseline, with 95 % intervals."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from evaluations.evidence.arms import ARMS, Arm
from evaluations.evidence.setting import Setting
from evaluations.evidence.store import Result
from tokenizer.runtime.files import atomic_write
from tokenizer.runtime.over_seeds import Merged, mean_interval, merge

METRICS = {  # heading and digits of what a table shows
    "psnr": ("PSNR (dB)", 2), "ssim": ("SSIM", 3), "mse": ("MSE", 4), "rfid": ("rFID", 2),
    "codes_used": ("codes used", 0),
    "usage": ("usage", 3), "perplexity": ("perplexity", 0), "effective_rank": ("effective rank", 2),
    "latent_spread": ("latents' spread", 2), "code_spread": ("codes' spread", 2),
    "code_distance": ("code distance", 2), "relative_error": ("quantization error", 3),
}
SHORT = {"lr": "lr {:g}", "code_lr_scale": "codes x{:g}", "beta": "β {:g}"}


class Difference(NamedTuple):
    """Of an arm from the baseline, over the seeds that both have."""

    mean: float
    interval: tuple[float, float] | None  # 95 %, Student's t of the paired differences; None: one seed
    seeds: int


class Row(NamedTuple):
    label: str
    values: dict[str, dict[int, float]]  # metric -> seed -> value
    diverged: int  # runs

    def merged(self, metric: str) -> Merged | None:
        return merge(list(self.values.get(metric, {}).values()))


def label(name: str, arm: Arm) -> str:
    """The arm's name, and what of it is not as that name says."""
    known = ARMS.get(name, Arm())
    names = [field.name for field in dataclasses.fields(Arm)]
    changed = [field for field in names if getattr(arm, field) != getattr(known, field)]
    words = [SHORT.get(field, field + " {}").format(getattr(arm, field)) for field in changed]
    return f"{name} ({', '.join(words)})" if words else name


def require_same_images(results: Sequence[Result]) -> None:
    """ValueError: two of them are known to have seen other images under one name."""
    images = {result.line["images"]: result.where for result in results if "images" in result.line}
    if len(images) > 1:
        one, other, *_ = images.values()
        raise ValueError(f"{one} and {other} are of other images of one name: no table can show both")


def rows(results: Sequence[Result]) -> list[Row]:
    """A row per arm, in the order in which they come. ValueError: results of more than one setting, of other images."""
    settings = {result.run.setting for result in results}
    if len(settings) > 1:
        raise ValueError(f"one table shows one setting, these results have {len(settings)}: {differing(settings)}")
    require_same_images(results)
    found: dict[Arm, Row] = {}
    for result in results:
        row = found.setdefault(result.run.arm, Row(label(result.name, result.run.arm), {}, 0))
        if result.metrics is None:
            found[result.run.arm] = row._replace(diverged=row.diverged + 1)
            continue
        for metric, value in result.metrics.items():
            row.values.setdefault(metric, {})[result.run.seed] = value
    return list(found.values())


def differing(settings: set[Setting]) -> str:
    """Which fields they differ in, with their values."""
    names = [field.name for field in dataclasses.fields(Setting)]
    fields = {name: sorted({str(getattr(setting, name)) for setting in settings}) for name in names}
    return "; ".join(f"{name} {' '.join(values)}" for name, values in fields.items() if len(values) > 1)


def difference(row: Row, baseline: Row, metric: str) -> Difference | None:
    """None: no seed in common, or the metric is missing."""
    ours, theirs = row.values.get(metric, {}), baseline.values.get(metric, {})
    pairs = np.array([ours[seed] - theirs[seed] for seed in ours if seed in theirs])
    if not len(pairs):
        return None
    if len(pairs) == 1:
        return Difference(float(pairs[0]), None, 1)
    low, high = mean_interval(pairs)["ci95"]
    return Difference(float(pairs.mean()), (low, high), len(pairs))


def find(table: Sequence[Row], name: str, flag: str) -> Row:
    """The row called so. ValueError names the flag and lists the names."""
    for row in table:
        if row.label == name:
            return row
    raise ValueError(f"{flag} {name!r} is none of the arms: {'; '.join(row.label for row in table)}")


def require_measured(table: Sequence[Row], metrics: Sequence[str], compared: str) -> None:
    """ValueError, naming the flag: no run has one of them."""
    for flag, metric in (*(("--metrics", metric) for metric in metrics), ("--compared", compared)):
        if not any(metric in row.values for row in table):
            raise ValueError(f"{flag} {metric}: no run has it")


def markdown(
    table: Sequence[Row], baseline: Row, metrics: Sequence[str], compared: str = "psnr",
    shown_as: Mapping[str, tuple[str, int]] = METRICS,
) -> str:
    """Mean ± standard deviation over seeds of each metric; the last column is the paired difference of `compared`.

    What is of fewer or more seeds than its row says, says so. shown_as: heading and digits of the metrics.
    """
    heading, digits = shown_as[compared]
    lines = ["| arm | seeds | " + " | ".join(shown_as[metric][0] for metric in metrics)
             + f" | {heading} against {baseline.label} [95 %] |", "|---" * (len(metrics) + 3) + "|"]
    for row in table:
        count = len(row.values.get(compared, {}))
        cells = [_cell(row.merged(metric), shown_as[metric][1], count) for metric in metrics]
        gap = difference(row, baseline, compared)
        shown = "" if row is baseline else "-"
        if gap and row is not baseline:
            shown = f"{gap.mean:+.{digits}f}"
            shown += f" [{gap.interval[0]:+.{digits}f}, {gap.interval[1]:+.{digits}f}]" if gap.interval else ""
            shown += _of(gap.seeds, count)
        seeds = str(count) + (f", {row.diverged} diverged" if row.diverged else "")
        lines.append(f"| {row.label} | {seeds} | {' | '.join(cells)} | {shown} |")
    return "\n".join(lines) + "\n"


def _cell(value: Merged | None, digits: int, seeds: int) -> str:
    if value is None:
        return "-"
    spread = "" if value.deviation is None else f" ± {value.deviation:.{digits}f}"
    return f"{value.mean:.{digits}f}{spread}{_of(value.seeds, seeds)}"


def _of(seeds: int, expected: int) -> str:
    return "" if seeds == expected else f" ({seeds} seed{'s' * (seeds > 1)})"


def figure(table: Sequence[Row], baseline: Row, metrics: Sequence[str], path: Path, compared: str = "psnr") -> None:
    """A panel per metric, each arm's seeds as dots and its mean as a bar; and one of the differences of `compared` from
    the baseline, with their 95 % intervals where there are two seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # here because tables and --help need no figure
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(3.0 + 2.2 * (len(metrics) + 1), 0.9 + 0.27 * len(table)), dpi=140, layout="constrained")
    *panels, last = drawing.subplots(1, len(metrics) + 1, sharey=True)
    for axes, metric in zip(panels, metrics, strict=True):
        for y, row in enumerate(table):
            values = list(row.values.get(metric, {}).values())
            if values:
                axes.plot(np.mean(values), y, "|", color="#d55e00", markersize=13, markeredgewidth=2)
                axes.plot(values, [y] * len(values), "o", color="#0072b2", markersize=3.5, alpha=0.7)
        axes.set_title(METRICS[metric][0], loc="left", fontsize=9)
    for y, row in enumerate(table):
        gap = difference(row, baseline, compared)
        if gap and row is not baseline:
            if gap.interval:
                last.plot(gap.interval, [y, y], color="#0072b2", linewidth=1.5)
            last.plot(gap.mean, y, "|", color="#d55e00", markersize=13, markeredgewidth=2)
    last.axvline(0.0, color="#7d7d7d", linewidth=0.8, linestyle=":")
    last.set_title(f"{METRICS[compared][0]}, difference", loc="left", fontsize=9)
    for axes in (*panels, last):
        axes.set_yticks(range(len(table)), [row.label for row in table])
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    last.invert_yaxis()  # shared: once for all
    FigureCanvasAgg(drawing)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: drawing.savefig(file, format="png"))
