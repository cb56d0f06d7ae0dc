"""Structure decoder: parity with ESM3 on identical weights, heads against plain formulas, padding, precision."""

from __future__ import annotations

import json
import math

import pytest
import torch
from golden_fill import GOLDEN, fill_values, load_arrays, load_shapes
from torch.nn import functional as F

from protein import structure_decoder
from protein.structure_decoder import (
    ESM3Decoder,
    VectorDecoder,
    backbone,
    expected_plddt,
    predicted_aligned_error,
    predicted_tm,
)


@pytest.fixture(scope="module")
def golden():
    return load_arrays("esm3_decoder_golden")


@pytest.fixture(scope="module")
def esm3():
    """The decoder at ESM3's sizes: 2.5 GB of weights, which it takes over without a copy."""
    weights = fill_values(load_shapes("esm3_decoder_keys"))
    checks = json.loads((GOLDEN / "esm3_fill_checks.json").read_text())["decoder"]
    assert checks.keys() == weights.keys()
    for key, (first, last, *_) in checks.items():  # the last number drawn depends on all before it
        value = weights[key].flatten()
        assert [value[0].item(), value[-1].item()] == pytest.approx([first, last], rel=1e-6), key
    with torch.device("meta"):
        decoder = ESM3Decoder()
    decoder.load_state_dict(weights, assign=True)
    return decoder.eval().requires_grad_(False)


@pytest.fixture
def small():
    torch.manual_seed(0)
    decoder = VectorDecoder(dim=5, width=16, heads=2, layers=2).eval()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return decoder


# ----------------------------------------------------------------------------------------------------------- ESM3

def test_keys_and_shapes_are_esm3s():
    with torch.device("meta"):
        decoder = ESM3Decoder()
    assert {k: tuple(v.shape) for k, v in decoder.state_dict().items()} == load_shapes("esm3_decoder_keys")
    assert sum(v.numel() for v in decoder.state_dict().values()) == 618_552_905


@pytest.mark.parametrize("case", "ABC")
def test_structure_and_confidence_match_esm3(golden, esm3, case):
    tokens, mask = golden[f"{case}_tokens"], golden.get(f"{case}_attention_mask")  # C is padded
    decoded = esm3(tokens, mask)
    pae_logits = esm3.pair_logits(decoded.hidden, pae=True).pae
    rows = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    residues = tokens < 4096
    flat = torch.cat([decoded.rotation.flatten(-2), decoded.origin], dim=-1)
    for found, name, tolerance in ((decoded.coords, "bb_pred", 1e-3), (flat, "affine12", 1e-3),
                                   (decoded.plddt, "plddt", 1e-5)):
        torch.testing.assert_close(found[rows], golden[f"{case}_{name}"][rows], rtol=0, atol=tolerance)
        assert not found[~rows].any()
    torch.testing.assert_close(predicted_tm(pae_logits, residues), golden[f"{case}_ptm"], rtol=0, atol=1e-5)
    if f"{case}_pae" in golden:
        pae = predicted_aligned_error(pae_logits, residues)
        pairs = residues[:, :, None] & residues[:, None, :]
        torch.testing.assert_close(pae[pairs], golden[f"{case}_pae"][pairs], rtol=0, atol=1e-3)
        assert pae[~pairs].isnan().all()


