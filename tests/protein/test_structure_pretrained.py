"""Structure tokenizers on disk: runs, exports, StructTokenBench's and ESM3's files, and files that are none of them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from golden_fill import fill_values, load_arrays, load_shapes
from structure_models import SMALL, build

from protein import pretrained
from protein.pretrained import (
    ESM3_DECODER_FILE,
    ESM3_ENCODER_FILE,
    ESM3Encoder,
    ESM3Tokenizer,
    infer_structtokenbench_config,
    load_structure_tokenizer,
    save_pretrained,
)
from protein.structure_decoder import ESM3Decoder
from protein.structure_model import to_structtokenbench
from tokenizer.provq import Curriculum
from tokenizer.runtime.checkpoint import Checkpointer


@pytest.fixture(scope="module")
def golden():
    return load_arrays("esm3_encoder_golden")


@pytest.fixture(scope="module")
def chain(golden):
    """Coordinates with missing residues, mask, residue numbers: (1, 64, ...)."""
    mask = torch.ones(1, 64, dtype=torch.bool)
    mask[0, 60:] = False
    return golden["B_coords"], mask, golden["B_residue_index"]


def same_tokenizer(found, model, chain):
    """Tokens, structures, codes and hash of a loaded tokenizer are those of the model."""
    tokens = model.encode(*chain)
    assert not found.training
    assert torch.equal(found.encode(*chain), tokens)
    torch.testing.assert_close(found.decode(tokens).coords, model.decode(tokens).coords, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.codebook(), model.quantize.codebook(), rtol=0, atol=0)
    assert found.num_codes == model.config.codebook_size
    assert found.can_decode
    assert found.hash() == pretrained.VQTokenizer(model).hash()


def training_state(model, ema=None):
    """As trainers write it, with settings of the training among the model's."""
    return {"model": model.state_dict(), "ema": ema and ema.state_dict(), "step": 7,
            "config": model.config.to_dict() | {"lr": 1e-4, "results_dir": "runs/x"}}


# ------------------------------------------------------------------------------------------------- this project's own

@pytest.mark.parametrize("quantizer", ["vq", "simvq", "aminoaseed", "ema"])
def test_runs_and_exports(tmp_path, chain, quantizer):
    model, older = build(quantizer), build(quantizer, seed=1)
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints")
    checkpointer.save(5, training_state(older))
    checkpointer.save(12, training_state(model))
    checkpointer.save_named("best", training_state(older))
    same_tokenizer(load_structure_tokenizer(tmp_path / "run"), model, chain)
    same_tokenizer(load_structure_tokenizer(tmp_path / "run" / "checkpoints" / "best.pt"), older, chain)
    assert load_structure_tokenizer(tmp_path / "run").model.config == model.config

    folder = save_pretrained(model, tmp_path / "export")
    found = load_structure_tokenizer(folder)
    same_tokenizer(found, model, chain)
    assert found.model.config.quantizer == "vq"
    assert json.loads((folder / "config.json").read_text())["trained_quantizer"] == quantizer
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("quantizer", ["vq", "aminoaseed", "ema"])
def test_codes_of_unit_norm_survive_an_export(tmp_path, chain, quantizer):
    model = build(quantizer, config=type(SMALL).from_dict(SMALL.to_dict() | {"codebook_l2_norm": True}))
    assert torch.allclose(model.quantize.codebook().norm(dim=1), torch.ones(SMALL.codebook_size))
    found = load_structure_tokenizer(save_pretrained(model, tmp_path / "export"))
    assert found.model.config.codebook_l2_norm
    # Not bit for bit, nor the same hash: rows of unit norm are normalised once more, which may change their last digit.
    tokens = model.encode(*chain)
    assert torch.equal(found.encode(*chain), tokens)
    torch.testing.assert_close(found.codebook(), model.quantize.codebook(), rtol=0, atol=2e-7)
    torch.testing.assert_close(found.decode(tokens).coords, model.decode(tokens).coords, rtol=0, atol=1e-4)


