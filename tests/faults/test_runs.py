"""Runs that end early, on full disks, from damaged files, with numbers that overflow: one line, and nothing lost."""

import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import termios
import time
from dataclasses import fields

import numpy as np
import pytest
import torch
import training_runs
from places import ROOT
from training_runs import NO_KMEANS, assert_same_run, rows, to_words

from autoregressive import extract_codes, train_c2i
from autoregressive import train_config as gpt_config
from protein import train_config as protein_config
from protein import train_provq as protein_train
from protein.benchmark import train_task
from tokenizer import curriculum, curriculum_config, reconstruct, train_config, train_provq
from tokenizer.code_meter import DriftMeter, drift
from tokenizer.runtime import checkpoint, lock
from tokenizer.runtime.checkpoint import Checkpointer, load_file

STEPS = 8
TINY = {"image_size": 16, "codebook_size": 16, "global_batch_size": 8, "max_steps": STEPS, "warmup_steps": 2,
        "transition_steps": 2, "log_every": 1, "val_every": 4, "val_size": 16, "ckpt_every": 1, "kmeans_batches": 2,
        "kmeans_iters": 5, "device": "cpu"}
PROTEIN = {"encoder_width": 32, "encoder_heads": 4, "decoder_width": 32, "decoder_heads": 2, "decoder_layers": 1,
           "codebook_embed_dim": 8, "codebook_size": 16, "ideal_chains": 24, "max_length": 32, "global_batch_size": 4,
           "max_steps": STEPS, "warmup_steps": 2, "transition_steps": 2, "log_every": 1, "val_every": 4, "val_size": 5,
           "ckpt_every": 1, "kmeans_batches": 2, "lr_warmup_steps": 2, "device": "cpu"}
