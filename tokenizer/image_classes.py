"""From names and labels to classes: which files are images, their order, and how many images a class has."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from tokenizer.image_names import to_line

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
ACCEPTED = (
    "a folder of images or of class folders, a .tar or .zip of such a folder, WebDataset shards "
    "('shards/train-{000000..000146}.tar' or a folder of .tar files), a folder with cifar-10-batches-py, "
    "'cifar10' (downloaded into data/), a .txt/.csv list of image paths, or nothing (scikit-learn's digits); "
    f"images: {' '.join(EXTENSIONS)}"
)
MAX_LABEL = 1_000_000
OF_FILE_SYSTEMS = {"lost+found", "System Volume Information", "$RECYCLE.BIN"}
_LISTED = 20  # classes that a message names one by one


def is_image(name: str) -> bool:
    """Image extension and no hidden part (macOS archives carry `._x.jpg` and `__MACOSX/`, which are no images)."""
    return name.lower().endswith(EXTENSIONS) and not (
        name.startswith((".", "__MACOSX/")) or "/." in name or "/__MACOSX/" in name
    )


def is_hidden(part: str) -> bool:
    return part[:1] == "." or part == "__MACOSX"


def sort_into_classes(names: list[str], where: str) -> tuple[list[int], np.ndarray, list[str]]:
    """Order, labels and class names as torchvision's ImageFolder gives them; flat names are one class with label 0.

    names: posix, relative. Returns (positions into names, (N,) int64 labels in that order, class names).
    Raises ValueError when there is no image, or images lie both inside and beside class folders.
    """
    if not names:
        raise ValueError(f"data path {where}: no images in it. Accepted: {ACCEPTED}")
    flat = [name for name in names if "/" not in name]
    if flat and len(flat) < len(names):
        raise ValueError(
            f"data path {where}: {len(flat)} images (such as {to_line(flat[0])}) lie beside {len(names) - len(flat)} "
            "images in sub-folders, so their class is unclear; move them into a folder or out of it"
        )

    def key(i: int) -> tuple[str, str, str]:
        folder, _, base = names[i].rpartition("/")
        return folder.split("/", 1)[0], folder, base

    order = sorted(range(len(names)), key=key)
    if flat:
        return order, np.zeros(len(names), dtype=np.int64), ["all"]
    labels, classes = named_classes([names[i].split("/", 1)[0] for i in order])
    return order, labels, classes


def named_classes(of_image: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """The class name of each image -> ((N,) int64 labels, names), numbered in the order of the names."""
    classes = sorted(set(of_image))
    number = {name: label for label, name in enumerate(classes)}
    return np.array([number[name] for name in of_image], dtype=np.int64), classes


def empty_classes(names: Sequence[str], folders: set[str]) -> list[str]:
    """Those of the top-level folders that have no image among names, where others have: no classes, or forgotten ones.

    Hidden ones and what a file system makes by itself do not count.
    """
    classes = {name.split("/", 1)[0] for name in names if "/" in name}
    return sorted(f for f in folders - classes - OF_FILE_SYSTEMS if f and not is_hidden(f)) if classes else []


def strip_outer_folder(names: list[str]) -> list[str]:
    """Drop leading folders that hold everything, as long as some folder level is left to be the class."""
    while names and all(name.count("/") >= 1 for name in names) and any(name.count("/") >= 2 for name in names):
        if len({name.split("/", 1)[0] for name in names}) > 1:
            break
        names = [name.split("/", 1)[1] for name in names]
    return names


def numbered_classes(
    labels: Sequence[int | None], describe: Callable[[int], str], remap: bool = False
) -> tuple[np.ndarray, list[str]]:
    """Labels given as numbers -> ((N,) int64, class names '0'...). All absent: zeros. `describe(i)` names item i.

    remap: number those that occur 0, 1 and so on, in their order; their names stay the numbers given.
    Raises ValueError when only some are given, or one is outside [0, 1000000).
    """
    missing = [i for i, label in enumerate(labels) if label is None]
    if missing and len(missing) < len(labels):
        raise ValueError(f"{describe(missing[0])}: no label, though others have one; give all images a label or none")
    numbers = np.zeros(len(labels), dtype=np.int64)
    for i, label in enumerate(labels):
        if label is not None and not 0 <= label < MAX_LABEL:
            raise ValueError(f"{describe(i)}: label {label} is not in [0, {MAX_LABEL})")
        numbers[i] = label or 0
    if remap:
        given, numbers = np.unique(numbers, return_inverse=True)
        return numbers.astype(np.int64), [str(label) for label in given.tolist()]
    return numbers, [str(c) for c in range(int(numbers.max()) + 1)]


# ---------------------------------------------------------------------------------------------------------------------
# how many images a class has


def describe_classes(labels: np.ndarray, classes: Sequence[str]) -> str:
    """One line: how many images, how many classes, how many images in each, and which classes have none."""
    counts = np.bincount(labels, minlength=len(classes))  # (classes,)
    filled = np.flatnonzero(counts)
    if len(classes) == 1:
        return f"{len(labels):,} images in one class"
    line = f"{len(labels):,} images in {len(filled):,} {'class' if len(filled) == 1 else 'classes'}"
    if len(filled) <= _LISTED:
        line += ": " + ", ".join(f"{to_line(classes[c])} {counts[c]:,}" for c in filled.tolist())
    else:
        low, high = int(filled[counts[filled].argmin()]), int(filled[counts[filled].argmax()])
        line += f", {counts[low]:,} ({to_line(classes[low])}) to {counts[high]:,} ({to_line(classes[high])}) in each"
    return line + (f"; {_without(counts, classes)}" if len(filled) < len(classes) else "")


def require_no_empty_class(labels: np.ndarray, classes: Sequence[str], where: str) -> None:
    """ValueError: a class without images, which a model would be sampled for and has never seen."""
    counts = np.bincount(labels, minlength=len(classes))
    if not counts.all():
        raise ValueError(f"{where}: {_without(counts, classes)}. Number the labels from 0 without gaps, or pass "
                         "--remap-labels to have those that occur numbered so")


def _without(counts: np.ndarray, classes: Sequence[str]) -> str:
    empty = np.flatnonzero(counts == 0)
    shown = ", ".join(to_line(classes[c]) for c in empty[:5].tolist()) + (", ..." if len(empty) > 5 else "")
    return f"no images in {len(empty):,} of {len(classes):,} classes ({shown})"
