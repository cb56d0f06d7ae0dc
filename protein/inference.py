"""Tokens of many chains, and chains of many tokens: in batches of like lengths, results in the order of the input."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protein.choices import EMBEDDINGS, MAX_RESIDUES
from protein.structure_io import Chain


def length_batches(lengths: Sequence[int], max_residues: int = MAX_RESIDUES) -> Iterator[list[int]]:
    """Indices of chains, longest first, so that a batch padded to its longest chain has at most max_residues."""
    batch: list[int] = []
    for i in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_residues:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def pad(arrays: Sequence[npt.NDArray[Any]], fill: float) -> Tensor:
    """Arrays (L_i, ...) of one type -> (B, max L_i, ...)."""
    return torch.nn.utils.rnn.pad_sequence([torch.as_tensor(a) for a in arrays], batch_first=True, padding_value=fill)


def padded_chains(chains: Sequence[Chain], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Coordinates (B, L, 3, 3) of N, CA, C about each chain's centre, mask (B, L), residue_index (B, L) int64."""
    coords = []
    for chain in chains:
        backbone = chain.coords[:, :3]
        # The encoder sees differences only; near the origin float32 keeps their digits.
        coords.append(backbone - np.nanmean(backbone[chain.mask], axis=(0, 1)) if chain.mask.any() else backbone)
    return (pad(coords, np.nan).to(device), pad([chain.mask for chain in chains], False).to(device),
            pad([chain.residue_index() for chain in chains], 0).to(device))


@torch.inference_mode()
def encode_chains(
    tokenizer: Any, chains: Sequence[Chain], device: torch.device, *, max_residues: int = MAX_RESIDUES,
    progress: Callable[[int], object] | None = None,
) -> list[npt.NDArray[np.int64]]:
    """Tokens of each chain, int64 (L,), -1 for residues without a backbone. progress: called with chains done."""
    tokens: list[npt.NDArray[np.int64]] = [np.empty(0, np.int64)] * len(chains)
    for batch in length_batches([len(chain) for chain in chains], max_residues):
        found = tokenizer.encode(*padded_chains([chains[i] for i in batch], device)).cpu().numpy()
        for i, row in zip(batch, found, strict=True):
            tokens[i] = row[: len(chains[i])]
        if progress is not None:
            progress(len(batch))
    return tokens


@torch.inference_mode()
def embed_chains(
    tokenizer: Any, chains: Sequence[Chain], device: torch.device, kind: str, *, max_residues: int = MAX_RESIDUES,
    progress: Callable[[int], object] | None = None,
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Of each chain the tokens, int64 (L,), and vectors, float32 (L, D), NaN for residues without a backbone.

    kind: "quantized", the codes of the tokens, or "continuous", the latents before quantization.
    ValueError: another kind.
    """
    if kind not in EMBEDDINGS:
        raise ValueError(f"embeddings {kind!r} are none of {', '.join(EMBEDDINGS)}")
    codebook = tokenizer.codebook().float()
    out: list[Any] = [None] * len(chains)
    for batch in length_batches([len(chain) for chain in chains], max_residues):
        coords, mask, index = padded_chains([chains[i] for i in batch], device)
        tokens = tokenizer.encode(coords, mask, index)
        if kind == "quantized":
            vectors = codebook[tokens.clamp_min(0)]
        else:
            vectors = tokenizer.embed(coords, mask, index).float()
        vectors = torch.where((tokens >= 0)[..., None], vectors, torch.nan).cpu().numpy()
        for i, row, ids in zip(batch, vectors, tokens.cpu().numpy(), strict=True):
            out[i] = ids[: len(chains[i])], row[: len(chains[i])].copy()  # a view would keep the padded batch
        if progress is not None:
            progress(len(batch))
    return out


@torch.inference_mode()
def decode_tokens(
    tokenizer: Any, tokens: Sequence[npt.NDArray[np.int64]], device: torch.device, *, max_residues: int = MAX_RESIDUES,
    progress: Callable[[int], object] | None = None,
) -> list[npt.NDArray[np.float32]]:
    """Coordinates of each chain, float32 (L, 3, 3) of N, CA, C in Angstrom; NaN for residues without a token."""
    coords: list[npt.NDArray[np.float32]] = [np.empty((0, 3, 3), np.float32)] * len(tokens)
    for batch in length_batches([len(t) for t in tokens], max_residues):
        padded = pad([tokens[i] for i in batch], -1).to(device)
        decoded = tokenizer.decode(padded, padded >= 0).coords.float()
        decoded = torch.where((padded >= 0)[..., None, None], decoded, torch.nan).cpu().numpy()
        for i, row in zip(batch, decoded, strict=True):
            coords[i] = row[: len(tokens[i])]
        if progress is not None:
            progress(len(batch))
    return coords
