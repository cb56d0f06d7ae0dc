"""Folders of trained runs become one file and one table; what would make either wrong is refused."""

import json
import os
import subprocess
import sys

import pytest
from places import ROOT

from evaluations.evidence import collect, trained


def make_run(root, row, seed, psnr, *, reports=None, settings=None, finished=True, inputs=None):
    folder = root / f"{row}-s{seed}"
    (folder / "evaluation").mkdir(parents=True)
    config = {"global_seed": seed, "results_dir": folder.name, "lr": 1e-3, "data_path": "/a/path", **(settings or {})}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text('{"step": 9}\n')
    (folder / "validation.jsonl").write_text(json.dumps({"step": 9, "psnr": psnr}) + "\n")
    if finished:
        found = {"step": 9, "psnr": psnr, "lpips": None, "usage": 0.5, **({"inputs": inputs} if inputs else {})}
        (folder / "summary.json").write_text(json.dumps(found))
    for name, report in (reports or {}).items():
        (folder / "evaluation" / f"{name}.json").write_text(json.dumps(report))
    return folder


def collected(folders, tmp_path, *words):
    out = tmp_path / "table.json"
    collect.main([*map(str, folders), "--out", str(out), "--metrics", "psnr", *words])
    return json.loads(out.read_text())


def test_a_file_has_what_runs_share_and_what_they_do_not(tmp_path, capsys):
    protein = {"tokenizers": {"runs/x": {"rmsd": 2.0, "tm": None}}}
    folders = [make_run(tmp_path, "vanilla", 0, 20.12345678, settings={"warmup_steps": 0}),
               make_run(tmp_path, "vanilla", 1, 21.0, settings={"warmup_steps": 0}),
               make_run(tmp_path, "provq", 0, 22.0, settings={"warmup_steps": 5}),
               make_run(tmp_path, "provq", 1, 23.5, settings={"warmup_steps": 5},
                        reports={"generation": {"fid": 3, "protocol": {"id": "x"}}, "structures": protein})]
    found = collected(folders, tmp_path)
    assert found["settings"] == {"lr": 1e-3}
    assert found["rows"] == {"vanilla": {"warmup_steps": 0}, "provq": {"warmup_steps": 5}}
    assert [(run["run"], run["seed"], run["psnr"]) for run in found["runs"]] == [
        ("vanilla", 0, 20.1235), ("vanilla", 1, 21.0), ("provq", 0, 22.0), ("provq", 1, 23.5)]
    assert found["runs"][3] == {"run": "provq", "seed": 1, "step": 9, "psnr": 23.5, "usage": 0.5,
                                "generation.fid": 3, "structures.rmsd": 2.0}
    assert "/a/path" not in json.dumps(found)
    table = capsys.readouterr().out.splitlines()
    assert table[0] == "| arm | seeds | PSNR (dB) | PSNR (dB) against vanilla [95 %] |"
    assert table[3].startswith("| provq | 2 | 22.75 ± 1.06 | +2.19 [")  # the mean of 1.88 and 2.5


@pytest.mark.parametrize(("change", "message"), [
    ({"finished": False}, "is no finished run: unfinished: step 9"),
    ({"settings": {"lr": 5.0}}, "runs of the row vanilla differ in lr"),
    ({"settings": {"init_from": "/some/run"}}, "runs of the row vanilla differ in init_from"),
    ({"settings": {"data_path": None}}, "runs of the row vanilla differ in data_path"),
    ({"settings": {"global_seed": 4}}, "has the seed 4; call the folder ROW-s4"),
    ({"reports": {"generation": [1]}}, "generation.json: no report"),
])
def test_runs_that_would_make_a_table_wrong(change, message, tmp_path):
    folders = [make_run(tmp_path, "vanilla", 0, 20.0), make_run(tmp_path, "vanilla", 1, 20.0, **change)]
    with pytest.raises(SystemExit, match=message):
        collected(folders, tmp_path)
    assert not (tmp_path / "table.json").exists()


