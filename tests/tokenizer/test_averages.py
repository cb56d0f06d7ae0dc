"""Averages of models, of the libraries people have, around a plain ProVQ and around an attached host: they pair entries
of state dicts by place or by name, and follow the model into its codes. Those of packages that are not there skip."""

import copy

import pytest
import timm.utils
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn
from workers import provq_codecs, provq_hosts
from workers.provq_hosts import VectorQuantizer2

from tokenizer.choices import GRIDS
from tokenizer.grid_quantizers import GridQuantizer
from tokenizer.provq import QUANTIZERS, AdaptiveWarmup, Curriculum, ProVQ, make_quantizer
from tokenizer.provq_attach import Attached, adapt, attach
from tokenizer.provq_codes import DeadCodeRestart, FollowingVectorQuantizer

pytestmark = pytest.mark.filterwarnings("ignore:a deep copy of", "ignore:.*will at once replace", "ignore:k-means gave")


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Model(nn.Module):
    """Images (B, 3, 4, 4) around a plain ProVQ or an attached host."""

    def __init__(self, kind: str):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)
        if kind == "attach":
            self.quantize: nn.Module = VectorQuantizer2(8, 4, 0.25)
            attach(self.quantize, Curriculum(3, 2))
        else:
            self.quantize = ProVQ(make_quantizer(kind, 8, 4), Curriculum(3, 2))

    @property
    def provq(self) -> ProVQ:
        return self.quantize if isinstance(self.quantize, ProVQ) else self.quantize.provq

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = self.quantize(self.encoder(x))
        if isinstance(self.quantize, ProVQ):
            return self.decoder(out.quantized), out.loss, out.indices
        return self.decoder(out[0]), out[1], out[2][2]

    def before(self, step: int, x: Tensor, **options) -> None:
        """What a loop does before its forward."""
        self.provq.set_step(step)
        if isinstance(self.provq, Attached):
            self.provq.maybe_init_codebook(**options)
        elif self.provq.needs_init:
            with torch.no_grad():
                self.provq.init_codebook(self.encoder(x).movedim(1, -1).reshape(-1, 4))


