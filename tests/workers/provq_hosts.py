"""Quantizers that provq.py adapts, as test cases: packages from the registry, and stand-ins for repositories.

The stand-ins are small classes of our own with a repository's class name, attributes, return value and semantics, traps
included. PROVQ_HOSTS=FOLDER adds originals from checkouts there: LlamaGen, taming-transformers, SimVQ, esm.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import diveq
import torch
import torch.nn.functional as F
import vector_quantize_pytorch as lucidrains
from torch import Tensor, nn

LossBreakdown = namedtuple("LossBreakdown", "per_sample_entropy codebook_entropy commitment avg_probs")


def _nearest(rows: Tensor, codes: Tensor) -> Tensor:
    return torch.cdist(rows, codes).argmin(1)


class VectorQuantizer(nn.Module):
    """LlamaGen: unit codes, losses only in training, a Parameter among the buffers."""

    def __init__(self, n_e: int, e_dim: int, beta: float, entropy_loss_ratio: float, l2_norm: bool, show_usage: bool):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.l2_norm = n_e, e_dim, beta, l2_norm
        self.entropy_loss_ratio, self.show_usage = entropy_loss_ratio, show_usage
        self.embedding = nn.Embedding(n_e, e_dim)
        self.embedding.weight.data.uniform_(-1.0 / n_e, 1.0 / n_e)
        if show_usage:
            self.register_buffer("codebook_used", nn.Parameter(torch.zeros(200)))

    def _unit(self, t: Tensor) -> Tensor:
        return F.normalize(t, dim=-1) if self.l2_norm else t

    def forward(self, z: Tensor):
        z = self._unit(z.permute(0, 2, 3, 1))
        codes = self._unit(self.embedding.weight)
        rows = z.reshape(-1, self.e_dim)
        distance = rows.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * rows @ codes.t()
        indices = distance.argmin(1)
        quantized = codes[indices].view(z.shape)
        losses, usage = (None, None, None), 0
        if self.training:
            if self.show_usage:
                n = len(indices)
                self.codebook_used[:-n] = self.codebook_used[n:].clone()
                self.codebook_used[-n:] = indices
                usage = len(self.codebook_used.unique()) / self.n_e
            log_p = (-distance / 0.01).log_softmax(1)
            mean = log_p.exp().mean(0)
            entropy = (mean * (mean + 1e-5).log()).sum() - (log_p.exp() * log_p).sum(1).mean()
            losses = ((quantized - z.detach()).square().mean(), self.beta * (quantized.detach() - z).square().mean(),
                      self.entropy_loss_ratio * entropy)
        quantized = z + (quantized - z).detach()
        return quantized.permute(0, 3, 1, 2), (*losses, usage), (None, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape=None, channel_first: bool = True) -> Tensor:
        codes = self._unit(self.embedding.weight)[indices]
        if shape is None:
            return codes
        if not channel_first:
            return codes.view(shape)
        return codes.reshape(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)


class VectorQuantizer2(nn.Module):
    """taming-transformers: one loss, beta on the wrong term unless legacy=False."""

    def __init__(self, n_e: int, e_dim: int, beta: float, remap=None, sane_index_shape: bool = False,
                 legacy: bool = True):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.legacy = n_e, e_dim, beta, legacy
        self.remap, self.sane_index_shape = remap, sane_index_shape
        self.embedding = nn.Embedding(n_e, e_dim)
        self.embedding.weight.data.uniform_(-1.0 / n_e, 1.0 / n_e)

    def _codes(self) -> Tensor:
        return self.embedding.weight

    def _quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = z.movedim(1, -1)
        indices = _nearest(z.reshape(-1, self.e_dim), self._codes())
        quantized = F.embedding(indices, self._codes()).view(z.shape)
        to_code, to_latent = (quantized.detach() - z).square().mean(), (quantized - z.detach()).square().mean()
        loss = to_code + self.beta * to_latent if self.legacy else self.beta * to_code + to_latent
        quantized = (z + (quantized - z).detach()).movedim(-1, 1)
        return quantized, loss, indices.view(z.shape[:-1]) if self.sane_index_shape else indices

    def forward(self, z: Tensor, temp=None):
        assert temp is None, "only there for another class's interface"
        quantized, loss, indices = self._quantize(z)
        return quantized, loss, (None, None, indices)

    def get_codebook_entry(self, indices: Tensor, shape) -> Tensor:
        codes = self._codes()[indices]
        return codes if shape is None else codes.view(shape).permute(0, 3, 1, 2)


class SimVQ(VectorQuantizer2):
    """youngsheen/SimVQ: frozen table times a trained map; a pair of tuples."""

    def __init__(self, n_e: int, e_dim: int, beta: float = 0.25, **options):
        super().__init__(n_e, e_dim, beta, **options)
        nn.init.normal_(self.embedding.weight, std=e_dim**-0.5)
        self.embedding.weight.requires_grad = False
        self.embedding_proj = nn.Linear(e_dim, e_dim)

    def _codes(self) -> Tensor:
        return self.embedding_proj(self.embedding.weight)

    def forward(self, z: Tensor, temp=None):
        assert temp is None, "only there for another class's interface"
        quantized, loss, indices = self._quantize(z)
        zero = torch.tensor(0.0)
        return (quantized, zero, indices), LossBreakdown(zero, zero, loss, zero)


class SimVQ1D(SimVQ):
    """The same for z (B, D, n)."""


class _RunningTable(nn.Module):
    def __init__(self, n: int, dim: int):
        super().__init__()
        self.decay, self.eps, self.update = 0.99, 1e-5, True
        codes = torch.randn(n, dim)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.cluster_size = nn.Parameter(torch.zeros(n), requires_grad=False)
        self.embed_avg = nn.Parameter(codes.clone(), requires_grad=False)


class EMAVectorQuantizer(nn.Module):
    """taming-transformers' EMA: codes are running means, updated in every training forward."""

    def __init__(self, n_embed: int, embedding_dim: int, beta: float, remap=None):
        super().__init__()
        self.num_tokens, self.codebook_dim, self.beta, self.remap = n_embed, embedding_dim, beta, remap
        self.embedding = _RunningTable(n_embed, embedding_dim)

    def forward(self, z: Tensor):
        z, table = z.movedim(1, -1), self.embedding
        rows = z.reshape(-1, self.codebook_dim)
        indices = _nearest(rows, table.weight)
        quantized = table.weight[indices].view(z.shape)
        one_hot = F.one_hot(indices, self.num_tokens).type(z.dtype)
        p = one_hot.mean(0)
        if self.training and table.update:
            table.cluster_size.data.mul_(table.decay).add_(one_hot.sum(0), alpha=1 - table.decay)
            table.embed_avg.data.mul_(table.decay).add_((one_hot.t() @ rows).detach(), alpha=1 - table.decay)
            n = table.cluster_size.sum()
            smoothed = (table.cluster_size + table.eps) / (n + self.num_tokens * table.eps) * n
            table.weight.data.copy_(table.embed_avg / smoothed[:, None])
        loss = self.beta * (quantized.detach() - z).square().mean()
        quantized = (z + (quantized - z).detach()).movedim(-1, 1)
        return quantized, loss, ((-p * (p + 1e-10).log()).sum().exp(), one_hot, indices)


