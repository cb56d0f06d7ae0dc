"""What is compared: an arm is a quantizer, a curriculum and options; a plan is a list of arms that belong together.

The paper's own arms have no options. Everything in `Arm` below `schedule` is ours. No torch, see runtime/command.py:
arm_quantizers.py builds what an arm describes.
"""

from __future__ import annotations

import dataclasses

CURRICULA = ("vanilla", "soft", "warmup", "provq", "adaptive")  # adaptive: a warm-up that ends by itself, hard
RESTART_BELOW = 0.1  # of the mean use of a code; less is dead
ADAPTIVE_CHECKS = 20  # in the longest warm-up that it may choose


@dataclasses.dataclass(frozen=True)
class Kind:
    """What of the tunable numbers and options a quantizer has; arm_quantizers.MAKERS makes it."""

    trained: bool = True  # an optimizer trains its codes, so their learning rate matters
    beta: bool = True  # it has a commitment loss
    table: bool = True  # codes are points among the latents, which k-means can set and whose spread says something
    restarts: bool = True  # dead codes can be placed anew from outside
    from_latents: bool = False  # without a warm-up, codes start at latents drawn at random


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train. ValueError: unknown names, options that its quantizer or curriculum does not have."""

    quantizer: str = "vq"  # key of KINDS
    curriculum: str = "vanilla"  # one of CURRICULA; lengths of the stages are the setting's
    lr: float = 1e-3  # of everything but the codes
    beta: float = 0.25  # weight of the commitment loss
    loss_floor: float = 0.5  # lambda of Eq. 4
    schedule: str = "cosine"  # of alpha
    code_lr_scale: float = 1.0  # learning rate of the codes, in units of lr
    recluster: bool = False  # k-means again where the setting's transition ends, in any curriculum
    recluster_at: tuple[int, ...] = ()  # and at these optimizer steps
    from_latents: bool = False  # without a warm-up, codes start at latents drawn at random
    follow: bool = False  # codes follow the latents' mean and spread (vq)
    follow_decay: float = 0.9  # of that mean and spread, per optimizer step
    restart: bool = False  # dead codes restart at latents
    token_mix: bool = False  # the transition draws per token instead of mixing

    def __post_init__(self) -> None:
        if self.quantizer not in KINDS or self.curriculum not in CURRICULA:
            raise ValueError(f"need a quantizer of {', '.join(KINDS)} and a curriculum of {', '.join(CURRICULA)}; got "
                             f"{self.quantizer!r}, {self.curriculum!r}")
        if min(self.lr, self.code_lr_scale) <= 0:
            raise ValueError(f"lr {self.lr} and code_lr_scale {self.code_lr_scale} must be positive")
        if not (0 <= self.loss_floor <= 1 and 0 <= self.follow_decay < 1 and self.beta >= 0):
            raise ValueError(f"loss_floor {self.loss_floor} must lie in [0, 1], follow_decay {self.follow_decay} in "
                             f"[0, 1), and beta {self.beta} must be at least 0")
        object.__setattr__(self, "recluster_at", tuple(sorted(self.recluster_at)))  # JSON has lists
        if len(set(self.recluster_at)) < len(self.recluster_at):
            raise ValueError(f"recluster_at {' '.join(map(str, self.recluster_at))} names a step twice")
        kind = KINDS[self.quantizer]
        if not kind.table and (self.curriculum in ("warmup", "provq", "adaptive") or self.reclusters):
            raise ValueError(f"{self.quantizer} has no codes that k-means could set: no warm-up, no recluster")
        if self.from_latents and (not kind.table or self.curriculum not in ("vanilla", "soft")):
            raise ValueError("from_latents is for codes that start without a warm-up")
        if self.follow and self.quantizer != "vq":
            raise ValueError(f"follow is for the quantizer vq, not {self.quantizer}")
        if self.restart and not kind.restarts:
            raise ValueError(f"restart is for codes that are trained and have none of their own, not {self.quantizer}")
        if self.token_mix and self.curriculum not in ("soft", "provq"):
            raise ValueError(f"token_mix needs a transition, and curriculum {self.curriculum} has none")

    @property
    def reclusters(self) -> bool:
        return self.recluster or bool(self.recluster_at)

    @property
    def idle(self) -> set[str]:
        """Those of the arm's numbers that change nothing in it."""
        kind = KINDS[self.quantizer]
        has = {"beta": kind.beta, "code_lr_scale": kind.trained, "loss_floor": self.curriculum in ("soft", "provq"),
               "follow_decay": self.follow}
        return {name for name, changes in has.items() if not changes}


KINDS: dict[str, Kind] = {
    "vq": Kind(),
    "l2": Kind(),  # LlamaGen
    "rotation": Kind(),
    "ema": Kind(trained=False, restarts=False),
    "ema-restart": Kind(trained=False, restarts=False),
    "simvq": Kind(),
    "aminoaseed": Kind(from_latents=True),
    "soft-to-hard": Kind(from_latents=True),
    "gumbel": Kind(from_latents=True),
    "nsvq": Kind(beta=False),
    "diveq": Kind(beta=False, restarts=False),
    "fsq": Kind(trained=False, beta=False, table=False, restarts=False),
    "lfq": Kind(trained=False, table=False, restarts=False),
}

