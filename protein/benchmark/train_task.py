"""Trains probes on the tokens of structure tokenizers and writes the paper's Table 3: how good are they downstream?

    python protein/benchmark/train_task.py --all --data struct_token_bench_release_data \\
        --results-dir runs/structtokenbench --tokenizer foldseek VQ=runs/vq ProVQ=runs/provq-s0 ProVQ=runs/provq-s1
    python protein/benchmark/train_task.py --task interface.jsonl --tokenizer foldseek --preset small \\
        --results-dir runs/interface

--task: names of StructTokenBench's tasks, or JSONL files (see tasks.py). From StructTokenBench's archive, --data, come
its processed lists (see released_tasks.py) or, where these are missing and with --splits strict, the raw files together
with --pdb-data (see task_archives.py). --tokenizer: see baselines.py; those of one LABEL are runs of one method. Every
tokenizer meets every task with every learning rate and seed. Structures, tokens and finished probes are kept in
--results-dir, so the same command again, or one with more tokenizers, tasks or seeds, does what is missing. JSONL
files, their structures and processed lists are read again if they have changed; after changes of the archive's raw
files use another --results-dir. Writes table3.md, .csv and .html there.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from protein.benchmark.choices import LEARNING_RATES, MODES
from protein.benchmark.tasks import MAX_LENGTH, STRUCTTOKENBENCH
from tokenizer.runtime import config
from tokenizer.runtime.command import command, refuse_early, require_out_folder
from tokenizer.runtime.config import REQUIRED, arg
from tokenizer.runtime.run_config import Effect, require_effects

PROG = "protein/benchmark/train_task.py"
PRESETS: dict[str, dict[str, Any]] = {
    "structtokenbench": {},                            # the defaults
    "small": {"max_steps": 600, "warmup_steps": 50},   # a few hundred chains on a CPU
}


@dataclass(frozen=True)
class TaskConfig:
    results_dir: str = arg(REQUIRED, "folder for everything that is written")
    tokenizer: tuple[str, ...] = arg(REQUIRED, "foldseek, foldseek-onehot, untrained, tokens:FOLDER, or a run, "
                                     "export or checkpoint; LABEL=... names it in tables")
    task: tuple[str, ...] = arg((), f"{', '.join(STRUCTTOKENBENCH)}, or JSONL files")
    all: bool = arg(False, "all tasks of StructTokenBench")
    preset: str = arg("structtokenbench", "which probe", choices=tuple(PRESETS))
    data: str | None = arg(None, "StructTokenBench's archive, unpacked: the folder struct_token_bench_release_data")
    pdb_data: str | None = arg(None, "PDB structures: the folder with mmcif_files and obsolete.dat; for raw files only")
    splits: str = arg("released", "strict: full CATH codes and whole chains, from the raw files", choices=MODES)
    num_workers: int = arg(0, "processes that read structures of the PDB")
    seeds: int = arg(3, "probes per learning rate, of seeds 0, 1, ...")
    learning_rates: tuple[float, ...] = arg(LEARNING_RATES, "to choose from on the validation split")
    max_steps: int = arg(10000, "updates per probe")
    warmup_steps: int = arg(200, "updates in which the learning rate rises from 0")
    batch_size: int | None = arg(None, "chains per update; none: 8, and 64 for classification")
    max_length: int = arg(MAX_LENGTH, "leave out chains with more residues")
    device: str = arg("auto", "of tokenizers and probes", choices=("auto", "cpu", "cuda"))

    def __post_init__(self) -> None:
        config.require_at_least(self, 1, "seeds max_steps batch_size max_length")
        config.require_at_least(self, 0, "warmup_steps num_workers")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"--learning-rates is {self.learning_rates}; they must be positive")
        if self.all == bool(self.task):
            raise ValueError("give --task NAME or FILE.jsonl ..., or --all")
        for name in self.task:
            if name not in STRUCTTOKENBENCH and not name.endswith(".jsonl"):
                raise ValueError(f"--task {name} is neither a file NAME.jsonl nor one of {', '.join(STRUCTTOKENBENCH)}")
        if self.data is None and self.of_the_archive():
            raise ValueError("tasks of StructTokenBench need --data, the folder struct_token_bench_release_data")

    def tasks(self) -> list[str]:
        return list(STRUCTTOKENBENCH) if self.all else list(dict.fromkeys(self.task))

    def of_the_archive(self) -> bool:
        """Whether a task is one of StructTokenBench's. JSONL files name their own splits and structures."""
        return any(name in STRUCTTOKENBENCH for name in self.tasks())

    def probe(self, kind: str) -> ProbeConfig:
        batch = self.batch_size or (64 if kind == "classification" else ProbeConfig.batch_size)
        return ProbeConfig(max_steps=self.max_steps, warmup_steps=self.warmup_steps, batch_size=batch)


EFFECTS = {name: Effect(TaskConfig.of_the_archive, "on JSONL files, which name their splits and structures")
           for name in ("data", "pdb_data", "splits", "num_workers")}  # see run_config.py


