"""Trainers that are killed at random moments and started again end as if nobody had killed them, bit for bit.

The default suite kills each trainer once or twice; the campaign, an hour or so, is
    OMP_NUM_THREADS=1 python -m pytest -m campaign tests/faults/test_kills.py
"""

import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress

import pytest
import torch
import training_runs
from places import ROOT
from training_runs import assert_same_run, to_words

from autoregressive import extract_codes
from tokenizer import train_provq
from tokenizer.runtime import lock
from tokenizer.runtime.checkpoint import load_file

STEPS, KEEP = 24, 2
EVENTS = {"max_steps": STEPS, "log_every": 1, "val_every": 5, "ckpt_every": 2, "keep_checkpoints": KEEP, "ema": True,
          "device": "cpu"}
CURRICULUM = {"warmup_steps": 7, "transition_steps": 8, "kmeans_batches": 2, "kmeans_iters": 5, "codebook_size": 16}
IMAGE = EVENTS | CURRICULUM | {"image_size": 16, "global_batch_size": 8, "val_size": 16}
PROTEIN = EVENTS | CURRICULUM | {
    "encoder_width": 32, "encoder_heads": 4, "decoder_width": 32, "decoder_heads": 2, "decoder_layers": 1,
    "codebook_embed_dim": 8, "ideal_chains": 24, "max_length": 32, "global_batch_size": 4, "val_size": 5,
    "lr_warmup_steps": 2}


@pytest.fixture(scope="module")
def codes(tmp_path_factory):
    """A tokenizer's run with codes of the digits."""
    run = tmp_path_factory.mktemp("codes") / "vq"
    train_provq.main(to_words(IMAGE | {"results_dir": run}))
    extract_codes.main(["--vq-ckpt", str(run), "--device", "cpu"])
    return run


def command(name, codes):
    gpt = EVENTS | {"preset": "digits", "code_path": codes / "codes", "vq_ckpt": codes, "global_batch_size": 8,
                    "lr_warmup_steps": 2, "sample_every": STEPS, "val_size": 16}
    return {"image": (ROOT / "tokenizer" / "train_provq.py", IMAGE),
            "gpt": (ROOT / "autoregressive" / "train_c2i.py", gpt),
            "protein": (ROOT / "protein" / "train_provq.py", PROTEIN)}[name]


def children(pid):
    """The processes that this one has started, and so on."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            found = [int(word) for word in file.read().split()]
    except FileNotFoundError:  # gone
        return []
    return found + [other for child in found for other in children(child)]


def kill(process, one_rank, rng):
    """SIGKILL all at once, as a machine that is lost, or one rank, as the kernel without memory; torchrun ends then."""
    everyone = [process.pid, *children(process.pid)]
    victims = [rng.choice(everyone[1:])] if one_rank and everyone[1:] else rng.sample(everyone, len(everyone))
    for pid in victims:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=120)


def owner(run):
    """Process id in the run's lock, None without."""
    try:
        return json.loads((run / lock.LOCK_FILE).read_text())["pid"]
    except (FileNotFoundError, ValueError):
        return None


def wait_for_owner(run, process, before):
    """Until this start owns the folder: whether it has come that far."""
    while process.poll() is None:
        found = owner(run)
        if found is not None and found != before:
            return True
        time.sleep(0.005)
    return False


def assert_identical(straight, run):
    """And nothing is left behind."""
    assert_same_run(straight, run, STEPS)
    ends = [load_file(folder / "checkpoints" / f"{STEPS:07d}.pt") for folder in (straight, run)]
    assert_equal(ends[0]["optimizer"], ends[1]["optimizer"])
    assert_equal(*(load_file(folder / "checkpoints" / "best.pt")["ema"] for folder in (straight, run)))
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (straight, run)]
    for summary in summaries:
        del summary["seconds_since_start_or_resume"]
    assert summaries[0] == summaries[1]
    assert len(list((run / "checkpoints").glob("0*.pt"))) == KEEP
    assert not [path for path in run.rglob(".*") if path.name == lock.LOCK_FILE or path.suffix == ".tmp"]


def assert_equal(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_equal(a, b)
    else:
        assert one == other


def campaign(name, codes, processes, kills, seed, base):
    """Kill so many times -> counts. Every run that was killed goes on until it is finished, and is compared."""
    script, settings = command(name, codes)
    rng = random.Random(f"{seed}-{name}-{processes}")
    several = processes if processes > 1 else None

    def start(run):
        return training_runs.start(script, to_words(settings | {"results_dir": run}), processes=several)

    straight = base / "straight"
    process = start(straight)
    assert wait_for_owner(straight, process, None), process.communicate()[0]
    began = time.monotonic()
    out, _ = process.communicate()
    assert process.returncode == 0, out
    seconds = time.monotonic() - began
    counts = {"trainer": name, "processes": processes, "kills": 0, "of one rank": 0, "before a checkpoint": 0,
              "runs": 0, "identical": 0}
    run, last = base / "run", None
    while counts["kills"] < kills or run.exists():
        process = start(run)
        if counts["kills"] < kills and wait_for_owner(run, process, last):
            last = owner(run)
            with suppress(ValueError):  # it may have ended
                time.sleep(rng.uniform(0, seconds))
            if process.poll() is None:
                one_rank = processes > 1 and rng.random() < 0.5
                kill(process, one_rank, rng)
                counts["kills"] += 1
                counts["of one rank"] += one_rank
                counts["before a checkpoint"] += not list(run.glob("checkpoints/0*.pt"))
                continue
        out, _ = process.communicate()
        assert process.returncode == 0, out
        assert_identical(straight, run)
        counts["runs"] += 1
        counts["identical"] += 1
        shutil.rmtree(run)
        last = None
    return counts


@pytest.mark.parametrize(("name", "processes", "kills"), [("image", 2, 2), ("gpt", 1, 1), ("protein", 1, 1)])
def test_a_few_kills(codes, tmp_path, name, processes, kills):
    counts = campaign(name, codes, processes, kills, 1, tmp_path)
    assert counts["kills"] == kills
    assert counts["identical"] == counts["runs"] > 0


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["image", "gpt", "protein"])
@pytest.mark.parametrize("processes", [1, 2])
def test_many_kills(codes, tmp_path, capsys, name, processes):
    counts = campaign(name, codes, processes, 20, 17, tmp_path)
    with capsys.disabled():
        print("\n" + json.dumps(counts))  # noqa: T201
    assert counts["kills"] == 20
    assert counts["identical"] == counts["runs"] > 0
