"""Drop-in mode as a host's training loop sees it: state, resume, collected latents, copies, compilation; callables."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import vector_quantize_pytorch as lucidrains
from torch import Tensor, nn
from workers.provq_hosts import CASES, VectorQuantizer2

from tokenizer.provq import AdaptiveWarmup, Curriculum, ProVQ, nearest_code
from tokenizer.provq_attach import RESERVOIR_CALLS, RESERVOIR_TOKENS_PER_CODE, adapt, attach, detach, host_state_dict

every_host = pytest.mark.parametrize("name", CASES)
STATE = {"step", "initialised", "warmup_end", "best_score", "stale_checks"}
RESERVOIR = {"reservoir", "reservoir_state"}


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    """What a host's repository has around its quantizer; it knows nothing of ProVQ."""

    def __init__(self, name: str):
        super().__init__()
        torch.manual_seed(0)
        self.case = CASES[name]
        self.encoder = nn.Linear(5, self.case.dim)
        self.quantize = self.case.make()
        self.decoder = nn.Linear(self.case.dim, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.quantize(self.encoder(x).movedim(-1, self.case.channel_dim))
        quantized, loss = out[0], out[-1]
        if isinstance(quantized, tuple):
            quantized, loss = quantized[0], loss.commitment  # SimVQ
        elif isinstance(loss, tuple):
            loss = out[1]  # taming
            if isinstance(loss, tuple):
                loss = sum(loss[:3]) if self.training else 0.0  # LlamaGen
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            loss = torch.zeros(())  # FSQ and diveq have none
        return self.decoder(quantized.movedim(self.case.channel_dim, -1)), loss.sum()


CURRICULUM = Curriculum(3, 3, loss_floor=0.5)


def _build(name: str, curriculum: Curriculum = CURRICULUM) -> tuple[Model, torch.optim.Optimizer]:
    model = Model(name)
    attach(model.quantize, curriculum)
    return model.train(), torch.optim.Adam(model.parameters(), lr=0.05)


def _train(model: Model, optimizer: torch.optim.Optimizer, start: int, stop: int) -> list[float]:
    losses = []
    for step in range(start, stop):
        model.quantize.provq.set_step(step)
        model.quantize.provq.maybe_init_codebook(optimizers=[optimizer])
        torch.manual_seed(step)  # diveq and dropout of levels draw random numbers
        x = _normal(*model.case.lead, 5, seed=step)
        reconstruction, loss = model(x)
        total = (reconstruction - x).square().mean() + loss
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return losses


# ------------------------------------------------------------------------------------------------------- state dict

@every_host
def test_resuming_from_the_hosts_own_checkpoint_continues_bit_for_bit_in_every_stage(name):
    straight, expected, files = _build(name), [], []
    for step in range(9):
        files.append(io.BytesIO())
        torch.save({"model": straight[0].state_dict(), "optimizer": straight[1].state_dict()}, files[-1])
        expected += _train(*straight, step, step + 1)
    for cut in range(1, 8):
        files[cut].seek(0)
        checkpoint = torch.load(files[cut], weights_only=True)
        model, optimizer = _build(name)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        assert _train(model, optimizer, cut, 9) == expected[cut:], cut
        for key, value in straight[0].state_dict().items():
            assert torch.equal(model.state_dict()[key], value), (cut, key)


@every_host
def test_no_key_is_renamed_and_the_checkpoint_loads_into_the_host_alone(name):
    host_keys = list(Model(name).state_dict())
    parameters = [key for key, _ in Model(name).named_parameters()]
    model, optimizer = _build(name)
    assert [key for key, _ in model.named_parameters()] == parameters
    _train(model, optimizer, 0, 8)
    state = model.state_dict()
    own = STATE | RESERVOIR if model.quantize.provq.quantizer.settable else STATE
    assert set(state) - set(host_keys) == {f"quantize.provq.{key}" for key in own}
    assert list(host_state_dict(state)) == host_keys
    alone = Model(name)
    alone.load_state_dict(host_state_dict(state))
    x = _normal(*model.case.lead, 5, seed=77)
    outputs = []
    for trained in (model.eval(), alone.eval(), detach(copy.deepcopy(model))):
        torch.manual_seed(0)
        outputs.append(trained(x)[0])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_detach_leaves_the_host_as_it_was():
    model, optimizer = _build("taming")
    _train(model, optimizer, 0, 5)
    assert detach(model) is model
    assert list(model.state_dict()) == list(Model("taming").state_dict())
    assert "forward" not in vars(model.quantize)
    assert not hasattr(model.quantize, "provq")
    attach(model.quantize, CURRICULUM)  # and once more


def test_a_checkpoint_of_the_host_alone_loads_and_leaves_the_curriculum():
    pretrained = Model("taming")
    nn.init.ones_(pretrained.quantize.embedding.weight)
    model, _ = _build("taming")
    model.quantize.provq.set_step(2)
    model.load_state_dict(pretrained.state_dict())
    assert model.quantize.provq.stage == 1
    assert int(model.quantize.provq.step) == 2
    assert (model.quantize.embedding.weight == 1).all()
    state = model.state_dict()
    del state["quantize.provq.step"]
    with pytest.raises(RuntimeError, match=r"Missing key.*quantize\.provq\.step"):
        model.load_state_dict(state)


def test_the_wrapper_of_an_adapter_holds_the_hosts_keys():
    model = ProVQ(adapt(VectorQuantizer2(8, 4, 0.25)), Curriculum(1, 1))
    assert set(model.state_dict()) == STATE | {"quantizer.module.embedding.weight"}


# -------------------------------------------------------------------------------------------------------- the loop

def test_eval_is_continuous_until_there_is_a_codebook():
    model, optimizer = _build("llamagen")
    _train(model, optimizer, 0, 3)
    z = CASES["llamagen"].z()
    quantized, losses, info = model.eval().quantize(z)
    assert torch.equal(quantized, F.normalize(z.movedim(1, -1), dim=-1).movedim(-1, 1))
    assert losses == (None, None, None, 0)
    assert (info[2] == -1).all()
    model.quantize.provq.set_step(3)
    model.quantize.provq.maybe_init_codebook()
    assert (model.quantize(z)[2][2] >= 0).all()


def test_a_training_forward_without_the_codebook_says_what_to_call():
    model, _ = _build("taming")
    model.quantize.provq.set_step(3)
    with pytest.raises(RuntimeError, match=r"step 3 .*maybe_init_codebook"):
        model(_normal(2, 4, 3, 5))
    with pytest.raises(RuntimeError, match=r"no latents were collected .*init_codebook\(None\)"):
        model.quantize.provq.maybe_init_codebook()
    assert model.quantize.provq.needs_init, "a failed call must not pass for done"


def test_an_adaptive_warm_up_ends_by_its_score():
    model = Model("taming").train()
    handle = attach(model.quantize, Curriculum(100, 2), adaptive=AdaptiveWarmup(patience=2))
    for step, score in enumerate([3.0, 2.0, 2.0, 2.0]):
        handle.set_step(step)
        assert handle.maybe_init_codebook() is None
        model(_normal(2, 4, 3, 5, seed=step))
        handle.observe(score)
    handle.set_step(4)
    assert handle.maybe_init_codebook()["tokens"] > 8
    assert (handle.stage, int(handle.warmup_end)) == (2, 4), "step 3 has trained in stage 1"


@pytest.mark.parametrize("name", ["lucidrains-residual-dropout", "lucidrains", "lucidrains-fsq-image", "diveq"])
def test_usage_counts_tokens_of_training_forwards(name):
    model, _ = _build(name, Curriculum(0, 2))
    handle, n = model.quantize.provq, CASES[name].z().numel() // CASES[name].dim
    out = model.quantize(CASES[name].z())
    indices, counts = out[1], handle.usage()["counts"]
    assert counts.sum() == (indices >= 0).sum() <= n * 3
    if "residual" in name:
        assert len(counts) == 24
        for level in range(3):
            used = indices[..., level][indices[..., level] >= 0]
            assert torch.equal(counts[8 * level : 8 * level + 8], torch.bincount(used, minlength=8))
    model.eval().quantize(CASES[name].z())
    assert handle.usage()["counts"].sum() == 0


# ----------------------------------------------------------------------------------------- collected latents

def test_the_reservoir_is_bounded_and_holds_the_latest_latents():
    handle = attach(VectorQuantizer2(8, 2, 0.25), Curriculum(200, 1))
    size = RESERVOIR_TOKENS_PER_CODE * 8
    take = size // RESERVOIR_CALLS
    for call in range(40):
        handle.collect(torch.stack([torch.full((64,), float(call)), torch.arange(64.0)], 1))
        assert len(handle.reservoir) == size
    calls, rows = handle.reservoir.t()
    assert calls.unique().tolist() == list(range(40 - RESERVOIR_CALLS, 40)), "the last calls, and no older ones"
    assert (calls.long().bincount()[-RESERVOIR_CALLS:] == take).all(), "as many of each"
    assert len(rows.unique()) > 55, "from everywhere in the batch, not on a fixed stride"
    for call in calls.unique():
        assert (rows[calls == call] // (64 // take)).unique().tolist() == list(range(take)), "spread over the batch"


@pytest.mark.parametrize("n", [3, 8, 19, 64, 1000])
def test_the_first_calls_fill_the_reservoir_with_latents_of_all_their_places(n):
    handle = attach(VectorQuantizer2(8, 1, 0.25), Curriculum(200, 1))
    size, calls = RESERVOIR_TOKENS_PER_CODE * 8, 0
    while (before := int(handle.reservoir_state[0])) < size:
        handle.collect(torch.arange(float(n))[:, None])
        rows = handle.reservoir[before : int(handle.reservoir_state[0]), 0]
        taken = min(n, size, size - before) // min(n, 8) * min(n, 8) or min(n, 8)
        assert int(handle.reservoir_state[0]) - before == min(taken, max(size - before, min(n, 8)))
        if before + n <= size:
            assert len(rows.unique()) == len(rows), "no latent twice"
        if len(rows) >= 8:
            assert rows.min() < n / 4 < 3 * n / 4 < rows.max()
        calls += 1
    assert calls <= -(-size // (min(n, size) // 2))


def test_codes_of_hardly_more_latents_than_codes_are_warned_of():
    for n, warned in ((4, True), (16, False)):
        module = VectorQuantizer2(8, 4, 0.25).train()
        handle = attach(module, Curriculum(2, 2))
        for step in range(3):
            handle.set_step(step)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                handle.maybe_init_codebook()
            module(_normal(1, 4, 1, n, seed=step))
        assert ["k-means of 8 latents for 8 codes" in str(each.message) for each in caught] == [True] * warned


def test_collecting_draws_no_random_numbers_and_takes_short_batches_whole():
    handle = attach(VectorQuantizer2(8, 2, 0.25), Curriculum(3, 1))
    state = torch.get_rng_state()
    for seed in range(3):
        handle.collect(_normal(5, 2, seed=seed))
    handle.collect(_normal(0, 2))
    assert torch.equal(torch.get_rng_state(), state)
    kept = handle.reservoir[: int(handle.reservoir_state[0])]
    assert torch.equal(kept, torch.cat([_normal(5, 2, seed=s) for s in range(3)]))
    with pytest.raises(ValueError, match=r"latents must be \(N, D = 2\), got \(4, 3\)"):
        handle.collect(_normal(4, 3))


def test_the_forwards_of_the_warm_up_collect_and_maybe_init_sets_the_codes_once():
    module = VectorQuantizer2(8, 4, 0.25).train()
    handle = attach(module, Curriculum(2, 2))
    for step in range(4):
        handle.set_step(step)
        info = handle.maybe_init_codebook(iters=30, seed=3)
        assert (info is None) == (step != 2)
        module(_normal(1, 4, 4, 5, seed=step))
        if info:
            assert info["tokens"] == 2 * 16, "two calls of as many whole sixteenths of the bound as each has"
    assert handle.reservoir.numel() == 0, "given back"
    assert set(handle.state_dict()) == STATE | RESERVOIR
    assert handle.state_dict()["reservoir"].tolist() == [[0.0] * 4]
    with pytest.raises(RuntimeError, match="called before"):
        handle.init_codebook(_normal(20, 4))


def test_collected_latents_are_in_the_checkpoint_until_the_codebook_is_set():
    model, other, fresh = (VectorQuantizer2(8, 4, 0.25).train() for _ in range(3))
    handle, twin, _ = (attach(module, Curriculum(2, 2)) for module in (model, other, fresh))
    handle.collect(_normal(20, 4))
    state = model.state_dict()
    assert set(state) == {"embedding.weight", *(f"provq.{key}" for key in STATE | RESERVOIR)}
    other.load_state_dict(state)
    for each in (handle, twin):
        each.collect(_normal(20, 4, seed=1))
        each.set_step(2)
        assert each.maybe_init_codebook()["tokens"] == 32
    assert torch.equal(model.embedding.weight, other.embedding.weight)
    twin = attach(other := VectorQuantizer2(8, 4, 0.25), Curriculum(2, 2))
    twin.collect(_normal(20, 4))
    assert twin.reservoir.any()
    other.load_state_dict(fresh.state_dict())
    assert not twin.reservoir.any(), "latents of before the load are of another encoder"
    assert twin.reservoir_state.tolist() == [0, 0]
    done = host_state_dict(model.state_dict()) | {f"provq.{key}": model.provq.state_dict()[key] for key in STATE}
    other.load_state_dict(done)
    assert twin.reservoir.numel() == 0


def test_setting_the_codes_of_a_fixed_grid_is_refused():
    handle = attach(lucidrains.FSQ([5, 5]), Curriculum(1, 1))
    handle.set_step(1)
    with pytest.raises(TypeError, match=r"FSQ has no codes to set: init_codebook\(None\)"):
        handle.init_codebook(_normal(30, 2))
    assert handle.needs_init


# ------------------------------------------------------------------------------------ copies and compilation

@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_are_attached_to_themselves(copied):
    model = VectorQuantizer2(8, 4, 0.25).train()
    handle = attach(model, Curriculum(2, 3))
    z = _normal(2, 4, 4, 3)
    model(z)
    twin = copied(model)
    assert twin.provq.quantizer.module is twin
    assert twin.provq is not handle
    twin.provq.set_step(2)
    twin.provq.maybe_init_codebook()
    assert handle.stage == 1
    assert (model(z)[2][2] == -1).all()
    assert (twin(z)[2][2] >= 0).all()
    assert not torch.equal(twin.embedding.weight, model.embedding.weight)


@pytest.mark.parametrize("name", ["llamagen", "taming", "simvq", "taming-ema", "esm"])
def test_one_graph_per_stage_while_alpha_moves(name):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    eager, model = _build(name, Curriculum(3, 4))[0], _build(name, Curriculum(3, 4))[0]
    if name == "llamagen":  # its usage meter takes the length of a tensor of unknown size
        eager.quantize.show_usage = model.quantize.show_usage = False
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    frames = []
    for step in range(10):
        outputs = []
        for module, call in ((eager, eager), (model, compiled)):
            handle = module.quantize.provq
            handle.set_step(step)
            handle.maybe_init_codebook()
            module.zero_grad()
            x = _normal(*module.case.lead, 5, seed=step)
            reconstruction, loss = call(x)
            ((reconstruction - x).square().mean() + loss).backward()
            outputs.append((reconstruction, module.encoder.weight.grad))
        for a, b in zip(*outputs, strict=True):
            torch.testing.assert_close(a, b)
        frames.append(counter.frame_count)
    assert frames[2] == 1
    assert frames[6] <= 2
    assert frames[9] <= 3
    assert torch.equal(model.quantize.provq.pop_counts(), eager.quantize.provq.pop_counts())


# ----------------------------------------------------------------------------------------------------- callables

class Foreign(nn.Module):
    """A quantizer that nobody has heard of: codes on the columns, cosine distance."""

    def __init__(self):
        super().__init__()
        self.columns = nn.Parameter(torch.randn(4, 8))

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        unit = F.normalize(x, dim=1)
        index = (unit @ F.normalize(self.columns, dim=0)).argmax(1)
        code = F.normalize(self.columns, dim=0).t()[index]
        return unit + (code - unit).detach(), index


def _foreign_call(module, x):
    codes, index = module.quantize(x)
    code = F.normalize(module.columns, dim=0).t()[index]
    return codes, index, {"vq": (F.normalize(x, dim=1) - code).square().mean()}


def _foreign_set(module, centroids, counts):
    assert counts is not None
    module.columns.copy_(centroids.t())


def test_five_callables_adapt_anything():
    torch.manual_seed(0)
    foreign = Foreign()
    adapter = adapt(
        foreign, "custom", call=_foreign_call, codebook=lambda m: F.normalize(m.columns, dim=0).t(),
        set_codebook=_foreign_set, latent=lambda m, x: F.normalize(x, dim=1),  # noqa: ARG005
        lookup=lambda m, i: F.normalize(m.columns, dim=0).t()[i])
    model = ProVQ(adapter, Curriculum(2, 2))
    assert (model.num_codes, model.dim) == (8, 4)
    for step in range(6):
        model.set_step(step)
        z = _normal(60, 4, seed=step)
        assert model.needs_init == (step == 2)
        if model.needs_init:
            assert model.init_codebook(z)["tokens"] == 60
        out = model(z.requires_grad_())
        (out.quantized.sum() + out.loss).backward()
        if step < 2:
            torch.testing.assert_close(out.quantized, F.normalize(z, dim=1))
    assert torch.equal(model.encode(z), foreign.quantize(z)[1])
    torch.testing.assert_close(model.decode(out.indices), out.quantized)
    twin = copy.deepcopy(model)
    twin.quantizer.module.columns.data.zero_()
    assert torch.equal(model.encode(z), out.indices)


def test_three_callables_suffice_where_codes_are_rows():
    module = nn.Embedding(8, 4)

    def call(module, x):
        index = nearest_code(x, module.weight)
        return x + (module.weight[index] - x).detach(), index, {}

    adapter = adapt(module, "custom", call=call, codebook=lambda m: m.weight,
                    set_codebook=lambda m, centroids, counts: m.weight.copy_(centroids))  # noqa: ARG005
    model = ProVQ(adapter, Curriculum(0, 0))
    z = _normal(30, 4)
    out = model(z)
    torch.testing.assert_close(model.decode(out.indices), out.quantized)
    assert out.loss == 0
    adapter.set_codebook_(z[:8], None)
    assert torch.equal(model.encode(z[:8]), torch.arange(8))
    with pytest.raises(TypeError, match="codebook"):
        adapt(module, "custom", call=call)


def test_residual_levels_are_set_one_after_the_other():
    module = lucidrains.ResidualVQ(dim=2, num_quantizers=2, codebook_size=4).train()
    handle = attach(module, Curriculum(8, 1))
    coarse = torch.tensor([[10.0, 0.0], [-10.0, 0.0], [0.0, 10.0], [0.0, -10.0]])
    fine = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    points = (coarse[:, None] + fine[None]).reshape(1, 16, 2)
    handle.set_step(8)
    handle.init_codebook(points[0])
    for codes, expected in zip(module.codebooks, (coarse, fine), strict=True):
        assert torch.cdist(expected, codes).min(1).values.max() < 1e-4
    torch.testing.assert_close(module.eval()(points)[0], points, rtol=0, atol=1e-4)
