"""What projects do around training a host: averages of the model, other checkpoint formats, fine-tuning, other rank
counts, subclasses, and calls that the host would refuse: right, or refused before the warm-up is spent."""

import copy
import io

import diveq
import pytest
import timm.utils
import torch
import vector_quantize_pytorch as lucidrains
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from workers.provq_hosts import CASES, SimVQ, VectorQuantizer, VectorQuantizer2

from tokenizer import provq as provq_file
from tokenizer.provq import AdaptiveWarmup, Curriculum
from tokenizer.provq_attach import RESERVOIR_TOKENS_PER_CODE, attach, host_state_dict


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _model(curriculum: Curriculum | None = None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), VectorQuantizer2(8, 4, 0.25))
    if curriculum is not None:
        attach(model[1], curriculum)
    return model


def _x(step: int) -> Tensor:
    return _normal(2, 3, 4, 4, seed=step)


def _forward(model: nn.Sequential, steps: range, **options) -> None:
    for step in steps:
        model[1].provq.set_step(step)
        model[1].provq.maybe_init_codebook(**options)
        model(_x(step))


def _indices(model: nn.Module) -> Tensor:
    return model.eval()(_x(99))[2][2]


# ------------------------------------------------------------------------------------------------------- averages

@pytest.mark.parametrize("options", [
    {"use_buffers": True},
    {"use_buffers": True, "avg_fn": get_ema_avg_fn(0.9)},
    {"use_buffers": True, "multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
], ids=["mean", "ema", "ema-multi", "parameters"])
def test_an_averaged_model_becomes_discrete_with_its_model(options):
    model = _model(Curriculum(2, 2))
    average = AveragedModel(model, **options)
    for step in range(6):
        _forward(model, range(step, step + 1))
        average.update_parameters(model)
        assert (_indices(average) >= 0).all() == (step >= 2), "as evaluated: continuous in the warm-up, then its codes"
        assert average.module[1].provq.best_score.isfinite()


@pytest.mark.parametrize("make", [timm.utils.ModelEmaV2, timm.utils.ModelEmaV3])
def test_averages_that_pair_state_dicts_entry_by_entry(make):
    model = _model(Curriculum(3, 2))
    average = make(model, decay=0.5)
    for step in range(6):
        copies = [average.module[1]] if step % 2 else average.module[1]  # one copy need not be in a list
        _forward(model, range(step, step + 1), copies=copies)
        average.update(model)
        assert list(average.module.state_dict()) == list(model.state_dict()), step
        if step == 3:
            assert torch.equal(average.module[1].embedding.weight, model[1].embedding.weight), "the new codes at once"


@pytest.mark.parametrize("made_at", [0, 1, 2])
def test_a_copy_made_in_the_warm_up_gets_the_codes(made_at):
    model, average = _model(Curriculum(3, 2)), None
    for step in range(5):
        if step == made_at:
            average = copy.deepcopy(model)
        _forward(model, range(step, step + 1), copies=[average[1]] if average is not None else [])
    assert torch.equal(average[1].embedding.weight, model[1].embedding.weight)
    assert average[1].provq.has_codebook
    assert not len(average[1].provq.reservoir)


# ----------------------------------------------------------------------------------------------------- checkpoints

def test_distributed_checkpoints_read_and_write_every_stage():
    for steps in (0, 2, 4, 6):
        model, other = _model(Curriculum(3, 2)), _model(Curriculum(3, 2))
        _forward(model, range(steps))
        state = {name: value.clone() for name, value in get_model_state_dict(model).items()}
        assert list(state) == list(model.state_dict())
        set_model_state_dict(other, state)
        for name, value in model.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), (steps, name)


