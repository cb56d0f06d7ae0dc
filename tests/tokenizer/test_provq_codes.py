"""Beyond the paper, of the library: re-clustering, following codes, restarts; what each does, and nothing else."""

import ast
import copy
import os
import shutil
import subprocess
import sys

import pytest
import torch
from places import ROOT
from torch.nn import functional as F

from tokenizer.provq import (
    Curriculum,
    EMAVectorQuantizer,
    LinearVectorQuantizer,
    ProVQ,
    VectorQuantizer,
    kmeans,
    nearest_code,
)
from tokenizer.provq_codes import DeadCodeRestart, FollowingVectorQuantizer, place_codes_

K, D = 16, 4


def tokens(n=400, seed=0, scale=1.0, offset=0.0):
    return offset + scale * torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


def step(provq, optimizer, number, x):
    """One optimizer step of a quantizer alone."""
    provq.set_step(number)
    out = provq(x)
    optimizer.zero_grad()
    (out.loss + out.quantized.square().mean()).backward()
    optimizer.step()
    return out


def trained(quantizer, steps=5):
    """A ProVQ in stage 3 after a few steps, and its Adam, which also trains a parameter beside the codes."""
    torch.manual_seed(0)
    provq = ProVQ(quantizer, Curriculum(0, 0), channel_dim=-1)
    beside = torch.nn.Parameter(torch.ones(D))
    optimizer = torch.optim.Adam([beside, *quantizer.parameters()], 1e-2)
    for number in range(steps):
        step(provq, optimizer, number, tokens(seed=number) * beside)
    provq.set_step(steps)
    return provq, optimizer, beside


# ---------------------------------------------------------------------------------------------------- recluster

@pytest.mark.parametrize("quantizer", [
    VectorQuantizer(K, D), VectorQuantizer(K, D, l2_norm=True), LinearVectorQuantizer(K, D), EMAVectorQuantizer(K, D),
    FollowingVectorQuantizer(K, D),
], ids=["vq", "l2", "simvq", "ema", "follow"])
def test_reclustered_codes_are_the_centroids_and_adam_forgets_them_alone(quantizer):
    provq, optimizer, beside = trained(quantizer)
    latents = tokens(500, seed=9, scale=0.3, offset=2.0)
    before = {name: value.clone() for name, value in optimizer.state[beside].items()}

    info = provq.recluster(latents, optimizers=[optimizer], seed=3)
    expected = kmeans(quantizer.latent(latents), K, seed=3, spherical=quantizer.l2_norm)
    torch.testing.assert_close(quantizer.codebook().detach(), expected.centroids, rtol=1e-5, atol=1e-6)
    assert info == expected.info()
    assert not any(parameter in optimizer.state for parameter in quantizer.parameters())
    assert all(torch.equal(value, optimizer.state[beside][name]) for name, value in before.items())


