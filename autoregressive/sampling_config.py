"""How codes are drawn from a GPT: the settings of sampling.py. No torch, see tokenizer/runtime/command.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULES = ("constant", "linear", "power-cosine")


@dataclass(frozen=True)
class SamplingConfig:
    """How codes are drawn. ValueError, naming the flag of sample_c2i.py: a value out of range.

    cfg_scale: 1 is no guidance; logits become u + scale (c - u). cfg_interval: codes with a place above it, counted
        from the second code, are drawn without guidance (LlamaGen's definition); -1: all are guided.
    cfg_schedule: the scale at code t of T, with progress r = (t + 1) / T: "constant" s; "linear" 1 + (s - 1) r (as MAR,
        Li et al. 2024); "power-cosine" 1 + (s - 1) (1 - cos(pi r^power)) / 2 (as MDT, Gao et al. 2023).
    temperature: 0 takes the most likely code. top_k: 0 is off. top_p: 1 is off.
    """

    cfg_scale: float = 1.5
    cfg_interval: int = -1
    cfg_schedule: str = "constant"
    cfg_power: float = 3.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        rules = (
            ("cfg_scale", math.isfinite(self.cfg_scale) and self.cfg_scale >= 1, "must be at least 1 (no guidance)"),
            ("cfg_interval", self.cfg_interval >= -1, "must be -1 (guide all codes) or a place"),
            ("cfg_schedule", self.cfg_schedule in SCHEDULES, f"must be one of {', '.join(SCHEDULES)}"),
            ("cfg_power", math.isfinite(self.cfg_power) and self.cfg_power > 0, "must be positive"),
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "must be 0 (greedy) or above"),
            ("top_k", self.top_k >= 0, "must be 0 (off) or a number of codes"),
            ("top_p", 0 < self.top_p <= 1, "must lie in (0, 1]; 1 is off"),
        )
        for name, good, rule in rules:
            if not good:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it {rule}")

    def scale(self, t: int, total: int) -> float:
        """Guidance of code t of `total`; 1: none."""
        if self.cfg_interval > -1 and t - 1 > self.cfg_interval:
            return 1.0
        progress = (t + 1) / total
        if self.cfg_schedule == "linear":
            return 1 + (self.cfg_scale - 1) * progress
        if self.cfg_schedule == "power-cosine":
            return 1 + (self.cfg_scale - 1) * (1 - math.cos(math.pi * progress**self.cfg_power)) / 2
        return self.cfg_scale
