"""Times all metrics of generation.py on random features of the sizes that ImageNet evaluations have.

    python evaluations/benchmarks/distribution.py [--samples 10000] [--threads 2]

Prints seconds per metric, once each, and the peak memory of the process.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least

PROG = "evaluations/benchmarks/distribution.py"
LEAST = 1000  # KID_SUBSET_SIZE of evaluations/distribution.py, which imports torch


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    for name, default in (("samples", 10_000), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, LEAST, "samples")
    require_flags_at_least(parser, args, 1, "threads")
    return args


if __name__ == "__main__":
    refuse_early(PROG, parse_args)

import torch
from torch import Tensor

from evaluations import distribution

assert LEAST == distribution.KID_SUBSET_SIZE
POOLED, SPATIAL, CLASSES = 2048, 2023, 1008  # of Inception-v3


def frechet(first: Tensor, second: Tensor) -> float:
    gaussians = [distribution.gaussian_statistics(side) for side in (first, second)]
    return distribution.frechet_distance(*gaussians)


def measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    reference, samples = (torch.randn(args.samples, POOLED).relu_() for _ in range(2))
    spatial = [torch.randn(args.samples, SPATIAL).relu_() for _ in range(2)]
    logits = torch.randn(args.samples, CLASSES)
    metrics: dict[str, Callable[[], object]] = {
        "FID": lambda: frechet(reference, samples),
        "sFID": lambda: frechet(*spatial),
        "Inception Score": lambda: distribution.inception_score(logits),
        "precision, recall": lambda: distribution.precision_recall(reference, samples),
        "KID": lambda: distribution.kid(reference, samples),
    }
    print(f"{args.samples} x {POOLED} against as many, {args.threads} threads, torch {torch.__version__}")  # noqa: T201
    total = 0.0
    for name, metric in metrics.items():
        began = time.perf_counter()
        metric()
        taken = time.perf_counter() - began
        total += taken
        print(f"{name:20s} {taken:7.1f} s", flush=True)  # noqa: T201
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{'all':20s} {total:7.1f} s   peak memory {peak:.1f} GiB")  # noqa: T201


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        measure(args)


if __name__ == "__main__":
    main()
