"""tokenizer/runtime: exact resume after a kill, equality of one and two processes, safe checkpoints."""

import argparse
import json
import math
import os
import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from places import WORKERS
from torch import nn
from workers.runtime_worker import logger, rows_of, two_process_worker

from autoregressive import sharding
from tokenizer.runtime import checkpoint, distributed
from tokenizer.runtime.checkpoint import Checkpointer, load_file
from tokenizer.runtime.ema import EMA
from tokenizer.runtime.files import atomic_write_text
from tokenizer.runtime.metrics import JsonlFile
from tokenizer.runtime.seeding import StepSampler, fold, seed_step

WORKER = WORKERS / "runtime_worker.py"
CPU = torch.device("cpu")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def launch(*command):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# ---------------------------------------------------------------- seeding


def test_fold_is_stable_and_sensitive():
    assert fold(0) == 0xE220A8397B1DCDAF >> 1  # first output of SplitMix64 seeded with 0, as published
    assert fold(1, 2, 3) == fold(1, 2, 3) == fold(np.int64(1), 2, 3)
    values = {fold(a, b) for a in range(-20, 20) for b in range(-20, 20)} | {fold(a) for a in range(-20, 20)}
    assert len(values) == 1640
    assert all(0 <= value < 2**63 for value in values)
    assert fold(2**70) == fold(0)  # 64-bit arithmetic
    with pytest.raises(TypeError):
        fold(0.5)


def test_seed_step_repeats_every_generator():
    def draw(*key):
        seed_step(*key)
        return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002 - the legacy one is tested

    first = draw(7, 0, 5)
    assert draw(7, 0, 5) == first
    for other in [(8, 0, 5), (7, 1, 5), (7, 0, 6)]:
        assert not set(draw(*other)) & set(first)


def stream(num_samples, global_batch, world=1, micro_batches=1, **options):
    """step -> rows of all ranks and micro-batches, in the order of the global batch."""
    samplers = [
        StepSampler(num_samples, global_batch, rank=r, world=world, micro_batches=micro_batches, **options)
        for r in range(world)
    ]
    parts = [list(sampler) for sampler in samplers]
    assert all(len(part) == len(sampler) for part, sampler in zip(parts, samplers, strict=True))
    flat = [row for i in range(len(parts[0])) for part in parts for row in part[i]]
    return [flat[i : i + global_batch] for i in range(0, len(flat), global_batch)]


