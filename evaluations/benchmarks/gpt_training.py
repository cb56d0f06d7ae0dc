"""Times a training step of GPT-B against LlamaGen's model, with the same weights in one process, neither compiled.

    python evaluations/benchmarks/gpt_training.py --peer /path/to/LlamaGen [--batch-size 2]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least

PROG = "evaluations/benchmarks/gpt_training.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--peer", type=Path, required=True, help="checkout of LlamaGen")
    for name, default in (("batch-size", 2), ("threads", 2), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="JSON of what was measured")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "batch_size threads repeats")
    return args


if __name__ == "__main__":
    refuse_early(PROG, parse_args)

import torch
import torch.nn.functional as F

from autoregressive.gpt import GPT
from autoregressive.gpt_config import GPT_PRESETS
from evaluations.benchmarks import peer


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """ValueError: --peer is no checkout of LlamaGen."""
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    ours = GPT(GPT_PRESETS["GPT-B"]).to(device).train()
    theirs = peer.load_module(args.peer, "autoregressive/models/gpt.py").GPT_models["GPT-B"](
        vocab_size=16384, block_size=256, num_classes=1000, cls_token_num=1, model_type="c2i")
    theirs.load_state_dict(ours.state_dict())
    theirs.to(device).train()
    theirs.freqs_cis = theirs.freqs_cis.to(device)
    codes = torch.randint(0, 16384, (args.batch_size, 256), device=device)
    labels = torch.arange(args.batch_size, device=device)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True) for m in (ours, theirs)]

    def run_ours() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = ours(codes[:, :-1], labels)
        F.cross_entropy(logits.flatten(0, 1), codes.flatten()).backward()
        optimizers[0].step()
        optimizers[0].zero_grad(set_to_none=True)

    def run_theirs() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            _, loss = theirs(cond_idx=labels, idx=codes[:, :-1], targets=codes)
        loss.backward()
        optimizers[1].step()
        optimizers[1].zero_grad(set_to_none=True)

    print(f"GPT-B, batch {args.batch_size} x 256 codes on {device}, {args.threads} threads, torch {torch.__version__}")  # noqa: T201
    times = peer.compare(run_ours, run_theirs, args.repeats, peer.clock_of(device))
    return [peer.report("training step of GPT-B", "codes", 256 * args.batch_size, *times)]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        peer.keep(args.out, measure(args))


if __name__ == "__main__":
    main()
