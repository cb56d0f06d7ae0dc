"""Protein chains as arrays, in memory or in a folder that training maps.

    CACHE/manifest.json       format, numbers, fingerprint of the content, files that could not be read
    CACHE/names.json          names and ids of the n chains
    CACHE/offsets.npy         (n + 1,) int64: chain i has rows offsets[i] to offsets[i + 1] of
    CACHE/coords.npy          (residues, 5, 3) float32: N, CA, C, O, CB in Angstrom, NaN where absent
    CACHE/sequence.npy        (residues,) uint8: letters as losses.sequence_ids numbers them
    CACHE/residue_index.npy   (residues,) int32: see Chain.residue_index
    CACHE/bfactors.npy        (residues,) float32: see Chain; pLDDT of predictions
    CACHE/numbers.npy         (residues,) int64: the author's; absent in old caches, which count from residue_index
    CACHE/insertion_codes.npy (residues,) 4 bytes of UTF-8; likewise
    CACHE/observed.npy        (n,) int32: residues that have N, CA and C
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from protein.losses import sequence_ids, sequence_letters
from protein.structure_io import ATOMS, MAX_PLDDT, Chain, require_plddt
from tokenizer.runtime import config, lock
from tokenizer.runtime.files import atomic_write, atomic_write_json, atomic_write_text, located, sync_folder
from tokenizer.runtime.mapped import map_array

FORMAT = "provq-structures-1"
MANIFEST, NAMES, OFFSETS, OBSERVED = "manifest.json", "names.json", "offsets.npy", "observed.npy"
ROWS: dict[str, tuple[str, tuple[int, ...]]] = {  # one row per residue: name -> type and shape of a row
    "coords": ("<f4", (len(ATOMS), 3)), "sequence": ("|u1", ()), "residue_index": ("<i4", ()), "bfactors": ("<f4", ()),
}
# What names residues in token files and structures. Training reads none of it, and fingerprints leave it out.
_LABELS: dict[str, tuple[str, tuple[int, ...]]] = {"numbers": ("<i8", ()), "insertion_codes": ("|S4", ())}
_HEADER = 128  # bytes of an .npy header of any of these arrays


# ---------------------------------------------------------------------------------------------------------------------
# chains as arrays


class ChainArrays(NamedTuple):
    """One chain or a stretch of it, L residues: views of the set's arrays."""

    coords: npt.NDArray[Any]         # float32 (L, 5, 3), see structure_io.ATOMS; NaN where absent
    sequence: npt.NDArray[Any]       # uint8 (L,), see losses.sequence_ids
    residue_index: npt.NDArray[Any]  # int32 (L,), see Chain.residue_index
    bfactors: npt.NDArray[Any]       # float32 (L,), see Chain

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """bool (L,): N, CA and C are all there."""
        return np.asarray(np.isfinite(self.coords[:, :3]).all((1, 2)))


