"""What evaluations/results/README.md prints as commands is what its files hold, no run more and none less."""

import dataclasses
import re
import shlex

import pytest
from places import ROOT

from evaluations.evidence import flags, run, store

RESULTS = ROOT / "evaluations" / "results"
README = (RESULTS / "README.md").read_text()
FENCES = re.findall(r"^## (\S+\.jsonl)\n\n```bash\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
PRINTED = "python evaluations/evidence/run.py "


def test_each_file_has_its_commands():
    assert [name for name, _ in FENCES] == sorted(path.name for path in RESULTS.glob("*.jsonl"))


def test_no_file_is_left_unnamed():
    assert not [path.name for path in RESULTS.glob("*.json*") if path.name not in README]


@pytest.mark.parametrize(("name", "commands"), FENCES, ids=[name for name, _ in FENCES])
def test_commands_ask_for_the_runs_of_the_file(name, commands, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10_train.zip").touch()  # no images are read
    asked = []
    for command in commands.replace("\\\n", "").splitlines():
        assert command.startswith(PRINTED)
        args = run.parse_args(shlex.split(command.removeprefix(PRINTED)))
        assert str(args.out) == f"evaluations/results/{name}"
        setting = dataclasses.replace(flags.setting(args), features="any" if args.features else None)
        asked += run.planned(args, setting)
    assert len(asked) == len(set(asked))
    there = store.read(RESULTS / name)
    assert set(asked) == {(result.name, _of_any_features(result.run)) for result in there}


def _of_any_features(one):
    """The run, whichever extractor scored it: a command names a file, a line the digest of what was in it."""
    setting = one.setting
    return one._replace(setting=dataclasses.replace(setting, features="any" if setting.features else None))
