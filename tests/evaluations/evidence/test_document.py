"""Tables of documents are what the results files give, those of RESULTS.md too."""

import dataclasses
import json

import pytest
from evidence_bed import SETTING
from places import ROOT

from evaluations.evidence import document, store, tuning
from evaluations.evidence.arms import ARMS
from evaluations.evidence.store import Run
from tokenizer.runtime.command import CannotContinue

LINE = "<!-- table: core-512.jsonl --seeds 100 101 --arms vanilla provq -->\n"


def test_tables_of_results_are_those_of_the_files():
    text = (ROOT / "RESULTS.md").read_text()
    found, count = document.filled(text)
    assert count >= 2
    assert found == text, "python evaluations/evidence/document.py RESULTS.md"


def test_what_stands_between_the_marks_is_replaced(tmp_path, capsys):
    path = tmp_path / "a.md"
    path.write_text(f"# Before\n{LINE}anything\nat all\n<!-- end -->\nafter\n")
    document.main([str(path)])
    head, names, line, first, second, *rest = path.read_text().splitlines()
    assert (head, names + "\n") == ("# Before", LINE)
    assert line.startswith("| arm | seeds | PSNR (dB) |")
    assert [row[:14] for row in (first, second, rest[0])] == ["|---|---|---|-", "| vanilla | 2 ", "| provq | 2 | "]
    assert rest[1:] == ["<!-- end -->", "after"]
    written = path.stat().st_mtime_ns
    document.main([str(path)])
    assert path.stat().st_mtime_ns == written
    assert capsys.readouterr().out.splitlines()[-1] == f"{path}: 1 tables, all as they were"


