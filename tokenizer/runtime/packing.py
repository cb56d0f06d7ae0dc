"""The tensors of a batch in one piece of memory, which goes to a GPU in one copy instead of one each."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes: kernels read up to 16 at once, and a compiled graph copies inputs that do not begin at such


class Packed:
    """tensors: on the CPU, of any dtypes and shapes. A DataLoader pins them as one."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._places: dict[str, tuple[int, int, torch.dtype, torch.Size]] = {}
        end = 0
        for name, tensor in tensors.items():
            start = -(-end // ALIGNMENT) * ALIGNMENT
            end = start + tensor.nbytes
            self._places[name] = start, end, tensor.dtype, tensor.shape
        self._memory = torch.empty(end, dtype=torch.uint8)
        for name, part in self.to("cpu").items():
            part.copy_(tensors[name])

    def pin_memory(self) -> "Packed":
        self._memory = self._memory.pin_memory()
        return self

    def to(self, device: torch.device | str) -> dict[str, Tensor]:
        """The tensors as parts of one memory there, by a copy that the host does not wait for; on the CPU no copy."""
        memory = self._memory.to(device, non_blocking=True)
        return {name: memory[start:end].view(dtype).view(shape)
                for name, (start, end, dtype, shape) in self._places.items()}


def packed(items: list[Any], *, collate: Callable[[list[Any]], Mapping[str, Any]], names: Iterable[str]) -> Packed:
    """Items -> those tensors of their batch that are named. With `partial` a collate function, so workers pack."""
    batch = collate(items)
    return Packed({name: batch[name] for name in names})
