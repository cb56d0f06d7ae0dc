"""TF32 is what the project sets, never what torch defaults to, and exact blocks are exact whatever the host has set."""

import json
import warnings

import pytest
import torch
from code_files import write_codes
from torch import nn

from autoregressive import train_c2i
from evaluations.features import Extractor, Features
from protein import train_provq as train_structures
from tokenizer import train_provq
from tokenizer.runtime.command import command
from tokenizer.runtime.precision import exact_float32, set_tf32
from tokenizer.train_config import PRESETS, TrainConfig

CUDA = torch.device("cuda")
new_switches = pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch before 2.9")


@pytest.fixture(autouse=True)
def _torchs_own():
    yield
    set_tf32(convolutions=True, matmul=False)


def switches():
    """(matmul, convolutions), True: TF32; read as torch itself does."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize("wanted", [(True, True), (False, True), (False, False)])
def test_both_switches_are_set(wanted):
    set_tf32(matmul=wanted[0], convolutions=wanted[1])
    assert switches() == wanted
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is no CUDA here
        with exact_float32(CUDA):
            assert not torch.is_autocast_enabled("cuda")
            assert all_exact()
    assert switches() == wanted
    with exact_float32(torch.device("cpu")):
        assert switches() == wanted  # nothing to do


def all_exact():
    if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"
    return switches() == (False, False)


@new_switches
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_features_are_exact_whichever_switch_the_host_has_set(precision):
    matmul, conv, seen = torch.backends.cuda.matmul, torch.backends.cudnn.conv, []

    def run(images):
        seen.append(all_exact())
        return Features(images.float().flatten(1), None, None)

    matmul.fp32_precision = conv.fp32_precision = precision
    Extractor("own", "0" * 64, nn.Identity(), run)(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    assert seen == [True]
    assert (matmul.fp32_precision, conv.fp32_precision) == (precision, precision)


def test_commands_are_exact():
    set_tf32(convolutions=True, matmul=True)
    with command("any.py"):
        assert switches() == (False, False)


def test_the_image_trainer_keeps_products_exact_and_says_what_it_does(tmp_path, capsys):
    for words, expected in (([], (False, True)), (["--no-tf32"], (False, False))):
        train_provq.main(["--dry-run", "--device", "cpu", "--results-dir", str(tmp_path / "run"), *words])
        assert switches() == expected
        assert json.loads(capsys.readouterr().out)["tf32"] is expected[1]


def test_the_other_trainers_use_tensor_cores_unless_told_not_to(tmp_path, capsys):
    write_codes(tmp_path / "codes")
    for main, words in ((train_structures.main, ["--ideal-chains", "24"]),
                        (train_c2i.main, ["--preset", "digits", "--code-path", str(tmp_path / "codes"),
                                          "--vq-ckpt", "none"])):
        for more, expected in (([], True), (["--no-tf32"], False)):
            main(["--dry-run", "--device", "cpu", "--results-dir", str(tmp_path / "run"), *words, *more])
            assert switches() == (expected, expected)
            assert json.loads(capsys.readouterr().out)["tf32"] is expected


def test_no_preset_has_batch_norm_over_processes():
    """It waits for all ranks, and LlamaGen does not have it."""
    assert not TrainConfig.sync_batchnorm
    assert not any("sync_batchnorm" in preset for preset in PRESETS.values())


def test_batch_norm_over_processes_is_for_gpus(tmp_path):
    words = ["--device", "cpu", "--results-dir", str(tmp_path / "run"), "--sync-batchnorm", "--image-size", "32"]
    with pytest.raises(SystemExit, match="--sync-batchnorm works on GPUs only"):
        train_provq.main([*words, "--disc-weight", "0.5"])
    with pytest.raises(SystemExit, match="--sync-batchnorm needs a discriminator: --disc-weight above 0"):
        train_provq.main(words)
