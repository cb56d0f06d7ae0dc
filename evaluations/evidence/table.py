"""Results files as a table in Markdown, and a figure.

    python evaluations/evidence/table.py evaluations/results/core.jsonl --baseline vanilla --figure core.png

Mean ± standard deviation over seeds; last column: paired difference from the baseline, with its 95 % interval.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from evaluations.evidence import comparison, selection
from tokenizer.runtime.command import command, make_parser, require_out_file
from tokenizer.runtime.files import atomic_write_text
from tokenizer.runtime.ranks import print0

PROG = "evaluations/evidence/table.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    selection.add_flags(parser)
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    parser.add_argument("--figure", type=Path, help="and draw it to this .png")
    args = parser.parse_args(argv)
    selection.check_numbers(parser, args)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        for flag, path in (("--out", args.out), ("--figure", args.figure)):
            if path:
                require_out_file(path, flag, inputs=args.results)
        text = selection.render(args)
        print0(text, end="")
        if note := selection.mixture(selection.shown(args)):
            print0(f"note: {note}", file=sys.stderr)
        if args.out:
            atomic_write_text(args.out, text)
        if args.figure:
            comparison.figure(*selection.rows(args), args.metrics, args.figure, args.compared)


if __name__ == "__main__":
    main()
