"""Writes the tables of a document from the results files that they name.

    python evaluations/evidence/document.py RESULTS.md

A table stands between `<!-- table: core-512.jsonl --seeds 100 101 -->`, which is a command line of table.py with files
of evaluations/results/, and `<!-- end -->`. The command line may go on in the next line. `<!-- pace: map-512.jsonl -->`
is the same for pace_map.py, `<!-- runs: digits.json --metrics psnr -->` for what collect.py gathered, and
`<!-- hosts: every-host.json --data sound -->` for what scripts/train_hosts.py trained. What stands there already is
replaced.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from evaluations.evidence import hosts, pace, selection, trained
from tokenizer.runtime.command import CannotContinue, command, make_parser
from tokenizer.runtime.files import atomic_write_text
from tokenizer.runtime.parsing import read_text
from tokenizer.runtime.ranks import print0

PROG = "evaluations/evidence/document.py"

RESULTS = Path(__file__).resolve().parents[1] / "results"
_KINDS = {"table": selection, "pace": pace, "runs": trained, "hosts": hosts}
_TABLE = re.compile(rf"(<!-- (?P<kind>{'|'.join(_KINDS)}): (?P<words>[^>]*?) -->\n)(?P<rows>.*?)(?P<end><!-- end -->)",
                    re.DOTALL)


def filled(text: str, results: Path = RESULTS) -> tuple[str, int]:
    """The text with its tables as the files in `results` give them, and how many there are.

    CannotContinue: a table's command line is none, or its file is not there.
    """
    count = 0

    def write(match: re.Match[str]) -> str:
        nonlocal count
        count += 1
        kind, parser = _KINDS[match["kind"]], make_parser("a table of the document", None)
        kind.add_flags(parser)
        try:
            args = parser.parse_args(shlex.split(match["words"]))
            args.results = [results / path for path in args.results]
            return f"{match[1]}{kind.render(args)}{match['end']}"
        except (SystemExit, OSError, ValueError) as error:
            raise CannotContinue(f"<!-- {match['kind']}: {match['words']} -->: {error}") from error

    return _TABLE.sub(write, text), count


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("document", type=Path, help="such as RESULTS.md")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        before = read_text(args.document)
        text, count = filled(before)
        if text != before:
            atomic_write_text(args.document, text)
        print0(f"{args.document}: {count} tables, {'written' if text != before else 'all as they were'}")


if __name__ == "__main__":
    main()
