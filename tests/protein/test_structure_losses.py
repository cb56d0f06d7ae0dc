"""Losses of the structure tokenizer: StructTokenBench's numbers, a slow definition, closed forms, masks, gradients."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from golden_fill import GOLDEN, load_arrays
from torch import Tensor

from protein import losses
from protein.geometry import virtual_cb
from protein.losses import (
    PADDING,
    UNKNOWN,
    binned_direction_loss,
    binned_distance_loss,
    direction_loss,
    distance_loss,
    inverse_folding_loss,
    sequence_ids,
    structure_losses,
)
from protein.structure_decoder import Decoded, PairLogits
from protein.structure_model import StructureModelConfig, StructureOutput, StructureVQModel

TERMS = ("distance", "direction", "binned_distance", "binned_direction", "inverse_folding")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


# ------------------------------------------------------------------------------------- the numbers of StructTokenBench


@pytest.fixture(scope="module")
def golden():
    arrays = {key: value for key, value in load_arrays("stb_losses_golden").items() if not key.startswith("q_")}
    arrays["dist_logits"] = arrays["dist_logits"].float()
    arrays["dir_logits"] = arrays["dir_logits"].float().unflatten(-1, (6, 16))
    values = json.loads((GOLDEN / "stb_losses_golden.json").read_text())
    return arrays, torch.ones(1, 24, dtype=torch.bool), {k: v for k, v in values.items() if isinstance(v, float)}


def test_values_of_structtokenbench(golden):
    arrays, mask, values = golden
    x, x_recon = arrays["x"], arrays["x_recon"]
    for as_coded in (False, True):  # one chain without breaks or padding: nothing to do wrong
        assert distance_loss(x_recon, x, mask, as_coded=as_coded).item() == pytest.approx(values["geom_dist"], 1e-5)
        assert direction_loss(x_recon, x, mask, as_coded=as_coded).item() == pytest.approx(values["geom_dir"], 1e-5)
    found = [binned_distance_loss(arrays["dist_logits"], x, mask, as_coded=c).item() for c in (False, True)]
    assert found == pytest.approx([values["binned_dist_cbfixed_squared"], values["binned_dist_stb"]], 1e-5)


@pytest.mark.parametrize(("name", "c_beta", "as_coded"), [
    ("stb", "cbeta_stb_batched", True), ("stb_cb_squared", "cbeta_stb_batched", False),
    ("cbfixed_plain", "cbeta_correct", True), ("cbfixed_squared", "cbeta_correct", False),
])
def test_each_defect_of_the_binned_distance(golden, name, c_beta, as_coded):
    arrays, mask, values = golden
    labels = losses._distance_bins(arrays[c_beta], as_coded)
    assert torch.equal(labels, arrays[f"dist_labels_{name}"].long())
    found = losses._pair_cross_entropy(arrays["dist_logits"], labels, mask, False)
    assert found.item() == pytest.approx(values["binned_dist_stb" if name == "stb" else f"binned_dist_{name}"], 1e-5)
    own = losses._c_beta_as_coded(arrays["x"]) if "stb" in c_beta else virtual_cb(arrays["x"])
    torch.testing.assert_close(own, arrays[c_beta], rtol=0, atol=1e-5)
    assert (labels.max() < 16) == as_coded  # squared edges leave three quarters of the bins empty


def test_binned_direction_of_structtokenbench(golden):
    arrays, mask, values = golden
    theirs = arrays["dir_labels"].long()
    assert losses._pair_cross_entropy(arrays["dir_logits"], theirs, mask, True).item() == pytest.approx(
        values["binned_dir"], 1e-5)
    # On the diagonal theirs is 7 or 8 by rounding, and so may ours be as coded; by default it is 8.
    noise = torch.eye(24, dtype=torch.bool)[..., None] & torch.tensor([0, 1, 0, 1, 1, 1], dtype=torch.bool)
    assert set(theirs[0][noise].tolist()) == {7, 8}
    for as_coded in (False, True):
        labels = losses._direction_bins(arrays["x"], as_coded)
        assert torch.equal(labels[0][~noise], theirs[0][~noise])
        assert set(labels[0][noise].tolist()) <= ({7, 8} if as_coded else {8})
        found = binned_direction_loss(arrays["dir_logits"], arrays["x"], mask, as_coded=as_coded)
        assert found.item() == pytest.approx(values["binned_dir"], abs=0.01)


# ------------------------------------------------------------------------------------- slow definitions, in float64


def chains(lengths=(9, 4, 7), *, seed=0, noise=0.7, dtype=torch.float64):
    """Coordinates, a prediction, logits, letters and a mask of chains with residues missing; a break in each."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = len(lengths), max(lengths)
    draw = {"generator": generator, "dtype": dtype}
    x = 2.5 * torch.randn(batch, length, 1, 3, **draw).cumsum(1) + torch.randn(batch, length, 3, 3, **draw)
    mask = torch.arange(length) < torch.tensor(lengths)[:, None]
    mask[0, 5:6] = False
    index = torch.arange(length).repeat(batch, 1)
    index[:, 2:] += 7
    pairs = torch.randn(batch, length, length, 64, **draw), torch.randn(batch, length, length, 6, 16, **draw)
    sequence = torch.randint(4, 24, (batch, length), generator=generator)
    sequence[0, 1] = UNKNOWN
    sequence[~mask] = PADDING
    return {
        "target": x, "predicted": x + noise * torch.randn(x.shape, **draw), "mask": mask, "residue_index": index,
        "distance": pairs[0], "direction": pairs[1], "letters": torch.randn(batch, length, 33, **draw),
        "sequence": sequence,
    }


