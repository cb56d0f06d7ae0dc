"""What a training step costs a GPU, counted without one (see fake_cuda.py), by the code of the trainers.

    python tests/step_counts.py    # the counts in PERFORMANCE.md; half a minute

Collectives are those of rank 0 of 8 processes, of which there is one: they do nothing. In the table they are those
beside DDP's, which the trainers are without here.
"""

import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

if str(Path(__file__).resolve().parents[1]) not in sys.path:
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from fake_cuda import GIB, fake_cuda
from fake_trainers import chains, codes, gpt_trainer, image_trainer, images, step, structure_trainer
from gpt_models import TINY, tiny
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from autoregressive import sharding
from autoregressive.train_config import TrainConfig
from tokenizer.runtime.optim import build_adamw, replicate, update


def low_precision_norms(fake):
    return image_trainer(fake, low_precision_norms=True)


# Of eager steps at the paper's size: what, trainer, its batches, GiB read and written, GiB kept for the backward.
CASES = {
    "images": ("VQ-16, 16 images of 256x256, with discriminator and EMA",
               image_trainer, lambda trainer: images(trainer, 16), 286.6, 21.27),
    "low-precision-norms": ("the same, --low-precision-norms",
                            low_precision_norms, lambda trainer: images(trainer, 16), 143.0, 13.24),
    "gpt": ("GPT-B, 32 images, with EMA",
            gpt_trainer, lambda trainer: codes(trainer, 32), 191.7, 6.04),
    "structures": ("structures, paper's size, 4 chains of 512, with EMA",
                   structure_trainer, lambda trainer: chains(trainer, 4, 512), 253.7, 7.97),
}


def count(case):
    """The second step -> what `step` gives. The first makes the optimizers' moments."""
    _, build, batches, *_ = CASES[case]
    with fake_cuda() as fake:
        trainer = build(fake)
        step(fake, trainer, batches(trainer), 1)
        return step(fake, trainer, batches(trainer), 2)


# --------------------------------------------------------------------------------------------------------- collectives

@contextmanager
def eight():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        yield
    finally:
        dist.destroy_process_group()


def collectives(operations):
    """Of a Counter of operations."""
    return Counter({name.split(".")[1]: times for name, times in operations.items() if name.startswith("c10d.")})


class Collectives(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.seen[func._schema.name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


def replicated_step():
    """A small GPT under DDP -> bytes of DDP's buckets, bytes of the weights, other collectives of a step, and how many
    gradients lie outside the buckets.
    """
    model, batch = tiny(dim=256, n_layer=4, vocab_size=8192), torch.zeros(2, TINY.block_size - 1, dtype=torch.int64)
    ddp, buckets, memory = replicate(model.train(), torch.device("cpu")), [], set()

    def reduce(_, bucket):
        buckets.append(bucket.buffer().numel() * 4)
        memory.add(bucket.buffer().untyped_storage().data_ptr())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    ddp.register_comm_hook(None, reduce)
    optimizer = build_adamw(model, TrainConfig())
    for _ in range(3):
        buckets.clear()
        with Collectives() as other:
            ddp(batch, batch[:, 0]).sum().backward()
            copies = sum(p.grad.untyped_storage().data_ptr() not in memory for p in model.parameters())
            update(optimizer, model, torch.amp.GradScaler("cpu", enabled=False), 1.0)
    return buckets, sum(p.numel() * 4 for p in model.parameters()), other.seen, copies


def sharded_step():
    """A small GPT under FSDP -> collectives of a step."""
    model = tiny().train()
    sharding.shard(model, model.layers, torch.device("cpu"), torch.bfloat16)
    optimizer, batch = build_adamw(model, TrainConfig()), torch.zeros(2, TINY.block_size - 1, dtype=torch.int64)
    for _ in range(2):
        with Collectives() as found:
            model(batch, batch[:, 0]).sum().backward()
            update(optimizer, model, torch.amp.GradScaler("cpu", enabled=False), 1.0)
    return found.seen


def table():
    """-> lines"""
    yield f"torch {torch.__version__}\n"
    yield "| one step | waits of the host | copies to the device | collectives | traffic, GiB | kept, GiB |"
    yield "|---|---|---|---|---|---|"
    with eight():
        for case, (what, *_) in CASES.items():
            seen = count(case)
            numbers = len(seen.syncs), len(seen.copies), sum(collectives(seen.operations).values())
            yield f"| {what} | {' | '.join(map(str, numbers))} | {seen.traffic / GIB:.1f} | {seen.saved / GIB:.2f} |"
        buckets, weights, others, _ = replicated_step()
        yield (f"\na GPT of {weights / 2**20:.0f} MiB, replicated: {len(buckets)} buckets, {sum(others.values())} "
               "other collectives")
        yield f"a GPT of {TINY.n_layer} blocks, sharded: {dict(sharded_step())}"


if __name__ == "__main__":
    for line in table():
        print(line, flush=True)  # noqa: T201
