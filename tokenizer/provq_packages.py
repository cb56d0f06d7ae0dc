# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The ProVQ authors
"""Quantizers of packages for `attach`: vector-quantize-pytorch and diveq. Copy all provq*.py; provq_attach.py loads it.

Tables, residual levels, groups and grids; each adapter says which options it does not support. Sizes as in
provq_attach.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Sequence

import torch
from torch import Tensor, nn

if TYPE_CHECKING or __package__:  # the files beside this one, in a package of any name
    from . import provq, provq_attach
    from .provq_attach import Adapter, ResidualAdapter, TableAdapter
    from .provq_hosts import Projected, running_means, warn_of_expiry
else:
    import provq
    import provq_attach
    from provq_attach import Adapter, ResidualAdapter, TableAdapter
    from provq_hosts import Projected, running_means, warn_of_expiry

__all__ = ["DiVeQAdapter", "FSQAdapter", "GroupedResidualAdapter", "LFQAdapter", "LatentQuantizeAdapter",
           "LucidrainsSimVQAdapter", "ResidualFSQAdapter", "ResidualLFQAdapter", "ResidualSimVQAdapter",
           "ResidualVQAdapter", "VectorQuantizeAdapter"]


# -------------------------------------------------------------------------------------------- tables, levels, groups

class DiVeQAdapter(TableAdapter):
    """diveq's DIVEQ and DIVEQDetach: z (N, D); no loss, codes learn through z~. `inference` is not intercepted."""

    classes, package, sizes = ("DIVEQ", "DIVEQDetach"), "diveq", ("num_embeddings", "embedding_dim")
    channel_dim, spatial, ndims, losses_at = -1, 0, (2,), {}
    needs, template = ("codebook", "codebook_usage", "replacement_iters"), (None, None, 0.0)  # perplexity is last

    def table(self) -> Tensor:
        return self.module.codebook


class VectorQuantizeAdapter(Projected, TableAdapter):
    """vector-quantize-pytorch's VectorQuantize: EMA, learned or cosine codes. Instead of its kmeans_init, ProVQ's."""

    classes: tuple[str, ...] = ("VectorQuantize",)
    accepts: tuple[str, ...] | None = ("mask",)
    needs = ("_codebook.embed", "_codebook.initted", "_codebook.use_ddp", "accept_3d_fmap", "project_in", "project_out")
    supports = {"heads": 1, "_codebook.affine_param": False, "_codebook.vq_bridge": None,  # noqa: RUF012
                "return_zeros_for_masked_padding": True}

    def __init__(self, module: Any):
        super().__init__(module)
        self.l2_norm = module.use_cosine_sim
        self.spatial = 2 if module.accept_image_fmap else 3 if module.accept_3d_fmap else 1
        self.channel_dim = -1 if self.spatial == 1 and module.channel_last else 1
        if self.spatial > 1:
            self.ndims, self.accepts = (self.spatial + 2,), ()

    def table(self) -> Tensor:
        return self.module._codebook.embed[0]

    def latent(self, x: Tensor) -> Tensor:
        return self.module._codebook.transform_input(super().latent(x))

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:
        book = self.module._codebook
        warn_of_expiry(self.module, counts, book.threshold_ema_dead_code)
        if counts is not None and book.use_ddp:
            counts = counts * provq._world()  # it adds up the batches of all ranks
        size, average = running_means(centroids, counts, book.eps)
        for target, value in ((book.embed, centroids), (book.cluster_size, size), (book.embed_avg, average)):
            target.data.copy_(value[None])
        book.initted.data.fill_(True)


