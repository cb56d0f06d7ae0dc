"""Times a quantizer's forward and backward, and the search in it, where cores or a batch are shared.

    python evaluations/benchmarks/sharing.py

threads: the search with two threads against one, alone and beside busy processes (--busy), by the clock on the wall;
above 1 the second thread helps. processes: a step of two processes that train together (DDP over gloo, half of the
tokens each, one thread each) against one process with all tokens, by the clock too; 2 is what there is to gain.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least

PROG = "evaluations/benchmarks/sharing.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    for name, default in (("tokens", 8192), ("busy", 4), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="JSON of what was measured")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 2, "tokens")
    require_flags_at_least(parser, args, 1, "repeats")
    require_flags_at_least(parser, args, 0, "busy")
    return args


if __name__ == "__main__":
    refuse_early(PROG, parse_args)

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from evaluations.benchmarks import peer
from tokenizer import provq

CODES, DIM = (1024, 16384, 65536), 8
QUANTIZERS = ("vq", "ema")


def _spin() -> None:
    while True:
        pass


def threads(args: argparse.Namespace, busy: int) -> list[dict[str, Any]]:
    """A row per number of codes: two threads and one in turns, beside so many processes that compute."""
    others = [mp.get_context("spawn").Process(target=_spin, daemon=True) for _ in range(busy)]
    for other in others:
        other.start()
    rows = []
    try:
        for codes in CODES:
            x, table = torch.randn(args.tokens, DIM), torch.randn(codes, DIM)
            searches = -(-(2**28) // (len(x) * len(table)))  # long beside a scheduler's slices

            def search(count: int, x: torch.Tensor = x, table: torch.Tensor = table, searches: int = searches) -> None:
                torch.set_num_threads(count)
                for _ in range(searches):
                    provq.nearest_code(x, table)

            times = peer.compare(lambda search=search: search(2), lambda search=search: search(1),  # type: ignore[misc]
                                 args.repeats)
            beside = f"beside {busy} busy processes" if busy else "alone"
            rows.append(peer.report(f"search, 2 threads against 1, {beside}, K={codes}", "tokens",
                                    args.tokens * searches, *times))
    finally:
        for other in others:
            other.terminate()
            other.join()
    return rows


def _train(rank: int, size: int, tokens: int, name: str, codes: int, steps: int, rendezvous: str, out: str) -> None:
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
    torch.manual_seed(0)
    model: Any = provq.ProVQ(provq.make_quantizer(name, codes, DIM), provq.Curriculum(0, 0), channel_dim=-1)
    core = torch.nn.Sequential(torch.nn.Linear(DIM, DIM), model)
    net = DistributedDataParallel(core) if size > 1 else core
    x, times = torch.randn(tokens // size, DIM), []
    for step in range(steps + 2):
        model.set_step(step)
        began = time.perf_counter()
        found = net(x)
        (found.quantized.square().mean() + found.loss).backward()
        core.zero_grad()
        times.append(time.perf_counter() - began)
    if rank == 0:
        torch.save(times[2:], out)
    if size > 1:
        dist.barrier()  # a process that ends early takes its gloo connections with it
        os._exit(0)     # and a thread of gloo can abort an interpreter that ends in order


def _steps(size: int, tokens: int, name: str, codes: int, steps: int) -> list[float]:
    """Seconds of each step, of the first of `size` processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "times.pt")
        context = mp.get_context("spawn")
        workers = [context.Process(target=_train, args=(rank, size, tokens, name, codes, steps, f"{folder}/meet", out))
                   for rank in range(size)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if any(worker.exitcode for worker in workers):
            raise RuntimeError(f"a process of {size} ended with {[worker.exitcode for worker in workers]}")
        return list(torch.load(out))


def processes(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    for name in QUANTIZERS:
        for codes in CODES:
            times = [_steps(size, args.tokens, name, codes, 4 * args.repeats) for size in (2, 1)]
            rows.append(peer.report(f"step of {name}, 2 processes against 1, K={codes}", "tokens", args.tokens, *times))
    return rows


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows = threads(args, 0) + (threads(args, args.busy) if args.busy else [])
    return rows + processes(args)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        peer.keep(args.out, measure(args))


if __name__ == "__main__":
    main()
