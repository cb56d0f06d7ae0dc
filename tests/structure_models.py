"""Small structure tokenizers, for the tests of models and of what loads them."""

import torch
from golden_fill import load_arrays

from protein.structure_model import StructureModelConfig, StructureVQModel

SMALL = StructureModelConfig(
    encoder_width=24, encoder_heads=4, decoder_width=64, decoder_heads=1, decoder_layers=2, codebook_size=12,
    codebook_embed_dim=6,
)


def build(quantizer="vq", curriculum=None, config=SMALL, seed=0):
    """A model whose codes are spread over its latents, and all of whose weights matter."""
    torch.manual_seed(seed)
    model = StructureVQModel(StructureModelConfig.from_dict(config.to_dict() | {"quantizer": quantizer}), curriculum)
    with torch.no_grad():
        for parameter in [*model.encoder.parameters(), *model.decoder.parameters()]:
            parameter += 0.1 * torch.randn_like(parameter)
        if curriculum is None:
            latents = model.encode_latents(load_arrays("esm3_encoder_golden")["A_coords"])[0]
            model.quantize.init_codebook(latents, iters=3)
    return model.eval()
