"""Puts a trained model among those of tokenizer/pretrained/, in half the size: weights rounded to float16.

    python scripts/release.py runs/cifar10 --name cifar10-vq4
    python scripts/release.py runs/gpt --name digits-gpt --tokenizer digits-vq

A rounded tokenizer is a tokenizer of its own, with its own hash: extract the codes of a GPT with the released one.
Writes the folder's config.json, model.safetensors and README.md, and prints the hash of the weights.
"""

import argparse
import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tokenizer.runtime.command import command, make_parser, refuse_early
from tokenizer.stored import RELEASED

PROG = "scripts/release.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("model", help="what provq.load takes: a run, a checkpoint, an export")
    parser.add_argument("--name", required=True, help="of the folder, and for provq.load")
    parser.add_argument("--tokenizer", help="of a GPT: the name of its released tokenizer")
    parser.add_argument("--folder", type=Path, default=RELEASED, help="where released models are (default: this tree)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    refuse_early(PROG, parse_args)

import torch
from torch import Tensor

from autoregressive.api import ImageGenerator
from tokenizer.hub import load
from tokenizer.runtime import config
from tokenizer.weights import CONFIG_FILE, WEIGHTS_FILE, write_export


@torch.no_grad()
def round_to_half(module: torch.nn.Module) -> None:
    """Every weight to the nearest float16, in place. ValueError: beyond its range."""
    for name, weight in module.named_parameters():
        rounded = weight.half().float()
        if not bool(torch.isfinite(rounded).all()):
            raise ValueError(f"{name} holds {weight.abs().max():.3g}, beyond float16")
        weight.copy_(rounded)


def in_half(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in float16. ValueError: they are not."""
    halves = {key: value.half() for key, value in state.items()}
    changed = [key for key, value in state.items() if not torch.equal(halves[key].float(), value)]
    if changed:
        raise ValueError(f"{changed[0]} is not what was rounded: this quantizer's export computes it anew")
    return halves


def release(args: argparse.Namespace) -> Path:
    from safetensors.torch import load_file

    options: dict[str, Any] = {"tokenizer": args.folder / args.tokenizer} if args.tokenizer else {}
    model = load(args.model, **options)
    round_to_half(model.loaded.model if isinstance(model, ImageGenerator) else model.model)
    folder = model.save_pretrained(args.folder / args.name)
    description = config.load(folder / CONFIG_FILE)
    if args.tokenizer:
        description["vq_ckpt"] = f"../{args.tokenizer}"
    return write_export(folder, description, in_half(load_file(folder / WEIGHTS_FILE)))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        folder = release(args)
        digest = hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
        print(f"wrote {folder}\n{WEIGHTS_FILE} sha256 {digest}")


if __name__ == "__main__":
    main()
