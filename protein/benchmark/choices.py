"""What flags may be, and are without being given. No torch, see tokenizer/runtime/command.py."""

MODES = ("released", "strict")  # see task_splits.py
LEARNING_RATES = (0.1, 0.01, 1e-3, 1e-4, 5e-5, 1e-5, 5e-6, 1e-6)  # StructTokenBench's sweep