RARELY = {"max_steps": 100_000, "ckpt_every": 100_000, "val_every": 100_000}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run with its codes in vq/codes."""
    base = tmp_path_factory.mktemp("runs")
    train_provq.main(to_words(TINY | {"results_dir": base / "vq"}))
    extract_codes.main(["--vq-ckpt", str(base / "vq"), "--device", "cpu"])
    return base


def gpt(trained, **changes):
    return {"preset": "digits", "code_path": trained / "vq" / "codes", "vq_ckpt": trained / "vq", "max_steps": STEPS,
            "global_batch_size": 8, "lr_warmup_steps": 2, "log_every": 1, "val_every": 4, "ckpt_every": 1,
            "sample_every": 0, "val_size": 8, "device": "cpu"} | changes


def trainer(name, trained):
    """script, settings"""
    return {"image": (ROOT / "tokenizer" / "train_provq.py", TINY),
            "gpt": (ROOT / "autoregressive" / "train_c2i.py", gpt(trained)),
            "protein": (ROOT / "protein" / "train_provq.py", PROTEIN)}[name]


def fails(main, settings, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(to_words(settings))
    assert stopped.value.code not in (0, None)
    return f"{stopped.value} {capsys.readouterr().err}"


def numbered(run):
    return sorted(int(p.stem) for p in (run / "checkpoints").glob("0*.pt"))


# ------------------------------------------------------------------------------------------------------ drift meter

def test_drift_of_codes_counts_from_where_the_codebook_was_started(tmp_path):
    """Not from the random table that k-means has replaced: that is no motion of codes."""
    train_provq.main(to_words(TINY | {"results_dir": tmp_path, "val_every": 1, "keep_checkpoints": 99}))
    started = np.load(tmp_path / "latents" / "0000002_codebook_initialised.npz")["codes"]
    first = load_file(tmp_path / "checkpoints" / "0000003.pt")["model"]["quantize.quantizer.embedding.weight"]
    found = {row["step"]: row["code_drift"] for row in rows(tmp_path, "validation.jsonl")}
    assert found[3] == pytest.approx(drift(torch.from_numpy(started), first), rel=1e-6)
    assert 0 < found[3] < 0.1
    assert found[2] == 0


def test_drift_of_a_single_code_is_relative_to_its_size(tmp_path):
    meter = DriftMeter()
    meter.update(code=torch.tensor([[3.0, 4.0]]))
    assert meter.update(code=torch.tensor([[3.0, 4.5]])) == {"code_drift": pytest.approx(0.1)}
    assert meter.update(code=torch.tensor([[3.0, 4.5]])) == {"code_drift": 0.0}
    train_provq.main(to_words(TINY | {"results_dir": tmp_path, "val_every": 1, "codebook_size": 1}))
    assert max(row["code_drift"] for row in rows(tmp_path, "validation.jsonl")) < 1


# ------------------------------------------------------------------------------------------------ checkpoints on disk

def damage(path, how, monkeypatch):
    content = path.read_bytes()
    if how == "cut in the middle":
        path.write_bytes(content[:1000] + content[1100:])
    elif how == "a link to nothing":
        path.unlink()
        path.symlink_to("gone.pt")
    elif how == "a folder":
        path.unlink()
        path.mkdir()
    else:
        number = {"a failing disk": errno.EIO, "another user's": errno.EACCES}[how]

        def load(other, *args):
            if other == path:
                raise OSError(number, os.strerror(number), str(path))
            return load_file(other, *args)

        monkeypatch.setattr(checkpoint, "load_file", load)


@pytest.mark.parametrize("how", ["cut in the middle", "a link to nothing", "a folder", "a failing disk",
                                 "another user's"])
def test_the_newest_readable_checkpoint_is_used_and_others_are_named(tmp_path, monkeypatch, capsys, how):
    saver = Checkpointer(tmp_path, keep_last=3)
    for step in (1, 2, 3):
        path = saver.save(step, {"step": step, "weights": torch.randn(1000)})
    damage(path, how, monkeypatch)
    assert saver.load_latest()["step"] == 2
    said = capsys.readouterr().out
    assert said.startswith("skipping a checkpoint that cannot be read: ")
    assert said.count(f"{path}") == 1


@pytest.mark.parametrize("step", range(1000, 60_000, 9871))
def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(trained, tmp_path, capsys, step):
    shutil.copytree(trained / "vq", tmp_path / "run", ignore=shutil.ignore_patterns("codes"))
    newest = tmp_path / "run" / "checkpoints" / f"{STEPS:07d}.pt"
    content = newest.read_bytes()
    newest.write_bytes(content[:step] + content[step + 100 :])
    train_provq.main(to_words(TINY | {"results_dir": tmp_path / "run"}))
    said = capsys.readouterr().out
    assert f"cannot be read: {newest}" in said
    assert f"resuming {tmp_path / 'run'} at step {STEPS - 1}" in said
    assert_same_run(trained / "vq", tmp_path / "run", STEPS)


def test_a_checkpoint_of_something_else_is_named(tmp_path, capsys):
    Checkpointer(tmp_path / "run" / "checkpoints").save(1, {"step": 1, "model": {}})
    assert "newest checkpoint has no metrics, last_validation, best, config, optimizer" in fails(
        train_provq.main, TINY | {"results_dir": tmp_path / "run"}, capsys)


def test_a_checkpoint_too_many_goes_at_the_next_start(trained, tmp_path):
    """A kill after a checkpoint was written and before the oldest was removed."""
    shutil.copytree(trained / "vq", tmp_path / "run", ignore=shutil.ignore_patterns("codes"))
    folder = tmp_path / "run" / "checkpoints"
    for step in (3, 4):
        shutil.copy(folder / f"{STEPS:07d}.pt", folder / f"{step:07d}.pt")
    train_provq.main(to_words(TINY | {"results_dir": tmp_path / "run"}))
    assert numbered(tmp_path / "run") == [STEPS - 1, STEPS]
    assert (folder / "best.pt").exists()


# ----------------------------------------------------------------------------------------------------------- disks

@pytest.fixture
def small_disk(tmp_path):
    """mount(size) -> an empty folder that holds no more."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a small file system needs the right to mount one")
        return folder

    yield mount
    subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False)


