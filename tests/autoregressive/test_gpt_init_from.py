"""GPTs that begin with weights of another."""

import pytest
import torch
from digit_runs import train_on_digits
from gpt_models import tiny
from test_train_c2i import flags

from autoregressive import extract_codes, train_c2i
from autoregressive.pretrained import LoadedGPT, export_gpt, load_gpt


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tokenizer's run in base/vq, the codes of the digits in base/vq/codes, a GPT for them in base/gpt."""
    base = tmp_path_factory.mktemp("begin")
    train_on_digits(base / "vq")
    extract_codes.main(["--vq-ckpt", str(base / "vq"), "--device", "cpu"])
    train_c2i.main(flags(base, base / "gpt", ema=True, max_steps=2, val_every=2, ckpt_every=2, sample_every=2))
    return base


def begun(base, run, monkeypatch, **changes):
    kept = []
    monkeypatch.setattr(train_c2i.Trainer, "train", lambda self: kept.append(self))
    train_c2i.main(flags(base, run, **changes))
    return kept[0]


def test_a_run_begins_with_the_weights(base, tmp_path, monkeypatch):
    trainer = begun(base, tmp_path, monkeypatch, init_from=base / "gpt", ema=True)
    expected = load_gpt(base / "gpt").model.state_dict()
    for state in (trainer.raw.state_dict(), trainer.ema.state_dict()):
        assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert trainer.run.start == 0
    assert not trainer.optimizer.state
    assert trainer.cfg.init_from == str(base / "gpt")


def test_llamagens_file(base, tmp_path, monkeypatch):
    torch.save({"model": load_gpt(base / "gpt").model.state_dict()}, tmp_path / "c2i.pt")
    trainer = begun(base, tmp_path / "run", monkeypatch, init_from=tmp_path / "c2i.pt")
    assert torch.equal(trainer.raw.output.weight, load_gpt(base / "gpt").model.output.weight)


def fails(words):
    with pytest.raises(SystemExit) as stopped:
        train_c2i.main(words)
    return str(stopped.value)


def test_weights_that_do_not_fit_are_refused_by_name(base, tmp_path):
    export_gpt(LoadedGPT(tiny(vocab_size=64), "", "tiny"), tmp_path / "other")
    said = fails(flags(base, tmp_path / "run", init_from=tmp_path / "other"))
    assert "n_layer 3 there, " in said
    assert "num_classes 5 there, 10 here" in said
    assert "vocab_size" not in said
    said = fails(flags(base, tmp_path / "run", init_from=tmp_path / "none"))
    assert "--init-from: no GPT at" in said


def test_codes_of_another_tokenizer_need_a_word(base, tmp_path, monkeypatch):
    train_on_digits(tmp_path / "vq", "--global-seed", "1")
    extract_codes.main(["--vq-ckpt", str(tmp_path / "vq"), "--device", "cpu"])
    words = {"init_from": base / "gpt"}
    assert "was trained on codes of another tokenizer than" in fails(flags(tmp_path, tmp_path / "run", **words))
    trainer = begun(tmp_path, tmp_path / "run", monkeypatch, other_tokenizer=True, **words)
    assert torch.equal(trainer.raw.output.weight, load_gpt(base / "gpt").model.output.weight)