def test_weights_of_the_host_alone_are_evaluated_with_their_codes():
    trained = _model(Curriculum(0, 0))
    _forward(trained, range(4))
    expected = _indices(trained)
    model = _model(Curriculum(50, 20))
    model.load_state_dict(host_state_dict(trained.state_dict()))
    assert torch.equal(_indices(model), expected)
    handle = model[1].provq

    model.train()
    _forward(model, range(1))
    assert (_indices(model) < 0).all(), "training has begun, in the warm-up: the codes are stale"

    handle.set_step(80)
    handle.reservoir_state.zero_()
    with pytest.raises(RuntimeError, match=r"weights loaded without.*init_codebook\(None\)"):
        handle.maybe_init_codebook()
    handle.init_codebook(None)
    assert torch.equal(model[1].embedding.weight, trained[1].embedding.weight)
    model.train()(_x(0))


def test_a_finished_run_goes_on_discretely_in_a_curriculum_of_no_length():
    for adaptive in (None, AdaptiveWarmup(patience=1)):
        model = nn.Sequential(nn.Conv2d(3, 4, 1), VectorQuantizer2(8, 4, 0.25))
        handle = attach(model[1], Curriculum(9, 2), adaptive=adaptive)
        for step in range(12):
            _forward(model, range(step, step + 1))
            if adaptive:
                handle.observe(1.0)
        assert handle.curriculum.warmup_steps == (2 if adaptive else 9), "steps 0 and 1 have trained in stage 1"
        tuned = _model(Curriculum(0, 0))
        tuned.load_state_dict(model.state_dict())
        _forward(tuned, range(1))
        assert tuned[1].provq.stage == 3
        assert torch.equal(_indices(tuned), _indices(model))


def test_a_resumed_run_follows_the_curriculum_it_is_given():
    model, other = _model(Curriculum(5, 3)), _model(Curriculum(3, 3))
    _forward(model, range(2))
    other.load_state_dict(model.state_dict())
    other[1].provq.set_step(3)
    assert other[1].provq.stage == 2


def test_a_second_warm_up_of_an_initialised_codebook_is_refused():
    model = _model(Curriculum(3, 2))
    _forward(model, range(6))
    again = _model(Curriculum(3, 2))
    again.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"step 0 is in the warm-up.*initialised by step 5.*Curriculum\(0, 0\)"):
        again[1].provq.set_step(0)
    fresh = _model(Curriculum(3, 2))
    fresh.load_state_dict(host_state_dict(model.state_dict()))
    _forward(fresh, range(6))
    assert fresh[1].provq.has_codebook
    fresh.eval()
    fresh[1].provq.set_step(0)  # looking at a step in evaluation is no training


