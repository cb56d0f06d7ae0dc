"""Structure tokens as sentences for language models: a vocabulary around a tokenizer's codes, and back.

    <bos> 17 402 3 <break> 51 <eos>                         a complex of two chains, or one with --complexes off
    <bos> M K V <break> G <structure> 17 402 3 <break> 51 <eos>      with the sequences first, as a prefix

Codes keep their numbers, 0 to K - 1; the words after them are SPECIAL and the amino acids. A residue without a backbone
is <unknown>. <mask> is in no sentence: it is there for models that are trained to fill in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from protein.token_files import TokenChain

SPECIAL = ("<bos>", "<eos>", "<pad>", "<mask>", "<break>", "<unknown>", "<structure>")
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWYXBUZO"
FORMAT = "provq-structure-words-1"
VOCABULARY = "vocabulary.json"  # in folders of sentences


@dataclass(frozen=True)
class Vocabulary:
    """Words of a tokenizer with `codes` codes, K. ValueError: none."""

    codes: int
    tokenizer: str = ""  # its hash; "" if unknown

    def __post_init__(self) -> None:
        if self.codes < 1:
            raise ValueError(f"a vocabulary of {self.codes} codes")

    def __len__(self) -> int:
        return self.codes + len(SPECIAL) + len(AMINO_ACIDS)

    def id(self, word: str) -> int:
        """Of one of SPECIAL or of an amino acid's letter. ValueError: another word."""
        if word in SPECIAL:
            return self.codes + SPECIAL.index(word)
        if len(word) == 1 and word in AMINO_ACIDS:
            return self.codes + len(SPECIAL) + AMINO_ACIDS.index(word)
        raise ValueError(f"{word!r} is neither an amino acid nor one of {', '.join(SPECIAL)}")

    def to_dict(self) -> dict[str, Any]:
        """What goes beside sentences: word -> id of all but the codes, whose words are their numbers."""
        words = {word: self.id(word) for word in (*SPECIAL, *AMINO_ACIDS)}
        return {"format": FORMAT, "codes": self.codes, "size": len(self), "tokenizer": self.tokenizer, "words": words}

    @classmethod
    def from_dict(cls, values: Any, source: str) -> Vocabulary:
        """ValueError, starting with source: not what to_dict gives."""
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ValueError(f"{source}: no vocabulary of structure tokens ({FORMAT})")
        codes, tokenizer = values.get("codes"), values.get("tokenizer")
        if type(codes) is not int or not isinstance(tokenizer, str):
            raise ValueError(f"{source}: codes or tokenizer is missing or of another kind")
        vocabulary = cls(codes, tokenizer)
        if values.get("words") != vocabulary.to_dict()["words"]:
            raise ValueError(f"{source}: its words are not those of this version")
        return vocabulary

    def prefix(self, sequences: Sequence[str]) -> list[int]:
        """<bos>, the sequences of a complex's chains, <structure>: what a structure is asked for by."""
        words: list[int] = [self.id("<bos>")]
        for place, sequence in enumerate(sequences):
            words += [self.id("<break>")] if place else []
            words += [self.id(letter) for letter in sequence]
        return [*words, self.id("<structure>")]

    def sentence(self, chains: Sequence[TokenChain], *, with_sequence: bool = False) -> list[int]:
        """The chains of one complex -> ids. ValueError, naming the chain: a token that is no code, an odd letter."""
        words = self.prefix([chain.sequence for chain in chains]) if with_sequence else [self.id("<bos>")]
        unknown = self.id("<unknown>")
        for place, chain in enumerate(chains):
            if chain.tokens.max() >= self.codes:
                raise ValueError(f"chain {chain.label} has token {chain.tokens.max()}, the vocabulary {self.codes} "
                                 "codes")
            words += [self.id("<break>")] if place else []
            words += [unknown if token < 0 else token for token in chain.tokens.tolist()]
        return [*words, self.id("<eos>")]

    def chains(self, ids: Sequence[int]) -> list[list[int]]:
        """The way back: tokens of each chain, -1 where a word stands that is no code. Reads from <structure>, if it is
        there, to <eos>, or to the first <pad>.
        """
        ids = list(ids)
        if self.id("<structure>") in ids:
            ids = ids[ids.index(self.id("<structure>")) + 1 :]
        elif ids and ids[0] == self.id("<bos>"):
            ids = ids[1:]
        ends = [ids.index(end) for end in (self.id("<eos>"), self.id("<pad>")) if end in ids]
        parts: list[list[int]] = [[]]
        for word in ids[: min(ends, default=len(ids))]:
            if word == self.id("<break>"):
                parts.append([])
            else:
                parts[-1].append(word if word < self.codes else -1)
        return [part for part in parts if part]


def complexes(chains: Iterable[TokenChain], together: bool) -> Iterator[list[TokenChain]]:
    """Neighbouring chains of one structure together, or each on its own."""
    if not together:
        yield from ([chain] for chain in chains)
        return
    for _, group in groupby(chains, key=lambda chain: chain.name):
        yield list(group)


def to_token_chains(name: str, parts: Sequence[Sequence[int]], sequences: Sequence[str] | None, tokenizer: str
                    ) -> list[TokenChain]:
    """Generated chains as decode.py takes them; chains are called A, B and so on. sequences: None: unknown (X)."""
    out = []
    for place, part in enumerate(parts):
        letters = sequences[place] if sequences else "X" * len(part)
        label = chr(ord("A") + place) if place < 26 else str(place)
        out.append(TokenChain(name, label, np.array(part, dtype=np.int64), letters,
                              tuple(map(str, range(1, len(part) + 1))), tokenizer))
    return out
