"""Tokenizer weights on disk: LlamaGen's format in and out, this project's exports, and one loader for all of them.

A LlamaGen file holds encoder, decoder, both 1x1 convolutions, `quantize.embedding.weight` (K, D) and a usage buffer. It
does not say whether the codebook is compared after L2 normalisation (LlamaGen's default is yes), so that is an argument
wherever such a file is read. Loading is strict: every missing, unexpected or misshapen tensor is an error by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizer.choices import GRIDS
from tokenizer.export_probe import (
    evaluating,
    is_table,
    probe_images,
    quantizer_identity,
    require_same,
    require_same_codes,
    require_table_shape,
)
from tokenizer.quantizer_config import Config
from tokenizer.stored import require_stored
from tokenizer.vq_model import ARCHITECTURES, VQModel, VQModelConfig
from tokenizer.weights import (
    Saved,
    check_state_dict,
    read_weights,
    require_finite,
    require_keys,
    shape_of,
    skeleton,
    write_export,
)

EXPORT_FORMAT = "provq-tokenizer-1"

_CODEBOOK = "quantize.embedding.weight"
_OWN_CODEBOOK = "quantize.quantizer.embedding.weight"
_OWN_QUANTIZER = "quantize.quantizer."
_USAGE = "quantize.codebook_used"  # FIFO of recent indices that LlamaGen needs for strict loading; training state only
_USAGE_SIZE = 65536


def to_llamagen_state_dict(model: VQModel) -> dict[str, Tensor]:
    """LlamaGen's state dict of a tokenizer: its keys and their shapes, on the CPU, not sharing memory with the model.

    The codebook is the effective one, `model.quantize.codebook()`: SimVQ, EMA, following codes come out as plain tables
    (unit rows if codebook_l2_norm; pass the same flag on the other side). LlamaGen itself knows VQ-8 and VQ-16; a VQ-4
    dict has the same layout. ValueError: the codebook is not initialised yet (still in warm-up), or a model of these
    weights would not encode and decode as this one does.
    """
    state = _table_state(model)
    require_finite(state, "this model")
    require_table_shape(model.quantize)
    _require_faithful(model, _discrete(table_config(model.config), state, "the export"))
    return state


def _require_faithful(model: VQModel, exported: VQModel) -> None:
    """ValueError: the two models do not encode and decode some images alike."""
    weight = model.last_layer
    exported.to(weight.device, weight.dtype).eval()
    x = probe_images(4, model.config.image_channels, 4 * model.downsample).to(weight)
    with evaluating(model):
        latents = model.encode_latents(x)
        require_same("latents", latents, exported.encode_latents(x))
        require_same_codes(model.quantize, exported.quantize, latents.movedim(1, -1).flatten(0, 2))
        codes = model.encode(x)
        require_same("images", model.decode_code(codes), exported.decode_code(codes))


def _table_state(model: VQModel) -> dict[str, Tensor]:
    if not model.quantize.has_codebook:
        raise ValueError("this tokenizer is still in its continuous warm-up: it has no codebook to export")
    tensors = {key: value for key, value in model.state_dict().items() if not key.startswith("quantize.")}
    tensors |= {_USAGE: torch.zeros(_USAGE_SIZE), _CODEBOOK: model.quantize.codebook()}
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}


def load_llamagen_state_dict(model: VQModel, state: Mapping[str, Tensor], *, source: str = "state dict") -> None:
    """Copy a LlamaGen state dict into a model with a plain "vq" quantizer, whose codebook then counts as initialised.

    The model's step and curriculum stay as they are; Curriculum(0, 0), VQModel's default, is a discrete tokenizer.
    ValueError: another quantizer, or keys and shapes that differ (named; `source` says where the dict came from).
    """
    given = _fitting(model, state, source)
    codebook = given.pop(_CODEBOOK)
    own = model.state_dict()
    model.load_state_dict(own | given | {_OWN_CODEBOOK: codebook, "quantize.initialised": torch.tensor(True)})


def _fitting(model: VQModel, state: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """A LlamaGen state dict without its usage buffer. ValueError: it does not fit the model (or its skeleton)."""
    own = model.state_dict()
    if _OWN_CODEBOOK not in own or model.config.codebook_follow:
        following = " with codebook_follow" if model.config.codebook_follow else ""
        raise ValueError("a LlamaGen codebook fits quantizer='vq' only, "
                         f"this model has {model.config.quantizer!r}{following}")
    shared = {key: value for key, value in own.items() if not key.startswith("quantize.")}
    given = {key: value for key, value in state.items() if key != _USAGE}
    check_state_dict(given, shared | {_CODEBOOK: own[_OWN_CODEBOOK]}, source)
    return given


def infer_llamagen_config(
    state: Mapping[str, Tensor], *, codebook_l2_norm: bool, source: str = "state dict"
) -> VQModelConfig:
    """Architecture, image channels and codebook size, read off a LlamaGen state dict's keys and shapes.

    ValueError: keys that no architecture of vq_model.ARCHITECTURES has.
    """
    levels = len({key.split(".")[2] for key in state if key.startswith("encoder.conv_blocks.")})
    absent = [key for key in ("encoder.conv_in.weight", _CODEBOOK) if key not in state]
    if absent:
        hint = "; it is a state dict of this project's: load the checkpoint, which has its config, or an export"
        raise ValueError(f"{source} is not a LlamaGen tokenizer: {', '.join(absent)} is missing"
                         f"{hint if 'quantize.step' in state else ''}")
    what = "a LlamaGen tokenizer"
    width, in_channels, *_ = shape_of(state, "encoder.conv_in.weight", 4, source, what)
    size, dim = shape_of(state, _CODEBOOK, 2, source, what)
    for name, arch in ARCHITECTURES.items():
        if (arch.channels, len(arch.channel_mult)) == (width, levels):
            values = VQModelConfig().to_dict() | {
                "vq_model": name, "image_channels": in_channels, "codebook_size": size, "codebook_embed_dim": dim,
                "codebook_l2_norm": codebook_l2_norm,
            }
            return VQModelConfig.from_dict(values, source)
    raise ValueError(
        f"{source} has {levels} resolutions of base width {width}, which is none of {', '.join(ARCHITECTURES)}"
    )


def save_pretrained(model: VQModel, folder: str | Path) -> Path:
    """Write an inference export, {folder}/config.json and model.safetensors (float32, LlamaGen's keys) -> folder.

    The quantizer becomes a plain table of its effective codes (but for fsq, which is none and stays what it is), so
    LlamaGen can load the weights as they are and the export cannot continue a SimVQ or EMA training: checkpoints do
    that. ValueError: see `to_llamagen_state_dict` and `write_export`.
    """
    if model.config.quantizer in GRIDS and not is_table(model.quantize, l2_norm=False):
        return _save_grid(model, Path(folder))
    state = to_llamagen_state_dict(model)
    return write_table_export(Path(folder), EXPORT_FORMAT, model.config, state)


def _save_grid(model: VQModel, folder: Path) -> Path:
    """`save_pretrained` of a quantizer that is a fixed grid and no table."""
    if not model.quantize.has_codebook:
        raise ValueError("this tokenizer is still in its continuous warm-up: it has no codes to export")
    state = {key: value.detach().to("cpu", copy=True).contiguous() for key, value in model.state_dict().items()
             if not key.startswith("quantize.") or key.startswith(_OWN_QUANTIZER)}
    require_finite(state, "this model")
    _require_faithful(model, _grid(model.config, state, "the export"))
    return write_export(folder, {"format": EXPORT_FORMAT, "trained_quantizer": model.config.quantizer,
                                 "tokenizer": model.config.to_dict()}, state)


def _grid(config: VQModelConfig, state: Mapping[str, Tensor], source: str) -> VQModel:
    """The discrete model of what `_save_grid` writes."""
    model = VQModel(config)
    own = model.state_dict()
    check_state_dict(state, {key: value for key, value in own.items()
                             if not key.startswith("quantize.") or key.startswith(_OWN_QUANTIZER)}, source)
    model.load_state_dict(own | dict(state) | {"quantize.initialised": torch.tensor(1.0)})
    return model


def write_table_export(folder: Path, kind: str, cfg: Any, state: Mapping[str, Tensor]) -> Path:
    """`write_export` of a tokenizer whose quantizer has become a plain table. kind: the format; cfg: of its model."""
    description = {
        "format": kind,
        "trained_quantizer": cfg.quantizer,  # for the reader; the table needs no more than "vq"
        "tokenizer": table_config(cfg).to_dict(),
    }
    return write_export(folder, description, state)


def table_config(cfg: Config) -> Config:
    """Of a tokenizer whose quantizer has become a plain table."""
    defaults = type(cfg)()
    return replace(cfg, quantizer="vq", codebook_ema_decay=defaults.codebook_ema_decay,
                   codebook_restart_below=defaults.codebook_restart_below, codebook_follow=False)


def load_tokenizer(
    path: str | Path, device: str | torch.device = "cpu", weights: str = "auto", *, codebook_l2_norm: bool | None = None
) -> VQModel:
    """The tokenizer stored at path, in eval mode on device.

    Args:
        path: a run folder (its newest readable checkpoint), a checkpoint of this project, a folder written by
            save_pretrained or its model.safetensors, or LlamaGen's weights: a `.pt` file, a state dict, .safetensors.
        weights: "model", "ema", or "auto": the EMA if there is one.
        codebook_l2_norm: for LlamaGen's weights, which do not record it (None: True, LlamaGen's default; .safetensors
            have no default). Other sources record it; contradicting them is an error.

    FileNotFoundError: nothing there. ValueError: an unreadable or foreign file, a weight set that the file lacks,
    tensors that do not fit or are not finite (each named). A checkpoint from the warm-up loads as the continuous
    autoencoder it is.
    """
    path = require_stored(path, weights, "tokenizer")
    saved = read_weights(path, EXPORT_FORMAT)
    if saved.exported:
        model = _from_export(saved, weights)
    elif "config" in saved.description:
        model = _from_checkpoint(saved, weights)
    else:
        model = _from_llamagen(saved, weights, codebook_l2_norm)
    if codebook_l2_norm is not None and codebook_l2_norm != model.config.codebook_l2_norm:
        raise ValueError(f"{path} records codebook_l2_norm={model.config.codebook_l2_norm}, not {codebook_l2_norm}")
    return model.to(device).eval()


def tokenizer_hash(model: VQModel) -> str:
    """64 hex digits over architecture and weights. A run, its export and its copy in LlamaGen's layout have the same
    (but for unit-norm codebooks, which an export has already normalised). ValueError: no codebook yet.
    """
    config, state = model.config, _table_state(model)
    description = {"vq_model": config.vq_model, "image_channels": config.image_channels,
                   "codebook_l2_norm": config.codebook_l2_norm}
    kind, own = quantizer_identity(model.quantize, config.codebook_l2_norm)
    return content_hash(description | kind, {**state, **own})


def content_hash(description: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """64 hex digits over JSON-ready values and tensors, whatever their order, device and floating-point type."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for key, tensor in sorted(state.items()):
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _from_export(saved: Saved, weights: str) -> VQModel:
    require_keys(saved.description, ["tokenizer"], str(saved.described_in))
    state, source = saved.choose(weights)
    config = VQModelConfig.from_dict(saved.description["tokenizer"], str(saved.described_in))
    return (_grid if config.quantizer in GRIDS else _discrete)(config, state, source)


