"""Protein chains for training: sources, entries held out, crops, batches of similar lengths.

A source is a folder of structure files, a folder that protein/prepare_structures.py wrote, or generated backbones; all
give the same `StructureSet`. Everything random about an item is a function of (seed, epoch, index), see tokenizer/data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from protein.losses import PADDING
from protein.structure_cache import MANIFEST, ROWS, StructureSet, read_cache, structure_set
from protein.structure_io import Chain
from protein.structure_model import check_residues, residue_places
from protein.structure_sources import Failure, iterate_folder
from tokenizer.runtime import distributed
from tokenizer.runtime.seeding import StepSampler, fold

OVERLONG = ("crop", "drop")
WINDOW = 32  # global batches


# ---------------------------------------------------------------------------------------------------------------------
# sources


def open_structures(
    path: str | Path | None, *, max_bad: int = 0, num_workers: int = 0, ideal_chains: int = 2000, seed: int = 0,
    min_plddt: float | None = None, plddt_from: str = "b_factor",
) -> StructureSet:
    """The chains of a folder of structure files (with its subfolders), of a cache, or, without a path, generated ones.

    max_bad: unreadable files to skip, each with a line that says why. num_workers: processes that read files.
    ideal_chains, seed: of the generated backbones. Files are read anew by every process of a distributed run: make a
    cache of more than some thousands.

    min_plddt, plddt_from: residues under it have no coordinates, see structure_io.read_structure; a cache has what it
    was prepared with in its B-factors.

    Raises FileNotFoundError, and ValueError naming the file: more unreadable files than max_bad, a damaged cache.
    """
    if path is None:
        from protein.backbones import generate_backbones

        # With "_" in their names they would be one entry.
        return structure_set(replace(chain, name=chain.name.replace("_", "-"))
                             for chain in generate_backbones(ideal_chains, seed))
    path = Path(path)
    if path.is_file():
        raise ValueError(f"{path} is a file; name the folder of structure files, or of prepare_structures.py")
    if (path / MANIFEST).exists():
        found = read_cache(path)
        if plddt_from != "b_factor":
            raise ValueError(f"{path} is a cache; pass --plddt-from {plddt_from} to prepare_structures.py")
        try:
            return found.masked(min_plddt)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if all((path / f"{name}.npy").exists() for name in ROWS):
        raise ValueError(f"{path} has no {MANIFEST}, but the other files of prepare_structures.py; run it again")
    return structure_set(chain for found in iterate_folder(path, max_failures=max_bad, num_workers=num_workers,
                                                            min_plddt=min_plddt, plddt_from=plddt_from)
                         for chain in report_failure(found))


def report_failure(found: list[Chain] | Failure) -> list[Chain]:
    """What `iterate_folder` yields -> its chains; of a file that could not be read, none and a line that says why."""
    if isinstance(found, Failure):
        distributed.print0(f"skipped {found.reason}")
        return []
    return found


# ---------------------------------------------------------------------------------------------------------------------
# which chains


class Usable(NamedTuple):
    indices: npt.NDArray[np.int64]  # ascending
    short: int                      # chains left out because they are too short
    long: int                       # or too long


def usable_chains(structures: StructureSet, *, min_length: int, max_length: int, overlong: str = "crop") -> Usable:
    """Chains of at least min_length residues that have N, CA and C; with overlong "drop", of at most max_length in all.

    StructTokenBench drops chains of more than 512 residues and has no minimum. ValueError: none is left.
    """
    if overlong not in OVERLONG:
        raise ValueError(f"overlong {overlong!r} is none of {', '.join(OVERLONG)}")
    short = structures.observed < min_length
    long = ~short & (structures.lengths > max_length) if overlong == "drop" else np.zeros_like(short)
    indices = np.flatnonzero(~(short | long))
    if not len(indices):
        raise ValueError(f"none of {len(structures)} chains is left: {short.sum()} have fewer than {min_length} "
                         f"residues with N, CA and C, {long.sum()} more than {max_length} residues")
    return Usable(indices, int(short.sum()), int(long.sum()))


def entry(name: str) -> str:
    """What a structure is a part or a form of, by its file's name without folders: an entry never straddles a split.

    The PDB id, in lower case, where the name begins with one: 1ABC_A, 1abc-assembly1, pdb1abc, pdb_00001abc, and
    domains of CATH (1abcA01) and SCOP (d1abca_). AF-P12345 for AlphaFold's AF-P12345-F2-model_v4. Else all up to the
    first "_": rather too much in one entry than one protein on both sides.
    """
    stem = name.rpartition("/")[2]
    lower = stem.lower()
    if lower.startswith("pdb_"):
        return lower[4:12].removeprefix("0000")
    if lower.startswith("af-"):
        return "-".join(stem.split("-")[:2])
    for prefix in ("", "pdb", "d"):
        code = lower.removeprefix(prefix)[:4]
        if lower.startswith(prefix) and len(code) == 4 and code.isalnum() and code[0].isdigit() and not code.isdigit():
            return code
    return stem.partition("_")[0]


def hold_out_entries(
    structures: StructureSet, indices: npt.NDArray[np.int64], fraction: float, seed: int,
    clusters: Sequence[str] | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Divide chains into training and held-out ones by entries: indices (n,) -> two arrays of them, ascending.

    fraction of the entries, at least one if it is not 0, is held out: those with the smallest hash of seed and entry.
    So who is held out depends on the names only, and few change sides when others join. Sequences may still be alike
    on both sides; clusters, the name of each chain's (see clusters.py), are held out instead of entries if given.

    Raises ValueError when nothing would be left to train on.
    """
    entries = {int(i): entry(structures.names[i]) if clusters is None else clusters[i] for i in indices}
    ranked = sorted(set(entries.values()), key=lambda e: hashlib.sha256(f"{seed}/{e}".encode()).digest())
    size = max(1, round(fraction * len(ranked))) if fraction else 0
    if size >= len(ranked):
        what = "entries" if clusters is None else "clusters"
        raise ValueError(f"cannot hold out {size} of {len(ranked)} {what} ({ranked[0]}, for one; names alike up to the "
                         'first "_" are one): one at least must remain for training. Validate on a folder of its own')
    chosen = set(ranked[:size])
    held_out = np.array([entries[int(i)] in chosen for i in indices], dtype=bool)
    return indices[~held_out], indices[held_out]