def run(term: str, c: dict[str, Tensor], **options) -> Tensor:
    """One term of the case `chains` makes."""
    if term == "distance":
        return distance_loss(c["predicted"], c["target"], c["mask"], **options)
    if term == "direction":
        return direction_loss(c["predicted"], c["target"], c["mask"], c["residue_index"], **options)
    if term == "binned_distance":
        return binned_distance_loss(c["distance"], c["target"], c["mask"], **options)
    if term == "binned_direction":
        return binned_direction_loss(c["direction"], c["target"], c["mask"], **options)
    return inverse_folding_loss(c["letters"], c["sequence"], c["mask"], **options)


LEARNT = dict(zip(TERMS, ("predicted", "predicted", "distance", "direction", "letters"), strict=True))


def slow_entries(term: str, c: dict[str, Tensor], b: int) -> list[float]:
    """Entries of chain b, whose mean is the loss, one by one from the definitions."""
    x, y, mask, index = (c[key][b].numpy() for key in ("predicted", "target", "mask", "residue_index"))
    residues = np.flatnonzero(mask)
    unit = lambda v: v / np.linalg.norm(v)  # noqa: E731
    cross_entropy = lambda logits, k: math.log(np.exp(logits).sum()) - logits[k]  # noqa: E731
    if term == "distance":
        atoms = [(i, a) for i in residues for a in range(3)]
        norm = np.linalg.norm
        return [min((norm(x[p] - x[q]) - norm(y[p] - y[q])) ** 2, 25) for p in atoms for q in atoms]
    if term == "direction":
        def vectors(z):
            for i in range(1, len(mask) - 1):
                if mask[i - 1 : i + 2].all() and index[i] - index[i - 1] == index[i + 1] - index[i] == 1:
                    u, v = z[i, 1] - z[i, 0], z[i, 2] - z[i, 1]
                    before, after = z[i, 0] - z[i - 1, 2], z[i + 1, 0] - z[i, 2]
                    yield from (u, v, after, -np.cross(u, v), np.cross(before, u), np.cross(v, after))
        vx, vy = list(vectors(x)), list(vectors(y))
        n = range(len(vx))
        return [min((vx[i] @ vx[j] - vy[i] @ vy[j]) ** 2, 20) for i in n for j in n]
    if term == "binned_distance":
        edges = [0] + [2.3125 + 0.3075 * k for k in range(63)]
        cb = virtual_cb(c["target"][b]).numpy()
        bins = lambda d: sum(d >= edge for edge in edges) - 1  # noqa: E731
        logits = c["distance"][b].numpy()
        return [cross_entropy(logits[i, j], bins(np.linalg.norm(cb[i] - cb[j]))) for i in residues for j in residues]
    if term == "binned_direction":
        sides = [(z[2] - z[1], z[0] - z[1]) for z in y]
        frames = [(unit(u), unit(v), unit(np.cross(u, v))) for u, v in sides]
        entries = []
        for i in residues:
            for j in residues:
                (ai, bi, ni), (aj, bj, nj) = frames[i], frames[j]
                dots = [ai @ bj, ai @ nj, bi @ aj, bi @ nj, ni @ aj, ni @ bj]
                for k, dot in enumerate(dots):
                    bin_ = 8 if i == j and k not in (0, 2) else min(math.floor((dot + 1) / 0.125), 15)
                    entries.append(cross_entropy(c["direction"][b, i, j, k].numpy(), bin_))
        return entries
    letters = c["sequence"][b].numpy()
    return [cross_entropy(c["letters"][b, i].numpy(), letters[i]) for i in residues if letters[i] != UNKNOWN]