class ResidualVQAdapter(Projected, ResidualAdapter):
    """vector-quantize-pytorch's ResidualVQ, set level by level."""

    classes, accepts = ("ResidualVQ",), ("mask", "rand_quantize_dropout_fixed_seed")
    sizes: tuple[str, ...] = ()
    needs = ("layers.0.accept_3d_fmap", "layers.0._codebook.use_ddp", "num_quantizers", "project_in", "project_out")
    supports = {"shared_codebook": False, "implicit_neural_codebook": False, "accept_image_fmap": False,  # noqa: RUF012
                "return_zeros_for_masked_padding": True}

    def __init__(self, module: Any):
        super().__init__(module)
        self._use_levels([VectorQuantizeAdapter(layer) for layer in module.layers])
        if any(level.l2_norm for level in self.levels):
            raise ValueError("ResidualVQ: use_cosine_sim = True is not supported: a sum of unit codes is no latent")
        self.dim = getattr(module.project_in, "in_features", module.codebook_dim)
        self.loss_shape = self.trailing


class LucidrainsSimVQAdapter(TableAdapter):
    """vector-quantize-pytorch's SimVQ. Codes are set in the frozen codebook, its map to the identity."""

    classes, package, sizes, spatial, ndims = ("SimVQ",), "vector_quantize_pytorch", (), 1, ()
    needs = ("frozen_codebook", "code_transform", "channel_first")

    def __init__(self, module: Any):
        super().__init__(module)
        linear = module.code_transform
        if not isinstance(linear, nn.Linear) or linear.in_features != linear.out_features:
            raise ValueError("SimVQ: a codebook_transform, or frozen_codebook_dim != dim, is not supported: only a "
                             "square nn.Linear can become the identity")
        self.num_codes, self.dim = module.codebook_size, linear.out_features
        self.channel_dim = 1 if module.channel_first else -1

    def table(self) -> Tensor:
        return self.module.codebook

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:  # noqa: ARG002
        self.module.frozen_codebook.copy_(centroids)
        provq_attach._make_identity(self.module.code_transform)


class ResidualSimVQAdapter(ResidualAdapter):
    """vector-quantize-pytorch's ResidualSimVQ, set level by level."""

    classes, package, spatial, ndims = ("ResidualSimVQ",), "vector_quantize_pytorch", 1, ()
    needs = ("layers.0.frozen_codebook", "layers.0.code_transform", "channel_first")
    accepts = ("rand_quantize_dropout_fixed_seed",)

    def __init__(self, module: Any):
        super().__init__(module)
        self._use_levels([LucidrainsSimVQAdapter(layer) for layer in module.layers])
        self.dim, self.channel_dim, self.loss_shape = self.levels[0].dim, self.levels[0].channel_dim, self.trailing


