"""A GPT and its tokenizer in a few lines of Python.

    generator = provq.load("runs/gpt")            # see tokenizer/hub.py
    generator.sample([3, 7], n=4)                 # eight PIL images
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoregressive.pretrained import (
    LoadedGPT,
    export_gpt,
    load_gpt,
    recorded_tokenizer,
    require_guidance,
    require_tokenizer,
    require_trained,
)
from autoregressive.sampling import SamplingConfig, generate
from tokenizer.api import BATCH, ImageTokenizer
from tokenizer.hub import Pretrained
from tokenizer.pretrained import load_tokenizer
from tokenizer.runtime.seeding import fold


class ImageGenerator(Pretrained):
    """A class-conditional GPT on the codes of an image tokenizer, and that tokenizer."""

    def __init__(self, loaded: LoadedGPT, tokenizer: ImageTokenizer | None):
        self.loaded, self.tokenizer = loaded, tokenizer

    @classmethod
    def open(
        cls, path: Path, device: torch.device, weights: str, *, tokenizer: str | Path | ImageTokenizer | None = None,
        num_codes: int | None = None,
    ) -> ImageGenerator:
        """See `load_gpt`. tokenizer: its path, or one that is loaded; None: what the GPT's run names, if it is a run.

        ValueError: also a tokenizer whose codes the GPT was not trained on.
        """
        loaded = load_gpt(path, device, weights, num_codes=num_codes)
        where: Any = tokenizer
        if tokenizer is None:
            recorded = recorded_tokenizer(path)
            if recorded.get("vq_ckpt"):
                where = recorded["vq_ckpt"]
                tokenizer = ImageTokenizer(load_tokenizer(
                    where, device, recorded.get("vq_weights") or "auto",
                    codebook_l2_norm=recorded.get("codebook_l2_norm")))
        elif not isinstance(tokenizer, ImageTokenizer):
            tokenizer = ImageTokenizer.open(Path(tokenizer), device, "auto")
        if tokenizer is not None:
            name = "the one given" if isinstance(where, ImageTokenizer) else where
            require_tokenizer(loaded, tokenizer.model, name, other="give the right one, tokenizer=")
        return cls(loaded, tokenizer)

    def write(self, folder: Path) -> None:
        """Of the GPT alone: its tokenizer is a model of its own."""
        export_gpt(self.loaded, folder)

    @property
    def sizes(self) -> Mapping[str, Any]:
        return {**asdict(self.loaded.model.config), "tokenizer_hash": self.loaded.tokenizer_hash}

    @property
    def num_classes(self) -> int:
        return self.loaded.model.config.num_classes

    def sample_codes(self, classes: int | Sequence[int], n: int = 1, *, seed: int = 0, **sampling: Any) -> Tensor:
        """Codes (n x classes, h, w) int64 of n images of each class, those of a class together.

        sampling: cfg_scale, temperature, top_k, top_p and so on, see SamplingConfig. Equal calls draw equal codes.
        ValueError: classes that the model does not have or was not trained on, n < 1, sampling out of range.
        """
        wanted = [classes] if isinstance(classes, int) else [int(c) for c in classes]
        if n < 1 or not wanted or not all(0 <= c < self.num_classes for c in wanted):
            raise ValueError(f"need n >= 1 and classes from 0 to {self.num_classes - 1}, got n={n}, classes={wanted}")
        require_trained(self.loaded, wanted, f"classes={wanted}")
        config = SamplingConfig(**sampling)
        require_guidance(self.loaded, config)
        labels = torch.tensor(wanted).repeat_interleave(n)
        size = min(BATCH, len(labels))
        drawn = []
        for start in range(0, len(labels), size):
            # Filled up to one size: equal shapes round equally, so an image does not depend on its neighbours.
            places = [start + i if start + i < len(labels) else start for i in range(size)]
            codes = generate(self.loaded.model, labels[places], seeds=[fold(seed, place) for place in places],
                             config=config)
            drawn.append(codes[: len(labels) - start])
        side = math.isqrt(self.loaded.model.config.block_size)
        return torch.cat(drawn).view(-1, side, side)

    def sample(self, classes: int | Sequence[int], n: int = 1, *, seed: int = 0, **sampling: Any) -> list[Any]:
        """PIL images, in the order of `sample_codes`. ValueError: also a GPT whose tokenizer is not known."""
        if self.tokenizer is None:
            raise ValueError(f"{self.loaded.name} does not say where its tokenizer is: load it with tokenizer=PATH")
        return self.tokenizer.decode(self.sample_codes(classes, n, seed=seed, **sampling))
