"""Trains arms on a bed, one process per core: a JSON line per run, resumed where it was interrupted.

    python evaluations/evidence/run.py cifar10_train.zip --plan core --seeds 100 101 --num-codes 512 \\
        --out evaluations/results/core.jsonl --jobs 2
    python evaluations/evidence/table.py evaluations/results/core.jsonl --baseline vanilla

Arms and plans are in evaluations/evidence/arms.py. Seeds from 100 on are for searching, 0 to 4 for what is reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from evaluations.evidence import flags
from evaluations.evidence.arms import ARMS, PLANS, Arm
from tokenizer.runtime.command import (
    as_flag_errors,
    command,
    make_parser,
    refuse_early,
    require_flags_at_least,
    require_flags_positive,
)
from tokenizer.runtime.config import flag_name

TUNABLE = ("lr", "code_lr_scale", "beta", "loss_floor", "follow_decay")
PROG = "evaluations/evidence/run.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    flags.add_bed(parser)
    parser.add_argument("--plan", choices=PLANS, help="a list of arms")
    parser.add_argument("--arms", nargs="+", default=[], choices=ARMS, metavar="ARM",
                        help=f"further arms, of {' '.join(ARMS)}")
    parser.add_argument("--seeds", type=int, nargs="+", default=[100, 101])
    for name in TUNABLE:
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, nargs="+", metavar="X",
                            help="in place of the arms' own; several: each of them")
    parser.add_argument("--recluster-at", type=int, nargs="+", metavar="STEP", help="k-means again at these steps")
    args = parser.parse_args(argv)
    flags.check_numbers(parser, args)
    require_flags_positive(parser, args, "lr code_lr_scale")
    require_flags_at_least(parser, args, 0, "beta loss_floor follow_decay recluster_at")
    if not args.plan and not args.arms:
        parser.error("name --plan or --arms")
    with as_flag_errors(parser):
        for name in chosen(args):
            variants(name, args)
    return args


def chosen(args: argparse.Namespace) -> list[str]:
    """Names of arms, each once."""
    return list(dict.fromkeys([*(PLANS[args.plan] if args.plan else ()), *args.arms]))


def variants(name: str, args: argparse.Namespace) -> list[Arm]:
    """The arm, with each combination of what the flags put in place of its own numbers.

    ValueError: the arm does not have what a flag asks for.
    """
    arms = [ARMS[name]]
    for field in TUNABLE:
        values = getattr(args, field) or [getattr(ARMS[name], field)]
        ignored = [value for value in values if field in ARMS[name].idle and value != getattr(ARMS[name], field)]
        if ignored:
            raise ValueError(f"{flag_name(field)} {ignored[0]:g} changes nothing in the arm {name}; leave one of them "
                             "out")
        arms = [_with(arm, name, **{field: value}) for value in values for arm in arms]
    return [_with(arm, name, recluster_at=args.recluster_at) for arm in arms] if args.recluster_at else arms


def _with(arm: Arm, name: str, **changes: Any) -> Arm:
    try:
        return dataclasses.replace(arm, **changes)
    except ValueError as error:
        raise ValueError(f"{flag_name(*changes)}, arm {name}: {error}") from error


if __name__ == "__main__":
    refuse_early(PROG, parse_args, flags.setting)

from evaluations.evidence.bed import with_features
from evaluations.evidence.setting import Setting
from evaluations.evidence.store import Run
from evaluations.evidence.sweep import Job, sweep


def planned(args: argparse.Namespace, setting: Setting) -> list[Job]:
    """What the flags ask for. Seeds outermost: an interrupted sweep has all arms on fewer seeds."""
    arms = [(name, arm) for name in chosen(args) for arm in variants(name, args)]
    return [(name, Run(arm, setting, seed)) for seed in args.seeds for name, arm in arms]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    flags.end_cleanly_on_sigterm()
    with command(PROG):
        setting = with_features(flags.setting(args), args.features)
        sweep(planned(args, setting), args.out, args.data_path, workers=args.jobs, cache=args.cache,
              features=args.features)


if __name__ == "__main__":
    main()
