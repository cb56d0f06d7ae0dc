"""Encodes many structures, kills the command once on the way, goes on, and writes down how much memory it took.

    python evaluations/benchmarks/encoding.py structures/ --ckpt runs/protein-ideal --chains 20000 \\
        --out runs/many

The files of the folder are repeated under other names (links) until there are --chains of them. OUT/memory.jsonl has a
row per sample: seconds, shards that are done, MiB that are resident in the command and in the processes that read for
it. OUT/tokens are the shards.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tokenizer.runtime.command import (
    CannotContinue,
    command,
    make_parser,
    refuse_early,
    require_flags_at_least,
    require_out_folder,
)

PROG = "evaluations/benchmarks/encoding.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("folder", type=Path, help="structure files")
    add("--ckpt", type=Path, required=True, metavar="PATH", help="the tokenizer")
    add("--out", type=Path, required=True, metavar="FOLDER", help="to write to")
    add("--chains", type=int, default=20_000, help="structures to encode (default: 20000)")
    add("--kill-at", type=float, default=0.3, help="share of the shards after which it is killed once; 0: never")
    add("--num-workers", type=int, default=1, help="processes that read (default: 1)")
    add("--every", type=float, default=5.0, help="seconds between samples (default: 5)")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "chains every")
    require_flags_at_least(parser, args, 0, "kill_at num_workers")
    return args


if __name__ == "__main__":
    refuse_early(PROG, parse_args)

from protein.structure_sources import find_structures, structure_name
from tokenizer.runtime.distributed import print0

ENCODE = Path(__file__).resolve().parents[2] / "protein" / "encode.py"


def link(folder: Path, count: int, out: Path) -> None:
    """count links in out to the structure files of folder, over and over."""
    out.mkdir(parents=True, exist_ok=True)
    files = find_structures(folder)
    for number, file in enumerate(itertools.islice(itertools.cycle(files), count)):
        name = structure_name(file, folder).replace("/", "-")
        target = out / f"{number:06d}-{name}{file.name.removeprefix(Path(structure_name(file, folder)).name)}"
        if not target.is_symlink():
            target.symlink_to(file.resolve())


def resident(pid: int) -> list[float]:
    """MiB of a process, and of its children together."""
    def of(one: int) -> float:
        try:
            lines = Path(f"/proc/{one}/status").read_text().splitlines()
        except OSError:  # it has ended
            return 0.0
        return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS")), 0.0)

    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        children = []
    return [round(of(pid), 1), round(sum(of(int(child)) for child in children), 1)]


def watch(words: list[str], args: argparse.Namespace, log: Any, begin: float, until: float) -> int | None:
    """Run encode.py to its end -> its status; None when it was killed since `until` shards were done."""
    with (args.out / "log.txt").open("a") as text, \
            subprocess.Popen([sys.executable, str(ENCODE), *words], stdout=text, stderr=text) as process:
        while True:
            try:
                return process.wait(args.every)
            except subprocess.TimeoutExpired:
                done = len(list((args.out / "tokens").glob("shard-*.json")))
                command_mib, readers_mib = resident(process.pid)
                log.write(json.dumps({"seconds": round(time.monotonic() - begin, 1), "shards": done,
                                      "mib": command_mib, "readers_mib": readers_mib}) + "\n")
                log.flush()
                if done >= until:
                    os.kill(process.pid, signal.SIGKILL)
                    process.wait()
                    return None


def measure(args: argparse.Namespace) -> str:
    """-> a line about it. CannotContinue: encode.py failed."""
    require_out_folder(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    link(args.folder, args.chains, args.out / "structures")
    words = [str(args.out / "structures"), "--ckpt", str(args.ckpt), "--out", str(args.out / "tokens"),
             "--num-workers", str(args.num_workers), "--device", "cpu"]
    shards = -(-args.chains // 512)
    begin = time.monotonic()
    with (args.out / "memory.jsonl").open("w") as log:
        status = watch(words, args, log, begin, args.kill_at * shards if args.kill_at else float("inf"))
        if status is None:
            status = watch(words, args, log, begin, float("inf"))
    if status:
        raise CannotContinue(f"{ENCODE} ended with status {status}; see {args.out / 'log.txt'}")
    rows = [json.loads(line) for line in (args.out / "memory.jsonl").read_text().splitlines()]
    manifest = json.loads((args.out / "tokens" / "manifest.json").read_text())
    quarter = max(1, len(rows) // 4)
    early, late = (max(row["mib"] for row in part) for part in (rows[: 2 * quarter], rows[-quarter:]))
    return (f"{manifest['chains']} chains, {manifest['residues']} residues in {time.monotonic() - begin:.0f} s; at "
            f"most {early:.0f} MiB in the first half of the time, {late:.0f} MiB in the last quarter; readers at most "
            f"{max(row['readers_mib'] for row in rows):.0f} MiB")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        print0(measure(args))


if __name__ == "__main__":
    main()
