"""The check of a machine with GPUs, in small without one; and that it finds what is wrong."""

import json

import pytest
from places import WORKERS

from scripts import gpu_check


def test_checks_run_and_end_in_a_table(tmp_path, capsys):
    assert gpu_check.check_all(["search", "eager", "extract"], tmp_path)
    out = capsys.readouterr().out
    assert [line.split()[:2] for line in out.splitlines()[1:4]] == [
        ["PASS", "search"], ["PASS", "eager"], ["PASS", "extract"]]
    row = next(line for line in out.splitlines() if line.startswith("| eager | PASS |"))
    assert "images/s " in row
    assert "GiB " in row


def test_failures_are_told_and_end_nothing(tmp_path, monkeypatch, capsys):
    def broken(_):
        gpu_check.run(["-c", "raise ValueError('planned')"])

    monkeypatch.setitem(gpu_check.CHECKS, "eager", broken)
    monkeypatch.setitem(gpu_check.CHECKS, "search", lambda _: {"kmeans_seconds": 11.0})
    monkeypatch.setitem(gpu_check.CHECKS, "sharded", lambda _: {"skipped": "needs two GPUs"})
    monkeypatch.setattr(gpu_check, "peak_flops", lambda *_: gpu_check.H100)
    assert not gpu_check.check_all(["search", "eager", "sharded"], tmp_path)
    out = capsys.readouterr().out
    assert "FAIL search (0 s) kmeans_seconds 11, expected 5" in out
    assert "status 1: ValueError: planned" in out
    assert "SKIP sharded" in out


def test_slow_runs_are_told_by_the_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "peak_flops", lambda *_: gpu_check.H100 / 2)
    machine = gpu_check.Machine(tmp_path)
    assert gpu_check.slow("eager", {"images/s": 26.0, "GiB": 80.0}, machine) == []
    assert len(gpu_check.slow("eager", {"images/s": 24.0, "GiB": 91.0}, machine)) == 2


def test_what_a_check_needs_comes_along():
    assert gpu_check.parse_args(["--only", "sample"]).checks == ["eager", "extract", "gpt", "sample"]
    with pytest.raises(SystemExit):
        gpu_check.parse_args(["--only", "speed"])


def test_a_profile_has_kinds(tmp_path):
    machine = gpu_check.Machine(tmp_path)
    found = gpu_check.worker(machine, "profile", *machine.image_words("profile", "--no-compile"))["shares"]
    assert sum(found.values()) == pytest.approx(1)
    assert found["conv"] > 0.05
    assert json.loads((tmp_path / "profile.json").read_text())["kmeans_seconds"] > 0
    assert (WORKERS / "gpu_steps.py").is_file()