@pytest.mark.parametrize("num_samples", [5, 12, 31, 100])  # smaller than a batch, equal, and neither divides the other
def test_sampler_does_not_depend_on_world_or_accumulation(num_samples):
    reference = stream(num_samples, 12, seed=3, end_step=20)
    for world, micro_batches in [(2, 1), (1, 3), (2, 3), (4, 1), (6, 2)]:
        assert stream(num_samples, 12, world, micro_batches, seed=3, end_step=20) == reference
    assert stream(num_samples, 12, 2, 1, seed=3, start_step=13, end_step=20) == reference[13:]
    flat = [row for rows in reference for row in rows]
    for epoch in range(len(flat) // num_samples):  # every epoch is a permutation, with nothing dropped between
        rows = flat[epoch * num_samples : (epoch + 1) * num_samples]
        assert rows == [(epoch, index) for _, index in rows]
        assert sorted(index for _, index in rows) == list(range(num_samples))
    assert stream(num_samples, 12, seed=4, end_step=20) != reference


def test_sampler_order_is_shuffled_anew_each_epoch():
    [order] = stream(1000, 2000, seed=0, end_step=1)
    first, second = [i for _, i in order[:1000]], [i for _, i in order[1000:]]
    assert first != second
    for indices in (first, second):
        assert abs(np.corrcoef(indices, range(1000))[0, 1]) < 0.1
    # Pinned: a run that is continued after an upgrade must see the same order.
    assert [index for _, index in next(iter(StepSampler(10, 10, seed=0)))] == [6, 7, 2, 3, 8, 1, 4, 9, 5, 0]


def test_sampler_in_a_loader_with_workers():
    class Identity(torch.utils.data.Dataset):
        def __getitem__(self, key):
            return key

    options = {"seed": 1, "start_step": 2, "end_step": 6}
    loader = torch.utils.data.DataLoader(
        Identity(), batch_sampler=StepSampler(7, 4, **options), num_workers=2, collate_fn=list
    )
    assert list(loader) == list(loader) == list(StepSampler(7, 4, **options))
    endless = iter(StepSampler(7, 4, seed=1))
    assert [next(endless) for _ in range(6)][2:] == list(loader)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch": 10, "world": 4}, "global_batch 10 is not divisible by 4 process.* = 4"),
        ({"global_batch": 12, "world": 4, "micro_batches": 2}, "12 is not divisible by 4 .* x 2 .* = 8"),
        ({"num_samples": 0}, "the data set is empty"),
        ({"global_batch": 0}, "global_batch 0"),
        ({"rank": 2, "world": 2}, r"rank 2 is outside \[0, 2\)"),
        ({"start_step": 5, "end_step": 4}, r"\[5, 4\)"),
    ],
)
def test_sampler_refuses_numbers_that_do_not_fit(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepSampler(**{"num_samples": 10, "global_batch": 4, "seed": 0, **arguments})


def test_endless_sampler_has_no_length():
    with pytest.raises(TypeError, match="end_step"):
        len(StepSampler(10, 4, seed=0))


# ---------------------------------------------------------------- distributed on one process


def test_collectives_are_the_identity_on_one_process():
    tensor = torch.arange(3.0)
    assert distributed.all_reduce_(tensor) is tensor
    assert distributed.broadcast_(tensor) is tensor
    assert distributed.gather_stack(tensor).tolist() == [[0.0, 1.0, 2.0]]
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert (distributed.any_rank(True), distributed.any_rank(False)) == (True, False)
    distributed.barrier()
    distributed.finalize()


def test_uneven_work_is_dealt_out_and_waited_for(tmp_path):
    """One rank is later than collectives wait: only a collective of its own gives up on it."""
    launch(*TORCHRUN, "--nproc_per_node=2", WORKER, "uneven", tmp_path)
    for rank in range(2):
        everywhere, again, failure, saved = json.loads((tmp_path / f"uneven-{rank}.json").read_text())
        assert sorted(number for part in everywhere for number in part) == list(range(6))
        assert len(everywhere[1]) == 1  # the other rank took what this one was too late for
        assert sorted(number for part in again for number in part) == [0, 1, 2]
        assert saved
        assert failure or rank == 1  # a barrier does give up
    assert list(distributed.deal_out(3)) == [0, 1, 2]  # on one process


def test_init_without_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.init("cpu") == CPU
    assert not torch.distributed.is_initialized()
    with pytest.raises(ValueError, match="--device gpu: not a device"):
        distributed.init("gpu")
    with pytest.raises(ValueError, match="--device meta: not supported"):
        distributed.init("meta")
    with pytest.raises(ValueError, match=r"--device mps: not supported, .* use --device cpu"):
        distributed.init("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.init("auto") == CPU
    with pytest.raises(ValueError, match="--device cuda: no CUDA device is visible; use --device cpu"):
        distributed.init("cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="sets WORLD_SIZE but not RANK, LOCAL_RANK: launch with torchrun"):
        distributed.init("cpu")


def test_init_numbers_the_cuda_devices(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match=r"LOCAL_RANK 2: only 2 CUDA device\(s\) visible"):
        distributed.init("auto")
    with pytest.raises(ValueError, match="--device cuda:1: torchrun numbers the devices itself"):
        distributed.init("cuda:1")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed by Linux")
def test_no_thread_outlives_the_group(tmp_path):
    # a thread of gloo that is left when the interpreter ends can abort the process after all of its work
    result = launch(*TORCHRUN, "--nproc_per_node=1", WORKER, "end", tmp_path)
    assert result.returncode == 0, result.stderr
    threads = json.loads((tmp_path / "threads.json").read_text())
    assert {when for when, name in threads if "gloo" in name} == {"before"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nccl_group_reduces_on_host_and_device(tmp_path):
    result = launch(*TORCHRUN, "--nproc_per_node=1", WORKER, "cuda", tmp_path)
    assert result.returncode == 0, result.stderr
    assert rows_of(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 3.0}]


# ---------------------------------------------------------------- checkpoints


def test_checkpointer_keeps_the_newest_and_the_named(tmp_path):
    saver = Checkpointer(tmp_path / "checkpoints", keep_last=2)
    assert saver.steps() == []
    assert saver.load_latest() is None
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".0000001.pt.tmp").write_bytes(b"left by a kill")
    for step in (1, 2, 10, 12_345_678):
        path = saver.save(step, {"step": step, "weights": torch.full((3,), float(step)), "nested": [{"a": (1, None)}]})
        if step == 2:
            saver.save_named("best", {"step": 2})
    assert path.name == "12345678.pt"
    assert saver.steps() == [10, 12_345_678]
    names = sorted(entry.name for entry in saver.folder.iterdir())
    assert names == ["0000010.pt", "12345678.pt", "best.pt"]
    assert saver.load_latest()["weights"].tolist() == [12_345_678.0] * 3
    assert load_file(saver.folder / "best.pt") == {"step": 2}
    with pytest.raises(ValueError, match="keep_last 0"):
        Checkpointer(tmp_path, keep_last=0)


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "zip without data"])
def test_unreadable_newest_file_is_skipped_with_a_message(tmp_path, capsys, damage):
    saver = Checkpointer(tmp_path, keep_last=1)
    saver.save(1, {"step": 1})
    content = saver.save(1, {"step": 1, "w": torch.ones(1000)}).read_bytes()
    broken = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "flipped": content.replace(b"\x00\x00\x80\x3f" * 8, b"\x00\x00\x80\x40" * 8, 1),
        "zip without data": b"PK\x05\x06" + b"\0" * 18,
    }[damage]
    (tmp_path / "0000002.pt").write_bytes(broken)
    assert saver.load_latest()["step"] == 1
    message = capsys.readouterr().out
    assert message.startswith("skipping a checkpoint that cannot be read: ")
    assert "0000002.pt" in message
    # The unreadable file must not displace a readable one when the run goes on, not even with keep_last=1.
    saver.save(1, {"step": 1})
    assert saver.load_latest()["step"] == 1
    (tmp_path / "0000001.pt").unlink()
    with pytest.raises(ValueError, match=r"none of the 1 checkpoint\(s\) can be read"):
        saver.load_latest()


