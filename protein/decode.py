"""Turns tokens back into protein structures.

    python protein/decode.py tokens.fasta --ckpt runs/protein-paper --out structures/
    python protein/decode.py tokens.npz --ckpt runs/protein-paper --out structures/ --reference 1abc.pdb predictions/

Reads what encode.py wrote, files and folders, or names and tokens of another program (see token_files.py), and writes
one file per chain: N, CA and C, with the sequence and residue numbers that the tokens came with. Chains that cannot be
written are named before anything is decoded; --max-bad-structures leaves that many out. --reference, with the files and
folders, --model and --altloc that encode.py was given, compares them with the structures that were encoded: RMSD, lDDT
and TM-score of every chain in OUT/metrics.json.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from protein.choices import MAX_RESIDUES
from protein.structure_io import ALTLOCS
from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least, require_out_folder
from tokenizer.stored import require_stored

PROG = "protein/decode.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("tokens", nargs="+", type=Path, metavar="FILE", help=".fasta, .jsonl or .npz files, and folders of encode.py")
    add("--ckpt", type=Path, required=True, metavar="PATH", help="the tokenizer: run folder, checkpoint or export of "
        "this project, or weights of StructTokenBench")
    add("--out", type=Path, required=True, metavar="FOLDER", help="to write to")
    add("--format", choices=("pdb", "cif"), default="pdb", help="cif holds what pdb has no room for, and calls a chain "
        "without an id A (default: pdb)")
    add("--reference", type=Path, nargs="+", metavar="FILE", help="the structures that were encoded, to compare with")
    add("--model", type=int, default=1, help="of --reference, as in encode.py: which of several models (default: 1)")
    add("--altloc", choices=ALTLOCS, default="first", help="of --reference, as in encode.py (default: first)")
    add("--renumber", action="store_true", help="number the residues of each chain from 1, without insertion codes")
    add("--max-bad-structures", type=int, default=0, help="chains that cannot be decoded or written to leave out "
        "before stopping (default: 0)")
    add("--other-tokenizer", action="store_true", help="go on although the tokens are of another tokenizer")
    add("--max-residues", type=int, default=MAX_RESIDUES, help=f"of a batch, padding included ({MAX_RESIDUES})")
    add("--weights", choices=("auto", "model", "ema"), default="auto", help="of --ckpt; auto: the EMA if any")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "model max_residues")
    require_flags_at_least(parser, args, 0, "max_bad_structures")
    return args


def check(args: argparse.Namespace) -> None:
    """ValueError, FileNotFoundError: a folder that cannot be written, a model that is not there."""
    require_out_folder(args.out)
    require_stored(args.ckpt, args.weights, "structure tokenizer")


if __name__ == "__main__":
    refuse_early(PROG, parse_args, check)

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from protein.inference import decode_tokens
from protein.pretrained import load_structure_tokenizer
from protein.structure_io import ATOMS, Chain, check_writable, write_structure
from protein.structure_sources import list_sources, read_sources
from protein.token_files import TokenChain
from protein.token_shards import iterate_tokens
from protein.validation import METRICS, reconstruction_metrics
from tokenizer.runtime import distributed
from tokenizer.runtime.files import atomic_write_json


def read_entries(args: argparse.Namespace) -> Iterator[list[TokenChain]]:
    """One file or shard at a time, renumbered if asked for."""
    for entries in iterate_tokens(args.tokens):
        yield [replace(entry, numbers=tuple(map(str, range(1, len(entry.tokens) + 1)))) if args.renumber else entry
               for entry in entries]


def check_entries(tokenizer: Any, args: argparse.Namespace) -> tuple[list[str], dict[int, str]]:
    """Labels of all entries, and by their places why some cannot be decoded or written.

    ValueError, naming the chain: tokens of another tokenizer, whose files are the wrong ones.
    """
    digest = tokenizer.hash()
    labels: list[str] = []
    paths: set[Path] = set()
    wrong: dict[int, str] = {}
    for entries in read_entries(args):
        for entry in entries:
            if entry.tokenizer not in ("", digest) and not args.other_tokenizer:
                raise ValueError(f"chain {entry.label} has tokens of another tokenizer ({entry.tokenizer[:8]}) than "
                                 f"--ckpt {args.ckpt} ({digest[:8]}); name the right one, or pass --other-tokenizer")
            try:
                check_entry(entry, tokenizer, args)
                if out_path(entry, args) in paths:
                    raise ValueError(f"chain {entry.label} occurs twice; decode the files separately")
            except ValueError as error:
                wrong[len(labels)] = str(error)
            paths.add(out_path(entry, args))
            labels.append(entry.label)
    return labels, wrong


def check_entry(entry: TokenChain, tokenizer: Any, args: argparse.Namespace) -> None:
    """ValueError, naming the chain: no codes, a name that is no file name, what --format cannot hold (but for
    coordinates, which nobody knows yet).
    """
    if entry.tokens.max() >= tokenizer.num_codes:
        raise ValueError(f"chain {entry.label} has token {entry.tokens.max()}, but --ckpt {args.ckpt} has "
                         f"{tokenizer.num_codes} codes")
    if (entry.tokens < 0).all():
        raise ValueError(f"chain {entry.label} has no tokens at all")
    if Path(entry.label).is_absolute() or ".." in Path(entry.label).parts:
        raise ValueError(f"chain {entry.label!r}: its name would lead out of --out")
    somewhere = np.zeros((len(entry.tokens), 3, 3), dtype=np.float32)
    try:
        check_writable(out_path(entry, args), writable(to_chain(entry, somewhere), args))
    except ValueError as error:
        text = str(error)
        hint = "; pass --format cif" if "write .cif" in text else "; pass --renumber" if "the number" in text else ""
        raise ValueError(f"--format {args.format}: {text}{hint}") from error


def to_chain(entry: TokenChain, coords: npt.NDArray[np.float32]) -> Chain:
    """coords (L, 3, 3) of N, CA, C."""
    numbers, codes = entry.residue_numbers()
    padded = np.full((len(coords), len(ATOMS), 3), np.nan, dtype=np.float32)
    padded[:, :3] = coords
    return Chain(entry.name, entry.chain, entry.sequence, padded, numbers, codes,
                 np.full(len(coords), np.nan, dtype=np.float32) if entry.plddt is None else entry.plddt)


def out_path(entry: TokenChain, args: argparse.Namespace) -> Path:
    """NAME_CHAIN; what no file name can have in the chain's id becomes %XX, names may contain folders."""
    label = entry.name
    if entry.chain:
        label += "_" + re.sub(r"[/\\\0%]", lambda found: f"%{ord(found[0]):02X}", entry.chain)
    return args.out / f"{label}.{args.format}"


