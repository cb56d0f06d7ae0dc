"""Makes the project importable for plain `pytest` too, and keeps tests from fighting over cores."""

import os
import sys
from pathlib import Path

# Before torch is imported, here and in the processes that tests start: on small tensors threads only cost time, and
# the same number everywhere makes results comparable bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LONG = (  # the longest first
    "faults/test_runs.py", "tokenizer/test_train_provq.py", "faults/test_kills.py", "tokenizer/test_attach.py",
    "test_graphs.py", "tokenizer/test_codebook_options.py", "protein/test_train_structures.py",
    "autoregressive/test_train_c2i.py", "test_first_steps.py", "tokenizer/test_provq_distributed.py",
    "evaluations/evidence/test_sweep.py", "tokenizer/test_provq_triton.py", "scripts/test_gpu_check.py",
    "scripts/test_tour.py", "tokenizer/test_worked_example.py", "scripts/test_slurm.py")


def pytest_collection_modifyitems(items):
    """Files that take long go first: begun last, they would leave the other cores without work."""
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.nodeid.partition("::")[0].removeprefix("tests/"), len(LONG)))
