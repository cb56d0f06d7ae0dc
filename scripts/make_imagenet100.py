"""Writes the paper's ImageNet-100 split (section 5.1.2) as lists of images; see make_imagenet100.sh.

The paper's test set is 15,000 images "uniformly" sampled from the training classes plus the 5,000 validation images,
for a stable FID. Here each class gives the same number (150 of 100 classes), chosen by a hash of class and file name,
so that the split depends on the seed and the names only. The paper does not say whether they are also trained
on; by default they are not (--keep-in-train leaves them in).

A list has one `path<TAB>label` per line, paths relative to the list (written as in tokenizer/image_names.py); labels
count the sorted WordNet ids, as torchvision's ImageFolder would on the 100 folders.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least, require_out_folder

PROG = "scripts/make_imagenet100.sh"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--imagenet", type=Path, required=True, help="folder with train/CLASS/ and val/CLASS/")
    parser.add_argument("--classes", type=Path, required=True, help="text file, one WordNet id per line")
    parser.add_argument("--out", type=Path, default=Path("data/imagenet100"), help="(default: data/imagenet100)")
    parser.add_argument("--test-images", type=int, default=15_000, help="held out of train for the test; paper: 15000")
    parser.add_argument("--keep-in-train", action="store_true", help="train on those images as well")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 0, "test_images seed")
    return args


if __name__ == "__main__":
    refuse_early(PROG, parse_args)

from tokenizer.image_classes import EXTENSIONS
from tokenizer.image_names import to_line
from tokenizer.runtime.files import atomic_write_json, atomic_write_text
from tokenizer.runtime.parsing import read_text


def read_classes(path: Path) -> list[str]:
    """WordNet ids of a class list, the first words of its lines, sorted. ValueError: none, repeated, no names."""
    lines = [line.split() for line in read_text(path).splitlines()]
    names = [words[0] for words in lines if words and not words[0].startswith("#")]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if not names or repeated:
        raise ValueError(f"--classes {path}: " + (f"{repeated[0]} occurs twice" if repeated else "no class in it"))
    wrong = [name for name in names if name != Path(name).name]
    if wrong:
        raise ValueError(f"--classes {path}: {wrong[0]!r} is no folder name; write one WordNet id per line")
    return sorted(names)


def list_images(folder: Path, classes: list[str], flag: str) -> dict[str, list[Path]]:
    """Class -> its image files, sorted. ValueError: a class without a folder or without images."""
    absent = [name for name in classes if not (folder / name).is_dir()]
    if absent:
        raise ValueError(
            f"{flag}: {len(absent)} of {len(classes)} classes have no folder in {folder}, such as {absent[0]}; it must "
            "hold one folder per class (sort ImageNet's flat validation images into such folders first)"
        )
    found = {c: sorted(p for p in (folder / c).iterdir() if _is_image(p)) for c in classes}
    empty = [name for name, images in found.items() if not images]
    if empty:
        raise ValueError(f"{flag}: no images in {folder / empty[0]}")
    return found


def _is_image(path: Path) -> bool:
    # A Mac leaves a ._NAME beside each NAME on foreign disks.
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith("._") and path.is_file()


def hold_out(images: dict[str, list[Path]], total: int, seed: int) -> dict[str, set[Path]]:
    """Class -> total / classes of its images. ValueError: not divisible, negative, or a class with too few images.

    The images whose SHA-256 of "seed/class/name" is smallest: the same on any machine, whatever else the folder holds.
    """
    each, rest = divmod(total, len(images))
    if rest or total < 0:
        raise ValueError(f"--test-images {total} must be a multiple of the {len(images)} classes, at least 0")
    small = [name for name, files in images.items() if len(files) <= each]
    if small:
        raise ValueError(f"--test-images {total}: {each} per class, but {small[0]} has {len(images[small[0]])} images")
    return {
        name: set(sorted(files, key=lambda p: hashlib.sha256(os.fsencode(f"{seed}/{name}/{p.name}")).digest())[:each])
        for name, files in images.items()
    }


def write_lists(args: argparse.Namespace) -> None:
    """ValueError, OSError: mistakes in flags and files, before anything is written."""
    # Of real folders: `..` leads out of the one that a link points to, not of the link's.
    imagenet, out = args.imagenet.resolve(), args.out.resolve()
    classes = read_classes(args.classes)
    train = list_images(imagenet / "train", classes, "--imagenet")
    val = list_images(imagenet / "val", classes, "--imagenet")
    test = hold_out(train, args.test_images, args.seed)

    def lines(images: dict[str, list[Path]], keep: Callable[[str, Path], bool]) -> list[str]:
        return [
            f"{to_line(os.path.relpath(path, out))}\t{label}\n"
            for label, name in enumerate(classes) for path in images[name] if keep(name, path)
        ]

    lists = {
        "train": lines(train, lambda name, path: args.keep_in_train or path not in test[name]),
        "val": lines(val, lambda *_: True),
    }
    lists["test"] = lines(train, lambda name, path: path in test[name]) + lists["val"]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, rows in lists.items():
        atomic_write_text(args.out / f"{name}.txt", "".join(rows))
    protocol = {
        "classes": classes, "seed": args.seed, "test_images_are_trained_on": args.keep_in_train,
        "images": {name: len(rows) for name, rows in lists.items()},
        "sha256": {name: hashlib.sha256("".join(rows).encode()).hexdigest() for name, rows in lists.items()},
    }
    atomic_write_json(args.out / "protocol.json", protocol)
    print(f"wrote {args.out}: " + ", ".join(f"{name}.txt {len(rows)} images" for name, rows in lists.items()))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        require_out_folder(args.out)
        write_lists(args)


if __name__ == "__main__":
    main()
