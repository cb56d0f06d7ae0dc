"""The benchmark of all: it runs small, fills its table, names missing peers and tells what became slower."""

import json
import subprocess
import sys

import pytest
from image_files import encoded, picture, write_tar

from evaluations.benchmarks import run_all

DOCUMENT = f"# Speed\n\n{run_all.MARKERS[0]}\nold\n{run_all.MARKERS[1]}\n\nafter\n"


def test_a_small_run_fills_the_table_and_names_missing_peers(tmp_path, capsys, monkeypatch):
    real = run_all.importlib.import_module

    def without_faiss(name):
        if name == "faiss":
            raise ImportError("not here")
        return real(name)

    monkeypatch.setattr(run_all.importlib, "import_module", without_faiss)
    monkeypatch.setattr(run_all, "CASES", [run_all.CASES[0], run_all.CASES[-1]])
    monkeypatch.setattr(run_all.programs, "PROGRAMS", [program for program in run_all.programs.PROGRAMS if program[2]])
    monkeypatch.setattr(run_all, "peak_mib", lambda case, way, args: run_all.grown_mib(
        run_all.ways(case, args)[0][way], args.device))
    document, out = tmp_path / "speed.md", tmp_path / "speed.json"
    document.write_text(DOCUMENT)
    run_all.main(["--scale", "0.01", "--repeats", "2", "--out", str(out), "--document", str(document)])
    rows = json.loads(out.read_text())["rows"]
    assert [row["way"] for row in rows][:2] == [run_all.OURS, "whole matrix"]
    assert all(row["seconds"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1.0
    text = document.read_text()
    assert "old" not in text
    assert text.endswith(f"{run_all.MARKERS[1]}\n\nafter\n")
    assert text.count("| nearest codes | 81 | 10 | 8 |") == 2
    assert "missing: faiss (not here)" in capsys.readouterr().err


def test_what_was_measured_outlives_what_fails_later(tmp_path, monkeypatch):
    def measure(case, args):  # noqa: ARG001
        if case[0] == "k-means++":
            raise ValueError("no memory left")
        return [{"case": case[0]}]

    monkeypatch.setattr(run_all, "measure", measure)
    out = tmp_path / "speed.json"
    with pytest.raises(SystemExit, match="no memory left"):
        run_all.main(["--out", str(out)])
    assert {row["case"] for row in json.loads(out.read_text())["rows"]} >= {"nearest codes", "k-means, 10 iterations"}


def test_programs_are_run_and_read_back(tmp_path, capfd):
    files = {f"{i}/{i}.jpg": encoded(picture(i, 80, 60), "JPEG") for i in range(3)}
    archive = write_tar(tmp_path / "images.tar", files)
    document = tmp_path / "speed.md"
    document.write_text(DOCUMENT)
    run_all.main(["--only", "reading", "--images", str(archive), "--repeats", "1", "--document", str(document)])
    text = document.read_text()
    assert text.count("| reading images, ") == 3
    assert "| case |" not in text
    run_all.main(["--only", "sampling"])
    assert "sampling: left out, missing: --llamagen" in capfd.readouterr().err
    with pytest.raises(SystemExit, match="1"):
        run_all.main(["--only", "reading", "--images", str(tmp_path / "none.tar"), "--repeats", "1"])
    assert "none.tar" in capfd.readouterr().err


def test_memory_is_that_of_a_process_of_its_own():
    """As `measure` asks for it: this process has freed memory, which would be taken first."""
    words = [sys.executable, run_all.__file__, "--scale", "0.5", "--measure-memory", "1", "whole matrix"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert 20 < float(done.stdout) < 300  # 4096 x 2048 distances are 32 MiB, and there are a few


def test_what_became_slower_is_named():
    row = {"case": "k-means", "tokens": 9, "codes": 3, "dim": 2, "way": run_all.OURS, "cpu_seconds": 1.0}
    row["seconds"] = 9.0
    machine = {"device": "a", "threads": 1, "scale": 1.0}
    old = {"machine": machine, "clock": "cpu", "rows": [row, row | {"way": "faiss", "cpu_seconds": 0.1}],
           "programs": [{"what": "sampling", "unit": "codes", "ours": 9.0}]}
    slower = {"machine": machine, "clock": "cpu", "rows": [row | {"cpu_seconds": 1.4}, row | {"way": "faiss"}],
              "programs": [{"what": "sampling", "unit": "codes", "ours": 6.5}]}
    assert run_all.regressions(slower, old, 1.5) == []
    assert run_all.regressions(slower, old, 1.3) == ["slower: k-means N=9 K=3 D=2: 1.4000 s, was 1.0000 s",
                                                     "slower: sampling: 6.50 codes/s, was 9.00"]
    assert run_all.regressions(slower | {"clock": "wall", "programs": []}, old, 1.3) == [], "there the clock counts"
    with pytest.raises(ValueError, match="threads 2"):
        run_all.regressions(slower, old | {"machine": machine | {"threads": 2}}, 1.3)


@pytest.mark.parametrize("text", ["no markers", f"{run_all.MARKERS[1]}{run_all.MARKERS[0]}"])
def test_a_document_without_markers_is_refused(text):
    with pytest.raises(ValueError, match="--document"):
        run_all.put_table(text, "")
