"""How fast a run is and how much memory it needs, for its log rows: tokens per second, MFU, peak memory."""

import resource
import sys
from collections.abc import Callable
from typing import Any

import torch

from tokenizer.runtime import distributed

# Of dense matrix products in bf16 or fp16, TF32, float32, in 1e12 FLOP/s, as the makers' data sheets have them. The
# first whose words are all in the device's name counts.
PEAKS: dict[str, tuple[float, float, float]] = {
    "B200": (2250, 1125, 75), "GH200": (989, 495, 67), "H200 NVL": (835, 418, 60), "H200": (989, 495, 67),
    "H100 PCIe": (756, 378, 51), "H100 NVL": (835, 418, 60), "H100": (989, 495, 67), "H800": (989, 495, 67),
    "A100": (312, 156, 19.5), "A800": (312, 156, 19.5), "L40S": (362, 183, 91.6), "A10": (125, 62.5, 31.2),
}


def peak_flops(name: str, precision: str, tf32: bool) -> float | None:
    """FLOP/s of the device called `name` at --mixed-precision and --tf32; None: not in PEAKS."""
    words = name.replace("-", " ").split()  # A100-SXM4-80GB
    found = next((peak for device, peak in PEAKS.items() if all(word in words for word in device.split())), None)
    return None if found is None else 1e12 * found[0 if precision != "none" else 1 if tf32 else 2]


def count_flops(forward: Callable[[], object]) -> int:
    """Of the matrix products, convolutions and attention in a call. Computes nothing, on whatever device."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # here because Triton comes with them
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        forward()
    return counter.get_total_flops()


class Throughput:
    """Entries of a log row from the samples of all ranks since the last one, and their seconds.

    tokens: per sample. forward: what a sample costs, as in `count_flops`; a training step is taken to cost three times
    as much. It is called once, on devices of PEAKS only: on others there is no MFU.
    """

    FIELDS = ("tokens_per_second", "mfu", "peak_memory_gib")

    def __init__(self, cfg: Any, device: torch.device, tokens: float, forward: Callable[[], object]) -> None:
        self.device, self.tokens = device, tokens
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = peak_flops(name, cfg.mixed_precision, cfg.tf32)
        self.flops = 0 if self.peak is None else 3 * count_flops(forward)

    def entries(self, samples_per_second: float) -> dict[str, float]:
        """tokens_per_second of all ranks; mfu: share of the devices' peak, in [0, 1]; peak_memory_gib of this rank, on
        a GPU since the last call, of a CPU process since it began.
        """
        row = {"tokens_per_second": samples_per_second * self.tokens}
        if self.peak is not None:
            row["mfu"] = samples_per_second * self.flops / (self.peak * distributed.world_size())
        if self.device.type == "cuda":
            used = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return row | {"peak_memory_gib": used / 2**30}
