"""Trains a small classifier as a feature extractor for images that Inception does not know, or where it is not at hand.

    python evaluations/train_extractor.py --out runs/digits-extractor.pt                       # no --data-path: digits
    python evaluations/generation.py REF SAMPLES --features torchscript:runs/digits-extractor.pt

Distances in its feature space (FID and the like) compare runs with one another; they are no published FID. The file is
a TorchScript module: uint8 images (N, 3, H, W) -> pooled features (N, 256), class logits (N, C), spatial features
(N, 512). Images are resized to the size that it was trained at.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
import warnings
import zipfile
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tokenizer.image_sources import add_image_flags, path_mode, require_image_flags
from tokenizer.runtime.command import (
    command,
    make_parser,
    refuse_early,
    require_flags_at_least,
    require_flags_positive,
    require_out_file,
)

PROG = "evaluations/train_extractor.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("--data-path", help="labelled images, any source of the tokenizer trainer (default: scikit-learn's digits)")
    add_image_flags(parser, remap_labels=True)
    add("--out", type=Path, required=True, help="TorchScript file to write")
    add("--image-size", type=int, default=32, help="side in pixels, a multiple of 8 (default: 32)")
    add("--max-steps", type=int, default=400, help="optimizer steps (default: 400)")
    add("--batch-size", type=int, default=64, help="(default: 64)")
    add("--lr", type=float, default=2e-3, help="peak learning rate of AdamW, half a sine (default: 2e-3)")
    add("--val-size", type=int, default=300, help="images held out for the accuracy, at most a tenth (default: 300)")
    add("--seed", type=int, default=0, help="of weights, split and order (default: 0)")
    add("--max-bad-images", type=int, default=100, help="unreadable images to skip before stopping (default: 100)")
    add("--num-workers", type=int, default=0, help="data-loading processes (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    args = parser.parse_args(argv)
    require_image_flags(parser, args)
    require_flags_at_least(parser, args, 1, "image_size max_steps batch_size val_size")
    require_flags_at_least(parser, args, 0, "seed max_bad_images num_workers")
    require_flags_positive(parser, args, "lr")
    if args.image_size % 8:
        parser.error(f"--image-size {args.image_size} must be a multiple of 8")
    return args


def check(args: argparse.Namespace) -> None:
    """ValueError, FileNotFoundError: a file that cannot be written, images that are not there."""
    require_out_file(args.out, inputs=[args.data_path])
    if args.data_path is not None:
        path_mode(args.data_path)


if __name__ == "__main__":
    refuse_early(PROG, parse_args, check)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluations.image_sets import in_colour
from tokenizer.data import (
    BadImageCounter,
    ImageDataset,
    consecutive,
    default_augment,
    describe_source,
    make_loader,
    split_holdout,
)
from tokenizer.image_classes import require_no_empty_class
from tokenizer.image_readers import ImageOptions
from tokenizer.image_sources import open_images
from tokenizer.runtime import distributed
from tokenizer.runtime.files import atomic_write
from tokenizer.runtime.seeding import StepSampler

WIDTHS = (32, 64, 128, 256)
SPATIAL_CHANNELS = 8  # of the 8x8 map, as sFID takes 7 of Inception's 17x17


class Extractor(nn.Module):
    """Four convolutional stages; the second last one's map gives the spatial features, the last one's mean the pooled.

    image_size: side that images are resized to, in pixels. num_classes: C.
    """

    def __init__(self, image_size: int, num_classes: int):
        super().__init__()
        self.image_size, self.spatial_channels = image_size, SPATIAL_CHANNELS
        self.stages = nn.ModuleList()
        for before, width in zip((3, *WIDTHS), WIDTHS, strict=False):
            self.stages.append(nn.Sequential(
                nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            ))
        self.head = nn.Linear(WIDTHS[-1], num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 (N, 3, H, W) -> pooled (N, 256), logits (N, C), spatial (N, 512), float32."""
        x = images.float() / 127.5 - 1.0
        if x.shape[2] != self.image_size or x.shape[3] != self.image_size:
            x = F.interpolate(x, size=[self.image_size, self.image_size], mode="bilinear", antialias=True)
        spatial = x
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i == 2:
                spatial = F.adaptive_avg_pool2d(x[:, : self.spatial_channels], 8)
            if i < 3:
                x = F.max_pool2d(x, 2)
        pooled = x.mean(dim=[2, 3])
        return pooled, self.head(pooled), spatial.flatten(1)


def train(args: argparse.Namespace, device: torch.device) -> tuple[Extractor, float]:
    """-> the trained network in eval mode, and its accuracy on held-out images in [0, 1]."""
    source = open_images(args.data_path, options=ImageOptions.of(args))
    for line in describe_source(source):
        distributed.print0(f"images: {line}")
    require_no_empty_class(source.labels, source.classes, f"--data-path {args.data_path}")
    if len(source.classes) < 2:
        raise ValueError(f"--data-path {args.data_path}: one class only; a classifier needs labelled images")
    if len(source) < 10:
        raise ValueError(f"--data-path {args.data_path}: {len(source)} images; at least 10 are needed, as a tenth is "
                         "held out")
    train_indices, val_indices = split_holdout(len(source), min(args.val_size, len(source) // 10), args.seed)
    augment = default_augment(source, args.image_size)
    train_set = ImageDataset(source, args.image_size, augment=augment, seed=args.seed, indices=train_indices)
    val_set = ImageDataset(source, args.image_size, indices=val_indices)
    torch.manual_seed(args.seed)
    model = Extractor(args.image_size, len(source.classes)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05)
    bad = BadImageCounter(args.max_bad_images)
    bad.add(source.damaged)
    sampler = StepSampler(len(train_set), args.batch_size, seed=args.seed, end_step=args.max_steps)
    for step, batch in enumerate(make_loader(train_set, sampler, num_workers=args.num_workers)):
        bad.add(batch["bad"])
        optimizer.param_groups[0]["lr"] = args.lr * math.sin(math.pi * (step + 0.5) / args.max_steps)
        logits = model(in_colour(batch["image"]).to(device))[1]
        F.cross_entropy(logits, batch["label"].to(device), label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            distributed.print0(f"step {step + 1}/{args.max_steps}")
    model.eval()
    right = 0
    with torch.no_grad():
        in_order = consecutive(len(val_set), args.batch_size)
        for batch in make_loader(val_set, in_order, num_workers=args.num_workers):
            prediction = model(in_colour(batch["image"]).to(device))[1].argmax(1).cpu()
            right += int((prediction == batch["label"]).sum())
    return model, right / len(val_set)


def torchscript(model: nn.Module) -> bytes:
    """The TorchScript file of a network, without the paths of this machine, which TorchScript notes for debugging."""
    scripted, archive = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, yet it alone loads without this class
        torch.jit.save(torch.jit.script(model), scripted)
    with zipfile.ZipFile(scripted) as whole, zipfile.ZipFile(archive, "w") as kept:
        for record in whole.infolist():
            if not record.filename.endswith(".debug_pkl"):
                kept.writestr(record, whole.read(record))
    return archive.getvalue()


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        device = distributed.init(args.device)
        check(args)
        model, accuracy = train(args, device)
        archive = torchscript(model.cpu())
        args.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(args.out, lambda file: file.write(archive))
        distributed.print0(f"held-out accuracy {accuracy:.4f}; wrote {args.out}")


if __name__ == "__main__":
    main()
