"""The commands: a sweep goes on where it was killed, tuning chooses on search seeds alone, tables come out."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile

import pytest
from evidence_bed import FLAGS, SETTING, make_images, write_pictures
from places import ROOT

from evaluations.evidence import flags, run, store, sweep, table, tune, tuning
from evaluations.evidence.arms import ARMS, KINDS, Arm
from evaluations.evidence.bed import Trainer
from evaluations.evidence.store import Result, Run


@pytest.fixture
def here(tmp_path):
    """Arguments of a command in a folder of its own, and its results file."""
    out = tmp_path / "results.jsonl"
    return [str(write_pictures(tmp_path)), *FLAGS, "--cache", str(tmp_path / "cache"), "--out", str(out)], out


@pytest.fixture
def fake(monkeypatch):
    """Runs that take no time, in this process. Returns those that were asked for; its `scores` rate them."""
    class Fake(list):
        scores = staticmethod(lambda *_: 20.0)

    asked = Fake()

    def run_all(todo, caches, writer, workers, features):  # noqa: ARG001
        for each, name in todo.items():
            asked.append((name, each.arm, each.seed))
            psnr = asked.scores(each.arm, each.seed)
            metrics = psnr and {"psnr": psnr, "codes_used": 1, "perplexity": 1.0}
            writer.append(store.result_line(name, each, {"metrics": metrics}))

    monkeypatch.setattr(sweep, "_run_all", run_all)
    return asked


def test_a_killed_sweep_goes_on(here, tmp_path):
    arguments, out = here
    command = [sys.executable, str(ROOT / "evaluations" / "evidence" / "run.py"), *arguments,
               "--arms", "vanilla", "provq+recluster", "warmup", "--seeds", "100", "--jobs", "1"]
    first = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out.exists() and out.read_bytes().count(b"\n")) and time.monotonic() < deadline:
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)  # the parent alone
    first.wait()
    while alive(first.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(first.pid), "workers end with their parent"

    before = out.read_text()
    there = before.count("\n")
    assert 1 <= there
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{there} of 3 runs are there" in done.stdout
    assert out.read_text().startswith(before[: before.rfind("\n") + 1]), "what was there stays"
    lines = [json.loads(text) for text in out.read_text().splitlines()]
    assert [line["arm"] for line in lines] == ["vanilla", "provq+recluster", "warmup"]

    images = make_images(tmp_path)
    expected = Trainer(ARMS["warmup"], SETTING, 100, images).run()  # the same, in another process and undisturbed
    assert lines[2]["metrics"] == store._rounded(expected["metrics"])
    assert lines[2].keys() >= {"options", "setting", "seed", "trace", "commit", "torch", "cpu", "seconds", "date"}

    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout.strip().endswith("3 of 3 runs are there")


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_diverged_run_is_a_result(here, capsys):
    arguments, out = here
    run.main([*arguments, "--arms", "vanilla", "--seeds", "1", "--lr", "1e30"])
    line = json.loads(out.read_text())
    assert line["metrics"] is None
    assert "the loss is" in line["diverged"] in capsys.readouterr().out
    table.main([str(out)])
    assert "| vanilla (lr 1e+30) | 0, 1 diverged | - | - | - |  |" in capsys.readouterr().out


def test_only_what_is_missing_runs_in_the_order_asked_for(here, fake):
    arguments, _ = here
    run.main([*arguments, "--arms", "vanilla", "--seeds", "5"])
    run.main([*arguments, "--plan", "core", "--arms", "soft", "--seeds", "5", "6"])
    expected = [(name, seed) for seed in (5, 6) for name in (*run.PLANS["core"], "soft")]
    assert [(name, seed) for name, _, seed in fake] == [("vanilla", 5)] + [e for e in expected if e != ("vanilla", 5)]


def test_another_setting_is_another_run(here, fake):
    arguments, _ = here
    for extra in ([], ["--num-codes", "8"], ["--steps", "13"], ["--lr", "0.1"], []):
        run.main([*arguments, "--arms", "vanilla", "--seeds", "5", *extra])
    assert len(fake) == 4


def test_other_images_of_the_same_name_are_not_taken_for_these(here, tmp_path, capsys):
    arguments, out = here
    words = ["--arms", "vanilla", "--seeds", "5"]
    run.main([*arguments, *words])
    there = out.read_text()
    other = tmp_path / "other" / SETTING.data
    other.parent.mkdir()
    with zipfile.ZipFile(arguments[0]) as archive, zipfile.ZipFile(other, "w") as changed:
        *names, last = archive.namelist()
        for name, content in [*((name, name) for name in names), (last, names[0])]:
            changed.writestr(name, archive.read(content))
    for more in ([], ["--lr", "2e-3"]):
        with pytest.raises(SystemExit, match=f"--out {out}: {out}:1 is of other images called pictures.zip"):
            run.main([str(other), *arguments[1:], *words, *more])
    assert out.read_text() == there
    apart = tmp_path / "apart.jsonl"
    run.main([str(other), *arguments[1:], *words, "--lr", "2e-3", "--out", str(apart)])
    with pytest.raises(SystemExit, match=f"{out}:1 and {apart}:1 are of other images of one name"):
        table.main([str(out), str(apart)])
    old = tmp_path / "old.jsonl"  # of a version that did not tell
    old.write_text(re.sub('"images": "[0-9a-f]{16}", ', "", there))
    assert old.read_text() != there
    run.main([str(other), *arguments[1:], *words, "--out", str(old)])
    table.main([str(old), str(apart)])
    assert "| vanilla (lr 0.002) | 1 |" in capsys.readouterr().out


def test_a_grid_of_numbers(here, fake):
    arguments, _ = here
    run.main([*arguments, "--arms", "vanilla", "--seeds", "5", "--lr", "0.1", "0.2", "--code-lr-scale", "1", "7"])
    assert {(arm.lr, arm.code_lr_scale) for _, arm, _ in fake} == {(0.1, 1), (0.1, 7), (0.2, 1), (0.2, 7)}
    run.main([*arguments, "--arms", "vanilla", "--seeds", "5", "--recluster-at", "9", "3"])
    assert fake[-1][1] == Arm(recluster_at=(3, 9))
    run.main([*arguments, "--arms", "ema", "fsq", "--seeds", "5", "--code-lr-scale", "1"])
    assert [arm for _, arm, _ in fake[-2:]] == [Arm("ema"), Arm("fsq")]


@pytest.mark.parametrize(("arm", "words", "message"), [
    ("ema", ("--code-lr-scale", "1", "10"), "--code-lr-scale 10 changes nothing in the arm ema"),
    ("fsq", ("--beta", "1"), "--beta 1 changes nothing in the arm fsq"),
    ("warmup", ("--loss-floor", "0"), "--loss-floor 0 changes nothing in the arm warmup"),
    ("provq", ("--follow-decay", "0.5"), "--follow-decay 0.5 changes nothing in the arm provq"),
    ("provq", ("--loss-floor", "2"), "--loss-floor, arm provq: loss_floor 2.0 must lie in"),
    ("provq+follow", ("--follow-decay", "1"), r"--follow-decay, arm provq\+follow: .* follow_decay 1.0 in"),
    ("lfq", ("--recluster-at", "9"), "--recluster-at, arm lfq: lfq has no codes that k-means could set"),
    ("vanilla", ("--recluster-at", "9", "9"), "--recluster-at, arm vanilla: recluster_at 9 9 names a step twice"),
])
def test_numbers_that_an_arm_does_not_have_are_refused(here, fake, arm, words, message, capsys):
    arguments, out = here
    with pytest.raises(SystemExit):
        run.main([*arguments, "--arms", arm, *words])
    assert re.search(message, capsys.readouterr().err)
    assert not fake
    assert not out.exists()


@pytest.mark.parametrize(("command", "words"), [
    (run, ("--recluster-at", "4")), (tune, ("--warmup-steps", "12", "--transition-steps", "0"))])
def test_a_sweep_with_an_arm_that_cannot_be_trained_never_begins(here, fake, command, words):
    arguments, out = here
    with pytest.raises(SystemExit, match="arm provq: "):
        command.main([*arguments, "--arms", "vanilla", "provq", *words])
    assert not fake
    assert not out.exists() or not out.read_text()


# ------------------------------------------------------------------------------------------------------- tuning

def test_the_grid_is_equal_for_all_but_for_what_an_arm_does_not_have():
    points = {name: [tuple(getattr(arm, field) for field in tuning.Point._fields) for arm in tuning.grid(Arm(name))]
              for name in KINDS}
    assert points["vq"] == points["l2"] == points["simvq"] == list(tuning.POINTS)
    assert points["nsvq"] == [point for point in tuning.POINTS if point.beta == 0.25], "nsvq has no beta"
    assert points["ema"] == [point for point in tuning.POINTS if point.code_lr_scale == 1] + [(2e-3, 1.0, 0.05)]
    assert points["fsq"] == [point for point in tuning.POINTS if point[1:] == (1, 0.25)]
    assert all(len(set(tuning.grid(arm))) == len(tuning.grid(arm)) for arm in ARMS.values())
    assert tuning.grid(ARMS["vanilla+x10"]) == tuning.grid(ARMS["vanilla"])


def results_of(scores):
    """Results of Arm() at points, from {point: PSNRs on the seeds from 100 on}."""
    runs = {Run(arm, SETTING, 100 + at): psnr for arm, values in scores.items() for at, psnr in enumerate(values)}
    return {run: Result(run, "", psnr and {"psnr": psnr}, {}) for run, psnr in runs.items()}


def test_finalists_are_the_best_on_the_first_seed_and_of_equals_the_first():
    points = tuning.grid(Arm())
    results = results_of(dict.fromkeys(points, (20.0, 99.0)) | {points[5]: (23.0,), points[7]: (24.0,),
                                                                points[8]: (None,)})
    assert tuning.finalists(Arm(), SETTING, 100, results) == [points[7], points[5], points[0]]
    assert len(tuning.finalists(Arm("fsq"), SETTING, 100, results_of(
        dict.fromkeys(tuning.grid(Arm("fsq")), (20.0,))))) == min(tuning.FINALISTS, len(tuning.grid(Arm("fsq"))))


def test_best_is_the_highest_mean_and_never_a_diverged_one():
    points = tuning.grid(Arm())
    results = results_of(dict.fromkeys(points, (20.0, 20.0)) | {
        points[5]: (23.0, 22.0), points[7]: (24.0, 20.5), points[8]: (90.0, None)})
    assert tuning.ranked(points, SETTING, (100, 101), results)[0] == points[5]
    assert tuning.ranked(points, SETTING, (100, 101), results)[-1] == points[8]


def test_edges_are_named():
    assert tuning.edges(Arm(lr=2e-3, code_lr_scale=10.0, beta=0.1)) == []
    assert tuning.edges(Arm(lr=4e-3, code_lr_scale=30.0, beta=0.1)) == ["lr", "code_lr_scale"]
    assert tuning.edges(Arm("fsq", lr=2e-3, code_lr_scale=1.0)) == [], "fsq has no such code learning rate"


def test_tune_searches_then_trains_the_best_on_other_seeds(here, fake, capsys):
    arguments, _ = here
    fake.scores = lambda arm, seed: (25.0 + (seed == 100) if (arm.lr, arm.beta) == (1e-3, 0.25)
                                     else 25.5 if (arm.lr, arm.beta) == (2e-3, 0.05) else 20.0 + arm.lr)
    tune.main([*arguments, "--arms", "ema", "fsq", "--seeds", "0", "1"])
    ran = [(seed, arm.lr, arm.beta) for name, arm, seed in fake if name == "ema"]
    assert ran[:4] == [(100, lr, 0.25) for lr in (1e-3, 2e-3, 4e-3)] + [(100, 2e-3, 0.05)]
    assert sorted(ran[4:7]) == [(101, 1e-3, 0.25), (101, 2e-3, 0.05), (101, 4e-3, 0.25)], "the best three of four"
    assert ran[7:] == [(0, 1e-3, 0.25), (1, 1e-3, 0.25)], "of 26.0 and 25.0, and twice 25.5, the first"
    assert "ema: best of 4 points is ema; at their edge: lr\n" in capsys.readouterr().out
    count = len(fake)
    tune.main([*arguments, "--arms", "ema", "fsq", "--seeds", "0", "1"])
    assert len(fake) == count, "all of it was there"


def test_an_arm_that_always_diverges_is_not_trained_on(here, fake, capsys):
    arguments, _ = here
    fake.scores = lambda arm, _: None if arm.quantizer == "fsq" else 20.0
    tune.main([*arguments, "--arms", "fsq", "lfq", "--seeds", "0"])
    assert [name for name, _, seed in fake if seed == 0] == ["lfq"]
    assert "fsq: each of the best 3 of 3 points diverged on a search seed" in capsys.readouterr().out


@pytest.mark.parametrize(("command", "flag"), [(run, "--seeds"), (tune, "--seeds"), (tune, "--search-seeds")])
def test_a_seed_twice_is_refused(here, fake, command, flag, capsys):
    """It would count twice where the best is chosen."""
    arguments, _ = here
    with pytest.raises(SystemExit):
        command.main([*arguments, "--arms", "vanilla", flag, "7", "8", "7"])
    assert f"{flag} names 7 twice" in capsys.readouterr().err
    assert not fake


def test_search_and_report_are_apart(here, capsys):
    arguments, _ = here
    with pytest.raises(SystemExit):
        tune.main([*arguments, "--seeds", "100", "3"])
    assert "--seeds and --search-seeds share [100]" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ tables, errors

def test_table_command(here, fake, capsys, tmp_path):
    arguments, out = here
    fake.scores = lambda arm, seed: 20.0 + (arm.curriculum == "provq") + 0.1 * seed
    run.main([*arguments, "--arms", "vanilla", "provq", "--seeds", "0", "1", "9"])
    run.main([*arguments, "--arms", "vanilla", "--num-codes", "8", "--seeds", "0"])
    capsys.readouterr()
    text, picture = tmp_path / "table.md", tmp_path / "figure.png"
    table.main([str(out), "--baseline", "provq", "--seeds", "0", "1", "--num-codes", "16", "--out", str(text),
                "--figure", str(picture)])
    shown, said = capsys.readouterr()
    assert not said  # all of one commit and machine
    assert "| vanilla | 2 | 20.05 ± 0.07 | 1 ± 0 | 1 ± 0 | -1.00 [-1.00, -1.00] |" in shown
    assert text.read_text() == shown
    assert picture.stat().st_size > 1000
    for flag in ("--metrics", "--compared"):
        with pytest.raises(SystemExit, match=f"{flag} rfid: no run has it"):
            table.main([str(out), "--num-codes", "16", flag, "rfid"])
    lines = [json.loads(line) | {"torch": f"2.{i}"} for i, line in enumerate(out.read_text().splitlines())]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    table.main([str(out), "--num-codes", "16", "--seeds", "0"])
    assert capsys.readouterr().err == (
        "note: the runs shown are of more than one torch (2.0, 2.1), and may round differently\n")
    table.main([str(out), "--num-codes", "16", "--seeds", "0", "--arms", "provq"])
    assert not capsys.readouterr().err, "of what is not shown"
    there = out.read_text()
    for flag in ("--out", "--figure"):
        with pytest.raises(SystemExit, match=f"{flag} {out} is what is read, and would be lost"):
            table.main([str(out), "--num-codes", "16", flag, str(out)])
    assert out.read_text() == there


@pytest.mark.parametrize(("extra", "message"), [
    (["--arms", "vanilla", "--steps", "7"], "together at most --steps 7"),
    (["--arms", "vanilla", "--held-out", "400"], "--held-out 400 and 256 to look at, of 316 images"),
])
def test_mistakes_are_one_line(here, extra, message):
    arguments, out = here
    with pytest.raises(SystemExit, match=f"run.py: error: .*{message}"):
        run.main([*arguments, *extra])
    assert not out.exists() or not out.read_text()


def test_more_mistakes(here, tmp_path, capsys):
    arguments, out = here
    with pytest.raises(SystemExit):
        run.main(arguments)
    assert "name --plan or --arms" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main([*arguments, "--arms", "vanilla", "--jobs", "0"])
    assert "run.py: error: --jobs is 0; it must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no such file of images"):
        run.main([str(tmp_path / "none.zip"), *arguments[1:], "--arms", "vanilla"])
    with pytest.raises(SystemExit, match="no such results file"):
        table.main([str(out)])


def test_confirm_bed(here):
    arguments, _ = here
    args = run.parse_args([arguments[0], "--out", "x", "--arms", "vanilla", "--bed", "confirm", "--steps", "4000"])
    setting = flags.setting(args)
    assert (setting.model, setting.image_size, setting.steps) == ("VQ-4", 32, 4000)
