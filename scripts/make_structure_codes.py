"""Makes data for autoregressive/train_c2i.py from structure tokens: each chain is one sentence of a fixed length.

    python protein/encode.py pdb/ --ckpt runs/protein-small --out tokens/
    python scripts/make_structure_codes.py tokens/ --out codes/ --sequence-prefix
    python autoregressive/train_c2i.py --code-path codes/ --gpt-model GPT-tiny --class-dropout-prob 0 \\
        --results-dir runs/structure-gpt
    python scripts/sample_structures.py --gpt-ckpt runs/structure-gpt --code-path codes/ --out sampled.jsonl
    python protein/decode.py sampled.jsonl --ckpt runs/protein-small --out structures/

Sentences (protein/language.py) end in <eos> and are filled up with <pad>; longer ones than --length are left out and
counted. All have the class 0. The GPT's rotary tables are two-dimensional, so a sentence is a square, row by row, and
the loss counts the padding: choose --length close to what the chains need.
"""

from __future__ import annotations

import argparse
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least, require_out_folder

PROG = "scripts/make_structure_codes.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("tokens", nargs="+", type=Path, metavar="FILE", help=".fasta, .jsonl or .npz files, and folders of encode.py")
    add("--out", type=Path, required=True, metavar="FOLDER", help="to write; must be new")
    add("--length", type=int, default=256, help="words of a sentence, a square number (default: 256)")
    add("--num-codes", type=int, help="K of the tokenizer; folders of encode.py say it themselves")
    add("--sequence-prefix", action="store_true", help="the amino acids first, so that they can be a condition")
    add("--complexes", action="store_true", help="the chains of a structure in one sentence")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "length num_codes")
    if math.isqrt(args.length) ** 2 != args.length:
        parser.error(f"--length is {args.length}; it must be a square number, such as 256, 576 or 1024")
    return args


def check(args: argparse.Namespace) -> None:
    """ValueError: a folder that is there already, or cannot be written."""
    if args.out.exists():
        raise ValueError(f"--out {args.out} exists already; name a new folder")
    require_out_folder(args.out)


if __name__ == "__main__":
    refuse_early(PROG, parse_args, check)

import numpy as np

from autoregressive.code_shards import code_dtype, file_hash, shard_name, write_manifest
from protein.language import VOCABULARY, complexes
from protein.token_shards import iterate_tokens, vocabulary_of
from tokenizer.runtime.files import atomic_write, atomic_write_json

SHARD = 65_536  # sentences


def make(args: argparse.Namespace) -> str:
    """-> a line about it. ValueError: see token_shards.vocabulary_of; no sentence is short enough."""
    check(args)
    vocabulary = vocabulary_of(args.tokens, args.num_codes)
    dtype, pad = code_dtype(len(vocabulary)), vocabulary.id("<pad>")
    rows: list[np.ndarray] = []
    names: list[str] = []
    long = 0
    for group in complexes((chain for part in iterate_tokens(args.tokens) for chain in part), args.complexes):
        words = vocabulary.sentence(group, with_sequence=args.sequence_prefix)
        if len(words) > args.length:
            long += 1
            continue
        rows.append(np.array(words + [pad] * (args.length - len(words)), dtype=dtype))
        names.append(group[0].name if args.complexes else group[0].label)
    if not rows:
        raise ValueError(f"--length {args.length}: none of {long} sentences is that short; raise it to a larger square")
    args.out.mkdir(parents=True)
    count = -(-len(rows) // SHARD)
    shards: list[dict[str, Any]] = []
    for number in range(count):
        name, part = shard_name(number, count), np.stack(rows[number * SHARD : (number + 1) * SHARD])[:, None]
        atomic_write(args.out / name, partial(np.save, arr=part))
        shards.append({"file": name, "images": len(part), "sha256": file_hash(args.out / name)})
    atomic_write_json(args.out / VOCABULARY, vocabulary.to_dict() | {
        "sequence_prefix": args.sequence_prefix, "complexes": args.complexes})
    description = {"views": 1, "num_tokens": args.length, "codebook_size": len(vocabulary), "num_classes": 1,
                   "tokenizer_hash": vocabulary.tokenizer, "crops": "none: sentences of structure tokens"}
    write_manifest(args.out, description, shards, [0] * len(rows), names)
    words_in_all = sum(int((row != pad).sum()) for row in rows)
    return (f"wrote {args.out}: {len(rows)} sentences of {len(vocabulary)} words, {long} longer than {args.length} "
            f"left out, {1 - words_in_all / (len(rows) * args.length):.0%} of the rest is padding")


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        print(make(args))


if __name__ == "__main__":
    main()
