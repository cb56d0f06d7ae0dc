"""Writes structure tokens as sentences for language models.

    python protein/export_tokens.py tokens/ --out sentences.jsonl
    python protein/export_tokens.py tokens.npz --num-codes 512 --out sentences.parquet --sequence-prefix --complexes

Takes what encode.py wrote. A row per chain, or with --complexes per structure: id, input_ids, sequence (chains apart by
"/"), num_residues; as `datasets.load_dataset("json", data_files=...)` or "parquet" reads them. Beside it, as
OUT.vocabulary.json, the words (see language.py). scripts/make_structure_codes.py makes data for our own GPT.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least, require_out_file

PROG = "protein/export_tokens.py"
FORMATS = (".jsonl", ".parquet")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("tokens", nargs="+", type=Path, metavar="FILE", help=".fasta, .jsonl or .npz files, and folders of encode.py")
    add("--out", type=Path, required=True, metavar="FILE", help=".jsonl, or .parquet (pip install pyarrow)")
    add("--num-codes", type=int, help="K of the tokenizer; folders of encode.py say it themselves")
    add("--sequence-prefix", action="store_true", help="the amino acids first, so that they can be a condition")
    add("--complexes", action="store_true", help="the chains of a structure in one sentence")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "num_codes")
    return args


def check(args: argparse.Namespace) -> None:
    """ValueError: a file of another kind, or that cannot be written."""
    if args.out.suffix.lower() not in FORMATS:
        raise ValueError(f"--out {args.out}: sentences are kept in {', '.join(FORMATS)}")
    require_out_file(args.out, inputs=args.tokens)


if __name__ == "__main__":
    refuse_early(PROG, parse_args, check)

from protein.language import Vocabulary, complexes
from protein.token_files import TokenChain
from protein.token_shards import iterate_tokens, vocabulary_of
from tokenizer.runtime.distributed import print0
from tokenizer.runtime.files import atomic_write, atomic_write_json

ROW_GROUP = 4096


def rows(vocabulary: Vocabulary, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    chains: Iterator[TokenChain] = (chain for part in iterate_tokens(args.tokens) for chain in part)
    for group in complexes(chains, args.complexes):
        yield {"id": group[0].name if args.complexes else group[0].label,
               "input_ids": vocabulary.sentence(group, with_sequence=args.sequence_prefix),
               "sequence": "/".join(chain.sequence for chain in group),
               "num_residues": sum(len(chain.tokens) for chain in group)}


def write_jsonl(path: Path, found: Iterator[dict[str, Any]]) -> int:
    count = 0

    def write(file: Any) -> None:
        nonlocal count
        for row in found:
            file.write((json.dumps(row) + "\n").encode())
            count += 1

    atomic_write(path, write)
    return count


def write_parquet(path: Path, found: Iterator[dict[str, Any]]) -> int:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"--out {path}: pip install pyarrow to write .parquet, or write .jsonl") from error
    count = 0
    schema = pyarrow.schema([("id", pyarrow.string()), ("input_ids", pyarrow.list_(pyarrow.int32())),
                             ("sequence", pyarrow.string()), ("num_residues", pyarrow.int64())])

    def write(file: Any) -> None:
        nonlocal count
        with pyarrow.parquet.ParquetWriter(file, schema) as writer:
            group: list[dict[str, Any]] = []
            for row in found:
                group.append(row)
                count += 1
                if len(group) == ROW_GROUP:
                    writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
                    group = []
            if group:
                writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))

    atomic_write(path, write)
    return count


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        check(args)
        kind = args.out.suffix.lower()
        vocabulary = vocabulary_of(args.tokens, args.num_codes)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        count = (write_jsonl if kind == ".jsonl" else write_parquet)(args.out, rows(vocabulary, args))
        atomic_write_json(args.out.with_name(f"{args.out.name}.vocabulary.json"), vocabulary.to_dict())
        print0(f"wrote {args.out}: {count} sentences of {len(vocabulary)} words")


if __name__ == "__main__":
    main()
