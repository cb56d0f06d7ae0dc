"""Configurations in config.json and checkpoints are checked before anything is built of them, by file and by name."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from gpt_models import TINY, tiny
from structure_models import SMALL, build

from autoregressive.gpt import GPTConfig
from autoregressive.pretrained import LoadedGPT, export_gpt, load_gpt
from protein.pretrained import load_structure_tokenizer
from protein.pretrained import save_pretrained as save_structure
from protein.structure_model import StructureModelConfig
from tokenizer import train_provq
from tokenizer.pretrained import load_tokenizer, save_pretrained
from tokenizer.runtime import config
from tokenizer.runtime.checkpoint import load_file
from tokenizer.train_config import TrainConfig
from tokenizer.vq_model import VQModel, VQModelConfig
from tokenizer.weights import skeleton

VQ = VQModelConfig("VQ-4", image_size=16, codebook_size=32, codebook_embed_dim=4)
MODELS = {  # what loads it, its configuration, a checkpoint, an export, and the configuration's name in both
    "tokenizer": (load_tokenizer, VQ, lambda: {"model": VQModel(VQ).state_dict(), "config": VQ.to_dict()},
                  lambda folder: save_pretrained(VQModel(VQ).eval(), folder), "config", "tokenizer"),
    "gpt": (load_gpt, TINY, lambda: {"model": tiny().state_dict(), "gpt": dataclasses.asdict(TINY),
                                     "config": {"tokenizer_hash": ""}},
            lambda folder: export_gpt(LoadedGPT(tiny(), "", ""), folder), "gpt", "gpt"),
    "structure": (load_structure_tokenizer, SMALL, lambda: {"model": build().state_dict(), "config": SMALL.to_dict()},
                  lambda folder: save_structure(build(), folder), "config", "tokenizer"),
}
FIELDS = [(name, field) for name, (_, cfg, *_) in MODELS.items() for field in (f.name for f in dataclasses.fields(cfg))]
ODD = ["x", None, [1], {"a": 1}, 1.5, True, -1, 10**9, 10**30, float("nan"), float("inf"), "VQ-16" * 10**5]


def refused(load, path, named):
    """The message of a refusal: one line, beginning with the file."""
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"\w") as caught:
        load(path)
    said = str(caught.value)
    assert named in said.split(":")[0].split(" ")[0] or said.startswith(str(named)), said
    assert "\n" not in said
    assert len(said) < 1500
    assert time.monotonic() - start < 60  # no hang: before, a size of 10^9 built layers until it was killed
    return said


@pytest.fixture(scope="module")
def saved():
    return {name: make() for name, (_, _, make, *_) in MODELS.items()}


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    return {name: export(tmp_path_factory.mktemp(name) / "export") for name, (_, _, _, export, *_) in MODELS.items()}


@pytest.mark.parametrize(("model", "field"), FIELDS)
def test_odd_values_in_a_checkpoint(tmp_path, saved, model, field):
    load, cfg, _, _, key, _ = MODELS[model]
    path = tmp_path / "a.pt"
    for odd in [*ODD, torch.zeros(2)]:
        torch.save(saved[model] | {key: saved[model][key] | {field: odd}}, path)
        if _fits(cfg, field, odd):
            load(path)
        else:
            said = refused(load, path, "a.pt")
            assert field in said or "does not fit the model" in said or "needs" in said or "must" in said


WITH_WEIGHTS = ("codebook_follow",)  # switches whose models have other keys


def _fits(cfg, field, odd):
    """Whether a value is one that no weight contradicts."""
    current = getattr(cfg, field)
    if type(odd) is bool or type(current) is bool:
        return type(odd) is type(current) and (odd == current or field not in WITH_WEIGHTS)
    if isinstance(current, float) and isinstance(odd, (int, float)):
        try:
            dataclasses.replace(cfg, **{field: odd})
        except ValueError:
            return False
        return float("-inf") < odd < 2**53
    return False


@pytest.mark.parametrize("model", MODELS)
def test_values_in_an_exports_config(exports, model):
    load, cfg, *_, key = MODELS[model]
    path = exports[model] / "config.json"
    whole = json.loads(path.read_text())
    try:
        for field in (f.name for f in dataclasses.fields(cfg)):
            for odd in ("x", None, 10**9, 10**30):
                path.write_text(json.dumps(whole | {key: whole[key] | {field: odd}}))
                if not _fits(cfg, field, odd):
                    refused(load, exports[model], "export")
            if field in getattr(cfg, "LATER", {}):  # older files do not have it
                continue
            path.write_text(json.dumps(whole | {key: {k: v for k, v in whole[key].items() if k != field}}))
            assert f"lacks {field}" in refused(load, exports[model], "config.json")
        for odd in ([1], "x", None, 3):
            path.write_text(json.dumps(whole | {key: odd}))
            assert "not values by name" in refused(load, exports[model], "config.json")
    finally:
        path.write_text(json.dumps(whole))
    load(exports[model])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("odd", [None, "x", [1], 5, {}])
def test_descriptions_of_another_kind(tmp_path, saved, model, odd):
    load, *_, key, _ = MODELS[model]
    torch.save(saved[model] | {key: odd}, tmp_path / "a.pt")
    refused(load, tmp_path / "a.pt", "a.pt")


def test_a_gpt_without_its_sizes_takes_no_defaults(tmp_path, saved):
    gpt = {k: v for k, v in saved["gpt"]["gpt"].items() if k != "block_size"}
    torch.save(saved["gpt"] | {"gpt": gpt}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt: its gpt lacks block_size"):
        load_gpt(tmp_path / "a.pt")
    torch.save({k: v for k, v in saved["gpt"].items() if k != "config"}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt has no 'config'"):
        load_gpt(tmp_path / "a.pt")
    for odd in ([], "x", {}, {"tokenizer_hash": 3}):
        torch.save(saved["gpt"] | {"config": odd}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"a.pt.*tokenizer_hash"):
            load_gpt(tmp_path / "a.pt")


@pytest.mark.parametrize(("cls", "field", "value", "said"), [
    (GPTConfig, "n_layer", 10**9, "must be at most 1024"), (GPTConfig, "block_size", 10**10, "must be at most 65536"),
    (GPTConfig, "n_head", 0, "must be at least 1"), (GPTConfig, "vocab_size", 2**31, "must be at most 2147483647"),
    (VQModelConfig, "codebook_size", 2**31, "must be at most"), (VQModelConfig, "image_size", 10**9, "at most 16384"),
    (VQModelConfig, "codebook_embed_dim", 10**9, "at most 1048576"),
    (StructureModelConfig, "decoder_layers", 10**9, "at most 1024"),
    (StructureModelConfig, "encoder_width", 10**9, "at most 1048576"),
])
def test_sizes_have_ends(cls, field, value, said):
    with pytest.raises(ValueError, match=f"{field}={value}.*{said}"):
        cls(**{field: value})


def test_skeletons_take_no_memory():
    """A codebook of 2^31 - 1 codes is compared with the weights without 64 GB."""
    model = skeleton(lambda: VQModel(dataclasses.replace(VQ, codebook_size=2**31 - 1)))
    assert model.state_dict()["quantize.quantizer.embedding.weight"].shape == (2**31 - 1, 4)


def test_sizes_beyond_the_weights_are_refused_before_memory_is_taken(tmp_path, saved):
    for size in (33, 10**9):
        torch.save(saved["tokenizer"] | {"config": VQ.to_dict() | {"codebook_size": size}}, tmp_path / "a.pt")
        said = rf"a.pt \[model\] .* quantize.quantizer.embedding.weight \(32, 4\) instead of \({size}, 4\)"
        with pytest.raises(ValueError, match=said):
            load_tokenizer(tmp_path / "a.pt")


def test_larger_integers_are_no_floats(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Settings:
        lr: float = config.arg(1.0, "rate")

    assert config.from_dict(Settings, {"lr": 3}, "x").lr == 3.0
    with pytest.raises(ValueError, match=r"^x: lr: an integer of \d+ bits is not a finite number"):
        config.from_dict(Settings, {"lr": 10**400}, "x")
    (tmp_path / "a.json").write_text('{"lr": 1' + "0" * 400 + "}")
    with pytest.raises(ValueError, match="not a finite number"):
        config.from_dict(Settings, config.load(tmp_path / "a.json"), "a.json")
    with pytest.raises(ValueError, match=r"^x is a list, not values by name"):
        config.from_dict(Settings, [1], "x")


# ------------------------------------------------------------------------------------------------------------- resume


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, and the words that resume it."""
    folder = tmp_path_factory.mktemp("run")
    words = ["--results-dir", str(folder), "--device", "cpu", "--global-batch-size", "12", "--max-steps", "2",
             "--warmup-steps", "0", "--transition-steps", "0", "--codebook-size", "8",
             "--val-size", "12", "--ckpt-every", "2", "--val-every", "2", "--image-size", "8", "--num-workers", "0"]
    train_provq.main(words)
    return folder, words


