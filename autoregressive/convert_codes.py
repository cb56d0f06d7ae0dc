"""Converts LlamaGen's code folders, one file per image, into shards, and back.

    python autoregressive/convert_codes.py imagenet_code_c2i_flip_ten_crop codes/imagenet --codebook-size 16384
    python autoregressive/convert_codes.py codes/imagenet llamagen_codes --to-llamagen imagenet256
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least, require_out_folder

PROG = "autoregressive/convert_codes.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("source", type=Path, help="folder with NAME_codes/ and NAME_labels/, or with --to-llamagen one of shards")
    add("out", type=Path, help="folder to write; must be new")
    add("--codebook-size", type=int, default=16384, help="K, which LlamaGen's folders do not record (default: 16384)")
    add("--num-classes", type=int, help="classes of the data set (default: one more than the largest label)")
    add("--to-llamagen", metavar="NAME", help="write OUT/NAME_codes/0.npy and OUT/NAME_labels/0.npy and so on")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "codebook_size num_classes")
    return args


def check(args: argparse.Namespace) -> None:
    """ValueError: a folder that is there already, or cannot be written."""
    if args.out.exists():
        raise ValueError(f"{args.out} exists already; name a new folder")
    require_out_folder(args.out, "out")


if __name__ == "__main__":
    refuse_early(PROG, parse_args, check)

import numpy as np
from tqdm import tqdm

from autoregressive.code_shards import code_dtype, file_hash, read_folder, read_llamagen, shard_name, write_manifest
from tokenizer.data import consecutive
from tokenizer.runtime import distributed
from tokenizer.runtime.files import atomic_write, located

SHARD = 65536  # images


def to_shards(args: argparse.Namespace) -> str:
    files = read_llamagen(args.source, args.codebook_size)
    classes = files.num_classes if args.num_classes is None else args.num_classes
    if classes < files.num_classes:
        raise ValueError(f"--num-classes is {classes}, but a label is {files.num_classes - 1}")
    array = files.arrays[0].astype(code_dtype(args.codebook_size))
    args.out.mkdir(parents=True)
    rows = consecutive(len(array), SHARD)
    shards = []
    for number, chunk in enumerate(rows):
        name = shard_name(number, len(rows))
        part = array[chunk[0] : chunk[-1] + 1]
        atomic_write(args.out / name, partial(np.save, arr=part))
        shards.append({"file": name, "images": len(part), "sha256": file_hash(args.out / name)})
    description = {"views": files.views, "num_tokens": files.num_tokens, "codebook_size": args.codebook_size,
                   "num_classes": classes, "tokenizer_hash": "", "crops": f"as in LlamaGen's {args.source.name}"}
    write_manifest(args.out, description, shards, files.labels.tolist(), [str(i) for i in range(len(array))])
    return f"{len(array)} images, {files.views} views of {files.num_tokens} codes"


def to_llamagen(args: argparse.Namespace) -> str:
    files = read_folder(args.source)
    folders = [args.out / f"{args.to_llamagen}_{kind}" for kind in ("codes", "labels")]
    for folder in folders:
        folder.mkdir(parents=True)
    for i, label in enumerate(tqdm(files.labels.tolist(), unit="image", disable=None)):
        codes = np.stack([files.codes(i, view) for view in range(files.views)])[None]
        for folder, value in zip(folders, (codes, np.array([label])), strict=True):
            with located(folder):
                np.save(folder / f"{i}.npy", value)
    return f"{len(files.labels)} images"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        check(args)
        done = to_llamagen(args) if args.to_llamagen else to_shards(args)
        distributed.print0(f"wrote {args.out}: {done}")


if __name__ == "__main__":
    main()
