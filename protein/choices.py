"""What flags of several commands may be, and are without being given. No torch, see tokenizer/runtime/command.py."""

MAX_RESIDUES = 4096  # of a batch, padding included; longer chains go alone
EMBEDDINGS = ("quantized", "continuous")
EMBEDDING_FORMATS = (".npz", ".safetensors")
