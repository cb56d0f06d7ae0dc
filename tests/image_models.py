"""A tokenizer and a GPT on its codes that need no training, for tests of the commands that read them."""

import torch
from gpt_models import tiny

from autoregressive.pretrained import LoadedGPT, export_gpt
from tokenizer.pretrained import load_tokenizer, save_pretrained, tokenizer_hash
from tokenizer.vq_model import Architecture, VQModel, VQModelConfig

CODES = 32
# Of VQ-4 every kind of layer, once per level, for tests that pay for each layer.
TINY_VQ4 = Architecture(32, (1, 1), encoder_blocks=(0, 1), decoder_blocks=(0, 1), z_channels=32)


def write_tokenizer(folder, channels=1):
    """An export of 16-pixel pictures and 4 x 4 codes."""
    torch.manual_seed(0)
    return save_pretrained(VQModel(VQModelConfig("VQ-4", image_channels=channels, image_size=16, codebook_size=CODES,
                                                 codebook_embed_dim=4)), folder)


def write_gpt(folder, tokenizer, trained_classes=None, **changes):
    """An export for the codes of an export."""
    model = tiny(vocab_size=CODES, **changes)
    return export_gpt(LoadedGPT(model, tokenizer_hash(load_tokenizer(tokenizer)), "tiny", trained_classes), folder)
