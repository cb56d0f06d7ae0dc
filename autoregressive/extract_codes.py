"""Encodes a data set with a trained tokenizer, for train_c2i.py: images in, a folder of codes out.

    torchrun --nproc_per_node=8 autoregressive/extract_codes.py --vq-ckpt runs/imagenet --code-path codes --ten-crop
    python autoregressive/extract_codes.py --vq-ckpt runs/digits       # the run's own images, into runs/digits/codes

Views follow LlamaGen: the center crop and its mirror image, or with --ten-crop ten crops of a larger one (four corners,
center, and the same of the mirror image). The same command again continues what was interrupted, and makes shards of a
finished folder again that are missing or damaged; processes take one shard after another as they come free, and the
result does not depend on their number.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tokenizer.image_sources import add_image_flags, path_mode, require_image_flags
from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least, require_out_folder
from tokenizer.stored import require_stored

PROG = "autoregressive/extract_codes.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("--vq-ckpt", type=Path, required=True, metavar="PATH",
        help="run folder, checkpoint, LlamaGen .pt, or folder with config.json and model.safetensors")
    add("--data-path", help="any source of the tokenizer trainer, or digits (default: what the run was trained on)")
    add_image_flags(parser, remap_labels=True)
    add("--code-path", type=Path, metavar="FOLDER", help="folder to write (default: codes in the run's folder)")
    add("--image-size", type=int, help="side in pixels, 384 for 24 x 24 codes (default: the size of training; of "
                                            "LlamaGen's files 256)")
    add("--flip", action=argparse.BooleanOptionalAction, default=None,
        help="also encode mirror images (default: yes, but for digits; LlamaGen: yes)")
    add("--ten-crop", action="store_true", help="ten views per image; LlamaGen's published models: yes")
    add("--crop-range", type=float, default=1.1, help="ten crops are cut from so many image sizes (LlamaGen: 1.1)")
    add("--batch-size", type=int, help="images at a time, all their views (default: 64; CPU: 64 of 32 x 32 pixels, "
        "fewer larger ones)")
    add("--mixed-precision", choices=("none", "bf16"), default="none", help="of the encoder; codes may differ (none)")
    add("--compile", action="store_true", help="torch.compile the encoder: pays from some ten thousand images on")
    add("--weights", choices=("auto", "model", "ema"), default="auto", help="auto: the EMA if there is one")
    add("--codebook-l2-norm", action=argparse.BooleanOptionalAction, default=None,
        help="for LlamaGen files, which do not record it (default there: yes, as LlamaGen)")
    add("--max-bad-images", type=int, default=100, help="unreadable images to leave out before stopping (default: 100)")
    add("--num-workers", type=int, default=0, help="image-reading processes per rank (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    args = parser.parse_args(argv)
    require_image_flags(parser, args)
    require_flags_at_least(parser, args, 1, "image_size batch_size")
    require_flags_at_least(parser, args, 0, "max_bad_images num_workers")
    if not 1 <= args.crop_range <= 2:
        parser.error(f"--crop-range is {args.crop_range}; it must lie between 1 and 2")
    if args.ten_crop and args.flip is False:
        parser.error("--ten-crop includes mirror images; leave out --no-flip")
    if args.code_path is None:
        if not args.vq_ckpt.exists():
            parser.error(f"--vq-ckpt {args.vq_ckpt} does not exist")
        if not (args.vq_ckpt / "checkpoints").is_dir():
            parser.error(f"--vq-ckpt {args.vq_ckpt} is no run's folder: give --code-path, where to write the codes")
        args.code_path = args.vq_ckpt / "codes"
    return args


def check(args: argparse.Namespace) -> None:
    """ValueError, FileNotFoundError: a folder that cannot be written, a tokenizer or images that are not there."""
    require_out_folder(args.code_path, "--code-path")
    require_stored(args.vq_ckpt, args.weights, "tokenizer")
    if args.data_path not in (None, "digits"):
        path_mode(args.data_path)


if __name__ == "__main__":
    refuse_early(PROG, parse_args, check)

import numpy as np
import torch
from tqdm import tqdm

from autoregressive.code_shards import LABELS, MANIFEST, NAMES, file_hash, load_array, shard_name, write_manifest
from autoregressive.extraction import default_batch_size, extract_shard
from tokenizer.data import BadImageCounter, ImageDataset, consecutive, describe_source
from tokenizer.data_split import recorded_settings
from tokenizer.image_classes import require_no_empty_class
from tokenizer.image_names import read_names, to_line
from tokenizer.image_readers import ImageOptions
from tokenizer.image_sources import ImageSource, open_images
from tokenizer.pretrained import load_tokenizer, tokenizer_hash
from tokenizer.runtime import config, distributed, lock
from tokenizer.runtime.files import atomic_write, atomic_write_json, atomic_write_text
from tokenizer.vq_model import VQModel

SETTINGS, PARTS = "extraction.json", "parts"  # of a folder that is not finished
SHARDS, LEAST, MOST = 32, 256, 4096           # shards of a data set, and images in one: a minute or two of a GPU
MOST_BEFORE = 65536                           # in folders whose manifest does not say how many
LATER = ("shard_images", "tf32")              # entries of the manifest that older folders do not have, and need not


def open_data(args: argparse.Namespace, channels: int) -> ImageSource:
    """--data-path, or the training images of the run, read as there but for what flags say.

    ValueError, FileNotFoundError: nothing there.
    """
    path, options = args.data_path, ImageOptions.of(args)
    if path is None:
        if not (args.vq_ckpt / "checkpoints").is_dir():
            raise ValueError(f"--vq-ckpt {args.vq_ckpt} is no run's folder, so its images are unknown: give "
                             "--data-path")
        recorded = recorded_settings(args.vq_ckpt)
        given = {name: value for name, value in vars(args).items() if value is not None}
        path, options = recorded.get("data_path"), ImageOptions.of(argparse.Namespace(**recorded | given))
    source = open_images(None if path == "digits" else path, channels=channels, options=options)
    for line in describe_source(source) if distributed.is_main() else ():
        distributed.print0(f"images: {line}")
    return source


def describe(model: VQModel, source: ImageSource, args: argparse.Namespace) -> dict[str, Any]:
    """What the codes are, for the manifest and to recognise an interrupted extraction."""
    side = args.image_size // model.downsample
    return {
        "views": 10 if args.ten_crop else 1 + args.flip,
        "num_tokens": side * side,
        "codebook_size": model.quantize.num_codes,
        "num_classes": len(source.classes),
        "tokenizer_hash": tokenizer_hash(model),
        "image_size": args.image_size,
        "crops": f"ten of a center crop to {enlarged(args)}" if args.ten_crop else
                 "center" + (" and its mirror image" if args.flip else ""),
        "mixed_precision": args.mixed_precision,
        "tf32": False,  # see runtime/command.py
        "source_images": len(source),
        "source_fingerprint": source.fingerprint(),
        "shard_images": images_per_shard(len(source), MOST),
    }


def images_per_shard(images: int, most: int) -> int:
    """Of a data set of so many images."""
    return min(max(-(-images // SHARDS), LEAST), most)


def as_begun(folder: Path, description: dict[str, Any]) -> dict[str, Any]:
    """description without what a folder that is there already was made without, so that it is finished as it was."""
    known = _known(folder)
    there = description if known is None else config.load(known)
    return {key: value for key, value in description.items() if key in there or key not in LATER}


def _known(folder: Path) -> Path | None:
    """The file in folder that says what its codes are."""
    return next((folder / name for name in (MANIFEST, SETTINGS) if (folder / name).is_file()), None)


def enlarged(args: argparse.Namespace) -> int:
    """Side of the center crop that views are cut from."""
    return int(args.image_size * args.crop_range) if args.ten_crop else args.image_size


def prepare_folder(folder: Path, description: dict[str, Any]) -> bool:
    """Whether there is work to do. ValueError: the folder holds something else. Changes nothing that is there."""
    known = _known(folder)
    if known is None:
        if not lock.is_unused(folder):
            raise ValueError(f"--code-path {folder} holds other files; name a new folder")
        return True
    there = config.load(known)
    changed = [f"{key}: {there.get(key)!r} there, {value!r} now" for key, value in description.items()
               if there.get(key) != value]
    if changed:
        raise ValueError(f"--code-path {folder} holds codes made otherwise ({'; '.join(changed)}); name another "
                         "folder, or delete it")
    return known.name != MANIFEST


def inspect(folder: Path, source: ImageSource, chunks: list[list[int]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Of a finished folder: the parts of its intact shards, and the files that are not. Collective; work is shared.

    chunks: places of the images of each shard. ValueError: the manifest lists other shards.
    """
    listed = config.load(folder / MANIFEST)["shards"]
    if [shard["file"] for shard in listed] != [shard_name(i, len(chunks)) for i in range(len(chunks))]:
        raise ValueError(f"--code-path {folder} has {len(listed)} shards, expected {len(chunks)}; delete the folder")
    names = read_names(folder / NAMES) if (folder / NAMES).is_file() else []
    mine, first, rank, world = {}, 0, distributed.rank(), distributed.world_size()
    for number, (shard, places) in enumerate(zip(listed, chunks, strict=True)):
        path, wanted = folder / shard["file"], names[first : first + shard["images"]]
        first += shard["images"]
        if len(places) > shard["images"]:  # some could not be read
            places = _subsequence(source, places, wanted)
        if number % world == rank:
            intact = len(places) == shard["images"] and path.is_file() and file_hash(path) == shard["sha256"]
            mine[number] = {**shard, "places": places} if intact else None
    found = sorted(pair for part in distributed.gather_objects(mine) for pair in part.items())
    good = [part for _, part in found if part is not None]
    damaged = [listed[number]["file"] for number, part in found if part is None]
    if not damaged:
        kept = [place for part in good for place in part["places"]]
        damaged += [NAMES] if names != [source.name(i) for i in kept] else []
        damaged += [LABELS] if not _holds(folder / LABELS, [source.label(i) for i in kept]) else []
    return good, damaged


