"""Trains an image tokenizer on the ProVQ curriculum (paper, sections 4 and 5.1.2). No flags: handwritten digits on CPU.

    torchrun --nproc_per_node=1 tokenizer/train_provq.py                                         # minutes, any machine
    torchrun --nproc_per_node=8 tokenizer/train_provq.py --data-path /data/imagenet/train --val-path /data/imagenet/val

--results-dir is the run's folder: the same command again resumes the run, at the very step.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import save_image

from tokenizer import losses
from tokenizer.data import BadImageCounter, ImageDataset, default_augment, make_loader, spread
from tokenizer.discriminator import NLayerDiscriminator
from tokenizer.perceptual import LPIPS
from tokenizer.provq import AdaptiveWarmup, Curriculum, code_statistics
from tokenizer.runtime import config, distributed
from tokenizer.runtime.ema import EMA
from tokenizer.runtime.training import Stateful, TrainingRun, accumulating, launch
from tokenizer.snapshots import count_codes, save_snapshot
from tokenizer.train_config import (
    RESUMABLE,
    TrainConfig,
    check,
    kmeans_batches,
    open_split,
    parse_config,
    uses_kmeans,
)
from tokenizer.validation import DriftMeter, channels_last, validate
from tokenizer.vq_model import VQModel, VQModelConfig

LOGGED = {"reconstruction": "recon_loss", "perceptual": "perceptual_loss", "adversarial": "gen_loss",
          "adaptive_weight": "disc_adaptive_weight"}  # losses.generator_loss's terms as metrics.jsonl names them


def build_model(cfg: TrainConfig) -> VQModel:
    """The tokenizer with its curriculum; weights are a function of --global-seed alone. ValueError: see its parts."""
    adaptive = None
    if cfg.adaptive_warmup_patience:
        adaptive = AdaptiveWarmup(cfg.adaptive_warmup_patience, cfg.adaptive_warmup_min_steps)
    curriculum = Curriculum(cfg.warmup_steps, cfg.transition_steps, cfg.transition, cfg.loss_lambda)
    torch.manual_seed(cfg.global_seed)
    return VQModel(VQModelConfig.from_dict(config.to_dict(cfg)), curriculum, adaptive=adaptive)


def _open_lpips(cfg: TrainConfig) -> LPIPS:
    try:
        return LPIPS(cfg.lpips_vgg_weights)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}, or train without this loss: --perceptual-weight 0") from error


# ------------------------------------------------------------------------------------------------------- training

class Trainer(TrainingRun):
    """Everything that one run holds. Built from a checked configuration; `run` trains it to the end."""

    def __init__(self, cfg: TrainConfig, device: torch.device):
        torch.backends.cudnn.benchmark = True  # training batches have one shape
        self.lpips = _open_lpips(cfg).to(device) if cfg.perceptual_weight else None  # fails first
        fingerprints = self._open_data(cfg)
        if cfg.max_steps is None:
            cfg = replace(cfg, max_steps=math.ceil(cfg.epochs * len(self.train_set) / cfg.global_batch_size))
        super().__init__(cfg, device, resumable=RESUMABLE, inputs=fingerprints)
        self.raw = build_model(cfg).to(device)
        self.quantize = self.raw.quantize
        self.disc = NLayerDiscriminator(cfg.image_channels).to(device) if cfg.disc_weight else None
        self.opt_g = torch.optim.Adam(self.raw.parameters(), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))
        self.opt_d = self.disc and torch.optim.Adam(self.disc.parameters(), lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.mixed_precision == "fp16")
        self.ema = EMA(self.raw, cfg.ema_decay) if cfg.ema else None
        self.drift, self.best = DriftMeter(), -math.inf
        self.resume()
        # Only training is worth the compile time; everything else goes through self.raw, under its own names.
        core = torch.compile(self.raw) if cfg.compile else self.raw
        # The tokenizer's buffers are equal on all ranks by construction, the discriminator's never used: no broadcast.
        wrap = {"device_ids": [device.index] if device.type == "cuda" else None, "broadcast_buffers": False}
        parallel = distributed.world_size() > 1
        self.model: nn.Module = DistributedDataParallel(core, **wrap) if parallel else core
        if self.disc is not None and parallel:
            if device.type == "cuda":
                self.disc = nn.SyncBatchNorm.convert_sync_batchnorm(self.disc)
            self.disc_ddp: nn.Module = DistributedDataParallel(self.disc, **wrap)
        else:
            self.disc_ddp = self.disc

    def _open_data(self, cfg: TrainConfig) -> dict[str, str]:
        split = open_split(cfg)
        source, val_source = split.source, split.val_source
        augment = default_augment(source, cfg.image_size) if cfg.augment == "auto" else cfg.augment
        self.train_set = ImageDataset(source, cfg.image_size, augment=augment, seed=cfg.global_seed,
                                      indices=split.train_indices)
        self.val_set = ImageDataset(val_source, cfg.image_size, indices=split.val_indices)
        self.bad = BadImageCounter(cfg.max_bad_images)
        return {"data_fingerprint": source.fingerprint(), "val_fingerprint": val_source.fingerprint()}

    # -------------------------------------------------------------------------------------------------- state

    def stateful(self) -> dict[str, Stateful | None]:
        return {"model": self.raw, "ema": self.ema, "optimizer": self.opt_g, "discriminator": self.disc,
                "optimizer_disc": self.opt_d, "scaler": self.scaler, "drift": self.drift}

    def values(self) -> dict[str, Any]:
        return {"best": self.best, "unreadable": sorted(self._all_bad_names())}

    def load_values(self, state: Mapping[str, Any]) -> None:
        self.best = state["best"]
        self.bad.names.update(state["unreadable"])

    def _all_bad_names(self) -> set[str]:
        return set().union(*distributed.gather_objects(self.bad.names))

    # --------------------------------------------------------------------------------------------------- data

    def batches(self, start: int, end: int) -> Iterator[dict[str, Any]]:
        sampler = self.sampler(len(self.train_set), start, end)
        pin = self.device.type == "cuda"
        for batch in make_loader(self.train_set, sampler, num_workers=self.cfg.num_workers, pin_memory=pin):
            self._count_bad(batch)
            yield batch

    def _val_batches(self) -> Iterator[dict[str, Any]]:
        mine = list(range(distributed.rank(), len(self.val_set), distributed.world_size()))
        size = self.micro_batch()
        batches = [mine[i : i + size] for i in range(0, len(mine), size)]
        for batch in make_loader(self.val_set, batches, num_workers=self.cfg.num_workers):
            self._count_bad(batch)
            yield batch

    def _count_bad(self, batch: dict[str, Any]) -> None:
        new = set(batch["bad"]) - self.bad.names
        for name in sorted(new):
            print(f"skipped an image that cannot be read: {name}", file=sys.stderr)  # noqa: T201
        if new:
            self.bad.add(new)

    # --------------------------------------------------------------------------------------------------- steps

    def train_step(self, batches: Iterator[dict[str, Any]], step: int) -> dict[str, Tensor]:
        """Step the tokenizer, then the discriminator -> unweighted terms, means over the micro-batches; code_counts."""
        cfg, parts = self.cfg, self.cfg.gradient_accumulation_steps
        adversarial = self.disc is not None and losses.disc_active(step, cfg.disc_start)
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        pairs = []
        for part in range(parts):
            x = next(batches)["image"].to(self.device, non_blocking=True)
            with accumulating(self.model, part < parts - 1):
                with self.autocast():
                    x_hat, out = self.model(x)
                    generator = losses.generator_loss(
                        x, x_hat, reconstruction=cfg.reconstruction_loss,
                        reconstruction_weight=cfg.reconstruction_weight, perceptual=self.lpips,
                        perceptual_weight=cfg.perceptual_weight, discriminator=self.disc if adversarial else None,
                        adversarial=cfg.disc_loss, disc_weight=cfg.disc_weight,
                        adaptive_layer=self.raw.last_layer if cfg.disc_adaptive_weight else None,
                    )
                loss = generator.total + out.loss
                self.scaler.scale(loss / parts).backward()
            if adversarial:
                pairs.append((x, x_hat.detach()))
            terms = {LOGGED[k]: v for k, v in generator.terms.items()} | {"loss": loss.detach()}
            terms |= {f"{k}_loss": out.losses.get(k, loss.new_zeros(())) for k in ("codebook", "commit")}
            for name, value in terms.items():
                totals[name] = totals[name] + value / parts
        totals["grad_norm"] = self.update(self.opt_g, self.raw, self.scaler)
        if adversarial:
            # On the reconstructions from before the update, as LlamaGen does.
            for part, (x, x_hat) in enumerate(pairs):
                with accumulating(self.disc_ddp, part < parts - 1):
                    with self.autocast():
                        d = losses.discriminator_loss(self.disc_ddp, x, x_hat, kind=cfg.disc_loss,
                                                      weight=cfg.disc_weight)
                    self.scaler.scale(d.total / parts).backward()
                totals["disc_loss"] = totals["disc_loss"] + d.terms["discriminator"] / parts
            self.update(self.opt_d, self.disc, self.scaler)
        if self.scaler.is_enabled():
            totals["loss_scale"] = torch.tensor(self.scaler.get_scale(), device=self.device)
            self.scaler.update()
        return totals | {"code_counts": self.quantize.pop_counts()}

    def maybe_init_codebook(self, step: int) -> None:
        """Once, when stage 1 is over: cluster the latents of the batches that come next (section 4.1)."""
        cfg, quantize = self.cfg, self.quantize
        wanted = uses_kmeans(cfg)
        from_start = wanted and step == 0 and quantize.stage > 1  # k-means without a warm-up
        if not (quantize.needs_init or from_start):
            return
        latents, order = self._collect_latents(step) if wanted else (None, None)
        info = quantize.init_codebook(latents, iters=cfg.kmeans_iters, start=cfg.kmeans_start, seed=cfg.global_seed,
                                      order=order, optimizers=[self.opt_g])
        if self.ema:
            self.ema.copy_(self.raw, "quantize.")  # an average with codes from before k-means would mean nothing
        distributed.print0(f"codebook initialised at step {step}: {info or 'kept as it was'}")
        self._save_boundary(step, "codebook_initialised", quantize.stage)

    @torch.no_grad()
    def _collect_latents(self, step: int) -> tuple[Tensor, Tensor]:
        """Latents (N_rank, D) of the next batches and the place of each among all ranks' (see provq.kmeans)."""
        cfg = self.cfg
        self.raw.eval()
        latents, order = [], []
        per_rank = self.micro_batch()
        for i, batch in enumerate(self.batches(step, step + kmeans_batches(cfg))):
            with self.autocast():
                z = self.raw.encode_latents(batch["image"].to(self.device))
            tokens = channels_last(z).float()
            latents.append(tokens)
            # Micro-batch m of rank r holds rows [(m W + r) b, +b) of its global batch (StepSampler).
            row = (i * distributed.world_size() + distributed.rank()) * per_rank
            order.append(torch.arange(len(tokens), device=self.device) + row * (len(tokens) // per_rank))
        self.raw.train()
        return torch.cat(latents), torch.cat(order)

    # ------------------------------------------------------------------------------------------------ outputs

    def _evaluated(self) -> VQModel:
        return self.ema.module if self.ema else self.raw

    def validate(self, step: int) -> dict[str, float]:
        """Collective. Appends to validation.jsonl, reports to the adaptive warm-up, keeps the best discrete model."""
        model = self._evaluated()
        result = validate(model, self._val_batches(), self.device, self.lpips)
        result |= self.drift.update(code=self.quantize.codebook, latent=self._probe(model))
        self.validations.write({"step": step, "stage": self.quantize.stage} | result)
        numbers = " ".join(f"{k} {result[k]:.4g}" for k in ("psnr", "ssim", "usage", "perplexity"))
        distributed.print0(f"validation at step {step}: {numbers}")
        if self.quantize.adaptive and self.quantize.stage == 1 and self.quantize.observe(result["mse"]):
            patience = self.cfg.adaptive_warmup_patience
            distributed.print0(f"warm-up ends at step {step}: no lower error in {patience} validations")
        # A continuous autoencoder always reconstructs better: only models with codes compete.
        if self.quantize.has_codebook and result["psnr"] > self.best:
            self.best = result["psnr"]
            self.checkpoints.save_named("best", {  # to use, not to resume
                "step": step,
                "model": self.raw.state_dict(),
                "ema": self.ema and self.ema.state_dict(),
                "validation": result,
                "config": self.identity(),
            })
        return result

    @torch.no_grad()
    def _probe(self, model: VQModel) -> Tensor:
        """Latents (N, D) of 64 fixed validation images, whose drift is watched."""
        was_training = model.training
        model.eval()
        images = (self.val_set[i]["image"] for i in spread(len(self.val_set), 64))
        parts = iter(lambda: list(itertools.islice(images, self.micro_batch())), [])
        latents = [channels_last(model.encode_latents(torch.stack(part).to(self.device))) for part in parts]
        model.train(was_training)
        return torch.cat(latents)

    def _save_boundary(self, step: int, name: str, stage: int) -> None:
        """Collective. RUN/images/STEP_name.png and RUN/latents/STEP_name.npz."""
        self._save_grid(step, name)
        model = self._evaluated()
        counts = count_codes(model, self._val_batches(), self.device) if model.quantize.has_codebook else None
        if distributed.is_main():
            path = self.run_dir / "latents" / f"{step:07d}_{name}.npz"
            save_snapshot(path, model, self._probe(model), counts, step=step, stage=stage)

    @torch.no_grad()
    def _save_grid(self, step: int, name: str) -> None:
        """RUN/images/STEP_name.png: validation images above their reconstructions. Rank 0."""
        if not distributed.is_main():
            return
        model = self._evaluated()
        was_training = model.training
        model.eval()
        x = torch.stack([self.val_set[i]["image"] for i in spread(len(self.val_set), 8)]).to(self.device)
        x_hat = model(x)[0]
        model.train(was_training)
        folder = self.run_dir / "images"
        folder.mkdir(parents=True, exist_ok=True)
        save_image((torch.cat([x, x_hat.float()]) + 1) / 2, folder / f"{step:07d}_{name}.png", nrow=len(x))

    # --------------------------------------------------------------------------------------------------- hooks

    def run(self) -> None:
        cfg = self.cfg
        last = self.quantize.curriculum.stage(cfg.max_steps - 1)
        if last < 3:
            distributed.print0(f"note: these {cfg.max_steps} steps end in stage {last}; stage 3 would begin at step "
                               f"{cfg.warmup_steps + cfg.transition_steps} (--warmup-steps + --transition-steps)")
        self.raw.train()
        super().run()

    def before_step(self, step: int) -> None:
        self.quantize.set_step(step)
        self.maybe_init_codebook(step)
        self.stage = self.quantize.stage

    def labels(self) -> dict[str, Any]:
        return {"stage": self.stage, "alpha": self.quantize.alpha, "omega": self.quantize.omega}

    def after_step(self, done: int) -> None:
        self.quantize.set_step(done)
        if self.ema:
            self.ema.update(self.raw, done)  # after set_step, which updates the codes of an ema quantizer

    def before_flush(self) -> None:
        self.bad.add(self._all_bad_names())  # all ranks stop together

    def derive(self, row: dict[str, Any]) -> dict[str, float]:
        """usage and perplexity of the codes looked up since the last row, by all ranks; 0 in stage 1: none are."""
        return code_statistics(row["code_counts"])

    def after_validation(self, done: int) -> None:
        if self.quantize.stage != self.stage:
            self._save_boundary(done, f"stage{self.stage}_end", self.stage)
        if done == self.cfg.max_steps:
            self._save_boundary(done, f"stage{self.quantize.stage}_final", self.quantize.stage)

    def summary(self) -> dict[str, Any]:
        return {
            "stage": self.quantize.stage,
            "warmup_steps": self.quantize.curriculum.warmup_steps,  # where an adaptive warm-up ended
            "parameters": sum(p.numel() for p in self.raw.parameters()),
            "training_images": len(self.train_set),
            "unreadable_images": len(self._all_bad_names()),
            "best_psnr": self.best if self.best > -math.inf else None,
        }


def main(argv: list[str] | None = None) -> None:
    def build() -> Trainer:
        cfg = parse_config(argv, __doc__)
        device = distributed.init(cfg.device)
        check(cfg, distributed.world_size())
        return Trainer(cfg, device)

    launch("train_provq.py", build)


if __name__ == "__main__":
    main()
