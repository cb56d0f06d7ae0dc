"""The documents say what is there: links, paths, commands and flags exist, lines fit a screen, README's recipes run.

Each check takes a repository root and returns complaints as "file:line: what", so that it can be shown to fail on a
small wrong document as well. A flag is one if the parser of its script knows it: scripts are asked for --help.
"""

import ast
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from entry_flags import flags
from places import ROOT

FOLDERS = ("tokenizer", "autoregressive", "protein", "synthetic", "evaluations", "scripts", "tests")
FRONT_PAGE, MAX_CHARACTERS, MAX_WIDTH = Path("README.md"), 10_000, 120
HISTORY = Path("CHANGELOG.md")  # it names what is no longer there
LAUNCHERS, SCRIPTS = ("python", "torchrun", "bash"), (".py", ".sh")

FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
PATCHED = re.compile(r"`[\w/]+\.py`:\n\n(?=```diff)")  # a file of the repository that the patch is for, not of ours
OUR_PATH = re.compile(rf"(?:{'|'.join(FOLDERS)})/[\w.*/-]*|[\w*]+\.(?:py|sh)")
OWN_FLAG = re.compile(r"^ +(--[\w-]+)\)", re.MULTILINE)  # flags that a shell script reads itself
FORWARDS = re.compile(r'\$ROOT/([\w/]+\.py)" "\$@"')  # a shell script that hands its flags on


# -------------------------------------------------------------------------------------------------- what is written

def documents(root):
    """(path relative to root, text) of every Markdown file."""
    paths = [*root.glob("*.md"), *(path for folder in FOLDERS for path in (root / folder).rglob("*.md"))]
    return [(path.relative_to(root), path.read_text(encoding="utf-8")) for path in sorted(paths)]


def blank(pattern, text):
    """text with the matches replaced by as many newlines as they have, so that line numbers stay."""
    return pattern.sub(lambda match: "\n" * match[0].count("\n"), text)


def line_of(text, position):
    return text.count("\n", 0, position) + 1


def commands(text):
    """(line, words) of every line of shell in blocks of it, and of every span of code in the prose."""
    for block in FENCE.finditer(text):
        if block[1] == "bash":
            start = line_of(text, block.start(2))
            joined = re.sub(r"\\\n", lambda _: "\\\0", block[2])  # a command is one line, and lines stay countable
            for line in joined.split("\n"):
                yield start, shlex.split(line.replace("\\\0", " "), comments=True)
                start += 1 + line.count("\0")
    prose = blank(FENCE, text)
    for span in SPAN.finditer(prose):
        yield line_of(prose, span.start()), span[1].split()


def script_and_flags(words):
    """What a command starts, and the flags that come after it: "a/b.py", ["--c"]. "": no Python or shell script."""
    words = list(itertools.dropwhile(lambda word: "=" in word, words))  # the environment
    if words and words[0] in LAUNCHERS and "pytest" not in words:
        words = list(itertools.dropwhile(lambda word: not word.endswith(SCRIPTS), words))
    if not words or not words[0].endswith(SCRIPTS):
        return "", []
    return words[0], [word.partition("=")[0] for word in words[1:] if word.startswith("--")]


def anchors(text):
    """The names under which GitHub reaches the headings."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in HEADING.findall(blank(FENCE, text))}


# --------------------------------------------------------------------------------------------------- what there is

def entry_scripts(root):
    """The Python files that are commands; tests and their helpers are none."""
    paths = [path for folder in FOLDERS[:-1] for path in sorted((root / folder).rglob("*.py"))]
    return [path for path in paths if any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        for node in ast.parse(path.read_text(encoding="utf-8")).body)]


def find(root, name):
    """What a path from the root names, * included; a file's name alone is one anywhere in our folders."""
    if "/" in name:
        return sorted(root.glob(name))
    return sorted(found for folder in FOLDERS for found in (root / folder).rglob(name))


def flags_of(script):
    """Of a Python script, or of the one that a shell script of scripts/ hands its flags to."""
    if script.suffix == ".py":
        return flags(script)
    text = script.read_text(encoding="utf-8")
    target = FORWARDS.search(text)
    return flags(script.parents[1] / target[1]) if target else set(OWN_FLAG.findall(text))


# ---------------------------------------------------------------------------------------------------------- checks

def check_front_page(root):
    length = len((root / FRONT_PAGE).read_text(encoding="utf-8"))
    if length > MAX_CHARACTERS:
        yield f"{FRONT_PAGE}:1: {length} characters; a front page has at most {MAX_CHARACTERS}"


