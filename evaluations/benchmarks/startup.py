"""Times the --help of every command, which is what anybody waits for who asks for it or mistypes a flag.

    python evaluations/benchmarks/startup.py [--before CHECKOUT] [--repeats 5] [--only tokenizer/]

Medians over fresh processes, which take turns with those of another checkout of this repository, such as an older one.
CPU seconds are of user and system together: unlike wall time they do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import re
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tokenizer.runtime.command import CannotContinue, command, make_parser, require_flags_at_least
from tokenizer.runtime.ranks import print0

PROG = "evaluations/benchmarks/startup.py"
ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("tokenizer", "autoregressive", "protein", "synthetic", "evaluations", "scripts")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="another one to compare with")
    parser.add_argument("--repeats", type=int, default=5, help="processes of each command (default: 5)")
    parser.add_argument("--only", default="", metavar="BEGIN", help="commands whose paths begin so (default: all)")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "repeats")
    if args.before is not None and not (args.before / "tokenizer").is_dir():
        parser.error(f"--before {args.before} is no checkout of this repository")
    return args


def scripts(only: str) -> list[str]:
    """Paths of the entry scripts, relative to the checkout."""
    found = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))
             if re.search(r'^if __name__ == "__main__":', path.read_text(encoding="utf-8"), re.MULTILINE))
    return [name for name in (path.relative_to(ROOT).as_posix() for path in found) if name.startswith(only)]


def seconds(checkout: Path, script: str) -> tuple[float, float]:
    """CPU and wall time of one --help. CannotContinue: it fails."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, script, "--help"], cwd=checkout, capture_output=True, text=True, check=False)
    wall, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise CannotContinue(f"{checkout / script} --help ends with status {done.returncode}: {done.stderr[-300:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def measure(args: argparse.Namespace) -> None:
    checkouts = {"now": ROOT} if args.before is None else {"before": args.before, "now": ROOT}
    heads = [f"{what} s, {name}" for name in checkouts for what in ("CPU", "wall")]
    print0(f"| command | {' | '.join(heads)} |\n|{'---|' * (len(heads) + 1)}")
    for script in scripts(args.only):
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in checkouts}
        for _ in range(args.repeats):
            for name, checkout in checkouts.items():
                if (checkout / script).exists():
                    taken[name].append(seconds(checkout, script))
        cells = [f"{statistics.median(column):.2f}" if found else "-"
                 for found in taken.values() for column in (list(zip(*found, strict=True)) or [(), ()])]
        print0(f"| `{script}` | {' | '.join(cells)} |")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        measure(args)


if __name__ == "__main__":
    main()
