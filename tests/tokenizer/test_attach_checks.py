"""Nothing silently wrong: look-alikes of known hosts, sizes, collapsed latents, calls that train in vain, averages."""

import copy
import warnings

import numpy as np
import pytest
import timm.utils
import torch
import torch.nn.functional as F
import vector_quantize_pytorch as lucidrains
from torch import Tensor, nn
from workers import provq_codecs
from workers.provq_hosts import CASES, VectorQuantizer, VectorQuantizer2

from tokenizer.provq import Curriculum, ProVQ, make_quantizer
from tokenizer.provq_attach import ADAPTERS, adapt, attach, detach, host_state_dict


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------- look-alikes

class Bridged(VectorQuantizer):
    """A LlamaGen fork whose table goes through a learned network (FVQ's VQBridge)."""

    def __init__(self, start: float = 1.0):
        super().__init__(8, 4, 0.25, 0.0, False, False)
        self.bridge = nn.Sequential(nn.Linear(4, 16), nn.GELU(), nn.Linear(16, 4))
        self.bridge[2].weight.data.mul_(start)
        self.bridge[2].bias.data.mul_(start)

    def forward(self, z: Tensor):
        twin = copy.copy(self)
        twin._modules = {"embedding": nn.Embedding.from_pretrained(self.codes())}
        return VectorQuantizer.forward(twin, z)

    def codes(self) -> Tensor:
        return self.embedding.weight + self.bridge(self.embedding.weight)


class Projected(Bridged):
    """One with SimVQ's projection as an option."""

    def codes(self) -> Tensor:
        return self.bridge[0](self.embedding.weight)[:, :4]


class Normalised(VectorQuantizer2):
    """A taming fork that compares normalised latents, by an option of another name."""

    def _quantize(self, z: Tensor):
        indices = super()._quantize(F.normalize(z, dim=1))[2]
        rows = z.movedim(1, -1)
        codes = self.embedding.weight[indices].view(rows.shape)
        return (rows + (codes - rows).detach()).movedim(-1, 1), (codes - rows).square().mean(), indices


@pytest.mark.parametrize("make", [Bridged, Projected, lambda: Normalised(8, 4, 0.25)])
def test_a_look_alike_is_refused_before_the_warm_up_with_both_numbers(make):
    host = make()
    assert host.training
    before, state = copy.deepcopy(host.state_dict()), torch.get_rng_state()
    for function in (adapt, lambda module: attach(module, Curriculum(2, 2))):
        with pytest.raises(ValueError, match=r"is no host for .*nearest code for \d+% of latents, and its error is .* "
                                             r"where .* is due.*kind='custom'.*check=False"):
            function(host)
    assert all(torch.equal(value, before[key]) for key, value in host.state_dict().items()), "a copy was tried"
    assert torch.equal(torch.get_rng_state(), state)
    assert not hasattr(host, "provq")
    assert attach(host, Curriculum(2, 2), check=False).quantizer.num_codes == 8


@pytest.mark.parametrize("wrapper", ["attach", "ProVQ"])
def test_a_host_that_becomes_one_is_refused_when_its_codes_are_set(wrapper):
    """A bridge that starts as the identity passes at first; by k-means somebody has trained it."""
    host = Bridged(start=0.0)
    z = _normal(4, 4, 4, 4)
    if wrapper == "attach":
        handle = attach(host, Curriculum(1, 1))
        host(z)
    else:
        handle = ProVQ(adapt(host), Curriculum(1, 1))
    nn.init.normal_(host.bridge[2].weight)
    handle.set_step(1)
    with pytest.raises(ValueError, match="Bridged is no host for LlamaGenAdapter"):
        handle.init_codebook(z.movedim(1, -1).reshape(-1, 4))
    assert handle.needs_init, "a failed call must not pass for done"
    assert all(module.training for module in host.modules()), "it was run in eval(), and put back"
    handle.quantizer.check = False
    assert handle.init_codebook(z.movedim(1, -1).reshape(-1, 4))["tokens"] == 64


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if adapt(case.make()).settable])
def test_the_check_tells_right_codes_from_shuffled_ones(name):
    adapter = adapt(CASES[name].make())
    x = _normal(200, CASES[name].dim)
    adapter.fit_codebook_(x)
    adapter.require_alike(x)
    adapter.nearest = lambda latents: torch.zeros(len(latents), dtype=torch.int64)
    for level in getattr(adapter, "levels", []):
        level.nearest = adapter.nearest
    with pytest.raises(ValueError, match="is no host for"):
        adapter.require_alike(x)


