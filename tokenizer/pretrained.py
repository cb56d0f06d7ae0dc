"""Tokenizer weights on disk: LlamaGen's format in and out, this project's exports, and one loader for all of them.

A LlamaGen file holds encoder, decoder, both 1x1 convolutions, `quantize.embedding.weight` (K, D) and a usage buffer. It
does not say whether the codebook is compared after L2 normalisation (LlamaGen's default is yes), so that is an argument
wherever such a file is read. Loading is strict: every missing, unexpected or misshapen tensor is an error by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizer.runtime import checkpoint, config
from tokenizer.vq_model import ARCHITECTURES, VQModel, VQModelConfig

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"  # an exported folder
CHECKPOINT_FOLDER = "checkpoints"                               # inside a run folder
EXPORT_FORMAT = "provq-tokenizer-1"

_CODEBOOK = "quantize.embedding.weight"
_OWN_CODEBOOK = "quantize.quantizer.embedding.weight"
_USAGE = "quantize.codebook_used"  # FIFO of recent indices that LlamaGen needs for strict loading; training state only
_USAGE_SIZE = 65536


def to_llamagen_state_dict(model: VQModel) -> dict[str, Tensor]:
    """LlamaGen's state dict of a tokenizer: its keys and their shapes, on the CPU, not sharing memory with the model.

    The codebook is the effective one, `model.quantize.codebook`, so SimVQ and EMA tokenizers come out as plain tables
    (unit rows if codebook_l2_norm; pass the same flag on the other side). LlamaGen itself knows VQ-8 and VQ-16; a VQ-4
    dict has the same layout. ValueError: the codebook is not initialised yet (still in warm-up).
    """
    if not model.quantize.has_codebook:
        raise ValueError("this tokenizer is still in its continuous warm-up: it has no codebook to export")
    tensors = {key: value for key, value in model.state_dict().items() if not key.startswith("quantize.")}
    tensors |= {_USAGE: torch.zeros(_USAGE_SIZE), _CODEBOOK: model.quantize.codebook}
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in tensors.items()}


def load_llamagen_state_dict(model: VQModel, state: Mapping[str, Tensor], *, source: str = "state dict") -> None:
    """Copy a LlamaGen state dict into a model with a plain "vq" quantizer, whose codebook then counts as initialised.

    The model's step and curriculum stay as they are; Curriculum(0, 0), VQModel's default, is a discrete tokenizer.
    ValueError: another quantizer, or keys and shapes that differ (named; `source` says where the dict came from).
    """
    own = model.state_dict()
    if _OWN_CODEBOOK not in own:
        raise ValueError(f"a LlamaGen codebook fits quantizer='vq' only, this model has {model.config.quantizer!r}")
    shared = {key: value for key, value in own.items() if not key.startswith("quantize.")}
    given = {key: value for key, value in state.items() if key != _USAGE}
    check_state_dict(given, shared | {_CODEBOOK: own[_OWN_CODEBOOK]}, source)
    codebook = given.pop(_CODEBOOK)
    model.load_state_dict(own | given | {_OWN_CODEBOOK: codebook, "quantize.initialised": torch.tensor(True)})


def infer_llamagen_config(
    state: Mapping[str, Tensor], *, codebook_l2_norm: bool, source: str = "state dict"
) -> VQModelConfig:
    """Architecture, image channels and codebook size, read off a LlamaGen state dict's keys and shapes.

    ValueError: keys that no architecture of vq_model.ARCHITECTURES has.
    """
    levels = len({key.split(".")[2] for key in state if key.startswith("encoder.conv_blocks.")})
    absent = [key for key in ("encoder.conv_in.weight", _CODEBOOK) if key not in state]
    if absent:
        raise ValueError(f"{source} is not a LlamaGen tokenizer: {', '.join(absent)} is missing")
    width, in_channels = state["encoder.conv_in.weight"].shape[:2]
    for name, arch in ARCHITECTURES.items():
        if (arch.channels, len(arch.channel_mult)) == (width, levels):
            size, dim = state[_CODEBOOK].shape
            return VQModelConfig(
                name, image_channels=in_channels, codebook_size=size, codebook_embed_dim=dim,
                codebook_l2_norm=codebook_l2_norm,
            )
    raise ValueError(
        f"{source} has {levels} resolutions of base width {width}, which is none of {', '.join(ARCHITECTURES)}"
    )


def save_pretrained(model: VQModel, folder: str | Path) -> Path:
    """Write an inference export, {folder}/config.json and model.safetensors (float32, LlamaGen's keys) -> folder.

    The quantizer becomes a plain table of its effective codes, so LlamaGen can load the weights as they are and the
    export cannot continue a SimVQ or EMA training: checkpoints do that. ValueError: no codebook yet, or the folder is
    in use, see `write_export`.
    """
    state = to_llamagen_state_dict(model)
    return write_table_export(Path(folder), EXPORT_FORMAT, model.config, state)


def write_table_export(folder: Path, kind: str, cfg: Any, state: Mapping[str, Tensor]) -> Path:
    """`write_export` of a tokenizer whose quantizer has become a plain table. kind: the format; cfg: of its model."""
    defaults = type(cfg)()
    exported = replace(cfg, quantizer="vq", codebook_ema_decay=defaults.codebook_ema_decay,
                       codebook_restart_below=defaults.codebook_restart_below)
    description = {
        "format": kind,
        "trained_quantizer": cfg.quantizer,  # for the reader; the table needs no more than "vq"
        "tokenizer": exported.to_dict(),
    }
    return write_export(folder, description, state)


def write_export(folder: Path, description: Mapping[str, Any], state: Mapping[str, Tensor]) -> Path:
    """{folder}/config.json and model.safetensors -> folder. state: on the CPU, contiguous.

    ValueError, before anything is written: the folder's config.json is of something else, such as a run.
    """
    import safetensors.torch

    path = folder / CONFIG_FILE
    if path.exists() and config.load(path).get("format") != description["format"]:
        raise ValueError(f"{path} is not of such an export, and must not be replaced; name a new folder for the export")
    weights = safetensors.torch.save(dict(state), metadata={"format": "pt"})
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.atomic_write(folder / WEIGHTS_FILE, lambda file: file.write(weights))
    checkpoint.atomic_write_text(folder / CONFIG_FILE, json.dumps(description, indent=2) + "\n")
    return folder


def require_keys(description: Mapping[str, Any], keys: Sequence[str], source: Path) -> None:
    """ValueError naming source and the first key that description lacks."""
    absent = [key for key in keys if key not in description]
    if absent:
        raise ValueError(f"{source} has no {absent[0]!r}: it was not written by this project, or is damaged")


def read_export(
    path: Path, weights: str, expected: str, keys: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """config.json, which has these keys, and the tensors of an exported folder.

    ValueError: weights "ema", another format, an absent key, damaged files.
    """
    import safetensors.torch

    if weights == "ema":
        raise ValueError(f"weights='ema': the export {path} holds a single set of weights, use 'auto' or 'model'")
    description = config.load(path / CONFIG_FILE)
    if description.get("format") != expected:
        raise ValueError(f"{path / CONFIG_FILE} has format {description.get('format')!r}, expected {expected!r}")
    require_keys(description, keys, path / CONFIG_FILE)
    try:
        return description, safetensors.torch.load_file(path / WEIGHTS_FILE)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS_FILE} is damaged or no safetensors file: {error}") from error


def load_tokenizer(
    path: str | Path, device: str | torch.device = "cpu", weights: str = "auto", *, codebook_l2_norm: bool | None = None
) -> VQModel:
    """The tokenizer stored at path, in eval mode on device.

    Args:
        path: a run folder (its newest readable checkpoint), a checkpoint of this project, a LlamaGen `.pt` file, or a
            folder written by save_pretrained.
        weights: "model", "ema", or "auto": the EMA if there is one.
        codebook_l2_norm: for LlamaGen files, which do not record it (None: True, LlamaGen's default). Other sources
            record it; contradicting them is an error.

    FileNotFoundError: nothing there. ValueError: an unreadable or foreign file, a weight set that the file lacks,
    tensors that do not fit (each named). A checkpoint from the warm-up loads as the continuous autoencoder it is.
    """
    path = require_stored(path, weights, "tokenizer")
    if (path / WEIGHTS_FILE).is_file():
        model = _from_export(path, weights)
    else:
        path, saved = read_checkpoint(path)
        if "config" not in saved:
            model = _from_llamagen(path, saved, weights, True if codebook_l2_norm is None else codebook_l2_norm)
        else:
            model = _from_checkpoint(path, saved, weights)
    if codebook_l2_norm is not None and codebook_l2_norm != model.config.codebook_l2_norm:
        raise ValueError(f"{path} records codebook_l2_norm={model.config.codebook_l2_norm}, not {codebook_l2_norm}")
    return model.to(device).eval()


def tokenizer_hash(model: VQModel) -> str:
    """64 hex digits over architecture and weights. A run, its export and its copy in LlamaGen's layout have the same
    (but for unit-norm codebooks, which an export has already normalised).
    """
    config = model.config
    description = {"vq_model": config.vq_model, "image_channels": config.image_channels,
                   "codebook_l2_norm": config.codebook_l2_norm}
    return content_hash(description, to_llamagen_state_dict(model))


def content_hash(description: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """64 hex digits over JSON-ready values and tensors, whatever their order, device and floating-point type."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for key, tensor in sorted(state.items()):
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def require_stored(path: str | Path, weights: str, what: str) -> Path:
    """The path. FileNotFoundError: nothing is there. ValueError: no such choice of weights."""
    if weights not in ("auto", "model", "ema"):
        raise ValueError(f"weights={weights!r} must be 'auto', 'model' or 'ema'")
    if not Path(path).exists():
        raise FileNotFoundError(f"no {what} at {path}")
    return Path(path)


def read_checkpoint(path: Path) -> tuple[Path, dict[str, Any]]:
    """A file, or the newest readable checkpoint of a run -> where it was and its content. FileNotFoundError: none."""
    if path.is_file():
        return path, checkpoint.load_file(path)
    folder = path / CHECKPOINT_FOLDER if (path / CHECKPOINT_FOLDER).is_dir() else path
    saved = checkpoint.Checkpointer(folder).load_latest()
    if saved is None:
        raise FileNotFoundError(f"{path} holds neither {WEIGHTS_FILE} nor {CHECKPOINT_FOLDER}/NNNNNNN.pt")
    return folder, saved


def _from_export(path: Path, weights: str) -> VQModel:
    description, state = read_export(path, weights, EXPORT_FORMAT, ["tokenizer"])
    model = VQModel(VQModelConfig.from_dict(description["tokenizer"]))
    load_llamagen_state_dict(model, state, source=str(path / WEIGHTS_FILE))
    return model


def _from_llamagen(path: Path, saved: Mapping[str, Any], weights: str, l2_norm: bool) -> VQModel:
    state, source = choose_weights(path, saved, weights)
    model = VQModel(infer_llamagen_config(state, codebook_l2_norm=l2_norm, source=source))
    load_llamagen_state_dict(model, state, source=source)
    return model


def _from_checkpoint(path: Path, saved: Mapping[str, Any], weights: str) -> VQModel:
    state, source = choose_weights(path, saved, weights)
    model = VQModel(VQModelConfig.from_dict(saved["config"]))  # the state says whether its warm-up has ended
    check_state_dict(state, model.state_dict(), source)
    model.load_state_dict(state)
    return model


def choose_weights(path: Path, saved: Mapping[str, Any], weights: str) -> tuple[Mapping[str, Tensor], str]:
    """The asked-for weight set of a checkpoint and how to call it in messages."""
    found = [name for name in ("ema", "model") if saved.get(name) is not None]
    name = weights if weights != "auto" else next(iter(found), "model")
    if name not in found:
        raise ValueError(f"{path} has no weights {name!r}; it holds {', '.join(map(str, saved))}")
    if not isinstance(saved[name], Mapping) or not all(isinstance(v, Tensor) for v in saved[name].values()):
        raise ValueError(f"{path} [{name}] is no state dict of tensors")
    return saved[name], f"{path} [{name}]"


def check_state_dict(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """ValueError names every tensor that is missing, unexpected or of another shape; source: where they came from."""
    def some(lines: list[str]) -> str:
        return ", ".join(lines[:8]) + (f" and {len(lines) - 8} more" if len(lines) > 8 else "")

    problems = {
        "missing": [key for key in expected if key not in given],
        "unexpected": [key for key in given if key not in expected],
        "of another shape": [
            f"{key} {tuple(given[key].shape)} instead of {tuple(expected[key].shape)}"
            for key in expected
            if key in given and given[key].shape != expected[key].shape
        ],
    }
    found = [f"{what}: {some(lines)}" for what, lines in problems.items() if lines]
    if found:
        raise ValueError(f"{source} does not fit the model; {'; '.join(found)}")
