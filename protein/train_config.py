"""Settings of protein/train_provq.py: one field per flag, the presets, and what makes no sense together.

The defaults are the paper's (section 5.1.3), and StructTokenBench's where the paper follows its recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from protein.atom_files import PLDDT_SOURCES
from protein.structure_config import PRESETS as MODELS
from tokenizer.choices import GRIDS
from tokenizer.curriculum_config import (
    CODEBOOK_INITS,
    EFFECTS_CURRICULUM,
    INIT_FROM,
    CurriculumConfig,
    check_curriculum,
    with_codes_kept,
)
from tokenizer.runtime import config
from tokenizer.runtime.config import arg, flag_name
from tokenizer.runtime.run_config import LR_SCHEDULES, RESUMABLE_RUN, Effect, check_optimizer, require_effects


@dataclass(frozen=True)
class TrainConfig(CurriculumConfig):
    # curriculum: what the paper has otherwise for proteins
    codebook_size: int = arg(512, "codes, K; StructTokenBench: 512")
    codebook_embed_dim: int = arg(1024, "channels of a code, D; StructTokenBench: 1024")
    warmup_steps: int = arg(20_000, "stage 1, plain autoencoder, in optimizer steps, or a fraction of all steps such "
                                    "as 0.25; paper: 20000", fraction=True)
    transition_steps: int = arg(10_000, "stage 2, soft transition, likewise; paper: 10000", fraction=True)
    codebook_init: str = arg("auto", "when stage 1 is over: kmeans of latents, latents drawn at random, or none; auto: "
                                     "kmeans after a warm-up, else latents, as StructTokenBench, but none for fsq and "
                                     "lfq; paper: kmeans",
                             choices=CODEBOOK_INITS)
    loss_lambda: float = arg(1.0, "weight of the quantization loss when stage 2 begins, lambda; paper: 1")
    # data
    preset: str = arg("auto", "set of defaults, below; auto: small with --data-path, else ideal",
                      choices=("auto", "ideal", "small", "paper"))
    data_path: str | None = arg(None, "training structures: a folder of .pdb, .cif or .bcif files (also .gz), or a "
                                      "folder of prepare_structures.py; none: generated ideal backbones")
    val_path: str | None = arg(None, "validation structures, likewise; none: entries are held out of --data-path")
    val_fraction: float = arg(0.1, "share of the entries held out; StructTokenBench: 0.1")
    clusters: str | None = arg(None, "text file of chains and their clusters, such as PREFIX_cluster.tsv of foldseek "
                                     "or mmseqs; then clusters are held out instead of entries")
    sample_by: str = arg("chain", "what an epoch has once: each chain, or one of each of --clusters",
                         choices=("chain", "cluster"))
    min_plddt: float | None = arg(None, "mask residues whose pLDDT, on the file's scale, is lower; none: mask none")
    plddt_from: str = arg("b_factor", "where predictions keep their pLDDT", choices=PLDDT_SOURCES)
    val_size: int = arg(500, "chains to validate on at most, evenly spaced; 0: all")
    ideal_chains: int = arg(2000, "generated backbones, without --data-path")
    min_length: int = arg(10, "leave out chains with fewer residues that have N, CA and C")
    max_length: int = arg(512, "longest chain, in residues; StructTokenBench: 512")
    overlong: str = arg("crop", "what to do with longer chains: a random stretch, another one each epoch, or leave "
                                "them out; StructTokenBench: drop", choices=("crop", "drop"))
    max_bad_structures: int = arg(100, "unreadable structure files to skip before the run stops")
    num_workers: int = arg(0, "processes that read structure files, and then load batches, per rank")
    # model
    init_from: str | None = arg(None, INIT_FROM.format("a file of StructTokenBench's"))
    encoder_width: int = arg(1024, "channels of a slot; ESM3: 1024")
    encoder_heads: int = arg(128, "vector heads of geometric attention; ESM3: 128")
    encoder_layers: int = arg(2, "geometric blocks; ESM3: 2")
    neighbours: int = arg(16, "residues of a neighbourhood; ESM3: 16")
    decoder_width: int = arg(1024, "channels of a token; StructTokenBench: 1024")
    decoder_heads: int = arg(16, "attention heads; StructTokenBench: 16")
    decoder_layers: int = arg(8, "transformer blocks; StructTokenBench: 8")
    # losses
    distance_weight: float = arg(1.0, "weight of the backbone distances; StructTokenBench: 1, as the four below")
    direction_weight: float = arg(1.0, "weight of the backbone directions")
    binned_distance_weight: float = arg(1.0, "weight of the binned C-beta distances")
    binned_direction_weight: float = arg(1.0, "weight of the binned directions")
    inverse_folding_weight: float = arg(1.0, "weight of the amino acids' cross entropy")
    losses_as_coded: bool = arg(False, "the losses as StructTokenBench's code computes them, defects included")
    # optimization
    global_batch_size: int = arg(32, "chains per optimizer step over all ranks; paper: 32")
    lr: float = arg(1e-4, "peak learning rate of AdamW; StructTokenBench: 1e-4")
    lr_schedule: str = arg("cosine", "after its warm-up; StructTokenBench: cosine", choices=LR_SCHEDULES)
    lr_warmup_steps: int = arg(5426, "steps in which the learning rate rises from 0; StructTokenBench: 5426")
    min_lr: float = arg(1e-5, "learning rate at the end; StructTokenBench: a tenth of the peak")
    beta1: float = arg(0.9, "AdamW's first moment; StructTokenBench: 0.9")
    beta2: float = arg(0.98, "AdamW's second moment; StructTokenBench: 0.98")
    weight_decay: float = arg(0.01, "of matrices, not of norms and biases; StructTokenBench: 0.01")
    mixed_precision: str = arg("none", "autocast; geometry, quantizer and losses stay float32; StructTokenBench: none",
                               choices=("none", "bf16"))


_SHORT = {"lr": 1e-3, "min_lr": 1e-4, "kmeans_batches": 8}
PRESETS: dict[str, dict[str, Any]] = {
    "ideal": MODELS["tiny"] | _SHORT | {  # minutes on a CPU
        "codebook_size": 64, "global_batch_size": 8, "max_steps": 300, "warmup_steps": 100, "transition_steps": 100,
        "lr_warmup_steps": 20, "max_length": 96, "ideal_chains": 400, "val_size": 40, "log_every": 20,
        "val_every": 50, "ckpt_every": 50,
    },
    "small": MODELS["small"] | _SHORT | {
        "global_batch_size": 16, "max_steps": 10_000, "warmup_steps": 2500, "transition_steps": 2500,
        "lr_warmup_steps": 500, "max_length": 256, "val_every": 500, "ckpt_every": 500, "val_size": 200,
    },
    "paper": MODELS["paper"] | {"max_steps": 108_530},
}

# Data may move: the sets' fingerprints are compared, not their paths.
RESUMABLE = RESUMABLE_RUN | {"preset", "data_path", "val_path", "num_workers", "max_bad_structures",
                             "stop_after", "code_search"}

_FILES = "on generated backbones", "give --data-path"
EFFECTS = EFFECTS_CURRICULUM | {
    "val_fraction": Effect(lambda cfg: not cfg.val_path, "with --val-path, which names what is validated on"),
    "clusters": Effect(lambda cfg: not cfg.val_path or cfg.sample_by == "cluster",
                       "with --val-path and --sample-by chain", "give --sample-by cluster"),
    "ideal_chains": Effect(lambda cfg: not cfg.data_path, "with --data-path, which has the chains"),
    "min_plddt": Effect(lambda cfg: cfg.data_path, *_FILES),
    "max_bad_structures": Effect(lambda cfg: cfg.data_path, *_FILES),
}


def pick_preset(given: dict[str, Any]) -> str:
    """The preset that the explicit flags ask for: --preset, else the small one when there are data."""
    if given.get("preset", "auto") != "auto":
        return str(given["preset"])
    return "small" if given.get("data_path") else "ideal"


def parse_config(argv: list[str] | None = None, description: str = "") -> TrainConfig:
    """Flags -> configuration with preset, folder and the start of the codebook decided.

    SystemExit(2) names the flag that is wrong, ValueError one that has no effect.
    """
    cfg, given = config.parse_given(TrainConfig, argv, presets=PRESETS, pick_preset=pick_preset,
                                    exclusive=("max_steps", "epochs"), description=description,
                                    prog="protein/train_provq.py")
    cfg = with_codes_kept(cfg)
    preset = pick_preset({"preset": cfg.preset, "data_path": cfg.data_path})
    init = cfg.codebook_init
    if init == "auto":
        init = "none" if cfg.quantizer in GRIDS else "kmeans" if cfg.warmup_steps else "latents"
    cfg = replace(cfg, preset=preset, results_dir=cfg.results_dir or f"runs/protein-{preset}", codebook_init=init)
    require_effects(cfg, given, EFFECTS)
    return cfg


def check(cfg: TrainConfig, world_size: int) -> None:
    """Raise ValueError, naming flag, value and fix, for settings that cannot work. Reads no data."""
    check_curriculum(cfg, world_size)
    check_optimizer(cfg)
    config.require_at_least(cfg, 0, "val_size num_workers max_bad_structures distance_weight direction_weight "
                            "binned_distance_weight binned_direction_weight inverse_folding_weight min_plddt")
    config.require_at_least(cfg, 1, "ideal_chains min_length encoder_width encoder_heads encoder_layers neighbours "
                            "decoder_width decoder_heads decoder_layers")
    config.require_at_most(cfg, 2**24, "ideal_chains")
    config.require_at_most(cfg, 2**16, "encoder_width encoder_heads neighbours decoder_width decoder_heads max_length")
    config.require_at_most(cfg, 2**10, "encoder_layers decoder_layers num_workers")
    config.require_fraction(cfg, "val_fraction")
    if cfg.max_length < cfg.min_length:
        raise ValueError(f"--max-length {cfg.max_length} is below --min-length {cfg.min_length}")
    if cfg.decoder_width % (2 * cfg.decoder_heads):
        raise ValueError(f"--decoder-width {cfg.decoder_width} must be an even multiple of --decoder-heads "
                         f"{cfg.decoder_heads}")
    if not any(loss_weights(cfg).values()):
        flags = ", ".join(flag_name(f"{name}_weight") for name in loss_weights(cfg))
        raise ValueError(f"{flags} are all 0: nothing would be learned")
    if cfg.sample_by == "cluster" and not cfg.clusters:
        raise ValueError("--sample-by cluster needs --clusters: the file that says who is in which")
    if cfg.clusters and not cfg.data_path:
        raise ValueError("--clusters needs --data-path; generated backbones have none")
    if cfg.plddt_from != "b_factor" and cfg.min_plddt is None:
        raise ValueError(f"--plddt-from {cfg.plddt_from} changes nothing without --min-plddt")
    if cfg.val_path and not cfg.data_path:
        raise ValueError("--val-path needs --data-path; without it generated backbones are held out")


def check_data(cfg: TrainConfig) -> None:
    """ValueError names the flag: there is no folder at --data-path or --val-path. Opens neither."""
    for name in ("data_path", "val_path"):
        path = getattr(cfg, name)
        if path is not None and not Path(path).exists():
            raise ValueError(f"{flag_name(name)}: {path}: no such folder")


def loss_weights(cfg: TrainConfig) -> dict[str, float]:
    """Weight of each term of losses.structure_losses."""
    return {"distance": cfg.distance_weight, "direction": cfg.direction_weight,
            "binned_distance": cfg.binned_distance_weight, "binned_direction": cfg.binned_direction_weight,
            "inverse_folding": cfg.inverse_folding_weight}


assert RESUMABLE <= {field.name for field in fields(TrainConfig)}
