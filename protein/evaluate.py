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
                           where no chain has them
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from protein.inference import MAX_RESIDUES, decode_tokens, encode_chains, list_structures, pad, read_chains
from protein.pretrained import load_structure_tokenizer
from protein.structure_io import Chain
from protein.validation import METRICS, reconstruction_metrics
from tokenizer.code_meter import mean_pairwise_distance
from tokenizer.provq import code_statistics
from tokenizer.runtime import distributed
from tokenizer.runtime.checkpoint import atomic_write_text
from tokenizer.runtime.command import command, make_parser, require_flags_at_least, require_out_file

PROG = "protein/evaluate.py"
COLUMNS = ("usage", "usage_per_chain", "normalized_perplexity", "normalized_perplexity_per_chain", "code_distance",
           "rmsd", "lddt", "tm")  # of the printed table; --out has all


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("structures", nargs="+", type=Path, metavar="FILE", help="structure files, and folders of them")
    add("--ckpt", type=Path, nargs="+", required=True, metavar="PATH", help="tokenizers: see encode.py")
    add("--out", type=Path, default=Path("structure_metrics.json"), help="(default: structure_metrics.json)")
    add("--max-length", type=int, default=600, help="leave out longer chains (default: 600, as StructTokenBench)")
    add("--max-bad-structures", type=int, default=0, help="unreadable files to leave out before stopping (default: 0)")
    add("--max-residues", type=int, default=MAX_RESIDUES, help=f"of a batch, padding included ({MAX_RESIDUES})")
    add("--weights", choices=("auto", "model", "ema"), default="auto", help="of each --ckpt; auto: the EMA if any")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "max_length max_residues")
    require_flags_at_least(parser, args, 0, "max_bad_structures")
    return args


def codebook_metrics(counts: Tensor, codebook: Tensor) -> dict[str, float]:
    """counts (chains, K) int64 of each chain's codes, codebook (K, D): see the head of this file."""
    pooled = code_statistics(counts.sum(0))
    each = [code_statistics(row) for row in counts if row.any()]
    out: dict[str, float] = {"chains": len(each), "tokens": int(counts.sum())}
    for name in ("usage", "perplexity"):
        out |= {name: pooled[name], f"{name}_per_chain": float(np.mean([row[name] for row in each]))}
    for suffix in ("", "_per_chain"):
        out[f"normalized_perplexity{suffix}"] = out[f"perplexity{suffix}"] / counts.shape[1]
    used = codebook[counts.sum(0).to(codebook.device) > 0]
    out["code_distance"] = mean_pairwise_distance(codebook)
    out["code_distance_used"] = mean_pairwise_distance(used) if len(used) > 1 else 0.0
    return out


def measure(tokenizer: Any, chains: Sequence[Chain], args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Collective. chains: this process's share. Decoders that a checkpoint lacks give no reconstruction metrics."""
    shown = tqdm(total=2 * len(chains), unit="chain", disable=None if distributed.is_main() else True)
    tokens = encode_chains(tokenizer, chains, device, max_residues=args.max_residues, progress=shown.update)
    counts = torch.stack([torch.bincount(torch.as_tensor(t[t >= 0]), minlength=tokenizer.num_codes) for t in tokens]) \
        if tokens else torch.zeros(0, tokenizer.num_codes, dtype=torch.int64)
    found: list[dict[str, float]] = []
    if tokenizer.can_decode:
        decoded = decode_tokens(tokenizer, tokens, device, max_residues=args.max_residues, progress=shown.update)
        for chain, coords in zip(chains, decoded, strict=True):
            values = reconstruction_metrics(pad([coords], np.nan), torch.as_tensor(chain.coords)[None],
                                            torch.as_tensor(chain.mask)[None])
            found.append({name: value.item() for name, value in values.items()})
    shown.close()
    parts = distributed.gather_objects((counts, found))
    out: dict[str, Any] = codebook_metrics(torch.cat([part for part, _ in parts]), tokenizer.codebook().float())
    rows = [row for _, part in parts for row in part]
    if rows:
        known = {name: [row[name] for row in rows if np.isfinite(row[name])] for name in METRICS}
        out |= {name: float(np.mean(values)) if values else None for name, values in known.items()}
        out["rmsd_median"] = float(np.median(known["rmsd"])) if known["rmsd"] else None
    return out


def evaluate(args: argparse.Namespace, device: torch.device) -> None:
    """Collective. ValueError, OSError: mistakes in flags and files."""
    require_out_file(args.out)
    files = list_structures(args.structures)
    tokenizers = [load_structure_tokenizer(path, device, args.weights) for path in args.ckpt]
    rank, world = distributed.rank(), distributed.world_size()
    with tqdm(total=len(files[rank::world]), unit="file", disable=None if distributed.is_main() else True) as shown:
        chains, reasons = read_chains(files[rank::world], max_bad=args.max_bad_structures, progress=shown.update)
    kept = [chain for chain in chains if len(chain) <= args.max_length]
    left_out = sum(distributed.gather_objects(len(chains) - len(kept)))
    if not any(distributed.gather_objects(len(kept))):
        raise ValueError(f"no chain of at most --max-length {args.max_length} residues")
    unreadable = [reason for part in distributed.gather_objects(reasons) for reason in part]
    report: dict[str, Any] = {"structures": [str(path) for path in args.structures], "max_length": args.max_length,
                              "longer_chains_left_out": left_out, "unreadable": unreadable, "tokenizers": {}}
    for path, tokenizer in zip(args.ckpt, tokenizers, strict=True):
        report["tokenizers"][str(path)] = measure(tokenizer, kept, args, device) | {
            "tokenizer_hash": tokenizer.hash(), "codes": tokenizer.num_codes}
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
