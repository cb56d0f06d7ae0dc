"""scripts/setup_env.sh in a throw-away root with requirements that need no network."""

import os
import shutil
import subprocess
import sys

import pytest
from places import ROOT

SETUP = ROOT / "scripts" / "setup_env.sh"


@pytest.fixture
def root(tmp_path):
    """A repository root whose path has a space, with the real setup_env.sh and an empty requirements.txt."""
    root = tmp_path / "a clone"
    (root / "scripts").mkdir(parents=True)
    shutil.copy(SETUP, root / "scripts")
    (root / "requirements.txt").write_text("# nothing\n")
    (root / "requirements-dev.txt").write_text("-r requirements.txt\n")
    (root / "requirements-dev-alone.txt").write_text("# nothing\n")
    (root / "scripts" / "caller.sh").write_text(
        'set -euo pipefail\nsource "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"\necho "python=$PYTHON root=$ROOT $*"\n'
    )
    return root


def call(root, *, path_first=None, **env):
    """Run caller.sh from `/`; `python3` is this interpreter unless path_first puts another one before it."""
    shim = root / "shim"
    shim.mkdir(exist_ok=True)
    if not (shim / "python3").exists():
        (shim / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (shim / "python3").chmod(0o755)
    base = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "PROVQ_SETUP_DEV", "PYTHONPATH")}
    path = os.pathsep.join([*([str(path_first)] if path_first else []), str(shim), base["PATH"]])
    return subprocess.run(
        ["bash", str(root / "scripts" / "caller.sh"), "an argument"],
        cwd="/", env={**base, "PATH": path, **env}, capture_output=True, text=True,
    )  # fmt: skip


def fake_python(folder, version):
    """A `python3` that says it is `version` and can do nothing else."""
    folder.mkdir()
    script = folder / "python3"
    script.write_text(f'#!/bin/sh\ncase "$2" in *print*) echo {version};; *) exit 1;; esac\n')
    script.chmod(0o755)
    return script


def test_venv_is_made_once_and_follows_the_requirements(root):
    pytest.importorskip("ensurepip")  # Debian packages it apart from Python
    stamp = root / ".venv" / "installed-requirements.txt"
    log = root / ".venv" / "install.log"

    first = call(root)
    assert first.returncode == 0, first.stderr
    assert f"python={root}/.venv/bin/python root={root} an argument" in first.stdout
    assert stamp.read_text() == "# nothing\n"

    log.unlink()
    second = call(root)
    assert second.returncode == 0, second.stderr
    assert second.stdout.splitlines() == [f"python={root}/.venv/bin/python root={root} an argument"]
    assert not log.exists()  # pip was not called

    # The tests' requirements are a second stamp; one run for both leaves the plain call up to date.
    dev = call(root, PROVQ_SETUP_DEV="1")
    assert dev.returncode == 0, dev.stderr
    assert {path.name for path in (root / ".venv").glob("installed-*")} == {
        "installed-requirements.txt", "installed-requirements-dev.txt", "installed-requirements-dev-alone.txt"}
    log.unlink()
    assert call(root).returncode == 0
    assert not log.exists()

    # A requirement that cannot be installed: pip's own words, the way out, and no stamp.
    (root / "requirements.txt").write_text("./no-such-package\n")
    failed = call(root)
    assert failed.returncode != 0
    assert "no-such-package" in failed.stderr
    assert "PYTHON=/path/to/python" in failed.stderr
    assert "python=" not in failed.stdout  # the caller did not go on
    assert not stamp.exists()

    # An install cut short (torn stamp) and a virtual environment without pip are both repaired.
    (root / "requirements.txt").write_text("# nothing\n# more\n")
    stamp.write_text("# nothing\n")
    for pip in (root / ".venv").glob("lib/python*/site-packages/pip*"):
        shutil.rmtree(pip)
    repaired = call(root)
    assert repaired.returncode == 0, repaired.stderr
    assert stamp.read_text() == "# nothing\n# more\n"


def test_given_python_is_used_as_it_is(root):
    done = call(root, PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    assert f"python={sys.executable} " in done.stdout
    assert not (root / ".venv").exists()


def test_given_python_without_torch(root, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    bare = tmp_path / "bare" / "bin" / "python"
    failed = call(root, PYTHON=str(bare))
    assert failed.returncode != 0
    assert f"PYTHON={bare} cannot import torch: ModuleNotFoundError" in failed.stderr
    assert "requirements.txt" in failed.stderr


def test_given_python_that_does_not_exist(root):
    failed = call(root, PYTHON="/no/such/python")
    assert failed.returncode != 0
    assert "/no/such/python" in failed.stderr


@pytest.mark.parametrize("given", [True, False])
def test_old_python(root, tmp_path, given):
    old = fake_python(tmp_path / "old", "3.8")
    failed = call(root, PYTHON=str(old)) if given else call(root, path_first=old.parent)
    assert failed.returncode != 0
    assert "is Python 3.8, but ProVQ needs Python 3.10 or newer" in failed.stderr
    assert not (root / ".venv").exists()
