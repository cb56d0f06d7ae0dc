"""TopoDisc: train vanilla VQ, its two cures and ProVQ on the 2-D diagnostic; write the numbers and the pictures.

    python synthetic/run_topodisc.py                           # the paper's view (Figures 2 and 3)
    python synthetic/run_topodisc.py --methods vanilla soft warmup provq simvq simvq+provq ema ema+provq
    python synthetic/run_topodisc.py --tuned                   # and the fair view: each arm at its own best setting

Writes under --out: summary.json, meters.json (every meter of every logged epoch and seed), figure2.png, figure3.png,
meters.png, dynamics.gif; with --tuned also scan.json, summary_tuned.json, figure2_tuned.png, learning_rate.png.
"""

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from synthetic.settings import CURRICULA, FINAL_SEEDS, FINALISTS, FIRST_SEED, Setting, parse_method
from tokenizer.runtime.command import command, refuse_early, require_out_folder
from tokenizer.runtime.config import arg, parse, require_at_least, require_positive
from tokenizer.runtime.run_config import Effect, require_effects

PROG = "synthetic/run_topodisc.py"


@dataclasses.dataclass(frozen=True)
class RunConfig(Setting):
    """The setting of all arms, and what to do with it."""

    methods: tuple[str, ...] = arg(
        ("vanilla", "soft", "warmup", "provq"),
        "arms; gains are over the first. Also simvq, ema, and QUANTIZER+CURRICULUM such as simvq+provq "
        "(curricula: soft warmup provq); ours: the quantizer follow, and +recluster at the end of a name")
    seeds: int = arg(20, "seeds of each arm: 0 .. N-1, each with its own data, networks and codes")
    out: str = arg("runs/topodisc", "folder for numbers and pictures")
    log_every: int = arg(10, "epochs between two entries of the meters, and two frames of the animation")
    workers: int = arg(0, "methods trained at the same time, in processes of one thread; 0: one per CPU core")
    tuned: bool = arg(False, "also the fair view: each method at its own best learning rate and width")
    tune_lr: tuple[float, ...] = arg((1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 1e-1), "--tuned: learning rates to scan")
    tune_width: tuple[int, ...] = arg((32, 64, 128), "--tuned: widths to scan")
    tune_codes: tuple[int, ...] = arg((), "--tuned: further codebook sizes to scan; the arms stay at --num-codes")
    tune_seeds: int = arg(8, f"--tuned: seeds of the scan, from {FIRST_SEED} on; "
                          f"{FINAL_SEEDS} times as many decide between the best {FINALISTS}")

    def __post_init__(self) -> None:
        super().__post_init__()
        for method in self.methods:
            parse_method(method)
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"--methods names one twice: {' '.join(self.methods)}")
        if not 2 <= self.seeds <= FIRST_SEED:
            raise ValueError(f"--seeds must lie between 2 (an interval) and {FIRST_SEED}, got {self.seeds}")
        require_at_least(self, 0, "workers")
        require_at_least(self, 1, "log_every tune_width tune_codes tune_seeds")
        require_positive(self, "tune_lr")
        if max(self.tune_codes, default=0) > self.disk_points + self.outline_points:
            raise ValueError(f"--tune-codes {max(self.tune_codes)} is more than there are points")


def _has_transition(cfg: RunConfig) -> bool:
    return bool(cfg.transition_epochs) and any(CURRICULA[parse_method(method)[1]][1] for method in cfg.methods)


# Not the lengths of stages: also where no arm has them, they must fit into --epochs.
EFFECTS = {  # see run_config.py
    **{name: Effect(lambda cfg: cfg.tuned, "without the fair view", "add --tuned")
       for name in ("tune_lr", "tune_width", "tune_codes", "tune_seeds")},
    "loss_floor": Effect(lambda cfg: _has_transition(cfg) or cfg.loss_floor == 1,  # as in discrete training
                         "where no arm has a transition", "add one such as provq to --methods"),
}


def parse_config(argv: Sequence[str] | None = None) -> RunConfig:
    return parse(RunConfig, argv, description=__doc__, prog=PROG,
                 refuse=lambda cfg, given: require_effects(cfg, given, EFFECTS))


def check(cfg: RunConfig) -> None:
    """ValueError: a folder that cannot be written."""
    require_out_folder(Path(cfg.out))


if __name__ == "__main__":
    refuse_early(PROG, parse_config, check)

from synthetic import plots, tuning
from synthetic.topodisc import METERS, Report, Run, summarise, table, train_jobs
from tokenizer.runtime.config import to_dict
from tokenizer.runtime.distributed import print0
from tokenizer.runtime.files import atomic_write_text


def train_all(settings: Mapping[str, Setting], cfg: RunConfig) -> dict[str, Run]:
    """Every method at its setting, on seeds 0 .. cfg.seeds - 1."""
    start, runs = time.perf_counter(), {}
    trained = train_jobs(list(settings.items()), range(cfg.seeds), log_every=cfg.log_every, workers=processes(cfg))
    for method, run in zip(settings, trained, strict=True):
        runs[method] = run
        print0(f"{method}: {cfg.seeds} seeds x {cfg.epochs} epochs, done after {time.perf_counter() - start:.0f} s")
    return runs


