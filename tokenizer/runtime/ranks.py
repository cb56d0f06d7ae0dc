"""Which of several processes this one is, asked without importing torch: see distributed.py, which makes the group."""

import os
import sys
from typing import Any

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


def launched() -> bool:
    """Whether torchrun started this process."""
    return all(name in os.environ for name in TORCHRUN_VARIABLES)


def started_together() -> int:
    """How many processes torchrun started, also before they have joined in a group; 1 without it."""
    return max(world_size(), int(os.environ.get("WORLD_SIZE", 1)))


def _group() -> Any:
    dist = sys.modules.get("torch.distributed")  # not imported: nobody has made a group
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def rank() -> int:
    group = _group()
    return int(group.get_rank()) if group else 0


def world_size() -> int:
    group = _group()
    return int(group.get_world_size()) if group else 1


def is_main() -> bool:
    return rank() == 0


def print0(*args: Any, **kwargs: Any) -> None:
    """`print` on rank 0 only, flushed so that lines of a redirected log appear when they happen."""
    if is_main():
        print(*args, **{"flush": True, **kwargs})
