"""Result lines: whole or not there, read back as what was run, of one writer at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("size", [1, 5, 300])
def test_a_disk_that_takes_a_part_gets_the_rest(size, tmp_path, monkeypatch):
    path, write = tmp_path / "results.jsonl", os.write
    monkeypatch.setattr(os, "write", lambda descriptor, content: write(descriptor, content[:size]))
    append(path, line(1), line(2))
    assert [result.run.seed for result in read(path)] == [1, 2]


def test_a_full_disk_is_named_and_loses_no_line(tmp_path):
    path = tmp_path / "results.jsonl"
    append(path, line(1))
    script = ("import resource, signal, test_store; from pathlib import Path\n"
              "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
              f"resource.setrlimit(resource.RLIMIT_FSIZE, ({path.stat().st_size + 100}, resource.RLIM_INFINITY))\n"
              f"test_store.append(Path({str(path)!r}), test_store.line(2))")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, *sys.path)))}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment,
                          cwd=Path(__file__).parent)
    assert done.stderr.splitlines()[-1] == f"OSError: [Errno 27] File too large: '{path}'"
    assert len(path.read_text().splitlines()) == 2
    append(path, line(3))
    assert [result.run.seed for result in read(path)] == [1, 3]


def test_a_whole_line_without_its_newline_is_a_result(tmp_path):
    path = tmp_path / "results.jsonl"
    append(path, line(1), line(2))
    path.write_text(path.read_text().removesuffix("\n"))  # an editor
    assert [result.run.seed for result in read(path)] == [1, 2]
    append(path, line(3))
    assert [result.run.seed for result in read(path)] == [1, 2, 3]


@pytest.mark.parametrize("content", [
    b"PK\x03\x04 \n an archive, whose end is \xff no line", b"# a document\n\nwithout an end", b"a single line",
    b'{"runs": []}', b'{"arm": "x"}', b"[1, 2]"])
def test_a_file_of_something_else_stays_as_it_is(content, tmp_path):
    path = tmp_path / "other"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"--out {path}(:1: no result of a run .*name another file|: cannot be read)"):
        append(path, line(1))
    assert path.read_bytes() == content


def test_a_folder_and_a_device_are_no_files(tmp_path):
    for path in (tmp_path, Path("/dev/null")):
        with pytest.raises(ValueError, match=rf"--out {path} is (a folder|no regular file)"):
            append(path, line(1))


@pytest.mark.parametrize("bad", ["{}", "no json", "", "[]",
                                 '{"arm": "x", "options": {"new": 1}, "setting": {}, "seed": 0}'])
def test_other_lines_are_named(bad, tmp_path):
    path = tmp_path / "results.jsonl"
    append(path, line(1))
    path.write_text(path.read_text() + bad + "\n")
    with pytest.raises(ValueError, match=r"results.jsonl:2: no result of a run"):
        read(path)


@pytest.mark.parametrize("changes", [
    {"metrics": {"psnr": float("nan")}}, {"metrics": {"psnr": "20"}}, {"metrics": {"ssim": 0.5}}, {"metrics": [20.0]},
    {"metrics": {"psnr": 20.0, "usage": None}}, {"seed": "1"}, {"seed": [1]}, {"arm": None},
    {"options": {"lr": float("inf")}}, {"options": {"code_lr_scale": 0}}, {"setting": {"data": ["x"]}},
], ids=str)
def test_edited_lines_are_named(changes, tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text(json.dumps(line(1)) + "\n" + json.dumps(line(2) | changes) + "\n")
    with pytest.raises(ValueError, match=r"results.jsonl:2: no result of a run"):
        read(path)


def test_a_run_that_is_there_twice_counts_once_and_must_be_the_same(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in (line(1), line(2), line(1))))
    assert [result.run.seed for result in read(path)] == [1, 2]
    for other in (line(2, psnr=20.5), line(2) | {"metrics": None}):
        path.write_text("".join(json.dumps(each) + "\n" for each in (line(1), line(2), other)))
        with pytest.raises(ValueError, match=rf"{path}:3 and {path}:2 are of one run, with other numbers: keep one"):
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
    more = line(1)
    more["metrics"]["ssim"] = 0.5  # of a newer version
    append(second, more, line(2))
    assert [(result.run.seed, result.metrics) for result in read_all([first, second])] == [
        (1, {"psnr": 20}), (2, {"psnr": 20})]
    third = tmp_path / "other.jsonl"
    append(third, line(2, psnr=99.0))
    with pytest.raises(ValueError, match=rf"{third}:1 and {second}:2 are of one run, with other numbers"):
        read_all([first, second, third])
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
