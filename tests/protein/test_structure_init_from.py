"""Structure tokenizers that begin with weights of another."""

import pytest
import torch
from test_train_structures import TRANSITION, WARMUP, flags
from training_runs import NO_KMEANS, rows

from protein import train_provq
from protein.pretrained import load_structure_model, load_structure_tokenizer, save_pretrained


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    train_provq.main(flags(folder / "run", ema=True, ckpt_every=9))
    save_pretrained(load_structure_tokenizer(folder / "run").model, folder / "export")
    return folder


@pytest.mark.parametrize("name", ["run", "export"])
def test_without_a_warm_up_codes_stay(source, tmp_path, monkeypatch, name):
    """Not so without --init-from: StructTokenBench draws them among latents."""
    kept = []
    monkeypatch.setattr(train_provq.Trainer, "train", lambda self: kept.append(self))
    train_provq.main(flags(tmp_path, init_from=source / name, warmup_steps=0, transition_steps=0, **NO_KMEANS))
    expected, state = load_structure_model(source / name), kept[0].raw.state_dict()
    assert kept[0].cfg.codebook_init == "none"
    assert torch.equal(kept[0].raw.quantize.codebook(), expected.quantize.codebook())
    assert all(torch.equal(value, state[key]) for key, value in expected.state_dict().items()
               if not key.startswith("quantize."))


def test_a_curriculum_begins_again_from_step_0(source, tmp_path, capsys):
    train_provq.main(flags(tmp_path, init_from=source / "run", codebook_size=12))
    assert "its weights, without its codes" in capsys.readouterr().out
    assert [row["stage"] for row in rows(tmp_path)] == [1] * WARMUP + [2] * TRANSITION + [3] * 3


@pytest.mark.parametrize(("changes", "said"), [
    ({"decoder_heads": 4}, "--decoder-heads 2 there, 4 here"),  # no shape tells it
    ({"encoder_width": 64}, "--encoder-width 32 there, 64 here"),
    ({"warmup_steps": 0, "codebook_size": 12, **NO_KMEANS}, "--codebook-size 16 there, 12 here"),
    ({"init_from": "/no/such/place"}, "--init-from: "),
])
def test_weights_that_do_not_fit_are_refused_by_name(source, tmp_path, changes, said):
    with pytest.raises(SystemExit, match=said):
        train_provq.main(flags(tmp_path, **{"init_from": source / "run"} | changes))
