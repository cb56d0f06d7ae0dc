# SPDX-License-Identifier: Apache-2.0
# Copyright 2026 The ProVQ authors
"""ProVQ inside a repository whose model, loss and checkpoints stay as they are: copy this file and provq.py.

The quantizers of LlamaGen, taming-transformers and SimVQ are known here; those of other repositories, of packages and
codecs, and kind="custom" for anything else, in provq_packages.py and provq_hosts.py, to be copied as well:

    from provq_attach import Curriculum, attach

    provq = attach(model.quantize, Curriculum(warmup_steps=50_000, transition_steps=20_000))
    for step in ...:
        provq.set_step(step)
        provq.maybe_init_codebook(optimizers=[opt])                 # from the latents of the warm-up's last steps

Sizes: N tokens, D channels of the host's latents, C of its codes (D but where it projects), K codes.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import importlib
import inspect
import warnings
import weakref
from typing import TYPE_CHECKING, Any, Callable, Iterable, Mapping, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING or __package__:  # the provq.py beside this file, in a package of any name
    from . import provq
else:
    import provq

__version__ = "0.3.0"
__all__ = ["ADAPTERS", "RESERVOIR_CALLS", "RESERVOIR_TOKENS_PER_CODE", "Adapter", "AdaptiveWarmup", "Attached",
           "Curriculum", "LlamaGenAdapter", "ResidualAdapter", "SimVQAdapter", "TableAdapter", "TamingAdapter",
           "adapt", "attach", "detach", "host_state_dict"]
_MOVED = """CustomAdapter DiVeQAdapter EMACodebookAdapter FSQAdapter LFQAdapter LucidrainsSimVQAdapter
ResidualVQAdapter TamingEMAAdapter VectorQuantizeAdapter""".split()  # to the files of `_companions`

if getattr(provq, "__version__", None) != __version__:
    raise ImportError(f"provq_attach.py is of version {__version__}, but {provq.__file__} of version "
                      f"{getattr(provq, '__version__', None)}: copy both, provq*.py, from one release")

AdaptiveWarmup = provq.AdaptiveWarmup
Curriculum = provq.Curriculum

# `Attached.collect` keeps this many tokens per code, over all ranks, of at least this many calls.
RESERVOIR_TOKENS_PER_CODE, RESERVOIR_CALLS = 16, 16


# ------------------------------------------------------------------------------------------------------------- adapters

Path = tuple[Union[int, str], ...]  # where something is in a return value: (1, 0) is out[1][0], ("loss",) out["loss"]


def _get(out: Any, path: Path) -> Any:
    for step in path:  # of Hugging Face's mappings that are dataclasses, keys that are None are absent
        attribute = isinstance(step, str) and (dataclasses.is_dataclass(out) or not isinstance(out, Mapping))
        out = getattr(out, str(step)) if attribute else out[step]
    return out


def _put(out: Any, path: Path, value: Any) -> Any:
    """out, of tuples, lists, mappings, dataclasses and objects, with value in that place."""
    if not path:
        return value
    step = path[0]
    inner = _put(_get(out, (step,)), path[1:], value)
    if dataclasses.is_dataclass(out):
        return dataclasses.replace(out, **{str(step): inner})  # type: ignore[type-var]
    if isinstance(step, str) and hasattr(out, "_replace"):
        return out._replace(**{step: inner})  # a named tuple
    if isinstance(step, str) or isinstance(out, Mapping):
        changed: Any = copy.copy(out)
        changed.__setitem__(step, inner) if isinstance(out, Mapping) else setattr(changed, str(step), inner)
        return changed
    items = list(out)
    items[step] = inner
    return type(out)(*items) if hasattr(out, "_fields") else type(out)(items)


def _beside(module: nn.Module, name: str) -> Any:
    """What is called `name` in the file of the module's class, or of the nearest base whose file has it."""
    scopes = (vars(cls)["forward"].__globals__ for cls in type(module).__mro__ if "forward" in vars(cls))
    found = next((scope[name] for scope in scopes if name in scope), None)
    if found is None:
        raise TypeError(f"{type(module).__name__}: no {name} in the file of its class, as the supported version has")
    return found


def _weight(module: nn.Module) -> Tensor:  # one of its weights, for their device and dtype
    return next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), torch.zeros(()))


