"""One folder, one owner: whoever comes second is told who is there, and a dead owner holds nothing."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import training_runs
from places import ROOT
from training_runs import rows, to_words

from autoregressive import extract_codes, sample_c2i, train_c2i
from protein.backbones import generate_backbones
from protein.benchmark import train_task
from protein.structure_cache import read_cache, write_cache
from tokenizer import train_provq
from tokenizer.data_split import open_run_split
from tokenizer.runtime import files, lock
from tokenizer.runtime.files import atomic_write, atomic_write_text

TINY = {"image_size": 16, "codebook_size": 16, "global_batch_size": 8, "max_steps": 6, "warmup_steps": 2,
        "transition_steps": 2, "log_every": 1, "val_every": 4, "val_size": 16, "ckpt_every": 1, "kmeans_batches": 2,
        "kmeans_iters": 5, "device": "cpu"}
HOLD = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tokenizer.runtime import lock
try:
    for folder in sys.argv[1:]:
        lock.own(folder, "--out")
except ValueError as error:
    raise SystemExit(f"refused: {{error}}")
if os.fork() == 0:  # as a process that loads data, which may outlive a killed parent
    time.sleep(600)
print("held", flush=True)
time.sleep(600)
"""


def hold(*folders, **env):
    """A process, with a child, that owns folders; or is refused."""
    return subprocess.Popen([sys.executable, "-c", HOLD, *map(str, folders)], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True, env={**os.environ, **env}, start_new_session=True)