class LastOfEquals(VectorQuantizer2):
    """Where codes are equal, as those of collapsed latents, it takes the last of them (a GPU may take any)."""

    def _quantize(self, z: Tensor):
        quantized, loss, indices = super()._quantize(z)
        equal = (self.embedding.weight[indices][:, None] - self.embedding.weight).abs().amax(2) < 1e-6
        return quantized, loss, equal.long().mul(torch.arange(1, 9)).argmax(1)


class Renumbered(VectorQuantizer2):
    """The right codes by other numbers."""

    def _quantize(self, z: Tensor):
        quantized, loss, indices = super()._quantize(z)
        return quantized, loss, (indices + 1) % 8


@pytest.mark.filterwarnings("ignore:k-means gave")
def test_equal_codes_are_no_look_alike_and_other_numbers_are():
    tokens = _normal(3, 4).repeat(20, 1)
    adapter = adapt(LastOfEquals(8, 4, 0.25))
    adapter.fit_codebook_(tokens)
    assert not torch.equal(adapter(tokens).indices, adapter.assign(tokens)[1]), "there are equal codes"
    assert torch.equal(adapter(tokens).codes, adapter.assign(tokens)[0])
    with pytest.raises(ValueError, match="Renumbered is no host for TamingAdapter"):
        adapt(Renumbered(8, 4, 0.25))


def _returning(base: type[nn.Module], change) -> type[nn.Module]:
    return type("Fork", (base,), {"forward": lambda self, z: change(*base.forward(self, z))})


FORKS = {
    "no losses": _returning(VectorQuantizer, lambda z, _, info: (z, info[2])),
    "one loss": _returning(VectorQuantizer2, lambda z, loss, info: (z, {"vq": loss}, info)),
    "a loss that is one number": _returning(VectorQuantizer, lambda z, _, info: (z, z.mean(), info)),
    "a dictionary": _returning(VectorQuantizer, lambda z, losses, _: {"z": z, "losses": losses}),
    "indices alone": _returning(VectorQuantizer2, lambda z, loss, info: (z, loss, info[2])),
    "another argument": type("Fork", (VectorQuantizer2,), {"forward": lambda self, z, scale: (self, z, scale)}),
}


@pytest.mark.parametrize("name", FORKS)
def test_forks_that_return_something_else_are_refused_before_any_step(name):
    fork = FORKS[name]
    host = fork(8, 4, 0.25, 0.0, False, False) if issubclass(fork, VectorQuantizer) else fork(8, 4, 0.25)
    with pytest.raises(TypeError, match=r"Fork is no host for \w+Adapter, which reads another return value, or calls "
                                        r"it in another way \(.+\): kind='custom' can tell"):
        attach(host, Curriculum(2, 2))
    assert not hasattr(host, "provq")


@pytest.mark.parametrize("name", ["encodec-residual", "dac-residual", "lucidrains-residual", "grouped"])
def test_levels_that_share_their_codes_are_refused_before_any_step(name):
    host = {**provq_codecs.STAND_INS, **CASES}[name].make() if name != "grouped" else lucidrains.GroupedResidualVQ(
        dim=8, groups=2, num_quantizers=2, codebook_size=8)
    if name == "grouped":
        host.rvqs[1] = host.rvqs[0]
    else:
        levels = host.quantizers if name == "dac-residual" else host.layers
        levels[2] = levels[0]
    with pytest.raises(ValueError, match="levels that share their codes are not supported"):
        attach(host, Curriculum(2, 2))


def test_two_attached_quantizers_of_one_table_are_refused():
    """The k-means of the second would take the place of the first's."""
    first, second, copied = VectorQuantizer2(8, 4, 0.25), VectorQuantizer2(8, 4, 0.25), VectorQuantizer2(8, 4, 0.25)
    second.embedding.weight = first.embedding.weight
    handle = attach(first, Curriculum(2, 2))
    with pytest.raises(ValueError, match="its codes are those of a quantizer that is attached already"):
        attach(second, Curriculum(2, 2))
    assert not hasattr(second, "provq")
    attach(copied, Curriculum(2, 2))
    attach(detach(copy.deepcopy(first)), Curriculum(2, 2))
    detach(first)
    assert handle.quantizer.module is first, "it may outlive its place"
    attach(second, Curriculum(2, 2))