def check_width(root):
    for path, text in documents(root):
        for number, line in enumerate(text.splitlines(), start=1):
            if len(line) > MAX_WIDTH:
                yield f"{path}:{number}: {len(line)} characters wide; at most {MAX_WIDTH}"


def check_links(root):
    for path, text in documents(root):
        prose = blank(SPAN, blank(FENCE, text))
        for match in LINK.finditer(prose):
            where = f"{path}:{line_of(prose, match.start())}"
            name, _, anchor = match[1].partition("#")
            target = root / path.parent / name if name else root / path
            if "://" in match[1]:
                continue
            if not target.exists():
                yield f"{where}: a link to {name}, which is not there"
            elif anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
                yield f"{where}: a link to {match[1]}, but {target.name} has no such heading"


def check_paths(root):
    for path, text in documents(root):
        if path == HISTORY:
            continue
        for line, words in commands(blank(PATCHED, text)):
            for word in {word.strip(".,:;()") for word in words}:
                if OUR_PATH.fullmatch(word) and not find(root, word):
                    yield f"{path}:{line}: {word} is not there"


def check_commands(root):
    for path, text in documents(root):
        if path == HISTORY:
            continue
        for line, words in commands(blank(PATCHED, text)):
            script, given = script_and_flags(words)
            found = find(root, script) if script else []
            if script and not found and len(words) > 1:  # one word alone is a name
                yield f"{path}:{line}: no script {script}"
            for flag in given if found else []:
                if flag not in flags_of(found[0]):
                    yield f"{path}:{line}: {script} has no flag {flag}"


def check_flags_in_prose(root):
    """A flag without its command must be one of some script's."""
    known = set().union(*map(flags, entry_scripts(root)))
    for path, text in documents(root):
        if path == HISTORY:
            continue
        for line, words in commands(blank(FENCE, text)):
            for flag in [word.partition("=")[0] for word in words if words[0].startswith("--")]:
                if flag.startswith("--") and flag not in known:
                    yield f"{path}:{line}: no script has a flag {flag}"


PARSER = """import argparse
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out")
    parser.add_argument("--flip", action=argparse.BooleanOptionalAction)
    parser.parse_args()
"""
SHELL = 'exec "$PYTHON" "$ROOT/protein/a.py" "$@"\n'
# Each check with documents that it must complain about, once: {file: content}, the first is the wrong one; its line.
CASES = [
    (check_front_page, {"README.md": "a" * 10_001}, 1),
    (check_width, {"protein/README.md": "# A\n\n" + "a" * 121}, 3),
    (check_width, {"RESULTS.md": "| " + "a" * 118 + " |"}, 1),
    (check_links, {"README.md": "\n[a](RESULTS.md)"}, 2),
    (check_links, {"protein/README.md": "[a](b/c.py)", "b/c.py": ""}, 1),
    (check_links, {"README.md": "![a](a.png)"}, 1),
    (check_links, {"README.md": "[a](A.md#use-provq)", "A.md": "# Use ProVQ now\n```bash\n# use provq\n```"}, 1),
    (check_links, {"README.md": "# A\n[a](#b)"}, 2),
    (check_paths, {"README.md": "`protein/a.py`"}, 1),
    (check_paths, {"README.md": "see\n`b/c`, `protein/a.py`", "protein/b.py": ""}, 2),
    (check_paths, {"README.md": "`tokenizer/provq*.py`", "tokenizer/data.py": ""}, 1),
    (check_paths, {"README.md": "`a.py` has it", "protein/b.py": ""}, 1),
    (check_paths, {"README.md": "```bash\ncp tokenizer/a.py b/\n```"}, 2),
    (check_paths, {"README.md": "```bash\npython scripts/b.py \\\n    --x protein/a.py\ncp scripts/c.sh d\n```",
                   "scripts/b.py": "", "protein/a.py": ""}, 4),
    (check_commands, {"README.md": "```bash\npython protein/b.py\n```", "protein/a.py": PARSER}, 2),
    (check_commands, {"README.md": "a\n```bash\n# b\nN=8 torchrun --nproc_per_node=8 protein/a.py x --ou y  # --z\n```",
                      "protein/a.py": PARSER}, 4),
    (check_commands, {"README.md": "```bash\npython protein/a.py --out x \\\n    --no-flop=1\n```",
                      "protein/a.py": PARSER}, 2),
    (check_commands, {"README.md": "```bash\nbash scripts/a.sh --ouch\n```", "scripts/a.sh": SHELL,
                      "protein/a.py": PARSER}, 2),
    (check_commands, {"README.md": "```bash\nbash scripts/a.sh --out b\n```", "scripts/a.sh": "exit 0\n"}, 2),
    (check_commands, {"README.md": "\n`protein/a.py --ou y` does", "protein/a.py": PARSER}, 2),
    (check_commands, {"README.md": "`a.py --ou y` does", "protein/a.py": PARSER}, 1),
    (check_flags_in_prose, {"README.md": "\nwith `--out x --outer 3`", "protein/a.py": PARSER}, 2),
]
CHECKS = list(dict.fromkeys(check for check, *_ in CASES))


