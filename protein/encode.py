"""Turns protein structures into tokens.

    python protein/encode.py 1abc.pdb 2xyz.cif.gz predictions/ --ckpt runs/protein-paper --out tokens.fasta
    torchrun --nproc_per_node=8 protein/encode.py predictions/ --ckpt runs/protein-paper --out tokens.npz

Reads .pdb, .cif and .bcif files, also gzipped, and folders of them; every protein chain becomes one entry of --out: a
.fasta, .jsonl or .npz file (see token_files.py). Residues without N, CA or C get token -1. decode.py is the way back.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from tqdm import tqdm

from protein.inference import MAX_RESIDUES, encode_chains, list_structures, read_chains
from protein.pretrained import load_structure_tokenizer
from protein.structure_io import ALTLOCS, Chain
from protein.token_files import TokenChain, check_chain, check_name, write_tokens
from tokenizer.runtime import distributed
from tokenizer.runtime.command import command, make_parser, require_flags_at_least, require_out_file

PROG = "protein/encode.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("structures", nargs="+", type=Path, metavar="FILE", help="structure files, and folders of them")
    add("--ckpt", type=Path, required=True, metavar="PATH", help="run folder, checkpoint or export of this project, "
        "weights of StructTokenBench or of ESM3's encoder")
    add("--out", type=Path, required=True, metavar="FILE", help=".fasta, .jsonl or .npz")
    add("--chains", help="ids, comma-separated, to read of every file (default: all)")
    add("--model", type=int, default=1, help="which of several models of a file, from 1 (default: 1)")
    add("--altloc", choices=ALTLOCS, default="first", help="which conformation of a residue to keep (default: first)")
    add("--max-bad-structures", type=int, default=0, help="unreadable files to leave out before stopping (default: 0)")
    add("--max-residues", type=int, default=MAX_RESIDUES, help=f"of a batch, padding included ({MAX_RESIDUES})")
    add("--weights", choices=("auto", "model", "ema"), default="auto", help="of --ckpt; auto: the EMA if any")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "model max_residues")
    require_flags_at_least(parser, args, 0, "max_bad_structures")
    return args


def blank_entry(chain: Chain, tokenizer: str) -> TokenChain:
    """The entry of a chain, all of its tokens -1. ValueError: what token files cannot hold."""
    numbers = tuple(f"{n}{code}" for n, code in zip(chain.residue_numbers, chain.insertion_codes, strict=True))
    return TokenChain(chain.name, chain.chain_id, np.full(len(chain), -1, dtype=np.int64), chain.sequence, numbers,
                      tokenizer)


def encode(args: argparse.Namespace, device: torch.device) -> None:
    """Collective. ValueError, OSError: mistakes in flags and files, before anything is computed."""
    check_name(args.out)
    require_out_file(args.out)
    files = list_structures(args.structures)
    tokenizer = load_structure_tokenizer(args.ckpt, device, args.weights)
    rank, world = distributed.rank(), distributed.world_size()
    chains_wanted = args.chains.split(",") if args.chains else None
    quiet = None if distributed.is_main() else True
    with tqdm(total=len(files[rank::world]), unit="file", disable=quiet) as shown:
        chains, reasons = read_chains(files[rank::world], max_bad=args.max_bad_structures, progress=shown.update,
                                      chains=chains_wanted, model=args.model, altloc=args.altloc)
    digest = tokenizer.hash()
    entries = [blank_entry(chain, digest) for chain in chains]
    for entry in entries:
        check_chain(args.out, entry)
    with tqdm(total=len(chains), unit="chain", disable=quiet) as shown:
        tokens = encode_chains(tokenizer, chains, device, max_residues=args.max_residues, progress=shown.update)
    entries = [replace(entry, tokens=found) for entry, found in zip(entries, tokens, strict=True)]
    gathered = distributed.gather_objects((entries, reasons))
    all_reasons = [reason for _, part in gathered for reason in part]
    if len(all_reasons) > args.max_bad_structures:
        raise ValueError(f"{len(all_reasons)} structure file(s) cannot be read, --max-bad-structures "
                         f"{args.max_bad_structures} are tolerated: {'; '.join(all_reasons[:20])}")
    if distributed.is_main():
        place = {name: i for i, (_, name) in enumerate(files)}  # ranks took turns with the files
        entries = sorted((entry for part, _ in gathered for entry in part), key=lambda entry: place[entry.name])
        write_tokens(args.out, entries)
        for reason in all_reasons:
            distributed.print0(f"left out: {reason}")
        distributed.print0(f"wrote {args.out}: {len(entries)} chains, {sum(len(e.tokens) for e in entries)} residues")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        encode(args, distributed.init(args.device))


if __name__ == "__main__":
    main()
