"""Structure tokenizers on disk: this project's runs and exports, StructTokenBench's and ESM3's weights; one loader.

Loading is strict: every missing, unexpected or misshapen tensor is an error by name. Files are data: nothing in them is
executed. ESM3's weights are under the Cambrian Non-Commercial licence.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from protein.structure_decoder import ESM3_CODES, Decoded, ESM3Decoder
from protein.structure_encoder import StructureEncoder
from protein.structure_model import (
    StructureModelConfig,
    StructureVQModel,
    check_residues,
    check_tokens,
    fit_structtokenbench,
    load_structtokenbench,
)
from tokenizer.export_probe import evaluating, quantizer_identity, require_same, require_same_codes, require_table_shape
from tokenizer.pretrained import content_hash, table_config, write_table_export
from tokenizer.provq import nearest_code
from tokenizer.stored import require_stored
from tokenizer.weights import (
    check_state_dict,
    listed,
    owned,
    read_weights,
    require_finite,
    require_keys,
    shape_of,
    skeleton,
)

EXPORT_FORMAT = "provq-structure-tokenizer-1"
ESM3_ENCODER_FILE, ESM3_DECODER_FILE = "esm3_structure_encoder_v0.pth", "esm3_structure_decoder_v0.pth"

PROBE_RESIDUES = 48  # of the chain that an export is tried on
HEAD_WIDTH = 64  # channels of an attention head in the decoders of ESM3 and StructTokenBench; no shape tells it
_EOS, _BOS, _PAD = (ESM3_CODES + i for i in (1, 2, 3))
_CODEBOOK = "quantizer.codebook.weight"


class StructureTokenizer(nn.Module, ABC):
    """What `load_structure_tokenizer` returns, in eval mode. B chains padded to L residues."""

    num_codes: int    # K
    can_decode: bool  # ESM3's decoder is a file of its own, which may not be there

    @property
    def step(self) -> int | None:
        """Training steps that made it; None: not known, as of exports and files of others."""
        return None

    @abstractmethod
    def encode(self, coords: Tensor, mask: Tensor | None = None, residue_index: Tensor | None = None) -> Tensor:
        """coords (B, L, A >= 3, 3) Angstrom, N, CA and C first; mask (B, L) bool, True = residue, None: all;
        residue_index (B, L) int, position in the sequence, None: in the array -> tokens (B, L) int64.

        -1 where masked and where N, CA or C is not finite. ValueError: shapes and types. RuntimeError: no codebook yet.
        """

    @abstractmethod
    def embed(self, coords: Tensor, mask: Tensor | None = None, residue_index: Tensor | None = None) -> Tensor:
        """Arguments and errors of encode -> latents before quantization (B, L, D); undefined where encode says -1."""

    @abstractmethod
    def decode(self, tokens: Tensor, mask: Tensor | None = None) -> Decoded:
        """tokens (B, L) int64, -1 = none; mask (B, L) bool as in encode -> see Decoded; 0 where there is no token.

        ValueError: shapes, a token that is no code, a tokenizer that cannot decode.
        """

    @abstractmethod
    def codebook(self) -> Tensor:
        """Effective codes (K, D)."""

    @abstractmethod
    def hash(self) -> str:
        """64 hex digits of what the tokens depend on. ValueError: no codebook yet."""


class VQTokenizer(StructureTokenizer):
    """A model of this project, or of StructTokenBench."""

    can_decode = True

    def __init__(self, model: StructureVQModel):
        super().__init__()
        self.model, self.num_codes = model, model.config.codebook_size

    def encode(self, coords: Tensor, mask: Tensor | None = None, residue_index: Tensor | None = None) -> Tensor:
        return self.model.encode(coords, mask, residue_index)

    def embed(self, coords: Tensor, mask: Tensor | None = None, residue_index: Tensor | None = None) -> Tensor:
        return self.model.encode_latents(coords, mask, residue_index)

    def decode(self, tokens: Tensor, mask: Tensor | None = None) -> Decoded:
        return self.model.decode(tokens, mask)

    def codebook(self) -> Tensor:
        return self.model.quantize.codebook()

    @property
    def step(self) -> int | None:
        return int(self.model.quantize.step) or None

    def hash(self) -> str:
        """A run and its export have the same."""
        config = self.model.config
        description = {"neighbours": config.neighbours, "decoder_heads": config.decoder_heads}  # others are shapes
        kind, own = quantizer_identity(self.model.quantize, config.codebook_l2_norm)
        return content_hash(description | kind, {**_exported_state(self.model), **own})


class _EMACodebook(nn.Module):
    """Only there for its names in the state dict: codes, and what ESM3's training keeps of their running means."""

    embeddings: Tensor

    def __init__(self, codes: int, dim: int):
        super().__init__()
        for name, shape in (("embeddings", (codes, dim)), ("N", (codes,)), ("z_avg", (codes, dim))):
            self.register_buffer(name, torch.zeros(shape))


