# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The ProVQ authors
"""More hosts for `attach`: audio codecs, images, and kind="custom". Copy all provq*.py; provq_attach.py loads it.

EnCodec (AudioCraft, WavTokenizer), descript-audio-codec, taming's EMA, diffusers, TiTok, IBQ, ESM; each adapter says
which options it does not support. Sizes as in provq_attach.py.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any, Callable, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING or __package__:  # the files beside this one, in a package of any name
    from . import provq, provq_attach
    from .provq_attach import Adapter, Path, ResidualAdapter, TableAdapter, TamingAdapter
else:
    import provq
    import provq_attach
    from provq_attach import Adapter, Path, ResidualAdapter, TableAdapter, TamingAdapter

__version__ = "0.3.0"
__all__ = ["CustomAdapter", "CustomResidualAdapter", "DACAdapter", "DACResidualAdapter", "DiffusersAdapter",
           "EMACodebookAdapter", "EncodecAdapter", "EncodecResidualAdapter", "IBQAdapter", "Projected",
           "TamingEMAAdapter", "TiTokAdapter", "VARAdapter", "custom", "running_means", "warn_of_expiry"]

if getattr(provq_attach, "__version__", None) != __version__:
    raise ImportError(f"provq_hosts.py is of version {__version__}, but {provq_attach.__file__} of version "
                      f"{getattr(provq_attach, '__version__', None)}: copy all, provq*.py, from one release")


def warn_of_expiry(module: nn.Module, counts: Tensor | None, threshold: float) -> None:
    """Warn where a host that replaces rare codes would replace most of those that k-means has just set."""
    rare = 0.0 if counts is None else float((counts < threshold).float().mean())
    if rare > 0.5:
        warnings.warn(f"{type(module).__name__} will at once replace {rare:.0%} of the codes that k-means has set: in a"
                      f" batch they have fewer than threshold_ema_dead_code = {threshold} tokens. Lower it, or train "
                      "with larger batches", stacklevel=7)


def running_means(centroids: Tensor, counts: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """cluster_size (K,) and embed_avg (K, C) of which the hosts' smoothed quotient gives the centroids back."""
    size = centroids.new_ones(len(centroids)) if counts is None else counts.to(centroids.dtype)
    total = size.sum()
    return size, centroids * ((size + eps) * total / (total + len(size) * eps))[:, None]


class Projected(Adapter):
    """A host with linear maps into and out of the space of the codes, or identities."""

    package, channel_dim, spatial = "vector_quantize_pytorch", -1, 1
    sizes: tuple[str, ...] = ("codebook_size", "dim")
    ndims: tuple[int, ...] = (2, 3)

    def cast(self, x: Tensor) -> Tensor:
        return x.to(next((p.dtype for p in self.module.project_in.parameters()), torch.float32))

    def latent(self, x: Tensor) -> Tensor:
        return self.module.project_in(x)

    def output(self, codes: Tensor) -> Tensor:
        return self.module.project_out(codes)


# --------------------------------------------------------------------------------------------------------- audio codecs

class EncodecAdapter(Projected, TableAdapter):
    """VectorQuantization of EnCodec, AudioCraft and WavTokenizer: EMA codes, projections. Their kmeans_init is ProVQ's.

    With threshold_ema_dead_code they replace codes that a batch uses less, whatever k-means found.
    """

    classes, package, channel_dim, ndims, loss_shape = ("VectorQuantization",), "", 1, (3,), (1,)
    sizes = ()
    needs = ("codebook_size", "_codebook.embed", "_codebook.inited", "_codebook.cluster_size", "_codebook.embed_avg",
             "project_in", "project_out", "commitment_weight")

    def __init__(self, module: Any):
        super().__init__(module)
        self.num_codes = module.codebook_size
        self.dim = getattr(module.project_in, "in_features", self.table().shape[1])
        self.channel_dim = -1 if getattr(module, "channels_last", False) else 1

    def table(self) -> Tensor:
        return self.module._codebook.embed

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:
        book = self.module._codebook
        warn_of_expiry(self.module, counts, book.threshold_ema_dead_code)
        size, average = running_means(centroids, counts, book.epsilon)
        for target, value in ((book.embed, centroids), (book.cluster_size, size), (book.embed_avg, average)):
            target.data.copy_(value)
        book.inited.data.fill_(1.0)


