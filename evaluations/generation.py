"""Scores generated images against a reference: FID, sFID, Inception Score, precision, recall, KID.

    python evaluations/generation.py VIRTUAL_imagenet256_labeled.npz samples.npz --out metrics.json
    python evaluations/generation.py data/imagenet/val FOLDER_OF_SAMPLE_C2I/samples.npz --image-size 256

Either side is an ADM .npz (`arr_0` with images, `mu` and `sigma`, or both, as ADM's own references), a folder or
archive of images, or "digits". Where a reference stores statistics, FID and sFID use those, as ADM's evaluator does;
precision, recall and KID need its images. They are of Inception's features: with others all is computed from images.
gFID of the tables is against VIRTUAL_imagenet256_labeled.npz, rFID against the validation images: the two are not
comparable, and the report says which reference it used. torchrun spreads the images over processes; the numbers stay
the same.

The Inception Score is of 10 parts. Samples of an .npz are cut as they lie, as ADM's evaluator does; names of files are
in no order of sampling, so images of other sources are shuffled first, as torch-fidelity does. The protocol says which.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from evaluations.extractor_flags import add_extractor_flags
from tokenizer.image_sources import add_image_flags, path_mode, require_image_flags
from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least, require_out_file

PROG = "evaluations/generation.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("reference", metavar="REF", help=".npz, or images: folder, .tar, .zip, list, digits")
    add("samples", metavar="SAMPLES", help="the same kinds")
    add("--out", type=Path, help="report to write (default: metrics.json in the folder SAMPLES, or NAME.metrics.json "
                                 "beside a file; digits are no place for one)")
    add_image_flags(parser)
    add("--image-size", type=int, help="center-crop images of folders and archives (default: all have one size)")
    add_extractor_flags(parser)
    add("--num-workers", type=int, default=0, help="image-reading processes per rank (default: 0)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    args = parser.parse_args(argv)
    require_image_flags(parser, args)
    require_flags_at_least(parser, args, 1, "image_size")
    require_flags_at_least(parser, args, 0, "num_workers")
    if args.out is None:
        args.out = beside(parser, args.samples)
    return args


def beside(parser: argparse.ArgumentParser, samples: str) -> Path:
    """Where a report goes that nobody named a place for. Ends with status 2 where there is none beside the samples."""
    path = Path(samples).expanduser()
    if not (path.exists() or "{" in samples or samples in ("digits", "cifar10")):
        parser.error(f"{samples}: no such file or folder")
    if not path.exists():  # shards in {}, or a word
        parser.error(f"--out: name a file for the report; {samples} is no folder or file to put it beside")
    return path / "metrics.json" if path.is_dir() else path.with_name(f"{path.stem}.metrics.json")


def check(args: argparse.Namespace) -> None:
    """ValueError, FileNotFoundError: a report that cannot be written, images that are not there."""
    require_out_file(args.out, inputs=[args.reference, args.samples])
    for path in (args.reference, args.samples):
        if path != "digits" and not path.endswith(".npz"):
            path_mode(path)
        elif path != "digits" and not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file")


if __name__ == "__main__":
    refuse_early(PROG, parse_args, check)

import torch

from evaluations import distribution
from evaluations.features import Extractor
from evaluations.image_sets import (
    FeatureCache,
    ImageSet,
    SetFeatures,
    cache_of_flags,
    extract,
    extractor_of_flags,
    open_set,
)
from evaluations.protocol import protocol_id
from tokenizer.image_readers import ImageOptions
from tokenizer.runtime import distributed
from tokenizer.runtime.files import atomic_write_json

METRICS = ("fid", "sfid", "inception_score", "inception_score_std", "precision", "recall", "kid", "kid_std")
SPLITS = 10
CUSTOMARY = 50_000  # samples in the field's tables
SORTED = 0.1        # relative change of the Inception Score by shuffling from which on samples count as sorted


def score(
    reference: ImageSet, samples: ImageSet, extractor: Extractor, cache: FeatureCache, device: torch.device
) -> tuple[dict[str, float | None], dict[str, str], dict[str, str], list[str]]:
    """All METRICS (None where one cannot be had), why not, the hashes of both sides, and warnings. Collective."""
    sides = {}
    for name, side in (("reference", reference), ("samples", samples)):
        sides[name] = (side, extract(side, extractor, device, cache) if side.count else None)
    values: dict[str, float | None] = dict.fromkeys(METRICS)
    why: dict[str, str] = {}
    warnings: list[str] = []

    def gaussian(name: str, kind: str) -> distribution.Gaussian | None:
        side, found = sides[name]
        if kind in side.statistics:
            return side.statistics[kind]
        features = None if found is None else getattr(found.features, kind)
        if found is None or features is None or len(features) < 2:
            return None
        return cache.gaussian(extractor, found.sha256, kind, features)

    for metric, kind in (("fid", "pooled"), ("sfid", "spatial")):
        gaussians = {name: gaussian(name, kind) for name in sides}
        known = [found for found in gaussians.values() if found is not None]
        absent = [name for name, found in gaussians.items() if found is None]
        if absent:
            single = [name for name in absent if sides[name][0].count == 1]
            why[metric] = (f"needs at least 2 images, or statistics, of: {', '.join(single)}" if single else
                           f"no {kind} features or statistics of: {', '.join(absent)}")
        else:
            values[metric] = distribution.frechet_distance(known[0], known[1])
    found_samples, found_reference = sides["samples"][1], sides["reference"][1]
    logits = found_samples and found_samples.features.logits
    if logits is None or len(logits) < SPLITS:
        why["inception_score"] = f"needs class logits of at least {SPLITS} sample images"
    else:
        shuffled = distribution.inception_score(logits, SPLITS, shuffle=True)
        scored = distribution.inception_score(logits, SPLITS) if samples.ordered else shuffled
        values["inception_score"], values["inception_score_std"] = scored
        if abs(shuffled[0] / scored[0] - 1) > SORTED:
            warnings.append(f"{samples.name} seems to be sorted, by class perhaps: its Inception Score is of "
                            f"consecutive parts, and shuffled it would be {shuffled[0]:.4g}")
    pair = [f.features.pooled for f in (found_reference, found_samples) if f is not None]
    smallest = min((len(p) for p in pair), default=0) if len(pair) == 2 else 0
    if smallest <= distribution.NEIGHBOURS:
        why["precision"] = why["recall"] = f"needs more than {distribution.NEIGHBOURS} images on both sides"
    else:
        values["precision"], values["recall"] = distribution.precision_recall(pair[0].to(device), pair[1].to(device))
    if smallest < distribution.KID_SUBSET_SIZE:
        why["kid"] = f"needs {distribution.KID_SUBSET_SIZE} images on both sides"
    else:
        values["kid"], values["kid_std"] = distribution.kid(pair[0], pair[1])
    return values, why, {name: _content_hash(*pair) for name, pair in sides.items()}, warnings


def _content_hash(side: ImageSet, found: SetFeatures | None) -> str:
    """Over a side's pixels and stored statistics, 64 hex digits."""
    digest = hashlib.sha256((found.sha256 if found else "").encode())
    for kind in sorted(side.statistics):
        for array in side.statistics[kind]:
            digest.update(array.numpy().tobytes())
    return digest.hexdigest()


