"""Tasks from StructTokenBench's processed lists: their names, chains, labels and splits; and damaged ones."""

import numpy as np
import pytest
import torch
from mini_archive import CHAINS, START, chain, esm_chain, processed_archive, processed_row, save_processed

from protein.benchmark import released_tasks
from protein.benchmark.released_tasks import list_files, read_released
from protein.benchmark.task_archives import HOMO_FOLDS, Archive
from protein.benchmark.tasks import STRUCTTOKENBENCH

FILES = {  # of the training split, as StructTokenBench calls them
    "BindInt": "functional/local/interpro/processed_structured_binding_label_train",
    "CatInt": "functional/local/interpro/processed_structured_activesite_label_train",
    "BindBio": "functional/local/biolip2/processed_structured_binding_label_train",
    "CatBio": "functional/local/biolip2/processed_structured_catalytic_label_train",
    "BindShake": "functional/local/proteinshake_bindingsite/processed_structured_binding_site_train",
    "Con": "functional/local/interpro/processed_structured_conservedsite_label_train",
    "Rep": "functional/local/interpro/processed_structured_repeat_label_train",
    "Ept": "functional/local/proteinglue_epitoperegion/processed_structured_epitope_region_train",
    "FlexRMSF": "physicochemical/atlas/processed_structured_train",
    "FlexBFactor": "physicochemical/atlas/processed_structured_train",
    "FlexNEQ": "physicochemical/atlas/processed_structured_train",
    "Homo": "structural/remote_homology/processed_structured_train",
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return Archive.open(processed_archive(tmp_path_factory.mktemp("released")), None)


@pytest.mark.parametrize("name", STRUCTTOKENBENCH)
def test_lists_are_found_under_their_names(archive, name):
    files = list_files(archive, name)
    assert list(files) == ["train", "valid", *STRUCTTOKENBENCH[name].tests]
    assert files["train"] == archive.data / FILES[name]
    ending = {"valid": "validation", "Fold": "fold_test", "SupFam": "superfamily_test", "Org": "test"}
    if name == "Homo":
        ending = {"valid": "valid", "Fold": "test_fold_holdout", "SupFam": "test_superfamily_holdout",
                  "Fam": "test_family_holdout"}
    for split in ("valid", *STRUCTTOKENBENCH[name].tests):
        assert str(files[split]) == str(files["train"]).removesuffix("train") + ending[split]


@pytest.mark.parametrize("name", STRUCTTOKENBENCH)
def test_chains_and_labels(archive, name):
    task = read_released(archive, name).filtered()
    assert task.spec == STRUCTTOKENBENCH[name]
    assert task.origin == "StructTokenBench's processed lists"
    seen = []
    for k, examples in enumerate(task.splits.values()):
        for example in examples:
            i = int(example.chain.name[2:])
            assert i % len(task.splits) == k, "every list is a split of its own"
            seen.append(i)
            expected = chain(i)
            assert (example.chain.sequence, example.chain.chain_id) == (expected.sequence, "A")
            np.testing.assert_array_equal(example.chain.coords, expected.coords)
            np.testing.assert_array_equal(example.chain.residue_numbers, expected.residue_numbers)
            np.testing.assert_array_equal(example.labels, expected_labels(name, i))
    folds = [i for i in range(CHAINS) if name != "Homo" or i % 3 < 2]
    assert sorted(seen) == folds
    assert task.left_out == ({"a fold with few proteins": 20} if name == "Homo" else {})


def expected_labels(name, i):
    n = len(chain(i))
    if name == "Homo":
        labels = np.full(n, HOMO_FOLDS.index((13, 26)[i % 3]), np.float32)
        if i % 2 == 0:
            labels[[k for k in range(n) if k + START not in (6, 7, 8, 10)]] = np.nan
        return labels
    place = np.arange(n, dtype=np.float32)
    if name == "FlexRMSF":
        return place + np.float32(0.5)
    if name == "FlexBFactor":
        return 10 * place * np.float32(0.01)
    if name == "FlexNEQ":
        return np.where(place == 2, np.nan, (place + 1) * np.float32(0.1)).astype(np.float32)
    labels = (place == i % 5).astype(np.float32)
    if name == "BindShake":
        labels[0] = np.nan
    return labels


def test_one_chain_is_one_object(tmp_path):
    found = Archive(tmp_path, None)
    for path in list_files(found, "BindInt").values():
        save_processed(path, [processed_row("BindInt", 1), processed_row("BindInt", 1), processed_row("BindInt", 2)])
    first, second, third = read_released(found, "BindInt").splits["train"]
    assert first.chain is second.chain is not third.chain
    assert len({first.id, second.id, third.id}) == 3


def test_two_domains_of_homology_are_dropped_from_the_list_that_has_them(archive, monkeypatch):
    """By place, and only if the list is as long as theirs; places are those of chains that are short enough."""
    before = [e.id for e in read_released(archive, "Homo").splits["train"]]
    monkeypatch.setattr(released_tasks, "HOMO_TRAINING", 12)
    monkeypatch.setattr(released_tasks, "HOMO_DROPPED", (0, 2))
    after = [e.id for e in read_released(archive, "Homo").splits["train"]]
    assert before == ["1a00_A 0", "1a10_A 2", "1a15_A 3", "1a25_A 5", "1a30_A 6", "1a40_A 8", "1a45_A 9", "1a55_A 11"]
    assert after == before[:0] + before[2:]
    monkeypatch.setattr(released_tasks, "HOMO_TRAINING", 13)
    assert [e.id for e in read_released(archive, "Homo").splits["train"]] == before


def damaged(changes, name="BindInt"):
    out = processed_row(name, 0)
    for key, value in changes.items():
        out[key] = value
    return out


@pytest.mark.parametrize(("rows", "message"), [
    ({"a": 1}, "train: holds a dict, not a list"),
    ([1], "train, entry 0: pdb_chain: no object of a chain"),
    ([damaged({"pdb_chain": None})], "train, entry 0: pdb_chain: no object of a chain"),
    ([processed_row("BindInt", 1), damaged({"binding_label": [0, 1]})],
     r"entry 1: binding_label: needs a 0 or 1 for every residue, has shape \(2,\)"),
    ([damaged({"binding_label": ["x"] * 10})], "entry 0: binding_label: no list of numbers"),
    ([damaged({"binding_label": [3] * 10})], "entry 0: binding_label: needs a 0 or 1"),
    ([damaged({"binding_label": None})], "entry 0: binding_label: "),
])
def test_damaged_lists_are_named(tmp_path, rows, message):
    archive = Archive(tmp_path, None)
    for path in list_files(archive, "BindInt").values():
        save_processed(path, rows)
    with pytest.raises(ValueError, match=f"processed_structured_binding_label_{message}"
                       if message.startswith("train") else message):
        read_released(archive, "BindInt")


def test_damaged_homology_and_chains_are_named(tmp_path):
    archive = Archive(tmp_path, None)
    without = esm_chain(chain(0))
    object.__setattr__(without, "residue_index", None)
    short = esm_chain(chain(0))
    object.__setattr__(short, "insertion_code", np.array(["", ""]))
    for changes, message in (({"residue_range": ["a-b"]}, "entry 0: residue_range: 'a-b' is no range"),
                             ({"fold_label": "x"}, "entry 0: fold_label is 'x'"),
                             ({"pdb_chain": without}, "entry 0: pdb_chain: residue_index is a NoneType"),
                             ({"pdb_chain": short}, r"entry 0: pdb_chain: 10 residues, .*insertion_code \(2,\)")):
        for path in list_files(archive, "Homo").values():
            save_processed(path, [damaged(changes, "Homo")])
        with pytest.raises(ValueError, match=message):
            read_released(archive, "Homo")


def test_files_that_are_no_lists_are_named(tmp_path):
    archive = Archive(tmp_path, None)
    path = list_files(archive, "Ept")["train"]
    path.parent.mkdir(parents=True)
    torch.save([1], path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match="processed_structured_epitope_region_train: damaged, or no pickle"):
        read_released(archive, "Ept")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="processed_structured_epitope_region_train"):
        read_released(archive, "Ept")
