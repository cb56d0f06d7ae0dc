"""Structure tokens on disk: .fasta (people read it), .jsonl (programs read it line by line), .npz (arrays).

A residue without a backbone has token -1. Each file keeps what decode.py needs to write a structure: sequence, residue
numbers, insertion codes, pLDDT if it is known to be one, and the hash of the tokenizer, since tokens mean nothing to
another one. A folder of token_shards.py is read like a file.

    >1abc_A chain=A tokenizer=9f86d081 sequence=MKV numbers=5,6,7A     .fasta: one header, one line of tokens per chain
    17 402 -1
    {"name": "1abc", "chain": "A", "tokens": [17, 402, -1], ...}    .jsonl: the fields of TokenChain, one chain per line
    tokens, offsets, names, chains, sequences, numbers, tokenizer   .npz: chain i is tokens[offsets[i]:offsets[i + 1]];
                                                                    plddt, float32, likewise, NaN where unknown
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protein.structure_io import Chain
from tokenizer.runtime.files import atomic_write, atomic_write_text
from tokenizer.runtime.npz import Npz
from tokenizer.runtime.parsing import brief, from_json, parsing, require_file

FORMATS = (".fasta", ".jsonl", ".npz")
_NUMBER = re.compile(r"(-?\d+)(\D?)")
MAX_RESIDUES = 2**28  # of an .npz file that is read: 2 GB of tokens
MAX_LENGTH = 2**20    # residues of a chain there
MAX_NAME = 4096       # letters of a name there
_TEXTS = {"names": "name", "chains": "chain", "sequences": "sequence", "numbers": "numbers", "tokenizer": "tokenizer"}
_INT32 = 2**31  # what .npz keeps of a token, and structure files of a residue number


@dataclass(frozen=True, eq=False)
class TokenChain:
    """The tokens of one chain of L residues. ValueError, naming the chain, for parts that do not fit together.

    tokens: int64 (L,), -1 for none. numbers: L residue numbers with insertion codes, such as "52A". tokenizer: its
    hash; "" if unknown. plddt: float32 (L,), NaN where unknown; None: the structure is none of a prediction, or nobody
    said so.
    """

    name: str
    chain: str
    tokens: npt.NDArray[np.int64]
    sequence: str
    numbers: tuple[str, ...]
    tokenizer: str = ""
    plddt: npt.NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        if len(self.label) > MAX_NAME:
            raise ValueError(f"chain {brief(self.label)}: a name of {len(self.label)} characters, at most {MAX_NAME}")
        lengths = {"tokens": len(self.tokens), "sequence": len(self.sequence), "numbers": len(self.numbers)}
        lengths |= {} if self.plddt is None else {"plddt": len(self.plddt)}
        if len(set(lengths.values())) > 1 or not len(self.tokens):
            counts = ", ".join(f"{n} {what}" for what, n in lengths.items())
            raise ValueError(f"chain {self.label}: {counts}; they must be equally many, and at least 1")
        if self.tokens.min() < -1:
            raise ValueError(f"chain {self.label}: token {self.tokens.min()}; tokens are at least 0, or -1 for none")
        if self.tokens.max() >= _INT32:
            raise ValueError(f"chain {self.label}: token {self.tokens.max()} is no code of any tokenizer")
        parts = ((number, _NUMBER.fullmatch(number)) for number in self.numbers)
        odd = [number for number, part in parts if part is None or abs(int(part[1])) >= _INT32]
        if odd:
            raise ValueError(f"chain {self.label}: {brief(odd[0])} is no residue number")

    @property
    def label(self) -> str:
        """NAME_CHAIN, or NAME alone when the chain id is blank."""
        return f"{self.name}_{self.chain}" if self.chain else self.name

    def residue_numbers(self) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
        """Numbers int64 (L,) and insertion codes, "" for none."""
        parts = [_NUMBER.fullmatch(number) for number in self.numbers]
        return (np.array([int(part[1]) for part in parts if part], dtype=np.int64),
                tuple(part[2] for part in parts if part))


def token_chain(chain: Chain, tokenizer: str, *, renumber: bool = False, plddt: bool = False) -> TokenChain:
    """The entry of a chain, all of its tokens -1. renumber: its residues from 1. plddt: its B-factors are pLDDT.

    ValueError: what token files cannot hold.
    """
    numbers = (tuple(map(str, range(1, len(chain) + 1))) if renumber else
               tuple(f"{n}{code}" for n, code in zip(chain.residue_numbers, chain.insertion_codes, strict=True)))
    return TokenChain(chain.name, chain.chain_id, np.full(len(chain), -1, dtype=np.int64), chain.sequence, numbers,
                      tokenizer, chain.bfactors if plddt else None)


def check_name(path: Path) -> str:
    """The format that a file's name asks for. ValueError: none of FORMATS."""
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"{path}: tokens are kept in {', '.join(FORMATS)}")
    return path.suffix.lower()


