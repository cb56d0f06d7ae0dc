"""An export whose codes or outputs would not be the model's is refused, of every model, and leaves no file."""

import pytest
import torch
from gpt_models import tiny
from structure_models import SMALL as STRUCTURES
from structure_models import build
from torch import nn

from autoregressive.gpt import rope_table
from autoregressive.pretrained import LoadedGPT, export_gpt
from protein.pretrained import VQTokenizer
from protein.pretrained import save_pretrained as save_structures
from tokenizer import pretrained, provq, reconstruct
from tokenizer.export_probe import differing, evaluating, is_table, probe_tokens
from tokenizer.pretrained import load_tokenizer, save_pretrained, to_llamagen_state_dict, tokenizer_hash
from tokenizer.provq import QUANTIZERS, Curriculum, ProVQ, VectorQuantizer, make_quantizer
from tokenizer.runtime.checkpoint import Checkpointer
from tokenizer.vq_model import VQModel, VQModelConfig

CONFIG = VQModelConfig("VQ-4", image_channels=1, image_size=16, codebook_size=81, codebook_embed_dim=4)


class TanhGrid(VectorQuantizer):
    """FSQ with three levels per channel as somebody writes it: a table in every respect but its bounded latents."""

    def _init_table(self):
        levels = torch.tensor([-1.0, 0.0, 1.0])
        grid = torch.cartesian_prod(*[levels] * self.dim)[: self.num_codes]
        self.embedding = nn.Embedding.from_pretrained(grid, freeze=False)

    def latent(self, x):
        return super().latent(x).tanh()


class ScaledLookup(VectorQuantizer):
    """Codes reach the decoder twice as long as they are compared."""

    def lookup(self, indices):
        return 2 * super().lookup(indices)


class OtherForward(VectorQuantizer):
    """forward, which images are reconstructed with, takes other codes than encode."""

    def forward(self, x):
        out = super().forward(x)
        return provq.Quantized(out.codes, (out.indices + 1) % self.num_codes, out.losses)


def spread(quantizer):
    """Codes apart from one another, so that tokens get different ones."""
    if type(quantizer) is not TanhGrid:
        generator = torch.Generator().manual_seed(5)
        quantizer.set_codebook_(torch.randn(quantizer.num_codes, quantizer.dim, generator=generator))
    return quantizer


def model_with(quantizer_class):
    torch.manual_seed(0)
    model = VQModel(CONFIG)
    model.quantize = ProVQ(spread(quantizer_class(81, 4)), Curriculum(0, 0))
    return model


@pytest.mark.parametrize(("quantizer_class", "said"), [
    (TanhGrid, r"TanhGrid is no table of codes .* of \d+ probe tokens .* gives \d+ another code"),
    (ScaledLookup, "ScaledLookup is no table"),
    (OtherForward, "OtherForward is no table"),
])
def test_a_quantizer_that_is_no_table_is_not_exported_as_one(quantizer_class, said, tmp_path):
    model = model_with(quantizer_class).train()
    with pytest.raises(ValueError, match=f"^not exported: {said}"):
        to_llamagen_state_dict(model)
    with pytest.raises(ValueError, match="not exported"):
        save_pretrained(model, tmp_path / "export")
    assert not (tmp_path / "export").exists()
    assert all(module.training for module in model.modules())
    # Nor has it the hash of the table, which codes in a file would be taken for.
    table = VQModel(CONFIG)
    table.load_state_dict(model.state_dict())
    assert tokenizer_hash(table) == tokenizer_hash(load_tokenizer(save_pretrained(table, tmp_path / "table")))
    assert tokenizer_hash(model) != tokenizer_hash(table)


