#!/usr/bin/env bash
# Writes the paper's ImageNet-100 split (section 5.1.2) as lists of images that every --data-path and --val-path accepts:
#
#     bash scripts/make_imagenet100.sh --imagenet /data/imagenet --classes imagenet100_classes.txt --out data/imagenet100
#
# train.txt, val.txt (the classes' validation images), test.txt (images held out of train, and val.txt). No image is copied.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"
exec "$PYTHON" "$ROOT/scripts/make_imagenet100.py" "$@"
