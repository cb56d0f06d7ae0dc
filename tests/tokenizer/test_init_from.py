"""Image tokenizers that begin with weights of another: of runs, exports and LlamaGen's files."""

import json
import shutil

import pytest
import torch
from digit_runs import train_on_digits
from test_train_provq import fails, flags
from training_runs import NO_KMEANS, assert_same_run, kill_at_step, rows

from tokenizer import train_provq
from tokenizer.pretrained import load_tokenizer, save_pretrained, to_llamagen_state_dict
from tokenizer.runtime.checkpoint import load_file

DIGITS = {"codebook_size": 64, "global_batch_size": 16, "kmeans_batches": 4}  # as digit_runs
VANILLA = {"warmup_steps": 0, "transition_steps": 0} | NO_KMEANS
CODES = "quantize.quantizer.embedding.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A trained run in RUN, and its weights as an export and as LlamaGen has them."""
    folder = tmp_path_factory.mktemp("source")
    train_on_digits(folder / "run")
    model = load_tokenizer(folder / "run")
    save_pretrained(model, folder / "export")
    torch.save({"model": to_llamagen_state_dict(model)}, folder / "vq.pt")
    return folder


@pytest.fixture
def begun(monkeypatch):
    """Flags -> the trainer, before its first step."""
    def begin(words):
        kept = []
        with monkeypatch.context() as patch:
            patch.setattr(train_provq.Trainer, "train", lambda self: kept.append(self))
            train_provq.main(words)
        return kept[0]

    return begin


def same(a, b, but=()):
    return all(torch.equal(a[key], b[key]) for key in a if not key.startswith(("quantize.", *but)))


@pytest.mark.parametrize("name", ["run", "export", "vq.pt"])
def test_a_run_begins_with_the_weights_at_step_0(source, tmp_path, begun, capsys, name):
    trainer = begun(flags(tmp_path, init_from=source / name, ema=True, **DIGITS | VANILLA))
    expected = load_tokenizer(source / name, codebook_l2_norm=False)
    for state in (trainer.raw.state_dict(), trainer.ema.state_dict()):
        assert same(expected.state_dict(), state)
        assert torch.equal(state[CODES], expected.quantize.codebook())
        assert int(state["quantize.step"]) == 0
    assert not trainer.optimizer.state
    said = capsys.readouterr().out
    assert f"--init-from {source / name}: its weights, with its codes" in said
    assert ("taken as --no-codebook-l2-norm, LlamaGen's default is --codebook-l2-norm" in said) == (name == "vq.pt")


def test_a_new_curriculum_places_its_own_codes_of_any_number(source, tmp_path, capsys):
    words = flags(tmp_path, init_from=source / "run", codebook_size=32, global_batch_size=16)
    train_provq.main(words)
    assert "its weights, without its codes" in (said := capsys.readouterr().out)
    assert "codebook initialised at step 4" in said
    assert [row["stage"] for row in rows(tmp_path)] == [1] * 4 + [2] * 4 + [3] * 4
    assert json.loads((tmp_path / "config.json").read_text())["init_from"] == str(source / "run")
    fresh = tmp_path / "fresh"
    train_provq.main(flags(fresh, codebook_size=32, global_batch_size=16))
    assert rows(tmp_path)[0]["recon_loss"] < 0.8 * rows(fresh)[0]["recon_loss"]


def test_codes_of_a_trained_tokenizer_placed_anew(source, tmp_path, capsys):
    """The recipe of tokenizer/README.md: k-means of what it gives, then the transition, without a warm-up."""
    train_provq.main(flags(tmp_path, init_from=source / "export", codebook_size=64, global_batch_size=16,
                           warmup_steps=0, transition_steps=0.5, codebook_init="kmeans", kmeans_batches=4))
    assert "codebook initialised at step 0" in capsys.readouterr().out
    assert [row["stage"] for row in rows(tmp_path)] == [2] * 6 + [3] * 6


def test_a_resumed_run_does_not_read_them_again(source, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(source / "export", copy)
    words = {"init_from": copy, **DIGITS}
    train_provq.main(flags(tmp_path / "straight", **words))
    kill_at_step(monkeypatch, train_provq.main, train_provq.Trainer, flags(tmp_path / "killed", **words), 6)
    shutil.rmtree(copy)
    train_provq.main(flags(tmp_path / "killed", **words))
    assert_same_run(tmp_path / "straight", tmp_path / "killed", 12)


def test_weights_of_the_warm_up_go_on_with_k_means(tmp_path, capsys):
    train_provq.main(flags(tmp_path / "first", stop_after="warmup"))
    words = {"init_from": tmp_path / "first", "warmup_steps": 0, "transition_steps": 4}
    said = fails(flags(tmp_path / "second", **words | NO_KMEANS), capsys)
    assert f"--init-from {tmp_path / 'first'} is still in its warm-up: it has no codes to keep. Place some" in said
    train_provq.main(flags(tmp_path / "second", **words, codebook_init="kmeans", max_steps=6))
    assert rows(tmp_path / "second")[-1]["stage"] == 3


@pytest.mark.parametrize(("changes", "said"), [
    ({"image_channels": 3}, "--image-channels 1 there, 3 here"),
    ({"vq_model": "VQ-8"}, "--vq-model VQ-4 there, VQ-8 here"),
    ({"codebook_embed_dim": 4}, "--codebook-embed-dim 8 there, 4 here"),
    ({**VANILLA, "codebook_size": 32}, "--codebook-size 64 there, 32 here); give its settings, or other weights, or "
                                       "place new codes: a --warmup-steps above 0, or --codebook-init kmeans"),
    ({**VANILLA, "quantizer": "simvq"}, "--quantizer vq there, simvq here"),
    ({"codebook_l2_norm": True}, "records codebook_l2_norm=False, not True"),
    ({"init_from": "/no/such/place"}, "--init-from: /no/such/place: no such file"),
    ({"init_from": __file__}, "--init-from: "),
])
def test_weights_that_do_not_fit_are_refused_by_name(source, tmp_path, capsys, changes, said):
    words = {"init_from": source / "run", **DIGITS} | changes
    assert said in (found := fails(flags(tmp_path / "new", **words), capsys))
    assert found.count("train_provq.py: error: ") == 1
    assert not (tmp_path / "new" / "metrics.jsonl").exists()


def test_the_average_is_what_a_run_begins_with(tmp_path, begun):
    """Weights are chosen as every command chooses them: the average, where there is one."""
    train_on_digits(tmp_path / "run", "--ema")
    trainer = begun(flags(tmp_path / "new", init_from=tmp_path / "run", **DIGITS))
    saved = load_file(next((tmp_path / "run" / "checkpoints").glob("0*.pt")))
    assert same(saved["ema"], trainer.raw.state_dict())
    assert not same(saved["model"], trainer.raw.state_dict())
