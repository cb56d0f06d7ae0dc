"""What provq.py keeps: EMA sums, usage counts and the state dict, under accumulation, checkpointing and compilation."""

import copy
import io

import pytest
import safetensors.torch
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint
from workers.provq_cases import RECIPES, quantizer

from tokenizer.provq import AdaptiveWarmup, Curriculum, EMAVectorQuantizer, ProVQ, make_quantizer
from tokenizer.provq_codes import FollowingVectorQuantizer

every_recipe = pytest.mark.parametrize("recipe", RECIPES)


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------- EMA

def test_ema_update_by_hand():
    bare = EMAVectorQuantizer(3, 2, decay=0.9, eps=1e-3)
    centroids = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    bare.set_codebook_(centroids, torch.tensor([2, 1, 3]))
    assert bare.ema_counts.tolist() == [1.0, 0.5, 1.5]
    bare.set_codebook_(centroids)
    running, sums = torch.ones(3), centroids.clone()
    for batch in ([[1.0, 1.0], [3.0, 1.0], [9.0, 1.0]], [[0.0, 9.0], [1.0, 8.0], [0.0, 11.0]]):  # mean count 1
        x = torch.tensor(batch)
        index = (x[:, None] - bare.codebook()[None]).norm(dim=-1).argmin(1)
        assert torch.equal(bare(x).indices, index)
        one_hot = torch.nn.functional.one_hot(index, 3).float()
        running = 0.9 * running + 0.1 * one_hot.sum(0)
        sums = 0.9 * sums + 0.1 * one_hot.t() @ x
        total = running.sum()
        bare.update_()
        torch.testing.assert_close(bare.codebook(), sums / ((running + 1e-3) * total / (total + 3e-3))[:, None])


