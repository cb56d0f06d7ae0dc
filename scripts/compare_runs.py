"""Compares finished tokenizer runs: prints a table and, with --picture, draws their validation curves and pictures.

    python scripts/compare_runs.py runs/quickstart/vanilla runs/quickstart/provq --picture comparison.png
"""

import argparse
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tokenizer.runtime.command import command, make_parser, refuse_early, require_out_file

PROG = "scripts/compare_runs.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--picture", type=Path, help="draw to this .png")
    return parser.parse_args(argv)


if __name__ == "__main__":
    refuse_early(PROG, parse_args)

from matplotlib import pyplot

from evaluations.report_figures import color, draw_curve
from evaluations.report_runs import Run, read_runs
from tokenizer.runtime.files import atomic_write
from tokenizer.runtime.metrics import short

COLUMNS = {"steps": "step", "PSNR (dB)": "psnr", "SSIM": "ssim", "usage": "usage", "perplexity": "perplexity",
           "code distance": "code_distance", "effective rank": "effective_rank"}
CURVES = {"psnr": "PSNR (dB)", "usage": "codes used", "perplexity": "perplexity (codes)"}


def read_finished(folders: list[Path]) -> list[Run]:
    """ValueError names what is missing."""
    runs = read_runs(folders)
    for run in runs:
        if not (run.summary and run.validation and run.images):
            raise ValueError(f"{run.path} is no finished run: {'; '.join(run.notes)}")
    return runs


def draw(runs: list[Run], path: Path) -> None:
    """Curves over steps with each run's stage boundaries dotted; below, the last picture of each run's images/."""
    figure = pyplot.figure(figsize=(10, 2.9 + 1.25 * len(runs)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[2.6, 1.2 * len(runs)], squeeze=False).flat
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


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        if args.picture:
            require_out_file(args.picture, "--picture")
        runs = read_finished(args.runs)
        print("| run | " + " | ".join(COLUMNS) + " |")
        print("|---" * (len(COLUMNS) + 1) + "|")
        for run in runs:
            cells = [run.path.name, *(short(run.summary[key]) for key in COLUMNS.values())]
            print(f"| {' | '.join(cells)} |")
        if args.picture:
            draw(runs, args.picture)


if __name__ == "__main__":
    main()