class ESM3Encoder(StructureEncoder):
    """The encoder with its codebook; state-dict keys are those of ESM3's file."""

    def __init__(self, width: int = 1024, heads: int = 128, layers: int = 2, dim: int = 128, codes: int = ESM3_CODES):
        super().__init__(width, heads, layers, dim)
        self.codebook = _EMACodebook(codes, dim)


class ESM3Tokenizer(StructureTokenizer):
    """ESM3's structure tokens (Hayes et al., Science 2025, appendix A.1.7).

    ESM3 itself gives residues without coordinates the code of one constant latent, `undefined_token` (955 in the
    released weights). encode says -1 for them as every tokenizer here; decode puts that code in for ESM3's decoder, as
    ESM3 does, if other residues follow.
    """

    def __init__(self, encoder: ESM3Encoder, decoder: ESM3Decoder | None = None):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.num_codes, self.can_decode = len(encoder.codebook.embeddings), decoder is not None

    @property
    def undefined_token(self) -> int:
        return int(nearest_code(self.encoder.pre_vq_proj.bias[None], self.codebook()))

    @torch.no_grad()
    def encode(self, coords: Tensor, mask: Tensor | None = None, residue_index: Tensor | None = None) -> Tensor:
        valid = check_residues(coords, mask)
        z = self.encoder(coords[:, :, :3], valid, residue_index)
        tokens = valid.new_full(valid.shape, -1, dtype=torch.int64)
        tokens[valid] = nearest_code(z[valid], self.codebook())
        return tokens

    def embed(self, coords: Tensor, mask: Tensor | None = None, residue_index: Tensor | None = None) -> Tensor:
        return self.encoder(coords[:, :, :3], check_residues(coords, mask), residue_index)

    def decode(self, tokens: Tensor, mask: Tensor | None = None) -> Decoded:
        if self.decoder is None:
            raise ValueError(f"these weights of ESM3 only encode; load the folder of both {ESM3_ENCODER_FILE} and "
                             f"{ESM3_DECODER_FILE}")
        tokens = check_tokens(tokens, mask, self.num_codes)
        valid = tokens >= 0
        position = torch.arange(tokens.shape[1] + 2, device=tokens.device)
        last = (valid * position[1:-1]).amax(1, keepdim=True)  # (B, 1), counted from 1; BOS has place 0
        framed = F.pad(torch.where(valid, tokens, self.undefined_token), (1, 1), value=_PAD)
        framed = torch.where(position > last, _PAD, framed)
        framed = torch.where(position == last + 1, _EOS, framed)
        framed[:, 0] = _BOS
        decoded = self.decoder(framed, position <= last + 1)
        return Decoded(*(torch.where(valid.view(*valid.shape, *[1] * (t.ndim - 2)), t[:, 1:-1], 0.0) for t in decoded))

    def codebook(self) -> Tensor:
        return self.encoder.codebook.embeddings

    def hash(self) -> str:
        """The same with and without decoder."""
        return content_hash({"tokenizer": "esm3"}, self.encoder.state_dict())


# ------------------------------------------------------------------------------------------------------- loading

