"""Token files: round trips, files of other programs, and garbage, which is named by file, line and reason."""

import json

import numpy as np
import pytest

from protein.token_files import FORMATS, TokenChain, read_tokens, write_tokens


def chains():
    return [
        TokenChain("1abc", "A", np.array([3, -1, 511]), "MXV", ("5", "-6", "7A"), "f" * 64),
        TokenChain("folder/2xyz_l_u", "", np.array([0]), "G", ("1",), "f" * 64),
        TokenChain("af-x", "AA", np.arange(700), "A" * 700, tuple(str(i) for i in range(700)), ""),
    ]


def same(a, b):
    return (a.name, a.chain, a.sequence, a.numbers, a.tokenizer, a.tokens.tolist()) == \
        (b.name, b.chain, b.sequence, b.numbers, b.tokenizer, b.tokens.tolist())


@pytest.mark.parametrize("kind", FORMATS)
def test_round_trip(kind, tmp_path):
    path = tmp_path / "new" / f"tokens{kind}"
    write_tokens(path, chains())
    assert all(same(a, b) for a, b in zip(read_tokens(path), chains(), strict=True))


def test_residue_numbers():
    numbers, codes = chains()[0].residue_numbers()
    assert numbers.tolist() == [5, -6, 7]
    assert codes == ("", "", "A")


@pytest.mark.parametrize(("name", "text"), [
    ("a.fasta", ">1abc_A\n17 402 -1\n"),
    ("a.fasta", ">1abc_A some words\n17,402, -1\n\n"),
    ("a.jsonl", '{"name": "1abc_A", "tokens": [17, 402, -1]}\n'),
])
def test_files_of_other_programs(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    (chain,) = read_tokens(tmp_path / name)
    assert same(chain, TokenChain("1abc_A", "", np.array([17, 402, -1]), "XXX", ("1", "2", "3"), ""))


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.fasta", "17 4\n", r"a\.fasta, line 1: tokens without a header"),
    ("a.fasta", ">x\n>y\n1 2\n", r"a\.fasta, line 2: a header without tokens"),
    ("a.fasta", ">x\n1 2\n>y\n", r"last header has no tokens; the file is cut off"),
    ("a.fasta", ">x\n1 two\n", r"a\.fasta, line 2: .*two"),
    ("a.fasta", ">x sequence=MK\n1\n", r"line 2: chain x: 1 tokens, 2 sequence, 1 numbers"),
    ("a.fasta", ">x numbers=1,B\n1 2\n", "'B' is no residue number"),
    ("a.fasta", ">x\n1 -2\n", "token -2"),
    ("a.fasta", "", "holds no chains"),
    ("a.jsonl", '{"name": "x", "tokens": [1]}\n{"name": "y", "tok', r"a\.jsonl, line 2: "),
    ("a.jsonl", '{"name": "x"}\n', "line 1: no tokens"),
    ("a.jsonl", '{"tokens": [1]}\n', "line 1: no name"),
    ("a.jsonl", '{"name": 3, "tokens": [1]}\n', "name is of the wrong type"),
    ("a.jsonl", '{"name": "x", "tokens": [1.5]}\n', "must be a list of integers"),
    ("a.jsonl", '{"name": "x", "tokens": []}\n', "must be a list of integers"),
    ("a.jsonl", "[1]\n", "line 1: "),
    ("a.jsonl", '{"name": "a", "tokens": [1, 99999999999999999999]}\n', "line 1: token 9{20} is no code"),
    ("a.fasta", ">a\n1 -99999999999999999999\n", "line 2: token -9{20} is no code"),
    ("a.jsonl", '{"name": "a", "tokens": [1], "numbers": ["99999999999999999999"]}\n', "'9{20}' is no residue number"),
    ("a.npz", "junk", r"a\.npz: damaged, or no \.npz"),
    ("a.txt", "x", r"a\.txt: tokens are kept in \.fasta, \.jsonl, \.npz"),
])
def test_garbage(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_tokens(tmp_path / name)


@pytest.mark.parametrize(("change", "said"), [
    ({"names": np.array("x")}, r"names must be 1 texts, one for each name, not <U1 \(\)"),
    ({"names": np.array([3])}, "names must be 1 texts"),
    ({"tokens": np.ones((2, 2), int)}, r"tokens must be a row of integers, not int64 \(2, 2\)"),
    ({"tokens": np.array([1.5, 2])}, "tokens must be a row of integers, not float64"),
    ({"offsets": np.array([0.0, 2.0])}, "offsets must be a row of integers, not float64"),
    ({"tokenizer": np.array(["a", "b"])}, "tokenizer must be 1 texts"),
    ({"numbers": np.array([], dtype=str)}, "numbers must be 1 texts"),
])
def test_arrays_of_another_kind(change, said, tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, **({"tokens": np.array([1, 2]), "offsets": np.array([0, 2]), "names": np.array(["x"])} | change))
    with pytest.raises(ValueError, match=rf"a\.npz: {said}"):
        read_tokens(path)


def test_a_single_array(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.arange(3))
    with pytest.raises(ValueError, match=r"a\.npz: damaged, or no \.npz file \(a single array\)"):
        read_tokens(tmp_path / "a.npz")


def test_damaged_arrays(tmp_path):
    path = tmp_path / "a.npz"
    write_tokens(path, chains())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="damaged"):
        read_tokens(path)
    np.savez(path, tokens=np.arange(5), offsets=np.array([0, 2, 4]), names=np.array(["a", "b"]))
    with pytest.raises(ValueError, match="do not cut 5 tokens into 2 chains"):
        read_tokens(path)
    np.savez(path, tokens=np.arange(5), names=np.array(["a"]))
    with pytest.raises(ValueError, match="no array offsets"):
        read_tokens(path)
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz: no such file"):
        read_tokens(tmp_path / "nothing.npz")


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_text("old")
    with pytest.raises(ValueError, match="cannot hold a name with spaces"):
        write_tokens(path, [TokenChain("a b", "", np.array([1]), "G", ("1",))])
    with pytest.raises(ValueError, match="no chains to write"):
        write_tokens(path, [])
    assert path.read_text() == "old"


def test_jsonl_is_plain_json(tmp_path):
    write_tokens(tmp_path / "a.jsonl", chains())
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert rows[0] == {"name": "1abc", "chain": "A", "tokens": [3, -1, 511], "sequence": "MXV",
                       "numbers": ["5", "-6", "7A"], "tokenizer": "f" * 64}
