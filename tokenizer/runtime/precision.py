"""TF32 on GPUs, which rounds what enters float32 products to 10 bits: one setting per process, and exact blocks in it.

Commands compute exactly (command.py). Trainers say what they want by --tf32, which config.json records.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


def set_tf32(*, convolutions: bool, matmul: bool) -> None:
    """Whether float32 convolutions and matrix products on CUDA use TF32 from here on, whatever torch's default is."""
    # By the names of before torch 2.9: setting these keeps both kinds of names readable, setting the new ones does not.
    torch.backends.cuda.matmul.allow_tf32 = matmul
    torch.backends.cudnn.allow_tf32 = convolutions


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Inside, float32 stays float32: no autocast, and on CUDA no TF32 in what runs at once (a backward comes later)."""
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            matmul, conv = torch.backends.cuda.matmul, getattr(torch.backends.cudnn, "conv", torch.backends.cudnn)
            for part in (matmul, conv):
                new = hasattr(part, "fp32_precision")  # since torch 2.9, which refuses to read the old after the new
                name, exact = ("fp32_precision", "ieee") if new else ("allow_tf32", False)
                stack.callback(setattr, part, name, getattr(part, name))
                setattr(part, name, exact)
        yield
