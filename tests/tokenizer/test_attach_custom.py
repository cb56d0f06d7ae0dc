"""kind="custom": quantizers that nobody has heard of, by functions and places, without surgery on the model."""

import copy
import dataclasses
import types
from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.provq import Curriculum
from tokenizer.provq_attach import attach, host_state_dict

pytestmark = pytest.mark.filterwarnings("ignore:set_step")


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Named = namedtuple("Named", "z_q loss extra")


@dataclasses.dataclass
class Result:
    codes: Tensor
    indices: Tensor
    loss: Tensor | None = None
    metrics: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Mapped(OrderedDict):
    """As Hugging Face's: a dataclass and a mapping, whose fields that are None are no keys."""

    codes: Tensor
    indices: Tensor
    loss: Tensor | None = None

    def __post_init__(self):
        self.update({name: value for name, value in vars(self).items() if value is not None})


class Foreign(nn.Module):
    """Codes on columns, compared by angle; projections; a return value of any form. z (B, n, 6)."""

    def __init__(self, form: str, dim: int = 6):
        super().__init__()
        self.form, self.into, self.out = form, nn.Linear(dim, 4), nn.Linear(4, dim)
        self.columns = nn.Parameter(torch.randn(4, 8))
        self.calls = 0

    def codes(self) -> Tensor:
        return F.normalize(self.columns, dim=0).t()

    def forward(self, z: Tensor, scale: float = 1.0):
        self.calls += 1
        unit = F.normalize(self.into(z), dim=-1)
        index = (unit @ self.codes().t()).argmax(-1)
        code = self.codes()[index]
        loss = scale * (unit - code).square().mean()
        quantized = self.out(unit + (code - unit).detach())
        return {"tuple": lambda: (quantized, loss, index),
                "list": lambda: [index, [quantized, loss]],
                "named": lambda: Named(quantized, None, (index, z.new_ones(3))),
                "dict": lambda: {"loss": {"vq": loss}, "z": quantized, "ids": index, "name": "x"},
                "ordered": lambda: OrderedDict(z=quantized, ids=index),
                "mapped": lambda: Mapped(quantized, index, loss),
                "mapped, no loss": lambda: Mapped(quantized, index),
                "object": lambda: types.SimpleNamespace(z=quantized, loss=loss, info={"ids": index}),
                "dataclass": lambda: Result(quantized, index, loss, {"perplexity": loss.detach()})}[self.form]()


PLACES = {
    "tuple": {"quantized_at": 0, "losses_at": {"vq": 1}, "indices_at": 2},
    "list": {"quantized_at": (1, 0), "losses_at": {"vq": (1, 1)}, "indices_at": 0},
    "named": {"quantized_at": "z_q", "losses_at": {"vq": "loss"}, "indices_at": ("extra", 0)},
    "dict": {"quantized_at": "z", "losses_at": {"vq": ("loss", "vq")}, "indices_at": "ids"},
    "ordered": {"quantized_at": "z"},
    "mapped": {"quantized_at": "codes", "losses_at": {"vq": "loss"}, "indices_at": "indices"},
    "mapped, no loss": {"quantized_at": "codes", "losses_at": {"vq": "loss"}, "indices_at": "indices"},
    "object": {"quantized_at": "z", "losses_at": {"vq": "loss"}, "indices_at": ("info", "ids")},
    "dataclass": {"quantized_at": "codes", "losses_at": {"vq": "loss"}, "indices_at": "indices"},
}
FUNCTIONS = {
    "codebook": lambda m: m.codes(), "set_codebook": lambda m, centroids, _: m.columns.copy_(centroids.t()),
    "latent": lambda m, x: F.normalize(m.into(x), dim=-1), "output": lambda m, codes: m.out(codes),
    "dim": 6, "channel_dim": -1,
}


def _find(out, place):
    for step in place if isinstance(place, tuple) else (place,):
        attribute = isinstance(step, str) and (isinstance(out, Mapped) or not isinstance(out, dict))
        out = getattr(out, step) if attribute else out[step]
    return out


