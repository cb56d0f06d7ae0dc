"""StructTokenBench's tasks from the raw files of its archive, as users download and unpack it.

    --data struct_token_bench_release_data, its folder data:
      CATH/cath-classification-data/cath-domain-list.txt, CATH/sequence-data/cath-domain-seqs.fa
      functional/local/interpro/{InterPro_parsed_r7_nofilter.tsv, pdbtosp.txt}            BindInt, CatInt, Con, Rep
      functional/local/biolip2/BioLiP_updated_set/BioLiP_nr.txt                           BindBio, CatBio
      functional/local/proteinshake_bindingsite/ProteinLigandInterfaceDataset.residue.*   BindShake (avro or json, .gz)
      functional/local/proteinglue_epitoperegion/{Dset48.csv, HM_479_testing.csv}         Ept
      physicochemical/atlas/{2022_06_13_ATLAS_pdb.txt, analysis/ID/ID.pdb, ...}           Flex*
      structural/remote_homology/{remote_homology_SPLIT.lmdb or .json, dir.cla.scop.1.75.txt}    Homo
    --pdb-data pdb_data/mmcif_files:
      mmcif_files/1abc.cif, obsolete.dat                                                  all but Flex*

Entries, their order, filters, alignment and splits follow StructTokenBench's code. Three things differ. The order of
Ept's proteins depends on Python's hash seed there, and with it the split; here it is the files'. Two training domains
of Homo that Biopython cannot parse stay in. Ranges of SCOP may begin below zero.
"""

from __future__ import annotations

import multiprocessing
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from protein.benchmark.archive_files import (
    column,
    parse_biolip_residues,
    parse_scop_residues,
    part,
    read_atlas,
    read_biolip,
    read_obsolete,
    read_pdbtosp,
    read_proteinshake,
    read_scop,
    read_table,
    read_tape,
)
from protein.benchmark.task_splits import SPLITS, Cath, Label, Ratios, split_entries
from protein.benchmark.tasks import STRUCTTOKENBENCH, Example, Task
from protein.structure_io import Chain, read_structure
from tokenizer.runtime.parsing import brief, text_lines

INTERPRO = {"BindInt": "Binding_site", "CatInt": "Active_site", "Con": "Conserved_site", "Rep": "Repeat"}
BIOLIP = {"BindBio": ("binding residues", 7), "CatBio": ("catalytic residues", 9)}       # column of BioLiP_nr.txt
ATLAS = {"FlexRMSF": ("RMSF", 1.0), "FlexBFactor": ("Bfactor", 0.01), "FlexNEQ": ("Neq", 0.1)}  # column, factor
PROTEINSHAKE_SPLITS = {"train": "train", "val": "valid", "test": "Org"}
HOMO_SPLITS = {"train": "train", "valid": "valid", "Fold": "test_fold_holdout", "SupFam": "test_superfamily_holdout",
               "Fam": "test_family_holdout"}
# The folds of TAPE that have 50 training proteins, of 1195.
HOMO_FOLDS = (0, 3, 13, 14, 18, 21, 22, 26, 36, 39, 42, 45, 47, 49, 51, 52, 56, 59, 60, 61, 70, 73, 77, 78, 81, 84, 88,
              90, 91, 95, 97, 113, 124, 126, 132, 133, 135, 143, 153, 176, 178, 179, 180, 246, 295)
RARE_LIGAND = 5       # a ligand of BioLiP with fewer entries is left out
MAX_DEVIATION = 1e-3  # Angstrom between ProteinShake's CA and the structure's
NOT_IN_CATH = "not in CATH, or not clearly one of its domains"

