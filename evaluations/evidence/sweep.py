"""Runs what is not yet in a results file, one process per core; what was interrupted is run again."""

from __future__ import annotations

import datetime
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import torch

from evaluations.evidence import store
from evaluations.evidence.bed import Diverged, Images, Trainer, pixels_sha256, prepare, require_trainable
from evaluations.evidence.setting import Setting
from evaluations.evidence.store import Result, Run
from evaluations.features import open_extractor
from tokenizer.runtime.distributed import print0
from tokenizer.runtime.pool import process_pool

Job = tuple[str, Run]  # an arm's name, and the run


def execute(run: Run, cache: Path, warmups: Path | None, features: str | None = None) -> dict[str, Any]:
    """One run, in this process on one thread: what `store.result_line` takes. A run that diverges is a result."""
    torch.set_num_threads(1)
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    images = Images(cache, run.setting.held_out)
    extractor = open_extractor(features) if features else None
    try:
        outcome = Trainer(run.arm, run.setting, run.seed, images, extractor).run(warmups)
    except Diverged as error:
        outcome = {"metrics": None, "diverged": str(error)}
    return outcome | {"date": date}


def sweep(
    jobs: Sequence[Job], path: Path, data: Path, *, workers: int, cache: Path | None = None,
    features: str | None = None,
) -> dict[Run, Result]:
    """Run each job that `path` lacks, in order, and append its line as soon as it is done; -> results of all jobs.

    data: the file of images; cache: folder for their decoded pixels, None: a temporary one of this machine; features:
    the extractor that the settings name, as `open_extractor` takes it. Killed at any moment, it loses the runs that
    were under way, nothing else.
    """
    folder = cache or Path(tempfile.gettempdir()) / "provq-evidence"
    with store.writing(path) as writer:
        there = store.read(path)
        done = {result.run for result in there}
        todo = {run: name for name, run in jobs if run not in done}
        for (arm, setting), name in {(run.arm, run.setting): name for run, name in todo.items()}.items():
            require_trainable(name, arm, setting)
        print0(f"{path}: {len({run for _, run in jobs}) - len(todo)} of {len({run for _, run in jobs})} runs are there")
        settings = {run.setting for run in todo}
        # Of another file of the same name, nothing that is there may be taken for a result.
        settings |= {run.setting for _, run in jobs if any("images" in result.line for result in there)}
        caches = {setting: prepare(data, setting, folder) for setting in settings}
        for setting, images in caches.items():
            _require_same(there, setting, pixels_sha256(images), path)
        if todo:
            _run_all(todo, caches, writer, workers, features)
    wanted = {run for _, run in jobs}
    return {result.run: result for result in store.read(path) if result.run in wanted}


def _require_same(there: Sequence[Result], setting: Setting, images: str, path: Path) -> None:
    """ValueError: a result is of other images that are called so."""
    for result in there:
        other = result.run.setting
        if (other.data, other.image_size) == (setting.data, setting.image_size) and result.line.get(
                "images", images) != images:
            raise ValueError(f"--out {path}: {result.where} is of other images called {setting.data} (sha256 "
                             f"{result.line['images']} there, {images} now): name another file, or restore the images")


def _run_all(
    todo: dict[Run, str], caches: dict[Any, Path], writer: store.Writer, workers: int, features: str | None
) -> None:
    machine, began = store.machine(), time.monotonic()
    images = {setting: {"images": pixels_sha256(cache)} for setting, cache in caches.items()}
    # Before the workers start: each has its core, and more threads than one would change the rounding.
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="provq-warmups-") as warmups, \
            process_pool(min(workers, len(todo))) as pool:
        futures = {pool.submit(execute, run, caches[run.setting], Path(warmups), features): run for run in todo}
        for count, future in enumerate(as_completed(futures), 1):
            run = futures[future]
            line = store.result_line(todo[run], run, future.result() | images[run.setting] | machine)
            writer.append(line)
            minutes = (time.monotonic() - began) / 60
            left = minutes / count * (len(todo) - count)
            shown = "{psnr:.2f} dB, {codes_used} codes, perplexity {perplexity:.0f}"
            scores = shown.format(**line["metrics"]) if line["metrics"] else line["diverged"]
            print0(f"{count}/{len(todo)} after {minutes:.1f} min, {left:.0f} min left: {todo[run]}, seed {run.seed}: "
                   f"{scores}")
