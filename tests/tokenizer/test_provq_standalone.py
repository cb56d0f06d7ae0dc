"""provq.py is meant to be copied: alone in an empty folder, with torch and the standard library, on Python 3.9.

PROVQ_PYTHONS=PATH[:PATH...] names further interpreters that run the example, say of Python 3.9 with torch 2.1.
"""

import ast
import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch._dynamo.testing
from places import ROOT
from torch.torch_version import TorchVersion

PYTHONS = [sys.executable, *filter(None, os.environ.get("PROVQ_PYTHONS", "").split(os.pathsep))]
SOURCE = ROOT / "tokenizer" / "provq.py"


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


@pytest.mark.parametrize("python", PYTHONS)
def test_the_docstring_example_runs_beside_a_lone_copy(tmp_path, python):
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
    done = subprocess.run([python, "example.py"], cwd=tmp_path, env=environment, capture_output=True, text=True,
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


def test_before_torch_2_4_no_graph_depends_on_the_stage(monkeypatch):
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.3.1"))
    spec = importlib.util.spec_from_file_location("provq_of_old_torch", SOURCE)
    old = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, old)  # dataclasses look their module up
    spec.loader.exec_module(old)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Linear(4, 4)
            self.quantize = old.ProVQ(old.VectorQuantizer(8, 4), old.Curriculum(2, 3), channel_dim=-1)

        def forward(self, x):
            return self.quantize(self.encoder(x))

    torch.manual_seed(0)
    torch._dynamo.reset()
    model, counter = Model(), torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter)
    for step in range(7):
        model.quantize.set_step(step)
        if model.quantize.needs_init:
            model.quantize.init_codebook(torch.randn(64, 4))
        x = torch.randn(5, 4)
        assert torch.equal(compiled(x).quantized, model(x).quantized), f"the graph of another stage at step {step}"
    assert counter.frame_count == 1, "only the encoder may be in a graph: those versions would not see it go stale"
