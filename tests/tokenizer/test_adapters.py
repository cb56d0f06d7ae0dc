"""Other people's quantizers on the curriculum: all of workers/provq_hosts.py, by `attach` and by ProVQ(adapt(...))."""

import copy
import functools
import math
import operator

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
import vector_quantize_pytorch as lucidrains
from golden_fill import fill_values, load_arrays, load_shapes
from torch import Tensor, nn
from workers.provq_hosts import CASES, STAND_INS, EMACodebook, SimVQ, VectorQuantizer, VectorQuantizer2, frozen

from tokenizer.provq import Curriculum, ProVQ
from tokenizer.provq_attach import ADAPTERS, Adapter, Attached, TableAdapter, adapt, attach, detach, host_state_dict

every_host = pytest.mark.parametrize("name", CASES)
TABLES = [name for name, case in CASES.items() if isinstance(adapt(case.make()), TableAdapter)]
SETTABLE = [name for name, case in CASES.items() if adapt(case.make()).settable]
EMA = ["taming-ema", "lucidrains", "lucidrains-image", "lucidrains-cosine", "lucidrains-projected"]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _spread(name: str, seed: int = 0) -> nn.Module:
    """A host whose codes lie among standard normal latents, as no constructor leaves them; in training mode."""
    torch.manual_seed(seed)
    module = CASES[name].make()
    adapter = adapt(module)
    for level in getattr(adapter, "levels", [adapter]):
        if adapter.settable:
            codes = _normal(level.num_codes, level.table().shape[1], seed=seed + 1)
            level.set_codebook_(F.normalize(codes, dim=1) if level.l2_norm else codes)
    return module.train()


def _attached(name: str, curriculum: Curriculum, step: int = 0) -> nn.Module:
    """A spread host attached and at `step`, codes as they are."""
    module = _spread(name)
    handle = attach(module, curriculum)
    handle.set_step(step)
    if handle.needs_init:
        handle.init_codebook(None)
    return module


def _call(module: nn.Module, z: Tensor, seed: int = 0, **options):
    torch.manual_seed(seed)  # diveq, dropout of residual levels
    return module(z, **options)


def _leaves(out) -> list:
    return [leaf for item in out for leaf in (_leaves(item) if isinstance(item, tuple) else [item])]


def _same(a, b) -> bool:
    def equal(x, y) -> bool:
        return torch.equal(x, y) and x.dtype == y.dtype if isinstance(x, Tensor) else x == y

    return type(a) is type(b) and len(_leaves(a)) == len(_leaves(b)) and all(map(equal, _leaves(a), _leaves(b)))


def _adapter(module: nn.Module) -> Adapter:
    return module.provq.quantizer if isinstance(getattr(module, "provq", None), Attached) else adapt(module)


def _at(out, path: tuple[int, ...]):
    return functools.reduce(operator.getitem, path, out)


def _quantized(module: nn.Module, out) -> Tensor:
    return _at(out, _adapter(module).quantized_at)


def _losses(module: nn.Module, out) -> list[Tensor]:
    found = [_at(out, path) for path in _adapter(module).losses_at.values()]
    return [loss.sum() for loss in found if loss is not None]


def _objective(module: nn.Module, out) -> Tensor:
    quantized = _quantized(module, out)
    return (quantized * _normal(*quantized.shape, seed=9)).sum() + sum(_losses(module, out))


# --------------------------------------------------------------------------------- a zero curriculum is the bare host

@every_host
def test_a_zero_curriculum_is_the_host_bit_for_bit(name):
    bare, wrapped = _spread(name), _spread(name)
    handle = attach(wrapped, Curriculum(0, 0))
    if bare.training and hasattr(bare, "codebook_used"):
        bare.codebook_used.requires_grad_(False)  # the host as it is raises on a CPU (see the trap below)
    optimizers = [torch.optim.SGD([*m.parameters(), nn.Parameter(torch.ones(1))], lr=0.1) for m in (bare, wrapped)]
    for step in range(4):
        handle.set_step(step)
        assert handle.maybe_init_codebook(optimizers=optimizers) is None
        results = []
        for module, optimizer in zip((bare, wrapped), optimizers, strict=True):
            z = CASES[name].z(step).requires_grad_()
            out = _call(module, z, step)
            optimizer.zero_grad()
            _objective(module, out).backward()
            optimizer.step()
            results.append((out, z.grad, [p.grad for p in module.parameters()]))
        (expected, z_grad, grads), (out, wrapped_grad, wrapped_grads) = results
        assert _same(out, expected)
        assert torch.equal(wrapped_grad, z_grad)
        assert z_grad.abs().sum() > 0
        assert len(grads) == len(wrapped_grads)
        assert all(torch.equal(a, b) if a is not None else b is None for a, b in zip(grads, wrapped_grads, strict=True))
        for key, value in bare.state_dict().items():
            assert torch.equal(wrapped.state_dict()[key], value), key
        assert _same(_call(wrapped.eval(), z, step), _call(bare.eval(), z, step))
        wrapped.train(), bare.train()
    counts = handle.usage()["counts"]
    indices = adapt(bare).indices_at
    assert counts.sum() > 0 or indices is None