@pytest.mark.parametrize(("words", "message"), [
    ("nothing.jsonl", "nothing.jsonl: no such results file"),
    ("core-512.jsonl --seeds 999", "is of these seeds"),
    ("core-512.jsonl --arms nobody", "--arms 'nobody' is none of the arms"),
    ("--frobnicate", "2"),  # argparse has said it
])
def test_tables_that_cannot_be_made_are_named(words, message, tmp_path):
    path = tmp_path / "a.md"
    path.write_text(f"<!-- table: {words} -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match=f"document.py: error: <!-- table: {words} -->: .*{message}"):
        document.main([str(path)])
    assert path.read_text() == f"<!-- table: {words} -->\n<!-- end -->\n"


@pytest.mark.parametrize(("text", "message"), [
    (f"{LINE}old\n\nwords\n\n{LINE}old\n<!-- end -->\n", "there must be a line <!-- end --> after it"),
    (f"{LINE}old\n\nwords\n", "there must be a line <!-- end --> after it"),
    (f"{LINE}old\n\n```\n<!-- end -->\n```\n", "there must be a line <!-- end --> after it"),
    (f"{LINE[:-1]} old <!-- end -->\n", "there must be a line <!-- end --> after it"),
    (f"{LINE}<!-- end -->\n<!-- tabel: core-512.jsonl -->\n<!-- end -->\n", "1 tables begin, 2 lines <!-- end -->"),
])
def test_a_damaged_document_stays_as_it_is(text, message, tmp_path):
    path = tmp_path / "a.md"
    path.write_text(text)
    with pytest.raises(SystemExit, match=f"document.py: error: .*{message}"):
        document.main([str(path)])
    assert path.read_text() == text


def test_marks_in_a_fence_are_text_and_line_ends_stay(tmp_path):
    fence = f"  ```markdown\n{LINE}here\n<!-- end -->\n  ```\n"
    path, link = tmp_path / "a.md", tmp_path / "link.md"
    path.write_bytes(f"{fence}{LINE}old\n<!-- end -->\n".replace("\n", "\r\n").encode())
    link.symlink_to(path)
    document.main([str(link)])
    assert link.is_symlink()
    text = path.read_bytes().decode()
    assert text.startswith(fence.replace("\n", "\r\n"))
    assert text.count("\r\n") == text.count("\n") == len(text.splitlines())
    assert text.count("| provq | 2 |") == 1
    assert "old" not in text


# ------------------------------------------------------------------------------- what a search chose (`tuned`)

def searched(path, scores, arms=("fsq", "lfq"), without=()):
    """Results of whole searches, and of seeds 0 to 4 at every point, with the PSNR that `scores` gives."""
    for name in arms:
        for point in tuning.grid(ARMS[name]):
            for seed in (*tuning.SEARCH_SEEDS, *tuning.FINAL_SEEDS):
                if (name, point.lr, seed) not in without:
                    line = store.result_line(name, Run(point, SETTING, seed), {"metrics": {
                        "psnr": scores(name, point, seed), "codes_used": 3, "perplexity": 2.0}})
                    with path.open("a") as file:
                        file.write(json.dumps(line) + "\n")


def rated(name, point, seed):
    """At 1e-3 the best on seed 100, at 4e-3 the worst there and the best of both."""
    lucky = {100: 1e-3, 101: 4e-3}.get(seed) == point.lr
    return 20.0 + (name == "lfq") + {1e-3: 0.0, 2e-3: 1.0, 4e-3: 0.8}[point.lr] + 1.25 * lucky + (
        0.01 * seed if seed < 100 else 0.0)


def test_rows_are_at_the_point_that_the_search_chose(tmp_path):
    searched(tmp_path / "search.jsonl", rated)
    text, _ = document.filled("<!-- tuned: search.jsonl --arms fsq lfq --metrics psnr -->\n<!-- end -->\n", tmp_path)
    assert text.splitlines()[1:-1] == [
        "| arm | points | seeds 100 and 101 (dB) | seeds | PSNR (dB) | PSNR (dB) against fsq [95 %] |",
        "|---|---|---|---|---|---|",
        "| fsq (lr 0.004) | 3 | 20.80 22.05 | 5 | 20.82 ± 0.02 |  |",
        "| lfq (lr 0.002) | 4 | 22.00 22.00 | 5 | 22.02 ± 0.02 | +1.20 [+1.20, +1.20] |"]  # 4 points: 4e-3 was the last


def test_a_search_of_other_seeds_chooses_by_these_alone(tmp_path):
    searched(tmp_path / "search.jsonl", rated, arms=["fsq"])
    flags = "search.jsonl --arms fsq --metrics psnr --search-seeds"
    text, _ = document.filled(f"<!-- tuned: {flags} 100 3 --seeds 0 4 101 -->\n<!-- end -->\n", tmp_path)
    heading, _, row = text.splitlines()[1:4]
    assert "| seeds 100 and 3 (dB) |" in heading
    assert row.startswith("| fsq (lr 0.002) | 3 | 21.00 21.03 | 3 | 21.01 ")  # 1e-3 has 21.25 and 20.03, 4e-3 less
    text, _ = document.filled(f"<!-- tuned: {flags} 2 3 4 --seeds 0 -->\n<!-- end -->\n", tmp_path)
    assert "| seeds 2 to 4 (dB) |" in text
    assert "| 21.03 ± 0.01 |" in text  # 2e-3 has 21.02, 21.03 and 21.04
    with pytest.raises(CannotContinue, match=r"--seeds and --search-seeds share \[3\]"):
        document.filled(f"<!-- tuned: {flags} 100 3 --seeds 0 3 -->\n<!-- end -->\n", tmp_path)
    with pytest.raises(CannotContinue, match=r"no result of fsq.*, seed 102: .* best 3 on 100 102, .* on 0 1 2 3"):
        document.filled(f"<!-- tuned: {flags} 100 102 -->\n<!-- end -->\n", tmp_path)
    with pytest.raises(CannotContinue, match=r"--seeds names 0 twice; a run is of one seed"):  # else a spread is wrong
        document.filled(f"<!-- tuned: {flags} 100 --seeds 0 0 -->\n<!-- end -->\n", tmp_path)


@pytest.mark.parametrize(("seed", "lr"), [(100, 1e-3), (101, 4e-3), (3, 4e-3)])
def test_a_search_that_is_not_whole_has_no_row(seed, lr, tmp_path):
    searched(tmp_path / "search.jsonl", rated, arms=["fsq"], without=[("fsq", lr, seed)])
    with pytest.raises(CannotContinue, match=rf"tuned: .*no result of fsq.*, seed {seed}: the search is not whole"):
        document.filled("<!-- tuned: search.jsonl --arms fsq -->\n<!-- end -->\n", tmp_path)


def test_a_search_has_one_setting(tmp_path):
    searched(tmp_path / "search.jsonl", rated, arms=["fsq"])
    other = store.result_line("fsq", Run(ARMS["fsq"], dataclasses.replace(SETTING, num_codes=8), 100), {"metrics": {
        "psnr": 1.0, "codes_used": 3, "perplexity": 2.0}})
    (tmp_path / "other.jsonl").write_text(json.dumps(other) + "\n")
    with pytest.raises(CannotContinue, match=rf"these files have 2: .*num_codes {SETTING.num_codes} 8"):
        document.filled("<!-- tuned: search.jsonl other.jsonl --arms fsq -->\n<!-- end -->\n", tmp_path)


def test_a_search_that_always_diverges_has_no_row(tmp_path):
    lines = [store.result_line("fsq", Run(point, SETTING, seed), {"metrics": None})
             for point in tuning.grid(ARMS["fsq"]) for seed in tuning.SEARCH_SEEDS]
    (tmp_path / "search.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(CannotContinue, match="fsq: each of its best points diverged on a search seed"):
        document.filled("<!-- tuned: search.jsonl --arms fsq -->\n<!-- end -->\n", tmp_path)


def test_arms_of_other_images_or_contradicting_lines_are_no_table(tmp_path):
    searched(tmp_path / "a.jsonl", rated, arms=["fsq"])
    searched(tmp_path / "b.jsonl", rated, arms=["lfq"])
    for name in ("a", "b"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(json.loads(line) | {"images": name}) + "\n" for line in path.open()))
    with pytest.raises(CannotContinue, match="other images of one name"):
        document.filled("<!-- tuned: a.jsonl b.jsonl --arms fsq lfq -->\n<!-- end -->\n", tmp_path)
    searched(tmp_path / "c.jsonl", lambda *of: rated(*of) + 1, arms=["fsq"])
    with pytest.raises(CannotContinue, match="are of one run, with other numbers"):
        document.filled("<!-- tuned: a.jsonl c.jsonl --arms fsq -->\n<!-- end -->\n", tmp_path)