# ---------------------------------------------------------------------------------------------------------------------
# items and batches


class StructureDataset(Dataset):
    """Chains by (epoch, position), or by position alone, which is epoch 0.

    indices: of the chains in the set, positions count within them. max_length: residues; of longer chains a stretch of
    that length, whose place is a function of seed, epoch and index. clusters: groups of indices, see clusters.members;
    then positions count within these, and an epoch has one chain of each, drawn by seed, epoch and position.
    """

    def __init__(self, structures: StructureSet, indices: Sequence[int] | npt.NDArray[np.int64], *, max_length: int,
                 seed: int = 0, clusters: Sequence[npt.NDArray[np.int64]] | None = None):
        self.structures = structures
        self.indices = np.array(indices, dtype=np.int64)
        self.max_length = max_length
        self.seed = seed
        self.clusters = clusters
        if not len(self.indices):
            raise ValueError("the subset of chains is empty")
        if max_length < 1 or self.indices.min() < 0 or self.indices.max() >= len(structures):
            raise ValueError(f"max_length {max_length} must be positive, and indices [{self.indices.min()}, "
                             f"{self.indices.max()}] among the {len(structures)} chains")

    def __len__(self) -> int:
        return len(self.indices) if self.clusters is None else len(self.clusters)

    def index(self, epoch: int, position: int) -> int:
        """Which chain of the set an epoch has at a position."""
        if self.clusters is None:
            return int(self.indices[position])
        cluster = self.clusters[position]
        return int(cluster[fold(self.seed, epoch, position) % len(cluster)])

    def length(self, epoch: int, position: int) -> int:
        """Residues of that item."""
        return int(min(self.structures.offsets[(i := self.index(epoch, position)) + 1] - self.structures.offsets[i],
                       self.max_length))

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(n,) residues of each chain's item."""
        return np.minimum(self.structures.lengths[self.indices], self.max_length)

    @property
    def observed(self) -> npt.NDArray[np.float64]:
        """(n,) residues of each chain's item that have N, CA and C; of a stretch, what the chain's share suggests."""
        share = self.structures.observed[self.indices] / self.structures.lengths[self.indices]
        return np.asarray(share * self.lengths, dtype=np.float64)

    def __getitem__(self, key: tuple[int, int] | int) -> dict[str, Any]:
        """coords float32 (L, 3, 3) of N, CA, C, NaN where absent, about the centre of the CAs of whole residues;
        residue_index int64 (L,), sequence int64 (L,), index (in the set).

        Not turned at random: the encoder sees relative frames, the losses distances and products of vectors.
        """
        epoch, position = key if isinstance(key, tuple) else (0, key)
        index = self.index(epoch, position)
        length = int(self.structures.lengths[index])
        start = fold(self.seed, epoch, index) % (length - self.max_length + 1) if length > self.max_length else 0
        chain = self.structures.residues(index, start, min(length, start + self.max_length))
        coords = chain.coords[:, :3]
        whole = chain.mask
        centre = coords[whole, 1].mean(0, dtype=np.float64) if whole.any() else np.zeros(3)
        return {
            "coords": torch.from_numpy((coords - centre).astype(np.float32)),
            "residue_index": torch.from_numpy(chain.residue_index.astype(np.int64)),
            "sequence": torch.from_numpy(chain.sequence.astype(np.int64)),
            "index": index,
        }


