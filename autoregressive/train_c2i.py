"""Trains a class-conditional GPT on the codes of a tokenizer, with LlamaGen's protocol (paper, section 5.1.2).

    torchrun --nproc_per_node=8 autoregressive/train_c2i.py --code-path imagenet_codes --gpt-model GPT-L --vq-ckpt RUN
    torchrun --nproc_per_node=1 autoregressive/train_c2i.py        # the digits' codes in runs/digits/codes; minutes

--results-dir is the run's folder: the same command again resumes the run, at the very step.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from autoregressive.train_config import RESUMABLE, TrainConfig, check, check_data, parse_config, shards
from tokenizer.runtime.command import refuse_early
from tokenizer.runtime.ranks import started_together

PROG = "autoregressive/train_c2i.py"

if __name__ == "__main__":
    refuse_early(PROG, lambda: parse_config(description=__doc__),
                 lambda cfg: check(cfg, started_together()), check_data)

import numpy as np
import torch
from torch import Tensor, nn

from autoregressive import sharding
from autoregressive.code_shards import CodeDataset, CodeFiles, open_codes
from autoregressive.gpt import GPT, GPTConfig, NextCodeLoss
from autoregressive.pretrained import load_gpt
from autoregressive.sampling import SamplingConfig, generate
from tokenizer.data import collate, make_loader, split_holdout, spread
from tokenizer.image_classes import describe_classes
from tokenizer.init_from import opened, require_alike
from tokenizer.pretrained import load_tokenizer, tokenizer_hash
from tokenizer.runtime import distributed
from tokenizer.runtime.ema import EMA
from tokenizer.runtime.files import atomic_write
from tokenizer.runtime.optim import (
    DTYPES,
    accumulating,
    autocast,
    build_adamw,
    learning_rate,
    replicate,
    set_learning_rate,
    update,
)
from tokenizer.runtime.packing import packed
from tokenizer.runtime.precision import set_tf32
from tokenizer.runtime.run import Run, Stateful, launch
from tokenizer.runtime.run_config import with_max_steps
from tokenizer.runtime.seeding import fold
from tokenizer.runtime.throughput import Throughput
from tokenizer.vq_model import VQModel

FED = ("codes", "label")  # what of a batch goes to the device
SAMPLES = 16  # pictures in a grid of samples
FEW = 8       # codes in use are worth a note below an eighth of them


class Trainer:
    """Everything that one run holds. Built from a checked configuration; `train` trains it to the end."""

    def __init__(self, cfg: TrainConfig, device: torch.device):
        self.cfg = cfg
        set_tf32(convolutions=cfg.tf32, matmul=cfg.tf32)
        codes = self._open_codes(cfg)
        cfg = with_max_steps(cfg, len(self.train_set))
        self.cfg, self.device = cfg, device
        self.tokenizer = self._open_tokenizer(codes)
        self.sample_cfg_scale = cfg.sample_cfg_scale
        if self.tokenizer is not None and cfg.class_dropout_prob == 0 and cfg.sample_cfg_scale > 1:
            self._say("note: --class-dropout-prob 0 trains no \"none\" for guidance to compare with: pictures are "
                      "drawn as with --sample-cfg-scale 1")
            self.sample_cfg_scale = 1.0
        self.gpt_config = GPTConfig.preset(
            cfg.gpt_model, vocab_size=codes.codebook_size, block_size=codes.num_tokens, num_classes=codes.num_classes,
            class_dropout_prob=cfg.class_dropout_prob, token_dropout_p=cfg.token_dropout_p,
            resid_dropout_p=cfg.dropout_p, ffn_dropout_p=cfg.dropout_p, drop_path_rate=cfg.drop_path_rate,
        )
        inputs = {"code_fingerprint": codes.fingerprint, "tokenizer_hash": codes.tokenizer_hash}
        describe = {"gpt": asdict(self.gpt_config), "trained_classes": self.trained_classes}
        self.run = Run(cfg, device, resumable=RESUMABLE, inputs=inputs, describe=describe)
        self.sharded = shards(cfg, distributed.world_size())
        self.raw = self._build()
        average = self._build() if cfg.ema and self.sharded else None
        self.ema = EMA(self.raw, cfg.ema_decay, average=average) if cfg.ema else None
        self.optimizer = build_adamw(self.raw, cfg)
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.mixed_precision == "fp16")
        self.run.resume(self._parts())
        if cfg.init_from and not self.run.start:
            self._begin_from(cfg.init_from, codes)
        self.run.throughput = Throughput(cfg, device, self.gpt_config.block_size, self._forward_once)
        loss = NextCodeLoss(self.raw)
        core: nn.Module = torch.compile(loss) if cfg.compile else loss  # type: ignore[assignment]
        self.model = core if self.sharded else replicate(core, device)

    # ---------------------------------------------------------------------------------------------------- parts

    def _open_codes(self, cfg: TrainConfig) -> CodeDataset:
        """Open --code-path and split it -> the codes, of which the model takes its sizes."""
        assert cfg.code_path  # check() saw to it
        codes = _open("--code-path", cfg.code_path, cfg.codebook_size)
        if cfg.val_code_path:
            val = _open("--val-code-path", cfg.val_code_path, cfg.codebook_size)
            val.require_like(codes)
            train: Any = range(len(codes))
            held_out: Any = spread(len(val), cfg.val_size or len(val))
        else:
            val = codes
            train, held_out = split_holdout(len(codes), min(cfg.val_size, len(codes) // 10), cfg.global_seed)
        if not len(held_out):
            raise ValueError("no image is held out for validation: give --val-code-path, or --val-size above 0")
        self.train_set = codes.subset(train, seed=cfg.global_seed)
        # A class whose images are all held out, or that the codes never had, is not to be sampled.
        self.trained_classes = np.unique(codes.labels[self.train_set.indices]).tolist()
        names = [str(c) for c in range(codes.num_classes)]
        self._say(f"training images: {describe_classes(codes.labels[self.train_set.indices], names)}")
        self.val_set = val.subset(held_out, seed=None)
        if not list(Path(cfg.results_dir or ".").glob("checkpoints/*.pt")):  # once in a run: it may be many gigabytes
            _require_intact("--code-path", codes.files)
            if val is not codes:
                _require_intact("--val-code-path", val.files)
        used, tokens = self.train_set.used_codes()
        if used * FEW <= codes.codebook_size <= tokens:
            self._say(f"note: {codes.path}: {used:,} of {codes.codebook_size:,} codes occur in {tokens:,} tokens: the "
                      "tokenizer has collapsed, or --codebook-size is not its own")
        return codes

    def _say(self, line: str) -> None:
        """With --dry-run, which prints JSON, beside it."""
        if distributed.is_main():
            print(line, file=sys.stderr if self.cfg.dry_run else sys.stdout, flush=True)

    def _open_tokenizer(self, codes: CodeDataset) -> VQModel | None:
        """The decoder of pictures. ValueError: it is not the one that the codes were made with."""
        path = self.cfg.vq_ckpt
        if not path:
            return None
        model = load_tokenizer(path, self.device, self.cfg.vq_weights, codebook_l2_norm=self.cfg.codebook_l2_norm)
        if model.quantize.num_codes != codes.codebook_size:
            raise ValueError(f"--vq-ckpt {path} has {model.quantize.num_codes} codes, --code-path {codes.path} has "
                             f"{codes.codebook_size}")
        if codes.tokenizer_hash == "":
            self._say(f"note: {codes.path} does not say which tokenizer made it; --vq-ckpt is taken on trust")
        elif tokenizer_hash(model) != codes.tokenizer_hash and not self.cfg.other_tokenizer:
            raise ValueError(f"--vq-ckpt {path} is not the tokenizer that made the codes in {codes.path} (another "
                             "training step, or other weights of it, count as another): extract the codes again, name "
                             "the right one, or pass --other-tokenizer")
        return model

    def _build(self) -> GPT:
        torch.manual_seed(fold(self.cfg.global_seed))  # equal weights on all ranks
        model = GPT(self.gpt_config).to(self.device)
        model.activation_checkpointing = self.cfg.activation_checkpointing
        if self.sharded:
            sharding.shard(model, model.layers, self.device, DTYPES[self.cfg.mixed_precision])
        return model

    def _begin_from(self, path: str, codes: CodeDataset) -> None:
        """Take the weights of a trained GPT. ValueError: they do not fit, or its codes meant something else."""
        loaded = opened(path, lambda path: load_gpt(path, num_codes=self.gpt_config.block_size))
        free = [field.name for field in fields(GPTConfig) if field.name.endswith(("_p", "_prob", "_rate", "_range"))]
        require_alike(asdict(loaded.model.config), asdict(self.gpt_config), free, path, "name codes and the "
                      "--gpt-model as it was trained with, or other weights", called=str)
        if loaded.tokenizer_hash and loaded.tokenizer_hash != codes.tokenizer_hash and not self.cfg.other_tokenizer:
            raise ValueError(f"--init-from {path} was trained on codes of another tokenizer than {codes.path}: equal "
                             "numbers mean other patches; pass --other-tokenizer to begin with it all the same")
        parts = self._parts()
        for part in (parts["model"], parts["ema"]):
            if part is not None:
                part.load_state_dict(loaded.model.state_dict())
        self._say(f"--init-from {path}: its weights")

    def _forward_once(self) -> None:
        """What one image costs in FLOP; on parameters that nobody has, since those of this model may be shards."""
        with torch.device("meta"):
            model = GPT(self.gpt_config).eval()
            size = self.gpt_config.block_size
            model(torch.zeros(1, size - 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))

    def _parts(self) -> dict[str, Stateful | None]:
        """What checkpoints hold."""
        if not self.sharded:
            return {"model": self.raw, "ema": self.ema, "scaler": self.scaler,
                    "optimizer": sharding.ReplicatedOptimizer(self.raw, self.optimizer)}
        return {"model": sharding.ShardedModel(self.raw),
                "ema": self.ema and sharding.ShardedModel(self.ema.module),
                "optimizer": sharding.ShardedOptimizer(self.raw, self.optimizer), "scaler": self.scaler}

    # ------------------------------------------------------------------------------------------------- the method

    def train(self) -> None:
        """Next-code prediction, one optimizer step after another."""
        cfg, run = self.cfg, self.run
        self.raw.train()
        batches = self.batches(run.start, run.end)
        for step in run.steps():                # seeds what the step draws; after it a checkpoint, where one is due
            lr = learning_rate(cfg, step)
            set_learning_rate(self.optimizer, lr)
            terms = self.train_step(batches, step)
            if self.ema:
                self.ema.update(self.raw, step + 1)
            run.log(terms, {"lr": lr})
            with run.untimed():
                if run.due(cfg.val_every):
                    self.validate()
                if self.tokenizer is not None and cfg.sample_every and run.due(cfg.sample_every):
                    self.save_samples(self.tokenizer)
        run.finish(self.summary())

    def batches(self, start: int, end: int) -> Iterator[dict[str, Tensor]]:
        sampler = self.run.sampler(len(self.train_set), start, end)
        yield from self._loader(self.train_set, sampler)

    def _loader(self, dataset: CodeDataset, batches: Iterable[Any]) -> Iterator[dict[str, Tensor]]:
        pin = self.device.type == "cuda"
        for batch in make_loader(dataset, batches, num_workers=self.cfg.num_workers, pin_memory=pin,
                                 collate=partial(packed, collate=collate, names=FED)):
            yield batch.to(self.device)

    def _losses(self, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Cross-entropy (B,) in nats per code and the share of codes predicted right (B,), float32."""
        with self.autocast():
            return model(batch["codes"], batch["label"])

    def autocast(self) -> torch.autocast:
        """Sharded models cast their parameters themselves."""
        return autocast(self.device, "none" if self.sharded else self.cfg.mixed_precision)

    def train_step(self, batches: Iterator[dict[str, Tensor]], step: int) -> dict[str, Tensor]:  # noqa: ARG002
        """-> loss (nats per code) and accuracy, means over the micro-batches; grad_norm."""
        parts = self.cfg.gradient_accumulation_steps
        total = torch.zeros(2, device=self.device)
        for part in range(parts):
            batch = next(batches)
            with accumulating(self.model if not self.sharded else self.raw, part + 1 < parts):
                losses, right = self._losses(self.model, batch)
                self.scaler.scale(losses.mean() / parts).backward()
            total += torch.stack([losses.detach().mean(), right.mean()]) / parts
        norm = update(self.optimizer, self.raw, self.scaler, self.cfg.max_grad_norm)
        self.scaler.update()
        return {"loss": total[0], "accuracy": total[1], "grad_norm": norm}

    @torch.no_grad()
    def validate(self) -> None:
        """Collective. Loss and accuracy on the held-out images, with their classes; keeps the best."""
        model = NextCodeLoss(self.ema.module if self.ema else self.raw).eval()
        rank, world, size = distributed.rank(), distributed.world_size(), self.run.micro_batch()
        places = range(len(self.val_set))
        rounds = math.ceil(len(places) / (size * world))  # equal on all ranks: a sharded forward is collective
        batches = [[places[(i * world + rank) * size + j] if (i * world + rank) * size + j < len(places) else 0
                    for j in range(size)] for i in range(rounds)]
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        for i, batch in enumerate(self._loader(self.val_set, batches)):
            counted = min(max(len(places) - (i * world + rank) * size, 0), size)  # the rest fills up
            losses, right = (part[:counted].double().sum() for part in self._losses(model, batch))
            sums += torch.stack([losses, right, torch.full_like(losses, counted)])
        distributed.all_reduce_(sums)
        self.raw.train()
        loss, accuracy = (sums[:2] / sums[2]).tolist()
        perplexity = math.exp(loss) if loss < 709 else math.inf  # beyond, exp raises; infinity ends the run as diverged
        self.run.record({"val_loss": loss, "val_perplexity": perplexity, "val_accuracy": accuracy})
        self.run.keep_best(loss, higher_is_better=False)

    # -------------------------------------------------------------------------------------------------- outputs

    def save_samples(self, tokenizer: VQModel) -> None:
        """Collective. RUN/samples/STEP.png: classes spread over all, the same random numbers every time."""
        averaged = self.ema.module if self.ema else self.raw
        model: Any = averaged
        if self.sharded:
            state = sharding.full_state(averaged)
            if distributed.is_main():
                model = GPT(self.gpt_config).to(self.device)
                model.load_state_dict(state)
        if not distributed.is_main():
            return
        model.eval()
        classes = self.trained_classes
        spaced = spread(len(classes), SAMPLES)
        labels = [classes[spaced[i % len(spaced)]] for i in range(SAMPLES)]
        seeds = [fold(self.cfg.global_seed, i) for i in range(SAMPLES)]
        codes = generate(model, torch.tensor(labels), seeds=seeds,
                         config=SamplingConfig(cfg_scale=self.sample_cfg_scale))
        side = math.isqrt(self.gpt_config.block_size)
        with torch.no_grad():
            images = tokenizer.decode_code(codes.view(-1, side, side).clone())
        self.raw.train()
        from torchvision.utils import save_image  # here because torchvision takes a second to import

        folder = self.run.folder / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        pictures = (images.float() + 1) / 2
        atomic_write(folder / f"{self.run.done:07d}.png", lambda file: save_image(pictures, file, format="png", nrow=8))

    def summary(self) -> dict[str, Any]:
        return {"parameters": self.gpt_config.num_parameters, "training_images": len(self.train_set),
                "views": self.train_set.views, "best_val_loss": self.run.best}


def _open(flag: str, path: str, codebook_size: int) -> CodeDataset:
    try:
        return open_codes(path, codebook_size)
    except (ValueError, OSError) as error:
        raise ValueError(f"{flag}: {error}") from error


def _require_intact(flag: str, folders: list[CodeFiles]) -> None:
    """Collective; ranks share the shards. ValueError: shards that are damaged."""
    rank, world = distributed.rank(), distributed.world_size()
    mine = [line for files in folders for line in files.damage(lambda number: number % world == rank)]
    found = [line for part in distributed.gather_objects(mine) for line in part]
    if found:
        raise ValueError(f"{flag}: {'; '.join(found)}. The command that made them makes damaged shards again "
                         "(autoregressive/extract_codes.py)")


def main(argv: list[str] | None = None) -> None:
    def build(cfg: TrainConfig) -> Trainer:
        device = distributed.init(cfg.device)
        check(cfg, distributed.world_size())
        return Trainer(cfg, device)

    launch(PROG, lambda: parse_config(argv, __doc__), build)


if __name__ == "__main__":
    main()
