"""Codecs, image tokenizers and residual packages (workers/provq_codecs.py) on the curriculum, by `attach`."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from places import ROOT
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from workers import provq_codecs
from workers.provq_codecs import PACKAGES, STAND_INS, original
from workers.provq_hosts import STAND_INS as REPOSITORIES
from workers.provq_hosts import Case, frozen

from scripts import hosts_table
from tokenizer import provq_attach, provq_hosts
from tokenizer.provq import Curriculum, ProVQ
from tokenizer.provq_attach import adapt, attach, detach, host_state_dict

CASES = {**STAND_INS, **PACKAGES}
every_host = pytest.mark.parametrize("name", CASES)
pytestmark = pytest.mark.filterwarnings("ignore:.*will at once replace", "ignore:set_step")


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _call(module: nn.Module, z: Tensor, seed: int = 0, **options):
    torch.manual_seed(seed)  # dropout of levels, codes that are replaced
    return module(z, **options)


def _same(a, b) -> bool:
    (flat, form), (other, other_form) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return form == other_form and all(torch.equal(x, y) if isinstance(x, Tensor) else x == y
                                      for x, y in zip(flat, other, strict=True))


def _objective(out, adapter) -> Tensor:
    quantized = provq_attach._get(out, adapter.quantized_at)
    losses = [provq_attach._get(out, path).sum() for path in adapter.losses_at.values()]
    return (quantized * _normal(*quantized.shape, seed=9)).sum() + sum(losses)


def _make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[name].make().train()


# ---------------------------------------------------------------------------------------------------- nothing changes

@every_host
def test_a_zero_curriculum_is_the_host_bit_for_bit(name):
    bare, wrapped = _make(name), _make(name)
    handle, adapter = attach(wrapped, Curriculum(0, 0)), adapt(_make(name), check=False)
    for step in range(3):
        handle.set_step(step)
        assert handle.maybe_init_codebook() is None
        results = []
        for module in (bare, wrapped):
            z = CASES[name].z(step).requires_grad_()
            out = _call(module, z, step)
            module.zero_grad()
            _objective(out, adapter).backward()
            with torch.no_grad():
                for p in module.parameters():
                    p -= 0.1 * p.grad if p.grad is not None else 0.0
            results.append((out, z.grad, [p.grad for p in module.parameters()]))
        assert _same(*results), step
        assert results[0][1].abs().sum() > 0
        assert all(torch.equal(value, wrapped.state_dict()[key]) for key, value in bare.state_dict().items())
        assert _same(_call(bare.eval(), z), _call(wrapped.eval(), z))
        bare.train(), wrapped.train()


@every_host
@pytest.mark.parametrize("training", [True, False])
def test_the_warm_up_returns_what_the_host_would(name, training, monkeypatch):
    module, z = _make(name), CASES[name].z()
    expected = _call(_make(name).train(training), z)
    handle = attach(module, Curriculum(3, 2))
    module.train(training)
    monkeypatch.setattr(type(module), "forward", None)
    out = module(z.requires_grad_())
    adapter = handle.quantizer
    (flat, form), (other, other_form) = pytree.tree_flatten(out), pytree.tree_flatten(expected)
    assert form == other_form or not training  # without training IBQ's loss may be a number
    for got, want in zip(flat, other, strict=True):
        if isinstance(want, Tensor) and got is not None:
            assert (got.shape, got.dtype) == (want.shape, want.dtype)
    assert (provq_attach._get(out, adapter.indices_at) == -1).all()
    assert all((provq_attach._get(out, path) == 0).all() for path in adapter.losses_at.values())
    _objective(out, adapter).backward()
    assert z.grad.abs().sum() > 0
    if training and adapter.settable:
        assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


@every_host
def test_the_transition_mixes_and_weights_the_hosts_own_output(name):
    module, z = _make(name), CASES[name].z()
    handle = attach(module, Curriculum(2, 3, loss_floor=0.25))
    handle.set_step(2)
    handle.init_codebook(None)
    handle.set_step(3)
    bare, adapter = _make(name), handle.quantizer
    expected, out = _call(bare, z), _call(module, z)
    dim = adapter.channels(z)
    smooth = adapter.smooth(z.movedim(dim, -1)).movedim(-1, dim)
    mixed = handle.alpha * smooth + (1 - handle.alpha) * provq_attach._get(expected, adapter.quantized_at)
    torch.testing.assert_close(provq_attach._get(out, adapter.quantized_at), mixed)
    for path in adapter.losses_at.values():
        torch.testing.assert_close(provq_attach._get(out, path), handle.omega * provq_attach._get(expected, path))
    assert torch.equal(provq_attach._get(out, adapter.indices_at), provq_attach._get(expected, adapter.indices_at))


# ------------------------------------------------------------------------------------------------------------ a codec

class Codec(nn.Module):
    """Windows of sound (B, 1, 48), or images (B, 1, 16, 12), around a quantizer that knows nothing of ProVQ."""

    def __init__(self, case: Case, quantizer: nn.Module):
        super().__init__()
        self.case = case
        self.encoder, self.decoder = nn.Linear(8, case.dim), nn.Linear(case.dim, 8)
        self.quantizer = quantizer

    def forward(self, x: Tensor, adapter) -> tuple[Tensor, Tensor, Tensor]:
        z = self.encoder(x).movedim(-1, self.case.channel_dim)
        out = self.quantizer(z)
        quantized = provq_attach._get(out, adapter.quantized_at)
        losses = [provq_attach._get(out, path) for path in adapter.losses_at.values()]
        loss = sum((loss.sum() for loss in losses if isinstance(loss, Tensor)), torch.zeros(()))
        return self.decoder(quantized.movedim(self.case.channel_dim, -1)), loss, quantized - z


def _windows(case: Case, step: int) -> Tensor:
    """(*case.lead, 8): windows of sums of two sines, or the same by name for images."""
    generator = torch.Generator().manual_seed(step)
    phase = torch.rand(*case.lead, 2, 1, generator=generator) * 2 * math.pi
    pitch = torch.tensor([[0.3], [0.9]]) * (1 + torch.randint(3, (*case.lead, 2, 1), generator=generator))
    return torch.sin(pitch * torch.arange(8.0) + phase).sum(-2)


@every_host
def test_a_small_codec_trains_through_all_stages_and_loads_into_the_host(name):
    case = CASES[name]
    host_keys = list(_make(name).state_dict())
    model = Codec(case, _make(name))
    handle = attach(model.quantizer, Curriculum(12, 6))
    adapter = adapt(_make(name), check=False)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    keys, rounded = list(model.state_dict()), {}
    for step in range(30):
        handle.set_step(step)
        info = handle.maybe_init_codebook(optimizers=[optimizer])
        assert (info is not None) == (step == 12)
        x = _windows(case, step)
        torch.manual_seed(step)
        y, loss, change = model(x, adapter)
        rounded[step] = change.square().mean().item()
        optimizer.zero_grad()
        ((y - x).square().mean() + loss).backward()
        optimizer.step()
        assert list(model.state_dict()) == keys
    assert torch.isfinite(loss)
    usage = handle.usage()
    assert usage["usage"] > 0.5
    if info is None and handle.quantizer.settable:
        assert handle.has_codebook
    state = host_state_dict(model.state_dict())
    alone = Codec(case, CASES[name].make())
    assert [key.removeprefix("quantizer.") for key in state if key.startswith("quantizer.")] == host_keys
    alone.load_state_dict(state)
    x = _windows(case, 99)
    assert torch.equal(alone.eval()(x, adapter)[0], model.eval()(x, adapter)[0])


SETTABLE = [name for name in CASES if adapt(CASES[name].make(), check=False).settable]


@pytest.mark.parametrize("name", SETTABLE)
def test_kmeans_brings_the_codes_near_the_latents(name):
    case, errors = CASES[name], []
    z = case.z(5)
    tokens = z.movedim(case.channel_dim, -1).reshape(-1, case.dim)
    for latents in (None, tokens):
        module = _make(name)
        handle = attach(module, Curriculum(1, 1))
        handle.set_step(1)
        handle.init_codebook(latents)
        out = _call(module.eval(), z)
        smooth = handle.quantizer.smooth(tokens)
        quantized = provq_attach._get(out, handle.quantizer.quantized_at)
        errors.append((quantized.movedim(case.channel_dim, -1).reshape(smooth.shape) - smooth).square().mean().item())
    own_kmeans = name == "grouped-residual"  # of the batch itself
    assert errors[1] < (1.0 if own_kmeans else 0.8) * errors[0]


# -------------------------------------------------------------------------------------------------------------- traps

def test_encodecs_own_kmeans_of_the_first_batch_does_not_run():
    module = _make("encodec-residual")
    handle = attach(module, Curriculum(1, 1))
    for step in range(3):
        z = CASES["encodec-residual"].z(step)
        module(z)
    assert not any(layer._codebook.inited for layer in module.layers)
    handle.set_step(1)
    handle.maybe_init_codebook()
    codes = [layer._codebook.embed.clone() for layer in module.layers]
    module.eval()(z)
    assert all(layer._codebook.inited for layer in module.layers)
    assert all(torch.equal(a, layer._codebook.embed) for a, layer in zip(codes, module.layers, strict=True))


@pytest.mark.parametrize("stage", [0, 2, 9])
def test_encodec_may_ask_for_some_levels(stage):
    module, z = _make("encodec-residual"), CASES["encodec-residual"].z()
    handle = attach(module, Curriculum(1, 4))
    handle.set_step(stage)
    if stage:
        handle.init_codebook(None)
    for n_q in (1, 2, None):
        quantized, indices, losses = module(z, n_q=n_q)
        assert (len(indices), len(losses)) == ((n_q or 3),) * 2
        assert quantized.shape == z.shape
    counts = handle.usage()["counts"].reshape(3, 8).sum(1).tolist()
    assert counts == ([0, 0, 0] if not stage else [144, 96, 48])


def test_rare_codes_that_a_host_would_replace_are_named():
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # attach knows of no tokens yet
        handle = attach(STAND_INS["encodec"].make(), Curriculum(1, 1))
    handle.quantizer.module(CASES["encodec"].z(0)[:1])  # 12 tokens in a batch, for 8 codes
    handle.collect(_normal(5, 4))
    handle.set_step(1)
    with pytest.warns(UserWarning, match=r"VectorQuantization will at once replace 100% of the codes .* = 2 tokens"):
        handle.init_codebook(_normal(64, 4))


def test_search_by_angle_has_its_own_start():
    module = _make("dac")
    adapter = adapt(module)
    x = _normal(300, 6)
    adapter.fit_codebook_(x)
    latent, codes = adapter.latent(x), adapter.codebook()
    index = module(x.t()[None])[3][0]
    for k in range(8):
        along = latent[index == k] @ F.normalize(codes[k], dim=0)
        torch.testing.assert_close(along.mean(), codes[k].norm(), rtol=1e-4, atol=1e-5)
    ibq = _make("ibq")
    adapt(ibq).fit_codebook_(_normal(300, 4))
    lengths = ibq.embedding.weight.norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand(8), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["dac", "ibq", "encodec-residual", "latent"])
def test_what_has_no_nearest_code_is_for_attach_only(name):
    with pytest.raises(TypeError, match=r"Adapter lacks .*lookup, which ProVQ needs"):
        ProVQ(adapt(_make(name)), Curriculum(1, 1))


def test_titoks_usage_goes_on_from_the_clusters():
    adapter = adapt(_make("titok-clustering"))
    adapter.fit_codebook_(_normal(300, 4))
    assert adapter.module.embed_prob.sum().item() == pytest.approx(1)
    assert adapter.module.embed_prob.min() > 0


def test_hosts_that_are_refused_say_why():
    class VectorQuantizer2(nn.Module):
        def __init__(self):
            super().__init__()
            self.v_patch_nums, self.quant_resi, self.Cvae = (1, 2), nn.Identity(), 4

        def forward(self, f, ret_usages=False):
            return f, ret_usages, None

    with pytest.raises(ValueError, match=r"VectorQuantizer2 of VAR is not supported: its one table serves every scale"):
        attach(VectorQuantizer2(), Curriculum(1, 1))

    class ResidualVectorQuantizer(nn.Module):  # EnCodec's outer module, which returns a dataclass
        def __init__(self):
            super().__init__()
            self.vq = STAND_INS["encodec-residual"].make()

    with pytest.raises(TypeError, match=r"but its vq is one: encodec-residual"):
        attach(ResidualVectorQuantizer(), Curriculum(1, 1))
    with pytest.raises(ValueError, match="ResidualLFQ: spherical = True"):
        adapt(provq_codecs.lucidrains.ResidualLFQ(dim=3, codebook_size=8, num_quantizers=2, spherical=True))


# ----------------------------------------------------------------------------------------------------- real classes

ORIGINALS = {
    "encodec": ("encodec", "quantization/core_vq", "VectorQuantization", {"dim": 4, "codebook_size": 8}),
    "encodec-residual": ("encodec", "quantization/core_vq", "ResidualVectorQuantization",
                         {"num_quantizers": 3, "dim": 4, "codebook_size": 8}),
    "dac": ("dac", "nn/quantize", "VectorQuantize", {"input_dim": 6, "codebook_size": 8, "codebook_dim": 4}),
    "dac-residual": ("dac", "nn/quantize", "ResidualVectorQuantize", {
        "input_dim": 6, "n_codebooks": 3, "codebook_size": 8, "codebook_dim": 2, "quantizer_dropout": 0.5}),
    "diffusers": ("diffusers", "models/autoencoders/vae", "VectorQuantizer", {
        "n_e": 8, "vq_embed_dim": 4, "beta": 0.25, "legacy": False}),
    "titok": ("1d-tokenizer", "modeling/quantizer/quantizer", "VectorQuantizer", {"codebook_size": 8, "token_size": 4}),
    "titok-clustering": ("1d-tokenizer", "modeling/quantizer/quantizer", "VectorQuantizer", {
        "codebook_size": 8, "token_size": 4, "use_l2_norm": True, "clustering_vq": True}),
    "ibq": ("SEED-Voken", "src/IBQ/modules/vqvae/quantize", "IndexPropagationQuantize", {"n_e": 8, "e_dim": 4}),
    "esm": ("esm", "layers/codebook", "EMACodebook", {"n_codes": 8, "embedding_dim": 4}),
    "audiocraft": ("audiocraft", "audiocraft/quantization/core_vq", "ResidualVectorQuantization", {
        "num_quantizers": 3, "dim": 4, "codebook_size": 8, "decay": 0.99, "kmeans_init": True}),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_a_stand_in_is_its_original_and_the_original_trains(name):
    package, path, class_name, options = ORIGINALS[name]
    try:
        make = original(package, path, class_name)
    except ModuleNotFoundError as error:
        pytest.skip(f"{package} itself needs {error.name}")
    if make is None:
        pytest.skip(f"no package {package}, nor one in PROVQ_HOSTS")
    twin = {"audiocraft": "encodec-residual"}.get(name, name)
    case = {**CASES, **REPOSITORIES}[twin]
    stand_in, (real, fresh, unmodified) = case.make(), [make(**options) for _ in range(3)]
    if name == "esm":
        frozen(real), frozen(fresh)
    assert list(real.state_dict()) == list(stand_in.state_dict())
    for module in (real, stand_in):
        attach(module, Curriculum(0, 0))
        module.provq.quantizer.fit_codebook_(_normal(200, case.dim)) if module is real else None
    stand_in.load_state_dict(real.state_dict())
    for training in (True, False):
        outs = [_call(module.train(training), case.z(3)) for module in (real, stand_in)]
        for a, b in zip(*map(pytree.tree_leaves, outs), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    detach(real)
    handle = attach(fresh, Curriculum(2, 2))
    for step in range(6):
        handle.set_step(step)
        handle.maybe_init_codebook()
        _call(fresh.train(), case.z(step), step)
    assert handle.usage()["usage"] > 0.5
    unmodified.load_state_dict(host_state_dict(fresh.state_dict()))


def test_every_new_adapter_has_a_case():
    kinds = {type(adapt(case.make(), check=False)) for case in CASES.values()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        there = {getattr(provq_hosts, name) for name in provq_hosts.__all__ if name.endswith("Adapter")}
    elsewhere = {provq_hosts.TamingEMAAdapter, provq_hosts.EMACodebookAdapter}  # test_adapters.py
    assert there - kinds - elsewhere == {provq_hosts.VARAdapter, provq_hosts.CustomAdapter,
                                         provq_hosts.CustomResidualAdapter}


def test_the_table_in_the_readme_is_what_the_command_prints(capsys):
    hosts_table.main([])
    printed = capsys.readouterr().out
    assert printed in (ROOT / "tokenizer" / "README.md").read_text(encoding="utf-8")
    for kind in provq_attach.ADAPTERS:
        assert f"| `{kind}` |" in printed
