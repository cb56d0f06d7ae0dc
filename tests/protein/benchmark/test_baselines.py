"""Tokenizers behind one interface: FoldSeek against biotite, other programs' files, untrained and trained models."""

import json
import pickle

import numpy as np
import pytest
import torch
from biotite.structure.alphabet import to_3di
from helices import helix

from protein.benchmark import baselines
from protein.benchmark.baselines import FoldSeek, TokenFiles, Untrained, open_tokenizer
from protein.pretrained import save_pretrained
from protein.structure_io import ATOMS, Chain
from protein.structure_model import StructureModelConfig, StructureVQModel

CPU = torch.device("cpu")


def one(tokenizer, chain):
    return tokenizer.encode([chain])[0]


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
    tokens = FoldSeek().encode([chain])[0]
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
    """As ProTokens has them: its codebook, and tokens of residue numbers without insertion codes."""
    folder = tmp_path / "ProTokens"
    folder.mkdir()
    (folder / "ProToken_Code_Book.pkl").write_bytes(pickle.dumps(np.ones((8, 3), np.float32)))
    row = {"name": "1abc", "chain": "A", "numbers": [3, 4, 5, 9], "tokens": [0, 7, 2, 1]}
    (folder / "tokens.jsonl").write_text(json.dumps(row) + "\n")
    return folder


def test_foreign_tokens_go_to_the_residues_of_their_numbers(protokens):
    tokenizer = TokenFiles(protokens)
    assert one(tokenizer, helix("1abc", 5, start=2)).tolist() == [-1, 0, 7, 2, -1]
    twice = one(tokenizer, helix("1abc", 4, numbers=[3, 4, 4, 5], codes=["", "", "A", ""])).tolist()
    assert twice in ([0, 7, -1, 2], [0, -1, 7, 2]), "one of the two residues 4"
    assert tokenizer.codebook().shape == (8, 3)
    with pytest.raises(ValueError, match=r"tokens.jsonl: no tokens of chain '1abc_B'"):
        one(tokenizer, helix("1abc", 5, chain_id="B"))
    with pytest.raises(ValueError, match="none of its residue numbers is in the structure"):
        one(tokenizer, helix("1abc", 5, start=50))
    np.save(protokens / "codebook.npy", np.zeros((8, 3), np.float32))  # it has precedence
    assert torch.equal(TokenFiles(protokens).codebook(), torch.zeros(8, 3))
    assert TokenFiles(protokens).identity() != tokenizer.identity()


def test_foreign_tokens_may_have_insertion_codes(protokens):
    row = {"name": "1abc", "chain": "A", "numbers": ["3", "4A"], "tokens": [5, 6]}
    (protokens / "tokens.jsonl").write_text(json.dumps(row) + "\n")
    chain = helix("1abc", 3, numbers=[3, 4, 4], codes=["", "", "A"])
    assert one(TokenFiles(protokens), chain).tolist() == [5, -1, 6]


@pytest.mark.parametrize(("row", "message"), [
    ('{"name": "a"}', "tokens.jsonl, line 1: no tokens"),
    ('{"name": "a", "tokens": [1, 2], "numbers": [1]}', "tokens.jsonl, line 1: chain a: 2 tokens, .* 1 numbers"),
    ('{"name": "a", "tokens": [1]}\n{"name": "b", "tokens": [1]}\n{"name": "a", "tokens": [2]}',
     "tokens.jsonl: chain a is there twice"),
    ('{"name": "a", "tokens": [8]}', "tokens.jsonl: chain a: token 8, but the codebook has 8 codes"),
])
def test_damaged_token_files_are_named(protokens, row, message):
    (protokens / "tokens.jsonl").write_text(row + "\n")
    with pytest.raises(ValueError, match=message):
        TokenFiles(protokens)


