"""Structure tokenizers to compare on tasks, each behind the same three methods. A new one is a class like these.

    foldseek            3Di states (van Kempen et al., Nature Biotechnology 2024), as biotite computes them
    foldseek-onehot     the same states as one-hot vectors: a probe's LayerNorm leaves of a 2-dimensional code one sign
    tokens:FOLDER       tokens that another program has made, such as ProTokens' own, see TokenFiles
    untrained           this project's small model at random weights, its codes fitted by k-means; untrained:PATH has
                        the architecture of a run or an export
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

from protein import token_files
from protein.benchmark import inert_pickle
from protein.benchmark.tasks import align_ids, residue_ids
from protein.inference import encode_chains, padded_chains
from protein.structure_config import PRESETS
from protein.structure_io import Chain
from protein.structure_model import StructureModelConfig, StructureVQModel
from tokenizer.runtime.parsing import parsing, require_file
from tokenizer.runtime.seeding import fold, seed_step

Tokens = npt.NDArray[np.int64]
_SHAPE = ("encoder_width", "encoder_heads", "encoder_layers", "neighbours", "codebook_size", "codebook_embed_dim")


class ChainTokenizer(ABC):
    """Chains to tokens. label: how tables call it; source: where it came from, a path if it has one; step: of a run's
    training, if known.
    """

    label: str
    source: str = ""
    step: int | None = None

    def fit(self, chains: Sequence[Chain]) -> None:  # noqa: B027 - most tokenizers come trained
        """Once for every task before `encode`, with the chains of the task's training split."""

    @abstractmethod
    def encode(self, chains: Sequence[Chain]) -> list[Tokens]:
        """Of each chain one token per residue, int64 (L,); -1 = none."""

    @abstractmethod
    def codebook(self) -> Tensor:
        """float32 (K, D): the vectors of the tokens 0 ... K - 1."""

    @abstractmethod
    def identity(self) -> str:
        """Differs between tokenizers that may give different tokens."""


class FoldSeek(ChainTokenizer):
    """20 states. Where the geometry is undefined (the ends, absent atoms), the state "d", as FoldSeek does."""

    def __init__(self, one_hot: bool = False):
        from biotite.structure.alphabet.encoder import Encoder

        self.label = "FoldSeek, one-hot" if one_hot else "FoldSeek"
        self._encoder = Encoder()
        self._one_hot = one_hot

    def encode(self, chains: Sequence[Chain]) -> list[Tokens]:
        out = []
        for chain in chains:
            n, ca, c, _, cb = chain.coords.astype(np.float64).swapaxes(0, 1)
            with np.errstate(invalid="ignore"):  # NaN of absent atoms
                out.append(self._encoder.encode(ca, cb, n, c).filled().astype(np.int64))
        return out

    def codebook(self) -> Tensor:
        centroids = torch.tensor(self._encoder.vae_encoder.layers[-1].centroids, dtype=torch.float32)  # (20, 2)
        return torch.eye(len(centroids)) if self._one_hot else centroids

    def identity(self) -> str:
        return self.label


def _load_array(path: Path) -> Any:
    require_file(path)
    with parsing(path, "damaged, or no .npy file"):
        return np.load(path, allow_pickle=False)


class TokenFiles(ChainTokenizer):
    """Tokens that another program has made, in a folder with

        tokens.jsonl  (or .npz, .fasta) in the form of token_files.py, a line per chain: {"name": "1abc", "chain": "A",
                      "numbers": [1, 2, "52A"], "tokens": [17, 403, 8]}
        codebook.npy  float (K, D); or ProToken_Code_Book.pkl, as ProTokens has it

    name is the structure's file name without extension, numbers the residues' (insertion codes may be left out).
    Residues without a token get none. ProTokens (Lin et al., 2023), whose program needs JAX and TensorFlow, gives the
    encoder's "protoken_index" and the residue_index of its inputs, both where seq_mask is set.
    """

    def __init__(self, folder: str | Path):
        """FileNotFoundError; ValueError, naming the file: damaged, a code that is not finite, no code of a token, a
        chain that is there twice.
        """
        folder = Path(folder)
        self.label = folder.name
        plain, pickled = folder / "codebook.npy", folder / "ProToken_Code_Book.pkl"
        path = plain if plain.exists() else pickled
        values = _load_array(path) if path == plain else inert_pickle.load_file(path)
        if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind != "f":
            raise ValueError(f"{path}: no codebook, which is a float array (K, D)")
        self._codebook = torch.tensor(values, dtype=torch.float32)
        bad = (~self._codebook.isfinite()).any(-1).nonzero()
        if len(bad):
            raise ValueError(f"{path}: code {int(bad[0])} has a number that is not finite in float32")
        found = [folder / f"tokens{kind}" for kind in token_files.FORMATS if (folder / f"tokens{kind}").exists()]
        self._path = found[0] if found else folder / "tokens.jsonl"
        self._chains: dict[str, token_files.TokenChain] = {}
        for chain in token_files.read_tokens(self._path):
            if chain.label in self._chains:
                raise ValueError(f"{self._path}: chain {chain.label} is there twice; keep one")
            self._chains[chain.label] = chain
            if chain.tokens.max() >= len(values):
                raise ValueError(f"{self._path}: chain {chain.label}: token {chain.tokens.max()}, but the codebook has "
                                 f"{len(values)} codes")
        self._hash = hashlib.sha256(self._path.read_bytes() + values.tobytes()).hexdigest()

    def encode(self, chains: Sequence[Chain]) -> list[Tokens]:
        return [self._of(chain) for chain in chains]

    def _of(self, chain: Chain) -> Tokens:
        if chain.label not in self._chains:
            raise ValueError(f"{self._path}: no tokens of chain {chain.label!r}")
        theirs = self._chains[chain.label]
        ids = residue_ids(chain)
        if not any(theirs.residue_numbers()[1]):
            ids = list(map(str, chain.residue_numbers.tolist()))
        places = align_ids(theirs.numbers, ids)
        if not (places >= 0).any():
            raise ValueError(f"{self._path}: chain {chain.label!r}: none of its residue numbers is in the structure")
        out = np.full(len(chain), -1, dtype=np.int64)
        out[places[places >= 0]] = theirs.tokens[places >= 0]
        return out

    def codebook(self) -> Tensor:
        return self._codebook

    def identity(self) -> str:
        return f"tokens {self._hash}"


