"""Turns tokens back into protein structures.

    python protein/decode.py tokens.fasta --ckpt runs/protein-paper --out structures/
    python protein/decode.py tokens.npz --ckpt runs/protein-paper --out structures/ --reference 1abc.pdb predictions/

Reads what encode.py wrote, or names and tokens of another program (see token_files.py), and writes one file per chain:
N, CA and C, with the sequence and residue numbers that the tokens came with. --reference, with the files and folders,
--model and --altloc that encode.py was given, compares them with the structures that were encoded: RMSD, lDDT and
TM-score of every chain in OUT/metrics.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from protein.structure_io import ALTLOCS, ATOMS, Chain, check_writable, write_structure
from protein.token_files import TokenChain, read_tokens
from protein.validation import METRICS, reconstruction_metrics
from tokenizer.runtime import distributed
from tokenizer.runtime.checkpoint import atomic_write_json
from tokenizer.runtime.command import command, make_parser, require_flags_at_least, require_out_folder

PROG = "protein/decode.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("tokens", nargs="+", type=Path, metavar="FILE", help=".fasta, .jsonl or .npz files")
    add("--ckpt", type=Path, required=True, metavar="PATH", help="the tokenizer: run folder, checkpoint or export of "
        "this project, or weights of StructTokenBench")
    add("--out", type=Path, required=True, metavar="FOLDER", help="to write to")
    add("--format", choices=("pdb", "cif"), default="pdb", help="cif holds what pdb has no room for, and calls a chain "
        "without an id A (default: pdb)")
    add("--reference", type=Path, nargs="+", metavar="FILE", help="the structures that were encoded, to compare with")
    add("--model", type=int, default=1, help="of --reference, as in encode.py: which of several models (default: 1)")
    add("--altloc", choices=ALTLOCS, default="first", help="of --reference, as in encode.py (default: first)")
    add("--other-tokenizer", action="store_true", help="go on although the tokens are of another tokenizer")
    add("--max-residues", type=int, default=MAX_RESIDUES, help=f"of a batch, padding included ({MAX_RESIDUES})")
    add("--weights", choices=("auto", "model", "ema"), default="auto", help="of --ckpt; auto: the EMA if any")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "model max_residues")
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


def out_path(entry: TokenChain, args: argparse.Namespace) -> Path:
    return args.out / f"{entry.label}.{args.format}"


def writable(chain: Chain, args: argparse.Namespace) -> Chain:
    """As it goes into a file: mmCIF must call a chain something."""
    return chain if args.format == "pdb" or chain.chain_id.strip() else replace(chain, chain_id="A")


def check_format(entries: Sequence[TokenChain], args: argparse.Namespace) -> None:
    """ValueError: what --format cannot hold, coordinates aside, which nobody knows yet."""
    for entry in entries:
        somewhere = np.zeros((len(entry.tokens), 3, 3), dtype=np.float32)
        chain, path = writable(to_chain(entry, somewhere), args), out_path(entry, args)
        try:
            check_writable(path, chain)
        except ValueError as error:
            hint = "; pass --format cif" if "write .cif" in str(error) else ""
            raise ValueError(f"--format {args.format}: {error}{hint}") from error


def read_references(entries: Sequence[TokenChain], args: argparse.Namespace) -> dict[str, Chain]:
    """Label -> the structure that was encoded. ValueError: a chain without a reference of its length."""
    labels = {entry.label for entry in entries}
    # A label is its file's name, or begins with it and "_": other files, perhaps unreadable, are none of our concern.
    names = labels | {label[:i] for label in labels for i, letter in enumerate(label) if letter == "_"}
    files = [(path, name) for path, name in list_structures(args.reference) if name in names]
    references = {chain.label: chain for chain in read_chains(files, max_bad=0, model=args.model,
                                                              altloc=args.altloc)[0]}
    for entry in entries:
        reference, length = references.get(entry.label), len(entry.tokens)
        if reference is None:
            raise ValueError(f"--reference: chain {entry.label} is not there; name the files and folders that were "
                             "encoded as encode.py was given them")
        if len(reference) != length:
            raise ValueError(f"--reference: chain {entry.label} has {len(reference)} residues, not {length}; are they "
                             "other structures, or was --model or --altloc another one when they were encoded?")
    return references


def compare(chains: Sequence[Chain], references: Mapping[str, Chain]) -> dict[str, Any]:
    """Metrics of every chain, and their means."""
    rows: dict[str, dict[str, Any]] = {}
    for chain in chains:
        reference = references[chain.label]
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
    require_out_folder(args.out)
    entries = [entry for path in args.tokens for entry in read_tokens(path)]
    tokenizer = load_structure_tokenizer(args.ckpt, device, args.weights)
    check_tokens(entries, tokenizer, args)
    check_format(entries, args)
    references = read_references(entries, args) if args.reference else {}
    with tqdm(total=len(entries), unit="chain") as shown:
        coords = decode_tokens(tokenizer, [entry.tokens for entry in entries], device, max_residues=args.max_residues,
                               progress=shown.update)
    chains = [to_chain(entry, xyz) for entry, xyz in zip(entries, coords, strict=True)]
    metrics = compare(chains, references) if args.reference else None
    for entry, chain in zip(entries, chains, strict=True):
        path = out_path(entry, args)
        path.parent.mkdir(parents=True, exist_ok=True)  # names of chains may contain folders
        write_structure(path, writable(chain, args))
    if metrics is not None:
        atomic_write_json(args.out / "metrics.json", metrics)
        print("mean of the chains: " + " ".join(f"{k} {v:.4g}" for k, v in metrics["mean"].items() if v is not None))  # noqa: T201
    distributed.print0(f"wrote {len(chains)} structures to {args.out}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        decode(args, distributed.init(args.device))


if __name__ == "__main__":
    main()
