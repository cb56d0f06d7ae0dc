"""Weights of runs, exports and other projects: one reading for tokenizer, GPT and protein; no choice is ignored, no
number that is not finite passes, and what is odd is named by file and tensor.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from gpt_models import tiny
from structure_models import build
from torch import nn

from autoregressive import extract_codes, sample_c2i, train_c2i
from autoregressive.gpt import GPT, GPTConfig
from autoregressive.pretrained import LoadedGPT, export_gpt, load_gpt
from protein import decode, encode, evaluate
from protein.pretrained import load_structure_tokenizer
from protein.pretrained import save_pretrained as save_structure
from protein.structure_io import Chain, write_structure
from protein.structure_model import to_structtokenbench
from protein.token_files import read_tokens
from tokenizer import reconstruct, weights
from tokenizer.pretrained import load_tokenizer, save_pretrained, to_llamagen_state_dict, tokenizer_hash
from tokenizer.runtime.checkpoint import Checkpointer
from tokenizer.vq_model import VQModel, VQModelConfig

VQ = VQModelConfig("VQ-4", image_size=16, codebook_size=32, codebook_embed_dim=4)


def filled(model, seed):
    """Every floating-point weight drawn, so that weights that were mixed up show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.eval()


class VQKind:
    """LlamaGen's layout of an image tokenizer."""

    load = staticmethod(lambda path, weights="auto": load_tokenizer(path, weights=weights, codebook_l2_norm=False))
    first, another = "encoder.conv_in.weight", "encoder.norm_out.weight"

    @staticmethod
    def state(seed):
        return to_llamagen_state_dict(filled(VQModel(VQ), seed))

    @staticmethod
    def found(loaded):
        return to_llamagen_state_dict(loaded)

    @staticmethod
    def export(seed, folder):
        return save_pretrained(filled(VQModel(VQ), seed), folder)

    @staticmethod
    def checkpoint(seed, ema=None):
        return {"model": filled(VQModel(VQ), seed).state_dict(), "step": 1, "config": VQ.to_dict(),
                "ema": None if ema is None else filled(VQModel(VQ), ema).state_dict()}


class GPTKind:
    load = staticmethod(lambda path, weights="auto": load_gpt(path, weights=weights, num_codes=16))
    first, another = "tok_embeddings.weight", "norm.weight"
    config = GPTConfig.preset("GPT-tiny", vocab_size=20, num_classes=5, block_size=16)

    @classmethod
    def state(cls, seed):
        return filled(GPT(cls.config), seed).state_dict()

    @staticmethod
    def found(loaded):
        return loaded.model.state_dict()

    @classmethod
    def export(cls, seed, folder):
        return export_gpt(LoadedGPT(filled(GPT(cls.config), seed), "ab", ""), folder)

    @classmethod
    def checkpoint(cls, seed, ema=None):
        return {"model": cls.state(seed), "ema": None if ema is None else cls.state(ema), "step": 1,
                "gpt": dict(cls.config.__dict__), "config": {"tokenizer_hash": "ab"}}


class ProteinKind:
    load = staticmethod(lambda path, weights="auto": load_structure_tokenizer(path, weights=weights))
    first, another = "encoder.pre_vq_proj.weight", "encoder.pre_vq_proj.bias"

    @staticmethod
    def state(seed):
        return to_structtokenbench(filled(build(), seed))

    @staticmethod
    def found(loaded):
        return to_structtokenbench(loaded.model)

    @staticmethod
    def export(seed, folder):
        return save_structure(filled(build(), seed), folder)

    @staticmethod
    def checkpoint(seed, ema=None):
        model = filled(build(), seed)
        return {"model": model.state_dict(), "step": 1, "config": model.config.to_dict(),
                "ema": None if ema is None else filled(build(), ema).state_dict()}


def a_structure(path):
    coords = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    write_structure(path, Chain("a", "A", "GA", coords, np.arange(1, 3), ("", ""), np.zeros(2, np.float32)))


KINDS = pytest.mark.parametrize("kind", [VQKind, GPTKind, ProteinKind])


def same(kind, loaded, seed):
    found, expected = kind.found(loaded), kind.state(seed)
    return found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


# ------------------------------------------------------------------------------------------- the choice of weights


@KINDS
def test_the_set_that_was_asked_for(tmp_path, kind):
    """LlamaGen's files name their sets without any config of ours."""
    path = tmp_path / "both.pt"
    if kind is ProteinKind:  # StructTokenBench's have one set: only checkpoints of this project have two
        torch.save(kind.checkpoint(1, ema=2), path)
    else:
        torch.save({"model": kind.state(1), "ema": kind.state(2), "steps": 3}, path)
    assert same(kind, kind.load(path), 2)
    assert same(kind, kind.load(path, "ema"), 2)
    assert same(kind, kind.load(path, "model"), 1)
    with pytest.raises(ValueError, match="weights='EMA' must be"):
        kind.load(path, "EMA")


