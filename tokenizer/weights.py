"""Weights on disk, read in one way for every model: runs, checkpoints, exports, and files of other projects.

    saved = read_weights(path, EXPORT_FORMAT)
    state, source = saved.choose("auto")               # tensors by name, all finite; what messages call them
    check_state_dict(state, skeleton(lambda: Model(config)).state_dict(), source)

A file of torch.save holds "model" and perhaps "ema", or weights under "state_dict" or "module", or nothing but weights.
A .safetensors file holds weights and, written by this project, what they are of. Prefixes that wrappers of modules put
in front of names are taken off. Files are data: nothing in them is executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokenizer.runtime import checkpoint, config, files
from tokenizer.runtime.parsing import brief, from_json, parsing, require_file
from tokenizer.stored import require_weights

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"  # an exported folder
CARD_FILE = "README.md"                                         # beside them: a model card
CHECKPOINT_FOLDER = "checkpoints"                               # inside a run folder
_DESCRIPTION = "provq"                                          # the same description, in the weights' own file

Module = TypeVar("Module", bound=nn.Module)

# torch.compile, FSDP and activation checkpointing put these names anywhere, DataParallel and DDP theirs in front.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = "module."
_UNBOUNDED = "best_score"  # of a warm-up that has not been validated yet: infinite in old checkpoints


@dataclass(frozen=True)
class Saved:
    """What was found.

    source: the file, or the folder of a run's checkpoints. sets: weights, by "model" and "ema". label: what messages
    call the only set of a file that does not name its sets; None: it does. description: what an export says of its
    weights (in described_in), or the entries of a checkpoint that are no weights; else {}. entries: what the file
    holds, for messages.
    """

    source: Path
    sets: Mapping[str, Any]
    label: str | None
    description: Mapping[str, Any] = field(default_factory=dict)
    described_in: Path | None = None
    entries: Sequence[Any] = ()

    @property
    def exported(self) -> bool:
        return self.described_in is not None

    def choose(self, weights: str, ignored: re.Pattern[str] | None = None) -> tuple[dict[str, Tensor], str]:
        """One set of weights, by name, and how to call it in messages. ignored: names that are left out, unchecked.

        weights: "model", "ema", or "auto": the EMA if there is one. ValueError, naming file and tensor: no such set, or
        something in it that is no plain tensor of finite numbers.
        """
        require_weights(weights)
        if weights == "ema" and self.label is not None:
            raise ValueError(f"weights='ema': {self.source} holds a single set of weights, use 'auto' or 'model'")
        name = "ema" if weights == "auto" and "ema" in self.sets else weights.replace("auto", "model")
        if name not in self.sets:
            raise ValueError(f"{self.source} has no weights {name!r}; it holds {listed(self.entries)}")
        source = f"{self.source}{f' [{name}]' if self.label is None else self.label}"
        state, without = _unwrapped(self.sets[name], source)
        source += f" (its names without {without})" if without else ""
        state = {key: value for key, value in state.items() if not (ignored and ignored.fullmatch(key))}
        require_plain(state, source)
        require_finite(state, source)
        return state, source


def listed(entries: Sequence[Any]) -> str:
    """Names for messages, the first few."""
    shown = [entry if isinstance(entry, str) and len(entry) < 100 else brief(entry) for entry in entries[:8]]
    return ", ".join(shown) + (f" and {len(entries) - 8} more" if len(entries) > 8 else "") if shown else "nothing"


# ------------------------------------------------------------------------------------------------------- reading


def read_weights(path: Path, export_format: str) -> Saved:
    """What a run folder, checkpoint, exported folder or file of weights holds. export_format: of exports to accept.

    FileNotFoundError: nothing there. ValueError, naming the file: damaged, foreign, an export of another format.
    """
    if path.is_dir():
        if (path / WEIGHTS_FILE).is_file():
            return _exported(path, export_format)
        return _of_torch(*read_checkpoint(path))
    require_file(path)
    if not _is_safetensors(path):
        return _of_torch(path, checkpoint.load_file(path))
    beside = path.with_name(CONFIG_FILE)
    if path.name == WEIGHTS_FILE and beside.is_file() and config.load(beside).get("format") == export_format:
        return _exported(path.parent, export_format)
    return _lone(path, export_format)


def read_checkpoint(path: Path) -> tuple[Path, dict[str, Any]]:
    """A file, or the newest readable checkpoint of a run -> where it was and its content. FileNotFoundError: none."""
    if path.is_file():
        return path, checkpoint.load_file(path)
    folder = path / CHECKPOINT_FOLDER if (path / CHECKPOINT_FOLDER).is_dir() else path
    saved = checkpoint.Checkpointer(folder).load_latest()
    if saved is None:
        raise FileNotFoundError(f"{path} holds neither {WEIGHTS_FILE} nor {CHECKPOINT_FOLDER}/NNNNNNN.pt")
    return folder, saved


def _of_torch(path: Path, content: Mapping[Any, Any]) -> Saved:
    """Which entries of a file of torch.save are weights."""
    entries = list(content)
    sets = {name: content[name] for name in ("model", "ema") if content.get(name) is not None}
    if not sets:
        for name in ("module", "state_dict"):  # of DeepSpeed, of Lightning
            if isinstance(content.get(name), Mapping):
                return Saved(path, {"model": content[name]}, f" [{name}]", entries=entries)
        if content and all(isinstance(value, Tensor) for value in content.values()):
            return Saved(path, {"model": content}, "", entries=entries)
    description = {key: value for key, value in content.items() if key not in ("model", "ema")}
    return Saved(path, sets, None, description, entries=entries)


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"  # after the length of the header


def _exported(folder: Path, export_format: str) -> Saved:
    """An exported folder. config.json decides; weights alone describe themselves or are anybody's."""
    if not (folder / CONFIG_FILE).exists():
        return _lone(folder / WEIGHTS_FILE, export_format)
    description = config.load(folder / CONFIG_FILE)
    _require_format(description, export_format, folder / CONFIG_FILE)
    state, _ = _read_safetensors(folder / WEIGHTS_FILE)
    return Saved(folder / WEIGHTS_FILE, {"model": state}, "", description, folder / CONFIG_FILE, list(state))


