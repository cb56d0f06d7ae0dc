"""Writes the tables of a document from the results files that they name.

    python evaluations/evidence/document.py RESULTS.md

A table stands between `<!-- table: core-512.jsonl --seeds 100 101 -->`, which is a command line of table.py with files
of evaluations/results/, and `<!-- end -->`. The command line may go on in the next line. `<!-- tuned: grid-512.jsonl
--arms vanilla provq -->` is a table of arms at what their search chose, `<!-- pace: map-512.jsonl -->` of pace_map.py,
`<!-- runs: digits.json --metrics psnr -->` for what collect.py gathered, and `<!-- hosts: every-host.json --data sound
-->` for what scripts/train_hosts.py trained. What stands there already is replaced. Marks in a fence of ``` are text.
"""

from __future__ import annotations

import argparse
import itertools
import re
import shlex
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from evaluations.evidence import hosts, pace, searched, selection, trained
from tokenizer.runtime.command import CannotContinue, command, make_parser
from tokenizer.runtime.files import atomic_write_text
from tokenizer.runtime.parsing import read_text
from tokenizer.runtime.ranks import print0

PROG = "evaluations/evidence/document.py"

RESULTS = Path(__file__).resolve().parents[1] / "results"
_KINDS = {"table": selection, "tuned": searched, "pace": pace, "runs": trained, "hosts": hosts}
_END = "<!-- end -->"
_FENCE = re.compile(r"^ *(?P<mark>`{3,}|~{3,}).*?^ *(?P=mark)", re.DOTALL | re.MULTILINE)
_MARK = re.compile(rf"<!-- (?P<kind>{'|'.join(_KINDS)}): (?P<words>.*?) -->(?P<line_end>\r?\n)?", re.DOTALL)


def filled(text: str, results: Path = RESULTS) -> tuple[str, int]:
    """The text with its tables as the files in `results` give them, and how many there are.

    CannotContinue: a table's command line is none, its file is not there, or where it ends is not clear.
    """
    fences = [match.span() for match in _FENCE.finditer(text)]

    def outside(pattern: re.Pattern[str]) -> list[re.Match[str]]:
        return [match for match in pattern.finditer(text) if not any(a <= match.start() < b for a, b in fences)]

    marks, ends = outside(_MARK), outside(re.compile(re.escape(_END)))
    parts, done = [], 0
    for mark, following in itertools.zip_longest(marks, marks[1:]):
        shown, until = f"<!-- {mark['kind']}: {mark['words']} -->", following.start() if following else len(text)
        of_mark = [end for end in ends if mark.end() <= end.start() < until]
        if not of_mark or mark["line_end"] is None:
            raise CannotContinue(f"{shown}: there must be a line {_END} after it, before the next table")
        try:
            rendered = _rendered(mark["kind"], mark["words"], results)
        except (SystemExit, OSError, ValueError) as error:
            raise CannotContinue(f"{shown}: {error}") from error
        parts += [text[done : mark.end()], rendered.replace("\n", mark["line_end"])]
        done = of_mark[0].start()
    if len(ends) != len(marks):
        raise CannotContinue(f"{len(marks)} tables begin, {len(ends)} lines {_END} end one: one begins with none of "
                             f"{', '.join(_KINDS)}, or an end is left over")
    return "".join([*parts, text[done:]]), len(marks)


def _rendered(kind: str, words: str, results: Path) -> str:
    parser = make_parser("a table of the document", None)
    _KINDS[kind].add_flags(parser)
    args = parser.parse_args(shlex.split(words))
    args.results = [results / path for path in args.results]
    return _KINDS[kind].render(args)


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
            atomic_write_text(args.document.resolve(), text)  # a link stays one
        print0(f"{args.document}: {count} tables, {'written' if text != before else 'all as they were'}")


if __name__ == "__main__":
    main()