def load_structure_tokenizer(
    path: str | Path, device: str | torch.device = "cpu", weights: str = "auto"
) -> StructureTokenizer:
    """The tokenizer stored at path, in eval mode on device.

    Args:
        path: a run folder (its newest readable checkpoint), a checkpoint of this project, a folder written by
            save_pretrained or its model.safetensors, StructTokenBench's mp_rank_00_model_states.pt or another file of
            its weights, ESM3's encoder file (which only encodes), or the folder that has both files of ESM3 under their
            released names.
        weights: "model", "ema", or "auto": the EMA if there is one.

    FileNotFoundError: nothing there. ValueError: an unreadable or foreign file, a weight set that the file lacks,
    tensors that do not fit or are not finite (each named), a checkpoint from the warm-up, which has no tokens yet.
    """
    path = require_stored(path, weights, "structure tokenizer")
    tokenizer = _open(path, weights)
    if isinstance(tokenizer, VQTokenizer) and not tokenizer.model.quantize.has_codebook:
        raise ValueError(f"{path} is still in its continuous warm-up: it has no codebook and so no tokens yet; train "
                         "on, or name a later checkpoint")
    return tokenizer.to(device).eval()


def load_structure_model(path: str | Path) -> StructureVQModel:
    """The model of a tokenizer of this project or StructTokenBench's, on the CPU, also from within its warm-up.

    FileNotFoundError, ValueError: as load_structure_tokenizer; ESM3's, which is another model.
    """
    tokenizer = _open(require_stored(path, "auto", "structure tokenizer"), "auto")
    if not isinstance(tokenizer, VQTokenizer):
        raise ValueError(f"{path} is ESM3's tokenizer, which is another model than those that are trained here")
    return tokenizer.model


def _open(path: Path, weights: str) -> StructureTokenizer:
    if (path / ESM3_ENCODER_FILE).is_file():
        encoder = _esm3_encoder(*read_weights(path / ESM3_ENCODER_FILE, EXPORT_FORMAT).choose(weights))
        decoder = path / ESM3_DECODER_FILE
        if not decoder.exists():
            return ESM3Tokenizer(encoder)
        return ESM3Tokenizer(encoder, _esm3_decoder(*read_weights(decoder, EXPORT_FORMAT).choose(weights)))
    saved = read_weights(path, EXPORT_FORMAT)
    state, source = saved.choose(weights)
    if saved.exported:
        require_keys(saved.description, ["tokenizer"], str(saved.described_in))
        config = _config(saved.description["tokenizer"], f"{saved.described_in}: its tokenizer")
        return _structtokenbench(config, state, source)
    if "config" in saved.description:
        config = _config(saved.description["config"], f"{source}: its config")
        check_state_dict(state, skeleton(lambda: StructureVQModel(config)).state_dict(), source)
        model = StructureVQModel(config)
        model.load_state_dict(state)
        return VQTokenizer(model)
    if any(key.removeprefix("model.") == "encoder.pre_vq_proj.weight" for key in state):
        state = {key.removeprefix("model."): value for key, value in state.items()}
        return _structtokenbench(infer_structtokenbench_config(state, source), state, source)
    if "codebook.embeddings" in state:
        return ESM3Tokenizer(_esm3_encoder(state, source))
    if "embed.weight" in state:
        raise ValueError(f"{path} is ESM3's decoder alone; load the folder that also has {ESM3_ENCODER_FILE}")
    raise ValueError(f"{source} is no structure tokenizer: it holds {listed(list(state))}, and not the config, "
                     "encoder.pre_vq_proj.weight or codebook.embeddings of this project, StructTokenBench and ESM3")


def _config(values: Any, source: str) -> StructureModelConfig:
    try:
        return StructureModelConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{source} is no structure tokenizer's ({error})") from error


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Blocks whose keys are {prefix}{number}.{rest}."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


_HEADS = "transformer.blocks.0.geom_attn.distance_scale_per_head"


def _esm3_encoder(state: Mapping[str, Tensor], source: str) -> ESM3Encoder:
    what = "ESM3's structure encoder"
    dim, width = shape_of(state, "pre_vq_proj.weight", 2, source, what)
    (heads,) = shape_of(state, _HEADS, 1, source, what)
    codes, _ = shape_of(state, "codebook.embeddings", 2, source, what)
    layers = _count(state, "transformer.blocks.")
    encoder = skeleton(lambda: ESM3Encoder(width, heads, layers, dim, codes))
    check_state_dict(state, encoder.state_dict(), source)
    encoder.load_state_dict(owned(state), assign=True)
    return encoder


