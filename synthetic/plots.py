"""Pictures of TopoDisc runs, drawn to be read at 800 pixels. The Agg canvas: no display, no window, no pyplot state."""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from PIL import Image
from torch import Tensor

from synthetic.topodisc import Report, Run
from synthetic.tuning import Cell, error
from tokenizer.runtime.files import atomic_write
from tokenizer.runtime.over_seeds import mean_interval

DISK, OUTLINE, CODES = "#5b9bd5", "#e07b39", "#111111"
COLOURS = ("#7d7d7d", "#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#0072b2", "#d55e00", "#8c6d31")  # by method
WIDTH = 8.0  # inches of every picture
DPI = 140  # 1120 pixels: sharp at 800 on screens that show two pixels for one
TEXT = 9  # points
FEW = 5  # methods whose names fit side by side, and whose bars have room for a number


class Panel(NamedTuple):
    """What demo.py shows of an arm: held-out waves (n, P) and what comes back, their latents (N, D), the codes (K, D).
    """

    title: str
    waves: Tensor
    returned: Tensor
    latents: Tensor
    codes: Tensor


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def _render(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _save(figure: Figure, path: Path) -> None:
    # A palette: a third of the bytes, and the same numbers give the same file.
    picture, buffer = _render(figure).quantize(128, dither=Image.Dither.NONE), io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    atomic_write(path, lambda file: file.write(buffer.getvalue()))


def _tidy(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=TEXT)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


# --------------------------------------------------------------------------------------------------- Figure 2

def comparison(report: Report, disk_points: int, path: Path) -> None:
    """Figure 2: the data, the errors of all methods, and the improvements over the baseline, with 95 % intervals."""
    figure = _figure(2.7)
    data, errors, gains = figure.subplots(1, 3, width_ratios=[0.75, 1.15, 1.1])
    run = next(iter(report.runs.values()))
    points = run.points[0].numpy()
    for xy, colour, label in ((points[:disk_points], DISK, "disk"), (points[disk_points:], OUTLINE, "outline")):
        data.scatter(xy[:, 0], xy[:, 1], s=3, color=colour, label=label)
    data.set_aspect("equal")
    data.legend(loc="lower center", bbox_to_anchor=(0.5, -0.28), ncol=2, frameon=False, fontsize=8, markerscale=3,
                handletextpad=0.1, columnspacing=1.0)
    _tidy(data, "(a) data of one seed")

    methods = report.summary["methods"]
    names = list(methods)
    place = np.arange(len(names))
    for part, colour, shift in (("disk", DISK, -0.2), ("triangle", OUTLINE, 0.2)):
        mse = [methods[name][f"{part}_mse"] for name in names]
        _bars(errors, place + shift, [m["mean"] for m in mse], [m["ci95"] for m in mse], colour)
        pct = [methods[name][f"improvement_{part}_pct"] for name in names[1:]]
        interval = [methods[name][f"improvement_{part}_ci95"] for name in names[1:]]
        _bars(gains, place[1:] + shift, pct, interval, colour)
        for x, value, (low, high) in zip(place[1:] + shift, pct, interval, strict=True):
            if len(names) <= FEW:
                gains.annotate(f"{value:+.0f}", (x, high if value >= 0 else low), (0, 2 if value >= 0 else -9),
                               textcoords="offset points", ha="center", fontsize=8)
    for axes, shown in ((errors, names), (gains, names[1:])):
        axes.set_xticks(place[len(names) - len(shown):], shown)
        if len(names) > FEW:
            axes.tick_params(axis="x", labelrotation=90)
    errors.axhline(0, color="black", lw=0.5)
    gains.axhline(0, color="black", lw=0.5)
    gains.margins(y=0.12)
    _tidy(errors, f"(b) MSE, {len(run.seeds)} seeds")
    _tidy(gains, f"(c) improvement over {names[0]}, %")
    _save(figure, path)


def _bars(axes: Axes, x: np.ndarray, height: Sequence[float], interval: Sequence[Sequence[float]], colour: str) -> None:
    low, high = np.array(interval).T
    axes.bar(x, height, width=0.38, color=colour, yerr=np.array([height - low, high - height]), capsize=2,
             error_kw={"lw": 1, "ecolor": "#333333"})


# ------------------------------------------------------------------------------------------- Figure 3 and GIF

def typical_seed(run: Run) -> int:
    """The position of the seed with the (lower) median triangle error at the end: pictures show it, not the best."""
    return int(np.argsort(run.final("triangle_mse"))[(len(run.seeds) - 1) // 2])


def _latent_space(axes: Axes, run: Run, entry: int, seed: int, disk_points: int, half: float) -> None:
    """Latents of the disk, the latent image of the outline, and codes, within +-half of the middle of the latents."""
    z, edges = run.latents[entry, seed].numpy(), run.edges[entry, seed].numpy()
    axes.scatter(z[:disk_points, 0], z[:disk_points, 1], s=3.5, color=DISK, lw=0)
    axes.plot(*edges.reshape(-1, 2).T, color=OUTLINE, lw=1.8, solid_joinstyle="round")
    if run.meters["gap"][entry, seed].isfinite():
        codes = run.codes[entry, seed].numpy()
        axes.scatter(codes[:, 0], codes[:, 1], s=21, color=CODES, marker="*", lw=0, zorder=3)
    centre = (z.min(0) + z.max(0)) / 2
    axes.set_xlim(centre[0] - half, centre[0] + half)
    axes.set_ylim(centre[1] - half, centre[1] + half)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(color="#bbbbbb", lw=0.8)


def _half_widths(run: Run, seed: int) -> np.ndarray:
    """(L,) half the side of the square that holds the latents, with a margin."""
    z = run.latents[:, seed].numpy()
    return 0.55 * (z.max(1) - z.min(1)).max(1)


def dynamics(runs: Mapping[str, Run], disk_points: int, path: Path) -> None:
    """Figure 3: latents and codes at five epochs, one row per method, the same typical seed of the first."""
    seed = typical_seed(next(iter(runs.values())))
    epochs = np.array(next(iter(runs.values())).epochs)
    entries = [int(np.abs(epochs - share * epochs[-1]).argmin()) for share in (0, 0.2, 0.4, 0.6, 1)]
    figure = _figure(1.7 * len(runs) + 0.25)
    grid = figure.subplots(len(runs), len(entries), squeeze=False)
    for row, (name, run) in zip(grid, runs.items(), strict=True):
        halves = _half_widths(run, seed)
        for axes, entry in zip(row, entries, strict=True):
            _latent_space(axes, run, entry, seed, disk_points, halves[entry])
            axes.set_xlabel(f"spread {run.meters['latent_spread'][entry, seed]:.2f}", fontsize=7.5, labelpad=2,
                            color="#444444")
        row[0].set_ylabel(name, fontsize=10, fontweight="bold")
    for axes, entry in zip(grid[0], entries, strict=True):
        axes.set_title(f"epoch {epochs[entry]}", fontsize=TEXT)
    _save(figure, path)


def animation(runs: Mapping[str, Run], disk_points: int, path: Path, *, milliseconds: int = 140) -> None:
    """Latents and codes over all logged epochs as a GIF, one panel per method, the typical seed of the first."""
    seed = typical_seed(next(iter(runs.values())))
    epochs = next(iter(runs.values())).epochs
    halves = {name: _smooth(_half_widths(run, seed)) for name, run in runs.items()}
    figure = Figure(figsize=(WIDTH, WIDTH / len(runs) + 0.35), dpi=100)
    grid = figure.subplots(1, len(runs), squeeze=False)[0]
    figure.subplots_adjust(left=0.005, right=0.995, bottom=0.09, top=0.91, wspace=0.03)
    label = figure.text(0.01, 0.02, "", fontsize=9)
    frames = []
    for entry, epoch in enumerate(epochs):
        for axes, (name, run) in zip(grid, runs.items(), strict=True):
            axes.clear()
            _latent_space(axes, run, entry, seed, disk_points, halves[name][entry])
            axes.set_title(f"{name}   outline MSE {run.meters['triangle_mse'][entry, seed]:.4f}", fontsize=8)
        label.set_text(f"epoch {epoch}")
        frames.append(_render(figure))
    # One palette of few colours for all frames: a third of the bytes. The last frame stays for two seconds.
    palette = frames[-1].quantize(16, dither=Image.Dither.NONE)
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    duration = [milliseconds] * (len(small) - 1) + [2000]
    buffer = io.BytesIO()
    small[0].save(buffer, format="GIF", save_all=True, append_images=small[1:], duration=duration, loop=0)
    atomic_write(path, lambda file: file.write(buffer.getvalue()))


def _smooth(values: np.ndarray, reach: int = 2) -> np.ndarray:
    """The largest value within `reach` entries, averaged likewise: a camera that neither cuts off nor jitters."""
    padded = np.pad(values, 2 * reach, mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view
    return windows(windows(padded, 2 * reach + 1).max(1), 2 * reach + 1).mean(1)


# ------------------------------------------------------------------------------------------------------ meters

PANELS = {  # title -> meters (the second one dashed), logarithmic?
    "outline MSE": (("triangle_mse",), True),
    "contraction: latents to codes": (("contraction",), False),
    "pursuit: codes to latents": (("pursuit",), False),
    "spread: latents, codes (dashed)": (("latent_spread", "code_spread"), True),
    "inward bend of the outline": (("inward_bend",), False),
    "effective rank of the latents": (("effective_rank",), False),
}
SETTLED = 0.2  # share of training after which contraction and pursuit fit their scale; before, latents leap
SMOOTHED = 5  # logged epochs that contraction and pursuit are averaged over: latents zigzag


def curves(runs: Mapping[str, Run], path: Path) -> None:
    """The deadlock meters over training: mean over seeds, shaded 95 % interval of the mean."""
    figure = _figure(4.4)
    grid = figure.subplots(2, 3)
    for axes, (title, (names, log)) in zip(grid.flat, PANELS.items(), strict=True):
        for colour, (method, run) in zip(cycle(COLOURS), runs.items()):
            for meter, line in zip(names, ("-", "--"), strict=False):
                values = run.meters[meter].numpy()
                if meter in ("contraction", "pursuit"):
                    values = _running_mean(values)
                _curve(axes, run.epochs, values, log=log, color=colour, ls=line, label=method)
        if log:
            axes.set_yscale("log")
        _tidy(axes, title)
    # One scale for both: who closes the gap is a comparison.
    settled = np.array(next(iter(runs.values())).epochs) >= SETTLED * next(iter(runs.values())).epochs[-1]
    both = [_running_mean(run.meters[m].numpy())[settled].mean(1) for run in runs.values()
            for m in ("contraction", "pursuit")]
    reach = 1.3 * max(float(np.nanmax(np.abs(values), initial=1e-3)) for values in both)
    for axes in grid[0, 1:]:
        axes.set_ylim(-reach, reach)
        axes.axhline(0, color="black", lw=0.5)
    figure.supxlabel("epoch", fontsize=9)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncol=len(runs), frameon=False, fontsize=9)
    _save(figure, path)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Centred means over SMOOTHED entries of values (L, S), over fewer beside the ends and NaN."""
    half = SMOOTHED // 2
    padded = np.pad(values, ((half, half), (0, 0)), constant_values=np.nan)
    windows = np.lib.stride_tricks.sliding_window_view(padded, SMOOTHED, axis=0)  # (L, S, SMOOTHED)
    there = np.isfinite(windows)
    mean = np.where(there, windows, 0).sum(2) / there.sum(2).clip(1)
    return np.where(np.isfinite(values), mean, np.nan)


def _curve(axes: Axes, epochs: Sequence[int], values: np.ndarray, *, log: bool, **style: Any) -> None:
    """Mean over seeds of values (L, S) and its 95 % interval, where all seeds have one."""
    rows = np.isfinite(values).all(1).nonzero()[0]
    low, high = np.array([mean_interval(values[row])["ci95"] for row in rows]).T
    mean, x = values[rows].mean(1), np.array(epochs)[rows]
    axes.plot(x, mean, lw=1.6, **style)
    if log:  # a mean of few and skewed seeds can have an interval that reaches below 0
        low = np.maximum(low, mean / 10)
    axes.fill_between(x, low, high, color=style["color"], alpha=0.2, lw=0)


def learning_rates(cells: Sequence[Cell], methods: Sequence[str], num_codes: int, width: int, path: Path) -> None:
    """What the learning rate does: errors of all methods at their best width; meters of the first at `width`.

    cells as of `tuning.scan`. The meters are those of the scanned width that is nearest to `width`.
    """
    cells = [cell for cell in cells if cell["num_codes"] == num_codes]
    lrs = sorted({cell["lr"] for cell in cells})
    figure = _figure(3.1)
    errors, gap, bend = figure.subplots(1, 3)
    for colour, method in zip(cycle(COLOURS), methods):
        best = [min(error(cell) for cell in cells if cell["method"] == method and cell["lr"] == lr) for lr in lrs]
        errors.plot(lrs, best, color=colour, marker="o", ms=3.5, lw=1.6, label=method)
    errors.set_xscale("log")
    errors.set_yscale("log")
    errors.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    errors.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    errors.yaxis.set_minor_locator(NullLocator())
    errors.set_xlabel("learning rate", fontsize=TEXT)
    figure.legend(*errors.get_legend_handles_labels(), loc="outside upper center", ncol=len(methods), frameon=False,
                  fontsize=TEXT)
    _tidy(errors, "(a) disk + outline MSE")

    shades = colormaps["viridis"](np.linspace(0.0, 0.9, len(lrs)))
    width = min((cell["width"] for cell in cells), key=lambda scanned: abs(scanned - width))
    at_width = {cell["lr"]: cell["curves"] for cell in cells if cell["method"] == methods[0] and cell["width"] == width}
    for axes, meter in ((gap, "gap"), (bend, "inward_bend")):
        for shade, lr in zip(shades, lrs, strict=True):
            if lr in at_width:
                curve = at_width[lr]
                axes.plot(curve["epochs"], np.array(curve[meter], float), color=shade, lw=1.6, label=f"{lr:g}")
        axes.set_xlabel("epoch", fontsize=TEXT)
    gap.set_yscale("log")
    figure.legend(*gap.get_legend_handles_labels(), title="learning\nrate", title_fontsize=8, fontsize=8, frameon=False,
                  loc="outside right center", handlelength=1.2)
    _tidy(gap, f"(b) {methods[0]}: gap to codes")
    _tidy(bend, f"(c) {methods[0]}: inward bend")
    _save(figure, path)


# ------------------------------------------------------------------------------------------------------- demo.py

def waves(panels: Sequence[Panel], path: Path) -> None:
    """A column per arm: waves and what comes back, latents and codes in the latents' two principal components."""
    figure = _figure(4.0)
    above, below = figure.subplots(2, len(panels))
    for panel, top, bottom in zip(panels, above, below, strict=True):
        for i, (wave, returned) in enumerate(zip(panel.waves.numpy(), panel.returned.numpy(), strict=True)):
            top.plot(wave - 2.6 * i, color="#b0b0b0", linewidth=2.5)
            top.plot(returned - 2.6 * i, color=OUTLINE, linewidth=1.2)
        _tidy(top, panel.title.replace(": ", "\n"))
        mean = panel.latents.mean(0)
        plane = torch.linalg.svd(panel.latents - mean, full_matrices=False).Vh[:2].T  # (D, 2)
        latents, codes = (((points - mean) @ plane).numpy() for points in (panel.latents, panel.codes))
        bottom.plot(*latents.T, ".", color=DISK, markersize=1.5)
        bottom.plot(*codes.T, "*", color=CODES, markersize=5, markeredgewidth=0)
        _tidy(bottom, "")
        for axes in (top, bottom):
            axes.set_xticks([])
            axes.set_yticks([])
    _save(figure, path)
