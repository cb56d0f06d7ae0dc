"""Training and sampling of GPTs from the command line: resume, processes, sharding, mistakes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from digit_runs import train_on_digits
from gpt_models import tiny
from PIL import Image
from places import ROOT

from autoregressive import extract_codes, sample_c2i, sharding, train_c2i
from autoregressive.pretrained import load_gpt
from autoregressive.train_config import TrainConfig
from tokenizer import train_provq
from tokenizer.runtime.metrics import TIMING_FIELDS
from tokenizer.runtime.optim import build_adamw, learning_rate

TIMINGS = set(TIMING_FIELDS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tokenizer's run on the digits, and their codes in base/vq/codes."""
    base = tmp_path_factory.mktemp("c2i")
    train_on_digits(base / "vq")
    extract_codes.main(["--vq-ckpt", str(base / "vq"), "--device", "cpu"])
    return base


def flags(base, run, **changes):
    values = {"preset": "digits", "code_path": base / "vq" / "codes", "vq_ckpt": base / "vq", "results_dir": run,
              "max_steps": 12, "global_batch_size": 8, "lr_warmup_steps": 2, "log_every": 2, "val_every": 6,
              "ckpt_every": 4, "sample_every": 12, "val_size": 20, "device": "cpu"} | changes
    out = []
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        out += ["--no-" + flag[2:]] if value is False else [flag] if value is True else [flag, str(value)]
    return out


def torchrun(processes, script, words, timeout=300):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}",
               str(ROOT / "autoregressive" / script), *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert result.returncode == 0, result.stderr[-3000:]


def rows(run, name="metrics"):
    lines = [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in lines]


def weights(run):
    return load_gpt(run, weights="model").model.state_dict()


def equal(first, second):
    return all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture(scope="module")
def straight(base):
    train_c2i.main(flags(base, base / "straight", ema=True))
    return base / "straight"


def test_a_run_leaves_what_it_promises(straight):
    assert [row["step"] for row in rows(straight)] == [1, 2, 4, 6, 8, 10, 12]
    assert {"loss", "accuracy", "grad_norm", "lr"} <= set(rows(straight)[0])
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["step"] == 12
    assert {"code_fingerprint", "tokenizer_hash"} == summary["inputs"].keys()
    assert summary["val_loss"] < 4.2  # log 64 = 4.16 at the start
    assert rows(straight)[-1]["loss"] < rows(straight)[0]["loss"]
    assert Image.open(straight / "samples" / "0000012.png").size[0] > 16
    best = load_gpt(straight / "checkpoints" / "best.pt", weights="ema")
    assert not equal(best.model.state_dict(), weights(straight))


