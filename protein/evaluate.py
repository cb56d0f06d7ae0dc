"""Measures structure tokenizers on a folder of structures, such as CASP14's or CAMEO's: the columns of Table 4, and how
well structures are reconstructed.

    python protein/evaluate.py casp14/ --ckpt runs/vanilla runs/provq --out casp14.json
    torchrun --nproc_per_node=8 protein/evaluate.py cameo/ --ckpt runs/provq

Usage and perplexity depend on whether codes are counted over the whole set (pooled) or protein by protein, and the
published tables do not say which they are. Both are measured:

    usage                  share of the codes that occur; usage_per_chain: mean of the chains' shares, which a short
                           chain bounds; StructTokenBench's code at batch size 1 computes that
    perplexity             exp of the entropy of the codes' frequencies; perplexity_per_chain: mean of the chains'
    normalized_perplexity  perplexity / K, likewise; StructTokenBench's "normalized entropy" is entropy / K
    code_distance          mean Euclidean distance of the effective codes, unused ones included; code_distance_used:
                           of the codes that occur
    rmsd, lddt, tm         of the decoded structures, means over chains: see validation.reconstruction_metrics; null
                           where no chain has them, and for tm with --no-tm

Structures are what encode.py takes. TM-align takes most of the time on long chains: with --num-workers it runs in
processes of its own, beside the tokenizer.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack
from multiprocessing import get_context
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from protein.choices import MAX_RESIDUES
from protein.reading_flags import WHAT, add_reading_flags, check_reading_flags, require_structures
from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least, require_out_file
from tokenizer.stored import require_stored

PROG = "protein/evaluate.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("structures", nargs="+", type=Path, metavar="FILE", help=WHAT)
    add("--ckpt", type=Path, nargs="+", required=True, metavar="PATH", help="tokenizers: see encode.py")
    add("--out", type=Path, default=Path("structure_metrics.json"), help="(default: structure_metrics.json)")
    add_reading_flags(parser)
    add("--no-tm", action="store_true", help="leave out the TM-score")
    add("--max-length", type=int, default=600, help="leave out longer chains (default: 600, as StructTokenBench)")
    add("--max-bad-structures", type=int, default=0, help="unreadable files to leave out before stopping (default: 0)")
    add("--max-residues", type=int, default=MAX_RESIDUES, help=f"of a batch, padding included ({MAX_RESIDUES})")
    add("--weights", choices=("auto", "model", "ema"), default="auto", help="of each --ckpt; auto: the EMA if any")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "max_length max_residues")
    require_flags_at_least(parser, args, 0, "max_bad_structures")
    check_reading_flags(parser, args)
    return args


def check(args: argparse.Namespace) -> None:
    """ValueError, FileNotFoundError: a report that cannot be written, structures or models that are not there."""
    require_out_file(args.out, inputs=[*args.structures, *args.ckpt])
    require_structures(args.structures)
    for path in args.ckpt:
        require_stored(path, args.weights, "structure tokenizer")


if __name__ == "__main__":
    refuse_early(PROG, parse_args, check)

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from protein.inference import decode_tokens, encode_chains, pad
from protein.pretrained import load_structure_tokenizer
from protein.reading_flags import reading_options
from protein.structure_io import Chain
from protein.structure_sources import Reading, collected, list_sources, read_sources, reading_workers
from protein.validation import METRICS, reconstruction_metrics, tm_of_chain
from tokenizer.code_meter import mean_pairwise_distance
from tokenizer.provq import code_statistics
from tokenizer.runtime import distributed
from tokenizer.runtime.files import atomic_write_text

COLUMNS = ("usage", "usage_per_chain", "normalized_perplexity", "normalized_perplexity_per_chain", "code_distance",
           "rmsd", "lddt", "tm")  # of the printed table; --out has all
CHUNK = 256  # structures whose chains are in memory at a time


class Tally:
    """What is measured of one tokenizer by this process, chain by chain; memory holds a few numbers of each."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.counts = torch.zeros(tokenizer.num_codes, dtype=torch.int64)
        self.each: dict[str, list[float]] = {"usage": [], "perplexity": []}
        self.found: list[dict[str, float | Future[float]]] = []

    def result(self) -> dict[str, Any]:
        """Collective: see the head of this file."""
        rows = [{name: value.result() if isinstance(value, Future) else value for name, value in row.items()}
                for row in self.found]
        parts = distributed.gather_objects((self.counts, self.each, rows))
        each = {name: [value for _, part, _ in parts for value in part[name]] for name in self.each}
        out = codebook_metrics(torch.stack([counts for counts, _, _ in parts]).sum(0), each,
                               self.tokenizer.codebook().float())
        rows = [row for *_, part in parts for row in part]
        if rows:
            known = {name: [row[name] for row in rows if np.isfinite(row.get(name, np.nan))] for name in METRICS}
            out |= {name: float(np.mean(values)) if values else None for name, values in known.items()}
            out["rmsd_median"] = float(np.median(known["rmsd"])) if known["rmsd"] else None
        return out


