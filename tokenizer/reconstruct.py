"""Encodes and decodes images with a trained tokenizer, and converts tokenizers between formats.

    python tokenizer/reconstruct.py runs/digits images/ --out out/      # a run, a checkpoint or an exported folder
    python tokenizer/reconstruct.py vq_ds16_c2i.pt cat.png --out out/   # LlamaGen's weights; a single image
    python tokenizer/reconstruct.py runs/digits --export-hf my_tokenizer/

Writes, for the readable images in the order of the source: OUT/pictures/*.png (original left, reconstruction right),
OUT/codes.npy (N, h, w) in the smallest unsigned type that holds the codebook, OUT/names.txt (a line each, see
image_names.py), OUT/metrics.json, OUT/settings.json. The same command again writes them anew; a folder with anything
else in it is left alone.
"""

from __future__ import annotations

import argparse
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tokenizer.image_sources import add_image_flags, path_mode, require_image_flags
from tokenizer.runtime.command import (
    command,
    make_parser,
    refuse_early,
    require_flags_at_least,
    require_out_file,
    require_out_folder,
)
from tokenizer.stored import require_stored

PROG = "tokenizer/reconstruct.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("ckpt", help="run folder, checkpoint, LlamaGen .pt, or folder with config.json and model.safetensors")
    add("images", nargs="?", help="image, folder, .tar, .zip, shard pattern or list of images, or digits; none: only "
                                  "export")
    add_image_flags(parser)
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
    require_image_flags(parser, args)
    if args.images == "":
        parser.error("images is an empty path; for the current folder write a dot")
    if not (args.images or args.export_hf or args.export_llamagen):
        parser.error("nothing to do: give images, --export-hf or --export-llamagen")
    require_flags_at_least(parser, args, 1, "batch_size image_size max_images")
    require_flags_at_least(parser, args, 0, "max_pictures max_bad_images num_workers")
    return args


def check(args: argparse.Namespace) -> None:
    """ValueError, FileNotFoundError: outputs that cannot be written, a model that is not there."""
    if args.images:
        require_out_folder(args.out)
    if args.export_hf:
        require_out_folder(args.export_hf, "--export-hf")
    if args.export_llamagen:
        require_out_file(args.export_llamagen, "--export-llamagen")
    require_stored(args.ckpt, args.weights, "tokenizer")
    if args.images not in (None, "digits"):
        path_mode(args.images)


if __name__ == "__main__":
    refuse_early(PROG, parse_args, check)

import numpy as np
import torch

from tokenizer import pretrained
from tokenizer.data import BadImageCounter, consecutive, describe_source
from tokenizer.image_names import to_line, write_names
from tokenizer.image_readers import ImageOptions
from tokenizer.image_sources import open_images_or_one
from tokenizer.perceptual import LPIPS
from tokenizer.runtime import config, distributed
from tokenizer.runtime.files import atomic_write, atomic_write_json
from tokenizer.validation import ReconstructionMeter, reconstructions
from tokenizer.vq_model import VQModel
from tokenizer.weights import CONFIG_FILE, WEIGHTS_FILE

PICTURES, SETTINGS = "pictures", "settings.json"
OUTPUTS = {PICTURES, SETTINGS, "codes.npy", "names.txt", "metrics.json"}
MAX_NAME = 240  # bytes of a file's name; file systems take 255, of which a temporary name needs some


def export(model: VQModel, args: argparse.Namespace) -> None:
    if args.export_hf:
        distributed.print0(f"wrote {pretrained.save_pretrained(model, args.export_hf)}")
    if args.export_llamagen:
        state = {"model": pretrained.to_llamagen_state_dict(model)}
        args.export_llamagen.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(args.export_llamagen, lambda file: torch.save(state, file))
        l2_norm = model.config.codebook_l2_norm
        distributed.print0(f"wrote {args.export_llamagen}; in LlamaGen set codebook_l2_norm={l2_norm}")


def check_out(out: Path, settings: dict[str, Any] | None = None) -> None:
    """ValueError: the folder holds something else, or reconstructions made otherwise than by these settings.

    An export's files may lie there as well.
    """
    if not out.exists():
        return
    other = sorted(p.name for p in out.iterdir()
                   if p.name not in OUTPUTS | {CONFIG_FILE, WEIGHTS_FILE})
    mine = sorted(p.name for p in out.iterdir() if p.name in OUTPUTS)
    if other or (mine and not (out / SETTINGS).is_file()):
        raise ValueError(f"--out {out} holds other files, such as {to_line((other or mine)[0])}; name a new folder")
    if settings is not None and mine:
        there = config.load(out / SETTINGS)
        changed = [f"{k}: {there.get(k)!r} there, {v!r} now" for k, v in settings.items() if there.get(k) != v]
        if changed:
            raise ValueError(f"--out {out} holds reconstructions made otherwise ({'; '.join(changed)}); name another "
                             "folder")


