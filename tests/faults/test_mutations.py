"""Inputs of every kind, damaged at random: each gives one line that names the file, or is read. None runs code.

The default suite damages each kind a few times; the campaign, whose counts RELIABILITY.md gives, is
    OMP_NUM_THREADS=1 python -m pytest -m campaign tests/faults/test_mutations.py
A case is drawn from its kind and number alone, so that a message's `run_case(KIND, NUMBER)` is all that it takes.
"""

import io
import json
import random
import re
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from input_kinds import KINDS, released
from mutations import damage

from tokenizer.data import TooManyBadImages
from tokenizer.runtime.command import USER_ERRORS

OUTCOMES = ("clear", "skipped", "accepted", "unnamed", "traceback", "hang", "code run")
GOOD = ("clear", "skipped", "accepted")
FEW, MANY = 8, 60  # cases of a kind
SECONDS = 30
MEMORY = 6 * 2**30  # bytes more than the process has
SKIPPED = re.compile("cannot be read|damaged|torn|left out|no rows|no JSON|no protocol|not a checkpoint|no checkpoint")
LONGEST = 2000      # characters of a message


class TimeLimit(BaseException):
    """Not an Exception: no reader may take it for one of its file."""


@contextmanager
def limited():
    """Of time and memory."""
    def stop(*_):
        raise TimeLimit

    before = signal.signal(signal.SIGALRM, stop)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture(scope="session")
def templates(tmp_path_factory):
    """Valid inputs by kind, made when they are first asked for."""
    base, made = tmp_path_factory.mktemp("valid"), {}

    def template(kind):
        if kind.name not in made:
            folder = Path(tempfile.mkdtemp(dir=base))
            with redirect_stdout(io.StringIO()):
                kind.write(folder)
            released()
            made[kind.name] = folder
        return made[kind.name]

    return template


def names_of(path, folder):
    """What a message may call a file: its path from the case's folder down, as far as it is not only a number."""
    relative = path.relative_to(folder)
    return [str(relative), *(part for part in relative.parts if not part.isdigit())]


def run_case(name, number, templates, tmp_path):
    """-> outcome, and what was done and said."""
    kind, rng = KINDS[name], random.Random(f"{name} {number}")
    source, folder, canary = templates(kind), tmp_path / f"the-input-{number}", tmp_path / "canary"
    shutil.copytree(source, folder, symlinks=True)
    found = sorted(path for path in folder.glob(kind.files) if path.is_file() and not path.name.startswith("."))
    path = rng.choice(found)
    try:
        done = f"{path.relative_to(folder)}: {damage(path, rng, canary, kind.values)}"
        outcome, said = read(kind, folder, path)
        if canary.exists():
            canary.unlink()
            outcome = "code run"
    finally:
        released()
        shutil.rmtree(folder)
    return outcome, f"run_case({name!r}, {number}): {done} -> {said}"


def read(kind, folder, path):
    """-> outcome, and what was said"""
    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err), warnings.catch_warnings(), limited():
            warnings.simplefilter("ignore")
            left_out = kind.read(folder)
    except TimeLimit:
        return "hang", "".join(traceback.format_exc().splitlines(keepends=True)[-6:])
    except (*USER_ERRORS, SystemExit) as error:
        said = str(error)
        if isinstance(error, SystemExit) and isinstance(error.code, int):  # argparse has said it
            said = (err.getvalue().strip().splitlines() or [""])[-1]
        elif len(said.splitlines()) != 1 or len(said) > LONGEST:
            return "unnamed", f"{len(said.splitlines())} lines, {len(said)} characters: {said[:300]!r}"
        of_source = isinstance(error, TooManyBadImages) and kind.name.startswith(("image", "Web"))  # names its members
        named = of_source or any(part in said for part in [*names_of(path, folder), str(folder)])
        if named or (kind.flags and re.search("--[a-z]", said)):
            return "clear", said
        return "unnamed", f"{type(error).__name__}: {said}"
    except Exception:
        return "traceback", traceback.format_exc()[-1500:]
    lines = (out.getvalue() + err.getvalue()).splitlines()
    noted = [line for line in lines if path.name in line and SKIPPED.search(line)]
    return ("skipped" if noted or (isinstance(left_out, int) and left_out) else "accepted"), ""


def run_cases(name, numbers, templates, tmp_path):
    """-> counts, and what was not good."""
    counts, wrong = Counter(dict.fromkeys(OUTCOMES, 0)), []
    for number in numbers:
        outcome, said = run_case(name, number, templates, tmp_path)
        counts[outcome] += 1
        if outcome not in GOOD:
            wrong.append(f"{outcome}: {said}")
    return counts, wrong


@pytest.mark.parametrize("name", KINDS)
def test_what_is_not_damaged_is_accepted(templates, tmp_path, name):
    kind, folder = KINDS[name], tmp_path / "the-input"
    shutil.copytree(templates(kind), folder)
    path = next(p for p in sorted(folder.glob(kind.files)) if p.is_file())
    try:
        outcome, said = read(kind, folder, path)
    finally:
        released()
    assert outcome == "accepted", said


@pytest.mark.parametrize("name", KINDS)
def test_a_few_damaged_inputs(templates, tmp_path, name):
    _, wrong = run_cases(name, range(FEW), templates, tmp_path)
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.campaign
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_inputs(templates, tmp_path, capsys, name):
    counts, wrong = run_cases(name, range(MANY), templates, tmp_path)
    with capsys.disabled():
        print("\n" + json.dumps({"kind": name, "tried": sum(counts.values()), **counts}))  # noqa: T201
    assert not wrong, "\n\n".join(wrong)
