"""Structure VQ model: quantizers, symmetry, padding, precision, garbage, and StructTokenBench's weights."""

from __future__ import annotations

import json
import math

import pytest
import torch
from golden_fill import GOLDEN, load_arrays, load_shapes
from structure_models import SMALL, build

from protein.losses import structure_losses
from protein.structure_config import PRESETS
from protein.structure_model import StructureModelConfig, StructureVQModel, load_structtokenbench, to_structtokenbench
from tokenizer.provq import Curriculum, nearest_code

QUANTIZERS = ("vq", "aminoaseed", "ema")


@pytest.fixture(scope="module")
def golden():
    return load_arrays("esm3_encoder_golden")


@pytest.fixture(scope="module")
def backbone(golden):
    """(1, 64, 3, 3): a real chain, and the number of each of its residues."""
    return golden["A_coords"], golden["A_residue_index"]


# ------------------------------------------------------------------------------------------------------- configuration

def test_presets_have_the_published_sizes():
    for quantizer, parameters in (("vq", 138_859_114), ("aminoaseed", 139_908_714)):  # of StructTokenBench's models
        model = StructureVQModel(StructureModelConfig(**PRESETS["paper"], quantizer=quantizer))
        names = to_structtokenbench(model)
        assert sum(value.numel() for value in names.values()) == parameters
    assert {key: tuple(value.shape) for key, value in names.items()} == load_shapes("stb_aminoaseed_keys")
    small = StructureVQModel(StructureModelConfig(**PRESETS["small"]))
    assert sum(p.numel() for p in small.parameters()) == 5_677_290


def test_configuration_is_read_out_of_a_larger_one_and_nothing_may_be_absent():
    values = SMALL.to_dict()
    assert StructureModelConfig.from_dict(values | {"lr": 1e-4}) == SMALL
    del values["neighbours"], values["quantizer"]
    with pytest.raises(ValueError, match="lacks quantizer, neighbours"):
        StructureModelConfig.from_dict(values)


@pytest.mark.parametrize(("change", "message"), [
    ({"encoder_layers": 0}, "encoder_layers=0 must be at least 1"),
    ({"quantizer": "vqq"}, "quantizer: 'vqq' is not one of vq, simvq, aminoaseed, ema, fsq, lfq; did you mean vq"),
    ({"decoder_heads": 3}, "decoder_width=64 must be an even multiple of decoder_heads=3"),
    ({"codebook_ema_decay": 0.9}, "codebook_ema_decay=0.9 has an effect with quantizer='ema' only, got 'vq'"),
])
def test_impossible_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        StructureModelConfig.from_dict(SMALL.to_dict() | change)


# ------------------------------------------------------------------------------------------------------------ forward

