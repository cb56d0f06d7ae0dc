"""Randomness as a pure function of (seed, position): nothing to save, so nothing to restore.

Random states are derived again at every step from (seed, rank, step), and the order of the data from (seed, epoch).
A run that continues at step s therefore draws exactly what an uninterrupted run draws there.
"""

import operator
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_GAMMA = 0x9E37_79B9_7F4A_7C15  # 2^64 / golden ratio: the stream increment of SplitMix64


def _mix(x: Any) -> Any:  # int to int, uint64 array to uint64 array: one definition for both
    """SplitMix64's finaliser: a bijection of 64-bit integers in which each input bit moves half of the output bits.

    Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014.
    """
    x = (x ^ (x >> 30)) * 0xBF58_476D_1CE4_E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D0_49BB_1331_11EB & _MASK
    return x ^ (x >> 31)


def fold(seed: int, *ints: int) -> int:
    """Hash integers, in order, into [0, 2^63). The same on every machine and in every Python (hash() is not)."""
    state = _mix((operator.index(seed) + _GAMMA) & _MASK)
    for value in ints:
        state = _mix((_mix((state + operator.index(value)) & _MASK) + _GAMMA) & _MASK)
    return int(state >> 1)


def seed_step(seed: int, rank: int, step: int) -> None:
    """Re-seed Python's, NumPy's legacy and torch's global generators (CPU and every CUDA device) for one step."""
    value = fold(seed, rank, step)
    random.seed(value)
    np.random.seed(value & 0xFFFF_FFFF)  # noqa: NPY002 - libraries that draw from the legacy global must repeat too
    torch.manual_seed(value)


class StepSampler:
    """Batches as a pure function of the step; an iterable of lists of (epoch, index), for DataLoader(batch_sampler=).

    The data is one endless stream: epoch 0 in its own order, epoch 1 in its own order, and so on. Step s takes the
    `global_batch` entries from position s * global_batch, so a batch may span epochs and nothing is dropped. The
    rows of a step are dealt out in contiguous blocks of b = global_batch / (world * micro_batches): micro-batch m of
    rank r takes rows [(m * world + r) * b, + b). The rows of a step thus do not depend on world or micro_batches.

    num_samples:    samples per epoch, n
    global_batch:   samples per step, over all ranks and micro-batches
    start_step:     first step to yield; end_step: one past the last, or None for an endless stream
    rank, world:    this process's share
    micro_batches:  batches that this process yields per step (gradient accumulation)

    Raises ValueError, naming the numbers, when they do not fit together.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch: int,
        *,
        seed: int,
        start_step: int = 0,
        rank: int = 0,
        world: int = 1,
        micro_batches: int = 1,
        end_step: int | None = None,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"num_samples is {num_samples}: the data set is empty")
        if min(global_batch, world, micro_batches) < 1:
            raise ValueError(
                f"global_batch {global_batch}, world {world} and micro_batches {micro_batches} must be positive"
            )
        if global_batch % (world * micro_batches):
            raise ValueError(
                f"global_batch {global_batch} is not divisible by {world} process(es) x {micro_batches} micro-batch(es)"
                f" = {world * micro_batches}"
            )
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} is outside [0, {world})")
        if start_step < 0 or (end_step is not None and end_step < start_step):
            raise ValueError(f"steps [{start_step}, {end_step}) are not a range of steps")
        self.num_samples = num_samples
        self.global_batch = global_batch
        self.seed = seed
        self.start_step = start_step
        self.end_step = end_step
        self.rank = rank
        self.world = world
        self.micro_batches = micro_batches
        self._cached_order: tuple[int, npt.NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        """Micro-batches of this process. TypeError for an endless stream."""
        if self.end_step is None:
            raise TypeError("an endless StepSampler has no length; give it end_step")
        return (self.end_step - self.start_step) * self.micro_batches

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        rows = self.global_batch // (self.world * self.micro_batches)
        step = self.start_step
        while self.end_step is None or step < self.end_step:
            for micro in range(self.micro_batches):
                first = step * self.global_batch + (micro * self.world + self.rank) * rows
                yield [self._sample(position) for position in range(first, first + rows)]
            step += 1

    def _sample(self, position: int) -> tuple[int, int]:
        epoch, offset = divmod(position, self.num_samples)
        return epoch, int(self._order(epoch)[offset])

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        """Epoch's permutation of the indices, (n,) int64: sorted by a hash, since NumPy's streams may change."""
        if self._cached_order is None or self._cached_order[0] != epoch:  # positions only grow: one epoch is enough
            keys = np.arange(self.num_samples, dtype=np.uint64) * _GAMMA + fold(self.seed, epoch)
            self._cached_order = epoch, np.argsort(_mix(keys), kind="stable")
        return self._cached_order[1]