def test_a_codebook_is_a_float_array(protokens):
    (protokens / "ProToken_Code_Book.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(ValueError, match=r"ProToken_Code_Book.pkl: no codebook"):
        TokenFiles(protokens)


@pytest.mark.parametrize("name", ["codebook.npy", "ProToken_Code_Book.pkl"])
@pytest.mark.parametrize("value", [np.nan, -np.inf, 1e300])
def test_codes_are_finite(protokens, name, value):
    values = np.ones((8, 3))
    values[5, 1] = value
    if name.endswith("pkl"):
        (protokens / name).write_bytes(pickle.dumps(values))
    else:
        np.save(protokens / name, values)
    with pytest.raises(ValueError, match=rf"{name}: code 5 has a number that is not finite"):
        TokenFiles(protokens)


@pytest.mark.parametrize("content", [b"", b"damaged", b"PK\3\4damaged", np.ones((8, 3), np.float32).tobytes()])
def test_a_damaged_codebook_is_named(protokens, content):
    (protokens / "codebook.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"^\S+codebook.npy: damaged, or no .npy file"):
        TokenFiles(protokens)


def test_untrained_tokens_depend_on_seed_and_training_chains_only():
    chains = [helix(str(i), 300, seed=i) for i in range(2)]
    first, again, other = Untrained(CPU), Untrained(CPU), Untrained(CPU, seed=1)
    for tokenizer in (first, again, other):
        torch.rand(3)  # whatever was drawn before
        tokenizer.fit(chains)
    tokens = one(first, chains[0])
    assert len(set(tokens.tolist())) > 50, "codes are spread over the latents"
    np.testing.assert_array_equal(tokens, one(again, chains[0]))
    assert torch.equal(first.codebook(), again.codebook())
    assert not torch.equal(first.codebook(), other.codebook())
    assert first.identity() == again.identity() != other.identity()
    assert one(first, without(chains[0], 5, "C"))[5] == -1
    with pytest.raises(ValueError, match="300 training residues are too few for 512 codes"):
        Untrained(CPU).fit(chains[:1])


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = StructureModelConfig(encoder_width=8, encoder_heads=2, decoder_width=8, decoder_heads=2, decoder_layers=1,
                                  codebook_size=16, codebook_embed_dim=4, quantizer="aminoaseed")
    return StructureVQModel(config).eval()


@pytest.fixture
def export(model, tmp_path):
    return save_pretrained(model, tmp_path / "exports" / "mine")


def test_trained_models(model, export):
    tokenizer = open_tokenizer(str(export), CPU)
    chain = without(helix(length=20), 5, "C")
    tokens = one(tokenizer, chain)
    index = torch.from_numpy(chain.residue_index())[None]
    expected = model.encode(torch.from_numpy(chain.coords)[None], residue_index=index)
    np.testing.assert_array_equal(tokens, expected[0].numpy())
    assert tokens[5] == -1
    assert len(set(tokens.tolist())) > 3
    together = tokenizer.encode([helix(length=31, seed=1), chain, helix(length=9, seed=2)])
    assert [len(row) for row in together] == [31, 20, 9]
    np.testing.assert_array_equal(together[1], tokens)
    torch.testing.assert_close(tokenizer.codebook(), model.quantize.codebook().detach())
    assert tokenizer.identity() == open_tokenizer(f"A={export}", CPU).identity()
    with torch.no_grad():
        model.encoder.pre_vq_proj.bias += 1
    assert open_tokenizer(str(save_pretrained(model, export)), CPU).identity() != tokenizer.identity()


def test_an_untrained_model_of_an_exports_architecture(export):
    tokenizer = open_tokenizer(f"untrained:{export}", CPU)
    tokenizer.fit([helix(length=30)])
    assert tokenizer.codebook().shape == (16, 4)
    assert tokenizer.identity() != Untrained(CPU).identity()
    assert not torch.allclose(tokenizer.codebook(), open_tokenizer(str(export), CPU).codebook())


def test_the_architecture_of_esm3s_encoder_is_not_taken(monkeypatch, export):
    monkeypatch.setattr(baselines.Trained, "__init__", lambda self, *_: vars(self).update(label="x", _model=object()))
    with pytest.raises(ValueError, match="x is neither a run nor an export"):
        open_tokenizer(f"untrained:{export}", CPU)


def test_names_and_labels(export, protokens):
    for name, kind, label in (
        ("foldseek", FoldSeek, "FoldSeek"), ("foldseek-onehot", FoldSeek, "FoldSeek, one-hot"),
        ("3Di=foldseek", FoldSeek, "3Di"), ("untrained", Untrained, "Untrained encoder"),
        (f"tokens:{protokens}", TokenFiles, "ProTokens"), (str(export), baselines.Trained, "mine"),
        (f"VanillaVQ={export}", baselines.Trained, "VanillaVQ"),
    ):
        tokenizer = open_tokenizer(name, CPU)
        assert (type(tokenizer), tokenizer.label) == (kind, label)
    with pytest.raises(ValueError, match=r"--tokenizer A=folseek: folseek is neither .* nor a path that exists"):
        open_tokenizer("A=folseek", CPU)
