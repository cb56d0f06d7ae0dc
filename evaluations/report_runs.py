"""Reads the folders of training runs for report.py and compare_runs.py, groups them and merges seeds.

A run that is unfinished or damaged is read as far as possible; what is missing or wrong is said in `Run.notes`.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

REPORTS = ("reconstruction", "generation")  # RUN/evaluation/NAME.json, written by the entries of these names
# Settings that pages read, and as what; float: any finite number. None passes.
SETTINGS = {"quantizer": str, "transition": str, "codebook_init": str, "recluster": bool, "recluster_at": list,
            "global_seed": float, "codebook_lr_scale": float, "codebook_restart_below": float}
PNG_START, PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"


class Snapshot(NamedTuple):
    """One file of RUN/latents. Without a codebook (stage 1) codes, rows and counts are empty."""

    name: str             # such as stage1_end
    step: int
    stage: int
    latents: np.ndarray   # (n, D) float32
    codes: np.ndarray     # (m, D) float32, a sample of the codebook
    rows: np.ndarray      # (m,) int64, places of the codes in the codebook
    counts: np.ndarray    # (K,) int64, look-ups over the validation set


@dataclass
class Run:
    """What a run's folder holds. Dicts and lists are empty where a file is missing or cannot be read."""

    path: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)              # empty: the run is not finished
    metrics: list[dict[str, Any]] = field(default_factory=list)        # rows with an integer step
    validation: list[dict[str, Any]] = field(default_factory=list)
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)   # of REPORTS, those that are there
    images: list[Path] = field(default_factory=list)                   # complete PNG files, in the order of steps
    samples: list[Path] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)            # in the order of steps and stages
    notes: list[str] = field(default_factory=list)                     # what a reader has to know

    @property
    def step(self) -> int:
        """Steps done, as far as the files say."""
        rows = [*self.metrics[-1:], *self.validation[-1:]]
        return int(number(self.summary.get("step")) or max((row["step"] for row in rows), default=0))

    @property
    def seed(self) -> Any:
        return self.config.get("global_seed")

    @property
    def result(self) -> dict[str, Any]:
        """The trainer's last validation."""
        return self.summary or (self.validation[-1] if self.validation else {})

    @property
    def lengths(self) -> tuple[int, int] | None:
        """Steps of stages 1 and 2, an adaptive warm-up as it came out; None: this run has no curriculum."""
        warmup = number(self.summary.get("warmup_steps", self.config.get("warmup_steps")))
        transition = number(self.config.get("transition_steps"))
        return None if warmup is None or transition is None else (int(warmup), int(transition))

    @property
    def stage_ends(self) -> list[int]:
        """Steps at which a stage ended, ascending."""
        warmup, transition = self.lengths or (0, 0)
        return sorted({end for end in (warmup, warmup + transition) if 0 < end < self.step})

    @property
    def last_kmeans(self) -> int | None:
        """Step at which k-means last set the codes; None if it never did, or is not known to have."""
        warmup, transition = self.lengths or (0, 0)
        init, again = self.config.get("codebook_init", "auto"), self.config.get("recluster_at")
        if self.config.get("quantizer") in ("fsq", "lfq"):  # their codes lie on a grid
            return None
        steps = [*([warmup] if init == "kmeans" or (init == "auto" and warmup) else []),
                 *(again if isinstance(again, list) else ()),
                 *([warmup + transition] if self.config.get("recluster") else [])]
        return max((step for step in steps if number(step) is not None and step < self.step), default=None)

    @property
    def written(self) -> str:
        """Day of the last change, ISO."""
        files = [p for p in self.path.iterdir() if p.suffix in (".json", ".jsonl")]
        return date.fromtimestamp(max(p.stat().st_mtime for p in files)).isoformat()


def number(value: object) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


# ------------------------------------------------------------------------------------------------------- reading

def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read every folder; names are the shortest ends of the paths that tell them apart.

    ValueError: a path that is no run, or given twice (it would count as two seeds).
    """
    resolved = [path.resolve() for path in paths]
    for path, place in zip(paths, resolved, strict=True):
        if not place.is_dir():
            raise ValueError(f"{path} is no folder; name the folders of training runs")
        if not any((place / name).is_file() for name in ("config.json", "metrics.jsonl")):
            raise ValueError(f"{path} is no run: it holds neither config.json nor metrics.jsonl")
        if resolved.count(place) > 1:
            raise ValueError(f"{path} is given twice; name each run once")
    length = 1
    while len({place.parts[-length:] for place in resolved}) < len(resolved):
        length += 1
    return [_read_run(place, "/".join(place.parts[-length:])) for place in resolved]


def _read_run(path: Path, name: str) -> Run:
    run = Run(path, name)
    run.config = _read_settings(run)
    run.metrics, run.validation = (_read_rows(run, f"{kind}.jsonl") for kind in ("metrics", "validation"))
    if (path / "summary.json").exists():
        run.summary = _read_object(run, "summary.json", "its last validation is used")
    else:
        planned = run.config.get("max_steps")
        run.notes.append(f"unfinished: step {run.step}" + (f" of {planned}" if planned else "")
                         + ", no summary.json; its numbers are those of the last validation")
    for kind in REPORTS:
        place = f"evaluation/{kind}.json"
        if (path / place).exists():
            report = _read_object(run, place, "it is left out")
            if isinstance(report.get("protocol"), dict):
                run.reports[kind] = report
            elif report:
                run.notes.append(f"{place} names no protocol; it is left out")
    pictures = sorted(path.glob("images/*.png"), key=lambda p: (p.stem[:7], "codebook" in p.stem))  # after the stage
    run.images = _pictures(run, pictures)
    run.samples = _pictures(run, sorted([*path.glob("samples/*.png"), *path.glob("*grid*.png")]))
    if not run.images:
        run.notes.append("images/ has no pictures")
    found = [snapshot for file in sorted(path.glob("latents/*.npz")) if (snapshot := _read_snapshot(run, file))]
    run.snapshots = sorted(found, key=lambda s: (s.step, s.stage))
    if not (path / "latents").is_dir():
        run.notes.append("latents/ is missing: no code-usage histogram and no picture of latents and codes (an older "
                         "trainer wrote this run, or it was stopped before the first stage ended)")
    return run


def _read_settings(run: Run) -> dict[str, Any]:
    consequence = "its settings are unknown"
    found = _read_object(run, "config.json", consequence)
    for key, kind in SETTINGS.items():
        value = found.get(key)
        if value is not None and not (isinstance(value, kind) if kind is not float else number(value) is not None):
            run.notes.append(f"config.json: {key} is {json.dumps(value)[:100]}, which no trainer writes; {consequence}")
            return {}
    return found


def _content(path: Path) -> bytes:
    """OSError: also for a pipe, which would be waited for."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no regular file")
    return path.read_bytes()


