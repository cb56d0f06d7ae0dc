"""What all arms of a comparison share: the settings of the bed. No torch, see tokenizer/runtime/command.py."""

from __future__ import annotations

import dataclasses

from tokenizer.vq_config import ARCHITECTURES, Architecture

MODELS = {  # the small one halves once; a run of 600 steps takes a minute of one core
    "small": Architecture(32, (1, 1), encoder_blocks=(0, 2), decoder_blocks=(0, 2), z_channels=32),
    "VQ-4": ARCHITECTURES["VQ-4"],
}
DISC_SIZES = {"ndf": 32, "n_layers": 2}  # for images of 16 and 32 pixels
DISC_MIN_IMAGE_SIZE = 12  # NLayerDiscriminator.min_image_size, with these


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all arms of a comparison share. ValueError, naming the flag: values that cannot work."""

    data: str  # name of the file of images; of all beds alike, where it lies does not matter
    num_codes: int = 512
    dim: int = 8
    model: str = "small"  # key of MODELS
    image_size: int = 16
    steps: int = 600
    batch_size: int = 32
    warmup_steps: int = 200
    transition_steps: int = 200
    held_out: int = 2000  # images that are scored
    latents_per_code: int = 16  # that k-means gets, from the encoder as it is then
    disc_start: int | None = None  # first step, counted from 1, with a discriminator; None: pixel loss only
    features: str | None = None  # sha256 of the extractor whose features give rfid; None: no such score

    def __post_init__(self) -> None:
        for name in ("num_codes", "dim", "image_size", "steps", "batch_size", "held_out", "latents_per_code"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; it must be at least 1")
        if self.features is not None and self.held_out < 2:
            raise ValueError(f"--held-out {self.held_out}: the rFID of --features needs at least 2 images")
        if self.disc_start is not None and not 0 < self.disc_start <= self.steps:
            raise ValueError(f"--disc-start {self.disc_start} must be a step of 1 to --steps {self.steps}")
        if self.disc_start is not None and self.image_size < DISC_MIN_IMAGE_SIZE:
            raise ValueError(f"--disc-start: images of --image-size {self.image_size} are too small for the "
                             f"discriminator, which needs {DISC_MIN_IMAGE_SIZE}")
        if self.model not in MODELS:
            raise ValueError(f"--model {self.model!r} is none of {', '.join(MODELS)}")
        if self.image_size % MODELS[self.model].downsample:
            raise ValueError(f"--image-size {self.image_size} is no multiple of {MODELS[self.model].downsample}")
        if min(self.warmup_steps, self.transition_steps) < 0 or self.discrete_from > self.steps:
            raise ValueError(f"--warmup-steps {self.warmup_steps} and --transition-steps {self.transition_steps} must "
                             f"be at least 0 and together at most --steps {self.steps}")

    @property
    def discrete_from(self) -> int:
        """First step of stage 3."""
        return self.warmup_steps + self.transition_steps
