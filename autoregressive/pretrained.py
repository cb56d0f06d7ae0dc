"""GPT weights on disk: this project's checkpoints and exports, and LlamaGen's files, through one loader."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoregressive.gpt import GPT, GPTConfig, rope_table
from autoregressive.gpt_config import GPT_PRESETS
from autoregressive.sampling import SamplingConfig
from tokenizer.export_probe import evaluating, require_same
from tokenizer.pretrained import tokenizer_hash
from tokenizer.runtime import config
from tokenizer.runtime.parsing import brief
from tokenizer.stored import require_stored
from tokenizer.vq_model import VQModel
from tokenizer.weights import (
    CARD_FILE,
    CONFIG_FILE,
    WEIGHTS_FILE,
    Saved,
    check_state_dict,
    owned,
    read_weights,
    require_finite,
    require_keys,
    shape_of,
    skeleton,
    write_export,
)

EXPORT_FORMAT = "provq-gpt-1"
PROBE_CODES = 64  # of an image, that an export is tried on
# Published LlamaGen files may hold these; they are computed from the sizes, or left over from a generation.
_IGNORED = re.compile(r"freqs_cis|causal_mask|.*\.kv_cache\..*")


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
        path: a run folder (its newest readable checkpoint), a checkpoint of this project, a folder written by
            export_gpt or its model.safetensors, or LlamaGen's weights: a `.pt` file, a state dict, .safetensors.
        weights: "model", "ema", or "auto": the EMA if there is one.
        num_codes: codes per image, for LlamaGen's weights, which do not record it (256 for 256-pixel models of VQ-16,
            576 for 384). Other sources record it; contradicting them is an error.

    FileNotFoundError: nothing there. ValueError: an unreadable or foreign file, a weight set that the file lacks,
    tensors that do not fit or are not finite (each named), no num_codes for LlamaGen's weights.
    """
    path = require_stored(path, weights, "GPT")
    saved = read_weights(path, EXPORT_FORMAT)
    if saved.exported:
        loaded = _from_export(saved, weights)
    elif "gpt" in saved.description:
        loaded = _from_checkpoint(saved, weights)
    elif isinstance(saved.description.get("config"), dict) and "quantizer" in saved.description["config"]:
        raise ValueError(f"{saved.source} is of a tokenizer, not of a GPT: its config has a quantizer")
    else:
        state, source = saved.choose(weights, _IGNORED)
        loaded = _build(infer_llamagen_config(state, num_codes, source), state, source, "")
    loaded = _with_classes(loaded, saved.description)
    if num_codes is not None and num_codes != loaded.model.config.block_size:
        raise ValueError(f"{path} is for {loaded.model.config.block_size} codes per image, not {num_codes}")
    loaded.model.to(device).eval()
    return loaded


def export_gpt(loaded: LoadedGPT, folder: str | Path) -> Path:
    """Write an inference export, {folder}/config.json and model.safetensors (LlamaGen's keys) -> folder.

    ValueError: the folder holds something else, or a model of what would be written does not predict as this one does.
    """
    folder = Path(folder)
    if folder.exists() and any(p.name not in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE) for p in folder.iterdir()):
        raise ValueError(f"{folder} holds other files; name a new folder for the export")
    state = {key: value.detach().cpu().contiguous() for key, value in loaded.model.state_dict().items()}
    require_finite(state, "this model")
    _require_faithful(loaded.model, _build(loaded.model.config, state, "the export", "").model)
    description = {"format": EXPORT_FORMAT, "tokenizer_hash": loaded.tokenizer_hash, "gpt": asdict(loaded.model.config),
                   "trained_classes": loaded.trained_classes}
    return write_export(folder, description, state)


def _require_faithful(model: GPT, exported: GPT) -> None:
    """ValueError: the two models do not give the codes of some images the same logits."""
    weight, sizes = model.output.weight, model.config
    exported.to(weight.device).cast(weight.dtype).eval()
    place = torch.arange(min(sizes.block_size - 1, PROBE_CODES), device=weight.device)
    codes = torch.stack([place * 7919 % sizes.vocab_size, place * 104729 % sizes.vocab_size])
    labels = torch.tensor([0, sizes.num_classes], device=weight.device)
    with evaluating(model):
        require_same("logits", model(codes, labels), exported(codes, labels))


def recorded_tokenizer(gpt: Path) -> dict[str, Any]:
    """What the GPT's run says of its tokenizer: vq_ckpt, vq_weights, codebook_l2_norm; {}: nothing does.

    An export of ours may name vq_ckpt as well, from its own folder: released ones do. ValueError: of another type, or
    the folder is one of something else.
    """
    path = gpt / CONFIG_FILE
    run = config.load(path) if path.is_file() else {}
    if run and "gpt_model" not in run and run.get("format") != EXPORT_FORMAT:
        of = "a tokenizer" if {"quantizer", "tokenizer"} & run.keys() else "something else"
        raise ValueError(f"{gpt} is of {of}, not of a GPT: its {CONFIG_FILE} has no gpt_model")
    kinds = {"vq_ckpt": str, "vq_weights": str, "codebook_l2_norm": bool}
    for name, kind in kinds.items():
        if not isinstance(run.get(name), (kind, type(None))):
            raise ValueError(f"{path}: {name}: {brief(run[name])} is of the wrong type")
    found = {name: run[name] for name in kinds if name in run}
    if run.get("format") == EXPORT_FORMAT and found.get("vq_ckpt"):
        found["vq_ckpt"] = str((gpt / found["vq_ckpt"]).resolve())
    return found


