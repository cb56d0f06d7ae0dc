"""Do tokens follow changes of conformation, and are the codes used? StructTokenBench's sensitivity and utilisation.

    python protein/benchmark/sensitivity.py --tokenizer foldseek VQ=runs/vq --pairs pairs.jsonl --chains pdb --out codes
    python protein/benchmark/sensitivity.py --tokenizer ProVQ=runs/provq --pairs fold_switching apo_holo \\
        --chains casp14 cameo --data struct_token_bench_release_data --pdb-data pdb_data/mmcif_files --out codes

--pairs: two conformations of one protein each; a JSONL file, or the names of StructTokenBench's sets. The first line
of the file is {"pairs": "NAME"}, every other {"id": "1ACB_r", "first": {"structure": "u.pdb", "chain": "A"}, "second":
{...}}; structures are relative to its folder, chain may be left out where there is one. --chains: folders of structure
files, or casp14, cameo. Writes OUT.json, with every pair, and OUT.md.

Sensitivity is the correlation, over pairs, of how alike the tokens are with how alike the structures are (TM-score,
mean of both normalizations). Token similarity is the score of a global alignment of both token sequences, gap -10, in
which two codes score 100 times their cosine, cut to an integer. "as coded" is that score, which grows with the chain's
length, so that long pairs look alike; "per residue" is the score divided by the mean length.

With --chains and several tokenizers, how much the tokens of each say about those of the first, residue by residue: with
`--tokenizer foldseek ProVQ=RUN`, what ours know of 3Di.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from protein.benchmark.tasks import MAX_LENGTH
from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least, require_out_file
from tokenizer.runtime.parsing import from_json, read_text

PROG = "protein/benchmark/sensitivity.py"
CONFORMATIONS = {"fold_switching": "codnas.csv", "apo_holo": "apo.csv"}  # in the archive's sensitivity/conformational
UTILITY = ("casp14", "cameo")      # in the archive's utility


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    add = parser.add_argument
    add("--tokenizer", nargs="+", required=True, help="see baselines.py; LABEL=... names it in tables")
    add("--pairs", nargs="+", default=[], metavar="FILE", help=f"JSONL files, or {', '.join(CONFORMATIONS)}")
    add("--chains", nargs="+", default=[], metavar="FOLDER", help=f"folders of structures, or {', '.join(UTILITY)}")
    add("--data", help="StructTokenBench's archive, unpacked")
    add("--pdb-data", help="PDB structures: the folder with mmcif_files")
    add("--max-length", type=int, default=MAX_LENGTH, help=f"leave out longer chains (default: {MAX_LENGTH})")
    add("--out", type=Path, required=True, help="where to write: OUT.json and OUT.md, over those of an earlier call")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of the tokenizers (default: auto)")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "max_length")
    if not args.pairs and not args.chains:
        parser.error("give --pairs or --chains")
    if args.data is None and {*args.pairs, *args.chains} & {*CONFORMATIONS, *UTILITY}:
        parser.error("StructTokenBench's sets need --data, the folder struct_token_bench_release_data")
    return args


def output_files(out: Path) -> tuple[Path, Path]:
    """OUT.json and OUT.md, also for OUT.json. ValueError: files of these names that an earlier call has not written."""
    stem = out.name.removesuffix(".json")  # not with_suffix, to which lambda-0.5 and lambda-0.25 are one name
    report, text = out.with_name(f"{stem}.json"), out.with_name(f"{stem}.md")
    for file in (report, text):
        require_out_file(file)
    if report.exists():
        try:
            found = from_json(read_text(report), report)
        except ValueError:
            found = None
        if not isinstance(found, dict) or not {"sensitivity", "utilisation"} <= found.keys():
            raise ValueError(f"--out {out}: {report} exists and is no earlier result; name another")
    elif text.exists():
        raise ValueError(f"--out {out}: {text} exists and is no earlier result; name another")
    return report, text


if __name__ == "__main__":
    refuse_early(PROG, parse_args, lambda args: output_files(args.out))

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from protein.benchmark.archive_files import read_table
from protein.benchmark.baselines import ChainTokenizer, Tokens, open_tokenizer
from protein.benchmark.information import mutual_information
from protein.benchmark.task_archives import Archive, read_chains
from protein.structure_io import Chain, read_structure
from protein.structure_sources import read_folder
from tokenizer.code_meter import mean_pairwise_distance
from tokenizer.provq import code_statistics
from tokenizer.runtime import distributed
from tokenizer.runtime.config import parse_object
from tokenizer.runtime.files import atomic_write_json, atomic_write_text
from tokenizer.runtime.page import Cell, Table, markdown_table
from tokenizer.runtime.parsing import brief, read_json

GAP = -10
SKIPPED = {("fold_switching", 2)}  # a pair that StructTokenBench leaves out, by its place in the file
MIN_ATOMS = 3  # CA atoms that TM-align needs of a chain


class Pair(NamedTuple):
    """Two conformations of one protein."""

    id: str
    first: Chain
    second: Chain


# ------------------------------------------------------------------------------------------------------------ measures

def _known(chain: Chain) -> npt.NDArray[np.intp]:
    """Places of the residues that have a CA."""
    return np.flatnonzero(np.isfinite(chain.coords[:, 1]).all(-1))


def tm_score(first: Chain, second: Chain) -> float:
    """Of the alignment that TM-align finds, CA atoms; mean of the two normalizations.

    ValueError, naming the chain: fewer than MIN_ATOMS of its residues have a CA.
    """
    from tmtools import tm_align

    parts = []
    for chain in (first, second):
        known = _known(chain)
        if len(known) < MIN_ATOMS:
            raise ValueError(f"chain {chain.label}: {len(known)} residues with CA; TM-align needs {MIN_ATOMS}")
        letters = "".join(chain.sequence[i] for i in known)
        parts.append((chain.coords[known, 1].astype(np.float64), letters))
    found = tm_align(parts[0][0], parts[1][0], parts[0][1], parts[1][1])
    return float(found.tm_norm_chain1 + found.tm_norm_chain2) / 2


def code_scores(codebook: Tensor) -> npt.NDArray[np.int32]:
    """(K, D) -> (K, K): 100 times the cosine in half precision, cut to an integer."""
    unit = F.normalize(codebook.float(), dim=-1).half().float()
    return ((unit @ unit.T).half() * 100).numpy().astype(np.int32)


class TokenAligner:
    """Scores of global alignments of tokens of one codebook (K, D). Residues without a token are left out."""

    def __init__(self, codebook: Tensor):
        from biotite.sequence import Alphabet
        from biotite.sequence.align import SubstitutionMatrix

        self._alphabet = Alphabet(list(range(len(codebook))))
        self._matrix = SubstitutionMatrix(self._alphabet, self._alphabet, code_scores(codebook))

    def score(self, first: Tokens, second: Tokens) -> int:
        """ValueError: one of them has no token at all."""
        from biotite.sequence import GeneralSequence
        from biotite.sequence.align import align_optimal

        sequences = []
        for tokens in (first, second):
            if not (tokens >= 0).any():
                raise ValueError("a chain without a single token")
            sequence = GeneralSequence(self._alphabet)
            sequence.code = tokens[tokens >= 0]
            sequences.append(sequence)
        return int(align_optimal(*sequences, self._matrix, gap_penalty=GAP, max_number=1)[0].score)


def correlations(x: Sequence[float], y: Sequence[float]) -> dict[str, float | None]:
    """Pearson's and Spearman's; None where one side is constant."""
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return {"pearson": None, "spearman": None}
    return {"pearson": float(pearsonr(x, y).statistic), "spearman": float(spearmanr(x, y).statistic)}


def sensitivity(
    tokenizer: ChainTokenizer, pairs: Sequence[Pair], targets: Sequence[float]
) -> dict[str, Any]:
    """targets: TM-scores. -> the correlations of both measures, and every pair."""
    aligner, rows = TokenAligner(tokenizer.codebook()), []
    scores, per_residue = [], []
    firsts, seconds = (tokenizer.encode(chains) for chains in zip(*((p.first, p.second) for p in pairs), strict=True))
    for pair, target, *tokens in zip(pairs, targets, firsts, seconds, strict=True):
        try:
            score = aligner.score(*tokens)
        except ValueError as error:
            raise ValueError(f"pair {pair.id}: {error}") from error
        length = sum(int((row >= 0).sum()) for row in tokens) / 2
        scores.append(float(score))
        per_residue.append(score / length / 100)
        rows.append({"id": pair.id, "tm_score": target, "score": score, "per_residue": per_residue[-1]})
    return {"per residue": correlations(per_residue, targets), "as coded": correlations(scores, targets), "pairs": rows}


def utilisation(tokenizer: ChainTokenizer, chains: Sequence[Chain]) -> dict[str, float]:
    """Use of the K codes, and the mean Euclidean distance of two of them.

    pooled: over all tokens of all chains. as coded: means over chains of each chain's own numbers, so that a chain of
    100 residues has a usage of at most 100 / K; entropy there is divided by K, not by its maximum.
    """
    codebook = tokenizer.codebook()
    k = len(codebook)
    counts = np.stack([np.bincount(tokens[tokens >= 0], minlength=k) for tokens in tokenizer.encode(chains)])
    counts = counts[counts.sum(1) > 0]
    if not len(counts):
        raise ValueError(f"{tokenizer.label}: none of the {len(chains)} chains has a token")
    pooled = code_statistics(torch.from_numpy(counts.sum(0)))
    p = counts / counts.sum(1, keepdims=True)
    entropy = -(p * np.log(p + 1e-8)).sum(1)
    return {
        "codes": k, "chains": len(counts), "tokens": int(counts.sum()),
        "pooled usage": pooled["usage"], "pooled perplexity": pooled["perplexity"],
        "pooled perplexity / K": pooled["perplexity"] / k,
        "as coded usage": float((counts > 0).mean(1).mean()),
        "as coded perplexity / K": float(np.exp(entropy).mean() / k),
        "as coded entropy / K": float(entropy.mean() / k),
        "code distance": mean_pairwise_distance(codebook),
    }


# --------------------------------------------------------------------------------------------------------------- data

def read_pairs(path: Path) -> tuple[str, list[Pair]]:
    """Name and pairs of a JSONL file. ValueError naming file, line and field."""
    pairs, name = [], ""
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        where = f"{path}, line {number}"
        row = parse_object(line, where)
        needed = ("id", "first", "second") if name else ("pairs",)
        absent = [key for key in needed if key not in row]
        if absent:
            raise ValueError(f"{where}: no field {absent[0]}")
        if not name:
            name = str(row["pairs"])
            continue
        chains = [_member(f"{where}: {key}", row[key], path.parent) for key in ("first", "second")]
        pairs.append(Pair(str(row["id"]), *chains))
    if not pairs:
        raise ValueError(f"{path}: no pairs")
    return name, pairs


def _member(where: str, value: Any, folder: Path) -> Chain:
    if not isinstance(value, dict) or not isinstance(value.get("structure"), str):
        raise ValueError(f'{where}: must be {{"structure": FILE}}, chain may be added')
    try:
        chains = read_structure(folder / value["structure"], chains=[value["chain"]] if "chain" in value else None)
    except (ValueError, OSError) as error:
        raise ValueError(f"{where}: {error}") from error
    if len(chains) > 1:
        raise ValueError(f"{where}: {value['structure']} has {len(chains)} chains; add the field chain")
    return chains[0]


def archive_pairs(archive: Archive, name: str) -> list[Pair]:
    """StructTokenBench's pairs: a table with the first chain, "1abc.A", in the column name and the other in the last.

    Pairs with a chain that cannot be read, or has fewer than MIN_ATOMS CA, are left out. ValueError naming file, line
    and field.
    """
    path = archive.data / "sensitivity" / "conformational" / CONFORMATIONS[name]
    wanted = []
    for place, (where, row) in enumerate(read_table(path, ("name",))):
        keys, last = [], [column for column in row if column is not None][-1]
        for field in ("name", last):
            pdb_id, dot, chain_id = (row[field] or "").partition(".")
            if not dot or not pdb_id or not chain_id:
                raise ValueError(f"{where}: {field}: {brief(row[field])} is no chain, such as 1abc.A")
            keys.append((archive.structure(pdb_id), chain_id))
        if (name, place) not in SKIPPED:
            wanted.append((f"{row['name']} {row[last]}", keys))
    found = read_chains([key for _, keys in wanted for key in keys])
    pairs = []
    for identifier, keys in wanted:
        first, second = (found[key] for key in keys)
        if not isinstance(first, Chain) or not isinstance(second, Chain):
            continue
        if min(len(_known(first)), len(_known(second))) >= MIN_ATOMS:
            pairs.append(Pair(identifier, first, second))
    if not pairs:
        raise ValueError(f"{path}: none of its pairs has structures in {archive.structure('1abc').parent}")
    return pairs


def archive_chains(archive: Archive, name: str) -> list[Chain]:
    """CASP14's or CAMEO's chains. ValueError: none of them can be read."""
    folder = archive.data / "utility" / name
    path = folder / "chain_data_cache.json"
    keys = read_json(path)
    wanted = []
    for key in keys:
        pdb_id, bar, chain_id = str(key).rpartition("_")
        if not bar:
            raise ValueError(f"{path}: {brief(key)} is no chain such as 1abc_A")
        wanted.append((folder / "data_dir" / f"{pdb_id}.cif", chain_id))
    chains = [chain for chain in read_chains(wanted).values() if isinstance(chain, Chain)]
    if not chains:
        raise ValueError(f"{path}: none of its {len(wanted)} chains can be read from {folder / 'data_dir'}")
    return chains


# ---------------------------------------------------------------------------------------------------------------- main

def tables(report: dict[str, Any]) -> list[Table]:
    out = []
    for name, rows in report["sensitivity"].items():
        table = Table(f"Sensitivity, {name}.", "Correlation of token similarity with TM-score, percent.",
                      ["Tokenizer", "Pairs", "Pearson, per residue", "Spearman, per residue", "Pearson, as coded",
                       "Spearman, as coded"])
        for label, row in rows.items():
            cells = [_percent(row[measure][kind]) for measure in ("per residue", "as coded") for kind in
                     ("pearson", "spearman")]
            table.rows.append([Cell(label), Cell(str(len(row["pairs"]))), *cells])
        out.append(table)
    for name, rows in report["utilisation"].items():
        table = Table(f"Use of the codes, {name}.", "Percent, but for the mean distance of two codes.",
                      ["Tokenizer", "K", "Chains", "Usage, pooled", "Perplexity / K, pooled", "Usage, as coded",
                       "Perplexity / K, as coded", "Code distance"])
        for label, row in rows.items():
            cells = [_percent(row[key]) for key in ("pooled usage", "pooled perplexity / K", "as coded usage",
                                                    "as coded perplexity / K")]
            table.rows.append([Cell(label), Cell(str(row["codes"])), Cell(str(row["chains"])), *cells,
                               Cell(f"{row['code distance']:.2f}")])
        out.append(table)
    for name, rows in report["information"].items():
        of = next(iter(rows.values()))["of"]
        table = Table(f"Information about {of}, {name}.", f"Bits per residue; {of} has "
                      f"{next(iter(rows.values()))['entropy']:.2f}.", ["Tokenizer", "Residues", "Bits", "Percent"])
        for label, row in rows.items():
            table.rows.append([Cell(label), Cell(str(row["residues"])), Cell(f"{row['information']:.3f}"),
                               _percent(row["share"])])
        out.append(table)
    return out


def _percent(value: float | None) -> Cell:
    return Cell("—", missing=True) if value is None else Cell(f"{100 * value:.2f}")


def _open_pairs(args: argparse.Namespace, archive: Archive | None) -> dict[str, tuple[list[Pair], list[float]]]:
    """Name -> pairs and their TM-scores, of every --pairs, before anything is tokenized. ValueError naming --pairs."""
    sets: dict[str, tuple[list[Pair], list[float]]] = {}
    sources: dict[str, str] = {}
    for source in args.pairs:
        known = source in CONFORMATIONS and archive is not None
        name, pairs = (source, archive_pairs(archive, source)) if known and archive else read_pairs(Path(source))
        if name in sources:
            raise ValueError(f"--pairs {sources[name]} and {source} are both called {name!r}, which names them in the "
                             "tables; change the first line of one")
        sources[name] = source
        pairs = [pair for pair in pairs if max(len(pair.first), len(pair.second)) <= args.max_length]
        if len(pairs) < 2:
            raise ValueError(f"--pairs {source}: {len(pairs)} pairs of at most {args.max_length} residues; needs two")
        targets = []
        for pair in pairs:
            try:
                targets.append(tm_score(pair.first, pair.second))
            except ValueError as error:
                raise ValueError(f"--pairs {source}: pair {pair.id}: {error}") from error
        sets[name] = pairs, targets
    return sets


def run(args: argparse.Namespace) -> dict[str, Any]:
    device = distributed.init(args.device)
    tokenizers = [open_tokenizer(name, device) for name in args.tokenizer]
    archive = None if args.data is None else Archive.open(args.data, args.pdb_data)
    found: dict[str, Any]
    report: dict[str, dict[str, Any]] = {"sensitivity": {}, "utilisation": {}, "information": {}}
    for name, (pairs, targets) in _open_pairs(args, archive).items():
        report["sensitivity"][name] = found = {}
        for tokenizer in tokenizers:
            tokenizer.fit([pair.first for pair in pairs])
            found[_fresh(tokenizer.label, found)] = sensitivity(tokenizer, pairs, targets)
    for source in args.chains:
        known = source in UTILITY and archive is not None
        chains = archive_chains(archive, source) if known and archive else read_folder(source).chains
        chains = [chain for chain in chains if len(chain) <= args.max_length]
        if not chains:
            raise ValueError(f"--chains {source}: none has at most {args.max_length} residues")
        report["utilisation"][source] = found = {}
        for tokenizer in tokenizers:
            tokenizer.fit(chains)
            found[_fresh(tokenizer.label, found)] = utilisation(tokenizer, chains)
        if len(tokenizers) > 1:
            about: dict[str, Any] = {}
            report["information"][source] = about
            tokens = [tokenizer.encode(chains) for tokenizer in tokenizers]
            for tokenizer, others in zip(tokenizers[1:], tokens[1:], strict=True):
                about[_fresh(tokenizer.label, about)] = {
                    "of": tokenizers[0].label, **mutual_information(tokens[0], others)}
    return report


def _fresh(label: str, taken: dict[str, Any]) -> str:
    """Several runs of one label are told apart."""
    count = sum(name == label or name.startswith(f"{label} (") for name in taken)
    return f"{label} ({count + 1})" if count else label


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        files = output_files(args.out)
        report = run(args)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_json(files[0], report)
        atomic_write_text(files[1], "\n".join(map(markdown_table, tables(report))))
        distributed.print0(f"wrote {files[0]} and .md")


if __name__ == "__main__":
    main()
