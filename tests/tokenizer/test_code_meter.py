"""The statistics of code_meter.py against closed forms."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tokenizer.code_meter import (
    PaceMeter,
    drift,
    effective_rank,
    mean_pairwise_distance,
    moved,
    second_moments,
    spread,
)


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_mean_pairwise_distance_is_the_mean_over_pairs():
    codes = _normal(40, 5)
    pairs = [(codes[i] - codes[j]).norm().item() for i, j in itertools.combinations(range(40), 2)]
    assert mean_pairwise_distance(codes) == pytest.approx(sum(pairs) / len(pairs), rel=1e-6)
    assert mean_pairwise_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0]])) == 5.0
    assert mean_pairwise_distance(codes[:1]) == 0.0
    near = torch.tensor([[1e4, 0.0], [1e4 + 0.0078125, 0.0]])  # |a|^2 - 2ab + |b|^2 would lose this distance
    assert mean_pairwise_distance(near) == 0.0078125


def test_mean_pairwise_distance_in_blocks():
    codes = F.normalize(_normal(2500, 8), dim=1)  # more than one block of 2^22 elements
    # Two uniform points of the unit sphere in 8 dimensions are 1.389 apart on average (sqrt 2 in root mean square).
    expected = 2**7 * math.gamma(4) ** 2 / (math.sqrt(math.pi) * math.gamma(7.5))
    assert mean_pairwise_distance(codes) == pytest.approx(expected, rel=3e-3)


def test_effective_rank_closed_forms():
    rank = lambda z: effective_rank(second_moments(z))  # noqa: E731
    cross = torch.cat([torch.eye(6), -torch.eye(6)])
    assert rank(cross) == pytest.approx(6.0, abs=1e-9)  # equal spread in every direction
    assert rank(1000.0 + cross) == pytest.approx(6.0, abs=1e-6)  # the mean does not count
    line = torch.linspace(-1, 1, 50)[:, None] * torch.tensor([[1.0, 2.0, -1.0]])
    assert rank(line) == pytest.approx(1.0, abs=1e-3)
    weights = torch.tensor([3.0, 1.0])  # singular values in the ratio 3 : 1
    p = weights / weights.sum()
    two = torch.cat([torch.diag(weights), -torch.diag(weights)])
    assert rank(two) == pytest.approx(math.exp(-(p * p.log()).sum().item()), rel=1e-6)
    assert rank(torch.ones(1, 4)) == 0.0
    assert rank(torch.ones(9, 4) / 3) == 0.0
    assert rank(torch.zeros(0, 4)) == 0.0


def test_second_moments_add_up():
    z = _normal(100, 5)
    whole = second_moments(z)
    assert whole.shape == (6, 6)
    assert whole.dtype == torch.float64
    assert whole[0, 0] == 100
    torch.testing.assert_close(whole[0, 1:], z.double().sum(0))
    torch.testing.assert_close(second_moments(z[:30]) + second_moments(z[30:]), whole)


def test_drift_closed_forms():
    before = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # RMS distance to the mean: 1
    assert drift(before, before) == 0.0
    assert drift(before, before + torch.tensor([3.0, 4.0])) == pytest.approx(5.0)
    assert drift(10 * before, 10 * before + 1.0) == pytest.approx(math.sqrt(2) / 10)
    assert drift(before + 7, -before + 7) == pytest.approx(2.0)


def test_spread_and_moved_are_per_channel():
    x = _normal(5000, 4)
    assert spread(3.0 * x + 7.0) == pytest.approx(3.0 * spread(x), rel=1e-5)
    assert spread(x) == pytest.approx(1.0, abs=0.05)
    assert moved(x, x + 0.5) == pytest.approx(0.5, rel=1e-5)


def test_pace_is_measured_from_row_to_row_and_behind_since_k_means():
    latents, codes = _normal(500, 4), _normal(32, 4, seed=1)
    meter = PaceMeter()
    assert meter.behind(meter.row(latents, codes), 0.1, 10) is None, "no k-means yet"
    meter.start(latents, codes)
    row = meter.row(latents + 0.5, codes - 0.25)
    assert row == pytest.approx({"latent_spread": spread(latents), "code_spread": spread(codes),
                                 "latents_moved": 0.5, "codes_moved": 0.25}, rel=1e-5)
    assert meter.row(latents + 0.5, codes)["codes_moved"] == pytest.approx(0.25, rel=1e-5)
    assert meter.behind(row, 0.8, 10) is meter.behind(row, 0.7, 10) is None
    resumed = PaceMeter()
    resumed.load_state_dict(meter.state_dict())
    assert meter.behind(row, 0.5, 10) == "since k-means the codes in use fell from 80.0% to 50.0%"
    assert meter.behind(row, 0.5, 10) is None, "said once"
    contracted = resumed.row(0.5 * latents, codes)
    assert "the spread of the latents went from" in resumed.behind(contracted, 0.8, 10)
    resumed.start(latents, codes)
    assert resumed.behind(contracted, 0.8, 10) is None, "said once, whatever the k-means"


def test_usage_of_other_intervals_is_not_compared():
    latents, codes = _normal(500, 4), _normal(32, 4, seed=1)
    meter = PaceMeter()
    meter.start(latents, codes)
    row = meter.row(latents, codes)
    assert meter.behind(row, 0.9, 100) is meter.behind(row, 0.3, 10) is None  # fewer steps use fewer codes
    assert meter.behind(row, 0.2, 10) == "since k-means the codes in use fell from 30.0% to 20.0%"


def test_both_at_the_same_rate_are_not_behind():
    latents, codes = _normal(500, 4), _normal(32, 4, seed=1)
    meter = PaceMeter()
    meter.start(latents, codes)
    assert meter.behind(meter.row(0.1 * latents, 0.1 * codes), 0.5, 10) is None
    meter.start(latents, codes[:1])  # a single code has no spread
    meter.row(latents, codes[:1])