class Adapter(nn.Module):
    """A foreign quantizer, `.module`, in the terms of ProVQ; `adapt` picks the subclass.

    One more host is one more subclass: what it calls its sizes, where its z has channels, where its return value has
    what, which options are not supported, and how codes are set. Only `set_codebook_` changes the host (and LlamaGen's
    usage meter, see there).
    """

    classes: tuple[str, ...]  # class names that "auto" recognises, if the attributes are there as well
    package = ""  # that they come from, if not from a repository whose files are copied
    sizes: tuple[str, ...] = ("n_e", "e_dim")  # attributes of the host: K and D; () where the subclass finds them
    needs: tuple[str, ...]  # further attributes
    supports: dict[str, Any] = {}  # noqa: RUF012  # option of the host -> the only value that is supported
    accepts: tuple[str, ...] | None = ()  # what its forward may be given besides z, by keyword; None: anything
    settable = True  # whether there are codes to set
    projections = ("project_in", "project_out")  # names of submodules that hold no codes
    check = True  # whether the host is run to see that it does with codes what the adapter thinks

    channel_dim = 1  # of z: 1 (B, D, ...) or -1 (B, ..., D)
    spatial = 2  # dimensions of z besides batch and channels; 0 for (N, D)
    ndims: tuple[int, ...] = (4,)  # of z that the host takes; (): any
    flat_indices = False  # (B h w,) instead of (B, h, w)
    index_dtype = torch.int64
    trailing: tuple[int, ...] = ()  # shape of indices beyond that; it may stand elsewhere:
    level_axis = -1
    loss_shape: tuple[int, ...] = ()
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
        if self.sizes:
            self.num_codes, self.dim = (getattr(module, name) for name in self.sizes)
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

    def smooth(self, x: Tensor) -> Tensor:
        """What the host would hand to the decoder of tokens (..., D) if it did not round."""
        return self.output(self.latent(x))

    def channels(self, z: Tensor) -> int:
        """Channel dimension of this z."""
        return -1 if z.ndim == 2 else self.channel_dim

    def parts(self) -> Sequence[_Table]:
        """The tables of codes: one, a residual quantizer's levels, or none."""
        return []

    def fit_codebook_(self, x: Tensor, *, batch: Any = None, **options: Any) -> dict[str, float]:  # noqa: ARG002
        """Make the centroids of tokens x (N, D) the codes. batch, float64 []: tokens of one rank's batch.

        Running means start at the size of a batch, or without it of the clusters. options, result: as of provq.kmeans,
        `KMeansResult.info`. TypeError: there are no codes to set. ValueError: see `provq.kmeans`, `require_alike`.
        """
        raise TypeError(f"{type(self.module).__name__} has no codes to set: init_codebook(None)")

    def assign(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens x (N, D) -> what the host should return for them (N, D), and its indices (N,) or (N, levels)."""
        raise NotImplementedError

    def decoded(self, indices: Tensor) -> Tensor:
        """What the host should return (N, D) for tokens of these indices, (N,) or (N, levels)."""
        raise NotImplementedError

    def codebook_parameters(self) -> Iterable[nn.Parameter]:
        """What optimizers must forget when codes are set. Projections go on as they are."""
        return [p for name, p in self.module.named_parameters() if not {*name.split(".")} & {*self.projections}]

    def countable(self, indices: Tensor) -> Tensor:
        """Indices of the host as indices into the counts of `ProVQ.usage`; negative: not counted."""
        return indices

    def silent(self, z: Tensor, quantized: Tensor, given: dict[str, Any]) -> Any:  # noqa: ARG002
        """The host's return value in the warm-up: losses 0, indices -1. given: what else it was called with."""
        out = _put(self.template, self.quantized_at, quantized)
        if self.indices_at:
            lead = z.movedim(self.channels(z), -1).shape[:-1]
            shape = (lead.numel(),) if self.flat_indices else (*lead, *self.trailing)
            none = torch.full(shape, -1, dtype=self.index_dtype, device=z.device)
            out = _put(out, self.indices_at, none.movedim(-1, self.level_axis))
        for path in self.losses_at.values():
            out = _put(out, path, torch.zeros(self.loss_shape, device=z.device))
        return out

    def shaped(self, x: Tensor) -> Tensor:
        """Tokens x (N, D) as latents in the host's layout."""
        if not self.spatial:
            return x.contiguous()
        z = x.reshape(1, -1, *[1] * (self.spatial - 1), x.shape[1])
        return z.movedim(-1, 1).contiguous() if self.channel_dim == 1 else z

    def forward(self, x: Tensor) -> provq.Quantized:
        """Quantize tokens x (N, D) by the host; see `Quantized`. `attach` only checks by it that codes are in use."""
        out = type(self.module).forward(self.module, self.shaped(x))
        losses = {name: _get(out, path) for name, path in self.losses_at.items()}
        codes = _get(out, self.quantized_at).movedim(self.channel_dim if self.spatial else -1, -1)
        none = torch.full((len(x),), -1, device=x.device)
        indices = self.token_indices(_get(out, self.indices_at), len(x)) if self.indices_at else none
        return provq.Quantized(codes.reshape(len(x), -1), indices,
                         {name: loss for name, loss in losses.items() if loss is not None})

    def token_indices(self, indices: Tensor, n: int) -> Tensor:
        """Indices as the host returned them for n tokens -> int64 (n,), or (n, levels)."""
        return indices.reshape(n, *self.trailing).long()

    @torch.no_grad()
    def require_alike(self, x: Tensor, reduce: bool = True) -> None:
        """Run the host itself, in eval(), on tokens x (N, D) of all ranks (of this one, unless reduce). Collective.

        ValueError: its indices are not those of the nearest codes, or its error is far from theirs.
        """
        modes = {module: module.training for module in self.module.modules()}
        self.module.eval()
        fork = torch.random.fork_rng(devices=[x.device] if x.is_cuda else [])
        try:
            with fork, torch.autocast(x.device.type, enabled=False):
                x = self.cast(x)
                found, due = self(x.to(_weight(self.module).dtype)) if len(x) else None, self.assign(x)
        finally:
            for module, mode in modes.items():
                module.training = mode
        smooth = self.smooth(x).double()
        stats = x.new_zeros(5, dtype=torch.float64)
        if found:
            same = self._alike(found.indices, *due) if self.indices_at else x.new_ones(len(x))
            errors = [(codes.double() - smooth).square().sum() for codes in (found.codes, due[0])]
            stats = torch.stack([same.double().sum(), *errors, smooth.square().sum(), stats[4] + len(x)])
        same, error, least, power, n = (provq._all_reduce(stats) if reduce else stats).tolist()
        exact = found is None or found.codes.dtype == torch.float32  # else near ties fall either way
        if (exact and same < 0.9 * n) or max(error, least) > 2 * min(error, least) + 1e-4 * power:
            raise ValueError(f"{type(self.module).__name__} is no host for {type(self).__name__}: its own forward takes"
                             f" the nearest code for {same / n:.0%} of latents, and its error is {error / n:.3g} where "
                             f"{least / n:.3g} is due. It compares or maps codes in another way: kind='custom' can tell"
                             " how; check=False goes on all the same")

    def _alike(self, indices: Tensor, codes: Tensor, due: Tensor) -> Tensor:
        """(N,): the host's indices are those that are due, or those of codes equal to theirs."""
        same = (indices == due).reshape(len(due), -1).all(1)
        sizes = torch.tensor([part.num_codes for part in self.parts()], device=due.device)
        columns = indices.reshape(len(due), -1)
        if bool(((columns < 0) | (columns >= sizes)).any()):
            return same
        return same | ((self.decoded(indices) - codes).square().sum(1) <= 1e-10 * codes.square().sum(1).mean())

    def twin(self) -> Adapter:
        """A copy of it and of the host alone. What weight_norm has computed is in a graph, and is copied as it is."""
        held = (value for module in self.module.modules() for value in vars(module).values())
        computed = {id(t): t.detach().clone() for t in held if isinstance(t, Tensor) and t.grad_fn is not None}
        return copy.deepcopy(self, {id(self.module._modules.get("provq")): None, **computed})

    def rehearse(self) -> None:
        """`require_alike` on a copy of the host with random codes: long before k-means, a look-alike is known."""
        generator, name = torch.Generator().manual_seed(0), type(self.module).__name__
        device = _weight(self.module).device
        if device.type == "meta":  # the codes of k-means are checked as well
            return
        x = torch.randn(256, self.dim, generator=generator).to(device)
        try:
            twin = self.twin()
            for part in twin.parts():
                codes = torch.randn(part.table().shape, generator=generator).to(device)
                codes = F.normalize(codes, dim=-1) if part.l2_norm else codes
                part.set_codebook_(codes, torch.full((len(codes),), 1e6, device=device))  # few would make hosts warn
            if len({float(part.codebook().detach().double().sum()) for part in twin.parts()}) < len(twin.parts()):
                raise ValueError(f"{name}: levels that share their codes are not supported: what one leaves over is no "
                                 "latent of another")
            if self.settable:
                twin.require_alike(x, reduce=False)
            idle = twin.idle(x[:16])
        except (LookupError, AttributeError, TypeError, RuntimeError) as error:
            raise TypeError(f"{name} is no host for {type(self).__name__}, which reads another return value, or calls "
                            f"it in another way ({error!r}): kind='custom' can tell where things stand; check=False "
                            "goes on all the same") from error
        if idle and provq._world() > 1:
            warnings.warn(f"{name}: its forward leaves {', '.join(idle)} without a gradient; in stage 2 "
                          "DistributedDataParallel needs find_unused_parameters=True", stacklevel=5)

    def idle(self, x: Tensor) -> list[str]:
        """Parameters that have no gradient after a training forward on tokens x: DDP finds them in stage 2."""
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        exact = torch.autocast(x.device.type, enabled=False)
        with torch.random.fork_rng([x.device] * x.is_cuda), torch.enable_grad(), exact:
            out = self.module.train() and self(self.cast(x).to(_weight(self.module).dtype).requires_grad_())
            total = torch.stack([t.float().sum() for t in (out.codes, *out.losses.values())]).sum()
        got = torch.autograd.grad(total, [*named.values()], allow_unused=True) if named and total.requires_grad else ()
        return [name for name, gradient in zip(named, got) if gradient is None]  # noqa: B905


class _Table(Adapter):
    """A host with one table of codes, searched in its own way."""

    def table(self) -> Tensor:
        """Codes (K, C) as the host has them, differentiable; C is D but where the host projects."""
        return self.module.embedding.weight

    def codebook(self) -> Tensor:
        return F.normalize(self.table(), dim=-1) if self.l2_norm else self.table()

    @torch.no_grad()
    def set_codebook_(self, centroids: Tensor, counts: Tensor | None = None) -> None:  # noqa: ARG002
        self.table().data.copy_(centroids)

    def parts(self) -> Sequence[_Table]:
        return [self]

    def nearest(self, latents: Tensor) -> Tensor:
        """Indices (N,) of the codes that the host takes for latents (N, C), as `latent` gives them."""
        return provq.nearest_code(latents, self.codebook())

    def assign(self, x: Tensor) -> tuple[Tensor, Tensor]:
        indices = self.nearest(self.latent(x))
        return self.decoded(indices), indices

    def decoded(self, indices: Tensor) -> Tensor:
        return self.output(F.embedding(indices, self.codebook()))

    def fit_codebook_(self, x: Tensor, *, batch: Tensor | None = None, **options: Any) -> dict[str, float]:
        info = self.place_(self.latent(self.cast(x)), batch, **options).info()
        if self.check:
            self.require_alike(x)
        return info

    def place_(self, latents: Tensor, batch: Tensor | None, *, scale: float = 0.0, what: str = "latents",
               **options: Any) -> provq.KMeansResult:
        """Make the centroids of latents (N, C) the codes. batch, options: see `fit_codebook_`.

        ValueError: codes are equal, to a millionth of scale; what: the latents, for that message.
        """
        result = provq.kmeans(latents, self.num_codes, spherical=self.l2_norm, **options)
        provq._require_distinct(result.centroids, scale, what)
        held = {*self.codebook_parameters()}
        self.set_codebook_(result.centroids, result.counts * (batch / result.counts.sum()) if batch else result.counts)
        name, codes = type(self.module).__name__, self.codebook()
        found = codes[self.nearest(result.centroids.to(codes.dtype))]
        own = ((found - codes).square().sum(1) <= 1e-6 * codes.square().sum(1).mean()).float().mean()
        if self.check and own < 0.5:
            raise ValueError(f"{name}: codes were set to centroids, and for {own:.0%} of these the nearest code is the "
                             "one set to it: what sets codes must write what is searched")
        if self.check and held != {*self.codebook_parameters()}:
            raise ValueError(f"{name}: setting its codes replaced a parameter, and optimizers hold the old one: write "
                             "into it, as in parameter.data.copy_(centroids)")
        return result


class TableAdapter(_Table, provq.Quantizer):
    """A host with one table of codes, of which it takes the nearest: all that ProVQ asks of a quantizer."""

    def lookup(self, indices: Tensor) -> Tensor:
        return self.decoded(indices)


class ResidualAdapter(Adapter):
    """A host of levels, each for what those before left over. It has no single codebook: `attach` takes it only."""

    sizes: tuple[str, ...] = ()
    levels: Sequence[_Table]

    def _use_levels(self, levels: Sequence[_Table]) -> None:
        self.levels = levels
        self.num_codes = sum(level.num_codes for level in levels)
        self.trailing = (len(levels),)

    def parts(self) -> Sequence[_Table]:
        return self.levels

    def assign(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rest = latent = self.latent(x)
        indices = []
        for level in self.levels:
            codes, index = level.assign(rest)
            rest = rest - codes
            indices.append(index)
        return self.output(latent - rest), torch.stack(indices, -1)

    def decoded(self, indices: Tensor) -> Tensor:
        codes = [level.decoded(index) for level, index in zip(self.levels, indices.unbind(-1))]  # noqa: B905
        return self.output(torch.stack(codes).sum(0))

    def fit_codebook_(self, x: Tensor, *, batch: Tensor | None = None, **options: Any) -> dict[str, float]:
        """Each level gets the centroids of what those before it left over."""
        rest, empty, scale = self.latent(self.cast(x)), 0, 0.0
        for n, level in enumerate(self.levels, 1):
            result = level.place_(level.latent(rest), batch, scale=scale, what=f"residuals of level {n}", **options)
            rest = rest - level.assign(rest)[0]
            scale = scale or float(result.centroids.abs().max())
            empty += int((result.counts == 0).sum())
        if self.check:
            self.require_alike(x)
        return {**result.info(), "empty": empty}

    def token_indices(self, indices: Tensor, n: int) -> Tensor:
        return indices.movedim(self.level_axis, -1).reshape(n, -1).long()

    def countable(self, indices: Tensor) -> Tensor:
        last = indices.movedim(self.level_axis, -1)  # of a call, perhaps, of the first few levels only
        first = torch.tensor([0, *[level.num_codes for level in self.levels]], device=indices.device).cumsum(0)
        return torch.where(last < 0, last, last + first[: last.shape[-1]])


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

    def silent(self, z: Tensor, quantized: Tensor, given: dict[str, Any]) -> Any:
        out = super().silent(z, quantized, given)
        return out if self.module.training else _put(out, (1,), self.template[1])


class TamingAdapter(TableAdapter):
    """taming-transformers' VectorQuantizer2 and its copies (latent-diffusion, ...). Its legacy beta stays as it is."""

    classes: tuple[str, ...] = ("VectorQuantizer2",)
    needs: tuple[str, ...] = ("embedding", "legacy", "sane_index_shape")
    supports = {"remap": None, "l2_normalize": False}  # noqa: RUF012
    template: Any = (None, None, (None, None, None))
    indices_at, losses_at = (2, 2), {"vq": (1,)}

    def __init__(self, module: Any):
        super().__init__(module)
        self.flat_indices = not getattr(module, "sane_index_shape", False)


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


# provq_hosts.py, loaded by the first `adapt`, adds its own.
ADAPTERS: dict[str, type[Adapter]] = {"llamagen": LlamaGenAdapter, "taming": TamingAdapter, "simvq": SimVQAdapter}


def _companions() -> list[Any]:
    """Those of provq_hosts.py and provq_packages.py that are beside this file; their adapters are then in ADAPTERS."""
    found = []
    for name in ("provq_hosts", "provq_packages"):
        companion = f"{__package__}.{name}" if __package__ else name
        try:
            found.append(importlib.import_module(companion))
        except ModuleNotFoundError as error:
            if error.name != companion:
                raise
    return found


def __getattr__(name: str) -> Any:
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for companion in _companions():
        if name in companion.__all__:
            return getattr(companion, name)
    raise ImportError(f"{name} is in provq_hosts.py or provq_packages.py: copy all, provq*.py")


def _missing(module: Any, adapter: type[Adapter]) -> list[str]:
    """Attributes that the adapter needs and the module has not."""
    missing = []
    for path in (*adapter.needs, *adapter.sizes):
        owner = module
        for name in path.split("."):
            owner = getattr(owner, name, _missing)  # a stand-in for "nothing": None is a value
        if owner is _missing:
            missing.append(path)
    return missing


def _recognised(module: nn.Module) -> tuple[list[str], list[str]]:
    """Kinds whose class names the module or a base of it has, the nearest first; and those that fit it as well."""
    named = [kind for cls in type(module).__mro__ for kind, adapter in ADAPTERS.items()
             if cls.__name__ in adapter.classes]
    return named, [kind for kind in named if not _missing(module, ADAPTERS[kind])]


def adapt(module: nn.Module, kind: str = "auto", *, check: bool = True, **callables: Any) -> Adapter:
    """A foreign quantizer for ProVQ(adapt(module), curriculum). kind: a name in ADAPTERS, "custom" or "auto".

    "auto" goes by class name and attributes, a kind by attributes alone (for renamed copies). "custom" takes the
    callables of `CustomAdapter`. check=False trusts the host: else a copy of it is run with random codes here, and it
    itself when codes have been set, to see that it takes the nearest ones. TypeError: not recognised, or attributes are
    missing. ValueError: an option of the host that is not supported, by name; unknown kind; see `require_alike`.
    """
    companions, name = _companions(), type(module).__name__
    if kind == "custom" and not companions:
        raise ImportError("kind='custom' is in provq_hosts.py: copy all, provq*.py")
    if callables and kind != "custom":
        raise TypeError(f"{', '.join(callables)}: only kind='custom' takes callables")
    if kind == "auto":
        named, found = _recognised(module)
        if not found:
            raise TypeError(f"{name} is none of the quantizers that adapt() knows ({_unknown(module, named)}): give "
                            "kind=, or kind='custom' and callables")
        kind = found[0]
    if kind not in (*ADAPTERS, "custom"):
        raise ValueError(f"unknown kind {kind!r}; choose one of auto, custom, {', '.join(ADAPTERS)}{_more()}")
    if kind != "custom" and _missing(module, ADAPTERS[kind]):
        raise TypeError(f"{name} is no {kind} quantizer: it lacks {', '.join(_missing(module, ADAPTERS[kind]))}")
    adapter: Adapter = companions[0].custom(module, **callables) if kind == "custom" else ADAPTERS[kind](module)
    adapter.check = check
    for part in adapter.parts():
        part.check = check
        if part.table().shape[:1] != (part.num_codes,):
            raise ValueError(f"{name} is no {kind} quantizer: its table is {tuple(part.table().shape)}, and K is "
                             f"{part.num_codes}")
    if check and (kind != "custom" or "call" in callables):  # how else a custom host is called is known in a forward
        adapter.rehearse()
    return adapter


def _unknown(module: nn.Module, named: list[str]) -> str:
    """Why no adapter fits, and what might."""
    inner = [f"{path} is one: {kinds[0]}" for path, child in module.named_modules() if path
             for _, kinds in [_recognised(child)] if kinds]
    if inner:
        return f"but its {inner[0]}"
    package = type(module).__module__.split(".")[0]
    lacks = [f"for {kind} it lacks {', '.join(_missing(module, ADAPTERS[kind]))}"
             + (": a version of its package that is not supported?" if ADAPTERS[kind].package == package else "")
             for kind in named]
    return "; ".join(lacks or [f"{kind}: {' or '.join(a.classes)}" for kind, a in ADAPTERS.items()]) + _more()


def _more() -> str:
    return "" if len(_companions()) == 2 else "; more if you copy all, provq*.py"


# --------------------------------------------------------------------------------------------------------- drop-in mode

# Those that are alive, of each handle: `maybe_init_codebook` asks whether they are averages.
_DEEP_COPIES: weakref.WeakKeyDictionary[Attached, weakref.WeakSet[Attached]] = weakref.WeakKeyDictionary()
_ATTACHED: weakref.WeakSet[Attached] = weakref.WeakSet()


class Attached(provq.ProVQ):
    """The curriculum of a host's quantizer where it stands: what `attach` returns, and the quantizer's child `provq`.

    All of ProVQ but the call (and what needs one table of codes, where there is none). The host is called as ever and
    returns its own tuple, with quantized mixed (Eq. 2) and losses weighted (Eq. 4). In the warm-up its forward does not
    run: quantized is the latent, losses are 0, indices -1. In stage 3, and in eval() once there is a codebook, the
    tuple is the host's, untouched. Weights of the host alone may be loaded: eval() then uses their codes until the
    first `set_step`. The state dict has the latents collected (reservoir, reservoir_state), zeros once they are used.

    recluster: once more k-means, where the transition ends (ours, not in the paper), of latents of its last steps.
    """

    REQUIRED = ("latent", "output", "num_codes", "dim")

    quantizer: Any  # an Adapter
    _loaded_alone = False  # the host's weights came without a curriculum, and no step has been set since
    _counted = 0  # the last stage whose indices were counted

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
        unknown = [name for name, value in given.items() if adapter.accepts is not None and name not in adapter.accepts
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
        dim, mask = adapter.channels(z), given.get("mask") if adapter.accepts else None
        if z.shape[dim] != self.dim:
            raise ValueError(f"latents need {self.dim} channels in dimension {dim}, got {tuple(z.shape)}")
        self._watch(z, dim)
        tokens = z.movedim(dim, -1)
        smooth = adapter.smooth(tokens)
        if mask is not None:
            smooth = torch.where(mask[..., None], smooth, 0.0)  # like the host
        smooth = smooth.movedim(-1, dim)
        wanted = self.training and adapter.settable and not self._initialised if continuous else self._reclusters
        if wanted and not provq._recomputing():
            self.collect((tokens if mask is None else tokens[mask]).detach().reshape(-1, self.dim))
        if continuous:
            if self.training:
                for parameter in module.parameters():  # then DistributedDataParallel sees the codebook used
                    if parameter.requires_grad:
                        smooth = smooth + 0.0 * parameter.float().sum()
            return adapter.silent(z, smooth, given)

        out = type(module).forward(module, z, *args, **kwargs)
        self._count_host(out)
        quantized = _get(out, adapter.quantized_at)
        mixed = self._alpha * smooth + (1.0 - self._alpha) * quantized
        out = _put(out, adapter.quantized_at, mixed.to(quantized.dtype))
        for path in adapter.losses_at.values():
            if _get(out, path) is not None:
                out = _put(out, path, self._omega * _get(out, path))
        return out

    def _replicate_for_data_parallel(self) -> Any:
        raise RuntimeError("nn.DataParallel: its replicas would share this module. Use DistributedDataParallel")

    def set_step(self, step: int) -> None:
        super().set_step(step)
        if self._loaded_alone:
            self._loaded_alone = False
            self._mirror()
        self._make_room()

    def _mirror(self) -> None:
        super()._mirror()
        self._from_start = self._from_start or self._loaded_alone  # either way the codes mean something

    def maybe_init_codebook(
        self, *, optimizers: Sequence[torch.optim.Optimizer] = (), copies: Sequence[nn.Module] | None = (),
        iters: int = 20, start: str = "kmeans++", seed: int = 0,
    ) -> dict[str, float] | None:
        """Once, when the warm-up has ended: `init_codebook` from what `collect` kept. Else None. Collective then.

        Call it in every step after set_step; `needs_init` and `init_codebook`, the lower level, are for latents of your
        own. optimizers, iters, start, seed: see there. copies: moving averages of the quantizer (same state-dict keys),
        which take the new codes over at once; without it, a deep copy that is alive gets a warning, unless copies is
        None. RuntimeError: `collect` was never called. With attach(..., recluster=True) also when the transition ends.
        """
        again = self._reclusters and self.stage == 3 and self.has_codebook and len(self.reservoir) > 0
        if not (self.needs_init or again):
            return None
        copies = [copies] if isinstance(copies, nn.Module) else copies
        gc.collect()  # of copies that are no more: a module that holds its handle is a circle
        if copies is not None and {twin.quantizer.module for twin in _DEEP_COPIES.get(self, ())} - {*copies}:
            warnings.warn(f"a deep copy of {type(self.quantizer.module).__name__} is alive and not in copies=[...]: a "
                          "moving average would mix codes of before k-means with those of after (copies=None: it is "
                          "none)", stacklevel=2)
        if not self.quantizer.settable:
            return self.init_codebook(None, optimizers=optimizers)
        kept, most = self.reservoir[: int(self.reservoir_state[0])], max(t.num_codes for t in self.quantizer.parts())
        count = int(provq._all_reduce(self.reservoir_state[:1].clone()))  # of all ranks: none raises alone
        if not count:
            raise RuntimeError("the warm-up has ended, and no latents were collected in it. Were weights loaded without"
                               " the curriculum's state? Then call init_codebook(None): codes stay as they are")
        if most <= count < 2 * most:
            warnings.warn(f"k-means of {count} latents for {most} codes makes codes of single latents: let the warm-up "
                          "see more, or give your own to init_codebook(latents)", stacklevel=2)
        place = self.recluster if again else self.init_codebook
        info = place(kept, optimizers=optimizers, iters=iters, start=start, seed=seed)
        state = self.quantizer.module.state_dict()
        for twin in copies or ():
            twin.load_state_dict({name: state[name] for name in twin.state_dict() if name in state})
        return info

    def _place(self, latents: Tensor | None, optimizers: Any = (), **options: Any) -> dict[str, float]:
        info = super()._place(latents, optimizers, **options)
        self._empty_reservoir()
        if self._reclusters and self.stage == 2:
            self._size_reservoir()
        return info

    def __deepcopy__(self, memo: dict[int, Any]) -> Attached:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        _DEEP_COPIES.setdefault(self, weakref.WeakSet()).add(twin)
        return twin

    def _fit(self, latents: Tensor, **options: Any) -> dict[str, float]:
        # Running means of a foreign quantizer count tokens of one rank's batches, not those of the whole sample; alike
        # on all ranks, or their codebooks would drift apart.
        batch = provq._all_reduce(self.reservoir_state[1].double()) / provq._world()
        return self.quantizer.fit_codebook_(latents, batch=batch, **options)

    @torch.no_grad()
    def collect(self, latents: Tensor) -> None:
        """Keep a sample of latents (N, D), this rank's valid tokens, for `maybe_init_codebook`. Done by the warm-up.

        Bounded: RESERVOIR_TOKENS_PER_CODE x K tokens over all ranks. The first calls fill it, each later one replaces
        the oldest 16th: the encoder moves, and one batch alone would be too uniform. Draws no random numbers and does
        not synchronise. ValueError: latents are not (N, D).
        """
        self._checked(latents)
        if not len(latents):
            return
        self._size_reservoir()
        size, n = len(self.reservoir), len(latents)
        take = min(n, -(-size // RESERVOIR_CALLS))  # rounded up: one call of all ranks may have to do
        # One row of each of equal parts of the batch, of which each `take` in turn are spread over all of it. Where in
        # its part is a hash (Knuth's) of a running number: a fixed stride would see the same places of every image.
        rounds, taken = min(n, size) // take, self.reservoir_state[0]
        i = torch.arange(rounds * take, device=latents.device)
        part, place = i % take * rounds + (i + taken) // take % rounds, (taken + i) % size
        start, end = part * n // len(i), (part + 1) * n // len(i)
        rows = start + ((taken + i) * 2654435769 % 2**32 * (end - start) >> 32)
        keep = (i < take) | (taken + i < size)  # known to the device alone
        self.reservoir[place] = torch.where(keep[:, None], latents[rows].float(), self.reservoir[place])
        self.reservoir_state.copy_(torch.stack([taken + keep.sum(), torch.full_like(taken, n)]))

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
        most = max(part.num_codes for part in self.quantizer.parts())  # levels share the tokens
        size = max(-(-RESERVOIR_TOKENS_PER_CODE * most // provq._world()), 2 * RESERVOIR_CALLS)
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
        # Known from the start: keys never change.
        if self.quantizer.settable and (self._full_curriculum.warmup_steps or self._reclusters):
            # One row for an empty one: averages that pair state dicts entry by entry can broadcast it to their own.
            empty = torch.zeros(1, self.dim, device=self.step.device)
            destination[prefix + "reservoir"] = self.reservoir if len(self.reservoir) else empty
            destination[prefix + "reservoir_state"] = self.reservoir_state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # A checkpoint of the host alone says nothing of the curriculum, which then stays as it is.
        self._loaded_alone = not any(name.startswith(prefix) for name in state_dict)
        if self._loaded_alone:
            self._from_start = True  # reads no buffer: a module on the meta device has none to read
            return
        self._empty_reservoir()
        kept = state_dict.get(prefix + "reservoir")  # ProVQ pops them: older checkpoints lack them
        used = state_dict.get(prefix + "initialised", False) and not self._reclusters
        if kept is not None and len(kept) > 1 and not used:
            self.reservoir = kept.to(self.step.device, copy=True)
            self.reservoir_state = state_dict[prefix + "reservoir_state"].to(self.step.device, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._make_room()

    def _new_counts(self) -> Tensor:
        # A grid of codes that keeps its indices has billions of them.
        return super()._new_counts() if self.quantizer.indices_at else torch.zeros(0, dtype=torch.int64)

    def _count_host(self, out: Any) -> None:
        if self.quantizer.indices_at:
            indices = self.quantizer.countable(_get(out, self.quantizer.indices_at)).reshape(-1).long()
            if not provq._is_compiling():
                self._require_codes(indices)
            self._count(indices)

    def _require_codes(self, indices: Tensor) -> None:
        first, self._counted = self._counted < self.stage, self.stage  # looking makes a GPU wait: once a stage
        if (first or indices.is_cpu) and bool((indices >= len(self._counts)).any()):
            raise ValueError(f"{type(self.quantizer.module).__name__} returned index {int(indices.max())} (of levels, "
                             f"counted on), and codes are 0 to {len(self._counts) - 1}")


def _attached_forward(module: nn.Module, z: Tensor, *args: Any, **kwargs: Any) -> Any:
    return module.get_submodule("provq")(z, *args, **kwargs)


def _tables(host: Adapter) -> set[int]:  # where its codes lie, if they are stored as they are
    stored = {t.data_ptr() for t in (*host.module.parameters(), *host.module.buffers())} - {0}
    return stored & {part.table().data_ptr() for part in (host.parts() if host.settable else ())}


def attach(module: nn.Module, curriculum: Curriculum, *, kind: str = "auto", adaptive: AdaptiveWarmup | None = None,
           recluster: bool = False, check: bool = True, **callables: Any) -> Attached:
    """Put a host's quantizer on the curriculum where it stands; returns the handle, which is also `module.provq`.

    module keeps its class, attributes, methods, parameters and state-dict keys, and gains the entries `provq.*`, the
    state of ProVQ, fixed from now on. kind, check, callables: see `adapt`, whose errors this has as well. RuntimeError:
    attached before. Attach before DistributedDataParallel and torch.compile; not for nn.DataParallel, whose replicas
    would share this module. A moving average needs the codes at once: maybe_init_codebook(..., copies=[it.quantize]).
    recluster: k-means again where the transition ends, see `Attached`; ValueError: no transition, no codes to set.

    The lines are those above. LlamaGen's tokenizer/tokenizer_image/vq_train.py: after `vq_model.to(device)`, and with
    --ema copies=[ema.quantize]. taming-transformers, SimVQ: attach in the model's __init__, and first in training_step
    the two calls, of self.quantize.provq with self.global_step and self.trainer.optimizers. EnCodec's quantizer is
    model.quantizer.vq, DAC's model.quantizer; ESM's EMACodebook needs freeze_codebook = True. See tokenizer/README.md.
    """
    if "forward" in module.__dict__ or hasattr(module, "provq"):
        raise RuntimeError(f"{type(module).__name__}: forward is replaced already; attach once, before others do that")
    attached = Attached(adapt(module, kind, check=check, **callables), curriculum, adaptive, recluster)
    if _tables(attached.quantizer) & set().union(*(_tables(other.quantizer) for other in _ATTACHED)):
        raise ValueError(f"{type(module).__name__}: its codes are those of a quantizer that is attached already, whose "
                         "k-means would be lost; attach to one module, and call that one in both places")
    _ATTACHED.add(attached)
    module.add_module("provq", attached.to(_weight(module).device).train(module.training))
    module.forward = functools.partial(_attached_forward, module)  # unlike a closure, it survives deepcopy and pickle
    return attached


def detach(model: nn.Module) -> nn.Module:
    """Undo every `attach` inside model, in place: the host as it was, with the codes that it has now."""
    for module in [m for m in model.modules() if isinstance(m._modules.get("provq"), Attached)]:
        _ATTACHED.discard(module._modules["provq"])  # type: ignore[arg-type]
        del module.forward, module._modules["provq"]
    return model


def host_state_dict(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of a model with attached quantizers, without ProVQ's entries: loads strictly into the host alone.

    Where a quantizer was replaced by ProVQ(adapt(it), ...), its keys get their old names back.
    """
    inner = "quantizer.module."
    own = {"step", "initialised", "warmup_end", "best_score", "stale_checks", "reservoir", "reservoir_state"}
    starts = {name[: name.index(inner)] for name in state_dict if f".{name}".find(f".{inner}") >= 0}
    wrapped = [start for start in starts if f"{start}warmup_end" in state_dict]
    found = {}
    for name, value in state_dict.items():
        start = next((start for start in wrapped if name.startswith(start)), None)
        rest = name if start is None else name[len(start) :]
        if start is not None and rest.startswith(inner):
            found[start + rest[len(inner) :]] = value
        elif name.split(".")[-2:-1] != ["provq"] and (start is None or rest not in own):
            found[name] = value
    return found
