"""Exponential moving average of a model's weights."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel


class EMA:
    """Averaged copy of a model: parameters follow p_ema <- decay * p_ema + (1 - decay) * p, buffers are copied.

    model: the plain module, not a DDP or compiled wrapper (TypeError): wrappers prefix every name.
    decay: in [0, 1), per update (ValueError otherwise).

    average: where to keep it, a second model with the same weights; None: a deep copy, which sharded models forbid.

    Parameters must be float32 or float64 (TypeError): 1e-4 of a difference is lost in half precision.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, *, average: nn.Module | None = None) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"EMA decay {decay} is outside [0, 1)")
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            raise TypeError(f"EMA got a {type(model).__name__}; pass its .module")
        if hasattr(model, "_orig_mod"):
            raise TypeError("EMA got the wrapper of torch.compile; pass the module that was compiled")
        for name, parameter in model.named_parameters():
            if parameter.dtype not in (torch.float32, torch.float64):
                raise TypeError(f"EMA cannot average {name} in {parameter.dtype}: keep it in float32, use autocast")
        self.decay = decay
        self._module = (copy.deepcopy(model) if average is None else average).eval().requires_grad_(False)
        self._hooks_due = False

    @property
    def module(self) -> nn.Module:
        """The averaged model, in eval mode and without gradients. Ask for it again after updates, do not keep it.

        Modules may mirror a buffer in a Python attribute through a load_state_dict hook. Running those hooks may
        wait for the device, so updates copy the buffers only and the hooks run here, when somebody looks.
        """
        if self._hooks_due:
            self._module.load_state_dict(self._module.state_dict())  # every copy is onto itself and costs nothing
            self._hooks_due = False
        return self._module

    @torch.no_grad()
    def update(self, model: nn.Module, step: int | None = None) -> None:
        """Move towards the model after an optimizer step.

        step: steps done. Given, the decay is at most (1 + step) / (10 + step), so that a young average does not consist
        of initial weights: it spans a tenth of the run until `decay` takes over.
        """
        decay = self.decay if step is None else min(self.decay, (1 + step) / (10 + step))
        averages, values = _matched(dict(self._module.named_parameters()), dict(model.named_parameters()))
        torch._foreach_lerp_(averages, values, 1.0 - decay)  # few launches, not one per parameter
        self._copy(dict(self._module.named_buffers()), dict(model.named_buffers()))

    @torch.no_grad()
    def copy_(self, model: nn.Module, prefix: str = "") -> None:
        """Copy exactly every parameter and buffer whose name starts with prefix, such as "quantize."."""
        own, other = _tensors(self._module, prefix), _tensors(model, prefix)
        if not own:
            raise ValueError(f"EMA.copy_: no parameter or buffer is called {prefix}...")
        self._copy(own, other)

    def _copy(self, own: dict[str, Tensor], other: dict[str, Tensor]) -> None:
        targets, sources = _matched(own, other)
        if targets:
            torch._foreach_copy_(targets, sources)
        self._hooks_due = True

    def state_dict(self) -> dict[str, Any]:
        """The averaged model's state dict: loads into the model itself."""
        return self._module.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._module.load_state_dict(state)
        self._hooks_due = False


def _tensors(model: nn.Module, prefix: str) -> dict[str, Tensor]:
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in named.items() if name.startswith(prefix)}


def _matched(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Both sides' tensors in one order. Raises ValueError naming what only one side has."""
    if own.keys() != other.keys():
        raise ValueError(f"the model is not the one this EMA averages: {sorted(own.keys() ^ other.keys())[:5]} differ")
    return list(own.values()), [other[name] for name in own]
