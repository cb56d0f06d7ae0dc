"""The rules of the architecture that a reader of one file cannot see, checked on the syntax trees of all files.

    L0  tokenizer/provq*.py | tokenizer/runtime/               imports nothing of ours but its own group
    L1  tokenizer/                                             imports L0 and its own folder
    L2  autoregressive/ | protein/ | synthetic/                import L0, L1 and their own folder
    L3  protein/benchmark/                                     imports L0, L1, protein/ and its own folder
    L4  evaluations/                                           imports everything above
    L5  scripts/ | tests/                                      import everything

So no arrow runs back up between folders, and nothing but scripts and tests imports evaluations/. Its meters (what is no
entry script, no benchmark and not shared by those) take arrays and import nothing of ours.
Entry scripts (files with `if __name__ == "__main__"`) are imported by nobody but tests. Each check takes the repository
root and returns complaints as "file:line: what", so that it can be shown to fail on a small wrong tree as well.
"""

import ast
import functools
import math
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from places import ROOT

PACKAGES = ("tokenizer", "autoregressive", "protein", "synthetic", "evaluations")
FOLDERS = (*PACKAGES, "scripts", "tests")
MAX_LINES = 600
# Copied into other projects; each may need those before it.
COPIED = (PROVQ, PROVQ_CODES, PROVQ_ATTACH, PROVQ_HOSTS, PROVQ_PACKAGES, PROVQ_TRITON) = tuple(
    Path(f"tokenizer/{name}.py")
    for name in ("provq", "provq_codes", "provq_attach", "provq_hosts", "provq_packages", "provq_triton"))
CURRICULUM = {Path("tokenizer/curriculum.py"), Path("tokenizer/curriculum_config.py")}  # all tokenizers' trainers share
# What the entry scripts of evaluations/ share. The rest of that folder are meters.
EVALUATIONS_SHARED = {Path("evaluations/image_sets.py")}
LONGER = {PROVQ: 960, PROVQ_ATTACH: 900}  # as few files as can be: they are copied by hand
# Packages that take seconds to import: not before a command has read its flags.
SLOW = {"torch", "torchvision", "scipy", "sklearn", "skimage", "matplotlib", "timm", "transformers", "diffusers"}
GUARD = "if not __package__:\n    sys.path[0] = str(Path(__file__).resolve().parents[{depth}])"


def python_files(root, folders=FOLDERS):
    """{path relative to root: syntax tree}"""
    paths = sorted(p for folder in folders for p in (root / folder).rglob("*.py"))
    return {p.relative_to(root): ast.parse(p.read_text(encoding="utf-8"), filename=str(p)) for p in paths}


