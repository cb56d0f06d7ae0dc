"""The map of pace: which runs are compared, and with what."""

import dataclasses

import pytest

from evaluations.evidence import document, pace, pace_map, store
from evaluations.evidence.arms import ARMS
from evaluations.evidence.setting import Setting

SETTING = Setting("images.zip", steps=800, transition_steps=50)


def line(name, transition, seed, psnr, spread=0.5, **options):
    setting = dataclasses.replace(SETTING, transition_steps=transition)
    run = store.Run(dataclasses.replace(ARMS[name], **options), setting, seed)
    trace = [{"step": 133, "latent_spread": 9.0}, {"step": 266, "latent_spread": spread}]
    return store.result_line(name, run, {"metrics": {"psnr": psnr, "codes_used": 100 + psnr}, "trace": trace})


def written(path, lines):
    with store.writing(path) as file:
        for each in lines:
            file.append(each)
    return path


def test_a_run_is_compared_with_the_hard_switch_of_its_seed_and_rates(tmp_path):
    path = written(tmp_path / "a.jsonl", [
        line("provq-hard", 0, 100, 20.0), line("provq-hard", 0, 101, 21.0),
        line("provq-hard", 0, 100, 30.0, code_lr_scale=10.0), line("vanilla", 50, 100, 5.0),
        line("provq", 50, 100, 20.5, spread=0.25), line("provq", 50, 101, 20.0), line("provq", 400, 100, 24.0),
        line("provq", 50, 100, 29.0, code_lr_scale=10.0), line("provq", 50, 100, 1.0, code_lr_scale=3.0)])  # no partner
    found = pace.points(store.read(path))
    assert [(p.transition_steps, p.code_lr_scale, p.seed, round(p.gain["psnr"], 6)) for p in found] == [
        (50, 1.0, 100, 0.5), (50, 1.0, 101, -1.0), (400, 1.0, 100, 4.0), (50, 10.0, 100, -1.0)]
    assert [p.pace for p in found] == pytest.approx([1e-3 * 50 / 0.25, 1e-3 * 50 / 0.5, 0.8, 1.0])
    assert pace.markdown(found).splitlines()[2:] == [
        "| codes' learning rate | 50 steps | 400 steps |", "|---|---|---|",
        "| x1 | -0.25 (0.15) | +4.00 (0.8) |", "| x10 | -1.00 (1) | - |"]


@pytest.mark.parametrize(("more", "message"), [
    ([("provq-hard", 50, 100, 20.0)], r"a.jsonl:1 and \S+a.jsonl:3 are both the hard switch"),
    ([("provq-linear", 50, 100, 20.0)], r"a.jsonl:2 and \S+a.jsonl:3 differ in more"),
    ([("provq-lambda0", 50, 100, 20.0), ("provq-lambda0", 0, 100, 20.0)], r"a.jsonl:2 and \S+a.jsonl:3 differ in more"),
])
def test_what_a_map_would_mix_is_refused(more, message, tmp_path):
    path = written(tmp_path / "a.jsonl", [line("provq-hard", 0, 100, 20.0), line("provq", 50, 100, 20.5),
                                          *(line(*each) for each in more)])
    with pytest.raises(SystemExit, match=message):
        pace_map.main([str(path)])


def test_a_hard_switch_of_other_images_is_refused(tmp_path):
    lines = [line("provq-hard", 0, 100, 20.0) | {"images": "a"}, line("provq", 50, 100, 20.5) | {"images": "b"}]
    with pytest.raises(SystemExit, match=r"a.jsonl:1 and \S+a.jsonl:2 are of other images of one name"):
        pace_map.main([str(written(tmp_path / "a.jsonl", lines))])


def test_a_line_without_a_trace_is_named(tmp_path):
    without = line("provq", 50, 100, 20.5)
    del without["trace"]
    path = written(tmp_path / "a.jsonl", [line("provq-hard", 0, 100, 20.0), without])
    with pytest.raises(SystemExit, match=r"a.jsonl:2, or its hard switch \S+a.jsonl:1, lacks what a map shows"):
        pace_map.main([str(path)])


def test_command_and_document_show_the_same(tmp_path, capsys):
    path = written(tmp_path / "a.jsonl", [line("provq-hard", 0, 100, 20.0), line("provq", 50, 100, 20.5)])
    pace_map.main([str(path), "--metric", "codes_used", "--figure", str(tmp_path / "figures" / "a.png")])
    shown = capsys.readouterr().out
    assert "+0 (0.1)" in shown
    assert (tmp_path / "figures" / "a.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="is what is read, and would be lost"):
        pace_map.main([str(path), "--figure", str(path)])
    text, count = document.filled("<!-- pace: a.jsonl --metric codes_used -->\n<!-- end -->\n", tmp_path)
    assert (count, text) == (1, f"<!-- pace: a.jsonl --metric codes_used -->\n{shown}<!-- end -->\n")


def test_without_a_hard_switch_the_runs_to_add_are_named(tmp_path):
    path = written(tmp_path / "a.jsonl", [line("provq", 50, 100, 20.5)])
    with pytest.raises(SystemExit, match="--arms provq-hard --transition-steps 0"):
        pace_map.main([str(path)])
