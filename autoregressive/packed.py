"""A GPT for sampling on a CPU: its linear layers hold their weights in the order in which oneDNN reads them.

A decoding step multiplies few rows, one per sequence, by all weights. PyTorch's product in float32 takes a weight as it
lies; the product with packed ones takes less time, most so for few rows.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from autoregressive.gpt import GPT


class PackedLinear(nn.Module):
    """x (..., in) float32 -> (..., out) as nn.Linear, up to rounding. rows: of x, roughly; it may have any number."""

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def can_pack(model: GPT) -> bool:
    """Float32 weights on a CPU, and a PyTorch that has oneDNN's operators, which it uses itself when it compiles."""
    weight = model.output.weight
    operators = "_reorder_linear_weight", "_linear_pointwise"
    return (weight.device.type == "cpu" and weight.dtype == torch.float32 and torch.backends.mkldnn.is_available()
            and all(hasattr(torch.ops.mkldnn, name) for name in operators))


def packed(model: GPT, rows: int) -> GPT:
    """The model with copies of its linear weights, packed for so many sequences; all else is shared, model unchanged.

    It computes what model does while the weights stay: make a new one after an update. Not to be trained or saved.
    """
    assert can_pack(model), "float32 on a CPU"

    def copied(module: nn.Module) -> nn.Module:
        if type(module) is nn.Linear:
            return PackedLinear(module, rows)
        twin = copy.copy(module)
        twin._modules = {name: None if child is None else copied(child) for name, child in module._modules.items()}
        return twin

    twin = copied(model)
    assert isinstance(twin, GPT)
    return twin
