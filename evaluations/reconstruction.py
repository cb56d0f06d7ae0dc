"""Scores a tokenizer's reconstructions as in the paper's Tables 1 and 5.

    torchrun --nproc_per_node=8 evaluations/reconstruction.py --vq-ckpt runs/imagenet --data-path /data/imagenet/val
    python evaluations/reconstruction.py --vq-ckpt runs/digits      # the images that the run held out

rFID, PSNR, SSIM, LPIPS, perplexity, usage and code distance. The reference of rFID are the center crops that the
tokenizer saw, not the files. `--image-size 384 --image-size-eval 256` is the 24 x 24 row of Table 1: images are encoded
at 384; for PSNR, SSIM and LPIPS original and reconstruction are resized to 256 (bicubic), and rFID compares the latter
with the same center crops taken at 256, as LlamaGen's numbers do.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from evaluations.extractor_flags import add_extractor_flags
from tokenizer.image_sources import add_image_flags, path_mode, require_image_flags
from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least, require_out_file
from tokenizer.stored import require_stored

PROG = "evaluations/reconstruction.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("--vq-ckpt", type=Path, required=True, metavar="PATH",
        help="run folder, checkpoint, LlamaGen .pt, or folder with config.json and model.safetensors")
    add("--data-path", help="folder, .tar, .zip, shard pattern or list of images, or digits (default: the images that "
                            "the run at --vq-ckpt validates on)")
    add_image_flags(parser)
    add("--image-size", type=int, help="center crop that is encoded, in pixels (default: the size of training)")
    add("--image-size-eval", type=int, help="size at which images are compared (default: --image-size)")
    add("--batch-size", type=int, default=32, help="images encoded at a time (default: 32)")
    add("--max-images", type=int, help="use so many images, evenly spread over all (default: all)")
    add("--max-bad-images", type=int, default=0, help="unreadable images to leave out before stopping (default: 0)")
    add("--weights", choices=("auto", "model", "ema"), default="auto", help="auto: the EMA if there is one")
    add("--codebook-l2-norm", action=argparse.BooleanOptionalAction, default=None,
        help="for LlamaGen files, which do not record it (default there: yes, as LlamaGen)")
    add("--lpips-vgg-weights", type=Path, metavar="FILE", help="vgg16-397923af.pth (default: in torch hub's cache)")
    add_extractor_flags(parser)
    add("--num-workers", type=int, default=0, help="image-reading processes per rank (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--out", type=Path, metavar="FILE",
        help="report to write (default: evaluation/reconstruction.json in the run's folder, or reconstruction.json)")
    args = parser.parse_args(argv)
    require_image_flags(parser, args)
    require_flags_at_least(parser, args, 1, "image_size batch_size")
    require_flags_at_least(parser, args, 7, "image_size_eval")
    require_flags_at_least(parser, args, 2, "max_images")
    require_flags_at_least(parser, args, 0, "max_bad_images num_workers")
    if args.out is None:
        run = (args.vq_ckpt / "checkpoints").is_dir()
        args.out = args.vq_ckpt / "evaluation" / "reconstruction.json" if run else Path("reconstruction.json")
    return args


def check(args: argparse.Namespace) -> None:
    """ValueError, FileNotFoundError: a report that cannot be written, a model or images that are not there."""
    require_out_file(args.out, inputs=[args.vq_ckpt, args.data_path])
    require_stored(args.vq_ckpt, args.weights, "tokenizer")
    if args.data_path not in (None, "digits"):
        path_mode(args.data_path)


if __name__ == "__main__":
    refuse_early(PROG, parse_args, check)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluations import distribution
from evaluations.features import Extractor
from evaluations.image_sets import (
    CHUNK,
    FeatureCache,
    SetFeatures,
    cache_of_flags,
    extractor_of_flags,
    in_colour,
    pixel_hash,
)
from evaluations.protocol import protocol_id
from tokenizer import pixels, pretrained
from tokenizer.data import BadImageCounter, ImageDataset, consecutive, describe_source, make_loader, spread
from tokenizer.data_split import open_run_split
from tokenizer.image_names import to_line
from tokenizer.image_readers import ImageOptions
from tokenizer.image_sources import ImageSource, open_images
from tokenizer.perceptual import LPIPS, MIN_IMAGE_SIZE
from tokenizer.runtime import distributed
from tokenizer.runtime.files import atomic_write_json
from tokenizer.validation import ReconstructionMeter, reconstructions
from tokenizer.vq_model import VQModel

METRICS = ("rfid", "psnr", "ssim", "lpips", "perplexity", "usage", "code_distance")


class Images(NamedTuple):
    """What is scored: places in a source."""

    source: ImageSource
    places: list[int]
    name: str


def open_data(args: argparse.Namespace, channels: int) -> Images:
    """--data-path, or the run's held-out images. ValueError, FileNotFoundError name the flag or file."""
    if args.data_path is not None:
        source = open_images(None if args.data_path == "digits" else args.data_path, channels=channels,
                             options=ImageOptions.of(args))
        images = Images(source, list(range(len(source))), Path(args.data_path).name)
    else:
        if not (args.vq_ckpt / "checkpoints").is_dir():
            raise ValueError(f"--vq-ckpt {args.vq_ckpt} is no run's folder, so its held-out images are unknown: give "
                             "--data-path")
        split = open_run_split(args.vq_ckpt)
        images = Images(split.val_source, [int(i) for i in split.val_indices], "images that the run validates on")
    for line in describe_source(images.source):
        distributed.print0(f"images: {line}")
    if args.max_images:
        images = images._replace(places=[images.places[i] for i in spread(len(images.places), args.max_images)])
    if len(images.places) < 2:
        raise ValueError(f"{images.name}: {len(images.places)} image; at least 2 are needed")
    return images


