"""Reads a folder of protein structures once, into a cache that training opens at once and shares between processes.

    python protein/prepare_structures.py pdb/ --out pdb-cache
    torchrun --nproc_per_node=8 protein/train_provq.py --preset paper --data-path pdb-cache

All protein chains of all files are kept, with their residues' N, CA, C, O and CB; --min-length and --max-length of the
training choose among them. CACHE appears when it is complete.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tqdm import tqdm

from protein.structure_data import write_cache
from protein.structure_io import EXTENSIONS, Chain
from protein.structure_sources import Failure, find_structures, iterate_folder
from tokenizer.runtime.command import command, make_parser, require_flags_at_least, require_out_folder
from tokenizer.runtime.distributed import print0

PROG = "protein/prepare_structures.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("folder", type=Path, help=f"structure files, also in subfolders: {' '.join(EXTENSIONS)}, also with .gz")
    add("--out", type=Path, required=True, metavar="CACHE", help="folder to write; must be new")
    add("--num-workers", type=int, default=os.cpu_count() or 1, help="reading processes; 0: this one (default: cores)")
    add("--max-bad-structures", type=int, default=100, help="unreadable files to skip before it stops (default: 100)")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 0, "num_workers max_bad_structures")
    return args


def prepare(args: argparse.Namespace) -> str:
    """Writes the cache -> a line about it. ValueError and OSError: see write_cache and iterate_folder."""
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists already; name a new folder")
    require_out_folder(args.out)
    files = len(find_structures(args.folder))
    summary: dict[str, Any] = {"files": files, "skipped": []}

    def chains() -> Iterator[Chain]:
        found = iterate_folder(args.folder, max_failures=args.max_bad_structures, num_workers=args.num_workers)
        for result in tqdm(found, total=files, unit="file", disable=None):
            if isinstance(result, Failure):
                tqdm.write(f"skipped {result.reason}", file=sys.stderr)
                summary["skipped"].append(result.reason)
            else:
                yield from result

    written = write_cache(args.out, chains(), summary)
    residues, observed = int(written.offsets[-1]), int(written.observed.sum())
    return (f"wrote {args.out}: {len(written)} chains of {files - len(summary['skipped'])} files, {residues} residues, "
            f"{residues - observed} of them without N, CA or C; {len(summary['skipped'])} files skipped")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        print0(prepare(args))


if __name__ == "__main__":
    main()
