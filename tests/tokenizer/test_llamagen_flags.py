"""Every flag of LlamaGen's tokenizer trainer is one of ours, or the table says what became of it; no row is idle."""

import re

from entry_flags import flags
from places import ROOT

# vq_train.py, of the commit that tests/golden was made with
THEIRS = set("""data-path cloud-save-path data-face-path no-local-save vq-model vq-ckpt finetune ema codebook-size
codebook-embed-dim codebook-l2-norm codebook-weight entropy-loss-ratio commit-loss-beta reconstruction-weight
reconstruction-loss perceptual-weight disc-weight disc-start disc-type disc-loss gen-loss compile dropout-p results-dir
dataset image-size epochs lr weight-decay beta1 beta2 max-grad-norm global-batch-size global-seed num-workers log-every
ckpt-every gradient-accumulation-steps mixed-precision""".split())


def test_the_table_is_complete():
    text = (ROOT / "tokenizer" / "README.md").read_text(encoding="utf-8")
    section = text.split("\n## LlamaGen's flags\n")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| `")]
    explained = {name for row in rows for name in re.findall("`([^`]+)`", row[1])}
    ours = {flag.removeprefix("--") for flag in flags(ROOT / "tokenizer" / "train_provq.py")}
    assert THEIRS - ours == explained
    named = {name for row in rows for name in re.findall("`--([^`]+)`", row[2])}
    assert named <= ours