class GroupedResidualAdapter(Adapter):
    """vector-quantize-pytorch's GroupedResidualVQ, -FSQ and -LFQ: channels in groups, a residual quantizer for each."""

    classes, package = ("GroupedResidualVQ", "GroupedResidualFSQ", "GroupedResidualLFQ"), "vector_quantize_pytorch"
    sizes, needs, supports = (), ("rvqs", "groups", "split_dim"), {"accept_image_fmap": False}
    channel_dim, spatial, ndims = -1, 1, (3,)

    def __init__(self, module: Any):
        super().__init__(module)
        self.groups = [provq_attach.adapt(group, check=False) for group in module.rvqs]
        first = self.groups[0]
        self.dim, self.num_codes = module.dim, sum(group.num_codes for group in self.groups)
        self.settable, self.index_dtype = first.settable, first.index_dtype
        self.template, self.losses_at = first.template, first.losses_at
        if "mask" in self.defaults:
            self.accepts = ("mask",)

    def _split(self, x: Tensor) -> list[tuple[Adapter, Tensor]]:
        return list(zip(self.groups, x.chunk(len(self.groups), -1)))  # noqa: B905  # strict= is of Python 3.10

    def cast(self, x: Tensor) -> Tensor:
        return self.groups[0].cast(x)

    def latent(self, x: Tensor) -> Tensor:
        return torch.cat([group.latent(part) for group, part in self._split(x)], -1)

    def output(self, codes: Tensor) -> Tensor:
        return torch.cat([group.output(part) for group, part in self._split(codes)], -1)

    def parts(self) -> Sequence[provq_attach._Table]:
        return [part for group in self.groups for part in group.parts()]

    def assign(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, indices = zip(*[group.assign(part) for group, part in self._split(x)])  # noqa: B905
        return torch.cat(codes, -1), torch.cat(indices, -1)

    def decoded(self, indices: Tensor) -> Tensor:
        return torch.cat([group.decoded(part) for group, part in self._split(indices)], -1)

    def fit_codebook_(self, x: Tensor, *, batch: Tensor | None = None, **options: Any) -> dict[str, float]:
        if not self.settable:
            return super().fit_codebook_(x)
        infos = [group.fit_codebook_(part, batch=batch, **options) for group, part in self._split(x)]
        if self.check:
            self.require_alike(x)
        return {**infos[0], **{name: sum(info[name] for info in infos) for name in ("inertia", "empty")}}

    def token_indices(self, indices: Tensor, n: int) -> Tensor:
        return indices.movedim(0, -2).reshape(n, -1).long()

    def countable(self, indices: Tensor) -> Tensor:
        counted, first = [], 0
        for group, part in zip(self.groups, indices):  # noqa: B905
            part = group.countable(part)
            counted.append(torch.where(part < 0, part, part + first))
            first += group.num_codes
        return torch.stack(counted)

    def silent(self, z: Tensor, quantized: Tensor, given: dict[str, Any]) -> Any:
        outs = [group.silent(z, quantized, given) for group in self.groups]
        out = provq_attach._put(self.template, self.quantized_at, quantized)
        for path in (self.indices_at or (), *self.losses_at.values()):
            out = provq_attach._put(out, path, torch.stack([provq_attach._get(each, path) for each in outs]))
        return out


# -------------------------------------------------------------------------------------------------------------- grids

class _Grid(Projected):
    """Codes on a fixed grid: warm-up and mix are all there is to do, by `attach` only."""

    settable, sizes, supports, ndims = False, (), {"orthogonal_rotation": False}, ()

    def __init__(self, module: Any):
        super().__init__(module)
        self.dim, self.num_codes = module.dim, int(getattr(module, "codebook_size", 0))
        self.trailing = (module.num_codebooks,) if module.keep_num_codebooks_dim else ()

    def channels(self, z: Tensor) -> int:
        return 1 if z.ndim >= 4 or self.module.channel_first else -1

    def bounded(self, z: Tensor) -> Tensor:
        """Projected latents (..., codebooks, C) just before they are rounded."""
        raise NotImplementedError

    def latent(self, x: Tensor) -> Tensor:
        return self.bounded(super().latent(x).unflatten(-1, (self.module.num_codebooks, -1))).flatten(-2)


class FSQAdapter(_Grid):
    """vector-quantize-pytorch's FSQ: the warm-up is its bounded latent without the rounding."""

    classes, template, losses_at, index_dtype = ("FSQ",), (None, None), {}, torch.int32
    needs = ("_levels", "preserve_symmetry", "bound_hard_clamp", "return_indices", "project_in", "project_out")

    def __init__(self, module: Any):
        super().__init__(module)
        self.num_codes = int(module._levels.prod())
        self.indices_at = (1,) if module.return_indices else None

    def bounded(self, z: Tensor) -> Tensor:
        hard, levels = self.module.bound_hard_clamp, self.module._levels
        half, offset = (levels - 1) * (1 + 1e-3) / 2, torch.where(levels % 2 == 0, 0.5, 0.0)
        if self.module.preserve_symmetry:
            half, offset, levels = torch.ones_like(half), torch.zeros_like(half), torch.full_like(levels, 2)
        shift = offset / half
        wide = (z + shift).clamp(-1.0, 1.0) if hard else torch.tanh(z + torch.atanh(shift))
        return ((wide * half - offset) / (levels // 2)).to(z.dtype)


class LFQAdapter(_Grid):
    """vector-quantize-pytorch's LFQ, and BSQ (spherical): the warm-up is the latent whose signs it takes."""

    classes, needs = ("LFQ",), ("codebook_scale", "maybe_l2norm", "soft_clamp_input_value", "project_in", "project_out")

    def __init__(self, module: Any):
        super().__init__(module)
        self.template = provq_attach._beside(module, "Return")(None, None, None)  # the named tuple of its file

    def bounded(self, z: Tensor) -> Tensor:
        clamp = self.module.soft_clamp_input_value
        return self.module.maybe_l2norm(z if clamp is None else (z / clamp).tanh() * clamp)


class LatentQuantizeAdapter(_Grid):
    """vector-quantize-pytorch's LatentQuantize: learned values for each channel, which start on a grid."""

    classes, index_dtype, channel_dim = ("LatentQuantize",), torch.int32, 1
    supports = {"in_place_codebook_optimizer": None}  # noqa: RUF012
    needs = ("_levels", "values_per_latent", "num_codebooks", "keep_num_codebooks_dim", "project_in", "project_out")

    def channels(self, z: Tensor) -> int:  # noqa: ARG002
        return 1

    def bounded(self, z: Tensor) -> Tensor:
        return z

    def countable(self, indices: Tensor) -> Tensor:
        return torch.where(indices < self.num_codes, indices, -1)  # its indices assume that values stay on the grid


class _ResidualGrid(Projected):
    """Levels of finer and finer grids: warm-up and mix, by `attach` only."""

    settable, sizes = False, ()
    ndims: tuple[int, ...] = (3,)
    accepts: tuple[str, ...] = ("rand_quantize_dropout_fixed_seed",)

    def __init__(self, module: Any):
        super().__init__(module)
        self.level_codes = module.layers[0].codebook_size
        self.num_codes = module.num_quantizers * self.level_codes
        self.dim = getattr(module.project_in, "in_features", module.layers[0].dim)
        self.trailing = (module.num_quantizers,)

    def countable(self, indices: Tensor) -> Tensor:
        last = indices.movedim(self.level_axis, -1)
        return torch.where(last < 0, last, last + self.level_codes * torch.arange(last.shape[-1], device=last.device))


class ResidualFSQAdapter(_ResidualGrid):
    """vector-quantize-pytorch's ResidualFSQ: the warm-up is the latent that its soft clamp bounds."""

    classes, template, losses_at = ("ResidualFSQ",), (None, None), {}
    needs = ("layers.0._levels", "scales", "num_quantizers", "is_channel_first", "project_in", "project_out")

    def __init__(self, module: Any):
        super().__init__(module)
        self.index_dtype = torch.int64 if module.quantize_dropout else torch.int32
        if module.is_channel_first:
            self.channel_dim, self.ndims, self.level_axis = 1, (), 1

    def latent(self, x: Tensor) -> Tensor:
        z, clamp = super().latent(x), self.module.soft_clamp_input_value
        return z if clamp is None else (z / clamp).tanh() * clamp


class ResidualLFQAdapter(_ResidualGrid):
    """vector-quantize-pytorch's ResidualLFQ: the warm-up is the latent whose signs, and those of its rest, it takes."""

    classes, accepts = ("ResidualLFQ",), ("mask", "rand_quantize_dropout_fixed_seed")
    needs = ("layers.0.codebook_scale", "layers.0.maybe_l2norm", "num_quantizers", "project_in", "project_out")

    def __init__(self, module: Any):
        super().__init__(module)
        if module.layers[0].spherical:
            raise ValueError("ResidualLFQ: spherical = True is not supported: a sum of unit codes is no latent")
        self.loss_shape = self.trailing


provq_attach.ADAPTERS.update({
    "diveq": DiVeQAdapter, "lucidrains": VectorQuantizeAdapter, "lucidrains-residual": ResidualVQAdapter,
    "lucidrains-simvq": LucidrainsSimVQAdapter, "lucidrains-residual-simvq": ResidualSimVQAdapter,
    "lucidrains-grouped": GroupedResidualAdapter, "lucidrains-fsq": FSQAdapter, "lucidrains-lfq": LFQAdapter,
    "lucidrains-latent": LatentQuantizeAdapter, "lucidrains-residual-fsq": ResidualFSQAdapter,
    "lucidrains-residual-lfq": ResidualLFQAdapter,
})
