"""Draws structure tokens from a GPT that was trained on codes of make_structure_codes.py.

    python scripts/sample_structures.py --gpt-ckpt runs/structure-gpt --code-path codes/ --num-samples 16 \\
        --out sampled.jsonl
    python scripts/sample_structures.py --gpt-ckpt runs/structure-gpt --code-path codes/ --sequences proteins.fasta \\
        --num-samples 4 --out folded.jsonl

--sequences, for a GPT trained with --sequence-prefix, asks for structures of given sequences (chains of a complex apart
by "/"): --num-samples of each, as many tokens as residues. Only words that make a structure are drawn: codes, breaks
between chains if the GPT has seen any, and the end. protein/decode.py turns the tokens into structures. A sample is a
function of --seed and its number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from autoregressive.sampling_config import SamplingConfig
from protein.token_files import check_name
from tokenizer.runtime.command import (
    as_flag_errors,
    command,
    make_parser,
    refuse_early,
    require_flags_at_least,
    require_out_file,
)
from tokenizer.stored import require_stored

PROG = "scripts/sample_structures.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("--gpt-ckpt", type=Path, required=True, metavar="PATH", help="run folder, checkpoint or export of a GPT")
    add("--code-path", type=Path, required=True, metavar="FOLDER", help="its codes, which have the vocabulary")
    add("--out", type=Path, required=True, metavar="FILE", help=".fasta, .jsonl or .npz of tokens")
    add("--num-samples", type=int, default=16, help="in all, or of each of --sequences (default: 16)")
    add("--sequences", type=Path, metavar="FASTA", help="amino acids to fold")
    add("--seed", type=int, default=0, help="of the samples (default: 0)")
    add("--temperature", type=float, default=1.0, help="0: the likeliest word (default: 1)")
    add("--top-k", type=int, default=0, help="likeliest words to draw from; 0: all (default: 0)")
    add("--top-p", type=float, default=1.0, help="share of the probability to draw from (default: 1)")
    add("--weights", choices=("auto", "model", "ema"), default="auto", help="of --gpt-ckpt; auto: the EMA if any")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "num_samples")
    require_flags_at_least(parser, args, 0, "seed")
    with as_flag_errors(parser):
        args.sampling = SamplingConfig(cfg_scale=1.0, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p)
    return args


def check(args: argparse.Namespace) -> None:
    """ValueError: a file of another kind, or that cannot be written; FileNotFoundError: no GPT is there."""
    check_name(args.out)
    require_out_file(args.out)
    require_stored(args.gpt_ckpt, args.weights, "GPT")


if __name__ == "__main__":
    refuse_early(PROG, parse_args, check)

import torch
from torch import Tensor

from autoregressive.pretrained import load_gpt
from autoregressive.sampling import generate
from protein.language import VOCABULARY, Vocabulary, to_token_chains
from protein.token_files import TokenChain, write_tokens
from tokenizer.runtime import config, distributed
from tokenizer.runtime.parsing import read_text
from tokenizer.runtime.seeding import fold

BATCH = 16


def read_sequences(path: Path) -> dict[str, list[str]]:
    """Names -> chains of a FASTA file. ValueError: names that occur twice, records without a sequence."""
    found: dict[str, list[str]] = {}
    for record in ("\n" + read_text(path)).split("\n>")[1:]:
        header, _, sequence = record.partition("\n")
        name, chains = (header.split() or [""])[0], "".join(sequence.split()).upper().split("/")
        if not name or name in found or not all(chains):
            raise ValueError(f"{path}: record {header!r} has no name or sequence, or a name that occurs twice")
        found[name] = chains
    if not found:
        raise ValueError(f"{path}: no FASTA records")
    return found


def sample(args: argparse.Namespace, device: torch.device) -> str:
    """-> a line about it. ValueError, OSError: mistakes in flags and files, before anything is drawn."""
    check(args)
    described = args.code_path / VOCABULARY
    values = config.load(described)
    prefixed, several = values.pop("sequence_prefix", None), values.pop("complexes", True)
    vocabulary = Vocabulary.from_dict(values, str(described))
    sequences: dict[str, list[str]] = read_sequences(args.sequences) if args.sequences else {"sample": []}
    if bool(args.sequences) != bool(prefixed):
        raise ValueError(f"--code-path {args.code_path} was made {'with' if prefixed else 'without'} "
                         f"--sequence-prefix: {'give' if prefixed else 'leave out'} --sequences")
    loaded = load_gpt(args.gpt_ckpt, device, args.weights)
    size = loaded.model.config.block_size
    if loaded.model.config.vocab_size != len(vocabulary) or loaded.tokenizer_hash not in ("", vocabulary.tokenizer):
        raise ValueError(f"--gpt-ckpt {args.gpt_ckpt} was trained on other codes than those in {args.code_path}")
    prefixes = {name: vocabulary.prefix(chains) if chains else [vocabulary.id("<bos>")]
                for name, chains in sequences.items()}
    ends = {name: len(prefixes[name]) + sum(map(len, chains)) + len(chains) - 1 if chains else size
            for name, chains in sequences.items()}
    long = [name for name, end in ends.items() if end > size]
    if long:
        raise ValueError(f"--sequences {args.sequences}: {', '.join(long[:20])} and its structure have more words than "
                         f"the {size} of a sentence")
    chains: list[TokenChain] = []
    endless = 0
    for number, (name, given) in enumerate(sequences.items()):
        for first in range(0, args.num_samples, BATCH):
            places = range(first, min(first + BATCH, args.num_samples))
            codes = generate(loaded.model, torch.zeros(len(places), dtype=torch.int64), num_codes=ends[name],
                             seeds=[fold(args.seed, number, place) for place in places], config=args.sampling,
                             prefix=torch.tensor([prefixes[name]] * len(places), device=device),
                             allowed=of_sequences(vocabulary, given) if given else any_structure(vocabulary, several))
            for place, row in zip(places, codes.tolist(), strict=True):
                endless += not given and vocabulary.id("<eos>") not in row
                chains += to_token_chains(f"{name}-{place}", vocabulary.chains(row), given or None,
                                          vocabulary.tokenizer)
    write_tokens(args.out, chains)
    more = f", {endless} of the samples cut off at the {size} words of a sentence" if endless else ""
    return f"wrote {args.out}: {len(chains)} chains{more}"


def any_structure(vocabulary: Vocabulary, several: bool) -> Callable[[Tensor], Tensor]:
    """For `generate`: a code; after one also <eos> and, with several chains, <break>; after <eos> only <pad>."""
    end, gap, pad = (vocabulary.id(word) for word in ("<eos>", "<break>", "<pad>"))

    def allowed(before: Tensor) -> Tensor:
        out = torch.zeros(len(before), len(vocabulary), dtype=torch.bool, device=before.device)
        ended = (before == end).any(1)
        out[:, : vocabulary.codes] = ~ended[:, None]
        out[:, pad] = ended
        out[:, end] = before[:, -1] < vocabulary.codes
        out[:, gap] = out[:, end] & several
        return out

    return allowed


def of_sequences(vocabulary: Vocabulary, sequences: Sequence[str]) -> Callable[[Tensor], Tensor]:
    """For `generate`: after the prefix, a code for each residue and <break> between chains."""
    start, gap = len(vocabulary.prefix(sequences)), vocabulary.id("<break>")
    breaks, place = set(), start
    for sequence in sequences[:-1]:
        place += len(sequence)
        breaks.add(place)
        place += 1

    def allowed(before: Tensor) -> Tensor:
        out = torch.zeros(len(before), len(vocabulary), dtype=torch.bool, device=before.device)
        if before.shape[1] in breaks:
            out[:, gap] = True
        else:
            out[:, : vocabulary.codes] = True
        return out

    return allowed


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        print(sample(args, distributed.init(args.device)))


if __name__ == "__main__":
    main()
