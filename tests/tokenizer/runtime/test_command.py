"""tokenizer/runtime/command.py: one line for mistakes, tracebacks for defects, outputs tried first, bounds of flags."""

import argparse
import os
import platform
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

from evaluations import generation, train_extractor
from tokenizer.runtime.command import (
    CannotContinue,
    as_flag_errors,
    command,
    make_parser,
    refuse_early,
    require_flags_at_least,
    require_flags_positive,
    require_one_process,
    require_out_file,
    require_out_folder,
)
from tokenizer.runtime.config import require_at_least, require_positive


def fail(error):
    with command("tool.py"):
        raise error


@pytest.mark.parametrize("error", [
    ValueError("--size is 3"), OSError("disk full"), FileNotFoundError("x: no such file"), ImportError("no lmdb"),
    CannotContinue("7 images are unreadable"), FloatingPointError("diverged"),
])
def test_mistakes_of_users_end_the_program(error):
    with pytest.raises(SystemExit) as stopped:
        fail(error)
    assert stopped.value.code == f"tool.py: error: {error}"  # Python prints a text and exits with status 1
    assert stopped.value.__cause__ is error


@pytest.mark.parametrize(("rank", "local", "end"), [
    (None, None, "tool.py: error: --size is 3"), ("0", "0", "tool.py: error: --size is 3"),
    ("8", "0", f"tool.py: error: --size is 3 (on {platform.node()})"),  # of another machine, which may lack a file
    ("1", "1", 2),  # the first of its machine says it, and does not end it under every launcher
])
def test_the_first_process_of_a_machine_says_what_is_wrong_before_slow_imports(monkeypatch, rank, local, end):
    for name, value in (("RANK", rank), ("LOCAL_RANK", local), ("WORLD_SIZE", rank and "16")):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)

    def check(size):
        raise ValueError(f"--size is {size}")

    with pytest.raises(SystemExit) as stopped:
        refuse_early("tool.py", lambda: 3, str, check)
    assert stopped.value.code == end


@pytest.mark.parametrize(("world", "said"), [("2", ""), ("1", "the following arguments are required: --size")])
def test_a_mistyped_flag_is_said_once_by_several_processes(monkeypatch, capsys, world, said):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", world)):
        monkeypatch.setenv(name, value)
    parser = make_parser("tool.py", "Does it.")
    parser.add_argument("--size", required=True)
    with pytest.raises(SystemExit) as stopped:
        refuse_early("tool.py", lambda: parser.parse_args([]))
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert said in err if said else err == ""


def test_a_mistake_is_not_hidden_under_all_flags(capsys):
    parser = make_parser("tool.py", "Does it.")
    for number in range(30):
        parser.add_argument(f"--flag-{number}", type=int)
    with pytest.raises(SystemExit):
        parser.parse_args(["--flag-3", "x"])
    usage, error = capsys.readouterr().err.splitlines()
    assert "--help" in usage
    assert "--flag-3: invalid int value: 'x'" in error


@pytest.mark.parametrize("error", [KeyError("step"), TypeError("no len"), AssertionError(), RuntimeError("defect"),
                                   AttributeError("x"), IndexError(3), KeyboardInterrupt()])
def test_defects_pass_through(error):
    with pytest.raises(type(error)) as raised:
        fail(error)
    assert raised.value is error


@pytest.mark.parametrize(("body", "status", "seen"), [
    ("raise CannotContinue('disk full')", 1, r"tool\.py: error: disk full\n"),
    ("{}['step']", 1, r"Traceback \(most recent(.|\n)*KeyError: 'step'\n"),
    ("refuse_early('tool.py', list) or {}.pop('step')", 1, r"Traceback \(most recent(.|\n)*KeyError: 'step'\n"),
    ("refuse_early('tool.py', list) or os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT, ""),
])
def test_what_a_user_sees(body, status, seen):
    program = f"import os, signal\nfrom tokenizer.runtime.command import *\nwith command('tool.py'):\n    {body}\n"
    done = subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True,
                          capture_output=True, timeout=120, check=False)
    assert done.returncode == status
    assert re.fullmatch(seen, done.stderr), done.stderr


def test_the_normal_end_leaves_the_process_group():
    script = ("import torch.distributed as dist\nfrom tokenizer.runtime import distributed\n"
              "from tokenizer.runtime.command import command\nwith command('tool.py'):\n    distributed.init('cpu')\n"
              "    assert dist.is_initialized()\nassert not dist.is_initialized()\n")
    single = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, **single, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_one_process(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    require_one_process()
    monkeypatch.setenv("WORLD_SIZE", "1")
    require_one_process()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start it with python, not torchrun"):
        require_one_process()
    with pytest.raises(SystemExit, match=r"^tool.py: error: .*start it with python, not torchrun$"):
        with command("tool.py", one_process=True):
            raise AssertionError("not reached")


# ---------------------------------------------------------------- outputs


def test_outputs_that_can_be_written_leave_nothing_behind(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "old.json").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    for file in ("new.json", "old.json", "a/b/new.json", "there/new.json"):
        require_out_file(tmp_path / file)
    for folder in ("new", "a/b", "there"):
        require_out_folder(tmp_path / folder)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "old.json").read_text() == "precious"


