"""Whoever asks for --help or mistypes a flag does not wait for torch: flags are read before it is imported."""

import json
import subprocess
import sys

import pytest
from places import ROOT
from test_layering import PACKAGES, is_entry, python_files

from tokenizer import choices, provq
from tokenizer.image_classes import ACCEPTED

SCRIPTS = [str(path) for path, tree in python_files(ROOT, (*PACKAGES, "scripts")).items() if is_entry(tree)]
# What flags mean together, and what only a check before the work finds: the line, and how the command ends.
REFUSED = {
    "tokenizer/train_provq.py --global-batch-size 0":
        "tokenizer/train_provq.py: error: --global-batch-size is 0; it must be at least 1",
    "autoregressive/train_c2i.py --max-steps 3 --epochs 2":
        "autoregressive/train_c2i.py: error: give one of --max-steps and --epochs; got 3 and 2",
    "protein/train_provq.py --decoder-width 6":
        "protein/train_provq.py: error: --decoder-width 6 must be an even multiple of --decoder-heads 4",
    "tokenizer/train_provq.py --preset cifar10 --data-path nowhere":
        "tokenizer/train_provq.py: error: --data-path: data path {here}/nowhere: no such file or folder. "
        "Accepted: {accepted}",
    "autoregressive/train_c2i.py --code-path nowhere":
        "autoregressive/train_c2i.py: error: --code-path: nowhere is no folder of codes; "
        "autoregressive/extract_codes.py makes one",
    "protein/train_provq.py --data-path nowhere":
        "protein/train_provq.py: error: --data-path: nowhere: no such folder",
    "tokenizer/reconstruct.py nowhere digits":
        "tokenizer/reconstruct.py: error: no tokenizer at nowhere",
    "protein/export_tokens.py nowhere.npz --out nowhere.txt":
        "protein/export_tokens.py: error: --out nowhere.txt: sentences are kept in .jsonl, .parquet",
    "protein/encode.py nowhere.pdb --ckpt nowhere --out nowhere.npz":
        "protein/encode.py: error: nowhere.pdb: no such file or folder",
    "evaluations/generation.py digits nowhere.npz --out nowhere.json":
        "evaluations/generation.py: error: nowhere.npz: no such file",
    "evaluations/evidence/run.py nowhere.zip --out nowhere.jsonl --arms vanilla":
        "evaluations/evidence/run.py: error: nowhere.zip: no such file of images",
    "evaluations/evidence/table.py nowhere.jsonl":
        "evaluations/evidence/table.py: error: nowhere.jsonl: no such results file",
}


@pytest.fixture(scope="module")
def started():
    """{line of words: (status, what it said, slow packages)}, of one process for all."""
    lines = [[script, *words] for script in SCRIPTS for words in (["--help"], ["--no-such-flag"])]
    lines += [line.split() for line in REFUSED]
    done = subprocess.run([sys.executable, ROOT / "tests" / "workers" / "start.py"], cwd=ROOT, input=json.dumps(lines),
                          capture_output=True, text=True, check=True)
    return dict(zip(map(" ".join, lines), json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_unknown_flags_come_without_torch(started, script):
    status, said, slow = started[f"{script} --help"]
    assert (status, slow) == (0, [])
    assert said.startswith("usage: ")
    status, said, slow = started[f"{script} --no-such-flag"]
    assert (status, slow) == (2, [])
    assert "error: " in said.splitlines()[-1]


@pytest.mark.parametrize(("line", "error"), REFUSED.items())
def test_so_does_what_a_check_of_the_flags_refuses(started, line, error):
    assert started[line] == [error.format(here=ROOT, accepted=ACCEPTED), "", []]


def test_names_in_flags_are_those_of_the_method():
    assert choices.QUANTIZERS == list(provq.QUANTIZERS)
    assert choices.TRANSITIONS == list(provq.SCHEDULES)