@pytest.mark.parametrize("processes", [None, 2])
def test_a_full_disk_ends_training_in_one_line_and_loses_nothing(trained, tmp_path, small_disk, processes):
    size = (trained / "vq" / "checkpoints" / f"{STEPS:07d}.pt").stat().st_size
    run = small_disk(f"{int(5.5 * size)}") / "run"  # 2 checkpoints, best.pt, one that is written, and half a file
    words = to_words(TINY | {"results_dir": run, "keep_checkpoints": 99, "max_steps": 100})
    process = training_runs.start(train_provq.__file__, words, processes=processes)
    out, _ = process.communicate()
    (line,) = [line for line in out.splitlines() if "error: " in line]
    assert line.startswith("tokenizer/train_provq.py: error: [Errno 28] No space left on device (")
    assert f" MB free): '{run}/" in line
    assert out.partition("torch.distributed.elastic")[0].count("Traceback") == (processes is not None)  # torchrun's own
    done = numbered(run)[-1]
    assert done >= 2
    for path in (run / "checkpoints").iterdir():
        load_file(path)
    shutil.copytree(run, tmp_path / "roomy")
    train_provq.main(to_words(TINY | {"results_dir": tmp_path / "roomy"}))
    assert [row["step"] for row in rows(tmp_path / "roomy")] == list(range(1, STEPS + 1))
    if processes is None:  # on two, sums are rounded otherwise
        assert_same_run(trained / "vq", tmp_path / "roomy", STEPS)


def test_commands_name_the_file_that_a_full_disk_refused(trained, small_disk):
    disk = small_disk("12k")
    with pytest.raises(SystemExit, match=rf"No space left on device \(0\.0 MB free\): '{disk}/out/"):
        reconstruct.main([str(trained / "vq"), "digits", "--max-images", "40", "--out", str(disk / "out")])
    for path in (disk / "out").rglob("*.*"):
        assert path.stat().st_size > 0
    shutil.rmtree(disk / "out")
    with pytest.raises(SystemExit, match=rf"{disk}/codes/codes-00000-of-00008\.npy: .* written \(0\.0 MB free\)"):
        extract_codes.main(["--vq-ckpt", str(trained / "vq"), "--code-path", str(disk / "codes"), "--device", "cpu"])
    lock.release()


@pytest.mark.parametrize("limit", [100, 20_000])
def test_a_write_that_fails_names_its_file_and_leaves_none(tmp_path, limit):
    """torch.save hides the error of the file system under one of its own."""
    program = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch\n"
               "from tokenizer.runtime.checkpoint import atomic_write\n"
               f"atomic_write({str(tmp_path / 'a.pt')!r}, lambda file: torch.save(torch.ones(20_000), file))")
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert result.stderr.splitlines()[-1] == f"OSError: [Errno 27] File too large: '{tmp_path / 'a.pt'}'"
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------- signals

