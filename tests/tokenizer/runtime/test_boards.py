"""What TensorBoard shows of a run, and Weights & Biases, which mirrors it."""

import sys
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import to_words

from tokenizer import train_provq

SETTINGS = {"image_size": 16, "global_batch_size": 8, "val_size": 16, "codebook_size": 16, "max_steps": 6,
            "log_every": 2, "val_every": 3, "ckpt_every": 3, "warmup_steps": 2, "transition_steps": 2,
            "kmeans_batches": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    folder = tmp_path_factory.mktemp("board") / "run"
    train_provq.main(to_words(SETTINGS | {"results_dir": folder}))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_scalars_of_training_and_validation(board):
    names = set(board.Tags()["scalars"])
    assert {"loss", "alpha", "usage", "latent_spread", "codes_moved"} <= names
    assert {"validation/psnr", "validation/ssim", "validation/usage"} <= names
    assert [event.step for event in board.Scalars("validation/psnr")] == [3, 6]


def test_reconstructions_and_uses_of_codes_at_stage_boundaries(board):
    pictures, histograms = board.Images("reconstructions"), board.Histograms("uses_of_a_code")
    assert len(pictures) >= 3
    assert (pictures[0].width, pictures[0].height) == (8 * 18 + 2, 2 * 18 + 2)  # a margin of 2 around each
    assert histograms[-1].histogram_value.num == 16
    assert histograms[-1].histogram_value.sum == 16 * 4 * 4  # tokens of the validation images


def test_wandb_mirrors_tensorboard_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    calls = []
    fake = SimpleNamespace(init=lambda **options: calls.append(options), Error=RuntimeError,
                           __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for steps in (5, 6):
        train_provq.main(to_words(SETTINGS | {"results_dir": tmp_path / "mine", "wandb": "codes", "max_steps": steps}))
    first, second = calls
    assert first["project"] == "codes"
    assert first["sync_tensorboard"]
    assert first["config"]["max_steps"] == 5
    assert (first["name"], first["resume"], first["dir"]) == ("mine", "allow", str(tmp_path / "mine"))
    assert first["id"] == second["id"] != ""


def test_wandb_that_cannot_start_ends_in_one_line(tmp_path, monkeypatch):
    def init(**_):
        raise RuntimeError("no API key\nconfigured")

    fake = SimpleNamespace(init=init, Error=RuntimeError, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with pytest.raises(SystemExit, match="--wandb codes: no API key configured"):
        train_provq.main(to_words(SETTINGS | {"results_dir": tmp_path / "mine", "wandb": "codes"}))


def test_wandb_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("tokenizer.runtime.run_config.find_spec", {}.get)
    with pytest.raises(SystemExit, match="--wandb codes needs a package: pip install wandb"):
        train_provq.main(to_words(SETTINGS | {"results_dir": tmp_path / "mine", "wandb": "codes"}))
    assert not (tmp_path / "mine").exists()
