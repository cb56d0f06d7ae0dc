"""Tasks on protein chains: what is predicted, for which chains, in which splits. Users' own come from a JSONL file:

    {"task": "interface", "kind": "binary"}
    {"id": "1ACB_r", "split": "train", "structure": "pdb/1ACB_r_u.pdb.gz", "residues": ["1", "2", "52A"],
     "labels": [0, 1, null]}

The first line names the task. kind: "binary" or "regression" (a label per residue) or "classification" (one per
chain). It may also have category (a heading of the table), modified_residues (default true), min_plddt and plddt_from
(see structure_io.read_structure; default: no residue is masked). Every other line is one example:

    id         unique within its split
    split      "train", "valid" or any other word: a test split, in the order of appearance
    structure  file, relative to the JSONL file's folder
    chain      id of the chain; may be left out when the file has one
    labels     binary: 0, 1; regression: numbers; null: unknown, neither trained on nor scored
    residues   what the labels belong to: the author's residue numbers with insertion codes; residues of the structure
               that are not listed have no label. May be left out when there is a label for every residue of the chain
    label      classification, instead of labels: a word or an integer. Only `residues`, if given, are looked at

StructTokenBench's tasks (Yuan et al., ICML 2025) come from its archive, see task_archives.py and released_tasks.py.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protein.atom_files import PLDDT_SOURCES
from protein.structure_io import Chain, read_structure
from tokenizer.runtime.config import parse_object
from tokenizer.runtime.files import atomic_write
from tokenizer.runtime.parsing import brief, parsing, read_text, require_file

KINDS = ("binary", "regression", "classification")
METRICS = {"binary": "AUROC", "regression": "Spearman's rho", "classification": "macro F1"}
FUNCTION, PHYSICS, STRUCTURE = "Functional site prediction", "Physicochemical property prediction", \
    "Structure property prediction"
MAX_LENGTH = 600   # residues that are looked at; StructTokenBench leaves out examples with more
MAX_CHAIN = 1024   # residues of the whole chain, which is what tokenizers see; the limit of ProTokens' model


@dataclass(frozen=True)
class TaskSpec:
    """name, kind of KINDS, category: heading in the table of results, tests: names of the test splits."""

    name: str
    kind: str
    category: str
    tests: tuple[str, ...]


_FOLD = ("Fold", "SupFam")
STRUCTTOKENBENCH = {spec.name: spec for spec in (
    *(TaskSpec(name, "binary", FUNCTION, ("Org",) if name == "BindShake" else _FOLD)
      for name in ("BindInt", "BindBio", "BindShake", "CatInt", "CatBio", "Con", "Rep", "Ept")),
    *(TaskSpec(name, "regression", PHYSICS, _FOLD) for name in ("FlexRMSF", "FlexBFactor", "FlexNEQ")),
    TaskSpec("Homo", "classification", STRUCTURE, ("Fold", "SupFam", "Fam")),
)}


@dataclass(frozen=True, eq=False)
class Example:
    """A chain and its labels, float32 (L,): NaN where there is none.

    Of "classification" the labels are the index of the class, once for every residue that is looked at.
    """

    id: str
    chain: Chain
    labels: npt.NDArray[np.float32]

    def __post_init__(self) -> None:
        assert self.labels.shape == (len(self.chain),), f"{self.id}: {self.labels.shape}, {len(self.chain)} residues"

    @property
    def labelled(self) -> npt.NDArray[np.bool_]:
        return ~np.isnan(self.labels)


@dataclass
class Task:
    """splits: "train", "valid" and those of spec.tests -> examples. classes: names of the labels 0, 1, ...

    left_out: reason -> number of examples that the source has and `splits` has not. origin: what it was read from.
    """

    spec: TaskSpec
    splits: dict[str, list[Example]]
    classes: tuple[str, ...] = ()
    left_out: Counter[str] = field(default_factory=Counter)
    origin: str = ""

    def filtered(self, max_length: int = MAX_LENGTH, max_chain: int = MAX_CHAIN) -> Task:
        """Without the examples that StructTokenBench leaves out for their length, and those without any label.

        ValueError: a split that has none left.
        """
        left_out = Counter(self.left_out)
        splits: dict[str, list[Example]] = {}
        for name, examples in self.splits.items():
            splits[name] = []
            for example in examples:
                length = int(example.labelled.sum()) if self.spec.kind == "classification" else len(example.chain)
                reason = ("no label" if not example.labelled.any() else
                          f"more than {max_length} residues" if length > max_length else
                          f"a chain of more than {max_chain} residues" if len(example.chain) > max_chain else "")
                if reason:
                    left_out[reason] += 1
                else:
                    splits[name].append(example)
        empty = [name for name, examples in splits.items() if not examples]
        if empty:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in left_out.items()) or "the source has none"
            raise ValueError(f"{self.spec.name}: no examples in {', '.join(empty)}; left out: {reasons}")
        return Task(self.spec, splits, self.classes, left_out, self.origin)


# ------------------------------------------------------------------------------------------------------- JSONL files

_READING = ("modified_residues", "min_plddt", "plddt_from")  # of a header: of structure_io.read_structure
_Row = tuple[str, dict[str, Any]]  # where it is, for messages, and what it holds


def task_identity(path: str | Path) -> str:
    """Differs between states of a JSONL file and of the structures that it names. Errors: as of read_task."""
    path = Path(path)
    require_file(path)  # a pipe would be waited for
    digest = hashlib.sha256(path.read_bytes())
    files: set[str] = set()
    for where, row in _read_rows(path)[2]:
        name = _string(where, row, "structure")
        if name not in files:
            files.add(name)
            # Contents, not sizes and times: PDB files of one protein are often equally long, and copying keeps times.
            digest.update(hashlib.sha256(_structure_file(where, path.parent / name).read_bytes()).digest())
    return digest.hexdigest()


def _structure_file(where: str, path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{where}: structure: no file {path}")
    return path


def _read_rows(path: Path) -> tuple[TaskSpec, dict[str, Any], list[_Row]]:
    """What is to be predicted, how structures are read, and the lines of the examples, of which only the split is
    checked.
    """
    lines = [(n, line) for n, line in enumerate(read_text(path).splitlines(), start=1) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: empty")
    header = parse_object(lines[0][1], f"{path}, line {lines[0][0]}")
    name, kind = _string(f"{path}, line {lines[0][0]}", header, "task"), header.get("kind")
    unknown = [key for key in header if key not in ("task", "kind", "category", *_READING)]
    if kind not in KINDS or unknown:
        wrong = f"unknown field {unknown[0][:100]}" if kind in KINDS else (
            f"kind: {brief(kind)} is none of {', '.join(KINDS)}")
        raise ValueError(f"{path}, line {lines[0][0]}: {wrong}")
    rows = [(f"{path}, line {n}", parse_object(line, f"{path}, line {n}")) for n, line in lines[1:]]
    reading = {key: header[key] for key in _READING if key in header}
    for key, good, rule in (
        ("modified_residues", lambda value: isinstance(value, bool), "is neither true nor false"),
        ("min_plddt", lambda value: type(value) in (int, float) and value >= 0, "is no number of at least 0"),
        ("plddt_from", lambda value: value in PLDDT_SOURCES, f"is none of {', '.join(PLDDT_SOURCES)}"),
    ):
        if key in reading and not good(reading[key]):
            raise ValueError(f"{path}, line {lines[0][0]}: {key}: {brief(reading[key])} {rule}")
    order = list(dict.fromkeys(_string(where, row, "split") for where, row in rows))
    tests = tuple(split for split in order if split not in ("train", "valid"))
    absent = [split for split in ("train", "valid") if split not in order]
    if absent or not tests:
        raise ValueError(f"{path}: no example of split {absent[0] if absent else 'test'}; a task needs train, valid "
                         "and at least one other")
    return TaskSpec(name, kind, str(header.get("category", "Own tasks")), tests), reading, rows


def read_task(path: str | Path) -> Task:
    """A task in the form above. ValueError, naming file, line and field, for anything that does not fit."""
    path = Path(path)
    spec, reading, rows = _read_rows(path)
    task = Task(spec, {split: [] for split in ("train", "valid", *spec.tests)}, origin=path.name)
    if spec.kind == "classification":
        task.classes = _classes(rows)
    files: dict[Path, list[Chain]] = {}
    seen: set[tuple[str, str]] = set()
    for where, row in rows:
        split, identifier = row["split"], _string(where, row, "id")
        if (split, identifier) in seen:
            raise ValueError(f"{where}: id: {brief(identifier)} is there twice in split {split}")
        seen.add((split, identifier))
        chain = _chain(where, row, path.parent, reading, files)
        task.splits[split].append(Example(identifier, chain, _labels(where, row, chain, spec, task.classes)))
    return task


def _string(where: str, row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where}: {name}: {brief(value)} is not a word")
    return value


def _classes(rows: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[str, ...]:
    """Names of the classes of the training split, sorted; integers by value."""
    names: dict[str, tuple[int, int, str]] = {}
    for where, row in rows:
        label = row.get("label")
        if isinstance(label, bool) or not isinstance(label, (str, int)):
            raise ValueError(f"{where}: label: {brief(label)} is neither a word nor an integer")
        if isinstance(label, int) and abs(label) >= 2**63:
            raise ValueError(f"{where}: label: {brief(label)} is no number of a class")
        if row["split"] == "train":
            names[str(label)] = (0, label, "") if isinstance(label, int) else (1, 0, label)
    return tuple(sorted(names, key=names.__getitem__))


def _chain(where: str, row: Mapping[str, Any], folder: Path, reading: Mapping[str, Any],
           files: dict[Path, list[Chain]]) -> Chain:
    path = folder / _string(where, row, "structure")
    if path not in files:
        _structure_file(where, path)
        try:
            files[path] = read_structure(path, **reading)
        except ValueError as error:
            raise ValueError(f"{where}: structure: {error}") from error
    found = {chain.chain_id: chain for chain in files[path]}
    wanted = row.get("chain")
    if wanted is None and len(found) == 1:
        return files[path][0]
    if not isinstance(wanted, str) or wanted not in found:
        raise ValueError(f"{where}: chain: {brief(wanted)}; {path} has {', '.join(map(repr, found))}")
    return found[wanted]


def residue_ids(chain: Chain) -> list[str]:
    """The author's numbers with insertion codes: "52A"."""
    return [f"{n}{code}" for n, code in zip(chain.residue_numbers.tolist(), chain.insertion_codes, strict=True)]


