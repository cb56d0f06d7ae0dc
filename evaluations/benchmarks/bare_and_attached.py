"""What commands share that train a host twice, bare and attached to: the curricula, the loop, images, runs."""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from evaluations.benchmarks.host_flags import ATTACHED, BARE
from tokenizer.data import ImageDataset, split_holdout
from tokenizer.image_sources import open_images
from tokenizer.pixels import from_uint8
from tokenizer.provq_attach import Adapter, Curriculum, attach
from tokenizer.runtime.files import atomic_write_json

Data = TypeVar("Data")


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


def no_counts(adapter: Adapter) -> Tensor:
    return torch.zeros(adapter.num_codes, dtype=torch.int64)


def counts_of(adapter: Adapter, indices: Tensor) -> Tensor:
    """How often indices, as the host returned them, have each of the adapter's codes: (num_codes,)."""
    return torch.bincount(adapter.countable(indices).flatten().long(), minlength=adapter.num_codes)


def document(args: argparse.Namespace, prog: str, settings: str) -> dict[str, Any]:
    """--out as it is, or as it starts. settings: names of flags that all its runs have in common.

    ValueError: its runs are of others.
    """
    wanted = {name: getattr(args, name) for name in settings.split()}
    if args.out is None or not args.out.exists():
        return {"command": prog, "torch": torch.__version__, "threads": torch.get_num_threads(),
                "date": datetime.date.today().isoformat(), "settings": wanted, "runs": []}
    found: dict[str, Any] = json.loads(args.out.read_text(encoding="utf-8"))
    if found.get("settings") != wanted:
        raise ValueError(f"--out {args.out} has runs of {found.get('settings')}, these flags say {wanted}: name another"
                         " file")
    return found


def complete(args: argparse.Namespace, document: dict[str, Any], name: str, load: Callable[[], Data],
             run: Callable[[Data, Curriculum, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """The document's runs of --seeds, with those of host `name` that it lacked. --out is written after each."""
    wanted = [(label, seed) for seed in args.seeds for label in (BARE, ATTACHED)]
    there = {(found["curriculum"], found["seed"]) for found in document["runs"] if found["host"] == name}
    missing = [each for each in wanted if each not in there]
    data = load() if missing else None
    for label, seed in missing:
        assert data is not None
        document["runs"].append({"host": name, "curriculum": label, "seed": seed,
                                 **run(data, curricula(args)[label], seed)})
        if args.out:
            atomic_write_json(args.out, document)
    return [found for found in document["runs"] if found["seed"] in args.seeds]