@pytest.mark.parametrize("term", TERMS)
def test_equals_the_slow_definition(term):
    case = chains()
    entries = [slow_entries(term, case, b) for b in range(3)]
    means = [np.mean(e) for e in entries if e]
    assert len(means) == (3 if term != "direction" else 2)  # four residues with a break: none has both neighbours
    assert run(term, case).item() == pytest.approx(np.mean(means), rel=1e-12)
    assert np.mean(means) != pytest.approx(np.mean(np.concatenate(entries)), rel=1e-4)  # one mean over all is another


def test_as_coded_is_what_the_code_does():
    """Steps of StructTokenBench on a padded batch with breaks, done again in place as it does them."""
    c = chains()
    x, y, mask = c["predicted"].clone(), c["target"].clone(), c["mask"]
    x[~mask] = y[~mask] = 0
    atoms = mask.repeat(1, 3)
    pairs = atoms[:, :, None] & atoms[:, None]
    error = (torch.cdist(x.flatten(1, 2), x.flatten(1, 2)) - torch.cdist(y.flatten(1, 2), y.flatten(1, 2))).square()
    torch.testing.assert_close(run("distance", c, as_coded=True), error.clamp(max=25)[pairs].mean())

    def products(z):
        n, ca, end = z.unbind(2)
        bond = n[:, 1:] - end[:, :-1]
        u, v = (ca - n)[:, 1:-1], (end - ca)[:, 1:-1]
        before, after = bond[:, :-1], bond[:, 1:]
        parts = [u, v, after, -u.cross(v, dim=-1), before.cross(u, dim=-1), v.cross(after, dim=-1)]
        return torch.cat(parts, 1) @ torch.cat(parts, 1).mT

    vectors = mask[:, 1:-1].repeat(1, 6)
    error = (products(x) - products(y)).square().clamp(max=20)
    expected = error[vectors[:, :, None] & vectors[:, None]].mean()
    torch.testing.assert_close(run("direction", c, as_coded=True), expected)

    known = c["letters"][mask].log_softmax(-1).gather(1, c["sequence"][mask][:, None])
    torch.testing.assert_close(run("inverse_folding", c, as_coded=True), -known.mean())  # X is a letter like the others
    for term in TERMS:
        assert run(term, c, as_coded=True).item() != pytest.approx(run(term, c).item(), rel=1e-4), term


def test_c_beta_as_coded_depends_on_the_crop_and_on_the_batch():
    y = chains((8, 8, 8))["target"]
    wrong, crop, batch = (losses._c_beta_as_coded(z) for z in (y[:2], y[:2, :4], y))
    assert not torch.allclose(wrong[:, :4], crop, atol=0.01)
    assert not torch.allclose(wrong, batch[:2], atol=0.01)
    torch.testing.assert_close(virtual_cb(y[:2])[:, :4], virtual_cb(y)[:2, :4])


# ------------------------------------------------------------------------------------------------- closed forms


def one_hot(labels, bins):
    return 100.0 * torch.nn.functional.one_hot(labels, bins)


