"""What the report says first: who wins and when nobody does, and which codebooks fell behind."""

import json

import pytest
from test_report import make_run, write

from evaluations.report_health import Scored, complaints, health, verdict
from tokenizer.code_meter import PaceMeter


@pytest.mark.parametrize(("others", "said"), [
    ([], "provq: PSNR 30.00 ± 1.00 dB with 90 % of its codes in use."),
    ([Scored("vanilla", 27.0, 0.5, 0.4)], "3.00 dB is more than both spreads over seeds together: clear."),
    ([Scored("vanilla", 29.0, 0.5, 0.4)], "1.00 dB is within the spreads over seeds: no clear winner."),
    ([Scored("vanilla", 20.0, None, 0.4)], "20.00 dB with 40 % of its codes in use. One seed on a side says little"),
])
def test_a_verdict_claims_what_the_seeds_allow(others, said):
    scored = [*others, Scored("provq", 30.0, 1.0, 0.9)]
    assert said in verdict(scored, "PSNR", " dB")
    if others:
        assert verdict(scored, "rFID", higher_is_better=False).startswith("vanilla has the best rFID")


def rows(spreads, moved=(0.1, 0.1)):
    return [{"step": step, "latent_spread": a, "code_spread": b, "codes_moved": moved[0], "latents_moved": moved[1]}
            for step, (a, b) in enumerate(spreads, 11)]


def used(*usage):
    return [{"step": step, "usage": value} for step, value in enumerate(usage, 10)]


def test_complaints_are_those_of_the_trainer():
    assert (PaceMeter.UNUSED, PaceMeter.CONTRACTED) == (0.75, 1.5)
    steady = rows([(1.0, 1.0), (0.5, 0.4)])
    assert complaints(steady, used(None, 0.9, 0.8), 10) == []
    assert complaints(steady, used(None), 10) is None
    assert complaints(steady, used(0.9, 0.5), 10) == []  # the 0.9 was before k-means
    assert complaints(steady, used(None, 0.8, 0.5), 10) == ["codes in use fell from 80 % to 50 %"]
    assert complaints(rows([(1.0, 1.0), (0.5, 0.9)]), used(None, 0.9), 10) == [
        "the spread of the latents went from 1 to 0.5, that of the codes from 1 to 0.9"]
    drifting = rows([(1.0, 0.001), (0.5, 0.9)])
    assert complaints(drifting, used(None, 0.9), 0) != [] == complaints(drifting, used(None, 0.9), None), "no k-means"
    still = rows([(1.0, 1.0)], (0.0, 0.1)), used(None, 0.9)
    assert complaints(*still, 10) == ["codes never moved while latents did"]
    assert complaints(rows([(1.0, 1.0)], (1e-14, 0.1)), used(None, 0.9), 10) == complaints(*still, 10), "rounding"
    assert complaints(rows([(1.0, 1.0)], (1e-4, 0.1)), used(None, 0.9), 10) == []
    assert complaints(*still, None) == [], "a grid's never do"


def test_the_box_counts_runs():
    cures = {"a": "--recluster", "b": "--lr 1"}
    lines, well = health({"a": [("a0", [], 0.9), ("a1", ["ill"], 0.5)], "b": [("b0", None, None)]}, cures)
    assert lines == ["a: 50 to 90 % of the codes in use; codes fell behind in 1 of 2. a1: ill. Try --recluster.",
                     "b: no codes yet, or their use is not recorded."]
    assert not well
    unknown = ["a: an unknown share of the codes in use; codes kept pace."]
    assert health({"a": [("a0", [], None)]}, cures) == (unknown, True)
    assert health({"a": [("a0", [], 0.9)]}, cures, ["a"]) == (["a: 90 % of the codes in use."], True), "unknown"
    (line,), _ = health({"a": [("a0", ["ill"], 0.5)]}, {})
    assert line.endswith("ill."), "what to try is not known"
    assert health({"a": [("a0", [], 0.9)]}, cures) == (["a: 90 % of the codes in use; codes kept pace."], True)


def test_the_page_begins_with_them(tmp_path):
    runs = [make_run(tmp_path / f"s{i}", i, 20.0 + i, rfid=1.0) for i in range(2)]
    plain = ["--warmup-steps", "0", "--transition-steps", "0"]
    runs += [make_run(tmp_path / f"v{i}", i, 10.0 + i, rfid=3.0, flags=plain) for i in range(2)]
    runs += [make_run(tmp_path / "f", 0, 12.0, flags=["--codebook-lr-scale", "10"])]
    runs += [make_run(tmp_path / "g", 0, 12.0, flags=["--quantizer", "fsq", *plain])]
    ill = [{"step": 50, "usage": 0.9}, {"step": 100, "usage": 0.5}]
    for run in (runs[0], runs[2], runs[4], runs[5]):
        (run / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ill))
    html, markdown = write(tmp_path, *runs)
    assert markdown.index("ProVQ has the best PSNR, 20.50 ± 0.71 dB") < markdown.index("## Runs")
    advice = [line for line in markdown.splitlines() if "codes in use fell from 90 % to 50 %" in line]
    assert [line.rpartition(" % to 50 %")[2] for line in advice] == [
        ". Try --codebook-lr-scale 10.", ". Try --codebook-lr-scale 10.", ". Try --recluster.", "."], (
        "what the trainer would say: not what the run has, and nothing for a grid's codes")
    assert '<div class="note"><p><b>Codebook health' in html


def test_tables_5_and_6_are_there_only_where_they_add_something(tmp_path):
    first = make_run(tmp_path / "a")
    _, markdown = write(tmp_path, first, make_run(tmp_path / "b", flags=["--lr", "0.5"]))
    assert "Table 1" in markdown
    assert "Table 5" not in markdown
    assert "Table 6" not in markdown
    _, markdown = write(tmp_path, first, make_run(tmp_path / "c", flags=["--warmup-steps", "0"]))
    assert "Table 5" in markdown
    assert "Table 6" not in markdown
