"""What benchmarks share that train a host twice, bare and attached to: the curricula, the loop, images."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tokenizer.data import ImageDataset, split_holdout
from tokenizer.image_sources import open_images
from tokenizer.pixels import from_uint8
from tokenizer.provq_attach import Curriculum, attach
from tokenizer.runtime.over_seeds import merge

BARE, ATTACHED = "bare", "+ ProVQ"


def curricula(args: argparse.Namespace) -> dict[str, Curriculum]:
    """Bare is `attach` with a zero-length curriculum, which equals the quantizer alone bit for bit."""
    third = args.steps // 3
    return {BARE: Curriculum(0, 0), ATTACHED: Curriculum(third, third, loss_floor=args.loss_floor)}


def load_images(args: argparse.Namespace, path: str | None) -> tuple[Tensor, Tensor]:
    """Training and held-out images (n, C, S, S) in [-1, 1], in memory. ValueError: too few of them."""
    source = open_images(path, channels=1 if path is None else 3)
    if len(source) <= args.val_size:
        raise ValueError(f"--val-size {args.val_size} of {len(source)} images leaves none to train on")
    training, held_out = (
        from_uint8(torch.stack([dataset[i]["image"] for i in range(len(dataset))]))
        for half in split_holdout(len(source), args.val_size, seed=0)
        for dataset in [ImageDataset(source, args.image_size, indices=half[: args.max_images])]
    )
    return training, held_out


def train(
    args: argparse.Namespace, model: nn.Module, quantizer: nn.Module, curriculum: Curriculum, seed: int, data: Tensor,
    objective: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Train the model, whose call gives (y, loss of the quantizer [], indices), on objective(y, x) + that loss.

    One batch of `data` a step, drawn by seed alone, so that both curricula see the same.
    """
    provq = attach(quantizer, curriculum)
    codes = list(quantizer.parameters())
    others = [p for p in model.parameters() if all(p is not code for code in codes)]
    optimizer = torch.optim.Adam([{"params": others}, {"params": codes, "lr": args.code_lr or args.lr}], args.lr)
    batches = torch.Generator().manual_seed(seed)
    for step in range(args.steps):
        provq.set_step(step)
        provq.maybe_init_codebook(optimizers=[optimizer], seed=seed)
        x = data[torch.randint(len(data), (args.batch_size,), generator=batches)]
        y, loss, _ = model(x)
        optimizer.zero_grad()
        (objective(y, x) + loss).backward()
        optimizer.step()


def over_seeds(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; without, of one seed."""
    found = merge(values)
    assert found is not None
    spread = "" if found.deviation is None else f" ± {found.deviation:.{digits}f}"
    return f"{found.mean:.{digits}f}{spread}"
