"""Rivals have exactly the codes that they claim, are discrete in eval(), and hand a gradient to what they should."""

from itertools import pairwise

import pytest
import torch

from evaluations.evidence.rivals import (
    DiVeQ,
    NoiseSubstitution,
    SoftToHardVectorQuantizer,
    make_fsq,
    make_lfq,
)
from tokenizer.provq import Curriculum, ProVQ, nearest_code
from tokenizer.quantizer_config import fsq_levels

K, D = 64, 4
MAKE = {
    "soft-to-hard": lambda: SoftToHardVectorQuantizer(K, D, anneal_steps=10),
    "gumbel": lambda: SoftToHardVectorQuantizer(K, D, anneal_steps=10, gumbel=True),
    "nsvq": lambda: NoiseSubstitution(K, D),
    "diveq": lambda: DiVeQ(K, D),
    "fsq": lambda: make_fsq(K, D),
    "lfq": lambda: make_lfq(K, D, 0.25),
}


def tokens(n=300, seed=0):
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=MAKE)
def rival(request):
    torch.manual_seed(0)
    return MAKE[request.param]()


def test_in_eval_each_token_is_its_code(rival):
    provq, z = ProVQ(rival, Curriculum(0, 0), channel_dim=-1).eval(), tokens()
    out = provq(z)
    assert rival.codebook().shape == (K, D)
    assert out.indices.dtype == torch.int64
    assert 0 <= out.indices.min() <= out.indices.max() < K
    torch.testing.assert_close(out.quantized, rival.codebook()[out.indices], rtol=0, atol=1e-6)
    torch.testing.assert_close(provq.decode(out.indices), out.quantized, rtol=0, atol=1e-6)
    assert torch.equal(provq(z).quantized, out.quantized), "no noise"


def test_encoder_and_codes_get_a_gradient(rival):
    z = tokens().requires_grad_()
    out = rival(z)
    (out.codes.square().mean() + sum(out.losses.values())).backward()
    assert z.grad.abs().sum() > 0
    gradients = [p.grad for p in rival.parameters()]
    assert gradients
    assert all(g is not None and g.isfinite().all() and g.abs().sum() > 0 for g in gradients)


@pytest.mark.parametrize("name", ["soft-to-hard", "nsvq", "diveq"])
def test_rivals_with_a_table_choose_the_nearest_code_and_can_be_set(name):
    rival, centroids = MAKE[name](), tokens(K, seed=3)
    rival.set_codebook_(centroids)
    assert torch.equal(rival.codebook(), centroids)
    assert torch.equal(rival.eval()(tokens()).indices, nearest_code(tokens(), centroids))


@pytest.mark.parametrize("name", ["fsq", "lfq"])
def test_a_grid_cannot_be_set(name):
    with pytest.raises(NotImplementedError, match="fixed grid"):
        MAKE[name]().set_codebook_(torch.zeros(K, D))


def test_temperature_falls_from_hot_to_cold_and_then_the_mixture_is_the_code():
    quantizer = MAKE["soft-to-hard"]()
    assert quantizer.temperature == SoftToHardVectorQuantizer.HOT
    temperatures = []
    for _ in range(12):
        quantizer.update_()
        temperatures.append(quantizer.temperature)
    ratios = [b / a for a, b in pairwise(temperatures[:10])]
    assert ratios == pytest.approx([ratios[0]] * 9)
    assert temperatures[9:] == pytest.approx([SoftToHardVectorQuantizer.COLD] * 3)
    x = tokens()
    soft = quantizer(x)
    hard = quantizer.codebook()[soft.indices]
    assert (soft.codes - hard).square().mean() < 0.02 * (x - hard).square().mean()


def test_the_soft_mixture_is_the_softmax_of_distances():
    quantizer, x = MAKE["soft-to-hard"](), tokens(20).double()
    quantizer.double()
    distance = (x[:, None] - quantizer.codebook()).square().sum(-1)
    expected = (-distance / (quantizer.temperature * distance.mean())).softmax(1) @ quantizer.codebook()
    torch.testing.assert_close(quantizer(x).codes, expected)


def test_noise_has_the_length_of_the_error_and_a_random_direction():
    quantizer, x = MAKE["nsvq"](), tokens()
    a, b = quantizer(x), quantizer(x)
    error = (x - quantizer.codebook()[a.indices]).norm(dim=1)
    torch.testing.assert_close((a.codes - x).norm(dim=1), error)
    assert not torch.equal(a.codes, b.codes)


@pytest.mark.parametrize("bits", range(2, 18))
def test_fsq_has_exactly_as_many_codes(bits):
    levels = torch.tensor(fsq_levels(2**bits))
    assert levels.prod() == 2**bits
    assert set(levels.tolist()) <= {4, 8}


@pytest.mark.parametrize("size", [2, 100, 4095])
def test_fsq_refuses_other_sizes(size):
    with pytest.raises(ValueError, match=f"2\\^n >= 4, got {size}"):
        fsq_levels(size)
