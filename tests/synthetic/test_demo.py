"""synthetic/demo.py: what it shows at its shipped length is there; its table and picture; mistakes."""

import pytest
from PIL import Image

from synthetic import demo


def test_vanilla_wastes_codes_that_provq_uses():
    vanilla, _ = demo.train("vanilla", 0)
    provq, panel = demo.train("provq", 0)
    assert vanilla.codes_used < demo.CODES // 2 < 0.9 * demo.CODES < provq.codes_used
    assert provq.mse < vanilla.mse / 3
    assert panel.title == f"provq: {provq.codes_used} of 64 codes, MSE {provq.mse:.3f}"


def test_table_and_picture(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "STEPS", 9)
    monkeypatch.setattr(demo, "ARMS", {"vanilla": (0, 0), "provq": (3, 3)})
    demo.main(["--seeds", "2", "--out", str(tmp_path / "new" / "a.png")])
    table = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in table[:4]] == ["arm", "---------", "vanilla", "provq"]
    assert len({len(line) for line in table[:4]}) == 1, "columns are straight"
    assert all("±" in line for line in table[2:4])
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert picture.size == (1120, 560)


def test_seeds_are_the_runs(monkeypatch):
    monkeypatch.setattr(demo, "STEPS", 4)
    monkeypatch.setattr(demo, "ARMS", {"provq": (1, 1)})
    first, again, other = (demo.train("provq", seed)[0] for seed in (0, 0, 1))
    assert first == again != other


def test_mistakes_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--seeds", "0"])
    assert "--seeds is 0; it must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"--out .* is a folder"):
        demo.main(["--out", str(tmp_path)])
