"""Makes the project importable for plain `pytest` too, and keeps tests from fighting over cores."""

import os
import sys
from pathlib import Path

# Before torch is imported, here and in the processes that tests start: on small tensors threads only cost time, and
# the same number everywhere makes results comparable bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