def processes(cfg: RunConfig) -> int:
    if cfg.workers:
        return cfg.workers
    # Linux: the cores that this process may use, fewer than the machine has in many containers and batch jobs
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def write_json(path: Path, value: Any) -> None:
    atomic_write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def meters_json(runs: Mapping[str, Run]) -> dict[str, Any]:
    """{"meters": what they are, "epochs": (L,), "methods": {NAME: {METER: (L, S)}}}, null where there is no meaning."""
    def rows(run: Run, meter: str) -> list[list[float | None]]:
        return [[None if math.isnan(v) else float(f"{v:.5g}") for v in row] for row in run.meters[meter].tolist()]

    return {"meters": METERS, "epochs": next(iter(runs.values())).epochs,
            "methods": {name: {meter: rows(run, meter) for meter in METERS} for name, run in runs.items()}}


def paper_view(cfg: RunConfig, out: Path) -> None:
    """All arms at one setting."""
    runs = train_all(dict.fromkeys(cfg.methods, cfg), cfg)
    report = Report(summarise(runs, to_dict(cfg), cfg.methods[0]), runs)
    write_json(out / "summary.json", report.summary)
    write_json(out / "meters.json", meters_json(runs))
    plots.comparison(report, cfg.disk_points, out / "figure2.png")
    plots.dynamics(runs, cfg.disk_points, out / "figure3.png")
    plots.curves(runs, out / "meters.png")
    plots.animation(runs, cfg.disk_points, out / "dynamics.gif")
    print0(f"\nOne setting for all: lr {cfg.lr:g}, width {cfg.width}, {cfg.num_codes} codes\n{table(report.summary)}")


def collect(what: str, total: int, cells: Iterable[tuning.Cell]) -> list[tuning.Cell]:
    """The cells as a list, with a line of progress for each."""
    done = []
    for cell in cells:
        done.append(cell)
        print0(f"{what} {len(done)}/{total}: {cell['method']} lr {cell['lr']:g} width {cell['width']} "
               f"K {cell['num_codes']}: error {tuning.error(cell):.5f}")
    return done


def fair_view(cfg: RunConfig, out: Path) -> None:
    """Each arm at the learning rate and width that suit it best, found on other seeds."""
    codebooks = dict.fromkeys((cfg.num_codes, *cfg.tune_codes))
    total = len(codebooks) * len(cfg.tune_lr) * len(cfg.tune_width) * len(cfg.methods)
    cells = collect("scan", total, tuning.scan(
        cfg.methods, cfg, lrs=cfg.tune_lr, widths=cfg.tune_width, codebooks=list(codebooks), seeds=cfg.tune_seeds,
        workers=processes(cfg)))
    finalists = min(FINALISTS, len(cfg.tune_lr) * len(cfg.tune_width))
    finals = collect("final", finalists * len(cfg.methods), tuning.finals(
        cells, cfg.methods, cfg, seeds=cfg.tune_seeds, workers=processes(cfg)))
    write_json(out / "scan.json", {"scan": cells, "finals": finals})
    chosen = {method: tuning.best(finals, method) for method in cfg.methods}
    settings = {method: dataclasses.replace(cfg, lr=cell["lr"], width=cell["width"]) for method, cell in chosen.items()}
    runs = train_all(settings, cfg)
    tuned = {method: {"lr": cell["lr"], "width": cell["width"]} for method, cell in chosen.items()}
    report = Report(summarise(runs, {**to_dict(cfg), "tuned": tuned}, cfg.methods[0]), runs)
    write_json(out / "summary_tuned.json", report.summary)
    plots.comparison(report, cfg.disk_points, out / "figure2_tuned.png")
    plots.learning_rates(cells, cfg.methods, cfg.num_codes, cfg.width, out / "learning_rate.png")
    print0("\nEach at its own best: "
           + ", ".join(f"{method} lr {c['lr']:g} width {c['width']}" for method, c in tuned.items()))
    print0(table(report.summary))
    if {"vanilla", "soft", "provq"} <= set(cfg.methods):
        print0("\nSettings of the scan that show what the paper reports, the best vanilla first:")
        for view in tuning.paper_views(cells):
            print0("  " + ", ".join(f"{name} {value:.4g}" for name, value in view.items()))


def main(argv: Sequence[str] | None = None) -> None:
    cfg = parse_config(argv)
    with command(PROG, one_process=True):
        check(cfg)
        out = Path(cfg.out)
        out.mkdir(parents=True, exist_ok=True)
        paper_view(cfg, out)
        if cfg.tuned:
            fair_view(cfg, out)
        print0(f"\nwrote {out}")


if __name__ == "__main__":
    main()