@dataclass(frozen=True, eq=False)
class StructureSet:
    """n chains, laid end to end. names: of their structures, see Chain.name; several chains may share one."""

    names: list[str]
    chain_ids: list[str]
    offsets: npt.NDArray[np.int64]   # (n + 1,)
    arrays: ChainArrays              # of all chains; memory-mapped if they come from a cache
    observed: npt.NDArray[np.int32]  # (n,) residues that have N, CA and C
    content: str                     # hash of the above
    labels: tuple[npt.NDArray[Any], ...] | None = None  # of all residues: numbers int64, insertion codes; None: unknown
    min_plddt: float | None = None   # residues with lower bfactors have no coordinates, see `masked`

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> ChainArrays:
        if not 0 <= i < len(self):
            raise IndexError(f"chain {i} of {len(self)}")
        return self.residues(i, 0, int(self.offsets[i + 1] - self.offsets[i]))

    def residues(self, i: int, start: int, stop: int) -> ChainArrays:
        """Residues [start, stop) of chain i, counted in its arrays."""
        first = int(self.offsets[i])
        found = ChainArrays(*(array[first + start : first + stop] for array in self.arrays))
        if self.min_plddt is None:
            return found
        low = ~(found.bfactors >= self.min_plddt)
        return found._replace(coords=np.where(low[:, None, None], np.float32(np.nan), found.coords))

    def chain(self, i: int) -> Chain:
        """Chain i as it was read. Of a cache without residue numbers they count along residue_index, from 1."""
        found, rows = self[i], slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        if self.labels is None:
            numbers, codes = found.residue_index.astype(np.int64) + 1, [""] * len(found.sequence)
        else:
            numbers = np.array(self.labels[0][rows])
            codes = [code.decode("utf-8", errors="replace") for code in self.labels[1][rows].tolist()]
        return Chain(self.names[i], self.chain_ids[i], sequence_letters(found.sequence), np.array(found.coords),
                     numbers, tuple(codes), np.array(found.bfactors))

    def masked(self, min_plddt: float | None) -> StructureSet:
        """The set without the coordinates of residues whose pLDDT, in bfactors, is below min_plddt or unknown.

        ValueError: no residue is left, or a value that is no pLDDT.
        """
        if min_plddt is None:
            return self
        values = self.arrays.bfactors
        if len(high := np.flatnonzero(values > MAX_PLDDT)):
            i = int(np.searchsorted(self.offsets, high[0], side="right")) - 1
            require_plddt(f"{self.names[i]}_{self.chain_ids[i]}", values[self.offsets[i] : self.offsets[i + 1]])
        observed = np.zeros(len(self), dtype=np.int32)
        limited = replace(self, min_plddt=min_plddt)
        for i in range(len(self)):
            observed[i] = limited[i].mask.sum()
        if not observed.any():
            highest = float(np.nanmax(self.arrays.bfactors, initial=-np.inf))
            raise ValueError(f"no residue has a pLDDT of at least {min_plddt:g}; the highest B-factor is {highest:g}")
        content = hashlib.sha256(f"{self.content} {min_plddt!r}".encode()).hexdigest()
        return replace(limited, observed=observed, content=content)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(n,) residues of each chain, with or without coordinates."""
        return np.diff(self.offsets)

    def fingerprint(self) -> str:
        """64 hex digits of the content; a cache has the same as the folder that it was made from."""
        return self.content


def _labels(chain: Chain) -> tuple[npt.NDArray[Any], ...]:
    return (chain.residue_numbers.astype("<i8"),
            np.array([code.encode()[:4] for code in chain.insertion_codes], dtype="|S4"))


def _arrays(chain: Chain) -> ChainArrays:
    return ChainArrays(
        np.ascontiguousarray(chain.coords, dtype="<f4"),
        sequence_ids(chain.sequence).numpy().astype(np.uint8),
        chain.residue_index().astype("<i4"),
        np.ascontiguousarray(chain.bfactors, dtype="<f4"),
    )


class _Hash:
    """Of chains in their order; the same whether they lie in memory or go to a file one by one."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def add(self, chain: Chain, arrays: ChainArrays) -> None:
        self._sha256.update(json.dumps([chain.name, chain.chain_id, len(chain)]).encode())
        for array in arrays:
            self._sha256.update(array.tobytes())

    def result(self) -> str:
        return self._sha256.hexdigest()


def structure_set(chains: Iterable[Chain]) -> StructureSet:
    """Chains in memory -> a set. ValueError: no chain."""
    names, chain_ids, parts, labels, content = [], [], [], [], _Hash()
    for chain in chains:
        names.append(chain.name)
        chain_ids.append(chain.chain_id)
        parts.append(_arrays(chain))
        labels.append(_labels(chain))
        content.add(chain, parts[-1])
    if not parts:
        raise ValueError("no chains")
    offsets = np.cumsum([0, *(len(part.sequence) for part in parts)])
    arrays = ChainArrays(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))
    observed = np.array([part.mask.sum() for part in parts], dtype=np.int32)
    return StructureSet(names, chain_ids, offsets, arrays, observed, content.result(),
                        tuple(np.concatenate(columns) for columns in zip(*labels, strict=True)))


