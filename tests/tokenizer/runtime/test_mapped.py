"""tokenizer/runtime/mapped.py: files that are what they should be are mapped, others are named."""

import numpy as np
import pytest

from tokenizer.runtime.mapped import map_array


@pytest.fixture
def path(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6, dtype=np.int32).reshape(2, 3))
    return tmp_path / "x.npy"


def test_a_view_of_the_file(path):
    array = map_array(path, (2, 3), "<i4", "make it again")
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert isinstance(array.base, np.memmap)
    assert not array.flags.writeable


@pytest.mark.parametrize(("damage", "message"), [
    (lambda p: p.unlink(), "x.npy is missing; make it again"),
    (lambda p: p.write_bytes(p.read_bytes()[:-1]), r"x.npy: damaged, cut short, or no .npy file \(.*\); make it again"),
    (lambda p: p.write_bytes(b"junk"), r"x.npy: damaged, cut short, or no .npy file \(.*\); make it again"),
    (lambda p: p.write_bytes(b""), r"x.npy: damaged, cut short, or no .npy file \(.*\); make it again"),
    (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "x.npy is longer than its header says; make it again"),
    (lambda p: np.save(p, np.zeros((3, 3), np.int32)), r"x.npy holds int32 \(3, 3\), the manifest says int32 \(2, 3\)"),
    (lambda p: np.save(p, np.zeros((2, 3))), r"x.npy holds float64 \(2, 3\), the manifest says int32 \(2, 3\)"),
    (lambda p: np.save(p, np.array([{}])), r"x.npy: damaged, cut short, or no .npy file \(.*\); make it again"),
])
def test_other_files_are_named(path, damage, message):
    damage(path)
    with pytest.raises(ValueError, match=message):
        map_array(path, (2, 3), np.int32, "make it again")
