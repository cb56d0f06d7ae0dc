"""Tokenizer model: parity with LlamaGen on identical weights, shapes, and weights on disk."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from golden_fill import fill_values, load_arrays, load_shapes, sums
from torch import nn
from torch.nn import functional as F

from tokenizer.pretrained import (
    infer_llamagen_config,
    load_llamagen_state_dict,
    load_tokenizer,
    save_pretrained,
    to_llamagen_state_dict,
)
from tokenizer.provq import QUANTIZERS, Curriculum
from tokenizer.runtime.checkpoint import Checkpointer
from tokenizer.vq_model import ARCHITECTURES, GroupNorm, VQModel, VQModelConfig

SMALL = VQModelConfig("VQ-4", codebook_size=32, codebook_embed_dim=4, codebook_l2_norm=False)


@pytest.fixture(scope="module", params=["vq16", "vq8"])
def golden(request):
    """Golden arrays, filled LlamaGen state dict, and the two models made of it (l2 and nol2)."""
    name = request.param
    shapes = load_shapes(f"{name}_keys")
    values = fill_values(shapes)
    state = {key: values.get(key, torch.zeros(shape)) for key, shape in shapes.items()}
    config = VQModelConfig({"vq16": "VQ-16", "vq8": "VQ-8"}[name])
    models = {}
    for prefix, l2_norm in (("l2", True), ("nol2", False)):
        models[prefix] = VQModel(VQModelConfig(**config.to_dict() | {"codebook_l2_norm": l2_norm}))
        load_llamagen_state_dict(models[prefix], state)
    return load_arrays(f"{name}_golden"), shapes, values, state, models


def test_fill_rule_reproduces_the_golden_weights(golden):
    arrays, _, values, _, _ = golden
    torch.testing.assert_close(sums(values), arrays["param_sum_sumsq"], rtol=1e-6, atol=1e-3)


def test_keys_and_shapes_are_llamagens(golden):
    _, shapes, _, state, models = golden
    exported = to_llamagen_state_dict(models["nol2"])
    assert {key: tuple(value.shape) for key, value in exported.items()} == shapes
    assert all(value.dtype == torch.float32 for value in exported.values())
    for key, value in state.items():
        assert torch.equal(exported[key], value), key


@pytest.mark.parametrize("prefix", ["l2", "nol2"])
def test_forward_matches_llamagen(golden, prefix):
    arrays, _, _, _, models = golden
    model = models[prefix].eval()
    x = arrays["x"]
    with torch.no_grad():
        torch.testing.assert_close(model.encoder(x), arrays["enc_out"], rtol=0, atol=1e-4)
        torch.testing.assert_close(model.encode_latents(x), arrays["z"], rtol=0, atol=1e-4)
        x_hat, out = model(x)
        indices = model.encode(x)
        codes = model.quantize.decode(indices)
        decoded = model.decode_code(arrays["code_in"].view(1, 4, 4))
    assert torch.equal(indices.flatten(), arrays[f"{prefix}_idx"])
    assert torch.equal(out.indices, indices)
    torch.testing.assert_close(out.quantized, arrays[f"{prefix}_quant"], rtol=0, atol=1e-4)
    torch.testing.assert_close(codes, arrays[f"{prefix}_entry"], rtol=0, atol=1e-6)
    torch.testing.assert_close(x_hat, arrays[f"{prefix}_dec"], rtol=0, atol=1e-4)
    expected = arrays["code_dec" if prefix == "l2" else "nol2_code_dec"]
    torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("prefix", ["l2", "nol2"])
def test_losses_and_gradients_match_llamagen(golden, prefix):
    arrays, _, _, _, models = golden
    model = models[prefix].train()
    model.zero_grad()
    x_hat, out = model(arrays["x"])
    total = x_hat.square().mean() + out.loss
    total.backward()
    losses = {"codebook": arrays[f"{prefix}_vq_loss"], "commit": arrays[f"{prefix}_commit_loss"]}
    assert out.losses.keys() == losses.keys()
    for name, expected in losses.items():
        torch.testing.assert_close(out.losses[name], expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(total.detach(), arrays[f"{prefix}_total_loss"], rtol=1e-4, atol=0)

    table = model.quantize.quantizer.embedding.weight.grad
    rows = arrays[f"{prefix}_grad_emb_rows"]
    pairs = {
        "grad_conv_in_w": model.encoder.conv_in.weight.grad,
        "grad_conv_out_w": model.last_layer.grad,
        "grad_quant_conv_w": model.quant_conv.weight.grad,
        "grad_emb": table[rows],
    }
    for name, found in pairs.items():
        expected = arrays[f"{prefix}_{name}"]
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), name
    others = torch.ones(len(table), dtype=torch.bool).index_fill_(0, rows, False)
    assert not table[others].any()
    norm = torch.stack([p.grad.double().norm() for p in model.parameters()]).norm()
    torch.testing.assert_close(norm, arrays[f"{prefix}_grad_norm_all"], rtol=1e-4, atol=0)


def test_llamagen_file_is_recognised_by_its_keys(golden):
    _, _, _, state, models = golden
    assert infer_llamagen_config(state, codebook_l2_norm=False) == models["nol2"].config
    assert infer_llamagen_config(state, codebook_l2_norm=True) == models["l2"].config


def test_the_model_of_256_runs_at_384_and_on_rectangles(golden):
    # Weights do not depend on the size; 64 and 96 have the ratio of 256 and 384 at a sixteenth of the cost.
    model = golden[-1]["nol2"].eval()
    factor = model.downsample
    with torch.no_grad():
        for height, width in ((64, 64), (96, 96), (32, 64)):
            x_hat, out = model(torch.zeros(1, 3, height, width))
            assert x_hat.shape == (1, 3, height, width)
            assert out.indices.shape == (1, height // factor, width // factor)


@pytest.mark.parametrize("in_channels", [1, 3, 4])
def test_vq4_takes_any_channels_and_small_images(in_channels):
    model = VQModel(VQModelConfig(**SMALL.to_dict() | {"image_channels": in_channels}))
    x_hat, out = model(torch.zeros(2, in_channels, 28, 32))
    assert x_hat.shape == (2, in_channels, 28, 32)
    assert out.indices.shape == (2, 7, 8)


def test_bad_images_and_indices_are_explained():
    model = VQModel(SMALL)
    with pytest.raises(ValueError, match=r"height 30 and width 32 .*VQ-4 downsampling factor 4"):
        model(torch.zeros(1, 3, 30, 32))
    with pytest.raises(ValueError, match=r"image_channels=3 .*got \(1, 1, 32, 32\)"):
        model(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match=r"shaped \(B, h, w\)"):
        model.decode_code(torch.zeros(64, dtype=torch.int64))
    with pytest.raises(ValueError, match="integers"):
        model.decode_code(torch.zeros(1, 8, 8))


def test_every_width_fits_the_group_norm_and_factors_are_as_named():
    for name, arch in ARCHITECTURES.items():
        assert all(width % 32 == 0 for width in arch.widths)
        assert len(arch.channel_mult) == len(arch.encoder_blocks) == len(arch.decoder_blocks)
        assert name.removesuffix("-S") == f"VQ-{arch.downsample}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vq_model": "VQ-32"}, "VQ-4, VQ-8, VQ-16"),
        ({"quantizer": "rvq"}, "simvq"),
        ({"quantizer": "fsq"}, "codebook_embed_dim=8 must be 5"),
        ({"codebook_size": 0}, "codebook_size=0"),
        ({"dropout_p": 1.0}, "dropout_p"),
        ({"codebook_ema_decay": 0.5}, "quantizer='ema' only"),
    ],
)
def test_config_mistakes_are_explained(change, message):
    with pytest.raises(ValueError, match=message):
        VQModelConfig(**change)


def test_config_survives_a_larger_configuration_and_misses_nothing_silently():
    values = SMALL.to_dict() | {"lr": 1e-4}
    assert VQModelConfig.from_dict(json.loads(json.dumps(values))) == SMALL
    del values["quantizer"]
    with pytest.raises(ValueError, match="lacks quantizer"):
        VQModelConfig.from_dict(values)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model = VQModel(VQModelConfig(**SMALL.to_dict() | {"dropout_p": 0.5}), Curriculum(10, 0))
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    assert not torch.equal(model(x)[0], model(x)[0])
    model.eval()
    assert torch.equal(model(x)[0], model(x)[0])


def test_latents_may_be_bfloat16_while_the_quantizer_stays_float32():
    torch.manual_seed(0)
    model = VQModel(SMALL).train()
    x = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = model.encode_latents(x)
        x_hat, out = model(x)
    assert latents.dtype == x_hat.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    distance = torch.cdist(latents.float().movedim(1, -1).flatten(0, 2), model.quantize.codebook())
    assert torch.equal(distance.argmin(1), out.indices.flatten())


def test_every_stage_trains_every_parameter_and_the_error_falls():
    torch.manual_seed(0)
    model = VQModel(SMALL, Curriculum(6, 6))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    x = F.interpolate(torch.rand(8, 3, 4, 4) * 2 - 1, scale_factor=4)
    errors = []
    for step in range(24):
        model.quantize.set_step(step)
        if model.quantize.needs_init:
            with torch.no_grad():
                latents = model.encode_latents(x).movedim(1, -1).flatten(0, 2)
            model.quantize.init_codebook(latents, optimizers=[optimizer])
        x_hat, out = model(x)
        error = F.mse_loss(x_hat, x)
        optimizer.zero_grad()
        (error + out.loss).backward()
        optimizer.step()
        errors.append(error.item())
    assert all(p.grad is not None for p in model.parameters())
    assert errors[-1] < 0.5 * errors[0]


# ---------------------------------------------------------------------------------------------- weights on disk


def _trained(config: VQModelConfig) -> VQModel:
    """A tokenizer whose codes were set from data and, for the linear quantizers, whose map has moved."""
    torch.manual_seed(1)
    model = VQModel(config, Curriculum(1, 0))
    model.quantize.set_step(1)
    model.quantize.init_codebook(torch.randn(256, config.codebook_embed_dim))
    with torch.no_grad():
        for p in model.quantize.quantizer.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def _assert_same_tokenizer(a: VQModel, b: VQModel) -> None:
    x = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1
    with torch.no_grad():
        indices = a.encode(x)
        assert len(indices.unique()) > 1
        assert torch.equal(indices, b.encode(x))
        torch.testing.assert_close(a.decode_code(indices), b.decode_code(indices), rtol=0, atol=1e-5)


@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_export_keeps_tokens_and_images_for_every_quantizer(name, l2_norm, tmp_path):
    model = _trained(VQModelConfig(**SMALL.to_dict() | {"quantizer": name, "codebook_l2_norm": l2_norm}))
    state = to_llamagen_state_dict(model)
    torch.testing.assert_close(state["quantize.embedding.weight"], model.quantize.codebook().detach(), rtol=0, atol=0)
    assert not state["quantize.codebook_used"].any()
    assert state["quantize.codebook_used"].shape == (65536,)

    loaded = load_tokenizer(save_pretrained(model, tmp_path / "export"))
    assert not loaded.training
    assert loaded.quantize.stage == 3
    assert loaded.config.codebook_l2_norm == l2_norm
    _assert_same_tokenizer(model, loaded)

    torch.save({"model": state}, tmp_path / "foreign.pt")
    _assert_same_tokenizer(model, load_tokenizer(tmp_path / "foreign.pt", codebook_l2_norm=l2_norm))


def test_llamagen_checkpoint_with_arguments_loads_and_prefers_ema(tmp_path):
    one, two = _trained(SMALL), _trained(SMALL)
    with torch.no_grad():
        two.post_quant_conv.weight.mul_(2)
    torch.save(
        {
            "model": to_llamagen_state_dict(one), "ema": to_llamagen_state_dict(two), "steps": 7,
            "args": argparse.Namespace(vq_model="VQ-16"), "optimizer": {}, "discriminator": {},
        },
        tmp_path / "0000007.pt",
    )
    for weights, expected in (("auto", two), ("ema", two), ("model", one)):
        loaded = load_tokenizer(tmp_path / "0000007.pt", weights=weights, codebook_l2_norm=False)
        assert torch.equal(loaded.post_quant_conv.weight, expected.post_quant_conv.weight)
    assert load_tokenizer(tmp_path / "0000007.pt").config.codebook_l2_norm is True  # LlamaGen's default


def _save_run(folder, model, ema=None, step=3):
    state = {"model": model.state_dict(), "ema": ema, "config": model.config.to_dict() | {"lr": 1e-4}, "step": step}
    return Checkpointer(folder / "checkpoints").save(step, state)


def test_own_checkpoints_and_run_folders_load(tmp_path):
    model = _trained(VQModelConfig(**SMALL.to_dict() | {"quantizer": "simvq"}))
    file = _save_run(tmp_path, model)
    for path in (file, tmp_path, tmp_path / "checkpoints"):
        loaded = load_tokenizer(path)
        assert loaded.config == model.config
        _assert_same_tokenizer(model, loaded)
    with pytest.raises(ValueError, match="no weights 'ema'"):
        load_tokenizer(file, weights="ema")
    with pytest.raises(ValueError, match="records codebook_l2_norm=False, not True"):
        load_tokenizer(file, codebook_l2_norm=True)


def test_a_checkpoint_from_the_warmup_stays_continuous_and_is_not_exported(tmp_path):
    model = VQModel(SMALL, Curriculum(10, 0))
    model.quantize.set_step(3)
    loaded = load_tokenizer(_save_run(tmp_path, model))
    x_hat, out = loaded(torch.zeros(1, 3, 16, 16))
    assert out.indices is None
    torch.testing.assert_close(x_hat, model.eval()(torch.zeros(1, 3, 16, 16))[0])
    with pytest.raises(ValueError, match="warm-up"):
        to_llamagen_state_dict(loaded)


def test_what_does_not_fit_is_named(tmp_path):
    model = _trained(SMALL)
    state = to_llamagen_state_dict(model)
    state["encoder.extra"] = torch.zeros(1)
    state["quant_conv.bias"] = torch.zeros(5)
    del state["decoder.conv_out.bias"]
    torch.save({"model": state}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match=r"bad.pt") as caught:
        load_tokenizer(tmp_path / "bad.pt")
    for part in ("missing: decoder.conv_out.bias", "unexpected: encoder.extra", "quant_conv.bias (5,) instead of (4,)"):
        assert part in str(caught.value)

    own = model.state_dict()
    own["quantize.quantizer.embedding.weight"] = torch.zeros(3, 4)
    torch.save({"model": own, "config": SMALL.to_dict()}, tmp_path / "own.pt")
    with pytest.raises(ValueError, match=r"own.pt .*embedding.weight \(3, 4\) instead of \(32, 4\)"):
        load_tokenizer(tmp_path / "own.pt")

    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other.pt .*encoder.conv_in.weight"):
        load_tokenizer(tmp_path / "other.pt")
    torch.save({"weights": {}}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match=r"none.pt has no weights 'model'; it holds weights"):
        load_tokenizer(tmp_path / "none.pt")
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "absent")
    folder = save_pretrained(model, tmp_path / "export")
    described = json.loads((folder / "config.json").read_text())
    del described["tokenizer"]
    (folder / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match=r"export/config.json has no 'tokenizer'"):
        load_tokenizer(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors"):
        load_tokenizer(tmp_path / "empty")
    simvq = VQModel(VQModelConfig(**SMALL.to_dict() | {"quantizer": "simvq"}))
    with pytest.raises(ValueError, match="quantizer='vq' only"):
        load_llamagen_state_dict(simvq, to_llamagen_state_dict(model))


def test_norms_under_autocast_are_float32_unless_asked_otherwise():
    """On CPUs as on GPUs, where autocast's own lists of operations differ."""
    torch.manual_seed(0)
    norm, x = GroupNorm(4, 16), torch.randn(2, 16, 8, 8) * 3 + 5
    nn.init.normal_(norm.weight)
    plain = nn.GroupNorm(4, 16)
    plain.load_state_dict(norm.state_dict())
    assert torch.equal(norm(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        wide, low = norm(x.bfloat16()), GroupNorm(4, 16)
        low.load_state_dict(norm.state_dict())
        low.low_precision = True
        narrow = low(x.bfloat16())
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    expected = plain(x.bfloat16().float())
    assert torch.equal(wide, expected)
    torch.testing.assert_close(narrow.float(), expected, rtol=2e-2, atol=2e-2)  # two roundings of 8 bits
