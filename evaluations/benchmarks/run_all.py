"""Runs all benchmarks against other packages and repositories, and says what became slower.

    python evaluations/benchmarks/run_all.py [--peers FOLDER] [--llamagen CHECKOUT] [--out speed.json]
    python evaluations/benchmarks/run_all.py --against speed.json --document PERFORMANCE.md

Peers are packages, of the environment or of --peers (pip install --target FOLDER faiss-cpu scikit-learn
vector-quantize-pytorch), and checkouts; what is missing is named and left out. First nearest codes, k-means, its start
and a quantizer's step: all ways of a case take turns in one process. Shown are medians of seconds (on a CPU of the
process's CPU time too: machines are shared), the median and range of each peer's time over ours within a turn, and how
much a process of its own grew at most, in MiB. Then sampling, training, extraction, shared cores and reading, each its
own program (see programs.py). --document replaces the tables between that file's markers. --against ends with status 1
if something became more than --tolerance times as slow, measured by CPU time on a CPU.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tokenizer.runtime.command import (
    CannotContinue,
    command,
    make_parser,
    refuse_early,
    require_flags_at_least,
    require_flags_positive,
    require_out_file,
)

PROG = "evaluations/benchmarks/run_all.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--peers", type=Path, help="folder of packages, after those of the environment")
    parser.add_argument("--llamagen", type=Path, help="checkout of LlamaGen")
    parser.add_argument("--stb", type=Path, help="checkout of StructTokenBench")
    parser.add_argument("--esm", type=Path, help="checkout of esm, which StructTokenBench imports")
    parser.add_argument("--images", type=Path, help="a .tar of CLASS/NAME.JPEG, to read")
    parser.add_argument("--only", help="cases whose names begin so")
    parser.add_argument("--out", type=Path, help="JSON of all numbers")
    parser.add_argument("--document", type=Path, help="Markdown file with the two markers")
    parser.add_argument("--against", type=Path, help="JSON of an earlier run on the same machine")
    parser.add_argument("--tolerance", type=float, default=1.3, help="times the earlier run's")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="of N and K, to try the command")
    parser.add_argument("--measure-memory", nargs=2, metavar=("CASE", "WAY"), help="print one peak in MiB, no table")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "threads repeats tolerance")
    require_flags_positive(parser, args, "scale")
    return args


if __name__ == "__main__":
    refuse_early(PROG, parse_args)

import torch
from torch import Tensor

from evaluations.benchmarks import peer, programs
from tokenizer import provq
from tokenizer.runtime.files import atomic_write_json, atomic_write_text

OURS = "here"
MARKERS = "<!-- run_all.py: begin -->", "<!-- run_all.py: end -->"
Way = Callable[[], object]

# What is done, N tokens, K codes, D channels.
CASES = [
    *(("nearest codes", *size) for size in ((8192, 1024, 8), (8192, 4096, 8), (8192, 16384, 8), (1024, 262144, 8),
                                            (32768, 4096, 8), (32768, 16384, 8), (8192, 4096, 64),
                                            (4096, 4096, 256))),
    *(("k-means, 10 iterations", *size) for size in ((32768, 1024, 8), (32768, 4096, 8), (262144, 4096, 8),
                                                     (32768, 1024, 64))),
    ("k-means, 20 iterations", 262144, 16384, 8),
    *(("k-means++", *size) for size in ((32768, 1024, 8), (65536, 16384, 8))),
    # What a step costs against K, N and D:
    *(("quantizer step", *size) for size in ((8192, 1024, 8), (8192, 4096, 8), (8192, 16384, 8), (8192, 65536, 8),
                                             (8192, 262144, 8), (1024, 16384, 8), (65536, 16384, 8),
                                             (8192, 4096, 32), (8192, 4096, 64), (8192, 4096, 256))),
]
MOST_PAIRS = 2**28  # of a token and a code: a matrix of more takes more than a GiB


def scaled(scale: float) -> list[tuple[str, int, int, int]]:
    return [(what, max(2, int(n * scale)), max(1, int(k * scale)), d) for what, n, k, d in CASES]


def whole_matrix(x: Tensor, codes: Tensor) -> Tensor:
    """x (N, D), codes (K, D) -> indices (N,) through one N x K matrix of distances, as most quantizers do it."""
    return (x.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * x @ codes.t()).argmin(1)


def step(quantize: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> None:
    """Forward and backward: quantize(x) gives the codes and the loss."""
    x = x.detach().requires_grad_()
    codes, loss = quantize(x)
    (codes.square().mean() + loss).backward()


def ways(case: tuple[str, int, int, int], args: argparse.Namespace) -> tuple[dict[str, Way], list[str]]:
    """How to do the case, ours first, and the peers that are missing."""
    what, n, k, d = case
    device, generator = torch.device(args.device), torch.Generator().manual_seed(0)
    centres = torch.randn(4 * k, d, generator=generator)  # tokens that have clusters
    x = centres[torch.randint(4 * k, (n,), generator=generator)] + 0.3 * torch.randn(n, d, generator=generator)
    x, codes = x.to(device), x[torch.randperm(n, generator=generator)[:k]].to(device)
    if len(codes) < k:
        codes = torch.randn(k, d, generator=generator).to(device)
    found: dict[str, Way] = {}
    missing: list[str] = []

    def package(name: str) -> Any:
        try:
            return importlib.import_module(name)
        except ImportError as error:
            missing.append(f"{name} ({error})")
            return None

    cpu = device.type == "cpu"
    if what == "nearest codes":
        found[OURS] = lambda: provq.nearest_code(x, codes)
        if not cpu and (kernel := package("tokenizer.provq_triton")):
            found["here, Triton"] = lambda: kernel.nearest(x, codes, codes.square().sum(1))
        if n * k <= MOST_PAIRS:
            found["whole matrix"] = lambda: whole_matrix(x, codes)
        if cpu and (faiss := package("faiss")):
            faiss.omp_set_num_threads(args.threads)
            found["faiss"] = lambda: faiss.knn(x.numpy(), codes.numpy(), 1)
    elif what.startswith("k-means,"):
        iters = int(what.split()[1])
        found[OURS] = lambda: provq.kmeans(x, k, iters=iters, start="random")
        if cpu and n * k <= 2**30 and (cluster := package("sklearn.cluster")):
            lloyd = functools.partial(cluster.KMeans, k, init=codes.numpy(), n_init=1, max_iter=iters, tol=0.0,
                                      algorithm="lloyd")
            found["scikit-learn"] = lambda: lloyd().fit(x.numpy())
        if cpu and (faiss := package("faiss")):
            faiss.omp_set_num_threads(args.threads)
            found["faiss"] = lambda: faiss.Kmeans(d, k, niter=iters, max_points_per_centroid=n,
                                                  min_points_per_centroid=1).train(x.numpy())
    elif what == "k-means++":
        found[OURS] = lambda: provq.kmeans(x, k, iters=0)
        if cpu and k <= 4096 and (cluster := package("sklearn.cluster")):
            sample = x[: max(4 * k, 4096)].numpy()  # ours draws from as many
            found["scikit-learn"] = lambda: cluster.kmeans_plusplus(sample, k, random_state=0)
    else:
        ours = provq.VectorQuantizer(k, d).to(device)
        ours.set_codebook_(codes)
        found[OURS] = lambda: step(lambda z: (lambda out: (out.codes, torch.stack([*out.losses.values()]).sum()))(
            ours(z)), x)
        if n * k <= MOST_PAIRS and (lucidrains := package("vector_quantize_pytorch")):
            ema = lucidrains.VectorQuantize(dim=d, codebook_size=k).to(device)
            found["lucidrains EMA"] = lambda: step(lambda z: ema(z[None])[::2], x)
        if args.llamagen is None:
            missing.append("LlamaGen (--llamagen is not given)")
        elif n * k <= MOST_PAIRS:
            theirs = peer.load_module(args.llamagen, "tokenizer/tokenizer_image/vq_model.py").VectorQuantizer(
                k, d, 0.25, 0.0, False, False).to(device)
            found["LlamaGen"] = lambda: step(
                lambda z: (lambda out: (out[0], out[1][0] + out[1][1]))(theirs(z.t()[None, :, :, None])), x)
    return found, missing


def clocks(way: Way) -> tuple[float, float]:
    """Seconds of the clock, and of this process's CPU time."""
    cpu = time.process_time()
    return peer.seconds(way), time.process_time() - cpu


