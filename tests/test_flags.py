"""Every numeric flag of every command is refused by its name where it cannot work, before any work."""

import argparse
import dataclasses
import importlib

import pytest
from places import ROOT

from tokenizer.runtime import config
from tokenizer.runtime.command import make_parser

PACKAGES = ("tokenizer", "autoregressive", "protein", "evaluations", "scripts")
SCRIPTS = [".".join(path.relative_to(ROOT).with_suffix("").parts) for folder in PACKAGES
           for path in sorted((ROOT / folder).rglob("*.py")) if "make_parser(PROG" in path.read_text(encoding="utf-8")]
# Commands whose flags are the fields of a dataclass.
CONFIGURED = {"synthetic.run_topodisc": "RunConfig", "protein.benchmark.train_task": "TaskConfig"}
# Flags without which others would be refused first.
NEEDED = {
    "evaluations.benchmarks.structure_model": ["--extract", "1"],
    "protein.benchmark.sensitivity": ["--chains", "x"],
    "tokenizer.reconstruct": ["--export-hf", "x"],
    "protein.benchmark.train_task": ["--results-dir", "x", "--tokenizer", "foldseek", "--task", "x.jsonl"],
}


class Parsed(BaseException):
    """Raised where the command line would be read."""


def parser_of(module, monkeypatch):
    """The parser that the module's main builds."""
    built = []

    def build(*args):
        parser = make_parser(*args)
        built.append(parser)

        def parse_args(_argv):
            raise Parsed

        parser.parse_args = parse_args
        return parser

    with monkeypatch.context() as patch:
        patch.setattr(module, "make_parser", build)
        with pytest.raises(Parsed):
            module.main([])
    return built[0]


def required_words(parser):
    words = []
    for action in parser._actions:
        value = next(iter(action.choices)) if action.choices else "x"
        if not action.option_strings and action.nargs != "?":
            words.append(value)
        elif action.required and action.option_strings:
            words += [action.option_strings[-1], value]
    return words


def refused(module, words, monkeypatch, capsys):
    def work(*_, **__):
        raise AssertionError(f"not refused: {' '.join(words)}")

    with monkeypatch.context() as patch:
        patch.setattr(module, "command", work)
        with pytest.raises(SystemExit) as stopped:
            module.main(words)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_the_scripts_are_found():
    assert {"tokenizer.reconstruct", "protein.benchmark.sensitivity", "scripts.make_imagenet100"} <= set(SCRIPTS)
    assert len(SCRIPTS) >= 20


@pytest.mark.parametrize("name", SCRIPTS)
def test_numbers_that_cannot_work(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    parser = parser_of(module, monkeypatch)
    base = [*required_words(parser), *NEEDED.get(name, [])]
    for action in parser._actions:
        if action.type not in (int, float):
            continue
        flag = action.option_strings[-1]
        for value in ("-7", "nan", "inf"):
            assert flag in refused(module, [*base, flag, value], monkeypatch, capsys).splitlines()[-1]


@pytest.mark.parametrize("name", CONFIGURED)
def test_numbers_of_configurations_that_cannot_work(name, monkeypatch, capsys):
    module = importlib.import_module(name)
    kinds = {flag.name: flag.kind for flag in config._flags(getattr(module, CONFIGURED[name])).values()}
    numeric = [field.name for field in dataclasses.fields(getattr(module, CONFIGURED[name]))
               if kinds[field.name] in (int, float)]
    assert numeric
    for field in numeric:
        for value in ("-7", "nan"):
            words = [*NEEDED.get(name, []), config.flag_name(field), value]
            said = refused(module, words, monkeypatch, capsys).splitlines()[-1]
            assert config.flag_name(field) in said or field in said


def test_the_check_finds_a_flag_without_a_bound(monkeypatch, capsys):
    module = argparse.Namespace(make_parser=make_parser)

    def main(argv):
        parser = module.make_parser("tool.py", None)
        parser.add_argument("--size", type=int)
        parser.parse_args(argv)
        module.command("tool.py")

    module.main, module.command = main, None
    assert [action.dest for action in parser_of(module, monkeypatch)._actions] == ["help", "size"]
    with pytest.raises(AssertionError, match="not refused: --size -7"):
        refused(module, ["--size", "-7"], monkeypatch, capsys)
