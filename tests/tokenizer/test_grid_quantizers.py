"""FSQ and LFQ as quantizers of a trainer: encode takes the codes that forward takes, and nothing places them."""

import json
import sys

import pytest
import torch
from digit_runs import train_on_digits
from training_runs import assert_same_run, rows

from tokenizer import provq
from tokenizer.choices import GRIDS
from tokenizer.export_probe import is_table
from tokenizer.grid_quantizers import GridQuantizer
from tokenizer.pretrained import load_tokenizer, save_pretrained, to_llamagen_state_dict, tokenizer_hash
from tokenizer.provq import Curriculum, ProVQ
from tokenizer.quantizer_config import grid_channels

CHANNELS = {"fsq": "2", "lfq": "6"}  # of 64 codes


@pytest.mark.parametrize(("name", "size", "channels"), [("fsq", 4096, 4), ("fsq", 16384, 5), ("lfq", 4096, 12)])
def test_codes_of_forward_encode_and_lookup_are_the_same(name, size, channels):
    assert grid_channels(name, size) == channels
    quantize = ProVQ(GridQuantizer(name, size), Curriculum(0, 0), channel_dim=-1).eval()
    x = 2 * torch.randn(2000, channels, generator=torch.Generator().manual_seed(0))
    out = quantize(x)
    assert torch.equal(out.indices, quantize.encode(x))
    torch.testing.assert_close(out.quantized, quantize.decode(out.indices))
    codes = quantize.codebook()
    assert codes.shape == (size, channels)
    assert len(codes.unique(dim=0)) == size
    assert torch.equal(quantize.encode(codes) if name == "lfq" else torch.arange(size), torch.arange(size))
    assert is_table(quantize, l2_norm=False) is (name == "lfq")


@pytest.mark.parametrize("name", GRIDS)
def test_the_whole_curriculum_with_resume_and_export(name, tmp_path):
    flags = ["--quantizer", name, "--codebook-embed-dim", CHANNELS[name], "--log-every", "2", "--val-every", "2",
             "--kmeans-batches", "0"]
    train_on_digits(tmp_path / "straight", *flags)
    train_on_digits(tmp_path / "twice", *flags, "--max-steps", "4")
    train_on_digits(tmp_path / "twice", *flags)
    assert_same_run(tmp_path / "straight", tmp_path / "twice", 6)
    assert [row["stage"] for row in rows(tmp_path / "straight")] == [1, 1, 2, 3]  # steps 1, 2, 4, 6
    model = load_tokenizer(tmp_path / "straight")
    loaded = load_tokenizer(save_pretrained(model, tmp_path / "export"))
    kept = json.loads((tmp_path / "export" / "config.json").read_text())["tokenizer"]["quantizer"]
    assert kept == ("vq" if name == "lfq" else "fsq")
    x = torch.rand(4, 1, 16, 16) * 2 - 1
    assert torch.equal(loaded.encode(x), model.encode(x))
    torch.testing.assert_close(loaded.decode_code(model.encode(x)), model.decode_code(model.encode(x)))
    assert tokenizer_hash(loaded) == tokenizer_hash(model)
    if name == "fsq":
        with pytest.raises(ValueError, match="not exported: GridQuantizer is no table"):
            to_llamagen_state_dict(model)
    assert torch.equal(provq.load(tmp_path / "export").encode(x, value_range=(-1, 1)), model.encode(x))


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("index", [-1, 64])
def test_codes_that_do_not_exist_are_no_codes(name, index):
    """A grid's arithmetic would go on and give another code."""
    quantizer = GridQuantizer(name, 64)
    with pytest.raises(IndexError, match=f"codes {min(index, 3)} to {max(index, 3)} of 64"):
        quantizer.lookup(torch.tensor([3, index]))
    if index > 0:
        with pytest.raises(IndexError, match="of 64"):
            ProVQ(quantizer, Curriculum(0, 0)).decode(torch.tensor([[index]]))


@pytest.mark.parametrize(("flags", "said"), [
    (["--codebook-embed-dim", "8"], "--codebook-embed-dim is 8; it must be 2, the channels of fsq with 64 codes"),
    (["--codebook-size", "100"], "--codebook-size is 100; it does not fit fsq: .*2\\^n >= 4"),
    (["--codebook-init", "kmeans"], "--codebook-init: the codes of --quantizer fsq lie on a fixed grid"),
    (["--recluster"], "--recluster: the codes"), (["--codebook-lr-scale", "2"], "--codebook-lr-scale: the codes"),
    (["--codebook-l2-norm"], "--codebook-l2-norm is True; it has no effect on the fixed grid of fsq"),
    (["--commit-loss-beta", "1"], "--commit-loss-beta is 1.0; it has no effect"),
])
def test_what_needs_codes_to_place_is_refused(flags, said, tmp_path):
    with pytest.raises(SystemExit, match=said):
        train_on_digits(tmp_path / "run", "--quantizer", "fsq", "--codebook-embed-dim", "2", "--kmeans-batches", "0",
                        *flags)
    assert not (tmp_path / "run").exists()


def test_without_the_package_the_message_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(ValueError, match="the quantizer fsq needs a package: pip install vector-quantize-pytorch"):
        GridQuantizer("fsq", 64)
