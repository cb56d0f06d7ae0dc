"""What the tests of training scripts share: command lines, rows of logs, and whether two runs are the same."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tokenizer.runtime.checkpoint import load_file
from tokenizer.runtime.metrics import TIMING_FIELDS

NO_KMEANS = {"kmeans_batches": None, "kmeans_iters": None}  # for settings that have them, of a run that has no k-means


class Killed(BaseException):
    """Ends a run in the middle of a step, as a kill would."""


def kill_at_step(monkeypatch, main, trainer, words, at):
    """Run main(words) until the training step `at` begins."""
    train_step = trainer.train_step

    def die(self, batches, step):
        if step == at:
            raise Killed
        return train_step(self, batches, step)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", die)
        with pytest.raises(Killed):
            main(words)


def to_words(settings):
    """{field or --flag: value} -> words of a command line. True: a switch; None: left out."""
    words = []
    for name, value in settings.items():
        flag = name if name.startswith("--") else f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [] if value is None else [flag, str(value)]
    return words


def rows(run_dir, name="metrics.jsonl", timings=False):
    parsed = [json.loads(line) for line in (Path(run_dir) / name).read_text().splitlines()]
    return parsed if timings else [{k: v for k, v in row.items() if k not in TIMING_FIELDS} for row in parsed]


def assert_same_run(a, b, step):
    """Logs, validations and weights of two run folders are equal bit for bit."""
    assert rows(a) == rows(b)
    assert rows(a, "validation.jsonl") == rows(b, "validation.jsonl")
    one, other = (load_file(Path(run_dir) / "checkpoints" / f"{step:07d}.pt") for run_dir in (a, b))
    for part in {"model", "ema", "discriminator"} & one.keys():
        if one[part] is None:
            assert other[part] is None
            continue
        assert one[part].keys() == other[part].keys()
        for key in one[part]:
            assert torch.equal(one[part][key], other[part][key]), f"{part} {key}"


def start(script, words, cwd="/", processes=None, **kwargs):
    """The script as a user starts it, from elsewhere and without PYTHONPATH."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen([*launcher, str(script), *words], cwd=cwd, env=env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, **kwargs)


def wait_for_row(run_dir, step, process):
    """Until the run has logged `step` rows. AssertionError with its output when it ends before."""
    path = Path(run_dir) / "metrics.jsonl"
    for _ in range(1200):
        if path.exists() and path.read_text().count("\n") >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    raise AssertionError("the run did not get there")
