"""Checks a machine with GPUs before the real runs, each check in processes of its own, and prints one table.

    bash scripts/gpu_check.sh

search     codes found on the GPU are the CPU's, under TF32; k-means of 16,384 codes
eager      60 steps of VQ-16 through all stages, none of which may wait for the device
compiled   the same through torch.compile, as the ImageNet presets do
profile    what five steps of the last stage spend their time on
resume     one process per GPU, SIGTERM after some steps, and the same command again
extract    codes of the images
gpt        GPT-B on these codes, replicated
sharded    GPT-XL in bf16, sharded, and resumed; needs two GPUs
sample     pictures, eager and as CUDA graphs
tests      pytest -m gpu

Images are noise: what is measured does not depend on them. A rate below half of what is expected is a failure, and so
is an error. Without a GPU the checks run in small on the CPU, which tests this script and no machine: exit status 1.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tokenizer.runtime.command import command, make_parser, refuse_early

PROG = "scripts/gpu_check.py"
NAMES = ("search", "eager", "compiled", "profile", "resume", "extract", "gpt", "sharded", "sample", "tests")
NEEDS = {"extract": ("eager",), "gpt": ("eager", "extract"), "sharded": ("eager", "extract"),
         "sample": ("eager", "extract", "gpt")}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--only", help="comma-separated checks, and what they need (default: all)")
    args = parser.parse_args(argv)
    wanted = NAMES if args.only is None else args.only.split(",")
    unknown = [name for name in wanted if name not in NAMES]
    if unknown:
        parser.error(f"--only {args.only}: {', '.join(unknown)} is none of {', '.join(NAMES)}")
    needed = {before for name in wanted for before in NEEDS.get(name, ())}
    args.checks = [name for name in NAMES if name in {*wanted, *needed}]
    return args


if __name__ == "__main__":
    refuse_early(PROG, parse_args)

import numpy as np
import torch
from PIL import Image

from tokenizer.runtime.throughput import peak_flops

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "tests" / "workers" / "gpu_steps.py"
LIMIT = 900  # seconds of a check
# On an H100, estimated from FLOP and memory traffic; other GPUs are expected to do as much less as their peak is lower.
EXPECTED: dict[str, dict[str, float]] = {
    "search": {"kmeans_seconds": 5},
    "eager": {"images/s": 100, "GiB": 45}, "compiled": {"images/s": 220, "MFU": 0.3, "GiB": 35},
    "gpt": {"tokens/s": 150_000, "MFU": 0.3}, "sharded": {"MFU": 0.25},
}
H100 = 989e12
NO_GPU = ("no GPU: torch {torch} sees no CUDA device (nvidia-smi lists what the driver sees). The checks run in small "
          "on the CPU, which tests this script and says nothing about a GPU")


class Failed(RuntimeError):
    """A check that found something; the message says what."""


class Machine:
    """What is there, and sizes of the checks that suit it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        self.name = torch.cuda.get_device_name(0) if self.gpus else "CPU"
        self.images = folder / "images"
        size, count = (256, 512) if self.gpus else (32, 64)
        generator = np.random.default_rng(0)
        for i in range(count):
            where = self.images / str(i % 4)
            where.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(where / f"{i}.jpg")

    def image_words(self, run: str, *more: str) -> list[str]:
        """A run through all stages in 60 steps, a batch of 16 per GPU."""
        words = ["--data-path", str(self.images), "--results-dir", str(self.folder / run), "--val-size", "16",
                 "--perceptual-weight", "0", "--disc-start", "10", "--ckpt-every", "1000", "--val-every", "1000"]
        if self.gpus:
            words += ["--preset", "imagenet256", "--max-steps", "60", "--warmup-steps", "20", "--transition-steps",
                      "20", "--log-every", "5", "--global-batch-size", "16", "--num-workers", "8"]
        else:
            words += ["--preset", "cifar10", "--max-steps", "30", "--warmup-steps", "8", "--transition-steps", "8",
                      "--log-every", "10", "--global-batch-size", "4", "--num-workers", "0", "--codebook-size", "16",
                      "--kmeans-batches", "2", "--disc-weight", "0.5", "--device", "cpu"]
        return [*words, *more]

    def gpt_words(self, run: str, model: str, batch: int, *more: str) -> list[str]:
        words = ["--preset", "c2i", "--code-path", str(self.folder / "codes"), "--results-dir", str(self.folder / run),
                 "--gpt-model", model, "--max-steps", "40", "--val-size", "8", "--log-every", "5",
                 "--val-every", "1000", "--ckpt-every", "1000", "--global-batch-size", str(batch)]
        if not self.gpus:
            words += ["--no-compile", "--max-steps", "8", "--device", "cpu"]
        return [*words, *more]


