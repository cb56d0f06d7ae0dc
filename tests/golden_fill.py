"""The weight-fill rule behind tests/golden: weights are regenerated from key names and shapes, none are stored."""

from __future__ import annotations

import json
import math

import numpy as np
import torch
from places import GOLDEN
from torch import Tensor


def load_arrays(name: str) -> dict[str, Tensor]:
    """tests/golden/{name}.npz as tensors."""
    with np.load(GOLDEN / f"{name}.npz") as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


def load_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """tests/golden/{name}.json, state-dict key -> shape."""
    return {key: tuple(shape) for key, shape in json.loads((GOLDEN / f"{name}.json").read_text()).items()}


def is_filled(key: str) -> bool:
    """Whether the rule draws numbers for this key; it skips buffers, which keep their initial values."""
    skipped = ("codebook_used", "running_mean", "running_var", "num_batches_tracked", "scaling_layer.shift",
               "scaling_layer.scale", "freqs_cis", "causal_mask", "codebook.N", "codebook.z_avg")
    return not key.endswith(skipped) and ".kv_cache." not in key


def fill_values(shapes: dict[str, tuple[int, ...]], seed: int = 1234) -> dict[str, Tensor]:
    """Key -> shape of one module's state dict to key -> float32 values of its filled keys (sorted order fixes them)."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for key in sorted(filter(is_filled, shapes)):
        shape = tuple(shapes[key])
        draw = torch.randn(shape, generator=generator, dtype=torch.float32)
        if key in ("quantize.embedding.weight", "codebook.embeddings"):
            values[key] = draw
        elif len(shape) >= 2:
            values[key] = draw * (1.0 / math.sqrt(math.prod(shape[1:])))
        elif key.endswith((".bias", "_scale_per_head")):
            values[key] = 0.1 * draw
        else:
            assert key.endswith(".weight"), key
            values[key] = 1.0 + 0.1 * draw
    return values


def sums(values: dict[str, Tensor]) -> Tensor:
    """(n, 2) float64: sum and sum of squares of each filled tensor in sorted-key order, as the goldens store them."""
    return torch.stack([torch.stack([v.double().sum(), v.double().square().sum()]) for _, v in sorted(values.items())])