def test_resuming_from_what_is_not_whole(run):
    folder, words = run
    path = folder / "checkpoints" / "0000002.pt"
    whole, content = path.read_bytes(), load_file(path)
    more = [*words[:7], "4", *words[8:]]
    assert more[6:8] == ["--max-steps", "4"]
    try:
        for name in ("step", "model", "optimizer", "config", "metrics", "best", "last_validation"):
            torch.save({key: value for key, value in content.items() if key != name}, path)
            _refuses(more, rf"--results-dir {folder}: its newest checkpoint has no {name}")
            for odd in ("x", [1], torch.zeros(2)):
                torch.save(content | {name: odd}, path)
                _refuses(more, f"--results-dir {folder}: the {name} of its newest checkpoint does not fit"
                         if name in ("model", "optimizer") else
                         f"--results-dir {folder}: its newest checkpoint has .* as its {name}: it is damaged")
        torch.save(content | {"step": -3}, path)
        _refuses(more, "has -3 as its step")
        for name in ("model", "optimizer"):
            torch.save(content | {name: {}}, path)
            _refuses(more, rf"--results-dir {folder}: the {name} of its newest checkpoint does not fit \(")
        state = dict(content["model"])
        state["encoder.conv_in.weight"] = state["encoder.conv_in.weight"].to("meta")
        torch.save(content | {"model": state}, path)
        _refuses(more, "the model of its newest checkpoint does not fit")
        averages = {0: {k: v[:1] if v.ndim else v for k, v in content["optimizer"]["state"][0].items()}}
        optimizer = content["optimizer"] | {"state": content["optimizer"]["state"] | averages}
        torch.save(content | {"optimizer": optimizer}, path)
        _refuses(more, r"the optimizer of its newest checkpoint does not fit \(exp_avg")
        torch.save(content | {"metrics": {}}, path)
        _refuses(more, "the metrics of its newest checkpoint are damaged")
        torch.save(content | {"config": {}}, path)
        _refuses(more, "other settings")
    finally:
        path.write_bytes(whole)
    train_provq.main(more)
    assert (folder / "checkpoints" / "0000004.pt").is_file()


def _refuses(words, said):
    with pytest.raises(SystemExit, match=f"error: {said}" if said.startswith("--") else said) as caught:
        train_provq.main(words)
    assert "\n" not in str(caught.value)


def test_settings_of_a_run_that_is_read_again(run):
    values = config.load(Path(run[0]) / "config.json")
    assert config.from_dict(TrainConfig, values, "x").codebook_size == 8
    for odd in ODD[:4]:
        with pytest.raises(ValueError, match=r"^x: codebook_size: "):
            config.from_dict(TrainConfig, values | {"codebook_size": odd}, "x")
