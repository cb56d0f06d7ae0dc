"""StructTokenBench's tasks from the processed lists in its archive: its very entries, labels and splits, no PDB needed.

The lists, files without extension that begin with "processed_structured", are what StructTokenBench wrote after its
first pass over the raw files: pickles of dicts, with each chain as an object of the esm package. They are read as data
here (see inert_pickle.py), so neither that package is needed nor trust.

    functional/local/interpro/processed_structured_FIELD_SPLIT             binding_label, activesite_label,
                                                                           conservedsite_label, repeat_label
    functional/local/biolip2/processed_structured_FIELD_SPLIT              binding_label, catalytic_label
    functional/local/proteinshake_bindingsite/processed_structured_binding_site_SPLIT
    functional/local/proteinglue_epitoperegion/processed_structured_epitope_region_SPLIT
    physicochemical/atlas/processed_structured_SPLIT                       labels: analysis/ID/ID_per_residue_labels.csv
    structural/remote_homology/processed_structured_SPLIT

SPLIT is train, validation, fold_test, superfamily_test, or test (ProteinShake), or what TAPE calls it (homology).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from protein.benchmark import inert_pickle
from protein.benchmark.inert_pickle import Inert
from protein.benchmark.task_archives import ATLAS, HOMO_FOLDS, HOMO_SPLITS, Archive, Labels, atlas_entry
from protein.benchmark.tasks import MAX_CHAIN, STRUCTTOKENBENCH, Example, Task, align_ids
from protein.structure_io import Chain
from tokenizer.runtime.parsing import brief

ORIGIN = "StructTokenBench's processed lists"
# Of the chains that are left, places that its code drops because Biopython cannot parse them.
HOMO_DROPPED, HOMO_TRAINING = (11220, 11959), 12071
_ATOM37 = (0, 1, 2, 4, 3)  # places of N, CA, C, O, CB in esm's order N, CA, C, CB, O, ...


class _Source(NamedTuple):
    folder: str  # below the archive's data
    stem: str    # of the file names, before _SPLIT
    field: str   # of the labels


_LOCAL = "functional/local/"
_SOURCES = {
    **{name: _Source(f"{_LOCAL}interpro", f"processed_structured_{field}", field) for name, field in (
        ("BindInt", "binding_label"), ("CatInt", "activesite_label"), ("Con", "conservedsite_label"),
        ("Rep", "repeat_label"))},
    **{name: _Source(f"{_LOCAL}biolip2", f"processed_structured_{field}", field) for name, field in (
        ("BindBio", "binding_label"), ("CatBio", "catalytic_label"))},
    "BindShake": _Source(f"{_LOCAL}proteinshake_bindingsite", "processed_structured_binding_site", "binding_site"),
    "Ept": _Source(f"{_LOCAL}proteinglue_epitoperegion", "processed_structured_epitope_region", "epitope_label"),
    **{name: _Source("physicochemical/atlas", "processed_structured", "") for name in ATLAS},
    "Homo": _Source("structural/remote_homology", "processed_structured", "fold_label"),
}
_SPLITS = {"train": "train", "valid": "validation", "Fold": "fold_test", "SupFam": "superfamily_test", "Org": "test"}


def list_files(archive: Archive, name: str) -> dict[str, Path]:
    """Split -> its list, whether it exists or not."""
    source, names = _SOURCES[name], HOMO_SPLITS if name == "Homo" else _SPLITS
    splits = ("train", "valid", *STRUCTTOKENBENCH[name].tests)
    return {split: archive.data / source.folder / f"{source.stem}_{names[split]}" for split in splits}


def read_released(archive: Archive, name: str) -> Task:
    """The task `name` of tasks.STRUCTTOKENBENCH. FileNotFoundError; ValueError naming file, entry and field."""
    task = Task(STRUCTTOKENBENCH[name], {}, tuple(map(str, HOMO_FOLDS)) if name == "Homo" else (), origin=ORIGIN)
    read_labels = _reader(archive, name)
    for split, path in list_files(archive, name).items():
        rows = inert_pickle.load_file(path)
        if not isinstance(rows, list):
            raise ValueError(f"{path}: holds a {type(rows).__name__}, not a list")
        rows = [(f"{path}, entry {i}", row) for i, row in enumerate(rows)]
        examples = []
        chains: dict[tuple[str, str], Chain] = {}
        for where, row in _kept(rows, name, split):
            chain = _chain(where, row, chains)
            labels = read_labels(where, row, chain)
            if labels is None:
                task.left_out["a fold with few proteins"] += 1
            else:
                examples.append(Example(f"{chain.label} {where.rpartition(' ')[2]}", chain, labels))
        task.splits[split] = examples
    return task


def _kept(rows: list[tuple[str, Any]], name: str, split: str) -> list[tuple[str, dict[str, Any]]]:
    for where, row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("pdb_chain"), Inert):
            raise ValueError(f"{where}: pdb_chain: no object of a chain")
    if name == "Homo" and split == "train":
        short = [(where, row) for where, row in rows if len(_attribute(where, row, "sequence", str)) <= MAX_CHAIN]
        if len(short) == HOMO_TRAINING:
            return [row for i, row in enumerate(short) if i not in HOMO_DROPPED]
    return rows


def _attribute(where: str, row: Mapping[str, Any], name: str, kind: type) -> Any:
    try:
        value = row["pdb_chain"].get(name)
    except KeyError as error:
        raise ValueError(f"{where}: pdb_chain: no {name}") from error
    if not isinstance(value, kind):
        raise ValueError(f"{where}: pdb_chain: {name} is a {type(value).__name__}")
    return value


def _chain(where: str, row: Mapping[str, Any], known: dict[tuple[str, str], Chain]) -> Chain:
    """Of esm's ProteinChain. One object for the entries of one chain."""
    names = tuple(str(row.get(name)) for name in ("pdb_id", "chain_id"))
    sequence = _attribute(where, row, "sequence", str)
    numbers, codes, positions = (_attribute(where, row, name, np.ndarray) for name in (
        "residue_index", "insertion_code", "atom37_positions"))
    n = len(sequence)
    if numbers.shape != (n,) or codes.shape != (n,) or positions.shape != (n, 37, 3):
        raise ValueError(f"{where}: pdb_chain: {n} residues, but residue_index {numbers.shape}, insertion_code "
                         f"{codes.shape} and atom37_positions {positions.shape}")
    coords = np.ascontiguousarray(positions[:, _ATOM37], dtype=np.float32)
    other = known.get((names[0], names[1]))
    if other is not None and other.sequence == sequence and np.array_equal(other.coords, coords, equal_nan=True):
        return other
    chain = Chain(name=names[0], chain_id=names[1], sequence=sequence, coords=coords,
                  residue_numbers=numbers.astype(np.int64), insertion_codes=tuple(str(c).strip() for c in codes),
                  bfactors=np.full(n, np.nan, dtype=np.float32))
    known[names[0], names[1]] = chain
    return chain