def require_tokenizer(loaded: LoadedGPT, vq: VQModel, vq_path: str | Path, *, other: str | None) -> None:
    """ValueError: the codes are not those of this tokenizer. other: how to go on all the same; None: that was said."""
    if vq.quantize.num_codes != loaded.model.config.vocab_size:
        raise ValueError(f"the tokenizer has {vq.quantize.num_codes} codes, the GPT {loaded.model.config.vocab_size}")
    if other is not None and loaded.tokenizer_hash not in ("", tokenizer_hash(vq)):
        raise ValueError(f"{loaded.name} was trained on codes of another tokenizer than {vq_path} is now: {other}")


def require_guidance(loaded: LoadedGPT, sampling: SamplingConfig) -> None:
    """ValueError: guidance compares with "no class", which the model has never seen."""
    if sampling.cfg_scale > 1 and loaded.model.config.class_dropout_prob == 0:
        raise ValueError(f"--cfg-scale {sampling.cfg_scale:g}: {loaded.name} was trained with --class-dropout-prob 0, "
                         "so without the class \"none\" that guidance compares with; pass --cfg-scale 1")


def require_trained(loaded: LoadedGPT, classes: Sequence[int], said: str) -> None:
    """ValueError, starting with said: a class of which there was no training image."""
    trained = loaded.trained_classes
    unknown = sorted(set(classes) - set(trained)) if trained is not None else []
    if trained is not None and unknown:
        raise ValueError(f"{said}: {loaded.name} had no training image of class "
                         f"{', '.join(map(str, unknown[:20]))}; it was trained on {len(trained)} of "
                         f"{loaded.model.config.num_classes}")


def _build(gpt_config: GPTConfig, state: Mapping[str, Tensor], source: str, tokenizer_hash: object) -> LoadedGPT:
    if not isinstance(tokenizer_hash, str):
        raise ValueError(f"{source}: its tokenizer_hash is no text")
    model = skeleton(lambda: GPT(gpt_config))  # large ones are neither drawn at random nor held twice
    check_state_dict(state, model.state_dict(), source)
    model.load_state_dict(owned(state), assign=True)
    model.rope = rope_table(math.isqrt(gpt_config.block_size), gpt_config.head_dim, gpt_config.rope_base)
    return LoadedGPT(model, tokenizer_hash, source)


def _from_export(saved: Saved, weights: str) -> LoadedGPT:
    described_in, description = str(saved.described_in), saved.description
    require_keys(description, ["gpt", "tokenizer_hash"], described_in)
    state, source = saved.choose(weights)
    return _build(GPTConfig.from_dict(description["gpt"], described_in), state, source, description["tokenizer_hash"])


def _from_checkpoint(saved: Saved, weights: str) -> LoadedGPT:
    require_keys(saved.description, ["config"], saved.source)
    require_keys(saved.description["config"], ["tokenizer_hash"], saved.source)
    gpt_config = GPTConfig.from_dict(saved.description["gpt"], f"{saved.source}: its gpt")
    state, source = saved.choose(weights)
    return _build(gpt_config, state, source, saved.description["config"]["tokenizer_hash"])


def _with_classes(loaded: LoadedGPT, description: Mapping[str, object]) -> LoadedGPT:
    """With the trained_classes of a checkpoint or export. ValueError: they are no classes of the model."""
    found, count = description.get("trained_classes"), loaded.model.config.num_classes
    if found is not None and not (
        isinstance(found, list) and found and all(type(c) is int and 0 <= c < count for c in found)
    ):
        raise ValueError(f"{loaded.name}: trained_classes must be numbers from 0 to {count - 1}")
    return replace(loaded, trained_classes=found)


def infer_llamagen_config(state: Mapping[str, Tensor], num_codes: int | None, source: str) -> GPTConfig:
    """Sizes of a LlamaGen model from the shapes of its weights. ValueError: not one of GPT_PRESETS, or no num_codes."""
    what = "a class-conditional GPT of LlamaGen's"
    vocab, dim = shape_of(state, "tok_embeddings.weight", 2, source, what)
    classes, _ = shape_of(state, "cls_embedding.embedding_table.weight", 2, source, what)
    layers = len({key.split(".")[1] for key in state if key.startswith("layers.")})
    fitting = [p for p in GPT_PRESETS.values() if (p.n_layer, p.dim) == (layers, dim)]
    if not fitting:
        raise ValueError(f"{source} has {layers} layers of width {dim}, which is none of {', '.join(GPT_PRESETS)}")
    if num_codes is None:
        raise ValueError(f"{source} is a LlamaGen file, which does not say how many codes an image has: give "
                         "--image-size")
    sizes = {"vocab_size": vocab, "num_classes": classes - 1, "block_size": num_codes}
    return GPTConfig.from_dict(asdict(fitting[0]) | sizes, source)
