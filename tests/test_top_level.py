"""What is committed lies in the folders that the project agreed on."""

import subprocess
from fnmatch import fnmatch

import pytest
from places import ROOT

FOLDERS = {"tokenizer", "autoregressive", "protein", "synthetic", "evaluations", "scripts", "tests"}
FILES = ("requirements*.txt", "*.md", "pyproject.toml", "LICENSE", "CITATION.cff")


def unexpected(paths):
    """The top-level entries among `paths` (relative, with slashes) that have no place in the layout."""
    wrong = set()
    for path in paths:
        top, slash, _ = path.partition("/")
        fits = top in FOLDERS if slash else any(fnmatch(top, pattern) for pattern in FILES)
        if not fits and not top.startswith("."):
            wrong.add(top)
    return sorted(wrong)


def test_top_level():
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip(f"not a git checkout: {listing.stderr.strip()}")
    assert unexpected(filter(None, listing.stdout.split("\0"))) == []


def test_unexpected_entries_are_found():
    assert unexpected(["tokenizer/a.py", ".ci/run", ".gitignore", "README.md", "requirements-dev.txt"]) == []
    assert unexpected(["utils/a.py", "train.py", "tests", "README.md/x"]) == ["README.md", "tests", "train.py", "utils"]