def test_perfect_predictions_cost_nothing():
    c = chains()
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    rotation *= torch.linalg.det(rotation)
    moved = c | {"predicted": c["target"] @ rotation.T + torch.tensor([3.0, -50.0, 8.0], dtype=torch.float64)}
    for case in (c | {"predicted": c["target"]}, moved):
        assert run("distance", case).item() < 1e-20
        assert run("direction", case).item() < 1e-20
    right = c | {
        "distance": one_hot(losses._distance_bins(virtual_cb(c["target"]), False), 64),
        "direction": one_hot(losses._direction_bins(c["target"], False), 16),
        "letters": one_hot(c["sequence"], 33),
    }
    for term in TERMS[2:]:
        assert run(term, right).item() < 1e-30, term
        wrong = right | {LEARNT[term]: right[LEARNT[term]].roll(1, -1)}
        assert run(term, wrong).item() == pytest.approx(100.0), term


def test_a_mirror_image_is_told_by_directions_only():
    c = chains()
    mirrored = c | {"predicted": c["target"] * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)}
    assert run("distance", mirrored).item() < 1e-20
    assert run("direction", mirrored).item() > 1.0


def test_no_information_costs_the_logarithm_of_the_bins():
    c = chains()
    for term, bins in (("binned_distance", 64), ("binned_direction", 16), ("inverse_folding", 33)):
        assert run(term, c | {LEARNT[term]: torch.zeros_like(c[LEARNT[term]])}).item() == pytest.approx(math.log(bins))


def test_errors_are_clamped():
    y = torch.zeros(1, 2, 3, 3)
    x = y.clone()
    x[0, 1] = 100.0
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert distance_loss(x, y, mask).item() == 25.0 * 18 / 36  # of 36 ordered pairs, 18 are across residues
    y = torch.randn(1, 9, 3, 3)
    mask = torch.ones(1, 9, dtype=torch.bool)
    assert 10 < direction_loss(1000 * y, y, mask).item() <= 20


def test_edges_belong_to_the_bin_above():
    for distance, as_coded, label in ((0, 0, 0), (2.3124, 0, 0), (2.3125, 0, 1), (2.6201, 0, 2), (21.377, 0, 62),
                                      (21.378, 0, 63), (500, 0, 63), (5.34, 1, 0), (5.35, 1, 1), (456, 1, 62)):
        points = torch.tensor([[[0.0, 0, 0], [0, distance, 0]]])
        assert losses._distance_bins(points, bool(as_coded))[0, 0, 1] == label, (distance, as_coded)


def test_a_residues_own_products_do_not_depend_on_rounding():
    y = chains((20,), noise=0, dtype=torch.float32)["target"]
    for seed in range(5):
        torch.manual_seed(seed)
        rotation, _ = torch.linalg.qr(torch.randn(3, 3))
        own = losses._direction_bins(y @ rotation.T, False).diagonal(dim1=1, dim2=2)
        assert (own[:, [1, 3, 4, 5]] == 8).all()


def test_a_break_is_no_bond():
    c = chains((12,), noise=0.02)
    c["mask"][:] = True
    plain = c | {"residue_index": torch.arange(12)[None]}
    moved = {key: value.clone() for key, value in c.items()}
    moved["predicted"][:, 2:] += 40.0  # the part behind the break goes elsewhere
    torch.testing.assert_close(run("direction", c), run("direction", moved))
    assert run("direction", plain | {"predicted": moved["predicted"]}) > 1.2 * run("direction", plain)
    assert torch.equal(run("direction", c, as_coded=True), run("direction", plain, as_coded=True))
    without = direction_loss(c["predicted"], c["target"], c["mask"])  # no residue_index: no breaks
    assert torch.equal(without, run("direction", plain))
    # Numbers that go back, or stay, are no chain either.
    for step in (0, -1):
        odd = c | {"residue_index": torch.tensor([[0, 1, *range(1 + step, 11 + step)]])}
        assert torch.equal(run("direction", odd), run("direction", c))


# ------------------------------------------------------------------------------------------------- masks and batches


