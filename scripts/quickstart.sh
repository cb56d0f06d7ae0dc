#!/usr/bin/env bash
# From nothing to sampled digits: installs; shows the disease and the cure on waves; trains a plain VQ tokenizer and ProVQ
# on scikit-learn's handwritten digits at equal steps and prints both side by side; then encodes the digits, trains a
# small GPT on the codes, samples every class and scores the samples. Minutes on 2 CPU cores; from any directory; run it
# again to see the tables again.
# PYTHON=/path/to/python uses that interpreter instead of .venv.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
OUT="${OUT:-$ROOT/runs/quickstart}"

say() {
    echo
    echo "== $1"
}

train() {
    say "tokenizer: $1"
    "$PYTHON" "$ROOT/tokenizer/train_provq.py" --preset digits --results-dir "$OUT/$1" "${@:2}"
}

say "the disease and the cure: waves through 64 codes"
OMP_NUM_THREADS=1 "$PYTHON" "$ROOT/synthetic/demo.py" --out "$OUT/demo.png"

# For both codes that learn ten times as fast as the rest, the best of what was tried, and an average of the weights; for
# ProVQ a second k-means when the transition ends. None of this is the paper's; see RESULTS.md, Digits.
both=(--codebook-lr-scale 10 --ema --ema-decay 0.98)
train vanilla "${both[@]}" --warmup-steps 0 --transition-steps 0
train provq "${both[@]}" --recluster

say "codes of the digits, and a GPT that learns them"
"$PYTHON" "$ROOT/autoregressive/extract_codes.py" --vq-ckpt "$OUT/provq"
"$PYTHON" "$ROOT/autoregressive/train_c2i.py" --preset digits --code-path "$OUT/provq/codes" --vq-ckpt "$OUT/provq" \
    --results-dir "$OUT/gpt"

say "samples of every class"
"$PYTHON" "$ROOT/autoregressive/sample_c2i.py" --gpt-ckpt "$OUT/gpt" --num-samples 500 --batch-size 100 --cfg-scale 1.5 \
    --temperature 0.7 --out "$OUT/samples"

say "evaluation, with features of a small classifier of digits instead of Inception's"
[ -f "$OUT/digits.pt" ] || "$PYTHON" "$ROOT/evaluations/train_extractor.py" --out "$OUT/digits.pt" --max-steps 100
for run in vanilla provq; do
    "$PYTHON" "$ROOT/evaluations/reconstruction.py" --vq-ckpt "$OUT/$run" --features "torchscript:$OUT/digits.pt"
done
"$PYTHON" "$ROOT/evaluations/generation.py" digits "$OUT/samples/samples.npz" --image-size 32 --out "$OUT/generation.json" \
    --features "torchscript:$OUT/digits.pt"
"$PYTHON" "$ROOT/evaluations/report.py" "$OUT/vanilla" "$OUT/provq" --out "$OUT/report.html"

say "results"
"$PYTHON" "$ROOT/scripts/compare_runs.py" "$OUT/vanilla" "$OUT/provq" --picture "$OUT/comparison.png"
echo
echo "provq is the preset with a second k-means (--recluster), as in README.md's column of that name"
echo "waves, with and without ProVQ: $OUT/demo.png"
echo "reconstructions at each stage boundary: $OUT/provq/images/"
echo "the tables, curves and latents on one page: $OUT/report.html"
echo "sampled digits, a row per class: $OUT/samples/grid.png"