def write(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_documents_are_right(check):
    complaints = list(check(ROOT))
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize(("check", "files", "line"), CASES)
def test_checks_can_fail(check, files, line, tmp_path):
    write(tmp_path, files)
    complaints = list(check(tmp_path))
    assert len(complaints) == 1, complaints
    assert complaints[0].startswith(f"{next(iter(files))}:{line}: ")


def test_right_documents_pass(tmp_path):
    write(tmp_path, {
        "README.md": "# A\n[a](protein/README.md#train-it-bs) [b](#a) [c](https://x.y/z) `[d](e)` `protein/*.py`\n"
                     "```bash\nNPROC=8 bash scripts/a.sh --out=1 --no-flip  # as ever: --what\n"
                     "python protein/a.py x \\\n    --flip\npython -m pytest -q protein/a.py --co\npip install --pre\n"
                     "```\nThe same `--out`; `python protein/a.py --out y`; `a.py`, `runs/b.py`.\n",
        "protein/README.md": "## Train it: `B`'s\n\n`tokenizer/host.py`:\n\n```diff\n+`protein/c.py`\n```\n" + "a" * 99,
        "CHANGELOG.md": "`protein/gone.py --gone`",
        "protein/a.py": PARSER,
        "scripts/a.sh": SHELL,
    })
    assert [complaint for check in CHECKS for complaint in check(tmp_path)] == []


# ----------------------------------------------------------------------------------------------- README's recipes

def recipe(mark):
    """The one Python block of README with `mark` in it."""
    blocks = [body for language, body in FENCE.findall((ROOT / FRONT_PAGE).read_text()) if language == "python"]
    found = [block for block in blocks if mark in block]
    assert len(found) == 1, found
    return found[0]


def run_beside_the_method(code, folder):
    """In a folder where README's `cp` has put the method, and in a process of its own."""
    for path in (ROOT / "tokenizer").glob("provq*.py"):
        shutil.copy(path, folder)
    (folder / "recipe.py").write_text(code)
    done = subprocess.run([sys.executable, "recipe.py"], cwd=folder, capture_output=True, text=True, timeout=120,
                          check=False)
    assert done.returncode == 0, done.stderr


def test_the_recipe_for_own_code_runs_as_it_stands(tmp_path):
    code = recipe("needs_init")
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("import", "from"))]
    assert len(lines) <= 12
    seen = code.replace("    opt.zero_grad()", "    stages.append(provq.stage); opt.zero_grad()")
    assert seen != code
    run_beside_the_method(f"""stages = []
{seen}
assert stages == [1] * 20 + [2] * 20 + [3] * 20, stages
assert provq.has_codebook and provq.usage()["usage"] > 0 and loss.isfinite()
assert tokens.shape == (16, 8, 8) and tokens.dtype == torch.int64
""", tmp_path)


def test_the_recipe_for_a_host_runs(tmp_path):
    """As it stands, except that the stages last 4 and 2 steps."""
    code = recipe("maybe_init_codebook")
    short = code.replace("warmup_steps=50_000, transition_steps=20_000", "warmup_steps=4, transition_steps=2")
    ours = short.replace("    ...", "    train(x)")
    assert code != short != ours
    run_beside_the_method(f"""import types, torch
from vector_quantize_pytorch import VectorQuantize
encoder, stages = torch.nn.Linear(6, 8), []
model = types.SimpleNamespace(quantize=VectorQuantize(dim=8, codebook_size=16))
optimizer = torch.optim.Adam(encoder.parameters(), 1e-2)
batches = torch.randn(9, 4, 32, 6)
def train(x):
    quantized, indices, loss = model.quantize(encoder(x))
    (quantized.square().mean() + loss.sum()).backward()
    optimizer.step()
    stages.append(provq.stage)
{ours}
assert stages == [1] * 4 + [2] * 2 + [3] * 3, stages
assert provq.has_codebook
""", tmp_path)