Labels = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Archive:
    """data: the folder with CATH, functional, ...; pdb: the folder with mmcif_files and obsolete.dat, or None."""

    data: Path
    pdb: Path | None

    @classmethod
    def open(cls, data: str | Path, pdb: str | Path | None) -> Archive:
        """data: struct_token_bench_release_data or the folder data in it. FileNotFoundError: something else."""
        root = Path(data) / "data" if (Path(data) / "data").is_dir() else Path(data)
        if not any((root / name).is_dir() for name in ("functional", "physicochemical", "structural", "sensitivity")):
            raise FileNotFoundError(f"--data {data}: no folder functional, physicochemical, structural or sensitivity")
        if pdb is not None and not (Path(pdb) / "mmcif_files").is_dir():
            raise FileNotFoundError(f"--pdb-data {pdb}: no folder mmcif_files")
        return cls(root, None if pdb is None else Path(pdb))

    @property
    def local(self) -> Path:
        return self.data / "functional" / "local"

    @property
    def homology(self) -> Path:
        return self.data / "structural" / "remote_homology"

    @property
    def mirror(self) -> Path:
        """ValueError: no --pdb-data."""
        if self.pdb is None:
            raise ValueError("this needs structures of the PDB: give --pdb-data, the folder that holds mmcif_files")
        return self.pdb

    def structure(self, pdb_id: str) -> Path:
        """ValueError: no --pdb-data."""
        return self.mirror / "mmcif_files" / f"{pdb_id}.cif"

    def cath(self) -> Cath:
        return Cath(self.data / "CATH")


@dataclass(frozen=True)
class Entry:
    """An annotated chain whose structure has not been read. chain_id None: the file's first chain.

    labels: chain -> float32 (L,), or the reason why the entry is left out.
    """

    id: str
    path: Path
    chain_id: str | None
    labels: Callable[[Chain], Labels | str]


def read_raw(archive: Archive, name: str, mode: str = "released", num_workers: int = 0) -> Task:
    """The task `name` of tasks.STRUCTTOKENBENCH. mode: of task_splits.MODES. num_workers: processes to read structures.

    FileNotFoundError; ValueError naming file, line or entry, and field; ImportError for an absent package.
    """
    task = Task(STRUCTTOKENBENCH[name], {}, tuple(map(str, HOMO_FOLDS)) if name == "Homo" else (),
                origin="StructTokenBench's raw files" + ("" if mode == "released" else f", {mode} splits"))
    if name == "BindShake":
        splits = _proteinshake(archive)
    elif name == "Homo":
        splits = _homology(archive, task.left_out)
    else:
        found, source, ratios = _annotated(archive, name, task.left_out)
        places = split_entries([a.label for a in found], [a.chain for a in found], ratios, mode, str(source))
        splits = {split: [found[i].entry for i in places[split]] for split in SPLITS}
    chains = read_chains([(e.path, e.chain_id) for entries in splits.values() for e in entries], num_workers)
    for split, entries in splits.items():
        task.splits[split] = []
        for entry in entries:
            chain = chains[entry.path, entry.chain_id]
            labels = chain if isinstance(chain, str) else entry.labels(chain)
            if isinstance(chain, str) or isinstance(labels, str):
                task.left_out[str(labels)] += 1
            else:
                task.splits[split].append(Example(entry.id, chain, labels))
    return task


# --------------------------------------------------------------------------------------------------------- structures

Wanted = tuple[Path, str | None]


def read_chains(wanted: Iterable[Wanted], num_workers: int = 0) -> dict[Wanted, Chain | str]:
    """Chains without HETATM, as StructTokenBench reads them; instead of one that cannot be had, why."""
    files: dict[Path, list[str | None]] = {}
    for path, chain_id in dict.fromkeys(wanted):
        files.setdefault(path, []).append(chain_id)
    if num_workers:
        with multiprocessing.get_context("spawn").Pool(num_workers) as pool:
            parts = pool.map(_read_file, files.items(), chunksize=8)
    else:
        parts = [_read_file(item) for item in files.items()]
    return {(path, name): chain for path, found in zip(files, parts, strict=True) for name, chain in found.items()}


def _read_file(item: tuple[Path, list[str | None]]) -> dict[str | None, Chain | str]:
    path, wanted = item
    if not path.exists():
        return dict.fromkeys(wanted, "no structure file")
    try:
        chains = read_structure(path, modified_residues=False)
    except ValueError:
        return dict.fromkeys(wanted, "a structure file without readable chains")
    found: dict[str | None, Chain | str] = {None: chains[0]}
    found |= {chain.chain_id: chain for chain in chains}
    for chain_id in wanted:
        if chain_id is not None and chain_id not in found:  # perhaps mmCIF's own id of the chain
            try:
                found[chain_id] = read_structure(path, chains=[chain_id], modified_residues=False)[0]
            except ValueError:
                found[chain_id] = "no such chain in the structure"
    return {chain_id: found[chain_id] for chain_id in wanted}


