"""Structure tokenizers to compare on tasks, each behind the same three methods. A new one is a class like these.

    foldseek            3Di states (van Kempen et al., Nature Biotechnology 2024), as biotite computes them
    foldseek-onehot     the same states as one-hot vectors: a probe's LayerNorm leaves of a 2-dimensional code one sign
    protokens:FOLDER    tokens that ProTokens' own program has computed, see ProTokens
    untrained           this project's small model at random weights, its codes fitted by k-means
    PATH                a run or an export of train_provq.py, a checkpoint of StructTokenBench (VanillaVQ, AminoAseed),
                        ESM3's esm3_structure_encoder_v0.pth: whatever protein/pretrained.py loads
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protein import inert_pickle
from protein.structure_io import Chain
from protein.structure_model import PRESETS, StructureModelConfig, StructureVQModel
from protein.tasks import align_ids
from tokenizer.runtime.seeding import fold, seed_step

Tokens = npt.NDArray[np.int64]


class StructureTokenizer(ABC):
    """Chains to tokens. label: how tables call it."""

    label: str

    def fit(self, chains: Sequence[Chain]) -> None:  # noqa: B027 - most tokenizers come trained
        """Once for every task before `encode`, with the chains of the task's training split."""

    @abstractmethod
    def encode(self, chain: Chain) -> Tokens:
        """One token per residue, int64 (L,); -1 = none."""

    @abstractmethod
    def codebook(self) -> Tensor:
        """float32 (K, D): the vectors of the tokens 0 ... K - 1."""

    @abstractmethod
    def identity(self) -> str:
        """Differs between tokenizers that may give different tokens."""


class FoldSeek(StructureTokenizer):
    """20 states. Where the geometry is undefined (the ends, absent atoms), the state "d", as FoldSeek does."""

    def __init__(self, one_hot: bool = False):
        from biotite.structure.alphabet.encoder import Encoder

        self.label = "FoldSeek, one-hot" if one_hot else "FoldSeek"
        self._encoder = Encoder()
        self._one_hot = one_hot

    def encode(self, chain: Chain) -> Tokens:
        n, ca, c, _, cb = chain.coords.astype(np.float64).swapaxes(0, 1)
        with np.errstate(invalid="ignore"):  # NaN of absent atoms
            return self._encoder.encode(ca, cb, n, c).filled().astype(np.int64)

    def codebook(self) -> Tensor:
        centroids = torch.tensor(self._encoder.vae_encoder.layers[-1].centroids, dtype=torch.float32)  # (20, 2)
        return torch.eye(len(centroids)) if self._one_hot else centroids

    def identity(self) -> str:
        return self.label


