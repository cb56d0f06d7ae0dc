"""provq.py is meant to be copied: alone, or with provq_attach.py; with torch and the standard library, on Python 3.9.

PROVQ_PYTHONS=PATH[:PATH...] names further interpreters that run the examples, say of Python 3.9 with torch 2.1.
"""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from places import ROOT
from torch.torch_version import TorchVersion

PYTHONS = [sys.executable, *filter(None, os.environ.get("PROVQ_PYTHONS", "").split(os.pathsep))]
SOURCE, COMPANION = ROOT / "tokenizer" / "provq.py", ROOT / "tokenizer" / "provq_attach.py"
MORE = [ROOT / "tokenizer" / "provq_hosts.py", ROOT / "tokenizer" / "provq_packages.py"]


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


def _roots(path: Path) -> set[str]:
    """First parts of all imports, also inside functions; relative ones with their dots and names."""
    roots = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            roots |= {"." * node.level + (node.module or alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add(node.module.split(".")[0])
    return {root for root in roots if root not in sys.stdlib_module_names}


def test_they_import_torch_and_the_standard_library_only():
    assert _roots(SOURCE) == {"torch"}
    assert _roots(COMPANION) == {"torch", "provq", ".provq"}, "flat, and in a package of any name"
    for path in MORE:
        assert {root.lstrip(".") for root in _roots(path)} <= {"torch", "provq", "provq_attach", "provq_hosts"}


@pytest.mark.parametrize("path", [SOURCE, COMPANION, *MORE])
def test_they_parse_as_python_3_9(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 9))
    futures = [n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
    assert [a.name for f in futures for a in f.names] == ["annotations"]  # X | Y in annotations must stay text


# ------------------------------------------------------------------------------------------------------ the companion

HOST = """
import torch

class VectorQuantizer2(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.n_e, self.e_dim, self.legacy, self.sane_index_shape, self.remap = 8, 4, False, True, None
        self.embedding = torch.nn.Embedding(8, 4)

    def forward(self, z):
        rows = z.movedim(1, -1)
        indices = torch.cdist(rows.reshape(-1, 4), self.embedding.weight).argmin(1).view(rows.shape[:-1])
        codes = self.embedding(indices)
        loss = (codes - rows.detach()).square().mean()
        return (rows + (codes - rows).detach()).movedim(-1, 1), loss, (None, None, indices)

torch.manual_seed(0)
quantize = VectorQuantizer2().train()
handle = attach(quantize, Curriculum(2, 2))
for step in range(6):
    handle.set_step(step)
    info = handle.maybe_init_codebook()
    assert (info is not None) == (step == 2)
    _, loss, (_, _, indices) = quantize(torch.randn(2, 4, 3, 5))
    assert ((indices == -1) if step < 2 else (indices >= 0)).all()
assert handle.stage == 3 and handle.usage()["usage"] > 0.5
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder on the path; what was imported from it is forgotten."""
    before = set(sys.modules)
    for name in ("provq", "provq_attach", "provq_hosts", "provq_packages"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
            del sys.modules[name]


def _copy(folder: Path, *paths: Path) -> None:
    folder.mkdir(exist_ok=True)
    for path in paths:
        shutil.copy(path, folder)


@pytest.mark.parametrize("python", PYTHONS)
def test_both_files_work_beside_a_hosts_script(tmp_path, python):
    _copy(tmp_path, SOURCE, COMPANION)
    (tmp_path / "host.py").write_text("from provq_attach import Curriculum, attach\n" + HOST + """
import provq, provq_attach, sys
assert provq.attach is attach and provq.Curriculum is Curriculum and isinstance(handle, provq.ProVQ)
assert provq_attach.provq is provq
assert not any(name.split(".")[0] in ("tokenizer", "evaluations", "scripts") for name in sys.modules)
print("host ran")
""")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([python, "host.py"], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "host ran"


def test_both_files_work_inside_a_package_of_the_host(folder):
    _copy(folder / "some_host", SOURCE, COMPANION)
    (folder / "some_host" / "__init__.py").touch()
    names: dict = {}
    exec("from some_host.provq_attach import Curriculum, attach\n" + HOST, names)
    core, companion = sys.modules["some_host.provq"], sys.modules["some_host.provq_attach"]
    assert "provq" not in sys.modules
    assert "provq_attach" not in sys.modules
    assert companion.provq is core
    assert isinstance(names["handle"], core.ProVQ)
    assert core.attach is companion.attach is names["attach"]


def test_here_both_are_one_module():
    from tokenizer import provq, provq_attach

    assert provq_attach.provq is provq
    assert issubclass(provq_attach.Attached, provq.ProVQ)
    assert provq_attach.Curriculum is provq.Curriculum
    assert provq_attach.AdaptiveWarmup is provq.AdaptiveWarmup


def test_names_of_version_0_2_are_the_companions():
    from tokenizer import provq, provq_attach
    from tokenizer.provq import ADAPTERS, Attached, adapt, attach, detach, host_state_dict

    for value in (Attached, adapt, attach, detach, host_state_dict):
        assert value is getattr(provq_attach, value.__name__)
    assert ADAPTERS is provq_attach.ADAPTERS
    assert {*provq._ELSEWHERE} - {"load"} <= {*provq_attach.__all__}
    assert set(provq_attach.__all__) & set(provq.__all__) == {"AdaptiveWarmup", "Curriculum"}
    assert all(getattr(provq, name) is getattr(provq_attach, name)
               for name in (*provq_attach.__all__, *provq_attach._MOVED))
    with pytest.raises(ImportError, match="cannot import name 'drift'"):
        from tokenizer.provq import drift  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'NoAdapter'"):
        from tokenizer.provq import NoAdapter  # noqa: F401


@pytest.mark.parametrize("path", [SOURCE, COMPANION, *MORE])
def test_all_names_what_is_public(path):
    module = importlib.import_module(f"tokenizer.{path.stem}")
    defined = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    public = {name for name in defined if not name.startswith("_")}
    assert public <= set(module.__all__)
    assert len(module.__all__) == len(set(module.__all__))
    assert all(hasattr(module, name) for name in module.__all__)


@pytest.mark.parametrize("package", ["", "some_host"])
def test_without_the_companion_its_names_say_where_they_are(folder, package):
    _copy(folder / package, SOURCE)
    if package:
        (folder / package / "__init__.py").touch()
    core = importlib.import_module(f"{package}.provq".lstrip("."))
    for name in ("attach", "host_state_dict", "ADAPTERS"):
        with pytest.raises(ImportError, match=f"^{name} is in provq_attach.py: copy it beside provq.py$"):
            exec(f"from {core.__name__} import {name}")
    assert not hasattr(core, "nothing")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec(f"from {core.__name__} import nothing")
    names: dict = {}
    exec(f"from {core.__name__} import *", names)
    assert set(core.__all__) <= set(names)


def test_without_the_other_adapters_their_names_say_where_they_are(folder):
    _copy(folder, SOURCE, COMPANION)
    attach = importlib.import_module("provq_attach")
    with pytest.raises(ImportError, match=r"^FSQAdapter is in provq_hosts.py or provq_packages.py: copy all, provq"):
        exec("from provq import FSQAdapter")
    assert not hasattr(attach, "nothing")
    with pytest.raises(ImportError, match=r"kind='custom' is in provq_hosts.py: copy all, provq\*\.py"):
        attach.adapt(torch.nn.Linear(2, 2), "custom")
    with pytest.raises(TypeError, match=r"simvq: SimVQ or SimVQ1D; more if you copy all, provq\*\.py\)"):
        attach.adapt(torch.nn.Linear(2, 2))
    _copy(folder, *MORE)
    importlib.invalidate_caches()
    assert attach.FSQAdapter.__module__ == "provq_packages"
    assert {"lucidrains", "encodec"} <= set(attach.ADAPTERS)


def test_adapters_of_another_version_are_refused(folder):
    _copy(folder, SOURCE, COMPANION)
    source = MORE[0].read_text()
    assert source.count('__version__ = "0.3.0"') == 1
    (folder / MORE[0].name).write_text(source.replace('__version__ = "0.3.0"', '__version__ = "0.2.9"'))
    attach = importlib.import_module("provq_attach")
    with pytest.raises(ImportError, match=r"provq_hosts.py is of version 0\.2\.9, but .*provq_attach.py of"):
        attach.adapt(torch.nn.Linear(2, 2))


def test_a_failing_companion_is_not_called_missing(folder):
    _copy(folder, SOURCE)
    (folder / "provq_attach.py").write_text("import no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        exec("from provq import attach")


@pytest.mark.parametrize(("old", "new", "found"), [
    ('__version__ = "0.3.0"', '__version__ = "0.2.0"', "0.2.0"),
    ('__version__ = "0.3.0"', '__version__ = "0.3.1"', "0.3.1"),
    ('__version__ = "0.3.0"', "", "None"),
])
@pytest.mark.parametrize("line", ["import provq_attach", "from provq import attach"])
def test_a_provq_of_another_version_is_refused(folder, old, new, found, line):
    source = SOURCE.read_text()
    assert source.count(old) == 1
    (folder / "provq.py").write_text(source.replace(old, new))
    _copy(folder, COMPANION)
    message = rf"^provq_attach.py is of version 0\.3\.0, but .*provq.py of version {found}: copy both, .* one release$"
    with pytest.raises(ImportError, match=message):
        exec(line)


# ----------------------------------------------------------------------------------------------------- old torch

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
