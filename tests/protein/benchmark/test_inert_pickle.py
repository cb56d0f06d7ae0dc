"""Pickles read as data: arrays come out, everything else stays inert, damage is named."""

import os
import pickle
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from protein.benchmark import inert_pickle
from protein.benchmark.inert_pickle import Inert


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@dataclass(frozen=True)
class Record:
    name: str
    values: np.ndarray


Pair = namedtuple("Pair", "first second")


def test_nothing_is_called(tmp_path):
    victim = tmp_path / "executed"
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps([Evil(victim), 1]))
    found = inert_pickle.load_file(tmp_path / "evil.pkl")
    assert not victim.exists()
    assert isinstance(found[0], Inert)
    assert found[0].args == (f"touch {victim}",)
    assert found[0].qualified_name.endswith("system")
    assert found[1] == 1


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_come_out_and_objects_keep_their_state(protocol):
    values = [{"x": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.int64(7), "s": np.array(["ab", "c"])},
              Record("chain", np.array([True, False])), Pair(1, 2), b"id"]
    found = inert_pickle.loads(pickle.dumps(values, protocol=protocol), "here")
    np.testing.assert_array_equal(found[0]["x"], values[0]["x"])
    assert found[0]["n"] == 7
    assert found[0]["s"].tolist() == ["ab", "c"]
    assert found[1].get("name") == "chain"
    np.testing.assert_array_equal(found[1].get("values"), [True, False])
    with pytest.raises(KeyError):
        found[1].get("sequence")
    assert found[3] == b"id"


def test_files_of_torch_save(tmp_path):
    torch.save([{"labels": [0, 1], "tokens": torch.arange(3), "chain": Record("a", np.ones(2))}], tmp_path / "data")
    row = inert_pickle.load_file(tmp_path / "data")[0]
    assert row["labels"] == [0, 1]
    assert isinstance(row["tokens"], Inert)
    np.testing.assert_array_equal(row["chain"].get("values"), np.ones(2))


def test_damage_is_named(tmp_path):
    content = pickle.dumps(list(range(100)))
    (tmp_path / "cut.pkl").write_bytes(content[:50])
    with pytest.raises(ValueError, match=r"cut\.pkl: damaged, or no pickle"):
        inert_pickle.load_file(tmp_path / "cut.pkl")
    np.savez(tmp_path / "other.npz", x=1)
    with pytest.raises(ValueError, match=r"other\.npz: a zip file, but not one of torch\.save"):
        inert_pickle.load_file(tmp_path / "other.npz")