def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Items -> coords float32 (B, L, 3, 3), residue_index and sequence int64 (B, L), mask bool (B, L): True = residue
    of the chain, with or without coordinates; index, length int64 (B,). Padded with NaN, 0 and losses.PADDING. places
    int64 (N,): of residues with coordinates among all B L.
    """
    length = torch.tensor([len(item["sequence"]) for item in items])
    batch, longest = len(items), int(length.max())
    padded = {
        "coords": torch.full((batch, longest, 3, 3), torch.nan),
        "residue_index": torch.zeros(batch, longest, dtype=torch.int64),
        "sequence": torch.full((batch, longest), PADDING, dtype=torch.int64),
    }
    for row, item in enumerate(items):
        for name, array in padded.items():
            array[row, : len(item[name])] = item[name]
    mask = torch.arange(longest) < length[:, None]
    return {**padded, "mask": mask, "index": torch.tensor([item["index"] for item in items]), "length": length,
            "places": residue_places(check_residues(padded["coords"], mask))}


class StructureBatchSampler(StepSampler):
    """StepSampler whose batches hold chains of similar lengths, so that little is padded.

    The stream of StepSampler is cut into windows of `window` global batches (no more than an epoch has). The chains of
    a window are sorted by length, cut into global batches, and those are shuffled. So each chain still occurs once per
    epoch (a window may reach into the next one), batches are a function of the step, and the rows of a step, in the
    order of their lengths, do not depend on world or micro_batches.

    lengths: (n,) residues of each sample. length_of: of (epoch, position) instead, where samples change with the
    epoch. Other arguments and errors: StepSampler.
    """

    def __init__(self, lengths: Sequence[int] | npt.NDArray[np.int64], global_batch: int, *, seed: int,
                 window: int = WINDOW, length_of: Callable[[int, int], int] | None = None, **options: Any):
        super().__init__(len(lengths), global_batch, seed=seed, **options)
        self.length_of = length_of
        if window < 1:
            raise ValueError(f"window {window} must be at least 1")
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.window = min(window, max(1, self.num_samples // global_batch))
        self._cached_window: tuple[int, list[tuple[int, int]]] | None = None

    def _sample(self, position: int) -> tuple[int, int]:
        number, offset = divmod(position, self.window * self.global_batch)
        if self._cached_window is None or self._cached_window[0] != number:
            self._cached_window = number, self._arranged(number)
        return self._cached_window[1][offset]

    def _arranged(self, number: int) -> list[tuple[int, int]]:
        """The samples of a window in the order in which they are used."""
        size = self.window * self.global_batch
        sample = super()._sample
        keys = [sample(position) for position in range(number * size, (number + 1) * size)]
        length_of = self.length_of or (lambda _, position: int(self.lengths[position]))
        keys.sort(key=lambda key: length_of(*key))  # stable: equal lengths stay shuffled
        batches = [keys[i : i + self.global_batch] for i in range(0, size, self.global_batch)]
        order = sorted(range(self.window), key=lambda batch: fold(self.seed, number, batch))
        return [key for batch in order for key in batches[batch]]
