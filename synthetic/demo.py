"""The disease and the cure in seconds: waves through 64 codes, with and without ProVQ.

    python synthetic/demo.py                  # a table and demo.png, under half a minute of one CPU core
    python synthetic/demo.py --seeds 5        # mean ± standard deviation over seeds 0 to 4

Sine waves of random frequency and phase, 64 points each, are squeezed by a small network into one of 64 codes and drawn
again from it. A quantizer that is there from the start (vanilla) keeps most of its codes unused for ever, and so does
one that fades in over random codes (soft). After a warm-up without a quantizer, k-means puts the codes where the
latents are (warmup); ProVQ fades in from there (provq).
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least, require_out_file

PROG = "synthetic/demo.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--seeds", type=int, default=1, help="of each arm: 0 .. N-1 (default: 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/demo.png"), metavar="FILE.png",
                        help="picture of seed 0 (default: %(default)s)")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "seeds")
    return args


def check(args: argparse.Namespace) -> None:
    """ValueError: a picture that cannot be written."""
    require_out_file(args.out)


if __name__ == "__main__":
    refuse_early(PROG, parse_args, check)

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from synthetic import plots
from synthetic.plots import Panel
from tokenizer.provq import Curriculum, ProVQ, VectorQuantizer
from tokenizer.runtime.distributed import print0
from tokenizer.runtime.over_seeds import merge

POINTS, CODES, DIM = 64, 64, 8
STEPS, BATCH, LR = 1200, 256, 1e-3
ARMS = {  # warm-up and transition steps
    "vanilla": (0, 0),
    "soft": (0, STEPS // 3),
    "warmup": (STEPS // 3, 0),
    "provq": (STEPS // 3, STEPS // 3),
}
HELD_OUT = 2000


def waves(count: int, generator: torch.Generator) -> Tensor:
    """(count, POINTS) float32: one to three periods, any phase."""
    frequency, phase = torch.rand(2, count, 1, generator=generator)
    return torch.sin(2 * torch.pi * ((1 + 2 * frequency) * torch.linspace(0, 1, POINTS) + phase))


def network(width_in: int, width_out: int, width: int = 128) -> nn.Module:
    return nn.Sequential(nn.Linear(width_in, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
                         nn.Linear(width, width_out))


class Scores(NamedTuple):
    mse: float
    codes_used: int  # by the held-out waves


def train(name: str, seed: int) -> tuple[Scores, Panel]:
    """One arm: what it reaches on held-out waves, and what it looks like. All arms of a seed share data and weights."""
    torch.manual_seed(seed)
    data = torch.Generator().manual_seed(seed)
    encoder, decoder = network(POINTS, DIM), network(DIM, POINTS)
    provq = ProVQ(VectorQuantizer(CODES, DIM), Curriculum(*ARMS[name]))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters(), *provq.parameters()], lr=LR)

    for step in range(STEPS):
        provq.set_step(step)
        if provq.needs_init:  # once, when the warm-up has ended
            with torch.no_grad():
                provq.init_codebook(encoder(waves(16 * CODES, data)), optimizers=[optimizer])
        x = waves(BATCH, data)
        out = provq(encoder(x))
        loss = F.mse_loss(decoder(out.quantized), x) + out.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    provq.eval()
    with torch.no_grad():
        x = waves(HELD_OUT, torch.Generator().manual_seed(10**6 + seed))
        z = encoder(x)
        out = provq(z)
        y = decoder(out.quantized)
        scores = Scores(F.mse_loss(y, x).item(), out.indices.unique().numel())
        title = f"{name}: {scores.codes_used} of {CODES} codes, MSE {scores.mse:.3f}"
        return scores, Panel(title, x[:3], y[:3], z, provq.codebook().detach().clone())


def row(name: str, scores: list[Scores]) -> str:
    def cell(values: list[float], digits: int) -> str:
        merged = merge(values)
        assert merged is not None
        spread = "" if merged.deviation is None else f" ± {merged.deviation:.{digits}f}"
        return f"{merged.mean:.{digits}f}{spread}"

    used = cell([float(s.codes_used) for s in scores], 0 if len(scores) == 1 else 1)
    return f"| {name:7} | {cell([s.mse for s in scores], 3):>13} | {used:>11} |"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        check(args)
        print0(f"| arm     |  MSE of waves |  codes used |\n|{'-' * 9}|{'-' * 15}|{'-' * 13}|")
        panels = []
        for name in ARMS:
            runs = [train(name, seed) for seed in range(args.seeds)]
            panels.append(runs[0][1])
            print0(row(name, [scores for scores, _ in runs]))
        args.out.parent.mkdir(parents=True, exist_ok=True)
        plots.waves(panels, args.out)
        print0(f"\nwrote {args.out}: above, waves (grey) and what comes back (orange); below, latents (blue) and codes "
               "(black) in their plane of largest spread")


if __name__ == "__main__":
    main()
