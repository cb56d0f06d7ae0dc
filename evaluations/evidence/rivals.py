"""Other ways to a discrete latent, with the methods that ProVQ needs of a quantizer.

What exists as a package is taken from there (vector-quantize-pytorch, diveq; imported where it is used, needed by
nothing else); what does not is written from its paper. Each is discrete, and exact, in eval().
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.provq import Quantized, VectorQuantizer, nearest_code
from tokenizer.quantizer_config import fsq_levels


class SoftToHardVectorQuantizer(VectorQuantizer):
    """A softmax over codes whose temperature falls until it is one code (Agustsson et al. 2017; Jang et al. 2016).

    Training: z_q = softmax(-d / (tau * mean d)) codes, d the squared distances; dividing by their mean makes tau free
    of the latents' scale. tau falls exponentially from HOT to COLD in `anneal_steps` calls of `update_()` and stays.
    gumbel=True adds Gumbel noise to the logits (Gumbel-softmax). Losses: those of the nearest code, as in Eq. 4.
    """

    HOT, COLD = 0.5, 1e-3
    steps: Tensor  # int64 []

    def __init__(self, num_codes: int, dim: int, *, anneal_steps: int, gumbel: bool = False, **options: Any):
        if anneal_steps < 1:
            raise ValueError(f"anneal_steps must be at least 1, got {anneal_steps}")
        super().__init__(num_codes, dim, **options)
        self.anneal_steps, self.gumbel = anneal_steps, gumbel
        self.register_buffer("steps", torch.tensor(0))

    def _init_table(self) -> None:
        self.embedding = nn.Embedding(self.num_codes, self.dim)  # ~ N(0, 1): a softmax over a point would say nothing

    @property
    def temperature(self) -> float:
        return self.HOT * (self.COLD / self.HOT) ** min(1.0, int(self.steps) / self.anneal_steps)

    def update_(self) -> None:
        self.steps.add_(1)

    def forward(self, x: Tensor) -> Quantized:
        hard = super().forward(x)
        if not self.training:
            return hard
        latent, codes = self.latent(x), self.codebook()
        distance = latent.square().sum(1, keepdim=True) - 2.0 * latent @ codes.t() + codes.square().sum(1)
        logits = -distance / (self.temperature * distance.detach().mean())
        if self.gumbel:
            logits = logits - torch.empty_like(logits).exponential_().log()
        return Quantized(logits.softmax(1) @ codes, hard.indices, hard.losses)


class NoiseSubstitution(VectorQuantizer):
    """The quantization error becomes noise of its length in a random direction (NSVQ, Vali & Bäckström 2022).

    So codes are trained by the reconstruction, through the length of the error; there are no other losses.
    """

    def _losses(self, latent: Tensor, code: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        return {}

    def forward(self, x: Tensor) -> Quantized:
        hard = super().forward(x)
        if not self.training:
            return hard
        latent = self.latent(x)
        error = (latent - F.embedding(hard.indices, self.codebook())).square().sum(1, keepdim=True)
        noise = F.normalize(torch.randn_like(latent), dim=1)
        return Quantized(latent + error.clamp_min(1e-12).sqrt() * noise, hard.indices, {})


class DiVeQ(nn.Module):
    """diveq's DIVEQ: z_q = z + |e - z| times a noisy unit vector towards e. It replaces dead codes by itself."""

    l2_norm = False

    def __init__(self, num_codes: int, dim: int):
        import diveq

        super().__init__()
        self.num_codes, self.dim = num_codes, dim
        self.module = diveq.DIVEQ(num_embeddings=num_codes, embedding_dim=dim, verbose=False)

    def codebook(self) -> Tensor:
        return self.module.codebook

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:  # noqa: ARG002
        self.module.codebook.copy_(centroids)

    def latent(self, x: Tensor) -> Tensor:
        return x.float()

    def lookup(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codebook())

    def forward(self, x: Tensor) -> Quantized:
        if self.training:
            codes, indices, _ = self.module(self.latent(x))
            return Quantized(codes, indices, {})
        indices = nearest_code(self.latent(x), self.codebook())
        return Quantized(self.lookup(indices), indices, {})


class Grid(nn.Module):
    """FSQ or LFQ of vector-quantize-pytorch, linear maps to its channels and back included: K codes on a fixed grid.

    codebook() is the grid as the decoder sees it. There is nothing that k-means could set.
    """

    l2_norm = False

    def __init__(self, module: Any, num_codes: int, dim: int):
        super().__init__()
        self.module, self.num_codes, self.dim = module, num_codes, dim

    def codebook(self) -> Tensor:
        return self.lookup(torch.arange(self.num_codes, device=next(self.module.buffers()).device))

    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:
        raise NotImplementedError("the codes of FSQ and LFQ lie on a fixed grid: a warm-up cannot place them")

    def latent(self, x: Tensor) -> Tensor:
        return x.float()

    def lookup(self, indices: Tensor) -> Tensor:
        return self.module.indices_to_codes(indices.reshape(1, -1)).reshape(*indices.shape, self.dim)

    def forward(self, x: Tensor) -> Quantized:
        codes, indices, *rest = self.module(self.latent(x)[None])
        losses = {"auxiliary": rest[0].float().sum()} if rest else {}
        return Quantized(codes[0], indices.reshape(-1).long(), losses)


def make_fsq(num_codes: int, dim: int) -> Grid:
    from vector_quantize_pytorch import FSQ

    return Grid(FSQ(levels=fsq_levels(num_codes), dim=dim), num_codes, dim)


def make_lfq(num_codes: int, dim: int, beta: float) -> Grid:
    from vector_quantize_pytorch import LFQ

    fsq_levels(num_codes)  # the same sizes
    return Grid(LFQ(dim=dim, codebook_size=num_codes, commitment_loss_weight=beta), num_codes, dim)
