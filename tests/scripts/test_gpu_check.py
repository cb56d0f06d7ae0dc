"""The check of a machine with GPUs, in small without one; and that it finds what is wrong."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from places import WORKERS
from torch.distributed.run import get_args_parser

from autoregressive import extract_codes, sample_c2i
from autoregressive import train_config as gpt_config
from scripts import gpu_check
from tokenizer import train_config as image_config
from tokenizer.runtime.throughput import Throughput

sys.path.insert(0, str(WORKERS))
import gpu_steps


def test_checks_run_and_end_in_a_table(tmp_path, capsys):
    assert gpu_check.check_all(["search", "eager", "extract"], tmp_path)
    out = capsys.readouterr().out
    assert out.count("no GPU: torch") == 2  # before and after: a table of a CPU is none of a GPU
    assert [line.split()[:2] for line in out.splitlines()[2:5]] == [
        ["PASS", "search"], ["PASS", "eager"], ["PASS", "extract"]]
    row = next(line for line in out.splitlines() if line.startswith("| eager | PASS |"))
    assert "images/s " in row
    assert "GiB " in row


class H100s:
    """Stands in for as many GPUs and for the programs that run on them: reads their words as they do, checks what they
    check before data are opened, and leaves behind what they leave."""

    def __init__(self, count, monkeypatch):
        self.ran, self.count = [], count
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
        monkeypatch.setattr(gpu_check, "Image", SimpleNamespace(fromarray=lambda _: SimpleNamespace(save=Path.touch)))
        monkeypatch.setattr(gpu_check, "run", self.run)

    def run(self, words, until=None):
        words, processes = [str(word) for word in words], 1
        if words[:2] == ["-m", "pytest"]:
            assert words[2:] == ["-q", "-m", "gpu", str(gpu_check.ROOT / "tests")]
            return self.ran.append(("tests", 1, "")) or ""
        if words[:2] == ["-m", "torch.distributed.run"]:
            launch = get_args_parser().parse_args(words[2:])
            assert launch.standalone
            processes = int(launch.nproc_per_node)
            words = [launch.training_script, *launch.training_script_args]
        script, mode = Path(words[0]).name, ""
        assert Path(words[0]).is_file()
        if script == "gpu_steps.py":
            _, mode, out, *words = words
            more = {"search": {"wrong_codes": 0}, "profile": {"shares": {"conv": 1.0}}}.get(mode, {})
            Path(out).write_text(json.dumps({"kmeans_seconds": 1.0} | more))
            script = {"search": "", "gpt": "train_c2i.py"}.get(mode, "train_provq.py")
        else:
            words = words[1:]
        self.ran.append((mode or script, processes, " ".join(words)))
        return {"": lambda *_: "", "train_provq.py": self.images, "train_c2i.py": self.gpt,
                "extract_codes.py": self.extract, "sample_c2i.py": self.sample}[script](words, processes, until)

    def images(self, words, processes, until):
        cfg = image_config.parse_config(words)
        image_config.check(cfg, processes)
        assert cfg.warmup_steps + cfg.transition_steps < cfg.max_steps - 5  # of all stages more than settles
        return self.trained(cfg, until)

    def gpt(self, words, processes, until):
        cfg = gpt_config.parse_config(words)
        gpt_config.check(cfg, processes)
        assert gpt_config.shards(cfg, processes) == (cfg.gpt_model == "GPT-XL")
        assert Path(cfg.code_path, "manifest.json").exists()
        assert not cfg.vq_ckpt or Path(cfg.vq_ckpt, "summary.json").exists()
        return self.trained(cfg, until)

    def trained(self, cfg, until):
        folder = Path(cfg.results_dir)
        resumes = folder.exists()
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        (folder / "checkpoints" / "0000040.pt").touch()
        row = dict.fromkeys(("samples_per_second", *Throughput.FIELDS), 1e6) | {"mfu": 0.5, "peak_memory_gib": 40}
        (folder / "metrics.jsonl").write_text(json.dumps(row))
        if until is None:
            (folder / "summary.json").touch()
        else:
            assert until()
        return "resuming" if resumes else ""

    def extract(self, words, *_):
        args = extract_codes.parse_args(words)
        args.code_path.mkdir()
        (args.code_path / "manifest.json").touch()
        return ""

    def sample(self, words, *_):
        args = sample_c2i.parse_args(words)
        (args.out / "images").mkdir(parents=True)
        for i in range(args.num_samples):
            (args.out / "images" / f"{i:06d}.png").touch()
        return ""


@pytest.mark.parametrize("count", [1, 2, 8])
def test_what_runs_on_gpus(tmp_path, monkeypatch, capsys, count):
    """All words are flags of the programs, all that the checks read is there, on one GPU and on several."""
    machines = H100s(count, monkeypatch)
    assert gpu_check.check_all(list(gpu_check.CHECKS), tmp_path), capsys.readouterr().out
    out = capsys.readouterr().out
    assert "no GPU" not in out
    assert out.startswith(f"{count} x NVIDIA H100")
    rows = dict(line.split(" | ")[:2] for line in out.splitlines() if " | PASS | " in line or " | SKIP | " in line)
    assert list(rows) == [f"| {name}" for name in gpu_check.CHECKS]
    assert {name for name, verdict in rows.items() if verdict != "PASS"} == ({"| sharded"} if count == 1 else set())
    for name, expected in gpu_check.EXPECTED.items():  # each is compared with what was measured
        measured = next(line for line in out.splitlines() if line.startswith(f"| {name} |")).split(" | ")[2]
        assert (count == 1 and name == "sharded") or all(f"{what} " in measured for what in expected), measured
    shared = {name: number for name, number, _ in machines.ran if number > 1}
    programs = ("train_provq.py", "extract_codes.py", "train_c2i.py")
    assert shared == ({} if count == 1 else dict.fromkeys(programs, count))
    compiled = [" --compile" in words for name, _, words in machines.ran if name in ("images", "profile")]
    assert compiled == [False, True, True]


class Stages:
    """A trainer whose stages last 9 steps."""

    quantize = SimpleNamespace(stage=1)

    def train_step(self, batches, step):  # noqa: ARG002
        modes = self.modes
        return modes.append(modes[-1])

    def start_codebook(self, step):
        self.quantize.stage = 1 + step // 9


def test_settled_steps_may_not_wait(monkeypatch):
    modes, seen = ["default"], []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: modes.append(mode))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    profile = SimpleNamespace(start=lambda: seen.append("start"), stop=lambda: seen.append("stop"))

    class Trainer(Stages):
        pass

    Trainer.modes = modes

    def main(_):
        trainer = Trainer()
        for step in range(27):
            trainer.start_codebook(step)
            trainer.train_step(None, step)

    gpu_steps.watch(Trainer, main, [], torch.device("cuda"), profile)
    inside = modes[2::3]  # set, seen by the step, set back
    assert inside == (["default"] * gpu_steps.SETTLED + ["error"] * (9 - gpu_steps.SETTLED)) * 3
    assert set(modes[3::3]) == {"default"}
    assert seen == ["start", "stop"]


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
