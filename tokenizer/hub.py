"""Models as objects of a few methods: found by name, loaded whatever they are, saved and shared with a model card.

    from tokenizer.hub import load                       # or provq.load
    tokenizer = load("runs/digits")                      # run, checkpoint, LlamaGen's .pt, exported folder, Hub id
    tokenizer = load("cifar10-vq4")                      # a released one, of tokenizer/pretrained/
    tokenizer.save_pretrained("my_tokenizer/")           # with README.md: data, seeds, curriculum, metrics, protocols
    tokenizer.push_to_hub("me/my_tokenizer")             # huggingface_hub's own; private=, token= and so on

What a model offers is in tokenizer/api.py (images), autoregressive/api.py (a GPT), protein/api.py (structures).
"""

from __future__ import annotations

import importlib
import json
import re
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from tokenizer.runtime import checkpoint, config
from tokenizer.runtime.files import atomic_write_text
from tokenizer.runtime.parsing import parsing, read_text, require_file
from tokenizer.stored import RELEASED
from tokenizer.weights import CARD_FILE, CHECKPOINT_FOLDER, CONFIG_FILE, WEIGHTS_FILE, read_checkpoint

# Folders above this one are named here and nowhere else below them, and imported only when such a model is asked for.
KINDS = {"images": ("tokenizer.api", "ImageTokenizer"), "gpt": ("autoregressive.api", "ImageGenerator"),
         "structures": ("protein.api", "StructureTokens")}
_FORMATS = {"provq-tokenizer-1": "images", "provq-gpt-1": "gpt", "provq-structure-tokenizer-1": "structures"}
_RECORDED = {"gpt_model": "gpt", "n_layer": "gpt", "encoder_width": "structures"}  # settings that only they have
# Weights that only they have; DeepSpeed and Lightning put "model." in front.
_WEIGHTS = {"tok_embeddings.weight": "gpt", "encoder.pre_vq_proj.weight": "structures",
            "model.encoder.pre_vq_proj.weight": "structures", "codebook.embeddings": "structures",
            "embed.weight": "structures"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Model = TypeVar("Model", bound="Pretrained")


class Pretrained(ModelHubMixin):
    """What all of them have. from_pretrained, push_to_hub: huggingface_hub's, see ModelHubMixin.

    A subclass has a class method `open(path, device, weights, **options)`: the model stored at path.
    """

    source: Path | None = None  # what it was loaded from

    @abstractmethod
    def write(self, folder: Path) -> None:
        """{folder}/config.json and model.safetensors."""

    @property
    @abstractmethod
    def sizes(self) -> Mapping[str, Any]:
        """Of the model, for its card."""

    def save_pretrained(  # type: ignore[override]  # the folder's config and card are the model's own
        self, save_directory: str | Path, *, config: None = None, model_card_kwargs: None = None
    ) -> Path:
        """Write config.json, model.safetensors and README.md, the model card -> folder.

        ValueError: weights that the model read back from them would use otherwise, or a folder in use.
        """
        if config is not None or model_card_kwargs:
            raise ValueError("config and model card are written from the model itself; edit README.md afterwards")
        folder = Path(save_directory)
        self.write(folder)
        atomic_write_text(folder / CARD_FILE, self.card())
        return folder

    def card(self) -> str:
        """The model card: what the run says, or the card beside the export that the model was loaded from."""
        beside = self.source / CARD_FILE if self.source else Path()
        if beside.is_file() and (beside.parent / WEIGHTS_FILE).is_file():
            return read_text(beside)
        run = self.source if self.source and (self.source / CHECKPOINT_FOLDER).is_dir() else None
        return model_card(type(self).__doc__ or "", self.sizes, run_facts(run) if run else {})

    @classmethod
    def from_pretrained(  # type: ignore[override]  # ModelHubMixin would read parts of config.json as arguments
        cls: type[Model], pretrained_model_name_or_path: str | Path, *, device: str | torch.device = "cpu",
        weights: str = "auto", revision: str | None = None, cache_dir: str | Path | None = None,
        force_download: bool = False, local_files_only: bool = False, token: str | bool | None = None, **options: Any,
    ) -> Model:
        """As `load`, of this class only; arguments as everywhere in huggingface_hub."""
        path = local_path(pretrained_model_name_or_path, revision=revision, cache_dir=cache_dir, token=token,
                          force_download=force_download, local_files_only=local_files_only)
        return _open(cls, path, device, weights, options)


def load(
    source: str | Path, device: str | torch.device = "cpu", weights: str = "auto", *, revision: str | None = None,
    **options: Any,
) -> Any:
    """ImageTokenizer, ImageGenerator or StructureTokens, whichever is stored at source, ready to use.

    Args:
        source: a run folder, checkpoint, exported folder or model.safetensors; LlamaGen's, StructTokenBench's or
            ESM3's weights; or, where no such file or folder is, the name of one in tokenizer/pretrained/, or a
            model's id on the Hub, "owner/name".
        weights: "model", "ema", or "auto": the EMA if there is one.
        revision: of a model on the Hub: branch, tag or commit.
        options: of the model's `open`, such as codebook_l2_norm for LlamaGen's tokenizers.

    FileNotFoundError: neither here nor on the Hub. ValueError: damaged, foreign, not what it says.
    """
    path = local_path(source, revision=revision)
    module, name = KINDS[kind_of(path)]
    return _open(getattr(importlib.import_module(module), name), path, device, weights, options)


def _open(cls: Any, path: Path, device: str | torch.device, weights: str, options: Mapping[str, Any]) -> Any:
    model = cls.open(path, torch.device(device), weights, **options)
    model.source = path
    return model


def released() -> list[str]:
    """Names of the models in tokenizer/pretrained/."""
    return sorted(path.parent.name for path in RELEASED.glob(f"*/{CONFIG_FILE}"))


def local_path(source: str | Path, **download: Any) -> Path:
    """Where the files are, after a download from the Hub if source is an id there and nothing here."""
    path = Path(source)
    if path.exists():
        return path
    if isinstance(source, str) and source in released():
        return RELEASED / source
    # "runs/typo" has the form of an id as well: an owner that is a folder here is none.
    if isinstance(source, Path) or not _HUB_ID.fullmatch(source) or Path(source.partition("/")[0]).exists():
        known = "" if path.parent.name else f"; released are {', '.join(released())}"
        raise FileNotFoundError(f"no model at {source}{known}")
    try:
        return Path(snapshot_download(source, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE, CARD_FILE], **download))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[:1]
        raise FileNotFoundError(f"no file or folder {source} here, and it cannot be had from the Hub "
                                f"({type(error).__name__}: {''.join(first)})") from error


