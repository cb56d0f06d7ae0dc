"""Result lines: whole or not there, read back as what was run, of one writer at a time."""

import json
import subprocess

import pytest
from evidence_bed import SETTING
from places import ROOT

from evaluations.evidence import store
from evaluations.evidence.arms import Arm
from evaluations.evidence.store import Run, read, read_all, result_line, writing


def line(seed, psnr=20.0):
    return result_line("arm", Run(Arm(recluster_at=(5,)), SETTING, seed), {"metrics": {"psnr": psnr}, "trace": []})


def append(path, *lines):
    with writing(path) as writer:
        for each in lines:
            writer.append(each)


def test_lines_come_back(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    assert read(path) == []
    append(path, line(1), line(2))
    append(path, line(3, psnr=21.123456789))
    results = read(path)
    assert [result.run for result in results] == [Run(Arm(recluster_at=(5,)), SETTING, seed) for seed in (1, 2, 3)]
    assert results[2].metrics == {"psnr": 21.1235}


def test_a_cut_off_line_is_no_result_and_is_cut_away(tmp_path):
    path = tmp_path / "results.jsonl"
    append(path, line(1))
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    assert len(read(path)) == 1
    append(path, line(2))
    assert [result.run.seed for result in read(path)] == [1, 2]
    assert path.read_text().startswith(whole)


@pytest.mark.parametrize("bad", ["{}", "no json", '{"arm": "x", "options": {"new": 1}, "setting": {}, "seed": 0}'])
def test_other_lines_are_named(bad, tmp_path):
    path = tmp_path / "results.jsonl"
    append(path, line(1))
    path.write_text(path.read_text() + bad + "\n")
    with pytest.raises(ValueError, match=r"results.jsonl:2: no result of a run"):
        read(path)


def test_settings_that_a_line_lacks_have_their_defaults(tmp_path):
    path = tmp_path / "results.jsonl"
    old = line(1)
    del old["options"]["token_mix"], old["setting"]["latents_per_code"]
    path.write_text(json.dumps(old) + "\n")
    assert read(path)[0].run == Run(Arm(recluster_at=(5,)), SETTING, 1)


def test_one_writer(tmp_path):
    path = tmp_path / "results.jsonl"
    with writing(path), pytest.raises(ValueError, match=f"--out {path}: another process is writing"):
        append(path, line(1))
    append(path, line(1))


def test_not_a_number_is_never_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        append(tmp_path / "results.jsonl", line(1, psnr=float("nan")))


def test_several_files(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    append(first, line(1))
    append(second, line(1, psnr=99.0), line(2))
    assert [(result.run.seed, result.metrics["psnr"]) for result in read_all([first, second])] == [(1, 20), (2, 20)]
    with pytest.raises(FileNotFoundError, match=r"c.jsonl: no such results file"):
        read_all([tmp_path / "c.jsonl"])


def test_the_machine_is_named(monkeypatch):
    machine = store.machine()
    assert machine["cpu"]
    assert machine["torch"]
    head = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode == 0:
        assert machine["commit"].rstrip("+") == head.stdout.strip()
    monkeypatch.setattr(store, "ROOT", ROOT.parent / "nowhere")
    assert store.machine()["commit"] is None


def test_the_results_of_the_repository_are_readable_and_each_run_is_there_once():
    files = sorted((ROOT / "evaluations" / "results").glob("*.jsonl"))
    assert files
    for file in files:
        runs = [result.run for result in read(file)]
        assert file.read_bytes().endswith(b"\n")
        assert len(set(runs)) == len(runs) > 0
