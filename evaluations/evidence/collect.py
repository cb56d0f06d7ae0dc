"""Gathers what trained runs measured, and their table: from folders ROW-sSEED to one small JSON file.

    python evaluations/evidence/collect.py runs/table-4-small/*-s? --out table.json --metrics rmsd lddt usage

Of each run: its seed, the trainer's last validation, and under their names the reports in its evaluation/, such as
reconstruction.rfid. Settings that all runs share stand once, others with each row; of paths only whether there is one,
and only where runs differ in it. With --probes RESULTS_DIR also what probes on their tokens scored there, such as
probe.bfactor, in percent on the test split: pooled over residues, at the learning rate that validation chose, mean over
the probe's seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from evaluations.evidence import store, trained
from evaluations.evidence.probes import Probes
from evaluations.protocol import differences
from evaluations.report_runs import Run, differing, number, read_runs
from tokenizer.runtime.command import command, make_parser, require_out_file
from tokenizer.runtime.files import atomic_write_text
from tokenizer.runtime.parsing import from_json, parsing, read_text
from tokenizer.runtime.ranks import print0

PROG = "evaluations/evidence/collect.py"
DATA = {"data_fingerprint": "trained on", "val_fingerprint": "validated on"}  # of a summary's inputs
# Of one row's runs these may differ: cadence and machine, no part of the experiment.
NO_SETTING = frozenset({"log_every", "ckpt_every", "keep_checkpoints", "num_workers", "device", "wandb"})
PATH = "a path"  # for any: data may lie elsewhere, but a run with init_from is another than one without


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of finished runs, called ROW-sSEED")
    parser.add_argument("--out", type=Path, required=True, help="file to write, NAME.json")
    parser.add_argument("--probes", nargs="+", type=Path, default=[], metavar="DIR",
                        help="of these runs: --results-dir of protein/benchmark/train_task.py")
    trained.add_table_flags(parser)
    return parser.parse_args(argv)


def numbers(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite ones, what was measured to six digits."""
    return {prefix + name: float(f"{value:.6g}") if isinstance(value, float) else value
            for name, value in values.items() if number(value) is not None}


def reports(run: Run) -> dict[str, dict[str, Any]]:
    """By the names of their files. ValueError: one is damaged."""
    found = {}
    for path in sorted(run.path.glob("evaluation/*.json")):
        found[path.stem] = from_json(read_text(path), path)
        if not isinstance(found[path.stem], dict):
            raise ValueError(f"{path}: no report, which is a JSON object; remove it")
    return found


def require_same_state(run: Run, name: str, report: dict[str, Any], step: Any) -> None:
    """ValueError: a report of other weights than those that the summary is of. step: as the report has it, if it has.

    Reports of older versions and of samples name no step: they must be younger than the weights.
    """
    path = run.path / "evaluation" / f"{name}.json"
    if step is not None:
        why = f"of step {step}, its summary.json of step {run.summary.get('step')}"
        if step == run.summary.get("step"):
            return
    else:
        weights = run.path / "checkpoints" / f"{run.step:07d}.pt"  # a finished run's summary is written at each start
        newer = weights if weights.exists() else run.path / "summary.json"
        why = f"older than {newer.relative_to(run.path)}, and does not say of which step it is"
        if path.stat().st_mtime >= newer.stat().st_mtime:
            return
    programs = {"generation": "evaluations/generation.py REFERENCE NEW_SAMPLES",
                "reconstruction": f"evaluations/reconstruction.py --vq-ckpt {run.path}",
                "structures": f"protein/evaluate.py STRUCTURES --ckpt {run.path}"}
    protocol = report.get("protocol")
    program = programs.get(protocol.get("task", "") if isinstance(protocol, dict) else "structures")
    raise ValueError(f"{path} is {why}; evaluate it again{f': python {program} --out {path}' if program else ''}")


def measured(run: Run) -> dict[str, float]:
    """What the run's trainer and its reports say. ValueError: it is not finished, or a report is damaged, or of other
    weights.
    """
    if not run.summary:
        raise ValueError(f"{run.path} is no finished run: {'; '.join(run.notes)}")
    found = numbers(run.summary)
    for name, report in reports(run).items():
        tokenizers = report.get("tokenizers")  # of protein/evaluate.py
        values = report
        if isinstance(tokenizers, dict) and len(tokenizers) == 1:
            [values] = tokenizers.values()
        require_same_state(run, name, report, values.get("step"))
        found |= numbers({key: value for key, value in values.items() if key != "step"}, f"{name}.")
    return found


