"""Flags that the commands of this folder share. No torch, see tokenizer/runtime/command.py."""

from __future__ import annotations

import argparse
import dataclasses
import signal
from pathlib import Path
from types import FrameType
from typing import Any

from evaluations.evidence.setting import MODELS, Setting
from tokenizer.runtime.command import require_flags_at_least
from tokenizer.runtime.config import flag_name

CONFIRM = {"model": "VQ-4", "image_size": 32, "steps": 3000, "batch_size": 64, "warmup_steps": 1000,
           "transition_steps": 1000}  # in place of the small bed's, with --bed confirm

_NUMBERS = [field for field in dataclasses.fields(Setting) if field.name not in ("data", "disc_start", "features")]


def add_bed(parser: argparse.ArgumentParser) -> None:
    """The file of images, what is run on it, and where results go."""
    parser.add_argument("data_path", type=Path, help="images, as for train_provq.py, such as cifar10_train.zip")
    parser.add_argument("--out", type=Path, required=True,
                        help="results file, NAME.jsonl: what it has is not run again")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, a process of one thread each")
    parser.add_argument("--cache", type=Path, help="folder for decoded images; default: a temporary one")
    parser.add_argument("--bed", choices=("small", "confirm"), default="small",
                        help="small: CIFAR-10 at 16x16, 600 steps of 32; confirm: 32x32, VQ-4, 3000 steps of 64")
    parser.add_argument("--disc-start", type=int, metavar="STEP",
                        help="first step, counted from 1, with a discriminator; default: none")
    parser.add_argument("--features", metavar="EXTRACTOR",
                        help="score rFID as well, in features as of evaluations/reconstruction.py, such as "
                             "torchscript:PATH")
    for field in _NUMBERS:
        choices = tuple(MODELS) if field.name == "model" else None
        parser.add_argument(flag_name(field.name), type=str if choices else int, choices=choices,
                            help=f"default {field.default}" + (
                                f", confirm {CONFIRM[field.name]}" if field.name in CONFIRM else ""))


def check_numbers(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with status 2, naming the flag: a number of `add_bed`, or a seed, beyond sense whatever the others are."""
    require_flags_at_least(parser, args, 1, "jobs disc_start num_codes dim image_size steps batch_size held_out "
                           "latents_per_code")
    require_flags_at_least(parser, args, 0, "warmup_steps transition_steps seeds")
    require_once(parser, args, "seeds")


def require_once(parser: argparse.ArgumentParser, args: argparse.Namespace, name: str) -> None:
    """End with status 2, naming the flag: one of its values is there twice."""
    values = getattr(args, name)
    for value in values:
        if values.count(value) > 1:
            parser.error(f"{flag_name(name)} names {value} twice; a run is of one seed")


def setting(args: argparse.Namespace) -> Setting:
    """What the flags of `add_bed` say, but for --features, see bed.with_features.

    ValueError: see Setting. FileNotFoundError: no such images.
    """
    if not args.data_path.exists():
        raise FileNotFoundError(f"{args.data_path}: no such file of images")
    values: dict[str, Any] = dict(CONFIRM) if args.bed == "confirm" else {}
    given = {name: getattr(args, name) for name in ("disc_start", *(field.name for field in _NUMBERS))}
    values |= {name: value for name, value in given.items() if value is not None}
    return Setting(args.data_path.name, **values)


def end_cleanly_on_sigterm() -> None:
    """A terminated command ends its workers, as on Ctrl-C."""
    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