def align_ids(first: Sequence[str], second: Sequence[str]) -> npt.NDArray[np.int64]:
    """For each of the first the place of the same in the second, -1 for none; in ascending order if ids repeat."""
    if list(first) == list(second):
        return np.arange(len(first))
    if len(set(first)) == len(first) and len(set(second)) == len(second):
        places = {name: i for i, name in enumerate(second)}
        return np.array([places.get(name, -1) for name in first], dtype=np.int64)
    from biotite.sequence import Alphabet, GeneralSequence
    from biotite.sequence.align import SubstitutionMatrix, align_optimal

    alphabet = Alphabet(list(dict.fromkeys([*first, *second])))
    # Gaps cost nothing and two different ids a lot: the alignment is the longest common subsequence.
    scores = np.where(np.eye(len(alphabet), dtype=bool), 1, -1).astype(np.int32)
    sequences = [GeneralSequence(alphabet, list(ids)) for ids in (first, second)]
    matrix = SubstitutionMatrix(alphabet, alphabet, scores)
    places_of = np.full(len(first), -1, dtype=np.int64)
    for i, j in align_optimal(*sequences, matrix, gap_penalty=0, max_number=1)[0].trace:
        if i >= 0 and j >= 0 and first[i] == second[j]:
            places_of[i] = j
    return places_of


