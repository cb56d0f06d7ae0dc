"""Encodes and decodes images with a trained tokenizer, and converts tokenizers between formats.

    python tokenizer/reconstruct.py runs/digits images/ --out out/      # a run, a checkpoint or an exported folder
    python tokenizer/reconstruct.py vq_ds16_c2i.pt images/ --out out/   # LlamaGen's weights
    python tokenizer/reconstruct.py runs/digits --export-hf my_tokenizer/

Writes, for the readable images in the order of the source: OUT/pictures/*.png (original left, reconstruction right),
OUT/codes.npy (N, h, w) in the smallest unsigned type that holds the codebook, OUT/names.txt, OUT/metrics.json.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torchvision.utils import save_image

from tokenizer import pretrained
from tokenizer.data import BadImageCounter, consecutive
from tokenizer.image_sources import open_images
from tokenizer.perceptual import LPIPS
from tokenizer.runtime import distributed
from tokenizer.runtime.checkpoint import atomic_write, atomic_write_json, atomic_write_text
from tokenizer.runtime.command import command, make_parser, require_flags_at_least, require_out_file, require_out_folder
from tokenizer.validation import ReconstructionMeter, reconstructions
from tokenizer.vq_model import VQModel

PROG = "tokenizer/reconstruct.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("ckpt", help="run folder, checkpoint, LlamaGen .pt, or folder with config.json and model.safetensors")
    add("images", nargs="?", help="folder, .tar, .zip, shard pattern or list of images, or digits; none: only export")
    add("--out", type=Path, default=Path("reconstructions"), help="folder to write to (default: reconstructions)")
    add("--image-size", type=int, help="centre crop in pixels (default: the size that the tokenizer was trained at)")
    add("--batch-size", type=int, default=32, help="images at a time; does not change the results (default: 32)")
    add("--max-images", type=int, help="use the first images only (default: all)")
    add("--max-pictures", type=int, default=64, help="pictures to write; codes and metrics are of all (default: 64)")
    add("--max-bad-images", type=int, default=100, help="unreadable images to skip before stopping (default: 100)")
    add("--num-workers", type=int, default=0, help="data-loading processes (default: 0)")
    add("--weights", choices=("auto", "model", "ema"), default="auto", help="auto: the EMA if there is one")
    add("--codebook-l2-norm", action=argparse.BooleanOptionalAction, default=None,
        help="for LlamaGen files, which do not record it (default there: yes, as LlamaGen)")
    add("--lpips-vgg-weights", type=Path, help="file vgg16-397923af.pth: also measure LPIPS (default: not measured)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--export-hf", type=Path, metavar="FOLDER", help="write config.json and model.safetensors, Hugging Face style")
    add("--export-llamagen", type=Path, metavar="FILE.pt", help="write LlamaGen's checkpoint layout")
    args = parser.parse_args(argv)
    if not (args.images or args.export_hf or args.export_llamagen):
        parser.error("nothing to do: give images, --export-hf or --export-llamagen")
    require_flags_at_least(parser, args, 1, "batch_size image_size max_images")
    require_flags_at_least(parser, args, 0, "max_pictures max_bad_images num_workers")
    return args


def export(model: VQModel, args: argparse.Namespace) -> None:
    if args.export_hf:
        distributed.print0(f"wrote {pretrained.save_pretrained(model, args.export_hf)}")
    if args.export_llamagen:
        state = {"model": pretrained.to_llamagen_state_dict(model)}
        args.export_llamagen.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(args.export_llamagen, lambda file: torch.save(state, file))
        l2_norm = model.config.codebook_l2_norm
        distributed.print0(f"wrote {args.export_llamagen}; in LlamaGen set codebook_l2_norm={l2_norm}")


def reconstruct(model: VQModel, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Write everything for args.images -> metrics. ValueError: images or sizes that the tokenizer cannot take."""
    size = args.image_size or model.config.image_size
    source = open_images(None if args.images == "digits" else args.images, channels=model.config.image_channels)
    count = min(args.max_images or len(source), len(source))
    lpips = LPIPS(args.lpips_vgg_weights).to(device) if args.lpips_vgg_weights else None
    meter = ReconstructionMeter(model.quantize.num_codes, model.quantize.dim, device, lpips)
    bad = BadImageCounter(args.max_bad_images)
    codes, names = [], []
    pictures = args.out / "pictures"
    for batch in reconstructions(model, source, size, batches=consecutive(count, args.batch_size),
                                 num_workers=args.num_workers, bad=bad, device=device):
        meter.add(batch.x, batch.x_hat, batch.latents, batch.codes, batch.indices)
        codes.append(batch.indices.cpu().numpy())
        for i, original, decoded in zip(batch.images, batch.x, batch.x_hat, strict=True):
            names.append(source.name(i))
            if len(names) <= args.max_pictures:
                pictures.mkdir(parents=True, exist_ok=True)
                name = f"{i:06d}_{Path(source.name(i)).stem}.png"
                pair = (torch.stack([original, decoded]) + 1) / 2
                atomic_write(pictures / name, partial(save_image, pair, format="png", padding=0))
    if not names:
        some = ", ".join(sorted(bad.names)[:20])
        raise ValueError(f"none of the {count} images of {args.images} can be read: {some}")
    args.out.mkdir(parents=True, exist_ok=True)
    metrics = meter.result(model.quantize.codebook) | {"image_size": size, "unreadable_images": len(bad.names)}
    smallest = np.min_scalar_type(model.quantize.num_codes - 1)
    atomic_write(args.out / "codes.npy", lambda file: np.save(file, np.concatenate(codes).astype(smallest)))
    atomic_write_text(args.out / "names.txt", "".join(f"{name}\n" for name in names))
    for name in sorted(bad.names):
        distributed.print0(f"left out an image that cannot be read: {name}")
    atomic_write_json(args.out / "metrics.json", metrics)
    return metrics


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        device = distributed.init(args.device)
        if args.images:
            require_out_folder(args.out)
        if args.export_hf:
            require_out_folder(args.export_hf, "--export-hf")
        if args.export_llamagen:
            require_out_file(args.export_llamagen, "--export-llamagen")
        model = pretrained.load_tokenizer(args.ckpt, device, args.weights, codebook_l2_norm=args.codebook_l2_norm)
        export(model, args)
        if args.images:
            metrics = reconstruct(model, args, device)
            distributed.print0(" ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
            distributed.print0(f"wrote {args.out}")


if __name__ == "__main__":
    main()
