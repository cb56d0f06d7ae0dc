"""Options of the trainers that are not in the paper: exact on resume, without effect when off, refused by name."""

import json

import pytest
import torch
import training_runs
from test_train_provq import STEPS, TRANSITION, WARMUP, flags
from training_runs import Killed, assert_same_run, kill_at_step, rows

from tokenizer import train_provq
from tokenizer.curriculum import CurriculumConfig, check_curriculum
from tokenizer.runtime.checkpoint import load_file
from tokenizer.runtime.optim import learning_rate, scale_learning_rate, set_learning_rate

TABLE = "quantize.quantizer.embedding.weight"


def checkpoint(run_dir, step):
    return load_file(run_dir / "checkpoints" / f"{step:07d}.pt")


# ------------------------------------------------------------------------------------------- learning rate of codes

def test_scaled_parameters_have_groups_of_their_own_and_schedules_keep_the_ratio():
    a, b, c = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    groups = [{"params": [a, b], "weight_decay": 0.5}, {"params": [c], "weight_decay": 0.0}]
    assert scale_learning_rate(groups, [b], 1.0, 0.1) is groups
    optimizer = torch.optim.AdamW(scale_learning_rate(groups, [b], 10.0, 0.1), lr=0.1)
    found = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(1, 0.1, 0.5), (1, 1.0, 0.5), (1, 0.1, 0.0)]
    assert optimizer.param_groups[1]["params"][0] is b
    cfg = CurriculumConfig()
    object.__setattr__(cfg, "lr", 0.1)
    for name, value in {"lr_warmup_steps": 4, "lr_schedule": "cosine", "min_lr": 0.01, "max_steps": 20}.items():
        object.__setattr__(cfg, name, value)
    for step in (0, 3, 10, 19):
        lr = learning_rate(cfg, step)
        set_learning_rate(optimizer, lr)
        assert [g["lr"] for g in optimizer.param_groups] == [lr, 10 * lr, lr]


@pytest.mark.parametrize(("quantizer", "moved"), [("vq", TABLE), ("simvq", "quantize.quantizer.map.weight")])
def test_codes_alone_move_at_the_scaled_rate(tmp_path, quantizer, moved):
    """Adam's first step is the learning rate: that of the codes comes right after k-means has made it forget."""
    for scale in (1, 10):
        train_provq.main(flags(tmp_path / str(scale), quantizer=quantizer, codebook_lr_scale=scale, keep_checkpoints=99,
                               max_steps=WARMUP + TRANSITION + 1, max_grad_norm=0))
    steps, others = {}, {}
    for scale in (1, 10):
        after = checkpoint(tmp_path / str(scale), WARMUP + 1)
        state = after["optimizer"]["state"]
        rates = {group["lr"] for group in after["optimizer"]["param_groups"]}
        assert rates == {1e-3, scale * 1e-3}
        assert sum(entry["step"] == 1 for entry in state.values()) == (1 if quantizer == "vq" else 2)
        steps[scale] = after["model"][moved]
        others[scale] = after["model"]["quant_conv.weight"]
    assert torch.equal(others[1], others[10])
    if quantizer == "simvq":  # both start from the identity
        ratio = (steps[10] - torch.eye(8)) / (steps[1] - torch.eye(8))
        torch.testing.assert_close(ratio, torch.full((8, 8), 10.0), rtol=1e-2, atol=0)
    else:
        assert not torch.equal(steps[1], steps[10])


def test_a_scaled_run_resumes_exactly(tmp_path, monkeypatch):
    train_provq.main(flags(tmp_path / "a", codebook_lr_scale=10))
    words = flags(tmp_path / "b", codebook_lr_scale=10)
    kill_at_step(monkeypatch, train_provq.main, train_provq.Trainer, words, WARMUP + 2)
    train_provq.main(words)
    assert_same_run(tmp_path / "a", tmp_path / "b", STEPS)
