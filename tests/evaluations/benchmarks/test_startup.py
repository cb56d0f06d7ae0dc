"""The benchmark of --help: a row for each command, beside another checkout's; a command that fails ends it."""

import pytest

from evaluations.benchmarks import startup


def test_every_command_has_a_row_beside_that_of_another_checkout(tmp_path, capsys):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "make_docking_tasks.py").write_text("print('usage: none')\n")
    startup.main(["--before", str(tmp_path), "--repeats", "1", "--only", "scripts/make_"])
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert head == "| command | CPU s, before | wall s, before | CPU s, now | wall s, now |"
    cells = {name.strip(" `"): numbers for _, name, *numbers, _ in (row.split("|") for row in rows)}
    assert list(cells) == [f"scripts/make_{name}.py" for name in ("docking_tasks", "imagenet100", "structure_codes")]
    assert all(float(number) > 0 for number in cells["scripts/make_docking_tasks.py"])
    assert [number.strip() for number in cells["scripts/make_imagenet100.py"][:2]] == ["-", "-"]


def test_a_command_that_fails_and_a_folder_that_is_no_checkout_are_named(tmp_path, capsys):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "make_imagenet100.py").write_text("raise SystemExit('broken')\n")
    with pytest.raises(SystemExit, match=r"make_imagenet100\.py --help ends with status 1: broken"):
        startup.main(["--before", str(tmp_path), "--only", "scripts/make_imagenet100.py"])
    with pytest.raises(SystemExit, match="2"):
        startup.main(["--before", str(tmp_path / "scripts")])
    assert "is no checkout of this repository" in capsys.readouterr().err
