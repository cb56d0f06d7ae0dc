"""Prints a table of finished tokenizer runs: python scripts/compare_runs.py RUN [RUN ...]"""

import json
import sys
from pathlib import Path

COLUMNS = {"steps": "step", "PSNR (dB)": "psnr", "SSIM": "ssim", "usage": "usage", "perplexity": "perplexity",
           "code distance": "code_distance"}


def main(folders: list[str]) -> None:
    if not folders:
        raise SystemExit(__doc__)
    print("| run | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for folder in folders:
        path = Path(folder) / "summary.json"
        if not path.is_file():
            raise SystemExit(f"compare_runs.py: error: {path} is missing: {folder} is no finished run")
        summary = json.loads(path.read_text())
        cells = [Path(folder).name, *(f"{summary[key]:.4g}" for key in COLUMNS.values())]
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
