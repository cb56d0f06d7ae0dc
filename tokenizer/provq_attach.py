# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The ProVQ authors
"""ProVQ inside a repository whose model, loss and checkpoints stay as they are: copy this file and provq.py.

The quantizers of LlamaGen, taming-transformers, SimVQ, vector-quantize-pytorch, diveq and ESM are known (the lines for
each are under `attach`); for anything else there is `adapt`:

    from provq_attach import Curriculum, attach

    provq = attach(model.quantize, Curriculum(warmup_steps=50_000, transition_steps=20_000))
    for step in ...:
        provq.set_step(step)
        provq.maybe_init_codebook(optimizers=[opt])                 # from the latents of the warm-up's last steps

Sizes: N tokens, D channels of the host's latents, C of its codes (D but where it projects), K codes.
"""

from __future__ import annotations

import functools
import inspect
import operator
from typing import TYPE_CHECKING, Any, Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING or __package__:  # the provq.py beside this file, in a package of any name
    from . import provq
else:
    import provq

__version__ = "0.3.0"
__all__ = ["ADAPTERS", "RESERVOIR_CALLS", "RESERVOIR_TOKENS_PER_CODE", "Adapter", "AdaptiveWarmup", "Attached",
           "Curriculum", "CustomAdapter", "DiVeQAdapter", "EMACodebookAdapter", "FSQAdapter", "LFQAdapter",
           "LlamaGenAdapter", "LucidrainsSimVQAdapter", "ResidualVQAdapter", "SimVQAdapter", "TableAdapter",
           "TamingAdapter", "TamingEMAAdapter", "VectorQuantizeAdapter", "adapt", "attach", "detach", "host_state_dict"]

if getattr(provq, "__version__", None) != __version__:
    raise ImportError(f"provq_attach.py is of version {__version__}, but {provq.__file__} of version "
                      f"{getattr(provq, '__version__', None)}: copy both, provq*.py, from one release")

AdaptiveWarmup = provq.AdaptiveWarmup
Curriculum = provq.Curriculum

# `Attached.collect` keeps this many tokens per code, over all ranks, of at least this many calls.
RESERVOIR_TOKENS_PER_CODE, RESERVOIR_CALLS = 16, 16


# ------------------------------------------------------------------------------------------------------------- adapters

Path = tuple[int, ...]  # where something is in a host's return value: (1, 0) is out[1][0]


def _get(out: Any, path: Path) -> Any:
    return functools.reduce(operator.getitem, path, out)


def _put(out: Any, path: Path, value: Any) -> Any:
    """out, a tuple of tuples (or of named ones), with value in that place."""
    if not path:
        return value
    items = list(out)
    items[path[0]] = _put(out[path[0]], path[1:], value)
    return type(out)(*items) if hasattr(out, "_fields") else tuple(items)


def _beside(module: nn.Module, name: str) -> Any:
    """What is called `name` in the file of the module's class, or of the nearest base whose file has it."""
    scopes = (vars(cls)["forward"].__globals__ for cls in type(module).__mro__ if "forward" in vars(cls))
    found = next((scope[name] for scope in scopes if name in scope), None)
    if found is None:
        raise TypeError(f"{type(module).__name__}: no {name} beside its class: a version that is not supported?")
    return found


