"""Clusters of chains, as foldseek and mmseqs write them: who is alike, so that splits and samples can respect it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from protein.structure_cache import StructureSet
from protein.structure_sources import is_structure
from tokenizer.runtime.parsing import read_text

_EXTENSION = re.compile(r"\.(pdb1?|ent|cif|mmcif|bcif)(\.gz)?(?=_|$)", re.IGNORECASE)


class Clusters(NamedTuple):
    """names: of each chain of the set its cluster's, and of a chain that the file does not list its own.

    unlisted: chains that the file does not list.
    """

    names: list[str]
    unlisted: int


def read_clusters(path: str | Path, structures: StructureSet) -> Clusters:
    """A text file of two columns, chain and cluster, in any order of the two: `PREFIX_cluster.tsv` of foldseek and
    mmseqs (representative, member) is read as it is.

    Chains are NAME_CHAIN or NAME, without folders, and may have a file's extension, as foldseek's have. Of the two
    columns the chains are the one that names more of the set's.

    FileNotFoundError. ValueError naming file and line: not two columns, a chain in two clusters, none of the chains.
    """
    path = Path(path)
    rows: list[tuple[int, str, str]] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        words = line.split("\t") if "\t" in line else line.split()
        if not line.strip() or line.startswith("#"):
            continue
        if len(words) != 2:
            raise ValueError(f"{path}, line {number}: {len(words)} columns; a line is a chain and its cluster")
        rows.append((number, words[0].strip(), words[1].strip()))
    labels = [_spellings(name, chain_id) for name, chain_id in zip(structures.names, structures.chain_ids, strict=True)]
    known = {spelling for spellings in labels for spelling in spellings}
    found = [len({_bare(row[column]) for row in rows} & known) for column in (1, 2)]
    if not max(found):
        raise ValueError(f"{path}: none of its {len(rows)} lines names a chain of the structures, such as "
                         f"{labels[0][0]}")
    chain, cluster = (1, 2) if found[0] > found[1] else (2, 1)
    of: dict[str, str] = {}
    for row in rows:
        name, group = _bare(str(row[chain])), str(row[cluster])
        if of.setdefault(name, group) != group:
            raise ValueError(f"{path}, line {row[0]}: {name} is in cluster {group}, and above in {of[name]}")
    names: list[str] = []
    unlisted = 0
    for spellings in labels:
        listed = next((of[spelling] for spelling in spellings if spelling in of), None)
        unlisted += listed is None
        names.append(f"alone:{spellings[0]}" if listed is None else f"listed:{listed}")
    return Clusters(names, unlisted)


def _bare(name: object) -> str:
    """A chain as a program names it, without folders and a file's extension: x/1abc.cif.gz_A is 1abc_A."""
    return _EXTENSION.sub("", str(name).rpartition("/")[2])


def _spellings(name: str, chain_id: str) -> list[str]:
    stem = name.rpartition("/")[2]
    stem = _EXTENSION.sub("", stem) if is_structure(stem) else stem
    return [f"{stem}_{chain_id}", stem] if chain_id else [stem]


def members(names: Sequence[str], indices: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """The indices of each cluster that occurs among them, in the order of its first."""
    found: dict[str, list[int]] = {}
    for i in indices.tolist():
        found.setdefault(names[i], []).append(i)
    return [np.array(rows, dtype=np.int64) for rows in found.values()]
