"""Every recipe of tokenizer/provq.py by name, for the tests in one process and for the worker that torchrun starts."""

from __future__ import annotations

import torch

from tokenizer.provq import VectorQuantizer, make_quantizer

RECIPES = {
    "vq": ("vq", {}),
    "vq-l2": ("vq", {"l2_norm": True}),
    "vq-rotation": ("vq", {"rotation": True}),
    "vq-l2-rotation": ("vq", {"l2_norm": True, "rotation": True}),
    "simvq": ("simvq", {}),
    "simvq-l2": ("simvq", {"l2_norm": True}),
    "aminoaseed": ("aminoaseed", {}),
    "ema": ("ema", {"decay": 0.8}),
    "ema-l2": ("ema", {"decay": 0.8, "l2_norm": True}),
    "ema-rotation": ("ema", {"decay": 0.8, "rotation": True}),
}
STRAIGHT_THROUGH = [name for name in RECIPES if "rotation" not in name]


def quantizer(recipe: str, num_codes: int = 16, dim: int = 4, seed: int = 0) -> VectorQuantizer:
    """A quantizer whose codes spread like standard normal latents, so that random tokens use many of them."""
    generator = torch.Generator().manual_seed(seed)
    kind, options = RECIPES[recipe]
    torch.manual_seed(seed)  # the map of the linear recipes
    made = make_quantizer(kind, num_codes, dim, **options)
    codes = torch.randn(num_codes, dim, generator=generator)
    if kind in ("simvq", "aminoaseed"):
        made.table.copy_(codes)  # and keep the random map: set_codebook_ would hide it behind the identity
    else:
        made.set_codebook_(codes)
    return made
