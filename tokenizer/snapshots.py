"""Latents, codes and their usage at the stage boundaries of a run: RUN/latents/STEP_name.npz.

evaluations/report.py draws them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizer.data import spread
from tokenizer.provq import ProVQ, nearest_code
from tokenizer.runtime.files import atomic_write

MAX_LATENTS, MAX_CODES = 2048, 1024  # rows in a file, evenly spaced: enough for a picture


@torch.no_grad()
def save_snapshot(
    path: Path, quantize: ProVQ, latents: Tensor, counts: Tensor | None, *, step: int, stage: int
) -> None:
    """Write one file, atomically. Rank 0.

    latents: (N, D) encoder outputs of fixed samples. counts: (K,) int64, how often the validation samples look up each
    code; None: no codebook yet.

    Entries: latents float32 (n <= 2048, D), as compared with codes; codes float32 (m <= 1024, D) of the effective
    codebook and code_rows int64 (m,), their places in it; indices int64 (n,), the code of each latent among all K;
    counts int64 (K,); step and stage int64 (). Without a codebook codes, code_rows, indices and counts are empty.
    """
    points = quantize.quantizer.latent(latents).float()
    points = points[spread(len(points), MAX_LATENTS)]
    nothing = torch.zeros(0, dtype=torch.int64)
    codes, rows, indices = points[:0], nothing, nothing
    if counts is not None:
        rows = torch.tensor(spread(quantize.num_codes, MAX_CODES))
        codes = quantize.codebook().float()[rows.to(points.device)]
        indices = nearest_code(points, quantize.codebook())
    arrays = {"latents": points, "codes": codes, "code_rows": rows, "indices": indices,
              "counts": nothing if counts is None else counts}
    path.parent.mkdir(parents=True, exist_ok=True)
    entries: dict[str, Any] = {name: value.cpu().numpy() for name, value in arrays.items()}
    atomic_write(path, lambda file: np.savez(file, step=step, stage=stage, **entries))
