"""Runs entry scripts up to where their command lines are refused, all in this process: JSON [[script, word, ...], ...]
from stdin -> JSON [[status, what it said, slow packages that it imported], ...].
"""

import contextlib
import io
import json
import runpy
import sys
from pathlib import Path

SLOW = {"torch", "torchvision", "scipy", "sklearn", "skimage", "matplotlib", "timm", "transformers", "diffusers"}


def run(script, *words):
    before, said, status = set(sys.modules), io.StringIO(), None
    sys.argv, sys.path[0] = [script, *words], str(Path(script).parent)  # as Python starts a script
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            status = end.code
    return status, said.getvalue(), sorted(SLOW & (set(sys.modules) - before))


if __name__ == "__main__":
    json.dump([run(*line) for line in json.load(sys.stdin)], sys.stdout)
