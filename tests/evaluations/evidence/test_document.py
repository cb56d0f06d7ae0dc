"""Tables of documents are what the results files give, those of RESULTS.md too."""

import pytest
from places import ROOT

from evaluations.evidence import document

LINE = "<!-- table: core-512.jsonl --seeds 100 101 --arms vanilla provq -->\n"


def test_tables_of_results_are_those_of_the_files():
    text = (ROOT / "RESULTS.md").read_text()
    found, count = document.filled(text)
    assert count >= 2
    assert found == text, "python evaluations/evidence/document.py RESULTS.md"


def test_what_stands_between_the_marks_is_replaced(tmp_path, capsys):
    path = tmp_path / "a.md"
    path.write_text(f"# Before\n{LINE}anything\nat all\n<!-- end -->\nafter <!-- end -->\n")
    document.main([str(path)])
    head, names, line, first, second, *rest = path.read_text().splitlines()
    assert (head, names + "\n") == ("# Before", LINE)
    assert line.startswith("| arm | seeds | PSNR (dB) |")
    assert [row[:14] for row in (first, second, rest[0])] == ["|---|---|---|-", "| vanilla | 2 ", "| provq | 2 | "]
    assert rest[1:] == ["<!-- end -->", "after <!-- end -->"]
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
