"""Figures of report.py and compare_runs.py: runs drawn as SVG that follows the page's text colour, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

if TYPE_CHECKING:
    from sklearn.decomposition import PCA

# Hues that keep a contrast of 3:1 on white and on near-black paper.
COLORS = ("#3a7fc4", "#d9701a", "#2c9a57", "#d0435b", "#8d63c9", "#98694a", "#1595a5", "#c9589f", "#8c8b2a", "#7d858d")
LATENT, CODE, DEAD = "#3a7fc4", "#e07b1f", "#858c94"  # latents, codes in use, codes not in use
_INK = "#010203"  # stands for the page's text colour until the SVG is written
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "text.parse_math": False, "font.size": 8.5, "axes.titlesize": 9, "axes.linewidth": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "lines.linewidth": 1.3, "text.color": _INK,
    "axes.labelcolor": _INK, "axes.edgecolor": _INK, "axes.titlecolor": _INK, "xtick.color": _INK,
    "ytick.color": _INK, "font.sans-serif": ["DejaVu Sans"],
}
# key, title, from validation.jsonl (else metrics.jsonl), logarithmic
PANELS = (
    ("loss", "total loss", False, True),
    ("recon_loss", "reconstruction loss", False, True),
    ("psnr", "PSNR (dB); hollow: no codes yet", True, False),
    ("ssim", "SSIM; hollow: no codes yet", True, False),
    ("perplexity", "perplexity (codes)", True, False),
    ("usage", "codes used (fraction)", True, False),
    ("code_drift", "drift of the codes", True, True),
    ("latent_drift", "drift of the latents", True, True),
    ("latent_spread", "spread of latents (solid), codes (dashed)", False, True),
    ("latents_moved", "moved: latents (solid), codes (dashed)", False, True),
    ("alpha", "alpha (solid) and omega (dashed)", False, False),
)
DASHED = {"latent_spread": "code_spread", "latents_moved": "codes_moved", "alpha": "omega"}  # in the same panel


def color(index: int) -> str:
    """Of the index-th setting; they repeat after ten."""
    return COLORS[index % len(COLORS)]


def points(rows: Sequence[Mapping[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have a number under `key`."""
    found = [(row["step"], row[key]) for row in rows
             if isinstance(row.get(key), (int, float)) and np.isfinite(row[key])]
    return [step for step, _ in found], [value for _, value in found]


def draw_curve(axis: Axes, run: Any, key: str, hue: str, *, validation: bool, label: str | None = None,
               linestyle: str = "-") -> bool:
    """Draw one number of a run over its steps, the ends of its stages dotted. False: the run does not have it.

    Validations before k-means are faint and apart: a continuous autoencoder's do not compare with a tokenizer's.
    run: with metrics and validation (rows with a step) and stage_ends (steps).
    """
    rows = run.validation if validation else run.metrics
    if not points(rows, key)[0]:
        return False
    marker = "." if validation else None
    if validation:
        before, rows = [row for row in rows if _continuous(row)], [row for row in rows if not _continuous(row)]
        axis.plot(*points(before, key), ":", color=hue, alpha=0.55, marker="o", markerfacecolor="none", markersize=3)
    axis.plot(*points(rows, key), linestyle, color=hue, marker=marker, markersize=4, label=label)
    for end in run.stage_ends:
        axis.axvline(end, color=hue, linestyle=":", linewidth=1)
    axis.set_xlabel("step")
    axis.grid(alpha=0.25, linewidth=0.6)
    return True


def _continuous(row: Mapping[str, Any]) -> bool:
    """Whether a validation was one of the warm-up's autoencoder, which uses no codes (0 of them in older runs)."""
    return "usage" in row and not row["usage"]


def curves(runs: Sequence[tuple[Any, str]], name: str) -> str:
    """All PANELS that any run has numbers for. runs: (run, colour). Empty: there are none. name: unique on the page."""
    shown = [panel for panel in PANELS
             if any(points(run.validation if panel[2] else run.metrics, panel[0])[0] for run, _ in runs)]
    if not shown:
        return ""
    drawn = []
    with matplotlib.rc_context(_STYLE):
        for key, title, validation, logarithmic in shown:
            figure = pyplot.figure(figsize=(3.6, 2.3), layout="constrained")
            axis = figure.subplots()
            for run, hue in runs:
                draw_curve(axis, run, key, hue, validation=validation)
                if key in DASHED:
                    draw_curve(axis, run, DASHED[key], hue, validation=False, linestyle="--")
            axis.set_title(title, loc="left")
            axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            if logarithmic:
                _logarithmic(axis)
            drawn.append(_svg(figure, f"{name}-{key}"))
    return _panels(drawn)


