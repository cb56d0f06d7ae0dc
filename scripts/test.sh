#!/usr/bin/env bash
# Lint, types and tests, from any directory: bash scripts/test.sh [pytest arguments, paths relative to the repository root]
# Makes .venv on the first call; PYTHON=/path/to/python uses that interpreter instead (see setup_env.sh).
set -euo pipefail

PROVQ_SETUP_DEV=1 source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
cd "$ROOT"

if "$PYTHON" -c 'import ruff, mypy' 2>/dev/null; then
    "$PYTHON" -m ruff check .
    "$PYTHON" -m mypy tokenizer autoregressive protein synthetic evaluations scripts
else
    echo "test.sh: $PYTHON has no ruff or mypy, lint and types are left out (pip install -r requirements-dev.txt)" >&2
fi
parallel=() # a process per core, in the order of tests/conftest.py
if "$PYTHON" -c 'import xdist' 2>/dev/null; then parallel=(-n auto --dist loadfile --no-loadscope-reorder); fi
exec "$PYTHON" -m pytest "${parallel[@]}" "$@"