@pytest.mark.parametrize(("check", "out", "message"), [
    (require_out_file, "folder", r"--picture .*/folder is a folder; name a file in it"),
    (require_out_file, "pipe", r"--picture .*/pipe is no regular file; name another"),
    (require_out_file, "file/x.png", r"--picture: folder .*/file: no files can be written there"),
    (require_out_file, "file/x/y.png", r"--picture: folder .*/file/x: no files can be written there"),
    (require_out_folder, "file", r"--picture .*/file: no files can be written there"),
    (require_out_folder, "file/x", r"--picture .*/file/x: no files can be written there"),
])
def test_outputs_that_cannot_be_written_are_named(check, out, message, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("precious")
    os.mkfifo(tmp_path / "pipe")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=message):
        check(tmp_path / out, "--picture")
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("out", ["data.zip", "link.zip", "a/../data.zip"])
def test_an_output_replaces_nothing_that_is_read(out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data.zip").write_text("precious")
    Path("link.zip").symlink_to("data.zip")
    with pytest.raises(ValueError, match=f"--out {out} is what is read, and would be lost; name another file"):
        require_out_file(Path(out), inputs=[None, "other", str(tmp_path / "data.zip")])
    with pytest.raises(ValueError, match="is what is read"):
        train_extractor.check(train_extractor.parse_args(["--data-path", "data.zip", "--out", out]))
    with pytest.raises(ValueError, match="is what is read"):
        generation.check(generation.parse_args(["digits", "data.zip", "--out", out]))
    require_out_file(Path("other.zip"), inputs=[None, "data.zip"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into any folder")
def test_a_folder_of_someone_else(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(ValueError, match="locked: no files can be written there"):
        require_out_file(tmp_path / "locked" / "x")


# ---------------------------------------------------------------- flags


def parse(words):
    parser = make_parser("folder/tool.py", "First line\n    kept as it is")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args(words)
    require_flags_at_least(parser, args, 1, "batch_size image_size")
    require_flags_at_least(parser, args, 0, "weight_decay seeds")
    require_flags_positive(parser, args, "lr")
    return args


def test_flags_within_their_bounds():
    args = parse(["--batch-size", "1", "--weight-decay", "0", "--lr", "1e30", "--seeds", "0", str(2**63 - 1)])
    assert (args.batch_size, args.image_size, args.lr) == (1, None, 1e30)


@pytest.mark.parametrize(("words", "message"), [
    (["--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
    (["--image-size", "-1"], "--image-size is -1; it must be at least 1"),
    (["--weight-decay", "-0.5"], "--weight-decay is -0.5; it must be at least 0"),
    (["--weight-decay", "nan"], "--weight-decay is nan; it must be at least 0"),
    (["--weight-decay", "inf"], "--weight-decay is inf; it must be at least 0 and finite"),
    (["--lr", "0"], "--lr is 0.0; it must be positive"),
    (["--lr", "nan"], "--lr is nan; it must be positive"),
    (["--lr", "inf"], "--lr is inf; it must be positive and finite"),
    (["--lr=-inf"], "--lr is -inf; it must be positive"),
    (["--seeds", "3", "-1"], "--seeds is -1; it must be at least 0"),
    (["--seeds", str(2**63)], f"--seeds is {2**63}; it must be at least 0 and below 2^63"),
    (["--batch-size", "nan"], "argument --batch-size: invalid int value: 'nan'"),
    (["--batch", "3"], "unrecognized arguments: --batch 3"),  # no abbreviations
])
def test_flags_out_of_bounds_are_named(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(words)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"folder/tool.py: error: {message}"


def test_help_shows_the_description_as_it_is_written(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "First line\n    kept as it is\n" in capsys.readouterr().out


def test_other_mistakes_of_flags(capsys):
    with pytest.raises(SystemExit) as stopped, as_flag_errors(make_parser("tool.py", None)):
        raise ValueError("--top-p is 2; it must lie in (0, 1]")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("tool.py: error: --top-p is 2; it must lie in (0, 1]\n")
    with pytest.raises(KeyError), as_flag_errors(make_parser("tool.py", None)):
        raise KeyError("a defect")


def test_configurations_have_the_same_bounds():
    cfg = argparse.Namespace(lr=(0.1, 0.0), steps=None, width=0)
    require_at_least(cfg, 0, "steps width lr")
    with pytest.raises(ValueError, match=r"^--width is 0; it must be at least 1$"):
        require_at_least(cfg, 1, "steps width")
    with pytest.raises(ValueError, match=r"^--lr is 0\.0; it must be positive$"):
        require_positive(cfg, "lr")


@pytest.mark.parametrize(("words", "flag"), [
    (["--lr", ""], "--lr"), (["--lr="], "--lr"), (["--seeds", "1", ""], "one argument"), ([""], "one argument"),
])
def test_empty_words_are_refused(words, flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(words)
    assert stopped.value.code == 2
    said = f"{flag}: the text is empty; leave it out, or for the current folder write a dot"
    assert capsys.readouterr().err.splitlines()[-1] == f"folder/tool.py: error: {said}"
