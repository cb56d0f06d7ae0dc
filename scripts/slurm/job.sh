# What the .sbatch files here share. They source it with what a process runs, without --results-dir, which is RUN:
#
#     RUN=runs/imagenet256
#     source scripts/slurm/job.sh tokenizer/train_provq.py --data-path /data/imagenet/train
#
# One process per GPU, started by srun instead of torchrun: Slurm's SIGTERM (--signal) then reaches each process itself.
# It saves a checkpoint and ends with 0, for which it has as long as --signal says. (torchrun kills after 30 seconds.)
# Then, while the run is not finished, the job goes back into the queue, and the same command resumes at the very step.
#   PYTHON=/path/to/python   the interpreter (.venv/bin/python if there is one)
#   MASTER_PORT=29500        where the processes meet on the first node (by default one that depends on the job)
set -euo pipefail

if [ -z "${PYTHON:-}" ]; then
    if [ -x .venv/bin/python ]; then PYTHON="$PWD/.venv/bin/python"; else PYTHON=python; fi
fi
MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_ADDR MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}"

# Of several networks, NCCL and gloo may take the wrong one, such as a management network, or docker0: then processes
# wait for one another in vain. Name the right ones (`ip -brief address`, `ibv_devices`):
#     export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0 NCCL_IB_HCA=mlx5
# NCCL_DEBUG=INFO prints what NCCL has chosen.

# --kill-on-bad-exit: a process that fails must not leave the others waiting. --gpu-bind=none: each process sees all
# GPUs of its node, and takes the one that LOCAL_RANK numbers.
status=0
srun --kill-on-bad-exit=1 --gpu-bind=none bash -c \
    'RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID exec "$@"' process \
    "$PYTHON" "$@" --results-dir "$RUN" || status=$?
if [ "$status" -eq 0 ] && [ ! -e "$RUN/summary.json" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