def test_the_command_refuses_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "simvq", TanhGrid)  # flags have the names of the import
    model = VQModel(VQModelConfig.from_dict(CONFIG.to_dict() | {"quantizer": "simvq"}))
    state = {"model": model.state_dict(), "ema": None, "config": model.config.to_dict(), "step": 3}
    Checkpointer(tmp_path / "run" / "checkpoints").save(3, state)
    for flag, out in (("--export-llamagen", tmp_path / "vq.pt"), ("--export-hf", tmp_path / "hf")):
        with pytest.raises(SystemExit, match="not exported: TanhGrid"):
            reconstruct.main([str(tmp_path / "run"), flag, str(out)])
        assert not out.exists()


def test_layers_that_an_export_would_lose_are_noticed(tmp_path):
    model = model_with(VectorQuantizer)
    save_pretrained(model, tmp_path / "good")
    model.decoder.register_forward_hook(lambda *args: args[2] * 1.05)
    with pytest.raises(ValueError, match="gives other images, by up to"):
        save_pretrained(model, tmp_path / "bad")
    model = model_with(VectorQuantizer)
    model.encoder.register_forward_hook(lambda *args: args[2] + 0.1)
    with pytest.raises(ValueError, match="gives other latents, by up to"):
        save_pretrained(model, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize("l2_norm", [False, True])
@pytest.mark.parametrize("name", ["vq", "simvq", "aminoaseed", "ema"])
def test_every_table_is_one(name, l2_norm):
    torch.manual_seed(3)
    quantize = ProVQ(make_quantizer(name, 300, 8, l2_norm=l2_norm), Curriculum(0, 0))
    assert is_table(quantize, l2_norm)
    quantize.quantizer.set_codebook_(torch.randn(300, 8))
    assert is_table(quantize, l2_norm)
    if not l2_norm:  # nor is a table without it; the other way round, the nearest code on the sphere is the nearest
        assert not is_table(quantize, True)


def test_codes_at_the_same_distance_are_no_difference():
    one, other = VectorQuantizer(6, 2).eval(), VectorQuantizer(6, 2).eval()
    codes = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 0)  # all twice
    one.set_codebook_(codes)
    other.set_codebook_(codes.roll(2, 0))
    tokens = probe_tokens(codes)
    with torch.no_grad():
        assert differing(one, other, tokens) == len(tokens)  # the vectors of an index differ
        other.set_codebook_(codes + 1e-7 * torch.tensor([[1.0], [-1.0]] * 3))
        assert differing(one, other, tokens) == 0


def test_modes_are_restored_one_by_one():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == [True, True, False, False]


def test_structures(tmp_path):
    model = build()
    save_structures(model, tmp_path / "good")
    table = VQTokenizer(model).hash()
    codes = model.quantize.codebook().detach()
    model.quantize.quantizer = TanhGrid(STRUCTURES.codebook_size, STRUCTURES.codebook_embed_dim)
    model.quantize.quantizer.embedding.weight.data = codes
    with pytest.raises(ValueError, match="not exported: TanhGrid is no table"):
        save_structures(model, tmp_path / "bad")
    assert VQTokenizer(model).hash() != table
    model = build()
    model.decoder.register_forward_hook(lambda *args: args[2]._replace(coords=args[2].coords + 1))
    with pytest.raises(ValueError, match="gives other coordinates"):
        save_structures(model, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_gpt(tmp_path):
    model = tiny()
    model.rope = rope_table(4, model.config.head_dim, base=100.0)  # in no state dict and in no config
    with pytest.raises(ValueError, match=r"not exported: .* gives other logits"):
        export_gpt(LoadedGPT(model, "", "tiny"), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    half = tiny().cast(torch.bfloat16)
    export_gpt(LoadedGPT(half, "", "tiny"), tmp_path / "half")


def test_the_messages_name_a_codebook_of_another_width():
    class Wide(VectorQuantizer):
        def codebook(self):
            return super().codebook()[:, :2]

        def latent(self, x):
            return super().latent(x)[:, :2]

    model = model_with(Wide)
    with pytest.raises(ValueError, match=r"the codes of Wide are \(81, 2\), no table \(K, D\) of \(81, 4\)"):
        to_llamagen_state_dict(model)
    assert len(pretrained.tokenizer_hash(model)) == 64