class Adapter(nn.Module):
    """A foreign quantizer, `.module`, in the terms of ProVQ; `adapt` picks the subclass.

    One more host is one more subclass: what it calls its sizes, where its z has channels, where its return value has
    what, which options are not supported, and how codes are set. Only `set_codebook_` changes the host (and LlamaGen's
    usage meter, see there).
    """

    classes: tuple[str, ...]  # class names that "auto" recognises, if the attributes are there as well
    sizes = ("n_e", "e_dim")  # attributes of the host: K and D
    needs: tuple[str, ...]  # further attributes
    supports: dict[str, Any] = {}  # noqa: RUF012  # option of the host -> the only value that is supported
    accepts: tuple[str, ...] = ()  # what its forward may be given besides z, by keyword
    settable = True  # whether there are codes to set

    channel_dim = 1  # of z: 1 (B, D, ...) or -1 (B, ..., D)
    spatial = 2  # dimensions of z besides batch and channels
    ndims: Path = (4,)  # of z that the host takes; (): any
    flat_indices = False  # (B h w,) instead of (B, h, w)
    index_dtype = torch.int64
    trailing: Path = ()  # shape of indices beyond that
    loss_shape: Path = ()
    l2_norm = False  # codes and latents on the unit sphere

    template: Any = (None, None, None)  # the return value, of a host that has not been called
    quantized_at: Path = (0,)
    indices_at: Path | None = (1,)
    losses_at: dict[str, Path] = {"vq": (2,)}  # noqa: RUF012

    def __init__(self, module: Any):
        super().__init__()
        self.module = module
        parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]
        self.defaults = {p.name: p.default for p in parameters}  # of what the host's forward takes besides z, in order
        self.num_codes, self.dim = (getattr(module, name, 0) for name in self.sizes)
        for option, value in self.supports.items():
            got = module
            for name in option.split("."):
                got = getattr(got, name, value)  # an option that this version of the host lacks is not set
            if got != value:
                raise ValueError(f"{type(module).__name__}: {option} = {got!r} is not supported, only {value!r}")

    def cast(self, x: Tensor) -> Tensor:
        """Tokens, collected in float32, in a dtype that `latent` takes."""
        return x

    def latent(self, x: Tensor) -> Tensor:
        """Tokens (..., D) as the host compares them with its codes."""
        return F.normalize(x, dim=-1) if self.l2_norm else x

    def output(self, codes: Tensor) -> Tensor:
        """Codes, or latents in their place, as the host hands them to the decoder: (..., D)."""
        return codes

    def channels(self, z: Tensor) -> int:
        """Channel dimension of this z."""
        return -1 if z.ndim == 2 else self.channel_dim

    def fit_codebook_(
        self, x: Tensor, *, batch: Tensor | None = None, **options: Any,  # noqa: ARG002
    ) -> dict[str, float]:
        """Make the centroids of tokens x (N, D) the codes. batch, float64 []: tokens of one rank's batch.

        Running means start at the size of a batch, or without it of the clusters. options, result: as of provq.kmeans,
        `KMeansResult.info`. TypeError: there are no codes to set.
        """
        raise TypeError(f"{type(self.module).__name__} has no codes to set: init_codebook(None)")

    def codebook_parameters(self) -> Iterable[nn.Parameter]:
        """What optimizers must forget when codes are set. Projections go on as they are."""
        return [p for name, p in self.module.named_parameters() if not name.startswith("project_")]

    def countable(self, indices: Tensor) -> Tensor:
        """Indices of the host as indices into the counts of `ProVQ.usage`; negative: not counted."""
        return indices

    def silent(self, z: Tensor, quantized: Tensor) -> Any:
        """The host's return value in the warm-up: losses 0, indices -1."""
        out = _put(self.template, self.quantized_at, quantized)
        if self.indices_at:
            lead = z.movedim(self.channels(z), -1).shape[:-1]
            shape = (lead.numel(),) if self.flat_indices else (*lead, *self.trailing)
            out = _put(out, self.indices_at, torch.full(shape, -1, dtype=self.index_dtype, device=z.device))
        for path in self.losses_at.values():
            out = _put(out, path, torch.zeros(self.loss_shape, device=z.device))
        return out

    def forward(self, x: Tensor) -> provq.Quantized:
        """Quantize tokens x (N, D) by the host; see `Quantized`. Used by ProVQ(adapt(module), ...), not by `attach`."""
        z = x.contiguous()[None]
        if self.channel_dim == 1:
            z = z.movedim(-1, 1).reshape(1, self.dim, -1, *[1] * (self.spatial - 1))
        out = self.module(z)
        losses = {name: _get(out, path) for name, path in self.losses_at.items()}
        codes = _get(out, self.quantized_at).movedim(self.channel_dim, -1).reshape(-1, self.dim)
        return provq.Quantized(codes, _get(out, self.indices_at or ()).reshape(-1).long(),
                         {name: loss for name, loss in losses.items() if loss is not None})


class TableAdapter(Adapter, provq.Quantizer):
    """A host with one table of codes: all that ProVQ asks of a quantizer."""

    def table(self) -> Tensor:
        """Codes (K, C) as the host has them, differentiable; C is D but where the host projects."""
        return self.module.embedding.weight

    def codebook(self) -> Tensor:
        return F.normalize(self.table(), dim=-1) if self.l2_norm else self.table()

    def lookup(self, indices: Tensor) -> Tensor:
        return self.output(F.embedding(indices, self.codebook()))

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:  # noqa: ARG002
        self.table().data.copy_(centroids)

    def fit_codebook_(self, x: Tensor, *, batch: Tensor | None = None, **options: Any) -> dict[str, float]:
        return _place(self, self.latent(self.cast(x)), batch, **options).info()


def _place(adapter: TableAdapter, latents: Tensor, batch: Tensor | None, **options: Any) -> provq.KMeansResult:
    """Make the centroids of latents (N, C) the codes of a host. batch, options: see `Adapter.fit_codebook_`."""
    result = provq.kmeans(latents, adapter.num_codes, spherical=adapter.l2_norm, **options)
    counts = result.counts * (batch / result.counts.sum()) if batch else result.counts
    adapter.set_codebook_(result.centroids, counts)
    return result