def _lone(path: Path, export_format: str) -> Saved:
    state, metadata = _read_safetensors(path)
    if _DESCRIPTION not in metadata:
        return Saved(path, {"model": state}, "", entries=list(state))
    description = from_json(metadata[_DESCRIPTION], path)
    if not isinstance(description, dict):
        raise ValueError(f"{path}: its description is a {type(description).__name__}, not an object {{...}}")
    _require_format(description, export_format, path)
    return Saved(path, {"model": state}, "", description, path, list(state))


def _require_format(description: Mapping[str, Any], expected: str, source: Path) -> None:
    if description.get("format") != expected:
        raise ValueError(f"{source} has format {brief(description.get('format'))}, expected {expected!r}")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata."""
    from safetensors import safe_open

    with parsing(path, "damaged, or no safetensors file"), safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}


def require_keys(description: Any, keys: Sequence[str], source: str | Path) -> None:
    """ValueError naming source and the first key that description lacks."""
    if not isinstance(description, Mapping):
        raise ValueError(f"{source}: holds a {type(description).__name__} where {', '.join(keys)} should be")
    absent = [key for key in keys if key not in description]
    if absent:
        raise ValueError(f"{source} has no {absent[0]!r}: it was not written by this project, or is damaged")


# ------------------------------------------------------------------------------------------------------- checking


def _unwrapped(state: Any, source: str) -> tuple[dict[str, Tensor], str]:
    """State dict without the prefixes of wrappers, and these. ValueError: no names, or two that become one."""
    if not isinstance(state, Mapping):
        raise ValueError(f"{source} is no state dict of tensors, but a {type(state).__name__}")
    odd = [key for key in state if not isinstance(key, str)]
    if odd:
        raise ValueError(f"{source} is no state dict of tensors: {brief(odd[0])} is no name")
    found = {match for key in state for match in _WRAPPERS.findall(key)}
    names = {key: _WRAPPERS.sub("", key) for key in state}
    while names and all(name.startswith(_PARALLEL) for name in names.values()):
        names = {key: name.removeprefix(_PARALLEL) for key, name in names.items()}
        found.add(_PARALLEL)
    unwrapped = {name: state[key] for key, name in names.items()}
    if len(unwrapped) < len(state):
        raise ValueError(f"{source}: some weights are there twice, with and without {' '.join(sorted(found))}")
    return unwrapped, " and ".join(sorted(found))


def require_plain(state: Mapping[str, Any], source: str) -> None:
    """ValueError names what is no dense tensor of real numbers in memory of its own."""
    for key, value in state.items():
        what = _oddity(value)
        if what:
            raise ValueError(f"{source} is no state dict of tensors: {brief(key)} is {what}")


def _oddity(value: Any) -> str:
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.is_meta:
        return "a meta tensor, without data"
    if value.layout is not torch.strided or value.is_nested or value.is_quantized or value.is_complex():
        return f"of {value.dtype} {value.layout}, not a dense tensor of real numbers"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():  # a view that repeats its elements
        return f"{tuple(value.shape)}, but has {value.untyped_storage().nbytes()} bytes"
    return ""


def require_finite(state: Mapping[str, Tensor], source: str) -> None:
    """ValueError names every tensor with NaN or infinities: from one, all codes or all images would be nonsense."""
    bad = [key for key, value in state.items() if value.is_floating_point() and not key.endswith(_UNBOUNDED)
           and not bool(torch.isfinite(value if value.element_size() > 1 else value.float()).all())]
    if bad:
        raise ValueError(f"{source} has values that are not finite, in {listed(bad)}: its training has diverged, or "
                         "the file is damaged; use an earlier checkpoint")


def check_state_dict(given: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    """ValueError names every tensor that is missing, unexpected or of another shape or kind; source: where they came
    from.
    """
    both = [key for key in expected if key in given]
    problems = {
        "missing": [key for key in expected if key not in given],
        "unexpected": [key for key in given if key not in expected],
        "of another shape": [f"{key} {tuple(given[key].shape)} instead of {tuple(expected[key].shape)}" for key in both
                             if given[key].shape != expected[key].shape],
        "of another kind": [f"{key} {given[key].dtype} instead of {expected[key].dtype}" for key in both
                            if given[key].ndim and given[key].is_floating_point() != expected[key].is_floating_point()],
    }
    found = [f"{what}: {listed(lines)}" for what, lines in problems.items() if lines]
    if found:
        raise ValueError(f"{source} does not fit the model; {'; '.join(found)}")


def shape_of(state: Mapping[str, Tensor], key: str, ndim: int, source: str, what: str) -> torch.Size:
    """Of a tensor that tells sizes of the model; what: the model. ValueError: not there, of other dimensions, empty."""
    if key not in state:
        raise ValueError(f"{source} is not {what}: {key} is missing")
    shape = state[key].shape
    if len(shape) != ndim or 0 in shape:
        raise ValueError(f"{source} is not {what}: {key} is {tuple(shape)}")
    return shape


# ------------------------------------------------------------------------------------------------------- models


class _RealScalars(TorchFunctionMode):
    """torch.tensor makes real tensors, whatever the default device: modules look at their own scalars."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.tensor:
            kwargs.setdefault("device", "cpu")
        return func(*args, **kwargs)