def test_a_killed_run_continues_bit_for_bit(base, straight, tmp_path):
    run = tmp_path / "run"
    words = flags(base, run, ema=True)
    process = subprocess.Popen([sys.executable, str(ROOT / "autoregressive" / "train_c2i.py"), *words],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(run.glob("checkpoints/0*.pt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert list(run.glob("checkpoints/0*.pt"))
    train_c2i.main(words)
    assert rows(run) == rows(straight)
    assert rows(run, "validation") == rows(straight, "validation")
    assert equal(weights(run), weights(straight))


QUIET = {"class_dropout_prob": 0, "dropout_p": 0, "token_dropout_p": 0}


@pytest.fixture(scope="module")
def quiet(base):
    """Without dropout, whose random numbers depend on the process."""
    train_c2i.main(flags(base, base / "quiet", ema=True, **QUIET))
    return base / "quiet"


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_two_processes_train_as_one(base, quiet, tmp_path, mode):
    words = flags(base, tmp_path / mode, ema=True, data_parallel=mode, **QUIET)
    torchrun(2, "train_c2i.py", words)
    for one, two in zip(rows(quiet), rows(tmp_path / mode), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    for one, two in zip(rows(quiet, "validation"), rows(tmp_path / mode, "validation"), strict=True):
        assert two["val_loss"] == pytest.approx(one["val_loss"], abs=1e-4)
    first, second = weights(quiet), weights(tmp_path / mode)
    assert max((first[k] - second[k]).abs().max().item() for k in first) < 2e-3  # Adam's steps are 1e-3 in sign
    if mode == "fsdp":  # checkpoints hold whole tensors, and resume
        shutil.rmtree(tmp_path / mode / "samples")
        (tmp_path / mode / "checkpoints" / "0000012.pt").unlink()
        (tmp_path / mode / "summary.json").unlink()
        before = rows(tmp_path / mode)
        torchrun(2, "train_c2i.py", words)
        assert rows(tmp_path / mode) == before
        assert equal(weights(tmp_path / mode), second)
        (tmp_path / mode / "checkpoints" / "0000012.pt").unlink()  # and go on as copies
        train_c2i.main(flags(base, tmp_path / mode, ema=True, data_parallel="ddp", **QUIET))
        for one, two in zip(rows(tmp_path / mode), before, strict=True):
            assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
        assert max((weights(tmp_path / mode)[k] - second[k]).abs().max().item() for k in second) < 2e-3


def test_optimizers_go_from_copies_to_shards_and_back():
    """Numbers of parameters become names, those of an older checkpoint too, whatever the order in a group."""
    model = tiny()
    optimizer = build_adamw(model, TrainConfig())
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    state, names = optimizer.state_dict(), sharding._names(model, optimizer)
    named = sharding._relabelled(state, dict(enumerate(names)))
    assert named["state"]["output.weight"]["exp_avg"].shape == model.output.weight.shape
    assert sharding._relabelled(named, dict(enumerate(names))) == named
    named["param_groups"] = [group | {"params": group["params"][::-1]} for group in named["param_groups"]]
    other = build_adamw(model, TrainConfig())
    sharding.ReplicatedOptimizer(model, other).load_state_dict(named)
    for parameter, values in optimizer.state.items():
        assert torch.equal(other.state[parameter]["exp_avg"], values["exp_avg"])
    with pytest.raises(ValueError, match=r"its parameters are others \(\d+ there, \d+ in"):
        sharding._relabelled({"state": {}, "param_groups": [{"params": [*names, "more"]}]}, dict(enumerate(names)))


def test_accumulation_changes_rounding_only(base, tmp_path):
    train_c2i.main(flags(base, tmp_path, gradient_accumulation_steps=4, max_steps=4, ema=True, lr_schedule="constant",
                         **QUIET))
    train_c2i.main(flags(base, tmp_path / "one", max_steps=4, ema=True, lr_schedule="constant", **QUIET))
    for one, four in zip(rows(tmp_path / "one"), rows(tmp_path), strict=True):
        assert four["loss"] == pytest.approx(one["loss"], abs=1e-5)


def test_learning_rates():
    cfg = TrainConfig(lr=1.0, min_lr=0.1, lr_warmup_steps=4, max_steps=14, lr_schedule="linear")
    assert [learning_rate(cfg, t) for t in (0, 3, 4, 9, 14)] == pytest.approx([0.25, 1, 1, 0.55, 0.1])
    assert learning_rate(replace(cfg, lr_schedule="cosine"), 9) == pytest.approx(0.55)
    assert learning_rate(replace(cfg, lr_schedule="constant"), 13) == 1


@pytest.mark.parametrize(("changes", "said"), [
    ({"code_path": "/no/codes"}, "--code-path: /no/codes is no folder of codes"),
    ({"vq_ckpt": "/no/vq"}, "/no/vq"),
    ({"global_batch_size": 9, "gradient_accumulation_steps": 2}, "--global-batch-size 9 must be a multiple of 2"),
    ({"epochs": 3}, "one of --max-steps and --epochs"),
    ({"gpt_model": "GPT-S"}, "--gpt-model"),
    ({"lr": -1}, "--lr is -1"),
    ({"data_parallel": "fsdp"}, "start at least 2 with torchrun"),
    ({"val_size": 0}, "no image is held out"),
    ({"dropout_p": 1.5}, "--dropout-p is 1.5"),
])
def test_mistakes_are_named_before_anything_is_written(base, tmp_path, capsys, changes, said):
    with pytest.raises(SystemExit) as caught:
        train_c2i.main(flags(base, tmp_path / "run", **changes))
    assert said in str(caught.value) + capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_damaged_codes_are_refused_before_training(base, tmp_path):
    shutil.copytree(base / "vq" / "codes", tmp_path / "codes")
    shard = sorted((tmp_path / "codes").glob("codes-*"))[0]
    array = np.load(shard)
    array[3, 0, 0] = 200
    np.save(shard, array)
    with pytest.raises(SystemExit, match=f"--code-path: .*{shard.name} is not the file .*extract_codes.py"):
        train_c2i.main(flags(base, tmp_path / "run", code_path=tmp_path / "codes"))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_is_no_gpt(base, tmp_path):
    words = ["--gpt-ckpt", str(base / "vq"), "--device", "cpu", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=f"{base / 'vq'} is of a tokenizer, not of a GPT: its config.json has no"):
        sample_c2i.main(words)
    with pytest.raises(SystemExit, match="checkpoints is of a tokenizer, not of a GPT"):
        sample_c2i.main([*words, "--vq-ckpt", str(base / "vq")])
    assert not (tmp_path / "out").exists()


def test_codes_of_another_tokenizer_are_refused(base, tmp_path):
    words = "--image-size 16 --codebook-size 64 --global-batch-size 16 --max-steps 2 --warmup-steps 0".split()
    train_provq.main([*words, "--transition-steps", "0", "--device", "cpu", "--results-dir", str(tmp_path / "other")])
    with pytest.raises(SystemExit, match="is not the tokenizer that made the codes"):
        train_c2i.main(flags(base, tmp_path / "run", vq_ckpt=tmp_path / "other"))
    train_c2i.main(flags(base, tmp_path / "run", vq_ckpt=tmp_path / "other", other_tokenizer=True, max_steps=2))


def test_another_experiment_cannot_resume_a_run(base, straight):
    before = (straight / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit, match=r"lr: 0.001 there, 0.5 now"):
        train_c2i.main(flags(base, straight, ema=True, lr=0.5))
    with pytest.raises(SystemExit, match=r"max_steps: 12 there, 24 now\)\. With --lr-schedule cosine the learn"):
        train_c2i.main(flags(base, straight, ema=True, max_steps=24))
    assert (straight / "metrics.jsonl").read_bytes() == before


# ---------------------------------------------------------------------------------------------------- samples


def pictures(out):
    return [p.read_bytes() for p in sorted((out / "images").iterdir())]


@pytest.fixture(scope="module")
def samples(straight, base):
    sample_c2i.main(["--gpt-ckpt", str(straight), "--num-samples", "25", "--batch-size", "6", "--device", "cpu",
                     "--out", str(base / "samples")])
    return base / "samples"


def test_samples_are_balanced_and_written_for_evaluation(samples):
    assert np.load(samples / "labels.npy").tolist() == [i % 10 for i in range(25)]
    with np.load(samples / "samples.npz") as file:
        array = file["arr_0"]
    assert (array.shape, array.dtype) == ((25, 16, 16, 3), np.uint8)
    for i in (0, 24):
        picture = np.asarray(Image.open(samples / "images" / f"{i:06d}.png").convert("RGB"))
        np.testing.assert_array_equal(array[i], picture)
    assert Image.open(samples / "grid.png").size == (34 + 3 * 18, 10 * 18)


def test_processes_change_no_picture(straight, samples, tmp_path):
    words = ["--gpt-ckpt", str(straight), "--num-samples", "25", "--batch-size", "6", "--device", "cpu"]
    torchrun(2, "sample_c2i.py", [*words, "--out", str(tmp_path / "two")])
    assert pictures(tmp_path / "two") == pictures(samples)
    assert (tmp_path / "two" / "samples.npz").read_bytes()[:200] == (samples / "samples.npz").read_bytes()[:200]


def test_interrupted_sampling_continues(straight, samples, tmp_path, monkeypatch):
    words = ["--gpt-ckpt", str(straight), "--num-samples", "25", "--batch-size", "6", "--device", "cpu",
             "--out", str(tmp_path / "some")]
    shutil.copytree(samples, tmp_path / "some")
    for i in (7, 20):
        (tmp_path / "some" / "images" / f"{i:06d}.png").unlink()
    (tmp_path / "some" / "samples.npz").unlink()
    calls = []
    real = sample_c2i.draw_batch
    monkeypatch.setattr(sample_c2i, "draw_batch", lambda *args: calls.append(1) or real(*args))
    sample_c2i.main(words)
    assert len(calls) == 2
    assert pictures(tmp_path / "some") == pictures(samples)
    assert (tmp_path / "some" / "samples.npz").is_file()
    with pytest.raises(SystemExit, match=r"made otherwise .*temperature: 1.0 there, 0.5 now"):
        sample_c2i.main([*words, "--temperature", "0.5"])


def test_the_newest_finished_run_is_taken(straight, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"runs/ holds no finished GPT(.|\n)*python autoregressive/train_c2i.py"):
        sample_c2i.main([])
    shutil.copytree(straight, tmp_path / "runs" / "old")
    shutil.copytree(straight, tmp_path / "runs" / "new")
    shutil.copytree(straight, tmp_path / "runs" / "unfinished")
    (tmp_path / "runs" / "unfinished" / "summary.json").unlink()
    os.utime(tmp_path / "runs" / "old" / "summary.json", (1, 1))
    sample_c2i.main(["--num-samples", "2", "--batch-size", "2", "--device", "cpu", "--classes", "3,4"])
    assert "sampling from runs/new" in capsys.readouterr().out
    assert len(list((tmp_path / "runs" / "new" / "samples").glob("*/grid.png"))) == 1


@pytest.mark.parametrize(("more", "said"), [
    (["--classes", "3,11"], "--classes 3,11: give numbers from 0 to 9"),
    (["--gpt-ckpt", "/no/gpt"], "--gpt-ckpt /no/gpt does not exist"),
    (["--image-size", "17"], "--image-size 17 must be a multiple of 4"),
    (["--image-size", "2"], "--image-size 2 must be a multiple of 4"),
    (["--image-size", "32"], "is for 16 codes per image, not 64"),
    (["--vq-ckpt", "/no/vq"], "/no/vq"),
])
def test_wrong_requests_are_named(straight, tmp_path, more, said):
    with pytest.raises(SystemExit) as caught:
        sample_c2i.main(["--gpt-ckpt", str(straight), "--device", "cpu", "--out", str(tmp_path / "out"), *more])
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["gpt", "tokenizer_hash"])
def test_an_export_without_a_key_is_named(straight, base, tmp_path, key):
    sample_c2i.main(["--gpt-ckpt", str(straight), "--device", "cpu", "--export-hf", str(tmp_path / "hf")])
    description = json.loads((tmp_path / "hf" / "config.json").read_text())
    del description[key]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(description))
    with pytest.raises(SystemExit, match=f"config.json has no '{key}'"):
        sample_c2i.main(["--gpt-ckpt", str(tmp_path / "hf"), "--vq-ckpt", str(base / "vq"), "--device", "cpu"])


def test_an_export_samples_the_same(straight, base, samples, tmp_path):
    sample_c2i.main(["--gpt-ckpt", str(straight), "--device", "cpu", "--export-hf", str(tmp_path / "hf")])
    sample_c2i.main(["--gpt-ckpt", str(tmp_path / "hf"), "--vq-ckpt", str(base / "vq"), "--num-samples", "25",
                     "--batch-size", "6", "--device", "cpu", "--out", str(tmp_path / "out")])
    assert pictures(tmp_path / "out") == pictures(samples)