def test_older_configurations_have_the_settings_of_their_time():
    values = SMALL.to_dict()
    del values["codebook_l2_norm"], values["rotation"]
    assert type(SMALL).from_dict(values) == SMALL


def test_moving_average_and_weights_of_the_last_step(tmp_path, chain):
    model, ema = build(), build(seed=1)
    Checkpointer(tmp_path).save(1, training_state(model, ema))
    same_tokenizer(load_structure_tokenizer(tmp_path), ema, chain)
    same_tokenizer(load_structure_tokenizer(tmp_path, weights="ema"), ema, chain)
    same_tokenizer(load_structure_tokenizer(tmp_path, weights="model"), model, chain)
    Checkpointer(tmp_path).save(2, training_state(model))
    with pytest.raises(ValueError, match="has no weights 'ema'"):
        load_structure_tokenizer(tmp_path, weights="ema")
    with pytest.raises(ValueError, match="weights='emma' must be 'auto', 'model' or 'ema'"):
        load_structure_tokenizer(tmp_path, weights="emma")


def test_a_checkpoint_of_the_warm_up_is_no_tokenizer_yet(tmp_path):
    model = build(curriculum=Curriculum(10, 10))
    Checkpointer(tmp_path).save(3, training_state(model))
    with pytest.raises(ValueError, match="is still in its continuous warm-up: it has no codebook and so no tokens"):
        load_structure_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="still in its continuous warm-up"):
        pretrained.VQTokenizer(model).hash()
    with pytest.raises(ValueError, match="still in its continuous warm-up"):
        save_pretrained(model, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_the_hash_sees_every_weight_and_what_no_shape_tells():
    model = build()
    first = pretrained.VQTokenizer(model).hash()
    assert pretrained.VQTokenizer(build()).hash() == first
    with torch.no_grad():
        model.decoder.plddt_head.output.bias[0] += 1
    assert pretrained.VQTokenizer(model).hash() != first
    fewer = type(SMALL).from_dict(SMALL.to_dict() | {"neighbours": 15})
    assert pretrained.VQTokenizer(build(config=fewer)).hash() != first


def test_weights_that_do_not_fit_are_named(tmp_path):
    state = training_state(build())
    del state["model"]["encoder.pre_vq_proj.bias"]
    Checkpointer(tmp_path / "a").save(1, state)
    with pytest.raises(ValueError, match=r"\[model\] does not fit the model; missing: encoder.pre_vq_proj.bias"):
        load_structure_tokenizer(tmp_path / "a")
    state = training_state(build())
    del state["config"]["neighbours"]
    Checkpointer(tmp_path / "b").save(1, state)
    with pytest.raises(ValueError, match="lacks neighbours"):
        load_structure_tokenizer(tmp_path / "b")


def test_damaged_and_foreign_exports(tmp_path):
    folder = save_pretrained(build(), tmp_path / "export")
    with pytest.raises(ValueError, match="single set of weights"):
        load_structure_tokenizer(folder, weights="ema")
    description = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(description | {"format": "provq-tokenizer-1"}))
    with pytest.raises(ValueError, match="has format 'provq-tokenizer-1', expected 'provq-structure-tokenizer-1'"):
        load_structure_tokenizer(folder)
    description["tokenizer"]["codebook_size"] = 13
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"of another shape: quantizer.codebook.weight \(12, 6\) instead of \(13, 6\)"):
        load_structure_tokenizer(folder)
    del description["tokenizer"]["neighbours"]
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"config.json: .* lacks neighbours"):
        load_structure_tokenizer(folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="damaged"):
        load_structure_tokenizer(folder)


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="no structure tokenizer at"):
        load_structure_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds neither"):
        load_structure_tokenizer(tmp_path)
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt is no structure tokenizer: it holds weights"):
        load_structure_tokenizer(tmp_path / "other.pt")
    torch.save({"model": {}, "config": {"vq_model": "VQ-16"}}, tmp_path / "image.pt")
    message = r"image.pt \[model\]: its config is no structure tokenizer's .*lacks .*encoder_width"
    with pytest.raises(ValueError, match=message):
        load_structure_tokenizer(tmp_path / "image.pt")
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"text.pt"):
        load_structure_tokenizer(tmp_path / "text.pt")


