"""Probes from the command line: tables, resuming, kills, mistakes; and the numbers in the tables."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helices import write_helix
from mini_archive import processed_archive
from places import PROTEINS, ROOT, needs_proteins

from protein.benchmark import train_task
from protein.benchmark.baselines import FoldSeek
from protein.benchmark.task_report import Results, summarise, write_report
from protein.benchmark.tasks import read_task, residue_ids

KINDS = {"toy": "binary", "scores": "regression", "folds": "classification"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three tasks on 20 helices of 20 residues, whose labels are easy: something that 3Di knows."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    rows = {name: [{"task": name, "kind": kind, "category": "Cat"}] for name, kind in KINDS.items()}
    for i in range(20):
        write_helix(folder / "pdb", str(i), 20, seed=i)
        split = "train" if i < 10 else "valid" if i < 14 else ("Fold", "SupFam")[i % 2]
        common = {"id": str(i), "split": split, "structure": f"pdb/{i}.pdb"}
        rows["toy"].append({**common, "labels": rng.integers(0, 2, 20).tolist()})
        rows["scores"].append({**common, "labels": rng.normal(size=20).tolist()})
        rows["folds"].append({**common, "label": "ab"[i // 2 % 2]})
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def words(folder, out, *more, tasks=tuple(KINDS), steps=6):
    files = [str(folder / f"{task}.jsonl") for task in tasks]
    return ["--task", *files, "--tokenizer", "foldseek", "1Hot=foldseek-onehot",
            "--results-dir", str(out), "--max-steps", str(steps), "--warmup-steps", "2", "--seeds", "2",
            "--learning-rates", "0.01", "0.001", "--device", "cpu", *more]


def results(out):
    found = {}
    for path in sorted((out / "results").rglob("*.json")):
        found[str(path.relative_to(out))] = json.loads(path.read_text()) | {"seconds": None}
    return found


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("straight")
    train_task.main(words(folder, out))
    return out


def test_a_run_leaves_tables_of_all_tokenizers_and_tasks(straight):
    assert len(results(straight)) == 2 * 3 * 2 * 2
    text = (straight / "table3.md").read_text()
    assert "| Task | Split | FoldSeek | 1Hot |" in text
    for line in ("toy | Fold", "scores | SupFam", "folds | Fold", "Cat (AUROC)", "Cat (Spearman's rho)", "Average"):
        assert f"| {line} " in text
    rows = list(csv.DictReader((straight / "table3.csv").open()))
    assert len(rows) == 2 * 2 * 3 * 3  # protocols, tokenizers, metrics, two splits and their average
    assert {row["metric"] for row in rows} == {"AUROC", "Spearman's rho", "macro F1"}
    assert {(row["runs"], row["seeds"]) for row in rows} == {("1", "2")}
    page = (straight / "table3.html").read_text()
    assert page.count("<table>") == 5
    assert "batch_size</dt><dd>8 (binary), 8 (regression), 64 (classification)" in page
    one = next(iter(results(straight).values()))
    assert one["counts"]["train"] == {"chains": 10, "labels": 10}
    assert set(one["protocols"]["as coded"]) == {"step", "score", "valid", "tests"}


def test_what_is_finished_is_not_done_again(folder, straight, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*.*") if not path.name.startswith("table3")}
    for place, name in ((train_task, "train_probe"), (train_task, "read_task"), (FoldSeek, "encode")):
        monkeypatch.setattr(place, name, lambda *_: pytest.fail("done again"))
    train_task.main(words(folder, straight))
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_killed_run_continues_to_the_same_results(folder, straight, tmp_path):
    command = [sys.executable, str(ROOT / "protein" / "benchmark" / "train_task.py"), *words(folder, tmp_path)]
    process = subprocess.Popen(command, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.rglob("seed*.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("seed*.json")}
    assert 3 <= len(done) < 24
    train_task.main(words(folder, tmp_path))
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert results(tmp_path) == results(straight)
    assert (tmp_path / "table3.csv").read_text() == (straight / "table3.csv").read_text()


def test_other_settings_and_other_inputs_need_another_folder(folder, straight, capsys):
    with pytest.raises(SystemExit, match=r"lr0.001.json was made with other settings \(max_steps: 6 there, 7 now\)"):
        train_task.main(words(folder, straight, tasks=("toy",), steps=7))
    text = (folder / "toy.jsonl").read_text()
    (folder / "toy.jsonl").write_text(text.replace("[1, ", "[0, ").replace("[0, 0,", "[1, 0,"))
    try:
        with pytest.raises(SystemExit, match=r"other settings \(inputs: "):
            train_task.main(words(folder, straight, tasks=("toy",)))
    finally:
        (folder / "toy.jsonl").write_text(text)
        train_task.main(words(folder, straight, tasks=("toy",)))
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize("flag", [("--splits", "strict"), ("--data", "x"), ("--pdb-data", "x"), ("--num-workers", "2")])
def test_flags_of_the_archive_are_refused_where_all_tasks_are_files(folder, tmp_path, capsys, flag):
    said = f"error: {' '.join(flag)} has no effect on JSONL files, which name their splits and structures: leave it out"
    with pytest.raises(SystemExit):
        train_task.main(words(folder, tmp_path / "out", *flag, tasks=("toy",)))
    assert not (tmp_path / "out").exists()
    assert said in capsys.readouterr().err
    both = ["--task", str(folder / "toy.jsonl"), "Ept", "--data", "x"]
    train_task.parse_config(["--results-dir", "x", "--tokenizer", "foldseek", *both, *flag])
    train_task.parse_config(words(folder, tmp_path, "--splits", "released", "--num-workers", "0"))  # what holds anyway


@pytest.fixture
def own(folder, tmp_path):
    """A copy of the tasks that a test may change; every third structure has 10 residues, which only "folds" allows."""
    shutil.copytree(folder, tmp_path / "own")
    for i in range(0, 20, 3):
        write_helix(tmp_path / "own" / "pdb", str(i), 10, seed=i)
    return tmp_path / "own"


def quick(folder, out, *more, tasks=("folds",)):
    """One probe a task and tokenizer."""
    train_task.main([*words(folder, out, *more, tasks=tasks, steps=2), "--seeds", "1", "--learning-rates", "0.01"])


def test_structures_that_changed_are_read_again(own, tmp_path):
    quick(own, tmp_path / "out")
    path = own / "pdb" / "1.pdb"
    stat = path.stat()
    write_helix(own / "pdb", "1", 20, seed=99)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert path.stat().st_size == stat.st_size
    with pytest.raises(SystemExit, match=r"other settings \(inputs: "):
        quick(own, tmp_path / "out")
    path.unlink()
    with pytest.raises(SystemExit, match=r"folds.jsonl, line 3: structure: no file .*1.pdb"):
        quick(own, tmp_path / "out")


def test_another_length_is_another_input(own, tmp_path):
    quick(own, tmp_path / "out")
    for more in ([], ["--learning-rates", "0.1"]):  # tables take all rates together, so another one is no way out
        with pytest.raises(SystemExit, match=r"lr0.01.json was made with other settings \(inputs: "):
            train_task.main([*words(own, tmp_path / "out", "--max-length", "15", tasks=("folds",), steps=2),
                             "--seeds", "1", "--learning-rates", "0.01", *more])
    quick(own, tmp_path / "other", "--max-length", "15")
    assert {r["counts"]["train"]["chains"] for r in results(tmp_path / "other").values()} == {4}
    quick(own, tmp_path / "out")  # back again


def test_all_tasks_are_read_before_any_probe(folder, own, tmp_path, monkeypatch):
    monkeypatch.setattr(train_task, "train_probe", lambda *_: pytest.fail("trained"))
    with pytest.raises(SystemExit, match=r"toy.jsonl, line 2: labels: 20 for 10 residues"):
        train_task.main([*words(own, tmp_path / "out", tasks=("folds", "toy"))])
    files = [str(folder / "folds.jsonl"), str(own / "folds.jsonl")]
    with pytest.raises(SystemExit, match=r"--task \S+folds.jsonl and \S+folds.jsonl are both called 'folds'"):
        train_task.main([*words(own, tmp_path / "out"), "--task", *files])


@pytest.mark.parametrize("pattern", ["tokens/FoldSeek-*/folds/000000.npz", "results/FoldSeek-*/folds/*.json"])
def test_damaged_files_are_named(own, tmp_path, pattern):
    """Cut off, bytes changed in the middle, and of another content."""
    quick(own, tmp_path / "out")
    path = next((tmp_path / "out").glob(pattern))
    whole = path.read_bytes()
    damaged = [whole[:100], b"", whole[:-40] + bytes(20) + whole[-20:], b"{}"]
    if path.suffix == ".npz":
        with np.load(path) as file:
            np.savez(path, identity=file["identity"], tokens=file["tokens"][:-1])
        damaged.append(path.read_bytes())
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(SystemExit, match=rf"{path.name}: damaged, delete it"):
            quick(own, tmp_path / "out")
    path.unlink()
    quick(own, tmp_path / "out")
    assert len(results(tmp_path / "out")) == 2


def test_processed_lists_that_changed_are_read_again(tmp_path, monkeypatch):
    data = processed_archive(tmp_path / "archive")
    more = ["--task", "Ept", "--data", str(data), "--results-dir", str(tmp_path / "out"), "--max-steps", "2", "--seeds",
            "1", "--learning-rates", "0.01", "--device", "cpu", "--tokenizer", "foldseek", "--warmup-steps", "1"]
    train_task.main(more)
    os.utime(next(data.rglob("processed_structured_epitope_region_train")), ns=(1, 1))
    read = []
    original = train_task.released_tasks.read_released
    monkeypatch.setattr(train_task.released_tasks, "read_released", lambda *a: read.append(a) or original(*a))
    for _ in range(2):
        train_task.main(more)
    assert len(read) == 1


def test_another_state_of_a_tokenizer_is_no_second_run(folder, tmp_path):
    """A run that was trained on has other tokens under the same name."""
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    np.save(tokens / "codebook.npy", np.eye(3, dtype=np.float32))
    for value in range(2):
        rows = [{"name": str(i), "chain": "A", "tokens": [value] * 20} for i in range(20)]
        (tokens / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        command = words(folder, tmp_path / "out", "--tokenizer", f"tokens:{tokens}", tasks=("toy",))
        if value == 0:
            train_task.main(command)
        else:
            with pytest.raises(SystemExit, match=r"results.tokens-\w+ is of an earlier state of tokens:.*: remove it"):
                train_task.main(command)


@pytest.mark.parametrize(("more", "message"), [
    (["--task", "BindInt", "--all"], "give --task NAME or FILE.jsonl"),
    ([], "give --task NAME or FILE.jsonl"),
    (["--task", "BindIn"], "--task BindIn is neither a file NAME.jsonl nor one of BindInt"),
    (["--task", "x.jsonl", "--seeds", "0"], "--seeds is 0; it must be at least 1"),
    (["--task", "x.jsonl", "--learning-rates", "0.1", "0"], r"they must be positive"),
    (["--all"], "tasks of StructTokenBench need --data"),
    (["--task", "x.jsonl", "--preset", "large"], "'large' is not one of structtokenbench, small"),
])
def test_mistakes_in_flags(tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as error:
        train_task.main(["--tokenizer", "foldseek", "--results-dir", str(tmp_path), *more])
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(("more", "message"), [
    (["--task", "none.jsonl"], "none.jsonl"),
    (["--task", "toy.jsonl", "--tokenizer", "runs/none"], "--tokenizer runs/none: runs/none is neither foldseek"),
])
def test_mistakes_in_files(folder, tmp_path, monkeypatch, more, message):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match=rf"train_task\.py: error: .*{message}"):
        train_task.main(["--tokenizer", "foldseek", "--results-dir", str(tmp_path), "--device", "cpu", *more])


def test_all_tasks_of_the_benchmark_in_one_command(tmp_path):
    """From processed lists; a second tokenizer later adds its column and repeats nothing."""
    more = ["--all", "--data", str(processed_archive(tmp_path / "archive")), "--results-dir", str(tmp_path / "out"),
            "--max-steps", "2", "--warmup-steps", "1", "--seeds", "1", "--learning-rates", "0.01", "--device", "cpu"]
    train_task.main(["--tokenizer", "foldseek", *more])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "results").rglob("*.json")}
    assert len(before) == 12
    train_task.main(["--tokenizer", "foldseek-onehot", "foldseek", *more])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    rows = list(csv.DictReader((tmp_path / "out" / "table3.csv").open()))
    pooled = [row for row in rows if row["protocol"] == "pooled" and row["tokenizer"] == "FoldSeek"]
    assert len([row for row in pooled if row["task"] != "Average"]) == 24
    assert [row["category"] for row in pooled if row["task"] == "Average"] == [
        "Functional site prediction", "Physicochemical property prediction", "Structure property prediction"]
    text = (tmp_path / "out" / "table3.md").read_text()
    assert "| Task | Split | FoldSeek, one-hot | FoldSeek |" in text
    assert "| BindShake | Org | " in text
    assert "Homo: from StructTokenBench's processed lists. Left out: a fold with few proteins: 20." in text


# ------------------------------------------------------------------------------------------------ numbers in the tables

def probe(label, run, task, seed, rate, score, fold, supfam, *, kind="binary"):
    """As train_task.py writes it, with one number for both protocols but for 0.1 more in the one as coded."""
    protocols = {name: {"step": 1, "score": score, "valid": score,
                        "tests": {"Fold": fold + extra, "SupFam": None if supfam is None else supfam + extra}}
                 for name, extra in (("pooled", 0.0), ("as coded", 0.1))}
    return {"label": label, "tokenizer": run, "source": run, "codebook": [20, 2], "task": task, "kind": kind,
            "category": "Cat", "tests": ["Fold", "SupFam"], "left_out": {}, "origin": "t",
            "counts": {"train": {"chains": 1, "labels": 1}}, "settings": {"max_steps": 1, "inputs": "x"}, "seed": seed,
            "learning_rate": rate, "protocols": protocols}


def test_the_learning_rate_is_chosen_on_validation_for_every_seed():
    found = Results([probe("A", "a", "t", 0, 0.1, 0.5, 0.9, 0.9), probe("A", "a", "t", 0, 0.01, 0.6, 0.7, 0.8),
                     probe("A", "a", "t", 1, 0.1, 0.7, 0.5, 0.6), probe("A", "a", "t", 1, 0.01, None, 1.0, 1.0),
                     probe("A", "a", "t", 1, 0.001, 0.7, 0.3, 0.2)])  # of equals the smaller rate
    assert found.values("pooled", "A", "t", "Fold") == {"a": {0: 0.7, 1: 0.3}}
    assert found.average("as coded", "A", ["t"]) == {"a": {0: pytest.approx(0.85), 1: pytest.approx(0.35)}}


def test_spread_is_over_seeds_or_over_runs():
    one = summarise({"a": {0: 0.7, 1: 0.5, 2: 0.6}})
    assert (one.mean, one.deviation, one.seeds) == (pytest.approx(0.6), pytest.approx(0.1), 3)
    several = summarise({"a": {0: 0.7, 1: 0.5}, "b": {0: 0.8, 1: 0.8}})  # means 0.6 and 0.8
    assert (several.mean, several.deviation, several.seeds) == (pytest.approx(0.7), pytest.approx(0.2 / 2**0.5), 2)
    assert summarise({"a": {0: 0.7}}).deviation is None
    assert summarise({"a": {0: 0.7, 1: None}}) is None
    assert summarise({}) is None


def test_averages_are_over_all_splits_of_a_category_and_metric(tmp_path):
    rows = [probe("A", "a", "t", 0, 0.1, 0.5, 0.9, 0.7), probe("A", "a", "u", 0, 0.1, 0.5, 0.6, 0.2),
            probe("B", "b", "t", 0, 0.1, 0.5, 0.5, 0.5), probe("A", "a", "r", 0, 0.1, 0.5, 0.1, 0.1, kind="regression")]
    folder = tmp_path / "results" / "x" / "y"
    folder.mkdir(parents=True)
    for i, row in enumerate(rows):
        (folder / f"{i}.json").write_text(json.dumps(row))
    write_report(tmp_path, ["B", "A"], ["u", "t"])
    lines = (tmp_path / "table3.md").read_text().split("as coded")[0].splitlines()
    assert [line for line in lines if line.startswith("|") and "---" not in line] == [
        "| Task | Split | B | A |", "| Cat (AUROC) |  |  |  |",
        "| u | Fold | — | 60.00 |", "| u | SupFam | — | 20.00 |",
        "| t | Fold | 50.00 | 90.00 |", "| t | SupFam | 50.00 | 70.00 |", "| Average |  | — | 60.00 |",
        "| Cat (Spearman's rho) |  |  |  |", "| r | Fold | — | 10.00 |", "| r | SupFam | — | 10.00 |",
        "| Average |  | — | 10.00 |",
    ]


# ------------------------------------------------------------------------------------------------------------ real data

@needs_proteins
def test_an_interface_task_of_real_structures(tmp_path):
    """The first chains of every split, through the converter and the whole program."""
    out = tmp_path / "tasks"
    lines = (PROTEINS / "benchmark.jsonl").read_text().splitlines()
    chosen = [line for split in ("train", "valid", "test")
              for line in [x for x in lines if f'"split":"{split}"' in x and len(x) < 6000][:4]]
    (tmp_path / "some.jsonl").write_text("\n".join(chosen))
    (tmp_path / "structures").symlink_to(PROTEINS / "structures")
    command = [sys.executable, str(ROOT / "scripts" / "make_docking_tasks.py"), str(tmp_path / "some.jsonl"), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    task = read_task(out / "interface.jsonl")
    by_id = {json.loads(line)["id"]: json.loads(line) for line in chosen}
    for examples in task.splits.values():
        for example in examples:
            row = by_id[example.id]
            expected = dict(zip(row["residues"], row["interface"], strict=True))
            for residue, label in zip(residue_ids(example.chain), example.labels, strict=True):
                assert expected.get(residue, -1) == (-1 if np.isnan(label) else label)
    bfactors = read_task(out / "bfactor.jsonl").splits["train"][0]
    assert np.nanmean(bfactors.labels) == pytest.approx(0, abs=1e-3)
    assert np.corrcoef(bfactors.labels, bfactors.chain.bfactors)[0, 1] == pytest.approx(1, abs=1e-4)
    train_task.main(["--task", str(out / "interface.jsonl"), "--tokenizer", "foldseek", "--device", "cpu",
                     "--results-dir", str(tmp_path / "r"), "--max-steps", "4", "--seeds", "1",
                     "--learning-rates", "0.01"])
    assert "| Interface | test | " in (tmp_path / "r" / "table3.md").read_text()