@KINDS
def test_a_set_that_is_not_there_is_refused(tmp_path, kind):
    path = tmp_path / "one.pt"
    torch.save(kind.checkpoint(1), path)
    assert same(kind, kind.load(path), 1)
    with pytest.raises(ValueError, match=r"one.pt has no weights 'ema'; it holds model"):
        kind.load(path, "ema")
    if kind is not ProteinKind:
        torch.save({"model": kind.state(1)}, path)
        with pytest.raises(ValueError, match=r"one.pt has no weights 'ema'; it holds model"):
            kind.load(path, "ema")
        torch.save({"ema": kind.state(1)}, path)
        with pytest.raises(ValueError, match=r"one.pt has no weights 'model'; it holds ema"):
            kind.load(path, "model")
    for content in ({"state_dict": kind.state(1)}, {"module": kind.state(1)}, kind.state(1)):
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"weights='ema': .*one.pt holds a single set of weights"):
            kind.load(path, "ema")
    with pytest.raises(ValueError, match="holds a single set of weights"):
        kind.load(kind.export(1, tmp_path / "export"), "ema")


def test_structure_commands_take_the_choice(tmp_path):
    Checkpointer(tmp_path / "run" / "checkpoints").save(1, ProteinKind.checkpoint(1, ema=2))
    a_structure(tmp_path / "a.pdb")
    words = [str(tmp_path / "a.pdb"), "--ckpt", str(tmp_path / "run"), "--device", "cpu"]
    hashes = {}
    for choice in ("auto", "ema", "model"):
        encode.main([*words, "--out", str(tmp_path / "a.jsonl"), "--weights", choice])
        (entry,) = read_tokens(tmp_path / "a.jsonl")
        hashes[choice] = entry.tokenizer
        assert entry.tokenizer == load_structure_tokenizer(tmp_path / "run", weights=choice).hash()
    assert hashes["auto"] == hashes["ema"] != hashes["model"]
    decode.main([str(tmp_path / "a.jsonl"), *words[1:], "--out", str(tmp_path / "out"), "--weights", "model"])
    with pytest.raises(SystemExit, match="has tokens of another tokenizer"):
        decode.main([str(tmp_path / "a.jsonl"), *words[1:], "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="holds a single set of weights"):
        evaluate.main([words[0], "--ckpt", str(ProteinKind.export(1, tmp_path / "export")), "--weights", "ema",
                       "--out", str(tmp_path / "m.json"), "--device", "cpu"])


def test_a_gpts_run_keeps_the_choice_of_its_tokenizer(tmp_path):
    """Codes of the weights of the last step, not of the average: trainer and sampler find the tokenizer again."""
    vq = dataclasses.replace(VQ, image_channels=1)
    saved = {"step": 1, "config": vq.to_dict()} | {
        name: filled(VQModel(vq), seed).state_dict() for name, seed in (("model", 1), ("ema", 2))}
    Checkpointer(tmp_path / "vq" / "checkpoints").save(1, saved)
    extract_codes.main(["--vq-ckpt", str(tmp_path / "vq"), "--code-path", str(tmp_path / "codes"), "--data-path",
                        "digits", "--weights", "model", "--device", "cpu"])
    words = ["--preset", "digits", "--code-path", str(tmp_path / "codes"), "--vq-ckpt", str(tmp_path / "vq"),
             "--results-dir", str(tmp_path / "run"), "--max-steps", "1", "--global-batch-size", "4", "--val-size", "4",
             "--sample-every", "0", "--device", "cpu"]
    with pytest.raises(SystemExit, match="is not the tokenizer that made the codes"):
        train_c2i.main(words)
    train_c2i.main([*words, "--vq-weights", "model"])
    run = ["--gpt-ckpt", str(tmp_path / "run")]
    path = tmp_path / "vq"
    assert sample_c2i.tokenizer_of(sample_c2i.parse_args(run)) == (path, "model", None)
    assert sample_c2i.tokenizer_of(sample_c2i.parse_args([*run, "--vq-weights", "ema"])) == (path, "ema", None)
    named = sample_c2i.parse_args([*run, "--vq-ckpt", "x", "--weights", "ema", "--codebook-l2-norm"])
    assert sample_c2i.tokenizer_of(named) == (Path("x"), "auto", True)
    loaded, model = sample_c2i.open_models(sample_c2i.parse_args(run), torch.device("cpu"))
    assert loaded.tokenizer_hash == tokenizer_hash(model) == tokenizer_hash(load_tokenizer(path, weights="model"))
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    for name in ("vq_ckpt", "vq_weights", "codebook_l2_norm"):
        (tmp_path / "run" / "config.json").write_text(json.dumps(described | {name: [1]}))
        with pytest.raises(ValueError, match=rf"config.json: {name}: \[1\] is of the wrong type"):
            sample_c2i.tokenizer_of(sample_c2i.parse_args(run))


# ---------------------------------------------------------------------------------------- what other people have


@KINDS
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("entry", ["state_dict", "module", "model", None])
def test_state_dicts_under_any_roof(tmp_path, kind, prefix, entry):
    state = {prefix + key: value for key, value in kind.state(1).items()}
    torch.save({entry: state, "epoch": 3} if entry else state, tmp_path / "a.pt")
    assert same(kind, kind.load(tmp_path / "a.pt"), 1)


@KINDS
def test_compiled_parts_and_checkpoints_of_wrapped_models(tmp_path, kind):
    part = kind.first.split(".")[0]
    state = {key.replace(f"{part}.", f"{part}._orig_mod.", 1): value for key, value in kind.state(1).items()}
    torch.save(state, tmp_path / "a.pt")
    assert same(kind, kind.load(tmp_path / "a.pt"), 1)
    saved = kind.checkpoint(1)
    saved["model"] = {f"module.{key}": value for key, value in saved["model"].items()}
    torch.save(saved, tmp_path / "b.pt")
    assert same(kind, kind.load(tmp_path / "b.pt"), 1)


@KINDS
def test_prefixes_are_named_in_complaints(tmp_path, kind):
    state = {f"module.{key}": value for key, value in kind.state(1).items()}
    del state[f"module.{kind.another}"]
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt \(its names without module\.\) does not fit the model; missing: "):
        kind.load(tmp_path / "a.pt")
    torch.save(kind.state(1) | {f"_orig_mod.{kind.first}": torch.zeros(1)}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"b.pt: some weights are there twice, with and without _orig_mod\."):
        kind.load(tmp_path / "b.pt")
    some = {(f"module.{key}" if key == kind.first else key): value for key, value in kind.state(1).items()}
    torch.save(some, tmp_path / "c.pt")  # of one weight only it is no wrapper's prefix
    with pytest.raises(ValueError, match=rf"c.pt.*{kind.first}"):
        kind.load(tmp_path / "c.pt")


@KINDS
def test_a_lone_safetensors_file(tmp_path, kind):
    safetensors.torch.save_file({k: v.contiguous() for k, v in kind.state(1).items()}, tmp_path / "a.safetensors")
    assert same(kind, kind.load(tmp_path / "a.safetensors"), 1)
    (tmp_path / "a.safetensors").rename(tmp_path / "renamed.bin")
    assert same(kind, kind.load(tmp_path / "renamed.bin"), 1)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk.safetensors: damaged, or no safetensors file \("):
        kind.load(tmp_path / "junk.safetensors")


@KINDS
def test_the_weights_of_an_export_alone(tmp_path, kind):
    """They know what they are: no size, and no norm of codes, is guessed."""
    folder = kind.export(1, tmp_path / "export")
    assert same(kind, kind.load(folder / "model.safetensors"), 1)
    (folder / "model.safetensors").rename(tmp_path / "taken.safetensors")
    assert same(kind, kind.load(tmp_path / "taken.safetensors"), 1)
    if kind is VQKind:
        assert load_tokenizer(tmp_path / "taken.safetensors").config == VQ
        with pytest.raises(ValueError, match="records codebook_l2_norm=False, not True"):
            load_tokenizer(tmp_path / "taken.safetensors", codebook_l2_norm=True)
    if kind is GPTKind:
        assert load_gpt(tmp_path / "taken.safetensors").tokenizer_hash == "ab"
    for other in (VQKind, GPTKind, ProteinKind):
        if other is not kind:
            with pytest.raises(ValueError, match=r"taken.safetensors has format 'provq-.*', expected 'provq-"):
                other.load(tmp_path / "taken.safetensors")


def test_norms_are_not_guessed_for_safetensors(tmp_path):
    """An export from before its weights described themselves, taken away alone, would load with LlamaGen's norm."""
    safetensors.torch.save_file(VQKind.state(1), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a.safetensors does not say whether .*--codebook-l2-norm .*or --no-codebook"):
        load_tokenizer(tmp_path / "a.safetensors")
    assert load_tokenizer(tmp_path / "a.safetensors", codebook_l2_norm=True).config.codebook_l2_norm


def test_a_state_dict_of_this_project_without_its_config_is_named(tmp_path):
    torch.save(VQModel(VQ).state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt is not a LlamaGen tokenizer: .* it is a state dict of this project's"):
        load_tokenizer(tmp_path / "a.pt")


def test_loading_changes_nothing_else(tmp_path):
    """Models that were built without memory compute what built ones do; half precision and shared memory are mended."""
    model = tiny()
    torch.save({"model": model.state_dict(), "gpt": dict(model.config.__dict__), "config": {"tokenizer_hash": ""}},
               tmp_path / "a.pt")
    loaded = load_gpt(tmp_path / "a.pt").model
    codes, labels = torch.randint(20, (2, 15)), torch.tensor([1, 5])
    assert torch.equal(loaded(codes, labels), model(codes, labels))
    assert all(not t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    state = GPTKind.state(1)
    state["output.weight"] = state["tok_embeddings.weight"] = state["tok_embeddings.weight"].half()
    torch.save(state, tmp_path / "b.pt")
    loaded = load_gpt(tmp_path / "b.pt", num_codes=16).model
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert loaded.output.weight.data_ptr() != loaded.tok_embeddings.weight.data_ptr()
    assert all(p.requires_grad for p in loaded.parameters())
    assert load_structure_tokenizer(save_structure(build(), tmp_path / "s")).model.decoder.plddt_head.dense.weight \
        .requires_grad is False


# ---------------------------------------------------------------------------------------------- numbers, tensors


@KINDS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, kind, value):
    state = kind.state(1)
    state[kind.first].view(-1)[3] = value
    said = rf"a\.(pt|safetensors) has values that are not finite, in {kind.first}: .*use an earlier checkpoint"
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=said):
        kind.load(tmp_path / "a.pt")
    safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=said):
        kind.load(tmp_path / "a.safetensors")
    saved = kind.checkpoint(1, ema=2)
    saved["ema"][kind.first].view(-1)[3] = value
    torch.save(saved, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=rf"b.pt \[ema\] has values that are not finite, in {kind.first}"):
        kind.load(tmp_path / "b.pt")
    assert same(kind, kind.load(tmp_path / "b.pt", "model"), 1)  # the other set is whole


def test_what_old_warm_ups_hold_is_no_damage(tmp_path):
    saved = VQKind.checkpoint(1)
    saved["model"]["quantize.best_score"] = torch.tensor(float("inf"), dtype=torch.float64)
    torch.save(saved, tmp_path / "a.pt")
    assert load_tokenizer(tmp_path / "a.pt").config == VQ


@KINDS
def test_exports_of_diverged_models_are_not_written(tmp_path, kind):
    model = {VQKind: lambda: VQModel(VQ).eval(), GPTKind: tiny, ProteinKind: build}[kind]()
    name, parameter = next(iter(model.named_parameters()))
    nn.init.constant_(parameter, float("nan"))
    export = {VQKind: save_pretrained, ProteinKind: save_structure,
              GPTKind: lambda model, folder: export_gpt(LoadedGPT(model, "", ""), folder)}[kind]
    with pytest.raises(ValueError, match=f"not finite, in {name}"):
        export(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.fixture
def diverged(tmp_path):
    """Runs of all three models with a NaN in one matrix."""
    for kind in (VQKind, GPTKind, ProteinKind):
        saved = kind.checkpoint(1)
        saved["model"][kind.first].view(-1)[0] = float("nan")
        Checkpointer(tmp_path / kind.__name__ / "checkpoints").save(1, saved)
    Checkpointer(tmp_path / "whole" / "checkpoints").save(1, VQKind.checkpoint(1))
    return tmp_path


def test_commands_refuse_diverged_weights(diverged):
    """Before: status 0, every code 0, a valid manifest; an export with the NaN; an IndexError from sampling."""
    vq, gpt = str(diverged / "VQKind"), str(diverged / "GPTKind")
    a_structure(diverged / "a.pdb")
    out, cpu = diverged / "out", ["--device", "cpu"]
    commands = {
        "tokenizer": [
            lambda: extract_codes.main(["--vq-ckpt", vq, "--code-path", str(out), "--data-path", "digits", *cpu]),
            lambda: reconstruct.main([vq, "--export-hf", str(out), *cpu]),
            lambda: reconstruct.main([vq, "--export-llamagen", str(out / "a.pt"), *cpu]),
            lambda: reconstruct.main([vq, "digits", "--out", str(out), *cpu]),
            lambda: sample_c2i.main(["--gpt-ckpt", gpt, "--vq-ckpt", vq, "--out", str(out), *cpu]),
        ],
        "GPT": [
            lambda: sample_c2i.main(["--gpt-ckpt", gpt, "--vq-ckpt", str(diverged / "whole"), "--out", str(out), *cpu]),
        ],
        "structure tokenizer": [
            lambda: encode.main([str(diverged / "a.pdb"), "--ckpt", str(diverged / "ProteinKind"), "--out",
                                 str(out / "a.jsonl"), *cpu]),
        ],
    }
    for runs in commands.values():
        for run in runs:
            with pytest.raises(SystemExit, match=r"error: .*checkpoints \[model\] has values that are not finite, in "):
                run()
    assert not [path for path in out.rglob("*") if path.is_file()]


@KINDS
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(("odd", "said"), [
    (lambda t: t.to_sparse(), "torch.sparse_coo, not a dense tensor"),
    (lambda t: t.to("meta"), "a meta tensor, without data"),
    (lambda t: t.to(torch.complex64), "of torch.complex64"),
    (lambda _: torch.zeros(1).expand(10**9), "but has 4 bytes"),
    (lambda _: [1.0], "a list"),
    (lambda _: None, "a NoneType"),
], ids=["sparse", "meta", "complex", "expanded", "list", "none"])
def test_odd_tensors_are_named(tmp_path, kind, odd, said):
    saved = kind.checkpoint(1)
    saved["model"][kind.first] = odd(saved["model"][kind.first])
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a.pt \[model\] is no state dict of tensors: '{kind.first}' is .*{said}"):
        kind.load(tmp_path / "a.pt")


@KINDS
def test_odd_names_and_kinds_are_named(tmp_path, kind):
    for key, said in ((5, "5 is no name"), (("a", "b"), r"\('a', 'b'\) is no name")):
        saved = kind.checkpoint(1)
        saved["model"][key] = torch.zeros(1)
        torch.save(saved, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=rf"a.pt \[model\] is no state dict of tensors: {said}"):
            kind.load(tmp_path / "a.pt")
    saved = kind.checkpoint(1)
    saved["model"][kind.first] = saved["model"][kind.first].long()
    torch.save(saved, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"of another kind: {kind.first} torch.int64 instead of torch.float32"):
        kind.load(tmp_path / "a.pt")
    for value in (3, "x", [1]):
        saved = kind.checkpoint(1) | {"model": value}
        torch.save(saved, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"a.pt \[model\] is no state dict of tensors, but a "):
            kind.load(tmp_path / "a.pt")


@KINDS
def test_shapes_that_tell_no_size_are_named(tmp_path, kind):
    for shape in ((), (3,), (0, 4), (2, 3, 4, 5, 6)):
        torch.save(kind.state(1) | {kind.first: torch.zeros(shape)}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=r"a.pt is not a.*: .* is \("):
            kind.load(tmp_path / "a.pt")


def test_sizes_without_any_sense(tmp_path):
    torch.save({"pre_vq_proj.weight": torch.zeros(4, 16), "codebook.embeddings": torch.zeros(3, 4),
                "transformer.blocks.0.geom_attn.distance_scale_per_head": torch.zeros(2)}, tmp_path / "esm3.pth")
    with pytest.raises(ValueError, match=r"esm3.pth does not fit the model; missing: "):
        load_structure_tokenizer(tmp_path / "esm3.pth")
    state = ProteinKind.state(1)
    state["decoder.post_vq_proj.weight"] = torch.zeros(3, 6)
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a.pt: decoder_heads=0 must be at least 1"):
        load_structure_tokenizer(tmp_path / "a.pt")


def test_wrappers_are_only_whole_parts_of_names():
    state, without = weights._unwrapped({"a_orig_mod.b": 1, "c.module.d": 2, "e._fsdp_wrapped_module.f": 3}, "x")
    assert state == {"a_orig_mod.b": 1, "c.module.d": 2, "e.f": 3}
    assert without == "_fsdp_wrapped_module."


def test_hashes_of_a_run_its_export_and_its_lone_weights_agree(tmp_path):
    Checkpointer(tmp_path / "run" / "checkpoints").save(1, VQKind.checkpoint(1))
    model = load_tokenizer(tmp_path / "run")
    folder = save_pretrained(model, tmp_path / "export")
    described = json.loads((folder / "config.json").read_text())
    assert described["tokenizer"] == VQ.to_dict()
    assert len({tokenizer_hash(load_tokenizer(path)) for path in
                (tmp_path / "run", folder, folder / "model.safetensors")}) == 1