class LlamaGenAdapter(TableAdapter):
    """LlamaGen's VectorQuantizer. Its losses are None in eval(); the entropy loss is weighted like the others."""

    classes, flat_indices = ("VectorQuantizer",), True
    needs = ("embedding", "l2_norm", "entropy_loss_ratio", "show_usage")
    template, indices_at = (None, (None, None, None, 0), (None, None, None)), (2, 2)
    losses_at = {"codebook": (1, 0), "commit": (1, 1), "entropy": (1, 2)}  # noqa: RUF012

    def __init__(self, module: Any):
        super().__init__(module)
        self.l2_norm = module.l2_norm
        if module.show_usage:  # a Parameter that the host writes to: raises on a CPU, and on a GPU its graph grows
            module._buffers["codebook_used"] = module.codebook_used.detach()

    def silent(self, z: Tensor, quantized: Tensor) -> Any:
        out = super().silent(z, quantized)
        return out if self.module.training else _put(out, (1,), self.template[1])


class TamingAdapter(TableAdapter):
    """taming-transformers' VectorQuantizer2 and its copies (latent-diffusion, ...). Its legacy beta stays as it is."""

    classes: tuple[str, ...] = ("VectorQuantizer2",)
    needs: tuple[str, ...] = ("embedding", "legacy", "sane_index_shape")
    supports = {"remap": None}  # noqa: RUF012
    template: Any = (None, None, (None, None, None))
    indices_at, losses_at = (2, 2), {"vq": (1,)}

    def __init__(self, module: Any):
        super().__init__(module)
        self.flat_indices = not getattr(module, "sane_index_shape", False)


