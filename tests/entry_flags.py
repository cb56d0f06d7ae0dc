"""Flags of the entry scripts, without starting a process for each."""

import argparse
import runpy
import sys
from functools import cache

import pytest


@cache
def flags(script):
    """The flags that the command's parser knows when --help asks for them."""
    found = set()

    def note(parser, file=None):  # noqa: ARG001
        found.update(flag for action in parser._actions for flag in action.option_strings)

    with pytest.MonkeyPatch.context() as patch:  # in this process: another takes longer than all else
        patch.setattr(argparse.ArgumentParser, "print_help", note)
        patch.setattr(sys, "argv", [str(script), "--help"])
        patch.setattr(sys, "path", [str(script.parent), *sys.path])  # the entry guard replaces the first
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0, f"{script} --help ends with {end.value.code}"
    return found
