"""The paper's Table 3 from the results of probes: Markdown, CSV and one HTML page."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from protein.benchmark.choices import PROTOCOLS
from protein.benchmark.tasks import METRICS, STRUCTTOKENBENCH
from tokenizer.runtime import page
from tokenizer.runtime.config import parse_object
from tokenizer.runtime.files import atomic_write_text
from tokenizer.runtime.over_seeds import Merged, clear_best
from tokenizer.runtime.page import Cell, Table
from tokenizer.runtime.parsing import brief, parsing, read_text

Values = dict[str, dict[int, float]]  # run of a tokenizer -> seed of the probe -> number
Row = tuple[str, str, str, str, Callable[[str], Values]]  # category, task, split, metric, tokenizer's label -> values
NAME = "table3"
_FIELDS: dict[str, type | tuple[type, ...]] = {  # of a result
    "label": str, "tokenizer": str, "source": str, "codebook": list, "task": str, "kind": str, "category": str,
    "tests": list, "left_out": dict, "origin": str, "counts": dict, "settings": dict, "seed": int,
    "learning_rate": (int, float), "protocols": dict,
}


def read_result(path: Path) -> dict[str, Any]:
    """One probe, as train_task.py has written it. ValueError naming the file: damaged."""
    with parsing(path, "damaged, delete it, and the same command makes it anew"):
        found = parse_object(read_text(path), "the result")
        wrong = [name for name, kind in _FIELDS.items() if not isinstance(found.get(name), kind)]
        if wrong:
            raise ValueError(f"{wrong[0]}: {brief(found.get(wrong[0]))}")
        METRICS[found["kind"]]
        if not (len(found["codebook"]) == 2 and all(type(size) is int for size in found["codebook"])):
            raise ValueError(f"codebook: {brief(found['codebook'])}")
        if not all(type(part[name]) is int for part in found["counts"].values() for name in ("chains", "labels")):
            raise ValueError(f"counts: {brief(found['counts'])}")
        for protocol in PROTOCOLS:
            part = found["protocols"][protocol]
            for value in (part["score"], *(part["tests"][split] for split in found["tests"])):
                if not (value is None or isinstance(value, (int, float))):
                    raise ValueError(f"{protocol}: {brief(value)} is no number")
    return found


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All probes below folder, in the order of their names. ValueError naming a damaged file."""
    return [read_result(path) for path in sorted(folder.glob("*/*/*.json"))]