def value_and_gradient(term, case):
    leaf = case[LEARNT[term]].detach().clone().requires_grad_()
    value = run(term, case | {LEARNT[term]: leaf})
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, 1e9])
def test_what_is_masked_changes_nothing(term, garbage):
    c = chains(dtype=torch.float32)
    mask = c["mask"]
    spoilt = {key: value.clone() for key, value in c.items()}
    for key in ("predicted", "target", "letters"):
        spoilt[key][~mask] = garbage
    for key in ("distance", "direction"):
        spoilt[key][~(mask[:, :, None] & mask[:, None])] = garbage
    spoilt["sequence"][~mask] = 17
    before = {key: value.clone() for key, value in spoilt.items()}
    (value, gradient), (spoilt_value, spoilt_gradient) = (value_and_gradient(term, case) for case in (c, spoilt))
    assert torch.equal(value, spoilt_value)
    assert torch.equal(gradient, spoilt_gradient)
    assert gradient.abs().max() > 0
    masked = ~(mask[:, :, None] & mask[:, None]) if term.startswith("binned") else ~mask
    assert not gradient[masked].any()
    run(term, spoilt, as_coded=True)
    for key, array in before.items():
        torch.testing.assert_close(spoilt[key], array, rtol=0, atol=0, equal_nan=True)  # nothing is written in place


@pytest.mark.parametrize("term", TERMS)
def test_padding_and_the_rest_of_the_batch_change_nothing(term):
    c = chains()
    whole, gradient = value_and_gradient(term, c)
    used, parts = [], []
    for b, length in enumerate((9, 4, 7)):
        rows = {key: value[b : b + 1, :length] for key, value in c.items()}
        rows["distance"], rows["direction"] = (rows[key][:, :, :length] for key in ("distance", "direction"))
        value, alone = value_and_gradient(term, rows)
        if term == "direction" and b == 1:
            assert value == 0
            assert not alone.any()
            continue
        parts.append(value)
        used.append((gradient[b, :length], alone[0]))
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    for together, alone in used:
        alone = alone / len(parts)
        torch.testing.assert_close(together[:, : alone.shape[1]] if term.startswith("binned") else together, alone)


@pytest.mark.parametrize("term", TERMS)
def test_nothing_to_score_is_zero(term):
    c = chains()
    c["mask"][:] = False
    for as_coded in (False, True):
        leaf = c[LEARNT[term]].clone().requires_grad_()
        value = run(term, c | {LEARNT[term]: leaf}, as_coded=as_coded)
        assert value == 0
        assert not torch.autograd.grad(value, leaf)[0].any()


# ------------------------------------------------------------------------------------------------- gradients, precision


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("as_coded", [False, True])
def test_gradients(term, as_coded):
    c = chains((5, 4), seed=3, noise=0.3)
    c["mask"][0, 3] = False
    c["residue_index"] = torch.arange(5).repeat(2, 1)
    leaf = c[LEARNT[term]].requires_grad_()
    assert torch.autograd.gradcheck(lambda value: run(term, c | {LEARNT[term]: value}, as_coded=as_coded), leaf,
                                    fast_mode=True)


def test_gradients_are_finite_where_atoms_coincide():
    y = chains((6,), dtype=torch.float32)["target"]
    mask = torch.ones(1, 6, dtype=torch.bool)
    for x in (torch.zeros_like(y), y[:, :1].expand_as(y).clone()):
        x.requires_grad_()
        value = distance_loss(x, y, mask) + direction_loss(x, y, mask)
        (gradient,) = torch.autograd.grad(value, x)
        assert value > 1
        assert gradient.isfinite().all()