class ProTokens(StructureTokenizer):
    """Tokens made by ProTokens' own program (Lin et al., 2023), which needs JAX and TensorFlow, in a folder with

        ProToken_Code_Book.pkl  the codebook as that program has it, or codebook.npy: float (512, 32)
        tokens.jsonl            a line per chain: {"chain": "1abc_A", "residues": [1, 2, ...], "tokens": [17, 403, ...]}

    chain is Chain.label, the structure's file name without extension and the chain's id. tokens are the encoder's
    "protoken_index" where its seq_mask is set, residues the author's numbers (encoder_aux["residue_index"]) there.
    Residues of a chain without a token get none.
    """

    label = "ProTokens"

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        pickled, plain = folder / "ProToken_Code_Book.pkl", folder / "codebook.npy"
        path = plain if plain.exists() else pickled
        values = np.load(path, allow_pickle=False) if path == plain else inert_pickle.load_file(path)
        if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind != "f":
            raise ValueError(f"{path}: no codebook, which is a float array (K, D)")
        self._codebook = torch.tensor(values, dtype=torch.float32)
        self._tokens: dict[str, tuple[list[str], Tokens]] = {}
        self._path = folder / "tokens.jsonl"
        content = self._path.read_bytes()
        self._hash = hashlib.sha256(content + values.tobytes()).hexdigest()
        for number, line in enumerate(content.decode("utf-8").splitlines(), start=1):
            self._add(f"{self._path}, line {number}", line)

    def _add(self, where: str, line: str) -> None:
        try:
            row = json.loads(line)
            name, residues, tokens = row["chain"], list(map(str, row["residues"])), np.array(row["tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{where}: no object with chain, residues and tokens ({error!r})") from error
        if len(residues) != len(tokens) or tokens.dtype.kind != "i":
            raise ValueError(f"{where}: tokens: {len(tokens)} for {len(residues)} residues; both must be lists of "
                             "integers, equally long")
        if len(tokens) and not (0 <= tokens.min() and tokens.max() < len(self._codebook)):
            raise ValueError(f"{where}: tokens: {tokens.min()} to {tokens.max()}; the codebook has "
                             f"{len(self._codebook)} codes")
        self._tokens[name] = residues, tokens

    def encode(self, chain: Chain) -> Tokens:
        if chain.label not in self._tokens:
            raise ValueError(f"{self._path}: no tokens of chain {chain.label!r}")
        residues, tokens = self._tokens[chain.label]
        places = align_ids(residues, list(map(str, chain.residue_numbers.tolist())))
        if not (places >= 0).any():
            raise ValueError(f"{self._path}: chain {chain.label!r}: none of its residue numbers is in the structure")
        out = np.full(len(chain), -1, dtype=np.int64)
        out[places[places >= 0]] = tokens[places >= 0]
        return out

    def codebook(self) -> Tensor:
        return self._codebook

    def identity(self) -> str:
        return f"ProTokens {self._hash}"


def _tensors(chain: Chain, device: torch.device) -> list[Tensor]:
    """coords (1, L, 5, 3), mask (1, L), residue index (1, L): a batch of one for a model."""
    arrays = (chain.coords, chain.mask, chain.residue_index())
    return [torch.from_numpy(np.ascontiguousarray(array)).unsqueeze(0).to(device) for array in arrays]


class Trained(StructureTokenizer):
    """A model that protein/pretrained.py loads."""

    def __init__(self, path: str | Path, device: torch.device):
        from protein.pretrained import load_structure_tokenizer

        self.label = Path(path).stem
        self._model: Any = load_structure_tokenizer(path, device)
        self._device = device

    @torch.no_grad()
    def encode(self, chain: Chain) -> Tokens:
        return self._model.encode(*_tensors(chain, self._device))[0].cpu().numpy().astype(np.int64)

    @torch.no_grad()
    def codebook(self) -> Tensor:
        return self._model.codebook().detach().float().cpu()

    def identity(self) -> str:
        digest = hashlib.sha256()
        for key, value in sorted(self._model.state_dict().items()):
            digest.update(f"{key} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


class Untrained(StructureTokenizer):
    """What the architecture alone gives: a random encoder, its codes the k-means centroids of its latents."""

    label = "Untrained encoder"
    _MAX_LATENTS = 20_000

    def __init__(self, device: torch.device, seed: int = 0):
        self._device, self._seed = device, seed
        self._config = StructureModelConfig.from_dict(StructureModelConfig().to_dict() | PRESETS["small"])
        self._model: StructureVQModel | None = None

    @torch.no_grad()
    def fit(self, chains: Sequence[Chain]) -> None:
        seed_step(fold(self._seed, 1), 0, 0)
        self._model = StructureVQModel(self._config).to(self._device).eval()
        latents: list[Tensor] = []
        for chain in chains:
            z = self._model.encode_latents(*_tensors(chain, self._device))[0]
            latents.append(z[torch.from_numpy(chain.mask).to(self._device)])
            if sum(map(len, latents)) >= self._MAX_LATENTS:
                break
        found = torch.cat(latents)
        if len(found) < self._config.codebook_size:
            raise ValueError(f"{self.label}: {len(found)} training residues are too few for "
                             f"{self._config.codebook_size} codes")
        self._model.quantize.init_codebook(found, seed=self._seed)

    def _fitted(self) -> StructureVQModel:
        assert self._model is not None, "fit comes first"
        return self._model

    def encode(self, chain: Chain) -> Tokens:
        return self._fitted().encode(*_tensors(chain, self._device))[0].cpu().numpy()

    def codebook(self) -> Tensor:
        return self._fitted().quantize.codebook.detach().float().cpu()

    def identity(self) -> str:
        return f"untrained {self._seed} {json.dumps(self._config.to_dict())}"


def open_tokenizer(name: str, device: torch.device) -> StructureTokenizer:
    """NAME or PATH of the list above, or LABEL=NAME to call it LABEL in tables.

    ValueError: neither a name nor a path that exists.
    """
    label, equals, spec = name.partition("=")
    if not equals:
        label, spec = "", name
    kind, _, rest = spec.partition(":")
    tokenizer: StructureTokenizer
    if spec in ("foldseek", "foldseek-onehot"):
        tokenizer = FoldSeek(one_hot=spec == "foldseek-onehot")
    elif spec == "untrained":
        tokenizer = Untrained(device)
    elif kind == "protokens" and rest:
        tokenizer = ProTokens(rest)
    elif Path(spec).exists():
        tokenizer = Trained(spec, device)
    else:
        raise ValueError(f"--tokenizer {name}: {spec} is neither foldseek, foldseek-onehot, untrained, "
                         "protokens:FOLDER nor a path that exists")
    tokenizer.label = label or tokenizer.label
    return tokenizer