class _Codec(ResidualAdapter):
    """Levels with projections of their own, which the warm-up trains as well: each adds what it passes on unrounded."""

    channel_dim, spatial, ndims = 1, 1, (3,)

    def smooth(self, x: Tensor) -> Tensor:
        rest = x
        for level in self.levels:
            rest = rest - level.smooth(rest)
        return x - rest


class EncodecResidualAdapter(_Codec):
    """ResidualVectorQuantization of EnCodec, AudioCraft and WavTokenizer: `.vq` of a model's quantizer.

    n_q, the number of levels in a call, may vary as they let it.
    """

    classes, level_axis, accepts = ("ResidualVectorQuantization",), 0, ("n_q",)
    needs = ("layers.0._codebook.inited", "layers.0._codebook.embed_avg", "layers.0.commitment_weight")

    def __init__(self, module: Any):
        super().__init__(module)
        self._use_levels([EncodecAdapter(layer) for layer in module.layers])
        self.dim, self.channel_dim = self.levels[0].dim, self.levels[0].channel_dim
        self.loss_shape = (len(self.levels), 1)

    def cast(self, x: Tensor) -> Tensor:
        return self.levels[0].cast(x)

    def silent(self, z: Tensor, quantized: Tensor, given: dict[str, Any]) -> Any:
        out, n = super().silent(z, quantized, given), given.get("n_q") or len(self.levels)
        return out[0], out[1][:n], out[2][:n]


class DACAdapter(provq_attach._Table):
    """descript-audio-codec's VectorQuantize: projections, search by angle alone, codes with a length. `attach` only."""

    classes, channel_dim, spatial, ndims = ("VectorQuantize",), 1, 1, (3,)
    sizes, projections = (), ("in_proj", "out_proj")
    needs = ("codebook_size", "in_proj.in_channels", "out_proj", "codebook.weight", "codebook_dim")
    template, indices_at = (None,) * 5, (3,)
    losses_at = {"commit": (1,), "codebook": (2,)}  # noqa: RUF012

    def __init__(self, module: Any):
        super().__init__(module)
        self.num_codes, self.dim = module.codebook_size, module.in_proj.in_channels

    def table(self) -> Tensor:
        return self.module.codebook.weight

    def latent(self, x: Tensor) -> Tensor:
        return _convolved(self.module.in_proj, x)

    def output(self, codes: Tensor) -> Tensor:
        return _convolved(self.module.out_proj, codes)

    def nearest(self, latents: Tensor) -> Tensor:
        return provq.nearest_code(F.normalize(latents, dim=-1), F.normalize(self.codebook(), dim=-1))

    def place_(self, latents: Tensor, batch: Tensor | None, *,  # noqa: ARG002
               scale: float = 0.0, what: str = "latents", **options: Any) -> provq.KMeansResult:
        """Directions by spherical k-means; each code has the length that is right for its cluster on average."""
        return _place_directions(self, latents, scale, what, each=True, **options)

    def silent(self, z: Tensor, quantized: Tensor, given: dict[str, Any]) -> Any:
        out, none = super().silent(z, quantized, given), z.new_zeros(len(z))
        return out[0], none, none.clone(), out[3], self.module.in_proj(z)


def _convolved(convolution: nn.Module, x: Tensor) -> Tensor:
    """A convolution of width 1 over tokens (..., D)."""
    return convolution(x.reshape(1, -1, x.shape[-1]).movedim(-1, 1))[0].t().reshape(*x.shape[:-1], -1)


def _place_directions(
    table: provq_attach._Table, latents: Tensor, scale: float, what: str, *, each: bool, **options: Any,
) -> provq.KMeansResult:
    """Codes for a search by angle: unit centroids, times the mean length of latents along them (one by one: each)."""
    result = provq.kmeans(latents, table.num_codes, spherical=True, **options)
    provq._require_distinct(result.centroids, scale, what)
    unit = result.centroids
    index = provq.nearest_code(F.normalize(latents, dim=-1), unit)
    along = (latents * unit[index]).sum(1).double()
    sums = latents.new_zeros(len(unit), 2, dtype=torch.float64).index_add_(
        0, index, torch.stack([along, torch.ones_like(along)], 1))
    provq._all_reduce(sums)
    mean = sums[:, 0].sum() / sums[:, 1].sum()
    length = torch.where(sums[:, 1] > 0, sums[:, 0] / sums[:, 1].clamp_min(1), mean) if each else mean.expand(len(unit))
    table.set_codebook_(unit * length[:, None].float(), result.counts)
    return result


