"""Compares finished tokenizer runs: prints a table and, with --picture, draws their validation curves and pictures.

    python scripts/compare_runs.py runs/quickstart/vanilla runs/quickstart/provq --picture comparison.png
"""

import argparse
import json
from pathlib import Path

COLUMNS = {"steps": "step", "PSNR (dB)": "psnr", "SSIM": "ssim", "usage": "usage", "perplexity": "perplexity",
           "code distance": "code_distance", "effective rank": "effective_rank"}
CURVES = {"psnr": "PSNR (dB)", "usage": "codes used", "perplexity": "perplexity (codes)"}


def read(folder: Path) -> tuple[dict, list[dict]]:
    """A run's summary and its validations; SystemExit naming what is missing."""
    for name in ("summary.json", "validation.jsonl"):
        if not (folder / name).is_file():
            raise SystemExit(f"compare_runs.py: error: {folder / name} is missing: {folder} is no finished run")
    validations = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    return json.loads((folder / "summary.json").read_text()), validations


def draw(folders: list[Path], path: Path) -> None:
    """Curves over steps with each run's stage boundaries dotted; below, the last picture of each run's images/."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(10, 2.9 + 1.25 * len(folders)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[2.6, 1.2 * len(folders)])
    axes = above.subplots(1, len(CURVES))
    for i, folder in enumerate(folders):
        config, (summary, validations) = json.loads((folder / "config.json").read_text()), read(folder)
        steps = [row["step"] for row in validations]
        ends = {summary["warmup_steps"], summary["warmup_steps"] + config["transition_steps"]} - {0}
        for axis, key in zip(axes, CURVES, strict=True):
            axis.plot(steps, [row[key] for row in validations], f"C{i}.-", label=folder.name)
            for end in ends:
                axis.axvline(end, color=f"C{i}", linestyle=":", linewidth=1)
    for axis, label in zip(axes, CURVES.values(), strict=True):
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    for i, (axis, folder) in enumerate(zip(below.subplots(len(folders), 1, squeeze=False)[:, 0], folders, strict=True)):
        axis.imshow(pyplot.imread(max((folder / "images").glob("*_final.png"))), interpolation="nearest")
        axis.set_title(f"{folder.name}: originals above reconstructions", fontsize=9, color=f"C{i}")
        axis.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs")
    parser.add_argument("--picture", type=Path, help="draw to this .png")
    args = parser.parse_args()
    print("| run | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for folder in args.runs:
        summary, _ = read(folder)
        cells = [folder.name, *(f"{summary[key]:.4g}" for key in COLUMNS.values())]
        print(f"| {' | '.join(cells)} |")
    if args.picture:
        draw(args.runs, args.picture)


if __name__ == "__main__":
    main()
