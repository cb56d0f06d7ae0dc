"""Makes tasks for protein/train_task.py and sensitivity.py from unbound and bound protein structures.

    python scripts/make_docking_tasks.py proteins/benchmark.jsonl tasks

Reads a JSONL file with a row per chain: id, split ("train", "valid", "test"), unbound, bound (structure files, relative
to the JSONL file), residues (numbers with insertion codes), interface (1 within reach of the partner, 0 not, -1
unknown) and bfactor (of CA, unbound). Writes

    interface.jsonl  binary: is the residue part of the interface?
    bfactor.jsonl    regression: B-factor, as the number of standard deviations from the chain's mean (crystals differ
                     in scale). Chains whose B-factors are all alike are left out
    pairs.jsonl      pairs of conformations, the unbound and the bound form of every chain
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np


def convert(source: Path, out: Path) -> dict[str, int]:
    """Returns the number of examples of each file. ValueError naming the line for a row that lacks a field."""
    out.mkdir(parents=True, exist_ok=True)
    files: dict[str, list[dict[str, Any]]] = {
        "interface": [{"task": "Interface", "kind": "binary"}],
        "bfactor": [{"task": "B-factor", "kind": "regression"}],
        "pairs": [{"pairs": "Unbound-bound"}],
    }
    for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(), start=1):
        row = json.loads(line)
        needed = ("id", "split", "unbound", "bound", "residues", "interface", "bfactor")
        absent = [name for name in needed if name not in row]
        if absent:
            raise ValueError(f"{source}, line {number}: no field {absent[0]}")
        unbound, bound = (os.path.relpath(source.parent / row[form], out) for form in ("unbound", "bound"))
        common = {"id": row["id"], "split": row["split"], "structure": unbound, "residues": row["residues"]}
        labels = [None if label < 0 else label for label in row["interface"]]
        files["interface"].append({**common, "labels": labels})
        values = np.array(row["bfactor"], dtype=np.float64)
        if values.std() > 1e-6:
            scores = (values - values.mean()) / values.std()
            files["bfactor"].append({**common, "labels": [round(score, 4) for score in scores.tolist()]})
        files["pairs"].append({"id": row["id"], "first": {"structure": unbound}, "second": {"structure": bound}})
    for name, rows in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {name: len(rows) - 1 for name, rows in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the JSONL file described above")
    parser.add_argument("out", type=Path, help="folder to write")
    args = parser.parse_args()
    try:
        counts = convert(args.source, args.out)
    except (ValueError, OSError) as error:
        raise SystemExit(f"make_docking_tasks.py: error: {error}") from error
    print(", ".join(f"{name}.jsonl: {count}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