class EMACodebook(nn.Module):
    """ESM: buffers; training raises unless the codebook is frozen, for the update is not released."""

    def __init__(self, n_codes: int, embedding_dim: int):
        super().__init__()
        self.n_codes, self.embedding_dim = n_codes, embedding_dim
        self.register_buffer("embeddings", torch.randn(n_codes, embedding_dim))
        self.register_buffer("N", torch.zeros(n_codes))
        self.register_buffer("z_avg", self.embeddings.clone())
        self._need_init, self.freeze_codebook = True, False

    def forward(self, z: Tensor):
        if self.training:
            assert self.freeze_codebook, "not implemented"
        indices = _nearest(z.view(-1, self.embedding_dim), self.embeddings).view(z.shape[:2])
        codes = F.embedding(indices, self.embeddings)
        return (codes - z).detach() + z, indices, 0.25 * F.mse_loss(z, codes.detach())


def frozen(codebook: nn.Module) -> nn.Module:
    codebook.freeze_codebook = True
    return codebook


# ------------------------------------------------------------------------------------------------------- test cases

class Case(NamedTuple):
    make: Callable[[], nn.Module]  # a fresh host with 8 codes in 4 dimensions, or nearly so
    lead: tuple[int, ...]  # shape of z without channels
    channel_dim: int = 1
    dim: int = 4
    kind: str = "auto"

    def z(self, seed: int = 0) -> Tensor:
        """Latents in the host's layout, standard normal."""
        z = torch.randn(*self.lead, self.dim, generator=torch.Generator().manual_seed(seed))
        return z.movedim(-1, self.channel_dim)


def _quiet(cls: type[nn.Module]) -> Callable[[], nn.Module]:
    return lambda: cls(8, 4, replacement_iters=3, allow_warning=False, verbose=False)


