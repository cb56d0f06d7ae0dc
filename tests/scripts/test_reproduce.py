"""scripts/reproduce.sh: every command that it runs or prints exists, with its flags; mistakes are named."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from entry_flags import flags
from places import ROOT

from autoregressive import train_config as gpt_config
from evaluations.evidence.flags import CONFIRM
from evaluations.evidence.setting import Setting
from protein import train_config as protein_config
from tokenizer import train_config

SCALES = {"small": "1 2 3 4 5 6 core rivals", "confirm": "1 2 3 4 5 6 core rivals", "paper": "1 2 3 4 5 6"}
CONFIGS = {"tokenizer/train_provq.py": train_config, "protein/train_provq.py": protein_config,
           "autoregressive/train_c2i.py": gpt_config}


@pytest.fixture
def reproduce(tmp_path):
    """The script, with an interpreter that only says what it is asked for."""
    folder = tmp_path / "scripts"
    folder.mkdir()
    shutil.copy(ROOT / "scripts" / "reproduce.sh", folder)
    stub = tmp_path / "python"
    stub.write_text(f"#!{sys.executable}\nimport shlex, sys\nprint('python', shlex.join(sys.argv[1:]))\n")
    stub.chmod(0o755)
    (folder / "setup_env.sh").write_text(f"ROOT={shlex.quote(str(ROOT))} PYTHON={shlex.quote(str(stub))}\n")

    def call(*words):
        return subprocess.run(["bash", str(folder / "reproduce.sh"), *words], capture_output=True, text=True, cwd="/")

    return call


def make_tasks(folder, scale, seeds):
    """-> the data of Table 3 on a CPU; beside its runs to be are those of Table 4."""
    data = folder / "the tasks"
    data.mkdir()
    for name in ("interface", "bfactor"):
        (data / f"{name}.jsonl").touch()
    for row in ("vanilla", "provq", "recluster", "aminoaseed", "aminoaseed-provq", "aminoaseed-recluster"):
        for seed in seeds.split():
            (folder / f"table-4-{scale}" / f"{row}-s{seed}").mkdir(parents=True)
    return str(data)


@pytest.mark.parametrize(("scale", "table"), [(scale, table) for scale, tables in SCALES.items()
                                              for table in tables.split()])
def test_every_command_exists_with_its_flags(reproduce, tmp_path, scale, table):
    data = "the data"
    if table == "3" and scale != "paper":
        data = make_tasks(tmp_path, scale, "3 4")
    given = ["--data", data] if (table, scale) != ("2", "small") else []
    done = reproduce(table, "--scale", scale, *given, "--seeds", "3 4", "--out", str(tmp_path / "an * [o]ut"))
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert lines
    for words in lines:
        launcher, *given = [word for word in words if word != "--nproc_per_node=8"]
        assert launcher == "python" or (launcher == "torchrun" and scale == "paper")
        script = Path(given[0]) if scale != "paper" else ROOT / given[0]
        asked = {word.partition("=")[0] for word in given[1:] if re.match("--[a-z]", word)}
        assert asked <= flags(script), script
        name = str(script.relative_to(ROOT))
        if name in CONFIGS:
            CONFIGS[name].parse_config(given[1:])  # values too
    trained = [words for words in lines if "--results-dir" in words and "--global-seed" in words]
    folders = [words[words.index("--results-dir") + 1] for words in trained]
    assert len(folders) == len(set(folders)), "a folder for every run"
    assert {words[words.index("--global-seed") + 1] for words in trained} <= {"3", "4"}
    if (made := lines[-1][1]).endswith(("collect.py", "report.py")):
        named = lines[-1][2 : lines[-1].index("--probes" if "--probes" in lines[-1] else "--out")]
        if table == "3":  # on what table 4 has trained
            folders = [word.partition("=")[2] for word in lines[0][lines[0].index("--tokenizer") + 2 :]]
            assert lines[-1][lines[-1].index("--probes") + 1] == lines[0][lines[0].index("--results-dir") + 1]
        assert set(named) <= set(folders), made
        assert len(named) == len(set(named)) >= 2
    if made.endswith("table.py"):  # of a file that may hold more
        shown, asked = ({flag: words[words.index(flag) + 1 :] for flag in ("--arms", "--seeds")} for words in (
            lines[-1], lines[-2]))
        assert shown["--seeds"][:2] == asked["--seeds"][:2] == ["3", "4"]
        count = asked["--arms"].index("--out")
        assert shown["--arms"][: count + 1] == [*asked["--arms"][:count], "--seeds"]
        side = CONFIRM["image_size"] if scale == "confirm" else Setting("x").image_size
        assert lines[-1][lines[-1].index("--image-size") + 1] == str(side)


def test_structures_that_are_split_are_validated_on_their_own_and_whole(reproduce, tmp_path):
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
    done = reproduce("4", "--data", str(tmp_path), "--seeds", "0", "--out", "runs")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    trained = [words for words in lines if words[1].endswith("protein/train_provq.py")]
    measured = [words for words in lines if words[1].endswith("protein/evaluate.py")]
    assert len(trained) == len(measured) == 6
    for words, after in zip(trained, measured, strict=True):
        assert words[words.index("--val-path") + 1] == after[2] == str(tmp_path / "val")
        folder = words[words.index("--results-dir") + 1]
        assert after[-1] == f"{folder}/evaluation/structures.json"  # where collect.py reads it
        assert folder in lines[-1]


def test_probes_need_the_tokenizers_of_table_4(reproduce, tmp_path):
    data = make_tasks(tmp_path, "small", "0")
    done = reproduce("3", "--data", data, "--seeds", "0 1", "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.strip() == (f"reproduce.sh: error: {tmp_path}/table-4-small/vanilla-s1 is missing; first: "
                                   f"reproduce.sh 4 --scale small --data {data}")
    done = reproduce("3", "--data", data, "--seeds", "0", "--out", str(tmp_path / "out"))
    words, after = map(shlex.split, done.stdout.splitlines())
    assert after[1].endswith("collect.py")
    assert words[words.index("--tokenizer") + 1 :] == ["foldseek", *(
        f"{row}={tmp_path}/table-4-small/{row}-s0"
        for row in ("vanilla", "provq", "recluster", "aminoaseed", "aminoaseed-provq", "aminoaseed-recluster"))]


@pytest.mark.parametrize(("words", "message"), [
    ((), "the table is ''; it must be 1 to 6, core or rivals"),
    (("7",), "the table is '7'"),
    (("5",), "--data is missing"),
    (("5", "--data"), "--data needs a value"),
    (("5", "--data", ""), "--data needs a value"),
    (("5", "--scale", "huge"), "--scale is 'huge'; it must be small, confirm or paper"),
    (("5", "--seeds", "x"), "--seeds is 'x'; it must be numbers"),
    (("5", "--data", "x", "--seeds", " "), "--seeds is ' '; it must be numbers"),
    (("5", "--data", "x", "--seeds", "0 *"), "--seeds is '0 *'; it must be numbers"),
    (("5", "--data", "x", "--seeds", "0 01"), "--seeds is '0 01'; it must be numbers"),
    (("4", "--seeds", "0 1  0"), "--seeds is '0 1  0'; it names 0 twice"),
    (("5", "--data", "x", "--jobs", "0"), "--jobs is '0'; it must be at least 1"),
    (("5", "--data", "x", "--jobs", "two"), "--jobs is 'two'; it must be at least 1"),
    (("4", "--jobs", "2"), "--jobs 2 is for the evidence bed, on which table 4 at scale small is not"),
    (("5", "--scale", "paper", "--data", "x", "--jobs", "2"), "--jobs 2 is for the evidence bed"),
    (("2", "--data", "x"), "--data x: table 2 at the scale small is of scikit-learn's digits"),
    (("5", "--frobnicate", "1"), "unknown flag --frobnicate"),
    (("core", "--scale", "paper", "--data", "x"), "core is not in the paper"),
    (("3", "--data", "x"), "--data is 'x'; it must be a folder that scripts/make_docking_tasks.py made"),
    (("4", "--scale", "confirm"), "--data is missing: a folder of structures"),
])
def test_mistakes_are_named(reproduce, words, message):
    done = reproduce(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("reproduce.sh: error: ")
    assert message in done.stderr