def code_usage(runs: Sequence[tuple[Any, str]], name: str) -> str:
    """Look-ups of each code over the validation set, most used code first. runs: (counts (K,) int, colour)."""
    with matplotlib.rc_context(_STYLE):
        figure = pyplot.figure(figsize=(5.5, 2.8), layout="constrained")
        axis = figure.subplots()
        for counts, hue in runs:
            used = np.sort(counts[counts > 0])[::-1]
            axis.step(np.arange(1, len(used) + 1), used, where="mid", color=hue)
            axis.plot(len(used), used[-1], "o", color=hue, markersize=4)
            axis.axhline(counts.sum() / len(counts), color=hue, linestyle=":", linewidth=1)
        axis.set(xlabel="code, the most used first", ylabel="look-ups",
                 xlim=(0, max(len(counts) for counts, _ in runs) + 1))
        _logarithmic(axis)
        axis.grid(alpha=0.25, linewidth=0.6)
        return f'<div class="single">{_svg(figure, name)}</div>'


def _logarithmic(axis: Axes) -> None:
    """Zeros are left out; where no value is positive the axis stays linear."""
    curves = (np.asarray(line.get_ydata(), dtype=float) for line in axis.lines)
    if any((values > 0).any() for values in curves if len(values) > 2):
        axis.set_yscale("log", nonpositive="mask")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))  # within a decade as well
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))  # no formulas: plain SVG text
        axis.yaxis.set_minor_formatter(NullFormatter())


def latents(snapshots: Sequence[Any], name: str) -> str:
    """Latents and codes at the ends of the stages, on the two main axes of the last snapshot's latents.

    snapshots: in time order, with name, step, latents (n, D), codes (m, D), rows (m,) and counts (K,); all of one D.
    """
    from sklearn.decomposition import PCA  # here because scikit-learn takes a second to import

    last = snapshots[-1].latents
    pca = PCA(n_components=min(2, *last.shape), svd_solver="full").fit(last)
    flat = [(_flat(pca, s.latents), _flat(pca, s.codes)) for s in snapshots]
    everything = np.concatenate([part for pair in flat for part in pair])
    low, high = everything.min(0), everything.max(0)
    margin = 0.04 * (high - low) + 1e-6
    shares = [*(100 * pca.explained_variance_ratio_), 0.0][:2]
    drawn = []
    with matplotlib.rc_context(_STYLE):
        for i, (snapshot, (cloud, codes)) in enumerate(zip(snapshots, flat, strict=True)):
            figure = pyplot.figure(figsize=(3.3, 3.4), layout="constrained")
            axis = figure.subplots()
            used = snapshot.counts[snapshot.rows] > 0
            dead, alive = codes[~used], codes[used]
            axis.scatter(cloud[:, 0], cloud[:, 1], s=3, color=LATENT, alpha=0.35, linewidths=0, rasterized=True)
            axis.scatter(dead[:, 0], dead[:, 1], s=12, marker="x", color=DEAD, linewidths=0.8, rasterized=True)
            axis.scatter(alive[:, 0], alive[:, 1], s=11, color=CODE, edgecolors="white", linewidths=0.35,
                         rasterized=True)
            in_use = (snapshot.counts > 0).sum()
            codes_line = f"{in_use} of {len(snapshot.counts)} codes in use" if len(codes) else "no codes yet"
            title = f"{snapshot.name.replace('_', ' ')}, step {snapshot.step}\n{codes_line}"
            axis.set_title(title, loc="left", fontsize=8.5)
            axis.set(xlim=(low[0] - margin[0], high[0] + margin[0]), ylim=(low[1] - margin[1], high[1] + margin[1]),
                     xlabel=f"component 1 ({shares[0]:.0f} % of the variance)",
                     ylabel=f"component 2 ({shares[1]:.0f} %)")
            drawn.append(_svg(figure, f"{name}-{i}"))
    return _panels(drawn)


def _flat(pca: PCA, x: np.ndarray) -> np.ndarray:
    """(n, D) -> (n, 2); codes of one dimension lie on a line."""
    if not len(x):
        return np.zeros((0, 2))
    flat = pca.transform(x)
    return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))


def _panels(drawn: Sequence[str]) -> str:
    """Side by side, as many as fit: on a telephone one below the other, its axes still readable."""
    return f'<div class="panels">{"".join(drawn)}</div>'


def _svg(figure: Figure, name: str) -> str:
    """Inline SVG with ids of its own, as wide as its container, in the page's colour and without a time stamp."""
    with matplotlib.rc_context({"svg.hashsalt": name}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", dpi=200, transparent=True, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    head, rest = svg.split(">", 1)
    return re.sub(r' (width|height)="[^"]*"', "", head) + ">" + rest


def caption(path: Path, grid: bool) -> str:
    """Of an image of a run: a grid of examples, or samples."""
    step, _, name = path.stem.partition("_")
    if not grid:
        return f"samples: {path.stem}"
    where = f"{name.replace('_', ' ')}, step {int(step)}" if step.isdigit() else path.stem
    return f"{where}: originals above reconstructions"