def kind_of(path: Path) -> str:
    """Key of KINDS. Of what is unknown "images", whose loader says what it is not. ValueError: damaged."""
    if path.is_dir():
        if any(path.glob("esm3_structure_encoder*")):
            return "structures"
        if (path / CONFIG_FILE).is_file():
            return _described(config.load(path / CONFIG_FILE))
        if not (path / WEIGHTS_FILE).is_file():
            return _kind_of_content(read_checkpoint(path)[1])
        path = path / WEIGHTS_FILE
    require_file(path)
    return _kind_of_safetensors(path) if path.suffix == ".safetensors" else _kind_of_content(checkpoint.load_file(path))


def _kind_of_content(content: Mapping[str, Any]) -> str:
    if isinstance(content.get("config"), Mapping):
        return "gpt" if "gpt" in content else _described(content["config"])
    parts = [content[name] for name in ("model", "ema", "module", "state_dict") if isinstance(content.get(name), dict)]
    return _kind_of_names((parts or [content])[0])


def _described(description: Mapping[str, Any]) -> str:
    if isinstance(description.get("format"), str) and description["format"] in _FORMATS:
        return _FORMATS[description["format"]]
    return next((kind for name, kind in _RECORDED.items() if name in description), "images")


def _kind_of_safetensors(path: Path) -> str:
    from safetensors import safe_open

    with parsing(path, "damaged, or no safetensors file"), safe_open(path, framework="pt") as file:
        names, about = list(file.keys()), (file.metadata() or {}).get("provq", "{}")
    try:
        description = json.loads(about)
    except ValueError:
        description = {}  # the loader says so
    return _described(description) if description else _kind_of_names(names)


def _kind_of_names(names: Iterable[Any]) -> str:
    wrapped = re.compile(r"^(module\.|_orig_mod\.)+")
    found = {wrapped.sub("", name) for name in names if isinstance(name, str)}
    return next((kind for name, kind in _WEIGHTS.items() if name in found), "images")


# ------------------------------------------------------------------------------------------------------- model cards

_SETTINGS = {  # of a run -> in its card
    "Data": ("preset", "data_fingerprint", "val_fingerprint", "image_size", "global_batch_size", "max_steps"),
    "Seeds": ("global_seed",),
    # Of tokenizers. What the quantizer is stands under "Model"; a GPT's own --codebook-size is of folders of others.
    "Curriculum": ("warmup_steps", "transition_steps", "stop_after", "transition", "loss_lambda",
                   "adaptive_warmup_patience", "recluster", "recluster_at", "codebook_lr_scale"),
}


def run_facts(run: Path) -> dict[str, dict[str, Any]]:
    """What a run's folder says for the card: settings, its last validation, and evaluations with their protocols."""
    settings = config.load(run / CONFIG_FILE) if (run / CONFIG_FILE).is_file() else {}
    saved = read_checkpoint(run)[1].get("config")  # has the fingerprints of the data as well
    settings |= saved if isinstance(saved, dict) else {}
    facts = {title: {name: settings[name] for name in names if settings.get(name) is not None}
             for title, names in _SETTINGS.items()}
    if settings.get("data_path"):
        facts["Data"]["data"] = Path(str(settings["data_path"])).name  # paths are nobody else's business
    rows = read_text(run / "validation.jsonl").splitlines() if (run / "validation.jsonl").is_file() else []
    if rows:
        facts["Last validation of the run"] = _numbers(json.loads(rows[-1]))
    for path in sorted((run / "evaluation").glob("*.json")):
        report = config.load(path)
        if isinstance(report.get("protocol"), dict):
            facts[f"Evaluation: {path.stem}, protocol {report['protocol'].get('id')}"] = _numbers(
                report | (report["metrics"] if isinstance(report.get("metrics"), dict) else {}))
    return {title: values for title, values in facts.items() if values}


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items()
            if isinstance(value, int | float) and not isinstance(value, bool)}


def model_card(what: str, sizes: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown with the Hub's metadata in front."""
    lines = ["---", "library_name: provq", "tags:", "- provq", "- vector-quantization", "---", "",
             f"# {what.strip().splitlines()[0].rstrip('.')}" if what.strip() else "# A model of ProVQ", "",
             "Trained on the curriculum of progressive vector quantization",
             "([arXiv 2603.22304](https://arxiv.org/abs/2603.22304)); its `provq.load` reads this folder."]
    for title, values in {"Model": sizes, **facts}.items():
        lines += ["", f"## {title}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {f'{value:.6g}' if isinstance(value, float) else value} |"
                  for name, value in values.items()]
    if not facts:
        lines += ["", "Data, seeds, curriculum and metrics are not recorded in the file that this was made of."]
    return "\n".join(lines) + "\n"
