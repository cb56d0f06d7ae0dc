"""What a run trains and validates on: opens the data that its settings name, now and when it is evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenizer.data import split_holdout, spread
from tokenizer.image_readers import ImageOptions, ImageSource
from tokenizer.image_sources import open_images
from tokenizer.runtime import config
from tokenizer.train_config import TrainConfig
from tokenizer.weights import CONFIG_FILE, read_checkpoint, require_keys

Indices = Sequence[int] | np.ndarray


class DataSplit(NamedTuple):
    """What a run trains and validates on: two sources, often the same one, and indices into each, sorted."""

    source: ImageSource
    train_indices: Indices
    val_source: ImageSource
    val_indices: Indices

    def fingerprints(self) -> dict[str, str]:
        """As a run records them."""
        return {"data_fingerprint": self.source.fingerprint(), "val_fingerprint": self.val_source.fingerprint()}


def open_split(cfg: TrainConfig) -> DataSplit:
    """Open --data-path and --val-path. ValueError names the flag: nothing there, unreadable, nothing to validate on."""
    source = _open("--data-path", cfg.data_path, cfg)
    if cfg.val_path:
        val_source = _open("--val-path", cfg.val_path, cfg)
        train: Indices = range(len(source))
        val: Indices = spread(len(val_source), cfg.val_size or len(val_source))
    else:
        size = min(cfg.val_size, max(1, len(source) // 10)) if cfg.data_path else cfg.val_size
        try:
            val_source, (train, val) = source, split_holdout(len(source), size, cfg.global_seed)
        except ValueError as error:
            raise ValueError(f"--val-size {cfg.val_size}: {error}") from error
    if not len(val):
        raise ValueError("no image is held out for validation: give --val-path, or --val-size above 0")
    return DataSplit(source, train, val_source, val)


def recorded_settings(run: str | Path) -> dict[str, Any]:
    """What the run in this folder recorded in config.json, with data paths that hold from anywhere. ValueError.

    Older runs recorded these paths as they were given. Where their --results-dir was relative as well, it tells the
    folder that both count from.
    """
    settings = config.load(Path(run) / CONFIG_FILE)
    folder, given = Path(run).resolve(), Path(settings.get("results_dir") or "/")
    if given.is_absolute() or folder.parts[-len(given.parts) :] != given.parts:
        return settings
    started_in = Path(*folder.parts[: -len(given.parts)])
    found = {name: settings[name] for name in ("data_path", "val_path") if settings.get(name) not in (None, "cifar10")}
    return settings | {name: str(started_in / data_path) for name, data_path in found.items()}


def open_run_split(run: str | Path) -> DataSplit:
    """The split that the run in this folder was trained on.

    ValueError: as `open_split`, or the images are not those that the run's checkpoint records, so that the split would
    be another one. FileNotFoundError: no checkpoint.
    """
    cfg = config.from_dict(TrainConfig, recorded_settings(run), str(Path(run) / CONFIG_FILE))
    split = open_split(cfg)
    where, saved = read_checkpoint(Path(run))
    require_keys(saved, ["config"], where)
    recorded = saved["config"]
    require_keys(recorded, [], where)
    for name, found in split.fingerprints().items():
        if recorded.get(name, found) != found:
            data = cfg.val_path if cfg.val_path and name == "val_fingerprint" else cfg.data_path
            raise ValueError(f"{data} has changed since {run} was trained on it ({name} {recorded[name]} then, {found} "
                             "now): images that it was trained on would count as held out. Restore the data as they "
                             "were, or give images of your own with --data-path")
    return split


def _open(flag: str, path: str | None, cfg: TrainConfig) -> ImageSource:
    try:
        return open_images(path, channels=cfg.image_channels, options=ImageOptions.of(cfg))
    except (ValueError, OSError) as error:
        raise ValueError(f"{flag}: {error}") from error