def choose(results: Sequence[Mapping[str, Any]], protocol: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(label of a tokenizer, task) -> run -> seed -> the probe of the learning rate with the best validation score.

    The smaller rate of equals; probes with an undefined score lose.
    """
    best: dict[tuple[str, str], dict[str, Any]] = {}
    for result in sorted(results, key=lambda r: r["learning_rate"]):
        runs = best.setdefault((result["label"], result["task"]), {})
        seeds = runs.setdefault(result["tokenizer"], {})
        kept = seeds.get(result["seed"])
        if kept is None or _score(result, protocol) > _score(kept, protocol):
            seeds[result["seed"]] = result
    return best


def _score(result: Mapping[str, Any], protocol: str) -> float:
    score = result["protocols"][protocol]["score"]
    return -math.inf if score is None else score


def summarise(values: Values) -> Merged | None:
    """Mean and sample standard deviation: over the runs' means if there are several runs, else over the probe's seeds.

    None: a number is undefined, or there are none.
    """
    numbers = [list(seeds.values()) for seeds in values.values()]
    if not numbers or any(x is None or math.isnan(x) for row in numbers for x in row):
        return None
    units = [fmean(row) for row in numbers] if len(numbers) > 1 else numbers[0]
    return Merged(fmean(units), stdev(units) if len(units) > 1 else None, len(units))


class Results:
    """Everything the tables are made of. labels: order of the columns, others follow."""

    def __init__(self, results: Sequence[dict[str, Any]], labels: Sequence[str] = (), tasks: Sequence[str] = ()):
        self.results = list(results)
        found = list(dict.fromkeys(result["label"] for result in results))
        self.labels = [label for label in dict.fromkeys([*labels, *found]) if label in found]
        names = list(dict.fromkeys(result["task"] for result in results))
        ordered = [task for task in dict.fromkeys([*tasks, *names]) if task in names]
        self.tasks = {name: next(r for r in results if r["task"] == name) for name in ordered}
        self.chosen = {protocol: choose(results, protocol) for protocol in PROTOCOLS}

    @property
    def categories(self) -> dict[tuple[str, str], list[str]]:
        """(category, metric) -> tasks."""
        out: dict[tuple[str, str], list[str]] = {}
        for name, task in self.tasks.items():
            out.setdefault((task["category"], METRICS[task["kind"]]), []).append(name)
        return out

    def values(self, protocol: str, label: str, task: str, split: str) -> Values:
        runs = self.chosen[protocol].get((label, task), {})
        return {run: {seed: result["protocols"][protocol]["tests"][split] for seed, result in seeds.items()}
                for run, seeds in runs.items()}

    def average(self, protocol: str, label: str, tasks: Sequence[str]) -> Values:
        """Mean over the splits of the tasks, for runs and seeds that have all of them."""
        columns = [self.values(protocol, label, task, split) for task in tasks for split in self.tasks[task]["tests"]]
        out: Values = {}
        for run in columns[0]:
            seeds = [seed for seed in columns[0][run] if all(seed in column.get(run, {}) for column in columns)]
            rows = {seed: [column[run][seed] for column in columns] for seed in seeds}
            rows = {seed: row for seed, row in rows.items() if None not in row}
            if rows:
                out[run] = {seed: fmean(row) for seed, row in rows.items()}
        return out

    def rows(self, protocol: str) -> list[Row]:
        """Every line of the table; that of an average has the task "Average"."""
        out: list[Row] = []
        for (category, metric), tasks in self.categories.items():
            splits = [(task, split) for task in tasks for split in self.tasks[task]["tests"]]
            for task, split in splits:
                out.append((category, task, split, metric, partial(self.values, protocol, task=task, split=split)))
            if len(splits) > 1:
                out.append((category, "Average", "", metric, partial(self.average, protocol, tasks=tasks)))
        return out


def table(results: Results, protocol: str) -> Table:
    name = "Table 3" if set(STRUCTTOKENBENCH) & set(results.tasks) else "Results"
    out = Table(f"{name}, {protocol}.", f"{PROTOCOLS[protocol][0].upper()}{PROTOCOLS[protocol][1:]}. Percent; mean ± "
                "standard deviation over the runs of a tokenizer, or over the probe's seeds if there is one run.",
                ["Task", "Split", *results.labels], left=2)
    heading = ("", "")
    for category, task, split, metric, numbers in results.rows(protocol):
        if heading != (category, metric):
            heading = (category, metric)
            out.rows.append([Cell(f"{category} ({metric})"), *[Cell("")] * (1 + len(results.labels))])
        merged = [summarise(numbers(label)) for label in results.labels]
        best = clear_best(merged, higher_is_better=True)
        cells = []
        for i, value in enumerate(merged):
            if value is None:
                cells.append(Cell("—", missing=True))
                continue
            spread = "" if value.deviation is None else f" ± {100 * value.deviation:.2f}"
            cells.append(Cell(f"{100 * value.mean:.2f}{spread}", bold=i == best))
        out.rows.append([Cell(task), Cell(split), *cells])
    out.notes.append("Bold: better than every other column by more than both standard deviations together.")
    return out


def csv_text(results: Results) -> str:
    """A line per protocol, task, split and tokenizer. Fractions, not percent."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["protocol", "category", "task", "split", "metric", "tokenizer", "mean", "deviation", "runs",
                     "seeds"])
    for protocol in PROTOCOLS:
        for category, task, split, metric, numbers in results.rows(protocol):
            for label in results.labels:
                values = numbers(label)
                merged = summarise(values)
                if merged is not None:
                    seeds = max(map(len, values.values()))
                    writer.writerow([protocol, category, task, split, metric, label, repr(merged.mean),
                                     "" if merged.deviation is None else repr(merged.deviation), len(values), seeds])
    return file.getvalue()