@pytest.mark.parametrize("tokens_per_code", [1, 100])
def test_the_first_update_after_initialisation_moves_codes_by_one_minus_decay(tokens_per_code):
    # Cluster sizes of the initial batch and of a training batch have different units: if they are mixed, the first
    # batch carries a code 10 % of the way with 1 token per code, and 92 % with 100: the k-means codes are gone.
    bare = EMAVectorQuantizer(4, 2, decay=0.9)
    centroids = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    bare.set_codebook_(centroids, torch.full((4,), 50))
    bare(centroids.repeat_interleave(tokens_per_code, 0) + torch.tensor([1.0, 0.0]))
    bare.update_()
    torch.testing.assert_close(bare.codebook(), centroids + torch.tensor([0.1, 0.0]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("restart_below", [0.0, 0.1])
def test_an_update_without_tokens_changes_nothing(restart_below):
    bare = EMAVectorQuantizer(8, 2, restart_below=restart_below)
    centroids = _normal(8, 2)
    bare.set_codebook_(centroids, torch.tensor([0, 1, 1, 1, 1, 1, 1, 1000]))  # rare codes, as k-means leaves them
    for _ in range(3):
        bare.update_()
        torch.testing.assert_close(bare.codebook(), centroids, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("l2_norm", [False, True])
def test_accumulated_micro_batches_give_the_update_of_one_batch(l2_norm):
    models = [ProVQ(quantizer("ema-l2" if l2_norm else "ema"), Curriculum(0, 5)) for _ in range(2)]
    for step in range(3):
        z = _normal(6, 4, 10, seed=step)
        for model, parts in zip(models, ([z], [z[:2], z[2:]]), strict=True):
            model.set_step(step)
            for part in parts:
                model.set_step(step)  # saying the step again is harmless
                before = model.codebook().clone()
                model(part)
                assert torch.equal(model.codebook(), before), "codes move between optimizer steps only"
            model.set_step(step + 1)
            assert not torch.equal(model.codebook(), before)
    torch.testing.assert_close(models[0].codebook(), models[1].codebook(), rtol=1e-6, atol=1e-6)
    assert torch.equal(models[0].pop_counts(), models[1].pop_counts())


def test_ema_gathers_in_training_only():
    bare = quantizer("ema").eval()
    before = bare.codebook().clone()
    bare(_normal(50, 4))
    bare.update_()
    torch.testing.assert_close(bare.codebook(), before, rtol=0, atol=1e-6)
    bare.train()(_normal(50, 4))
    bare.update_()
    assert (bare.codebook() - before).abs().max() > 1e-2


@pytest.mark.parametrize("quantizer", [
    FollowingVectorQuantizer(16, 4), EMAVectorQuantizer(16, 4), EMAVectorQuantizer(16, 4, restart_below=0.5),
], ids=["follow", "ema", "ema, restarts"])
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_latents_that_are_not_finite_count_as_none(quantizer, bad):
    """A gradient scaler in float16 begins with steps that overflow, and skips them: running statistics must, too."""
    poisoned, clean = copy.deepcopy(quantizer), copy.deepcopy(quantizer)
    for module in (poisoned, clean):
        module(_normal(300, 4)), module.update_()
    x = _normal(300, 4, seed=1)
    some = x.clone()
    some[5, 2] = some[100] = bad
    kept = torch.ones(300, dtype=torch.bool)
    kept[[5, 100]] = False
    torch.manual_seed(0), poisoned(some), clean(x[kept])
    torch.testing.assert_close(poisoned._pending, clean._pending, rtol=1e-12, atol=1e-12)
    poisoned.update_()
    assert poisoned.codebook().isfinite().all()
    before = {name: value.clone() for name, value in poisoned.state_dict().items()}
    poisoned(torch.full((300, 4), bad)), poisoned.update_()
    assert all(torch.equal(value, before[name]) for name, value in poisoned.state_dict().items()), "nothing counted"


@pytest.mark.parametrize("recipe", ["ema", "vq", "simvq"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_counts_each_token_once(recipe, use_reentrant):
    plain, recomputed = (ProVQ(quantizer(recipe), Curriculum(0, 5)) for _ in range(2))
    for model in (plain, recomputed):
        model.set_step(1)
        z = _normal(6, 4, 10).requires_grad_()
        if model is plain:
            quantized, _, loss, _ = model(z)
        else:  # the reentrant kind returns a plain tuple
            quantized, _, loss, _ = checkpoint(model, z, use_reentrant=use_reentrant)
        (quantized.square().sum() + loss).backward()
        model.gradients = [z.grad, *(p.grad for p in model.parameters())]
        model.set_step(2)
    assert all(torch.equal(a, b) for a, b in zip(plain.gradients, recomputed.gradients, strict=True))
    assert plain._counts.sum() == 60
    assert torch.equal(recomputed.pop_counts(), plain.pop_counts())
    assert torch.equal(recomputed.codebook(), plain.codebook())


def test_dead_codes_restart_at_latents_of_the_last_batch():
    centroids = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [1e3, 1e3]])  # nothing ever gets near the last one
    x = centroids[:3].repeat(20, 1) + _normal(60, 2)
    codes = []
    for restart_below in (0.0, 0.8):
        bare = EMAVectorQuantizer(4, 2, decay=0.5, restart_below=restart_below)
        bare.set_codebook_(centroids, torch.ones(4))
        bare(x)
        bare.update_()
        codes.append(bare.codebook())
    assert codes[0][3].norm() > 1e3, "the premise: by itself it stays where it is"
    torch.testing.assert_close(codes[1][:3], codes[0][:3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(codes[1][3], x[(x - codes[1][3]).norm(dim=1).argmin()], rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------------------------------------------- usage

def test_usage_counts_training_tokens_since_the_last_call():
    model = ProVQ(make_quantizer("vq", 4, 1), Curriculum(0, 0))
    model.quantizer.set_codebook_(torch.tensor([[0.0], [1.0], [2.0], [3.0]]))
    model(torch.tensor([[0.1], [0.2], [2.1], [1.9]]))
    model(torch.tensor([[0.0], [2.0]]))
    usage = model.usage()
    assert usage["counts"].tolist() == [3, 0, 3, 0]
    assert (usage["usage"], usage["perplexity"]) == (0.5, pytest.approx(2.0))
    assert model.usage()["counts"].tolist() == [0, 0, 0, 0]
    model(torch.tensor([[3.0]]))
    assert model.pop_counts().tolist() == [0, 0, 0, 1]


def test_steps_may_be_set_in_inference_mode():
    """Weights swapped for an average's while looking, and back: training goes on."""
    provq = ProVQ(quantizer("vq"), Curriculum(0, 4))
    with torch.inference_mode():
        provq.set_step(2)
        provq.load_state_dict(provq.state_dict())
    out = provq(_normal(2, 4, 3).requires_grad_())
    (out.quantized.sum() + out.loss).backward()


def test_usage_may_be_read_in_inference_mode():
    model = ProVQ(quantizer("vq"), Curriculum(0, 0))
    model(_normal(5, 4))
    with torch.inference_mode():
        assert model.usage()["counts"].sum() == 5
    model(_normal(7, 4))  # training goes on: its counter must be no inference tensor
    assert model.usage()["counts"].sum() == 7


# ------------------------------------------------------------------------------------------------------- state

def _objects(recipe: str) -> tuple[torch.nn.Module, ProVQ, torch.optim.Optimizer]:
    torch.manual_seed(0)
    encoder = torch.nn.Linear(3, 4)
    model = ProVQ(quantizer(recipe), Curriculum(2, 3, loss_floor=0.5), channel_dim=-1)
    return encoder, model, torch.optim.Adam([*encoder.parameters(), *model.parameters()], lr=0.05)


def _train(objects: tuple, start: int, stop: int) -> list[float]:
    encoder, model, optimizer = objects
    losses = []
    for step in range(start, stop):
        x = _normal(4, 20, 3, seed=100 + step)
        model.set_step(step)
        if model.needs_init:
            with torch.no_grad():
                model.init_codebook(encoder(x).reshape(-1, 4), optimizers=[optimizer])
        out = model(encoder(x))
        loss = (out.quantized - 1).square().mean() + out.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.set_step(step + 1)
        losses.append(loss.item())
    return losses


@every_recipe
def test_resuming_continues_bit_for_bit_in_every_stage(recipe):
    straight, expected, files = _objects(recipe), [], []
    for step in range(7):
        files.append(io.BytesIO())
        torch.save([o.state_dict() for o in straight], files[-1])
        expected += _train(straight, step, step + 1)
    for cut in (1, 2, 3, 4, 5):  # around both ends of the transition, which lasts from 2 to 4
        files[cut].seek(0)
        resumed = _objects(recipe)
        for target, state in zip(resumed, torch.load(files[cut], weights_only=True), strict=True):
            target.load_state_dict(state)
        loaded = resumed[1]
        assert loaded.stage == Curriculum(2, 3).stage(cut)
        assert (loaded.alpha, loaded.omega) == (Curriculum(2, 3).alpha(cut), Curriculum(2, 3).omega(cut))
        assert (loaded.needs_init, loaded.has_codebook) == (cut == 2, cut > 2)
        assert _train(resumed, cut, 7) == expected[cut:]
        for a, b in zip(straight[:2], resumed[:2], strict=True):
            for name, value in a.state_dict().items():
                assert torch.equal(b.state_dict()[name], value), (cut, name)


@every_recipe
def test_safetensors_hold_the_state(recipe, tmp_path):
    objects = _objects(recipe)
    _train(objects, 0, 4)
    safetensors.torch.save_file(objects[1].state_dict(), tmp_path / "provq.safetensors")
    loaded = ProVQ(quantizer(recipe, seed=5), Curriculum(2, 3, loss_floor=0.5), channel_dim=-1)
    loaded.load_state_dict(safetensors.torch.load_file(tmp_path / "provq.safetensors"))
    z = _normal(3, 4)
    assert torch.equal(loaded(z).quantized, objects[1](z).quantized)
    assert torch.equal(loaded(z).loss, objects[1](z).loss)
    assert (loaded.stage, loaded.alpha) == (2, Curriculum(2, 3).alpha(4))


@every_recipe
def test_the_trained_quantizer_alone_suffices(recipe):
    objects = _objects(recipe)
    _train(objects, 0, 7)
    alone = quantizer(recipe, seed=5).eval()
    alone.load_state_dict(objects[1].quantizer.state_dict())
    z = _normal(30, 4)
    out = objects[1].eval()(z)
    assert torch.equal(alone(z).codes, out.quantized)
    assert torch.equal(alone(z).indices, out.indices)


def test_state_dict_keys_are_stable():
    keys = {"step", "initialised", "warmup_end", "best_score", "stale_checks"}
    model = ProVQ(quantizer("vq"), Curriculum(2, 3))
    assert set(model.state_dict()) == keys | {"quantizer.embedding.weight"}
    model.set_step(5)
    model.init_codebook(None)
    model(_normal(5, 4))
    assert set(model.state_dict()) == keys | {"quantizer.embedding.weight"}
    adaptive = ProVQ(quantizer("ema"), Curriculum(2, 3), adaptive=AdaptiveWarmup())
    assert set(adaptive.state_dict()) == keys | {"quantizer.codes", "quantizer.ema_sums", "quantizer.ema_counts"}


def test_a_checkpoint_of_version_0_2_with_collected_latents_loads_strictly():
    model, old = (ProVQ(quantizer("vq", seed=seed), Curriculum(2, 3)) for seed in (0, 1))
    old.set_step(1)
    state = dict(old.state_dict(), reservoir=_normal(256, 4), reservoir_state=torch.tensor([20, 20]))
    wrapper, whole = torch.nn.Sequential(model), {f"0.{name}": value for name, value in state.items()}
    assert len(whole) == len(wrapper.state_dict()) + 2
    wrapper.load_state_dict(whole)
    assert model.step == 1
    assert torch.equal(model.codebook(), old.codebook())
    assert set(model.state_dict()) == set(old.state_dict())
    with pytest.raises(RuntimeError, match="another_key"):
        model.load_state_dict(dict(state, another_key=torch.zeros(1)))


def test_loading_drops_sums_that_were_gathered_before():
    model = ProVQ(quantizer("ema"), Curriculum(0, 5))
    saved = copy.deepcopy(model.state_dict())
    model(50 + _normal(40, 4))  # the user changes his mind and goes back to the checkpoint
    model.load_state_dict(saved)
    model.set_step(1)
    torch.testing.assert_close(model.codebook(), saved["quantizer.codes"], rtol=0, atol=1e-5)


def test_a_warm_up_checkpoint_has_no_codebook_whatever_the_curriculum_that_loads_it():
    trained = ProVQ(quantizer("vq"), Curriculum(5, 5))
    trained.set_step(3)
    loaded = ProVQ(quantizer("vq"), Curriculum(0, 0)).eval()  # as a script for inference would build it
    loaded.load_state_dict(trained.state_dict())
    assert not loaded.has_codebook
    assert loaded(_normal(5, 4)).indices is None
    with pytest.raises(RuntimeError, match="init_codebook"):
        loaded.encode(_normal(5, 4))


@every_recipe
def test_a_deep_copy_is_independent_and_equal(recipe):
    objects = _objects(recipe)
    _train(objects, 0, 4)
    model = objects[1]
    twin = copy.deepcopy(model)
    z = _normal(30, 4)
    assert torch.equal(twin(z).quantized, model(z).quantized)
    counts = model._counts.clone()
    codes = model.codebook().detach().clone()
    twin(z)
    twin.set_step(9)
    assert torch.equal(model._counts, counts)
    assert torch.equal(model.codebook(), codes)
    assert (model.stage, twin.stage) == (2, 3)


# ------------------------------------------------------------------------------------------------- compilation

@every_recipe
def test_one_graph_per_stage_while_alpha_moves(recipe):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    eager, model = (ProVQ(quantizer(recipe), Curriculum(3, 6)) for _ in range(2))
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    frames = []
    for step in range(12):
        outputs = []
        z = _normal(2, 4, 5, seed=step)
        for module, call in ((eager, eager), (model, compiled)):
            module.set_step(step)
            if module.needs_init:
                module.init_codebook(z.movedim(1, -1).reshape(-1, 4).repeat(2, 1) + _normal(20, 4))
            latent = z.clone().requires_grad_()
            out = call(latent)
            (out.quantized.square().sum() + out.loss).backward()
            outputs.append((out, latent.grad))
        (expected, gradient), (out, compiled_gradient) = outputs
        torch.testing.assert_close(out.quantized, expected.quantized)
        torch.testing.assert_close(out.loss, expected.loss)
        torch.testing.assert_close(compiled_gradient, gradient)
        assert (out.indices is None) == (step < 3)
        frames.append(counter.frame_count)
        if step == 7:
            assert torch.equal(model.pop_counts(), eager.pop_counts())  # reading usage must not compile again
    assert frames[2] == 1
    assert frames[8] <= 2
    assert frames[11] <= 3
    torch.testing.assert_close(model.codebook(), eager.codebook())
    assert torch.equal(model.pop_counts(), eager.pop_counts())


def test_functionalised_compilation_keeps_ema_sums_and_counts():
    torch._dynamo.reset()
    eager, model = (ProVQ(quantizer("ema"), Curriculum(0, 6)) for _ in range(2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for step in range(3):
        z = _normal(2, 4, 5, seed=step)
        for module, call in ((eager, eager), (model, compiled)):
            module.set_step(step)
            out = call(z.clone().requires_grad_())
            (out.quantized.square().sum() + out.loss).backward()
    assert torch.equal(model.pop_counts(), eager.pop_counts())
    torch.testing.assert_close(model.quantizer._pending, eager.quantizer._pending)


@pytest.mark.parametrize("recipe", ["vq", "ema"])
def test_checkpointing_a_compiled_module_is_a_plain_step(recipe):
    torch._dynamo.reset()
    plain, model = (ProVQ(quantizer(recipe), Curriculum(0, 4)) for _ in range(2))
    compiled = torch.compile(model, backend="eager")
    for call in (plain, lambda z: checkpoint(compiled, z, use_reentrant=False)):
        out = call(_normal(50, 4).requires_grad_())
        (out.quantized.square().sum() + out.loss).backward()
    for module in (plain, model):
        module.set_step(1)
    assert torch.equal(model.pop_counts(), plain.pop_counts())
    torch.testing.assert_close(model.codebook(), plain.codebook(), rtol=1e-5, atol=1e-5)