def open_lpips(args: argparse.Namespace, channels: int, size: int, device: torch.device) -> tuple[LPIPS | None, str]:
    """The network, or None and why there is none. FileNotFoundError: a file that the user named."""
    if channels == 4 or size < MIN_IMAGE_SIZE:
        return None, f"LPIPS takes 1 or 3 channels and sides from {MIN_IMAGE_SIZE} pixels, not {channels} and {size}"
    try:
        return LPIPS(args.lpips_vgg_weights).to(device), ""
    except FileNotFoundError as error:
        if args.lpips_vgg_weights is not None:
            raise
        return None, f"LPIPS: {error}"


class Scores(NamedTuple):
    values: dict[str, float]
    images: int
    sha256: str          # of the reference's pixels
    unreadable: list[str]


def score(
    model: VQModel, images: Images, args: argparse.Namespace, extractor: Extractor | None, lpips: nn.Module | None,
    device: torch.device,
) -> Scores:
    """Reconstruct all images, spread over the ranks in chunks. Collective; all ranks return the same."""
    seen, compared = args.image_size, args.image_size_eval
    meter = ReconstructionMeter(model.quantize.num_codes, model.quantize.dim, device, lpips)
    bad = BadImageCounter(args.max_bad_images)
    bad.add(images.source.damaged)
    cache, no_cache = cache_of_flags(args), FeatureCache(None)
    hashes: dict[int, str] = {}
    found: dict[str, dict[int, Any]] = {"reference": {}, "samples": {}}
    rank, world = distributed.rank(), distributed.world_size()
    for number, chunk in enumerate(consecutive(len(images.places), CHUNK)):
        if number % world != rank:
            continue
        places = [images.places[i] for i in chunk]
        batches = [[places[i] for i in batch] for batch in consecutive(len(places), args.batch_size)]
        crops = _crops(images.source, compared, batches, args.num_workers) if compared != seen else None
        originals, decoded = [], []
        for batch in reconstructions(model, images.source, seen, batches=batches, num_workers=args.num_workers,
                                     bad=bad, device=device):
            x, x_hat = _resize(batch.x, compared), _resize(batch.x_hat, compared)
            meter.add(x, x_hat, batch.latents, batch.codes, batch.indices)
            reference = pixels.to_uint8(x).cpu() if crops is None else torch.stack(
                [next(crop for place, crop in crops if place == wanted) for wanted in batch.images])
            originals.append(reference)
            decoded.append(pixels.to_uint8(x_hat).cpu())
        if not originals:
            continue
        reference, samples = torch.cat(originals), torch.cat(decoded)
        hashes[number] = pixel_hash(reference)
        if extractor is not None:
            found["reference"][number] = cache.features(extractor, in_colour(reference), device)
            found["samples"][number] = no_cache.features(extractor, in_colour(samples), device)
    unreadable = sorted(set().union(*distributed.gather_objects(bad.names)))
    everywhere = sorted(pair for part in distributed.gather_objects(hashes) for pair in part.items())
    if len(everywhere) == 0:
        raise ValueError(f"{images.name}: no image can be read")
    values = meter.result(model.quantize.codebook())
    if extractor is not None:
        sides = {name: SetFeatures.join(parts).features.pooled for name, parts in found.items()}
        gaussians = {name: distribution.gaussian_statistics(pooled) for name, pooled in sides.items()}
        values["rfid"] = distribution.frechet_distance(gaussians["reference"], gaussians["samples"])
    digest = hashlib.sha256("".join(digest for _, digest in everywhere).encode()).hexdigest()
    return Scores({k: values[k] for k in METRICS if k in values}, int(values["images"]), digest, unreadable)


