"""Structure encoder: parity with ESM3 on identical weights, symmetries, padding, missing atoms, gradients."""

from __future__ import annotations

import json
import math

import pytest
import torch
from golden_fill import GOLDEN, fill_values, load_arrays, load_shapes
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from protein import geometry, structure_encoder
from protein.structure_encoder import StructureEncoder, pair_distance
from tokenizer.provq import nearest_code


@pytest.fixture(scope="module")
def golden():
    return load_arrays("esm3_encoder_golden")


@pytest.fixture(scope="module")
def weights():
    return fill_values(load_shapes("esm3_encoder_keys"))


@pytest.fixture(scope="module")
def esm3(weights):
    """The encoder at ESM3's sizes, and its codebook (4096, 128)."""
    encoder = StructureEncoder(1024, 128, 2, 128).eval().requires_grad_(False)
    encoder.load_state_dict({key: value for key, value in weights.items() if key != "codebook.embeddings"})
    return encoder, weights["codebook.embeddings"]


@pytest.fixture
def small():
    """An encoder in which every weight matters, the scales of the heads, which begin as zeros, among them."""
    torch.manual_seed(0)
    encoder = StructureEncoder(16, 4, 2, 6).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return encoder


def chain(golden, length=64):
    """Real backbones (1, L, 3, 3): the first residues of an actual chain."""
    return golden["A_coords"][:, :length].clone()


def rotation(seed):
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    q = q * r.diagonal().sign()
    q[:, 0] *= torch.linalg.det(q)
    return q


def moved(coords, seed, distance):
    """Turned, and moved that many Angstrom, in float64."""
    generator = torch.Generator().manual_seed(100 + seed)
    direction = F.normalize(torch.randn(3, generator=generator, dtype=torch.float64), dim=0)
    return (coords.double() @ rotation(seed).T + distance * direction).float()


def tokens(encoder, codebook, coords, mask=None, residue_index=None):
    z = encoder(coords, mask, residue_index)
    return z, nearest_code(z.flatten(0, 1), codebook).view(z.shape[:2])


# ----------------------------------------------------------------------------------------------------------- ESM3

def test_fill_rule_reproduces_the_golden_weights(weights):
    checks = json.loads((GOLDEN / "esm3_fill_checks.json").read_text())["encoder"]
    assert checks.keys() == weights.keys()
    for key, (first, last, total, norm) in checks.items():
        value = weights[key].double().flatten()
        assert value[0].item() == pytest.approx(first, rel=1e-6), key
        assert value[-1].item() == pytest.approx(last, rel=1e-6), key
        assert value.sum().item() == pytest.approx(total, rel=1e-5, abs=1e-3), key
        assert value.norm().item() == pytest.approx(norm, rel=1e-6), key


def test_keys_and_shapes_are_esm3s():
    with torch.device("meta"):
        encoder = StructureEncoder(1024, 128, 2, 128)
    shapes = {key: value for key, value in load_shapes("esm3_encoder_keys").items() if not key.startswith("codebook.")}
    assert {key: tuple(value.shape) for key, value in encoder.state_dict().items()} == shapes


@pytest.mark.parametrize("case", "ABCDEF")
def test_latents_and_tokens_match_esm3(golden, esm3, case):
    # A: plain. B: missing residues and a gap in the numbering. C: fewer residues than neighbours. D: padded batch with
    # inf. E: 8 valid residues. F: B without numbering.
    encoder, codebook = esm3
    z, found = tokens(encoder, codebook, golden[f"{case}_coords"], golden.get(f"{case}_attention_mask"),
                      golden.get(f"{case}_residue_index"))
    torch.testing.assert_close(z, golden[f"{case}_z"], rtol=0, atol=5e-5)
    assert torch.equal(found, golden[f"{case}_tokens"])


@pytest.mark.parametrize("mistake", ["15 neighbours", "offsets up to 31", "squared distances"])
def test_golden_latents_tell_a_different_encoder_from_esm3s(golden, esm3, monkeypatch, mistake):
    encoder, codebook = esm3
    if mistake == "15 neighbours":
        monkeypatch.setattr(encoder, "neighbours", 15)
    elif mistake == "offsets up to 31":
        monkeypatch.setattr(structure_encoder, "REACH", 31)
    else:
        monkeypatch.setattr(structure_encoder, "pair_distance", lambda a, b: pair_distance(a, b).square())
    z, found = tokens(encoder, codebook, golden["A_coords"], None, golden["A_residue_index"])
    assert (z - golden["A_z"]).abs().max() > 0.1
    assert (found != golden["A_tokens"]).sum() >= 4