def test_seeds_may_differ_in_what_is_no_part_of_the_experiment(tmp_path):
    settings = [{"log_every": every, "num_workers": every, "val_every": 5} for every in (1, 10)]
    folders = [make_run(tmp_path, "vanilla", seed, 20.0, settings=mine) for seed, mine in enumerate(settings)]
    found = collected(folders, tmp_path)
    assert len(found["runs"]) == 2
    assert found["rows"] == {"vanilla": {}}
    assert found["settings"]["val_every"] == 5
    assert not found["settings"].keys() & {"log_every", "num_workers"}  # of which there is no one value


def test_rows_tell_a_pretrained_run_but_not_where_files_lie(tmp_path):
    folders = [make_run(tmp_path, "scratch", 0, 20.0, settings={"init_from": None}),
               make_run(tmp_path, "tuned", 0, 20.0, settings={"init_from": "/here/run", "data_path": "/b/path"}),
               make_run(tmp_path, "tuned", 1, 20.0, settings={"init_from": "/there/run"}),
               make_run(tmp_path, "older", 0, 20.0)]  # of before there was the setting
    found = collected(folders, tmp_path)
    assert found["rows"] == {"scratch": {"init_from": None}, "tuned": {"init_from": "a path"},
                             "older": {"init_from": None}}
    assert found["settings"] == {"lr": 1e-3}