@pytest.mark.parametrize("name", TABLES)
def test_the_wrapper_on_flat_tokens_is_the_host(name):
    bare = _spread(name)
    case, adapter = CASES[name], adapt(copy.deepcopy(bare))
    if hasattr(bare, "codebook_used"):
        bare.codebook_used.requires_grad_(False)
    model = ProVQ(adapter, Curriculum(0, 0), channel_dim=case.channel_dim)
    z_bare, z = case.z().requires_grad_(), case.z().requires_grad_()
    expected, out = _call(bare, z_bare), _call(model, z)
    _objective(bare, expected).backward()
    ((out.quantized * _normal(*z.shape, seed=9)).sum() + out.loss).backward()
    assert torch.equal(out.quantized, _quantized(bare, expected))
    assert torch.equal(out.loss, sum(_losses(bare, expected), torch.zeros(())))
    torch.testing.assert_close(z.grad, z_bare.grad, rtol=1e-6, atol=1e-7)
    for p, q in zip(adapter.module.parameters(), bare.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6)
    assert {k.removeprefix("quantizer.module.") for k in model.state_dict()} >= set(bare.state_dict())


@pytest.mark.parametrize("name", TABLES)
def test_encode_lookup_and_decode_agree_with_the_host(name):
    case = CASES[name]
    model = ProVQ(adapt(_spread(name)), Curriculum(0, 0), channel_dim=case.channel_dim).eval()
    z = case.z()
    out = _call(model, z)
    assert torch.equal(model.encode(z), out.indices)
    if "diveq" in name:  # its forward adds noise in eval() as well
        torch.testing.assert_close(model.decode(out.indices), out.quantized, rtol=0, atol=0.1)
    else:
        torch.testing.assert_close(model.decode(out.indices), out.quantized, rtol=1e-5, atol=1e-6)
    assert len(out.indices.unique()) > 2, "the premise: codes are in use"


def test_hosts_own_lookups_go_on_working():
    module = _attached("llamagen", Curriculum(2, 2), 9).eval()
    z = CASES["llamagen"].z()
    quantized, _, (_, _, indices) = module(z)
    torch.testing.assert_close(module.get_codebook_entry(indices, z.shape), quantized)
    assert isinstance(module, VectorQuantizer)
    assert module.embedding.weight.shape == (8, 4)


# ------------------------------------------------------------------------------------------------------ the warm-up

@every_host
@pytest.mark.parametrize("training", [True, False])
def test_the_warm_up_returns_the_hosts_tuple_and_never_runs_the_host(name, training, monkeypatch):
    module, z = _spread(name).train(training), CASES[name].z()
    if hasattr(module, "codebook_used"):
        module.codebook_used.requires_grad_(False)
    expected = _call(module, z)
    module = _attached(name, Curriculum(3, 2), 1).train(training)
    before = copy.deepcopy(host_state_dict(module.state_dict()))

    def fail(*_):
        raise AssertionError("the host ran in the warm-up")

    monkeypatch.setattr(type(module), "forward", fail)
    out = module(z)
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in before.items())
    adapter = module.provq.quantizer
    last = z.movedim(adapter.channels(z), -1)
    smooth = adapter.output(adapter.latent(last)).movedim(-1, adapter.channels(z))
    assert torch.equal(_quantized(module, out), smooth)
    for got, want in zip(_leaves(out), _leaves(expected), strict=True):
        assert type(got) in (type(want), int), "LlamaGen's usage is an int or a float"
        if isinstance(want, Tensor):
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert all(loss == 0 for loss in _losses(module, out))
    if adapter.indices_at:
        assert (_at(out, adapter.indices_at) == -1).all()