def _read_object(run: Run, name: str, consequence: str) -> dict[str, Any]:
    try:
        value = json.loads(_content(run.path / name).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        run.notes.append(f"{name} cannot be read ({type(error).__name__}); {consequence}")
        return {}
    if not isinstance(value, dict):
        run.notes.append(f"{name} is no JSON object; {consequence}")
        return {}
    return value


def _read_rows(run: Run, name: str) -> list[dict[str, Any]]:
    try:
        lines = _content(run.path / name).splitlines()
    except OSError as error:
        run.notes.append(f"{name} cannot be read ({type(error).__name__})")
        return []
    rows, bad = [], 0
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        else:
            bad += 1
    if bad:
        run.notes.append(f"{name}: {bad} line(s) torn or damaged, left out")
    if not rows:
        run.notes.append(f"{name} has no rows")
    return rows


def _pictures(run: Run, paths: Sequence[Path]) -> list[Path]:
    """Those that are whole: a killed process leaves half a picture."""
    complete = []
    for path in paths:
        content = _content(path) if path.is_file() else b""
        if content.startswith(PNG_START) and content.endswith(PNG_END):
            complete.append(path)
        else:
            run.notes.append(f"{path.relative_to(run.path)} is torn or no PNG, left out")
    return complete


def _read_snapshot(run: Run, path: Path) -> Snapshot | None:
    try:
        with np.load(io.BytesIO(_content(path)), allow_pickle=False) as file:
            s = Snapshot(re.sub(r"^\d+_", "", path.stem), int(file["step"]), int(file["stage"]), file["latents"],
                         file["codes"], file["code_rows"], file["counts"])
        whole = s.latents.ndim == s.codes.ndim == 2 and len(s.latents) and s.latents.shape[1] == s.codes.shape[1] > 0
        whole = whole and s.rows.shape == s.codes.shape[:1] and bool(np.isin(s.rows, range(s.counts.size)).all())
        whole = whole and s.rows.dtype.kind in "iu" and s.counts.ndim == 1 and s.counts.dtype.kind in "iuf"
        if not whole or not (np.isfinite(s.latents).all() and np.isfinite(s.codes).all()):
            raise ValueError("shapes or values")
    except Exception as error:  # what damaged archives make numpy throw, or return, is not documented
        run.notes.append(f"{path.relative_to(run.path)} is damaged ({type(error).__name__}), left out")
        return None
    return s


# ---------------------------------------------------------------------------------------------- settings and seeds

@dataclass
class Setting:
    """Runs that differ in their seed only, and in what cannot change the result."""

    config: dict[str, Any]
    runs: list[Run]
    name: str = ""    # on the page
    detail: str = ""  # the part of the name that tells settings of one method apart

    @property
    def step(self) -> int:
        return self.runs[0].step

    @property
    def seeds(self) -> list[Run]:
        """One run per seed: the same seed again is no independent sample."""
        return list({json.dumps(run.seed): run for run in reversed(self.runs)}.values())[::-1]


def group_settings(runs: Sequence[Run], ignored: Collection[str]) -> list[Setting]:
    """Runs of one configuration (but for the seed and the `ignored` keys) and one number of steps, in order."""
    found: dict[str, Setting] = {}
    for run in runs:
        config = {k: v for k, v in run.config.items() if k not in ignored and k != "global_seed"}
        key = json.dumps([config, run.step, str(run.path) if not run.config else ""], sort_keys=True)
        found.setdefault(key, Setting(config, [])).runs.append(run)
    for setting in found.values():
        for run in setting.runs:
            if run not in setting.seeds:
                run.notes.append(f"repeats seed {run.seed} of another run with these settings: not counted again")
    return list(found.values())


def differing(configs: Sequence[Mapping[str, Any]], ignored: Collection[str] = ()) -> list[str]:
    """Keys that do not have one value in all configurations, in order of appearance."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in ignored)
    return [key for key in keys if len({json.dumps(config.get(key), sort_keys=True) for config in configs}) > 1]


def flatten(values: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}"""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out |= flatten(value, f"{name}{key}.") if isinstance(value, dict) else {f"{name}{key}": value}
    return out


def missing_reason(report: Mapping[str, Any], key: str) -> str:
    said = report.get("unavailable")
    if isinstance(said, dict) and said.get(key):
        return str(said[key])
    if "protocol" in report:
        return "the report does not have it"
    if key == "lpips":
        return "trained without LPIPS (--perceptual-weight 0): run evaluations/reconstruction.py"
    if key == "rfid":
        return "no evaluation/reconstruction.json: run evaluations/reconstruction.py --vq-ckpt RUN"
    return "the trainer's last validation does not have it"