def test_reclustering_uses_every_code_again():
    provq, optimizer, _ = trained(VectorQuantizer(K, D))
    with torch.no_grad():
        provq.quantizer.embedding.weight[K // 2:] = 100.0  # a ring that lies outside
    latents = tokens(500, seed=9)
    assert len(provq.encode(latents).unique()) <= K // 2
    provq.recluster(latents, optimizers=[optimizer])
    assert len(provq.encode(latents).unique()) == K


def test_the_first_step_after_reclustering_is_adams_first():
    provq, optimizer, _ = trained(VectorQuantizer(K, D))
    provq.recluster(tokens(500), optimizers=[optimizer])
    step(provq, optimizer, 6, tokens(500))
    assert optimizer.state[provq.quantizer.embedding.weight]["step"] == 1


def test_recluster_needs_codes():
    provq = ProVQ(VectorQuantizer(K, D), Curriculum(5, 0), channel_dim=-1)
    with pytest.raises(RuntimeError, match="no codes yet"):
        provq.recluster(tokens(), optimizers=[])


def test_a_reclustering_that_fails_leaves_everything():
    provq, optimizer, _ = trained(VectorQuantizer(K, D))
    before, known = provq.codebook().detach().clone(), len(optimizer.state)
    with pytest.raises(ValueError, match="needs at least num_codes = 16 tokens"):
        provq.recluster(tokens(5), optimizers=[optimizer])
    with pytest.raises(TypeError, match="itres"):
        provq.recluster(tokens(50), itres=3)
    assert torch.equal(provq.codebook(), before)
    assert (len(optimizer.state), provq.has_codebook) == (known, True)


# ---------------------------------------------------------------------------------------------- following codes

def following(decay=0.9, **options):
    torch.manual_seed(0)
    return FollowingVectorQuantizer(K, D, decay=decay, **options).train()


def test_following_codes_are_mean_plus_spread_times_table():
    quantizer, x = following(), tokens(scale=3.0, offset=-5.0)
    quantizer(x)
    quantizer.update_()
    expected = x.mean(0) + x.std(0, unbiased=False) * quantizer.embedding.weight
    torch.testing.assert_close(quantizer.codebook(), expected, rtol=1e-5, atol=1e-5)


def test_running_moments():
    quantizer, first, second = following(decay=0.75), tokens(seed=1), tokens(seed=2, scale=2.0, offset=1.0)
    for x in (first, second):
        quantizer(x)
        quantizer.update_()
    torch.testing.assert_close(quantizer.mean, 0.75 * first.mean(0) + 0.25 * second.mean(0))
    torch.testing.assert_close(
        quantizer.spread, 0.75 * first.std(0, unbiased=False) + 0.25 * second.std(0, unbiased=False))


def test_micro_batches_are_one_batch():
    whole, parts, x = following(), following(), tokens(300, offset=7.0)
    whole(x)
    for part in x.split(100):
        parts(part)
    whole.update_(), parts.update_()
    torch.testing.assert_close(parts.state_dict(), whole.state_dict())


def test_codes_follow_a_drift_that_no_gradient_tells_them():
    quantizer, x = following(), tokens()
    quantizer(x)
    quantizer.update_()
    used = quantizer(x).indices
    for _ in range(300):
        quantizer(4.0 * x + 50.0)
        quantizer.update_()
    assert torch.equal(quantizer(4.0 * x + 50.0).indices, used)


def test_set_codes_are_exact_and_stay_where_they_are_until_the_latents_move():
    quantizer, x = following(), tokens(500, scale=0.2, offset=3.0)
    result = kmeans(x, K)
    quantizer.set_codebook_(result.centroids, result.counts)
    torch.testing.assert_close(quantizer.codebook().detach(), result.centroids, rtol=1e-6, atol=1e-6)
    for _ in range(3):
        quantizer(x)
        quantizer.update_()
    torch.testing.assert_close(quantizer.codebook().detach(), result.centroids, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(quantizer.spread, x.std(0, unbiased=False), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("first", [slice(1), slice(0, 0), slice(None)], ids=["one token", "no token", "nearly blank"])
def test_no_single_batch_sets_the_scale_of_the_codes(first):
    """After k-means spread is that of its latents; one odd batch moves it by 1 - decay, and not for good."""
    provq = ProVQ(following(), Curriculum(1, 0), channel_dim=-1)
    provq.set_step(1)
    provq.init_codebook(tokens(4096))
    before = provq.codebook().detach().clone()
    odd = tokens(300, seed=1)[first] * (0.05 if first == slice(None) else 1.0)
    for number, x in enumerate([odd, *(tokens(1000, seed=i) for i in range(2, 60))], 1):
        provq.set_step(number)
        provq(x)
    provq.set_step(61)
    torch.testing.assert_close(provq.codebook(), before, rtol=0, atol=0.15)
    quantizer = following()  # codes without their latents: the first batch may widen the spread, not narrow it
    quantizer.set_codebook_(before)
    quantizer(odd), quantizer.update_()
    for number in range(2, 60):
        quantizer(tokens(1000, seed=number)), quantizer.update_()
    torch.testing.assert_close(quantizer.codebook(), before, rtol=0.2, atol=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_folding_is_exact(dtype):
    provq, _, _ = trained(FollowingVectorQuantizer(K, D))
    quantizer, x = provq.quantizer.eval().to(dtype), tokens(1000, seed=5).to(dtype)
    with torch.no_grad():
        quantizer.mean.add_(1 / 3)  # with the digits that a dtype holds
    plain = quantizer.folded()
    assert type(plain) is VectorQuantizer
    assert plain.codebook().dtype == dtype
    assert torch.equal(plain.codebook(), quantizer.codebook())
    assert torch.equal(plain(x).indices, quantizer(x).indices)
    assert torch.equal(plain(x).codes, quantizer(x).codes)


def test_without_movement_following_is_the_plain_quantizer():
    """m = 0 and s = 1 give the plain quantizer bit for bit: values, losses and gradients."""
    quantizer, plain, x = following(), VectorQuantizer(K, D), tokens()
    plain.load_state_dict({"embedding.weight": quantizer.embedding.weight.detach().clone()})
    outputs = []
    for module in (quantizer, plain):
        inputs = x.clone().requires_grad_()
        out = module(inputs)
        (out.codes.sum() + sum(out.losses.values())).backward()
        outputs.append((out.codes, out.indices, inputs.grad, module.embedding.weight.grad))
    for a, b in zip(*outputs, strict=True):
        assert torch.equal(a, b)


def test_eval_and_the_warm_up_gather_nothing():
    provq = ProVQ(following(), Curriculum(2, 0), channel_dim=-1)
    provq(tokens())
    provq.set_step(1)
    provq.quantizer.eval()
    provq.quantizer(tokens())
    provq.quantizer.update_()
    provq.quantizer.train().update_()
    assert provq.quantizer.state == FollowingVectorQuantizer.FRESH
    assert torch.equal(provq.quantizer.mean, torch.zeros(D))


def test_a_constant_channel_does_not_divide_by_zero():
    quantizer = following()
    quantizer(torch.ones(50, D))
    quantizer.update_()
    quantizer(torch.ones(50, D))
    assert quantizer.codebook().isfinite().all()


@pytest.mark.parametrize("options", [{"decay": 1.0}, {"decay": -0.1}, {"l2_norm": True}])
def test_following_refuses(options):
    with pytest.raises(ValueError, match="need 0 <= decay < 1 and no l2_norm"):
        FollowingVectorQuantizer(K, D, **options)


# ------------------------------------------------------------------------------------------------------ restart

@pytest.mark.parametrize("quantizer", [
    VectorQuantizer(K, D), VectorQuantizer(K, D, l2_norm=True), LinearVectorQuantizer(K, D),
    FollowingVectorQuantizer(K, D),
], ids=["vq", "l2", "simvq", "follow"])
def test_dead_codes_restart_at_latents_and_the_others_stay(quantizer):
    _, optimizer, _ = trained(quantizer)
    latents = tokens(100, seed=7)
    restart = DeadCodeRestart(quantizer, 0.5, every=2)
    restart.counts = torch.tensor([5] * (K - 3) + [0] * 3)  # the last three are not used at all
    restart.latents = quantizer.latent(latents)
    before = quantizer.codebook().detach().clone()
    average = copy.deepcopy(quantizer)
    moments = optimizer.state[quantizer.embedding.weight]["exp_avg"] if hasattr(quantizer, "embedding") else None
    kept = moments[: K - 3].clone() if moments is not None else None

    assert restart.step([optimizer]) == 0, "not due"
    assert restart.step([optimizer], [average]) == 3
    codes = quantizer.codebook().detach()
    torch.testing.assert_close(codes[: K - 3], before[: K - 3], rtol=1e-5, atol=1e-6)
    reached = F.embedding(nearest_code(codes[K - 3:], quantizer.latent(latents)), quantizer.latent(latents))
    torch.testing.assert_close(codes[K - 3:], reached, rtol=1e-4, atol=1e-5)
    if moments is not None:
        assert torch.equal(moments[: K - 3], kept)
        assert not moments[K - 3:].any()
        assert torch.equal(average.embedding.weight, quantizer.embedding.weight)
    assert [restart.step([optimizer]) for _ in range(2)] == [0, 0], "counts start over"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [VectorQuantizer, LinearVectorQuantizer, FollowingVectorQuantizer])
def test_codes_restart_in_the_dtype_of_the_model(kind, dtype):
    torch.manual_seed(0)
    quantizer, x = kind(K, D).to(dtype), tokens(100, seed=7).to(dtype)
    average = copy.deepcopy(quantizer).float()  # low-precision training averages in float32
    restart = DeadCodeRestart(quantizer, 0.5, every=1)
    restart.counts[0] = 1000
    quantizer(x)
    assert restart.step(copies=[average]) == K - 1
    codes, precision = quantizer.codebook().detach()[1:], torch.finfo(dtype).eps
    assert codes.dtype == dtype
    reached = x[nearest_code(codes, x)]
    torch.testing.assert_close(codes, reached, rtol=0, atol=max(1e-6, 32 * precision))
    if hasattr(quantizer, "embedding"):
        assert torch.equal(average.embedding.weight, quantizer.embedding.weight.float())


def test_a_restart_watches_training_forwards_alone():
    provq, _, _ = trained(VectorQuantizer(K, D))
    restart = DeadCodeRestart(provq.quantizer, 0.5, every=1)
    provq.eval()(tokens(50))
    provq.train()
    assert int(restart.counts.sum()) == 0
    first, second = tokens(30, seed=1), tokens(20, seed=2)
    indices = [provq(first).indices, provq(second).indices]
    assert torch.equal(restart.counts, torch.bincount(torch.cat(indices), minlength=K))
    assert torch.equal(restart.latents, second), "those of the last micro-batch"
    x = tokens(30, seed=3).requires_grad_()
    restart.counts.zero_()
    torch.utils.checkpoint.checkpoint(lambda x: provq(x).quantized, x, use_reentrant=False).sum().backward()
    assert int(restart.counts.sum()) == 30, "recomputed activations count once"


def test_a_restart_resumes_where_it_was():
    provq, optimizer, _ = trained(VectorQuantizer(K, D))
    restart = DeadCodeRestart(provq.quantizer, 0.5, every=3)
    provq(tokens(40))
    restart.step([optimizer])
    state = restart.state_dict()
    other, _, _ = trained(VectorQuantizer(K, D))
    resumed = DeadCodeRestart(other.quantizer, 0.5, every=3)
    resumed.load_state_dict(state)
    assert torch.equal(resumed.counts, restart.counts)
    assert (resumed.steps, resumed.due) == (1, False)
    with pytest.raises(ValueError, match="of 8 codes"):
        DeadCodeRestart(VectorQuantizer(8, D), 0.5).load_state_dict(state)


def test_no_code_restarts_at_a_latent_that_is_not_finite():
    quantizer = VectorQuantizer(K, D)
    restart = DeadCodeRestart(quantizer, 0.5, every=1)
    restart.counts[0], restart.latents = 100, tokens(K - 1)
    restart.latents[3, 1], restart.latents[4] = float("inf"), float("nan")
    assert restart.step() == K - 3
    assert quantizer.codebook().isfinite().all()


def test_no_code_restarts_where_all_are_used():
    provq, optimizer, _ = trained(VectorQuantizer(K, D))
    before = provq.codebook().detach().clone()
    restart = DeadCodeRestart(provq.quantizer, 0.5, every=1)
    restart.counts, restart.latents = torch.ones(K, dtype=torch.int64), tokens()
    assert restart.step([optimizer]) == 0
    assert torch.equal(provq.codebook(), before)


def test_k_means_begins_the_count_anew():
    """Codes of k-means are not judged by how often those before it were chosen, nor by a single batch."""
    provq = ProVQ(VectorQuantizer(K, D), Curriculum(3, 0), channel_dim=-1)
    restart = DeadCodeRestart(provq.quantizer, 0.5, every=4)
    for number in range(3):  # of the warm-up
        provq.set_step(number)
        provq(tokens(50, seed=number))
        restart.step()
    assert restart.steps == 3
    x = tokens(500)
    provq.set_step(3)
    provq.init_codebook(x)
    provq(x[:2])  # most codes are not in it
    assert restart.step() == 0
    assert restart.steps == 1
    provq(x), restart.step()
    counts = restart.counts.clone()
    assert torch.equal(counts, provq(x).indices.bincount(minlength=K)), "those of the whole batch alone"
    provq.recluster(x)
    provq(x[:2])
    assert restart.step() == 0
    assert (restart.steps, int(restart.counts.sum())) == (1, 0)


@pytest.mark.parametrize(("latents", "restarted"), [(tokens(40), K - 1), (tokens(K - 1), K - 1), (tokens(5), 5),
                                                    (tokens(0), 0)])
def test_codes_restart_at_distinct_latents(latents, restarted):
    """Two codes at one latent would leave one that nothing can choose."""
    quantizer = VectorQuantizer(K, D)
    restart = DeadCodeRestart(quantizer, 0.5, every=1)
    restart.counts[0], restart.latents = 100, latents
    assert restart.step() == restarted
    assert len(quantizer.codebook().unique(dim=0)) == K
    assert all((code == latents).all(1).any() for code in quantizer.codebook()[1:restarted + 1])


@pytest.mark.parametrize(("count", "restarted"), [(40, K - 1), (5, 5), (0, 0)])
def test_ema_codes_restart_at_distinct_latents_or_stay(count, restarted):
    quantizer = EMAVectorQuantizer(K, D, restart_below=0.9).train()
    codes = 100.0 + torch.arange(float(K))[:, None].expand(-1, D)
    quantizer.set_codebook_(codes)
    quantizer.ema_counts[1:] = 0.1
    quantizer.ema_sums[1:] *= 0.1
    quantizer.codes.copy_(quantizer.ema_sums / quantizer._smoothed()[:, None])
    quantizer(codes[:1].repeat(30, 1))
    quantizer._last = last = tokens(count)
    quantizer.update_()
    found = quantizer.codebook()[1:]
    moved = found[found.norm(dim=1) < 90]
    assert len(moved) == len(moved.unique(dim=0)) == restarted
    assert all((code - last).abs().amax(1).min() < 1e-2 for code in moved)
    stayed = found.norm(dim=1) >= 90
    torch.testing.assert_close(found[stayed], codes[1:][stayed], rtol=2e-3, atol=0)


class SlowWeights(torch.optim.Optimizer):
    """A wrapper with the state in the optimizer inside, as timm's Lookahead."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, {})
        self._base_optimizer = inner

    def step(self):
        self._base_optimizer.step()
        for group in self._base_optimizer.param_groups:
            for parameter in group["params"]:
                state = self._base_optimizer.state[parameter]
                slow = state.setdefault("lookahead_slow_buff", parameter.detach().clone())
                slow.add_(parameter.detach() - slow, alpha=0.5)
                parameter.data.copy_(slow)


def test_optimizers_inside_others_forget_as_well():
    quantizer = VectorQuantizer(K, D)
    provq = ProVQ(quantizer, Curriculum(0, 0), channel_dim=-1)
    optimizer = SlowWeights(torch.optim.Adam(quantizer.parameters(), 1e-3))
    step(provq, optimizer, 0, tokens())
    state = optimizer._base_optimizer.state[quantizer.embedding.weight]
    place_codes_(quantizer, torch.tensor([2, 5]), torch.full((2, D), 9.0), optimizer)  # one optimizer, no list
    assert torch.equal(state["lookahead_slow_buff"][[2, 5]], torch.full((2, D), 9.0)), "a copy of the weights"
    assert not state["exp_avg"][[2, 5]].any()
    assert state["exp_avg"][0].any()
    provq.recluster(tokens(500, offset=5.0), optimizers=optimizer)
    assert quantizer.embedding.weight not in optimizer._base_optimizer.state
    step(provq, optimizer, 1, tokens(500, offset=5.0))
    assert float(provq.codebook().detach().mean()) == pytest.approx(5.0, abs=0.3), "not dragged back to where it was"


@pytest.mark.parametrize(("kind", "name", "value"), [
    (torch.optim.Rprop, "step_size", 1e-2), (torch.optim.Rprop, "prev", 0.0), (torch.optim.ASGD, "ax", 9.0),
])
def test_restarted_rows_are_those_of_a_fresh_optimizer(kind, name, value):
    """Rprop only multiplies a row's step size, and ASGD's average of the weights is a copy of them."""
    quantizer, beside = VectorQuantizer(K, D), torch.nn.Parameter(torch.ones(D))
    provq = ProVQ(quantizer, Curriculum(0, 0), channel_dim=-1)
    optimizer = kind([{"params": [beside], "lr": 1.0}, {"params": quantizer.parameters(), "lr": 1e-2}])
    for number in range(3):
        step(provq, optimizer, number, tokens() * beside)
    state = optimizer.state[quantizer.embedding.weight][name]
    others = state[3:].clone()
    place_codes_(quantizer, torch.tensor([1, 2]), torch.full((2, D), 9.0), optimizer)
    assert torch.equal(state[1:3], torch.full((2, D), value))
    assert torch.equal(state[3:], others)
    step(provq, optimizer, 3, tokens(offset=9.0))
    assert (quantizer.embedding.weight[1:3] != 9.0).any(), "it trains on"


def test_the_optimizer_inside_sam_forgets_as_well():
    """SAM shares its parameter groups with `base_optimizer`, which alone has the moments."""
    quantizer = VectorQuantizer(K, D)
    provq = ProVQ(quantizer, Curriculum(0, 0), channel_dim=-1)
    inner = torch.optim.Adam(quantizer.parameters(), 1e-3)
    step(provq, inner, 0, tokens())
    sam = torch.optim.Optimizer(inner.param_groups, {})
    sam.base_optimizer = inner
    inner.base_optimizer = sam  # not looked into for ever
    place_codes_(quantizer, torch.tensor([2, 5]), torch.full((2, D), 9.0), sam)
    moment = inner.state[quantizer.embedding.weight]["exp_avg"]
    assert not moment[[2, 5]].any()
    assert moment[0].any()
    provq.recluster(tokens(500), optimizers=sam)
    assert quantizer.embedding.weight not in inner.state


@pytest.mark.parametrize("forgets", [
    lambda provq, opt: provq.recluster(tokens(500), optimizers=opt),
    lambda provq, opt: place_codes_(provq.quantizer, torch.tensor([2, 5]), torch.full((2, D), 9.0), opt),
], ids=["recluster", "restart"])
def test_lbfgs_begins_anew(forgets):
    """Its state lies under the first parameter, here one beside the codes, and mixes both in flat vectors."""
    quantizer, beside = VectorQuantizer(K, D), torch.nn.Parameter(torch.ones(D))
    provq, x = ProVQ(quantizer, Curriculum(0, 0), channel_dim=-1), tokens()
    optimizer = torch.optim.LBFGS([beside, *quantizer.parameters()], lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = provq(x * beside).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.state[beside]["old_dirs"]
    forgets(provq, optimizer)
    assert not optimizer.state
    assert optimizer.step(closure).isfinite()


def test_restart_refuses():
    with pytest.raises(ValueError, match="need 0 < below < 1"):
        DeadCodeRestart(VectorQuantizer(K, D), 1.0)
    with pytest.raises(TypeError, match="EMAVectorQuantizer restarts its codes by itself: restart_below"):
        DeadCodeRestart(EMAVectorQuantizer(K, D), 0.1)
    with pytest.raises(TypeError, match="Linear: only codes of"):
        DeadCodeRestart(torch.nn.Linear(2, 2), 0.1)
    with pytest.raises(TypeError, match="EMAVectorQuantizer"):
        place_codes_(EMAVectorQuantizer(K, D), torch.tensor([0]), torch.ones(1, D), [])


@pytest.mark.parametrize("at", [0, 1, 2])
def test_following_codes_resume_in_every_state(at):
    """Fresh, placed and following: a state dict holds all that the updates to come depend on."""
    def advance(quantizer, numbers):
        for number in numbers:
            if number == 1:
                quantizer.set_codebook_(kmeans(tokens(300, scale=2.0), K).centroids)
            if number != at:  # a step without tokens changes nothing
                quantizer(tokens(50, seed=number, offset=0.1 * number))
            quantizer.update_()

    whole, resumed = following(), following()
    advance(whole, range(at))
    resumed.load_state_dict(whole.state_dict())
    advance(whole, range(at, 5)), advance(resumed, range(at, 5))
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    assert resumed.placed is whole.placed is False


def test_following_codes_are_float32_under_autocast():
    quantizer, plain, x = following(), following(), tokens(offset=3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = quantizer(x)
        codes = quantizer.codebook()
        looked_up = quantizer.lookup(out.indices)
    assert codes.dtype == out.codes.dtype == torch.float32
    assert torch.equal(looked_up, plain(x).codes)
    quantizer.update_(), plain.update_()
    assert torch.equal(quantizer.mean, plain.mean)


# ----------------------------------------------------------------------------------------------- compiled, and copied

def test_compiled_is_eager():
    """Statistics of codes that follow, and what a restart watches, are gathered inside the graph as well."""
    results = []
    for compiled in (False, True):
        provq, _, _ = trained(following())
        restart = DeadCodeRestart(provq.quantizer, 0.5)
        model = torch.compile(provq, backend="eager") if compiled else provq
        for number in range(5, 8):
            provq.set_step(number)
            model(tokens(50, seed=number, offset=2.0))
        provq.set_step(8)
        results.append((provq.state_dict(), restart.counts, restart.latents))
    torch.testing.assert_close(results[0], results[1])
    assert results[1][1].sum() == 150


CHECK = """
import sys, torch
from provq import Curriculum, ProVQ
from provq_codes import DeadCodeRestart, FollowingVectorQuantizer
import provq, provq_codes

encoder, decoder = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.ConvTranspose2d(8, 3, 4, 4)
provq = ProVQ(FollowingVectorQuantizer(num_codes=64, dim=8), Curriculum(warmup_steps=5, transition_steps=5))
opt = torch.optim.Adam([*encoder.parameters(), *decoder.parameters(), *provq.parameters()], 1e-2)
restart = DeadCodeRestart(provq.quantizer, below=0.1, every=4)
for step in range(16):
    provq.set_step(step)
    x = torch.rand(4, 3, 32, 32)
    if provq.needs_init:
        with torch.no_grad():
            provq.init_codebook(encoder(x).movedim(1, -1).reshape(-1, 8), optimizers=[opt])
    out = provq(encoder(x))
    loss = (decoder(out.quantized) - x).square().mean() + out.loss
    opt.zero_grad(), loss.backward(), opt.step()
    restart.step(optimizers=[opt])
    provq.set_step(step + 1)
plain = provq.quantizer.folded()
assert torch.equal(plain.codebook(), provq.codebook())
assert provq_codes.provq is sys.modules["provq"]
"""


def test_it_works_copied_beside_provq_alone(tmp_path):
    source = ROOT / "tokenizer" / "provq_codes.py"
    ast.parse(source.read_text(), feature_version=(3, 9))
    for name in ("provq.py", "provq_codes.py"):
        shutil.copy(source.with_name(name), tmp_path)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", CHECK], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          check=False)
    assert done.returncode == 0, done.stderr
    core = tmp_path / "provq.py"
    core.write_text(core.read_text().replace('__version__ = "', '__version__ = "9'))
    done = subprocess.run([sys.executable, "-c", "import provq_codes"], cwd=tmp_path, env=environment, text=True,
                          capture_output=True, check=False)
    assert "copy both, provq*.py, from one release" in done.stderr