def imported_names(tree):
    """(line, dotted name) of every import, also those inside functions. `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield node.lineno, module
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def project_imports(tree, files):
    """(line, file of ours) of every import that names one of `files`."""
    for line, name in imported_names(tree):
        if name.startswith("."):
            continue  # see check_absolute_imports
        stem = Path(*name.split("."))
        for target in (stem.with_suffix(".py"), stem / "__init__.py"):
            if target in files:
                yield line, target


def is_main_block(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "'__main__' == __name__")


def is_entry(tree):
    return any(is_main_block(node) for node in tree.body)


def group(path, tree):
    """(layer, name of the group that may import itself, layers that it may import)"""
    top = path.parts[0]
    if path in COPIED:
        return 0, "tokenizer/provq*.py", ()
    if path.name == "__init__.py":
        return 0, str(path), ()
    if path.parts[:2] == ("tokenizer", "runtime"):
        return 0, "tokenizer/runtime", ()
    if top == "tokenizer":
        return 1, top, (0,)
    if path.parts[:2] == ("protein", "benchmark"):
        return 3, "protein/benchmark", (0, 1, "protein")
    if top == "evaluations":
        meter = not is_entry(tree) and len(path.parts) == 2 and path not in EVALUATIONS_SHARED
        return 4, str(path) if meter else top, () if meter else (0, 1, 2, 3, 4)
    return (2, top, (0, 1)) if top in PACKAGES else (5, top, (0, 1, 2, 3, 4, 5))


def check_layers(root):
    files = python_files(root)
    for path, tree in files.items():
        layer, name, allowed = group(path, tree)
        for line, imported in project_imports(tree, files):
            if imported.name == "__init__.py":
                continue
            below, other, _ = group(imported, files[imported])
            if name != other and below not in allowed and other not in allowed:
                yield f"{path}:{line}: L{layer} ({name}) imports {imported}, which is L{below} ({other})"
            if is_entry(files[imported]) and path.parts[0] != "tests":
                yield f"{path}:{line}: imports the entry script {imported}; move what is shared to a module"


def check_no_arrow_back(root):
    """Between folders, as a reader of the tree sees them: the graph of their imports has no circle."""
    files = python_files(root, (*PACKAGES, "scripts"))
    graph, where = {}, {}
    for path, tree in files.items():
        for line, imported in project_imports(tree, files):
            if path.parts[0] != imported.parts[0]:
                graph.setdefault(path.parts[0], set()).add(imported.parts[0])
                where.setdefault((path.parts[0], imported.parts[0]), f"{path}:{line}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        circle = error.args[1]
        yield f"{where[circle[1], circle[0]]}: folders import one another: {' <- '.join(circle)}"


def check_absolute_imports(root):
    for path, tree in python_files(root).items():
        if path in COPIED[1:]:
            continue  # in other projects it stands in packages of any name; see check_provq_stands_alone
        for line in sorted({line for line, name in imported_names(tree) if name.startswith(".")}):
            yield f"{path}:{line}: relative import; write it from the repository root"


def check_no_cycles(root):
    files = python_files(root, PACKAGES)
    graph = {path: {target for _, target in project_imports(tree, files)} - {path} for path, tree in files.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        yield f"{error.args[1][0]}:1: import cycle: {' <- '.join(map(str, error.args[1]))}"


def check_provq_stands_alone(root):
    files = python_files(root, ("tokenizer",))
    for i, path in enumerate(COPIED):
        libraries = {"torch", *sys.stdlib_module_names} | ({"triton"} if path == PROVQ_TRITON else set())
        above = {other.stem for other in COPIED[:i]}  # beside it, flat or in a package: `import provq`, `from . import`
        for line, name in imported_names(files.get(path, ast.Module(body=[]))):
            stem = name.lstrip(".").split(".")[0]
            if name.split(".")[0] not in libraries and stem not in above | ({""} if above else set()):
                also = f", {', '.join(other.name for other in COPIED[:i])}" if above else ""
                yield f"{path}:{line}: imports {name}; this file must work with torch{also} and the standard library"


def check_entry_guard(root):
    files = python_files(root, (*PACKAGES, "scripts"))  # tests start their own helpers with the path set
    for path, tree in files.items():
        ours = [line for line, name in imported_names(tree) if name.split(".")[0] in PACKAGES]
        if not is_entry(tree) or not ours:
            continue
        guard = GUARD.format(depth=len(path.parts) - 1)
        lines = [node.lineno for node in tree.body if ast.unparse(node) == guard]
        if not lines or lines[0] > min(ours):
            yield f"{path}:{min(ours)}: entry script without this before its project imports: {guard!r}"


def imported_at_once(nodes, before=math.inf):
    """Import statements that run when a module is imported, down to a line: not those of functions or type checkers."""
    for node in nodes:
        if node.lineno >= before:
            return
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, (ast.If, ast.Try)) and "TYPE_CHECKING" not in ast.unparse(getattr(node, "test", node)):
            yield from imported_at_once([*node.body, *node.orelse], before)


def check_flags_first(root):
    """What an entry script imports above its first `if __name__ == "__main__":` brings nothing slow, by any way; nor do
    modules that are named as those of flags are.
    """
    files = python_files(root, (*PACKAGES, "scripts"))

    @functools.cache
    def brings(path):
        """{slow package: the file that imports it}"""
        found = {}
        for node in imported_at_once(files[path].body):
            found |= of(node, path)
        return found

    def of(node, path):
        found = {name.split(".")[0]: path for _, name in imported_names(node) if name.split(".")[0] in SLOW}
        for _, other in project_imports(node, files):
            found = brings(other) | found
        return found

    for path, tree in files.items():
        first = next((node.lineno for node in tree.body if is_main_block(node)), None)
        if path.stem.endswith(("config", "choices", "flags")):
            first = math.inf
        for node in imported_at_once(tree.body, first) if first else ():
            for package, where in of(node, path).items():
                yield f"{path}:{node.lineno}: {package} is imported (in {where}) before the flags are read"


def check_packages(root):
    for folder in sorted({path.parent for path in python_files(root, PACKAGES)}):
        marker = root / folder / "__init__.py"
        if not marker.exists():
            yield f"{folder}/__init__.py:1: missing; an installed package of that name would win over the folder"
        elif marker.stat().st_size:
            yield f"{folder}/__init__.py:1: not empty; importing one module would pay for all"


def check_forbidden(root):
    banned = {("strict", False), ("allow_pickle", True), ("weights_only", False)}
    for path, tree in python_files(root).items():
        if path.parts[0] == "tests":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler) and node.type is None:
                yield f"{path}:{node.lineno}: bare except; name the exceptions"
            if not isinstance(node, ast.Call) or ast.unparse(node.func) in ("zip", "map"):
                continue  # zip(strict=False) is another thing
            for keyword in node.keywords:
                if isinstance(keyword.value, ast.Constant) and (keyword.arg, keyword.value.value) in banned:
                    yield f"{path}:{keyword.value.lineno}: {keyword.arg}={keyword.value.value}"
            if isinstance(node.func, ast.Attribute) and node.func.attr == "load_state_dict":
                if len(node.args) > 1 and isinstance(node.args[1], ast.Constant) and node.args[1].value is False:
                    yield f"{path}:{node.lineno}: strict=False"


def check_commands(root):
    """How commands read flags and end with an error is in tokenizer/runtime/command.py, and nowhere else."""
    for path, tree in python_files(root, (*PACKAGES, "scripts")).items():
        if path.parts[:2] == ("tokenizer", "runtime"):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("argparse.ArgumentParser", "ArgumentParser"):
                yield f"{path}:{node.lineno}: ArgumentParser; use command.make_parser"
            if isinstance(node, ast.Raise) and node.exc is not None and "SystemExit" in ast.unparse(node.exc):
                argument = next(iter(getattr(node.exc, "args", [])), None)
                if not (isinstance(argument, ast.Constant) and isinstance(argument.value, int)):
                    yield f"{path}:{node.lineno}: SystemExit; raise one of USER_ERRORS inside `with command(PROG)`"


def check_names(root):
    """A command calls itself in --help and in errors what one types from the repository root."""
    for path, tree in python_files(root, (*PACKAGES, "scripts")).items():
        for node in tree.body if is_entry(tree) else ():
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PROG":
                if ast.literal_eval(node.value) not in (str(path), str(path.with_suffix(".sh"))):
                    yield f"{path}:{node.lineno}: PROG is {ast.unparse(node.value)}"
        for node in ast.walk(tree) if is_entry(tree) else ():
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "command":
                if ast.unparse(node.args[0]) != "PROG":
                    yield f"{path}:{node.lineno}: command({ast.unparse(node.args[0])}); give it PROG"


def check_length(root):
    shells = [p.relative_to(root) for p in sorted((root / "scripts").rglob("*.sh"))]
    for path in (*python_files(root), *shells):
        lines = len((root / path).read_text(encoding="utf-8").splitlines())
        limit = LONGER.get(path, MAX_LINES)
        if lines > limit:
            yield f"{path}:{limit + 1}: {lines} lines; split the file (at most {limit})"


def config_fields(tree):
    """(line, field) of every dataclass field made by `arg(...)` or `config.arg(...)`."""
    for cls in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in cls.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
                if ast.unparse(node.value.func) in ("arg", "config.arg"):
                    yield node.lineno, node.target.id


def attributes_read(tree):
    """Names read as `something.name`. Reading a field only to validate it in `__post_init__` does not count."""
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node not in skipped:
            yield node.attr


def check_no_dead_flags(root):
    for folder in PACKAGES:
        files = python_files(root, (folder,))
        readers = files | python_files(root, ("tokenizer/runtime",))  # the loop that all trainers share,
        readers |= {path: tree for path, tree in python_files(root, ("tokenizer",)).items() if path in CURRICULUM}
        read = {name for tree in readers.values() for name in attributes_read(tree)}
        for path, tree in files.items():
            for line, field in config_fields(tree):
                if field not in read:
                    yield f"{path}:{line}: nothing in {folder}/ or the runtime reads the configuration field {field!r}"


# Each check with the smallest tree that it must complain about, and where: {file: content} -> "file:line".
MAIN = 'if __name__ == "__main__":\n    pass\n'
CHECKS = [
    (check_layers, {"tokenizer/provq.py": "import tokenizer.runtime.ema", "tokenizer/runtime/ema.py": ""}, PROVQ, 1),
    (check_layers, {"tokenizer/runtime/ema.py": "\nfrom tokenizer import data", "tokenizer/data.py": ""}, None, 2),
    (check_layers, {"tokenizer/data.py": "from synthetic.a import b", "synthetic/a.py": ""}, None, 1),
    (check_layers, {"protein/a.py": "def f():\n  import synthetic.a", "synthetic/a.py": ""}, None, 2),
    (check_layers, {"evaluations/features.py": "import tokenizer.data", "tokenizer/data.py": ""}, None, 1),
    (check_layers, {"tokenizer/a.py": "import evaluations.b", "evaluations/b.py": ""}, None, 1),
    (check_layers, {"protein/a.py": "import protein.benchmark.b", "protein/benchmark/b.py": ""}, None, 1),
    (check_layers, {"protein/benchmark/a.py": "import synthetic.b", "synthetic/b.py": ""}, None, 1),
    (check_no_arrow_back, {"protein/a.py": "import synthetic.b", "synthetic/b.py": "\nimport protein.c",
                           "protein/c.py": ""}, "synthetic/b.py", 2),
    (check_layers, {"tokenizer/a.py": "from tokenizer import train", "tokenizer/train.py": MAIN}, None, 1),
    (check_layers, {"scripts/a.py": "from tokenizer.train import f", "tokenizer/train.py": MAIN}, None, 1),
    (check_absolute_imports, {"tokenizer/a.py": "from .runtime import ema"}, None, 1),
    (check_layers, {"tokenizer/provq_attach.py": "import tokenizer.data", "tokenizer/data.py": ""}, PROVQ_ATTACH, 1),
    (check_no_cycles, {"tokenizer/a.py": "import tokenizer.b", "tokenizer/b.py": "import tokenizer.a"}, None, 1),
    (check_provq_stands_alone, {"tokenizer/provq.py": "import math\nimport numpy"}, None, 2),
    (check_provq_stands_alone, {"tokenizer/provq.py": "import provq_attach"}, None, 1),
    (check_provq_stands_alone, {"tokenizer/provq_attach.py": "import torch, provq\nimport numpy"}, None, 2),
    (check_provq_stands_alone, {"tokenizer/provq_codes.py": "import torch, provq\nimport provq_attach"}, None, 2),
    (check_provq_stands_alone, {"tokenizer/provq_attach.py": "from . import provq\nfrom . import data"}, None, 2),
    (check_provq_stands_alone, {"tokenizer/provq_hosts.py": "from .provq_attach import A\nimport einops"}, None, 2),
    (check_provq_stands_alone, {"tokenizer/provq_hosts.py": "import provq_packages"}, None, 1),
    (check_provq_stands_alone, {"tokenizer/provq_codes.py": "import triton", "tokenizer/provq_triton.py":
                                "import triton, torch\nimport provq"}, None, 1),
    (check_entry_guard, {"protein/train.py": "import sys\nimport protein.a\n" + MAIN}, None, 2),
    (check_entry_guard, {"protein/a/b.py": GUARD.format(depth=1) + "\nimport protein.c\n" + MAIN}, None, 3),
    (check_entry_guard, {"protein/a.py": "import protein.c\n" + GUARD.format(depth=1) + "\n" + MAIN}, None, 1),
    (check_flags_first, {"protein/a.py": "import sys\nimport torch\n" + MAIN}, None, 2),
    (check_flags_first, {"protein/train_config.py": "try:\n  import scipy\nfinally:\n  pass"}, None, 2),
    (check_flags_first, {"scripts/a.py": "from protein import b\n" + MAIN + "import torch",
                         "protein/b.py": "from protein.c import d",
                         "protein/c.py": "def d():\n  import scipy\nimport torch.nn"}, None, 1),
    (check_packages, {"protein/benchmarks/a.py": ""}, "protein/benchmarks/__init__.py", 1),
    (check_packages, {"protein/__init__.py": "import protein.a", "protein/a.py": ""}, None, 1),
    (check_forbidden, {"tokenizer/a.py": "try:\n  f()\nexcept:\n  g()"}, None, 3),
    (check_forbidden, {"tokenizer/a.py": "m.load_state_dict(s,\n strict=False)"}, None, 2),
    (check_forbidden, {"tokenizer/a.py": "m.load_state_dict(s, False)"}, None, 1),
    (check_forbidden, {"scripts/a.py": "np.load(f, allow_pickle=True)"}, None, 1),
    (check_forbidden, {"scripts/a.py": "torch.load(f, weights_only=False)"}, None, 1),
    (check_names, {"scripts/a.py": "PROG = 'a.py'\n" + MAIN}, None, 1),
    (check_commands, {"scripts/a.py": "import argparse\nargparse.ArgumentParser(description=__doc__)"}, None, 2),
    (check_commands, {"protein/a.py": "try:\n  f()\nexcept OSError as e:\n  raise SystemExit(f'{e}') from e"}, None, 4),
    (check_length, {"tests/a.py": "x = 1\n" * 601}, None, 601),
    (check_length, {"tokenizer/provq.py": "x = 1\n" * 961, "tokenizer/provq_attach.py": "x = 1\n" * 900}, None, 961),
    (
        check_no_dead_flags,
        {"synthetic/a.py": "class C:\n  n: int = config.arg(1)\n  m: int = arg(2)\n  k: int = 3\nC().n"},
        None,
        3,
    ),
    (
        check_no_dead_flags,
        {"synthetic/a.py": "class C:\n  n: int = arg(1)\n  def __post_init__(self):\n    f(self.n)"},
        None,
        2,
    ),
]


@pytest.mark.parametrize("check", dict.fromkeys(check for check, *_ in CHECKS), ids=lambda check: check.__name__)
def test_rules_hold(check):
    complaints = list(check(ROOT))
    assert not complaints, "\n" + "\n".join(complaints)


@pytest.mark.parametrize(("check", "tree", "path", "line"), CHECKS)
def test_checks_can_fail(check, tree, path, line, tmp_path):
    for name, content in tree.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    complaints = list(check(tmp_path))
    assert len(complaints) == 1, complaints
    assert complaints[0].startswith(f"{path or next(iter(tree))}:{line}: ")


def test_allowed_imports_pass(tmp_path):
    tree = {
        "tokenizer/provq.py": "from __future__ import annotations\nimport torch.nn",
        "tokenizer/provq_attach.py": "if __package__:\n  from . import provq\nelse:\n  import provq",
        "tokenizer/runtime/seeding.py": "",
        "tokenizer/runtime/ema.py": "from tokenizer.runtime import seeding",
        "tokenizer/model.py": "from tokenizer.provq import ProVQ\nfrom tokenizer.runtime import ema",
        "evaluations/features.py": "",
        "autoregressive/gpt.py": "import tokenizer.model",
        "protein/geometry.py": "import tokenizer.model",
        "protein/benchmark/probe.py": "import protein.geometry",
        "autoregressive/train.py": GUARD.format(depth=1) + "\nimport autoregressive.flags\n" + MAIN
        + "from autoregressive import gpt\n" + MAIN,
        "evaluations/report.py": GUARD.format(depth=1) + "\n" + MAIN + "import autoregressive.gpt\n"
        + "import evaluations.features\n",
        "tests/test_train.py": "from autoregressive import train",
        "autoregressive/flags.py": "if TYPE_CHECKING:\n  import torch\ndef f():\n  import torch",
        "scripts/convert.py": "import argparse\nzip(a, b, strict=False)\n" + MAIN,
    }
    for name, content in tree.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).parent.joinpath("__init__.py").touch()
        (tmp_path / name).write_text(content)
    assert [complaint for check, *_ in CHECKS for complaint in check(tmp_path)] == []
