"""How StructTokenBench splits its tasks: by CATH's folds and superfamilies.

released: its code's result, to the entry. Folds and superfamilies are the bare third and fourth number of CATH's
          code, so that unrelated folds share a label, and entries are drawn one by one, so that one chain may come to
          lie in training and in the test of superfamilies.
strict:   the same procedure on full codes (C.A.T, C.A.T.H), and a chain with all its entries stays together.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sklearn.model_selection import train_test_split

from tokenizer.runtime.parsing import brief, text_lines

SPLITS = ("train", "valid", "Fold", "SupFam")
_SEED = 42
_COLUMNS = 12  # of cath-domain-list.txt


class Domain(NamedTuple):
    """One domain of CATH. chain: PDB id and chain id, five letters; code: C, A, T, H."""

    chain: str
    code: tuple[int, int, int, int]
    sequence: str


class Label(NamedTuple):
    """Of the domain that stands for an entry. chain_id: its chain's."""

    code: tuple[int, int, int, int]
    chain_id: str

    def fold(self, mode: str) -> Hashable:
        return self.code[2] if mode == "released" else self.code[:3]

    def superfamily(self, mode: str) -> Hashable:
        return self.code[3] if mode == "released" else self.code


class Cath:
    """CATH 4.3 as the archive has it: folder/cath-classification-data and sequence-data.

    FileNotFoundError; ValueError naming file, line and field.
    """

    def __init__(self, folder: Path):
        sequences = _read_sequences(folder / "sequence-data" / "cath-domain-seqs.fa")
        self._by_chain: dict[str, list[Domain]] = {}
        self._by_entry: dict[str, list[Domain]] = {}
        path = folder / "cath-classification-data" / "cath-domain-list.txt"
        for where, line in text_lines(path):
            if line.startswith("#") or not line.strip():
                continue
            fields = line.split()
            if len(fields) != _COLUMNS or not all(re.fullmatch(r"[0-9]{1,9}", field) for field in fields[1:5]):
                raise ValueError(f"{where}: needs a domain, four numbers and {_COLUMNS - 5} more columns, got "
                                 f"{brief(line.strip())}")
            name, code = fields[0], (int(fields[1]), int(fields[2]), int(fields[3]), int(fields[4]))
            if name not in sequences:
                raise ValueError(f"{where}: domain {name[:40]} has no sequence in cath-domain-seqs.fa")
            domain = Domain(name[:5], code, sequences[name])
            self._by_chain.setdefault(name[:5], []).append(domain)
            self._by_entry.setdefault(name[:4], []).append(domain)

    def label(self, pdb_id: str, chain_id: str | None, sequence: str | None) -> Label | None:
        """Of the domain that is most like the sequence, among those of the chain, or of the entry if chain_id is None.

        Without a sequence: of the first domain, if all have one sequence. None: CATH has none, or none can be chosen.
        """
        found = self._by_entry.get(pdb_id, []) if chain_id is None else self._by_chain.get(pdb_id + chain_id, [])
        if not found:
            return None
        if sequence is None:
            chosen = found[0] if len({domain.sequence for domain in found}) == 1 else None
        else:
            chosen = _most_similar(sequence, found)
        return chosen and Label(chosen.code, chosen.chain[-1] if chain_id is None else chain_id)


def _read_sequences(path: Path) -> dict[str, str]:
    """Domain -> sequence, from lines ">cath|4_3_0|12asA00/4-330" and sequences of one line each."""
    found: dict[str, str] = {}
    name = ""
    for where, line in text_lines(path):
        line = line.strip()
        if line.startswith(">"):
            match = re.fullmatch(r">.*\|([^|/]+)/\S*", line)
            if not match:
                raise ValueError(f"{where}: {brief(line)} is no header >cath|VERSION|DOMAIN/RESIDUES")
            name = match[1]
        elif line:
            if not name:
                raise ValueError(f"{where}: a sequence without a header of its own")
            found[name], name = line, ""
    return found


def _most_similar(sequence: str, domains: Sequence[Domain]) -> Domain | None:
    """By biotite's distance of pairwise alignments (Feng and Doolittle). None: it is undefined for one of the pairs."""
    from biotite.sequence import ProteinSequence
    from biotite.sequence.align import SubstitutionMatrix, align_multiple

    sequences = [ProteinSequence(sequence), *(ProteinSequence(domain.sequence) for domain in domains)]
    try:
        distances = align_multiple(sequences, SubstitutionMatrix.std_protein_matrix())[3]
    except ValueError:  # a pair that is less alike than shuffled sequences
        return None
    return domains[int(distances[0, 1:].argmin())]


class Ratios(NamedTuple):
    """Fractions that leave training (of a fold's superfamilies, a superfamily's entries), and that validation takes."""

    fold: float = 0.4
    fold_valid: float = 0.2
    superfamily: float = 0.2
    superfamily_valid: float = 0.2


def split_entries(
    labels: Sequence[Label], chains: Sequence[str], ratios: Ratios, mode: str, source: str
) -> dict[str, list[int]]:
    """Split of SPLITS -> places of the entries. chains: the chain of every entry. ValueError: too few to split."""
    folds = [label.fold(mode) for label in labels]
    families = [label.superfamily(mode) for label in labels]
    units: Sequence[Hashable] = range(len(labels)) if mode == "released" else chains  # what stays together

    def count(members: Iterable[int]) -> int:
        return len({units[i] for i in members})

    def draw(members: Sequence[int], ratio: float) -> tuple[list[int], list[int]]:
        """Two parts of the members, the second with the fraction `ratio` of their units, rounded up."""
        by_unit: dict[Hashable, list[int]] = {}
        for i in members:
            by_unit.setdefault(units[i], []).append(i)
        first, second = ([i for unit in part for i in by_unit[unit]]
                         for part in train_test_split(list(by_unit), test_size=ratio, random_state=_SEED))
        return first, second

    train: list[int] = []
    fold_test: list[int] = []
    for fold in _distinct(folds, mode):
        members = [i for i, other in enumerate(folds) if other == fold]
        names = _distinct([families[i] for i in members], mode)
        held: set[Hashable] = set()
        if int(len(names) * ratios.fold):
            held.update(train_test_split(names, test_size=ratios.fold, random_state=_SEED)[1])
        train += [i for i in members if families[i] not in held]
        fold_test += [i for i in members if families[i] in held]
    kept: list[int] = []
    family_test: list[int] = []
    for family in _distinct([families[i] for i in train], mode):
        members = [i for i in train if families[i] == family]
        few = int(count(members) * ratios.superfamily) == 0
        rest, gone = (members, []) if few else draw(members, ratios.superfamily)
        kept += rest
        family_test += gone
    tests = (("folds", fold_test, ratios.fold_valid), ("superfamilies", family_test, ratios.superfamily_valid))
    for name, members, _ in tests:
        if count(members) < 2:
            raise ValueError(f"{source}: {len(members)} of {len(labels)} entries are in the test of {name}, too few to "
                             "take a validation set from")
    (fold_test, fold_valid), (family_test, family_valid) = (draw(members, ratio) for _, members, ratio in tests)
    return {"train": kept, "valid": fold_valid + family_valid, "Fold": fold_test, "SupFam": family_test}


def _distinct(values: Iterable[Any], mode: str) -> list[Any]:
    # The released splits follow the order in which Python's sets of integers give their members.
    return list(set(values)) if mode == "released" else sorted(set(values))
