"""Times the nearest-code search against the usual way, the whole N x K distance matrix at once.

    python evaluations/benchmarks/code_search.py [--tokens 8192] [--codes 16384] [--dim 8] [--threads 2]

Prints seconds (median of the repeats) and the peak size of the distance block. Same indices are asserted, up to ties.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch import Tensor

from tokenizer import provq
from tokenizer.runtime.command import command, make_parser, require_flags_at_least

PROG = "evaluations/benchmarks/code_search.py"


def whole_matrix(x: Tensor, codebook: Tensor) -> Tensor:
    """x (N, D), codebook (K, D) -> indices (N,), through one N x K matrix of |x|^2 + |e|^2 - 2 x e."""
    distance = x.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * x @ codebook.t()
    return distance.argmin(1)


def seconds(function: Callable[[], Tensor], repeats: int, device: torch.device) -> float:
    times = []
    for _ in range(repeats + 1):  # the first is a warm-up
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def measure(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    x, codebook = torch.randn(args.tokens, args.dim, device=device), torch.randn(args.codes, args.dim, device=device)
    ways = {"whole matrix": lambda: whole_matrix(x, codebook),
            "provq.nearest_code": lambda: provq.nearest_code(x, codebook)}
    limit = provq.CPU_SEARCH_ELEMENTS if device.type == "cpu" else provq.GPU_SEARCH_ELEMENTS
    blocks = {"whole matrix": args.tokens * args.codes, "provq.nearest_code": min(limit, args.tokens * args.codes)}
    differ = (ways["whole matrix"]() != ways["provq.nearest_code"]()).double().mean().item()
    assert differ <= 1e-3, f"the searches differ in {differ:.2%} of the codes"
    print(f"N={args.tokens} K={args.codes} D={args.dim} on {device}, {args.threads} threads, torch {torch.__version__}")  # noqa: T201
    for name, way in ways.items():
        taken = seconds(way, args.repeats, device)
        print(f"{name:20s} {taken:8.4f} s   distance block {blocks[name] * 4 / 2**20:8.1f} MiB")  # noqa: T201


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(PROG, __doc__)
    for name, default in (("tokens", 8192), ("codes", 16384), ("dim", 8), ("threads", 2), ("repeats", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "tokens codes dim threads repeats")
    with command(PROG):
        measure(args)


if __name__ == "__main__":
    main()
