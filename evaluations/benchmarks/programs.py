"""The benchmarks that are programs of their own, each run as one and read back, for run_all.py's second table."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tokenizer.runtime.command import CannotContinue

# What it is called here, its file, which of run_all.py's paths it takes by which flag ("": as an argument), and which
# of the other flags.
PROGRAMS: list[tuple[str, str, dict[str, str], tuple[str, ...]]] = [
    ("sampling", "sampling.py", {"llamagen": "--peer"}, ("repeats", "threads")),
    ("GPT training", "gpt_training.py", {"llamagen": "--peer"}, ("repeats", "threads")),
    ("image training", "image_training.py", {"llamagen": "--peer"}, ("repeats", "threads")),
    ("extraction", "extraction.py", {"llamagen": "--peer"}, ("repeats", "threads")),
    ("structure training", "structure_model.py", {"stb": "--peer-stb", "esm": "--peer-esm"}, ("repeats", "threads")),
    ("sharing", "sharing.py", {}, ("repeats",)),
    ("reading images", "input_pipeline.py", {"images": ""}, ("repeats",)),
]


def run_program(program: tuple[str, str, dict[str, str], tuple[str, ...]], args: argparse.Namespace,
                ) -> list[dict[str, Any]]:
    """Rows of what one of PROGRAMS measured, see peer.report; if a path that it needs was not given, that is said on
    standard error, and there are none.

    args: of run_all.py. Without --device cuda it sees no GPU. CannotContinue: it failed.
    """
    name, file, paths, others = program
    if args.only is not None and not name.startswith(args.only):
        return []
    if lacking := [f"--{path}" for path in paths if getattr(args, path) is None]:
        print(f"{name}: left out, missing: {' and '.join(lacking)}", file=sys.stderr)  # noqa: T201
        return []
    print(name, file=sys.stderr)  # noqa: T201
    environment = dict(os.environ) if args.device == "cuda" else os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        words = [sys.executable, str(Path(__file__).with_name(file)), "--out", str(out)]
        for path, flag in paths.items():
            words += [*([flag] if flag else []), str(getattr(args, path))]
        for flag in others:
            words += [f"--{flag}", str(getattr(args, flag))]
        done = subprocess.run(words, env=environment, stdout=sys.stderr, check=False)
        if done.returncode:
            raise CannotContinue(f"{file} ended with status {done.returncode}, see above")
        return list(json.loads(out.read_text(encoding="utf-8")))


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| what | unit | here, /s | peer, /s | ratio (range) |", "|" + "---|" * 5]
    lines += [f"| {row['what']} | {row['unit']} | {row['ours']:.2f} | {row['peer']:.2f} "
              f"| {row['ratio']:.2f} ({row['ratio_least']:.2f} to {row['ratio_most']:.2f}) |" for row in rows]
    return "\n".join(lines)


def regressions(new: list[dict[str, Any]], old: list[dict[str, Any]], tolerance: float) -> list[str]:
    """A line for each whose rate is less than what it was by more than this factor."""
    before = {row["what"]: row["ours"] for row in old}
    return [f"slower: {row['what']}: {row['ours']:.2f} {row['unit']}/s, was {before[row['what']]:.2f}"
            for row in new if row["what"] in before and row["ours"] * tolerance < before[row["what"]]]
