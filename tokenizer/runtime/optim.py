"""What updates weights, the same in every trainer: learning rates, AdamW, precision, accumulation, clipping."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tokenizer.runtime import distributed

DTYPES = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # of --mixed-precision
# torch 2.14 has another name for it, and warns at the old one.
_NEWER = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
_BUFFERS_EVERY_FORWARD = "forward_sync_buffers" if _NEWER else "broadcast_buffers"


def build_adamw(
    model: nn.Module, cfg: Any, *, scaled: Iterable[nn.Parameter] = (), scale: float = 1.0
) -> torch.optim.AdamW:
    """AdamW with cfg.lr, beta1, beta2; cfg.weight_decay on matrices and embeddings only: not on norms and biases.

    scaled, scale: see `scale_learning_rate`. Decay is per learning rate, so that these parameters decay faster as well.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if p.dim() >= 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0}]
    groups = scale_learning_rate(groups, scaled, scale, cfg.lr)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)


def scale_learning_rate(
    groups: list[dict[str, Any]], chosen: Iterable[nn.Parameter], scale: float, lr: float
) -> list[dict[str, Any]]:
    """groups with the chosen parameters in groups of their own, at scale x lr. With a scale of 1 as they are: the
    states of optimizers without the option stay loadable.
    """
    if scale == 1.0:
        return groups
    known = {id(p) for p in chosen}
    split: list[dict[str, Any]] = []
    for group in groups:
        inside = [p for p in group["params"] if id(p) in known]
        outside = [p for p in group["params"] if id(p) not in known]
        if outside:
            split.append(group | {"params": outside})
        if inside:
            split.append(group | {"params": inside, "lr": scale * lr, "lr_scale": scale})
    return split


def learning_rate(cfg: Any, step: int) -> float:
    """Of the update that is step number `step`, counted from 0: a pure function, so there is nothing to resume.

    Rises linearly over cfg.lr_warmup_steps, then stays (cfg.lr_schedule "constant"), or falls to cfg.min_lr at
    cfg.max_steps along half a cosine or a line.
    """
    if step < cfg.lr_warmup_steps:
        return float(cfg.lr * (step + 1) / cfg.lr_warmup_steps)
    if cfg.lr_schedule == "constant":
        return float(cfg.lr)
    progress = (step - cfg.lr_warmup_steps) / max(cfg.max_steps - cfg.lr_warmup_steps, 1)
    height = 1 - progress if cfg.lr_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return float(cfg.min_lr + (cfg.lr - cfg.min_lr) * height)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Into all groups, times what `scale_learning_rate` gave them."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of --mixed-precision, a key of DTYPES."""
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "none")


def replicate(module: nn.Module, device: torch.device) -> nn.Module:
    """module under DistributedDataParallel, if there are several processes.

    Buffers are equal on all ranks by construction (or, as a discriminator's, never used): no broadcast.
    """
    if distributed.world_size() == 1:
        return module
    ids = [device.index] if device.type == "cuda" else None
    options: dict[str, Any] = {_BUFFERS_EVERY_FORWARD: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(module, device_ids=ids, **options)


@contextmanager
def accumulating(module: nn.Module, more: bool) -> Iterator[None]:
    """Gradients of DDP and FSDP modules are reduced with the last micro-batch only; `more`: this is not the last."""
    if isinstance(module, DistributedDataParallel) and more:
        with module.no_sync():
            yield
    else:
        set_sync = getattr(module, "set_requires_gradient_sync", None)  # fully_shard adds it
        if set_sync is not None:
            set_sync(not more)
        yield


def update(
    optimizer: torch.optim.Optimizer, module: nn.Module, scaler: torch.amp.GradScaler, max_grad_norm: float
) -> Tensor:
    """Clip to max_grad_norm (0: not), step, clear -> gradient norm before clipping; 0 for a step that fp16 skips."""
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm or math.inf)
    if hasattr(norm, "full_tensor"):  # a DTensor, of sharded parameters; importing it takes as long as this module
        norm = norm.full_tensor()
    scaler.step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    return torch.where(norm.isfinite(), norm, 0.0) if scaler.is_enabled() else norm
