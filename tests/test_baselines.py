"""Tokenizers behind one interface: FoldSeek against biotite, ProTokens' files, untrained and trained models."""

import json
import pickle
import sys
import types

import numpy as np
import pytest
import torch
from biotite.structure.alphabet import to_3di
from helices import helix

from protein import baselines
from protein.baselines import FoldSeek, ProTokens, Untrained, open_tokenizer
from protein.structure_io import ATOMS, Chain
from protein.structure_model import StructureModelConfig, StructureVQModel

CPU = torch.device("cpu")


def atoms_of(chain):
    from biotite.structure import AtomArray

    residue, column = np.nonzero(np.isfinite(chain.coords).all(-1))
    atoms = AtomArray(len(residue))
    atoms.coord, atoms.res_id = chain.coords[residue, column], chain.residue_numbers[residue]
    atoms.atom_name, atoms.chain_id[:] = np.array(ATOMS)[column], "A"
    return atoms


def without(chain, residue, atom):
    """The chain without one atom."""
    coords = chain.coords.copy()
    coords[residue, ATOMS.index(atom)] = np.nan
    return Chain(**vars(chain) | {"coords": coords})


@pytest.mark.parametrize("chain", [
    helix(length=60), without(helix(length=30), 7, "CB"), without(helix(length=30), 9, "N"), helix(length=2),
], ids=["whole", "no CB", "no N", "two residues"])
def test_foldseek_is_biotites_3di(chain):
    tokens = FoldSeek().encode(chain)
    np.testing.assert_array_equal(tokens, to_3di(atoms_of(chain))[0][0].code)
    assert tokens.dtype == np.int64
    assert tokens[0] == tokens[-1] == 2, "undefined at the ends: d"


def test_foldseeks_codes_are_its_20_centroids_or_one_hot():
    assert FoldSeek().codebook().shape == (20, 2)
    assert torch.pdist(FoldSeek().codebook()).mean().item() == pytest.approx(2.7512, abs=1e-4)  # of its source code
    assert torch.equal(FoldSeek(one_hot=True).codebook(), torch.eye(20))
    assert FoldSeek().identity() != FoldSeek(one_hot=True).identity()


