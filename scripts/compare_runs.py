"""Compares finished tokenizer runs: prints a table and, with --picture, draws their validation curves and pictures.

    python scripts/compare_runs.py runs/quickstart/vanilla runs/quickstart/provq --picture comparison.png
"""

import argparse
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from matplotlib import pyplot

from evaluations.report_figures import color, draw_curve
from evaluations.report_runs import Run, read_runs
from tokenizer.runtime.checkpoint import atomic_write

COLUMNS = {"steps": "step", "PSNR (dB)": "psnr", "SSIM": "ssim", "usage": "usage", "perplexity": "perplexity",
           "code distance": "code_distance", "effective rank": "effective_rank"}
CURVES = {"psnr": "PSNR (dB)", "usage": "codes used", "perplexity": "perplexity (codes)"}


def read_finished(folders: list[Path]) -> list[Run]:
    """SystemExit names what is missing."""
    try:
        runs = read_runs(folders)
    except ValueError as error:
        raise SystemExit(f"compare_runs.py: error: {error}") from error
    for run in runs:
        if not (run.summary and run.validation and run.images):
            raise SystemExit(f"compare_runs.py: error: {run.path} is no finished run: {'; '.join(run.notes)}")
    return runs


def draw(runs: list[Run], path: Path) -> None:
    """Curves over steps with each run's stage boundaries dotted; below, the last picture of each run's images/."""
    figure = pyplot.figure(figsize=(10, 2.9 + 1.25 * len(runs)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[2.6, 1.2 * len(runs)])
    for axis, (key, label) in zip(above.subplots(1, len(CURVES)), CURVES.items(), strict=True):
        for i, run in enumerate(runs):
            draw_curve(axis, run, key, color(i), validation=True, label=run.path.name)
        axis.set_ylabel(label)
        if key == "psnr":
            axis.legend(frameon=False)
    for i, (axis, run) in enumerate(zip(below.subplots(len(runs), 1, squeeze=False)[:, 0], runs, strict=True)):
        axis.imshow(pyplot.imread(run.images[-1]), interpolation="nearest")
        axis.set_title(f"{run.path.name}: originals above reconstructions", fontsize=9, color=color(i))
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--picture", type=Path, help="draw to this .png")
    args = parser.parse_args()
    runs = read_finished(args.runs)
    print("| run | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for run in runs:
        cells = [run.path.name, *(f"{run.summary[key]:.4g}" for key in COLUMNS.values())]
        print(f"| {' | '.join(cells)} |")
    if args.picture:
        draw(runs, args.picture)


if __name__ == "__main__":
    main()
