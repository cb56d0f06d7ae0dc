"""Flags of the evaluations that compare features; image_sets.py has what they mean. No torch."""

from __future__ import annotations

import argparse
import os
from pathlib import Path


def default_cache() -> Path:
    """Where features are kept: $XDG_CACHE_HOME/provq/features, or ~/.cache/provq/features."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "provq" / "features"


def add_extractor_flags(parser: argparse.ArgumentParser) -> None:
    """--features, --inception-weights, --cache-dir, --no-cache."""
    parser.add_argument("--features", default="inception", metavar="WHICH",
                        help="inception, timm:NAME:PATH (that model, with this file of weights), or torchscript:PATH "
                             "(default: inception)")
    parser.add_argument("--inception-weights", type=Path, metavar="FILE", help="weights-inception-2015-12-05-6726825d."
                        "pth of torch-fidelity's release v0.2.0 (default: in torch hub's cache)")
    parser.add_argument("--cache-dir", type=Path, default=default_cache(), metavar="FOLDER",
                        help="where features are kept (default: provq/features in the user's cache)")
    parser.add_argument("--no-cache", action="store_true", help="keep no features")