def test_another_number_of_ranks_after_a_resume(monkeypatch):
    share = RESERVOIR_TOKENS_PER_CODE * 8
    for before, after in ((4, 1), (1, 4), (1, 1)):
        monkeypatch.setattr(provq_file, "_world", lambda ranks=before: ranks)
        old = attach(VectorQuantizer2(8, 2, 0.25), Curriculum(99, 1))
        for call in range(40):
            old.collect(torch.full((64, 2), float(call)))
        assert len(old.reservoir) == share // before
        monkeypatch.setattr(provq_file, "_world", lambda ranks=after: ranks)
        module = lucidrains.VectorQuantize(dim=2, codebook_size=8).train()
        handle = attach(module, Curriculum(99, 1))
        handle.load_state_dict(old.state_dict())
        handle.set_step(50)
        assert len(handle.reservoir) == share // after
        stayed = handle.reservoir[: int(handle.reservoir_state[0]), 0]
        assert stayed.max() == 39, "the latest stay"
        assert len(stayed) >= min(share // before, share // after)
        module(torch.full((1, 64, 2), 40.0))
        assert (handle.reservoir[:, 0] == 40.0).any()


# --------------------------------------------------------------------------------------------------- dtypes, sizes

@pytest.mark.parametrize("name", ["lucidrains", "lucidrains-projected", "lucidrains-residual", "lucidrains-fsq"])
def test_a_host_in_bfloat16_goes_through_all_stages(name):
    case = CASES[name]
    module = case.make().train()
    handle = attach(module, Curriculum(2, 2))
    module.bfloat16()
    for step in range(6):
        handle.set_step(step)
        handle.maybe_init_codebook()
        assert module(case.z().bfloat16())[0].dtype == torch.bfloat16, step


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_host_may_have_its_dtype_before_it_is_attached_to(dtype):
    for name in ("llamagen-euclidean", "lucidrains-projected", "lucidrains-residual"):
        case = CASES[name]
        module = case.make().train().to(dtype)
        handle = attach(module, Curriculum(2, 2))
        for step in range(5):
            handle.set_step(step)
            handle.maybe_init_codebook()
            assert module(case.z(step).to(dtype))[0].dtype == dtype, (name, step)


def test_a_grid_that_keeps_its_indices_is_not_counted():
    module = lucidrains.FSQ([8] * 12, return_indices=False)  # 7e10 codes
    handle = attach(module.train(), Curriculum(1, 1))
    for step in range(3):
        handle.set_step(step)
        handle.maybe_init_codebook()
        assert module(_normal(2, 5, 12))[0].shape == (2, 5, 12)


# ----------------------------------------------------------------------------------------------------- other calls

@pytest.mark.parametrize(("make", "shape", "message"), [
    (lambda: diveq.DIVEQ(8, 4, verbose=False), (2, 5, 4), "DIVEQ takes latents of 2 dimensions"),
    (lambda: VectorQuantizer2(8, 4, 0.25), (2, 4, 5), "VectorQuantizer2 takes latents of 4 dimensions"),
    (lambda: VectorQuantizer(8, 4, 0.25, 0.0, True, False), (2, 4, 5), "VectorQuantizer takes latents of 4"),
    (lambda: lucidrains.VectorQuantize(4, 8), (2, 5, 5, 4), "VectorQuantize takes latents of 2 or 3 dimensions"),
    (lambda: lucidrains.VectorQuantize(4, 8, accept_image_fmap=True), (2, 5, 4), "latents of 4 dimensions"),
])
def test_latents_that_the_host_will_refuse_are_refused_in_the_warm_up(make, shape, message):
    module = make().train()
    attach(module, Curriculum(2, 2))
    with pytest.raises(ValueError, match=message):
        module(_normal(*shape))


def test_a_mask_of_an_image_is_refused_in_the_warm_up():
    module = lucidrains.VectorQuantize(4, 8, accept_image_fmap=True).train()
    attach(module, Curriculum(2, 2))
    with pytest.raises(TypeError, match="mask in a call is not supported"):
        module(_normal(2, 4, 3, 3), mask=torch.ones(2, 3, 3, dtype=torch.bool))


def test_arguments_that_ask_for_nothing_may_be_given():
    module = lucidrains.VectorQuantize(4, 8).train()
    handle = attach(module, Curriculum(2, 2))
    for step in range(6):
        handle.set_step(step)
        handle.maybe_init_codebook()
        module(_normal(2, 12, 4, seed=step), mask=None, freeze_codebook=False, lens=None)
    assert handle.usage()["counts"].sum() == 4 * 24

    residual = lucidrains.ResidualVQ(dim=4, num_quantizers=2, codebook_size=8).train()
    handle = attach(residual, Curriculum(2, 2))
    mask = torch.arange(12) < torch.tensor([[12], [7]])
    residual(_normal(2, 12, 4), mask)
    assert handle.reservoir_state[1] == 19, "a mask by position is a mask"


def test_groups_of_a_grouped_residual_quantizer():
    grouped = lucidrains.GroupedResidualVQ(dim=8, groups=2, num_quantizers=2, codebook_size=8).train()
    handles = [attach(group, Curriculum(2, 2)) for group in grouped.rvqs]
    for step in range(6):
        for handle in handles:
            handle.set_step(step)
            handle.maybe_init_codebook()
        grouped(_normal(2, 12, 8, seed=step))
    assert [int(handle.usage()["counts"].sum()) for handle in handles] == [4 * 24 * 2] * 2


def test_subclasses_in_another_file():
    scope = {"SimVQ": SimVQ, "LFQ": lucidrains.LFQ}
    exec("class MySimVQ(SimVQ):\n    def forward(self, z, temp=None): return super(MySimVQ, self).forward(z)\n"
         "class MyLFQ(LFQ):\n    def forward(self, x): return super(MyLFQ, self).forward(x)\n", scope)
    for module, z in ((scope["MySimVQ"](8, 4), _normal(2, 4, 3, 3)), (scope["MyLFQ"](dim=3, codebook_size=8),
                                                                         _normal(2, 5, 3))):
        handle = attach(module.train(), Curriculum(1, 1))
        types = []
        for step in range(3):
            handle.set_step(step)
            handle.maybe_init_codebook()
            types.append(type(module(z)))
        assert len(set(types)) == 1


def test_one_optimizer_need_not_be_in_a_list():
    model = _model(Curriculum(1, 1))
    optimizer = torch.optim.Adam(model.parameters())
    handle = model[1].provq
    model(_x(0))[0].sum().backward()
    optimizer.step()
    handle.set_step(1)
    handle.maybe_init_codebook(optimizers=optimizer)
    assert model[1].embedding.weight not in optimizer.state
    assert model[0].weight in optimizer.state


def test_the_reservoir_moves_with_its_module():
    model = _model(Curriculum(3, 2))
    assert len(model[1].provq.reservoir), "there at once: a copy has the same entries as its model"
    meta = copy.deepcopy(model).to("meta")
    assert meta[1].provq.reservoir.is_meta
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    whole = torch.load(file, weights_only=False)
    _forward(whole, range(5))
    assert whole[1].provq.has_codebook


def test_loading_copies_the_collected_latents():
    model, other = _model(Curriculum(3, 2)), _model(Curriculum(3, 2))
    _forward(model, range(2))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    kept = state["1.provq.reservoir"].clone()
    other.load_state_dict(state)
    _forward(other, range(2, 3))
    assert torch.equal(state["1.provq.reservoir"], kept), "training on wrote into what was loaded"
    assert other[1].provq.reservoir.device == other[1].provq.step.device


# ---------------------------------------------------------------------------------------------- k-means once more

def test_a_host_is_reclustered_where_its_transition_ends():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), VectorQuantizer2(8, 4, 0.25))
    provq = attach(model[1], Curriculum(2, 3), recluster=True)
    optimizer = torch.optim.Adam(model.parameters())
    average = copy.deepcopy(model)
    happened = []
    for step in range(8):
        provq.set_step(step)
        kept = provq.reservoir[: int(provq.reservoir_state[0])].clone()
        info = provq.maybe_init_codebook(optimizers=optimizer, copies=average[1])
        if info:
            happened.append(step)
            expected = provq_file.kmeans(kept, 8).centroids
            assert torch.equal(model[1].embedding.weight, expected)
            assert torch.equal(average[1].embedding.weight, expected)
            assert model[1].embedding.weight not in optimizer.state
        if step == 4:  # a checkpoint of the transition has its latents
            state = model.state_dict()
            assert len(state["1.provq.reservoir"]) > 0
            resumed = copy.deepcopy(model)
            resumed.load_state_dict(state)
            assert torch.equal(resumed[1].provq.reservoir, provq.reservoir)
        optimizer.zero_grad()
        z, loss, _ = model(_x(step))
        (z.square().mean() + loss).backward()
        optimizer.step()
    assert happened == [2, 5]
    assert model.state_dict()["1.provq.reservoir"].tolist() == [[0.0] * 4], "its entry stays, and it is empty"
    with pytest.raises(ValueError, match=r"latents must be \(N, D = 4\)"):
        provq.recluster(torch.zeros(9, 3))
    info = provq.recluster(_normal(40, 4), optimizers=[optimizer])
    assert info["tokens"] == 40


def test_a_reclustering_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="FSQ has no codes to set"):
        attach(lucidrains.FSQ(levels=[4, 4], dim=4), Curriculum(2, 2), recluster=True)
    with pytest.raises(ValueError, match="VectorQuantizer2 has no transition to end"):
        attach(VectorQuantizer2(8, 4, 0.25), Curriculum(2, 0), recluster=True)
    with pytest.raises(RuntimeError, match=r"recluster\(\) before init_codebook\(\)"):
        attach(VectorQuantizer2(8, 4, 0.25), Curriculum(2, 2)).recluster(_normal(40, 4))