def parse_config(argv: list[str] | None = None) -> TaskConfig:
    return config.parse(TaskConfig, argv, presets=PRESETS, prog=PROG,
                        description=__doc__ or "", pick_preset=lambda given: given.get("preset", "structtokenbench"),
                        refuse=lambda cfg, given: require_effects(cfg, given, EFFECTS))


def check(cfg: TaskConfig) -> None:
    """ValueError: a folder that cannot be written."""
    require_out_folder(Path(cfg.results_dir), "--results-dir")


if __name__ == "__main__":
    refuse_early(PROG, parse_config, check)

import numpy as np
import torch

from protein.benchmark import released_tasks
from protein.benchmark.baselines import ChainTokenizer, Tokens, open_tokenizer
from protein.benchmark.probe import ProbeConfig, ProbeData, probe_data, train_probe
from protein.benchmark.task_archives import Archive, read_raw
from protein.benchmark.task_report import read_result, write_report
from protein.benchmark.tasks import Task, load_prepared, read_task, save_prepared, task_identity
from protein.structure_io import Chain
from tokenizer.runtime import distributed, lock
from tokenizer.runtime.files import atomic_write, atomic_write_json
from tokenizer.runtime.parsing import parsing

CHAINS_PER_FILE = 256  # of tokens: what is lost when a run is killed


# ------------------------------------------------------------------------------------------------- tasks and tokens

def open_task(cfg: TaskConfig, name: str, folder: Path) -> Task:
    """From folder/NAME.npz if it has been read before, and neither file nor structures have changed since.

    Of StructTokenBench's archive the processed lists are looked at, by size and time, but no other files.
    """
    read: Callable[[], Task]
    if name in STRUCTTOKENBENCH:
        archive = Archive.open(cfg.data or "", cfg.pdb_data)
        lists = released_tasks.list_files(archive, name)
        processed = cfg.splits == "released" and all(path.exists() for path in lists.values())
        states = [(path.stat().st_size, path.stat().st_mtime_ns) for path in lists.values()] if processed else []
        source = json.dumps([name, cfg.splits, processed, str(archive.data.resolve()), states])
        if processed:
            read = partial(released_tasks.read_released, archive, name)
        else:
            read = partial(read_raw, archive, name, cfg.splits, cfg.num_workers)
    else:
        source = task_identity(name)
        read = partial(read_task, name)
    prepared = folder / f"{_slug(Path(name).stem)}.npz"
    task = load_prepared(prepared, source)
    if task is None:
        task = read()
        folder.mkdir(parents=True, exist_ok=True)
        save_prepared(task, prepared, source)
    return task.filtered(cfg.max_length)


def open_tasks(cfg: TaskConfig, folder: Path) -> dict[str, str]:
    """Reads every task into folder -> its name in the tables: the one in --task. ValueError: two of one name."""
    names: dict[str, str] = {}
    for source in cfg.tasks():
        name = open_task(cfg, source, folder).spec.name
        for other, taken in names.items():
            if _slug(name) == _slug(taken):  # one folder of results
                raise ValueError(f"--task {other} and {source} are both called {name!r}; change the first line of one")
        names[source] = name
    return names


def chains_identity(task: Task) -> str:
    """Of all that tokens may depend on: the chains of each split, since training's fit some tokenizers."""
    digest = hashlib.sha256()
    for split, examples in task.splits.items():
        for chain in (example.chain for example in examples):
            digest.update(json.dumps([split, chain.label, len(chain), chain.sequence, chain.insertion_codes]).encode())
            digest.update(chain.residue_numbers.tobytes() + chain.coords.tobytes())
    return digest.hexdigest()