def check_chain(path: Path, chain: TokenChain) -> None:
    """ValueError: the format of the file's name cannot hold this chain, whatever its tokens."""
    if check_name(path) == ".fasta" and re.search(r"\s", chain.label):
        raise ValueError(f"chain {chain.label!r}: .fasta cannot hold a name with spaces; use .jsonl or .npz")


def write_tokens(path: Path, chains: Sequence[TokenChain]) -> None:
    """Write chains in the format of the file's extension, atomically. ValueError: another extension, or no chains."""
    kind = check_name(path)
    if not chains:
        raise ValueError(f"{path}: no chains to write")
    for chain in chains:
        check_chain(path, chain)
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == ".npz":
        arrays: dict[str, Any] = {
            "tokens": np.concatenate([chain.tokens for chain in chains]).astype(np.int32),
            "offsets": np.concatenate([[0], np.cumsum([len(chain.tokens) for chain in chains])]),
            "names": np.array([chain.name for chain in chains]),
            "chains": np.array([chain.chain for chain in chains]),
            "sequences": np.array([chain.sequence for chain in chains]),
            "numbers": np.array([",".join(chain.numbers) for chain in chains]),
            "tokenizer": np.array([chain.tokenizer for chain in chains]),
        }
        if any(chain.plddt is not None for chain in chains):
            arrays["plddt"] = np.concatenate([np.full(len(c.tokens), np.nan, np.float32) if c.plddt is None else c.plddt
                                              for c in chains]).astype(np.float32)
        atomic_write(path, lambda file: np.savez_compressed(file, **arrays))
    else:
        atomic_write_text(path, "".join((_fasta if kind == ".fasta" else _json)(chain) for chain in chains))


def _fasta(chain: TokenChain) -> str:
    plddt = "" if chain.plddt is None else f" plddt={','.join(f'{value:g}' for value in chain.plddt.tolist())}"
    return (f">{chain.label} chain={chain.chain} tokenizer={chain.tokenizer} sequence={chain.sequence} "
            f"numbers={','.join(chain.numbers)}{plddt}\n{' '.join(map(str, chain.tokens))}\n")


def _json(chain: TokenChain) -> str:
    plddt = {} if chain.plddt is None else {
        "plddt": [float(f"{v:g}") if math.isfinite(v) else None for v in chain.plddt.tolist()]}
    return json.dumps({"name": chain.name, "chain": chain.chain, "tokens": chain.tokens.tolist(),
                       "sequence": chain.sequence, "numbers": list(chain.numbers),
                       "tokenizer": chain.tokenizer} | plddt) + "\n"


def read_tokens(path: Path) -> list[TokenChain]:
    """The chains of one file. FileNotFoundError; ValueError naming file, and line or entry, for what is wrong.

    A .fasta or .jsonl of another program needs only names and tokens: then residues are unknown ("X") and numbered from
    1, and the tokenizer is unknown.
    """
    kind = check_name(path)
    require_file(path)
    chains = list(_from_npz(path) if kind == ".npz" else _from_lines(path, kind))
    if not chains:
        raise ValueError(f"{path}: holds no chains")
    return chains


def _chain(values: Any) -> TokenChain:
    """The chain that a file's values describe. ValueError: what is absent or of the wrong type."""
    if not isinstance(values, dict):
        raise ValueError(f"a {type(values).__name__}, a chain is an object {{...}}")
    absent = [key for key in ("tokens", "name") if values.get(key) in (None, "")]
    if absent:
        raise ValueError(f"no {absent[0]}")
    tokens = values["tokens"]
    if not isinstance(tokens, list) or not tokens or not all(type(token) is int for token in tokens):
        raise ValueError("tokens must be a list of integers, at least one")
    huge = [token for token in tokens if abs(token) >= _INT32]  # before they overflow an array
    if huge:
        raise ValueError(f"token {brief(huge[0])} is no code of any tokenizer")
    others = {"sequence": "X" * len(tokens), "numbers": [str(i + 1) for i in range(len(tokens))], "chain": "",
              "tokenizer": ""}
    values = others | {key: value for key, value in values.items() if value not in ("", None)}
    texts = [key for key in ("name", "chain", "sequence", "tokenizer") if not isinstance(values[key], str)]
    numbers = values["numbers"]
    if not isinstance(numbers, list) or not all(type(number) in (str, int) for number in numbers):
        texts.append("numbers")
    plddt = values.get("plddt")
    if plddt is not None and not (isinstance(plddt, list) and all(v is None or type(v) in (int, float) for v in plddt)):
        texts.append("plddt")
    if texts:
        raise ValueError(f"{texts[0]} is of the wrong type: {brief(values[texts[0]])}")
    if plddt is not None:
        plddt = np.array([math.nan if v is None or abs(v) > 1e6 else v for v in plddt], dtype=np.float32)
    return TokenChain(values["name"], values["chain"], np.array(tokens, dtype=np.int64), values["sequence"],
                      tuple(n if isinstance(n, str) else brief(n) for n in numbers), values["tokenizer"], plddt)


