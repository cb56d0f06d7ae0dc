"""Probes on the tokens of trained runs, which protein/benchmark/train_task.py has left, run by run."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from protein.benchmark.task_report import choose, read_results

PROTOCOL = "pooled"  # over all residues of a split


def named(result: Mapping[str, Any], split: str) -> str:
    """probe.TASK, and .SPLIT where a task has several test splits."""
    task = re.sub(r"\W", "", result["task"]).lower()
    return f"probe.{task}" if len(result["tests"]) == 1 else f"probe.{task}.{split}"


def protocol(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the probes of one tokenizer on one task were trained on and how, but for its tokens."""
    settings = {name: value for name, value in results[0]["settings"].items() if name != "inputs"}
    return {"seeds": sorted({result["seed"] for result in results}),
            "learning_rates": sorted({result["learning_rate"] for result in results}),
            "counts": results[0]["counts"], **settings}


class Probes:
    """The probes in some --results-dir of train_task.py. FileNotFoundError; ValueError: a folder with none, a damaged
    file, or tokenizers whose probes were trained in other ways, which are not to be compared."""

    def __init__(self, folders: Sequence[Path]):
        self.settings: dict[str, dict[str, Any]] = {}  # task -> what was the same for all tokenizers
        self._values: dict[str, dict[str, float]] = {}  # source -> name -> percent
        self._steps: dict[str, dict[int, str]] = {}  # source -> step of the run that was probed -> folder of probes
        for folder in folders:
            results = read_results(folder / "results")
            if not results:
                raise FileNotFoundError(f"--probes {folder}: no results of train_task.py in it")
            self._add(folder, results)

    def _add(self, folder: Path, results: Sequence[dict[str, Any]]) -> None:
        trained: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for result in results:
            trained.setdefault((result["tokenizer"], result["task"]), []).append(result)
        earlier = set(self.settings)
        seen: dict[tuple[str, str], str] = {}  # run and task -> whose results they are
        chosen = {(run, task): seeds for (_, task), runs in choose(results, PROTOCOL).items()
                  for run, seeds in runs.items()}
        for (run, task), every in trained.items():
            if task in earlier:
                raise ValueError(f"--probes {folder}: another folder has the task {task} too; give one of them")
            source, tests = every[0]["source"], every[0]["tests"]
            if (twin := seen.setdefault((os.path.realpath(source), task), run)) != run:
                raise ValueError(f"--probes {folder}: {task} of {source} is there twice, of two states of it or by two "
                                 f"names; remove results/{twin} or results/{run}")
            mine = protocol(every)
            other = self.settings.setdefault(task, mine)
            wrong = [name for name in mine | other if mine.get(name) != other.get(name)]
            if len(every) != len(mine["seeds"]) * len(mine["learning_rates"]):
                wrong = ["learning rates for each of its seeds"]
            if wrong:
                raise ValueError(f"--probes {folder}: {task} of {source} was trained with other {', '.join(wrong)} "
                                 "than of the tokenizers before it; repeat train_task.py with all of them")
            for result in every:
                if result.get("step") is not None:  # older ones do not have it
                    self._steps.setdefault(source, {})[result["step"]] = f"{folder / 'results' / run}"
            for split in tests:
                scores = [result["protocols"][PROTOCOL]["tests"][split] for result in chosen[run, task].values()]
                if None not in scores:
                    self._values.setdefault(source, {})[named(every[0], split)] = 100 * fmean(scores)

    def of(self, run: Path, step: Any) -> dict[str, float]:
        """Task -> percent, mean over the probe's seeds, of the learning rate that validation chose for each.

        step: that the run is at. ValueError: this run was not probed, or its probes are known to be of another step.
        """
        mine = [source for source in self._values if os.path.realpath(source) == os.path.realpath(run)]
        for source in mine:
            for probed, folder in self._steps.get(source, {}).items():
                if probed != step:
                    raise ValueError(f"--probes: {folder} is of step {probed} of {run}, its summary.json of step "
                                     f"{step}; remove it, and repeat train_task.py")
        found = [self._values[source] for source in mine]
        if not found:
            raise ValueError(f"--probes: none of {run}; there are those of {', '.join(sorted(self._values))}")
        return found[0]

    def others(self, runs: Sequence[Path]) -> dict[str, dict[str, float]]:
        """Of the sources that are none of these runs and no path, such as foldseek."""
        return {source: values for source, values in self._values.items() if os.sep not in source
                and os.path.realpath(source) not in map(os.path.realpath, runs)}
