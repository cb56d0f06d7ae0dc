"""Commands that srun starts several times without telling the processes of one another."""

import pytest

from tokenizer.runtime import distributed


@pytest.mark.parametrize(("step", "said"), [
    ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "8"},
     "srun --nodes=1 --ntasks-per-node=1 torchrun --standalone --nproc-per-node=8 "),
    ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"},
     "srun --nodes=2 --ntasks-per-node=1 torchrun --nnodes=2 --rdzv-backend=c10d "),
    ({"SLURM_STEP_NUM_TASKS": "4"}, "--standalone --nproc-per-node=4 "),
])
def test_srun_without_torchrun_is_refused_with_the_line_to_type(monkeypatch, step, said):
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{step['SLURM_STEP_NUM_TASKS']} times, each of them for itself") as refused:
        distributed.init("cpu")
    assert said in str(refused.value)


@pytest.mark.parametrize("step", [{"SLURM_STEP_NUM_TASKS": "1"}, {"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, {}])
def test_one_process_and_a_job_without_srun_go_on(monkeypatch, step):
    for name, value in step.items():
        monkeypatch.setenv(name, value)
    assert distributed.init("cpu").type == "cpu"
