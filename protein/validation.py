"""Validation of a structure tokenizer on held-out chains: the same numbers for trainer, decode.py and tables."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protein.geometry import backbone_rmsd, lddt, tm_score
from tokenizer.code_meter import CodeMeter
from tokenizer.runtime import distributed

METRICS = ("rmsd", "lddt", "tm")


def reconstruction_metrics(predicted: Tensor, target: Tensor, mask: Tensor, *, tm: bool = True) -> dict[str, Tensor]:
    """Of each chain, float32 (B,): predicted, target (B, L, >= 3, 3) Angstrom, mask (B, L) of residues that count.

    rmsd: of N, CA and C after superposition, Angstrom; mirror images are not alike. lddt: of CA, in [0, 1], radius 15
    Angstrom. tm: TM-score of CA, residue onto residue, in (0, 1]; the superposition is searched for by TM-align.
    NaN for chains of fewer than 3 residues. tm=False leaves it out, which takes most of the time on long chains.
    """
    enough = mask.sum(-1) >= 3
    values = {
        "rmsd": backbone_rmsd(predicted, target, mask),
        "lddt": lddt(predicted[:, :, 1:2], target[:, :, 1:2], mask),
    }
    if tm:
        values["tm"] = tm_score(predicted[:, :, 1], target[:, :, 1], mask)
    return {name: torch.where(enough, value, math.nan) for name, value in values.items()}


def tm_of_chain(predicted: npt.NDArray[np.float32], target: npt.NDArray[np.float32]) -> float:
    """TM-score of CA positions (L, 3), all of which count: for processes that have nothing else to do."""
    x, y = torch.from_numpy(predicted), torch.from_numpy(target)
    return tm_score(x, y, torch.ones(len(x), dtype=torch.bool)).item()


class StructureMeter:
    """Means over all chains of all ranks, whatever their batches, each chain once; and CodeMeter's statistics.

    num_codes: K. dim: D, channels of a latent.
    """

    def __init__(self, num_codes: int, dim: int, device: torch.device):
        self.sums = torch.zeros(1 + 2 * len(METRICS), dtype=torch.float64, device=device)
        self.codes = CodeMeter(num_codes, dim, device)
        self.rmsds: list[float] = []

    def add_chains(self, predicted: Tensor, target: Tensor, mask: Tensor) -> None:
        """See reconstruction_metrics. Measures that a chain is too short for leave that chain out."""
        values = reconstruction_metrics(predicted, target, mask)
        self.rmsds += values["rmsd"].tolist()
        parts = [torch.tensor([len(mask)], device=mask.device)]
        for name in METRICS:
            known = values[name].isfinite()
            parts += [known.sum()[None], torch.where(known, values[name], 0.0).sum(dtype=torch.float64)[None]]
        self.sums += torch.cat([part.double() for part in parts])

    def result(self, codebook: Tensor | None) -> dict[str, Any]:
        """Collective. chains; rmsd, rmsd_median (Angstrom), lddt, tm; CodeMeter's; normalized_perplexity in [0, 1]:
        perplexity / K; None: no codes yet.
        """
        rmsds = [value for part in distributed.gather_objects(self.rmsds) for value in part]
        chains, *sums = distributed.all_reduce_(self.sums).tolist()
        out: dict[str, Any] = {"chains": int(chains)}
        for i, name in enumerate(METRICS):
            out[name] = sums[2 * i + 1] / sums[2 * i] if sums[2 * i] else math.nan
        out["rmsd_median"] = torch.tensor(rmsds).nanmedian().item()
        out |= self.codes.result(codebook)
        perplexity = out["perplexity"]
        return out | {"normalized_perplexity": perplexity and perplexity / len(self.codes.counts)}
