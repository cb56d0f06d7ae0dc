"""Structure tokens as sentences: vocabulary, exports, and the GPT of the autoregressive tree trained on them."""

import json

import numpy as np
import pytest
import torch
from gpt_models import tiny
from places import PROTEINS, needs_proteins
from structure_models import build
from training_runs import to_words

from autoregressive import train_c2i
from autoregressive.code_shards import read_folder
from autoregressive.sampling import SamplingConfig, generate
from protein import decode, encode, export_tokens
from protein.language import SPECIAL, Vocabulary, complexes, to_token_chains
from protein.pretrained import save_pretrained
from protein.structure_io import read_structure
from protein.token_files import TokenChain, read_tokens, write_tokens
from protein.token_shards import iterate_tokens
from scripts import make_structure_codes, sample_structures


def chain(name, letter, tokens, sequence):
    return TokenChain(name, letter, np.array(tokens), sequence, tuple(map(str, range(1, len(tokens) + 1))), "ab")


PAIR = [chain("x", "A", [3, -1, 11], "MKV"), chain("x", "B", [0, 5], "GX")]


def test_sentences_and_back():
    words = Vocabulary(12, "ab")
    assert len(words) == 12 + 7 + 25
    plain, prefixed = (words.sentence(PAIR, with_sequence=flag) for flag in (False, True))
    bos, eos, pad, _, gap, unknown, structure = (words.id(word) for word in SPECIAL)
    assert plain == [bos, 3, unknown, 11, gap, 0, 5, eos]
    assert prefixed == [bos, *map(words.id, "MKV"), gap, *map(words.id, "GX"), structure, *plain[1:]]
    for sentence in (plain, prefixed, [*plain, pad, pad], plain[:-1]):
        assert words.chains(sentence) == [[3, -1, 11], [0, 5]]
    assert words.chains([bos, 3, words.id("M"), eos, 4]) == [[3, -1]]
    assert words.chains([bos, eos]) == []
    back = to_token_chains("y", [[3, -1], [4]], ["MK", "G"], "ab")
    assert [(c.chain, c.sequence, c.tokens.tolist()) for c in back] == [("A", "MK", [3, -1]), ("B", "G", [4])]
    assert Vocabulary.from_dict(json.loads(json.dumps(words.to_dict())), "here") == words
    with pytest.raises(ValueError, match="chain x_A has token 11, the vocabulary 8 codes"):
        Vocabulary(8).sentence(PAIR)
    with pytest.raises(ValueError, match="here: no vocabulary"):
        Vocabulary.from_dict({}, "here")


def test_complexes_are_neighbours_of_one_name():
    other = chain("y", "A", [1], "M")
    assert [len(group) for group in complexes([*PAIR, other], True)] == [2, 1]
    assert [len(group) for group in complexes([*PAIR, other], False)] == [1, 1, 1]


def test_exports(tmp_path):
    write_tokens(tmp_path / "t.jsonl", PAIR)
    words = Vocabulary(12, "ab")
    export_tokens.main([str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "s.jsonl"), "--num-codes", "12"])
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["x_A", "x_B"]
    assert rows[0]["input_ids"] == words.sentence(PAIR[:1])
    said = json.loads((tmp_path / "s.jsonl.vocabulary.json").read_text())
    assert said["words"]["<bos>"] == 12
    assert said["size"] == len(words)
    more = ["--num-codes", "12", "--complexes", "--sequence-prefix"]
    export_tokens.main([str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "c.jsonl"), *more])
    (row,) = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert (row["id"], row["sequence"], row["num_residues"]) == ("x", "MKV/GX", 5)
    assert row["input_ids"] == words.sentence(PAIR, with_sequence=True)
    for words_, message in ((["--out", "s.txt"], "sentences are kept in"), (["--out", "s.jsonl"], "is not clear")):
        with pytest.raises(SystemExit, match=message):
            export_tokens.main([str(tmp_path / "t.jsonl"), *words_])


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    write_tokens(tmp_path / "t.jsonl", PAIR)
    export_tokens.main([str(tmp_path / "t.jsonl"), "--out", str(tmp_path / "s.parquet"), "--num-codes", "12"])
    rows = parquet.read_table(tmp_path / "s.parquet").to_pylist()
    assert rows[1]["input_ids"] == Vocabulary(12).sentence(PAIR[1:])


def test_a_prefix_is_given_and_not_drawn():
    model, labels = tiny(), torch.zeros(2, dtype=torch.int64)
    config = SamplingConfig(cfg_scale=1.0)
    free = generate(model, labels, seeds=[1, 2], config=config)
    prefix = torch.tensor([[7, 8, 9], [4, 4, 4]])
    found = generate(model, labels, seeds=[1, 2], config=config, prefix=prefix)
    assert found[:, :3].tolist() == prefix.tolist()
    assert found[:, 3:].tolist() != free[:, 3:].tolist()
    assert torch.equal(generate(model, labels, seeds=[1, 2], config=config, prefix=free[:, :5]), free)
    for wrong in (prefix[:1], prefix + 20, prefix.float()):
        with pytest.raises(ValueError, match="a prefix of"):
            generate(model, labels, seeds=[1, 2], config=config, prefix=wrong)


