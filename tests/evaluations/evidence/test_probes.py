"""Probes that train_task.py left become numbers of the runs that they were trained on, and never of others."""

import json

import pytest
from test_collect import make_run

from evaluations.evidence import collect

SCORES = {  # (seed of the probe, rate) -> validation, test
    (0, 0.01): (0.6, 0.30), (0, 0.001): (0.7, 0.50), (1, 0.01): (0.9, 0.40), (1, 0.001): (0.8, 0.90)}


def probe(root, source, run, *, task="B-factor", scores=SCORES, tests=("test",), steps=600, more=None):
    folder = root / "results" / run / task
    folder.mkdir(parents=True)
    for (seed, rate), (valid, test) in scores.items():
        part = {"step": 1, "score": valid, "valid": valid, "tests": dict.fromkeys(tests, test)}
        (folder / f"seed{seed}-lr{rate:g}.json").write_text(json.dumps({
            "label": run.split("-")[0], "tokenizer": run, "source": str(source), "codebook": [4, 2], "task": task,
            "kind": "regression", "category": "Own", "tests": list(tests), "left_out": {}, "origin": "x.jsonl",
            "counts": {"test": {"chains": 2, "labels": 9}}, "settings": {"max_steps": steps, "inputs": run},
            "seed": seed, "learning_rate": rate, "protocols": {"pooled": part, "as coded": {**part, "score": -valid}},
            **(more or {})}))


@pytest.fixture
def runs(tmp_path):
    return [make_run(tmp_path, "vanilla", 0, 20.0), make_run(tmp_path, "provq", 0, 21.0)]


def collected(runs, tmp_path, *words):
    out = tmp_path / "table.json"
    collect.main([*map(str, runs), "--out", str(out), "--metrics", "psnr", *words])
    return json.loads(out.read_text())


def test_the_rate_that_validation_chose_and_the_mean_over_probes(runs, tmp_path):
    probe(tmp_path / "p", runs[0], "vanilla-1")
    probe(tmp_path / "p", runs[1], "provq-1", scores={key: (valid, test / 2) for key, (valid, test) in SCORES.items()})
    probe(tmp_path / "p", "foldseek", "FoldSeek-1")
    found = collected(runs, tmp_path, "--probes", str(tmp_path / "p"))
    assert [run["probe.bfactor"] for run in found["runs"]] == [45.0, 22.5]  # of 0.50 and 0.40, not 0.90 nor 0.30
    assert [run["psnr"] for run in found["runs"]] == [20.0, 21.0]
    assert found["probes"]["others"] == {"foldseek": {"probe.bfactor": 45.0}}
    settings = found["probes"]["settings"]["B-factor"]
    assert (settings["seeds"], settings["learning_rates"], settings["max_steps"]) == ([0, 1], [0.001, 0.01], 600)
    assert "inputs" not in settings


def test_two_folders_and_a_task_of_two_splits(runs, tmp_path):
    for run, name in zip(runs, ("vanilla-1", "provq-1"), strict=True):
        probe(tmp_path / "p", run, name)
        probe(tmp_path / "q", run, name, task="BindInt", tests=("Fold", "SupFam"))
    found = collected(runs, tmp_path, "--probes", str(tmp_path / "p"), str(tmp_path / "q"))
    assert set(found["runs"][0]) >= {"probe.bfactor", "probe.bindint.Fold", "probe.bindint.SupFam"}


def test_without_probes_nothing_is_added(runs, tmp_path):
    assert "probes" not in collected(runs, tmp_path)


def fewer(scores, *left_out):
    return {key: value for key, value in scores.items() if key not in left_out}


@pytest.mark.parametrize(("second", "message"), [
    ({"steps": 700}, "was trained with other max_steps"),
    ({"scores": fewer(SCORES, (1, 0.01), (1, 0.001))}, "was trained with other seeds"),
    ({"scores": fewer(SCORES, (0, 0.01), (1, 0.01))}, "was trained with other learning_rates"),
    ({"scores": fewer(SCORES, (1, 0.01))}, "other learning rates for each of its seeds"),
    (None, r"--probes: none of .*provq-s0; there are those of .*vanilla-s0"),
])
def test_tokenizers_that_were_probed_otherwise_or_not_at_all(second, message, runs, tmp_path):
    probe(tmp_path / "p", runs[0], "vanilla-1")
    if second is not None:
        probe(tmp_path / "p", runs[1], "zprovq-1", **second)
    with pytest.raises(SystemExit, match=message):
        collected(runs, tmp_path, "--probes", str(tmp_path / "p"))
    assert not (tmp_path / "table.json").exists()


def test_two_states_of_a_run_are_not_one(runs, tmp_path):
    """As train_task.py leaves them where a run was trained anew and given another label."""
    for run, name in ((runs[0], "vanilla-1"), (runs[0], "again-2"), (runs[1], "provq-1")):
        probe(tmp_path / "p", run, name)
    with pytest.raises(SystemExit, match=r"vanilla-s0 is there twice.*remove results/again-2 or results/vanilla-1"):
        collected(runs, tmp_path, "--probes", str(tmp_path / "p"))


def test_probes_of_another_step_of_a_run_are_refused(runs, tmp_path):
    for folder, step in (("p", 9), ("q", 6), ("older", None)):
        for run, name in zip(runs, ("vanilla-1", "provq-1"), strict=True):
            probe(tmp_path / folder, run, name, task=f"task of {folder}", more={"step": step})
    assert collected(runs, tmp_path, "--probes", str(tmp_path / "p"), str(tmp_path / "older"))
    with pytest.raises(SystemExit, match=r"results/vanilla-1 is of step 6 of \S+-s0, its summary.json of step 9"):
        collected(runs, tmp_path, "--probes", str(tmp_path / "p"), str(tmp_path / "q"))


def test_folders_that_have_no_probes_or_the_same(runs, tmp_path):
    with pytest.raises(SystemExit, match="no results of train_task"):
        collected(runs, tmp_path, "--probes", str(tmp_path / "p"))
    for run, name in zip(runs, ("vanilla-1", "provq-1"), strict=True):
        for folder in "pq":
            probe(tmp_path / folder, run, name)
    with pytest.raises(SystemExit, match="another folder has the task B-factor too"):
        collected(runs, tmp_path, "--probes", str(tmp_path / "p"), str(tmp_path / "q"))
