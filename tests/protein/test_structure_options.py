"""Options of the structure trainer that are not in the paper (those of images: tests/tokenizer/)."""

import pytest
import training_runs
from test_train_structures import STEPS, TRANSITION, WARMUP, flags
from training_runs import assert_same_run, rows

from protein import train_provq
from protein.pretrained import load_structure_tokenizer, save_pretrained
from protein.structure_model import to_structtokenbench
from tokenizer.runtime.checkpoint import load_file


def test_a_schedule_keeps_the_ratio_and_options_resume_exactly(tmp_path, monkeypatch):
    options = {"codebook_lr_scale": 5, "codebook_follow": True, "recluster": True, "ema": True,
               "codebook_restart_below": 0.5}
    train_provq.main(flags(tmp_path / "whole", **options))
    log = rows(tmp_path / "whole")
    last = load_file(tmp_path / "whole" / "checkpoints" / f"{STEPS:07d}.pt")
    rates = {group["lr"] for group in last["optimizer"]["param_groups"]}
    assert rates == {log[-1]["lr"], 5 * log[-1]["lr"]}
    assert {"latent_spread", "codes_moved"} <= log[-1].keys()
    words = flags(tmp_path / "killed", **options)
    training_runs.kill_at_step(monkeypatch, train_provq.main, train_provq.Trainer, words, WARMUP + TRANSITION)
    train_provq.main(words)
    assert_same_run(tmp_path / "whole", tmp_path / "killed", STEPS)
    tokenizer = load_structure_tokenizer(tmp_path / "whole")
    exported = load_structure_tokenizer(save_pretrained(tokenizer.model, tmp_path / "export"))
    assert exported.hash() == tokenizer.hash()
    assert not exported.model.config.codebook_follow
    with pytest.raises(ValueError, match="no 'vq' with codebook_follow"):
        to_structtokenbench(tokenizer.model)
