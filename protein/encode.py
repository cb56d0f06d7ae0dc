"""Turns protein structures into tokens.

    python protein/encode.py 1abc.pdb 2xyz.cif.gz predictions/ --ckpt runs/protein-paper --out tokens.fasta
    torchrun --nproc_per_node=8 protein/encode.py UP000005640_9606.tar --ckpt runs/protein-paper --out tokens/

Reads .pdb, .cif and .bcif files, also gzipped, folders and .tar archives of them, Foldcomp databases and what
prepare_structures.py made; every protein chain becomes one entry. --out is a .fasta, .jsonl or .npz file (see
token_files.py), or, without extension, a folder of shards (see token_shards.py): memory then does not grow with the
number of structures. The same command again goes on where it was stopped. Residues without N, CA or C get token -1.
What cannot be read or written is left out and named; more of it than --max-bad-structures ends the command, without
encoding on, when all is read. decode.py is the way back.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from protein.choices import EMBEDDING_FORMATS, EMBEDDINGS, MAX_RESIDUES
from protein.reading_flags import WHAT, add_reading_flags, check_reading_flags, require_structures
from protein.token_files import FORMATS, check_name
from tokenizer.runtime.command import (
    command,
    make_parser,
    refuse_early,
    require_flags_at_least,
    require_out_file,
    require_out_folder,
)
from tokenizer.stored import require_stored

PROG = "protein/encode.py"
SHARD_SIZE = 512  # structures


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("structures", nargs="*", type=Path, metavar="FILE", help=f"{WHAT}; none: only --export-hf")
    add("--ckpt", type=Path, required=True, metavar="PATH", help="run folder, checkpoint or export of this project, "
        "weights of StructTokenBench or of ESM3's encoder")
    add("--out", type=Path, metavar="PATH", help=".fasta, .jsonl or .npz, or a folder of shards")
    add("--format", choices=[kind[1:] for kind in FORMATS], default="npz", help="of shards (default: npz)")
    add("--shard-size", type=int, default=SHARD_SIZE, help=f"structures of a shard (default: {SHARD_SIZE})")
    add_reading_flags(parser)
    add("--renumber", action="store_true", help="number the residues of each chain from 1, without insertion codes")
    add("--max-bad-structures", type=int, default=0, help="unreadable files, and chains that cannot be written, to "
        "leave out before stopping (default: 0)")
    add("--embeddings", choices=EMBEDDINGS, help="also write a vector for each residue: of its code, or before "
        "quantization")
    add("--embeddings-format", choices=[kind[1:] for kind in EMBEDDING_FORMATS], default="npz", help="(default: npz)")
    add("--export-hf", type=Path, metavar="FOLDER", help="write the tokenizer as config.json and model.safetensors, "
        "Hugging Face style")
    add("--max-residues", type=int, default=MAX_RESIDUES, help=f"of a batch, padding included ({MAX_RESIDUES})")
    add("--weights", choices=("auto", "model", "ema"), default="auto", help="of --ckpt; auto: the EMA if any")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "max_residues shard_size")
    require_flags_at_least(parser, args, 0, "max_bad_structures")
    check_reading_flags(parser, args)
    if bool(args.structures) != bool(args.out) or not (args.structures or args.export_hf):
        parser.error("give structures and --out, or --export-hf, or all of them")
    return args


def check(args: argparse.Namespace) -> None:
    """ValueError, FileNotFoundError: outputs that cannot be written, structures or a model that are not there."""
    if args.export_hf:
        require_out_folder(args.export_hf, "--export-hf")
    if args.out and args.out.suffix:
        check_name(args.out)
        require_out_file(args.out, inputs=[*args.structures, args.ckpt])
    elif args.out:
        require_out_folder(args.out)
    require_structures(args.structures)
    require_stored(args.ckpt, args.weights, "structure tokenizer")


if __name__ == "__main__":
    refuse_early(PROG, parse_args, check)

import torch
from tqdm import tqdm

from protein.inference import embed_chains, encode_chains
from protein.pretrained import VQTokenizer, load_structure_tokenizer, save_pretrained
from protein.reading_flags import knows_plddt, reading_options
from protein.structure_io import Chain
from protein.structure_sources import Reading, Source, collected, digest, list_sources, read_sources, reading_workers
from protein.token_files import TokenChain, check_chain, token_chain
from protein.token_shards import (
    SETTINGS,
    finish_shards,
    join_shards,
    open_shards,
    read_embeddings,
    read_record,
    shard_name,
    write_embeddings,
    write_shard,
)
from tokenizer.runtime import config, distributed, lock


class Encoder:
    """Reads, encodes and writes this process's shards of a list of structures."""

    def __init__(self, args: argparse.Namespace, device: torch.device, tokenizer: Any, sources: list[Source]):
        self.args, self.device, self.tokenizer = args, device, tokenizer
        self.digest = tokenizer.hash()
        self.one_file = bool(args.out.suffix)
        self.kind = check_name(args.out) if self.one_file else f".{args.format}"
        # Next to the file that it becomes, so that a rename is enough, and under one name, so that it is found again.
        self.folder = args.out.with_name(f".{args.out.name}.parts") if self.one_file else args.out
        size = args.shard_size
        self.shards = [sources[i : i + size] for i in range(0, len(sources), size)]
        self.settings = {
            "tokenizer": self.digest, "codes": tokenizer.num_codes, "structures": len(sources),
            "list": digest(sources), "format": self.kind, "shard_size": size, "renumber": args.renumber,
            "embeddings": args.embeddings, "embeddings_format": f".{args.embeddings_format}",
            "plddt": knows_plddt(args), **reading_options(args)}
        self.left_out: list[str] = []  # by this process, of shards that were finished before as well

    def open(self) -> None:
        """Collective. ValueError: see token_shards.open_shards."""
        if self.one_file:
            lock.own(self.folder, "--out: its parts in")
            settings = self.folder / SETTINGS
            if distributed.is_main() and settings.exists() and config.diff(config.load(settings), self.settings):
                distributed.print0(f"note: {self.folder} is of another command; it begins anew")
                for part in self.folder.glob("shard-*"):
                    part.unlink()
                settings.unlink()
        open_shards(self.folder, self.settings)

    def run(self) -> None:
        """Every shard of this process that is not there yet. It stops encoding, but reads on and names what cannot be
        encoded, when that is more than --max-bad-structures.
        """
        args = self.args
        mine = range(distributed.rank(), len(self.shards), distributed.world_size())
        records = {number: read_record(self.folder, number) for number in mine}
        self.left_out = [reason for record in records.values() if record for reason in record["left_out"]]
        todo = [number for number in mine if records[number] is None]
        count = sum(len(self.shards[number]) for number in todo)
        workers = reading_workers(count, args.num_workers, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        readings = read_sources(itertools.chain.from_iterable(self.shards[number] for number in todo),
                                num_workers=workers, **reading_options(args))
        with tqdm(total=count, unit="structure", disable=None if distributed.is_main() else True) as shown:
            for number in todo:
                chains, entries, record = self.read(
                    itertools.islice(readings, len(self.shards[number])), shown)
                if len(self.left_out) <= args.max_bad_structures:
                    self.write(number, chains, entries, record)

    def read(self, readings: Iterable[Reading], shown: Any
             ) -> tuple[list[Chain], list[TokenChain], dict[str, Any]]:
        """Of one shard: the chains, their entries without tokens, and what was left out."""
        chains, entries, left_out, filtered = [], [], [], 0
        for reading in readings:
            shown.update()
            for note in reading.notes:
                tqdm.write(f"note: {note}", file=sys.stderr)
            if reading.failure and reading.filtered:
                filtered += 1
            elif reading.failure:
                left_out.append(reading.failure)
            for chain in reading.chains:
                try:
                    entry = token_chain(chain, self.digest, renumber=self.args.renumber, plddt=knows_plddt(self.args))
                    check_chain(self.args.out.with_suffix(self.kind), entry)
                except ValueError as error:
                    left_out.append(f"{reading.source.place}: {error}")
                else:
                    chains.append(chain)
                    entries.append(entry)
        for reason in left_out:
            tqdm.write(f"left out: {reason}", file=sys.stderr)
        self.left_out += left_out
        return chains, entries, {"left_out": left_out, "filtered": filtered}

    def write(self, number: int, chains: list[Chain], entries: list[TokenChain], record: dict[str, Any]) -> None:
        args, vectors = self.args, None
        if args.embeddings:
            found = embed_chains(self.tokenizer, chains, self.device, args.embeddings, max_residues=args.max_residues)
            tokens, vectors = [pair[0] for pair in found], [pair[1] for pair in found]
        else:
            tokens = encode_chains(self.tokenizer, chains, self.device, max_residues=args.max_residues)
        entries = [replace(entry, tokens=row) for entry, row in zip(entries, tokens, strict=True)]
        write_shard(self.folder, number, self.kind, entries, record, vectors, f".{args.embeddings_format}")

    def finish(self) -> str:
        """Collective -> a line about it. ValueError: too much was left out, or nothing was read."""
        left_out = [reason for part in distributed.gather_objects(self.left_out) for reason in part]
        limit = self.args.max_bad_structures
        if len(left_out) > limit:
            self.discard(keep_finished=True)
            raise ValueError(f"{len(left_out)} structure(s) or chain(s) cannot be encoded, --max-bad-structures "
                             f"{limit} are tolerated: {'; '.join(left_out[:20])}")
        if not distributed.is_main():
            return ""
        manifest = finish_shards(self.folder, len(self.shards), self.settings)
        if not manifest["chains"]:
            self.discard(keep_finished=False)
            raise ValueError(f"no chains: all {len(left_out) + manifest['filtered']} structures were left out")
        if self.one_file:
            join_shards(self.folder, len(self.shards), self.kind, self.args.out)
            if self.args.embeddings:
                self.join_embeddings()
            self.discard(keep_finished=False)
        more = f", {manifest['filtered']} filtered out" if manifest["filtered"] else ""
        more += f", {len(left_out)} left out" if left_out else ""
        return f"wrote {self.args.out}: {manifest['chains']} chains, {manifest['residues']} residues{more}"

    def join_embeddings(self) -> None:
        kind = f".{self.args.embeddings_format}"
        parts = [self.folder / f"{shard_name(i)}.embeddings{kind}" for i in range(len(self.shards))]
        found = [item for part in parts if part.exists() for item in read_embeddings(part).items()]
        write_embeddings(self.args.out.with_suffix(f".embeddings{kind}"), [key for key, _ in found],
                         [rows for _, rows in found])

    def discard(self, *, keep_finished: bool) -> None:
        """Remove the parts of a file; finished ones may be of use to the next try."""
        if self.one_file and distributed.is_main() and not (keep_finished and any(self.folder.glob("shard-*.json"))):
            lock.release(self.folder)
            shutil.rmtree(self.folder, ignore_errors=True)


def encode(args: argparse.Namespace, device: torch.device) -> None:
    """Collective. ValueError, OSError: mistakes in flags and files, before anything is computed."""
    check(args)
    sources: list[Source] = []
    if args.out:
        with collected() as notes:
            sources = list_sources(args.structures, args.ids)
        for note in notes:
            distributed.print0(f"note: {note}")
    tokenizer = load_structure_tokenizer(args.ckpt, device, args.weights)
    if args.export_hf:
        if not isinstance(tokenizer, VQTokenizer):
            raise ValueError(f"--export-hf: --ckpt {args.ckpt} holds ESM3's weights, which only their owners pass on")
        if distributed.is_main():
            distributed.print0(f"wrote {save_pretrained(tokenizer.model, args.export_hf)}")
    if args.out:
        encoder = Encoder(args, device, tokenizer, sources)
        encoder.open()
        encoder.run()
        distributed.print0(encoder.finish())


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        encode(args, distributed.init(args.device))


if __name__ == "__main__":
    main()