@pytest.mark.parametrize("form", PLACES)
def test_any_return_value_through_all_stages(form):
    torch.manual_seed(0)
    host, places = Foreign(form), PLACES[form]
    keys = list(host.state_dict())
    handle = attach(host, Curriculum(4, 3, loss_floor=0.5), kind="custom", **FUNCTIONS, **places)
    optimizer = torch.optim.Adam(host.parameters(), 1e-2)
    for step in range(10):
        handle.set_step(step)
        assert (handle.maybe_init_codebook(optimizers=[optimizer]) is not None) == (step == 4)
        z = _normal(3, 20, 6, seed=step).requires_grad_()
        bare = type(host).forward(copy.deepcopy(host), z)
        calls = host.calls
        out = host(z)
        assert host.calls == calls + (step >= 4), "in the warm-up it does not run"
        assert type(out) is type(bare)
        quantized = _find(out, places["quantized_at"])
        smooth = host.out(F.normalize(host.into(z), dim=-1))
        expected = handle.alpha * smooth + (1 - handle.alpha) * _find(bare, places["quantized_at"])
        torch.testing.assert_close(quantized, expected)
        total = quantized.square().mean()
        for place in places.get("losses_at", {}).values():
            loss = _find(out, place)
            if form in ("named", "mapped, no loss"):
                assert loss is None
                continue
            torch.testing.assert_close(loss, (handle.omega if step >= 4 else 0.0) * _find(bare, place))
            total = total + loss
        if "indices_at" in places:
            indices = _find(out, places["indices_at"])
            assert torch.equal(indices, _find(bare, places["indices_at"]) if step >= 4 else torch.full((3, 20), -1))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
    assert form == "ordered" or handle.usage()["usage"] > 0.5
    state = host_state_dict(host.state_dict())
    assert list(state) == keys
    Foreign(form).load_state_dict(state)


def test_the_zero_curriculum_is_the_host():
    torch.manual_seed(0)
    host = Foreign("dict")
    bare = copy.deepcopy(host)
    attach(host, Curriculum(0, 0), kind="custom", **FUNCTIONS, **PLACES["dict"])
    out, expected = host(_normal(2, 5, 6), scale=3.0), bare(_normal(2, 5, 6), scale=3.0)
    assert torch.equal(out["loss"]["vq"], expected["loss"]["vq"])
    assert torch.equal(out["z"], expected["z"])


def test_arguments_of_a_call_are_passed_on_in_every_stage():
    torch.manual_seed(0)
    host = Foreign("tuple")
    handle = attach(host, Curriculum(1, 1), kind="custom", **FUNCTIONS, **PLACES["tuple"])
    z = _normal(2, 12, 6)
    for step in range(3):
        handle.set_step(step)
        handle.maybe_init_codebook()
        once, thrice = host(z)[1], host(z, scale=3.0)[1]
        torch.testing.assert_close(thrice, 3 * once)


def test_functions_that_do_not_fit_the_host_are_found_in_the_first_forward():
    for wrong in ({"latent": lambda m, x: m.into(x).flip(-1)}, {"codebook": lambda m: 2 * m.codes() + 1}):
        torch.manual_seed(0)
        host = Foreign("tuple")
        attach(host, Curriculum(2, 2), kind="custom", **FUNCTIONS | wrong, **PLACES["tuple"])
        with pytest.raises(ValueError, match="Foreign is no host for CustomAdapter: its own forward takes the nearest"):
            host(_normal(2, 5, 6))
        host = Foreign("tuple")
        attach(host, Curriculum(2, 2), kind="custom", check=False, **FUNCTIONS | wrong, **PLACES["tuple"])
        host(_normal(2, 5, 6))
    with pytest.raises(ValueError, match=r"channel_dim must be 1 .* got 2"):
        attach(Foreign("tuple"), Curriculum(1, 1), kind="custom", **FUNCTIONS | {"channel_dim": 2})
    with pytest.raises(TypeError, match="codebook"):
        attach(Foreign("tuple"), Curriculum(1, 1), kind="custom")
    with pytest.raises(TypeError, match="codebook: only kind='custom' takes callables"):
        attach(Foreign("tuple"), Curriculum(1, 1), codebook=len)


