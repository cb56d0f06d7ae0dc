"""Reads protein structures once, into a cache that training opens at once and shares between processes.

    python protein/prepare_structures.py pdb/ --out pdb-cache
    python protein/prepare_structures.py UP000005640_9606.tar --out predicted-cache --min-plddt 70
    torchrun --nproc_per_node=8 protein/train_provq.py --preset paper --data-path pdb-cache

All protein chains of all files are kept, with their residues' N, CA, C, O and CB; --min-length and --max-length of the
training choose among them. Residues under --min-plddt have no coordinates; B-factors, pLDDT of predictions, are kept.
CACHE appears when it is complete.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from protein.reading_flags import WHAT, add_reading_flags, check_reading_flags, require_structures
from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least, require_out_folder

PROG = "protein/prepare_structures.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("structures", nargs="+", type=Path, metavar="FILE", help=WHAT)
    add("--out", type=Path, required=True, metavar="CACHE", help="folder to write; must be new")
    add_reading_flags(parser)
    add("--max-bad-structures", type=int, default=100, help="unreadable files to skip before it stops (default: 100)")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 0, "max_bad_structures")
    check_reading_flags(parser, args)
    return args


def check(args: argparse.Namespace) -> None:
    """ValueError, FileNotFoundError: a folder that is there already or cannot be written, structures that are not."""
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists already; name a new folder")
    require_out_folder(args.out)
    require_structures(args.structures)


if __name__ == "__main__":
    refuse_early(PROG, parse_args, check)

from tqdm import tqdm

from protein.reading_flags import reading_options
from protein.structure_cache import write_cache
from protein.structure_io import Chain
from protein.structure_sources import collected, list_sources, read_sources, reading_workers
from tokenizer.runtime.distributed import print0


def prepare(args: argparse.Namespace) -> str:
    """Writes the cache -> a line about it. ValueError and OSError: see write_cache and list_sources."""
    check(args)
    with collected() as notes:
        sources = list_sources(args.structures, args.ids)
    for note in notes:
        print0(f"note: {note}")
    summary: dict[str, Any] = {"files": len(sources), "skipped": [], "filtered": 0,
                               "min_plddt": args.min_plddt, "plddt_from": args.plddt_from}

    def chains() -> Iterator[Chain]:
        workers = reading_workers(len(sources), args.num_workers)
        found = read_sources(sources, num_workers=workers, **reading_options(args))
        for reading in tqdm(found, total=len(sources), unit="file", disable=None):
            for note in reading.notes:
                tqdm.write(f"note: {note}", file=sys.stderr)
            if reading.failure and reading.filtered:
                summary["filtered"] += 1
            elif reading.failure:
                tqdm.write(f"skipped {reading.failure}", file=sys.stderr)
                summary["skipped"].append(reading.failure)
                if len(summary["skipped"]) > args.max_bad_structures:
                    raise ValueError(f"{len(summary['skipped'])} unreadable structure file(s), --max-bad-structures "
                                     f"{args.max_bad_structures} are tolerated: {'; '.join(summary['skipped'][:20])}")
            yield from reading.chains

    written = write_cache(args.out, chains(), summary)
    residues, observed = int(written.offsets[-1]), int(written.observed.sum())
    read = len(sources) - len(summary["skipped"]) - summary["filtered"]
    more = f", {summary['filtered']} filtered out" if summary["filtered"] else ""
    return (f"wrote {args.out}: {len(written)} chains of {read} files, {residues} residues, "
            f"{residues - observed} of them without N, CA or C; {len(summary['skipped'])} files skipped{more}")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        print0(prepare(args))


if __name__ == "__main__":
    main()