def run(words: Sequence[Any], until: Callable[[], bool] | None = None) -> str:
    """Run a program to its end, or `until` something is true and then to the end that SIGTERM makes -> its output.

    Failed: no end, or another exit status than 0.
    """
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen([sys.executable, *map(str, words)], stdout=log, stderr=subprocess.STDOUT, text=True,
                                   start_new_session=True)
        deadline, stopped = time.monotonic() + LIMIT, False
        while process.poll() is None:
            if until is not None and not stopped and until():
                process.send_signal(signal.SIGTERM)
                stopped = True
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)  # with what torchrun has started
                process.wait()
                raise Failed(f"no end after {LIMIT} seconds")
            time.sleep(0.2)
        log.seek(0)
        text = log.read()
    if process.returncode and not stopped:  # torchrun reports a signal, which its processes have not minded
        lines = [line for line in text.splitlines() if "Error" in line or "error:" in line] or text.splitlines()[-1:]
        raise Failed(f"status {process.returncode}: {lines[0].strip() if lines else 'no output'}\n{text[-4000:]}")
    return text


def torchrun(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={max(1, processes)}"]


def rates(run: Path) -> dict[str, float]:
    """Of the second half of a run's log rows: the medians."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = rows[len(rows) // 2 :]
    names = {"samples_per_second": "images/s", "tokens_per_second": "tokens/s", "mfu": "MFU", "peak_memory_gib": "GiB"}
    return {shown: float(np.median([row[name] for row in rows])) for name, shown in names.items() if name in rows[0]}


# --------------------------------------------------------------------------------------------------------- the checks

def worker(machine: Machine, mode: str, *words: str) -> dict[str, Any]:
    out = machine.folder / f"{mode}.json"
    run([WORKER, mode, out, *words])
    return dict(json.loads(out.read_text()))


def check_search(machine: Machine) -> dict[str, Any]:
    found = worker(machine, "search")
    if found["wrong_codes"]:
        raise Failed(f"{found['wrong_codes']} of 4096 codes are not the nearest")
    return found


def check_eager(machine: Machine) -> dict[str, Any]:
    return worker(machine, "images", *machine.image_words("eager", "--no-compile")) | rates(machine.folder / "eager")


def check_compiled(machine: Machine) -> dict[str, Any]:
    words = machine.image_words("compiled", "--compile" if machine.gpus else "--no-compile")
    return worker(machine, "images", *words) | rates(machine.folder / "compiled")


def check_profile(machine: Machine) -> dict[str, Any]:
    words = machine.image_words("profile", "--compile" if machine.gpus else "--no-compile")
    return dict(worker(machine, "profile", *words)["shares"])


def check_resume(machine: Machine) -> dict[str, Any]:
    processes = max(1, machine.gpus)
    words = machine.image_words("resume", "--no-compile", "--global-batch-size", str(4 * processes))
    command, folder = [*torchrun(processes), ROOT / "tokenizer" / "train_provq.py", *words], machine.folder / "resume"
    run(command, until=lambda: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size > 0)
    if not list((folder / "checkpoints").glob("0*.pt")) or (folder / "summary.json").exists():
        raise Failed("SIGTERM left no checkpoint, or came too late")
    if "resuming" not in run(command) or not (folder / "summary.json").exists():
        raise Failed("the same command did not resume and finish the run")
    return {"processes": processes} | rates(folder)


def check_extract(machine: Machine) -> dict[str, Any]:
    words = ["--vq-ckpt", machine.folder / "eager", "--code-path", machine.folder / "codes"]
    run([*torchrun(machine.gpus), ROOT / "autoregressive" / "extract_codes.py", *words,
         *([] if machine.gpus else ["--device", "cpu"])])
    return {}


def check_gpt(machine: Machine) -> dict[str, Any]:
    name, batch = ("GPT-B", 32) if machine.gpus else ("GPT-tiny", 4)
    words = machine.gpt_words("gpt", name, batch, "--vq-ckpt", str(machine.folder / "eager"), "--sample-every", "0")
    found = worker(machine, "gpt", *words) | rates(machine.folder / "gpt")
    if machine.gpus > 1:
        words = machine.gpt_words("gpt-ddp", name, batch * machine.gpus)
        run([*torchrun(machine.gpus), ROOT / "autoregressive" / "train_c2i.py", *words])
        found["tokens/s on all GPUs"] = rates(machine.folder / "gpt-ddp")["tokens/s"]
    return found


def check_sharded(machine: Machine) -> dict[str, Any]:
    if machine.gpus == 1:
        return {"skipped": "needs two GPUs"}
    name, batch = ("GPT-XL", 16 * machine.gpus) if machine.gpus else ("GPT-tiny", 4)
    words = machine.gpt_words("sharded", name, batch, "--data-parallel", "fsdp")
    command = [*torchrun(machine.gpus or 2), ROOT / "autoregressive" / "train_c2i.py"]
    run([*command, *words])
    if "resuming" not in run([*command, *words, "--max-steps", "45"]):  # from a checkpoint that rank 0 reads
        raise Failed("the same command did not resume the run")
    return rates(machine.folder / "sharded")


def check_sample(machine: Machine) -> dict[str, Any]:
    found: dict[str, Any] = {}
    count = 64 if machine.gpus else 4
    for how in ("--no-compile", "--compile") if machine.gpus else ("--no-compile",):
        out, began = machine.folder / f"samples{how}", time.monotonic()
        run([ROOT / "autoregressive" / "sample_c2i.py", "--gpt-ckpt", machine.folder / "gpt", "--out", out,
             "--num-samples", count, "--batch-size", min(32, count), how])
        if len(list((out / "images").glob("*.png"))) != count:
            raise Failed(f"{how}: not all pictures are there")
        found[f"seconds {how}"] = time.monotonic() - began
    return found


def check_tests(machine: Machine) -> dict[str, Any]:
    run(["-m", "pytest", "-q", "-m", "gpu", ROOT / "tests"] if machine.gpus else ["-m", "pytest", "--version"])
    return {}


CHECKS: dict[str, Callable[[Machine], dict[str, Any]]] = dict(zip(NAMES, (
    check_search, check_eager, check_compiled, check_profile, check_resume, check_extract, check_gpt, check_sharded,
    check_sample, check_tests), strict=True))


def slow(name: str, found: dict[str, Any], machine: Machine) -> list[str]:
    """Rates that are below half of what is expected of this GPU, memory and seconds that are above twice as much."""
    peak = peak_flops(machine.name, "bf16", True)
    if peak is None:
        return []
    off = []
    for what, expected in EXPECTED.get(name, {}).items():
        goal = expected * (peak / H100 if what.endswith("/s") else 1)
        more_is_worse = what in ("GiB", "kmeans_seconds")
        if what in found and (found[what] > 2 * goal if more_is_worse else found[what] < goal / 2):
            off.append(f"{what} {found[what]:.4g}, expected {goal:.4g}")
    return off


def table(results: dict[str, tuple[str, dict[str, Any]]]) -> str:
    """Markdown: a row per check."""
    lines = ["| check | | measured | expected on an H100 |", "|---|---|---|---|"]
    for name, (verdict, found) in results.items():
        shown = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in found.items())
        expected = ", ".join(f"{k} {v:g}" for k, v in EXPECTED.get(name, {}).items())
        lines.append(f"| {name} | {verdict} | {shown} | {expected} |")
    return "\n".join(lines)


def check_all(names: Sequence[str], folder: Path) -> bool:
    """Whether all checks pass."""
    machine, good = Machine(folder), True
    results: dict[str, tuple[str, dict[str, Any]]] = {}
    note = [] if machine.gpus else [NO_GPU.format(torch=torch.__version__)]
    print("\n".join([f"{max(1, machine.gpus)} x {machine.name}, torch {torch.__version__}", *note]), flush=True)
    for name in names:
        began = time.monotonic()
        missing = [before for before in NEEDS.get(name, ()) if before in results and results[before][0] == "FAIL"]
        try:
            if missing:
                raise Failed(f"needs {' and '.join(missing)}")
            found = CHECKS[name](machine)
            problems = slow(name, found, machine)
        except (Failed, LookupError, OSError, ValueError) as error:
            found, problems = {}, [str(error)]
        verdict = "FAIL" if problems else "SKIP" if "skipped" in found else "PASS"
        good &= not problems
        results[name] = verdict, found
        print(f"{verdict} {name} ({time.monotonic() - began:.0f} s) {'; '.join(problems)}", flush=True)
    print("\n".join([table(results), *note]))
    return good


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG), tempfile.TemporaryDirectory() as folder:
        good = check_all(args.checks, Path(folder))
    if not good or not torch.cuda.is_available():
        raise SystemExit(1)


if __name__ == "__main__":
    main()
