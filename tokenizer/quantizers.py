"""Quantizers by their settings."""

from __future__ import annotations

from tokenizer.choices import GRIDS
from tokenizer.grid_quantizers import GridQuantizer
from tokenizer.provq import VectorQuantizer, make_quantizer
from tokenizer.provq_codes import DeadCodeRestart, FollowingVectorQuantizer
from tokenizer.quantizer_config import QuantizerConfig


def build_quantizer(cfg: QuantizerConfig) -> VectorQuantizer:
    """The module that the settings describe."""
    options: dict[str, float | bool] = {
        "l2_norm": cfg.codebook_l2_norm, "beta": cfg.commit_loss_beta, "rotation": cfg.rotation,
    }
    if cfg.quantizer in GRIDS:
        return GridQuantizer(cfg.quantizer, cfg.codebook_size, beta=cfg.commit_loss_beta)
    if cfg.codebook_follow:
        return FollowingVectorQuantizer(cfg.codebook_size, cfg.codebook_embed_dim, beta=cfg.commit_loss_beta,
                                        rotation=cfg.rotation)
    if cfg.quantizer == "ema":
        options |= {"decay": cfg.codebook_ema_decay, "restart_below": cfg.codebook_restart_below}
    return make_quantizer(cfg.quantizer, cfg.codebook_size, cfg.codebook_embed_dim, **options)


def build_restart(cfg: QuantizerConfig, quantizer: VectorQuantizer) -> DeadCodeRestart | None:
    """What restarts the codes that nothing uses, from outside; None: nothing does, or the quantizer by itself (ema)."""
    if cfg.quantizer == "ema" or not cfg.codebook_restart_below:
        return None
    return DeadCodeRestart(quantizer, cfg.codebook_restart_below)
