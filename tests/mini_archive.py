"""Miniature copies of StructTokenBench's archive for tests: every raw file in its own format, and processed lists.

60 chains 1a00_A ... 1a59_A, two folds of five superfamilies of six chains each. Residues are numbered from 5.
"""

import json
import pickle
import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helices import helix

from protein.benchmark.released_tasks import list_files
from protein.benchmark.task_archives import Archive
from protein.benchmark.tasks import STRUCTTOKENBENCH
from protein.structure_io import write_structure

CHAINS, START = 60, 5
FOLDS, SUPERFAMILIES = (10, 20), (10, 20, 30, 40, 50)


def pdb_id(i):
    return f"1a{i:02d}"


def code(i):
    return 3, 40 + i // 30, FOLDS[i // 30], SUPERFAMILIES[i // 6 % 5]


def chain(i):
    return helix(pdb_id(i), 10 + i % 4, seed=i, start=START)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def tsv(rows):
    return "".join("\t".join(map(str, row)) + "\n" for row in rows)


class MiniArchive:
    """root: struct_token_bench_release_data; pdb: mmcif_files' folder."""

    def __init__(self, folder):
        self.root, self.pdb = folder / "struct_token_bench_release_data", folder / "pdb_data" / "mmcif_files"
        self.data = self.root / "data"
        self.local = self.data / "functional" / "local"
        (self.pdb / "mmcif_files").mkdir(parents=True)
        for i in range(CHAINS):
            write_structure(self.pdb / "mmcif_files" / f"{pdb_id(i)}.cif", chain(i))
        write(self.pdb / "obsolete.dat", " LIST OF OBSOLETE COORDINATE ENTRIES AND SUCCESSORS\n"
              "OBSLTE    31-JUL-94 9XYZ     1A07\nOBSLTE    31-JUL-94 9XYY     \n"
              "OBSLTE    01-JAN-00 9XYW     1A01 1A02\n")
        domains = [f"{pdb_id(i)}A00 {' '.join(map(str, code(i)))} 1 1 1 1 1 {len(chain(i))} 2.0" for i in range(CHAINS)]
        write(self.data / "CATH/cath-classification-data/cath-domain-list.txt",
              "# CATH List File\n" + "\n".join(domains) + "\n")
        sequences = [(f"{pdb_id(i)}A00/{START}-{START + len(chain(i)) - 1}", chain(i).sequence) for i in range(CHAINS)]
        write(self.data / "CATH/sequence-data/cath-domain-seqs.fa",
              "".join(f">cath|4_3_0|{name}\n{sequence}\n" for name, sequence in sequences))

    def interpro(self):
        """A site at residues 6 to 8 of each chain; for the last three: beyond the chain, another type, no structure."""
        rows = [("uniprot_id", "ipr_id", "ipr_type", "residue_fragments")]
        types_of = ["Binding_site", "Active_site", "Conserved_site", "Repeat"]
        for kind in types_of:
            rows += [(f"P{i:05d}", "IPR000001", kind, "6-8-S") for i in range(CHAINS)]
        rows += [("P00001", "IPR000002", "Binding_site", "900-905-S"), ("P00002", "IPR000003", "PTM", "6-7-S"),
                 ("Q99999", "IPR000004", "Binding_site", "6-8-S")]
        write(self.local / "interpro/InterPro_parsed_r7_nofilter.tsv", tsv(rows))
        lines = [f"{pdb_id(i).upper()}  X-ray     1.74 A      PROT{i}_ECOLI  (P{i:05d})" for i in range(CHAINS - 1)]
        lines += [f"{pdb_id(59).upper()}  NMR       -           OTHER_HUMAN (O11111), PROT_HUMAN (P11111),",
                  "                                        LAST_HUMAN (P00059)"]
        write(self.local / "interpro/pdbtosp.txt", "----\nPDB cross-references\n\n" + "\n".join(lines) + "\n\nEnd\n")

    def biolip(self):
        """Two residues of each chain bind ATP, one catalyses; two lines are of a rare ligand, one has no sites."""
        rows = []
        for i in range(CHAINS):
            c = chain(i)
            row = [""] * 21
            row[0], row[1], row[4], row[5], row[6], row[20] = pdb_id(i), "A", "ATP", "B", "1", c.sequence
            row[7] = f"{c.sequence[1]}{START + 1} {c.sequence[4]}{START + 4}A {c.sequence[0]}999"
            row[9] = f"X{START + 2}"
            rows.append(row)
        rare = [[*r[:4], "RAR", *r[5:]] for r in rows[:2]]
        empty = [*rows[0][:7], "?", rows[0][8], "", *rows[0][10:]]
        stranger = ["9zzz", *rows[0][1:]]
        write(self.local / "biolip2/BioLiP_updated_set/BioLiP_nr.txt", tsv([*rows, *rare, empty, stranger]))

    def proteinshake(self):
        """-> the proteins. The first residue binds. One of two chains, one moved by 0.1 Angstrom."""
        proteins = []
        for i in range(12):
            c, n = chain(i), len(chain(i))
            x, y, z = (c.coords[:, 1].astype(float) + (0.1 if i == 3 else 0)).T.tolist()
            proteins.append({
                "protein": {"ID": pdb_id(i), "sequence": c.sequence, "ligand_id": "ATP",
                            "structure_split_0.7": ("train", "val", "test")[i % 3]},
                "residue": {"residue_number": c.residue_numbers.tolist(), "residue_type": list(c.sequence),
                            "chain_id": ["A"] * (n - 1) + ["B" if i == 4 else "A"], "x": x, "y": y, "z": z,
                            "binding_site": [1] + [0] * (n - 1)},
            })
        write(self.local / "proteinshake_bindingsite/ProteinLigandInterfaceDataset.residue.json", json.dumps(proteins))
        return proteins

    def epitopes(self):
        """The annotated sequence lacks the chain's first residue; its second is an epitope. Half are called H_1A00."""
        for name, chains in (("Dset48.csv", range(0, CHAINS, 2)), ("HM_479_testing.csv", range(1, CHAINS, 2))):
            lines = ["Pos,name,Interface,Interface1,length,AliPos,AliSeq"]
            for i in chains:
                sequence = chain(i).sequence[1:]
                label = f"H_{pdb_id(i).upper()}" if i % 2 else f"{pdb_id(i).upper()}_A"
                lines += [f"{k},{label},{int(k == 1)},{'NI'[k == 1:]},{len(sequence)},{k},{letter}"
                          for k, letter in enumerate(sequence)]
            lines.append(f"0,{pdb_id(0).upper()}_AB,0,NI,1,0,A")
            write(self.local / f"proteinglue_epitoperegion/{name}", "\n".join(lines) + "\n")

    def atlas(self):
        folder = self.data / "physicochemical" / "atlas"
        names = [f"{pdb_id(i)}_A" for i in range(CHAINS)]
        write(folder / "2022_06_13_ATLAS_pdb.txt", "\n".join(names) + "\n")
        for i, name in enumerate(names):
            rows = [f"{x},{k + 0.5},{10 * k},{'' if k == 2 else 1 + k}" for k, x in enumerate(chain(i).sequence)]
            write(folder / "analysis" / name / f"{name}_per_residue_labels.csv",
                  "\n".join(["seq,RMSF,Bfactor,Neq", *rows]))
            write_structure(folder / "analysis" / name / f"{name}.pdb", chain(i))

    def homology(self, lmdb=None):
        """Domains of residues 6 to 8 and 10, or of whole chains; folds 13 and 26, and one that is too small."""
        folder = self.data / "structural" / "remote_homology"
        lines = ["# dir.cla.scop.txt"]
        for i in range(CHAINS):
            place = "A:" if i % 2 else "A:6-8,A:10-10"
            lines.append(f"d{pdb_id(i)}a_\t{'9xyz' if i == 7 else pdb_id(i)}\t{place}\ta.1.1.1\t1\tcl=1")
        write(folder / "dir.cla.scop.1.75.txt", "\n".join(lines) + "\n")
        for k, split in enumerate(("train", "valid", "test_fold_holdout", "test_superfamily_holdout",
                                   "test_family_holdout")):
            items = [{"id": f"d{pdb_id(i)}a_", "fold_label": (13, 26)[i // 5 % 2], "primary": chain(i).sequence}
                     for i in range(10 * k, 10 * k + 10)]
            items += [{"id": "dgone_", "fold_label": 13}, {"id": f"d{pdb_id(1)}a_", "fold_label": 1}]
            if lmdb is None:
                write(folder / f"remote_homology_{split}.json", json.dumps(items))
            else:
                folder.mkdir(parents=True, exist_ok=True)
                with lmdb.open(str(folder / f"remote_homology_{split}.lmdb")) as base, base.begin(write=True) as t:
                    t.put(b"num_examples", pickle.dumps(len(items)))
                    for j, item in enumerate(items):
                        more = {"id": item["id"].encode(), "evolutionary": np.ones((3, 2), np.float32)}
                        t.put(str(j).encode(), pickle.dumps({**item, **more}))


# ----------------------------------------------------------------------------------------------------- processed lists

FIELDS = {"BindInt": "binding_label", "CatInt": "activesite_label", "Con": "conservedsite_label", "Rep": "repeat_label",
          "BindBio": "binding_label", "CatBio": "catalytic_label", "BindShake": "binding_site", "Ept": "epitope_label"}

@dataclass(frozen=True)
class WrappedProteinChain:
    """Has the name and the fields of the class in StructTokenBench's pickles."""

    id: str
    sequence: str
    chain_id: str
    residue_index: np.ndarray
    insertion_code: np.ndarray
    atom37_positions: np.ndarray


def esm_chain(c):
    positions = np.full((len(c), 37, 3), np.nan, np.float32)
    positions[:, [0, 1, 2, 4, 3]] = c.coords
    return WrappedProteinChain(c.name, c.sequence, c.chain_id, c.residue_numbers, np.array(c.insertion_codes, "<U4"),
                               positions)


def save_processed(path, rows):
    """torch.save, as from a program in which the class is protein_chain.WrappedProteinChain."""
    module = types.ModuleType("protein_chain")
    module.WrappedProteinChain = WrappedProteinChain
    before, WrappedProteinChain.__module__ = WrappedProteinChain.__module__, "protein_chain"
    sys.modules["protein_chain"] = module
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(rows, path)
    finally:
        del sys.modules["protein_chain"]
        WrappedProteinChain.__module__ = before


class Table:
    """What pandas leaves in the lists of ATLAS: an object that nobody looks at."""


def processed_row(name, i):
    c = chain(i)
    base = {"pdb_id": pdb_id(i), "chain_id": "A", "residue_range": [""], "pdb_chain": esm_chain(c)}
    if name in FIELDS:
        base[FIELDS[name]] = [int(k == i % 5) for k in range(len(c))]
    if name == "BindShake":  # the label's residues are the dataset's own: one is absent
        base |= {FIELDS[name]: base[FIELDS[name]][1:], "residue_index": c.residue_numbers.tolist()[1:]}
    if name.startswith("Flex"):
        base |= {"pdb_id_chain_id": f"{pdb_id(i)}_A", "annot_df": Table()}
    if name == "Homo":
        base |= {"fold_label": np.int64((13, 26, 1)[i % 3]), "id": f"d{pdb_id(i)}a_".encode(),
                 "residue_range": [""] if i % 2 else ["6-8", "10-10"]}
    return base


def processed_archive(folder):
    """Lists of all tasks, and nothing else but ATLAS's tables: no PDB. -> struct_token_bench_release_data."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mini_archive.write_structure", lambda *_: None)
        mini = MiniArchive(folder)
        mini.atlas()
    archive = Archive.open(mini.root, None)
    for name in STRUCTTOKENBENCH:
        files = list_files(archive, name)
        for k, path in enumerate(files.values()):
            save_processed(path, [processed_row(name, i) for i in range(k, CHAINS, len(files))])
    return mini.root
