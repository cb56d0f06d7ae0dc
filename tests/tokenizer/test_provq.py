"""provq.py in one process: curriculum, quantizers, the ProVQ wrapper, its state and its behaviour under autograd."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from workers.provq_cases import RECIPES, STRAIGHT_THROUGH, quantizer

from tokenizer import provq
from tokenizer.provq import (
    AdaptiveWarmup,
    Curriculum,
    EMAVectorQuantizer,
    ProVQ,
    VectorQuantizer,
    make_quantizer,
)

every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _at(step: int, recipe: str = "vq", curriculum: Curriculum | None = None, **options) -> ProVQ:
    """A ProVQ in training mode at `step` of (2, 4) steps, its codebook kept as it is once the warm-up is over."""
    made = ProVQ(quantizer(recipe), curriculum or Curriculum(2, 4, loss_floor=0.25), **options)
    made.set_step(step)
    if made.needs_init:
        made.init_codebook(None)
    return made


# -------------------------------------------------------------------------------------------------- curriculum

def test_equations_3_and_4():
    curriculum = Curriculum(warmup_steps=3, transition_steps=8, loss_floor=0.3)
    for step in range(20):
        t = step - 3
        alpha = 1.0 if t < 0 else 0.0 if t >= 8 else 0.5 * (1 + math.cos(math.pi * t / 8))
        omega = 0.0 if t < 0 else 0.3 + 0.7 * (1 - alpha)
        assert curriculum.stage(step) == (1 if t < 0 else 2 if t < 8 else 3)
        assert curriculum.alpha(step) == pytest.approx(alpha, abs=1e-15)
        assert curriculum.omega(step) == pytest.approx(omega, abs=1e-15)
    assert curriculum.alpha(3) == 1.0
    assert curriculum.omega(3) == pytest.approx(0.3)
    assert curriculum.alpha(7) == pytest.approx(0.5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "exp"])
def test_gradual_schedules_fall_from_one_to_zero(schedule):
    curriculum = Curriculum(5, 1000, schedule=schedule)
    alpha = [curriculum.alpha(s) for s in range(1010)]
    assert alpha[:6] == [1.0] * 6
    assert alpha[1005:] == [0.0] * 5
    assert all(a > b for a, b in itertools.pairwise(alpha[5:1006]))
    assert alpha[1004] < 0.006, "no jump at the end"
    omega = [curriculum.omega(s) for s in range(5, 1010)]
    assert all(a <= b for a, b in itertools.pairwise(omega))


def test_the_hard_schedule_holds_one_and_drops():
    curriculum = Curriculum(2, 5, schedule="hard", loss_floor=0.4)
    assert [curriculum.alpha(s) for s in range(9)] == [1.0] * 7 + [0.0] * 2
    assert [curriculum.omega(s) for s in range(9)] == [0.0] * 2 + [0.4] * 5 + [1.0] * 2


def test_a_callable_schedule_sees_the_progress():
    seen = []
    curriculum = Curriculum(2, 4, schedule=lambda u: seen.append(u) or 1 - u * u)
    assert [curriculum.alpha(s) for s in range(8)] == [1.0, 1.0, 1.0, 0.9375, 0.75, 0.4375, 0.0, 0.0]
    assert seen == [0.0, 0.25, 0.5, 0.75]
    with pytest.raises(ValueError, match=r"alpha = 1\.5 at step 3"):
        Curriculum(2, 4, schedule=lambda u: 1.5).alpha(3)  # noqa: ARG005
    with pytest.raises(ValueError, match="nan"):
        Curriculum(2, 4, schedule=lambda u: math.nan).omega(3)  # noqa: ARG005


@pytest.mark.parametrize(("lengths", "stages"), [
    ((0, 0), [3, 3, 3, 3]), ((2, 0), [1, 1, 3, 3]), ((0, 2), [2, 2, 3, 3]), ((1, 1), [1, 2, 3, 3]),
])
def test_a_stage_of_length_zero_is_skipped(lengths, stages):
    assert [Curriculum(*lengths).stage(s) for s in range(4)] == stages


@pytest.mark.parametrize(("arguments", "message"), [
    ({"warmup_steps": -1}, "warmup_steps"), ({"transition_steps": -1}, "transition_steps"),
    ({"loss_floor": 1.01}, "loss_floor"), ({"loss_floor": -0.01}, "loss_floor"), ({"loss_floor": math.nan}, "nan"),
    ({"schedule": "sine"}, "cosine, linear, exp, hard"),
])
def test_curriculum_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        Curriculum(**{"warmup_steps": 1, "transition_steps": 1, **arguments})


# -------------------------------------------------------------------------- values, gradients, lookup and encode

@every_recipe
def test_a_zero_curriculum_is_the_bare_quantizer_bit_for_bit(recipe):
    bare = quantizer(recipe).train()
    wrapped = ProVQ(copy.deepcopy(bare), Curriculum(0, 0)).train()
    cotangent = _normal(2 * 3 * 5, 4, seed=7)
    for step in range(3):
        z_bare = _normal(2, 4, 3, 5, seed=step).requires_grad_()
        z = z_bare.detach().clone().requires_grad_()
        wrapped.set_step(step)
        if step and isinstance(bare, EMAVectorQuantizer):
            bare.update_()
        expected = bare(z_bare.movedim(1, -1).reshape(-1, 4))
        ((expected.codes * cotangent).sum() + sum(expected.losses.values())).backward()
        out = wrapped(z)
        ((out.quantized.movedim(1, -1).reshape(-1, 4) * cotangent).sum() + out.loss).backward()
        assert torch.equal(out.quantized.movedim(1, -1).reshape(-1, 4), expected.codes)
        assert torch.equal(out.indices.flatten(), expected.indices)
        assert torch.equal(out.loss, sum(expected.losses.values()))
        assert out.loss.dtype == torch.float32
        assert {k: v.item() for k, v in out.losses.items()} == {k: v.item() for k, v in expected.losses.items()}
        assert torch.equal(z.grad, z_bare.grad)
        assert z.grad.abs().sum() > 0
        assert torch.equal(wrapped.codebook(), bare.codebook())
        for p, q in zip(wrapped.quantizer.parameters(), bare.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
            with torch.no_grad():
                p -= 0.1 * p.grad
                q -= 0.1 * q.grad
            p.grad = q.grad = None
    assert torch.equal(wrapped.usage()["counts"].sum(), torch.tensor(3 * 30))


@every_recipe
@pytest.mark.parametrize("step", range(2, 7))
def test_z_tilde_is_equation_2_and_the_loss_equation_4(recipe, step):
    model = _at(step, recipe)
    z = _normal(3, 4, 5)
    tokens = z.movedim(1, -1).reshape(-1, 4)
    bare = copy.deepcopy(model.quantizer)(tokens)
    alpha, omega = Curriculum(2, 4).alpha(step), Curriculum(2, 4, loss_floor=0.25).omega(step)
    out = model(z)
    mixed = alpha * model.quantizer.latent(tokens) + (1 - alpha) * bare.codes
    torch.testing.assert_close(out.quantized.movedim(1, -1).reshape(-1, 4), mixed)
    torch.testing.assert_close(out.loss, omega * sum(bare.losses.values()))
    for name, value in out.losses.items():
        assert torch.equal(value, bare.losses[name].detach()), "logged losses carry no weight"
        assert not value.requires_grad
    assert (model.alpha, model.omega) == (alpha, pytest.approx(omega))


@pytest.mark.parametrize("recipe", STRAIGHT_THROUGH)
@pytest.mark.parametrize("step", [0, 2, 3, 5, 6, 9])
def test_with_straight_through_z_tilde_moves_as_the_latent_at_any_alpha(recipe, step):
    model = _at(step, recipe)
    z = _normal(7, 4).requires_grad_()
    upstream = _normal(7, 4, seed=1)
    got, = torch.autograd.grad(model(z).quantized, z, upstream)
    expected, = torch.autograd.grad(model.quantizer.latent(z), z, upstream)
    torch.testing.assert_close(got, expected)
    if not model.quantizer.l2_norm:
        torch.testing.assert_close(got, upstream)


@every_recipe
def test_gradcheck_of_the_continuous_stage_and_of_the_losses(recipe):
    model = _at(0, recipe).double()
    mask = torch.tensor([[True, True, False], [True, False, True]])
    z = _normal(2, 4, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: model(t, mask).quantized, z, fast_mode=True)
    tokens = _normal(12, 4).double().requires_grad_()
    bare = model.quantizer.eval()
    assert torch.autograd.gradcheck(lambda t: bare(t).losses["commit"], tokens, fast_mode=True)
    for parameter in bare.parameters():
        assert torch.autograd.gradcheck(lambda _: bare(tokens.detach()).losses["codebook"], parameter, fast_mode=True)


@every_recipe
def test_losses_are_means_over_all_elements(recipe):
    bare = quantizer(recipe)
    x = _normal(9, 4)
    out = bare(x)
    squared = (bare.latent(x) - bare.codebook()[out.indices]).square().mean().item()
    assert out.losses["commit"].item() == pytest.approx(0.25 * squared, rel=1e-5)
    if "ema" in recipe:
        assert set(out.losses) == {"commit"}
        assert not list(bare.parameters())
    else:
        assert out.losses["codebook"].item() == pytest.approx(squared, rel=1e-5)


@every_recipe
@pytest.mark.parametrize("autocast", [False, True])
def test_lookup_encode_and_decode_agree_with_forward(recipe, autocast):
    model = _at(9, recipe).eval()
    z = _normal(2, 4, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        bare = model.quantizer(z.movedim(1, -1).reshape(-1, 4))
        out = model(z)
        codes = model.quantizer.lookup(bare.indices)
        shaped = model.quantizer.lookup(bare.indices.reshape(2, 4, -1))
        tokens, decoded = model.encode(z), model.decode(out.indices)
    assert bare.codes.dtype == codes.dtype == torch.float32
    assert torch.equal(codes, bare.codes)
    assert torch.equal(shaped, bare.codes.reshape(2, 4, -1, 4))
    assert torch.equal(tokens, out.indices)
    assert out.indices.shape == (2, 16, 16)
    assert torch.equal(decoded, out.quantized)
    assert len(tokens.unique()) > 6, "the premise: many codes are in use"


@every_recipe
def test_autocast_changes_nothing(recipe):
    plain, under = _at(4, recipe), _at(4, recipe)
    z = _normal(64, 4)
    expected = plain(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = under(z)
    assert torch.equal(out.quantized, expected.quantized)
    assert torch.equal(out.indices, expected.indices)
    assert torch.equal(out.loss, expected.loss)


@every_recipe
def test_half_precision_latents_keep_their_dtype(recipe):
    for step in (0, 4, 9):
        out = _at(step, recipe)(_normal(6, 4).bfloat16())
        assert out.quantized.dtype == torch.bfloat16
        assert out.loss.dtype == torch.float32


@pytest.mark.parametrize("l2_norm", [False, True])
def test_the_linear_map_trains_and_the_table_stays(l2_norm):
    bare = make_quantizer("simvq", 16, 4, l2_norm=l2_norm)
    table = bare.table.clone()
    bare(_normal(20, 4)).losses["codebook"].backward()
    assert {n for n, p in bare.named_parameters() if p.grad.abs().sum() > 0} == {"map.weight", "map.bias"}
    centroids = F.normalize(_normal(16, 4, seed=2), dim=1) if l2_norm else _normal(16, 4, seed=2)
    assert not torch.equal(bare.table, centroids)
    assert torch.equal(bare.table, table)
    bare.set_codebook_(centroids)
    torch.testing.assert_close(bare.codebook(), centroids, rtol=0, atol=1e-7)


# --------------------------------------------------------------------------------------- the rotation trick

def test_rotation_in_the_plane_takes_z_to_e():
    bare = VectorQuantizer(1, 2, rotation=True)
    bare.set_codebook_(torch.tensor([[0.0, 3.0]]))
    z = torch.tensor([[2.0, 0.0]], requires_grad=True)
    codes = bare(z).codes
    assert codes.tolist() == [[0.0, 3.0]]
    jacobian = torch.autograd.functional.jacobian(lambda t: bare(t).codes[0], z)[:, 0]
    torch.testing.assert_close(jacobian, 1.5 * torch.tensor([[0.0, -1.0], [1.0, 0.0]]))  # |e|/|z| x a quarter turn


def test_rotation_is_a_scaled_rotation_in_any_dimension():
    bare = quantizer("vq-rotation", num_codes=8, dim=5)
    for seed in range(4):
        z = _normal(1, 5, seed=seed)
        out = bare(z)
        e = bare.lookup(out.indices)[0]
        assert torch.equal(out.codes[0], e)
        jacobian = torch.autograd.functional.jacobian(lambda t: bare(t).codes[0], z)[:, 0]
        scale = e.norm() / z.norm()
        torch.testing.assert_close(jacobian @ z[0], e, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(jacobian.t() @ jacobian, scale**2 * torch.eye(5), rtol=1e-4, atol=1e-5)
        assert torch.linalg.det(jacobian) > 0, "a rotation, not a reflection"
        normal = torch.linalg.svd(torch.stack([z[0], e])).Vh[2:]  # what is orthogonal to z and e does not turn
        torch.testing.assert_close(normal @ jacobian.t(), scale * normal, rtol=1e-4, atol=1e-5)


def test_rotation_stays_finite_at_its_singular_points():
    bare = VectorQuantizer(1, 2, rotation=True)
    bare.set_codebook_(torch.tensor([[1.0, 0.0]]))
    z = torch.tensor([[-2.0, 0.0], [0.0, 0.0], [1.0, 0.0]], requires_grad=True)
    codes = bare(z).codes
    codes.sum().backward()
    assert codes.tolist() == [[1.0, 0.0]] * 3
    assert z.grad.isfinite().all()


# ------------------------------------------------------------------------ stage 1, initialisation, eval, misuse

@every_recipe
def test_the_warm_up_never_touches_the_quantizer(recipe, monkeypatch):
    model = _at(0, recipe)
    before = copy.deepcopy(model.quantizer.state_dict())
    monkeypatch.setattr(model.quantizer, "forward", lambda x: pytest.fail("stage 1 called the quantizer"))  # noqa: ARG005
    z = _normal(2, 4, 5).requires_grad_()
    for step in range(2):
        model.set_step(step)
        out = model(z)
        (out.quantized.sum() + out.loss).backward()
    tokens = z.detach().movedim(1, -1).reshape(-1, 4)
    assert torch.equal(out.quantized.movedim(1, -1).reshape(-1, 4), model.quantizer.latent(tokens))
    assert (out.indices, out.losses, out.loss.item(), out.loss.dtype) == (None, {}, 0.0, torch.float32)
    for parameter in model.quantizer.parameters():  # a gradient, so that DDP sees it used, and it is zero
        assert parameter.grad is not None
        assert not parameter.grad.any()
    model.set_step(2)
    for name, value in model.quantizer.state_dict().items():
        assert torch.equal(value, before[name]), name
    usage = model.usage()
    assert (usage["usage"], usage["perplexity"], usage["counts"].sum().item()) == (0.0, 0.0, 0)


@pytest.mark.parametrize("recipe", ["vq", "vq-l2", "aminoaseed"])
def test_initialisation_forgets_what_adam_gathered_in_the_warm_up(recipe):
    encoder = torch.nn.Linear(3, 4)
    model = ProVQ(quantizer(recipe), Curriculum(50, 0), channel_dim=-1)
    optimizer = torch.optim.Adam([*encoder.parameters(), *model.parameters()], lr=1e-3, betas=(0.9, 0.95))
    x = _normal(200, 3)

    def train(step: int) -> None:
        model.set_step(step)
        if model.needs_init:
            model.init_codebook(encoder(x), optimizers=[optimizer])
            assert all(p not in optimizer.state for p in model.parameters())
            assert all(p in optimizer.state for p in encoder.parameters())
        out = model(encoder(x))
        optimizer.zero_grad()
        ((out.quantized - 1).square().mean() + out.loss).backward()
        optimizer.step()

    for step in range(50):
        train(step)
    parameter = next(model.quantizer.parameters())
    assert optimizer.state[parameter]["step"] == 50, "the premise: zero gradients advance Adam"
    train(50)
    # Adam's first step is lr x sign(gradient); with 50 stale zero gradients it would be 0.46 of that.
    assert optimizer.state[parameter]["step"] == 1
    codebook = model.codebook().detach().clone()
    assert codebook.isfinite().all()


@every_recipe
def test_initialisation_takes_the_centroids_of_the_latents(recipe):
    model = ProVQ(quantizer(recipe), Curriculum(1, 0))
    assert not model.needs_init
    model.set_step(1)
    assert model.needs_init
    latents = 3 * _normal(500, 4)
    info = model.init_codebook(latents, iters=5, seed=3)
    expected = provq.kmeans(model.quantizer.latent(latents), 16, iters=5, seed=3, spherical="l2" in recipe)
    torch.testing.assert_close(model.codebook(), expected.centroids, rtol=0, atol=1e-6)
    assert info == {"inertia": expected.inertia, "iterations": 5, "tokens": 500, "empty": 0}
    assert not model.needs_init
    assert model.has_codebook
    with pytest.raises(RuntimeError, match="called before"):
        model.init_codebook(latents)


@every_recipe
def test_initialisation_with_none_keeps_the_codes(recipe):
    model = ProVQ(quantizer(recipe), Curriculum(1, 0))
    before = model.codebook().detach().clone()
    model.set_step(1)
    assert model.init_codebook(None) == {}
    assert torch.equal(model.codebook(), before)
    assert not model.needs_init


def test_eval_is_discrete_exactly_when_there_is_a_codebook():
    z = _normal(5, 4)
    model = ProVQ(quantizer("vq"), Curriculum(2, 4)).eval()
    for step in (0, 3, 9):  # past the warm-up too: evaluating before init_codebook must not crash or lie
        model.set_step(step)
        out = model(z)
        assert out.indices is None
        assert torch.equal(out.quantized, z)
    with pytest.raises(RuntimeError, match="init_codebook"):
        model.encode(z)
    model.init_codebook(None)
    for step in (0, 3, 9):
        model.set_step(step)
        out = model(z)
        assert torch.equal(out.quantized, model.codebook()[out.indices])
    assert model.usage()["counts"].sum() == 0, "evaluation does not count"
    baseline = ProVQ(quantizer("vq"), Curriculum(0, 4)).eval()
    assert baseline(z).indices is not None


def test_training_past_the_warm_up_needs_the_codebook():
    model = ProVQ(quantizer("vq"), Curriculum(2, 4))
    model.set_step(2)
    with pytest.raises(RuntimeError, match=r"step 2 .*init_codebook"):
        model(_normal(5, 4))
    ProVQ(quantizer("vq"), Curriculum(0, 4))(_normal(5, 4))  # without a warm-up the codes train from the start


@pytest.mark.parametrize(("call", "error", "message"), [
    (lambda m: m(torch.zeros(2, 4, 3, dtype=torch.int64)), TypeError, "int64"),
    (lambda m: m(torch.zeros(2, 5, 4)), ValueError, "4 channels in dimension 1"),
    (lambda m: m(torch.zeros(4)), ValueError, "4 channels"),
    (lambda m: m(torch.zeros(2, 4, 3), torch.ones(2, 4, dtype=torch.bool)), ValueError, r"bool \(2, 3\)"),
    (lambda m: m(torch.zeros(2, 4, 3), torch.ones(2, 3)), ValueError, "float32"),
    (lambda m: m.encode(torch.zeros(2, 3, 3)), ValueError, "4 channels"),
    (lambda m: m.set_step(1.0), TypeError, "float"),
    (lambda m: m.set_step(torch.tensor(1)), TypeError, "Tensor"),
    (lambda m: m.set_step(True), TypeError, "bool"),
    (lambda m: m.set_step(-1), ValueError, "-1"),
    (lambda m: m.observe(1.0), RuntimeError, "adaptive"),
    (lambda m: m.init_codebook(torch.zeros(20, 3)), ValueError, "D = 4"),
    (lambda m: m.init_codebook(torch.zeros(3, 4)), ValueError, "16 tokens"),
    (lambda m: m.init_codebook(torch.full((30, 4), math.nan)), ValueError, "non-finite"),
    (lambda m: m.quantizer.set_codebook_(torch.zeros(16, 3)), ValueError, r"\(16, 4\)"),
])
def test_misuse_is_reported(call, error, message):
    with pytest.raises(error, match=message):
        call(ProVQ(quantizer("vq"), Curriculum(0, 0)))


def test_bad_construction_is_reported():
    with pytest.raises(TypeError, match="Linear lacks codebook"):
        ProVQ(torch.nn.Linear(4, 4), Curriculum(0, 0))
    with pytest.raises(ValueError, match="channel_dim"):
        ProVQ(quantizer("vq"), Curriculum(0, 0), channel_dim=2)
    with pytest.raises(ValueError, match="min_steps 9"):
        ProVQ(quantizer("vq"), Curriculum(5, 0), adaptive=AdaptiveWarmup(min_steps=9))
    with pytest.raises(ValueError, match="vq, simvq, aminoaseed, ema"):
        make_quantizer("fsq", 8, 4)
    for options in ({"num_codes": 0}, {"dim": 0}, {"beta": -1.0}):
        with pytest.raises(ValueError, match="need"):
            VectorQuantizer(**{"num_codes": 8, "dim": 4, **options})
    for options in ({"decay": 1.0}, {"decay": -0.1}, {"restart_below": -1.0}, {"restart_below": 1.5}):
        with pytest.raises(ValueError, match="decay"):
            EMAVectorQuantizer(8, 4, **options)
    for options in ({"patience": 0}, {"min_steps": -1}, {"mode": "best"}):
        with pytest.raises(ValueError, match="patience"):
            AdaptiveWarmup(**options)


def test_an_adaptive_warm_up_needs_a_warm_up():
    with pytest.raises(ValueError, match="warm"):
        ProVQ(quantizer("vq"), Curriculum(0, 5), adaptive=AdaptiveWarmup())


# ------------------------------------------------------------------------------------------------------- masks

@every_recipe
@pytest.mark.parametrize("step", [0, 4, 9])
@pytest.mark.parametrize("channel_dim", [1, -1])
@pytest.mark.parametrize("training", [True, False])
def test_masked_tokens_change_nothing(recipe, step, channel_dim, training):
    mask = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    results = []
    for padding in (math.nan, 1e9, 0.0):
        model = _at(step, recipe, channel_dim=channel_dim).train(training)
        z = _normal(2, 3, 5, 4)
        z[~mask] = padding
        z = z.movedim(-1, channel_dim).contiguous().requires_grad_()
        out = model(z, mask)
        (out.quantized.square().sum() + out.loss).backward()
        results.append((model, out, z))
        last = out.quantized.movedim(channel_dim, -1)
        assert last.shape == (2, 3, 5, 4)
        assert not last[~mask].any()
        assert last[mask].any()
        assert not z.grad.movedim(channel_dim, -1)[~mask].any()
        if out.indices is not None:
            assert (out.indices[~mask] == -1).all()
            assert (out.indices[mask] >= 0).all()
            assert torch.equal(model.encode(z, mask), out.indices)
            decoded = model.decode(out.indices)
            assert decoded.shape == z.shape
            assert not decoded.movedim(channel_dim, -1)[~mask].any()
            assert torch.equal(decoded.movedim(channel_dim, -1)[mask], model.codebook()[out.indices[mask]])
            expected = mask.sum().item() if training else 0
            assert model.pop_counts().sum().item() == expected
    first = results[0]
    for model, out, z in results[1:]:
        assert torch.equal(out.quantized, first[1].quantized)
        assert torch.equal(out.loss, first[1].loss)
        assert torch.equal(z.grad, first[2].grad)
        for p, q in zip(model.parameters(), first[0].parameters(), strict=True):
            assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)
    flat = _at(step, recipe).train(training)(_normal(2, 3, 5, 4)[mask])
    assert torch.equal(flat.quantized, first[1].quantized.movedim(channel_dim, -1)[mask])
    assert torch.equal(flat.loss, first[1].loss)


@every_recipe
def test_a_batch_without_valid_tokens(recipe):
    model = _at(4, recipe)
    before = model.codebook().detach().clone()
    z = _normal(2, 4, 3).requires_grad_()
    out = model(z, torch.zeros(2, 3, dtype=torch.bool))
    (out.quantized.sum() + out.loss).backward()
    assert out.loss.item() == 0.0
    assert not out.quantized.any()
    assert torch.equal(out.indices, torch.full((2, 3), -1))
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    model.set_step(5)
    torch.testing.assert_close(model.codebook(), before, rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------- adaptive warm-up

def _decisions(scores: list[float], every: int = 10, warmup: int = 100, **options) -> tuple[int | None, ProVQ]:
    model = ProVQ(quantizer("vq"), Curriculum(warmup, 5), adaptive=AdaptiveWarmup(**options))
    for n, score in enumerate(scores, 1):
        model.set_step(n * every)
        if model.observe(score):
            return n * every, model
    return None, model


def test_the_warm_up_ends_after_patience_checks_without_improvement():
    ended, model = _decisions([5, 4, 3, 3.5, 3.2, 3.1, 0], patience=3)
    assert ended == 60
    assert (model.stage, model.alpha, model.needs_init, model.curriculum.warmup_steps) == (2, 1.0, True, 60)
    assert [model.curriculum.stage(s) for s in (59, 60, 64, 65)] == [1, 2, 2, 3]
    assert _decisions([5, 4, 3, 2, 1], patience=1)[0] is None
    assert _decisions([5, 6, 4, 6, 3], patience=2)[0] is None, "an improvement starts the count again"
    assert _decisions([5, 5], patience=1)[0] == 20, "equal is not better"


@pytest.mark.parametrize("told", [True, False], ids=["after set_step(step + 1)", "before it"])
@pytest.mark.parametrize("length", [1, 4])
def test_the_transition_begins_with_the_step_after_a_score(told, length):
    """Whether a loop has said yet that its step is done: no step that trained in stage 1 becomes one of stage 2."""
    model = ProVQ(quantizer("vq"), Curriculum(100, length), adaptive=AdaptiveWarmup(patience=1))
    alphas = []
    for step in range(10):
        model.set_step(step)
        if model.needs_init:
            model.init_codebook(_normal(100, model.dim))
        model(_normal(2, model.dim, 15))
        alphas.append(model.alpha)
        if told:
            model.set_step(step + 1)
        if step in (3, 5):
            assert model.observe(1.0) is (step == 5)
    assert alphas[:6] == [1.0] * 6
    assert alphas[6:] == [model.curriculum.alpha(step) for step in range(6, 10)]
    assert (alphas[6], model.curriculum.warmup_steps) == (1.0, 6)


def test_min_delta_mode_and_min_steps():
    assert _decisions([5, 4.9, 4.8], patience=2, min_delta=0.5)[0] == 30
    assert _decisions([5, 4.4, 3.8], patience=2, min_delta=0.5)[0] is None
    assert _decisions([1, 2, 3, 2, 2], patience=2, mode="max")[0] == 50
    assert _decisions([1, 2, 3, 2, 2], patience=2, mode="min")[0] == 30
    assert _decisions([1, 2, 2, 2, 2, 2], patience=2, min_steps=50)[0] == 50
    assert _decisions([1, 2, 2, 2, 0.5, 2], patience=2, min_steps=50)[0] is None


def test_the_curriculum_bounds_the_adaptive_warm_up():
    model = ProVQ(quantizer("vq"), Curriculum(10, 5), adaptive=AdaptiveWarmup(patience=1))
    model.set_step(10)
    assert model.needs_init
    assert not model.observe(1.0)
    assert not model.observe(2.0), "the warm-up is over: a score decides nothing"
    assert model.curriculum.warmup_steps == 10
    with pytest.raises(ValueError, match="finite"):
        model.observe(math.nan)


def test_an_adaptive_decision_survives_a_checkpoint():
    scores = [5, 4, 4.5, 4.6, 4.7]
    for cut in range(5):
        _, model = _decisions(scores[:cut], patience=3)
        resumed = ProVQ(quantizer("vq"), Curriculum(100, 5), adaptive=AdaptiveWarmup(patience=3))
        resumed.load_state_dict(model.state_dict())
        ended = []
        for n, score in enumerate(scores[cut:], cut + 1):
            resumed.set_step(n * 10)
            ended.append(resumed.observe(score))
        assert ended == [False] * (4 - cut) + [True]
        again = ProVQ(quantizer("vq"), Curriculum(100, 5), adaptive=AdaptiveWarmup(patience=3))
        again.load_state_dict(resumed.state_dict())
        assert (again.stage, again.needs_init, again.curriculum) == (2, True, resumed.curriculum)
        assert again.curriculum.warmup_steps == 50
