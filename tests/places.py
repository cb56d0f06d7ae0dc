"""Where tests find things: the project, golden numbers, helper programs, and real data beside the checkout."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
WORKERS = ROOT / "tests" / "workers"

# Real images and proteins are no part of the project: tests that read them run where they lie beside the checkout.
IMAGES = ROOT.parent / "shared" / "data" / "images"
PROTEINS = ROOT.parent / "shared" / "data" / "proteins"
CASES = ROOT.parent / "shared" / "cases"  # small inputs that were once misread
needs_cases = pytest.mark.skipif(not CASES.is_dir(), reason=f"no cases in {CASES}")
needs_images = pytest.mark.skipif(not IMAGES.is_dir(), reason=f"no real images in {IMAGES}")
needs_proteins = pytest.mark.skipif(not PROTEINS.is_dir(), reason=f"no real structures in {PROTEINS}")