def _from_lines(path: Path, kind: str) -> Iterable[TokenChain]:
    header: dict[str, Any] | None = None
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                if kind == ".jsonl":
                    yield _chain(from_json(line, "the line"))
                elif line.startswith(">"):
                    if header is not None:
                        raise ValueError("a header without tokens before it")
                    header = _fasta_header(line)
                elif header is None:
                    raise ValueError("tokens without a header before them")
                else:
                    yield _chain(header | {"tokens": [int(word) for word in re.split(r"[\s,]+", line.strip())]})
                    header = None
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error
    if header is not None:
        raise ValueError(f"{path}: the last header has no tokens; the file is cut off")


def _fasta_header(line: str) -> dict[str, Any]:
    label, *words = line[1:].split()
    fields = dict(word.split("=", 1) for word in words if "=" in word)
    chain, numbers = fields.get("chain", ""), fields.get("numbers")
    return {"name": label.removesuffix(f"_{chain}") if chain else label, "chain": chain,
            "sequence": fields.get("sequence"), "numbers": numbers.split(",") if numbers else None,
            "tokenizer": fields.get("tokenizer"),
            "plddt": [float(value) for value in fields["plddt"].split(",")] if fields.get("plddt") else None}


def _from_npz(path: Path) -> Iterator[TokenChain]:
    """Chain by chain: what a few bytes inflate to is never held as a whole."""
    with Npz(path) as file:
        absent = [key for key in ("tokens", "offsets", "names") if key not in file.names]
        if absent:
            raise ValueError(f"{path}: no array {', '.join(absent)}")
        for key in ("tokens", "offsets"):
            header = file.header(key)
            if len(header.shape) != 1 or header.dtype.kind not in "iu":
                raise ValueError(f"{path}: {key} must be a row of integers, not {header}")
            if header.shape[0] > MAX_RESIDUES + 1:
                raise ValueError(f"{path}: {key} {header.shape}: more than {MAX_RESIDUES} residues in one file")
        tokens, offsets = file.array("tokens"), file.array("offsets").astype(np.int64)
        count = math.prod(file.header("names").shape)
        ascends = offsets.shape == (count + 1,) and bool((np.diff(offsets) > 0).all())
        if not ascends or offsets[0] != 0 or offsets[-1] != len(tokens):
            raise ValueError(f"{path}: offsets do not cut {len(tokens)} tokens into {count} chains")
        longest = int(np.diff(offsets).max()) if count else 0
        if longest > MAX_LENGTH:
            raise ValueError(f"{path}: a chain of {longest} residues; at most {MAX_LENGTH} are read")
        plddt = None
        if "plddt" in file.names:
            header = file.header("plddt")
            if header.shape != tokens.shape or header.dtype.kind != "f":
                raise ValueError(f"{path}: plddt must be a number for each of {len(tokens)} tokens, not {header}")
            plddt = file.array("plddt")
        columns = {field: _texts(file, key, count, longest) for key, field in _TEXTS.items() if key in file.names}
        for i in range(count):
            texts = {field: next(column) for field, column in columns.items()}
            numbers = texts["numbers"].split(",") if texts.get("numbers") else None
            more = {} if plddt is None else {"plddt": plddt[offsets[i] : offsets[i + 1]].tolist()}
            try:
                yield _chain(texts | more | {"numbers": numbers,
                                             "tokens": tokens[offsets[i] : offsets[i + 1]].tolist()})
            except ValueError as error:
                raise ValueError(f"{path}, entry {i}: {error}") from error


def _texts(file: Npz, key: str, count: int, longest: int) -> Iterator[str]:
    """The texts of one array, one at a time. ValueError: they are not `count`, or too long for chains of `longest`."""
    header = file.header(key)
    if header.shape != (count,) or header.dtype.kind != "U":
        raise ValueError(f"{file.path}: {key} must be {count} texts, one for each name, not {header}")
    if header.dtype.itemsize // 4 > max(MAX_NAME, len("-2147483648A,") * longest):
        raise ValueError(f"{file.path}: {key} {header}: its texts are too long for chains of {longest} residues")
    return _strings(file, key)


def _strings(file: Npz, key: str) -> Iterator[str]:
    for part in file.rows(key, 1):
        with parsing(file.path, f"{key} is damaged"):
            text = str(part[0])
        yield text
