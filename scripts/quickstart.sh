#!/usr/bin/env bash
# From nothing to a trained tokenizer: installs, trains a plain VQ tokenizer and ProVQ on scikit-learn's handwritten
# digits at equal steps, prints both side by side. A few minutes on 2 CPU cores; from any directory; run it again to see
# the table again. PYTHON=/path/to/python uses that interpreter instead of .venv.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
OUT="${OUT:-$ROOT/runs/quickstart}"

train() {
    echo
    echo "== $1"
    "$PYTHON" "$ROOT/tokenizer/train_provq.py" --preset digits --results-dir "$OUT/$1" "${@:2}"
}

train vanilla --warmup-steps 0 --transition-steps 0
train provq
echo
"$PYTHON" "$ROOT/scripts/compare_runs.py" "$OUT/vanilla" "$OUT/provq" --picture "$OUT/comparison.png"
echo "originals above reconstructions at each stage boundary:"
ls "$OUT"/*/images/*.png
