"""A tokenizer's run of a few steps on scikit-learn's digits, for tests of what reads runs, and their pictures."""

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from tokenizer import train_provq


def train_on_digits(run_dir, *flags):
    """Six steps through all three stages at 16 x 16 pixels, which is 4 x 4 of 64 codes. flags: more, or others."""
    words = ("--image-size 16 --codebook-size 64 --global-batch-size 16 --max-steps 6 --warmup-steps 2 "
             "--transition-steps 2 --val-size 16 --kmeans-batches 4 --device cpu").split()
    train_provq.main([*words, "--results-dir", str(run_dir), *flags])


def write_digits(folder, count, size):
    """The first digits as 000.png, 001.png and so on, resized to (width, height)."""
    folder.mkdir()
    for i, image in enumerate(load_digits().images[:count]):
        Image.fromarray((image * 15).astype(np.uint8)).resize(size).save(folder / f"{i:03d}.png")
