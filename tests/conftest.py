"""Makes the project importable for plain `pytest` too, and keeps tests from fighting over cores."""

import os
import sys
from pathlib import Path

# Before torch is imported, here and in the processes that tests start: on small tensors threads only cost time, and
# the same number everywhere makes results comparable bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LONG = ("faults/test_kills.py", "test_first_steps.py", "scripts/test_tour.py", "scripts/test_slurm.py",
        "tokenizer/test_codebook_options.py", "protein/test_train_structures.py", "tokenizer/test_provq_distributed.py")


def pytest_collection_modifyitems(items):
    """Files of few tests that take long go first: begun last, they would leave the other cores without work."""
    items.sort(key=lambda item: item.nodeid.partition("::")[0].removeprefix("tests/") not in LONG)
