"""What arms describe, built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from evaluations.evidence.arms import KINDS, RESTART_BELOW, Arm
from evaluations.evidence.options import TokenMixProVQ
from evaluations.evidence.rivals import DiVeQ, NoiseSubstitution, SoftToHardVectorQuantizer, make_fsq, make_lfq
from tokenizer.provq import (
    AdaptiveWarmup,
    Curriculum,
    EMAVectorQuantizer,
    LinearVectorQuantizer,
    ProVQ,
    VectorQuantizer,
)
from tokenizer.provq_codes import FollowingVectorQuantizer

ADAPTIVE = AdaptiveWarmup(patience=3, mode="max")  # of the probe images' PSNR


def _vq(**options: Any) -> Callable[[Arm, int, int, int], nn.Module]:
    def make(arm: Arm, num_codes: int, dim: int, anneal_steps: int) -> nn.Module:  # noqa: ARG001
        if arm.follow:
            return FollowingVectorQuantizer(num_codes, dim, beta=arm.beta, decay=arm.follow_decay, **options)
        return VectorQuantizer(num_codes, dim, beta=arm.beta, **options)
    return make


def _class(cls: type[VectorQuantizer], **options: Any) -> Callable[[Arm, int, int, int], nn.Module]:
    return lambda arm, num_codes, dim, _: cls(num_codes, dim, beta=arm.beta, **options)


def _annealed(gumbel: bool) -> Callable[[Arm, int, int, int], nn.Module]:
    return lambda arm, num_codes, dim, steps: SoftToHardVectorQuantizer(
        num_codes, dim, beta=arm.beta, anneal_steps=steps, gumbel=gumbel)


# By the names of arms.KINDS: (arm, num_codes, dim, anneal_steps) -> quantizer.
MAKERS: dict[str, Callable[[Arm, int, int, int], nn.Module]] = {
    "vq": _vq(),
    "l2": _vq(l2_norm=True),
    "rotation": _vq(rotation=True),
    "ema": _class(EMAVectorQuantizer),
    "ema-restart": _class(EMAVectorQuantizer, restart_below=RESTART_BELOW),
    "simvq": _class(LinearVectorQuantizer),
    "aminoaseed": _class(LinearVectorQuantizer),
    "soft-to-hard": _annealed(gumbel=False),
    "gumbel": _annealed(gumbel=True),
    "nsvq": _class(NoiseSubstitution),
    "diveq": lambda arm, num_codes, dim, _: DiVeQ(num_codes, dim),  # noqa: ARG005
    "fsq": lambda arm, num_codes, dim, _: make_fsq(num_codes, dim),  # noqa: ARG005
    "lfq": lambda arm, num_codes, dim, _: make_lfq(num_codes, dim, arm.beta),
}
assert MAKERS.keys() == KINDS.keys()


def make_provq(arm: Arm, num_codes: int, dim: int, warmup_steps: int, transition_steps: int) -> ProVQ:
    """The arm's quantizer on its curriculum. The setting's stages: lengths in optimizer steps."""
    both = warmup_steps + transition_steps
    warmup, transition = {
        "vanilla": (0, 0), "soft": (0, transition_steps), "warmup": (warmup_steps, 0),
        "provq": (warmup_steps, transition_steps), "adaptive": (both, 0),
    }[arm.curriculum]
    quantizer = MAKERS[arm.quantizer](arm, num_codes, dim, max(1, both))
    cls = TokenMixProVQ if arm.token_mix else ProVQ
    return cls(quantizer, Curriculum(warmup, transition, arm.schedule, arm.loss_floor),
               adaptive=ADAPTIVE if arm.curriculum == "adaptive" else None)