# ------------------------------------------------------------------------------------------------ tasks split by CATH

@dataclass(frozen=True)
class _Annotated:
    """An entry, and what decides on its split. chain: PDB id and chain id."""

    entry: Entry
    label: Label
    chain: str


_Found = tuple[list[_Annotated], Path, Ratios]  # source: what messages call it


def _annotated(archive: Archive, name: str, left_out: Counter[str]) -> _Found:
    if name in INTERPRO:
        return _interpro(archive, name, left_out)
    if name in BIOLIP:
        return _biolip(archive, name, left_out)
    return _epitopes(archive, left_out) if name == "Ept" else _atlas(archive, name, left_out)


def _interpro(archive: Archive, name: str, left_out: Counter[str]) -> _Found:
    """Sites and repeats in UniProt's numbering, looked for among the author's residue numbers of a PDB entry."""
    folder, cath = archive.local / "interpro", archive.cath()
    structures = read_pdbtosp(folder / "pdbtosp.txt")
    path = folder / "InterPro_parsed_r7_nofilter.tsv"
    found = []
    for where, row in read_table(path, ("uniprot_id", "ipr_id", "ipr_type", "residue_fragments"), delimiter="\t"):
        if row["ipr_type"] != INTERPRO[name]:
            continue
        match = re.match(r"(\d+)-(\d+)", row["residue_fragments"])  # "10-25-S": of several fragments the first
        if not match:
            raise ValueError(f"{where}: residue_fragments: {brief(row['residue_fragments'])} is no range such as "
                             "10-25-S")
        first, last = int(match[1]), int(match[2])
        for pdb_id in structures.get(row["uniprot_id"], []):
            label = cath.label(pdb_id, None, None)
            if label is None:
                left_out[NOT_IN_CATH] += 1
                continue
            identifier = f"{pdb_id}_{label.chain_id} {row['ipr_id']} {row['uniprot_id']} {first}-{last}"
            entry = Entry(identifier, archive.structure(pdb_id), label.chain_id, _range_labels(first, last))
            found.append(_Annotated(entry, label, pdb_id + label.chain_id))
    return found, path, Ratios()


def _range_labels(first: int, last: int) -> Callable[[Chain], Labels | str]:
    def labels(chain: Chain) -> Labels | str:
        inside = (chain.residue_numbers >= first) & (chain.residue_numbers <= last)
        return inside.astype(np.float32) if inside.any() else "no annotated residue in the structure"
    return labels


def _biolip(archive: Archive, name: str, left_out: Counter[str]) -> _Found:
    """Residues that bind a ligand, or catalyse."""
    field, place = BIOLIP[name]
    path = archive.local / "biolip2" / "BioLiP_updated_set" / "BioLiP_nr.txt"
    cath = archive.cath()
    rows = []
    for where, columns in read_biolip(path):
        label = cath.label(columns[0], columns[1], columns[20])
        if label is None:
            left_out[NOT_IN_CATH] += 1
        else:
            rows.append((where, columns, label))
    ligands = Counter(columns[4] for _, columns, _ in rows)
    found = []
    for where, columns, label in rows:
        if ligands[columns[4]] < RARE_LIGAND or columns[place] in ("", "?"):
            left_out[f"no {field}" if ligands[columns[4]] >= RARE_LIGAND else "a rare ligand"] += 1
            continue
        pdb_id, chain_id = columns[0], columns[1]
        labels = _residue_labels(parse_biolip_residues(columns[place], f"{where}: {field}"))
        identifier = f"{pdb_id}_{chain_id} {columns[4]} {columns[5]} {columns[6]}"
        entry = Entry(identifier, archive.structure(pdb_id), chain_id, labels)
        found.append(_Annotated(entry, label, pdb_id + chain_id))
    return found, path, Ratios()


def _residue_labels(residues: Sequence[tuple[str, int]]) -> Callable[[Chain], Labels | str]:
    """1 at the residue numbers, insertion codes aside; of several with one number, at the first with the letter."""
    def labels(chain: Chain) -> Labels | str:
        out = np.zeros(len(chain), dtype=np.float32)
        for letter, number in residues:
            places = np.flatnonzero(chain.residue_numbers == number).tolist()
            if len(places) > 1:
                places = [i for i in places if chain.sequence[i] == letter][:1]
                if not places:
                    return "an annotated residue is another one in the structure"
            out[places] = 1
        return out
    return labels


