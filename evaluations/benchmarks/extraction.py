"""Times extract_codes.py against LlamaGen's procedure: one image at a time with its mirror image, two files each.

    python evaluations/benchmarks/extraction.py [--peer /path/to/LlamaGen] [--images 512]

At 32 x 32 both run our VQ-4 tokenizer, which LlamaGen does not have: the ratio is that of the procedures. At 256 x 256
theirs is LlamaGen's VQ-16 from the checkout (--peer), with the same weights. Ours runs in float32 and in bfloat16
(--mixed-precision bf16), at 32 x 32 also compiled (--compile); the share of codes that differ is printed. Pictures are
made up and read from a folder of JPEG files by both. The line on arithmetic says how near the encoder is to what the
processor can do at all: convolutions take nearly all of the time.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least

PROG = "evaluations/benchmarks/extraction.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--peer", type=Path, help="checkout of LlamaGen, for 256 x 256")
    for name, default in (("images", 512), ("images-256", 8), ("num-workers", 0), ("threads", 2), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch-size", type=int, help="(default: extract_codes.py's)")
    parser.add_argument("--out", type=Path, help="JSON of what was measured")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "images images_256 threads repeats batch_size")
    require_flags_at_least(parser, args, 0, "num_workers")
    return args


if __name__ == "__main__":
    refuse_early(PROG, parse_args)

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from autoregressive.code_shards import code_dtype
from autoregressive.extraction import default_batch_size, extract_shard
from evaluations.benchmarks import peer
from tokenizer.data import BadImageCounter, ImageDataset, consecutive, make_loader
from tokenizer.image_sources import open_images
from tokenizer.pixels import from_uint8
from tokenizer.pretrained import to_llamagen_state_dict
from tokenizer.vq_model import VQModel, VQModelConfig


def measure(title: str, model: VQModel, encode: Callable[[Tensor], Tensor], size: int, args: argparse.Namespace,
            images: int, folder: Path, precision: str = "none",
            compiled: bool = False) -> dict[str, Any]:
    """encode: images (2, C, S, S) -> codes, any shape, as the peer computes them."""
    encoder = torch.compile(model.encode_latents) if compiled else None
    random = np.random.default_rng(0)
    pictures = folder / f"pictures{size}"
    pictures.mkdir(exist_ok=True)
    for i in range(images):
        pixels = random.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((size + 20, size)).save(pictures / f"{i:05d}.jpg")
    dataset = ImageDataset(open_images(str(pictures)), size)
    device = torch.device("cpu")
    batch_size = args.batch_size or default_batch_size(size, device)

    def ours() -> None:
        batches = consecutive(images, batch_size)
        codes, _ = extract_shard(model, dataset, batches, image_size=size, flip=True, precision=precision,
                                 num_workers=args.num_workers, device=device, bad=BadImageCounter(0), encode=encoder)
        np.save(folder / "codes.npy", codes.astype(code_dtype(model.quantize.num_codes)))

    def theirs() -> None:
        out = folder / "theirs"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for i, batch in enumerate(make_loader(dataset, consecutive(images, 1))):
            x = from_uint8(batch["image"])
            with torch.no_grad():
                codes = encode(torch.cat([x, x.flip(-1)]))
            np.save(out / f"codes{i}.npy", codes.reshape(1, 2, -1).numpy())
            np.save(out / f"labels{i}.npy", batch["label"].numpy())

    title += f", ours {precision}{' compiled' * compiled}"
    print(f"{title}, {images} images, batch {batch_size} against 1, {args.threads} threads, "  # noqa: T201
          f"torch {torch.__version__}")
    clock = time.perf_counter if args.num_workers else peer.clock_of(device)  # workers' CPU time is not this process's
    mine, others = peer.compare(ours, theirs, args.repeats, clock)
    row = peer.report(f"extraction, {title}", "images", images, mine, others)
    codes = np.concatenate([np.load(folder / "theirs" / f"codes{i}.npy")[0] for i in range(images)])
    differ = (np.load(folder / "codes.npy").reshape(codes.shape) != codes).mean()
    print(f"codes  {100 * differ:10.2f} % differ")  # noqa: T201
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode_latents(torch.zeros(1, 3, size, size))
    flops = counter.get_total_flops() / 1e9  # of one view
    print(f"arithmetic: {flops:.3f} GFLOP per view, {2 * flops * images / min(mine):.0f} GFLOP/s in ours, "  # noqa: T201
          f"{peer.matmul_gflops(device, clock):.0f} in float32 matrix products")
    return row | {"differ": float(differ)}


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """ValueError: --peer is no checkout of LlamaGen."""
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        small = VQModel(VQModelConfig(vq_model="VQ-4", image_size=32, codebook_size=512)).eval()
        for precision, compiled in (("none", False), ("none", True), ("bf16", False), ("bf16", True)):
            rows.append(measure("32 x 32, VQ-4 for both", small,
                                lambda x: small.quantize.encode(small.encode_latents(x)), 32, args, args.images,
                                Path(name), precision, compiled))
        if args.peer:
            large = VQModel(VQModelConfig(codebook_l2_norm=True)).eval()
            module = peer.load_module(args.peer, "tokenizer/tokenizer_image/vq_model.py")
            theirs = module.VQ_models["VQ-16"](codebook_size=16384, codebook_embed_dim=8)
            theirs.load_state_dict(to_llamagen_state_dict(large))
            theirs.eval()
            for precision in ("none", "bf16"):
                rows.append(measure("256 x 256, VQ-16", large, lambda x: theirs.encode(x)[2][2], 256, args,
                                    args.images_256, Path(name), precision))
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        peer.keep(args.out, measure_all(args))


if __name__ == "__main__":
    main()