def tokenizer_table(results: Results) -> Table:
    """What was compared."""
    out = Table("Tokenizers.", "K codes of D numbers. Runs of one tokenizer share a row in the results.",
                ["Tokenizer", "Run", "K", "D"], left=2)
    runs = {(r["label"], r["source"]): r["codebook"] for r in results.results}
    for label in results.labels:
        for (name, source), (codes, dim) in runs.items():
            if name == label:
                out.rows.append([Cell(label), Cell(source), Cell(str(codes)), Cell(str(dim))])
    return out


def data_table(results: Results) -> Table:
    """What the numbers are over."""
    out = Table("Data.", "Chains, and labels that are scored, of each split.",
                ["Task", "Kind", "Split", "Chains", "Labels"], left=3)
    for name, task in results.tasks.items():
        for split, counts in task["counts"].items():
            out.rows.append([Cell(name), Cell(task["kind"]), Cell(split), *(Cell(f"{counts[key]:,}")
                             for key in ("chains", "labels"))])
        left_out = ", ".join(f"{reason}: {count}" for reason, count in task["left_out"].items())
        out.notes.append(f"{name}: from {task['origin']}. Left out: {left_out or 'nothing'}.")
    return out


def rates_table(results: Results) -> Table:
    """The learning rates that validation chose."""
    out = Table("Learning rates", "chosen on the validation split, one per seed.",
                ["Task", "Tokenizer", *PROTOCOLS], left=4)
    for task in results.tasks:
        for label in results.labels:
            cells = []
            for protocol in PROTOCOLS:
                runs = results.chosen[protocol].get((label, task), {})
                cells.append(Cell(", ".join(f"{result['learning_rate']:g}" for seeds in runs.values()
                                            for _, result in sorted(seeds.items())) or "—"))
            out.rows.append([Cell(task), Cell(label), *cells])
    return out


def probe_settings(results: Results) -> dict[str, str]:
    """Setting -> value, or the value for each kind of task where they differ."""
    kinds = {task["kind"]: task["settings"] for task in results.tasks.values()}
    out = {}
    for name in dict.fromkeys(key for settings in kinds.values() for key in settings if key != "inputs"):
        values = {kind: str(settings[name]) for kind, settings in kinds.items()}
        alike = len(set(values.values())) == 1
        out[name] = next(iter(values.values())) if alike else ", ".join(f"{v} ({k})" for k, v in values.items())
    return out


def write_report(folder: Path, labels: Sequence[str], tasks: Sequence[str]) -> None:
    """folder/table3.md, .csv and .html of all results below folder/results. labels, tasks: first in the tables."""
    results = Results(read_results(folder / "results"), labels, tasks)
    settings = probe_settings(results)
    tables = {"Results": [table(results, protocol) for protocol in PROTOCOLS],
              "Tokenizers": [tokenizer_table(results)], "Learning rates": [rates_table(results)],
              "Data": [data_table(results)]}
    own = not set(STRUCTTOKENBENCH) & set(results.tasks)
    title = f"Structure tokenizers on {'downstream' if own else 'the'} tasks{'' if own else ' of StructTokenBench'}"
    markdown = [f"# {title}\n"]
    for heading, parts in tables.items():
        markdown += [f"## {heading}\n", *map(page.markdown_table, parts)]
    markdown += ["## Probe\n", "".join(f"- {page.markdown(k)}: {page.markdown(v)}\n" for k, v in settings.items())]
    atomic_write_text(folder / f"{NAME}.md", "\n".join(markdown))
    atomic_write_text(folder / f"{NAME}.csv", csv_text(results))
    sections = {heading: "".join(map(page.html_table, parts)) for heading, parts in tables.items()}
    subtitle = f"{len(results.labels)} tokenizers, {len(results.tasks)} tasks"
    sections["Probe"] = page.definitions(settings)
    atomic_write_text(folder / f"{NAME}.html", page.page(title, subtitle, sections))