def _from_llamagen(saved: Saved, weights: str, l2_norm: bool | None) -> VQModel:
    state, source = saved.choose(weights)
    if l2_norm is None and saved.source.suffix == ".safetensors":  # more likely an older export of ours than LlamaGen's
        raise ValueError(f"{saved.source} does not say whether its codebook is compared after L2 normalisation: give "
                         "--codebook-l2-norm (LlamaGen's default) or --no-codebook-l2-norm")
    config = infer_llamagen_config(state, codebook_l2_norm=l2_norm is not False, source=source)
    return _discrete(config, state, source)


def _discrete(config: VQModelConfig, state: Mapping[str, Tensor], source: str) -> VQModel:
    """The model of a LlamaGen state dict, built when it is known to fit."""
    _fitting(skeleton(lambda: VQModel(config)), state, source)
    model = VQModel(config)
    load_llamagen_state_dict(model, state, source=source)
    return model


def _from_checkpoint(saved: Saved, weights: str) -> VQModel:
    config = VQModelConfig.from_dict(saved.description["config"], f"{saved.source}: its config")
    state, source = saved.choose(weights)
    check_state_dict(state, skeleton(lambda: VQModel(config)).state_dict(), source)
    model = VQModel(config)  # the state says whether its warm-up has ended
    model.load_state_dict(state)
    return model