class DACResidualAdapter(_Codec):
    """descript-audio-codec's ResidualVectorQuantize, with its quantizer dropout: `.quantizer` of a model."""

    classes, level_axis, accepts = ("ResidualVectorQuantize",), 1, ("n_quantizers",)
    needs = ("quantizers.0.in_proj", "quantizers.0.codebook.weight", "quantizer_dropout")
    projections = DACAdapter.projections
    template, losses_at = (None,) * 5, {"commit": (3,), "codebook": (4,)}

    def __init__(self, module: Any):
        super().__init__(module)
        self._use_levels([DACAdapter(level) for level in module.quantizers])
        self.dim = self.levels[0].dim

    def silent(self, z: Tensor, quantized: Tensor, given: dict[str, Any]) -> Any:
        out = super().silent(z, quantized, given)
        n = len(self.levels) if self.module.training else given.get("n_quantizers") or len(self.levels)
        size = sum(level.table().shape[1] for level in self.levels[:n])
        return out[0], out[1][:, :n], z.new_zeros(len(z), size, z.shape[2]), *out[3:]


# --------------------------------------------------------------------------------------------------------------- images

class TamingEMAAdapter(TamingAdapter):
    """taming-transformers' EMAVectorQuantizer. Of copies that run: the original's constructor raises NameError."""

    classes, sizes = ("EMAVectorQuantizer",), ("num_tokens", "codebook_dim")
    needs = ("embedding.weight", "embedding.cluster_size", "embedding.embed_avg")

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:
        table = self.module.embedding
        size, average = running_means(centroids, counts, table.eps)
        for target, value in ((table.weight, centroids), (table.cluster_size, size), (table.embed_avg, average)):
            target.data.copy_(value)

    def silent(self, z: Tensor, quantized: Tensor, given: dict[str, Any]) -> Any:
        out = super().silent(z, quantized, given)  # perplexity 0, and no code in the one-hot rows
        return *out[:2], (z.new_zeros(()), z.new_zeros(z.numel() // self.dim, self.num_codes), out[2][2])


class DiffusersAdapter(TamingAdapter):
    """diffusers' VectorQuantizer, of its VQModel: taming-transformers' with another name for D."""

    classes, package, sizes = ("VectorQuantizer",), "diffusers", ("n_e", "vq_embed_dim")


class TiTokAdapter(TableAdapter):
    """TiTok's VectorQuantizer (1d-tokenizer), which returns a dictionary. clustering_vq counts go on from k-means."""

    classes, sizes = ("VectorQuantizer",), ("codebook_size", "token_size")
    needs = ("embedding", "commitment_cost", "use_l2_norm", "clustering_vq")
    indices_at: Path | None = (1, "min_encoding_indices")
    losses_at = {name: (1, name) for name in ("quantizer_loss", "commitment_loss", "codebook_loss")}  # noqa: RUF012

    def __init__(self, module: Any):
        super().__init__(module)
        self.l2_norm = module.use_l2_norm
        self.template = (None, dict.fromkeys([*self.losses_at, "min_encoding_indices"]))

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:
        super().set_codebook_(centroids, counts)
        if self.module.clustering_vq and counts is not None:
            self.module.embed_prob.copy_(counts / counts.sum())


class IBQAdapter(provq_attach._Table):
    """IBQ's IndexPropagationQuantize (SEED-Voken, Emu3.5): the code of largest dot product. `attach` only.

    So that k-means is what it searches, codes start with one length, in the directions of spherical centroids.
    """

    classes, flat_indices = ("IndexPropagationQuantize",), True
    needs, supports = ("embedding", "use_entropy_loss", "cosine_similarity"), {"remap": None}

    def __init__(self, module: Any):
        super().__init__(module)
        self.l2_norm = getattr(module, "l2_normalize", False)
        entropy = module.use_entropy_loss
        self.template = (None, (None,) * 4 if entropy else None, (None, None, None))
        self.indices_at = (2, 2)
        self.losses_at = {"quant": (1, 0), "entropy": (1, 3)} if entropy else {"quant": (1,)}

    def nearest(self, latents: Tensor) -> Tensor:
        rows = max(1, 2**22 // self.num_codes)
        return torch.cat([(part @ self.codebook().t()).argmax(1) for part in latents.split(rows)])

    def place_(self, latents: Tensor, batch: Tensor | None, *,  # noqa: ARG002
               scale: float = 0.0, what: str = "latents", **options: Any) -> provq.KMeansResult:
        return _place_directions(self, latents, scale, what, each=False, **options)

    def silent(self, z: Tensor, quantized: Tensor, given: dict[str, Any]) -> Any:
        out = super().silent(z, quantized, given)
        if isinstance(out[1], tuple):  # what it logs
            out = out[0], (out[1][0], z.new_zeros(()), z.new_zeros(()), out[1][3]), out[2]
        return out


class VARAdapter(Adapter):
    """VAR's multi-scale VectorQuantizer2."""

    classes, sizes, needs = ("VectorQuantizer2",), (), ("v_patch_nums", "quant_resi", "Cvae")
    refused = ("its one table serves every scale, and a scale quantizes averages of what those before left over of a "
               "whole map: no latent has a code of its own that k-means could find")

    def __init__(self, module: Any):
        raise ValueError(f"{type(module).__name__} of VAR is not supported: {self.refused}")


# ------------------------------------------------------------------------------------------------------------- proteins

class EMACodebookAdapter(TableAdapter):
    """ESM's EMACodebook. Its EMA update is not released, so the codebook must be frozen: it stays at the centroids."""

    classes, sizes = ("EMACodebook",), ("n_codes", "embedding_dim")
    channel_dim, spatial, ndims = -1, 1, (3,)
    needs, supports = ("embeddings", "N", "z_avg", "freeze_codebook"), {"freeze_codebook": True}

    def table(self) -> Tensor:
        return self.module.embeddings

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:  # noqa: ARG002
        self.module.embeddings.copy_(centroids)
        self.module.z_avg.copy_(centroids)
        self.module.N.fill_(1.0)
        self.module._need_init = False


# -------------------------------------------------------------------------------------------------------- anything else

Place = Union[int, str, Path]  # in a return value: 0, "codes" or ("info", 2)


class _Returned(dict):  # type: ignore[type-arg]
    """Return values of a host, which a copy of it sees anew: they may be of any kind."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Returned:
        return _Returned()


class _Custom(Adapter):
    """What a module returns, by places. A copy of it is called once per shape of z in the warm-up, to see."""

    sizes: tuple[str, ...] = ()
    needs, ndims, accepts = (), (), None
    _set: Callable[..., None]
    _call: Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]]

    def _use(self, module: nn.Module, functions: dict[str, Callable[..., Any] | None], quantized_at: Place,
             indices_at: Place | None, losses_at: dict[str, Place] | None, channel_dim: int) -> None:
        if channel_dim not in (1, -1):
            raise ValueError(f"channel_dim must be 1 (B, D, ...) or -1 (B, ..., D), got {channel_dim}")
        for name, function in functions.items():
            if function is not None:
                self.__dict__[name] = functools.partial(function, module)  # in front of the method
        self.quantized_at, self.channel_dim = _path(quantized_at), channel_dim
        self.indices_at = None if indices_at is None else _path(indices_at)
        self.losses_at = {name: _path(place) for name, place in (losses_at or {}).items()}
        self._returned = _Returned()

    def silent(self, z: Tensor, quantized: Tensor, given: dict[str, Any]) -> Any:
        # A compiler breaks its graph for a new shape: it would trace the checks. (Here, as this import takes long.)
        example = torch.compiler.disable(self._example) if provq._is_compiling() else self._example
        out = provq_attach._put(example(z, given), self.quantized_at, quantized)
        if self.indices_at:
            indices = provq_attach._get(out, self.indices_at)
            out = provq_attach._put(out, self.indices_at, torch.full_like(indices, -1))
        for path in self.losses_at.values():
            loss = provq_attach._get(out, path)
            if loss is not None:
                out = provq_attach._put(out, path, torch.zeros_like(torch.as_tensor(loss)))
        return out

    def _example(self, z: Tensor, given: dict[str, Any]) -> Any:
        """What the host returns for latents of z's shape."""
        key = (z.shape, z.dtype, z.device, self.module.training)
        if key not in self._returned:
            found = self._probe(z, given)
            if not self._returned and self.check:
                self.spatial = z.ndim - 2
                self._require_places(found, z)
                self.rehearse()
            self._returned[key] = found
        return self._returned[key]

    @torch.no_grad()
    def _require_widths(self) -> None:
        """ValueError: latent and output do not lead from D channels to those of codes and back."""
        width, x = self.parts()[0].table().shape[1], provq_attach._weight(self.module).new_zeros(2, self.dim)
        for name, given, due in (("latent", x, width), ("output", x.new_zeros(2, width), self.dim)):
            got = getattr(self, name)(given)
            if got.shape != (2, due):
                raise ValueError(f"{type(self.module).__name__}: {name}= makes {tuple(got.shape)} of "
                                 f"{tuple(given.shape)}, and {(2, due)} is due: latents have dim = {self.dim} channels,"
                                 f" codes {width}")

    def _require_places(self, out: Any, z: Tensor) -> None:
        """ValueError: something is not where it should be in what the host returned for z."""
        name, found = type(self.module).__name__, {}
        places = {"quantized_at": self.quantized_at, "indices_at": self.indices_at,
                  **{f"losses_at[{loss!r}]": path for loss, path in self.losses_at.items()}}
        for key, path in places.items():
            try:
                found[key] = None if path is None else provq_attach._get(out, path)
            except (LookupError, AttributeError, TypeError) as error:
                raise ValueError(f"{name}: {key} = {path}: nothing is there in its return value ({error})") from error
        codes, indices = found["quantized_at"], found["indices_at"]
        if getattr(codes, "shape", None) != z.shape:
            raise ValueError(f"{name}: quantized_at = {self.quantized_at}: {_shape(codes)}, and latents are "
                             f"{tuple(z.shape)}")
        if indices is None:
            return
        sizes, n = [part.num_codes for part in self.parts()], z.numel() // self.dim
        whole = isinstance(indices, Tensor) and not indices.is_floating_point() and indices.numel() == n * len(sizes)
        if not whole or (self.trailing and indices.shape[self.level_axis] != len(sizes)):
            levels = f", of {len(sizes)} levels along level_axis = {self.level_axis}" if self.trailing else ""
            raise ValueError(f"{name}: indices_at = {self.indices_at}: {_shape(indices)}, and one for each of {n} "
                             f"latents is due{levels}")
        least, most = indices.min().item(), indices.max().item()
        if least < 0 or most >= max(sizes):
            raise ValueError(f"{name}: indices_at = {self.indices_at}: {least} to {most}, and codes are 0 to "
                             f"{max(sizes) - 1}")

    def fit_codebook_(self, x: Tensor, **options: Any) -> dict[str, float]:
        info = super().fit_codebook_(x, **options)
        if self.check:
            self._require_rest(self.twin(), x)
        return info

    @torch.no_grad()
    def _require_rest(self, twin: Adapter, x: Tensor) -> None:
        """Warn where a training forward on the tokens of the centroids moves the codes far from them."""
        twin.module.train()
        before = [part.codebook() for part in self.parts()]
        fork = torch.random.fork_rng(devices=[x.device] if x.is_cuda else [])
        with fork, torch.autocast(x.device.type, enabled=False):
            twin(twin.cast(x).to(provq_attach._weight(twin.module).dtype))
        moved = [float((part.codebook() - codes).square().sum() / codes.var(0).sum().clamp_min(1e-12) / len(codes))
                 for part, codes in zip(twin.parts(), before)]  # noqa: B905
        if max(moved) > 0.05:
            warnings.warn(f"{type(self.module).__name__}: its next training forward moves codes away from where "
                          f"k-means has set them, by {max(moved) ** 0.5:.0%} of their spread: set_codebook must set "
                          "what they are made of as well, such as running means", stacklevel=7)

    @torch.no_grad()
    def _probe(self, z: Tensor, given: dict[str, Any]) -> Any:
        twin = self.twin().module
        with torch.random.fork_rng(devices=[z.device] if z.is_cuda else []):
            return type(twin).forward(twin, z.detach(), **given)


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _path(place: Place) -> tuple[int | str, ...]:
    return place if isinstance(place, tuple) else (place,)


class CustomAdapter(_Custom, TableAdapter):
    """Any module, by functions that get it as first argument."""

    def __init__(
        self, module: nn.Module, *, codebook: Callable[..., Tensor], set_codebook: Callable[..., None],
        latent: Callable[..., Tensor] | None = None, output: Callable[..., Tensor] | None = None,
        dim: int | None = None, quantized_at: Place = 0, indices_at: Place | None = None,
        losses_at: dict[str, Place] | None = None, channel_dim: int = 1,
        call: Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]] | None = None,
        lookup: Callable[..., Tensor] | None = None,
    ):
        """Of tokens x (..., D), codes (K, C), indices (...) int64 and cluster sizes (K,) or None:

        codebook(module) -> (K, C); set_codebook(module, centroids, counts); latent(module, x) -> (..., C) as compared
        with codes, by default x; output(module, codes) -> (..., D) as the decoder gets them, by default the codes. dim:
        D where latent maps to another C.

        For attach: where quantized, indices and losses stand in the return value, as an index, a key or attribute, or a
        tuple of such; what has no place stays as it is. channel_dim of z: 1 or -1.

        For ProVQ(adapt(...)): call(module, x) -> codes (N, D), indices (N,), weighted losses by name;
        lookup(module, indices) -> (..., D), by default rows of the codebook.
        """
        super().__init__(module)
        self._use(module, {"table": codebook, "_set": set_codebook, "latent": latent, "output": output, "_call": call,
                           "lookup": lookup}, quantized_at, indices_at, losses_at, channel_dim)
        self.num_codes, width = self.table().shape
        self.dim = width if dim is None else dim
        self._require_widths()

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:
        self._set(centroids, counts)

    def forward(self, x: Tensor) -> provq.Quantized:
        return provq.Quantized(*self._call(x)) if "_call" in self.__dict__ else super().forward(x)


class _CustomLevel(provq_attach._Table):
    sizes = ()

    def __init__(self, level: Any, codebook: Callable[..., Tensor], set_codebook: Callable[..., None]):
        super().__init__(level)
        self._codes, self._set = functools.partial(codebook, level), functools.partial(set_codebook, level)
        self.num_codes, self.dim = self.table().shape

    def table(self) -> Tensor:
        return self._codes()

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:
        self._set(centroids, counts)


class CustomResidualAdapter(_Custom, ResidualAdapter):
    """Any residual module, by functions. `attach` only."""

    def __init__(
        self, module: nn.Module, *, levels: Callable[..., Sequence[nn.Module]], codebook: Callable[..., Tensor],
        set_codebook: Callable[..., None], latent: Callable[..., Tensor] | None = None,
        output: Callable[..., Tensor] | None = None, dim: int | None = None, quantized_at: Place = 0,
        indices_at: Place | None = None, losses_at: dict[str, Place] | None = None, channel_dim: int = 1,
        level_axis: int = -1,
    ):
        """As CustomAdapter, but: levels(module) -> a module for each level, coarse to fine, which codebook and
        set_codebook get instead; latent and output are around all of them. level_axis: that of levels in indices.
        """
        super().__init__(module)
        self._use(module, {"latent": latent, "output": output}, quantized_at, indices_at, losses_at, channel_dim)
        self._use_levels([_CustomLevel(level, codebook, set_codebook) for level in levels(module)])
        self.dim, self.level_axis = self.levels[0].dim if dim is None else dim, level_axis
        self._require_widths()


def custom(module: nn.Module, **options: Any) -> Adapter:
    """kind="custom": `CustomResidualAdapter` if `levels` is given, else `CustomAdapter`."""
    return (CustomResidualAdapter if "levels" in options else CustomAdapter)(module, **options)


provq_attach.ADAPTERS.update({
    "taming-ema": TamingEMAAdapter, "esm": EMACodebookAdapter, "encodec": EncodecAdapter,
    "encodec-residual": EncodecResidualAdapter, "dac": DACAdapter, "dac-residual": DACResidualAdapter,
    "diffusers": DiffusersAdapter, "titok": TiTokAdapter, "ibq": IBQAdapter, "var": VARAdapter,
})