def write_cache(folder: str | Path, chains: Iterable[Chain], description: Mapping[str, Any]) -> StructureSet:
    """Write chains to a new folder, one by one, and open it. The folder appears when it is complete.

    description: what else the manifest should say; read when the chains are through.
    ValueError: the folder exists, another process is writing it, or there are no chains. OSError names the folder.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists already; name a new folder")
    temporary = folder.with_name(f".{folder.name}.tmp")
    lock.own(temporary, f"{folder}: its unfinished folder")
    try:
        with located(folder):
            _write_arrays(temporary, chains, description)
            os.rename(temporary, folder)  # fails where another process has finished one in the meantime
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        lock.release(temporary)
    sync_folder(folder.parent)
    return read_cache(folder)


def _write_arrays(folder: Path, chains: Iterable[Chain], description: Mapping[str, Any]) -> None:
    for left in folder.iterdir():  # by a process that was killed
        if left.name != lock.LOCK_FILE:
            left.unlink()
    names, chain_ids, offsets, observed, content = [], [], [0], [], _Hash()
    with ExitStack() as stack:
        columns = ROWS | _LABELS
        files = [stack.enter_context(open(folder / f"{name}.npy", "wb")) for name in columns]
        for file in files:
            file.write(bytes(_HEADER))
        for chain in chains:
            arrays = _arrays(chain)
            for file, array in zip(files, (*arrays, *_labels(chain)), strict=True):
                file.write(array.tobytes())
            content.add(chain, arrays)
            names.append(chain.name)
            chain_ids.append(chain.chain_id)
            offsets.append(offsets[-1] + len(chain))
            observed.append(arrays.mask.sum())
        if not names:
            raise ValueError("no chains")
        for file, (kind, row) in zip(files, columns.values(), strict=True):
            file.seek(0)
            np.lib.format.write_array_header_1_0(
                file, {"descr": kind, "fortran_order": False, "shape": (offsets[-1], *row)})
            assert file.tell() == _HEADER, (kind, file.tell())
            file.flush()
            os.fsync(file.fileno())
    atomic_write(folder / OFFSETS, lambda file: np.save(file, np.array(offsets, dtype=np.int64)))
    atomic_write(folder / OBSERVED, lambda file: np.save(file, np.array(observed, dtype=np.int32)))
    atomic_write_text(folder / NAMES, json.dumps({"names": names, "chain_ids": chain_ids}))
    manifest = {"format": FORMAT, "chains": len(names), "residues": offsets[-1], "fingerprint": content.result()}
    atomic_write_json(folder / MANIFEST, {**manifest, **description})


def read_cache(folder: Path) -> StructureSet:
    """Open what `write_cache` wrote. ValueError: names the file that is absent, cut short or of another kind."""
    again = "run protein/prepare_structures.py again"
    manifest = config.load(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{folder / MANIFEST} has format {manifest.get('format')!r}, expected {FORMAT!r}; {again}")
    chains, residues, content = (manifest.get(key) for key in ("chains", "residues", "fingerprint"))
    if not (isinstance(chains, int) and isinstance(residues, int) and isinstance(content, str)):
        raise ValueError(f"{folder / MANIFEST} lacks chains, residues or fingerprint; {again}")
    offsets = map_array(folder / OFFSETS, (chains + 1,), "<i8", again)
    if offsets[0] != 0 or offsets[-1] != residues or (np.diff(offsets) < 1).any():
        raise ValueError(f"{folder / OFFSETS} does not divide {residues} residues into {chains} chains; {again}")
    names = config.load(folder / NAMES)
    listed = [names.get(key) for key in ("names", "chain_ids")]
    if not all(isinstance(texts, list) and len(texts) == chains and all(isinstance(text, str) for text in texts)
               for texts in listed):
        raise ValueError(f"{folder / NAMES} does not have the names of {chains} chains; {again}")
    arrays = ChainArrays(*(map_array(folder / f"{name}.npy", (residues, *row), kind, again)
                           for name, (kind, row) in ROWS.items()))
    observed = map_array(folder / OBSERVED, (chains,), "<i4", again)
    labels = None
    if all((folder / f"{name}.npy").exists() for name in _LABELS):
        labels = tuple(map_array(folder / f"{name}.npy", (residues, *row), kind, again)
                       for name, (kind, row) in _LABELS.items())
    return StructureSet(names["names"], names["chain_ids"], offsets, arrays, observed, content, labels)