def _running_means(centroids: Tensor, counts: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """cluster_size (K,) and embed_avg (K, C) of which the hosts' smoothed quotient gives the centroids back."""
    size = centroids.new_ones(len(centroids)) if counts is None else counts.to(centroids.dtype)
    total = size.sum()
    return size, centroids * ((size + eps) * total / (total + len(size) * eps))[:, None]


class TamingEMAAdapter(TamingAdapter):
    """taming-transformers' EMAVectorQuantizer (of copies that run: the original's constructor raises NameError)."""

    classes, sizes = ("EMAVectorQuantizer",), ("num_tokens", "codebook_dim")
    needs = ("embedding.weight", "embedding.cluster_size", "embedding.embed_avg")

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:
        table = self.module.embedding
        size, average = _running_means(centroids, counts, table.eps)
        for target, value in ((table.weight, centroids), (table.cluster_size, size), (table.embed_avg, average)):
            target.data.copy_(value)

    def silent(self, z: Tensor, quantized: Tensor) -> Any:
        out = super().silent(z, quantized)  # perplexity 0, and no code in the one-hot rows
        return _put(_put(out, (2, 0), z.new_zeros(())), (2, 1), z.new_zeros(z.numel() // self.dim, self.num_codes))


class SimVQAdapter(TamingAdapter):
    """youngsheen/SimVQ: SimVQ (images), SimVQ1D (audio). Codes are set in the frozen table, its map to the identity."""

    classes, needs = ("SimVQ", "SimVQ1D"), ("embedding", "embedding_proj", "sane_index_shape")
    quantized_at, indices_at, losses_at = (0, 0), (0, 2), {"commitment": (1, 2)}

    def __init__(self, module: Any):
        super().__init__(module)
        self.spatial = 1 if type(module).__name__.endswith("1D") else 2
        self.ndims = (self.spatial + 2,)
        breakdown = _beside(module, "LossBreakdown")  # the named tuple of its file
        self.template = ((None, torch.tensor(0.0), None), breakdown(*[torch.tensor(0.0)] * 4))

    def table(self) -> Tensor:
        return self.module.embedding_proj(self.module.embedding.weight)

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:  # noqa: ARG002
        self.module.embedding.weight.data.copy_(centroids)
        _make_identity(self.module.embedding_proj)


def _make_identity(linear: nn.Linear) -> None:
    nn.init.eye_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


class EMACodebookAdapter(TableAdapter):
    """ESM's EMACodebook. Its EMA update is not released, so the codebook must be frozen: it stays at the centroids."""

    classes, sizes, channel_dim, ndims = ("EMACodebook",), ("n_codes", "embedding_dim"), -1, (3,)
    needs, supports = ("embeddings", "N", "z_avg", "freeze_codebook"), {"freeze_codebook": True}

    def table(self) -> Tensor:
        return self.module.embeddings

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:  # noqa: ARG002
        self.module.embeddings.copy_(centroids)
        self.module.z_avg.copy_(centroids)
        self.module.N.fill_(1.0)
        self.module._need_init = False


class DiVeQAdapter(TableAdapter):
    """diveq's DIVEQ and DIVEQDetach: z (N, D); no loss, codes learn through z~. `inference` is not intercepted."""

    classes, sizes, channel_dim, ndims = ("DIVEQ", "DIVEQDetach"), ("num_embeddings", "embedding_dim"), -1, (2,)
    needs, template = ("codebook", "codebook_usage", "replacement_iters"), (None, None, 0.0)  # perplexity is last
    losses_at = {}  # noqa: RUF012

    def table(self) -> Tensor:
        return self.module.codebook

    def forward(self, x: Tensor) -> provq.Quantized:
        codes, indices, _ = self.module(x)
        return provq.Quantized(codes, indices, {})


class _Projected(Adapter):
    """vector-quantize-pytorch: linear maps into and out of the space of the codes, or identities."""

    sizes, channel_dim = ("codebook_size", "dim"), -1
    ndims: Path = (2, 3)

    def cast(self, x: Tensor) -> Tensor:
        return x.to(next((p.dtype for p in self.module.project_in.parameters()), torch.float32))

    def latent(self, x: Tensor) -> Tensor:
        return self.module.project_in(x)

    def output(self, codes: Tensor) -> Tensor:
        return self.module.project_out(codes)


class VectorQuantizeAdapter(_Projected, TableAdapter):
    """vector-quantize-pytorch's VectorQuantize: EMA, learned or cosine codes. Instead of its kmeans_init, ProVQ's."""

    classes: tuple[str, ...] = ("VectorQuantize",)
    accepts: tuple[str, ...] = ("mask",)
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
        if counts is not None and book.use_ddp:
            counts = counts * provq._world()  # it adds up the batches of all ranks
        size, average = _running_means(centroids, counts, book.eps)
        for target, value in ((book.embed, centroids), (book.cluster_size, size), (book.embed_avg, average)):
            target.data.copy_(value[None])
        book.initted.data.fill_(True)


class ResidualVQAdapter(_Projected):
    """vector-quantize-pytorch's ResidualVQ, set level by level. It has no single codebook: `attach` takes it only."""

    classes, accepts = ("ResidualVQ",), ("mask", "rand_quantize_dropout_fixed_seed")
    needs = ("layers.0.accept_3d_fmap", "layers.0._codebook.use_ddp", "num_quantizers", "project_in", "project_out")
    supports = {"shared_codebook": False, "implicit_neural_codebook": False, "accept_image_fmap": False,  # noqa: RUF012
                "return_zeros_for_masked_padding": True}

    def __init__(self, module: Any):
        super().__init__(module)
        self.levels = [VectorQuantizeAdapter(layer) for layer in module.layers]
        if any(level.l2_norm for level in self.levels):
            raise ValueError("ResidualVQ: use_cosine_sim = True is not supported: a sum of unit codes is no latent")
        self.num_codes = sum(level.num_codes for level in self.levels)
        self.dim = getattr(module.project_in, "in_features", module.codebook_dim)
        self.trailing = self.loss_shape = (len(self.levels),)

    def fit_codebook_(self, x: Tensor, *, batch: Tensor | None = None, **options: Any) -> dict[str, float]:
        """Each level gets the centroids of what those before it left over."""
        rest, empty = self.latent(self.cast(x)), 0
        for level in self.levels:
            result = _place(level, rest, batch, **options)
            rest = rest - F.embedding(provq.nearest_code(rest, result.centroids), result.centroids)
            empty += int((result.counts == 0).sum())
        return {**result.info(), "empty": empty}

    def countable(self, indices: Tensor) -> Tensor:
        first = torch.tensor([0, *[level.num_codes for level in self.levels]], device=indices.device).cumsum(0)[:-1]
        return torch.where(indices < 0, indices, indices + first)


class LucidrainsSimVQAdapter(TableAdapter):
    """vector-quantize-pytorch's SimVQ. Codes are set in the frozen codebook, its map to the identity."""

    classes, spatial, ndims = ("SimVQ",), 1, ()
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
        _make_identity(self.module.code_transform)


class _Grid(_Projected):
    """Codes on a fixed grid: warm-up and mix are all there is to do, by `attach` only."""

    settable, supports, ndims = False, {"orthogonal_rotation": False}, ()

    def __init__(self, module: Any):
        super().__init__(module)
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
        self.template = _beside(module, "Return")(None, None, None)  # the named tuple of its file

    def bounded(self, z: Tensor) -> Tensor:
        clamp = self.module.soft_clamp_input_value
        return self.module.maybe_l2norm(z if clamp is None else (z / clamp).tanh() * clamp)


class CustomAdapter(TableAdapter):
    """Any module, by functions that get it as first argument. For ProVQ(adapt(...)) only: its tuple is unknown."""

    def __init__(
        self, module: nn.Module, *, call: Callable[..., tuple[Tensor, Tensor, dict[str, Tensor]]],
        codebook: Callable[..., Tensor], set_codebook: Callable[..., None],
        lookup: Callable[..., Tensor] | None = None, latent: Callable[..., Tensor] | None = None,
    ):
        """Of tokens x (N, D), codes (K, D), indices (...) int64 and cluster sizes (K,) or None:

        call(module, x) -> codes (N, D), indices (N,), weighted losses by name; codebook(module) -> (K, D);
        set_codebook(module, centroids, counts); lookup(module, indices) -> (..., D), by default rows of the codebook;
        latent(module, x) -> (N, D) comparable with codes, by default x.
        """
        super().__init__(module)
        self._call, self._set = functools.partial(call, module), functools.partial(set_codebook, module)
        for name, function in {"table": codebook, "lookup": lookup, "latent": latent}.items():
            if function is not None:
                self.__dict__[name] = functools.partial(function, module)  # in front of the method
        self.num_codes, self.dim = self.table().shape

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:
        self._set(centroids, counts)

    def forward(self, x: Tensor) -> provq.Quantized:
        return provq.Quantized(*self._call(x))


ADAPTERS: dict[str, type[Adapter]] = {
    "llamagen": LlamaGenAdapter, "taming": TamingAdapter, "taming-ema": TamingEMAAdapter, "simvq": SimVQAdapter,
    "esm": EMACodebookAdapter, "diveq": DiVeQAdapter, "lucidrains": VectorQuantizeAdapter,
    "lucidrains-residual": ResidualVQAdapter, "lucidrains-simvq": LucidrainsSimVQAdapter, "lucidrains-fsq": FSQAdapter,
    "lucidrains-lfq": LFQAdapter,
}


def _missing(module: Any, adapter: type[Adapter]) -> list[str]:
    """Attributes that the adapter needs and the module has not."""
    missing = []
    for path in adapter.needs:
        owner = module
        for name in path.split("."):
            owner = getattr(owner, name, _missing)  # a stand-in for "nothing": None is a value
        if owner is _missing:
            missing.append(path)
    return missing


def adapt(module: nn.Module, kind: str = "auto", **callables: Any) -> Adapter:
    """A foreign quantizer for ProVQ(adapt(module), curriculum). kind: a name in ADAPTERS, "custom" or "auto".

    "auto" goes by class name and attributes, a kind by attributes alone (for renamed copies). "custom" takes the
    callables of `CustomAdapter`. TypeError: not recognised, or attributes are missing. ValueError: an option of the
    host that is not supported, by name; unknown kind.
    """
    if kind == "custom":
        return CustomAdapter(module, **callables)
    if callables:
        raise TypeError(f"{', '.join(callables)}: only kind='custom' takes callables")
    name = type(module).__name__
    if kind == "auto":
        named = [kind for cls in type(module).__mro__ for kind, adapter in ADAPTERS.items()  # the nearest class first
                 if cls.__name__ in adapter.classes]
        found = [kind for kind in named if not _missing(module, ADAPTERS[kind])]
        if found:
            return ADAPTERS[found[0]](module)
        lacks = "; ".join(f"for {kind} it lacks {', '.join(_missing(module, ADAPTERS[kind]))}" for kind in named)
        known = "; ".join(f"{kind}: {' or '.join(adapter.classes)}" for kind, adapter in ADAPTERS.items())
        raise TypeError(f"{name} is none of the quantizers that adapt() knows ("
                        + (f"{lacks}: a version of its package that is not supported?" if named else known)
                        + "): give kind=, or kind='custom' and callables")
    if kind not in ADAPTERS:
        raise ValueError(f"unknown kind {kind!r}; choose one of auto, custom, {', '.join(ADAPTERS)}")
    missing = _missing(module, ADAPTERS[kind])
    if missing:
        raise TypeError(f"{name} is no {kind} quantizer: it lacks {', '.join(missing)}")
    return ADAPTERS[kind](module)


# --------------------------------------------------------------------------------------------------------- drop-in mode

class Attached(provq.ProVQ):
    """The curriculum of a host's quantizer where it stands: what `attach` returns, and the quantizer's child `provq`.

    All of ProVQ but the call (and what needs one table of codes, where there is none). The host is called as ever and
    returns its own tuple, with quantized mixed (Eq. 2) and losses weighted (Eq. 4). In the warm-up its forward does not
    run: quantized is the latent, losses are 0, indices -1. In stage 3, and in eval() once there is a codebook, the
    tuple is the host's, untouched. Weights of the host alone may be loaded: eval() then uses their codes until the
    first `set_step`. While it holds latents, the state dict has them as well (reservoir, reservoir_state).

    recluster: once more k-means, where the transition ends (ours, not in the paper), of latents of its last steps.
    """

    REQUIRED = ("latent", "output", "num_codes", "dim")

    quantizer: Any  # an Adapter
    _loaded_alone = False  # the host's weights came without a curriculum, and no step has been set since

    def __init__(self, adapter: Adapter, curriculum: Curriculum, adaptive: AdaptiveWarmup | None = None,
                 recluster: bool = False):
        super().__init__(adapter, curriculum, channel_dim=adapter.channel_dim, adaptive=adaptive)
        if recluster and not (adapter.settable and curriculum.transition_steps):
            lacks = "no transition to end" if adapter.settable else "no codes to set"
            raise ValueError(f"recluster=True: {type(adapter.module).__name__} has {lacks}")
        self._reclusters = recluster
        # Known, but no child: the host holds this module, and a module tree must have no cycle.
        self.__dict__["quantizer"] = self._modules.pop("quantizer")
        self._empty_reservoir()
        self._make_room()

    @provq._guarded
    def forward(self, z: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The host's forward, on the curriculum. `usage` counts calls with no arguments that change the host's tuple.

        TypeError: such arguments before stage 3. ValueError: dimensions or channels. RuntimeError: training past the
        warm-up without `maybe_init_codebook`.
        """
        adapter, module = self.quantizer, self.quantizer.module
        if self.training and self.needs_init:
            raise RuntimeError(f"step {self._step} is past the warm-up: call maybe_init_codebook() after set_step()")
        given = {**dict(zip(adapter.defaults, args)), **kwargs}  # noqa: B905  # strict= is of Python 3.10
        unknown = [name for name, value in given.items() if name not in adapter.accepts
                   and value is not adapter.defaults.get(name) and value is not None and value is not False]
        continuous = self.stage == 1 if self.training else not self.has_codebook
        if not continuous and (self.stage == 3 or not self.training):
            out = type(module).forward(module, z, *args, **kwargs)
            if self.training and not unknown:
                self._count_host(out)
            return out

        if unknown:
            raise TypeError(f"{type(module).__name__}: {', '.join(unknown)} in a call is not supported before stage 3")
        if adapter.ndims and z.ndim not in adapter.ndims:
            dimensions = " or ".join(map(str, adapter.ndims))
            raise ValueError(f"{type(module).__name__} takes latents of {dimensions} dimensions, got {tuple(z.shape)}")
        dim, mask = adapter.channels(z), given.get("mask")
        if z.shape[dim] != self.dim:
            raise ValueError(f"latents need {self.dim} channels in dimension {dim}, got {tuple(z.shape)}")
        tokens = z.movedim(dim, -1)
        smooth = adapter.output(adapter.latent(tokens))
        if mask is not None:
            smooth = torch.where(mask[..., None], smooth, 0.0)  # like the host
        smooth = smooth.movedim(-1, dim)
        if continuous:
            if self.training:
                if adapter.settable and not self._initialised and not provq._recomputing():
                    self._collect_valid(tokens, mask)
                for parameter in module.parameters():  # then DistributedDataParallel sees the codebook used
                    if parameter.requires_grad:
                        smooth = smooth + 0.0 * parameter.float().sum()
            return adapter.silent(z, smooth)

        if self._reclusters and not provq._recomputing():
            self._collect_valid(tokens, mask)
        out = type(module).forward(module, z, *args, **kwargs)
        self._count_host(out)
        quantized = _get(out, adapter.quantized_at)
        alpha, omega = self._alpha.clone(), self._omega.clone()  # backward needs them, after the next set_step
        mixed = alpha * smooth + (1.0 - alpha) * quantized
        out = _put(out, adapter.quantized_at, mixed.to(quantized.dtype))
        for path in adapter.losses_at.values():
            out = _put(out, path, omega * _get(out, path))
        return out

    def set_step(self, step: int) -> None:
        super().set_step(step)
        if self._loaded_alone:
            self._loaded_alone = False
            self._mirror()
        self._make_room()

    def _mirror(self) -> None:
        super()._mirror()
        self._from_start = self._from_start or self._loaded_alone  # either way the codes mean something

    def maybe_init_codebook(self, *, copies: Sequence[nn.Module] = (), **options: Any) -> dict[str, float] | None:
        """Once, when the warm-up has ended: `init_codebook` from what `collect` kept. Else None. Collective then.

        Call it in every step after set_step. options: those of `init_codebook`, above all `optimizers`. copies: moving
        averages of the quantizer (same state-dict keys), which take the new codes over at once. RuntimeError: `collect`
        was never called. With attach(..., recluster=True) also once when the transition has ended.
        """
        again = self._reclusters and self.stage == 3 and self.has_codebook and len(self.reservoir) > 0
        if not (self.needs_init or again):
            return None
        if not self.quantizer.settable:
            return self.init_codebook(None)
        kept = self.reservoir[: int(self.reservoir_state[0])]
        if not provq._all_reduce(self.reservoir_state[:1].clone()):  # of all ranks: none may raise while others wait
            raise RuntimeError("the warm-up has ended, and no latents were collected in it. Were weights loaded without"
                               " the curriculum's state? Then call init_codebook(None): codes stay as they are")
        info = self.recluster(kept, **options) if again else self.init_codebook(kept, **options)
        state = self.quantizer.module.state_dict()
        for copy in [copies] if isinstance(copies, nn.Module) else copies:
            # Without the reservoir, which is empty now: loading empties the copy's.
            copy.load_state_dict({name: state[name] for name in copy.state_dict() if name in state})
        return info

    def _place(self, latents: Tensor | None, optimizers: Any = (), **options: Any) -> dict[str, float]:
        info = super()._place(latents, optimizers, **options)
        self._empty_reservoir()
        return info

    def init_codebook(self, latents: Tensor | None, **options: Any) -> dict[str, float]:
        info = super().init_codebook(latents, **options)
        self._make_room()
        return info

    def _fit(self, latents: Tensor, **options: Any) -> dict[str, float]:
        # Running means of a foreign quantizer count tokens of one rank's batches, not those of the whole sample; alike
        # on all ranks, or their codebooks would drift apart.
        batch = provq._all_reduce(self.reservoir_state[1].double()) / provq._world()
        return self.quantizer.fit_codebook_(latents, batch=batch, **options)

    def _collect_valid(self, tokens: Tensor, mask: Tensor | None) -> None:
        self.collect((tokens if mask is None else tokens[mask]).detach().reshape(-1, self.dim))

    @torch.no_grad()
    def collect(self, latents: Tensor) -> None:
        """Keep a sample of latents (N, D), this rank's valid tokens, for `maybe_init_codebook`. Done by the warm-up.

        Bounded: RESERVOIR_TOKENS_PER_CODE x K tokens over all ranks, the latest, and of no call more than a 16th of
        that: the encoder moves, so old latents are dropped, and one batch alone would be too uniform. Draws no random
        numbers and does not synchronise. ValueError: latents are not (N, D).
        """
        self._checked(latents)
        if not len(latents):
            return
        if not len(self.reservoir):
            self._size_reservoir()
        size, n = len(self.reservoir), len(latents)
        take = min(n, -(-size // RESERVOIR_CALLS))  # rounded up: one call of all ranks may have to do
        # One row of each of `take` equal parts of the batch. Where in its part is a hash (Knuth's) of a running number,
        # in whole numbers: a fixed stride would see the same places of every image.
        i = torch.arange(take, device=latents.device)
        taken = self.reservoir_state[0]
        within = (taken + i) * 2654435769 % 2**32
        rows = (i * n + (within * n >> 32)) // take
        self.reservoir[(taken + i) % size] = latents[rows].float()
        self.reservoir_state[0] += take
        self.reservoir_state[1] = n

    def _empty_reservoir(self) -> None:
        # Plain tensors, not buffers: DistributedDataParallel would overwrite other ranks' latents with rank 0's.
        self.reservoir = torch.zeros(0, self.dim, device=self.step.device)
        self.reservoir_state = torch.zeros(2, dtype=torch.int64, device=self.step.device)  # tokens: taken, last call's

    def _make_room(self) -> None:
        # At once, not in the first forward: then torch.compile would trace the warm-up twice, and a copy of the model
        # made in between would not have the entry that the model's state dict has.
        warmup = self.stage == 1 and not self._initialised and self.quantizer.settable
        if warmup or (self._reclusters and self.stage == 2):
            self._size_reservoir()

    def _size_reservoir(self) -> None:
        """Make room for this rank's share. With another number of ranks than before, the latest tokens stay."""
        size = max(-(-RESERVOIR_TOKENS_PER_CODE * self.num_codes // provq._world()), 2 * RESERVOIR_CALLS)
        if len(self.reservoir) == size:
            return
        taken, old = (int(self.reservoir_state[0]), self.reservoir) if len(self.reservoir) else (0, self.reservoir)
        stay = torch.arange(max(0, taken - min(len(old), size)), taken, device=old.device)
        self.reservoir = torch.zeros(size, self.dim, device=old.device)
        self.reservoir[: len(stay)] = old[stay % max(1, len(old))]
        self.reservoir_state[0] = len(stay)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> nn.Module:
        super()._apply(fn, *args)
        self.reservoir = self.reservoir.to(self.step.device)  # no buffers, but they move along
        self.reservoir_state = self.reservoir_state.to(self.step.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if len(self.reservoir):
            destination[prefix + "reservoir"] = self.reservoir
            destination[prefix + "reservoir_state"] = self.reservoir_state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A checkpoint of the host alone says nothing of the curriculum, which then stays as it is.
        self._loaded_alone = not any(name.startswith(prefix) for name in state_dict)
        if self._loaded_alone:
            self._from_start = True  # reads no buffer: a module on the meta device has none to read
            return
        self._empty_reservoir()
        if prefix + "reservoir" in state_dict:  # ProVQ pops them: they come and go, and strict loading must not mind
            self.reservoir = state_dict[prefix + "reservoir"].to(self.step.device, copy=True)
            self.reservoir_state = state_dict[prefix + "reservoir_state"].to(self.step.device, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _new_counts(self) -> Tensor:
        # A grid of codes that keeps its indices has billions of them.
        return super()._new_counts() if self.quantizer.indices_at else torch.zeros(0, dtype=torch.int64)

    def _count_host(self, out: Any) -> None:
        if self.quantizer.indices_at:
            indices = self.quantizer.countable(_get(out, self.quantizer.indices_at))
            self._count(indices.reshape(-1).long())


def _attached_forward(module: nn.Module, z: Tensor, *args: Any, **kwargs: Any) -> Any:
    return module.get_submodule("provq")(z, *args, **kwargs)


def attach(
    module: nn.Module, curriculum: Curriculum, *, kind: str = "auto", adaptive: AdaptiveWarmup | None = None,
    recluster: bool = False,
) -> Attached:
    """Put a host's quantizer on the curriculum where it stands; returns the handle, which is also `module.provq`.

    module keeps its class, attributes, methods, parameters and state-dict keys, and gains the entries `provq.*`, the
    state of ProVQ. kind: see `adapt`, whose errors this has as well; no "custom". RuntimeError: attached before. Attach
    before DistributedDataParallel and torch.compile; not for nn.DataParallel, whose replicas would share this module.
    A moving average of the model needs the codes at once: maybe_init_codebook(..., copies=[average.quantize]).
    recluster: k-means again where the transition ends, see `Attached`; ValueError: no transition, no codes to set.

    LlamaGen, tokenizer/tokenizer_image/vq_train.py: after `vq_model = vq_model.to(device)`, and first in the loop,
        provq = attach(vq_model.quantize, Curriculum(warmup_steps=50_000, transition_steps=20_000))
            provq.set_step(train_steps)
            provq.maybe_init_codebook(optimizers=[optimizer])       # with --ema: copies=[ema.quantize]
    taming-transformers, SimVQ: in the model's __init__ after `self.quantize = ...`, and first in training_step,
        attach(self.quantize, Curriculum(warmup_steps=50_000, transition_steps=20_000))
        self.quantize.provq.set_step(self.global_step)
        self.quantize.provq.maybe_init_codebook(optimizers=self.trainer.optimizers)
    vector-quantize-pytorch (vq = VectorQuantize(...), ResidualVQ, SimVQ, FSQ, LFQ), diveq (vq = DIVEQ(...)), ESM
    (vq = EMACodebook(...); vq.freeze_codebook = True): before the loop, and first in it,
        provq = attach(vq, Curriculum(warmup_steps=50_000, transition_steps=20_000))
            provq.set_step(step)
            provq.maybe_init_codebook(optimizers=[optimizer])
    """
    if kind == "custom":
        raise ValueError("attach(kind='custom'): of an unknown return value only ProVQ(adapt(module, 'custom', ...))")
    if "forward" in module.__dict__ or hasattr(module, "provq"):
        raise RuntimeError(f"{type(module).__name__}: forward is replaced already; attach once, before others do that")
    attached = Attached(adapt(module, kind), curriculum, adaptive, recluster)
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))
    module.add_module("provq", attached.to(device).train(module.training))
    module.forward = functools.partial(_attached_forward, module)  # unlike a closure, it survives deepcopy and pickle
    return attached


def detach(model: nn.Module) -> nn.Module:
    """Undo every `attach` inside model, in place: the host as it was, with the codes that it has now."""
    for module in [m for m in model.modules() if isinstance(m._modules.get("provq"), Attached)]:
        del module.forward, module._modules["provq"]
    return model


def host_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of a model with attached quantizers, without ProVQ's entries: loads strictly into the host alone."""
    return {name: value for name, value in state_dict.items() if name.split(".")[-2:-1] != ["provq"]}
