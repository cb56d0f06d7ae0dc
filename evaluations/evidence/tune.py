"""Gives every arm its own best learning rate, code learning rate and beta, and trains it with them on fresh seeds.

    python evaluations/evidence/tune.py cifar10_train.zip --plan tuned --num-codes 512 \\
        --out evaluations/results/tuned.jsonl --jobs 2
    python evaluations/evidence/table.py evaluations/results/tuned.jsonl --seeds 0 1 2 3 4

The grid (evaluations/evidence/tuning.py) is equal for all arms; what chooses is the mean PSNR of the search seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from evaluations.evidence import flags, tuning
from evaluations.evidence.arms import ARMS, PLANS
from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least

PROG = "evaluations/evidence/tune.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    flags.add_bed(parser)
    parser.add_argument("--plan", choices=PLANS, default="tuned", help="the arms")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help="these instead")
    parser.add_argument("--search-seeds", type=int, nargs="+", default=list(tuning.SEARCH_SEEDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(tuning.FINAL_SEEDS), help="of the final runs")
    args = parser.parse_args(argv)
    flags.check_numbers(parser, args)
    require_flags_at_least(parser, args, 0, "search_seeds")
    flags.require_once(parser, args, "search_seeds")
    if set(args.seeds) & set(args.search_seeds):
        parser.error(f"--seeds and --search-seeds share {sorted(set(args.seeds) & set(args.search_seeds))}: what is "
                     "reported must not have chosen")
    return args


if __name__ == "__main__":
    refuse_early(PROG, parse_args, flags.setting)

from evaluations.evidence.bed import require_trainable, with_features
from evaluations.evidence.comparison import label
from evaluations.evidence.store import Run
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
        # Arm by arm: an interrupted search has some arms whole.
        for name in names:
            points = tuning.grid(ARMS[name])
            search = [(name, Run(point, setting, seed)) for seed in args.search_seeds for point in points]
            results = sweep(search, args.out, args.data_path, workers=args.jobs, cache=args.cache,
                            features=args.features)
            chosen = tuning.best(ARMS[name], setting, args.search_seeds, results)
            if tuning.score(chosen, setting, args.search_seeds, results) == -math.inf:
                print0(f"{name}: each of {len(points)} diverged on a search seed; nothing is trained on --seeds")
                continue
            edges = tuning.edges(chosen)
            print0(f"{name}: best of {len(points)} is {label(name, chosen)}"
                   + (f"; at the grid's edge: {', '.join(edges)}" if edges else ""))
            sweep([(name, Run(chosen, setting, seed)) for seed in args.seeds], args.out, args.data_path,
                  workers=args.jobs, cache=args.cache, features=args.features)


if __name__ == "__main__":
    main()