_MAX_LABEL = float(np.finfo(np.float32).max)


def _labels(
    where: str, row: Mapping[str, Any], chain: Chain, spec: TaskSpec, classes: tuple[str, ...]
) -> npt.NDArray[np.float32]:
    """float32 (L,), see Example."""
    out = np.full(len(chain), np.nan, dtype=np.float32)
    residues = row.get("residues")
    if residues is not None and not (isinstance(residues, list) and all(isinstance(r, str) for r in residues)):
        raise ValueError(f"{where}: residues: must be a list of words, the residue numbers")
    if spec.kind == "classification":
        if str(row["label"]) not in classes:
            raise ValueError(f"{where}: label: {brief(row['label'])} does not occur in the training split")
        places = np.arange(len(chain)) if residues is None else align_ids(residues, residue_ids(chain))
        out[places[places >= 0]] = classes.index(str(row["label"]))
        return out
    labels = row.get("labels")
    if not isinstance(labels, list):
        raise ValueError(f"{where}: labels: must be a list, got {type(labels).__name__}")
    expected = len(chain) if residues is None else len(residues)
    if len(labels) != expected:
        raise ValueError(f"{where}: labels: {len(labels)} for {expected} residues of "
                         f"{'the structure' if residues is None else 'the field residues'}")
    for i, label in enumerate(labels):
        good = not isinstance(label, bool) and isinstance(label, (int, float)) and abs(label) <= _MAX_LABEL
        if label is not None and not (good and (spec.kind == "regression" or label in (0, 1))):
            allowed = "a finite number" if spec.kind == "regression" else "0, 1"
            raise ValueError(f"{where}: labels[{i}]: {brief(label)} is neither {allowed} nor null")
    values = np.array([np.nan if label is None else label for label in labels], dtype=np.float32)
    if residues is None:
        return values
    places = align_ids(residues, residue_ids(chain))
    out[places[places >= 0]] = values[places >= 0]
    return out


