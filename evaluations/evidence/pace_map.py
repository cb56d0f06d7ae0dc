"""What a soft transition gains over a hard switch against the pace of the codes (see pace.py), as a table and a figure.

    python evaluations/evidence/pace_map.py evaluations/results/map-512.jsonl --figure evaluations/figures/pace.png
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from evaluations.evidence import pace, store
from tokenizer.runtime.command import command, make_parser, require_out_file
from tokenizer.runtime.ranks import print0

PROG = "evaluations/evidence/pace_map.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    pace.add_flags(parser)
    parser.add_argument("--figure", type=Path, help="and draw it to this .png")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        if args.figure:
            require_out_file(args.figure, "--figure", inputs=args.results)
        print0(pace.render(args), end="")
        if args.figure:
            pace.figure(pace.points(store.read_all(args.results)), args.figure)


if __name__ == "__main__":
    main()