@pytest.mark.parametrize("case", "BE")
def test_residues_without_a_whole_backbone_get_the_bias(golden, esm3, case):
    encoder, _ = esm3
    coords = golden[f"{case}_coords"]
    invalid = ~geometry.valid_residues(coords)
    assert invalid.any()
    z = encoder(coords)
    assert torch.equal(z[invalid], encoder.pre_vq_proj.bias.expand_as(z[invalid]))


@pytest.mark.parametrize("distance", [0, 10, 100, 1000])
def test_rotations_and_translations_change_no_token(golden, esm3, distance):
    encoder, codebook = esm3
    coords = golden["B_coords"]  # with missing residues
    for seed in range(3):
        z, found = tokens(encoder, codebook, moved(coords, seed, distance), None, golden["B_residue_index"])
        # A coordinate of 1000 Angstrom has float32 steps of 6e-5 Angstrom.
        torch.testing.assert_close(z, golden["B_z"], rtol=0, atol=6e-4 if distance == 1000 else 1e-4)
        assert torch.equal(found, golden["B_tokens"])


def test_a_mirror_image_has_other_tokens(golden, esm3):
    encoder, codebook = esm3
    coords = chain(golden) * torch.tensor([1.0, 1.0, -1.0])
    z, found = tokens(encoder, codebook, coords)
    assert (z - golden["A_z"]).abs().max() > 1
    assert (found != golden["A_tokens"]).sum() >= 60


# ---------------------------------------------------------------------------------------- padding, absence, extremes

def test_a_padded_batch_equals_its_chains_in_values_and_gradients(golden, small):
    lengths, index = (40, 7, 64), torch.arange(64).where(torch.arange(64) < 20, torch.arange(64) + 50)
    coords = torch.full((3, 64, 3, 3), math.nan)
    mask = torch.zeros(3, 64, dtype=torch.bool)
    weight = torch.randn(64, 6)  # an arbitrary loss that weights every latent
    singles = [chain(golden, length) + 5.0 * i for i, length in enumerate(lengths)]
    for i, single in enumerate(singles):
        coords[i, : lengths[i]] = single
        mask[i, : lengths[i]] = True

    z = small(coords, mask, index.expand(3, -1))
    (z * weight).masked_fill(~mask[..., None], 0).sum().backward()
    batched = {name: p.grad.clone() for name, p in small.named_parameters()}
    small.zero_grad()
    for i, (single, length) in enumerate(zip(singles, lengths, strict=True)):
        alone = small(single, None, index[None, :length])
        torch.testing.assert_close(z[i, :length], alone[0], rtol=0, atol=1e-4)  # of latents around 8
        (alone[0] * weight[:length]).sum().backward()
    for name, p in small.named_parameters():
        torch.testing.assert_close(batched[name], p.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_what_lies_at_absent_residues_changes_nothing(golden, small, garbage):
    coords = chain(golden, 24)
    mask = torch.ones(1, 24, dtype=torch.bool)
    mask[0, 20:] = False
    reference = coords.clone()
    reference[0, 20:] = 0.0
    reference[0, 5] = math.nan
    expected = small(reference, mask)
    coords[0, 20:] = garbage
    coords[0, 5, 2, 1] = garbage  # one number of one atom makes the residue absent
    coords.requires_grad_()
    z = small(coords, mask)
    torch.testing.assert_close(z, expected, rtol=0, atol=0)
    z.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in small.parameters())
    assert coords.grad.isfinite().all()
    assert not coords.grad[0, 20:].any()
    assert not coords.grad[0, 5].any()
    assert coords.grad[0, 6].any()


@pytest.mark.parametrize("length", [1, 2, 15, 16, 17])
def test_short_chains(golden, small, length):
    coords = chain(golden, length)
    z = small(coords)
    assert z.shape == (1, length, 6)
    assert z.isfinite().all()
    torch.testing.assert_close(z, reference_encoder(small, coords), rtol=0, atol=1e-4)  # of latents around 8