# -------------------------------------------------------------------------------------------------- StructTokenBench

@pytest.mark.parametrize("quantizer", ["vq", "aminoaseed"])
def test_structtokenbench_checkpoints(tmp_path, chain, quantizer):
    model = build(quantizer)
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": {f"model.{k}": v for k, v in to_structtokenbench(model).items()},
                "param_shapes": {"a": torch.Size([2])}, "ds_version": "0.14"}, path)
    found = load_structure_tokenizer(path)
    same_tokenizer(found, model, chain)
    assert found.model.config == model.config
    with pytest.raises(ValueError, match="single set of weights"):
        load_structure_tokenizer(path, weights="ema")
    torch.save({"module": {"model.encoder.pre_vq_proj.weight": torch.zeros(2, 2)}}, path)
    with pytest.raises(ValueError, match=r"\[module\] is not a VQVAEModel of StructTokenBench's: encoder.transformer"):
        load_structure_tokenizer(path)


def test_published_sizes_are_read_off_the_shapes():
    weights = {key: torch.empty(shape, device="meta") for key, shape in load_shapes("stb_aminoaseed_keys").items()}
    config = infer_structtokenbench_config(weights)
    assert config == type(SMALL)(quantizer="aminoaseed")  # the defaults are the published sizes


# --------------------------------------------------------------------------------------------------------------- ESM3

@pytest.fixture(scope="module")
def esm3_file(tmp_path_factory):
    """ESM3's encoder file, with the weights behind the golden numbers."""
    shapes = load_shapes("esm3_encoder_keys")
    values = fill_values(shapes)
    path = tmp_path_factory.mktemp("esm3") / ESM3_ENCODER_FILE
    torch.save({key: values.get(key, torch.zeros(shape)) for key, shape in shapes.items()}, path)
    return path


def test_tokens_of_esm3s_encoder_file(golden, esm3_file):
    tokenizer = load_structure_tokenizer(esm3_file)
    assert {k: tuple(v.shape) for k, v in tokenizer.encoder.state_dict().items()} == load_shapes("esm3_encoder_keys")
    for case in "ABCDEF":
        coords, mask = golden[f"{case}_coords"], golden.get(f"{case}_attention_mask")
        tokens = tokenizer.encode(coords, mask, golden.get(f"{case}_residue_index"))
        valid = coords.isfinite().flatten(2).all(-1)
        assert torch.equal(tokens >= 0, valid)
        # ESM3 gives the others one and the same token.
        expected = golden[f"{case}_tokens"]
        assert torch.equal(torch.where(valid, tokens, tokenizer.undefined_token), expected)
    assert tokenizer.codebook().shape == (4096, 128)
    assert tokenizer.num_codes == 4096
    assert not tokenizer.can_decode
    with pytest.raises(ValueError, match=f"only encode; load the folder of both {ESM3_ENCODER_FILE}"):
        tokenizer.decode(tokens)
    with pytest.raises(ValueError, match=r"coordinates must be floating point"):
        tokenizer.encode(coords[0])


class Recorder(ESM3Decoder):
    """Keeps what it was asked to decode."""

    def forward(self, tokens, mask=None):
        self.asked = tokens, mask
        return super().forward(tokens, mask)


def small_esm3(decoder=ESM3Decoder):
    torch.manual_seed(0)
    encoder = ESM3Encoder(width=16, heads=2, layers=1, dim=4)
    encoder.codebook.embeddings.normal_()
    return ESM3Tokenizer(encoder, decoder(width=64, heads=1, layers=1)).eval()


