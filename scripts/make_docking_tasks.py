"""Makes tasks for protein/benchmark/train_task.py and sensitivity.py from unbound and bound protein structures, and
folders of structures for protein/train_provq.py with the same split.

    python scripts/make_docking_tasks.py proteins/benchmark.jsonl tasks

Reads a JSONL file with a row per chain: id, split ("train", "valid", "test"), unbound, bound (structure files, relative
to the JSONL file), residues (numbers with insertion codes), interface (1 within reach of the partner, 0 not, -1
unknown) and bfactor (of CA, unbound; null: unknown). Blank lines are skipped. Writes

    interface.jsonl  binary: is the residue part of the interface?
    bfactor.jsonl    regression: B-factor, as the number of standard deviations from the chain's mean (crystals differ
                     in scale). Chains whose B-factors are all alike are left out, and listed
    pairs.jsonl      pairs of conformations, the unbound and the bound form of every chain
    train/, val/     links to both forms of every chain; val/ has those of the splits valid and test
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np

from tokenizer.runtime.command import command, make_parser, require_out_folder
from tokenizer.runtime.config import parse_object
from tokenizer.runtime.parsing import read_text

PROG = "scripts/make_docking_tasks.py"


def read_rows(source: Path) -> list[dict[str, Any]]:
    """ValueError naming file, line and field for what does not fit."""
    rows: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    for number, line in enumerate(read_text(source).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{source}, line {number}"
        row = parse_object(line, where)
        check_row(where, row, source.parent)
        if (row["split"], row["id"]) in seen:
            raise ValueError(f"{where}: id: {row['id']!r} is there twice in split {row['split']}")
        seen.add((row["split"], row["id"]))
        rows.append(row)
    if not rows:
        raise ValueError(f"{source}: no rows")
    return rows


def check_row(where: str, row: dict[str, Any], folder: Path) -> None:
    """ValueError, starting with where and the field. folder: of the structures."""
    for name in ("id", "split", "unbound", "bound", "residues", "interface", "bfactor"):
        if name not in row:
            raise ValueError(f"{where}: no field {name}")
    for name in ("id", "split", "unbound", "bound"):
        if not isinstance(row[name], str) or not row[name]:
            raise ValueError(f"{where}: {name}: {row[name]!r} is not a word")
    for name in ("unbound", "bound"):
        if not (folder / row[name]).is_file():
            raise ValueError(f"{where}: {name}: no file {folder / row[name]}")
    for name, what, good in (
        ("residues", "a word", lambda value: isinstance(value, str)),
        ("interface", "1, 0 or -1", lambda value: type(value) is int and value in (1, 0, -1)),
        ("bfactor", "a finite number or null",
         lambda value: value is None or (type(value) in (int, float) and math.isfinite(value))),
    ):
        values = row[name]
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where}: {name}: must be a list with an entry per residue, got {values!r}")
        for i, value in enumerate(values):
            if not good(value):
                raise ValueError(f"{where}: {name}[{i}]: {value!r} is not {what}")
        if len(values) != len(row["residues"]):
            raise ValueError(f"{where}: {name}: {len(values)} for {len(row['residues'])} residues")


def standard_scores(values: list[float | None]) -> list[float | None] | None:
    """Standard deviations from the mean of those that are known. None: all that are known are alike."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(known) or known.std() <= 1e-6:
        return None
    mean, deviation = float(known.mean()), float(known.std())
    return [None if value is None else round((value - mean) / deviation, 4) for value in values]


def convert(source: Path, out: Path) -> tuple[dict[str, int], list[str]]:
    """Returns the number of examples of each file, and the ids that bfactor.jsonl lacks.

    ValueError naming file, line and field, before anything is written.
    """
    files: dict[str, list[dict[str, Any]]] = {
        "interface": [{"task": "Interface", "kind": "binary"}],
        "bfactor": [{"task": "B-factor", "kind": "regression"}],
        "pairs": [{"pairs": "Unbound-bound"}],
    }
    left_out, rows = [], read_rows(source)
    for row in rows:
        unbound, bound = (os.path.relpath(source.parent / row[form], out) for form in ("unbound", "bound"))
        common = {"id": row["id"], "split": row["split"], "structure": unbound, "residues": row["residues"]}
        labels = [None if label < 0 else label for label in row["interface"]]
        files["interface"].append({**common, "labels": labels})
        scores = standard_scores(row["bfactor"])
        if scores is None:
            left_out.append(row["id"])
        else:
            files["bfactor"].append({**common, "labels": scores})
        files["pairs"].append({"id": row["id"], "first": {"structure": unbound}, "second": {"structure": bound}})
    places = links(rows, source.parent, out)
    out.mkdir(parents=True, exist_ok=True)
    link(places)
    for name, examples in files.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in examples), encoding="utf-8")
    return {name: len(examples) - 1 for name, examples in files.items()}, left_out


def links(rows: list[dict[str, Any]], folder: Path, out: Path) -> dict[Path, Path]:
    """-> the structure that each link below out names. ValueError for two structures of one name, and where train/ or
    val/ hold anything else, which a tokenizer would be trained or validated on."""
    found: dict[Path, Path] = {}
    for row in rows:
        for form in ("unbound", "bound"):
            file = folder / row[form]
            place = out / ("train" if row["split"] == "train" else "val") / file.name
            if not found.setdefault(place, file).samefile(file):
                raise ValueError(f"{found[place]} and {file} have one name; in {place.parent} each needs its own")
    for part in ("train", "val"):
        for place in sorted((out / part).glob("*")):
            if place not in found or not place.exists() or not place.samefile(found[place]):
                raise ValueError(f"{place} is not of this split; remove it, or give another folder than {out}")
    return found


def link(found: dict[Path, Path]) -> None:
    for place, file in found.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            place.symlink_to(os.path.relpath(file, place.parent))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("source", type=Path, help="the JSONL file described above")
    parser.add_argument("out", type=Path, help="folder to write")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        require_out_folder(args.out, "out")
        counts, left_out = convert(args.source, args.out)
        print(", ".join(f"{name}.jsonl: {count}" for name, count in counts.items()))
        if left_out:
            print(f"bfactor.jsonl is without {len(left_out)}, whose B-factors are all alike: {', '.join(left_out)}")


if __name__ == "__main__":
    main()