def test_options_of_forks_are_refused_by_name():
    fork = VectorQuantizer2(8, 4, 0.25)
    fork.l2_normalize = True
    with pytest.raises(ValueError, match=r"VectorQuantizer2: l2_normalize = True is not supported, only False"):
        attach(fork, Curriculum(1, 1))


# ----------------------------------------------------------------------------------------------------------- sizes

def test_sizes_belong_to_what_a_kind_needs():
    host = VectorQuantizer2(8, 4, 0.25)
    del host.e_dim  # as in diffusers, which calls it vq_embed_dim
    with pytest.raises(TypeError, match=r"VectorQuantizer2 is no taming quantizer: it lacks e_dim$"):
        adapt(host, "taming")
    with pytest.raises(TypeError, match=r"for taming it lacks e_dim[^:]*\): give kind="):
        adapt(host)
    host.e_dim, host.n_e = 4, 9
    with pytest.raises(ValueError, match=r"VectorQuantizer2 is no taming quantizer: its table is \(8, 4\), and K is 9"):
        adapt(host, "taming")
    for adapter in ADAPTERS.values():
        assert adapter.needs or adapter.sizes


def test_a_model_around_a_quantizer_is_told_where_it_is():
    model = nn.Module()
    model.inner = nn.Sequential(nn.Linear(2, 2), VectorQuantizer2(8, 4, 0.25))
    with pytest.raises(TypeError, match=r"Module is none of .*but its inner\.1 is one: taming"):
        attach(model, Curriculum(1, 1))


# ------------------------------------------------------------------------------------------------ collapsed latents

def _provq(tokens: Tensor) -> tuple[ProVQ, Tensor]:
    return ProVQ(make_quantizer("vq", 8, 4), Curriculum(0, 1), channel_dim=-1), tokens


def _host(tokens: Tensor, make=lambda: VectorQuantizer2(8, 4, 0.25)):
    handle = attach(make(), Curriculum(1, 1))
    handle.set_step(1)
    return handle, tokens