@pytest.fixture
def protokens(tmp_path):
    (tmp_path / "ProToken_Code_Book.pkl").write_bytes(pickle.dumps(np.ones((8, 3), np.float32)))
    rows = [{"chain": "1abc_A", "residues": [3, 4, 5, 9], "tokens": [0, 7, 2, 1]}]
    (tmp_path / "tokens.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_protokens_go_to_the_residues_of_their_numbers(protokens):
    tokenizer = ProTokens(protokens)
    assert tokenizer.encode(helix("1abc", 5, start=2)).tolist() == [-1, 0, 7, 2, -1]
    assert tokenizer.codebook().shape == (8, 3)
    with pytest.raises(ValueError, match=r"tokens.jsonl: no tokens of chain '1abc_B'"):
        tokenizer.encode(helix("1abc", 5, chain_id="B"))
    with pytest.raises(ValueError, match="none of its residue numbers is in the structure"):
        tokenizer.encode(helix("1abc", 5, start=50))
    np.save(protokens / "codebook.npy", np.zeros((8, 3), np.float32))  # it has precedence
    assert torch.equal(ProTokens(protokens).codebook(), torch.zeros(8, 3))
    assert ProTokens(protokens).identity() != tokenizer.identity()


@pytest.mark.parametrize(("row", "message"), [
    ('{"chain": "a"}', "line 1: no object with chain, residues and tokens"),
    ("[]", "line 1: no object with chain"),
    ('{"chain": "a", "residues": [1], "tokens": [1, 2]}', "line 1: tokens: 2 for 1 residues"),
    ('{"chain": "a", "residues": [1], "tokens": [0.5]}', "line 1: tokens: .* both must be lists of integers"),
    ('{"chain": "a", "residues": [1], "tokens": [8]}', "line 1: tokens: 8 to 8; the codebook has 8 codes"),
])
def test_damaged_protokens_are_named(protokens, row, message):
    (protokens / "tokens.jsonl").write_text(row + "\n")
    with pytest.raises(ValueError, match=f"tokens.jsonl, {message}"):
        ProTokens(protokens)


def test_a_codebook_is_a_float_array(protokens):
    (protokens / "ProToken_Code_Book.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match=r"ProToken_Code_Book.pkl: no codebook"):
        ProTokens(protokens)


def test_untrained_tokens_depend_on_seed_and_training_chains_only():
    chains = [helix(str(i), 300, seed=i) for i in range(2)]
    first, again, other = Untrained(CPU), Untrained(CPU), Untrained(CPU, seed=1)
    for tokenizer in (first, again, other):
        torch.rand(3)  # whatever was drawn before
        tokenizer.fit(chains)
    tokens = first.encode(chains[0])
    assert len(set(tokens.tolist())) > 50, "codes are spread over the latents"
    np.testing.assert_array_equal(tokens, again.encode(chains[0]))
    assert torch.equal(first.codebook(), again.codebook())
    assert not torch.equal(first.codebook(), other.codebook())
    assert first.identity() == again.identity() != other.identity()
    assert first.encode(without(chains[0], 5, "C"))[5] == -1
    with pytest.raises(ValueError, match="300 training residues are too few for 512 codes"):
        Untrained(CPU).fit(chains[:1])


@pytest.fixture
def loader(monkeypatch):
    """A stand-in for protein/pretrained.py, whatever its state: one small model."""
    class Model(StructureVQModel):
        def codebook(self):
            return self.quantize.codebook

    torch.manual_seed(0)
    config = StructureModelConfig(encoder_width=8, encoder_heads=2, decoder_width=8, decoder_heads=2, decoder_layers=1,
                                  codebook_size=16, codebook_embed_dim=4)
    model = Model(config).eval()
    stand_in = types.ModuleType("protein.pretrained")
    stand_in.load_structure_tokenizer = lambda path, device: model.to(device)  # noqa: ARG005
    monkeypatch.setitem(sys.modules, "protein.pretrained", stand_in)
    return model


def test_trained_models(loader, tmp_path):
    tokenizer = open_tokenizer(str(tmp_path), CPU)
    chain = without(helix(length=20), 5, "C")
    tokens = tokenizer.encode(chain)
    assert tokens.shape == (20,)
    assert tokens[5] == -1
    assert ((tokens >= 0) & (tokens < 16)).sum() == 19
    assert tokenizer.codebook().shape == (16, 4)
    before = tokenizer.identity()
    assert before == open_tokenizer(str(tmp_path), CPU).identity()
    with torch.no_grad():
        loader.encoder.pre_vq_proj.bias += 1
    assert tokenizer.identity() != before


def test_names_and_labels(tmp_path, loader, protokens):  # noqa: ARG001
    (tmp_path / "model.pt").touch()
    for name, kind, label in (
        ("foldseek", FoldSeek, "FoldSeek"), ("foldseek-onehot", FoldSeek, "FoldSeek, one-hot"),
        ("3Di=foldseek", FoldSeek, "3Di"), ("untrained", Untrained, "Untrained encoder"),
        (f"protokens:{protokens}", ProTokens, "ProTokens"), (str(tmp_path / "model.pt"), baselines.Trained, "model"),
        (f"ESM3={tmp_path / 'model.pt'}", baselines.Trained, "ESM3"),
    ):
        tokenizer = open_tokenizer(name, CPU)
        assert (type(tokenizer), tokenizer.label) == (kind, label)
    with pytest.raises(ValueError, match=r"--tokenizer A=folseek: folseek is neither .* nor a path that exists"):
        open_tokenizer("A=folseek", CPU)
