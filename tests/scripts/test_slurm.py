"""The job templates with a Slurm that is two processes of this machine: time runs out, the job comes back, resumes."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from places import ROOT
from training_runs import rows

SRUN = """#!/usr/bin/env bash
# Starts two tasks; with TIME_IS_UP, SIGTERM comes to each after the first log row, as with --signal.
while [[ $1 == --* ]]; do echo "$1" >> "$LOG"; shift; done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_NTASKS=2 "$@" &
    tasks+=($!)
done
if [ -n "${TIME_IS_UP:-}" ]; then
    until [ -s "$RUN/metrics.jsonl" ]; do kill -0 "${tasks[0]}" || exit 9; sleep 0.1; done
    kill -TERM "${tasks[@]}"
fi
wait -n; first=$?; wait -n || first=$?
exit $first
"""
SCONTROL = """#!/usr/bin/env bash
if [ "$1 $2" = "show hostnames" ]; then echo localhost; else echo "$*" >> "$LOG"; fi
"""


@pytest.fixture
def slurm(tmp_path):
    """Runs a template -> its result, and what it asked of Slurm."""
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)

    def submit(template, *words, **env):
        env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT),
                            "SLURM_JOB_ID": str(70000 + os.getpid() % 10000), "SLURM_JOB_NODELIST": "any",
                            "PYTHON": sys.executable, "LOG": str(tmp_path / "log"), "RUN": str(tmp_path / "run"), **env}
        shutil.copy(ROOT / "scripts" / "slurm" / template, tmp_path / "spooled")  # as sbatch does
        (tmp_path / "log").unlink(missing_ok=True)
        done = subprocess.run(["bash", str(tmp_path / "spooled"), *words], env=env, cwd="/", text=True, timeout=300,
                              capture_output=True, check=False)
        return done, (tmp_path / "log").read_text().splitlines()

    return submit


def test_a_job_whose_time_is_up_comes_back_and_resumes(slurm, tmp_path):
    words = ("--preset digits --data-path none --val-path none --num-workers 0 --image-size 16 --codebook-size 16 "
             "--global-batch-size 8 --warmup-steps 2 --transition-steps 2 --log-every 1 --val-size 8 "
             "--device cpu").split()
    done, asked = slurm("tokenizer.sbatch", *words, "--max-steps", "100000", TIME_IS_UP="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert asked[:2] == ["--kill-on-bad-exit=1", "--gpu-bind=none"]
    assert asked[2:] == [f"requeue {70000 + os.getpid() % 10000}"]
    reached = rows(tmp_path / "run")[-1]["step"]
    done, asked = slurm("tokenizer.sbatch", *words, "--max-steps", str(reached + 4))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"at step {reached}" in done.stdout
    assert len(asked) == 2  # it has finished
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == reached + 4


def test_a_job_that_fails_stays_away(slurm, tmp_path):
    done, asked = slurm("gpt.sbatch", "--device", "cpu", CODES=str(tmp_path / "none"), TOKENIZER=str(tmp_path))
    assert done.returncode != 0
    assert "is no folder of codes" in done.stderr
    assert len(asked) == 2