def picture_name(i: int, name: str) -> str:
    """File name of the picture of image i of a source."""
    start, stem = f"{i:06d}_", to_line(Path(name).stem)
    if len(f"{start}{stem}.png".encode()) > MAX_NAME:
        stem = stem.encode()[: MAX_NAME - len(start) - 4].decode(errors="ignore")
    return f"{start}{stem}.png"


def reconstruct(model: VQModel, args: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Write everything for args.images -> metrics. ValueError: images or sizes that the tokenizer cannot take, or
    --out holds something else.
    """
    from torchvision.utils import save_image  # here because torchvision takes a second to import

    size = args.image_size or model.config.image_size
    options = ImageOptions.of(args)
    source = open_images_or_one(None if args.images == "digits" else args.images,
                                channels=model.config.image_channels, options=options)
    for line in describe_source(source):
        distributed.print0(f"images: {line}")
    count = min(args.max_images or len(source), len(source))
    settings = {"tokenizer_sha256": pretrained.tokenizer_hash(model) if model.quantize.has_codebook else "",
                "source_fingerprint": source.fingerprint(), "images": count, "image_size": size,
                "bit_depth": options.bit_depth, "max_pictures": args.max_pictures}
    check_out(args.out, settings)
    lpips = LPIPS(args.lpips_vgg_weights).to(device) if args.lpips_vgg_weights else None
    meter = ReconstructionMeter(model.quantize.num_codes, model.quantize.dim, device, lpips)
    bad = BadImageCounter(args.max_bad_images)
    bad.add(source.damaged)
    codes: list[np.ndarray] = []
    names: list[str] = []
    written: set[str] = set()
    pictures = args.out / PICTURES
    for batch in reconstructions(model, source, size, batches=consecutive(count, args.batch_size),
                                 num_workers=args.num_workers, bad=bad, device=device):
        if not names:  # nothing is written before it is known that something can be
            (pictures if args.max_pictures > 0 else args.out).mkdir(parents=True, exist_ok=True)
            (args.out / "metrics.json").unlink(missing_ok=True)  # the last to come back
            atomic_write_json(args.out / SETTINGS, settings)
        meter.add(batch.x, batch.x_hat, batch.latents, batch.codes, batch.indices)
        codes.append(batch.indices.cpu().numpy())
        for i, original, decoded in zip(batch.images, batch.x, batch.x_hat, strict=True):
            names.append(source.name(i))
            if len(names) <= args.max_pictures:
                pair = (torch.stack([original, decoded]) + 1) / 2
                name = picture_name(i, source.name(i))
                written.add(name)
                atomic_write(pictures / name, partial(save_image, pair, format="png", padding=0))
    if not names:
        some = ", ".join(to_line(name) for name in sorted(bad.names)[:20])
        raise ValueError(f"none of the {count} images of {args.images} can be read: {some}")
    for left in pictures.glob("*.png"):  # of an earlier run, when other images could be read
        if re.match(r"\d{6,}_", left.name) and left.name not in written:
            left.unlink()
    metrics = meter.result(model.quantize.codebook()) | {"image_size": size, "unreadable_images": len(bad.names)}
    smallest = np.min_scalar_type(model.quantize.num_codes - 1)
    atomic_write(args.out / "codes.npy", lambda file: np.save(file, np.concatenate(codes).astype(smallest)))
    write_names(args.out / "names.txt", names)
    for name in sorted(bad.names):
        distributed.print0(f"left out an image that cannot be read: {to_line(name)}")
    atomic_write_json(args.out / "metrics.json", metrics)
    return metrics


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        device = distributed.init(args.device)
        check(args)
        if args.images:
            check_out(args.out)
        model = pretrained.load_tokenizer(args.ckpt, device, args.weights, codebook_l2_norm=args.codebook_l2_norm)
        export(model, args)
        if args.images:
            metrics = reconstruct(model, args, device)
            distributed.print0(" ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
            distributed.print0(f"wrote {args.out}")


if __name__ == "__main__":
    main()
