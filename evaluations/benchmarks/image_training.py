"""Times a training step of image tokenizers against LlamaGen's model, with the same weights in one process.

    python evaluations/benchmarks/image_training.py --peer /path/to/LlamaGen

VQ-16 at 256 x 256 and VQ-8 at 32 x 32 (LlamaGen has no VQ-4); pixel loss, losses of the quantizer and Adam, float32,
neither compiled. On a CPU the seconds are those of the process's threads together, so that other work on the machine
counts for little. The line on arithmetic is the share of what large matrix products reach there.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least

PROG = "evaluations/benchmarks/image_training.py"
CASES = {"256": ("VQ-16", 256, 1), "32": ("VQ-8", 32, 16)}  # model, side of the images, batch


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--peer", type=Path, required=True, help="checkout of LlamaGen")
    parser.add_argument("--only", choices=CASES, help="the size of the images (default: all)")
    for name, default in (("threads", 1), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="JSON of what was measured")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "threads repeats")
    return args


if __name__ == "__main__":
    refuse_early(PROG, parse_args)

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evaluations.benchmarks import peer
from tokenizer.pretrained import to_llamagen_state_dict
from tokenizer.vq_model import VQModel, VQModelConfig


class Theirs(nn.Module):
    """LlamaGen's model, with the loss that its VQLoss adds for the quantizer."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x_hat, (codebook, commit, entropy, _) = self.model(x)
        return x_hat, codebook + commit + entropy


class Ours(nn.Module):
    def __init__(self, model: VQModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x_hat, out = self.model(x)
        return x_hat, out.loss


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """ValueError: --peer is no checkout of LlamaGen, or its model computes something else."""
    vq_model, size, batch = CASES[name]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = peer.clock_of(device)
    torch.manual_seed(0)
    ours = Ours(VQModel(VQModelConfig(vq_model, image_size=size, codebook_l2_norm=True)).to(device).train())
    module = peer.load_module(args.peer, "tokenizer/tokenizer_image/vq_model.py")
    peers = module.VQ_models[vq_model](codebook_size=16384, codebook_embed_dim=8).to(device).train()
    peers.load_state_dict(to_llamagen_state_dict(ours.model))
    peers.quantize.codebook_used.requires_grad_(False)  # a buffer made as a parameter, which it writes into
    theirs = Theirs(peers)
    x = torch.rand(batch, 3, size, size, device=device) * 2 - 1

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        x_hat, quantizer = model(x)
        loss = (x_hat - x).square().mean() + quantizer
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    adams = [torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.95)) for model in (ours, theirs)]
    with FlopCounterMode(display=False) as counter:
        first = step(ours, adams[0])
    other = step(theirs, adams[1])
    if abs(first - other) > 1e-3 * abs(other):
        raise ValueError(f"--peer {args.peer}: its loss of {vq_model} is {other:.5f}, ours {first:.5f}")
    print(f"{vq_model}, {batch} x {size} x {size} on {device}, {args.threads} threads, torch {torch.__version__}")  # noqa: T201
    times = peer.compare(lambda: step(ours, adams[0]), lambda: step(theirs, adams[1]), args.repeats, clock)
    row = peer.report(f"training step of {vq_model}, {size} x {size}", "images", batch, *times)
    rate = counter.get_total_flops() / 1e9 / statistics.median(times[0])
    most = peer.matmul_gflops(device, clock)
    print(f"arithmetic: {rate:.0f} GFLOP/s in ours, {most:.0f} in float32 matrix products")  # noqa: T201
    return row | {"gflops": rate, "gflops_of_products": most}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        torch.set_num_threads(args.threads)
        peer.keep(args.out, [measure(name, args) for name in (CASES if args.only is None else [args.only])])


if __name__ == "__main__":
    main()