@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_tokens_are_what_forward_quantizes_to_and_decode_to_the_same_structure(backbone, quantizer):
    model = build(quantizer)
    coords, index = backbone
    coords = coords.clone()
    coords[0, 3] = math.nan
    with torch.no_grad():
        out = model(coords, None, index)
        tokens = model.encode(coords, None, index)
        decoded = model.decode(tokens)
        by_vectors = model.decode(out.quantized.quantized, out.mask)
    assert torch.equal(tokens, out.quantized.indices)
    assert (tokens == -1).nonzero().tolist() == [[0, 3]]
    assert len(tokens.unique()) > 6
    assert torch.equal(out.mask, tokens >= 0)
    codes = model.quantize.codebook()[tokens[out.mask]]
    torch.testing.assert_close(out.quantized.quantized[out.mask], codes, rtol=0, atol=0)
    assert torch.equal(nearest_code(model.encode_latents(coords, None, index)[out.mask], model.quantize.codebook()),
                       tokens[out.mask])
    for name in ("coords", "rotation", "origin", "plddt", "hidden"):
        torch.testing.assert_close(getattr(decoded, name), getattr(out.decoded, name), rtol=0, atol=0)
        torch.testing.assert_close(getattr(by_vectors, name), getattr(out.decoded, name), rtol=0, atol=0)
        assert not getattr(decoded, name)[0, 3].any()
    assert out.pairs.distance.shape == (1, 64, 64, 64)
    assert out.pairs.direction.shape == (1, 64, 64, 6, 16)
    assert out.sequence_logits.shape == (1, 64, 33)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_every_trained_weight_gets_a_finite_gradient(backbone, quantizer):
    model = build(quantizer).train()
    coords, index = backbone
    sequence = torch.randint(4, 24, (1, 64))
    out = model(coords, None, index)
    (sum(structure_losses(out, coords, sequence, index).values()) + out.quantized.loss).backward()
    for name, p in model.named_parameters():
        assert p.requires_grad != name.startswith("decoder.plddt_head"), name
        if p.requires_grad and not name.endswith("pairwise_classification_head.linear2.weight"):
            assert p.grad is not None, name
            assert p.grad.isfinite().all(), name
            assert p.grad.any(), name
    logits = model.decoder.pairwise_classification_head.linear2.weight.grad
    assert logits[:160].any()
    assert not logits[160:].any()  # aligned error: nothing trains it


def test_continuous_in_the_warm_up_and_discrete_after(backbone):
    model = build(curriculum=Curriculum(warmup_steps=2, transition_steps=0)).train()
    coords, _ = backbone
    out = model(coords).quantized
    assert out.indices is None
    torch.testing.assert_close(out.quantized, model.encode_latents(coords), rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="before init_codebook"):
        model.encode(coords)
    with pytest.raises(RuntimeError, match="before init_codebook"):
        model.decode(torch.zeros(1, 4, dtype=torch.int64))
    model.quantize.set_step(2)
    model.quantize.init_codebook(out.quantized[0].detach())
    assert torch.equal(model(coords).quantized.indices, model.encode(coords))


def test_a_padded_batch_equals_its_chains_in_values_and_gradients(backbone):
    # In the warm-up, where the loss is a mean over chains; the quantizer's is a mean over tokens.
    model = build(curriculum=Curriculum(warmup_steps=1, transition_steps=0)).train()
    lengths = (30, 9, 17)
    singles = [backbone[0][:, 5 * i : 5 * i + length] for i, length in enumerate(lengths)]
    sequences = [torch.randint(4, 24, (1, length)) for length in lengths]
    coords, mask = torch.full((3, 30, 5, 3), math.nan), torch.zeros(3, 30, dtype=torch.bool)
    sequence = torch.ones(3, 30, dtype=torch.int64)
    for i, length in enumerate(lengths):
        coords[i, :length, :3], mask[i, :length], sequence[i, :length] = singles[i], True, sequences[i]

    out = model(coords, mask)
    terms = structure_losses(out, coords, sequence)
    sum(terms.values()).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    means = dict.fromkeys(terms, 0.0)
    for i, length in enumerate(lengths):
        alone = model(singles[i])
        torch.testing.assert_close(out.decoded.coords[i, :length], alone.decoded.coords[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out.pairs.distance[i, :length, :length], alone.pairs.distance[0], rtol=1e-4,
                                   atol=1e-4)
        for name, value in structure_losses(alone, singles[i], sequences[i]).items():
            (value / 3).backward(retain_graph=True)
            means[name] += value.item() / 3
    assert {name: value.item() for name, value in terms.items()} == pytest.approx(means, rel=1e-4)
    for name, p in model.named_parameters():
        if name in grads:
            scale = max(p.grad.abs().max().item(), 1e-3)
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-2, atol=1e-3 * scale, msg=name)