# ------------------------------------------------------------------------------------------------- prepared tasks

_CHAIN_ARRAYS = {"coords": np.float32, "residue_numbers": np.int64, "bfactors": np.float32}


def save_prepared(task: Task, path: Path, source: str) -> None:
    """Write the task with its chains into one .npz, so that structures are parsed once. source: what it was made of."""
    examples = [(split, example) for split, found in task.splits.items() for example in found]
    chains = list({id(example.chain): example.chain for _, example in examples}.values())
    place = {id(chain): i for i, chain in enumerate(chains)}
    arrays: dict[str, Any] = {
        "description": json.dumps({"source": source, "spec": vars(task.spec), "classes": task.classes,
                                   "splits": list(task.splits), "left_out": task.left_out, "origin": task.origin}),
        "length": np.array([len(chain) for chain in chains]),
        "name": np.array([chain.name for chain in chains]),
        "chain_id": np.array([chain.chain_id for chain in chains]),
        "sequence": np.array("".join(chain.sequence for chain in chains)),
        "insertion_codes": np.array([code for chain in chains for code in chain.insertion_codes]),
        "id": np.array([example.id for _, example in examples]),
        "split": np.array([split for split, _ in examples]),
        "chain": np.array([place[id(example.chain)] for _, example in examples]),
        "labels": np.concatenate([example.labels for _, example in examples]),
    }
    arrays |= {name: np.concatenate([getattr(chain, name) for chain in chains]) for name in _CHAIN_ARRAYS}
    atomic_write(path, lambda file: np.savez(file, **arrays))


def load_prepared(path: Path, source: str) -> Task | None:
    """The task that save_prepared wrote. None: no such file, or made of something else."""
    if not path.exists():
        return None
    with parsing(path, "damaged, delete it to make it anew"), np.load(path) as file:
        description = json.loads(str(file["description"]))
        return _prepared(description, dict(file)) if description["source"] == source else None


def _prepared(description: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> Task:
    ends = np.cumsum(arrays["length"])
    sequence = str(arrays["sequence"])
    chains = []
    for i, end in enumerate(ends.tolist()):
        part = slice(end - int(arrays["length"][i]), end)
        chains.append(Chain(
            name=str(arrays["name"][i]), chain_id=str(arrays["chain_id"][i]), sequence=sequence[part],
            insertion_codes=tuple(arrays["insertion_codes"][part].tolist()),
            **{name: arrays[name][part] for name in _CHAIN_ARRAYS},
        ))
    spec = TaskSpec(**description["spec"] | {"tests": tuple(description["spec"]["tests"])})
    task = Task(spec, {split: [] for split in description["splits"]}, tuple(description["classes"]),
                Counter(description["left_out"]), description["origin"])
    start = 0
    for identifier, split, place in zip(*(arrays[key].tolist() for key in ("id", "split", "chain")), strict=True):
        chain = chains[place]
        example = Example(identifier, chain, arrays["labels"][start : start + len(chain)])
        task.splits[split].append(example)
        start += len(chain)
    return task
