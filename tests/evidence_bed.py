"""A bed of a second: a few hundred tiny pictures in an archive, and a setting for them."""

from pathlib import Path

from image_files import encoded, picture, write_zip

from evaluations.evidence.bed import PROBE, Images, prepare
from evaluations.evidence.setting import Setting

HELD_OUT = 20
SETTING = Setting("pictures.zip", num_codes=16, image_size=8, steps=12, batch_size=4, warmup_steps=4,
                  transition_steps=4, held_out=HELD_OUT)
FLAGS = ["--num-codes", "16", "--image-size", "8", "--steps", "12", "--batch-size", "4", "--warmup-steps", "4",
         "--transition-steps", "4", "--held-out", str(HELD_OUT)]


def write_pictures(folder: Path) -> Path:
    """pictures.zip in folder."""
    return write_zip(folder / SETTING.data, {
        f"{i % 2}/{i}.png": encoded(picture(i, 8, 8)) for i in range(HELD_OUT + PROBE + 40)})


def make_images(folder: Path) -> Images:
    return Images(prepare(write_pictures(folder), SETTING, folder / "cache"), HELD_OUT)
