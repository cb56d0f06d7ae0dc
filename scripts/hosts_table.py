"""Prints the table of hosts in tokenizer/README.md, from the adapters themselves.

    python scripts/hosts_table.py
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tokenizer.runtime.command import command, make_parser, refuse_early

PROG = "scripts/hosts_table.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return make_parser(PROG, __doc__).parse_args(argv)


if __name__ == "__main__":
    refuse_early(PROG, parse_args)

from tokenizer import provq_attach
from tokenizer.provq_attach import ADAPTERS, Adapter, TableAdapter


def row(kind: str, adapter: type[Adapter]) -> str:
    """Host, kind, what codes start from, what it may be used by."""
    host = re.split(r"[.:](?: |$)| \(|, (?:of its|which|with|set) ", adapter.__doc__ or "")[0]
    start = "" if hasattr(adapter, "refused") else "k-means" if adapter.settable else "a fixed grid"
    used = "attach, adapt" if issubclass(adapter, TableAdapter) else "attach" if start else "none"
    return f"| {host} | `{kind}` | {start} | {used} |"


def note(kind: str, adapter: type[Adapter]) -> str:
    """Options that must keep their values, or why the host is refused; empty if there is nothing to say."""
    needs = ", ".join(f"`{option.split('.')[-1]}={value}`" for option, value in adapter.supports.items())
    text = f"refused, as {adapter.refused}" if hasattr(adapter, "refused") else needs and f"with {needs} only"
    return textwrap.fill(f"* `{kind}`: {text}", 118, subsequent_indent="  ", break_on_hyphens=False) if text else ""


def table() -> str:
    provq_attach._companions()  # they put theirs into ADAPTERS
    head = ["| host | `kind=` | codes start from | used by |", "|---|---|---|---|"]
    rows, notes = ([write(kind, adapter) for kind, adapter in ADAPTERS.items()] for write in (row, note))
    return "\n".join([*head, *rows, "", *filter(None, notes)])


def main(argv: list[str] | None = None) -> None:
    parse_args(argv)
    with command(PROG, one_process=True):
        print(table())


if __name__ == "__main__":
    main()
