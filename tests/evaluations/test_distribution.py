"""FID, Inception Score, precision, recall and KID against ADM's evaluator, closed forms and hand-made sets."""

import math

import numpy as np
import pytest
import torch
from places import GOLDEN
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric

from evaluations import distribution
from evaluations.distribution import (
    Gaussian,
    frechet_distance,
    gaussian_statistics,
    inception_score,
    kid,
    precision_recall,
)

NUMBERS = GOLDEN / "eval_golden.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(NUMBERS) as file:
        return dict(file)


def normal(n, d, seed, shift=0.0, scale=1.0):
    return shift + scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------- ADM's evaluator


def test_fid_is_the_evaluators(golden):
    found = frechet_distance(*(gaussian_statistics(golden[side]) for side in ("ref", "sample")))
    assert found == pytest.approx(float(golden["fid"]), abs=1e-7)  # the evaluator's mean is float32


@pytest.mark.parametrize("split_size", [100, 5000])
def test_inception_score_is_the_evaluators(golden, split_size):
    mean, _ = inception_score(golden["sample"] @ golden["W"], split_size=split_size)
    assert mean == pytest.approx(float(golden[f"is_split{split_size}"]), abs=1e-5)  # its softmax is float32


def test_precision_and_recall_are_the_evaluators(golden):
    found = precision_recall(golden["ref"], golden["sample"])
    assert found == (float(golden["precision"]), pytest.approx(float(golden["recall"]), abs=1e-12))
    radii = distribution._radii(torch.from_numpy(golden["ref"]).double(), 3, 64)
    np.testing.assert_allclose(radii, golden["radii_ref"][:, 0], rtol=1e-5)


# ------------------------------------------------------------------------------------------------------- FID


def test_statistics_are_numpys():
    x = normal(50, 6, 0, shift=1e3).numpy()
    mu, sigma = gaussian_statistics(x)
    np.testing.assert_allclose(mu, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(x.T), rtol=1e-10)


def test_fid_of_diagonal_gaussians():
    # |m1 - m2|^2 + sum of (s1 - s2)^2
    first = Gaussian(torch.tensor([0.0, 1.0, 2.0]), torch.diag(torch.tensor([1.0, 4.0, 9.0])))
    second = Gaussian(torch.tensor([1.0, 1.0, 0.0]), torch.diag(torch.tensor([4.0, 4.0, 0.25])))
    assert frechet_distance(first, second) == pytest.approx(5 + 1 + 0 + 2.5**2, rel=1e-12)


def test_fid_of_rotated_gaussians_that_commute():
    rotation = torch.linalg.qr(normal(5, 5, 1)).Q
    s1, s2 = torch.tensor([1.0, 2, 3, 4, 5]).double(), torch.tensor([2.0, 0.5, 3, 0, 7]).double()
    mu = torch.zeros(5).double()
    first, second = (Gaussian(mu, rotation @ torch.diag(s.square()) @ rotation.T) for s in (s1, s2))
    assert frechet_distance(first, second) == pytest.approx(float((s1 - s2).square().sum()), rel=1e-9)


def test_fid_of_covariances_that_do_not_commute():
    # For 2 x 2 matrices tr sqrt(A B) = sqrt(tr(A B) + 2 sqrt(det(A B))).
    a, b = torch.tensor([[2.0, 0.9], [0.9, 1.0]]).double(), torch.tensor([[1.0, -0.7], [-0.7, 3.0]]).double()
    root = math.sqrt(float((a @ b).trace()) + 2 * math.sqrt(float((a @ b).det())))
    mu = torch.zeros(2).double()
    expected = float(a.trace() + b.trace()) - 2 * root
    assert frechet_distance(Gaussian(mu, a), Gaussian(mu, b)) == pytest.approx(expected, rel=1e-12)


def test_fid_with_fewer_samples_than_dimensions():
    # Samples on orthogonal axes have commuting covariances, both of low rank.
    first, second = torch.zeros(8, 40).double(), torch.zeros(8, 40).double()
    first[:, :3], second[:, 20:22] = normal(8, 3, 2), normal(8, 2, 3)
    expected = sum(float(np.trace(np.cov(x.T.numpy()))) for x in (first, second))
    expected += float((first.mean(0) - second.mean(0)).square().sum())
    assert frechet_distance(gaussian_statistics(first), gaussian_statistics(second)) == pytest.approx(expected)


def test_fid_is_symmetric_and_zero_for_equals():
    a, b = (gaussian_statistics(normal(30, 64, seed, shift=seed)) for seed in (0, 1))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    # 30 samples in 64 dimensions: rounding makes 1e-16 of an eigenvalue that is 0, and its root is 1e-8.
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-7)


# ------------------------------------------------------------------------------------------- Inception Score


def test_inception_score_of_known_posteriors():
    assert inception_score(torch.zeros(40, 7)) == (pytest.approx(1), pytest.approx(0))  # nothing is recognised
    certain = 1e4 * torch.eye(8).repeat(10, 1)
    assert inception_score(certain)[0] == pytest.approx(8)      # all classes in every part
    assert inception_score(1e4 * torch.eye(8).repeat_interleave(10, 0), splits=8)[0] == pytest.approx(1)
    mixed = torch.log(torch.tensor([[0.9, 0.1], [0.1, 0.9]]))
    information = math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1)
    assert inception_score(mixed, splits=1)[0] == pytest.approx(math.exp(information))


