"""The probe of StructTokenBench (Yuan et al., ICML 2025): a small network on frozen codes, its training, its metrics.

Code vector of each residue's token + learned position -> LayerNorm -> dropout -> Linear -> ReLU -> dropout -> Linear.
Chains ("classification") average over their residues before the first Linear. Residues of a batch are one long list:
nothing is padded.

Two protocols go through the same training and are kept apart, see PROTOCOLS in choices.py. Each picks, by its own score
on the validation split, the step (and train_task.py the learning rate) whose test numbers it reports.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from sklearn.metrics import f1_score, roc_auc_score
from torch import Tensor, nn

from protein.benchmark.tasks import Example
from tokenizer.runtime.seeding import StepSampler, seed_step

POSITIONS = 700  # rows of its table of positions


@dataclass(frozen=True)
class ProbeConfig:
    """Defaults are StructTokenBench's."""

    max_steps: int = 10000
    warmup_steps: int = 200
    plateau: float = 0.1        # fraction of max_steps at the full rate after warm-up
    min_ratio: float = 0.1      # of the rate, which the cosine ends in
    batch_size: int = 8         # chains; 64 for classification
    hidden: int = 512
    dropout: float = 0.1
    weight_decay: float = 0.01  # not of biases and LayerNorm
    max_grad_norm: float = 1.0

    def learning_rate_factor(self, step: int) -> float:
        """Of the update after `step` updates: linear from 0, a plateau, then a cosine down to min_ratio."""
        plateau = int(self.plateau * self.max_steps)
        if step < self.warmup_steps:
            return step / self.warmup_steps
        if step < self.warmup_steps + plateau:
            return 1.0
        rest = max(1, self.max_steps - self.warmup_steps - plateau)
        progress = (step - self.warmup_steps - plateau) / rest
        return max(self.min_ratio, 0.5 * (1 + math.cos(math.pi * progress)))


# ------------------------------------------------------------------------------------------------------------ data

@dataclass(frozen=True, eq=False)
class ProbeData:
    """One split: n chains of N residues in all, as arrays.

    tokens: int64 (N,), -1 where a residue has none. positions: int64 (N,), from 0 in each chain.
    starts: int64 (n + 1,). labels: float32 (N,), NaN = none; of "classification" int64 (n,).
    """

    tokens: Tensor
    positions: Tensor
    starts: Tensor
    labels: Tensor
    kind: str

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def count(self) -> int:
        """Labels that are scored."""
        return len(self) if self.kind == "classification" else int((~self.labels.isnan()).sum())


def probe_data(examples: Sequence[Example], tokens: Sequence[npt.NDArray[np.integer[Any]]], kind: str) -> ProbeData:
    """tokens: of every example's whole chain, (L,)."""
    chosen = [e.labelled if kind == "classification" else np.ones(len(e.chain), bool) for e in examples]
    lengths = np.array([int(mask.sum()) for mask in chosen])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    parts = [row[mask] for row, mask in zip(tokens, chosen, strict=True)]
    if kind == "classification":
        labels = torch.tensor([int(example.labels[example.labelled][0]) for example in examples])
    else:
        labels = torch.from_numpy(np.concatenate([example.labels for example in examples]))
    return ProbeData(
        torch.from_numpy(np.concatenate(parts).astype(np.int64)),
        torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        torch.from_numpy(starts), labels, kind,
    )


