"""Trains an image tokenizer on the ProVQ curriculum (paper, sections 4 and 5.1.2). No flags: handwritten digits on CPU.

    torchrun --nproc_per_node=1 tokenizer/train_provq.py                                         # minutes, any machine
    torchrun --nproc_per_node=8 tokenizer/train_provq.py --data-path /data/imagenet/train --val-path /data/imagenet/val

--results-dir is the run's folder: the same command again resumes the run, at the very step.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tokenizer.runtime.command import refuse_early
from tokenizer.runtime.ranks import started_together
from tokenizer.train_config import RESUMABLE, TrainConfig, check, check_data, parse_config, tokens_per_batch

PROG = "tokenizer/train_provq.py"

if __name__ == "__main__":
    refuse_early(PROG, lambda: parse_config(description=__doc__),
                 lambda cfg: check(cfg, started_together()), check_data)

import torch
from torch import Tensor, nn

from tokenizer import losses
from tokenizer.code_meter import PaceMeter, count_
from tokenizer.curriculum import CurriculumTrainer, build_curriculum, choose_code_search, code_usage
from tokenizer.curriculum_config import kmeans_batches, last_step, with_length
from tokenizer.data import (
    BadImageCounter,
    ImageDataset,
    ImageSource,
    default_augment,
    describe_source,
    make_loader,
    spread,
)
from tokenizer.data_split import open_split
from tokenizer.discriminator import NLayerDiscriminator
from tokenizer.image_names import to_line
from tokenizer.init_from import opened
from tokenizer.perceptual import LPIPS
from tokenizer.pixels import from_uint8
from tokenizer.pretrained import EXPORT_FORMAT, load_tokenizer
from tokenizer.quantizers import build_restart
from tokenizer.runtime import config, distributed
from tokenizer.runtime.config import flag_name
from tokenizer.runtime.ema import EMA
from tokenizer.runtime.files import atomic_write
from tokenizer.runtime.optim import accumulating, replicate, scale_learning_rate, update
from tokenizer.runtime.precision import set_tf32
from tokenizer.runtime.run import Run, launch
from tokenizer.runtime.throughput import Throughput
from tokenizer.validation import channels_last, validate
from tokenizer.vq_model import VQModel, VQModelConfig
from tokenizer.weights import read_weights

LOGGED = {"reconstruction": "recon_loss", "perceptual": "perceptual_loss", "adversarial": "gen_loss",
          "adaptive_weight": "disc_adaptive_weight"}  # losses.generator_loss's terms as metrics.jsonl names them


def build_model(cfg: TrainConfig) -> VQModel:
    """The tokenizer with its curriculum; weights are a function of --global-seed alone. ValueError: see its parts."""
    curriculum, adaptive = build_curriculum(cfg)
    torch.manual_seed(cfg.global_seed)
    model = VQModel(VQModelConfig.from_dict(config.to_dict(cfg)), curriculum, adaptive=adaptive)
    return model.set_norm_precision(cfg.low_precision_norms)


def _open_lpips(cfg: TrainConfig) -> LPIPS:
    try:
        return LPIPS(cfg.lpips_vgg_weights)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}, or train without this loss: --perceptual-weight 0") from error


# ------------------------------------------------------------------------------------------------------- training

class Trainer(CurriculumTrainer):
    """Everything that one run holds. Built from a checked configuration; `train` trains it to the end."""

    best_metric, higher_is_better, warmup_metric = "psnr", True, "mse"
    shown = ("psnr", "ssim", "usage", "perplexity")

    def __init__(self, cfg: TrainConfig, device: torch.device):
        torch.backends.cudnn.benchmark = True  # training batches have one shape
        set_tf32(convolutions=cfg.tf32, matmul=False)  # a compiled model searches its codes at this precision
        if cfg.sync_batchnorm and device.type != "cuda":
            raise ValueError(f"--sync-batchnorm works on GPUs only, not on --device {device.type}; leave it out")
        choose_code_search(cfg.code_search, device)
        fingerprints = self._open_data(cfg)  # before LPIPS: a wrong path is no reason to look for weights
        self.lpips = _open_lpips(cfg).to(device) if cfg.perceptual_weight else None
        cfg = with_length(cfg, len(self.train_set))
        self.cfg, self.device = cfg, device
        assert cfg.max_steps is not None  # see with_length
        if cfg.disc_weight and cfg.disc_start > cfg.max_steps:
            distributed.print0(f"note: --disc-start {cfg.disc_start} is beyond the {cfg.max_steps} steps: the "
                               "discriminator never trains; --disc-weight 0 saves its memory")
        self.run = Run(cfg, device, resumable=RESUMABLE, inputs=fingerprints, end=last_step(cfg))
        self.raw = build_model(cfg).to(device)
        self.disc = NLayerDiscriminator(cfg.image_channels).to(device) if cfg.disc_weight else None
        self.optimizer, self.opt_d = self.make_optimizers()
        self.scaler = torch.amp.GradScaler(device.type, enabled=cfg.mixed_precision == "fp16")
        self.ema = EMA(self.raw, cfg.ema_decay) if cfg.ema else None
        self.restart = build_restart(cfg, self.raw.quantize.quantizer)
        self.drift = PaceMeter()
        self.kmeans_batches = kmeans_batches(cfg, tokens_per_batch(cfg))
        self.resume({"model": self.raw, "ema": self.ema, "optimizer": self.optimizer, "discriminator": self.disc,
                     "optimizer_disc": self.opt_d, "scaler": self.scaler, "drift": self.drift, "unreadable": self.bad,
                     "restart": self.restart})
        if cfg.init_from and not self.run.start:
            self.begin_from(cfg.init_from, self._open_weights(cfg.init_from))
        self.run.throughput = Throughput(cfg, device, tokens_per_batch(cfg) / cfg.global_batch_size, self._forward_once)
        # Only training is worth the compile time; everything else goes through self.raw, under its own names.
        core: nn.Module = torch.compile(self.raw) if cfg.compile else self.raw  # type: ignore[assignment]
        self.model = replicate(core, device)
        if self.disc is not None and cfg.sync_batchnorm and distributed.world_size() > 1:
            self.disc = nn.SyncBatchNorm.convert_sync_batchnorm(self.disc)
        self.disc_ddp = None if self.disc is None else replicate(self.disc, device)

    def _open_weights(self, path: str) -> VQModel:
        norm, saved = self.cfg.codebook_l2_norm, opened(path, lambda path: read_weights(Path(path), EXPORT_FORMAT))
        if not saved.exported and "config" not in saved.description:
            flag = flag_name("codebook_l2_norm") if norm else "--no-codebook-l2-norm"
            distributed.print0(f"note: --init-from {path} does not say whether its latents have unit norm; taken as "
                               f"{flag}, LlamaGen's default is --codebook-l2-norm")
        return opened(path, lambda path: load_tokenizer(path, codebook_l2_norm=norm))

    def make_optimizers(self) -> tuple[torch.optim.Adam, torch.optim.Adam | None]:
        """Of the tokenizer and of the discriminator, if there is one."""
        cfg = self.cfg
        adam = partial(torch.optim.Adam, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=True)
        groups = scale_learning_rate([{"params": list(self.raw.parameters())}], self.quantize.parameters(),
                                     cfg.codebook_lr_scale, cfg.lr)
        return adam(groups), None if self.disc is None else adam(self.disc.parameters())

    def _forward_once(self) -> None:
        """A third of what training on one image costs in FLOP: the tokenizer, and VGG16 for LPIPS, which sees an image
        and its reconstruction but has a backward for the latter alone. The discriminator, some per cent, is left out.
        """
        cfg = self.cfg
        x = torch.empty(1, cfg.image_channels, cfg.image_size, cfg.image_size, device=self.device)
        x_hat = self.raw.decode_latents(self.raw.encode_latents(x))
        if self.lpips is not None:
            self.lpips.features(x_hat)

    def _open_data(self, cfg: TrainConfig) -> dict[str, str]:
        split = open_split(cfg)
        self._say(cfg, "training images", split.source)
        if split.val_source is not split.source:
            self._say(cfg, "validation images", split.val_source)
        augment = cfg.augment
        if augment == "auto":
            augment = default_augment(split.source, cfg.image_size)
            distributed.print0(f"--augment auto: {augment}")
        self.train_set = ImageDataset(split.source, cfg.image_size, augment=augment, seed=cfg.global_seed,
                                      indices=split.train_indices)
        self.val_set = ImageDataset(split.val_source, cfg.image_size, indices=split.val_indices)
        self.bad = BadImageCounter(cfg.max_bad_images)
        self.bad.add([*split.source.damaged, *split.val_source.damaged])
        return split.fingerprints()

    @staticmethod
    def _say(cfg: TrainConfig, what: str, source: ImageSource) -> None:
        """What a source holds; with --dry-run, which prints JSON, beside it."""
        for line in describe_source(source) if distributed.is_main() else ():
            print(f"{what}: {line}", file=sys.stderr if cfg.dry_run else sys.stdout, flush=True)

    # ------------------------------------------------------------------------------------------------- the method

    def train(self) -> None:
        """The curriculum of the paper, one optimizer step after another."""
        cfg, run, quantize = self.cfg, self.run, self.quantize
        self.raw.train()
        batches = self.batches(run.start, run.end)
        for step in run.steps():                    # seeds what the step draws; after it a checkpoint, where one is due
            quantize.set_step(step)                 # stage 1, 2 or 3, alpha (Eq. 3) and omega (Eq. 4)
            self.start_codebook(step)               # once, at needs_init: init_codebook by k-means (section 4.1)
            position = self.position()
            terms = self.train_step(batches, step)  # decodes z~ = alpha z + (1 - alpha) z_q (Eq. 2); updates once
            self.finish_step(step)                  # set_step(step + 1): the steps up to this one are done; averages
            if run.due(cfg.log_every):
                self.bad.agree()                    # on too many unreadable images all ranks stop together
            run.log(terms, position, derive=lambda row: self.with_pace(row["step"], code_usage(row)))
            with run.untimed():
                if run.due(cfg.val_every):
                    self.validate()
                self.save_stage_end(position["stage"])
        run.finish(self.summary())

    def train_step(self, batches: Iterator[dict[str, Any]], step: int) -> dict[str, Tensor]:
        """Step the tokenizer, then the discriminator -> unweighted terms, means over the micro-batches; code_counts."""
        cfg, parts = self.cfg, self.cfg.gradient_accumulation_steps
        adversarial = self.disc is not None and losses.disc_active(step, cfg.disc_start)
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        pairs = []
        for part in range(parts):
            x = from_uint8(next(batches)["image"].to(self.device, non_blocking=True))
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
        totals["grad_norm"] = update(self.optimizer, self.raw, self.scaler, cfg.max_grad_norm)
        if adversarial:
            totals["disc_loss"] = self._update_discriminator(pairs)
        if self.scaler.is_enabled():
            totals["loss_scale"] = self.scaler.scale(torch.ones((), device=self.device))  # get_scale would wait
            self.scaler.update()
        return totals | {"code_counts": self.quantize.pop_counts()}

    def _update_discriminator(self, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """pairs: images and their reconstructions, from before the tokenizer's update as in LlamaGen, per micro-batch.
        """
        cfg, parts = self.cfg, len(pairs)
        assert self.disc is not None
        assert self.disc_ddp is not None
        assert self.opt_d is not None
        total = torch.zeros((), device=self.device)
        for part, (x, x_hat) in enumerate(pairs):
            with accumulating(self.disc_ddp, part < parts - 1):
                with self.autocast():
                    d = losses.discriminator_loss(self.disc_ddp, x, x_hat, kind=cfg.disc_loss, weight=cfg.disc_weight)
                self.scaler.scale(d.total / parts).backward()
            total = total + d.terms["discriminator"] / parts
        update(self.opt_d, self.disc, self.scaler, cfg.max_grad_norm)
        return total

    # --------------------------------------------------------------------------------------------------- data

    def batches(self, start: int, end: int) -> Iterator[dict[str, Any]]:
        sampler = self.run.sampler(len(self.train_set), start, end)
        for batch in self._loader(self.train_set, sampler):
            self._count_bad(batch)
            yield batch

    def _val_batches(self) -> Iterator[dict[str, Any]]:
        mine = list(range(distributed.rank(), len(self.val_set), distributed.world_size()))
        size = self.run.micro_batch()
        batches = [mine[i : i + size] for i in range(0, len(mine), size)]
        for batch in self._loader(self.val_set, batches):
            self._count_bad(batch)
            yield batch

    def _loader(self, dataset: ImageDataset, batches: Iterable[Any]) -> Iterable[dict[str, Any]]:
        pin = self.device.type == "cuda"
        return make_loader(dataset, batches, num_workers=self.cfg.num_workers, pin_memory=pin)

    def _count_bad(self, batch: dict[str, Any]) -> None:
        new = set(batch["bad"]) - self.bad.names
        for name in sorted(new):
            print(f"skipped an image that cannot be read: {to_line(name)}", file=sys.stderr)  # noqa: T201
        if new:
            self.bad.add(new)

    # -------------------------------------------------------------------------------------- what is tokenized

    def latents(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        z = self.raw.encode_latents(from_uint8(batch["image"].to(self.device)))  # (B, D, h, w)
        return channels_last(z), torch.full((len(z),), z[0, 0].numel())

    def evaluate(self, model: VQModel) -> dict[str, Any]:
        return validate(model, self._val_batches(), self.device, self.lpips)

    def probe(self, model: VQModel) -> Tensor:
        """Of 64 images."""
        parts = self._probe_images.split(self.run.micro_batch())
        return torch.cat([channels_last(model.encode_latents(part.to(self.device))) for part in parts])

    @cached_property
    def _probe_images(self) -> Tensor:
        """(64, C, H, W) on the CPU: read once, looked at with every log row."""
        return from_uint8(torch.stack([self.val_set[i]["image"] for i in spread(len(self.val_set), 64)]))

    def count_codes(self, model: VQModel) -> Tensor:
        counts = torch.zeros(model.quantize.num_codes, dtype=torch.int64, device=self.device)
        for batch in self._val_batches():
            x = from_uint8(batch["image"].to(self.device, non_blocking=True))
            indices = model.quantize.encode(model.encode_latents(x))
            count_(counts, indices)
        return distributed.all_reduce_(counts)

    def save_examples(self, model: VQModel, stem: str) -> None:
        """RUN/images/STEM.png: images above their reconstructions."""
        from torchvision.utils import make_grid, save_image  # here because torchvision takes a second to import

        x = from_uint8(torch.stack([self.val_set[i]["image"] for i in spread(len(self.val_set), 8)]).to(self.device))
        x_hat = model(x)[0]
        folder = self.run.folder / "images"
        folder.mkdir(parents=True, exist_ok=True)
        picture = make_grid((torch.cat([x, x_hat.float()]) + 1) / 2, nrow=len(x)).clamp(0, 1)
        atomic_write(folder / f"{stem}.png", lambda file: save_image(picture, file, format="png"))
        self.run.metrics.show_picture(self.run.done, "reconstructions", picture)

    def summary(self) -> dict[str, Any]:
        return super().summary() | {
            "training_images": len(self.train_set),
            "unreadable_images": len(self.bad.everywhere()),
        }


def main(argv: list[str] | None = None) -> None:
    def build(cfg: TrainConfig) -> Trainer:
        device = distributed.init(cfg.device)
        check(cfg, distributed.world_size())
        return Trainer(cfg, device)

    launch(PROG, lambda: parse_config(argv, __doc__), build)


if __name__ == "__main__":
    main()
