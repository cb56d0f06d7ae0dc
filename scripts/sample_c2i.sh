#!/usr/bin/env bash
# Samples images of every class from a trained GPT; all flags are those of autoregressive/sample_c2i.py. Without any:
# from the newest finished run under runs/. NPROC=8 uses so many processes.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
if [ "${NPROC:-1}" -gt 1 ]; then
    exec "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$NPROC" \
        "$ROOT/autoregressive/sample_c2i.py" "$@"
fi
exec "$PYTHON" "$ROOT/autoregressive/sample_c2i.py" "$@"