def _subsequence(source: ImageSource, places: list[int], names: list[str]) -> list[int]:
    """The places of these names, which come in this order; fewer where a name is not among them."""
    kept: list[int] = []
    for place in places:
        if len(kept) < len(names) and source.name(place) == names[len(kept)]:
            kept.append(place)
    return kept


def _holds(path: Path, labels: list[int]) -> bool:
    try:
        return np.array_equal(load_array(path), labels)
    except (ValueError, FileNotFoundError):
        return False


def extract(args: argparse.Namespace, device: torch.device) -> None:
    """Collective. ValueError, OSError: mistakes in flags and files, before anything is computed."""
    check(args)
    distributed.wait_for_all()  # the trial has left nothing behind when other ranks look
    model = load_tokenizer(args.vq_ckpt, device, args.weights, codebook_l2_norm=args.codebook_l2_norm)
    if not model.quantize.has_codebook:
        raise ValueError(f"--vq-ckpt {args.vq_ckpt} is still in its continuous warm-up, without codes; train it "
                         "further")
    args.image_size = args.image_size or model.config.image_size
    if args.image_size % model.downsample:
        raise ValueError(f"--image-size {args.image_size} must be a multiple of {model.downsample}, the tokenizer's "
                         "factor")
    if args.batch_size is None:
        args.batch_size = default_batch_size(args.image_size, device)
    source = open_data(args, model.config.image_channels)
    if args.flip is None:
        args.flip = source.flippable
    if (args.flip or args.ten_crop) and not source.flippable:
        raise ValueError("--flip and --ten-crop mirror images, but the mirror image of a digit is no digit")
    folder = args.code_path
    description = as_begun(folder, describe(model, source, args))
    size = description.get("shard_images", images_per_shard(len(source), MOST_BEFORE))
    shards = consecutive(len(source), size)
    good: list[dict[str, Any]] = []
    if _known(folder) is None:
        require_no_empty_class(source.labels, source.classes, "the images")
    finished = not prepare_folder(folder, description)
    if finished:
        good, damaged = inspect(folder, source, shards)
        if not damaged:
            distributed.print0(f"{folder} is complete")
            return
        distributed.print0(f"{folder}: missing or damaged, made again: {', '.join(damaged)}")
    distributed.wait_for_all()  # all ranks have looked before rank 0 writes
    lock.own(folder, "--code-path")
    if not finished and not prepare_folder(folder, description):  # by another process in the meantime
        distributed.print0(f"{folder} is complete")
        return
    distributed.wait_for_all()
    parts = folder / PARTS
    if distributed.is_main():
        parts.mkdir(parents=True, exist_ok=True)
        for part in good:
            atomic_write_text(parts / f"{part['file']}.json", json.dumps(part))
        atomic_write_json(folder / SETTINGS, description)
        (folder / MANIFEST).unlink(missing_ok=True)
    distributed.wait_for_all()
    dataset = ImageDataset(source, enlarged(args))
    bad = BadImageCounter(args.max_bad_images)
    bad.add(source.damaged)
    encode = torch.compile(model.encode_latents) if args.compile else None
    fill_to = min(args.batch_size, max(map(len, shards))) if args.compile else 0
    with tqdm(total=len(source), unit="image", disable=None if distributed.is_main() else True) as shown:
        for number in distributed.deal_out(len(shards)):  # one takes minutes more than another: see distributed.py
            name, places = shard_name(number, len(shards)), shards[number]
            shown.update(places[0] - shown.n)  # those before are done, or other processes' now
            if _is_done(folder / name, parts / f"{name}.json"):
                continue
            batches = [[places[i] for i in rows] for rows in consecutive(len(places), args.batch_size)]
            codes, kept = extract_shard(
                model, dataset, batches, image_size=args.image_size, flip=args.flip, ten=args.ten_crop,
                precision=args.mixed_precision, num_workers=args.num_workers, device=device, bad=bad,
                progress=shown.update, encode=encode, fill_to=fill_to,
            )
            atomic_write(folder / name, partial(np.save, arr=codes))
            part = {"file": name, "images": len(kept), "sha256": file_hash(folder / name), "places": kept}
            atomic_write_text(parts / f"{name}.json", json.dumps(part))
    if distributed.is_main():
        _finish(folder, description, source, [shard_name(i, len(shards)) for i in range(len(shards))])


def _is_done(shard: Path, part: Path) -> bool:
    return part.is_file() and shard.is_file() and config.load(part)["sha256"] == file_hash(shard)


def _finish(folder: Path, description: dict[str, Any], source: ImageSource, files: list[str]) -> None:
    parts = [config.load(folder / PARTS / f"{name}.json") for name in files]
    places = [place for part in parts for place in part.pop("places")]
    names = [source.name(i) for i in places]
    for i in sorted(set(range(len(source))) - set(places)):
        distributed.print0(f"left out an image that cannot be read: {to_line(source.name(i))}")
    write_manifest(folder, description, parts, [source.label(i) for i in places], names)
    shutil.rmtree(folder / PARTS)
    (folder / SETTINGS).unlink()
    distributed.print0(f"wrote {folder}: {len(places)} images, {description['views']} views of "
                       f"{description['num_tokens']} codes, {len(files)} shards")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        extract(args, distributed.init(args.device))


if __name__ == "__main__":
    main()
