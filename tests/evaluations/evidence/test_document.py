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
