"""FSQ and LFQ: codes on a fixed grid, which nothing has to place. Both are vector-quantize-pytorch's, needed by nothing
else.

They cannot collapse as a table does, and k-means has nothing to do: the warm-up passes their bounded latents through,
and the transition mixes these with the grid's points. FSQ: Mentzer et al. 2024, arXiv 2309.15505; LFQ: Yu et al. 2024,
arXiv 2310.05737.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.provq import Quantized, VectorQuantizer
from tokenizer.provq_packages import FSQAdapter, LFQAdapter
from tokenizer.quantizer_config import fsq_levels, grid_channels


class GridQuantizer(VectorQuantizer):
    """Either of them, (N, D) as any quantizer. latent() is what is rounded: the nearest code is the one taken."""

    def __init__(self, name: str, num_codes: int, *, beta: float = 0.25):
        """beta: weight of LFQ's commitment loss. ValueError: other sizes, or the package is not installed."""
        nn.Module.__init__(self)
        try:
            from vector_quantize_pytorch import FSQ, LFQ
        except ModuleNotFoundError as error:
            if error.name != "vector_quantize_pytorch":
                raise
            raise ValueError(f"the quantizer {name} needs a package: pip install vector-quantize-pytorch") from error
        self.num_codes, self.dim = num_codes, grid_channels(name, num_codes)
        self.l2_norm, self.beta, self.rotation = False, beta, False
        self.adapter: Any
        with torch.device("cpu"):  # also in a skeleton: their constructors compute with the grid
            if name == "fsq":
                self.adapter = FSQAdapter(FSQ(levels=fsq_levels(num_codes)))
            else:
                self.adapter = LFQAdapter(LFQ(dim=self.dim, codebook_size=num_codes, commitment_loss_weight=beta))

    def codebook(self) -> Tensor:
        device = next(self.adapter.buffers()).device
        return self._codes(torch.arange(self.num_codes, device=device))

    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:
        raise NotImplementedError("the codes of FSQ and LFQ lie on a fixed grid, which cannot be placed")

    def latent(self, x: Tensor) -> Tensor:
        return self.adapter.latent(x.to(torch.promote_types(x.dtype, torch.float32)))

    def lookup(self, indices: Tensor) -> Tensor:
        """Codes of int64 indices (...) -> (..., D). IndexError: there is no such code, and the grid would go on."""
        if indices.numel() and not (0 <= int(indices.min()) and int(indices.max()) < self.num_codes):
            raise IndexError(f"codes {int(indices.min())} to {int(indices.max())} of {self.num_codes}")
        return self._codes(indices)

    def _codes(self, indices: Tensor) -> Tensor:
        return self.adapter.module.indices_to_codes(indices.reshape(1, -1)).reshape(*indices.shape, self.dim)

    def forward(self, x: Tensor) -> Quantized:
        with torch.autocast(x.device.type, enabled=False):
            codes, indices, *rest = self.adapter.module(x.to(torch.promote_types(x.dtype, torch.float32))[None])
            losses = {"auxiliary": rest[0].float().sum()} if rest else {}
            return Quantized(codes[0], indices.reshape(-1).long(), losses)