def end(process):
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer's run with codes, and a GPT's run on them."""
    base = tmp_path_factory.mktemp("owners")
    train_provq.main(to_words(TINY | {"results_dir": base / "vq"}))
    extract_codes.main(["--vq-ckpt", str(base / "vq"), "--device", "cpu"])
    train_c2i.main(["--preset", "digits", *to_words({
        "code_path": base / "vq" / "codes", "vq_ckpt": base / "vq", "results_dir": base / "gpt", "max_steps": 2,
        "global_batch_size": 8, "lr_warmup_steps": 1, "sample_every": 0, "val_size": 8, "device": "cpu"})])
    return base


@pytest.fixture
def owner(tmp_path):
    """Another process that owns tmp_path/out and its like -> what a refusal says of it."""
    process = hold(tmp_path / "out", tmp_path / ".cache.tmp")
    assert process.stdout.readline() == "held\n"
    yield f"is in use by process {process.pid} on {socket.gethostname()}"
    end(process)


def refused(main, words):
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in words])
    return str(stopped.value)


def test_every_command_that_fills_a_folder_asks_for_it(trained, owner, tmp_path):
    out, cpu = tmp_path / "out", ["--device", "cpu"]
    gpt = ["--preset", "digits", "--code-path", trained / "vq" / "codes", "--vq-ckpt", trained / "vq"]
    for main, words in [
        (train_provq.main, to_words(TINY | {"results_dir": out})),
        (train_c2i.main, [*gpt, "--results-dir", out, *cpu]),
        (extract_codes.main, ["--vq-ckpt", trained / "vq", "--code-path", out, *cpu]),
        (sample_c2i.main, ["--gpt-ckpt", trained / "gpt", "--num-samples", "2", "--out", out, *cpu]),
        (train_task.main, ["--results-dir", out, "--tokenizer", "foldseek", "--task", "a.jsonl", *cpu]),
    ]:
        assert f"{out} {owner}; wait for it" in refused(main, words)
    assert [p.name for p in out.iterdir()] == [lock.LOCK_FILE]
    with pytest.raises(ValueError, match=owner):
        write_cache(tmp_path / "cache", generate_backbones(1, seed=0), {})
    assert not (tmp_path / "cache").exists()


def test_a_run_that_is_started_twice_and_then_killed(tmp_path):
    long = TINY | {"results_dir": tmp_path / "run", "ckpt_every": 10, "keep_checkpoints": 999, "num_workers": 1}
    words = to_words(long | {"max_steps": 3000})
    first = training_runs.start(ROOT / "tokenizer" / "train_provq.py", words, start_new_session=True)
    training_runs.wait_for_row(tmp_path / "run", 11, first)
    says = f"error: --results-dir {tmp_path / 'run'} is in use by process {first.pid} on {socket.gethostname()}; wait"
    assert says in refused(train_provq.main, words)
    # Readers do not care, and a copy is another folder.
    assert len(open_run_split(tmp_path / "run").val_indices) == 16
    shutil.copytree(tmp_path / "run", tmp_path / "copy", ignore=shutil.ignore_patterns("*.tmp"))
    short = long | {"results_dir": tmp_path / "copy", "max_steps": 4}
    assert "is at step" in refused(train_provq.main, to_words(short))
    os.kill(first.pid, signal.SIGKILL)  # its data-loading process lives on for a while
    first.wait()
    done = max(row["step"] for row in rows(tmp_path / "run"))
    train_provq.main(to_words(long | {"max_steps": done + 2}))
    steps = [row["step"] for row in rows(tmp_path / "run")]
    assert steps == list(range(1, done + 3))
    assert not (tmp_path / "run" / lock.LOCK_FILE).exists()
    first.stdout.close()


def test_copies_by_srun_have_one_owner(tmp_path):
    """Without torchrun each copy believes to be alone."""
    copies = [hold(tmp_path / "new" / "run", SLURM_STEP_NUM_TASKS="3") for _ in range(3)]
    lines = {process: process.stdout.readline() for process in copies}
    (winner,) = [process for process, line in lines.items() if line == "held\n"]
    for process, line in lines.items():
        if process is not winner:
            assert line.startswith(f"refused: --out {tmp_path}/new/run is in use by process {winner.pid} on ")
            assert "srun has started this command 3 times" in line
            process.communicate()
    end(winner)


def test_a_dead_owner_holds_nothing(tmp_path):
    process = hold(tmp_path / "run")
    assert process.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="is in use by process"):
        lock.own(tmp_path / "run", "--results-dir")
    os.kill(process.pid, signal.SIGKILL)  # not its child
    process.wait()
    for _ in range(50):  # its child shares the lock from its fork until it runs its program
        with contextlib.suppress(ValueError):
            lock.own(tmp_path / "run", "--results-dir")
            break
        time.sleep(0.1)
    lock.own(tmp_path / "run", "--results-dir")  # the owner may ask again
    assert json.loads((tmp_path / "run" / lock.LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()
    assert list((tmp_path / "run").iterdir()) == []
    end(process)


def test_nothing_is_left_where_nothing_was_written(tmp_path):
    lock.own(tmp_path / "a" / "b", "--out")
    assert lock.is_unused(tmp_path / "a" / "b")
    lock.release()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--out .*file cannot be locked"):
        lock.own(tmp_path / "file", "--out")


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    lock.own(tmp_path, "--out")
    lock.release()
    assert "this file system has no locks ([Errno 37] No locks available); nothing keeps" in capsys.readouterr().err


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / ("long" * 60)

    def write(file):
        atomic_write_text(path, "the other's")
        file.write(b"mine")

    atomic_write(path, write)
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


def test_what_killed_writers_leave_is_removed_by_the_next_owner(tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / "part").mkdir()
    (tmp_path / "codes").mkdir()
    (tmp_path / "codes" / lock.LOCK_FILE).write_text("")  # may have an owner of its own
    here = files._HOST
    left = {f".a.json.{here}-{dead.pid}-0123abcd.tmp": False, f"part/.b.png.{here}-{dead.pid}-0123abcd.tmp": False,
            f".a.json.{here}-{os.getpid()}-0123abcd.tmp": True, f"codes/.c.{here}-{dead.pid}-0123abcd.tmp": True,
            ".a.json.elsewhere-7-0123abcd.tmp": True, ".old.json.elsewhere-7-0123abcd.tmp": False, ".my.tmp": True}
    for name in left:
        (tmp_path / name).write_text("x")
    os.utime(tmp_path / ".old.json.elsewhere-7-0123abcd.tmp", (time.time() - 7200,) * 2)
    lock.own(tmp_path, "--out")
    assert {name: (tmp_path / name).exists() for name in left} == left
    lock.release()


def test_a_folder_that_was_killed_before_its_first_file_can_be_used(trained, tmp_path):
    out = tmp_path / "codes"
    out.mkdir()
    (out / lock.LOCK_FILE).write_text("")
    (out / f".extraction.json.{files._HOST}-1-0123abcd.tmp").write_text("")
    extract_codes.main(["--vq-ckpt", str(trained / "vq"), "--code-path", str(out), "--device", "cpu"])
    assert (out / "manifest.json").exists()


def test_a_cache_begun_by_a_killed_process_is_begun_anew(tmp_path):
    (tmp_path / ".cache.tmp").mkdir()
    (tmp_path / ".cache.tmp" / "junk.npy").write_bytes(b"x")
    assert len(write_cache(tmp_path / "cache", generate_backbones(2, seed=0), {})) == 2
    assert len(read_cache(tmp_path / "cache")) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache"]
    assert not {"junk.npy", lock.LOCK_FILE} & {p.name for p in (tmp_path / "cache").iterdir()}