@pytest.mark.parametrize("start", [_provq, _host])
def test_codes_of_collapsed_latents(start):
    handle, tokens = start(_normal(1, 4).expand(50, 4))
    with pytest.raises(ValueError, match=r"all latents are equal \(a collapsed encoder"):
        handle.init_codebook(tokens)
    handle, tokens = start(_normal(3, 4).repeat(20, 1))
    with pytest.warns(UserWarning, match=r"k-means gave 3 distinct codes of 8: latents have few values"):
        handle.init_codebook(tokens)
    handle, tokens = start(_normal(60, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        handle.init_codebook(tokens)


def test_levels_that_see_nothing_left_over():
    def residual() -> nn.Module:
        return lucidrains.ResidualVQ(dim=4, num_quantizers=2, codebook_size=8)

    handle, tokens = _host(_normal(8, 4).repeat(20, 1), residual)
    with pytest.raises(ValueError, match=r"all residuals of level 2 are equal"):
        handle.init_codebook(tokens)


# ---------------------------------------------------------------------------------------------- calls in vain, steps

def _train(handle: ProVQ, forwards: int) -> list[str]:
    """Messages of so many forwards in the modes in which handle and its host are."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(forwards):
            handle.quantizer.module(_normal(2, 4, 3, 3)) if hasattr(handle, "collect") else handle(_normal(2, 4, 3, 3))
    return [str(w.message) for w in caught]


ANY = {
    "attach": lambda curriculum: attach(VectorQuantizer2(8, 4, 0.25), curriculum),
    "ProVQ": lambda curriculum: ProVQ(make_quantizer("vq", 8, 4), curriculum),
}
any_handle = pytest.mark.parametrize("make", ANY.values(), ids=ANY)


@any_handle
@pytest.mark.parametrize("curriculum", [Curriculum(50, 2), Curriculum(0, 50)])
def test_training_without_set_step_is_noticed_once(make, curriculum, monkeypatch):
    monkeypatch.setattr(ProVQ, "FORWARDS_OF_A_STEP", 5)
    assert _train(make(curriculum), 12) == [
        "5 training forwards at step 0: without set_step in every step, stages never end and codes that are running "
        "means never move"]
    handle = make(curriculum)
    for step in range(12):  # accumulated gradients: the step stays for some forwards
        handle.set_step(step)
        assert _train(handle, 4) == []
    getattr(handle.quantizer, "module", handle).eval()
    assert _train(handle, 12) == []


@any_handle
def test_without_stages_set_step_is_asked_for_by_running_means_alone(make, monkeypatch):
    assert ProVQ.FORWARDS_OF_A_STEP >= 1000, "gradients are accumulated over fewer forwards"
    monkeypatch.setattr(ProVQ, "FORWARDS_OF_A_STEP", 5)
    assert _train(make(Curriculum(0, 0)), 12) == []
    assert len(_train(ProVQ(make_quantizer("ema", 8, 4), Curriculum(0, 0)), 12)) == 1
    checkpointed = make(Curriculum(50, 2))
    module, z = getattr(checkpointed.quantizer, "module", checkpointed), _normal(2, 4, 3, 3).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):  # each runs forward twice
            torch.utils.checkpoint.checkpoint(module, z, use_reentrant=False)[0].sum().backward()


@any_handle
def test_a_step_over_the_whole_transition_is_noticed(make):
    for curriculum, before, after in ((Curriculum(3, 4), 2, 7), (Curriculum(0, 4), 0, 9), (Curriculum(3, 1), 2, 4)):
        handle = make(curriculum)
        handle.set_step(before)
        with pytest.warns(UserWarning, match=rf"set_step\({after}\) after {before} skips all of stage 2: Curriculum"):
            handle.set_step(after)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for curriculum in (Curriculum(3, 4), Curriculum(3, 1), Curriculum(0, 1), Curriculum(3, 0), Curriculum(0, 0)):
            handle = make(curriculum)
            for step in (0, 1, 2, 3, 4, 5, 6, 70):
                handle.set_step(step)
            make(curriculum).eval().set_step(70)
            resumed = make(curriculum)
            resumed.load_state_dict(handle.state_dict())
            resumed.set_step(71)
    handle = make(Curriculum(3, 0))
    handle.set_step(9)  # there is no transition to skip


def _attached(channel_dim: int) -> nn.Module:
    host = lucidrains.VectorQuantize(4, 8, channel_last=channel_dim == -1)
    attach(host, Curriculum(9, 1))
    return host


@pytest.mark.parametrize(("channel_dim", "form"), [(1, r"\(B, D, L\)"), (-1, r"\(B, L, D\)")])
@pytest.mark.parametrize("make", [_attached, lambda channel_dim: ProVQ(
    make_quantizer("vq", 8, 4), Curriculum(9, 1), channel_dim=channel_dim)])
def test_channels_that_could_be_either_dimension_are_noticed_once(make, channel_dim, form):
    host = make(channel_dim)
    with pytest.warns(UserWarning, match=rf"latents \(2, 4, 4\) are taken as {form}, and the other way") as caught:
        host(_normal(2, 4, 4)), host(_normal(2, 4, 4))
    assert len(caught) == 1


def test_channels_that_can_be_told_are_not_noticed():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("lucidrains", "lucidrains-channels-first", "taming"):
            host = CASES[name].make()
            attach(host, Curriculum(9, 1))
            host(CASES[name].z())


def test_steps_and_lengths_of_numpy():
    curriculum = Curriculum(np.int64(2), np.int32(2))
    for handle in (ProVQ(make_quantizer("vq", 8, 4), curriculum), attach(VectorQuantizer2(8, 4, 0.25), curriculum)):
        handle.set_step(np.int64(1))
        assert (handle.stage, handle.step.item(), type(handle._step)) == (1, 1, int)
        for wrong in (1.0, np.float32(1), True, "1", torch.tensor(1)):
            with pytest.raises(TypeError, match="step must be an int"):
                handle.set_step(wrong)


# -------------------------------------------------------------------------------------------------------- averages

def _model(attached: bool) -> tuple[nn.Sequential, ProVQ]:
    torch.manual_seed(0)
    quantizer = VectorQuantizer2(8, 4, 0.25) if attached else ProVQ(make_quantizer("ema", 8, 4), Curriculum(3, 2))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), quantizer)
    return model, attach(quantizer, Curriculum(3, 2)) if attached else quantizer


def _step(model: nn.Module, handle: ProVQ, step: int, **options) -> None:
    x = _normal(4, 3, 4, 4, seed=step)
    handle.set_step(step)
    if hasattr(handle, "maybe_init_codebook"):
        handle.maybe_init_codebook(**options)
    elif handle.needs_init:
        with torch.no_grad():
            handle.init_codebook(model[0](x).movedim(1, -1).reshape(-1, 4))
    model(x)


class HandWritten:
    """An average of everything, entry by entry, as many repositories have it; a second model, no deep copy."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.module, _ = _model("provq" in model[1]._modules)
        self.module.load_state_dict(model.state_dict())

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for own, new in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            own.copy_(self.decay * own + (1 - self.decay) * new)


@pytest.mark.parametrize("make", [timm.utils.ModelEmaV2, timm.utils.ModelEmaV3, HandWritten])
@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("made_at", [0, 2, 4])
@pytest.mark.filterwarnings("ignore:a deep copy of", "ignore:an average of models")
def test_keys_are_fixed_at_construction_so_that_averages_pair(make, attached, made_at):
    model, handle = _model(attached)
    keys, average = list(model.state_dict()), None
    for step in range(8):
        average = make(model, decay=0.5) if step == made_at else average
        _step(model, handle, step)
        if average is not None:
            average.update(model)
        assert list(model.state_dict()) == keys
    assert list(average.module.state_dict()) == keys
    table = next(key for key in keys if key.endswith(("embedding.weight", "quantizer.codes")))
    assert torch.allclose(average.module.state_dict()[table], model.state_dict()[table], atol=0.5)
    average.module.eval()
    out = average.module(_normal(4, 3, 4, 4))
    assert ((out[2][2] if attached else out.indices) >= 0).all()


def test_a_deep_copy_that_is_no_part_of_copies_gets_a_message():
    for given, message in (({}, True), ({"copies": None}, False), ({"copies": "it"}, False)):
        model, handle = _model(True)
        average = timm.utils.ModelEmaV2(model, decay=0.5)
        for step in range(3):
            _step(model, handle, step)
        if given.get("copies"):
            given = {"copies": [average.module[1]]}
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _step(model, handle, 3, **given)
        assert [w for w in caught if "a deep copy of VectorQuantizer2 is alive" in str(w.message)] != [] or not message
        assert len(caught) == message
    model, handle = _model(True)
    copy.deepcopy(model)  # dropped at once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(5):
            _step(model, handle, step)


@pytest.mark.parametrize("attached", [True, False])
def test_an_average_whose_codes_are_old_says_so_until_it_gets_the_new_ones(attached):
    for told in (False, True):
        model, handle = _model(attached)
        average = timm.utils.ModelEmaV2(model, decay=0.9)
        for step in range(6):
            _step(model, handle, step, **({"copies": None} if attached else {}))
            if step == 3 and told:
                average.module[1].load_state_dict(model[1].state_dict())
            average.update(model)
        x = _normal(4, 3, 4, 4)
        model.eval()(x)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            average.module.eval()(x)
            average.module(x)  # once
            _model(attached)[0].load_state_dict(average.module.state_dict())
        said = [str(w.message) for w in caught]
        assert len(said) == (0 if told else 2), said
        assert all("codes are to 73% those of before k-means" in line for line in said)  # 0.9^3


def test_checkpoints_of_before_the_keys_were_fixed_load():
    model, handle = _model(True)
    for step in range(6):
        _step(model, handle, step)
    old = {key: value for key, value in model.state_dict().items() if "reservoir" not in key}
    fresh, twin = _model(True)
    fresh.load_state_dict(old)
    assert twin.has_codebook
    assert list(fresh.state_dict()) == list(model.state_dict())
    plain, _ = _model(False)
    state = dict(plain.state_dict())
    state["1.reservoir"], state["1.reservoir_state"] = torch.zeros(9, 4), torch.zeros(2, dtype=torch.int64)  # 0.2
    plain.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------- host_state_dict

def test_a_wrapped_quantizers_keys_get_their_names_back():
    host = nn.Sequential(nn.Conv2d(3, 4, 1), VectorQuantizer2(8, 4, 0.25))
    keys = list(host.state_dict())
    model = nn.Sequential(host[0], ProVQ(adapt(host[1]), Curriculum(2, 2)))
    assert "1.quantizer.module.embedding.weight" in model.state_dict()
    found = host_state_dict(model.state_dict())
    assert list(found) == keys
    nn.Sequential(nn.Conv2d(3, 4, 1), VectorQuantizer2(8, 4, 0.25)).load_state_dict(found)
    assert list(host_state_dict(ProVQ(adapt(VectorQuantizer2(8, 4, 0.25)), Curriculum(2, 2)).state_dict())) == [
        "embedding.weight"]
    others = {"step": 1, "quantizer.module.weight": 2, "module.quantizer.module.step": 3}  # no ProVQ in sight
    assert host_state_dict(others) == others
