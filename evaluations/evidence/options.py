"""What may be added to a curriculum, beyond the paper and beyond what the library has: for one process.

The library's own options are ProVQ.recluster and tokenizer/provq_codes.py. Sizes: N tokens, D latent channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.provq import ProVQ, ProVQOutput


class TokenMixProVQ(ProVQ):
    """A transition that draws instead of mixing: a token is z with probability alpha, else z_q, which is Eq. 2 on
    average. The decoder sees codes from the first step of the transition on, whole ones. Otherwise as ProVQ."""

    def forward(self, z: Tensor, mask: Tensor | None = None) -> ProVQOutput:
        if not self.training or self.stage != 2 or self.needs_init:
            return super().forward(z, mask)
        if mask is not None:
            raise ValueError("TokenMixProVQ takes no mask")
        last = z.movedim(self.channel_dim, -1)
        tokens = last.reshape(-1, self.dim)
        out = self.quantizer(tokens)
        continuous = torch.rand(len(tokens), 1, device=z.device) < self.alpha
        mixed = torch.where(continuous, self.quantizer.latent(tokens), out.codes).to(z.dtype)
        losses = {name: loss.float() for name, loss in out.losses.items()}
        return ProVQOutput(
            quantized=mixed.reshape(last.shape).movedim(-1, self.channel_dim),
            indices=out.indices.reshape(last.shape[:-1]),
            loss=self.omega * torch.stack([torch.zeros((), device=z.device), *losses.values()]).sum(),
            losses={name: loss.detach() for name, loss in losses.items()},
        )