def measure(case: tuple[str, int, int, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way: medians, ratios to ours within a turn, memory."""
    found, missing = ways(case, args)
    for name in missing:
        print(f"{case[0]}: left out, missing: {name}", file=sys.stderr)  # noqa: T201
    print(f"{case[0]}, N={case[1]} K={case[2]} D={case[3]}", file=sys.stderr)  # noqa: T201
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in found}
    for turn in range(args.repeats + 1):
        order = list(found) if turn % 2 else list(found)[::-1]  # who goes first tends to be slower
        for name in order:
            taken = clocks(found[name])
            if turn:  # the first is a warm-up
                turns[name].append(taken)
    which = 1 if args.device == "cpu" else 0
    rows = []
    for name, taken_by in turns.items():
        ratios = sorted(a[which] / b[which] for a, b in zip(taken_by, turns[OURS], strict=True))
        rows.append({"case": case[0], "tokens": case[1], "codes": case[2], "dim": case[3], "way": name,
                     "seconds": statistics.median(t[0] for t in taken_by),
                     "cpu_seconds": statistics.median(t[1] for t in taken_by),
                     "ratio": statistics.median(ratios), "ratio_least": ratios[0], "ratio_most": ratios[-1],
                     "peak_mib": peak_mib(case, name, args)})
    return rows


def peak_mib(case: tuple[str, int, int, int], way: str, args: argparse.Namespace) -> float:
    """How far a process that does this once grows while it does, in MiB: of the device's memory on a GPU."""
    words = [sys.executable, str(Path(__file__).resolve()), "--measure-memory", str(scaled(args.scale).index(case)),
             way, "--threads", str(args.threads), "--device", args.device, "--scale", str(args.scale)]
    for flag in ("peers", "llamagen"):
        if getattr(args, flag) is not None:
            words += [f"--{flag}", str(getattr(args, flag))]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CannotContinue(f"the memory of {way} at {case} could not be measured: {done.stderr[-500:]}")
    return float(done.stdout.split()[-1])


def _resident(field: str) -> int:
    """VmHWM (peak) or VmRSS (now) of this process in KiB. Not getrusage: it holds the peak of the process before."""
    match = re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert match is not None, "Linux has these fields"
    return int(match[1])


def grown_mib(way: Way, device: str) -> float:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        way()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak starts over
    before = _resident("VmRSS")
    way()
    return max(0, _resident("VmHWM") - before) / 2**10


def machine(args: argparse.Namespace) -> dict[str, Any]:
    name = platform.processor() or platform.machine()
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
    elif match := re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8")):
        name = match[1]
    return {"device": name, "cores": os.cpu_count(), "threads": args.threads, "torch": torch.__version__,
            "provq": provq.__version__, "load": os.getloadavg()[0], "repeats": args.repeats, "scale": args.scale,
            "date": datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()}


def table(result: dict[str, Any]) -> str:
    """Markdown: which machine, and a line for each way of each case."""
    of = result["machine"]
    lines = [f"{of['device']}, {of['cores']} cores, {of['threads']} threads, load {of['load']:.1f}, "
             f"torch {of['torch']}; medians of {of['repeats']}, {of['date']}.", "",
             *(["| case | N | K | D | way | s | CPU s | its time / ours (range) | MiB |", "|" + "---|" * 9]
               if result["rows"] else [])]
    for row in result["rows"]:
        ratio = f"{row['ratio']:.2f} ({row['ratio_least']:.2f} to {row['ratio_most']:.2f})"
        ratio = "" if row["way"] == OURS else ratio
        lines.append(f"| {row['case']} | {row['tokens']} | {row['codes']} | {row['dim']} | {row['way']} "
                     f"| {row['seconds']:.4f} | {row['cpu_seconds']:.4f} | {ratio} | {row['peak_mib']:.0f} |")
    if result["programs"]:
        lines += [*([""] if result["rows"] else []), programs.table(result["programs"])]
    return "\n".join(lines)


def put_table(document: str, text: str) -> str:
    """document with text between the markers. ValueError: it lacks them."""
    begin, end = MARKERS
    if document.count(begin) != 1 or document.count(end) != 1 or document.index(begin) > document.index(end):
        raise ValueError(f"--document needs the lines {begin!r} and {end!r}, once each, in this order")
    return f"{document[: document.index(begin) + len(begin)]}\n{text}\n{document[document.index(end):]}"


def regressions(new: dict[str, Any], old: dict[str, Any], tolerance: float) -> list[str]:
    """A line for each of our ways that takes more than tolerance times what it took. ValueError: not comparable."""
    for field in ("device", "threads", "scale"):
        if new["machine"][field] != old["machine"][field]:
            raise ValueError(f"--against was measured with {field} {old['machine'][field]!r}, this run with "
                             f"{new['machine'][field]!r}: repeat it there")
    identify = ("case", "tokens", "codes", "dim", "way")
    before = {tuple(row[f] for f in identify): row for row in old["rows"]}
    clock = "cpu_seconds" if new["clock"] == "cpu" else "seconds"
    lines = []
    for row in new["rows"]:
        was = before.get(tuple(row[f] for f in identify))
        if row["way"] == OURS and was is not None and row[clock] > tolerance * was[clock]:
            lines.append(f"slower: {row['case']} N={row['tokens']} K={row['codes']} D={row['dim']}: "
                         f"{row[clock]:.4f} s, was {was[clock]:.4f} s")
    return lines + programs.regressions(new["programs"], old["programs"], tolerance)


def run(args: argparse.Namespace) -> None:
    """ValueError: --out, --document, --against, --llamagen. CannotContinue: something became slower."""
    if args.peers is not None:
        if not args.peers.is_dir():
            raise ValueError(f"--peers {args.peers} is no folder; make it with pip install --target")
        sys.path.append(str(args.peers.resolve()))
    torch.set_num_threads(args.threads)
    if args.measure_memory is not None:
        index, way = args.measure_memory
        print(grown_mib(ways(scaled(args.scale)[int(index)], args)[0][way], args.device))  # noqa: T201
        return
    if args.out is not None:
        require_out_file(args.out)
    old = None if args.against is None else json.loads(args.against.read_text(encoding="utf-8"))
    if args.document is not None:
        put_table(args.document.read_text(encoding="utf-8"), "")  # before any work
    cases = [case for case in scaled(args.scale) if args.only is None or case[0].startswith(args.only)]
    names = [*dict.fromkeys(case[0] for case in CASES), *(program[0] for program in programs.PROGRAMS)]
    if args.only is not None and not any(name.startswith(args.only) for name in names):
        raise ValueError(f"--only {args.only!r} begins none of {', '.join(names)}")
    result: dict[str, Any] = {"machine": machine(args), "clock": "cpu" if args.device == "cpu" else "wall",
                              "rows": [], "programs": []}
    # Kept as they come: an hour's numbers are not lost with the last of them.
    for field, found in (*(("rows", functools.partial(measure, case, args)) for case in cases),
                         *(("programs", functools.partial(programs.run_program, program, args))
                           for program in programs.PROGRAMS)):
        result[field] += found()
        if args.out is not None:
            atomic_write_json(args.out, result)
    print(table(result))  # noqa: T201
    if args.document is not None:
        atomic_write_text(args.document, put_table(args.document.read_text(encoding="utf-8"), table(result)))
    if old is not None and (slower := regressions(result, old, args.tolerance)):
        raise CannotContinue("\n".join(slower))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    warnings.filterwarnings("ignore", category=Warning, module="sklearn")  # of the iterations, which are the point
    with command(PROG):
        run(args)


if __name__ == "__main__":
    main()
