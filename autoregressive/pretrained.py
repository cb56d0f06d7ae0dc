"""GPT weights on disk: this project's checkpoints and exports, and LlamaGen's files, through one loader."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoregressive.gpt import GPT, GPT_PRESETS, GPTConfig
from tokenizer.pretrained import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_state_dict,
    choose_weights,
    read_checkpoint,
    read_export,
    require_keys,
    write_export,
)

EXPORT_FORMAT = "provq-gpt-1"
# Published LlamaGen files may hold these; they are computed from the sizes, or left over from a generation.
_IGNORED = re.compile(r"freqs_cis|causal_mask|.*\.kv_cache\..*")
_LLAMAGEN_KEYS = ("model", "module", "state_dict")


@dataclass(frozen=True)
class LoadedGPT:
    """A model in eval mode, and what its file says of its codes. tokenizer_hash "": nothing."""

    model: GPT
    tokenizer_hash: str
    name: str  # of file and weight set, for messages and folder names
    trained_classes: list[int] | None = None  # those with training images, ascending; None: not recorded


def load_gpt(
    path: str | Path, device: str | torch.device = "cpu", weights: str = "auto", *, num_codes: int | None = None
) -> LoadedGPT:
    """The GPT stored at path.

    Args:
        path: a run folder (its newest readable checkpoint), a checkpoint of this project, a LlamaGen `.pt` file, or a
            folder written by export_gpt.
        weights: "model", "ema", or "auto": the EMA if there is one.
        num_codes: codes per image, for LlamaGen files, which do not record it (256 for 256-pixel models of VQ-16, 576
            for 384). Other sources record it; contradicting them is an error.

    FileNotFoundError: nothing there. ValueError: an unreadable or foreign file, a weight set that the file lacks,
    tensors that do not fit (each named), no num_codes for a LlamaGen file.
    """
    if weights not in ("auto", "model", "ema"):
        raise ValueError(f"weights={weights!r} must be 'auto', 'model' or 'ema'")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no GPT at {path}")
    if (path / WEIGHTS_FILE).is_file():
        loaded = _from_export(path, weights)
    else:
        found, saved = read_checkpoint(path)
        loaded = _from_checkpoint(found, saved, weights) if "gpt" in saved else _from_llamagen(found, saved, num_codes)
    if num_codes is not None and num_codes != loaded.model.config.block_size:
        raise ValueError(f"{path} is for {loaded.model.config.block_size} codes per image, not {num_codes}")
    loaded.model.to(device).eval()
    return loaded


def export_gpt(loaded: LoadedGPT, folder: str | Path) -> Path:
    """Write an inference export, {folder}/config.json and model.safetensors (LlamaGen's keys) -> folder.

    ValueError: the folder holds something else.
    """
    folder = Path(folder)
    if folder.exists() and any(p.name not in (CONFIG_FILE, WEIGHTS_FILE) for p in folder.iterdir()):
        raise ValueError(f"{folder} holds other files; name a new folder for the export")
    state = {key: value.detach().cpu().contiguous() for key, value in loaded.model.state_dict().items()}
    description = {"format": EXPORT_FORMAT, "tokenizer_hash": loaded.tokenizer_hash, "gpt": asdict(loaded.model.config),
                   "trained_classes": loaded.trained_classes}
    return write_export(folder, description, state)


def _build(gpt_config: GPTConfig, state: Mapping[str, Tensor], source: str, tokenizer_hash: str) -> LoadedGPT:
    model = GPT(gpt_config)
    check_state_dict(state, model.state_dict(), source)
    model.load_state_dict({key: value.float() for key, value in state.items()})
    return LoadedGPT(model, tokenizer_hash, source)


def _with_classes(loaded: LoadedGPT, description: Mapping[str, Any]) -> LoadedGPT:
    """With the trained_classes of a checkpoint or export. ValueError: they are no classes of the model."""
    found, count = description.get("trained_classes"), loaded.model.config.num_classes
    if found is not None and not (
        isinstance(found, list) and found and all(type(c) is int and 0 <= c < count for c in found)
    ):
        raise ValueError(f"{loaded.name}: trained_classes must be numbers from 0 to {count - 1}")
    return replace(loaded, trained_classes=found)


def _config(values: Mapping[str, Any], source: str) -> GPTConfig:
    try:
        return GPTConfig(**values)
    except TypeError as error:
        raise ValueError(f"{source}: the sizes of the GPT are not readable ({error})") from error


def _from_export(path: Path, weights: str) -> LoadedGPT:
    description, state = read_export(path, weights, EXPORT_FORMAT, ["gpt", "tokenizer_hash"])
    gpt_config = _config(description["gpt"], str(path / CONFIG_FILE))
    loaded = _build(gpt_config, state, str(path / WEIGHTS_FILE), description["tokenizer_hash"])
    return _with_classes(loaded, description)


def _from_checkpoint(path: Path, saved: Mapping[str, Any], weights: str) -> LoadedGPT:
    state, source = choose_weights(path, saved, weights)
    require_keys(saved, ("config",), path)
    require_keys(saved["config"], ("tokenizer_hash",), path)
    loaded = _build(_config(saved["gpt"], source), state, source, saved["config"]["tokenizer_hash"])
    return _with_classes(loaded, saved)


def _from_llamagen(path: Path, saved: Mapping[str, Any], num_codes: int | None) -> LoadedGPT:
    name = next((key for key in _LLAMAGEN_KEYS if isinstance(saved.get(key), Mapping)), None)
    state = {k: v for k, v in (saved if name is None else saved[name]).items() if not _IGNORED.fullmatch(k)}
    source = f"{path} [{name}]" if name else str(path)
    return _build(infer_llamagen_config(state, num_codes, source), state, source, "")


def infer_llamagen_config(state: Mapping[str, Tensor], num_codes: int | None, source: str) -> GPTConfig:
    """Sizes of a LlamaGen model from the shapes of its weights. ValueError: not one of GPT_PRESETS, or no num_codes."""
    try:
        (vocab, dim), classes = state["tok_embeddings.weight"].shape, len(state["cls_embedding.embedding_table.weight"])
    except (KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"{source} is no class-conditional GPT of LlamaGen's: tok_embeddings.weight and "
                         "cls_embedding.embedding_table.weight are not both there") from error
    layers = len({key.split(".")[1] for key in state if key.startswith("layers.")})
    fitting = [p for p in GPT_PRESETS.values() if (p.n_layer, p.dim) == (layers, dim)]
    if not fitting:
        raise ValueError(f"{source} has {layers} layers of width {dim}, which is none of {', '.join(GPT_PRESETS)}")
    if num_codes is None:
        raise ValueError(f"{source} is a LlamaGen file, which does not say how many codes an image has: give "
                         "--image-size")
    return replace(fitting[0], vocab_size=vocab, num_classes=classes - 1, block_size=num_codes)
