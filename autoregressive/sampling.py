"""Draws codes from a GPT: classifier-free guidance, temperature, top-k and top-p, with one random stream per image.

A code is drawn by inverting the cumulative distribution at a uniform number. Image i takes its numbers from its own
seed alone, so it stays the same in another batch, at another place, or on another process, up to the rounding of the
logits (equal shapes round equally: sample_c2i.py fills up its last batch).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autoregressive.gpt import GPT, KVCache
from autoregressive.packed import can_pack, packed
from autoregressive.sampling_config import SamplingConfig

LENGTH_STEP = 64  # a compiled step attends to a multiple of this, so that few lengths are compiled


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """(len(seeds), count) float64 in [0, 1 - 2^-24], each row of one seed alone, on the CPU."""
    draws = [torch.rand(count, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(draws).double()


def filter_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Excluded codes become -inf; a new tensor (B, V).

    top_k: all as likely as the k-th stay. top_p: of the rest, the fewest most likely whose probability exceeds p.
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p < 1:
        ordered, places = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
        before[..., 0] = 0  # the most likely always stays
        logits = logits.masked_fill((before > top_p).scatter(-1, places, before > top_p), -math.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor, config: SamplingConfig) -> Tensor:
    """logits (B, V) float32 and uniform numbers (B,) float64 -> codes (B,) int64."""
    if config.temperature == 0:
        return logits.argmax(-1)
    logits = filter_logits(logits / max(config.temperature, 1e-5), config.top_k, config.top_p)
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    # The first code whose cumulative probability exceeds the number: never one of probability 0.
    return torch.searchsorted(cumulative, (uniform * cumulative[:, -1])[:, None], right=True)[:, 0]


class CompiledDecoding:
    """The decoding step of a GPT through torch.compile, for `generate`; on GPUs as CUDA graphs, without launches.

    Compiles at the first images, once per LENGTH_STEP and batch size. Graphs read and write memory at fixed places, so
    the caches are kept here from call to call. One call at a time.
    """

    def __init__(self, model: GPT) -> None:
        options = {"mode": "reduce-overhead"} if model.output.weight.is_cuda else {}
        self._step = torch.compile(model.decode, fullgraph=True, dynamic=False, **options)  # type: ignore[call-overload]
        self._caches: dict[tuple[int, torch.dtype], KVCache] = {}

    def cache(self, model: GPT, batch: int) -> KVCache:
        """For `batch` sequences. What an earlier call left in it is hidden, see GPT.decode."""
        weight = model.output.weight
        key = batch, weight.dtype
        if key not in self._caches:
            self._caches[key] = cache = KVCache(model.config, batch, weight.dtype, weight.device)
            for layer in (*cache.layers, *cache.first(batch // 2)):
                for part in layer:
                    torch._dynamo.mark_static_address(part)
        return self._caches[key]

    def __call__(self, *args: Any) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the last step returned has been read
        return self._step(*args)


@torch.no_grad()
def generate(
    model: GPT, labels: Tensor, *, seeds: Sequence[int], config: SamplingConfig, num_codes: int | None = None,
    compiled: Callable[..., Tensor] | None = None, progress: Callable[[int], object] | None = None,
    prefix: Tensor | None = None, allowed: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Codes (B, num_codes) int64 of images of the classes labels (B,) int64.

    model: in eval mode; its parameters' dtype and device are used. In float32 on a CPU a copy of its linear weights is
    packed for the call, which is faster and takes their memory once more. seeds: one int per image. num_codes: the
    first so many codes of an image; None: all. compiled: CompiledDecoding of this model (worth its minutes for many
    images). progress: called with the number of codes done, after each. prefix: (B, P) int64, the first codes, which
    are given and not drawn. allowed: codes so far (B, t) -> bool (B, V), those that may follow, one at least of each
    row; None: all.
    ValueError: a model in training mode, labels, seeds or a prefix that do not fit.
    """
    total = model.config.block_size if num_codes is None else num_codes
    check_request(model, labels, seeds, total)
    given = 0 if prefix is None else prefix.shape[1]
    if prefix is not None and (prefix.shape[0] != len(labels) or given > total or prefix.dtype != torch.int64 or
                               not 0 <= int(prefix.min()) <= int(prefix.max()) < model.config.vocab_size):
        raise ValueError(f"a prefix of {prefix.dtype} {tuple(prefix.shape)} for {len(labels)} sequences of {total} "
                         f"codes below {model.config.vocab_size}")
    weight = model.output.weight
    labels = labels.to(weight.device, non_blocking=True)
    batch = len(labels)
    guided = [config.scale(t, total) != 1 for t in range(total)]
    size = 2 * batch if any(guided) else batch
    if isinstance(compiled, CompiledDecoding):
        cache = compiled.cache(model, size)
    else:
        cache = KVCache(model.config, size, weight.dtype, weight.device)
    uniform = uniforms(seeds, total).to(weight.device, non_blocking=True)
    codes = torch.empty(batch, total, dtype=torch.int64, device=weight.device)
    decode = compiled or (packed(model, size) if can_pack(model) else model).decode
    nothing = torch.full_like(labels, model.config.num_classes)
    for t in range(total):
        # Where no later code is guided, the half without classes is not computed any more.
        both = any(guided[t:])
        if t:
            x = model.tok_embeddings(codes[:, t - 1 : t])
            x = torch.cat([x, x]) if both else x
        else:
            x = model.cls_embedding(torch.cat([labels, nothing]) if both else labels)
        length = min(-(-(t + 1) // LENGTH_STEP) * LENGTH_STEP, model.config.block_size) if compiled else t + 1
        position = torch.full((1,), t, dtype=torch.int64, device=weight.device)
        caches = cache.layers if both else cache.first(batch)
        logits = decode(x.to(weight.dtype), position, caches, length, compiled is not None)
        if both:
            with_class, without = logits[:batch], logits[batch:]
            logits = without + (with_class - without) * config.scale(t, total) if guided[t] else with_class
        if prefix is not None and t < given:
            codes[:, t] = prefix[:, t]
        else:
            if allowed is not None:
                logits = logits.masked_fill(~allowed(codes[:, :t]), -math.inf)
            codes[:, t] = draw(logits, uniform[:, t], config)
        if progress is not None:
            progress(t + 1)
    return codes


def check_request(model: GPT, labels: Tensor, seeds: Sequence[int], total: int) -> None:
    """ValueError: what `generate` cannot do."""
    if model.training:
        raise ValueError("the model is in training mode, with dropout; call eval() first")
    if labels.dim() != 1 or not len(labels) or labels.dtype != torch.int64:
        raise ValueError(f"labels must be (B,) int64, got {labels.dtype} {tuple(labels.shape)}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > model.config.num_classes:
        raise ValueError(f"labels span [{low}, {high}], the model has classes 0 to {model.config.num_classes - 1}")
    if len(seeds) != len(labels):
        raise ValueError(f"{len(seeds)} seeds for {len(labels)} images")
    if not 1 <= total <= model.config.block_size:
        raise ValueError(f"{total} codes are asked for; an image has {model.config.block_size}")