def require_one_protocol(runs: Sequence[Run]) -> None:
    """ValueError: reports of one name were measured in other ways. Runs of other seeds may hold other images out."""
    first: dict[str, tuple[Run, dict[str, Any]]] = {}
    for run in runs:
        for name, report in reports(run).items():
            protocol = report.get("protocol")
            if not isinstance(protocol, dict):
                continue
            for key in (name, f"{name} of seed {run.seed}"):
                other, there = first.setdefault(key, (run, protocol))
                apart = [what for what in differences(there, protocol) if key != name or what != "reference.sha256"]
                if apart:
                    raise ValueError(f"evaluation/{name}.json of {run.path} and of {other.path} differ in how it was "
                                     f"measured: {', '.join(apart)}; evaluate one of them again, as the other")


def require_same_data(runs: Sequence[Run]) -> None:
    """ValueError: two runs are known to have other data. Summaries of older versions do not say.

    Without a --data-path chains are generated from the seed, so that runs of other seeds have other ones.
    """
    first: dict[tuple[str, Any], tuple[Run, Any]] = {}
    for run in runs:
        inputs = run.summary.get("inputs")
        known = inputs if isinstance(inputs, dict) else {}
        for name, what in DATA.items():
            for key in ((name, run.seed), *([(name, "any")] if run.config.get("data_path") else [])):
                if name not in known:
                    continue
                other, there = first.setdefault(key, (run, known[name]))
                if known[name] != there:
                    raise ValueError(f"{run.path} and {other.path} were {what} different data ({name} {known[name]} "
                                     f"and {there}): gather them apart, or train one of them anew")


def row_of(run: Run, path: Path) -> str:
    """path: as the run was named. ValueError: it is not called ROW-sSEED with the seed of its settings."""
    if run.seed is None:
        raise ValueError(f"{run.path} has settings without a seed: {'; '.join(run.notes) or 'no global_seed'}")
    match = re.fullmatch(r"(.+)-s(\d+)", Path(os.path.abspath(path)).name)  # a link has its own name
    if not match or run.seed != int(match[2]):
        raise ValueError(f"{path} has the seed {run.seed}; call the folder ROW-s{run.seed}, a row for each setting")
    return match[1]


def gathered(runs: Sequence[Run], paths: Sequence[Path], probes: Probes | None = None) -> dict[str, Any]:
    """What is written. paths: as the runs were named."""
    require_same_data(runs)
    require_one_protocol(runs)
    settings = [{name: PATH if isinstance(value, str) and os.sep in value else value
                 for name, value in run.config.items() if name not in ("global_seed", "results_dir")} for run in runs]
    names = differing(settings, NO_SETTING)
    rows: dict[str, dict[str, Any]] = {}
    lines = []
    for run, path, mine in zip(runs, paths, settings, strict=True):
        row, own = row_of(run, path), {name: mine.get(name) for name in names}
        if rows.setdefault(row, own) != own:
            raise ValueError(f"runs of the row {row} differ in {', '.join(differing([rows[row], own]))}: name another")
        probed = numbers(probes.of(run.path, run.summary.get("step"))) if probes else {}
        lines.append({"run": row, "seed": run.seed, **measured(run), **probed})
    apart = differing(settings)
    shared = {name: value for name, value in settings[0].items() if name not in apart and value != PATH}
    # Runs do not record where they were made: this is what they were gathered with.
    head = {"date": max(run.written for run in runs), "collected_with": store.machine(), "settings": shared,
            "rows": rows}
    if probes:
        others = {source: numbers(values) for source, values in probes.others([run.path for run in runs]).items()}
        head["probes"] = {"settings": probes.settings, "others": others}
    return {**head, "runs": lines}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        require_out_file(args.out)
        if args.out.exists():
            with parsing(f"--out {args.out}", "is there and no file of this command; name another"):
                trained.read(args.out)
        found = gathered(read_runs(args.runs), args.runs, Probes(args.probes) if args.probes else None)
        table = trained.table(found["runs"], args)  # before anything is written
        head = {name: value for name, value in found.items() if name != "runs"}
        lines = ",\n".join("  " + json.dumps(line) for line in found["runs"])
        text = json.dumps(head, indent=1)[:-2] + f',\n "runs": [\n{lines}\n ]\n}}\n'  # a line per run
        atomic_write_text(args.out, text)
        print0(table, end="")


if __name__ == "__main__":
    main()
