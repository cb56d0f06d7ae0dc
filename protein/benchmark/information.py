"""How much the tokens of one tokenizer say about those of another, residue by residue."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protein.benchmark.baselines import Tokens


def mutual_information(first: Sequence[Tokens], second: Sequence[Tokens]) -> dict[str, float]:
    """Tokens (L,) of the same chains by two tokenizers, -1 for none -> bits over the residues that both have.

    residues; entropy: of the first; information: what the second says about the first, with Miller's and Madow's
    correction for samples (counts alone make it look larger, the more so the more codes there are); uncorrected; share:
    information / entropy, in [0, 1]. ValueError: chains that do not fit together, no residue that both have.
    """
    if [len(tokens) for tokens in first] != [len(tokens) for tokens in second]:
        raise ValueError("the tokenizers have given chains of other lengths")
    one, other = (np.concatenate([*tokens, np.zeros(0, dtype=np.int64)]) for tokens in (first, second))
    both = (one >= 0) & (other >= 0)
    if not both.any():
        raise ValueError("no residue has a token of both tokenizers")
    one, other = one[both], other[both]
    pairs = one * (int(other.max()) + 1) + other
    counts = [np.unique(column, return_counts=True)[1] for column in (one, other, pairs)]
    plain = [_entropy(count) for count in counts]
    # Miller and Madow: an entropy is underestimated by (states - 1) / 2n nats.
    corrected = [value + (len(count) - 1) / (2 * len(one) * np.log(2))
                 for value, count in zip(plain, counts, strict=True)]
    information = max(0.0, corrected[0] + corrected[1] - corrected[2])
    entropy = corrected[0]
    return {"residues": len(one), "entropy": entropy, "information": information,
            "uncorrected": plain[0] + plain[1] - plain[2],
            "share": min(1.0, information / entropy) if entropy else 0.0}


def _entropy(counts: np.ndarray) -> float:
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())