def _trained(wrong: dict, make=lambda: Foreign("tuple")) -> None:
    torch.manual_seed(0)
    host = make()
    handle = attach(host, Curriculum(1, 1), kind="custom", **{**FUNCTIONS, **PLACES["tuple"], **wrong})
    host(_normal(3, 20, 6))
    handle.set_step(1)
    handle.maybe_init_codebook()


@pytest.mark.parametrize(("wrong", "message"), [
    ({"latent": None}, r"Foreign: latent= makes \(2, 6\) of \(2, 6\), and \(2, 4\) is due: latents have dim = 6"),
    ({"output": None}, r"Foreign: output= makes \(2, 4\) of \(2, 4\), and \(2, 6\) is due"),
    ({"quantized_at": 1}, r"Foreign: quantized_at = \(1,\): \(\), and latents are \(3, 20, 6\)"),
    ({"indices_at": 0}, r"Foreign: indices_at = \(0,\): \(3, 20, 6\), and one for each of 60 latents is due"),
    ({"indices_at": 7}, r"Foreign: indices_at = \(7,\): nothing is there in its return value"),
    ({"losses_at": {"vq": "loss"}}, r"Foreign: losses_at\['vq'\] = \('loss',\): nothing is there"),
    ({"set_codebook": lambda *_: None}, "Foreign: codes were set to centroids, and for .* what is searched"),
    ({"set_codebook": lambda m, centroids, _: setattr(m, "columns", nn.Parameter(centroids.t().clone()))},
     "Foreign: setting its codes replaced a parameter, and optimizers hold the old one"),
])
def test_what_does_not_fit_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        _trained(wrong)


class Plain(nn.Module):
    """Returns the latents, too."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 6))

    def forward(self, z: Tensor):
        index = torch.cdist(z, self.table).argmin(-1)
        return z, self.table[index], (self.table[index] - z).square().mean(), index


@pytest.mark.parametrize("places", [{"indices_at": 3}, {}])
def test_latents_in_the_place_of_codes_are_noticed(places):
    wrong = {"latent": None, "output": None, "codebook": lambda m: m.table,
             "set_codebook": lambda m, centroids, _: m.table.copy_(centroids), "losses_at": {"vq": 2},
             "quantized_at": 0}
    with pytest.raises(ValueError, match=r"Plain is no host .* its error is 0 where .* is due"):
        _trained({"indices_at": None, **wrong, **places}, Plain)


class Renumbering(Foreign):
    """The first eight indices are for other tokens."""

    def forward(self, z: Tensor):
        quantized, loss, index = super().forward(z)
        return quantized, loss, index + 8


def test_indices_that_are_none_of_codes_are_named():
    with pytest.raises(ValueError, match=r"Renumbering: indices_at = \(2,\): \d+ to \d+, and codes are 0 to 7"):
        _trained({}, lambda: Renumbering("tuple"))


class Running(nn.Module):
    """Running means under names of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("book", _normal(8, 6))
        self.register_buffer("total", self.book.clone())
        self.register_buffer("share", torch.ones(8))

    def forward(self, z: Tensor):
        rows = z.reshape(-1, 6)
        index = torch.cdist(rows, self.book).argmin(1)
        codes = self.book[index].view(z.shape)
        if self.training:
            one_hot = F.one_hot(index, 8).float()
            self.share.lerp_(one_hot.sum(0), 0.1)
            self.total.lerp_((one_hot.t() @ rows).detach(), 0.1)
            self.book.copy_(self.total / self.share.clamp_min(1e-3)[:, None])
        return z + (codes - z).detach(), (codes.detach() - z).square().mean(), index.view(z.shape[:-1])


