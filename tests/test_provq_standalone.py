"""provq.py is meant to be copied: alone in an empty folder, with torch and the standard library, on Python 3.9."""

import ast
import os
import subprocess
import sys
import textwrap
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "tokenizer" / "provq.py"


def _example() -> str:
    """The indented block of the module docstring: the code that a reader will paste."""
    lines = ast.get_docstring(ast.parse(SOURCE.read_text())).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("    import torch"))
    block = []
    for line in lines[start:]:
        if line.strip() and not line.startswith("    "):
            break
        block.append(line)
    return textwrap.dedent("\n".join(block))


def test_the_docstring_example_runs_beside_a_lone_copy(tmp_path):
    (tmp_path / "provq.py").write_text(SOURCE.read_text())
    check = """
assert provq.stage == 3 and provq.step == 59, (provq.stage, provq.step)
assert tokens.shape == (16, 8, 8) and tokens.dtype == torch.int64
assert provq.decode(tokens).shape == (16, 8, 8, 8)
assert len(tokens.unique()) > 8, "k-means must leave a codebook that is in use"
import os, sys
assert os.path.dirname(os.path.abspath(sys.modules["provq"].__file__)) == os.getcwd()
assert not any(name.split(".")[0] in ("tokenizer", "evaluations", "scripts") for name in sys.modules)
print("example ran")
"""
    (tmp_path / "example.py").write_text(_example() + check)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "example ran"


def test_the_docstring_example_is_the_whole_recipe():
    example = _example()
    for call in ("set_step(", "needs_init", "init_codebook(", "optimizers=", "out.loss", "encode("):
        assert call in example, f"the example lost {call}"


def test_it_imports_torch_and_the_standard_library_only():
    roots = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import cannot be copied"
            roots.add(node.module.split(".")[0])
    assert "torch" in roots
    assert {root for root in roots if root not in sys.stdlib_module_names} == {"torch"}


def test_it_parses_as_python_3_9():
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 9))
    futures = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
    assert [a.name for f in futures for a in f.names] == ["annotations"]  # X | Y in annotations must stay text
