"""What flags may be, and are without being given. No torch, see tokenizer/runtime/command.py."""

MODES = ("released", "strict")  # see task_splits.py
LEARNING_RATES = (0.1, 0.01, 1e-3, 1e-4, 5e-5, 1e-5, 5e-6, 1e-6)  # StructTokenBench's sweep
PROTOCOLS = {
    "pooled": "one number over all residues (or chains) of the split; chosen by the same number on validation",
    "as coded": "StructTokenBench's code: AUROC and F1 are means over batches of 8 chains (64 for classes), where a "
                "batch of one class scores AUROC 0; chosen by the batches' mean F1 on validation. Spearman's rho is "
                "pooled",
}