class Trained(ChainTokenizer):
    """A model that protein/pretrained.py loads."""

    def __init__(self, path: str | Path, device: torch.device):
        from protein.pretrained import load_structure_tokenizer

        self.label = Path(path).stem
        self._model: Any = load_structure_tokenizer(path, device)
        self.step = self._model.step
        self._device = device

    def encode(self, chains: Sequence[Chain]) -> list[Tokens]:
        return encode_chains(self._model, chains, self._device)

    @torch.no_grad()
    def codebook(self) -> Tensor:
        return self._model.codebook().detach().float().cpu()

    def config(self) -> StructureModelConfig:
        """Of a run or an export. ValueError: ESM3's encoder has none."""
        model = getattr(self._model, "model", None)
        if not isinstance(model, StructureVQModel):
            raise ValueError(f"{self.label} is neither a run nor an export, so its architecture is unknown")
        return model.config

    def identity(self) -> str:
        return str(self._model.hash())


class Untrained(ChainTokenizer):
    """What the architecture alone gives: a random encoder, its codes the k-means centroids of its latents."""

    label = "Untrained encoder"
    _MAX_LATENTS = 20_000

    def __init__(self, device: torch.device, config: StructureModelConfig | None = None, seed: int = 0):
        """config: its quantizer does not matter; None: the preset "small"."""
        self._device, self._seed = device, seed
        values = StructureModelConfig().to_dict()
        shape = PRESETS["small"] if config is None else {k: v for k, v in config.to_dict().items() if k in _SHAPE}
        self._config = StructureModelConfig.from_dict(values | shape)
        self._model: StructureVQModel | None = None

    @torch.no_grad()
    def fit(self, chains: Sequence[Chain]) -> None:
        seed_step(fold(self._seed, 1), 0, 0)
        self._model = StructureVQModel(self._config).to(self._device).eval()
        latents: list[Tensor] = []
        for chain in chains:
            coords, mask, index = padded_chains([chain], self._device)
            latents.append(self._model.encode_latents(coords, mask, index)[mask])
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

    def encode(self, chains: Sequence[Chain]) -> list[Tokens]:
        return encode_chains(self._fitted(), chains, self._device)

    def codebook(self) -> Tensor:
        return self._fitted().quantize.codebook().detach().float().cpu()

    def identity(self) -> str:
        return f"untrained {self._seed} {json.dumps(self._config.to_dict())}"


def open_tokenizer(name: str, device: torch.device) -> ChainTokenizer:
    """NAME or PATH of the list above, or LABEL=NAME to call it LABEL in tables.

    ValueError: neither a name nor a path that exists.
    """
    label, equals, spec = name.partition("=")
    if not equals:
        label, spec = "", name
    kind, _, rest = spec.partition(":")
    tokenizer: ChainTokenizer
    if spec in ("foldseek", "foldseek-onehot"):
        tokenizer = FoldSeek(one_hot=spec == "foldseek-onehot")
    elif spec == "untrained":
        tokenizer = Untrained(device)
    elif kind == "untrained" and rest:
        tokenizer = Untrained(device, Trained(rest, device).config())
    elif kind == "tokens" and rest:
        tokenizer = TokenFiles(rest)
    elif Path(spec).exists():
        tokenizer = Trained(spec, device)
    else:
        raise ValueError(f"--tokenizer {name}: {spec} is neither foldseek, foldseek-onehot, untrained, "
                         "untrained:PATH, tokens:FOLDER nor a path that exists")
    tokenizer.label = label or tokenizer.label
    tokenizer.source = str(Path(spec).resolve()) if Path(spec).exists() else spec
    return tokenizer
