"""Turns tokens back into protein structures.

    python protein/decode.py tokens.fasta --ckpt runs/protein-paper --out structures/
    python protein/decode.py tokens.npz --ckpt runs/protein-paper --out structures/ --reference predictions/

Reads what encode.py wrote, or names and tokens of another program (see token_files.py), and writes one file per chain:
N, CA and C, with the sequence and residue numbers that the tokens came with. --reference compares them with the
structures that were encoded: RMSD, lDDT and TM-score of every chain in OUT/metrics.json.
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
import numpy.typing as npt
import torch
from tqdm import tqdm

from protein.inference import MAX_RESIDUES, decode_tokens, list_structures, read_chains
from protein.pretrained import load_structure_tokenizer
from protein.structure_io import ATOMS, Chain, write_structure
from protein.token_files import TokenChain, read_tokens
from protein.validation import METRICS, reconstruction_metrics
from tokenizer.runtime import distributed
from tokenizer.runtime.checkpoint import atomic_write_text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="protein/decode.py", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("tokens", nargs="+", type=Path, metavar="FILE", help=".fasta, .jsonl or .npz files")
    add("--ckpt", type=Path, required=True, metavar="PATH", help="the tokenizer: run folder, checkpoint or export of "
        "this project, or weights of StructTokenBench")
    add("--out", type=Path, required=True, metavar="FOLDER", help="to write to")
    add("--format", choices=("pdb", "cif"), default="pdb", help="(default: pdb)")
    add("--reference", type=Path, nargs="+", metavar="FILE", help="the structures that were encoded, to compare with")
    add("--other-tokenizer", action="store_true", help="go on although the tokens are of another tokenizer")
    add("--max-residues", type=int, default=MAX_RESIDUES, help=f"of a batch, padding included ({MAX_RESIDUES})")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    args = parser.parse_args(argv)
    if args.max_residues < 1:
        parser.error(f"--max-residues is {args.max_residues}; it must be at least 1")
    return args


def check_tokens(entries: Sequence[TokenChain], tokenizer: Any, args: argparse.Namespace) -> None:
    """ValueError, naming the chain: tokens of another tokenizer, no codes, names that are no file names or twice."""
    digest, seen = tokenizer.hash(), set()
    for entry in entries:
        if entry.tokenizer not in ("", digest) and not args.other_tokenizer:
            raise ValueError(f"chain {entry.label} has tokens of another tokenizer ({entry.tokenizer[:8]}) than --ckpt "
                             f"{args.ckpt} ({digest[:8]}); name the right one, or pass --other-tokenizer")
        if entry.tokens.max() >= tokenizer.num_codes:
            raise ValueError(f"chain {entry.label} has token {entry.tokens.max()}, but --ckpt {args.ckpt} has "
                             f"{tokenizer.num_codes} codes")
        if (entry.tokens < 0).all():
            raise ValueError(f"chain {entry.label} has no tokens at all")
        if Path(entry.label).is_absolute() or ".." in Path(entry.label).parts:
            raise ValueError(f"chain {entry.label!r}: its name would lead out of --out")
        if entry.label in seen:
            raise ValueError(f"chain {entry.label} occurs twice; decode the files separately")
        seen.add(entry.label)


def to_chain(entry: TokenChain, coords: npt.NDArray[np.float32]) -> Chain:
    """coords (L, 3, 3) of N, CA, C."""
    numbers, codes = entry.residue_numbers()
    padded = np.full((len(coords), len(ATOMS), 3), np.nan, dtype=np.float32)
    padded[:, :3] = coords
    return Chain(entry.name, entry.chain, entry.sequence, padded, numbers, codes,
                 np.full(len(coords), np.nan, dtype=np.float32))


def compare(chains: Sequence[Chain], references: Sequence[Chain]) -> dict[str, Any]:
    """Metrics of every chain, and their means. ValueError: a chain without a reference of its length."""
    by_label = {chain.label: chain for chain in references}
    rows = {}
    for chain in chains:
        reference = by_label.get(chain.label)
        if reference is None or len(reference) != len(chain):
            found = "is not there" if reference is None else f"has {len(reference)} residues, not {len(chain)}"
            raise ValueError(f"--reference: chain {chain.label} {found}")
        both = torch.tensor(chain.mask & reference.mask)[None]
        predicted, target = (torch.tensor(c.coords)[None] for c in (chain, reference))
        found = reconstruction_metrics(predicted, target, both)
        rows[chain.label] = {"residues": int(both.sum())} | {
            name: None if value.isnan() else round(value.item(), 6) for name, value in found.items()}
    known = {name: [row[name] for row in rows.values() if row[name] is not None] for name in METRICS}
    means = {name: float(np.mean(values)) if values else None for name, values in known.items()}
    return {"chains": len(rows), "mean": means, "of_each_chain": rows}


def decode(args: argparse.Namespace, device: torch.device) -> None:
    """ValueError, OSError: mistakes in flags and files, before anything is computed."""
    entries = [entry for path in args.tokens for entry in read_tokens(path)]
    references: list[Chain] = []
    if args.reference:
        references, _ = read_chains(list_structures(args.reference), max_bad=0)
    tokenizer = load_structure_tokenizer(args.ckpt, device)
    check_tokens(entries, tokenizer, args)
    with tqdm(total=len(entries), unit="chain") as shown:
        coords = decode_tokens(tokenizer, [entry.tokens for entry in entries], device, max_residues=args.max_residues,
                               progress=shown.update)
    chains = [to_chain(entry, xyz) for entry, xyz in zip(entries, coords, strict=True)]
    metrics = compare(chains, references) if args.reference else None
    for chain in chains:
        path = args.out / f"{chain.label}.{args.format}"
        path.parent.mkdir(parents=True, exist_ok=True)  # names of chains may contain folders
        write_structure(path, chain)
    if metrics is not None:
        atomic_write_text(args.out / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        print("mean of the chains: " + " ".join(f"{k} {v:.4g}" for k, v in metrics["mean"].items() if v is not None))  # noqa: T201
    distributed.print0(f"wrote {len(chains)} structures to {args.out}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        device = distributed.init(args.device)
        if distributed.world_size() > 1:
            raise ValueError("runs on one process; start it with python, not torchrun")
        decode(args, device)
    except (ValueError, OSError) as error:
        raise SystemExit(f"decode.py: error: {error}") from error


if __name__ == "__main__":
    main()