def test_running_means_that_were_not_set_are_noticed(recwarn):
    def whole(m: Running, centroids: Tensor, counts: Tensor) -> None:
        m.book.copy_(centroids)
        m.share.copy_(counts)
        m.total.copy_(centroids * m.share[:, None])

    common = {"codebook": lambda m: m.book, "latent": None, "output": None, "dim": None}
    _trained(common | {"set_codebook": whole}, Running)
    assert [str(w.message) for w in recwarn if "moves codes away" in str(w.message)] == []
    with pytest.warns(UserWarning, match=r"Running: its next training forward moves codes away .* by \d+% of their"):
        _trained(common | {"set_codebook": lambda m, centroids, _: m.book.copy_(centroids)}, Running)


class Levels(nn.Module):
    """Residual levels around one pair of projections. z (B, 6, n); indices (B, levels, n)."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(6, 4), nn.Linear(4, 6)
        self.levels = nn.ModuleList([nn.Embedding(8, 4) for _ in range(3)])

    def forward(self, z: Tensor):
        rest = latent = self.into(z.movedim(1, -1))
        indices = []
        for level in self.levels:
            indices.append(torch.cdist(rest, level.weight[None]).argmin(-1))
            rest = rest - level(indices[-1])
        quantized = latent + (latent - rest - latent).detach()
        return {"z_q": self.out(quantized).movedim(-1, 1), "codes": torch.stack(indices, 1),
                "commit": rest.square().mean()}


def test_residual_levels():
    torch.manual_seed(0)
    host = Levels()
    handle = attach(
        host, Curriculum(4, 2), kind="custom", levels=lambda m: m.levels, codebook=lambda level: level.weight,
        set_codebook=lambda level, centroids, _: level.weight.copy_(centroids),
        latent=lambda m, x: m.into(x), output=lambda m, codes: m.out(codes), dim=6, quantized_at="z_q",
        indices_at="codes", level_axis=1, losses_at={"commit": "commit"})
    for step in range(8):
        handle.set_step(step)
        handle.maybe_init_codebook()
        out = host(_normal(4, 6, 12, seed=step))
        assert out["codes"].shape == (4, 3, 12)
        assert ((out["codes"] < 0) == (step < 4)).all()
    counts = handle.usage()["counts"].reshape(3, 8)
    assert counts.sum(1).tolist() == [192] * 3
    assert (counts > 0).float().mean() > 0.8
    Levels().load_state_dict(host_state_dict(host.state_dict()))


def test_copies_of_an_attached_host_use_their_own_codes():
    torch.manual_seed(0)
    host = Foreign("tuple")
    handle = attach(host, Curriculum(2, 2), kind="custom", **FUNCTIONS, **PLACES["tuple"])
    host(_normal(3, 20, 6))
    twin = copy.deepcopy(host)
    handle.set_step(2)
    handle.maybe_init_codebook(copies=[twin])
    assert torch.equal(twin.columns, host.columns)
    twin.columns.data.zero_()
    assert twin.provq.quantizer.codebook().abs().sum() == 0
    assert handle.quantizer.codebook().abs().sum() > 0


class Wrong(Foreign):
    """Its indices are right until they are counted: beyond the codes from the first step of stage 2 on."""

    beyond = False

    def forward(self, z: Tensor, scale: float = 1.0):
        quantized, loss, index = super().forward(z, scale)
        return quantized, loss, index + 5 * self.beyond


def test_an_index_beyond_the_codes_is_named():
    torch.manual_seed(0)
    module = Wrong("tuple")
    handle = attach(module, Curriculum(1, 2), kind="custom", **FUNCTIONS, **PLACES["tuple"])
    module(_normal(4, 20, 6))
    handle.set_step(1)
    handle.maybe_init_codebook()
    module.beyond = True
    with pytest.raises(ValueError, match=r"Wrong returned index \d+ \(of levels, counted on\), and codes are 0 to 7"):
        module(_normal(4, 20, 6))
