"""Times sampling from GPT-B against LlamaGen's own generate, with the same weights in one process.

    python evaluations/benchmarks/sampling.py --peer /path/to/LlamaGen [--batch-size 8] [--codes 256] [--cfg-scale 2]

Prints codes per second of both (medians over repeats taken in turn), and the share of the memory bandwidth that reading
the weights once per step takes. On a CPU the seconds are those of the process's threads together, so that other work on
the machine counts for little.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from autoregressive.sampling_config import SamplingConfig
from tokenizer.runtime.command import as_flag_errors, command, make_parser, refuse_early, require_flags_at_least

PROG = "evaluations/benchmarks/sampling.py"
CODES = 256  # of an image, of both models


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--peer", type=Path, required=True, help="checkout of LlamaGen")
    for name, default in (("batch-size", 8), ("codes", CODES), ("threads", 2), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--cfg-scale", type=float, default=2.0)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="compile our decoding step")
    parser.add_argument("--out", type=Path, help="JSON of what was measured")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "batch_size codes threads repeats")
    if args.codes > CODES:
        parser.error(f"--codes is {args.codes}; both draw at most {CODES}, those of an image of 256 x 256 pixels")
    with as_flag_errors(parser):
        args.sampling = SamplingConfig(cfg_scale=args.cfg_scale)
    return args


if __name__ == "__main__":
    refuse_early(PROG, parse_args)

import torch

from autoregressive.gpt import GPT
from autoregressive.gpt_config import GPT_PRESETS
from autoregressive.sampling import CompiledDecoding, generate
from evaluations.benchmarks import peer


def bandwidth(device: torch.device, clock: Callable[[], float]) -> float:
    """Bytes per second of a copy within the device's memory, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / min(peer.seconds(lambda: target.copy_(source), clock) for _ in range(10))


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """ValueError: --peer is no checkout of LlamaGen."""
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock = peer.clock_of(device)
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    ours = GPT(GPT_PRESETS["GPT-B"])
    torch.nn.init.normal_(ours.output.weight, std=0.02)
    theirs = peer.load_module(args.peer, "autoregressive/models/gpt.py").GPT_models["GPT-B"](
        vocab_size=16384, block_size=CODES, num_classes=1000, cls_token_num=1, model_type="c2i")
    theirs.load_state_dict(ours.state_dict())
    ours.to(device).cast(dtype).eval()
    theirs.to(device=device, dtype=dtype).eval()
    their_generate = peer.load_module(args.peer, "autoregressive/models/generate.py").generate
    labels = torch.arange(args.batch_size, device=device)
    compiled = CompiledDecoding(ours) if args.compile else None

    def run_ours() -> object:
        return generate(ours, labels, seeds=range(args.batch_size), config=args.sampling, num_codes=args.codes,
                        compiled=compiled)

    def run_theirs() -> object:
        with torch.device(device):
            return their_generate(theirs, labels, args.codes, cfg_scale=args.cfg_scale, temperature=1.0, top_k=0,
                                  top_p=1.0, sample_logits=True)

    print(f"GPT-B, {args.codes} codes, batch {args.batch_size}, guidance {args.cfg_scale}, {args.dtype} on {device}, "  # noqa: T201
          f"{args.threads} threads, torch {torch.__version__}")
    times = peer.compare(run_ours, run_theirs, args.repeats, clock)
    row = peer.report("sampling from GPT-B", "codes", args.batch_size * args.codes, *times)
    read = ours.config.num_parameters * torch.finfo(dtype).bits / 8 * args.codes
    share = read / statistics.median(times[0]) / bandwidth(device, clock)
    print(f"share of the memory bandwidth: {share:.1%}")  # noqa: T201
    return [row | {"share_of_bandwidth": share}]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        peer.keep(args.out, measure(args))


if __name__ == "__main__":
    main()