def skeleton(build: Callable[[], Module]) -> Module:
    """What build() makes, without memory for its weights, to compare with those of a file before they are believed."""
    with torch.device("meta"), _RealScalars():
        return build()


def owned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights that load_state_dict(assign=True) may keep: float32, each dense and in memory of its own."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in state.items():
        tensor = value.detach().float().contiguous()
        if tensor.untyped_storage().nbytes() > tensor.nbytes or tensor.data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.data_ptr())
        kept[key] = tensor
    return kept


# ------------------------------------------------------------------------------------------------------- exports


def write_export(folder: Path, description: Mapping[str, Any], state: Mapping[str, Tensor]) -> Path:
    """{folder}/config.json and model.safetensors -> folder. state: on the CPU, contiguous.

    ValueError, before anything is written: weights that are not finite; the folder's config.json is of something else,
    such as a run.
    """
    import safetensors.torch

    path = folder / CONFIG_FILE
    if path.exists() and config.load(path).get("format") != description["format"]:
        raise ValueError(f"{path} is not of such an export, and must not be replaced; name a new folder for the export")
    require_finite(state, "this model")
    # The description also goes into the weights' file: people take that away alone.
    metadata = {"format": "pt", _DESCRIPTION: json.dumps(description)}
    weights = safetensors.torch.save(dict(state), metadata=metadata)
    folder.mkdir(parents=True, exist_ok=True)
    files.atomic_write(folder / WEIGHTS_FILE, lambda file: file.write(weights))
    files.atomic_write_text(folder / CONFIG_FILE, json.dumps(description, indent=2) + "\n")
    return folder
