"""VQ autoencoder of protein backbones around a ProVQ quantizer: coordinates -> one token per residue -> coordinates.

The paper (Sec. 5.1.3) keeps the tokenizer of StructTokenBench (Yuan et al., ICML 2025), which is ESM3's encoder and a
smaller ESM3 decoder, and changes the quantizer only: VanillaVQ is quantizer="vq", AminoAseed "aminoaseed", ESM3's own
"ema". Encoder and decoder carry StructTokenBench's state-dict keys, so its weights load (load_structtokenbench).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from protein.geometry import valid_residues
from protein.structure_config import StructureModelConfig
from protein.structure_decoder import Decoded, PairLogits, RegressionHead, VectorDecoder
from protein.structure_encoder import StructureEncoder
from tokenizer.provq import AdaptiveWarmup, Curriculum, ProVQ, ProVQOutput
from tokenizer.quantizers import build_quantizer
from tokenizer.weights import check_state_dict

SEQUENCE_VOCABULARY = 33  # ESM's alphabet: the inverse folding head scores these letters


class StructureOutput(NamedTuple):
    """What a training step needs; B chains padded to L residues."""

    decoded: Decoded         # coordinates, frames, hidden states
    pairs: PairLogits        # distance and direction bins of residue pairs
    sequence_logits: Tensor  # (B, L, 33): inverse folding
    quantized: ProVQOutput   # its loss is already weighted by the curriculum
    mask: Tensor             # (B, L) bool: residues with coordinates that the mask given did not exclude


class StructureVQModel(nn.Module):
    """Encoder -> ProVQ -> decoder, on chains of N, CA, C coordinates.

    Args:
        config: architecture and quantizer.
        curriculum: training schedule of the quantizer; None means discrete from the first step, the plain baseline.
        adaptive: ends the warm-up by validation scores, see provq.AdaptiveWarmup.

    Every method takes a mask (B, L) bool, True = residue; None: all. Residues without finite N, CA and C are left out
    in any case. Masked residues get no token and influence nothing: a padded batch equals its chains one by one.
    Geometry, distances and losses are float32 under autocast.
    """

    def __init__(
        self, config: StructureModelConfig, curriculum: Curriculum | None = None, *,
        adaptive: AdaptiveWarmup | None = None,
    ):
        super().__init__()
        self.config = config
        self.encoder = StructureEncoder(
            config.encoder_width, config.encoder_heads, config.encoder_layers, config.codebook_embed_dim,
            config.neighbours,
        )
        self.quantize = ProVQ(
            build_quantizer(config), Curriculum(0, 0) if curriculum is None else curriculum, channel_dim=-1,
            adaptive=adaptive,
        )
        self.decoder = VectorDecoder(
            config.codebook_embed_dim, config.decoder_width, config.decoder_heads, config.decoder_layers
        )
        self.inverse_folding_head = RegressionHead(config.decoder_width, SEQUENCE_VOCABULARY)

    def forward(
        self, coords: Tensor, mask: Tensor | None = None, residue_index: Tensor | None = None,
        places: Tensor | None = None,
    ) -> StructureOutput:
        """coords (B, L, A >= 3, 3) Angstrom, residue_index (B, L) int -> see StructureOutput. Raises like encode.

        places (N,) int64: of `residues(coords, mask)` among all B L, in order, for who knows them without waiting for
        the device; None: they are found.
        """
        mask = self.residues(coords, mask)
        places = residue_places(mask) if places is None else places
        z = self.encoder(coords[:, :, :3], mask, residue_index, places)
        out = self.quantize(z.flatten(0, 1).index_select(0, places))  # (N, D)
        out = out._replace(quantized=_spread(out.quantized, places, mask, 0.0),
                           indices=None if out.indices is None else _spread(out.indices, places, mask, -1))
        decoded = self.decoder(out.quantized, mask)
        pairs = self.decoder.pair_logits(decoded.hidden)
        return StructureOutput(decoded, pairs, self.inverse_folding_head(decoded.hidden), out, mask)

    def residues(self, coords: Tensor, mask: Tensor | None = None) -> Tensor:
        """Residues that get a token, (B, L) bool; see `check_residues`."""
        return check_residues(coords, mask)

    def encode_latents(
        self, coords: Tensor, mask: Tensor | None = None, residue_index: Tensor | None = None
    ) -> Tensor:
        """coords (B, L, A >= 3, 3), residue_index (B, L) int: position in the sequence, by default in the array ->
        latents before quantization (B, L, D). Raises like encode."""
        return self.encoder(coords[:, :, :3], self.residues(coords, mask), residue_index)

    @torch.no_grad()
    def encode(self, coords: Tensor, mask: Tensor | None = None, residue_index: Tensor | None = None) -> Tensor:
        """Like encode_latents -> tokens (B, L) int64, -1 where masked.

        ValueError: see `residues`. RuntimeError: no codebook yet.
        """
        valid = self.residues(coords, mask)
        return self.quantize.encode(self.encoder(coords[:, :, :3], valid, residue_index), valid)

    def decode(self, tokens: Tensor, mask: Tensor | None = None) -> Decoded:
        """tokens (B, L) int, -1 = none, or quantized vectors (B, L, D) float -> see Decoded.

        `decoder.pair_logits(decoded.hidden)` gives what the pairwise heads say. ValueError: another shape, or a token
        that is no code. RuntimeError: no codebook yet.
        """
        if not tokens.is_floating_point():
            tokens = check_tokens(tokens, mask, self.config.codebook_size)
            return self.decoder(self.quantize.decode(tokens), tokens >= 0)
        if tokens.ndim != 3 or tokens.shape[-1] != self.config.codebook_embed_dim:
            raise ValueError(f"quantized vectors must be (B, L, {self.config.codebook_embed_dim}), "
                             f"got {tuple(tokens.shape)}")
        return self.decoder(tokens, _check_mask(mask, tokens.shape[:2]))


def residue_places(valid: Tensor) -> Tensor:
    """bool (B, L) -> where it is True among all B L, int64 (N,) in order. On a GPU the host waits for it."""
    return valid.flatten().nonzero()[:, 0]


def _spread(values: Tensor, places: Tensor, valid: Tensor, padding: float) -> Tensor:
    """Of N residues (N, ...) -> (B, L, ...), padding elsewhere."""
    full = values.new_full((valid.numel(), *values.shape[1:]), padding)
    return full.index_copy(0, places, values).unflatten(0, valid.shape)


def _check_mask(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
        raise ValueError(f"mask must be bool {tuple(shape)}, got {mask.dtype} {tuple(mask.shape)}")
    return mask


def check_residues(coords: Tensor, mask: Tensor | None) -> Tensor:
    """Residues of the mask that have coordinates, (B, L) bool.

    ValueError: coords empty, or not (B, L, A >= 3, 3) floating point, or a mask (B, L) unlike them.
    """
    shaped = coords.ndim == 4 and coords.shape[2] >= 3 and coords.shape[3] == 3 and coords.numel() > 0
    if not shaped or not coords.is_floating_point():
        raise ValueError("coordinates must be floating point (B, L, A, 3) with atoms N, CA, C first, "
                         f"got {coords.dtype} {tuple(coords.shape)}")
    return valid_residues(coords, _check_mask(mask, coords.shape[:2]))


def check_tokens(tokens: Tensor, mask: Tensor | None, num_codes: int) -> Tensor:
    """tokens as int64, -1 where masked. ValueError: empty or no integers (B, L), a mask unlike them, no code."""
    if tokens.ndim != 2 or not tokens.numel() or tokens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"tokens must be integers (B, L), got {tokens.dtype} {tuple(tokens.shape)}")
    mask = _check_mask(mask, tokens.shape)
    if mask is not None:
        tokens = torch.where(mask, tokens, -1)
    if bool((tokens >= num_codes).any()):
        raise ValueError(f"token {int(tokens.max())} is no code: the codebook has {num_codes}")
    return tokens.long().clamp_min(-1)


# -------------------------------------------------------------------------------------- weights of StructTokenBench

_QUANTIZER_KEYS = {  # ours -> StructTokenBench's, below quantize.quantizer. and quantizer.
    "vq": {"embedding.weight": "codebook.weight"},
    "aminoaseed": {"table": "codebook.weight", "map.weight": "linear_proj.weight", "map.bias": "linear_proj.bias"},
}


def _structtokenbench_keys(model: StructureVQModel) -> dict[str, str]:
    """StructTokenBench's name for each weight of the model, ours -> theirs; ProVQ's own state has none."""
    if model.config.quantizer not in _QUANTIZER_KEYS or model.config.codebook_follow:
        following = " with codebook_follow (its export is a plain table)" if model.config.codebook_follow else ""
        raise ValueError("StructTokenBench has the quantizers VanillaVQ (quantizer='vq') and AminoAseed "
                         f"('aminoaseed'), no {model.config.quantizer!r}{following}")
    names = {key: key for key in model.state_dict() if not key.startswith("quantize.")}
    for ours, theirs in _QUANTIZER_KEYS[model.config.quantizer].items():
        names[f"quantize.quantizer.{ours}"] = f"quantizer.{theirs}"
    return names


def to_structtokenbench(model: StructureVQModel) -> dict[str, Tensor]:
    """The model's weights under the keys of StructTokenBench's VQVAEModel. ValueError: a quantizer it does not have."""
    state = model.state_dict()
    return {theirs: state[ours] for ours, theirs in _structtokenbench_keys(model).items()}


def load_structtokenbench(model: StructureVQModel, state: Mapping[str, Tensor], source: str = "state dict") -> None:
    """Load the weights of a VQVAEModel, with or without the prefix `model.` of its checkpoints, which hold them under
    "module"; they include a codebook.

    ValueError: weights that are missing, unexpected or of another shape, each named (source: where they came from), or
    a quantizer that StructTokenBench does not have.
    """
    weights, own = fit_structtokenbench(model, state, source), model.state_dict()
    model.load_state_dict(own | weights | {"quantize.initialised": torch.tensor(True)})


def fit_structtokenbench(model: StructureVQModel, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """The same weights under the model's names; the model may be a skeleton. ValueError: see load_structtokenbench."""
    state = {key.removeprefix("model."): value for key, value in state.items()}
    names, own = _structtokenbench_keys(model), model.state_dict()
    check_state_dict(state, {theirs: own[ours] for ours, theirs in names.items()}, source)
    return {ours: state[theirs] for ours, theirs in names.items()}