@pytest.mark.parametrize("name", SETTABLE)
def test_every_parameter_has_a_gradient_in_the_warm_up(name):
    module = _attached(name, Curriculum(3, 2))
    out = module(CASES[name].z().requires_grad_())
    _quantized(module, out).sum().backward()
    for key, parameter in module.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() == 0 or key.startswith("project_")


def test_latents_of_grids_round_to_their_codes():
    fsq = lucidrains.FSQ([5, 4, 3])
    z = 3 * _normal(200, 1, 3)
    smooth, quantized = adapt(fsq).latent(z), fsq(z)[0]
    half_width = torch.tensor([2, 2, 1])
    torch.testing.assert_close((smooth * half_width).round() / half_width, quantized)
    for options in ({"preserve_symmetry": True}, {"bound_hard_clamp": True}):
        fsq = lucidrains.FSQ([5, 4, 3], **options)
        bin_width = torch.tensor([2 / 4, 2 / 3, 1.0]) if "preserve_symmetry" in options else 1 / half_width
        assert ((adapt(fsq).latent(z) - fsq(z)[0]).abs() <= 0.5 * bin_width + 2e-3).all(), options
    for options in ({}, {"spherical": True}, {"soft_clamp_input_value": 3.0}):
        lfq = lucidrains.LFQ(dim=3, codebook_size=8, **options)
        assert torch.equal(adapt(lfq).latent(z).sign(), lfq.eval()(z).quantized.sign())


# --------------------------------------------------------------------------------------------------- the transition

@every_host
@pytest.mark.parametrize("step", [2, 3, 4])
def test_the_transition_mixes_and_weights_the_hosts_own_output(name, step):
    bare, module = _spread(name), _attached(name, Curriculum(2, 3, loss_floor=0.25), step)
    if hasattr(bare, "codebook_used"):
        bare.codebook_used.requires_grad_(False)
    handle, adapter, z = module.provq, adapt(bare), CASES[name].z()
    expected, out = _call(bare, z), _call(module, z)
    dim = adapter.channels(z)
    smooth = adapter.output(adapter.latent(z.movedim(dim, -1))).movedim(-1, dim)
    mixed = handle.alpha * smooth + (1 - handle.alpha) * _quantized(bare, expected)
    torch.testing.assert_close(_quantized(module, out), mixed)
    for loss, want in zip(_losses(module, out), _losses(bare, expected), strict=True):
        torch.testing.assert_close(loss, handle.omega * want)
    replaced = {id(leaf) for leaf in [_quantized(module, out), *_losses(module, out)]}
    rest = [(a, b) for a, b in zip(_leaves(out), _leaves(expected), strict=True) if id(a) not in replaced]
    assert rest
    assert handle.omega < 1


@pytest.mark.parametrize("name", ["llamagen-euclidean", "taming", "simvq", "taming-ema", "esm"])
def test_with_straight_through_z_tilde_moves_as_the_latent(name):
    for step in (0, 2, 3, 9):
        module = _attached(name, Curriculum(2, 3), step)
        z = CASES[name].z().requires_grad_()
        quantized = _quantized(module, module(z))
        upstream = _normal(*quantized.shape, seed=3)
        got, = torch.autograd.grad(quantized, z, upstream)
        torch.testing.assert_close(got, upstream)


def test_autocast_keeps_the_mix_in_the_hosts_dtype():
    for name in ("llamagen", "taming", "lucidrains"):
        bare, z = _spread(name).eval(), CASES[name].z().bfloat16()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, expected = _attached(name, Curriculum(2, 3), 3)(z), bare(z)
        assert out[0].dtype == expected[0].dtype
        assert out[0].isfinite().all()


# ------------------------------------------------------------------------------------------------ codes, optimizers

