"""Times what one loader worker does for training at 256 x 256, against torchvision's ImageFolder, on the same files.

    python evaluations/benchmarks/input_pipeline.py imagenet_sample.tar

The archive holds CLASS/NAME.JPEG. Its images are read from it, from a folder, and from a WebDataset shard of them, with
LlamaGen's random crop and the mirror image; ImageFolder resizes, crops at random, mirrors and normalises. Images per
CPU second of one process, batches of 32, ways in turns.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least

PROG = "evaluations/benchmarks/input_pipeline.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("archive", type=Path, help="a .tar of CLASS/NAME.JPEG")
    for name, default in (("images", 256), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="JSON of what was measured")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "images repeats")
    return args


if __name__ == "__main__":
    refuse_early(PROG, parse_args)

import torch
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from evaluations.benchmarks import peer
from tokenizer.data import ImageDataset, consecutive, make_loader, open_images

SIZE, BATCH = 256, 32
PEER = "ImageFolder"


def unpack(archive: Path, count: int, folder: Path) -> int:
    """The first images of the archive into folder/tree, folder/flat.tar and the shard folder/shard.tar -> how many.

    ValueError: none are there.
    """
    labels: dict[str, int] = {}
    done = 0
    with tarfile.open(archive) as source, tarfile.open(folder / "flat.tar", "w") as flat, \
            tarfile.open(folder / "shard.tar", "w") as shard:
        for member in source:
            where = Path(member.name)
            if done == count or not member.isfile() or where.suffix.lower() not in (".jpg", ".jpeg"):
                continue
            content = source.extractfile(member)
            assert content is not None  # of a file
            data, label = content.read(), labels.setdefault(where.parent.name, len(labels))
            (folder / "tree" / where.parent.name).mkdir(parents=True, exist_ok=True)
            (folder / "tree" / where.parent.name / where.name).write_bytes(data)
            for target, name, entry in ((flat, f"{where.parent.name}/{where.name}", data),
                                        (shard, f"{done:06d}.jpg", data), (shard, f"{done:06d}.cls", b"%d" % label)):
                info = tarfile.TarInfo(name)
                info.size = len(entry)
                target.addfile(info, io.BytesIO(entry))
            done += 1
    if not done:
        raise ValueError(f"{archive} holds no CLASS/NAME.jpg")
    return done


def loaders(folder: Path, count: int) -> dict[str, Iterable[Any]]:
    found: dict[str, Iterable[Any]] = {}
    for name, path in (("folder", "tree"), ("tar", "flat.tar"), ("WebDataset", "shard.tar")):
        dataset = ImageDataset(open_images(str(folder / path)), SIZE, augment="crop-flip")
        found[name] = make_loader(dataset, consecutive(count, BATCH))
    steps = [transforms.Resize(SIZE), transforms.RandomCrop(SIZE), transforms.RandomHorizontalFlip(),
             transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    found[PEER] = DataLoader(ImageFolder(str(folder / "tree"), transforms.Compose(steps)), BATCH)
    return found


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """ValueError: an archive without images."""
    torch.set_num_threads(1)  # as in a worker
    with tempfile.TemporaryDirectory() as name:
        count = unpack(args.archive, args.images, Path(name))
        ways = loaders(Path(name), count)
        rates: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(args.repeats + 1):
            for way, loader in ways.items():
                began = time.process_time()
                for _ in loader:
                    pass
                if turn:  # the first reads the files into the system's cache
                    rates[way].append(count / (time.process_time() - began))
    print(f"{count} images at {SIZE} x {SIZE}, one process, torch {torch.__version__}")  # noqa: T201
    peers, rows = rates[PEER], []
    for way, found in rates.items():
        ratios = sorted(a / b for a, b in zip(found, peers, strict=True))
        print(f"{way:12s} {statistics.median(found):8.1f} images per CPU second "  # noqa: T201
              f"({min(found):.1f} to {max(found):.1f}), {statistics.median(ratios):.2f} times ImageFolder's")
        if way != PEER:
            rows.append({"what": f"reading images, {way}", "unit": "images", "ours": statistics.median(found),
                         "peer": statistics.median(peers), "ratio": statistics.median(ratios),
                         "ratio_least": ratios[0], "ratio_most": ratios[-1]})
    return rows


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        peer.keep(args.out, measure(args))


if __name__ == "__main__":
    main()