def evaluate(args: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """The whole report. ValueError, FileNotFoundError: inputs that cannot be scored, before anything is computed."""
    reference, samples = (open_set(path, args.image_size, args.num_workers, ImageOptions.of(args))
                          for path in (args.reference, args.samples))
    for name, side in (("reference", reference), ("samples", samples)):
        for kind, gaussian in side.statistics.items():
            if gaussian.mu.dim() != 1 or gaussian.sigma.shape != (len(gaussian.mu),) * 2:
                raise ValueError(f"{name} {side.name}: {kind} mu {tuple(gaussian.mu.shape)} and sigma "
                                 f"{tuple(gaussian.sigma.shape)} do not fit together")
    extractor, reason = extractor_of_flags(args, device)
    warnings = []
    if extractor is not None:
        for side in (reference, samples):
            warnings += keep_statistics_of(extractor, side)
    values: dict[str, float | None] = dict.fromkeys(METRICS)
    hashes = {"reference": "", "samples": ""}
    warnings += warnings_of(reference, samples, extractor)
    if extractor is None:
        why = dict.fromkeys((m for m in METRICS if not m.endswith("_std")), reason)
    else:
        values, why, hashes, more = score(reference, samples, extractor, cache_of_flags(args), device)
        warnings += more
    protocol: dict[str, Any] = {
        "task": "generation",
        "reference": {"sha256": hashes["reference"], "count": reference.count,
                      "stored_statistics": sorted(reference.statistics)},
        "reference_name": reference.name,  # may differ: the hash decides
        "samples": {"name": samples.name, "sha256": hashes["samples"], "count": samples.count},
        "extractor": {"name": args.features.split(":")[0], "sha256": extractor.sha256 if extractor else ""},
        "crop": "none" if args.image_size is None else f"center crop to {args.image_size} pixels (ADM's)",
        "inception_score": f"{SPLITS} consecutive parts" if samples.ordered else
                           f"{SPLITS} parts, shuffled with torch-fidelity's seed {distribution.SHUFFLE_SEED}",
        "precision_recall": f"k = {distribution.NEIGHBOURS}, squared distances in float64",
        "kid": f"{distribution.KID_SUBSETS} subsets of {distribution.KID_SUBSET_SIZE}, seed {distribution.KID_SEED}, "
               "samples as torch-fidelity's input 1",
        "warnings": warnings,
    }
    protocol["id"] = protocol_id(protocol)
    return {**values, "num_reference": reference.count, "num_samples": samples.count, "unavailable": why,
            "protocol": protocol}


def keep_statistics_of(extractor: Extractor, side: ImageSet) -> list[str]:
    """Leave out stored statistics of other features than the extractor's -> warnings.

    ValueError: statistics of another width than Inception's, or a side that stores nothing but another's statistics.
    """
    if not side.statistics:
        return []
    if not extractor.widths:
        if not side.count:
            raise ValueError(f"{side.name} holds Inception's statistics without images, which --features "
                             f"{extractor.name}:PATH cannot be compared with; name the images")
        side.statistics = {}
        return [f"{side.name} stores statistics of Inception's features; its images are used instead"]
    for kind, gaussian in side.statistics.items():
        if len(gaussian.mu) != extractor.widths[kind]:
            raise ValueError(f"{side.name}: the {kind} statistics have {len(gaussian.mu)} dimensions, Inception's "
                             f"features {extractor.widths[kind]}")
    return []


def warnings_of(reference: ImageSet, samples: ImageSet, extractor: Extractor | None) -> list[str]:
    """What a reader of the numbers should know."""
    found = []
    if samples.count and samples.count != CUSTOMARY:
        found.append(f"{samples.count} samples; published numbers are of {CUSTOMARY}, and FID falls with the number")
    if extractor is not None and extractor.name != "inception":
        found.append("features are not Inception's: comparable with reports of the same extractor only")
    sizes = [side.size for side in (reference, samples) if side.count]
    if len(set(sizes)) > 1:
        found.append(f"images of {sizes[0]} pixels are compared with images of {sizes[1]}")
    if reference.count and "pooled" not in reference.statistics and reference.count < CUSTOMARY:
        found.append(f"reference statistics of {reference.count} images only")
    return found


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        device = distributed.init(args.device)
        check(args)
        report = evaluate(args, device)
        if distributed.is_main():
            args.out.parent.mkdir(parents=True, exist_ok=True)
            atomic_write_json(args.out, report)
            for warning in report["protocol"]["warnings"]:
                distributed.print0(f"note: {warning}")
            for reason in dict.fromkeys(report["unavailable"].values()):
                metrics = ", ".join(m for m, r in report["unavailable"].items() if r == reason)
                distributed.print0(f"not measured: {metrics} ({reason})")
            distributed.print0(" ".join(f"{m} {report[m]:.6g}" for m in METRICS if report[m] is not None))
            distributed.print0(f"wrote {args.out}, protocol {report['protocol']['id']}")
    if all(report[m] is None for m in METRICS):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