def _batch(data: ProbeData, chains: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """tokens (M,), positions (M,), owner (M,): place of each residue's chain in the batch, labels (M,) or (B,)."""
    spans = [range(int(data.starts[i]), int(data.starts[i + 1])) for i in chains]
    rows = torch.cat([torch.arange(span.start, span.stop) for span in spans])
    owner = torch.repeat_interleave(torch.arange(len(spans)), torch.tensor([len(span) for span in spans]))
    labels = data.labels[torch.tensor(chains)] if data.kind == "classification" else data.labels[rows]
    return data.tokens[rows], data.positions[rows], owner, labels


# ----------------------------------------------------------------------------------------------------------- model

class Probe(nn.Module):
    """codebook (K, D) float; outputs: 1, or the number of classes; positions: the longest chain."""

    codes: Tensor

    def __init__(self, codebook: Tensor, outputs: int, *, hidden: int, dropout: float, positions: int, pool: bool):
        super().__init__()
        dim = codebook.shape[1]
        self.pool = pool
        # A residue without a token (-1, the last row) is zero. StructTokenBench has rows of noise there.
        self.register_buffer("codes", torch.cat([codebook.detach().float(), codebook.new_zeros(1, dim).float()]))
        self.position = nn.Embedding(positions, dim)  # N(0, 1), as the class draws it
        self.norm = nn.LayerNorm(dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, outputs))

    def forward(self, tokens: Tensor, positions: Tensor, owner: Tensor) -> Tensor:
        """(M,), (M,), (M,) of B chains -> (M, outputs), or (B, outputs) if pooled."""
        x = self.dropout(self.norm(self.codes[tokens] + self.position(positions)))
        if self.pool:
            chains = int(owner[-1]) + 1
            count = torch.bincount(owner, minlength=chains).unsqueeze(1)
            x = x.new_zeros(chains, x.shape[1]).index_add_(0, owner, x) / count
        return self.head(x)


