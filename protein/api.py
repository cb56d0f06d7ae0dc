"""A structure tokenizer in a few lines of Python.

    tokenizer = provq.load("runs/structures")     # see tokenizer/hub.py
    tokens, embeddings = tokenizer.encode("1abc.cif")[0]
    backbone = tokenizer.decode(tokens)           # (L, 3, 3) Angstrom: N, CA, C
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protein.inference import decode_tokens, embed_chains
from protein.pretrained import StructureTokenizer, VQTokenizer, load_structure_tokenizer, save_pretrained
from protein.structure_io import Chain, read_structure
from tokenizer.hub import Pretrained


class Tokens(NamedTuple):
    """Of a chain of L residues."""

    tokens: npt.NDArray[np.int64]        # (L,), -1 for residues without N, CA and C
    embeddings: npt.NDArray[np.float32]  # (L, D), see encode; NaN where there is no token
    chain: Chain                         # sequence, residue numbers and names


class StructureTokens(Pretrained):
    """A tokenizer of protein structures: a token per residue, and back to backbones."""

    def __init__(self, tokenizer: StructureTokenizer):
        self.tokenizer = tokenizer.eval()

    @classmethod
    def open(cls, path: Path, device: torch.device, weights: str) -> StructureTokens:
        """See `load_structure_tokenizer`."""
        return cls(load_structure_tokenizer(path, device, weights))

    def write(self, folder: Path) -> None:
        """ValueError: also ESM3's, whose licence and format are its own."""
        if not isinstance(self.tokenizer, VQTokenizer):
            raise ValueError(f"{type(self.tokenizer).__name__} is not exported: use its own files")
        save_pretrained(self.tokenizer.model, folder)

    @property
    def sizes(self) -> Mapping[str, Any]:
        own = self.tokenizer.model.config.to_dict() if isinstance(self.tokenizer, VQTokenizer) else {}
        return {**own, "codes": self.tokenizer.num_codes, "tokenizer_hash": self.tokenizer.hash()}

    def codebook(self) -> Tensor:
        """Effective codes (K, D)."""
        return self.tokenizer.codebook().detach()

    def encode(
        self, structures: str | Path | Chain | Sequence[str | Path | Chain], *, chains: Sequence[str] | None = None,
        embeddings: str = "quantized",
    ) -> list[Tokens]:
        """Every protein chain of structure files, and chains, in this order.

        chains: ids to read of each file; None: all. embeddings: "quantized", the codes of the tokens, or "continuous",
        the latents before quantization. FileNotFoundError. ValueError: unreadable, no such chain. For folders, filters
        and many processes there is protein/encode.py.
        """
        given = [structures] if isinstance(structures, str | Path | Chain) else list(structures)
        found: list[Chain] = []
        for item in given:
            if not isinstance(item, Chain) and Path(item).is_dir():
                raise ValueError(f"{item} is a folder: give its files, or use protein/encode.py")
            found += [item] if isinstance(item, Chain) else read_structure(item, chains=chains)
        return [Tokens(*both, chain) for both, chain in zip(
            embed_chains(self.tokenizer, found, self.codebook().device, embeddings), found, strict=True)]

    def decode(self, tokens: npt.NDArray[Any] | Sequence[npt.NDArray[Any]]) -> Any:
        """Tokens (L,), or several such -> float32 (L, 3, 3) of N, CA, C in Angstrom, or a list; NaN without a token.

        ValueError: no tokens of this tokenizer, or one that only encodes.
        """
        single = isinstance(tokens, np.ndarray) and tokens.ndim == 1
        rows = [np.asarray(row) for row in ([tokens] if single else tokens)]
        for row in rows:
            if row.ndim != 1 or not row.size or row.dtype.kind not in "iu":
                raise ValueError(f"tokens are integers (L,), got {row.dtype} {row.shape}")
        decoded = decode_tokens(self.tokenizer, [row.astype(np.int64) for row in rows], self.codebook().device)
        return decoded[0] if single else decoded