_LabelReader = Callable[[str, Mapping[str, Any], Chain], Labels | None]  # None: the entry is left out


def _reader(archive: Archive, name: str) -> _LabelReader:
    field = _SOURCES[name].field

    def per_residue(where: str, row: Mapping[str, Any], chain: Chain) -> Labels | None:
        values = np.asarray(row.get(field), dtype=object)
        try:
            values = values.astype(np.float32)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {field}: no list of numbers") from error
        numbers = row.get("residue_index") if name == "BindShake" else chain.residue_numbers.tolist()
        if not isinstance(numbers, list) or values.shape != (len(numbers),) or not np.isin(values, (0, 1)).all():
            raise ValueError(f"{where}: {field}: needs a 0 or 1 for every residue, has shape {values.shape}")
        places = align_ids([str(n) for n in numbers], [str(n) for n in chain.residue_numbers.tolist()])
        out = np.full(len(chain), np.nan, dtype=np.float32)
        out[places[places >= 0]] = values[places >= 0]
        return out

    def simulated(where: str, row: Mapping[str, Any], chain: Chain) -> Labels | None:
        identifier = row.get("pdb_id_chain_id")
        if not isinstance(identifier, str):
            raise ValueError(f"{where}: pdb_id_chain_id: {brief(identifier)} is not a word")
        labels = atlas_entry(archive.data / _SOURCES[name].folder, identifier, name)[0].labels(chain)
        assert not isinstance(labels, str)
        return labels

    def domain(where: str, row: Mapping[str, Any], chain: Chain) -> Labels | None:
        fold, ranges = row.get("fold_label"), row.get("residue_range")
        if not isinstance(fold, (int, np.integer)) or not isinstance(ranges, list):
            raise ValueError(f"{where}: fold_label is {brief(fold)} and residue_range {brief(ranges)}; must be an "
                             "integer and a list")
        if int(fold) not in HOMO_FOLDS:
            return None
        inside = np.full(len(chain), ranges == [""])
        for text in [] if ranges == [""] else ranges:
            first, dash, last = str(text).partition("-")
            if not (dash and first.isdigit() and last.isdigit()):
                raise ValueError(f"{where}: residue_range: {brief(text)} is no range such as 5-100")
            inside |= (chain.residue_numbers >= int(first)) & (chain.residue_numbers <= int(last))
        return np.where(inside, HOMO_FOLDS.index(int(fold)), np.nan).astype(np.float32)

    return domain if name == "Homo" else simulated if name in ATLAS else per_residue
