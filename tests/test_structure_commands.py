"""encode.py, decode.py and evaluate.py on files: round trips, processes, metrics against the model, and garbage."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import training_runs
from training_runs import to_words

from protein import decode, encode, evaluate, train_provq
from protein.backbones import generate_backbones
from protein.inference import length_batches, padded_chains
from protein.pretrained import load_structure_tokenizer
from protein.structure_io import read_structure, write_structure
from protein.token_files import TokenChain, read_tokens, write_tokens

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
DATA = ROOT.parent / "shared" / "data" / "proteins" / "structures"
RUN = {"encoder_width": 32, "encoder_heads": 4, "decoder_width": 32, "decoder_heads": 2, "decoder_layers": 1,
       "codebook_embed_dim": 8, "codebook_size": 16, "ideal_chains": 12, "max_length": 32, "global_batch_size": 4,
       "max_steps": 4, "warmup_steps": 2, "transition_steps": 0, "val_size": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run, and five generated structures in two formats and a subfolder."""
    base = tmp_path_factory.mktemp("commands")
    train_provq.main(to_words(RUN | {"results_dir": base / "run"}))
    (base / "structures" / "more").mkdir(parents=True)
    for i, chain in enumerate(generate_backbones(5, seed=3)):
        write_structure(base / "structures" / ("more" if i > 2 else "") / f"s{i}.{'cif' if i % 2 else 'pdb'}", chain)
    encode.main([str(base / "structures"), "--ckpt", str(base / "run"), "--out", str(base / "tokens.fasta"),
                 "--device", "cpu"])
    return base


def test_tokens_are_the_models(base):
    entries = read_tokens(base / "tokens.fasta")
    assert [entry.name for entry in entries] == ["more/s3", "more/s4", "s0", "s1", "s2"]
    tokenizer = load_structure_tokenizer(base / "run", CPU)
    for entry in entries:
        path = next(p for p in (base / "structures").rglob(f"{Path(entry.name).name}.*"))
        (chain,) = read_structure(path)
        assert (entry.sequence, len(entry.tokens)) == (chain.sequence, len(chain))
        alone = tokenizer.encode(*padded_chains([chain], CPU))[0].numpy()
        assert entry.tokens.tolist() == alone.tolist()
        assert entry.tokenizer == tokenizer.hash()


@pytest.mark.parametrize("kind", ["jsonl", "npz"])
def test_formats_and_batches_hold_the_same_tokens(base, tmp_path, kind):
    out = tmp_path / f"tokens.{kind}"
    encode.main([str(base / "structures"), "--ckpt", str(base / "run"), "--out", str(out), "--max-residues", "1",
                 "--device", "cpu"])
    for one, other in zip(read_tokens(base / "tokens.fasta"), read_tokens(out), strict=True):
        assert (one.label, one.tokens.tolist(), one.numbers) == (other.label, other.tokens.tolist(), other.numbers)


def test_two_processes_write_the_same_file(base, tmp_path):
    words = [str(base / "structures"), "--ckpt", str(base / "run"), "--out", str(tmp_path / "two.fasta"), "--device",
             "cpu"]
    process = training_runs.start(ROOT / "protein" / "encode.py", words, processes=2)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert (tmp_path / "two.fasta").read_bytes() == (base / "tokens.fasta").read_bytes()


@pytest.mark.parametrize("form", ["pdb", "cif"])
def test_decoded_structures_can_be_read_back(base, tmp_path, form):
    decode.main([str(base / "tokens.fasta"), "--ckpt", str(base / "run"), "--out", str(tmp_path), "--format", form,
                 "--reference", str(base / "structures"), "--device", "cpu"])
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["chains"] == 5
    for entry in read_tokens(base / "tokens.fasta"):
        (chain,) = read_structure(tmp_path / f"{entry.label}.{form}")
        assert chain.sequence == entry.sequence
        assert chain.mask.all()
        numbers, _ = entry.residue_numbers()
        assert chain.residue_numbers.tolist() == numbers.tolist()
        # Ideal geometry inside a residue, whatever the decoder has learnt: |N - CA| of its local frame.
        assert np.linalg.norm(chain.coords[:, 0] - chain.coords[:, 1], axis=-1) == pytest.approx(1.459, abs=0.01)
        assert report["of_each_chain"][entry.label]["rmsd"] > 0
    each = [row["rmsd"] for row in report["of_each_chain"].values()]
    assert report["mean"]["rmsd"] == pytest.approx(np.mean(each), rel=1e-6)


def test_missing_residues_stay_missing(base, tmp_path):
    (chain,) = generate_backbones(1, seed=9)
    chain.coords[4, 2] = np.nan
    write_structure(tmp_path / "gap.cif", chain)
    encode.main([str(tmp_path / "gap.cif"), "--ckpt", str(base / "run"), "--out", str(tmp_path / "t.npz"), "--device",
                 "cpu"])
    (entry,) = read_tokens(tmp_path / "t.npz")
    assert (entry.tokens < 0).nonzero()[0].tolist() == [4]
    decode.main([str(tmp_path / "t.npz"), "--ckpt", str(base / "run"), "--out", str(tmp_path), "--device", "cpu"])
    (decoded,) = read_structure(tmp_path / f"{entry.label}.pdb")
    assert len(decoded) == len(chain) - 1