def test_only_words_that_make_a_structure_are_drawn():
    """Whatever the GPT likes best: here the words that no structure may hold, and the end."""
    words = Vocabulary(3)
    bos, eos, pad, mask, gap, *_ = (words.id(word) for word in SPECIAL)

    def model_that_likes(*liked):
        model = tiny(vocab_size=len(words))
        model.decode = lambda x, *_: torch.zeros(len(x), len(words)).index_fill_(1, torch.tensor(liked), 50.0)
        return model

    def drawn(model, prefix, allowed):
        return generate(model, torch.zeros(4, dtype=torch.int64), seeds=range(4), config=SamplingConfig(cfg_scale=1.0),
                        prefix=torch.tensor([prefix] * 4), allowed=allowed).tolist()

    odd = model_that_likes(mask, bos, words.id("<unknown>"), words.id("<structure>"), words.id("M"))
    for several in (False, True):
        found = drawn(odd, [bos], sample_structures.any_structure(words, several))
        assert {word for row in found for word in row[1:]} <= {0, 1, 2, eos, pad, *[gap] * several}
        found = drawn(model_that_likes(gap, eos), [bos], sample_structures.any_structure(words, several))
        for row in found:
            assert row[1] < words.codes, "an empty structure"
            assert eos in row
            assert set(row[row.index(eos) + 1 :]) <= {pad}
            assert all(part for part in words.chains(row))
            assert (gap in row) <= several
    assert any(gap in row for row in found)
    prefix = words.prefix(["MK", "G", "GA"])
    for model in (odd, model_that_likes(gap, eos)):
        for row in drawn(model, prefix, sample_structures.of_sequences(words, ["MK", "G", "GA"])):
            parts = words.chains(row)
            assert [len(part) for part in parts] == [2, 1, 2]
            assert min(min(part) for part in parts) >= 0


@needs_proteins
@pytest.mark.parametrize("conditioned", [False, True])
def test_a_gpt_of_real_structures(tmp_path, conditioned):
    """The commands of the README: encode, make codes, train, sample, decode."""
    save_pretrained(build(), tmp_path / "tokenizer")
    files = [PROTEINS / "structures" / f"{name}_u.pdb.gz" for name in ("1CLV_l", "1GL1_l", "1OC0_l", "1EFN_l")]
    encode.main([*map(str, files), "--ckpt", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "tokens"),
                 "--device", "cpu"])
    entries = [entry for part in iterate_tokens([tmp_path / "tokens"]) for entry in part]
    make_structure_codes.main([str(tmp_path / "tokens"), "--out", str(tmp_path / "codes"), "--length", "100",
                               *["--sequence-prefix"] * conditioned])
    codes, words = read_folder(tmp_path / "codes"), Vocabulary(12, entries[0].tokenizer)
    fitting = [entry for entry in entries if len(words.sentence([entry], with_sequence=conditioned)) <= 100]
    assert len(codes.labels) == len(fitting) > 1
    assert words.chains(codes.codes(0, 0).tolist()) == [fitting[0].tokens.tolist()]
    train_c2i.main(to_words({
        "code_path": tmp_path / "codes", "val_code_path": tmp_path / "codes", "gpt_model": "GPT-tiny",
        "class_dropout_prob": 0, "global_batch_size": 2,
        "max_steps": 2, "mixed_precision": "none", "--no-compile": True, "device": "cpu",
        "results_dir": tmp_path / "gpt"}))
    call = ["--gpt-ckpt", str(tmp_path / "gpt"), "--code-path", str(tmp_path / "codes"), "--device", "cpu",
            "--num-samples", "2"]
    if conditioned:
        (tmp_path / "s.fasta").write_text(f">one\n{fitting[0].sequence}\n>two some words\nMKV\nG/GG\n")
        call += ["--sequences", str(tmp_path / "s.fasta")]
    for out in ("a.jsonl", "b.jsonl"):
        sample_structures.main([*call, "--out", str(tmp_path / out)])
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    sampled = read_tokens(tmp_path / "a.jsonl")
    if conditioned:
        assert [(c.label, c.sequence) for c in sampled[::2]] == [
            ("one-0_A", fitting[0].sequence), ("two-0_A", "MKVG"), ("two-1_A", "MKVG")]
    else:
        assert [c.label for c in sampled] == ["sample-0_A", "sample-1_A"]  # codes were made without --complexes
    assert all((0 <= c.tokens).all() and (c.tokens < words.codes).all() for c in sampled)  # of a GPT of two steps
    decode.main([str(tmp_path / "a.jsonl"), "--ckpt", str(tmp_path / "tokenizer"), "--out", str(tmp_path / "out"),
                 "--device", "cpu"])
    written = sorted((tmp_path / "out").glob("*.pdb"))
    assert written
    assert all(read_structure(path)[0].mask.any() for path in written)
