"""Program of tests/test_first_steps.py: a few steps of each trainer in its precisions and parallel modes, eager and
compiled, on two gloo processes: `torchrun ... first_steps.py FOLDER`.

One program, because starting Python takes longer than these steps. Compiled graphs run without inductor, whose C++
takes minutes: what breaks is found while tracing.
"""

import sys
from functools import partial
from pathlib import Path

import torch

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])
sys.path.append(str(Path(__file__).resolve().parents[1]))

from image_models import TINY_VQ4

from autoregressive import train_c2i
from protein import train_provq as train_structures
from tokenizer import train_provq as train_images
from tokenizer import vq_model
from tokenizer.runtime import distributed

IMAGES = ("--image-size 32 --codebook-size 16 --global-batch-size 4 --max-steps 3 --warmup-steps 1 "
          "--transition-steps 1 --val-size 4 --disc-weight 0.5 --disc-start 0 --lr 1e-5")
KMEANS = "--kmeans-batches 1 --kmeans-iters 2"
GPT = ("--preset digits --vq-ckpt none --max-steps 3 --global-batch-size 4 --val-size 4 --dropout-p 0 "
       "--token-dropout-p 0 --class-dropout-prob 0 --lr-warmup-steps 0 --lr-schedule constant")
STRUCTURES = ("--ideal-chains 40 --max-length 24 --codebook-size 16 --global-batch-size 4 --max-steps 3 "
              "--warmup-steps 1 --transition-steps 1 --lr-warmup-steps 1 --val-size 4 --kmeans-batches 2")
COMPILE = {"eager": "--no-compile", "compile": "--compile"}


def cases(folder):
    """(name of the case, main, words)"""
    for precision in ("none", "bf16", "fp16"):
        yield f"images-{precision}-ddp-stages", train_images.main, [
            *IMAGES.split(), *KMEANS.split(), "--mixed-precision", precision]
    for how in COMPILE:  # each stage is a graph: test_graphs.py makes all of them
        words = "--mixed-precision bf16 --warmup-steps 0 --transition-steps 0 --max-steps 1".split()
        yield f"images-bf16-ddp-{how}", train_images.main, [*IMAGES.split(), *words, COMPILE[how]]
    for precision, mode, how in (
            ("none", "ddp", "eager"), ("bf16", "ddp", "eager"), ("bf16", "ddp", "compile"), ("fp16", "ddp", "eager"),
            ("none", "fsdp", "eager"), ("bf16", "fsdp", "eager"), ("bf16", "fsdp", "compile")):
        words = [*GPT.split(), "--code-path", str(folder / "codes"), "--mixed-precision", precision,
                 "--data-parallel", mode, COMPILE[how]]
        yield f"gpt-{precision}-{mode}-{how}", train_c2i.main, words
    words = [*GPT.split(), "--code-path", str(folder / "codes"), "--no-compile", "--ema"]
    more = ["--mixed-precision", "bf16", "--data-parallel", "fsdp", "--activation-checkpointing"]
    yield "gpt-bf16-fsdp-checkpointing", train_c2i.main, [*words, *more]
    for first, then in (("ddp", "fsdp"), ("fsdp", "ddp")):  # resumed after two steps, when the optimizer has moments
        for mode, last in ((first, "2"), (then, "3")):
            yield f"gpt-none-{first}-to-{then}", train_c2i.main, [*words, "--data-parallel", mode, "--max-steps", last]
    for precision in ("none", "bf16"):
        words = [*STRUCTURES.split(), "--mixed-precision", precision]
        yield f"structures-{precision}-ddp-stages", train_structures.main, words


def main(folder, only=""):
    distributed.finalize = lambda: None  # the cases share one process group
    torch.compile = partial(torch.compile, backend="aot_eager")
    distributed.init("cpu")
    vq_model.ARCHITECTURES["VQ-4"] = TINY_VQ4  # tracing takes seconds per layer
    for name, train, words in cases(folder):
        if only in name:
            train([*words, "--results-dir", str(folder / name), "--device", "cpu", "--log-every", "1"])
            torch._dynamo.reset()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