STAND_INS = {
    "llamagen": Case(lambda: VectorQuantizer(8, 4, 0.25, 0.0, True, True), (2, 4, 3)),
    "llamagen-euclidean": Case(lambda: VectorQuantizer(8, 4, 0.25, 0.1, False, False), (2, 4, 3)),
    "taming": Case(lambda: VectorQuantizer2(8, 4, 0.25), (2, 4, 3)),
    "taming-sane": Case(lambda: VectorQuantizer2(8, 4, 0.25, sane_index_shape=True, legacy=False), (2, 4, 3)),
    "taming-ema": Case(lambda: EMAVectorQuantizer(8, 4, 0.25), (2, 4, 3)),
    "simvq": Case(lambda: SimVQ(8, 4), (2, 4, 3)),
    "simvq-1d": Case(lambda: SimVQ1D(8, 4, legacy=False), (2, 12)),
    "esm": Case(lambda: frozen(EMACodebook(8, 4)), (2, 12), -1),
}
PACKAGES = {
    "lucidrains": Case(lambda: lucidrains.VectorQuantize(4, 8), (2, 12), -1),
    "lucidrains-image": Case(lambda: lucidrains.VectorQuantize(4, 8, accept_image_fmap=True, decay=0.9), (2, 4, 3)),
    "lucidrains-channels-first": Case(lambda: lucidrains.VectorQuantize(4, 8, channel_last=False), (2, 12)),
    "lucidrains-cosine": Case(lambda: lucidrains.VectorQuantize(4, 8, use_cosine_sim=True), (2, 12), -1),
    "lucidrains-projected": Case(lambda: lucidrains.VectorQuantize(6, 8, codebook_dim=4), (2, 12), -1, dim=6),
    "lucidrains-learned": Case(
        lambda: lucidrains.VectorQuantize(4, 8, learnable_codebook=True, ema_update=False, rotation_trick=False),
        (2, 12), -1),
    "lucidrains-residual": Case(lambda: lucidrains.ResidualVQ(dim=4, num_quantizers=3, codebook_size=8), (2, 12), -1),
    "lucidrains-residual-dropout": Case(
        lambda: lucidrains.ResidualVQ(dim=6, num_quantizers=3, codebook_size=8, codebook_dim=4, quantize_dropout=True),
        (2, 12), -1, dim=6),
    "lucidrains-simvq": Case(lambda: lucidrains.SimVQ(4, 8), (2, 12), -1),
    "lucidrains-simvq-image": Case(lambda: lucidrains.SimVQ(4, 8, channel_first=True, rotation_trick=False), (2, 4, 3)),
    "lucidrains-fsq": Case(lambda: lucidrains.FSQ([4, 3]), (2, 12), -1, dim=2),
    "lucidrains-fsq-image": Case(
        lambda: lucidrains.FSQ([4, 3], dim=6, num_codebooks=2, preserve_symmetry=True), (2, 4, 3), dim=6),
    "lucidrains-lfq": Case(lambda: lucidrains.LFQ(dim=4, codebook_size=8), (2, 12), -1),
    "lucidrains-bsq": Case(lambda: lucidrains.LFQ(dim=3, codebook_size=8, spherical=True), (2, 4, 3), dim=3),
    "diveq": Case(_quiet(diveq.DIVEQ), (24,), -1),
    "diveq-detach": Case(lambda: diveq.DIVEQDetach(8, 4, allow_warning=False, verbose=False), (24,), -1),
}


def _load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _originals(folder: Path) -> dict[str, Case]:
    cases = {}
    if (path := folder / "LlamaGen/tokenizer/tokenizer_image/vq_model.py").exists():
        cls = _load("original_llamagen", path).VectorQuantizer
        cases["original-llamagen"] = Case(lambda: cls(8, 4, 0.25, 0.0, True, True), (2, 4, 3))
        cases["original-llamagen-entropy"] = Case(lambda: cls(8, 4, 0.25, 0.1, False, False), (2, 4, 3))
    if (path := folder / "taming-transformers/taming/modules/vqvae/quantize.py").exists():
        taming = _load("original_taming", path)
        cases["original-taming"] = Case(lambda: taming.VectorQuantizer2(8, 4, 0.25), (2, 4, 3))

        class Running(taming.EMAVectorQuantizer):
            """With the constructor that the original meant."""

            def __init__(self):
                nn.Module.__init__(self)
                self.codebook_dim, self.num_tokens, self.beta, self.remap = 4, 8, 0.25, None
                self.embedding = taming.EmbeddingEMA(8, 4)

        cases["original-taming-ema"] = Case(Running, (2, 4, 3))
    if (path := folder / "SimVQ/taming/modules/vqvae/quantize.py").exists():
        simvq = _load("original_simvq", path)
        cases["original-simvq"] = Case(lambda: simvq.SimVQ(8, 4), (2, 4, 3))
        cases["original-simvq-1d"] = Case(lambda: simvq.SimVQ1D(8, 4), (2, 12))
    if (path := folder / "esm/esm/layers/codebook.py").exists():
        esm = _load("original_esm", path)
        cases["original-esm"] = Case(lambda: frozen(esm.EMACodebook(8, 4)), (2, 12), -1)
    return cases


CHECKOUTS = Path(os.environ["PROVQ_HOSTS"]) if "PROVQ_HOSTS" in os.environ else None
ORIGINALS = _originals(CHECKOUTS) if CHECKOUTS else {}
CASES = {**STAND_INS, **PACKAGES, **ORIGINALS}
