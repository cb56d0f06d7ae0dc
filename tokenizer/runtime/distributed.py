"""Process groups and collectives that cost nothing on one process.

Every function works under `torchrun` (gloo on CPU, nccl on CUDA) and under plain `python`, where no process group
exists and a collective is the identity. The world size is asked for on every call and never cached: a module that was
imported before `init()` sees the group as soon as it exists.

An exception on one rank must not leave the others waiting: torchrun ends the remaining ranks when one exits, so let
exceptions propagate and call `finalize()` on the normal way out only. `TIMEOUT` bounds every wait of a collective.
Work that takes one rank longer than another is no part of one: `deal_out` it, or `wait_for_all` after it.
"""

import itertools
import os
import re
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

# Before any group exists: its functions take the group of the moment of this import as a default. Imported later, as
# torch.compile does, they hold the group beyond its end, and gloo's threads abort the process at exit now and then.
import torch.distributed.nn.functional
from torch import Tensor

# All of it is asked by this module's name as well.
from tokenizer.runtime.ranks import TORCHRUN_VARIABLES, is_main, launched, print0, rank, world_size  # noqa: F401

# Of a collective, which ranks reach together: short enough to notice a lost node the same hour.
TIMEOUT = timedelta(minutes=10)

T = TypeVar("T")
_REDUCE_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}


class OtherRankFailed(RuntimeError):
    """This rank has to stop because another one could not go on. That one says why."""


def init(device: str = "auto") -> torch.device:
    """Pick this process's device and, under torchrun, join the process group.

    device: "auto" (CUDA when visible, else CPU), "cpu" or "cuda"; a numbered device such as "cuda:1" only
    without torchrun, which numbers the devices itself through LOCAL_RANK.

    Raises ValueError for a device that this machine does not have, for an incomplete torchrun environment, and for
    processes of srun that know nothing of one another.
    """
    _refuse_bare_srun()
    found = [name for name in TORCHRUN_VARIABLES if name in os.environ]
    if found and len(found) < len(TORCHRUN_VARIABLES):
        missing = [name for name in TORCHRUN_VARIABLES if name not in found]
        raise ValueError(
            f"the environment sets {', '.join(found)} but not {', '.join(missing)}: "
            "launch with torchrun, which sets all of them, or unset them to run on one process"
        )
    chosen = _resolve_device(device, int(os.environ["LOCAL_RANK"]) if found else None)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if found and not dist.is_initialized():
        # CUDA runs get gloo beside nccl: agreeing on a host flag every step must not wait for the GPU's queue.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT)
    return chosen


def _refuse_bare_srun() -> None:
    """ValueError says what to type: every process that srun starts would be a run of its own, in the same folder."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")  # of srun; sbatch alone does not set it
    if tasks in ("", "1") or any(name in os.environ for name in TORCHRUN_VARIABLES):
        return
    nodes = os.environ.get("SLURM_STEP_NUM_NODES") or "1"
    each = re.match(r"\d*", os.environ.get("SLURM_STEP_TASKS_PER_NODE", ""))  # such as 8(x2)
    per_node = (each and each[0]) or str(max(1, int(tasks) // int(nodes)))
    where = "--standalone" if nodes == "1" else (
        f"--nnodes={nodes} --rdzv-backend=c10d --rdzv-id=$SLURM_JOB_ID "
        "--rdzv-endpoint=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1):29500")
    raise ValueError(f"srun has started this command {tasks} times, each of them for itself; type: srun "
                     f"--nodes={nodes} --ntasks-per-node=1 torchrun {where} --nproc-per-node={per_node} "
                     f"{' '.join(sys.argv[:1])} ... (or take scripts/slurm/)")


def _resolve_device(device: str, local_rank: int | None) -> torch.device:
    """`local_rank` is None without torchrun. Raises ValueError naming --device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"--device {device}: not a device; use auto, cpu or cuda") from error
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type == "mps":
        raise ValueError("--device mps: not supported, it has no float64, in which sums and scores are kept; use "
                         "--device cpu")
    if chosen.type != "cuda":
        raise ValueError(f"--device {device}: not supported; use auto, cpu or cuda")

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ValueError(f"--device {device}: no CUDA device is visible; use --device cpu")
    if local_rank is not None and chosen.index is not None:
        raise ValueError(f"--device {device}: torchrun numbers the devices itself; use --device cuda")
    index = local_rank if local_rank is not None else (chosen.index or 0)
    if index >= count:
        asked = f"LOCAL_RANK {index}" if local_rank is not None else f"--device {device}"
        raise ValueError(f"{asked}: only {count} CUDA device(s) visible; launch at most {count} process(es) per node")
    return torch.device("cuda", index)


