"""provq.py in two gloo processes against one: one torchrun, many scenarios (see workers/provq_distributed.py)."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch.distributed as dist
from places import WORKERS
from workers.provq_cases import RECIPES

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WORKER = WORKERS / "provq_distributed.py"
SCENARIOS = [*re.findall(r"^@scenario\ndef (\w+)", WORKER.read_text(), re.MULTILINE), *(f"ddp_{r}" for r in RECIPES)]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> list[dict]:
    """Results of each rank: scenario -> None, or what went wrong."""
    folder = tmp_path_factory.mktemp("provq_distributed")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER),
               str(folder)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                          timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_agree_with_one(outcome, name):
    for rank, results in enumerate(outcome):
        assert results[name] is None, f"rank {rank}: {results[name]}"


def test_every_scenario_ran(outcome):
    assert len(SCENARIOS) > 20
    assert all(sorted(results) == sorted(SCENARIOS) for results in outcome)