def _esm3_decoder(state: Mapping[str, Tensor], source: str) -> ESM3Decoder:
    _, width = shape_of(state, "embed.weight", 2, source, "ESM3's structure decoder")
    if width % HEAD_WIDTH:
        raise ValueError(f"{source} is not ESM3's structure decoder: its width {width} is no multiple of {HEAD_WIDTH}")
    layers = _count(state, "decoder_stack.blocks.")
    decoder = skeleton(lambda: ESM3Decoder(width, width // HEAD_WIDTH, layers))  # 2.5 GB that are not held twice
    check_state_dict(state, decoder.state_dict(), source)
    decoder.load_state_dict(owned(state), assign=True)
    return decoder


def _structtokenbench(config: StructureModelConfig, state: Mapping[str, Tensor], source: str) -> VQTokenizer:
    """Of weights under StructTokenBench's keys, built when they are known to fit."""
    fit_structtokenbench(skeleton(lambda: StructureVQModel(config)), state, source)
    model = StructureVQModel(config)
    load_structtokenbench(model, state, source)
    return VQTokenizer(model)


def infer_structtokenbench_config(state: Mapping[str, Tensor], source: str = "state dict") -> StructureModelConfig:
    """Sizes and quantizer of a VQVAEModel, its keys without prefix. ValueError: keys that it always has are missing."""
    what = "a VQVAEModel of StructTokenBench's"
    _, encoder_width = shape_of(state, "encoder.pre_vq_proj.weight", 2, source, what)
    (heads,) = shape_of(state, f"encoder.{_HEADS}", 1, source, what)
    decoder_width, _ = shape_of(state, "decoder.post_vq_proj.weight", 2, source, what)
    codes, dim = shape_of(state, _CODEBOOK, 2, source, what)
    values = StructureModelConfig().to_dict() | {
        "encoder_width": encoder_width, "encoder_heads": heads,
        "encoder_layers": _count(state, "encoder.transformer.blocks."), "decoder_width": decoder_width,
        "decoder_heads": decoder_width // HEAD_WIDTH, "decoder_layers": _count(state, "decoder.decoder_stack.blocks."),
        "codebook_size": codes, "codebook_embed_dim": dim,
        "quantizer": "aminoaseed" if "quantizer.linear_proj.weight" in state else "vq",
    }
    return StructureModelConfig.from_dict(values, source)


# ------------------------------------------------------------------------------------------------------- exports

def _exported_state(model: StructureVQModel) -> dict[str, Tensor]:
    """Weights with the effective codes as a plain table, on the CPU, under StructTokenBench's keys of a VanillaVQ."""
    if not model.quantize.has_codebook:
        raise ValueError("this tokenizer is still in its continuous warm-up: it has no codebook to export")
    tensors = {key: value for key, value in model.state_dict().items() if not key.startswith("quantize.")}
    tensors[_CODEBOOK] = model.quantize.codebook()
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}


def save_pretrained(model: StructureVQModel, folder: str | Path) -> Path:
    """Write an inference export, {folder}/config.json and model.safetensors, under StructTokenBench's keys -> folder.

    The quantizer becomes a plain table of its effective codes, so StructTokenBench can load the weights as VanillaVQ
    and the export cannot continue a training: checkpoints do that. ValueError: no codebook yet, or a model of what
    would be written does not encode and decode as this one does.
    """
    state = _exported_state(model)
    require_finite(state, "this model")
    require_table_shape(model.quantize)
    _require_faithful(model, _structtokenbench(table_config(model.config), state, "the export").model)
    return write_table_export(Path(folder), EXPORT_FORMAT, model.config, state)


def _require_faithful(model: StructureVQModel, exported: StructureVQModel) -> None:
    """ValueError: the two models do not encode and decode a chain alike."""
    weight = model.decoder.post_vq_proj.weight
    exported.to(weight.device, weight.dtype).eval()
    # A random walk in steps of a residue: N and C beside CA, about as far as bonds are long.
    step, n, c = F.normalize(torch.randn(3, PROBE_RESIDUES, 3, generator=torch.Generator().manual_seed(0)), dim=-1)
    ca = (3.8 * step).cumsum(0)
    coords = torch.stack([ca + 1.5 * n, ca, ca + 1.5 * c], dim=1)[None].to(weight)  # (1, L, 3, 3)
    with evaluating(model):
        latents = model.encode_latents(coords)
        require_same("latents", latents, exported.encode_latents(coords))
        require_same_codes(model.quantize, exported.quantize, latents[0])
        tokens = model.encode(coords)
        require_same("coordinates", model.decode(tokens).coords, exported.decode(tokens).coords)