def test_logits_and_hidden_states_match_esm3(golden, esm3):
    decoded = esm3(golden["A_tokens"])
    pairs = esm3.pair_logits(decoded.hidden, pae=True)
    together = torch.cat([pairs.distance, pairs.direction.flatten(-2), pairs.pae], dim=-1)[:, :8, :8]
    torch.testing.assert_close(together, golden["A_pairwise_logits_8x8"], rtol=0, atol=1e-4)
    torch.testing.assert_close(esm3.plddt_head(decoded.hidden), golden["A_plddt_logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(decoded.hidden[0, :4], golden["A_stack_norm_first4"], rtol=0, atol=1e-4)


def test_padding_must_be_masked(golden, esm3):
    tokens, mask = golden["C_tokens"][1:], golden["C_attention_mask"][1:]
    assert not mask.all()
    wrong = esm3(tokens).coords
    assert (wrong - golden["C_bb_pred"][1:])[mask].abs().max() > 1  # so the parity above shows that it is


# ----------------------------------------------------------------------------------------------------------- heads

@pytest.mark.parametrize("elements", [1, 128 * 7 * 3, 2**19])  # blocks of 1, 3 and all residues
def test_pair_logits_equal_the_plain_formula_in_values_and_gradients(small, monkeypatch, elements):
    monkeypatch.setattr(structure_decoder, "CPU_PAIR_ELEMENTS", elements)
    head = small.pairwise_classification_head
    hidden = torch.randn(2, 7, 16)

    def plain(x):
        q, k = head.downproject(x).chunk(2, dim=-1)
        q, k = q[:, None], k[:, :, None]  # entry (i, j): k of i, q of j
        pairs = head.norm(F.gelu(head.linear1(torch.cat([q * k, q - k], dim=-1))))
        return head.linear2(pairs).split([64, 96, 64], dim=-1)

    def ours(x):
        distance, direction, pae = head(x, True)
        assert direction.shape == (2, 7, 7, 6, 16)
        return distance, direction.flatten(-2), pae

    weight, results = torch.randn(2, 7, 7, 224), []
    for function in (ours, plain):
        leaf = hidden.clone().requires_grad_()
        head.zero_grad()
        out = torch.cat(function(leaf), dim=-1)
        (out * weight).sum().backward()
        results.append([out.detach(), leaf.grad, *(p.grad.clone() for p in head.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    without = head(hidden, False)
    assert without.pae is None
    torch.testing.assert_close(without.distance, ours(hidden)[0])
    assert (without.distance - without.distance.transpose(1, 2)).abs().max() > 0.1, "else i and j could be swapped"


def test_pair_logits_have_the_gradients_of_their_values():
    torch.manual_seed(0)
    q, k = torch.randn(2, 3, 64, dtype=torch.float64), torch.randn(2, 3, 64, dtype=torch.float64)
    shapes = ((128, 128), (128,), (128,), (2, 128), (1, 128))
    weights = [0.1 * torch.randn(shape, dtype=torch.float64) for shape in shapes]
    weights[1] += 1
    inputs = [t.requires_grad_() for t in (q, k, *weights)]
    assert torch.autograd.gradcheck(structure_decoder._PairLogits.apply, inputs, fast_mode=True)


def test_pair_logits_under_autocast(small):
    head, weight = small.pairwise_classification_head, torch.randn(2, 9, 9, 64)
    gradients = {}
    for enabled in (False, True):
        head.zero_grad()
        hidden = torch.linspace(-2, 2, 2 * 9 * 16).view(2, 9, 16).sin().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            distance = head(hidden, False).distance
        assert distance.dtype == (torch.bfloat16 if enabled else torch.float32)
        (distance * weight).sum().backward()  # outside autocast, as training loops have it
        gradients[enabled] = {"hidden": hidden.grad} | {name: p.grad.clone() for name, p in head.named_parameters()}
    for name, exact in gradients[False].items():
        found = gradients[True][name]
        assert found.dtype == torch.float32
        assert 0 < (found - exact).norm() < 0.03 * exact.norm(), name


def test_frames_are_rotations_and_atoms_have_ideal_geometry(small):
    decoded = small(torch.randn(2, 9, 5))
    r = decoded.rotation
    torch.testing.assert_close(r.transpose(-1, -2) @ r, torch.eye(3).expand_as(r), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(2, 9), rtol=0, atol=1e-5)
    n, ca, c = decoded.coords.unbind(-2)
    assert torch.equal(ca, decoded.origin)
    torch.testing.assert_close((n - ca).norm(dim=-1), torch.full((2, 9), math.hypot(0.5256, 1.3612)), rtol=0, atol=1e-5)
    torch.testing.assert_close((c - ca).norm(dim=-1), torch.full((2, 9), 1.5251), rtol=0, atol=1e-5)
    assert not torch.equal(decoded.coords[0], decoded.coords[1])


def test_backbone_lies_in_its_frame():
    angle = torch.tensor(math.pi / 2)
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0], [0, 0, 1]])
    found = backbone(turn, torch.tensor([1.0, 2.0, 3.0]))
    expected = torch.tensor([[1 - 1.3612, 2 + 0.5256, 3], [1, 2, 3], [1, 2 - 1.5251, 3]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_plddt_of_a_certain_and_of_an_open_answer():
    logits = torch.zeros(2, 50)
    logits[0, 49] = 100.0
    torch.testing.assert_close(expected_plddt(logits), torch.tensor([0.99, 0.5]))


def test_aligned_error_and_tm_of_certain_errors():
    length = 30
    logits = torch.full((1, length, length, 64), -100.0)
    logits[..., 0] = 100.0  # 0.25 Angstrom everywhere
    mask = torch.ones(1, length, dtype=torch.bool)
    mask[0, 25:] = False
    pae = predicted_aligned_error(logits, mask)
    torch.testing.assert_close(pae[0, :25, :25], torch.full((25, 25), 0.25))
    assert pae[0, 25:].isnan().all()
    assert pae[0, :, 25:].isnan().all()
    d0 = 1.24 * (25 - 15) ** (1 / 3) - 1.8
    torch.testing.assert_close(predicted_tm(logits, mask), torch.tensor([1 / (1 + (0.25 / d0) ** 2)]))
    # Frame 3 sees ten residues in the last bin and fifteen in the first, all others see everything in the last one.
    logits = torch.full((1, length, length, 64), -100.0)
    logits[..., 63] = 100.0
    logits[0, 3, :15, 63], logits[0, 3, :15, 0] = -100.0, 100.0
    near, far = 1 / (1 + (0.25 / d0) ** 2), 1 / (1 + (31.75 / d0) ** 2)
    torch.testing.assert_close(predicted_tm(logits, mask), torch.tensor([(15 * near + 10 * far) / 25]))
    torch.testing.assert_close(predicted_aligned_error(logits, mask)[0, 0, 1], torch.tensor(31.75))


def test_tm_of_a_chain_without_residues_is_0():
    logits = torch.randn(2, 4, 4, 64)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[1] = True
    found = predicted_tm(logits, mask)
    assert found[0] == 0
    assert 0 < found[1] < 1


# ------------------------------------------------------------------------------------------- padding and precision

def test_a_padded_batch_equals_its_chains_in_values_and_gradients(small):
    lengths = (11, 4, 1)
    singles = [torch.randn(1, length, 5) for length in lengths]
    z = torch.full((3, 11, 5), math.nan)
    mask = torch.zeros(3, 11, dtype=torch.bool)
    for i, single in enumerate(singles):
        z[i, : lengths[i]] = single
        mask[i, : lengths[i]] = True

    def loss(decoded, i):
        return (decoded.coords[i] * torch.arange(9.0).view(3, 3)).sum() + decoded.rotation[i].square().sum()

    leaf = z.clone().requires_grad_()
    decoded = small(leaf, mask)
    sum(loss(decoded, i) for i in range(3)).backward()
    trained = {name: p for name, p in small.named_parameters() if p.grad is not None}
    batched = {name: p.grad.clone() for name, p in trained.items()}
    assert leaf.grad.isfinite().all()
    assert not leaf.grad[~mask].any()
    small.zero_grad()
    for i, single in enumerate(singles):
        alone = small(single)
        for name in ("coords", "rotation", "origin", "plddt", "hidden"):
            found = getattr(decoded, name)
            torch.testing.assert_close(found[i, : lengths[i]], getattr(alone, name)[0], rtol=1e-4, atol=1e-4, msg=name)
            assert not found[i, lengths[i] :].any()
        loss(alone, 0).backward()
    for name, p in trained.items():
        torch.testing.assert_close(batched[name], p.grad, rtol=1e-3, atol=1e-3, msg=name)


def test_a_gap_in_the_mask_keeps_positions(small):
    z, mask = torch.randn(1, 6, 5), torch.ones(1, 6, dtype=torch.bool)
    mask[0, 2] = False
    gap, joined = small(z, mask).coords[mask], small(z[mask][None]).coords[0]
    assert (gap - joined).abs().max() > 1e-3, "positions are those in the array"
    z[0, 2] = math.inf
    torch.testing.assert_close(small(z, mask).coords[mask], gap, rtol=0, atol=0)


def test_a_chain_without_tokens_is_zero_and_its_gradients_are_finite(small):
    decoded = small(torch.randn(2, 4, 5), torch.tensor([[False] * 4, [True] * 4]))
    assert not decoded.coords[0].any()
    pairs = small.pair_logits(decoded.hidden)
    assert all(logits.isfinite().all() for logits in (pairs.distance, pairs.direction))
    (decoded.coords.sum() + pairs.distance.sum() + pairs.direction.sum()).backward()
    assert all(p.grad.isfinite().all() for p in small.parameters() if p.grad is not None)


def test_every_trained_weight_gets_a_gradient_and_the_others_are_frozen(small):
    decoded = small(torch.randn(2, 6, 5))
    pairs = small.pair_logits(decoded.hidden)
    (decoded.coords.square().sum() + pairs.distance.sum() + pairs.direction.square().sum()).backward()
    for name, p in small.named_parameters():
        assert p.requires_grad != name.startswith("plddt_head"), name
        assert (p.grad is not None) == p.requires_grad, name  # DistributedDataParallel would wait for it


def test_frames_stay_float32_under_autocast(small):
    with torch.no_grad():
        small.affine_output_projection.proj.bias[:3] += 5.0  # 50 Angstrom away, where bfloat16 has steps of 0.25
        z = torch.randn(1, 8, 5)
        expected = small(z)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            decoded = small(z)
            pairs = small.pair_logits(decoded.hidden)
    assert decoded.coords.dtype == decoded.rotation.dtype == decoded.plddt.dtype == torch.float32
    assert all(logits.isfinite().all() for logits in (pairs.distance, pairs.direction))
    r = decoded.rotation
    torch.testing.assert_close(r.transpose(-1, -2) @ r, torch.eye(3).expand_as(r), rtol=0, atol=1e-5)
    n, ca, _ = decoded.coords.unbind(-2)
    torch.testing.assert_close((n - ca).norm(dim=-1), torch.full((1, 8), math.hypot(0.5256, 1.3612)), rtol=0, atol=2e-5)
    error = (decoded.coords - expected.coords).abs().mean()
    assert 0 < error < 0.1 * expected.coords.std(), "what precedes the head ran in bfloat16"


@pytest.mark.parametrize(("width", "heads"), [(16, 3), (6, 2)])
def test_impossible_heads(width, heads):
    with pytest.raises(ValueError, match=f"decoder width {width} must be an even multiple of its {heads} heads"):
        VectorDecoder(4, width, heads, 1)
