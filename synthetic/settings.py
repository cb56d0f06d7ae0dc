"""Settings of TopoDisc, the names of its arms, the seeds of its scan. No torch, see tokenizer/runtime/command.py."""

import dataclasses

from tokenizer.choices import QUANTIZERS
from tokenizer.runtime.config import arg, require_at_least, require_positive

FIRST_SEED = 1000  # the scan's seeds: never those of a comparison, which start at 0
FINALISTS, FINAL_SEEDS = 3, 4  # cells per method that are trained again; on this many times the scan's seeds


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all arms share. The defaults are the paper's view; synthetic/README.md says how they were chosen.

    One epoch is one optimizer step on all points. ValueError: sizes below 1, negative lengths, a curriculum that does
    not end before training does.
    """

    disk_points: int = arg(400, "points of the filled disk (paper: 400)")
    outline_points: int = arg(275, "points of the polygon's outline (paper: 275)")
    disk_radius: float = arg(1.0, "radius of the disk")
    outline_radius: float = arg(2.0, "distance of the polygon's corners from the centre of the disk")
    sides: int = arg(3, "sides of the polygon; 3: the paper's triangle")
    noise: float = arg(0.0, "standard deviation of Gaussian noise added to every coordinate")
    num_codes: int = arg(64, "codes in the codebook, K")
    width: int = arg(128, "hidden units per layer of the MLPs: 2-H-H-2 encoder, 2-H-H-2 decoder, ReLU")
    lr: float = arg(2e-3, "learning rate of Adam, constant, for networks and codebook")
    epochs: int = arg(500, "epochs of full-batch training (paper: 500)")
    warmup_epochs: int = arg(100, "manifold warm-up of the arms that have one")
    transition_epochs: int = arg(200, "soft transition of the arms that have one")
    loss_floor: float = arg(0.5, "lambda of Eq. 4")
    beta: float = arg(0.25, "weight of the commitment loss")

    def __post_init__(self) -> None:
        require_at_least(self, 1, "disk_points outline_points num_codes width epochs")
        require_at_least(self, 3, "sides")
        require_at_least(self, 0, "warmup_epochs transition_epochs noise beta")
        require_positive(self, "disk_radius outline_radius lr")
        if self.num_codes > self.disk_points + self.outline_points:
            raise ValueError(f"--num-codes {self.num_codes} is more than there are points "
                             f"({self.disk_points + self.outline_points})")
        if not 0 <= self.loss_floor <= 1:
            raise ValueError(f"--loss-floor is {self.loss_floor}; it must lie in [0, 1]")
        if self.warmup_epochs + self.transition_epochs >= self.epochs:
            raise ValueError(f"--warmup-epochs {self.warmup_epochs} + --transition-epochs {self.transition_epochs} "
                             f"must be less than --epochs {self.epochs}: the curriculum ends in discrete training")


# name -> (manifold warm-up?, soft transition?): the rows of Table 5
CURRICULA = {"plain": (False, False), "soft": (False, True), "warmup": (True, False), "provq": (True, True)}
# The arms of Figure 2 wrap the paper's vanilla VQ and go by the name of their curriculum alone.
ALIASES = {"vanilla": "vq", "soft": "vq+soft", "warmup": "vq+warmup", "provq": "vq+provq"}


# Ours: codes that follow the latents' mean and spread, and a second k-means where the transition ends.
FOLLOW, RECLUSTER = "follow", "+recluster"


def parse_method(method: str) -> tuple[str, str, bool]:
    """Quantizer, curriculum and whether it ends in "+recluster", of the name of an arm. ValueError: none."""
    base = method.removesuffix(RECLUSTER)
    quantizer, _, curriculum = ALIASES.get(base, base).partition("+")
    if quantizer not in (*QUANTIZERS, FOLLOW) or (curriculum or "plain") not in CURRICULA:
        raise ValueError(f"unknown method {method!r}: choose from {', '.join(ALIASES)}, a quantizer "
                         f"({', '.join(QUANTIZERS)}, {FOLLOW}), or one on a curriculum such as simvq+provq "
                         f"({', '.join(CURRICULA)}); {RECLUSTER} may come last")
    return quantizer, curriculum or "plain", method.endswith(RECLUSTER)
