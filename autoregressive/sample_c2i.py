"""Samples images of given classes: codes from a GPT, pixels from its tokenizer.

    torchrun --nproc_per_node=8 autoregressive/sample_c2i.py --gpt-ckpt runs/GPT-L --num-samples 50000 --cfg-scale 2
    python autoregressive/sample_c2i.py              # the newest finished run under runs/, ten images of each class
    python autoregressive/sample_c2i.py --gpt-ckpt c2i_L_384.pt --vq-ckpt vq_ds16_c2i.pt --image-size 384  # LlamaGen's

Writes OUT/images/000000.png and so on, OUT/labels.npy, OUT/grid.png (a row per class), OUT/samples.npz (ADM's `arr_0`,
for evaluations/generation.py) and OUT/settings.json. Image i depends on --global-seed and i alone, not on the number
of processes; the same command again continues what was interrupted.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from autoregressive.sampling_config import SCHEDULES, SamplingConfig
from tokenizer.runtime.command import (
    as_flag_errors,
    command,
    make_parser,
    refuse_early,
    require_flags_at_least,
    require_out_folder,
)
from tokenizer.stored import require_stored

PROG = "autoregressive/sample_c2i.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    d = SamplingConfig()
    add("--gpt-ckpt", type=Path, metavar="PATH", help="run folder, checkpoint, LlamaGen .pt, or exported folder "
                                                      "(default: the newest finished run under runs/)")
    add("--vq-ckpt", type=Path, metavar="PATH", help="its tokenizer (default: the --vq-ckpt of the GPT's run)")
    add("--other-tokenizer", action="store_true", help="go on although the GPT was trained on another one's codes")
    add("--out", type=Path, metavar="FOLDER", help="to write (default: in the run's samples/, named by the settings)")
    add("--num-samples", type=int, default=100, help="images; LlamaGen's tables: 50000; more than before in the same "
                                                     "folder adds to them (default: 100)")
    add("--classes", help="comma-separated class numbers (default: all that were trained); image i has class i mod "
                          "their number")
    add("--image-size", type=int, help="of a LlamaGen GPT, which does not record it: 256, 384 (default: as trained)")
    add("--image-size-eval", type=int, help="resize pictures to it, bicubic, as LlamaGen (default: --image-size)")
    add("--cfg-scale", type=float, default=d.cfg_scale, help="guidance; 1: none; LlamaGen: 1.5 to 2 (1.5)")
    add("--cfg-interval", type=int, default=d.cfg_interval, help="no guidance after so many codes; -1: never (-1)")
    add("--cfg-schedule", choices=SCHEDULES, default=d.cfg_schedule, help="of the guidance over the codes (constant)")
    add("--cfg-power", type=float, default=d.cfg_power, help="exponent of power-cosine (3)")
    add("--temperature", type=float, default=d.temperature, help="0: the most likely codes (1)")
    add("--top-k", type=int, default=d.top_k, help="draw from the k most likely codes; 0: off (0)")
    add("--top-p", type=float, default=d.top_p, help="draw from codes that hold this probability; 1: off (1)")
    add("--batch-size", type=int, default=32, help="images at a time on each process (32)")
    add("--global-seed", type=int, default=0, help="of the random numbers of all images (0)")
    add("--mixed-precision", choices=("auto", "none", "bf16"), default="auto", help="auto: bf16 on GPUs, else none")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="compile the decoding step (no)")
    add("--weights", choices=("auto", "model", "ema"), default="auto", help="of the GPT; auto: the EMA if there is one")
    add("--vq-weights", choices=("auto", "model", "ema"), help="of the tokenizer (default: as in the GPT's run "
        "if that names the tokenizer, else as --weights, or auto for ema)")
    add("--codebook-l2-norm", action=argparse.BooleanOptionalAction, default=None,
        help="for LlamaGen tokenizers, which do not record it (default there: yes)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add("--export-hf", type=Path, metavar="FOLDER", help="write the GPT as config.json and model.safetensors, and stop")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "num_samples image_size image_size_eval batch_size")
    require_flags_at_least(parser, args, 0, "global_seed")
    with as_flag_errors(parser):
        args.sampling = SamplingConfig(**{name: getattr(args, name) for name in asdict(d)})
    return args


def check(args: argparse.Namespace) -> None:
    """ValueError, FileNotFoundError: a folder that cannot be written, models that are not there."""
    if args.export_hf or args.out:
        require_out_folder(args.export_hf or args.out, "--export-hf" if args.export_hf else "--out")
    if args.vq_ckpt is not None:
        require_stored(args.vq_ckpt, args.vq_weights or "auto", "tokenizer")
    elif args.gpt_ckpt is not None and not args.gpt_ckpt.exists():
        raise FileNotFoundError(f"--gpt-ckpt {args.gpt_ckpt} does not exist")
    if args.gpt_ckpt is not None:
        require_stored(args.gpt_ckpt, args.weights, "GPT")


if __name__ == "__main__":
    refuse_early(PROG, parse_args, check)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from autoregressive.gpt import GPT
from autoregressive.pretrained import (
    LoadedGPT,
    export_gpt,
    load_gpt,
    recorded_tokenizer,
    require_guidance,
    require_tokenizer,
    require_trained,
)
from autoregressive.sampling import CompiledDecoding, generate
from tokenizer.pixels import to_uint8
from tokenizer.pretrained import load_tokenizer, tokenizer_hash
from tokenizer.runtime import config, distributed, lock
from tokenizer.runtime.files import atomic_write, atomic_write_json
from tokenizer.runtime.optim import DTYPES
from tokenizer.runtime.seeding import fold
from tokenizer.vq_model import VQModel

GRID_COLUMNS, GRID_ROWS = 10, 20
SETTINGS = "settings.json"


def newest_run(root: Path = Path("runs")) -> Path:
    """The GPT run under root that was finished last. FileNotFoundError says how to make one."""
    finished = [p.parent for p in root.glob("**/summary.json")
                if (p.parent / "config.json").is_file() and "gpt_model" in config.load(p.parent / "config.json")]
    if not finished:
        raise FileNotFoundError(f"{root}/ holds no finished GPT: name one with --gpt-ckpt, or train one with\n"
                                "    python tokenizer/train_provq.py\n"
                                "    python autoregressive/extract_codes.py --vq-ckpt runs/digits\n"
                                "    python autoregressive/train_c2i.py")
    return max(finished, key=lambda p: (p / "summary.json").stat().st_mtime)


def tokenizer_of(args: argparse.Namespace) -> tuple[Path, str, bool | None]:
    """Path, weights and codebook_l2_norm of --vq-ckpt, or what the GPT's run names.

    ValueError: neither. FileNotFoundError: no such run.
    """
    weights = args.vq_weights or ("auto" if args.weights == "ema" else args.weights)
    if args.vq_ckpt is not None:
        return args.vq_ckpt, weights, args.codebook_l2_norm
    run = recorded_tokenizer(args.gpt_ckpt)
    if not run.get("vq_ckpt"):
        raise ValueError(f"--gpt-ckpt {args.gpt_ckpt} does not say where its tokenizer is: give --vq-ckpt")
    l2_norm = run.get("codebook_l2_norm") if args.codebook_l2_norm is None else args.codebook_l2_norm
    return Path(run["vq_ckpt"]), args.vq_weights or run.get("vq_weights") or weights, l2_norm


def open_models(args: argparse.Namespace, device: torch.device) -> tuple[LoadedGPT, VQModel]:
    """ValueError, FileNotFoundError: models that are not there or do not belong together."""
    vq_path, vq_weights, l2_norm = tokenizer_of(args)
    vq = load_tokenizer(vq_path, device, vq_weights, codebook_l2_norm=l2_norm)
    if args.image_size is not None and args.image_size % vq.downsample:
        raise ValueError(f"--image-size {args.image_size} must be a multiple of {vq.downsample}, the tokenizer's "
                         "factor")
    num_codes = None if args.image_size is None else (args.image_size // vq.downsample) ** 2
    loaded = load_gpt(args.gpt_ckpt, device, args.weights, num_codes=num_codes)
    how = None if args.other_tokenizer else "name the right one with --vq-ckpt, or pass --other-tokenizer"
    require_tokenizer(loaded, vq, vq_path, other=how)
    return loaded, vq


def class_list(args: argparse.Namespace, loaded: LoadedGPT) -> list[int]:
    """ValueError: a class that the model does not have, or that had no training image."""
    num_classes = loaded.model.config.num_classes
    trained = list(range(num_classes)) if loaded.trained_classes is None else loaded.trained_classes
    if args.classes is None:
        return trained
    words = [word.strip() for word in args.classes.split(",")]
    if not all(re.fullmatch("[0-9]{1,9}", word) and int(word) < num_classes for word in words):
        raise ValueError(f"--classes {args.classes}: give numbers from 0 to {num_classes - 1}, comma-separated")
    require_trained(loaded, [int(word) for word in words], f"--classes {args.classes}")
    return [int(word) for word in words]


def folder_name(args: argparse.Namespace) -> str:
    s = args.sampling
    parts = [f"cfg-{s.cfg_scale:g}"]
    parts += [f"interval-{s.cfg_interval}"] if s.cfg_interval >= 0 else []
    parts += [s.cfg_schedule + (f"-{s.cfg_power:g}" if s.cfg_schedule == "power-cosine" else "")] if (
        s.cfg_schedule != "constant") else []
    parts += [f"t-{s.temperature:g}", f"topk-{s.top_k}", f"topp-{s.top_p:g}", f"n-{args.num_samples}",
              f"seed-{args.global_seed}"]
    parts += [f"classes-{args.classes.replace(',', '-')}"[:60]] if args.classes else []
    return "_".join(parts)


def check_folder(args: argparse.Namespace, settings: dict[str, Any]) -> bool:
    """Whether the folder holds fewer samples of the same kind, to be added to.

    ValueError: it holds something else, or samples made otherwise.
    """
    known = args.out / SETTINGS
    if not known.is_file():
        if not lock.is_unused(args.out):
            raise ValueError(f"--out {args.out} holds other files; name a new folder")
        return False
    there = {"tf32": False} | config.load(known)  # older folders do not say
    before = there.get("num_samples")
    grows = type(before) is int and before < args.num_samples
    there |= {"num_samples": args.num_samples} if grows else {}
    changed = [f"{k}: {there.get(k)!r} there, {v!r} now" for k, v in settings.items() if there.get(k) != v]
    if changed:
        raise ValueError(f"--out {args.out} holds samples made otherwise ({'; '.join(changed)}); name another "
                         "folder")
    return grows


@torch.no_grad()
def draw_batch(
    model: GPT, vq: VQModel, places: list[int], labels: list[int], args: argparse.Namespace,
    compiled: Callable[..., Tensor] | None,
) -> np.ndarray:
    """-> uint8 (len(places), S, S, C)"""
    # Filled up to one size: equal shapes round equally, so an image does not depend on its neighbours.
    full = [places[i % len(places)] for i in range(args.batch_size)]
    seeds = [fold(args.global_seed, place) for place in full]
    codes = generate(model, torch.tensor([labels[p] for p in full]), seeds=seeds, config=args.sampling,
                     compiled=compiled)
    side = math.isqrt(model.config.block_size)
    images = vq.decode_code(codes.view(-1, side, side)).float()
    if args.image_size_eval is not None and args.image_size_eval != images.shape[-1]:
        images = F.interpolate(images, size=(args.image_size_eval,) * 2, mode="bicubic")
    return to_uint8(images)[: len(places)].permute(0, 2, 3, 1).cpu().numpy()


def sample(args: argparse.Namespace, device: torch.device) -> None:
    """Collective. ValueError, OSError: mistakes in flags and files, before anything is computed."""
    if args.gpt_ckpt is None:
        args.gpt_ckpt = newest_run()
        distributed.print0(f"sampling from {args.gpt_ckpt}")
    if args.out is None:
        run = (args.gpt_ckpt / "checkpoints").is_dir()
        args.out = (args.gpt_ckpt / "samples" if run else Path("samples") / args.gpt_ckpt.stem) / folder_name(args)
    check(args)
    distributed.wait_for_all()  # the trial has left nothing behind when other ranks look
    loaded, vq = open_models(args, device)
    model = loaded.model
    precision = args.mixed_precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "none"
    if args.export_hf:
        distributed.print0(f"wrote {export_gpt(loaded, args.export_hf)}")
        return
    require_guidance(loaded, args.sampling)
    classes = class_list(args, loaded)
    settings = {**asdict(args.sampling), "num_samples": args.num_samples, "classes": classes,
                "global_seed": args.global_seed, "mixed_precision": precision, "tf32": False, "gpt": loaded.name,
                "gpt_sha256": _weights_hash(model), "tokenizer_sha256": tokenizer_hash(vq),
                "image_size_eval": args.image_size_eval, "batch_size": args.batch_size}
    check_folder(args, settings)
    distributed.wait_for_all()  # all ranks have looked before rank 0 writes
    lock.own(args.out, "--out")
    grows = check_folder(args, settings)  # again, now that nobody else writes
    model.cast(DTYPES[precision])
    distributed.wait_for_all()
    images = args.out / "images"
    labels = [classes[i % len(classes)] for i in range(args.num_samples)]
    if distributed.is_main():
        images.mkdir(parents=True, exist_ok=True)
        for name in ("samples.npz", "grid.png") if grows else ():  # they are of fewer samples, until all are there
            (args.out / name).unlink(missing_ok=True)
        atomic_write_json(args.out / SETTINGS, settings)
        atomic_write(args.out / "labels.npy", lambda file: np.save(file, np.array(labels)))
    distributed.wait_for_all()
    compiled = CompiledDecoding(model) if args.compile else None
    starts = range(0, args.num_samples, args.batch_size)
    with tqdm(total=args.num_samples, unit="image", disable=None if distributed.is_main() else True) as shown:
        for number in distributed.deal_out(len(starts)):
            start = starts[number]
            places = list(range(start, min(start + args.batch_size, args.num_samples)))
            files = [images / f"{place:06d}.png" for place in places]
            shown.update(start - shown.n)  # those before are done, or other processes' now
            if not all(file.exists() for file in files):
                for pixels, file in zip(draw_batch(model, vq, places, labels, args, compiled), files, strict=True):
                    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
                    atomic_write(file, partial(picture.save, format="PNG"))
            shown.update(len(places))
    if distributed.is_main():
        write_npz(images, args.num_samples, args.out / "samples.npz")
        draw_grid(images, labels, classes, args.out / "grid.png")
        distributed.print0(f"wrote {args.num_samples} images to {args.out}; look at {args.out / 'grid.png'}")


def _weights_hash(model: GPT) -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.cpu().float().numpy().tobytes())
    return digest.hexdigest()


def write_npz(images: Path, count: int, path: Path) -> None:
    """ADM's layout, `arr_0` uint8 (N, H, W, 3), written picture by picture."""
    with Image.open(images / "000000.png") as first:
        shape = (count, first.height, first.width, 3)

    def write(file: Any) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as array:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(array, header)
                for i in range(count):
                    with Image.open(images / f"{i:06d}.png") as picture:
                        array.write(np.asarray(picture.convert("RGB")).tobytes())

    atomic_write(path, write)


def draw_grid(images: Path, labels: list[int], classes: list[int], path: Path) -> None:
    """A row per class with its number in front; at most 20 rows of 10 pictures."""
    shown = list(dict.fromkeys(classes))[:GRID_ROWS]
    rows = [[i for i, label in enumerate(labels) if label == c][:GRID_COLUMNS] for c in shown]
    with Image.open(images / "000000.png") as first:
        side = first.width
    gap, margin = 2, 34
    columns = max(len(row) for row in rows)
    grid = Image.new("RGB", (margin + columns * (side + gap), len(rows) * (side + gap)), "white")
    pen = ImageDraw.Draw(grid)
    for y, (label, row) in enumerate(zip(shown, rows, strict=True)):
        pen.text((4, y * (side + gap) + side // 2 - 5), str(label), fill="black")
        for x, i in enumerate(row):
            with Image.open(images / f"{i:06d}.png") as picture:
                grid.paste(picture.convert("RGB"), (margin + x * (side + gap), y * (side + gap)))
    atomic_write(path, lambda file: grid.save(file, format="PNG"))


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        sample(args, distributed.init(args.device))


if __name__ == "__main__":
    main()
