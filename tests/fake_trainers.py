"""The three trainers on fake CUDA, built past the constructors that open data and folders; and batches for them."""

from types import SimpleNamespace

import torch

from autoregressive import train_c2i
from autoregressive.gpt import GPT, GPTConfig, NextCodeLoss
from autoregressive.train_config import TrainConfig as GPTTrainConfig
from protein import train_provq as train_structures
from protein.train_config import PRESETS as STRUCTURE_PRESETS
from protein.train_config import TrainConfig as StructureTrainConfig
from tokenizer import train_provq as train_images
from tokenizer.discriminator import NLayerDiscriminator
from tokenizer.runtime.ema import EMA
from tokenizer.runtime.optim import build_adamw
from tokenizer.runtime.packing import Packed
from tokenizer.train_config import TrainConfig as ImageTrainConfig

SMALL_IMAGES = {"vq_model": "VQ-4", "image_size": 32, "codebook_size": 64}


def image_trainer(fake, **changes):
    """Paper sizes unless changed; perceptual loss off, whose weights are not ours."""
    cfg = ImageTrainConfig(**{"data_path": "x", "results_dir": "x", "max_steps": 9, "perceptual_weight": 0.0,
                              "warmup_steps": 1, "transition_steps": 1, "disc_start": 0, "ema": True} | changes)
    model, average = train_images.build_model(cfg), train_images.build_model(cfg)
    disc = NLayerDiscriminator(cfg.image_channels)
    trainer = train_images.Trainer.__new__(train_images.Trainer)
    trainer.ema = EMA(model, average=average)
    for module in (model, disc, trainer.ema._module):
        fake.to_cuda(module)
    trainer.cfg, trainer.device, trainer.lpips, trainer.restart = cfg, fake.device, None, None
    trainer.raw, trainer.model, trainer.disc, trainer.disc_ddp = model, model, disc, disc
    trainer.optimizer, trainer.opt_d = trainer.make_optimizers()
    trainer.scaler = torch.amp.GradScaler("cuda", enabled=cfg.mixed_precision == "fp16")
    trainer.raw.train()
    return trainer


def images(trainer, batch):
    while True:
        shape = batch, trainer.cfg.image_channels, *[trainer.cfg.image_size] * 2
        yield {"image": torch.empty(shape, dtype=torch.uint8), "bad": []}


def gpt_trainer(fake, gpt=None, **changes):
    cfg = GPTTrainConfig(**{"code_path": "x", "results_dir": "x", "max_steps": 9, "ema": True} | changes)
    trainer = train_c2i.Trainer.__new__(train_c2i.Trainer)
    trainer.cfg, trainer.device, trainer.sharded = cfg, fake.device, False
    trainer.gpt_config = gpt or GPTConfig.preset(cfg.gpt_model)
    trainer.raw, average = GPT(trainer.gpt_config), GPT(trainer.gpt_config)
    trainer.ema = EMA(trainer.raw, average=average)
    fake.to_cuda(trainer.raw)
    fake.to_cuda(trainer.ema._module)
    trainer.model = NextCodeLoss(trainer.raw)
    trainer.optimizer = build_adamw(trainer.raw, cfg)
    trainer.scaler = torch.amp.GradScaler("cuda", enabled=cfg.mixed_precision == "fp16")
    trainer.raw.train()
    return trainer


def codes(trainer, batch):
    return _moved(trainer, {"codes": torch.empty(batch, trainer.gpt_config.block_size, dtype=torch.int64),
                            "label": torch.empty(batch, dtype=torch.int64)})


def structure_trainer(fake, **changes):
    cfg = StructureTrainConfig(**{"data_path": "x", "results_dir": "x", "max_steps": 9, "warmup_steps": 1, "ema": True,
                                  "transition_steps": 1} | changes)
    trainer = train_structures.Trainer.__new__(train_structures.Trainer)
    trainer.cfg, trainer.device, trainer.restart = cfg, fake.device, None
    trainer.raw, average = train_structures.build_model(cfg), train_structures.build_model(cfg)
    trainer.ema = EMA(trainer.raw, average=average)
    fake.to_cuda(trainer.raw)
    fake.to_cuda(trainer.ema._module)
    trainer.model = trainer.raw
    trainer.optimizer = build_adamw(trainer.raw, cfg)
    trainer.scaler = torch.amp.GradScaler(enabled=False)
    trainer.raw.train()
    return trainer


SMALL_STRUCTURES = {name: value for name, value in STRUCTURE_PRESETS["ideal"].items() if not name.endswith("_steps")}


def chains(trainer, batch, length):
    return _moved(trainer, {
        "coords": torch.empty(batch, length, 3, 3), "mask": torch.empty(batch, length, dtype=torch.bool),
        "residue_index": torch.empty(batch, length, dtype=torch.int64),
        "sequence": torch.empty(batch, length, dtype=torch.int64),
        "places": torch.empty(batch * length, dtype=torch.int64)})


def _moved(trainer, made):
    """Batches as the trainers' loaders give them. Workers pack them: none of the step's work."""
    batch = Packed(made)
    return iter(lambda: batch.to(trainer.device), None)


def step(fake, trainer, batches, number):
    """What the loop of each trainer does with step `number` -> what the recorder saw, with `saved`: bytes kept."""
    quantize = getattr(trainer.raw, "quantize", None)
    if quantize is not None and number:
        quantize._initialised = True
    with fake.recorder() as seen, fake.saved() as saved:
        if quantize is not None:
            quantize.set_step(number)
            assert quantize.stage == min(number, 2) + 1  # one step of each
        terms = trainer.train_step(batches, number)
        if quantize is None:
            trainer.ema.update(trainer.raw, number + 1)
        else:
            trainer.finish_step(number)
    assert {value.device.type for value in terms.values()} == {"cuda"}
    return SimpleNamespace(syncs=seen.syncs, copies=seen.copies, traffic=seen.traffic, saved=saved[0], terms=terms,
                           operations=seen.operations)