ARMS: dict[str, Arm] = {
    # the paper's (Tables 5 and 6)
    "vanilla": Arm(),
    "soft": Arm(curriculum="soft"),
    "warmup": Arm(curriculum="warmup"),
    "provq": Arm(curriculum="provq"),
    "provq-hard": Arm(curriculum="provq", schedule="hard"),
    "provq-linear": Arm(curriculum="provq", schedule="linear"),
    "provq-exp": Arm(curriculum="provq", schedule="exp"),
    "provq-lambda0": Arm(curriculum="provq", loss_floor=0.0),
    "provq-lambda.25": Arm(curriculum="provq", loss_floor=0.25),
    "provq-lambda1": Arm(curriculum="provq", loss_floor=1.0),
    # ours: pace for the codes
    "vanilla+x10": Arm(code_lr_scale=10.0),
    "provq+x10": Arm(curriculum="provq", code_lr_scale=10.0),
    "warmup+x10": Arm(curriculum="warmup", code_lr_scale=10.0),
    "soft+x10": Arm(curriculum="soft", code_lr_scale=10.0),
    "vanilla+latents": Arm(from_latents=True),
    "vanilla+latents+x10": Arm(from_latents=True, code_lr_scale=10.0),
    "vanilla+follow": Arm(follow=True),
    "provq+follow": Arm(curriculum="provq", follow=True),
    "warmup+follow": Arm(curriculum="warmup", follow=True),
    "provq+mix": Arm(curriculum="provq", token_mix=True),
    "provq+mix+follow": Arm(curriculum="provq", token_mix=True, follow=True),
    # ours: a second k-means
    "vanilla+recluster": Arm(recluster=True),
    "vanilla+recluster+x10": Arm(recluster=True, code_lr_scale=10.0),
    "warmup+recluster": Arm(curriculum="warmup", recluster=True),
    "warmup+recluster+x10": Arm(curriculum="warmup", recluster=True, code_lr_scale=10.0),
    "provq+recluster": Arm(curriculum="provq", recluster=True),
    "provq+recluster+x10": Arm(curriculum="provq", recluster=True, code_lr_scale=10.0),
    "provq+recluster+follow": Arm(curriculum="provq", recluster=True, follow=True),
    "warmup+recluster+follow": Arm(curriculum="warmup", recluster=True, follow=True),
    "vanilla+recluster+follow": Arm(recluster=True, follow=True),
    "provq+recluster+mix": Arm(curriculum="provq", recluster=True, token_mix=True),
    # ours: dead codes start again
    "vanilla+restart": Arm(restart=True),
    "provq+restart": Arm(curriculum="provq", restart=True),
    "provq+restart+x10": Arm(curriculum="provq", restart=True, code_lr_scale=10.0),
    # rivals, and those of them that have codes with the curriculum
    "llamagen": Arm("l2"),
    "ema": Arm("ema"),
    "ema-restart": Arm("ema-restart"),
    "simvq": Arm("simvq"),
    "aminoaseed": Arm("aminoaseed"),
    "rotation": Arm("rotation"),
    "diveq": Arm("diveq"),
    "nsvq": Arm("nsvq", restart=True),
    "fsq": Arm("fsq"),
    "lfq": Arm("lfq"),
    "gumbel": Arm("gumbel"),
    "soft-to-hard": Arm("soft-to-hard"),
    "adaptive": Arm(curriculum="adaptive"),
    "ema+provq": Arm("ema", "provq"),
    "simvq+provq": Arm("simvq", "provq"),
    "simvq+soft": Arm("simvq", "soft"),
    "simvq+provq+recluster": Arm("simvq", "provq", recluster=True),
    "aminoaseed+provq": Arm("aminoaseed", "provq"),
    "ema+provq+recluster": Arm("ema", "provq", recluster=True),
    "l2+provq": Arm("l2", "provq"),
    "rotation+provq+recluster": Arm("rotation", "provq", recluster=True),
    "nsvq+provq+recluster": Arm("nsvq", "provq", recluster=True, restart=True),
    "nsvq+warmup+recluster": Arm("nsvq", "warmup", recluster=True, restart=True),
}

PLANS: dict[str, tuple[str, ...]] = {
    "core": ("vanilla", "vanilla+x10", "warmup", "provq", "provq+x10", "provq+recluster", "provq+recluster+x10",
             "vanilla+follow", "provq+follow", "warmup+recluster"),
    "paper": ("vanilla", "soft", "warmup", "provq", "provq-hard", "provq-linear", "provq-exp", "provq-lambda0",
              "provq-lambda.25", "provq-lambda1"),
    "more": ("vanilla+latents", "vanilla+latents+x10", "soft", "ema", "ema+provq", "vanilla+recluster",
             "vanilla+recluster+x10", "provq+mix", "provq+mix+follow", "provq+recluster+mix", "provq+recluster+follow",
             "warmup+recluster+follow", "vanilla+recluster+follow", "warmup+recluster+x10", "warmup+x10",
             "warmup+follow", "vanilla+restart", "provq+restart", "provq+restart+x10", "simvq+provq+recluster",
             "ema+provq+recluster", "provq-lambda1"),
    "rivals": ("llamagen", "ema", "ema-restart", "simvq", "aminoaseed", "rotation", "diveq", "nsvq", "fsq", "lfq",
               "gumbel", "soft-to-hard", "adaptive", "simvq+soft", "simvq+provq", "aminoaseed+provq", "l2+provq"),
    "tuned": ("vanilla", "vanilla+follow", "warmup", "warmup+recluster", "provq", "provq+recluster", "nsvq", "simvq",
              "rotation", "adaptive", "ema-restart", "diveq", "llamagen", "gumbel", "soft-to-hard", "fsq", "lfq"),
}
