"""Meters of latents and codes during validation, the same for every kind of data."""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.provq import code_statistics, drift, effective_rank, mean_pairwise_distance, second_moments
from tokenizer.runtime import distributed


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
            self.counts += torch.bincount(indices.flatten(), minlength=len(self.counts))

    def result(self, codebook: Tensor | None) -> dict[str, float]:
        """Collective, once. codebook (K, D); None: the warm-up has none, and its statistics are 0: no code is in use.

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
        return code_statistics(self.counts) | {
            "code_distance": 0.0 if codebook is None else mean_pairwise_distance(codebook),
            "effective_rank": effective_rank(self.moments),
            "quantization_error": self.error.item() / tokens.item() / max(variance, 1e-12),
        }


class DriftMeter:
    """How far the codes, and the latents of a few fixed samples, moved since the last call (see provq.drift).

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
        self.before = dict(state)


def _drift(before: Tensor, after: Tensor) -> float:
    size = before.double().square().sum(1).mean().sqrt()
    spread = (before - before.mean(0)).double().square().sum(1).mean().sqrt()
    if spread > 1e-6 * size:
        return drift(before, after)
    return ((after.double() - before).square().sum(1).mean().sqrt() / size.clamp_min(1e-12)).item()
