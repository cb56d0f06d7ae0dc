"""The check of a machine with GPUs, in small without one; and that it finds what is wrong."""

import json
import time
from pathlib import Path

import pytest
import torch
from places import WORKERS

from scripts import gpu_check


def test_checks_run_and_end_in_a_table(tmp_path, capsys):
    assert gpu_check.check_all(["search", "eager", "extract"], tmp_path)
    out = capsys.readouterr().out
    assert out.count("no GPU: torch") == 2  # before and after: a table of a CPU is none of a GPU
    assert [line.split()[:2] for line in out.splitlines()[2:5]] == [
        ["PASS", "search"], ["PASS", "eager"], ["PASS", "extract"]]
    row = next(line for line in out.splitlines() if line.startswith("| eager | PASS |"))
    assert "images/s " in row
    assert "GiB " in row


def test_failures_are_told_and_end_nothing(tmp_path, monkeypatch, capsys):
    def broken(_):
        gpu_check.run(["-c", "raise ValueError('planned')"])

    monkeypatch.setitem(gpu_check.CHECKS, "eager", broken)
    monkeypatch.setitem(gpu_check.CHECKS, "search", lambda _: {"kmeans_seconds": 11.0})
    monkeypatch.setitem(gpu_check.CHECKS, "resume", lambda _: {"skipped": "needs two GPUs"})
    monkeypatch.setattr(gpu_check, "peak_flops", lambda *_: gpu_check.H100)
    assert not gpu_check.check_all(["search", "eager", "resume"], tmp_path)
    out = capsys.readouterr().out
    assert "FAIL search (0 s) kmeans_seconds 11, expected 5" in out
    assert "status 1: ValueError: planned" in out
    assert "SKIP resume" in out


def test_a_run_ends_by_its_signal_its_fault_or_its_limit(tmp_path, monkeypatch):
    """What torchrun has started ends with it."""
    program = tmp_path / "two.py"
    program.write_text("import subprocess, sys, time\n"
                       "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
                       "print(child.pid, file=open(sys.argv[1], 'w'), flush=True)\ntime.sleep(60)\n")
    gpu_check.run(["-c", "import time; time.sleep(60)"], until=lambda: True)
    with pytest.raises(gpu_check.Failed, match="ValueError: planned"):
        gpu_check.run(["-c", "raise ValueError('planned')"], until=lambda: False)
    monkeypatch.setattr(gpu_check, "LIMIT", 10)  # a busy machine takes seconds to start two programs
    with pytest.raises(gpu_check.Failed, match="no end after 10 seconds"):
        gpu_check.run([program, tmp_path / "pid"])
    child, deadline = Path("/proc", (tmp_path / "pid").read_text().strip(), "stat"), time.monotonic() + 10
    while time.monotonic() < deadline and runs(child):
        time.sleep(0.1)
    assert not runs(child)


def runs(stat):
    """Whether the process of /proc/PID/stat does; one that nobody has waited for does not."""
    try:
        return ") Z" not in stat.read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_what_needs_a_failure_is_not_tried(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gpu_check.CHECKS, "eager", lambda _: [][0])
    assert not gpu_check.check_all(["eager", "extract"], tmp_path)
    assert "FAIL extract (0 s) needs eager" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_ready(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    monkeypatch.setattr(gpu_check, "check_all", lambda *_: True)
    with pytest.raises(SystemExit) as caught:
        gpu_check.main([])
    assert caught.value.code == 1


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
