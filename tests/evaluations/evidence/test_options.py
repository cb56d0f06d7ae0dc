"""The token mix: what it does, and that it does nothing else."""

import pytest
import torch

from evaluations.evidence.options import TokenMixProVQ
from tokenizer.provq import Curriculum, ProVQ, VectorQuantizer

K, D = 16, 4


def tokens(n=400, seed=0, scale=1.0, offset=0.0):
    return offset + scale * torch.randn(n, D, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------- token mix

def mixing(number):
    torch.manual_seed(0)
    provq = TokenMixProVQ(VectorQuantizer(K, D), Curriculum(0, 8, loss_floor=0.5))
    provq.set_step(number)
    return provq


def test_a_token_is_whole_and_drawn_with_probability_alpha():
    provq = mixing(3)
    z = tokens(20_000).t()[None]  # (1, D, N)
    out = provq(z)
    codes = provq.decode(provq.encode(z))
    continuous, discrete = (out.quantized == z).all(1), (out.quantized == codes).all(1)
    assert (continuous ^ discrete).all()
    assert continuous.double().mean().item() == pytest.approx(provq.alpha, abs=4 * 0.5 / 20_000**0.5)


def test_beside_the_mix_it_is_provq():
    for number in (3, 8, 9):
        ours = mixing(number)
        torch.manual_seed(0)
        plain = ProVQ(VectorQuantizer(K, D), Curriculum(0, 8, loss_floor=0.5))
        plain.set_step(number)
        z = tokens(64).t().reshape(1, D, 8, 8)
        a, b = ours(z), plain(z)
        torch.testing.assert_close((a.loss, a.losses, a.indices), (b.loss, b.losses, b.indices), rtol=1e-6, atol=0)
        if number >= 8:
            assert torch.equal(a.quantized, b.quantized)
        ours.eval(), plain.eval()
        assert torch.equal(ours(z).quantized, plain(z).quantized)


def test_token_mix_takes_no_mask():
    with pytest.raises(ValueError, match="no mask"):
        mixing(3)(torch.zeros(1, D, 2), mask=torch.ones(1, 2, dtype=torch.bool))
