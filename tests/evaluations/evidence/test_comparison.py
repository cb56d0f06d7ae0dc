"""Tables: pairs are of one seed, intervals are Student's, and nothing of another setting slips in."""

import argparse
import dataclasses

import numpy as np
import pytest
from evidence_bed import SETTING
from PIL import Image
from scipy import stats

from evaluations.evidence import comparison, selection
from evaluations.evidence.arms import ARMS, Arm
from evaluations.evidence.store import Result, Run


def result(name, seed, psnr, codes=10.0, arm=None, setting=SETTING):
    metrics = None if psnr is None else {"psnr": psnr, "codes_used": codes}
    return Result(Run(arm or ARMS[name], setting, seed), name, metrics, {})


def make_rows(**arms):
    """arm -> PSNR by seed"""
    return comparison.rows([result(name, seed, value) for name, values in arms.items()
                            for seed, value in enumerate(values)])


def test_paired_interval_is_scipys():
    rng = np.random.default_rng(0)
    level = rng.normal(20, 3, 5)  # seeds differ much more than arms do
    ours, theirs = level + rng.normal(0.5, 0.1, 5), level
    base, arm = make_rows(vanilla=theirs, provq=ours)
    gap = comparison.difference(arm, base, "psnr")
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert gap.mean == pytest.approx((ours - theirs).mean())
    assert gap.interval == pytest.approx((interval.low, interval.high))
    assert gap.seeds == 5


def test_interval_closed_form():
    base, arm = make_rows(vanilla=[1.0, 2.0], provq=[2.0, 5.0])  # differences 1 and 3; t of one degree: tan(pi .95 / 2)
    half = np.tan(np.pi * 0.95 / 2) * np.sqrt(2) / np.sqrt(2)
    assert comparison.difference(arm, base, "psnr").interval == pytest.approx((2 - half, 2 + half))


def test_only_seeds_of_both_make_pairs():
    rows = comparison.rows([result("vanilla", 0, 1.0), result("vanilla", 2, 3.0), result("provq", 2, 3.5),
                            result("provq", 7, 90.0), result("soft", 9, 1.0)])
    gap = comparison.difference(rows[1], rows[0], "psnr")
    assert (gap.mean, gap.interval, gap.seeds) == (0.5, None, 1)
    assert comparison.difference(rows[2], rows[0], "psnr") is None
    assert comparison.difference(rows[1], rows[0], "ssim") is None


def test_runs_that_round_differently_are_told():
    def of(**line):
        return result("vanilla", 0, 20.0)._replace(line=line)

    assert selection.mixture([of(commit="a" * 40, torch="2.9"), of(commit="a" * 40, torch="2.9"), of()]) is None
    assert selection.mixture([of(commit="a" * 40, torch="2.9"), of(commit="b" * 40, torch="2.9")]) == (
        "the runs shown are of more than one commit (aaaaaaaaaaaa, bbbbbbbbbbbb), and may round differently")
    assert "torch (2.9, 2.10)" in selection.mixture([of(torch="2.9"), of(torch="2.10")])


def test_markdown():
    rows = comparison.rows([
        *(result("vanilla", seed, 20.0 + seed, codes=100) for seed in range(3)),
        *(result("provq", seed, 21.0 + seed + 0.1 * (seed == 0), codes=200 + seed) for seed in range(3)),
        result("soft", 0, 19.0), result("soft", 1, None), result("warmup", 8, 5.0)])
    del rows[0].values["codes_used"][2]  # of an older version
    rows[1].values["psnr"][9] = 22.03333
    lines = comparison.markdown(rows, rows[0], ["psnr", "codes_used"]).splitlines()
    assert lines == [
        "| arm | seeds | PSNR (dB) | codes used | PSNR (dB) against vanilla [95 %] |",
        "|---|---|---|---|---|",
        "| vanilla | 3 | 21.00 ± 1.00 | 100 ± 0 (2 seeds) |  |",
        "| provq | 4 | 22.03 ± 0.78 | 201 ± 1 (3 seeds) | +1.03 [+0.89, +1.18] (3 seeds) |",
        "| soft | 1, 1 diverged | 19.00 | 10 | -1.00 |",
        "| warmup | 1 | 5.00 | 10 | - |",
    ]


def test_labels_say_what_is_not_as_the_name_says():
    assert comparison.label("provq", ARMS["provq"]) == "provq"
    changed = dataclasses.replace(ARMS["vanilla+x10"], lr=5e-4, beta=1.0, code_lr_scale=30.0, loss_floor=0.25)
    assert comparison.label("vanilla+x10", changed) == (
        "vanilla+x10 (lr 0.0005, β 1, loss_floor 0.25, codes x30)")


def test_arms_with_other_numbers_are_other_rows():
    rows = comparison.rows([result("provq", 0, 20.0), result("provq", 1, 21.0),
                            result("provq", 0, 22.0, arm=Arm(curriculum="provq", lr=2e-3))])
    assert [(row.label, len(row.values["psnr"])) for row in rows] == [("provq", 2), ("provq (lr 0.002)", 1)]


def test_settings_are_not_mixed():
    other = dataclasses.replace(SETTING, num_codes=32)
    with pytest.raises(ValueError, match="these results have 2: num_codes 16 32"):
        comparison.rows([result("provq", 0, 20.0), result("provq", 0, 20.0, setting=other)])


def test_scores_in_other_features_are_not_mixed_but_what_was_trained_is(monkeypatch):
    other = dataclasses.replace(SETTING, features="5" * 64)
    found = [result("provq", 0, 20.0), result("vanilla", 0, 19.0, setting=other), result("soft", 0, None),
             result("soft", 0, None, setting=other)]
    monkeypatch.setattr(selection.store, "read_all", lambda _: found)
    parser = argparse.ArgumentParser()
    selection.add_flags(parser)
    table = selection.render(parser.parse_args(["x.jsonl", "--metrics", "psnr"]))
    assert "| vanilla | 1 | 19.00 | -1.00 |" in table
    assert "| soft | 0, 1 diverged |" in table, "one run, with and without features"
    for words in (["--metrics", "psnr", "rfid"], ["--compared", "rfid"]):
        with pytest.raises(ValueError, match="these results have 2: features 5555"):
            selection.render(parser.parse_args(["x.jsonl", *words]))


def test_the_baseline_must_be_there():
    rows = make_rows(vanilla=[1.0], provq=[2.0])
    assert comparison.find(rows, "provq", "--baseline") is rows[1]
    with pytest.raises(ValueError, match="'soft' is none of the arms: vanilla; provq"):
        comparison.find(rows, "soft", "--baseline")


def test_figure(tmp_path):
    rows = make_rows(vanilla=[1.0, 2.0], provq=[3.0, 4.0])
    comparison.figure(rows, rows[0], ["psnr", "codes_used"], tmp_path / "new" / "figure.png")
    drawn = np.array(Image.open(tmp_path / "new" / "figure.png").convert("RGB"))
    blue = (drawn[..., 2] > drawn[..., 0].astype(int) + 60).sum()
    orange = (drawn[..., 0] > drawn[..., 2].astype(int) + 60).sum()
    assert blue > 50, "seeds are dots"
    assert orange > 50, "means are bars"