def _crops(
    source: ImageSource, size: int, batches: list[list[int]], num_workers: int
) -> Iterator[tuple[int, Tensor]]:
    """(place, center crop (C, size, size) in bytes) in the order of the batches."""
    for batch in make_loader(ImageDataset(source, size), batches, num_workers=num_workers):
        yield from zip(batch["index"].tolist(), batch["image"], strict=True)


def _resize(x: Tensor, size: int) -> Tensor:
    """LlamaGen's: bicubic, without antialiasing."""
    return x if x.shape[-1] == size else F.interpolate(x, size=(size, size), mode="bicubic")


def evaluate(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The whole report. ValueError, FileNotFoundError: inputs that cannot be scored, before anything is computed."""
    model = pretrained.load_tokenizer(args.vq_ckpt, device, args.weights, codebook_l2_norm=args.codebook_l2_norm)
    channels = model.config.image_channels
    args.image_size = args.image_size or model.config.image_size
    args.image_size_eval = args.image_size_eval or args.image_size
    images = open_data(args, channels)
    extractor, why_not = extractor_of_flags(args, device)
    if extractor is not None and channels == 4:
        extractor, why_not = None, "feature extractors take pictures of 1 or 3 channels, the tokenizer's have 4"
    lpips, why_no_lpips = open_lpips(args, channels, args.image_size_eval, device)
    scores = score(model, images, args, extractor, lpips, device)
    unavailable = {"rfid": why_not, "lpips": why_no_lpips}
    crop = f"ADM's center crop to {args.image_size}"
    resized = args.image_size_eval != args.image_size
    protocol: dict[str, Any] = {
        "task": "reconstruction",
        "reference": {"sha256": scores.sha256, "count": scores.images},
        "reference_name": images.name,
        "samples": {"tokenizer": args.vq_ckpt.name, "K": model.quantize.num_codes, "weights": args.weights,
                    "tokens": (args.image_size // model.downsample) ** 2},
        "encoded": crop,
        "compared": f"both resized to {args.image_size_eval}, bicubic" if resized else crop,
        "rfid_reference": f"ADM's center crop to {args.image_size_eval}",
        "extractor": {"name": args.features.split(":")[0], "sha256": extractor.sha256 if extractor else ""},
        "psnr_ssim": "of bytes against unrounded originals, data range 1, mean over images",
        "lpips": "VGG-16, version 0.1, inputs in [-1, 1]",
    }
    protocol["id"] = protocol_id(protocol)
    return {**{m: scores.values.get(m) for m in METRICS}, "num_images": scores.images,
            "step": int(model.quantize.step) or None,  # of training; None: not known of exports
            "unreadable_images": scores.unreadable,
            "unavailable": {m: why for m, why in unavailable.items() if why}, "protocol": protocol}


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        device = distributed.init(args.device)
        check(args)
        report = evaluate(args, device)
        if distributed.is_main():
            args.out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(args.out, report)
        for name in report["unreadable_images"]:
            distributed.print0(f"left out an image that cannot be read: {to_line(name)}")
        for metric, reason in report["unavailable"].items():
            distributed.print0(f"not measured: {metric} ({reason})")
        distributed.print0(" ".join(f"{m} {report[m]:.6g}" for m in METRICS if report[m] is not None))
        distributed.print0(f"wrote {args.out}, protocol {report['protocol']['id']}")


if __name__ == "__main__":
    main()
