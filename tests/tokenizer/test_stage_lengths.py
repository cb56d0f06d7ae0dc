"""Lengths of the stages as fractions of the run, and what is said of a run that does not fit them."""

import json

import pytest
from test_train_provq import fails, flags
from training_runs import rows

from protein.train_config import check as check_structures
from protein.train_config import parse_config as parse_structures
from tokenizer import train_provq
from tokenizer.curriculum_config import with_length
from tokenizer.runtime.config import from_dict
from tokenizer.train_config import TrainConfig, check, parse_config


def lengths(cfg):
    return cfg.warmup_steps, cfg.transition_steps


@pytest.mark.parametrize(("parse", "check"), [(parse_config, check), (parse_structures, check_structures)],
                         ids=["images", "structures"])
def test_fractions_become_steps(parse, check, tmp_path):
    words = ["--results-dir", str(tmp_path), "--warmup-steps", "0.25", "--transition-steps", ".5"]
    cfg = parse([*words, "--max-steps", "4000"])
    check(cfg, 1)
    assert lengths(with_length(cfg, 7)) == (1000, 2000)
    cfg = parse([*words, "--epochs", "3"])
    check(cfg, 1)
    planned = with_length(cfg, 100 * cfg.global_batch_size)
    assert (planned.max_steps, *lengths(planned)) == (300, 75, 150)
    assert all(type(length) is int for length in lengths(planned))


def test_a_fraction_is_at_least_a_step_and_whole_numbers_stay(tmp_path):
    cfg = parse_config(["--results-dir", str(tmp_path), "--warmup-steps", "0.001", "--transition-steps", "1"])
    assert lengths(with_length(cfg, 1)) == (1, 1)


@pytest.mark.parametrize("value", ["1.0", "-0.25", "0.0", "nan", "1e3", "1.5"])
def test_other_numbers_are_neither(value, capsys):
    with pytest.raises(SystemExit):
        parse_config(["--warmup-steps", value])
    assert "--warmup-steps" in (said := capsys.readouterr().err)
    assert "is neither an integer nor a fraction between 0 and 1" in said
    if value != "nan":
        with pytest.raises(ValueError, match=r"warmup_steps: .* is neither an integer nor a fraction"):
            from_dict(TrainConfig, {"warmup_steps": float(value)}, "config.json")


def test_lengths_are_checked_when_the_data_tell_them(tmp_path, capsys):
    """--epochs over 1781 digits in batches of 8 is 223 steps."""
    words = {"max_steps": None, "epochs": 1, "warmup_steps": 0.5}
    said = fails(flags(tmp_path, transition_steps=201, **words), capsys)
    assert "--epochs 1 of 1781 samples: the run would end after 223 steps, before stage 3" in said
    assert "these are --warmup-steps 112 + --transition-steps 201: give more steps, shorter stages, or say" in said
    said = fails(flags(tmp_path, transition_steps=0.25, recluster_at=100, **words), capsys)
    assert "--recluster-at 100 is not after --warmup-steps 112" in said
    assert "--warmup-steps 0.9 + " not in fails(flags(tmp_path, warmup_steps=0.9), capsys)


def test_a_run_records_the_steps_and_resumes_with_them(tmp_path, capsys):
    words = flags(tmp_path, max_steps=8, warmup_steps=0.25, transition_steps=0.5, val_every=8)
    train_provq.main([*words, "--stop-after", "transition"])
    assert "--warmup-steps 0.25 of 8 steps: 2, --transition-steps 0.5 of 8 steps: 4" in capsys.readouterr().out
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert (recorded["max_steps"], recorded["warmup_steps"], recorded["transition_steps"]) == (8, 2, 4)  # as planned
    train_provq.main(words)
    assert [row["stage"] for row in rows(tmp_path)] == [1] * 2 + [2] * 4 + [3] * 2
    longer = flags(tmp_path, max_steps=16, warmup_steps=0.25, transition_steps=4)
    assert "warmup_steps: 2 there, 4 now" in fails(longer, capsys)
    train_provq.main(flags(tmp_path, max_steps=9, warmup_steps=2, transition_steps=4))
    assert rows(tmp_path)[-1]["step"] == 9


def test_dry_run_prints_notes_beside_the_configuration(tmp_path, capsys):
    train_provq.main(flags(tmp_path, max_steps=8, warmup_steps=0.75, adaptive_warmup_patience=1, val_every=2,
                           transition_steps=4, disc_weight=0.5, image_size=32, disc_start=100, dry_run=True))
    out, err = capsys.readouterr()
    assert json.loads(out)["warmup_steps"] == 6
    assert "--warmup-steps 0.75 of 8 steps: 6" in err
    assert "note: these 8 steps reach stage 3 only if the adaptive warm-up ends before step 4" in err
    assert "note: --disc-start 100 is beyond the 8 steps: the discriminator never trains" in err
    assert not (tmp_path / "metrics.jsonl").exists()