def _epitopes(archive: Archive, left_out: Counter[str]) -> _Found:
    """Residues of antigens that an antibody touches."""
    folder, cath = archive.local / "proteinglue_epitoperegion", archive.cath()
    found = []
    for path in (folder / "Dset48.csv", folder / "HM_479_testing.csv"):
        proteins: dict[str, list[tuple[str, float]]] = {}
        for where, row in read_table(path, ("name", "AliSeq", "Interface")):
            if row["Interface"] not in ("0", "1") or not re.fullmatch("[A-Za-z]", row["AliSeq"]):
                raise ValueError(f"{where}: AliSeq {brief(row['AliSeq'])} must be a letter and Interface "
                                 f"{brief(row['Interface'])} 0 or 1")
            proteins.setdefault(row["name"], []).append((row["AliSeq"].upper(), float(row["Interface"])))
        for name, residues in proteins.items():
            pdb_id, _, chain = name[2:].partition("_") if name.startswith("H_") else name.partition("_")
            if not name.startswith("H_") and len(chain) != 1:
                left_out["an antigen of several chains"] += 1
                continue
            sequence = "".join(letter for letter, _ in residues)
            label = cath.label(pdb_id.lower(), chain or None, sequence)
            if label is None:
                left_out[NOT_IN_CATH] += 1
                continue
            labels = _aligned_labels(sequence, [value for _, value in residues])
            identifier = f"{pdb_id.lower()}_{label.chain_id}"
            entry = Entry(identifier, archive.structure(pdb_id.lower()), label.chain_id, labels)
            found.append(_Annotated(entry, label, identifier))
    return found, folder, Ratios(0.5, 0.2, 0.4, 0.4)


def _aligned_labels(sequence: str, values: Sequence[float]) -> Callable[[Chain], Labels | str]:
    """By global alignment to the structure's sequence. Residues without a partner count as no epitope."""
    def labels(chain: Chain) -> Labels | str:
        from biotite.sequence import ProteinSequence
        from biotite.sequence.align import SubstitutionMatrix, align_optimal

        out = np.zeros(len(chain), dtype=np.float32)
        pair = (ProteinSequence(sequence), ProteinSequence(chain.sequence))
        for i, j in align_optimal(*pair, SubstitutionMatrix.std_protein_matrix())[0].trace:
            if i >= 0 and j >= 0:
                out[j] = values[i]
        return out
    return labels


def _atlas(archive: Archive, name: str, left_out: Counter[str]) -> _Found:
    """Flexibility in molecular dynamics simulations."""
    folder, cath = archive.data / "physicochemical" / "atlas", archive.cath()
    path = folder / "2022_06_13_ATLAS_pdb.txt"
    found = []
    for where, line in text_lines(path):
        match = re.fullmatch(r"(\w{4})_(\w)", line.strip())
        if not match:
            raise ValueError(f"{where}: {brief(line)} is no chain such as 1abc_A")
        entry, sequence = atlas_entry(folder, match[0], name)
        label = cath.label(match[1], match[2], sequence)
        if label is None:
            left_out[NOT_IN_CATH] += 1
        else:
            found.append(_Annotated(entry, label, match[0]))
    return found, path, Ratios()


def atlas_entry(folder: Path, identifier: str, name: str) -> tuple[Entry, str]:
    """A chain of ATLAS, such as 1abc_A, with the labels of task `name`, and its sequence."""
    field, factor = ATLAS[name]
    place = folder / "analysis" / identifier
    table, structure = place / f"{identifier}_per_residue_labels.csv", place / f"{identifier}.pdb"
    sequence, values = read_atlas(table, field)

    def labels(chain: Chain) -> Labels | str:
        if chain.sequence != sequence:
            raise ValueError(f"{table}: seq: its {len(sequence)} letters are not those of the {len(chain)} residues in "
                             f"{structure.name}")
        return values * np.float32(factor)
    return Entry(identifier, structure, None, labels), sequence