@pytest.mark.parametrize("name", SETTABLE)
def test_the_warm_ups_latents_become_the_codes(name):
    torch.manual_seed(0)
    module = CASES[name].make().train()
    handle = attach(module, Curriculum(4, 3))
    adapter, case = adapt(detach(copy.deepcopy(module))), CASES[name]
    blobs = 10 * _normal(8, case.dim, seed=5)

    def batch(seed: int) -> Tensor:
        n = math.prod(case.lead)
        tokens = blobs[torch.arange(n) % 8].roll(seed, 0) + 0.01 * _normal(n, case.dim, seed=seed)
        return tokens.reshape(*case.lead, case.dim).movedim(-1, case.channel_dim)

    for step in range(4):
        handle.set_step(step)
        assert handle.maybe_init_codebook() is None
        module(batch(step))
    handle.set_step(4)
    with pytest.raises(RuntimeError, match="maybe_init_codebook"):
        module(batch(9))
    info = handle.maybe_init_codebook()
    assert info["empty"] <= 8 * (len(getattr(adapter, "levels", [1])) - 1)  # later levels have nothing left over
    assert info["inertia"] < 0.01
    assert handle.maybe_init_codebook() is None
    z = batch(10)
    module.eval()
    smooth = adapter.output(adapter.latent(z.movedim(case.channel_dim, -1))).movedim(-1, case.channel_dim)
    assert (_quantized(module, module(z)) - smooth).abs().max() < 0.2, "every blob has its code"
    if name in EMA:  # and running means agree with the codes: a batch of the same latents does not move them
        before = adapt(detach(copy.deepcopy(module))).codebook().clone()
        module.train()(z)
        assert (adapt(detach(copy.deepcopy(module))).codebook() - before).abs().max() < 0.02


@pytest.mark.parametrize("name", EMA)
def test_without_running_means_the_first_update_would_undo_the_codes(name):
    # What set_codebook_ has to avoid: this shows that the data above tells right from wrong.
    module = _spread(name)
    adapter = adapt(module)
    adapter.table().data.copy_(10 * _normal(8, 4, seed=5))
    before = adapter.codebook().clone()
    module(CASES[name].z())
    assert (adapter.codebook() - before).abs().max() > 0.5


@pytest.mark.parametrize("name", TABLES)
def test_set_codebook_sets_the_codebook(name):
    module = _spread(name)
    adapter = adapt(module)
    codes = _normal(8, adapter.table().shape[1], seed=3)
    codes = F.normalize(codes, dim=1) if adapter.l2_norm else codes
    adapter.set_codebook_(codes, torch.arange(8))
    torch.testing.assert_close(adapter.codebook(), codes, rtol=0, atol=1e-6)
    assert (adapter.codebook().shape[0], adapter.dim) == (adapter.num_codes, CASES[name].dim)


def test_running_means_start_at_the_size_of_a_batch():
    module = lucidrains.VectorQuantize(4, 8)
    handle = attach(module, Curriculum(20, 2))
    for step in range(20):
        handle.set_step(step)
        module(_normal(5, 12, 4, seed=step))
    handle.set_step(20)
    assert handle.maybe_init_codebook()["tokens"] > 100
    assert module._codebook.cluster_size.sum().item() == pytest.approx(60)


def test_kmeans_init_of_the_host_is_done_by_provq():
    module = lucidrains.VectorQuantize(4, 8, kmeans_init=True)
    handle = attach(module, Curriculum(1, 2))
    module(_normal(5, 12, 4))
    assert not module._codebook.initted
    handle.set_step(1)
    handle.maybe_init_codebook()
    assert module._codebook.initted
    codes = module.codebook.clone()
    module.eval()(_normal(5, 12, 4, seed=1))
    assert torch.equal(module.codebook, codes)


def test_optimizers_forget_the_codebook_and_nothing_else():
    module = _spread("lucidrains-projected")
    learned = lucidrains.VectorQuantize(6, 8, codebook_dim=4, learnable_codebook=True, ema_update=False)
    for host, codes in ((learned, [learned._codebook.embed]), (module, [])):
        handle = attach(host, Curriculum(1, 2))
        optimizer = torch.optim.Adam(host.parameters(), lr=0.1)
        host(_normal(5, 12, 6))[0].square().sum().backward()
        optimizer.step()
        assert all(p in optimizer.state for p in host.parameters())
        handle.set_step(1)
        handle.maybe_init_codebook(optimizers=[optimizer])
        left = set(optimizer.state)
        assert left == set(host.parameters()) - set(codes)