@pytest.mark.parametrize("distance", [0.0, 1000.0])
def test_tokens_survive_motion_and_tell_mirror_images_apart(backbone, distance):
    model = build()
    coords, index = backbone
    tokens = model.encode(coords, None, index)
    q, r = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    q = q * r.diagonal().sign()
    q[:, 0] *= torch.linalg.det(q)
    moved = (coords.double() @ q.T + distance).float()
    assert torch.equal(model.encode(moved, None, index), tokens)
    assert (model.encode(coords * torch.tensor([1.0, -1.0, 1.0]), None, index) != tokens).float().mean() > 0.3


def test_a_batch_without_coordinates_trains_nothing_but_breaks_nothing():
    model = build().train()
    coords = torch.full((2, 5, 3, 3), math.nan)
    out = model(coords)
    assert not out.mask.any()
    assert (out.quantized.indices == -1).all()
    assert not out.decoded.coords.any()
    sequence = torch.randint(4, 24, (2, 5))
    (sum(structure_losses(out, coords, sequence).values()) + out.quantized.loss).backward()
    for name, p in model.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name


def test_coordinates_stay_float32_under_autocast(backbone):
    model = build("aminoaseed").train()
    coords, index = backbone
    with torch.no_grad():
        expected = model(coords, None, index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(coords, None, index)
    assert out.decoded.coords.dtype == out.quantized.quantized.dtype == torch.float32
    sequence = torch.randint(4, 24, (1, 64))
    terms = structure_losses(out, coords, sequence, index)
    assert all(value.dtype == torch.float32 for value in terms.values())
    (sum(terms.values()) + out.quantized.loss).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    exact = structure_losses(expected, coords, sequence, index)
    assert {k: v.item() for k, v in terms.items()} == pytest.approx({k: v.item() for k, v in exact.items()}, rel=0.2)


@pytest.mark.parametrize(("coords", "mask", "message"), [
    (torch.zeros(2, 4, 3), None, r"\(2, 4, 3\)"),
    (torch.zeros(2, 4, 2, 3), None, r"got torch.float32 \(2, 4, 2, 3\)"),
    (torch.zeros(2, 0, 3, 3), None, r"got torch.float32 \(2, 0, 3, 3\)"),
    (torch.zeros(2, 4, 3, 3, dtype=torch.int64), None, "coordinates must be floating point"),
    (torch.zeros(2, 4, 3, 3), torch.ones(2, 5, dtype=torch.bool), r"mask must be bool \(2, 4\)"),
    (torch.zeros(2, 4, 3, 3), torch.ones(2, 4), r"got torch.float32 \(2, 4\)"),
])
def test_wrong_inputs_of_encode(coords, mask, message):
    model = build()
    for method in (model, model.encode, model.encode_latents):
        with pytest.raises(ValueError, match=message):
            method(coords, mask)


@pytest.mark.parametrize(("tokens", "mask", "message"), [
    (torch.tensor([[0, 12]]), None, "token 12 is no code: the codebook has 12"),
    (torch.tensor([0, 1]), None, r"tokens must be integers \(B, L\), got torch.int64 \(2,\)"),
    (torch.zeros(1, 0, dtype=torch.int64), None, r"got torch.int64 \(1, 0\)"),
    (torch.tensor([[True]]), None, "tokens must be integers"),
    (torch.zeros(1, 2, 5), None, r"quantized vectors must be \(B, L, 6\), got \(1, 2, 5\)"),
    (torch.zeros(1, 2, 6), torch.ones(2, 2, dtype=torch.bool), r"mask must be bool \(1, 2\)"),
    (torch.tensor([[0, 1]]), torch.ones(1, 2), "got torch.float32"),
])
def test_wrong_inputs_of_decode(tokens, mask, message):
    with pytest.raises(ValueError, match=message):
        build().decode(tokens, mask)


def test_masked_tokens_may_be_anything():
    model = build()
    tokens, mask = torch.tensor([[3, 1, 999, -7]]), torch.tensor([[True, True, False, True]])
    found = model.decode(tokens, mask)
    assert torch.equal(found.coords, model.decode(torch.tensor([[3, 1, -1, -1]], dtype=torch.int32)).coords)


# -------------------------------------------------------------------------------------------------- StructTokenBench

@pytest.mark.parametrize(("name", "theirs"), [("vq", "vanilla"), ("aminoaseed", "aminoaseed")])
def test_quantizers_match_structtokenbench(name, theirs):
    arrays = load_arrays("stb_losses_golden")
    expected = json.loads((GOLDEN / "stb_losses_golden.json").read_text())[f"q_{theirs}"]
    config = StructureModelConfig.from_dict(
        SMALL.to_dict() | {"codebook_size": 32, "codebook_embed_dim": 16, "quantizer": name})
    model = StructureVQModel(config).train()
    weights = to_structtokenbench(model) | {"quantizer.codebook.weight": arrays["q_codebook"]}
    if name == "aminoaseed":
        weights |= {"quantizer.linear_proj.weight": arrays["q_W"], "quantizer.linear_proj.bias": arrays["q_b"]}
    load_structtokenbench(model, weights)
    z = arrays["q_z"].clone().requires_grad_()
    out = model.quantize(z)
    (out.loss + out.quantized.square().sum()).backward()
    assert torch.equal(out.indices, arrays[f"q_idx_{theirs}"])
    torch.testing.assert_close(out.quantized, arrays[f"q_zq_{theirs}"], rtol=0, atol=1e-5)
    torch.testing.assert_close(z.grad, arrays[f"q_grad_z_{theirs}"], rtol=0, atol=1e-5)
    assert out.loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert out.losses["commit"].item() == pytest.approx(0.25 * expected["commitment_loss"], rel=1e-5)
    assert out.losses["codebook"].item() == pytest.approx(expected["quantization_loss"], rel=1e-5)
    parameter, gradient = {"vq": ("embedding.weight", "codebook"), "aminoaseed": ("map.weight", "W")}[name]
    found = dict(model.quantize.quantizer.named_parameters())[parameter].grad
    torch.testing.assert_close(found, arrays[f"q_grad_{gradient}_{theirs}"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("quantizer", ["vq", "aminoaseed"])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_weights_go_to_structtokenbench_and_back(backbone, quantizer, prefix):
    model, other = build(quantizer), build(quantizer, seed=1)
    coords, index = backbone
    tokens = model.encode(coords, None, index)
    assert not torch.equal(other.encode(coords, None, index), tokens)
    load_structtokenbench(other, {prefix + key: value for key, value in to_structtokenbench(model).items()})
    assert torch.equal(other.encode(coords, None, index), tokens)
    torch.testing.assert_close(other.decode(tokens).coords, model.decode(tokens).coords, rtol=0, atol=0)
    torch.testing.assert_close(other.quantize.codebook(), model.quantize.codebook(), rtol=0, atol=0)


def test_loaded_weights_count_as_a_codebook():
    weights = to_structtokenbench(build())
    model = build(curriculum=Curriculum(5, 5))
    load_structtokenbench(model, weights)
    assert model.quantize.has_codebook


def test_weights_that_do_not_fit_are_named():
    model = build()
    weights = to_structtokenbench(model)
    del weights["encoder.pre_vq_proj.bias"]
    weights["surplus"] = torch.zeros(1)
    weights["decoder.post_vq_proj.bias"] = torch.zeros(3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    message = (r"a file does not fit the model; missing: encoder.pre_vq_proj.bias; unexpected: surplus; of another "
               r"shape: decoder.post_vq_proj.bias \(3,\) instead of \(64,\)")
    with pytest.raises(ValueError, match=message):
        load_structtokenbench(model, weights, "a file")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_other_quantizers_are_refused():
    for function in (to_structtokenbench, lambda model: load_structtokenbench(model, {})):
        with pytest.raises(ValueError, match=r"VanillaVQ .* and AminoAseed .*, no 'ema'"):
            function(build("ema"))
