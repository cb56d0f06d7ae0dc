"""Codecs and image tokenizers that provq_hosts.py and provq_packages.py adapt, as test cases beside provq_hosts.py's.

Stand-ins are small classes of our own with the original's class name, attributes, state-dict keys, return value and
semantics. `original` loads the real class where its package, or a folder of it in PROVQ_HOSTS, is at hand: the file of
the class alone, without the rest of its package, which needs more than torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable

import torch
import torch.nn.functional as F
import vector_quantize_pytorch as lucidrains
from torch import Tensor, nn
from workers.provq_hosts import CHECKOUTS, Case, VectorQuantizer2

# -------------------------------------------------------------------------------------------------------------- EnCodec


class _EuclideanCodebook(nn.Module):
    def __init__(self, dim: int, size: int, kmeans_init: bool, threshold_ema_dead_code: int):
        super().__init__()
        self.decay, self.epsilon, self.threshold_ema_dead_code = 0.99, 1e-5, threshold_ema_dead_code
        embed = torch.zeros(size, dim) if kmeans_init else torch.randn(size, dim)
        self.register_buffer("inited", torch.Tensor([not kmeans_init]))
        self.register_buffer("cluster_size", torch.zeros(size))
        self.register_buffer("embed", embed)
        self.register_buffer("embed_avg", embed.clone())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = x.reshape(-1, x.shape[-1])
        if not self.inited:  # stands for k-means of the first batch, in eval() as well
            self.embed.copy_(rows[torch.arange(len(self.embed)) % len(rows)])
            self.embed_avg.copy_(self.embed)
            self.cluster_size.fill_(len(rows) / len(self.embed))
            self.inited.fill_(1.0)
        index = torch.cdist(rows, self.embed).argmin(1)
        codes = F.embedding(index, self.embed).view(x.shape)
        if self.training:
            rare = self.cluster_size < self.threshold_ema_dead_code
            if rare.any():
                self.embed.copy_(torch.where(rare[:, None], rows[torch.randint(len(rows), rare.shape)], self.embed))
            one_hot = F.one_hot(index, len(self.embed)).type(x.dtype)
            self.cluster_size.mul_(self.decay).add_(one_hot.sum(0), alpha=1 - self.decay)
            self.embed_avg.mul_(self.decay).add_((one_hot.t() @ rows).detach(), alpha=1 - self.decay)
            n = self.cluster_size.sum()
            smoothed = (self.cluster_size + self.epsilon) / (n + len(self.embed) * self.epsilon) * n
            self.embed.copy_(self.embed_avg / smoothed[:, None])
        return codes, index.view(x.shape[:-1])


class VectorQuantization(nn.Module):
    """EnCodec, AudioCraft, WavTokenizer: z (B, D, n), a loss of shape (1,), straight-through in training only."""

    def __init__(self, dim: int, codebook_size: int, codebook_dim: int | None = None, kmeans_init: bool = True,
                 threshold_ema_dead_code: int = 2, commitment_weight: float = 1.0):
        super().__init__()
        inner = codebook_dim or dim
        self.project_in = nn.Linear(dim, inner) if inner != dim else nn.Identity()
        self.project_out = nn.Linear(inner, dim) if inner != dim else nn.Identity()
        self.commitment_weight, self.codebook_size = commitment_weight, codebook_size
        self._codebook = _EuclideanCodebook(inner, codebook_size, kmeans_init, threshold_ema_dead_code)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.project_in(x.movedim(1, -1))
        quantized, index = self._codebook(x)
        loss = torch.tensor([0.0], requires_grad=self.training)
        if self.training:
            loss = loss + self.commitment_weight * F.mse_loss(quantized.detach(), x)
            quantized = x + (quantized - x).detach()
        return self.project_out(quantized).movedim(-1, 1), index, loss


class ResidualVectorQuantization(nn.Module):
    """Its levels: indices (levels, B, n), losses (levels, 1); a call may ask for the first n_q of them."""

    def __init__(self, *, num_quantizers: int, **options):
        super().__init__()
        self.layers = nn.ModuleList([VectorQuantization(**options) for _ in range(num_quantizers)])

    def forward(self, x: Tensor, n_q: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        total, rest, indices, losses = 0.0, x, [], []
        for layer in self.layers[: n_q or len(self.layers)]:
            quantized, index, loss = layer(rest)
            rest, total = rest - quantized, total + quantized
            indices.append(index)
            losses.append(loss)
        return total, torch.stack(indices), torch.stack(losses)


# ------------------------------------------------------------------------------------------------------------------ DAC

def _convolution(inputs: int, outputs: int) -> nn.Module:
    return nn.utils.weight_norm(nn.Conv1d(inputs, outputs, 1))


class VectorQuantize(nn.Module):
    """descript-audio-codec: cosine search of codes that are no unit vectors; losses per item, the latents returned."""

    def __init__(self, input_dim: int, codebook_size: int, codebook_dim: int):
        super().__init__()
        self.codebook_size, self.codebook_dim = codebook_size, codebook_dim
        self.in_proj = _convolution(input_dim, codebook_dim)
        self.out_proj = _convolution(codebook_dim, input_dim)
        self.codebook = nn.Embedding(codebook_size, codebook_dim)

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        latent = self.in_proj(z)
        rows = latent.movedim(1, -1)
        index = (F.normalize(rows, dim=-1) @ F.normalize(self.codebook.weight).t()).argmax(-1)
        codes = self.codebook(index).movedim(-1, 1)
        commit = (latent - codes.detach()).square().mean([1, 2])
        code_loss = (codes - latent.detach()).square().mean([1, 2])
        return self.out_proj(latent + (codes - latent).detach()), commit, code_loss, index, latent


class ResidualVectorQuantize(nn.Module):
    """Its levels: codes (B, levels, n); in training each item of a batch may have a random number of levels."""

    def __init__(self, input_dim: int, n_codebooks: int, codebook_size: int, codebook_dim: int,
                 quantizer_dropout: float = 0.0):
        super().__init__()
        self.n_codebooks, self.codebook_size, self.quantizer_dropout = n_codebooks, codebook_size, quantizer_dropout
        self.quantizers = nn.ModuleList(
            [VectorQuantize(input_dim, codebook_size, codebook_dim) for _ in range(n_codebooks)])

    def forward(self, z: Tensor, n_quantizers: int | None = None) -> tuple[Tensor, ...]:
        levels = torch.full((len(z),), float(n_quantizers or self.n_codebooks))
        if self.training:
            levels = torch.full((len(z),), self.n_codebooks + 1.0)
            dropped = int(len(z) * self.quantizer_dropout)
            levels[:dropped] = torch.randint(1, self.n_codebooks + 1, (len(z),)).float()[:dropped]
        total, rest, commit, code_loss, codes, latents = 0, z, 0, 0, [], []
        for i, quantizer in enumerate(self.quantizers):
            if not self.training and i >= levels[0]:
                break
            quantized, commit_i, code_i, index, latent = quantizer(rest)
            kept = i < levels
            total, rest = total + quantized * kept[:, None, None], rest - quantized
            commit, code_loss = commit + (commit_i * kept).mean(), code_loss + (code_i * kept).mean()
            codes.append(index)
            latents.append(latent)
        return total, torch.stack(codes, 1), torch.cat(latents, 1), commit, code_loss


# --------------------------------------------------------------------------------------------------------------- images

class DiffusersQuantizer(VectorQuantizer2):
    """diffusers' VQModel: taming's, with vq_embed_dim for e_dim."""

    def __init__(self, n_e: int, vq_embed_dim: int, beta: float, **options):
        super().__init__(n_e, vq_embed_dim, beta, **options)
        self.vq_embed_dim = vq_embed_dim
        del self.e_dim

    def _quantize(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        twin = types.SimpleNamespace(**vars(self), e_dim=self.vq_embed_dim, _codes=self._codes)
        return VectorQuantizer2._quantize(twin, z)


class TiTokQuantizer(nn.Module):
    """1d-tokenizer: a dictionary as second return value; clustering_vq moves unused codes to latents."""

    def __init__(self, codebook_size: int, token_size: int, use_l2_norm: bool = False, clustering_vq: bool = False):
        super().__init__()
        self.codebook_size, self.token_size, self.commitment_cost = codebook_size, token_size, 0.25
        self.use_l2_norm, self.clustering_vq = use_l2_norm, clustering_vq
        self.embedding = nn.Embedding(codebook_size, token_size)
        self.embedding.weight.data.uniform_(-1.0 / codebook_size, 1.0 / codebook_size)
        if clustering_vq:
            self.register_buffer("embed_prob", torch.zeros(codebook_size))

    def forward(self, z: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        raw = z.float().movedim(1, -1)
        z, codes = raw, self.embedding.weight
        if self.use_l2_norm:
            z, codes = F.normalize(z, dim=-1), F.normalize(codes, dim=-1)
        distance = torch.cdist(z.reshape(-1, self.token_size), codes)
        index = distance.argmin(1)
        quantized = codes[index].view(z.shape)
        commit = self.commitment_cost * (quantized.detach() - z).square().mean()
        code_loss = (quantized - z.detach()).square().mean()
        if self.clustering_vq and self.training:
            with torch.no_grad():
                share = torch.bincount(index, minlength=self.codebook_size) / len(index)
                self.embed_prob.mul_(0.99).add_(share, alpha=0.01)
                decay = torch.exp(-self.embed_prob * self.codebook_size * 10 / 0.01 - 1e-3)[:, None]
                near = raw.reshape(-1, self.token_size)[distance.argmin(0)]
                self.embedding.weight.data = self.embedding.weight.data * (1 - decay) + near * decay
        quantized = (z + (quantized - z).detach()).movedim(-1, 1)
        return quantized, {"quantizer_loss": commit + code_loss, "commitment_loss": commit, "codebook_loss": code_loss,
                           "min_encoding_indices": index.view(len(z), *z.shape[1:3])}


class IndexPropagationQuantize(nn.Module):
    """IBQ (SEED-Voken): the largest dot product; gradients reach all codes through a softmax."""

    def __init__(self, n_e: int, e_dim: int, use_entropy_loss: bool = False, l2_normalize: bool = False):
        super().__init__()
        self.n_e, self.e_dim, self.beta, self.remap, self.cosine_similarity = n_e, e_dim, 0.25, None, False
        self.use_entropy_loss, self.l2_normalize = use_entropy_loss, l2_normalize
        self.embedding = nn.Embedding(n_e, e_dim)

    def forward(self, z: Tensor):
        codes = self.embedding.weight
        if self.l2_normalize:
            z, codes = F.normalize(z, dim=1), F.normalize(codes, dim=1)
        logits = torch.einsum("bdhw,nd->bnhw", z, codes)
        soft = logits.softmax(1)
        index = soft.argmax(1)
        hard = F.one_hot(index, self.n_e).movedim(-1, 1).type(z.dtype)
        quantized = torch.einsum("bnhw,nd->bdhw", hard - soft.detach() + soft, codes)
        picked = torch.einsum("bnhw,nd->bdhw", hard, codes)
        loss = ((quantized - z).square().mean() + (picked.detach() - z).square().mean()
                + self.beta * (picked - z.detach()).square().mean())
        if self.use_entropy_loss:
            p = (logits / 0.01).softmax(1)
            each, mean = -(p * (p + 1e-5).log()).sum(1).mean(), p.mean((0, 2, 3))
            spread = -(mean * (mean + 1e-5).log()).sum()
            loss = (loss, each, spread, each - spread)
        return quantized, loss, (None, None, index.flatten())


for _cls, _name in ((DiffusersQuantizer, "VectorQuantizer"), (TiTokQuantizer, "VectorQuantizer")):
    _cls.__name__ = _name  # the name that all of these share


# ----------------------------------------------------------------------------------------------------------- test cases

STAND_INS = {
    "encodec": Case(lambda: VectorQuantization(4, 8), (4, 12)),
    "encodec-projected": Case(
        lambda: VectorQuantization(6, 8, codebook_dim=4, threshold_ema_dead_code=0), (4, 12), dim=6),
    "encodec-residual": Case(lambda: ResidualVectorQuantization(num_quantizers=3, dim=4, codebook_size=8), (4, 12)),
    "encodec-residual-projected": Case(
        lambda: ResidualVectorQuantization(num_quantizers=3, dim=6, codebook_dim=4, codebook_size=8), (4, 12), dim=6),
    "dac": Case(lambda: VectorQuantize(6, 8, 4), (4, 12), dim=6),
    "dac-residual": Case(lambda: ResidualVectorQuantize(6, 3, 8, 2, quantizer_dropout=0.5), (4, 12), dim=6),
    "diffusers": Case(lambda: DiffusersQuantizer(8, 4, 0.25, legacy=False), (4, 4, 3)),
    "titok": Case(lambda: TiTokQuantizer(8, 4), (4, 1, 12)),
    "titok-clustering": Case(lambda: TiTokQuantizer(8, 4, use_l2_norm=True, clustering_vq=True), (4, 1, 12)),
    "ibq": Case(lambda: IndexPropagationQuantize(8, 4), (4, 4, 3)),
    "ibq-entropy": Case(lambda: IndexPropagationQuantize(8, 4, use_entropy_loss=True, l2_normalize=True), (4, 4, 3)),
}
PACKAGES = {
    "residual-simvq": Case(lambda: lucidrains.ResidualSimVQ(dim=4, num_quantizers=3, codebook_size=8), (4, 12), -1),
    "residual-simvq-image": Case(lambda: lucidrains.ResidualSimVQ(
        dim=4, num_quantizers=3, codebook_size=8, channel_first=True, quantize_dropout=True), (4, 4, 3)),
    "residual-fsq": Case(lambda: lucidrains.ResidualFSQ(levels=[5, 3], num_quantizers=3, dim=6), (4, 12), -1, dim=6),
    "residual-fsq-image": Case(
        lambda: lucidrains.ResidualFSQ(levels=[5, 3], num_quantizers=3, is_channel_first=True), (4, 4, 3), dim=2),
    "residual-lfq": Case(lambda: lucidrains.ResidualLFQ(dim=6, codebook_size=8, num_quantizers=3), (4, 12), -1, dim=6),
    "grouped-residual": Case(lambda: lucidrains.GroupedResidualVQ(  # as audiolm-pytorch's SoundStream is built
        dim=8, groups=2, num_quantizers=3, codebook_size=8, kmeans_init=True, quantize_dropout=True,
        stochastic_sample_codes=True), (4, 12), -1, dim=8),
    "grouped-residual-fsq": Case(
        lambda: lucidrains.GroupedResidualFSQ(dim=8, groups=2, levels=[5, 3], num_quantizers=2), (4, 12), -1, dim=8),
    "grouped-residual-lfq": Case(
        lambda: lucidrains.GroupedResidualLFQ(dim=8, groups=2, codebook_size=8, num_quantizers=2), (4, 12), -1, dim=8),
    "latent": Case(lambda: lucidrains.LatentQuantize(levels=[5, 4], dim=6), (4, 4, 3), dim=6),
    "latent-codebooks": Case(
        lambda: lucidrains.LatentQuantize(levels=[5, 5], dim=6, num_codebooks=2), (4, 4, 3), dim=6),
}


@functools.cache
def _folder(package: str) -> str | None:
    if CHECKOUTS and (CHECKOUTS / package).is_dir() and str(CHECKOUTS) not in sys.path:
        sys.path.append(str(CHECKOUTS))
    spec = importlib.util.find_spec(package)
    return spec.submodule_search_locations[0] if spec and spec.submodule_search_locations else None


def original(package: str, path: str, name: str) -> Callable[..., nn.Module] | None:
    """Class `name` of package/path.py; None if the package is not at hand."""
    folder = _folder(package)
    if folder is None:
        return None
    parts = [package, *path.split("/")]
    if package != "diffusers":  # the others' __init__ need more than torch: parents without them
        for i in range(1, len(parts)):
            parent = types.ModuleType(".".join(parts[:i]))
            parent.__path__ = ["/".join([folder, *parts[1:i]])]
            sys.modules.setdefault(parent.__name__, parent)
    return getattr(importlib.import_module(".".join(parts)), name)