# ------------------------------------------------------------------------------------ tasks that come with their splits

def _proteinshake(archive: Archive) -> dict[str, list[Entry]]:
    """Residues near the ligand of a PDBbind complex, split by structural similarity; single chains only."""
    out: dict[str, list[Entry]] = {split: [] for split in PROTEINSHAKE_SPLITS.values()}
    for where, row in read_proteinshake(archive.local / "proteinshake_bindingsite"):
        protein, residue = part(where, row, "protein"), part(where, row, "residue")
        pdb_id, split = protein.get("ID"), protein.get("structure_split_0.7")
        if not isinstance(pdb_id, str) or split not in PROTEINSHAKE_SPLITS:
            raise ValueError(f"{where}: protein: ID is {brief(pdb_id)}, which must be a word, and structure_split_0.7 "
                             f"{brief(split)}, which must be one of {', '.join(PROTEINSHAKE_SPLITS)}")
        words = {name: column(where, residue, name, str) for name in ("residue_type", "chain_id")}
        numbers = {name: column(where, residue, name, float) for name in ("x", "y", "z", "binding_site")}
        lengths = {name: len(values) for name, values in (words | numbers).items()}
        if len(set(lengths.values())) > 1 or "".join(words["residue_type"]) != protein.get("sequence"):
            raise ValueError(f"{where}: residue: {lengths} must be equally long, and residue_type spell the sequence")
        if len(set(words["chain_id"])) == 1:
            coords = np.array([numbers[axis] for axis in "xyz"], dtype=np.float64).T
            labels = _placed_labels(coords, np.array(numbers["binding_site"], dtype=np.float32))
            out[PROTEINSHAKE_SPLITS[split]].append(
                Entry(pdb_id, archive.structure(pdb_id), words["chain_id"][0], labels))
    return out


def _placed_labels(coords: npt.NDArray[np.float64], values: Labels) -> Callable[[Chain], Labels | str]:
    """Labels of the first residues, whose CA must lie where the annotation has it."""
    def labels(chain: Chain) -> Labels | str:
        n = len(values)
        if n > len(chain) or not (np.abs(chain.coords[:n, 1] - coords) < MAX_DEVIATION).all():
            return "coordinates differ from the annotation's"
        return np.concatenate([values, np.full(len(chain) - n, np.nan, dtype=np.float32)])
    return labels


def _homology(archive: Archive, left_out: Counter[str]) -> dict[str, list[Entry]]:
    """SCOP domains and their folds."""
    scop_file = archive.homology / "dir.cla.scop.1.75.txt"
    scop, successors = read_scop(scop_file), read_obsolete(archive.mirror / "obsolete.dat")
    out: dict[str, list[Entry]] = {}
    for split, name in HOMO_SPLITS.items():
        out[split] = []
        for where, row in read_tape(archive.homology / f"remote_homology_{name}"):
            identifier, fold = row.get("id"), row.get("fold_label")
            identifier = identifier.decode() if isinstance(identifier, bytes) else identifier
            if not isinstance(identifier, str) or not isinstance(fold, (int, np.integer)):
                raise ValueError(f"{where}: id is {brief(identifier)} and fold_label {brief(fold)}; needs a word and "
                                 "an integer")
            if int(fold) not in HOMO_FOLDS or identifier not in scop:
                left_out["a fold with few proteins" if identifier in scop else "not in SCOP"] += 1
                continue
            pdb_id, description = scop[identifier]
            chain_id, ranges = parse_scop_residues(description, f"{scop_file}: domain {identifier}: residues")
            path = archive.structure(successors.get(pdb_id, pdb_id))
            out[split].append(Entry(identifier, path, chain_id, _domain_labels(HOMO_FOLDS.index(int(fold)), ranges)))
    return out


def _domain_labels(value: int, ranges: Sequence[tuple[int, int]]) -> Callable[[Chain], Labels | str]:
    """The class at the residues of the domain; no ranges: at all."""
    def labels(chain: Chain) -> Labels | str:
        inside = np.full(len(chain), not ranges)
        for first, last in ranges:
            inside |= (chain.residue_numbers >= first) & (chain.residue_numbers <= last)
        return np.where(inside, value, np.nan).astype(np.float32) if inside.any() else "no residue of the domain"
    return labels