def test_decoding_frames_each_chain_with_bos_and_eos():
    tokenizer = small_esm3(Recorder)
    tokens = torch.tensor([[5, 6, 7, 8], [9, -1, 10, -1], [-1, -1, -1, -1], [3, 4, 4095, 4]])
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[3, 2:] = False
    decoded = tokenizer.decode(tokens, mask)
    asked, attended = tokenizer.decoder.asked
    bos, eos, pad, gap = 4098, 4097, 4099, tokenizer.undefined_token
    assert asked.tolist() == [[bos, 5, 6, 7, 8, eos], [bos, 9, gap, 10, eos, pad], [bos, eos, pad, pad, pad, pad],
                              [bos, 3, 4, eos, pad, pad]]
    assert torch.equal(attended, asked != pad)
    assert decoded.coords.shape == (4, 4, 3, 3)
    assert decoded.hidden.shape == (4, 4, 64)
    assert not decoded.coords[1, [1, 3]].any()
    assert not decoded.coords[2].any()
    direct = tokenizer.decoder(asked[:1])
    torch.testing.assert_close(decoded.coords[0], direct.coords[0, 1:-1], rtol=0, atol=1e-5)
    alone = tokenizer.decode(tokens[1:2, :3])
    torch.testing.assert_close(decoded.coords[1, :3], alone.coords[0], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="token 4097 is no code: the codebook has 4096"):
        tokenizer.decode(torch.tensor([[4097]]))


def test_the_folder_of_both_files_decodes(tmp_path, chain):
    tokenizer = small_esm3()
    torch.save(tokenizer.encoder.state_dict(), tmp_path / ESM3_ENCODER_FILE)
    encoder_only = load_structure_tokenizer(tmp_path)
    assert not encoder_only.can_decode
    torch.save(tokenizer.decoder.state_dict(), tmp_path / ESM3_DECODER_FILE)
    found = load_structure_tokenizer(tmp_path)
    tokens = tokenizer.encode(*chain)
    assert torch.equal(found.encode(*chain), tokens)
    assert found.can_decode
    torch.testing.assert_close(found.decode(tokens).coords, tokenizer.decode(tokens).coords, rtol=0, atol=0)
    assert all(p.dtype == torch.float32 and not p.is_meta for p in found.parameters())
    assert found.hash() == tokenizer.hash() == encoder_only.hash()
    with torch.no_grad():
        tokenizer.encoder.codebook.embeddings[3, 0] += 1
    assert tokenizer.hash() != found.hash()
    with pytest.raises(ValueError, match="is ESM3's decoder alone"):
        load_structure_tokenizer(tmp_path / ESM3_DECODER_FILE)
    with pytest.raises(ValueError, match="single set of weights"):
        load_structure_tokenizer(tmp_path, weights="ema")


def test_esm3_files_that_do_not_fit_are_named(tmp_path):
    tokenizer = small_esm3()
    state = tokenizer.encoder.state_dict()
    torch.save({k: v for k, v in state.items() if k != "pre_vq_proj.weight"}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a.pth is not ESM3's structure encoder: pre_vq_proj.weight is missing"):
        load_structure_tokenizer(tmp_path / "a.pth")
    torch.save(state | {"surplus": torch.zeros(1)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b.pth does not fit the model; unexpected: surplus"):
        load_structure_tokenizer(tmp_path / "b.pth")
    torch.save(state, tmp_path / ESM3_ENCODER_FILE)
    torch.save({"embed.weight": torch.zeros(4101, 64)}, tmp_path / ESM3_DECODER_FILE)
    with pytest.raises(ValueError, match=f"{ESM3_DECODER_FILE} does not fit the model; missing: decoder_stack"):
        load_structure_tokenizer(tmp_path)


def test_masked_residues_of_esm3_get_no_token(golden, esm3_file):
    tokenizer = load_structure_tokenizer(esm3_file)
    coords, mask = golden["A_coords"].clone(), torch.ones(1, 64, dtype=torch.bool)
    mask[0, 50:] = False
    expected = tokenizer.encode(coords[:, :50])
    coords[0, 50:] = math.nan
    found = tokenizer.encode(coords, mask)
    assert torch.equal(found[:, :50], expected)
    assert (found[:, 50:] == -1).all()