def test_evaluation(base, tmp_path, capsys):
    out = tmp_path / "metrics.json"
    evaluate.main([str(base / "structures"), "--ckpt", str(base / "run"), "--out", str(out), "--device", "cpu"])
    assert "normalized_perplexity" in capsys.readouterr().out
    found = json.loads(out.read_text())["tokenizers"][str(base / "run")]
    tokens = [entry.tokens for entry in read_tokens(base / "tokens.fasta")]
    counts = np.stack([np.bincount(t, minlength=16) for t in tokens])
    used = [(row > 0).mean() for row in counts]
    assert found["usage"] == pytest.approx((counts.sum(0) > 0).mean())
    assert found["usage_per_chain"] == pytest.approx(np.mean(used))

    def perplexity(row):
        p = row[row > 0] / row.sum()
        return np.exp(-(p * np.log(p)).sum())

    assert found["perplexity"] == pytest.approx(perplexity(counts.sum(0)), rel=1e-5)
    assert found["normalized_perplexity_per_chain"] == pytest.approx(
        np.mean([perplexity(row) for row in counts]) / 16, rel=1e-5)
    codes = load_structure_tokenizer(base / "run", CPU).codebook().float().detach()
    assert found["code_distance"] == pytest.approx(torch.pdist(codes).mean().item(), rel=1e-4)
    decode.main([str(base / "tokens.fasta"), "--ckpt", str(base / "run"), "--out", str(tmp_path / "d"), "--reference",
                 str(base / "structures"), "--device", "cpu"])
    means = json.loads((tmp_path / "d" / "metrics.json").read_text())["mean"]
    assert {name: found[name] for name in means} == pytest.approx(means, rel=1e-4)
    process = training_runs.start(ROOT / "protein" / "evaluate.py", [
        str(base / "structures"), "--ckpt", str(base / "run"), "--out", str(tmp_path / "two.json"), "--device", "cpu"],
        processes=2)
    log, _ = process.communicate()
    assert process.returncode == 0, log
    two = json.loads((tmp_path / "two.json").read_text())["tokenizers"][str(base / "run")]
    assert two.pop("tokenizer_hash") == found.pop("tokenizer_hash")
    assert two == pytest.approx(found, rel=1e-6)


def test_length_batches_cover_everything_once():
    lengths = [5, 100, 1, 40, 40, 3000, 7]
    batches = list(length_batches(lengths, max_residues=120))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 120 for b in batches)


def fails(module, words):
    with pytest.raises(SystemExit) as stopped:
        module.main([*map(str, words), "--device", "cpu"])
    assert stopped.value.code not in (0, None)
    return str(stopped.value)


def test_mistakes_of_encoding(base, tmp_path):
    ckpt, out = ["--ckpt", base / "run"], ["--out", tmp_path / "t.fasta"]
    assert "no such file or folder" in fails(encode, [tmp_path / "none.pdb", *ckpt, *out])
    assert "tokens are kept in" in fails(encode, [base / "structures", *ckpt, "--out", tmp_path / "t.txt"])
    assert "nowhere" in fails(encode, [base / "structures", "--ckpt", tmp_path / "nowhere", *out])
    (tmp_path / "bad.pdb").write_text("ATOM      1  N   ALA A   1      11.1")
    assert "bad.pdb" in fails(encode, [base / "structures", tmp_path / "bad.pdb", *ckpt, *out])
    assert not (tmp_path / "t.fasta").exists()
    encode.main([str(base / "structures"), str(tmp_path / "bad.pdb"), *map(str, ckpt + out), "--max-bad-structures",
                 "1", "--device", "cpu"])
    assert len(read_tokens(tmp_path / "t.fasta")) == 5
    assert "would both be called s0" in fails(
        encode, [base / "structures" / "s0.pdb", base / "structures", *ckpt, *out])


@pytest.mark.parametrize(("change", "said"), [
    ({"tokenizer": "ab" * 32}, "of another tokenizer"),
    ({"tokens": np.array([3, 16])}, "token 16, but"),
    ({"tokens": np.array([-1, -1])}, "no tokens at all"),
    ({"name": "../../elsewhere"}, "lead out of --out"),
    ({"name": "/elsewhere"}, "lead out of --out"),
])
def test_mistakes_of_decoding(base, tmp_path, change, said):
    fields = {"name": "x", "chain": "A", "tokens": np.array([3, 4]), "sequence": "MK", "numbers": ("1", "2")} | change
    write_tokens(tmp_path / "t.jsonl", [TokenChain(**fields)])
    assert said in fails(decode, [tmp_path / "t.jsonl", "--ckpt", base / "run", "--out", tmp_path / "out"])
    assert not (tmp_path / "out").exists()


def test_another_tokenizers_tokens_on_request(base, tmp_path):
    write_tokens(tmp_path / "t.jsonl", [TokenChain("x", "A", np.array([3, 4]), "MK", ("1", "2"), "ab")])
    decode.main([str(tmp_path / "t.jsonl"), "--ckpt", str(base / "run"), "--out", str(tmp_path), "--other-tokenizer",
                 "--device", "cpu"])
    assert (tmp_path / "x_A.pdb").exists()


@pytest.mark.skipif(not DATA.exists(), reason="the shared structures are not here")
def test_real_structures(base, tmp_path):
    files = [str(path) for path in sorted(DATA.iterdir())[:3]]
    encode.main([*files, "--ckpt", str(base / "run"), "--out", str(tmp_path / "t.npz"), "--device", "cpu"])
    decode.main([str(tmp_path / "t.npz"), "--ckpt", str(base / "run"), "--out", str(tmp_path / "out"), "--reference",
                 *files, "--device", "cpu"])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["chains"] >= 3