def writable(chain: Chain, args: argparse.Namespace) -> Chain:
    """As it goes into a file: mmCIF must call a chain something."""
    return chain if args.format == "pdb" or chain.chain_id.strip() else replace(chain, chain_id="A")


def read_references(labels: Collection[str], args: argparse.Namespace) -> dict[str, Chain]:
    """Label -> the structure that was encoded. ValueError: a chain without a reference."""
    # A label is its file's name, or begins with it and "_": other files, perhaps unreadable, are none of our concern.
    names = set(labels) | {label[:i] for label in labels for i, letter in enumerate(label) if letter == "_"}
    sources = [source for source in list_sources(args.reference) if source.name in names]
    references: dict[str, Chain] = {}
    for reading in read_sources(sources, model=args.model, altloc=args.altloc):
        if reading.failure:
            raise ValueError(f"--reference: {reading.failure}")
        references |= {chain.label: chain for chain in reading.chains}
    absent = [label for label in labels if label not in references]
    if absent:
        others = f" (nor are {', '.join(absent[1:20])})" if absent[1:] else ""
        raise ValueError(f"--reference: chain {absent[0]} is not there{others}; name the files and folders that were "
                         "encoded as encode.py was given them")
    return references


def check_lengths(references: Mapping[str, Chain], skipped: Collection[int], args: argparse.Namespace) -> None:
    """ValueError: a chain whose reference has another length."""
    entries = (entry for part in read_entries(args) for entry in part)
    for place, entry in enumerate(entries):
        length = len(entry.tokens)
        if place not in skipped and len(references[entry.label]) != length:
            raise ValueError(f"--reference: chain {entry.label} has {len(references[entry.label])} residues, not "
                             f"{length}; are they other structures, or was --model or --altloc another one when they "
                             "were encoded?")


def compare(chain: Chain, reference: Chain) -> dict[str, Any]:
    """Metrics of one chain."""
    both = torch.tensor(chain.mask & reference.mask)[None]
    predicted, target = (torch.tensor(c.coords)[None] for c in (chain, reference))
    found = reconstruction_metrics(predicted, target, both)
    return {"residues": int(both.sum())} | {
        name: None if value.isnan() else round(value.item(), 6) for name, value in found.items()}


def means(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    known = {name: [row[name] for row in rows.values() if row[name] is not None] for name in METRICS}
    mean = {name: float(np.mean(values)) if values else None for name, values in known.items()}
    return {"chains": len(rows), "mean": mean, "of_each_chain": rows}


def decode(args: argparse.Namespace, device: torch.device) -> None:
    """ValueError, OSError: mistakes in flags and files, before anything is computed."""
    check(args)
    tokenizer = load_structure_tokenizer(args.ckpt, device, args.weights)
    labels, wrong = check_entries(tokenizer, args)
    for reason in wrong.values():
        distributed.print0(f"left out: {reason}", file=sys.stderr)
    if len(wrong) > args.max_bad_structures:
        raise ValueError(f"{len(wrong)} chain(s) cannot be decoded, --max-bad-structures {args.max_bad_structures} are "
                         f"tolerated: {'; '.join([*wrong.values()][:20])}")
    references: dict[str, Chain] = {}
    if args.reference:
        references = read_references([label for i, label in enumerate(labels) if i not in wrong], args)
        check_lengths(references, wrong, args)
    rows: dict[str, dict[str, Any]] = {}
    place = 0
    with tqdm(total=len(labels) - len(wrong), unit="chain") as shown:
        for part in read_entries(args):
            entries = [entry for i, entry in enumerate(part, start=place) if i not in wrong]
            place += len(part)
            coords = decode_tokens(tokenizer, [entry.tokens for entry in entries], device,
                                   max_residues=args.max_residues, progress=shown.update)
            for entry, xyz in zip(entries, coords, strict=True):
                chain, path = to_chain(entry, xyz), out_path(entry, args)
                if args.reference:
                    rows[chain.label] = compare(chain, references[chain.label])
                path.parent.mkdir(parents=True, exist_ok=True)  # names of chains may contain folders
                write_structure(path, writable(chain, args))
    if args.reference:
        metrics = means(rows)
        atomic_write_json(args.out / "metrics.json", metrics)
        print("mean of the chains: " + " ".join(f"{k} {v:.4g}" for k, v in metrics["mean"].items() if v is not None))  # noqa: T201
    distributed.print0(f"wrote {len(labels) - len(wrong)} structures to {args.out}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        decode(args, distributed.init(args.device))


if __name__ == "__main__":
    main()
