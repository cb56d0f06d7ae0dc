"""Flags of what trains a host twice, bare and attached to, and the two's names. No torch, see runtime/command.py."""

from __future__ import annotations

import argparse

from tokenizer.runtime.command import require_flags_at_least, require_flags_positive

BARE, ATTACHED = "bare", "+ ProVQ"


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--image-size", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--code-lr", type=float, help="learning rate of the quantizer's parameters, default --lr")
    parser.add_argument("--loss-floor", type=float, default=0.5, help="lambda of Eq. 4")
    parser.add_argument("--val-size", type=int, default=1000, help="held-out images")
    parser.add_argument("--max-images", type=int, default=20_000, help="at most so many of each half are read")


def check_flags(parser: argparse.ArgumentParser, args: argparse.Namespace, downsample: int) -> None:
    """End with status 2 for values that cannot be. downsample: of the images, by the model."""
    require_flags_at_least(parser, args, 3, "steps")
    require_flags_at_least(parser, args, 1, "image_size batch_size val_size max_images")
    require_flags_at_least(parser, args, 0, "seeds")
    require_flags_positive(parser, args, "lr code_lr")
    if args.image_size % downsample:
        parser.error(f"--image-size {args.image_size} must be a multiple of {downsample}")
    if not 0 <= args.loss_floor <= 1:
        parser.error(f"--loss-floor {args.loss_floor} must lie in [0, 1]")