def test_float32_is_exact_far_from_the_origin():
    c = chains((40,))
    for key in ("predicted", "target"):
        c[key] = (1024 * c[key]).round() / 1024  # so that float32 holds them 2048 away
    _, exact = value_and_gradient("distance", c)
    far = c | {key: (c[key] + 2048).float() for key in ("predicted", "target")}
    _, gradient = value_and_gradient("distance", far)
    assert (gradient - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize("term", TERMS)
def test_float32_under_autocast(term):
    c = chains(dtype=torch.float32)
    value, gradient = value_and_gradient(term, c)
    with torch.autocast("cpu", torch.bfloat16):
        low_value, low_gradient = value_and_gradient(term, c)
    assert torch.equal(low_value, value)
    assert torch.equal(low_gradient, gradient)
    half = c | {key: c[key].bfloat16() for key in ("predicted", "distance", "direction", "letters")}
    half_value, half_gradient = value_and_gradient(term, half)
    assert half_value.dtype == torch.float32
    assert half_gradient.dtype == torch.bfloat16
    rounded = {key: value.float() if value.dtype == torch.bfloat16 else value for key, value in half.items()}
    torch.testing.assert_close(half_value, run(term, rounded), **TOLERANCE)


@pytest.mark.parametrize("term", TERMS)
def test_blocks_change_nothing(term, monkeypatch):
    case = chains()
    value, gradient = value_and_gradient(term, case)
    monkeypatch.setattr(losses, "_CPU_ELEMENTS", 170)
    blocks, block_gradient = value_and_gradient(term, case)
    torch.testing.assert_close(blocks, value, rtol=1e-12, atol=0)
    torch.testing.assert_close(block_gradient, gradient, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("term", TERMS)
def test_without_gradients_and_with_two_backward_passes(term):
    case = chains()
    value, gradient = value_and_gradient(term, case)
    leaf = case[LEARNT[term]].requires_grad_()
    with torch.no_grad():
        assert torch.equal(run(term, case), value)
    loss = 3 * run(term, case)
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    torch.testing.assert_close(first, 3 * gradient)
    assert torch.equal(first, second)


# ------------------------------------------------------------------------------------------------- alphabet, all terms


def test_alphabet_is_that_of_esm():
    assert sequence_ids("LAGVSERTIDPKQNFYMHWC").tolist() == list(range(4, 24))
    assert sequence_ids("XBUZO").tolist() == [UNKNOWN, 25, 26, 27, 28] == [24, 25, 26, 27, 28]
    assert sequence_ids("MKV").dtype == torch.int64
    for wrong in ("ACx", "AC-", "AC.", "A C", "ÄC"):
        with pytest.raises(ValueError, match="is none of the amino acids"):
            sequence_ids(wrong)


def test_unknown_residues_are_not_scored():
    c = chains()
    value, gradient = value_and_gradient("inverse_folding", c)
    assert c["sequence"][0, 1] == UNKNOWN
    assert not gradient[0, 1].any()
    spoilt = c["letters"].clone()
    spoilt[0, 1] = math.nan
    assert torch.equal(run("inverse_folding", c | {"letters": spoilt}), value)


def output(case, **changes):
    c = case | changes
    decoded = Decoded(c["predicted"], *[torch.zeros(())] * 4)
    return StructureOutput(decoded, PairLogits(c["distance"], c["direction"], None), c["letters"], None, c["mask"])


@pytest.mark.parametrize("as_coded", [False, True])
def test_all_terms_at_once(as_coded):
    c = chains()
    found = structure_losses(output(c), c["target"], c["sequence"], c["residue_index"], as_coded=as_coded)
    assert tuple(found) == TERMS
    for term, value in found.items():
        assert torch.equal(value, run(term, c, as_coded=as_coded)), term
    atoms = torch.cat([c["target"], torch.full_like(c["target"][:, :, :2], math.nan)], dim=2)  # O and CB are not read
    assert torch.equal(structure_losses(output(c), atoms, c["sequence"], c["residue_index"])["distance"],
                       run("distance", c))


def test_every_trained_weight_of_the_model_learns():
    torch.manual_seed(0)
    config = StructureModelConfig(encoder_width=32, encoder_heads=4, encoder_layers=1, decoder_width=32,
                                  decoder_heads=2, decoder_layers=1, codebook_size=8, codebook_embed_dim=8)
    model, c = StructureVQModel(config), chains((9, 6), dtype=torch.float32)
    c["target"][~c["mask"]] = math.nan
    out = model(c["target"], c["mask"], c["residue_index"])
    terms = structure_losses(out, c["target"], c["sequence"], c["residue_index"])
    (sum(terms.values()) + out.quantized.loss).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(("change", "message"), [
    ({"mask": torch.ones(3, 9)}, "must be bool"),
    ({"mask": torch.ones(3, 8, dtype=torch.bool)}, "must be bool"),
    ({"target": torch.zeros(3, 9, 2, 3)}, "must be"),
    ({"residue_index": torch.zeros(3, 8)}, "residue_index"),
    ({"distance": torch.zeros(3, 9, 8, 64)}, "logits"),
    ({"direction": torch.zeros(3, 9, 9, 96)}, "logits"),
    ({"sequence": torch.zeros(3, 8, dtype=torch.int64)}, "sequence"),
])
def test_shapes_that_do_not_fit(change, message):
    c = chains() | change
    with pytest.raises(ValueError, match=message):
        structure_losses(output(c), c["target"], c["sequence"], c["residue_index"])