def test_averages_of_the_weights_take_the_codes_over():
    module = _spread("llamagen")
    before, after = copy.deepcopy(module), None
    handle = attach(module, Curriculum(1, 2))
    after = copy.deepcopy(module)
    for average in (before, after):
        average.requires_grad_(False).eval()
    module(CASES["llamagen"].z())
    handle.set_step(1)
    handle.maybe_init_codebook(copies=[before, after])
    z = CASES["llamagen"].z(3)
    expected = module.eval()(z)
    assert _same(before(z), expected)
    assert _same(after(z), expected), "it knows that there is a codebook, too"


# ---------------------------------------------------------------------------------------------- masks and arguments

@pytest.mark.parametrize("name", ["lucidrains", "lucidrains-residual"])
def test_masked_tokens_change_nothing(name):
    mask = torch.arange(12)[None] < torch.tensor([[12], [7]])
    for step in (0, 3, 9):
        results = []
        for padding in (0.0, 1e4):
            module = _attached(name, Curriculum(2, 3), step)
            z = torch.where(mask[..., None], CASES[name].z(), padding)
            out = module(z, mask=mask)
            assert (out[0][~mask] == 0).all()
            results.append((out[0], out[2], module.provq.reservoir))
            if step == 0:
                assert module.provq.reservoir_state[1] == 19
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_arguments_that_change_the_tuple_are_refused_by_name():
    for module in (_attached("lucidrains", Curriculum(2, 3)), _attached("lucidrains", Curriculum(2, 3), 3)):
        with pytest.raises(TypeError, match=r"VectorQuantize: return_loss_breakdown .* before stage 3"):
            module(_normal(2, 12, 4), return_loss_breakdown=True)
    with pytest.raises(TypeError, match="VectorQuantizer2: temp in a call"):
        _attached("taming", Curriculum(2, 3))(CASES["taming"].z(), 1.0)
    discrete = _attached("lucidrains", Curriculum(2, 3), 9)
    assert len(discrete(_normal(2, 12, 4), return_loss_breakdown=True)) == 4
    with pytest.raises(ValueError, match=r"need 4 channels in dimension 1"):
        _attached("taming", Curriculum(2, 3))(_normal(2, 5, 3, 3))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: lucidrains.VectorQuantize(8, 8, heads=2, codebook_dim=4), "VectorQuantize: heads = 2"),
    (lambda: lucidrains.VectorQuantize(4, 8, affine_param=True), "affine_param = True"),
    (lambda: lucidrains.VectorQuantize(4, 8, vq_bridge=nn.Identity()), "vq_bridge = Identity"),
    (lambda: lucidrains.VectorQuantize(4, 8, return_zeros_for_masked_padding=False), "return_zeros_for_masked_padding"),
    (lambda: lucidrains.ResidualVQ(dim=4, num_quantizers=2, codebook_size=8, shared_codebook=True),
     "ResidualVQ: shared_codebook = True"),
    (lambda: lucidrains.ResidualVQ(dim=4, num_quantizers=2, codebook_size=8, implicit_neural_codebook=True),
     "implicit_neural_codebook = True"),
    (lambda: lucidrains.ResidualVQ(dim=4, num_quantizers=2, codebook_size=8, accept_image_fmap=True),
     "accept_image_fmap = True"),
    (lambda: lucidrains.ResidualVQ(dim=4, num_quantizers=2, codebook_size=8, use_cosine_sim=True), "use_cosine_sim"),
    (lambda: lucidrains.SimVQ(4, 8, codebook_transform=nn.Sequential(nn.Linear(4, 4))), "codebook_transform"),
    (lambda: lucidrains.SimVQ(4, 8, frozen_codebook_dim=6), "frozen_codebook_dim"),
    (lambda: lucidrains.FSQ([5, 5], orthogonal_rotation=True), "FSQ: orthogonal_rotation = True"),
    (lambda: lucidrains.LFQ(dim=3, codebook_size=8, orthogonal_rotation=True), "LFQ: orthogonal_rotation = True"),
    (lambda: VectorQuantizer2(8, 4, 0.25, remap="used.npy"), "VectorQuantizer2: remap = 'used.npy'"),
    (lambda: SimVQ(8, 4, remap="used.npy"), "SimVQ: remap = 'used.npy'"),
    (lambda: EMACodebook(8, 4), "EMACodebook: freeze_codebook = False"),
])
def test_unsupported_options_are_refused_by_name(make, message):
    for function in (adapt, lambda module: attach(module, Curriculum(1, 1))):
        with pytest.raises(ValueError, match=message):
            function(make())