def test_llamagen_namespace_loads(tmp_path):
    arguments = argparse.Namespace(vq_model="VQ-16", lr=1e-4, betas=(0.9, 0.95))
    torch.save({"model": {"w": torch.ones(2)}, "steps": 5, "args": arguments}, tmp_path / "vq.pt")
    state = load_file(tmp_path / "vq.pt")
    assert state["args"] == arguments
    assert state["model"]["w"].tolist() == [1.0, 1.0]


class Malicious:
    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_malicious_pickle_is_refused_and_not_run(tmp_path):
    Malicious.target = str(tmp_path / "attacked")
    torch.save({"model": Malicious()}, tmp_path / "zip.pt")
    with pytest.raises(ValueError, match=r"zip\.pt: refused.*mkdir"):
        load_file(tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps({"model": Malicious()}))
    with pytest.raises(ValueError, match=r"plain\.pt: truncated, or not a file of torch\.save"):
        load_file(tmp_path / "plain.pt")
    assert not (tmp_path / "attacked").exists()


def test_load_file_names_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt: no such checkpoint"):
        load_file(tmp_path / "none.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match=r"list\.pt: holds a list"):
        load_file(tmp_path / "list.pt")


def test_what_rank_0_hands_out_nobody_else_reads(tmp_path, monkeypatch):
    """A sharded run's checkpoint on every rank would be 37 GB, eight times on one machine."""
    Checkpointer(tmp_path).save(3, {"model": {"w": torch.ones(2)}, "step": 3})
    shared = []

    def gather(value):  # of two ranks, one after the other
        shared.append(value)
        return shared

    monkeypatch.setattr(distributed, "gather_objects", gather)
    assert torch.equal(Checkpointer(tmp_path).load_latest(main_only=["model"])["model"]["w"], torch.ones(2))
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    monkeypatch.setattr(checkpoint, "load_file", None)
    assert Checkpointer(tmp_path).load_latest(main_only=["model"]) == {"model": {}, "step": 3}
    assert all(part.from_main for part in (sharding.ShardedModel, sharding.ShardedOptimizer))


@pytest.mark.parametrize(
    ("state", "where"),
    [
        ({"config": {"folder": Path("x")}}, r"state\['config'\]\['folder'\] is a pathlib"),
        ({"losses": [1.0, np.float64(2.0)]}, r"state\['losses'\]\[1\] is a numpy\.float64"),
        ({Path("x"): 1}, "key .* of state is a pathlib"),
        ({"args": argparse.Namespace()}, r"state\['args'\] is a argparse\.Namespace"),
    ],
)
def test_save_refuses_what_would_not_load(tmp_path, state, where):
    with pytest.raises(TypeError, match=where):
        Checkpointer(tmp_path).save(1, state)
    assert list(tmp_path.iterdir()) == []


def test_optimizer_state_is_plain(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=None)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    Checkpointer(tmp_path).save(1, {"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    optimizer.load_state_dict(Checkpointer(tmp_path).load_latest()["optimizer"])


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    atomic_write_text(path, "old ω")

    def full(_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space left"):
            atomic_write_text(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text(encoding="utf-8") == "old ω"


# ---------------------------------------------------------------- EMA


class Mirrored(nn.Module):
    """A buffer with a Python mirror that only a load hook refreshes, and a buffer outside of the state dict."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("step", torch.tensor(0))
        self.register_buffer("alpha", torch.tensor(1.0), persistent=False)
        self.mirror = 0
        self.register_load_state_dict_post_hook(lambda module, _: setattr(module, "mirror", int(module.step)))


def test_ema_averages_parameters_and_copies_buffers():
    model = Mirrored()
    ema = EMA(model, decay=0.9)
    start = model.linear.weight.detach().clone()
    with torch.no_grad():
        model.linear.weight.add_(1.0)
        model.step.fill_(5)
        model.alpha.fill_(0.25)
    ema.update(model)
    torch.testing.assert_close(ema.module.linear.weight, start + 0.1)
    ema.update(model)
    torch.testing.assert_close(ema.module.linear.weight, start + 0.19)
    assert (ema.module.step.item(), ema.module.alpha.item(), ema.module.mirror) == (5, 0.25, 5)
    assert not ema.module.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
    assert model.training
    assert model.linear.weight.requires_grad

    other = EMA(Mirrored(), decay=0.9)
    other.load_state_dict(ema.state_dict())
    assert torch.equal(other.module.linear.weight, ema.module.linear.weight)
    assert other.module.mirror == 5

    with torch.no_grad():
        model.linear.bias.add_(3.0)
    bias = ema.module.linear.bias.clone()
    model.step.fill_(6)
    ema.copy_(model, prefix="step")
    assert ema.module.mirror == 6
    assert torch.equal(ema.module.linear.bias, bias)
    ema.copy_(model)
    assert all(
        torch.equal(a, b) for a, b in zip(ema.module.state_dict().values(), model.state_dict().values(), strict=True)
    )


def test_ema_mistakes():
    with pytest.raises(ValueError, match=r"decay 1\.0 is outside \[0, 1\)"):
        EMA(nn.Linear(2, 2), decay=1.0)
    with pytest.raises(TypeError, match=r"pass its \.module"):
        EMA(nn.DataParallel(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match=r"torch\.compile"):
        EMA(torch.compile(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match=r"weight in torch\.bfloat16"):
        EMA(nn.Linear(2, 2).bfloat16())
    with pytest.raises(ValueError, match="'bias'"):
        EMA(nn.Linear(2, 2)).update(nn.Linear(2, 2, bias=False))
    with pytest.raises(ValueError, match=r"is called decoder\."):
        EMA(nn.Linear(2, 2)).copy_(nn.Linear(2, 2), prefix="decoder.")


# ---------------------------------------------------------------- metrics


def test_flush_reduces_writes_and_resets(tmp_path, capsys):
    metrics = logger(tmp_path)
    metrics.add({"loss": torch.tensor(1.0, requires_grad=True)}, weight=1)
    metrics.add({"loss": torch.tensor(4.0), "code_counts": torch.tensor([1, 0, 2])}, weight=2)
    metrics.add({"code_counts": torch.tensor([1, 0, 0])}, weight=7)
    metrics.add_samples(64)
    result = metrics.flush(
        4,
        {"stage": 2, "alpha": 0.625},
        derive=lambda reduced: {"used": int((reduced["code_counts"] > 0).sum())},
    )
    assert result["code_counts"].tolist() == [2.0, 0.0, 2.0]
    assert result["samples_per_second"] > 0
    [row] = rows_of(tmp_path / "metrics.jsonl")
    assert list(row.items()) == [("step", 4), ("stage", 2), ("alpha", 0.625), ("loss", 3.0), ("used", 2)]
    line = capsys.readouterr().out
    assert line.startswith("step 4/10 stage 2 alpha 0.625 loss 3 used 2 ")
    assert " samples/s eta 0:00:" in line

    metrics.add({"loss": torch.tensor(7.0)})
    assert metrics.flush(5)["loss"] == 7.0
    assert "code_counts" not in metrics.flush(6)
    assert [row["step"] for row in rows_of(tmp_path / "metrics.jsonl")] == [4, 5, 6]


def test_progress_bar_and_tensorboard(tmp_path, capsys):
    metrics = logger(tmp_path, progress=True, tensorboard=True, resume_step=2)
    metrics.add({"loss": torch.tensor(0.5)})
    metrics.flush(7, {"stage": 1, "note": "text"})
    metrics.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "7/10" in captured.err
    assert "stage 1 loss 0.5" in captured.err
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in board.Scalars("loss")] == [(7, 0.5)]
    assert board.Tags()["scalars"] == ["stage", "loss", "elapsed_seconds"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_divergence_stops_before_anything_is_written(tmp_path, value):
    metrics = logger(tmp_path)
    metrics.add({"fine": torch.tensor(1.0), "loss": torch.tensor(value)})
    with pytest.raises(FloatingPointError, match=r"loss is .* at step 3"):
        metrics.flush(3)
    with pytest.raises(FloatingPointError, match=r"alpha is .* at step 4"):
        metrics.flush(4, {"alpha": value})
    with pytest.raises(FloatingPointError, match=r"per_class\.cats\[1\] is .* at step 5"):
        metrics.write({"step": 5, "per_class": {"cats": [1.0, value]}})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_add_mistakes(tmp_path):
    metrics = logger(tmp_path)
    with pytest.raises(TypeError, match="metric loss is a float"):
        metrics.add({"loss": 1.0})
    with pytest.raises(ValueError, match=r"metric loss has shape \(2,\).*of one number, or named \.\.\._counts"):
        metrics.add({"loss": torch.ones(2)})
    with pytest.raises(ValueError, match=r"metric code_counts has shape \(\)"):
        metrics.add({"code_counts": torch.tensor(1)})
    with pytest.raises(ValueError, match="weight of loss is 0"):
        metrics.add({"loss": torch.tensor(1.0)}, weight=0)
    with pytest.raises(TypeError, match="scale at step 1 is a Tensor"):
        metrics.flush(1, {"scale": torch.tensor(1.0)})


def test_add_never_reads_a_value(tmp_path):
    """On the meta device any synchronisation raises, since there is no value to read."""
    metrics = logger(tmp_path, device=torch.device("meta"))
    for _ in range(2):
        metrics.add({"loss": torch.ones((), device="meta"), "code_counts": torch.ones(4, device="meta")}, weight=3)
        metrics.add_samples(1)


def test_state_continues_between_two_flushes(tmp_path):
    def add(metrics, step):
        metrics.add({"loss": torch.tensor(0.1 * step), "code_counts": torch.tensor([step, 1])}, weight=step + 1)
        metrics.add_samples(3)

    straight, killed = logger(tmp_path / "a"), logger(tmp_path / "b")
    for step in range(4):
        add(straight, step)
    for step in range(2):
        add(killed, step)
    Checkpointer(tmp_path).save(2, {"metrics": killed.state_dict()})
    resumed = logger(tmp_path / "b", resume_step=2)
    resumed.load_state_dict(Checkpointer(tmp_path).load_latest()["metrics"])
    for step in range(2, 4):
        add(resumed, step)
    a, b = straight.flush(4), resumed.flush(4)
    assert a["loss"] == b["loss"]
    assert a["code_counts"].tolist() == b["code_counts"].tolist() == [6.0, 4.0]

    four_ranks = {**straight.state_dict(), "layout": [["loss", 1], ["n_counts", 2]]}
    four_ranks["accumulators"] = torch.tensor([[2.0, 1, 1, r, r, 0] for r in range(4)])  # images, weights, sums
    resumed.load_state_dict(four_ranks)
    result = resumed.flush(5)
    assert result["loss"] == (0 + 1 + 2 + 3) / 4
    assert result["n_counts"].tolist() == [6.0, 0.0]


def test_jsonl_drops_later_rows_and_a_torn_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = [f'{{"step": {step},  "loss": 0.10}}\n' for step in (1, 2, 3, 3, 4)]
    for torn in ("", '{"step": 5, "lo', '{"step": 5}'):
        path.write_text("".join(lines) + torn)
        JsonlFile(path, resume_step=3)
        assert path.read_text() == "".join(lines[:4])
    JsonlFile(path, resume_step=3).write({"step": 4, "loss": 1})
    assert [row["step"] for row in rows_of(path)] == [1, 2, 3, 3, 4]
    path.write_text(lines[0] + "nonsense\n" + lines[1])
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2: not a JSON object with a step"):
        JsonlFile(path, resume_step=3)
    JsonlFile(path, resume_step=0)
    assert path.read_text() == ""


# ---------------------------------------------------------------- exact resume: SIGKILL at every disk operation


def test_sigkill_at_any_disk_operation_resumes_exactly(tmp_path):
    result = launch(WORKER, "kill", tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    # 3 checkpoints (fsync, replace, fsync of the folder), 1 removal, 2 rows in 2 files, 2 new names in the run folder
    assert int((tmp_path / "operations").read_text()) == 3 * 3 + 1 + 2 * 2 + 2


# ---------------------------------------------------------------- two processes


def test_two_processes_equal_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    two_process_worker(one)
    result = launch(*TORCHRUN, "--nproc_per_node=2", WORKER, "two", two)
    assert "planned failure" in result.stderr, result.stderr[-3000:]
    assert result.returncode != 0  # rank 1 failed while rank 0 was waiting for it: both ended long before TIMEOUT

    expected = json.loads((one / "result-0.json").read_text())
    assert sum(expected["counts"]) == 12
    for rank in (0, 1):
        result = json.loads((two / f"result-{rank}.json").read_text())
        assert result.keys() == expected.keys()
        for name, value in expected.items():
            assert result[name] == pytest.approx(value, rel=1e-14), name
    rows = [rows_of(folder / "metrics.jsonl") for folder in (one, two)]
    assert [row["step"] for row in rows[1]] == [3, 7, 8]
    for row in (0, 1, 2):
        assert rows[1][row] == pytest.approx(rows[0][row], rel=1e-14)

    errors = [json.loads((two / f"errors-{rank}.json").read_text()) for rank in (0, 1)]
    assert "ranks added different metrics before step 9; this rank: []" in errors[0]["metrics"]
    assert "this rank: [('only_here', 1)]" in errors[1]["metrics"]
    assert "state['path'] is a pathlib" in errors[0]["save"]
    assert "rank 0 could not write this checkpoint" in errors[1]["save"]
    assert (
        errors[0]["diverged"]
        == errors[1]["diverged"]
        == "FloatingPointError: loss is nan at step 1: the run has diverged"
    )