def test_the_shuffled_inception_score_is_torch_fidelitys():
    logits = torch.randn(95, 6, generator=torch.Generator().manual_seed(0)).cumsum(0)  # neighbours are alike
    theirs = isc_features_to_metric(logits, splits=10, shuffle=True)
    mean, deviation = inception_score(logits, shuffle=True)
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-12)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-12)
    assert mean > 1.1 * inception_score(logits)[0]


def test_inception_score_over_parts():
    parts = [torch.zeros(4, 4), 1e4 * torch.eye(4)]
    assert inception_score(torch.cat(parts), splits=2) == (pytest.approx(2.5), pytest.approx(1.5))  # of 1 and 4
    logits = normal(50, 6, 0)
    assert inception_score(logits, splits=5) == inception_score(logits, split_size=10)
    assert inception_score(logits + 3) == pytest.approx(inception_score(logits))


# -------------------------------------------------------------------------------------- precision and recall


def test_which_side_is_which():
    # The samples sit in a corner of the reference: all are precise, most of the reference is not recalled.
    reference = torch.cartesian_prod(torch.arange(10.0), torch.arange(10.0))
    samples = torch.tensor([0.5, 0.5]) + 0.1 * normal(20, 2, 0)
    precision, recall = precision_recall(reference, samples)
    assert precision == 1.0
    assert recall < 0.05
    assert precision_recall(samples, reference) == (recall, precision)


def test_a_set_by_hand():
    # Points on a line, k = 1: radii of the reference are 1, 1, 9, so its balls cover [-1, 2] and [1, 19].
    reference, samples = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[-1.5], [1.5], [2.0], [19.5]])
    # Radii of the samples are 3, 0.5, 0.5, 17.5: their balls cover [-4.5, 1.5], [1, 2.5] and [2, 37].
    assert precision_recall(reference, samples, k=1) == (0.5, 1.0)
    assert precision_recall(reference, samples + 100, k=1) == (0.0, 0.0)


def test_blocks_change_nothing():
    a, b = normal(130, 5, 0), normal(90, 5, 1, shift=0.5)
    assert len({precision_recall(a, b, block_size=size) for size in (1, 7, 64, 1024)}) == 1


def test_a_set_covers_itself():
    a = normal(60, 4, 0)
    assert precision_recall(a, a) == (1.0, 1.0)


# ------------------------------------------------------------------------------------------------------- KID


def test_kid_is_the_unbiased_cubic_kernel_distance():
    a, b = normal(200, 8, 0).numpy(), normal(200, 8, 1, shift=0.3).numpy()
    d, n = a.shape[1], len(a)
    kaa, kbb, kab = ((x @ y.T / d + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = sum((k.sum() - np.trace(k)) / (n * (n - 1)) for k in (kaa, kbb))
    mean, deviation = kid(a, b, subset_size=n)  # every subset is the whole set
    assert mean == pytest.approx(within - 2 * kab.mean(), rel=1e-6)
    assert deviation == pytest.approx(0, abs=1e-6)


def test_kid_takes_the_samples_as_torch_fidelitys_first_input():
    reference, samples = normal(700, 8, 0), normal(400, 8, 1, shift=0.3)
    expected, other = (kid_features_to_metric(*pair, kid_subsets=100, kid_subset_size=300, rng_seed=2020, verbose=False)
                       for pair in ((samples, reference), (reference, samples)))
    name = "kernel_inception_distance_mean"
    assert kid(reference, samples, subset_size=300)[0] == expected[name]
    assert expected[name] != other[name]  # the subsets differ


def test_kid_of_one_distribution_is_about_zero():
    same, _ = kid(normal(600, 8, 0), normal(600, 8, 1), subset_size=300)
    other, _ = kid(normal(600, 8, 0), normal(600, 8, 1, shift=0.3), subset_size=300)
    assert abs(same) < 0.05 < other


# ----------------------------------------------------------------------------------------------------- input


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dtype_and_container_do_not_matter(dtype):
    a, b = normal(80, 4, 0).half(), normal(80, 4, 1).half()
    expected = precision_recall(a.double(), b.double())
    fid = frechet_distance(gaussian_statistics(a.double()), gaussian_statistics(b.double()))
    a, b = a.to(dtype), b.to(dtype).numpy()
    assert precision_recall(a, b) == expected
    assert frechet_distance(gaussian_statistics(a), gaussian_statistics(b)) == fid


def test_bad_input_is_named():
    good, bad = normal(20, 4, 0), normal(20, 4, 0)
    bad[[3, 5]] = math.nan
    with pytest.raises(ValueError, match="features: 2 rows are not finite, the first is row 3"):
        gaussian_statistics(bad)
    with pytest.raises(ValueError, match="samples: 2 rows"):
        precision_recall(good, bad)
    with pytest.raises(ValueError, match="logits: 2 rows"):
        inception_score(bad)
    with pytest.raises(ValueError, match="4 dimensions, samples 3"):
        precision_recall(good, good[:, :3])
    with pytest.raises(ValueError, match="N at least 4"):
        precision_recall(good, good[:3])
    with pytest.raises(ValueError, match="N at least 2"):
        gaussian_statistics(good[:1])
    with pytest.raises(ValueError, match="N at least 1000"):
        kid(good, good)
    with pytest.raises(ValueError, match="5 samples cannot be cut into 10 parts"):
        inception_score(good[:5])
    with pytest.raises(ValueError, match="split_size 0"):
        inception_score(good, split_size=0)
    with pytest.raises(ValueError, match=r"must be \(D,\) and \(D, D\)"):
        frechet_distance(gaussian_statistics(good), gaussian_statistics(good[:, :3]))
    broken = Gaussian(torch.tensor([math.inf]), torch.eye(1))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(broken, broken)