def test_what_adapt_does_not_know():
    with pytest.raises(TypeError, match=r"Linear is none .*llamagen: VectorQuantizer;.*kind='custom'"):
        adapt(nn.Linear(2, 2))
    old = lucidrains.VectorQuantize(dim=4, codebook_size=8)
    del old.accept_3d_fmap  # as before vector-quantize-pytorch 1.27
    with pytest.raises(TypeError, match=r"VectorQuantize .*for lucidrains it lacks accept_3d_fmap: a version"):
        adapt(old)
    with pytest.raises(ValueError, match=r"unknown kind 'llama'.*llamagen, taming"):
        adapt(nn.Linear(2, 2), "llama")
    with pytest.raises(TypeError, match=r"VectorQuantizer2 is no llamagen quantizer: it lacks l2_norm"):
        adapt(VectorQuantizer2(8, 4, 0.25), "llamagen")
    with pytest.raises(TypeError, match=r"call: only kind='custom'"):
        adapt(VectorQuantizer2(8, 4, 0.25), call=len)
    with pytest.raises(TypeError, match=r"FSQAdapter lacks codebook"):
        ProVQ(adapt(lucidrains.FSQ([5, 5])), Curriculum(1, 1))
    with pytest.raises(TypeError, match=r"VectorQuantizer2 lacks .*adapt\(\)"):
        ProVQ(VectorQuantizer2(8, 4, 0.25), Curriculum(1, 1))
    module = VectorQuantizer2(8, 4, 0.25)
    attach(module, Curriculum(1, 1))
    with pytest.raises(RuntimeError, match="attach once"):
        attach(module, Curriculum(1, 1))


def test_renamed_and_derived_classes():
    class Renamed(VectorQuantizer2):
        pass

    class Copied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.n_e, self.e_dim = nn.Embedding(8, 4), 8, 4
            self.legacy, self.sane_index_shape = True, True

    assert isinstance(adapt(Renamed(8, 4, 0.25)), ADAPTERS["taming"])
    assert isinstance(adapt(SimVQ(8, 4)), ADAPTERS["simvq"]), "its stand-in derives from taming's"
    with pytest.raises(TypeError, match="Copied"):
        adapt(Copied())
    assert adapt(Copied(), "taming", check=False).num_codes == 8


# ---------------------------------------------------------------------------------------------------------- traps

def test_llamagens_usage_buffer_works_on_a_cpu():
    module = STAND_INS["llamagen"].make().train()
    with pytest.raises(RuntimeError, match="leaf Variable"):
        module(CASES["llamagen"].z())
    attach(module, Curriculum(0, 0))
    out = module(CASES["llamagen"].z())
    assert out[1][3] > 0
    assert module.codebook_used.grad_fn is None
    assert "codebook_used" in module.state_dict()


def test_the_stand_in_is_llamagens_quantizer():
    arrays = load_arrays("vq16_golden")
    weight = fill_values(load_shapes("vq16_keys"))["quantize.embedding.weight"]
    for prefix, l2_norm in (("l2", True), ("nol2", False)):
        module = VectorQuantizer(len(weight), 8, 0.25, 0.0, l2_norm, False).train()
        module.embedding.weight.data.copy_(weight)
        attach(module, Curriculum(0, 0))
        quantized, losses, (_, _, indices) = module(arrays["z"])
        assert torch.equal(indices, arrays[f"{prefix}_idx"])
        torch.testing.assert_close(quantized, arrays[f"{prefix}_quant"], rtol=1e-5, atol=1e-6)
        for loss, key in zip(losses, ("vq_loss", "commit_loss"), strict=False):
            torch.testing.assert_close(loss, arrays[f"{prefix}_{key}"], rtol=1e-4, atol=1e-7)


def test_a_frozen_esm_codebook_stays_at_the_centroids():
    module = frozen(EMACodebook(8, 4))
    handle = attach(module.train(), Curriculum(1, 2))
    module(_normal(3, 12, 4))
    handle.set_step(1)
    handle.maybe_init_codebook()
    assert not module._need_init
    assert torch.equal(module.z_avg, module.embeddings)
    codes = module.embeddings.clone()
    module(_normal(3, 12, 4, seed=1))
    assert torch.equal(module.embeddings, codes)
