"""A GPT small enough for any test, with an output that is not zero."""

import torch
from torch import nn

from autoregressive.gpt import GPT, GPTConfig

TINY = GPTConfig(n_layer=3, n_head=2, dim=32, vocab_size=20, block_size=16, num_classes=5)


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**TINY.__dict__, **changes})).eval()
    nn.init.normal_(model.output.weight)
    return model