def probe_loss(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    """Of one batch, float32 []: cross-entropy, squared error, or cross-entropy in which both classes weigh the same.

    logits (M, 1) with labels (M,), NaN = left out, or logits (B, C) with labels (B,).
    """
    if kind == "classification":
        return F.cross_entropy(logits, labels)
    known = ~labels.isnan()
    x, y = logits.squeeze(1)[known], labels[known]
    if kind == "regression":
        return F.mse_loss(x, y)
    positive, n = y.sum(), len(y)
    weight = torch.where(y > 0.5, 0.5 * n / positive, 0.5 * n / (n - positive))
    return F.binary_cross_entropy_with_logits(x, y, weight=weight)


# --------------------------------------------------------------------------------------------------------- metrics

def auroc(scores: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    """Area under the ROC curve; NaN when all labels are alike."""
    return float(roc_auc_score(labels, scores)) if 0 < labels.sum() < len(labels) else math.nan


def rank_correlation(scores: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    """Spearman's rho; NaN when one side is constant."""
    if len(scores) < 2 or np.ptp(scores) == 0 or np.ptp(labels) == 0:
        return math.nan
    return float(spearmanr(scores, labels).statistic)


def macro_f1(scores: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    """Mean F1 of the classes that occur among the labels or the predictions (the highest of the scores (n, C))."""
    return float(f1_score(labels, scores.argmax(1), average="macro", zero_division=0))


def _binary_f1(scores: npt.NDArray[Any], labels: npt.NDArray[Any]) -> float:
    """As torchmetrics takes logits: for probabilities, if all happen to lie in [0, 1]."""
    threshold = 0.5 if ((scores >= 0) & (scores <= 1)).all() else 0.0
    return float(f1_score(labels, scores > threshold, zero_division=0))


Batches = Sequence[tuple[npt.NDArray[Any], npt.NDArray[Any]]]  # scores and labels of each batch, where there are labels


def _over_batches(measure: Callable[[npt.NDArray[Any], npt.NDArray[Any]], float], batches: Batches) -> float:
    """Unweighted mean; an undefined number counts as 0. A last batch of one residue weighs as much as a full one."""
    return float(np.mean([np.nan_to_num(measure(*batch)) for batch in batches]))


def measures(batches: Batches, kind: str) -> dict[str, tuple[float, float]]:
    """Protocol -> the number to report, and the score to choose by."""
    scores, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    if kind == "regression":
        rho = rank_correlation(scores, labels)
        return {"pooled": (rho, rho), "as coded": (rho, rho)}
    if kind == "classification":
        pooled, coded = macro_f1(scores, labels), _over_batches(macro_f1, batches)
        return {"pooled": (pooled, pooled), "as coded": (coded, coded)}
    pooled = auroc(scores, labels)
    return {"pooled": (pooled, pooled), "as coded": (_over_batches(auroc, batches), _over_batches(_binary_f1, batches))}


@torch.no_grad()
def predict(probe: Probe, data: ProbeData, batch_size: int, device: torch.device) -> Batches:
    """In evaluation mode, in the order of the split."""
    probe.eval()
    batches = []
    for first in range(0, len(data), batch_size):
        *inputs, labels = _batch(data, range(first, min(first + batch_size, len(data))))
        logits = probe(*(x.to(device) for x in inputs)).cpu()
        if data.kind != "classification":
            known = ~labels.isnan()
            logits, labels = logits.squeeze(1)[known], labels[known]
        if len(labels):
            batches.append((logits.numpy(), labels.numpy()))
    return batches


# -------------------------------------------------------------------------------------------------------- training

def train_probe(
    data: Mapping[str, ProbeData], codebook: Tensor, classes: int, cfg: ProbeConfig, learning_rate: float, seed: int,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Train on data["train"], validate on data["valid"] after every epoch and at the end, test the chosen states.

    codebook: (K, D). classes: of a classification. Initial weights, order and dropout depend on the seed alone, so
    learning rates are compared on equal terms. Returns protocol -> {"step": int, "score": validation score,
    "valid": float, "tests": {split: float}}; NaN where a number is undefined.
    """
    kind = data["train"].kind
    seed_step(seed, 0, 0)
    longest = max(int(part.positions.max()) + 1 for part in data.values())
    probe = Probe(codebook, classes if kind == "classification" else 1, hidden=cfg.hidden, dropout=cfg.dropout,
                  positions=max(POSITIONS, longest), pool=kind == "classification").to(device)
    optimizer = _optimizer(probe, learning_rate, cfg)
    every = max(1, len(data["train"]) // cfg.batch_size)
    best: dict[str, dict[str, Any]] = {}
    for step, chains in enumerate(_order(len(data["train"]), cfg, seed)):
        probe.train()
        *inputs, labels = _batch(data["train"], chains)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * cfg.learning_rate_factor(step)
        if kind == "classification" or not labels.isnan().all():
            loss = probe_loss(probe(*(x.to(device) for x in inputs)), labels.to(device), kind)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(probe.parameters(), cfg.max_grad_norm)
            optimizer.step()
        done = step + 1
        if done % every == 0 or done == cfg.max_steps:
            _keep_best(best, probe, predict(probe, data["valid"], cfg.batch_size, device), kind, done)
    for name, chosen in best.items():
        probe.load_state_dict(chosen.pop("state"))
        chosen["tests"] = {split: measures(predict(probe, part, cfg.batch_size, device), kind)[name][0]
                           for split, part in data.items() if split not in ("train", "valid")}
    return best


def _order(chains: int, cfg: ProbeConfig, seed: int) -> Iterator[list[int]]:
    for batch in StepSampler(chains, cfg.batch_size, seed=seed, end_step=cfg.max_steps):
        yield [index for _, index in batch]


def _optimizer(probe: Probe, learning_rate: float, cfg: ProbeConfig) -> torch.optim.AdamW:
    plain = [p for name, p in probe.named_parameters() if name.endswith("bias") or name.startswith("norm")]
    decayed = [p for p in probe.parameters() if all(p is not other for other in plain)]
    groups = [{"params": decayed, "weight_decay": cfg.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98), eps=1e-8)


def _keep_best(best: dict[str, dict[str, Any]], probe: Probe, batches: Batches, kind: str, done: int) -> None:
    """The first of equals stays; an undefined score is worse than any other."""
    for name, (value, score) in measures(batches, kind).items():
        rank = -math.inf if math.isnan(score) else score
        if name not in best or rank > best[name]["rank"]:
            best[name] = {"step": done, "score": score, "rank": rank, "valid": value,
                          "state": copy.deepcopy(probe.state_dict())}