def codebook_metrics(counts: Tensor, each: dict[str, list[float]], codebook: Tensor) -> dict[str, Any]:
    """counts (K,) int64 of all chains' codes, usage and perplexity of each chain, codebook (K, D): see the head of this
    file.
    """
    pooled = code_statistics(counts)
    out: dict[str, Any] = {"chains": len(each["usage"]), "tokens": int(counts.sum())}
    for name in ("usage", "perplexity"):
        out |= {name: pooled[name], f"{name}_per_chain": float(np.mean(each[name]))}
    for suffix in ("", "_per_chain"):
        out[f"normalized_perplexity{suffix}"] = out[f"perplexity{suffix}"] / len(counts)
    used = codebook[counts.to(codebook.device) > 0]
    out["code_distance"] = mean_pairwise_distance(codebook)
    out["code_distance_used"] = mean_pairwise_distance(used) if len(used) > 1 else 0.0
    return out


def measure(tally: Tally, chains: Sequence[Chain], args: argparse.Namespace, device: torch.device,
            pool: ProcessPoolExecutor | None) -> None:
    """Decoders that a checkpoint lacks give no reconstruction metrics. pool: for TM-scores; None: this process."""
    tokenizer = tally.tokenizer
    tokens = encode_chains(tokenizer, chains, device, max_residues=args.max_residues)
    for ids in tokens:
        used = torch.bincount(torch.as_tensor(ids[ids >= 0]), minlength=tokenizer.num_codes)
        tally.counts += used
        statistics = code_statistics(used)
        for name, each in tally.each.items():
            each.append(statistics[name])
    if not tokenizer.can_decode:
        return
    decoded = decode_tokens(tokenizer, tokens, device, max_residues=args.max_residues)
    for chain, coords in zip(chains, decoded, strict=True):
        found = reconstruction_metrics(pad([coords], np.nan), torch.as_tensor(chain.coords)[None],
                                       torch.as_tensor(chain.mask)[None], tm=not (args.no_tm or pool))
        row: dict[str, float | Future[float]] = {name: value.item() for name, value in found.items()}
        if pool and not args.no_tm:
            row["tm"] = pool.submit(tm_of_chain, coords[chain.mask, 1], chain.coords[chain.mask, 1])
        tally.found.append(row)


def chunks(readings: Iterator[Reading], args: argparse.Namespace, left: dict[str, Any], shown: Any
           ) -> Iterator[list[Chain]]:
    """Chains of at most --max-length, some at a time; left counts and names the others."""
    while some := list(itertools.islice(readings, CHUNK)):
        kept = []
        for reading in some:
            for note in reading.notes:
                tqdm.write(f"note: {note}", file=sys.stderr)
            left["filtered"] += reading.filtered
            if reading.failure and not reading.filtered:
                left["unreadable"].append(reading.failure)
            fit = [chain for chain in reading.chains if len(chain) <= args.max_length]
            left["longer"] += len(reading.chains) - len(fit)
            kept += fit
        if len(left["unreadable"]) <= args.max_bad_structures:
            yield kept
        shown.update(len(some))


def evaluate(args: argparse.Namespace, device: torch.device) -> None:
    """Collective. ValueError, OSError: mistakes in flags and files."""
    check(args)
    with collected() as notes:
        sources = list_sources(args.structures, args.ids)
    for note in notes:
        distributed.print0(f"note: {note}")
    tallies = [Tally(load_structure_tokenizer(path, device, args.weights)) for path in args.ckpt]
    mine = sources[distributed.rank() :: distributed.world_size()]
    left: dict[str, Any] = {"unreadable": [], "longer": 0, "filtered": 0}
    workers = reading_workers(len(mine), args.num_workers, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    with ExitStack() as stack:
        pool = None
        if workers and not args.no_tm:
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
        readings = read_sources(mine, num_workers=workers, **reading_options(args))
        with tqdm(total=len(mine), unit="file", disable=None if distributed.is_main() else True) as shown:
            for chains in chunks(readings, args, left, shown):
                for tally in tallies:
                    measure(tally, chains, args, device, pool)
        gathered = distributed.gather_objects(left)
        unreadable = [reason for part in gathered for reason in part["unreadable"]]
        if len(unreadable) > args.max_bad_structures:
            raise ValueError(f"{len(unreadable)} structure file(s) cannot be read, --max-bad-structures "
                             f"{args.max_bad_structures} are tolerated: {'; '.join(unreadable[:20])}")
        if not any(distributed.gather_objects(len(tallies[0].each["usage"]))):
            raise ValueError(f"no chain of at most --max-length {args.max_length} residues")
        report: dict[str, Any] = {"structures": [str(path) for path in args.structures], "max_length": args.max_length,
                                  "longer_chains_left_out": sum(part["longer"] for part in gathered),
                                  "filtered": sum(part["filtered"] for part in gathered), "unreadable": unreadable,
                                  "tokenizers": {}}
        for path, tally in zip(args.ckpt, tallies, strict=True):
            report["tokenizers"][str(path)] = tally.result() | {
                "tokenizer_hash": tally.tokenizer.hash(), "step": tally.tokenizer.step,
                "codes": tally.tokenizer.num_codes}
    if distributed.is_main():
        args.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(args.out, json.dumps(report, indent=1, allow_nan=False) + "\n")
        distributed.print0(table(report["tokenizers"]) + f"\nwrote {args.out}")


def table(results: dict[str, dict[str, Any]]) -> str:
    """Markdown; what is absent or None is left empty."""
    lines = ["| tokenizer | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join("" if row.get(c) is None else f"{row[c]:.4g}" for c in COLUMNS) + " |"
              for name, row in results.items()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        evaluate(args, distributed.init(args.device))


if __name__ == "__main__":
    main()
