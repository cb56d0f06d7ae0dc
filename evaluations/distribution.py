"""FID, sFID, Inception Score, KID, precision and recall of two sets of features: arrays in, numbers out.

Definitions are those of ADM's evaluator, which the field's tables are made with (Dhariwal & Nichol 2021), computed in
float64 and in blocks: 50,000 x 2,048 features need less than 4 GB. Where features lie on a GPU, so does the work.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ArrayLike = np.ndarray | Tensor
NEIGHBOURS = 3        # k of precision and recall in ADM's evaluator
KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020  # torch-fidelity's defaults
SHUFFLE_SEED = 2020  # of torch-fidelity's Inception Score


class Gaussian(NamedTuple):
    """Mean (D,) and unbiased covariance (D, D) of features, float64, on the CPU."""

    mu: Tensor
    sigma: Tensor


def gaussian_statistics(features: ArrayLike) -> Gaussian:
    """features (N, D), any real dtype -> their Gaussian. ValueError: N < 2, not 2-D, or a value that is not finite."""
    x = _checked(features, "features", least=2)
    mu = x.mean(0)
    x = x - mu
    return Gaussian(mu.cpu(), (x.T @ x / (len(x) - 1)).cpu())


def frechet_distance(first: Gaussian, second: Gaussian) -> float:
    """Fréchet distance |mu1 - mu2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2): FID of pooled, sFID of spatial features.

    The trace of the root is the sum of the roots of the eigenvalues of S1^1/2 S2 S1^1/2, which is symmetric and
    positive semi-definite, so covariances of fewer samples than dimensions need no jitter (scipy's sqrtm of S1 S2 may
    return complex numbers for them). Dowson & Landau 1982; Heusel et al. 2017. ValueError: shapes that do not agree.
    """
    mu1, sigma1 = (torch.as_tensor(t).double().cpu() for t in first)
    mu2, sigma2 = (torch.as_tensor(t).double().cpu() for t in second)
    shapes = [tuple(t.shape) for t in (mu1, sigma1, mu2, sigma2)]
    d = len(mu1) if mu1.dim() == 1 else -1
    if shapes != [(d,), (d, d)] * 2:
        raise ValueError(f"means and covariances must be (D,) and (D, D) on both sides, got {shapes}")
    if not all(bool(t.isfinite().all()) for t in (mu1, sigma1, mu2, sigma2)):
        raise ValueError("a mean or covariance is not finite")
    values, vectors = torch.linalg.eigh(sigma1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ sigma2 @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace
    return max(float(distance), 0.0)  # equal Gaussians give rounding errors of either sign


def inception_score(
    logits: ArrayLike, splits: int = 10, split_size: int | None = None, *, shuffle: bool = False
) -> tuple[float, float]:
    """Inception Score exp(E_x KL(p(y|x) | p(y))) of consecutive parts -> mean and deviation (population) over them.

    logits (N, C), any real dtype, in the order of the samples: mixed over classes, or the parts' marginals narrow.
    splits: number of equal parts (Salimans et al. 2016). split_size: instead, samples per part, the last one smaller,
    as ADM's evaluator does with 5,000; both are the same at N = 50,000. shuffle: first into the order that
    torch-fidelity's score takes them in, a function of N; ADM's does not.
    ValueError: fewer samples than parts, or values that are not finite.
    """
    x = _checked(logits, "logits", least=1)
    n = len(x)
    if shuffle:
        x = x[torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(n)).to(x.device)]
    if split_size is None:
        if not 1 <= splits <= n:
            raise ValueError(f"{n} samples cannot be cut into {splits} parts")
        bounds = [i * n // splits for i in range(splits + 1)]
    else:
        if split_size < 1:
            raise ValueError(f"split_size {split_size} is not positive")
        bounds = [*range(0, n, split_size), n]
    scores = []
    for low, high in pairwise(bounds):
        log_p = x[low:high].log_softmax(1)
        log_marginal = log_p.logsumexp(0) - np.log(high - low)
        scores.append((log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp())
    stacked = torch.stack(scores)
    return float(stacked.mean()), float(stacked.std(correction=0))


def precision_recall(
    reference: ArrayLike, samples: ArrayLike, k: int = NEIGHBOURS, block_size: int = 1024
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019) with ADM's k = 3 -> both in [0, 1].

    A set's manifold is the union of balls around its points that reach to their k-th nearest other point (of the same
    set). Precision is the share of samples inside the reference's manifold, recall the share of references inside the
    samples'. ADM's evaluator computes distances in float16 where they fit; here they are float64.

    reference (N, D), samples (M, D), any real dtype. block_size: rows of a distance matrix held at once.
    ValueError: widths that differ, not more than k points on a side, values that are not finite.
    """
    a, b = _checked(reference, "reference", least=k + 1), _checked(samples, "samples", least=k + 1)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"reference features have {a.shape[1]} dimensions, samples {b.shape[1]}")
    radii_a, radii_b = _radii(a, k, block_size), _radii(b, k, block_size)
    b_covered = torch.zeros(len(b), dtype=torch.bool, device=b.device)
    a_covered = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    for low in range(0, len(a), block_size):
        rows = slice(low, low + block_size)
        distances = _squared_distances(a[rows], b)  # (block, M)
        b_covered |= (distances <= radii_a[rows, None]).any(0)
        a_covered[rows] = (distances <= radii_b).any(1)
    return float(b_covered.double().mean()), float(a_covered.double().mean())


def kid(reference: ArrayLike, samples: ArrayLike, subset_size: int = KID_SUBSET_SIZE) -> tuple[float, float]:
    """Kernel Inception Distance (Bińkowski et al. 2018) by torch-fidelity -> mean and deviation over 100 subsets.

    Cubic kernel, unbiased, so values slightly below 0 occur. The samples are torch-fidelity's input 1, as its
    callers have it: the subsets, so the last digits, depend on the order. ValueError: a side with fewer than
    subset_size points.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    a, b = _checked(reference, "reference", least=subset_size), _checked(samples, "samples", least=subset_size)
    result = kid_features_to_metric(b.cpu(), a.cpu(), kid_subsets=KID_SUBSETS, kid_subset_size=subset_size,
                                    rng_seed=KID_SEED, verbose=False)
    return result["kernel_inception_distance_mean"], result["kernel_inception_distance_std"]


def _radii(x: Tensor, k: int, block_size: int) -> Tensor:
    """Squared distance (N,) of each point to its k-th nearest other one."""
    # A point is its own nearest neighbour, so the k-th other one is number k + 1.
    return torch.cat([
        _squared_distances(x[low : low + block_size], x).topk(k + 1, largest=False).values[:, -1]
        for low in range(0, len(x), block_size)
    ])


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(n, D), (m, D) -> (n, m), float64."""
    norms = x.square().sum(1, keepdim=True) + y.square().sum(1)
    return torch.addmm(norms, x, y.T, alpha=-2).clamp_(min=0)


def _checked(array: ArrayLike, what: str, least: int) -> Tensor:
    tensor = torch.as_tensor(array)
    if tensor.dim() != 2 or len(tensor) < least or not tensor.shape[1]:
        raise ValueError(f"{what} must be (N, D) with N at least {least}, got shape {tuple(tensor.shape)}")
    if not bool(tensor.isfinite().all()):
        rows = (~tensor.isfinite().all(1)).nonzero().flatten()
        raise ValueError(f"{what}: {len(rows)} rows are not finite, the first is row {int(rows[0])}")
    return tensor.double()