def take_notice():
    """Of signals that the tests may have been started without, by nohup or in the background."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def start(trained, tmp_path):
    """start(trainer, ...) -> its process in a session of its own, once it has logged `until` steps to tmp_path."""
    started = []

    def start_one(name, processes=None, until=2, **changes):
        script, settings = trainer(name, trained)
        words = to_words(settings | RARELY | {"results_dir": tmp_path} | changes)
        process = training_runs.start(script, words, processes=processes, start_new_session=True,
                                      preexec_fn=take_notice)
        started.append(process)
        training_runs.wait_for_row(tmp_path, until, process)
        return process

    yield start_one
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("name", ["image", "gpt", "protein"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGHUP, 0)])
def test_ctrl_c_and_a_closed_terminal_save(start, tmp_path, name, number, status):
    process = start(name)
    process.send_signal(number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == status, out
    assert "Traceback" not in out
    assert "stopped by a signal at step" in out
    assert numbered(tmp_path) == [rows(tmp_path)[-1]["step"]]


@pytest.mark.parametrize("name", ["image", "gpt", "protein"])
def test_ctrl_c_under_torchrun_saves(start, tmp_path, name):
    process = start(name, processes=2)
    process.send_signal(signal.SIGINT)  # which torchrun passes on
    out, _ = process.communicate(timeout=120)
    assert "stopped by a signal at step" in out, out
    assert numbered(tmp_path) == [rows(tmp_path)[-1]["step"]]


def test_ctrl_c_in_a_terminal_reaches_data_workers_too(start, tmp_path):
    process = start("image", num_workers=2)
    os.killpg(process.pid, signal.SIGINT)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT, out
    assert "Traceback" not in out
    assert numbered(tmp_path) == [rows(tmp_path)[-1]["step"]]


@pytest.mark.parametrize("processes", [None, 2])
def test_ctrl_c_twice_ends_at_once(start, tmp_path, processes):
    process = start("image", processes=processes, until=1, global_batch_size=1536)  # steps of seconds
    time.sleep(0.5)  # into the next one
    process.send_signal(signal.SIGINT)
    time.sleep(0.8)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == (1 if processes else -signal.SIGINT), out
    assert out.count("Ctrl-C again ends at once") == 1
    assert numbered(tmp_path) == []
    assert not [line for line in out.splitlines() if "stopped by a signal" in line]


def test_a_terminal_that_closes_takes_no_checkpoint_with_it(trained, tmp_path):
    """Nothing can be written to it any more, not even the row that is due before the checkpoint."""
    script, settings = trainer("image", trained)
    ours, theirs = os.openpty()

    def take_terminal():
        take_notice()
        os.setsid()
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = subprocess.Popen([sys.executable, str(script), *to_words(settings | RARELY | {"results_dir": tmp_path})],
                               stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=take_terminal)
    os.close(theirs)
    training_runs.wait_for_row(tmp_path, 2, process)
    os.close(ours)
    assert process.wait(timeout=120) == 0
    assert numbered(tmp_path) == [rows(tmp_path)[-1]["step"]]


def test_a_run_under_nohup_outlives_its_terminal(trained, tmp_path):
    script, settings = trainer("image", trained)
    words = to_words(settings | RARELY | {"results_dir": tmp_path, "max_steps": 40})
    process = training_runs.start(script, words, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    training_runs.wait_for_row(tmp_path, 2, process)
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    assert rows(tmp_path)[-1]["step"] == 40


def test_signals_are_as_before_when_a_run_is_over(tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    train_provq.main(to_words(TINY | {"results_dir": tmp_path}))
    assert [signal.getsignal(number) for number in numbers] == before


# ------------------------------------------------------------------------------------------------------ divergence

def test_a_loss_beyond_what_exp_takes_is_divergence(trained, tmp_path, monkeypatch, capsys):
    losses = train_c2i.Trainer._losses

    def huge(self, model, batch):
        loss, right = losses(self, model, batch)
        return loss + 710, right

    monkeypatch.setattr(train_c2i.Trainer, "_losses", huge)
    said = fails(train_c2i.main, gpt(trained, results_dir=tmp_path / "run"), capsys)
    assert "train_c2i.py: error: step 4: val_perplexity is inf at step 4: the run has diverged: lower --lr" in said


# ------------------------------------------------------------------------------------------------------------ flags

MODULES = {"image": (train_provq.main, train_config, {}), "protein": (protein_train.main, protein_config, {}),
           "gpt": (train_c2i.main, gpt_config, {"preset": "digits"})}
SIZES = [(name, field.name) for name, (_, module, _) in MODULES.items() for field in fields(module.TrainConfig)
         if field.type in ("int", "int | None")]
RATES = [(name, field.name) for name, (_, module, _) in MODULES.items() for field in fields(module.TrainConfig)
         if field.type == "float"]


@pytest.mark.parametrize(("name", "field"), SIZES)
def test_absurd_sizes_are_refused_by_flag(trained, tmp_path, capsys, name, field):
    main, _, more = MODULES[name]
    flag = f"--{field.replace('_', '-')}"
    base = {"image": TINY, "protein": PROTEIN, "gpt": gpt(trained)}[name] | more | {"results_dir": tmp_path / "run"}
    assert f"argument {flag}: {10**20} does not fit into 64 bits" in fails(main, base | {field: 10**20}, capsys)
    for value in (2**62, 0, -1):
        said = flag  # where the value makes sense
        try:
            main(to_words(base | {field: value, "dry_run": True}))
        except SystemExit as stopped:
            said = f"{stopped} {capsys.readouterr().err}"
        assert flag in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "field"), RATES)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_numbers_that_are_none_are_refused_by_flag(capsys, name, field, value):
    main, _, more = MODULES[name]
    with pytest.raises(SystemExit, match="2"):
        main(to_words(more | {field: value}))
    assert f"argument --{field.replace('_', '-')}: " in capsys.readouterr().err


def test_rates_of_probes_must_be_numbers(capsys):
    with pytest.raises(SystemExit, match="2"):
        train_task.main(["--results-dir", "x", "--tokenizer", "foldseek", "--all", "--learning-rates", "0.1", "nan"])
    assert "argument --learning-rates: nan is not a finite number" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "field"), [
    ("image", "data_path"), ("image", "val_path"), ("image", "lpips_vgg_weights"), ("protein", "data_path"),
    ("protein", "val_path"), ("gpt", "code_path"), ("gpt", "val_code_path"), ("gpt", "vq_ckpt")])
def test_an_empty_path_is_not_the_current_folder(tmp_path, monkeypatch, capsys, name, field):
    monkeypatch.chdir(tmp_path)
    main, _, more = MODULES[name]
    assert f"argument --{field.replace('_', '-')}: the text is empty" in fails(main, more | {field: ""}, capsys)


@pytest.mark.parametrize(("changes", "said"), [
    ({"encoder_width": 0}, "--encoder-width is 0; it must be at least 1"),
    ({"neighbours": -3}, "--neighbours is -3; it must be at least 1"),
    ({"decoder_width": 30, "decoder_heads": 2}, "--decoder-width 30 must be an even multiple of --decoder-heads 2"),
    ({"decoder_layers": 0}, "--decoder-layers is 0; it must be at least 1"),
    ({"codebook_embed_dim": 0}, "--codebook-embed-dim is 0; it must be at least 1"),
])
def test_sizes_of_the_protein_model_are_named_as_flags(tmp_path, capsys, changes, said):
    assert said in fails(protein_train.main, PROTEIN | {"results_dir": tmp_path / "run"} | changes, capsys)


def test_too_little_memory_is_one_line(tmp_path, capsys):
    sizes = {"codebook_size": 2**24, "codebook_embed_dim": 2**16, "kmeans_batches": 2**20}  # 4 TiB of codes
    _, most = limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**40, most))
    try:
        said = fails(train_provq.main, TINY | sizes | {"results_dir": tmp_path / "run"}, capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert "train_provq.py: error: out of memory (" in said


# ----------------------------------------------------------------------------------------------- length and dry run

@pytest.mark.parametrize("name", ["image", "protein"])
@pytest.mark.parametrize(("length", "said"), [
    ({"max_steps": 2}, "--max-steps 2: the run would end after 2 steps, before stage 3, with no discrete tokenizer. "
                       "Give at least 4 steps (--warmup-steps 2 + --transition-steps 2), shorten these "
                       "(fractions such as 0.25 will do), or say --stop-after warmup"),
    ({"max_steps": 3}, "or say --stop-after transition"),
    ({"max_steps": 20, "warmup_steps": 0.99, "transition_steps": 0.01},  # 21 steps would be refused as well
     "Rounded, these are --warmup-steps 20 + --transition-steps 1: give more steps, shorter stages, or say"),
    ({"max_steps": 20, "warmup_steps": 0.5, "transition_steps": 0.5, "recluster": True},  # likewise
     "--recluster comes after step 20, --max-steps 20: the run ends there; give shorter stages, or leave"),
    ({"max_steps": None, "epochs": 1, "warmup_steps": 0.6, "transition_steps": 0.5},
     "--warmup-steps 0.6 and --transition-steps 0.5 of the run are more than all of it; give fractions of at most 1"),
    ({"max_steps": 4, "warmup_steps": 4, "transition_steps": 0}, "Give at least 5 steps (--warmup-steps 4 + "),
    ({"max_steps": None, "epochs": 1, "warmup_steps": 900}, "--epochs 1 of "),
    ({"max_steps": 5, "warmup_steps": 4, "transition_steps": 4, "val_every": 1, "adaptive_warmup_patience": 1,
      "adaptive_warmup_min_steps": 2}, "Give at least 6 steps"),
    ({"stop_after": "transition", "transition_steps": 0}, "--stop-after transition: there is no such stage"),
    ({"stop_after": "warmup", "adaptive_warmup_patience": 2}, "--stop-after warmup needs to know where stages end"),
])
def test_a_run_too_short_for_its_stages_is_refused(tmp_path, capsys, name, length, said):
    main, settings = {"image": (train_provq.main, TINY), "protein": (protein_train.main, PROTEIN)}[name]
    assert said in fails(main, settings | {"results_dir": tmp_path / "run"} | length, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("stage", "steps"), [("warmup", 2), ("transition", 4)])
def test_a_run_that_says_so_ends_with_a_stage_and_can_be_continued(trained, tmp_path, stage, steps):
    train_provq.main(to_words(TINY | {"results_dir": tmp_path, "stop_after": stage}))
    assert json.loads((tmp_path / "summary.json").read_text())["step"] == steps
    assert json.loads((tmp_path / "config.json").read_text())["max_steps"] == STEPS  # as planned
    train_provq.main(to_words(TINY | {"results_dir": tmp_path}))
    assert rows(tmp_path) == rows(trained / "vq")


@pytest.mark.parametrize("name", ["image", "protein"])
@pytest.mark.parametrize(("changes", "said"), [
    ({"adaptive_warmup_patience": 3, "warmup_steps": 0} | NO_KMEANS,
     "--adaptive-warmup-patience 3: there is no warm-up to end early with --warmup-steps 0; give"),
    ({"adaptive_warmup_patience": 3, "warmup_steps": 120, "val_every": 1000, "max_steps": 300},
     "--adaptive-warmup-patience 3 could never end the warm-up early: with --val-every 1000 the first validation that "
     "may is after step 4000, and --warmup-steps is 120; give --val-every 29 or less, or leave it out"),
    ({"adaptive_warmup_patience": 3, "warmup_steps": 120, "val_every": 30, "max_steps": 300}, "is after step 120, and"),
    ({"adaptive_warmup_patience": 1, "warmup_steps": 12, "val_every": 5, "adaptive_warmup_min_steps": 11,
      "max_steps": 90}, "is after step 15, and --warmup-steps is 12; lengthen the warm-up, or leave it out"),
    ({"adaptive_warmup_patience": 1, "val_every": 1}, "is after step 2, and --warmup-steps is 2; lengthen"),
    ({"adaptive_warmup_patience": 1, "warmup_steps": 0.5, "transition_steps": 0, "max_steps": 8},
     "is after step 8, and --warmup-steps is 4"),
    ({"adaptive_warmup_patience": 1000, "warmup_steps": 0.5, "transition_steps": 0, "max_steps": None, "epochs": 1},
     "is after step 4004, and --warmup-steps is "),
])
def test_a_warm_up_that_could_not_end_early_is_refused(tmp_path, capsys, name, changes, said):
    main, settings = {"image": (train_provq.main, TINY), "protein": (protein_train.main, PROTEIN)}[name]
    assert said in fails(main, settings | {"results_dir": tmp_path / "run"} | changes, capsys)
    assert not (tmp_path / "run").exists()


def test_a_run_that_began_with_such_a_warm_up_resumes(tmp_path, monkeypatch):
    words = TINY | {"results_dir": tmp_path / "run", "adaptive_warmup_patience": 1}
    with monkeypatch.context() as earlier:
        earlier.setattr(curriculum_config, "require_early_end", lambda *_, **__: None)
        earlier.setattr(curriculum, "require_early_end", lambda *_, **__: None)
        train_provq.main(to_words(words | {"max_steps": 5}))
    train_provq.main(to_words(words))
    assert rows(tmp_path / "run")[-1]["step"] == STEPS


@pytest.mark.parametrize("name", ["image", "protein"])
def test_the_cadence_of_a_run_may_change_once_its_adaptive_warm_up_is_over(tmp_path, capsys, name):
    main, settings = {"image": (train_provq.main, TINY), "protein": (protein_train.main, PROTEIN)}[name]
    words = settings | {"results_dir": tmp_path / "run", "adaptive_warmup_patience": 1, "warmup_steps": 3,
                        "keep_checkpoints": 99} | ({"lr_schedule": "constant"} if name == "protein" else {})
    main(to_words(words | {"val_every": 1, "max_steps": 6}))
    main(to_words(words | {"val_every": 5}))
    assert rows(tmp_path / "run")[-1]["step"] == STEPS
    newest = sorted((tmp_path / "run" / "checkpoints").glob("0*.pt"))
    for path in newest[1:]:
        path.unlink()
    capsys.readouterr()
    said = fails(main, words | {"val_every": 6}, capsys)  # at step 1, and so in the warm-up
    assert "--adaptive-warmup-patience 1 could never end the warm-up early: with --val-every 6" in said


def test_a_short_run_may_hope_for_an_adaptive_warmup(tmp_path, capsys):
    train_provq.main(to_words(TINY | {"results_dir": tmp_path / "run", "max_steps": 5, "warmup_steps": 5,
                                      "val_every": 1, "adaptive_warmup_patience": 1, "dry_run": True}))
    assert "note: these 5 steps reach stage 3 only if the adaptive warm-up ends before step 3" in (
        capsys.readouterr().err)


@pytest.mark.parametrize("name", ["image", "protein", "gpt"])
def test_the_settings_of_a_run_of_epochs_start_another_and_resume_it(trained, tmp_path, capsys, name):
    """Its config.json holds the steps that the epochs came to as well."""
    main, _, _ = MODULES[name]
    settings = {"image": TINY | {"global_batch_size": 256}, "protein": PROTEIN,
                "gpt": gpt(trained) | {"global_batch_size": 256}}[name]
    stages = {} if name == "gpt" else {"warmup_steps": 0.25, "transition_steps": 0.25}
    run, again, file = tmp_path / "run", tmp_path / "again", str(tmp_path / "run" / "config.json")
    main(to_words(settings | stages | {"results_dir": run, "max_steps": None, "epochs": 1}))
    recorded = json.loads((run / "config.json").read_text())
    assert recorded["epochs"] == 1
    assert recorded["max_steps"] == rows(run)[-1]["step"]
    main(["--config", file, "--results-dir", str(again)])
    assert rows(again) == rows(run)
    capsys.readouterr()
    for length, value in (("max_steps", recorded["max_steps"] + 1), ("epochs", 2)):
        main(["--config", file, "--results-dir", str(tmp_path / "more"), f"--{length.replace('_', '-')}", str(value),
              "--dry-run"])
        longer = json.loads(capsys.readouterr().out)
        assert longer[length] == value
        assert longer["max_steps"] > recorded["max_steps"]
    max((run / "checkpoints").glob("0*.pt")).unlink()  # as if killed before it
    main(["--config", file])
    assert f"resuming {run} at step {recorded['max_steps'] - 1}" in capsys.readouterr().out
    assert rows(run) == rows(again)


@pytest.mark.parametrize("name", ["image", "protein", "gpt"])
def test_a_dry_run_prints_json_and_its_notes_beside_it(trained, tmp_path, capsys, name):
    main, _, _ = MODULES[name]
    settings = {"image": TINY, "protein": PROTEIN, "gpt": gpt(trained)}[name]
    held = tmp_path / "held"
    lock.own(held, "--results-dir")  # whoever only looks needs no lock
    main(to_words(settings | {"results_dir": held, "dry_run": True}))
    out, err = capsys.readouterr()
    assert json.loads(out)["max_steps"] == STEPS
    notes = {"image": "--augment auto: none", "protein": "training and 2 validation chains", "gpt": ""}
    assert notes[name] in err
    lock.release()
