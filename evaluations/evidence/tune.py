"""Gives every arm its own best learning rate, code learning rate and beta, and trains it with them on fresh seeds.

    python evaluations/evidence/tune.py cifar10_train.zip --plan tuned --num-codes 512 \\
        --out evaluations/results/tuned.jsonl --jobs 2
    python evaluations/evidence/table.py evaluations/results/tuned.jsonl --seeds 0 1 2 3 4

The points (evaluations/evidence/tuning.py) are equal for all arms. All of them are trained on the first search seed,
the best few on the others, and of these the highest mean PSNR is chosen.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from evaluations.evidence import flags, tuning
from evaluations.evidence.arms import ARMS, PLANS, Arm
from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least

PROG = "evaluations/evidence/tune.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    flags.add_bed(parser)
    parser.add_argument("--plan", choices=PLANS, default="tuned", help="the arms")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help="these instead")
    parser.add_argument("--search-seeds", type=int, nargs="+", default=list(tuning.SEARCH_SEEDS),
                        help="the first sees every point, the others the best few")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(tuning.FINAL_SEEDS), help="of the final runs")
    args = parser.parse_args(argv)
    flags.check_numbers(parser, args)
    require_flags_at_least(parser, args, 0, "search_seeds")
    try:
        tuning.seeds(args.search_seeds, args.seeds)
    except ValueError as error:
        parser.error(str(error))
    return args


if __name__ == "__main__":
    refuse_early(PROG, parse_args, flags.setting)

from evaluations.evidence.bed import require_trainable, with_features
from evaluations.evidence.comparison import label
from evaluations.evidence.setting import Setting
from evaluations.evidence.store import Result, Run
from evaluations.evidence.sweep import sweep
from tokenizer.runtime.distributed import print0


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    flags.end_cleanly_on_sigterm()
    with command(PROG):
        setting = with_features(flags.setting(args), args.features)
        names = dict.fromkeys(args.arms or PLANS[args.plan])
        for name in names:
            require_trainable(name, ARMS[name], setting)
        for name in names:  # arm by arm: an interrupted search has some arms whole
            tune_arm(name, setting, args)


def tune_arm(name: str, setting: Setting, args: argparse.Namespace) -> None:
    """Search the arm's points, choose one and train it on the final seeds, all into --out."""
    def run(points: Sequence[Arm], seeds: Sequence[int]) -> dict[Run, Result]:
        jobs = [(name, Run(point, setting, seed)) for seed in seeds for point in points]
        return sweep(jobs, args.out, args.data_path, workers=args.jobs, cache=args.cache, features=args.features)

    points, first = tuning.grid(ARMS[name]), args.search_seeds[0]
    finalists = tuning.finalists(ARMS[name], setting, first, run(points, [first]))
    results = run(finalists, args.search_seeds)
    chosen = tuning.ranked(finalists, setting, args.search_seeds, results)[0]
    if tuning.score(chosen, setting, args.search_seeds, results) == -math.inf:
        print0(f"{name}: each of the best {len(finalists)} of {len(points)} points diverged on a search seed; nothing "
               "is trained on --seeds")
        return
    edges = tuning.edges(chosen)
    print0(f"{name}: best of {len(points)} points is {label(name, chosen)}"
           + (f"; at their edge: {', '.join(edges)}" if edges else ""))
    run([chosen], args.seeds)


if __name__ == "__main__":
    main()