def _train(model: Model, steps: range, average=None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in steps:
        x = _normal(8, 3, 4, 4, seed=step)
        model.before(step, x)
        y, loss, _ = model(x)
        optimizer.zero_grad()
        ((y - x).square().mean() + loss).backward()
        optimizer.step()
        if average is not None:
            average.update(model)


class ByPlace:
    """Hand-written, over `state_dict().values()` of a second model that was built and loaded, not copied."""

    def __init__(self, model: Model):
        self.module = Model("attach" if isinstance(model.provq, Attached) else "ema")
        self.module.load_state_dict(model.state_dict())

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for own, new in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            own.copy_(0.5 * own + 0.5 * new)


class ByName:
    """Hand-written, over `named_parameters()`, buffers copied (LlamaGen's does not copy them: ours have no meaning)."""

    def __init__(self, model: Model):
        self.module = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        own = dict(self.module.named_parameters())
        for name, parameter in model.named_parameters():
            own[name].lerp_(parameter, 0.5)
        for mine, buffer in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(buffer)


class Torch:
    def __init__(self, model: Model, **options):
        self.average = AveragedModel(model, **options)
        self.module, self.update = self.average.module, self.average.update_parameters


class EmaPytorch:
    def __init__(self, model: Model):
        package = pytest.importorskip("ema_pytorch")
        self.ema = package.EMA(model, beta=0.5, update_after_step=-1, update_every=1, include_online_model=False)
        self.ema.initted.fill_(True)
        self.module = self.ema.ema_model

    def update(self, model: nn.Module) -> None:
        self.ema.online_model[0] = model
        self.ema.update()


class Diffusers:
    """EMAModel, which accelerate's trainers use: of parameters, written into a model when it is evaluated."""

    def __init__(self, model: Model):
        package = pytest.importorskip("diffusers.training_utils")
        self.ema = package.EMAModel(model.parameters(), decay=0.5, min_decay=0.5)

    def update(self, model: nn.Module) -> None:
        self.ema.step(model.parameters())
        self.module = copy.deepcopy(model)
        self.ema.copy_to(self.module.parameters())


AVERAGES = {
    "timm-v2": lambda model: timm.utils.ModelEmaV2(model, decay=0.5),
    "timm-v3": lambda model: timm.utils.ModelEmaV3(model, decay=0.5),
    "timm-v3-loop": lambda model: timm.utils.ModelEmaV3(model, decay=0.5, foreach=False),
    "torch-ema": lambda model: Torch(model, use_buffers=True, avg_fn=get_ema_avg_fn(0.5)),
    "torch-ema-multi": lambda model: Torch(model, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    "torch-parameters": lambda model: Torch(model, multi_avg_fn=get_ema_multi_avg_fn(0.5)),
    "by-place": ByPlace,
    "by-name": ByName,
    "ema-pytorch": EmaPytorch,
    "diffusers": Diffusers,
}
every_kind = pytest.mark.parametrize("kind", ["attach", "ema", "vq"])


@every_kind
@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_follows_its_model_into_its_codes(name, kind):
    if (name, kind) == ("by-place", "vq"):
        pytest.skip("its second model is one of ema codes")
    model = Model(kind)
    keys, average = list(model.state_dict()), AVERAGES[name](model)
    _train(model, range(3), average)
    x = _normal(8, 3, 4, 4, seed=99)
    indices = average.module.eval()(x)[2]
    assert indices is None or (indices == -1).all(), "as evaluated: continuous in the warm-up"
    average.module.train()
    _train(model, range(3, 9), average)
    assert list(model.state_dict()) == list(average.module.state_dict()) == keys
    for _ in range(60):  # a model that rests: each entry of the average is pulled to the entry of the same name
        average.update(model)
    theirs = average.module.state_dict()
    for key, value in model.state_dict().items():
        if value.is_floating_point() and not key.endswith("reservoir"):
            torch.testing.assert_close(theirs[key], value, rtol=1e-4, atol=1e-6, msg=key)
    expected, got = model.eval()(x), average.module.eval()(x)
    assert torch.equal(got[2], expected[2])
    assert (got[2] >= 0).all()
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------------- frameworks

@every_kind
@pytest.mark.parametrize("callback", ["EMAWeightAveraging", "WeightAveraging", "StochasticWeightAveraging"])
def test_lightnings_averages(callback, kind, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.seen = Model(kind), []

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.05)

        def training_step(self, batch, batch_idx):  # noqa: ARG002
            self.model.before(self.global_step, batch)
            y, loss, _ = self.model(batch)
            return (y - batch).square().mean() + loss

        def validation_step(self, batch, batch_idx):  # noqa: ARG002
            self.seen.append(self.model(batch)[2])

    make = getattr(lightning.pytorch.callbacks, callback)
    options = {"EMAWeightAveraging": {"decay": 0.5}, "WeightAveraging": {},
               "StochasticWeightAveraging": {"swa_lrs": 0.05, "swa_epoch_start": 3}}[callback]
    module = Module()
    trainer = lightning.Trainer(
        max_epochs=5, accelerator="cpu", callbacks=[make(**options)], logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0)
    data = torch.utils.data.DataLoader(torch.stack([_normal(3, 4, 4, seed=n) for n in range(16)]), batch_size=8)
    trainer.fit(module, data, data)  # 10 steps; codes from step 3 on
    assert module.model.provq.has_codebook
    assert [indices is None or bool((indices < 0).all()) for indices in module.seen[:2]] == [True, True]
    assert all((indices >= 0).all() for indices in module.seen[4:])
    state = torch.load(trainer.checkpoint_callback.best_model_path, weights_only=True)["state_dict"]
    assert list(state) == [f"model.{key}" for key in Model(kind).state_dict()]
    assert (module.eval().model(_normal(8, 3, 4, 4))[2] >= 0).all()


@every_kind
def test_accelerates_checkpoints_and_an_average_beside_them(kind, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Model(kind)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.05))
    raw, keys = accelerator.unwrap_model(model), list(model.state_dict())
    average = timm.utils.ModelEmaV3(raw, decay=0.5)
    for step in range(8):
        for half in range(2):
            x = _normal(8, 3, 4, 4, seed=2 * step + half)
            with accelerator.accumulate(model):
                raw.before(step, x)
                y, loss, _ = model(x)
                accelerator.backward((y - x).square().mean() + loss)
                optimizer.step()
                optimizer.zero_grad()
        average.update(raw)
        if step in (1, 6):
            accelerator.save_state(str(tmp_path / str(step)))
    assert list(model.state_dict()) == list(average.module.state_dict()) == keys
    for step in (1, 6):
        accelerator.load_state(str(tmp_path / str(step)))
        assert (raw.provq.stage, raw.provq.has_codebook) == ((1, False) if step == 1 else (3, True))


# -------------------------------------------------------------------------------------------------------------- keys

def _plain() -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {name: make_quantizer(name, 8, 4) for name in QUANTIZERS}
    found["ema-restart"] = make_quantizer("ema", 8, 4, restart_below=0.1)
    found["follow"] = FollowingVectorQuantizer(8, 4)
    found |= {name: GridQuantizer(name, 8) for name in GRIDS}
    for name, case in provq_hosts.CASES.items():
        adapter = adapt(case.make(), check=False)
        if all(hasattr(adapter, needed) for needed in ProVQ.REQUIRED):
            found[f"adapt-{name}"] = adapter
    return found


PLAIN = _plain()


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("adaptive", [None, AdaptiveWarmup()])
def test_keys_and_shapes_of_a_plain_provq_are_fixed(name, adaptive):
    torch.manual_seed(0)
    provq = ProVQ(copy.deepcopy(PLAIN[name]), Curriculum(2, 2), channel_dim=-1, adaptive=adaptive)
    settable = not isinstance(PLAIN[name], GridQuantizer)
    shapes = {key: value.shape for key, value in provq.state_dict().items()}
    restart = DeadCodeRestart(provq.quantizer, 0.1) if name in ("vq", "simvq", "follow") else None
    for step in range(6):
        provq.set_step(step)
        z = _normal(32, provq.dim, seed=step).requires_grad_()
        if provq.needs_init:
            provq.init_codebook(z.detach() if settable else None)
        provq(z).quantized.sum().backward()
        if restart:
            restart.step()
        if adaptive:
            provq.observe(1.0)
        provq.usage()
        assert {key: value.shape for key, value in provq.state_dict().items()} == shapes, step
    provq.eval()(z)
    provq.encode(z)
    provq.load_state_dict(provq.state_dict())
    if settable:
        provq.recluster(z.detach())
    assert {key: value.shape for key, value in copy.deepcopy(provq).state_dict().items()} == shapes


HOSTS = {**provq_hosts.CASES, **provq_codecs.STAND_INS, **provq_codecs.PACKAGES}


@pytest.mark.parametrize("name", HOSTS)
def test_keys_of_an_attached_host_are_fixed(name):
    torch.manual_seed(0)
    case = HOSTS[name]
    module = case.make().train()
    host = list(module.state_dict())
    settable = adapt(case.make(), check=False).settable
    handle = attach(module, Curriculum(9, 2), recluster=settable, check=False)  # of 72 tokens: ties
    keys = list(module.state_dict())
    assert keys[: len(host)] == host
    copies = "dac" not in name  # weights of weight_norm, once they were used, cannot be copied
    for step in range(13):
        handle.set_step(step)
        handle.maybe_init_codebook()
        module(case.z(step))
        assert list(module.state_dict()) == keys, step
        if copies and step == 0:
            assert list(copy.deepcopy(module).state_dict()) == keys, step
    module.eval()(case.z())
    module.load_state_dict(module.state_dict())
    assert list(module.state_dict()) == keys
