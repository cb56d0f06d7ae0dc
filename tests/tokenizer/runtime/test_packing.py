"""Batches in one piece of memory: what comes out is what went in, pinned and moved as one."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

from autoregressive import train_c2i
from protein import train_provq as train_structures
from tokenizer.runtime.packing import ALIGNMENT, Packed

TENSORS = {"mask": torch.tensor([[True, False, True]]), "coords": torch.tensor([[0.5, torch.nan], [-1.0, 2.0]]),
           "none": torch.zeros(0, dtype=torch.int64), "label": torch.tensor(7), "codes": torch.arange(6).view(2, 3).T}


def test_what_is_packed_comes_out():
    found = Packed(TENSORS).to("cpu")
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].is_contiguous()
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True)
        assert found[name].data_ptr() % ALIGNMENT == 0 or not tensor.numel()
    found["codes"].zero_()  # nobody's but its own
    torch.testing.assert_close(found["coords"], TENSORS["coords"], rtol=0, atol=0, equal_nan=True)
    assert TENSORS["codes"].sum() == 15


def test_a_loader_pins_one_tensor(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self) or self.clone())
    found = pin_memory(Packed(TENSORS)).to("cpu")
    assert len(pinned) == 1
    assert found["label"] == 7
    assert found["label"].untyped_storage().data_ptr() != pinned[0].untyped_storage().data_ptr()


def chain(length):
    return {"coords": torch.rand(length, 3, 3), "residue_index": torch.arange(length),
            "sequence": torch.zeros(length, dtype=torch.int64), "index": 0}


@pytest.mark.parametrize(("trainer", "load", "items"), [
    (train_c2i.Trainer, "_loader", [{"codes": torch.arange(4) + i, "label": i, "index": i, "bad": []} for i in (0, 1)]),
    (train_structures.Trainer, "_load", [chain(5), chain(3)]),
], ids=["gpt", "structures"])
def test_trainers_move_their_batches_in_one_piece(trainer, load, items):
    one = trainer.__new__(trainer)
    one.cfg, one.device = SimpleNamespace(num_workers=0), torch.device("cpu")
    (batch,) = getattr(one, load)(items, [[0, 1]])
    assert len(batch) > 1
    assert len({tensor.untyped_storage().data_ptr() for tensor in batch.values()}) == 1
    name = "codes" if "codes" in batch else "coords"
    torch.testing.assert_close(batch[name][0], items[0][name])
