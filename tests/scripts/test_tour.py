"""The notebook runs from top to bottom, as a reader would run it, and says what its text promises."""

import json
import os
import subprocess
import sys

from places import ROOT

NOTEBOOK = ROOT / "scripts" / "tour.ipynb"
CHECKS = """
assert codes.shape == (8, 4, 4) and codes.unique().numel() > 8, codes
assert [picture.size for picture in pictures] == [(16, 16)] * 8
mse = torch.nn.functional.mse_loss(torch.stack([torch.tensor(p.getdata()) for p in pictures]) / 255, images.flatten(1))
assert mse < images.var(), (mse, images.var())
assert len(samples) == 8
assert handle.stage == 3 and used > 16, used
assert set(report.runs) == {"plain", "provq"}
assert {path.name for path in (OUT / "shared").iterdir()} == {"README.md", "config.json", "model.safetensors"}
print("all of it ran")
"""


def cells():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_runs(tmp_path):
    sources = ["".join(cell["source"]) for cell in cells() if cell["cell_type"] == "code"]
    program = tmp_path / "tour.py"
    program.write_text("import warnings\nwarnings.simplefilter('ignore')\n" + "\n".join([*sources, CHECKS]))
    env = {**os.environ, "MPLBACKEND": "agg", "TMPDIR": str(tmp_path)}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([sys.executable, str(program)], cwd=ROOT / "scripts", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "all of it ran" in done.stdout


def test_it_is_stored_without_outputs():
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells() if "outputs" in cell)
    assert max(len(line.rstrip("\n")) for cell in cells() for line in cell["source"]) <= 120