def test_one_residue_sees_itself_only(golden, small):
    coords = chain(golden, 20)
    alone = coords.clone()
    alone[:, 1:] = math.nan
    torch.testing.assert_close(small(alone)[:, 0], small(coords[:, :1])[:, 0], rtol=0, atol=1e-4)
    assert (small(coords)[:, 0] - small(alone)[:, 0]).abs().max() > 1e-2


def test_a_chain_without_coordinates(small):
    z = small(torch.full((2, 9, 3, 3), math.nan))
    torch.testing.assert_close(z, small.pre_vq_proj.bias.expand_as(z), rtol=0, atol=0)
    z.sum().backward()
    for name, p in small.named_parameters():  # all there, for DistributedDataParallel
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


def test_coinciding_residues_have_finite_gradients(small):
    coords = torch.tensor([[0.5, 1.4, 0.0], [0.0, 0.0, 0.0], [-1.5, 0.0, 0.0]]).expand(1, 20, 3, 3).clone()
    coords[0, 10:] = 3.0  # and N, CA, C in one point
    coords.requires_grad_()
    small(coords).square().sum().backward()
    assert coords.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in small.parameters())


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_memory_of_a_long_chain_is_bounded(golden, small, monkeypatch):
    length = 3000
    monkeypatch.setattr(geometry, "_PAIRS_AT_ONCE", 2**18)
    monkeypatch.setattr(structure_encoder, "CPU_HIDDEN_ELEMENTS", 2**19)
    coords = torch.cat([chain(golden) + 40.0 * i for i in range(-(-length // 64))], dim=1)[:, :length]
    with torch.no_grad(), LargestTensor() as largest:
        z = small(coords)
    assert z.isfinite().all()
    assert largest.elements <= max(2**19, length * 16 * 9) < length**2 / 10
    torch.testing.assert_close(z[:, 1000:1010], small(coords[:, 500:1500])[:, 500:510], rtol=0, atol=1e-4)


def test_only_differences_of_residue_numbers_matter_and_only_up_to_32(golden, small):
    coords, index = chain(golden), torch.arange(64)[None]
    z = small(coords, None, index)
    torch.testing.assert_close(small(coords), z, rtol=0, atol=0)
    torch.testing.assert_close(small(coords, None, index + 1000), z, rtol=0, atol=0)
    gap = index + 50 * (index >= 32)
    wider = index + 5000 * (index >= 32)
    torch.testing.assert_close(small(coords, None, gap), small(coords, None, wider), rtol=0, atol=0)
    assert (small(coords, None, gap) - z).abs().max() > 1e-2


def test_geometry_and_latents_stay_float32_under_autocast(golden, small):
    coords = chain(golden)
    with torch.no_grad():
        expected = small(coords)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            z, far = small(coords), small(coords + 500.0)
    assert z.dtype == torch.float32
    spread = expected.std()
    assert (z - expected).abs().mean() < 0.02 * spread
    assert (z - expected).abs().max() > 1e-4 * spread, "bfloat16 was used, or this test shows nothing"
    assert (far - z).abs().mean() < 0.02 * spread  # bfloat16 at 500 Angstrom has steps of 2 Angstrom


# ------------------------------------------------------------------------------------------------------- gradients

def reference_encoder(encoder, coords, residue_index=None):
    """The same function, written down as in the paper: every slot of every block, no tables, plain operations."""
    batch, length = coords.shape[:2]
    valid = geometry.valid_residues(coords)
    frames = geometry.backbone_frames(coords, valid)
    ca = torch.where(valid[..., None], coords[:, :, 1], 0.0)
    k = min(encoder.neighbours, length)
    number = torch.arange(length).expand(batch, -1) if residue_index is None else residue_index
    rows = []
    for b in range(batch):
        for i in range(length):
            if not valid[b, i]:
                rows.append(encoder.pre_vq_proj.bias)
                continue
            distance = (ca[b] - ca[b, i]).norm(dim=-1).detach().masked_fill(~valid[b], math.inf)
            distance[i] = -1
            order = distance.argsort(stable=True)[:k]
            order = order[distance[order].isfinite()]
            offset = (number[b, order] - number[b, i]).clamp(-32, 32) + 33
            x = encoder.relative_positional_embedding.embedding(offset)  # (S, d)
            r, t = frames.rotation[b, order], frames.origin[b, order]
            for block in encoder.transformer.blocks:
                attention = block.geom_attn
                h = attention.heads
                s = attention.proj(attention.s_norm(x))
                q, key, value, p, o = (part.unflatten(-1, (h, 3)) for part in s.split(3 * h, dim=-1))  # (S, h, 3)
                q, key, value, p, o = (torch.einsum("sxy,shy->shx", r, v) for v in (q, key, value, p, o))
                p, o = p + t[:, None], o + t[:, None]
                squared = (p[:, None] - o[None]).square().sum(-1)
                gap = torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)  # sqrt has no gradient at 0
                logits = (F.softplus(attention.rotation_scale_per_head) * torch.einsum("ihx,jhx->ijh", q, key)
                          - F.softplus(attention.distance_scale_per_head) * gap) / math.sqrt(3)
                out = torch.einsum("ijh,jhx->ihx", logits.softmax(1), value)
                out = torch.einsum("sxy,shx->shy", r, out)
                x = x + attention.out_proj(out.flatten(1))
                x = x + block.ffn(x)
            rows.append(encoder.pre_vq_proj(x[0]))
    return torch.stack(rows).view(batch, length, -1)


def test_latents_and_gradients_equal_a_plain_implementation(golden, small):
    coords = golden["B_coords"][:, :45].clone()  # with missing residues
    index = golden["B_residue_index"][:, :45]
    weight = torch.randn(45, 6)
    found = {}
    for name, function in (("ours", small), ("plain", lambda c, _, i: reference_encoder(small, c, i))):
        small.zero_grad()
        leaf = coords.clone().requires_grad_()
        z = function(leaf, None, index)
        (z[0] * weight).sum().backward()
        found[name] = {"z": z.detach(), "coords": leaf.grad} | {n: p.grad.clone() for n, p in small.named_parameters()}
    for name, expected in found["plain"].items():
        scale = expected.abs().max().item()
        assert scale > 0 or name.endswith("bias"), name
        torch.testing.assert_close(found["ours"][name], expected, rtol=1e-3, atol=1e-4 * max(scale, 1e-2), msg=name)


def test_pair_distance_is_differentiable():
    torch.manual_seed(0)
    a, b = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(3, 2, 5, dtype=torch.float64)
    expected = (a[..., :, None] - b[..., None, :]).square().sum(0).sqrt()
    torch.testing.assert_close(pair_distance(a, b), expected)
    assert torch.autograd.gradcheck(pair_distance, (a.requires_grad_(), b.requires_grad_()))


def test_swiglu_is_differentiable():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    swiglu = structure_encoder.SwiGLU()
    torch.testing.assert_close(swiglu(x), F.silu(x[:, :4]) * x[:, 4:])
    assert torch.autograd.gradcheck(swiglu, x)


def test_pair_distance_at_coinciding_points_and_far_away():
    a = torch.full((3, 1, 2), 1000.0)
    a[0, 0, 1] += 1e-3
    x, y = a.clone().requires_grad_(), a.clone().requires_grad_()
    distance = pair_distance(x, y)
    step = (a[0, 0, 1] - a[0, 0, 0]).item()
    torch.testing.assert_close(distance[0], torch.tensor([[0.0, step], [step, 0.0]]), rtol=1e-6, atol=0)
    distance.sum().backward()
    for grad, other in ((x.grad, y.grad), (y.grad, x.grad)):
        torch.testing.assert_close(grad[0, 0], torch.tensor([-1.0, 1.0]), rtol=1e-5, atol=1e-6)
        assert torch.equal(grad[1:], torch.zeros(2, 1, 2))
        assert torch.equal(grad, other)


def test_a_single_block_is_an_encoder_too(golden):
    torch.manual_seed(0)
    encoder = StructureEncoder(16, 4, 1, 6)
    coords = chain(golden, 20)
    torch.testing.assert_close(encoder(coords), reference_encoder(encoder, coords), rtol=0, atol=1e-5)
