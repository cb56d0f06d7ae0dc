"""Statistics of latents and codes, and meters of them during validation, the same for every kind of data."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenizer.provq import code_statistics
from tokenizer.runtime import distributed


@torch.no_grad()
def mean_pairwise_distance(codebook: Tensor) -> float:
    """Mean Euclidean distance over the K (K - 1) / 2 pairs of codes (K, D): "Euc dist." of Tables 1 and 4."""
    codes, total = codebook.detach().float(), 0.0
    if len(codes) < 2:
        return 0.0
    for part in torch.split(codes, max(1, 2**22 // len(codes))):  # without the matmul shortcut: exact for near pairs
        total += torch.cdist(part, codes, compute_mode="donot_use_mm_for_euclid_dist").sum(dtype=torch.float64).item()
    return total / (len(codes) * (len(codes) - 1))


@torch.no_grad()
def second_moments(latents: Tensor) -> Tensor:
    """Sum of [1, z]^T [1, z] over tokens (N, D) -> (D+1, D+1) float64: add these over batches and ranks."""
    z = F.pad(latents.detach().double(), (1, 0), value=1.0)
    return z.t() @ z


def effective_rank(moments: Tensor) -> float:
    """exp(entropy of the normalised singular values) of the centred latents, in dimensions (Roy & Vetterli 2007).

    moments (D+1, D+1) from `second_moments`. Between 1 (a line) and D (a ball); 0 for fewer than two tokens.
    """
    n = moments[0, 0].clamp_min(1)
    mean = moments[0, 1:] / n
    eigenvalues = torch.linalg.eigvalsh(moments[1:, 1:] / n - torch.outer(mean, mean)).clamp_min(0)
    # Rounding leaves about 1e-15 of the raw second moment in directions that the latents do not use at all.
    eigenvalues = torch.where(eigenvalues > 1e-13 * moments[1:, 1:].diagonal().sum() / n, eigenvalues, 0.0)
    if not bool(eigenvalues.any()):
        return 0.0
    p = eigenvalues.sqrt() / eigenvalues.sqrt().sum()
    return (-torch.xlogy(p, p).sum()).exp().item()


@torch.no_grad()
def drift(before: Tensor, after: Tensor) -> float:
    """How far points (N, D) moved, in units of their spread: RMS displacement / RMS distance of `before` to its mean.

    0 = stagnant, 1 = moved by as much as they are apart. Of codes and of the latents of fixed images per interval, it
    shows the deadlock of section 3: latents that follow codes that do not move.
    """
    before, after = before.double(), after.double()
    spread = (before - before.mean(0)).square().sum(1).mean().sqrt()
    return ((after - before).square().sum(1).mean().sqrt() / spread.clamp_min(1e-12)).item()


def spread(x: Tensor) -> float:
    """Standard deviation of a channel of rows x (N, D), root mean square over channels."""
    return x.double().var(0, unbiased=False).mean().sqrt().item()


def moved(before: Tensor, after: Tensor) -> float:
    """How far rows (N, D) moved, root mean square over tokens and channels, in the units of `spread`."""
    return F.mse_loss(after.double(), before.double()).sqrt().item()


@torch.no_grad()
def count_(counts: Tensor, indices: Tensor) -> None:
    """Add to counts (K,) int64 how often each code is among indices (int64, any shape; negative: none)."""
    indices = indices.flatten()  # not bincount: it would wait for the device to find the largest
    counts.index_add_(0, indices.clamp_min(0), (indices >= 0).long())


class CodeMeter:
    """Exact statistics over all tokens of all ranks, whatever their batches.

    num_codes: K. dim: D, channels of a latent.
    """

    def __init__(self, num_codes: int, dim: int, device: torch.device):
        self.error = torch.zeros((), dtype=torch.float64, device=device)  # sum of |z - code|^2
        self.counts = torch.zeros(num_codes, dtype=torch.int64, device=device)
        self.moments = torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, latents: Tensor, codes: Tensor | None, indices: Tensor | None) -> None:
        """latents, codes (N, D); indices int64, any shape. None: no codebook yet."""
        if codes is not None:
            self.error += (latents.float() - codes.float()).square().sum(dtype=torch.float64)
        self.moments += second_moments(latents)
        if indices is not None:
            count_(self.counts, indices)

    def result(self, codebook: Tensor | None) -> dict[str, Any]:
        """Collective, once. codebook (K, D); None: the warm-up has none, and nothing can be said of codes: None.

        usage in [0, 1]; perplexity (codes); code_distance (mean pairwise, Euclidean); effective_rank of the latents
        (dimensions); quantization_error: mean |z - code|^2 as a fraction of the latents' variance. FloatingPointError,
        on all ranks: latents that are not finite.
        """
        for tensor in (self.error, self.counts, self.moments):
            distributed.all_reduce_(tensor)
        tokens = self.moments[0, 0]
        if not bool(self.moments.isfinite().all()):
            raise FloatingPointError("latents are not finite: the run has diverged")
        mean = self.moments[0, 1:] / tokens
        variance = (self.moments[1:, 1:].diagonal() / tokens - mean.square()).sum().item()
        result = code_statistics(self.counts) | {
            "code_distance": 0.0 if codebook is None else mean_pairwise_distance(codebook),
            "effective_rank": effective_rank(self.moments),
            "quantization_error": self.error.item() / tokens.item() / max(variance, 1e-12),
        }
        of_latents = ("effective_rank",)
        return {name: value if name in of_latents or codebook is not None else None for name, value in result.items()}


class DriftMeter:
    """How far the codes, and the latents of a few fixed samples, moved since the last call (see `drift`).

    The paper's deadlock (section 3) is codes that stand still while latents crowd around them. The points of the last
    call are state, so that a resumed run reports the same numbers. Points that all coincide, such as a single code,
    have no spread: their drift is in units of their distance to the origin.
    """

    def __init__(self) -> None:
        self.before: dict[str, Tensor] = {}

    def update(self, **points: Tensor) -> dict[str, float]:
        """points: name -> (N, D). Returns name_drift each; 0 at the first call for a name."""
        before = self.before
        self.restart(**points)
        return {f"{k}_drift": _drift(before[k], self.before[k]) if k in before else 0.0 for k in points}

    def restart(self, **points: Tensor) -> None:
        """The next drift of these names counts from here: their points have been set to others, they did not move."""
        self.before = self.before | {k: v.detach().float().cpu().clone() for k, v in points.items()}

    def state_dict(self) -> dict[str, Tensor]:
        return self.before

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.before = {name: points.clone() for name, points in state.items()}


class PaceMeter(DriftMeter):
    """Whether codes keep pace with latents, from log row to log row and since k-means.

    A curriculum's transition contracts the latents; an optimizer moves a code by about its learning rate per step.
    Where that is too slow, codes stay behind and fall out of use. What rows are compared with is state, beside the
    points of DriftMeter. POINTS: of the latents and codes at most so many are kept, evenly spaced.
    """

    POINTS, CONTRACTED, UNUSED = 4096, 1.5, 0.75  # the second: of spreads, the third: of usage; beyond is behind

    def start(self, latents: Tensor, codes: Tensor) -> None:
        """k-means has set the codes (K, D), of latents (N, D) as they are compared with codes."""
        self.restart(code=codes, row_latent=_thinned(latents, self.POINTS), row_code=_thinned(codes, self.POINTS))
        advised = self.before["since_kmeans"][3] if "since_kmeans" in self.before else 0.0
        since = torch.tensor([spread(latents), spread(codes), 0.0, advised], dtype=torch.float64)
        self.before["since_kmeans"] = since  # spread of latents and of codes then; best usage; 1: advice was given

    def row(self, latents: Tensor, codes: Tensor) -> dict[str, float]:
        """latent_spread, code_spread; from the second row on latents_moved, codes_moved since the last (see `moved`).

        latents (N, D) of the same samples every time.
        """
        before = self.before
        entries = {"latent_spread": spread(latents), "code_spread": spread(codes)}
        self.restart(row_latent=_thinned(latents, self.POINTS), row_code=_thinned(codes, self.POINTS))
        if "row_code" in before:
            entries["latents_moved"] = moved(before["row_latent"], self.before["row_latent"])
            entries["codes_moved"] = moved(before["row_code"], self.before["row_code"])
        return entries

    def behind(self, row: dict[str, float], usage: float, steps: int) -> str | None:
        """What shows that codes fell behind since k-means; None: nothing does, or it has been said before.

        row: of `row`; usage: fraction of codes used in so many steps, and compared with that in as many only.
        """
        since = self.before.get("since_kmeans")
        if since is None:
            return None
        if int(self.before.get("usage_steps", steps)) != steps:  # resumed with another interval
            since[2] = 0.0
        self.before["usage_steps"] = torch.tensor(steps)
        latents, codes, best, advised = since.tolist()
        since[2] = max(best, usage)
        ratio = (row["code_spread"] / max(row["latent_spread"], 1e-12)) / max(codes / max(latents, 1e-12), 1e-12)
        why = None
        if usage < self.UNUSED * best:
            why = f"since k-means the codes in use fell from {best:.1%} to {usage:.1%}"
        elif not 1 / self.CONTRACTED <= ratio <= self.CONTRACTED:
            why = (f"since k-means the spread of the latents went from {latents:.3g} to {row['latent_spread']:.3g}, "
                   f"that of the codes from {codes:.3g} to {row['code_spread']:.3g}")
        if why is None or advised:
            return None
        since[3] = 1.0
        return why


def _thinned(points: Tensor, most: int) -> Tensor:
    return points if len(points) <= most else points[torch.arange(most, device=points.device) * len(points) // most]


def _drift(before: Tensor, after: Tensor) -> float:
    size = before.double().square().sum(1).mean().sqrt()
    spread = (before - before.mean(0)).double().square().sum(1).mean().sqrt()
    if spread > 1e-6 * size:
        return drift(before, after)
    return ((after.double() - before).square().sum(1).mean().sqrt() / size.clamp_min(1e-12)).item()