def finalize() -> None:
    """Leave the process group. For the normal end of a program; after an exception just let the process exit."""
    if dist.is_initialized():
        dist.destroy_process_group()  # joins the threads of groups that nobody holds
        # A model under DDP holds one for as long as it lives, DTensor's caches hold FSDP's for ever. A thread lets go
        # of its last collective's tensors when all ranks have the result; late, in the interpreter's end, that would
        # abort the process, and nothing can be waited for.
        if _gloo_threads():
            time.sleep(0.5)


def _gloo_threads() -> bool:
    """Whether this process has threads of gloo. Linux says it; elsewhere False."""
    names = Path("/proc/self/task").glob("*/comm")
    return any(name.read_text(errors="replace").startswith(("pt_gloo", "gloo")) for name in names)


def barrier() -> None:
    """Wait on the host until every rank is here. Does not wait for work queued on a GPU."""
    any_rank(False)


def all_reduce_(tensor: Tensor, op: str = "sum") -> Tensor:
    """Reduce in place over ranks and return the same tensor; op is "sum", "max" or "min". Same shape on every rank."""
    assert op in _REDUCE_OPS, f"op {op!r}: use one of {', '.join(_REDUCE_OPS)}"
    assert tensor.is_contiguous(), f"all_reduce_ needs a contiguous tensor, got strides {tensor.stride()}"
    if world_size() > 1:
        with torch.no_grad():
            dist.all_reduce(tensor, op=_REDUCE_OPS[op])
    return tensor


def broadcast_(tensor: Tensor, src: int = 0) -> Tensor:
    """Overwrite the tensor in place with rank src's values and return it. Same shape and dtype on every rank."""
    assert tensor.is_contiguous(), f"broadcast_ needs a contiguous tensor, got strides {tensor.stride()}"
    if world_size() > 1:
        with torch.no_grad():
            dist.broadcast(tensor, src=src)
    return tensor


def gather_stack(tensor: Tensor) -> Tensor:
    """Every rank's tensor, detached, as a new (world, *tensor.shape) on every rank. Same shape and dtype on each."""
    tensor = tensor.detach().contiguous()
    parts = [tensor]
    if world_size() > 1:
        parts = [torch.empty_like(tensor) for _ in range(world_size())]
        dist.all_gather(parts, tensor)
    return torch.stack(parts)  # (W, ...)


_waits, _deals = itertools.count(), itertools.count()  # all ranks count alike, as they do in any collective


def wait_for_all() -> None:
    """Wait on the host until every rank is here, however long that takes: for the end of uneven work.

    A collective would give up after TIMEOUT. This asks the store that the ranks have met in. What has started them ends
    all of them when one fails: torchrun, or srun with --kill-on-bad-exit.
    """
    if world_size() == 1:
        return
    store, key = dist.distributed_c10d._get_default_store(), f"provq/wait/{next(_waits)}"
    store.add(key, 1)
    pause = 0.001  # seconds
    while store.add(key, 0) < world_size():
        time.sleep(pause)  # not store.wait: signals must be seen meanwhile
        pause = min(2 * pause, 0.5)
    barrier()  # where rank 0 holds the store, it must not be gone before the others have asked it


def deal_out(count: int) -> Iterator[int]:
    """The numbers below count, each on one rank, in order: whoever asks first gets the next. Collective.

    For pieces of work of uneven length. After its last one, every rank waits until all pieces are done.
    """
    if world_size() == 1:
        yield from range(count)
        return
    store, key = dist.distributed_c10d._get_default_store(), f"provq/deal/{next(_deals)}"
    while (number := store.add(key, 1) - 1) < count:
        yield number
    wait_for_all()


def gather_objects(value: T) -> list[T]:
    """Every rank's value (anything that pickles), in the order of ranks, on every rank. For small things.

    Waits for all ranks first: it is what uneven work ends with.
    """
    wait_for_all()
    values: list[T] = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def any_rank(flag: bool) -> bool:
    """True on every rank when the flag is true on at least one."""
    return bool(all_reduce_(torch.tensor(int(flag)), op="max").item())
