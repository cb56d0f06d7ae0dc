"""Programs that test_runtime.py runs in processes of their own: `runtime_worker.py MODE FOLDER`; modes: see main."""

import json
import math
import os
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tokenizer.runtime import checkpoint, distributed
from tokenizer.runtime.checkpoint import Checkpointer
from tokenizer.runtime.ema import EMA
from tokenizer.runtime.metrics import TIMING_FIELDS, JsonlFile, MetricLogger
from tokenizer.runtime.seeding import StepSampler, seed_step

CPU = torch.device("cpu")


def rows_of(path):
    """Rows of a metrics file without the timing fields; the file has to be strictly valid JSON lines."""

    def refuse(word):
        raise AssertionError(f"{word} in {path}")

    text = Path(path).read_text()
    assert text == "" or text.endswith("\n")
    rows = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMING_FIELDS} for row in rows]


def logger(folder, **options):
    return MetricLogger(folder, **{"total_steps": 10, "device": CPU, "tensorboard": False, **options})


def train(run_dir, total_steps=5):
    """A small run: log every 3 steps, checkpoint every 2, so that metrics are always pending at some checkpoint."""
    saver = Checkpointer(run_dir / "checkpoints", keep_last=2)
    state = saver.load_latest()
    first = state["step"] if state else 0
    metrics = logger(run_dir, total_steps=total_steps, resume_step=first)
    validation = JsonlFile(run_dir / "validation.jsonl", first)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    ema = EMA(model, decay=0.5)
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.load_state_dict(state["ema"])
        metrics.load_state_dict(state["metrics"])
    data = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
    sampler = StepSampler(len(data), 4, seed=5, start_step=first, end_step=total_steps)
    for step, rows in enumerate(sampler, start=first):
        seed_step(5, 0, step)
        loss = model(data[[index for _, index in rows]]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(model)
        metrics.add({"loss": loss, "index_counts": torch.bincount(torch.tensor(rows)[:, 1], minlength=10)}, weight=4)
        done = step + 1
        if done % 3 == 0 or done == total_steps:
            metrics.flush(done, derive=lambda reduced: {"most_used": int(reduced["index_counts"].argmax())})
            validation.write({"step": done, "weight": float(ema.module[0].weight.sum())})
        if done % 2 == 0 or done == total_steps:
            state = {"step": done, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            saver.save(done, {**state, "ema": ema.state_dict(), "metrics": metrics.state_dict()})


def outcome(run_dir):
    state = Checkpointer(run_dir / "checkpoints").load_latest()
    weights = {f"{part}.{name}": w.tolist() for part in ("model", "ema") for name, w in state[part].items()}
    return state["step"], weights, rows_of(run_dir / "metrics.jsonl"), rows_of(run_dir / "validation.jsonl")


def killed_at(call):
    """Make this process kill itself at the call-th disk operation, losing the end of a file that it would sync."""
    calls = 0

    def patch(name):
        original = getattr(os, name)

        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                if name == "fsync" and os.path.isfile(f"/proc/self/fd/{args[0]}"):
                    os.truncate(f"/proc/self/fd/{args[0]}", max(os.fstat(args[0]).st_size - 9, 0))
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(os, name, wrapper)

    for name in ("fsync", "replace", "unlink"):  # Path.unlink calls os.unlink
        patch(name)


def kill_worker(folder):
    """Kill a run at each of its disk operations in turn, continue it, and compare with the run that nobody killed."""

    def child(run_dir, call=None):
        pid = os.fork()
        if pid == 0:
            status = 1  # a child that fails must not return into the parent's code
            try:
                if call is not None:
                    killed_at(call)
                train(run_dir)
                status = 0
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    torch.set_num_threads(1)  # a forked child has no worker threads
    train(folder / "warm_up")  # what torch imports on first use, the children then share
    assert child(folder / "straight") == 0
    expected = outcome(folder / "straight")
    assert [row["step"] for row in expected[2]] == [3, 5]
    call = 0
    finished = False
    while not finished:
        call += 1
        run_dir = folder / f"killed{call}"
        status = child(run_dir, call)
        finished = status == 0  # the run has fewer disk operations than `call`
        assert finished or status == -signal.SIGKILL, status
        assert child(run_dir) == 0, f"cannot continue after a kill at operation {call}"
        assert outcome(run_dir) == expected, f"differs after a kill at operation {call}"
        assert not list((run_dir / "checkpoints").glob(".*.tmp"))
    (folder / "operations").write_text(str(call - 1))


def two_process_worker(folder):
    """Runs on 1 or 2 processes; what it writes as result-RANK.json must not depend on their number."""
    rank, world = distributed.rank(), distributed.world_size()
    result = {}
    tensor = torch.tensor([1.0, 2.0]) * (2 / world)  # sums to the same on any number of ranks
    result["sum"] = distributed.all_reduce_(tensor).tolist()
    result["max"] = distributed.all_reduce_(torch.tensor([rank - world]), "max").item()
    result["min"] = distributed.all_reduce_(torch.tensor([rank + 5]), "min").item()
    result["broadcast"] = distributed.broadcast_(torch.tensor([rank])).item()
    result["any"] = [distributed.any_rank(rank == world - 1), distributed.any_rank(False)]
    gathered = distributed.gather_stack(torch.tensor([rank, 7]))
    assert gathered.tolist() == [[r, 7] for r in range(world)]

    data = torch.randn(10, generator=torch.Generator().manual_seed(0)).double()
    metrics = logger(folder, total_steps=4)

    def add(metrics, first, last):
        sampler = StepSampler(10, 4, seed=1, start_step=first, end_step=last, rank=rank, world=world)
        for rows in sampler:
            indices = torch.tensor([index for _, index in rows])
            counts = torch.bincount(indices, minlength=10)
            metrics.add({"loss": data[indices].mean(), "index_counts": counts}, weight=len(rows))
            metrics.add_samples(len(rows))

    add(metrics, 0, 3)
    first = metrics.flush(3, {"stage": 1})
    result["loss"], result["counts"] = first["loss"], first["index_counts"].tolist()
    add(metrics, 3, 5)
    path = Checkpointer(folder / "checkpoints").save(5, {"step": 5, "metrics": metrics.state_dict()})
    assert path.exists()  # on every rank, because save ends with a barrier
    resumed = logger(folder, total_steps=10, resume_step=5)
    resumed.load_state_dict(Checkpointer(folder / "checkpoints").load_latest()["metrics"])
    add(resumed, 5, 7)
    result["resumed_loss"] = resumed.flush(7)["loss"]
    add(metrics, 5, 7)
    assert metrics.flush(8)["loss"] == result["resumed_loss"]  # bit for bit on as many ranks as saved it

    # Mistakes that only one rank makes must end every rank with a message, not leave the others waiting.
    errors = {}
    for name, mistake in {
        "metrics": lambda: (resumed.add({"only_here": torch.tensor(1.0)}) if rank else None, resumed.flush(9)),
        "save": lambda: Checkpointer(folder / "bad").save(1, {"path": folder}),
        "diverged": lambda: logger(folder / "nan").write({"step": 1, "loss": math.nan}),
    }.items():
        try:
            mistake()
        except (RuntimeError, TypeError, FloatingPointError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    (folder / f"errors-{rank}.json").write_text(json.dumps(errors))
    (folder / f"result-{rank}.json").write_text(json.dumps(result))


def end_worker(folder):
    """The threads of a process that has compiled a model, while its group lives and after."""
    model = torch.nn.Linear(4, 4)
    torch.compile(model, backend="eager")(torch.ones(2, 4))
    distributed.gather_objects("work")
    found = []
    for when in ("before", "after"):
        if when == "after":
            distributed.finalize()
        found += [(when, (task / "comm").read_text().strip()) for task in Path("/proc/self/task").iterdir()]
    (folder / "threads.json").write_text(json.dumps(found))


def uneven_worker(folder):
    """Rank 1 needs longer for its first piece of work than collectives wait."""
    mine = []
    for number in distributed.deal_out(6):
        mine.append(number)
        if distributed.rank() == 1 and len(mine) == 1:
            time.sleep(3.0)
        time.sleep(0.2)
    everywhere = distributed.gather_objects(mine)
    time.sleep(3.0 * distributed.rank())
    saver, read, load = Checkpointer(folder / "checkpoints"), [], checkpoint.load_file
    saved = saver.save(1, {"dealt": everywhere, "large": {"w": torch.ones(3)}})
    checkpoint.load_file = lambda *args: read.append(args) or load(*args)
    state = saver.load_latest(main_only=["large"])
    assert state["dealt"] == everywhere
    assert (len(read), len(state["large"])) == ((1, 1) if distributed.rank() == 0 else (0, 0))
    again = distributed.gather_objects(list(distributed.deal_out(3)))  # each deal starts over
    failure = ""
    try:
        time.sleep(3.0 * distributed.rank())
        distributed.barrier()
    except RuntimeError as error:
        failure = str(error)
    (folder / f"uneven-{distributed.rank()}.json").write_text(json.dumps([everywhere, again, failure, saved.exists()]))
    time.sleep(2.0)  # torchrun would end the other one


def main(mode, folder):
    if mode == "kill":
        kill_worker(folder)
        return
    if mode == "uneven":
        distributed.TIMEOUT = timedelta(seconds=2)
    device = distributed.init("cuda" if mode == "cuda" else "cpu")
    if mode == "uneven":
        uneven_worker(folder)
        return
    if mode == "end":
        end_worker(folder)
        return
    if mode == "cuda":
        metrics = logger(folder, device=device)
        metrics.add({"loss": distributed.all_reduce_(torch.tensor(3.0, device=device))})
        assert distributed.any_rank(True)
        metrics.flush(1)
        distributed.finalize()
        return
    two_process_worker(folder)
    if distributed.rank() == 1:
        raise RuntimeError("planned failure")
    distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