def tokenize(tokenizer: ChainTokenizer, chains: Sequence[Chain], folder: Path, source: str) -> list[Tokens]:
    """Tokens of every chain, from folder where they are there. source: says which chains they are.

    ValueError naming the file: damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    identity = json.dumps([tokenizer.identity(), source])
    out: list[Tokens] = []
    for first in range(0, len(chains), CHAINS_PER_FILE):
        part = chains[first : first + CHAINS_PER_FILE]
        path = folder / f"{first:06d}.npz"
        tokens = _load_tokens(path, identity, part)
        if tokens is None:
            tokens = tokenizer.encode(part)
            atomic_write(path, partial(np.savez_compressed, identity=identity, tokens=np.concatenate(tokens)))
        out += tokens
    return out


def _load_tokens(path: Path, identity: str, chains: Sequence[Chain]) -> list[Tokens] | None:
    if not path.exists():
        return None
    ends = np.cumsum([len(chain) for chain in chains])
    with parsing(path, "damaged, delete it to make it anew"), np.load(path) as file:
        if str(file["identity"]) != identity:
            return None
        tokens = file["tokens"]
        if tokens.shape != (ends[-1],) or tokens.dtype.kind != "i":
            raise ValueError(f"{tokens.dtype} {tokens.shape} as tokens of {ends[-1]} residues")
    return np.split(tokens, ends[:-1])


def probe_inputs(task: Task, tokenizer: ChainTokenizer, folder: Path) -> dict[str, ProbeData]:
    """Split -> arrays."""
    chains = list({id(e.chain): e.chain for examples in task.splits.values() for e in examples}.values())
    tokenizer.fit(list({id(e.chain): e.chain for e in task.splits["train"]}.values()))
    found = tokenize(tokenizer, chains, folder, chains_identity(task))
    tokens = {id(chain): row for chain, row in zip(chains, found, strict=True)}
    return {split: probe_data(examples, [tokens[id(e.chain)] for e in examples], task.spec.kind)
            for split, examples in task.splits.items()}


def fingerprint(data: Mapping[str, ProbeData], codebook: torch.Tensor) -> str:
    """Of all that a probe sees."""
    digest = hashlib.sha256(codebook.numpy().tobytes())
    for split, part in data.items():
        digest.update(split.encode())
        for tensor in (part.tokens, part.starts, part.labels):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------- probes

def sweep(cfg: TaskConfig, task: Task, tokenizer: ChainTokenizer, device: torch.device) -> None:
    """All learning rates and seeds of one tokenizer on one task; a file each."""
    root, kind = Path(cfg.results_dir), task.spec.kind
    run = f"{_slug(tokenizer.label)}-{hashlib.sha256(tokenizer.identity().encode()).hexdigest()[:8]}"
    _check_source(root / "results", run, tokenizer)
    data = probe_inputs(task, tokenizer, root / "tokens" / run / _slug(task.spec.name))
    codebook = tokenizer.codebook()
    settings = {**asdict(cfg.probe(kind)), "inputs": fingerprint(data, codebook)}
    common = {
        "label": tokenizer.label, "tokenizer": run, "source": tokenizer.source, "step": tokenizer.step,
        "codebook": list(codebook.shape),
        "task": task.spec.name, "kind": kind,
        "category": task.spec.category, "tests": list(task.spec.tests), "left_out": dict(task.left_out),
        "origin": task.origin,
        "counts": {split: {"chains": len(part), "labels": part.count} for split, part in data.items()},
        "settings": settings,
    }
    folder = root / "results" / run / _slug(task.spec.name)
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob("*.json")):  # also of other rates and seeds: the tables take all of them together
        _check_same(path, settings)
    for seed, rate in ((seed, rate) for seed in range(cfg.seeds) for rate in cfg.learning_rates):
        path = folder / f"seed{seed}-lr{rate:g}.json"
        if path.exists():
            continue
        began = time.monotonic()
        found = train_probe(data, codebook, len(task.classes), cfg.probe(kind), rate, seed, device)
        protocols = {name: {"step": best["step"], "score": _number(best["score"]), "valid": _number(best["valid"]),
                            "tests": {split: _number(value) for split, value in best["tests"].items()}}
                     for name, best in found.items()}
        result = {**common, "seed": seed, "learning_rate": rate, "protocols": protocols,
                  "seconds": round(time.monotonic() - began, 2)}
        atomic_write_json(path, result)
        shown = ", ".join(f"{name} {best['valid']:.4f}" for name, best in found.items())
        distributed.print0(f"{task.spec.name} | {tokenizer.label} | seed {seed} | lr {rate:g} | validation: {shown}")


def _check_source(folder: Path, run: str, tokenizer: ChainTokenizer) -> None:
    """ValueError: folder has results of another state of this tokenizer, which would count as a run of its own."""
    for other in folder.glob("*"):
        path = next(other.glob("*/*.json"), None)
        if other.name != run and path is not None:
            found = read_result(path)
            if (found["label"], found["source"]) == (tokenizer.label, tokenizer.source):
                raise ValueError(f"{other} is of an earlier state of {tokenizer.source}: remove it, give the new one "
                                 "another LABEL, or use another --results-dir")


def _check_same(path: Path, settings: Mapping[str, Any]) -> None:
    changed = config.diff(read_result(path)["settings"], settings)
    if changed:
        what = "; ".join(f"{name}: {old!r} there, {new!r} now" for name, old, new in changed)
        raise ValueError(f"{path} was made with other settings ({what}); use those, or another --results-dir")


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _slug(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-")


def main(argv: list[str] | None = None) -> None:
    cfg = parse_config(argv)
    with command(PROG, one_process=True):
        device = distributed.init(cfg.device)
        check(cfg)
        root = Path(cfg.results_dir)
        lock.own(root, "--results-dir")
        tokenizers = [open_tokenizer(name, device) for name in cfg.tokenizer]
        labels = [tokenizer.label for tokenizer in tokenizers]
        names = open_tasks(cfg, root / "structures")  # all, so that a mistake in the last one does not cost a sweep
        for name in names:
            task = open_task(cfg, name, root / "structures")  # once more: all of the benchmark may not fit in memory
            for tokenizer in tokenizers:
                sweep(cfg, task, tokenizer, device)
                write_report(root, labels, list(names.values()))
        distributed.print0(f"wrote {root / 'table3.md'}, .csv and .html")


if __name__ == "__main__":
    main()
