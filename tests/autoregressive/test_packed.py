"""Packed weights: the same numbers up to rounding for any number of rows, and a model that stays as it was."""

import pytest
import torch
from gpt_models import tiny

from autoregressive.gpt import KVCache
from autoregressive.packed import PackedLinear, can_pack, packed
from autoregressive.sampling import SamplingConfig, generate


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 65])
def test_a_step_computes_the_same(rows):
    model = tiny(dim=64, vocab_size=50)
    assert can_pack(model)
    twin = packed(model, 7)  # whatever it was packed for
    x, position = torch.randn(rows, 1, 64), torch.tensor([0])
    with torch.no_grad():
        found, expected = (m.decode(x, position, KVCache(m.config, rows, x.dtype, x.device).layers, 1)
                           for m in (twin, model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_layer_adds_its_bias():
    linear = torch.nn.Linear(5, 3)
    x = torch.randn(2, 4, 5)
    torch.testing.assert_close(PackedLinear(linear, 4)(x), linear(x))


def test_the_model_stays_as_it_was_and_shares_all_else():
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = packed(model, 4)
    assert not any(type(module) is torch.nn.Linear for module in twin.modules())
    assert twin.tok_embeddings.weight is model.tok_embeddings.weight
    assert twin.layers[0].attention_norm.weight is model.layers[0].attention_norm.weight
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert type(model.output) is torch.nn.Linear


def test_only_float32_on_a_cpu_is_packed():
    assert not can_pack(tiny().cast(torch.bfloat16))
    assert not can_pack(tiny().to("meta"))


def test_sampling_uses_the_weights_of_the_call():
    """A copy kept from an earlier call would draw what the old weights say."""
    model, config = tiny(), SamplingConfig(cfg_scale=1, temperature=0)
    labels = torch.tensor([1, 2])
    first = generate(model, labels, seeds=[0, 1], config=config)
    with torch.no_grad():
        model.output.weight.neg_()
    second = generate(model, labels, seeds=[0, 1], config=config)
    assert not torch.equal(first, second)
    with torch.no_grad():
        logits = model(second[:, :-1], labels)
    assert torch.equal(logits.argmax(-1), second)
