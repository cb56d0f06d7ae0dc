"""The worked example of tokenizer/README.md, a quantizer and a domain, trains, resumes and is loaded as it stands."""

import os
import re
import subprocess
import sys

from places import ROOT
from training_runs import assert_same_run, rows

WORDS = ["--log-every", "10", "--val-every", "10", "--ckpt-every", "10", "--device", "cpu"]


def run(folder, *words):
    done = subprocess.run([sys.executable, "signals.py", *words], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})
    return done.returncode, done.stdout + done.stderr


def test_it_trains_and_resumes_bit_for_bit(tmp_path):
    text = (ROOT / "tokenizer" / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(\"\"\"python signals\.py.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "signals.py").write_text(block)
    flags = block.partition("\n")[0].strip('"').split()[2:]
    short = [{"300": "40", "100": "10"}.get(word, word) for word in flags] + WORDS
    assert short.count("10") == 5
    code, said = run(tmp_path, *short, "--results-dir", "straight")
    assert code == 0, said
    twice = [*short, "--results-dir", "twice"]
    twice[twice.index("40")] = "30"
    for steps in ("30", "40"):
        twice[twice.index("--max-steps") + 1] = steps
        code, said = run(tmp_path, *twice)
        assert code == 0, said
    assert_same_run(tmp_path / "straight", tmp_path / "twice", 40)
    assert [row["stage"] for row in rows(tmp_path / "straight")] == [1, 1, 2, 3, 3]  # steps 1, 10, 20, 30, 40
    assert rows(tmp_path / "straight", "validation.jsonl")[-1]["usage"] > 0.2
    code, said = run(tmp_path, "--quantiser", "bounded")
    assert code == 2
    assert "did you mean --quantizer?" in said
