"""Makes the project importable for plain `pytest` too (`python -m pytest` adds only the current directory)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