@pytest.mark.parametrize(("words", "message"), [
    (("--metrics", "rmsd"), "--metrics rmsd: no run has it"),
    (("--compared", "rmsd"), "--compared rmsd: no run has it"),
    (("--rows", "nobody"), "--rows 'nobody' is none of the arms: vanilla; provq"),
    (("--baseline", "nobody"), "--baseline 'nobody' is none"),
])
def test_tables_that_cannot_be_made_are_named(words, message, tmp_path):
    folders = [make_run(tmp_path, row, 0, 20.0) for row in ("vanilla", "provq")]
    done = subprocess.run([sys.executable, str(ROOT / "evaluations" / "evidence" / "collect.py"), *map(str, folders),
                           "--out", str(tmp_path / "t.json"), "--metrics", "psnr", *words],
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (tmp_path / "t.json").exists()


def test_a_seed_that_a_row_has_twice_is_refused(tmp_path):
    folders = [make_run(tmp_path / place, "vanilla", 0, 20.0) for place in ("a", "b")]
    with pytest.raises(SystemExit, match="two runs of the row vanilla have the seed 0: name one of them"):
        collected(folders, tmp_path)


def test_a_link_is_a_row_of_its_own_name(tmp_path):
    plain = make_run(tmp_path, "vanilla", 0, 20.0)
    link = tmp_path / "best-s1"
    link.symlink_to(make_run(tmp_path, "trial", 1, 22.0))
    found = collected([plain, link], tmp_path)
    assert [(run["run"], run["seed"]) for run in found["runs"]] == [("vanilla", 0), ("best", 1)]


def test_reports_of_other_protocols_share_no_table(tmp_path):
    def run(row, seed, held_out, extractor="inception"):
        protocol = {"extractor": {"name": extractor}, "reference": {"sha256": held_out, "count": 5}, "samples": row}
        return make_run(tmp_path, row, seed, 20.0, reports={"reconstruction": {"rfid": 1.5, "protocol": protocol}})

    folders = [run("vanilla", 0, "a"), run("vanilla", 1, "b"), run("provq", 0, "a")]
    assert collected(folders, tmp_path)["runs"][2]["reconstruction.rfid"] == 1.5
    with pytest.raises(SystemExit, match=r"json of \S+provq-s1 and of \S+vanilla-s0 differ in .*: extractor.name;"):
        collected([*folders, run("provq", 1, "b", "torchscript")], tmp_path)
    with pytest.raises(SystemExit, match=r"soft-s1 and of \S+vanilla-s1 differ in how .*: reference.sha256; evaluate"):
        collected([*folders, run("soft", 1, "c")], tmp_path)


def test_reports_of_another_state_of_the_run_are_refused(tmp_path):
    def run(row, name, report):
        return make_run(tmp_path, row, 0, 20.0, reports={name: report})

    drawn = {"fid": 3.0, "protocol": {"task": "generation"}}  # of samples, which name no step
    scored = {"rfid": 1.5, "protocol": {"task": "reconstruction"}}
    whole = {"tokenizers": {"runs/x": {"rmsd": 2.0, "step": 9}}}
    fresh = [run("a", "reconstruction", {**scored, "step": 9}), run("b", "reconstruction", scored),
             run("c", "structures", whole), run("d", "generation", drawn)]
    assert "reconstruction.step" not in collected(fresh, tmp_path)["runs"][0]
    wrong = [(run("e", "reconstruction", {**scored, "step": 6}), "of step 6, its summary.json of step 9; evaluate it "
              r"again: python evaluations/reconstruction.py --vq-ckpt \S+e-s0 --out \S+e-s0/evaluation/reconstruct"),
             (run("f", "structures", {"tokenizers": {"runs/x": {"rmsd": 2.0, "step": 6}}}),
              r"evaluate it again: python protein/evaluate.py STRUCTURES --ckpt \S+f-s0 --out \S+structures.json")]
    for folder, name in zip(fresh[1::2], ("reconstruction", "generation"), strict=True):
        os.utime(folder / "evaluation" / f"{name}.json", (1, 1))
        wrong.append((folder, f"{name}.json is older than summary.json, and does not say"))
    for folder, message in wrong:
        with pytest.raises(SystemExit, match=message):
            collected([folder], tmp_path)
    (fresh[1] / "checkpoints").mkdir()  # the same command again writes the summary anew, the weights are the same
    (fresh[1] / "checkpoints" / "0000009.pt").touch()
    os.utime(fresh[1] / "checkpoints" / "0000009.pt", (0, 0))
    collected([fresh[1]], tmp_path)


def test_runs_of_other_data_share_no_table(tmp_path):
    def run(row, data, val, seed=0, **settings):
        inputs = {"data_fingerprint": data, "val_fingerprint": val, "code_fingerprint": row}  # codes are a tokenizer's
        return make_run(tmp_path, row, seed, 20.0, inputs=inputs, settings=settings)

    same = [make_run(tmp_path, "older", 0, 20.0), run("a", "train", "val"), run("b", "train", "val", seed=1)]
    assert len(collected(same, tmp_path)["runs"]) == 3
    generated = [run("ideal", f"of seed {seed}", f"of seed {seed}", seed, data_path=None) for seed in (2, 3)]
    assert len(collected(generated, tmp_path)["runs"]) == 2
    with pytest.raises(SystemExit, match=r"e-s2 and \S+ideal-s2 were trained on different data"):
        collected([*generated, run("e", "of seed 3", "of seed 2", 2, data_path=None)], tmp_path)
    with pytest.raises(SystemExit, match=r"f-s1 and \S+a-s0 were trained on different data"):
        collected([*same[:2], run("f", "other", "val", seed=1)], tmp_path)
    with pytest.raises(SystemExit, match=r"c-s0 and \S+/a-s0 were trained on different data \(data_fingerprint other "):
        collected([*same, run("c", "other", "val")], tmp_path)
    with pytest.raises(SystemExit, match=r"d-s0 and \S+/a-s0 were validated on different data \(val_fingerprint other"):
        collected([*same, run("d", "train", "other")], tmp_path)


def test_files_of_something_else_are_no_output(tmp_path):
    run = make_run(tmp_path, "vanilla", 0, 20.0)
    config = (run / "config.json").read_text()
    with pytest.raises(SystemExit, match=r"--out \S+config.json: is there and no file of this command; name another"):
        collect.main([str(run), "--out", str(run / "config.json"), "--metrics", "psnr"])
    assert (run / "config.json").read_text() == config
    collected([run], tmp_path)
    collected([run], tmp_path)


def test_a_run_without_settings_is_named(tmp_path):
    run = make_run(tmp_path, "vanilla", 0, 20.0)
    (run / "config.json").unlink()
    with pytest.raises(SystemExit, match=r"has settings without a seed: config.json cannot be read"):
        collected([run], tmp_path)


def test_files_of_something_else_are_named(tmp_path):
    path = tmp_path / "other.json"
    for runs in (None, [1], [{"run": "a", "seed": "0"}], *(
            [{"run": "a", "seed": 0, "psnr": psnr}] for psnr in (float("nan"), "9"))):
        path.write_text(json.dumps({"runs": runs} if runs else []))
        with pytest.raises(ValueError, match=r"other.json: no file of collect.py"):
            trained.read(path)
