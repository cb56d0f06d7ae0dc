#!/usr/bin/env bash
# Is this machine with its GPUs ready for the real runs? Ten minutes on one GPU, more with several:
#
#     bash scripts/gpu_check.sh                  # all checks, and a table at the end
#     bash scripts/gpu_check.sh --only eager,compiled
#
# Exit status 0: there are GPUs, and all checks pass. What they do: scripts/gpu_check.py.
set -euo pipefail

PROVQ_SETUP_DEV=1 source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
exec "$PYTHON" "$ROOT/scripts/gpu_check.py" "$@"
