"""Folders of codes that no tokenizer has made."""

import numpy as np

from autoregressive.code_shards import file_hash, shard_name, write_manifest
from tokenizer.runtime.seeding import fold


def write_codes(folder, images=60, tokens=16, codes=32, classes=4):
    """A folder of codes, as extract_codes.py writes it, with something to learn."""
    folder.mkdir()
    name = shard_name(0, 1)
    array = np.array([[[fold(i % classes, t) % codes for t in range(tokens)]] for i in range(images)], dtype=np.uint8)
    np.save(folder / name, array)
    write_manifest(folder, {"views": 1, "num_tokens": tokens, "codebook_size": codes, "num_classes": classes,
                            "tokenizer_hash": ""},
                   [{"file": name, "images": images, "sha256": file_hash(folder / name)}],
                   [i % classes for i in range(images)], [f"{i}.png" for i in range(images)])
