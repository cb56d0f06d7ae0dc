"""What `pip install` gives: the method's files as top-level modules, beside a host's own `tokenizer` folder.

Offline, and nothing is written into the checkout: the wheel is built from a copy, by the setuptools at hand.
"""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from places import ROOT

from tokenizer.provq import __version__

MODULES = ("provq", "provq_codes", "provq_attach", "provq_hosts", "provq_packages", "provq_triton")
# LlamaGen's folders have no __init__.py: an installed package of the same name would win over them.
HOST = '''"""LlamaGen's quantizer, as far as attach looks at it."""
import torch


class VectorQuantizer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.n_e, self.e_dim, self.l2_norm, self.entropy_loss_ratio, self.show_usage = 8, 4, True, 0.0, False
        self.embedding = torch.nn.Embedding(8, 4)

    def forward(self, z):
        raise NotImplementedError
'''


def run(*command: object, cwd: Path, path: Path) -> str:
    """stdout of `python *command` in cwd, with `path` in front of what is installed."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env={**os.environ, "PYTHONPATH": str(path)},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy that has all of tokenizer/, with a torch that cannot be imported."""
    source, out, traps = (tmp_path_factory.mktemp(name) for name in ("source", "wheels", "traps"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    leftovers = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "tokenizer", source / "tokenizer", ignore=leftovers)
    (traps / "torch.py").write_text('raise RuntimeError("the build imports torch")\n')
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check",
        "--wheel-dir", out, source, cwd=out, path=traps)
    return out / f"provq-{__version__}-py3-none-any.whl"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", target, wheel,
        cwd=target, path=target)
    return target


def test_the_wheel_holds_the_method_alone(wheel):
    about = f"provq-{__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        assert sorted(archive.namelist()) == sorted(
            [f"{name}.py" for name in MODULES]
            + [f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "top_level.txt", "licenses/LICENSE")])
        for name in MODULES:
            assert archive.read(f"{name}.py") == (ROOT / "tokenizer" / f"{name}.py").read_bytes(), name
        metadata = email.message_from_bytes(archive.read(f"{about}/METADATA"))
    assert (metadata["Name"], metadata["Version"]) == ("provq", __version__)
    assert metadata.get_all("Requires-Dist") == ["torch>=2.1"]
    assert metadata["Requires-Python"] == ">=3.9"
    assert metadata["License-Expression"] == "Apache-2.0"


def test_it_imports_anywhere(installed, tmp_path):
    check = "import provq_attach, provq; from provq import attach; print(attach.__module__, provq.__file__)"
    assert run("-c", check, cwd=tmp_path, path=installed).split() == ["provq_attach", str(installed / "provq.py")]


@pytest.mark.parametrize("host", [False, True])
def test_load_needs_a_checkout(installed, tmp_path, host):
    if host:
        (tmp_path / "tokenizer").mkdir()  # of somebody else, without an __init__.py
    check = "import provq\ntry:\n  provq.load\nexcept ImportError as error:\n  print(error)"
    assert run("-c", check, cwd=tmp_path, path=installed).startswith("load is in hub.py: run in a checkout of ProVQ")
    there = "import provq; print(provq.load.__module__, provq.__file__)"
    assert run("-c", there, cwd=ROOT, path=installed).split() == ["tokenizer.hub", str(installed / "provq.py")]


def test_a_host_keeps_its_own_tokenizer_folder(installed, tmp_path):
    model = tmp_path / "tokenizer" / "tokenizer_image" / "vq_model.py"
    model.parent.mkdir(parents=True)
    model.write_text(HOST)
    check = """
import provq
from provq import Curriculum, attach
import provq_attach
import tokenizer.tokenizer_image.vq_model as host

quantizer = host.VectorQuantizer()
handle = attach(quantizer, Curriculum(warmup_steps=2, transition_steps=2), check=False)  # its forward is none
assert quantizer.provq is handle
assert isinstance(handle, provq.ProVQ), "the method is there twice, under two names"
print(provq.__file__, provq_attach.__file__, host.__file__, sep="\\n")
"""
    files = run("-c", check, cwd=tmp_path, path=installed).splitlines()
    assert [Path(file).resolve() for file in files] == [
        installed.resolve() / "provq.py", installed.resolve() / "provq_attach.py", model.resolve()]


@pytest.mark.parametrize(("file", "pattern"), [("CITATION.cff", r'^version: "(.+)"$'), ("CHANGELOG.md", r"^## (\S+)")])
def test_there_is_one_version(file, pattern):
    found = re.search(pattern, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
    assert found, f"{file} names no version"
    assert found[1] == __version__


def test_contributing_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\b\w+/[\w/]+\.\w+", text))
    assert len(named) > 10, named
    assert sorted(name for name in named if not (ROOT / name).is_file()) == []
