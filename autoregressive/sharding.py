"""Fully sharded data parallelism (FSDP2) for models that do not fit, or do not train well, as a copy per process.

Checkpoints hold full tensors under the plain names, so one file serves every number of processes, the samplers and the
unsharded trainer's tools alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from tokenizer.runtime import distributed

_FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: nn.Module, blocks: nn.ModuleList, device: torch.device, dtype: torch.dtype) -> None:
    """Shard the parameters over all processes in place, block by block; computation in dtype, reductions in float32.

    model: with real weights on rank 0 at least; all ranks get rank 0's. blocks: submodules gathered one at a time.
    """
    state = model.state_dict() if distributed.is_main() else {}
    state = {key: value.cpu() for key, value in state.items()}
    # Between blocks activations keep the dtype that they have, and the float32 rotary table is not cast on the way in.
    inner = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    outer = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=inner)
    fully_shard(model, mesh=mesh, mp_policy=outer)
    load_full_state(model, state)


def full_state(model: nn.Module) -> dict[str, Any]:
    """Collective. The whole state dict in the CPU memory of rank 0, {} elsewhere."""
    return get_model_state_dict(model, options=_FULL)


def load_full_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Collective. Give a sharded model the state dict that rank 0 has; other ranks' argument is not read."""
    set_model_state_dict(model, dict(state), options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


class ShardedModel:
    """state_dict and load_state_dict of a sharded model in full tensors; both collective.

    from_main: what is loaded is read from rank 0's argument alone, so that nobody else needs to read a checkpoint.
    """

    from_main = True

    def __init__(self, model: nn.Module):
        self.model = model

    def state_dict(self) -> dict[str, Any]:
        return full_state(self.model)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_full_state(self.model, state)


class ShardedOptimizer:
    """The same for its optimizer; states are named by parameter, so they fit any number of processes."""

    from_main = True

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self.model, self.optimizer, options=_FULL)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:  # rank 0's
            state = _relabelled(state, dict(enumerate(_names(self.model, self.optimizer))))
        set_optimizer_state_dict(self.model, self.optimizer, dict(state),
                                 options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))


class ReplicatedOptimizer:
    """An optimizer of a model that is not sharded, which also takes what ShardedOptimizer has saved."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        numbers = {name: i for i, name in enumerate(_names(self.model, self.optimizer))}
        self.optimizer.load_state_dict(_relabelled(state, numbers))


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Of the optimizer's parameters, in the order in which it numbers them."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _relabelled(state: Mapping[str, Any], labels: Mapping[Any, Any]) -> dict[str, Any]:
    """An optimizer's state with other labels of its parameters, numbers for names or the reverse, in the order of
    `labels`; as it is, if it has them already. ValueError: the state of other parameters.
    """
    found = {label for group in state["param_groups"] for label in group["params"]}
    if found == set(labels.values()):
        return dict(state)
    if found != set(labels):
        raise ValueError(f"its parameters are others ({len(found)} there, {len(labels)} in the model)")
    order = {label: place for place, label in enumerate(labels)}
    groups = [group | {"params": [labels[label] for label in sorted(group["params"], key=order.__getitem__)]}
              for group in state["param_groups"]]
    return {"state": {labels[label]: values for label, values in state["state"].items()}, "param_groups": groups}
