"""Latents, codes and their usage at the stage boundaries of a run: RUN/latents/STEP_name.npz.

evaluations/report.py draws them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tokenizer.data import spread
from tokenizer.provq import nearest_code
from tokenizer.runtime import distributed
from tokenizer.runtime.checkpoint import atomic_write
from tokenizer.vq_model import VQModel

MAX_LATENTS, MAX_CODES = 2048, 1024  # rows in a file, evenly spaced: enough for a picture


@torch.no_grad()
def count_codes(model: VQModel, batches: Iterable[dict[str, Any]], device: torch.device) -> Tensor:
    """How often all ranks' images look up each code: (K,) int64. Collective. batches: this rank's share.

    The random state of the caller stays as it was (a data loader draws from it), so counting does not change training.
    """
    was_training = model.training
    model.eval()
    counts = torch.zeros(model.quantize.num_codes, dtype=torch.int64, device=device)
    with torch.random.fork_rng(devices=[]):  # loaders draw on the CPU, and the model in eval mode draws nothing
        for batch in batches:
            indices = model.quantize.encode(model.encode_latents(batch["image"].to(device)))
            counts += torch.bincount(indices.flatten(), minlength=len(counts))
    model.train(was_training)
    return distributed.all_reduce_(counts)


@torch.no_grad()
def save_snapshot(path: Path, model: VQModel, latents: Tensor, counts: Tensor | None, *, step: int, stage: int) -> None:
    """Write one file, atomically. Rank 0.

    latents: (N, D) encoder outputs of fixed images. counts: (K,) int64, see count_codes; None: no codebook yet.

    Entries: latents float32 (n <= 2048, D), as compared with codes; codes float32 (m <= 1024, D) of the effective
    codebook and code_rows int64 (m,), their places in it; indices int64 (n,), the code of each latent among all K;
    counts int64 (K,); step and stage int64 (). Without a codebook codes, code_rows, indices and counts are empty.
    """
    quantize = model.quantize
    points = quantize.quantizer.latent(latents).float()
    points = points[spread(len(points), MAX_LATENTS)]
    nothing = torch.zeros(0, dtype=torch.int64)
    codes, rows, indices = points[:0], nothing, nothing
    if counts is not None:
        rows = torch.tensor(spread(quantize.num_codes, MAX_CODES))
        codes = quantize.codebook.float()[rows.to(points.device)]
        indices = nearest_code(points, quantize.codebook)
    arrays = {"latents": points, "codes": codes, "code_rows": rows, "indices": indices,
              "counts": nothing if counts is None else counts}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, lambda file: np.savez(file, step=step, stage=stage,
                                             **{name: value.cpu().numpy() for name, value in arrays.items()}))
