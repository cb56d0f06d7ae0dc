"""Flags of the commands that read structures: which, what of them, and how many may be unreadable."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from protein.atom_files import PLDDT_SOURCES
from protein.residues import ALTLOCS
from tokenizer.runtime.command import require_flags_at_least

WHAT = "structure files, folders and .tar archives of them, Foldcomp databases, folders of prepare_structures.py"


def add_reading_flags(parser: argparse.ArgumentParser, *, selection: bool = True) -> None:
    """selection: also --ids, --chains, --model and --altloc."""
    add = parser.add_argument
    if selection:
        add("--ids", type=Path, metavar="FILE", help="of names to keep, one a line: NAME, NAME_CHAIN or NAME CHAIN")
        add("--chains", help="ids, comma-separated, to read of every file (default: all)")
        add("--model", type=int, default=1, help="which of several models of a file, from 1 (default: 1)")
        add("--altloc", choices=ALTLOCS, default="first", help="which conformation to keep (default: first)")
    add_plddt_flags(parser)
    add("--max-resolution", type=float, metavar="A", help="leave out files that say to be of a lower one, in Angstrom")
    add("--max-r-free", type=float, metavar="R", help="leave out files that give a higher R-free")
    add("--num-workers", type=int, help="processes that read (default: cores, for more than 200 structures)")


def add_plddt_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--min-plddt", type=float, metavar="P", help="mask residues of a lower pLDDT, on the file's "
                        "scale (70 is usual)")
    parser.add_argument("--plddt-from", choices=PLDDT_SOURCES, help="where predictions keep their pLDDT; either is "
                        "kept with the tokens (default: b_factor, if --min-plddt is given)")


def check_reading_flags(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with status 2, naming the flag, for values that cannot be meant."""
    if getattr(args, "model", None) is not None:
        require_flags_at_least(parser, args, 1, "model")
    require_flags_at_least(parser, args, 0, "min_plddt max_resolution max_r_free num_workers")
    if getattr(args, "ids", None) and args.chains:
        parser.error("--ids and --chains exclude one another; name chains in the file of --ids")


def reading_options(args: argparse.Namespace) -> dict[str, Any]:
    """Of structure_sources.read_sources."""
    out: dict[str, Any] = {"min_plddt": args.min_plddt, "plddt_from": args.plddt_from or "b_factor",
                           "max_resolution": args.max_resolution, "max_r_free": args.max_r_free}
    if hasattr(args, "ids"):
        out |= {"chains": args.chains.split(",") if args.chains else None, "model": args.model, "altloc": args.altloc}
    return out


def require_structures(paths: Iterable[Path]) -> None:
    """FileNotFoundError: one of the files and folders is not there."""
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")


def knows_plddt(args: argparse.Namespace) -> bool:
    """Whether the flags say that B-factors are pLDDT."""
    return args.min_plddt is not None or args.plddt_from is not None
