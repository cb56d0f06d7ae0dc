"""Sensitivity and use of codes: alignments, TM-scores and averages worked out by hand; the command line; mistakes."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from helices import helix, write_helix
from mini_archive import CHAINS, MiniArchive, chain, pdb_id, write

from protein.benchmark import sensitivity as sens
from protein.benchmark.baselines import ChainTokenizer
from protein.benchmark.sensitivity import (
    Pair,
    TokenAligner,
    archive_chains,
    archive_pairs,
    code_scores,
    main,
    read_pairs,
)
from protein.benchmark.task_archives import Archive
from protein.structure_io import Chain


def row(*tokens):
    return np.array(tokens, dtype=np.int64)


class Scripted(ChainTokenizer):
    """Tokens by the chain's name."""

    label = "Scripted"

    def __init__(self, codebook, **tokens):
        self.codes, self.tokens = codebook, tokens

    def encode(self, chains):
        return [row(*self.tokens[chain.name]) for chain in chains]

    def codebook(self):
        return self.codes

    def identity(self):
        return "scripted"


def test_codes_score_a_hundred_cosines_cut_towards_zero():
    codes = torch.tensor([[1.0, 0], [0, 3.0], [1, 1], [-1, -1]])
    assert code_scores(codes).tolist() == [[100, 0, 70, -70], [0, 100, 70, -70], [70, 70, 100, -100],
                                           [-70, -70, -100, 100]]


def test_alignment_scores():
    """Orthogonal codes: 100 for each pair of equal tokens, 0 for others, -10 for each gap, at the ends as well."""
    align = TokenAligner(torch.eye(3))
    assert align.score(row(0, 1, 2), row(0, 1, 2)) == 300
    assert align.score(row(0, 1, 2), row(0, 2)) == 190
    assert align.score(row(0, 1, 2, 2), row(2, 2)) == 180
    assert align.score(row(0, 1), row(1, 0)) == 80
    assert align.score(row(0, -1, 1), row(0, 1, -1)) == 200, "residues without a token are left out"
    with pytest.raises(ValueError, match="a chain without a single token"):
        align.score(row(-1), row(0))


def moved(c, matrix):
    return Chain(**vars(c) | {"coords": (c.coords @ np.array(matrix, np.float32).T + 3).astype(np.float32)})


def test_tm_score_does_not_see_rigid_motions_but_mirrors():
    c = helix(length=40)
    assert sens.tm_score(c, c) == pytest.approx(1, abs=1e-6)
    turned = [[0, -1, 0], [1, 0, 0], [0, 0, 1]]
    assert sens.tm_score(c, moved(c, turned)) == pytest.approx(1, abs=1e-5)
    assert sens.tm_score(c, moved(c, np.diag([1, 1, -1]))) < 0.8
    gap = c.coords.copy()
    gap[7] = np.nan
    assert sens.tm_score(c, Chain(**vars(c) | {"coords": gap})) > 0.9, "an absent CA is left out"


def test_sensitivity_as_coded_and_per_residue():
    """Pairs a, b, c score 100, 50 (orthogonal but for one: 2 residues), 600 over lengths 1, 3 and 6."""
    codes = torch.eye(4)
    tokenizer = Scripted(codes, a=[0], b=[0, 1, 2], b2=[0, 3, 3], c=[0] * 6)
    pairs = [Pair("a", helix("a"), helix("a")), Pair("b", helix("b"), helix("b2")), Pair("c", helix("c"), helix("c"))]
    found = sens.sensitivity(tokenizer, pairs, [0.9, 0.4, 0.9])
    assert [(p["id"], p["score"]) for p in found["pairs"]] == [("a", 100), ("b", 100), ("c", 600)]
    np.testing.assert_allclose([p["per_residue"] for p in found["pairs"]], [1, 1 / 3, 1])
    assert found["per residue"] == pytest.approx({"pearson": 1.0, "spearman": 1.0})
    assert found["as coded"]["pearson"] == pytest.approx(0.5)  # (100, 100, 600) against (0.9, 0.4, 0.9)
    assert sens.correlations([1, 1], [2, 3]) == {"pearson": None, "spearman": None}


def test_utilisation_by_hand():
    """Tokens 0 0 1 and 2 of K = 4, one residue without. Pooled: 1/2, 1/4, 1/4."""
    found = sens.utilisation(Scripted(torch.eye(4), a=[0, 0, 1], b=[2, -1], c=[-1]), [helix(n) for n in "abc"])
    assert (found["codes"], found["chains"], found["tokens"]) == (4, 2, 4)
    assert found["pooled usage"] == 0.75
    assert found["pooled perplexity"] == pytest.approx(2**1.5)
    assert found["pooled perplexity / K"] == pytest.approx(2**1.5 / 4)
    assert found["as coded usage"] == pytest.approx((2 / 4 + 1 / 4) / 2)
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert found["as coded perplexity / K"] == pytest.approx((math.exp(entropy) + 1) / 2 / 4, abs=1e-6)
    assert found["as coded entropy / K"] == pytest.approx(entropy / 2 / 4, abs=1e-6)
    assert found["code distance"] == pytest.approx(2**0.5)
    with pytest.raises(ValueError, match="none of the 1 chains has a token"):
        sens.utilisation(Scripted(torch.eye(4), c=[-1]), [helix("c")])


# --------------------------------------------------------------------------------------------------------------- data

@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Six pairs of chains of the miniature archive, of which the third is StructTokenBench's to skip."""
    mini = MiniArchive(tmp_path_factory.mktemp("archive"))
    lines = [f"{pdb_id(i)}.A,{len(chain(i))},{chain(i).sequence},x,{pdb_id(i + 10)}.A" for i in range(6)]
    folder = mini.data / "sensitivity" / "conformational"
    write(folder / "codnas.csv", "\n".join(["name,seqlen,seq,seqres,fold2", *lines, "9zzz.A,1,A,A,1a00.A"]) + "\n")
    write(folder / "apo.csv", "\n".join(["name,seqlen,seq,seqres,apo", *lines]) + "\n")
    utility = mini.data / "utility" / "casp14"
    write(utility / "chain_data_cache.json", json.dumps({f"{pdb_id(i)}_A": {} for i in range(8)} | {"gone_A": {}}))
    shutil.copytree(mini.pdb / "mmcif_files", utility / "data_dir")
    return Archive.open(mini.root, mini.pdb)


def test_pairs_and_chains_of_the_archive(archive):
    assert CHAINS > 16
    switching, apo = archive_pairs(archive, "fold_switching"), archive_pairs(archive, "apo_holo")
    assert [pair.first.name for pair in apo] == [pdb_id(i) for i in range(6)]
    assert [pair.second.name for pair in apo] == [pdb_id(i + 10) for i in range(6)]
    assert [pair.first.name for pair in switching] == [pdb_id(i) for i in (0, 1, 3, 4, 5)]
    assert [c.name for c in archive_chains(archive, "casp14")] == [pdb_id(i) for i in range(8)]


def test_pairs_of_the_archive_that_cannot_be_aligned_are_left_out(archive, monkeypatch):
    shortest = min(min(len(pair.first), len(pair.second)) for pair in archive_pairs(archive, "apo_holo"))
    monkeypatch.setattr(sens, "MIN_ATOMS", shortest + 1)
    found = archive_pairs(archive, "apo_holo")
    assert 0 < len(found) < 6
    assert all(min(len(pair.first), len(pair.second)) > shortest for pair in found)


def own_pairs(folder, stem="pairs", name="Mine", count=2, length=12, first_length=None):
    """folder/STEM.jsonl: pairs of helices, the first of first_length."""
    rows = [{"pairs": name}]
    for i in range(count):
        chosen = (first_length or length) if i == 0 else length
        for form in "ub":
            write_helix(folder / "pdb", f"{stem}{i}{form}", chosen, seed=2 * i + (form == "b"))
        rows.append({"id": f"p{i}", "first": {"structure": f"pdb/{stem}{i}u.pdb"},
                     "second": {"structure": f"pdb/{stem}{i}b.pdb"}})
    path = folder / f"{stem}.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def call(out, *pairs):
    main(["--tokenizer", "foldseek", "--pairs", *map(str, pairs), "--out", str(out), "--device", "cpu"])


def test_names_with_a_dot_are_kept_apart(tmp_path):
    pairs = own_pairs(tmp_path)
    for name in ("lambda-0.5", "lambda-0.25", "plain.json"):
        call(tmp_path / "res" / name, pairs)
    call(tmp_path / "res" / "lambda-0.5", pairs)  # the same command again
    assert sorted(path.name for path in (tmp_path / "res").iterdir()) == [
        f"{stem}.{kind}" for stem in ("lambda-0.25", "lambda-0.5", "plain") for kind in ("json", "md")]


@pytest.mark.parametrize(("name", "text"), [("README.md", "# Mine"), ("a.json", "[]"), ("a.json", "{}"),
                                            ("a.json", "{")])
def test_other_files_are_not_written_over(tmp_path, name, text):
    pairs = own_pairs(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit, match=rf"--out .*{name} exists and is no earlier result; name another"):
        call(tmp_path / name.partition(".")[0], pairs)
    assert (tmp_path / name).read_text() == text


def test_two_sets_of_one_name_are_refused(tmp_path):
    first, second = own_pairs(tmp_path, "a"), own_pairs(tmp_path, "b")
    with pytest.raises(SystemExit, match=r"--pairs .*a.jsonl and .*b.jsonl are both called 'Mine'"):
        call(tmp_path / "out", first, second)
    call(tmp_path / "out", first, own_pairs(tmp_path, "b", "Other"))
    assert list(json.loads((tmp_path / "out.json").read_text())["sensitivity"]) == ["Mine", "Other"]


def test_chains_too_short_to_align_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"pairs.jsonl: pair p0: chain pairs0u_A: 2 residues with CA; TM-align needs"):
        call(tmp_path / "out", own_pairs(tmp_path, first_length=2))


def test_damaged_tables_are_named(archive, tmp_path):
    shutil.copytree(archive.data / "sensitivity", tmp_path / "sensitivity")
    path = tmp_path / "sensitivity" / "conformational" / "apo.csv"
    text = path.read_text()
    path.write_text(text.replace("1a02.A", "1a02A", 1))
    with pytest.raises(ValueError, match=r"apo.csv, line 4: name: '1a02A' is no chain"):
        archive_pairs(Archive(tmp_path, archive.pdb), "apo_holo")
    path.write_text(text.replace("name", "names", 1))
    with pytest.raises(ValueError, match=r"apo.csv, line 1: no column name"):
        archive_pairs(Archive(tmp_path, archive.pdb), "apo_holo")


@pytest.mark.parametrize(("lines", "message"), [
    (['{"pair": "x"}'], "line 1: no field pairs"),
    (["nothing"], "line 1: not JSON"),
    (['{"pairs": "x"}'], "no pairs"),
    (['{"pairs": "x"}', '{"id": "a", "first": {"structure": "a.pdb"}}'], "line 2: no field second"),
    (['{"pairs": "x"}', '{"id": "a", "first": "a.pdb", "second": "a.pdb"}'], "line 2: first: must be"),
    (['{"pairs": "x"}', '{"id": "a", "first": {"structure": "a.pdb"}, "second": {"structure": "z.pdb"}}'],
     "line 2: second: .*z.pdb"),
    (['{"pairs": "x"}', '{"id": "a", "first": {"structure": "a.pdb", "chain": "Q"}, "second": {}}'],
     "line 2: first: .*no protein chain 'Q'"),
])
def test_damaged_pairs_are_named(tmp_path, lines, message):
    write_helix(tmp_path, "a", 5)
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=f"p.jsonl.*{message}"):
        read_pairs(tmp_path / "p.jsonl")


def test_the_command_line(archive, tmp_path):
    folder = tmp_path / "own"
    rows = [{"pairs": "Mine"}]
    for i in range(4):
        write_helix(folder / "pdb", f"{i}u", 20, seed=i)
        write_helix(folder / "pdb", f"{i}b", 20 - i, seed=i + 50)
        rows.append({"id": str(i), "first": {"structure": f"pdb/{i}u.pdb"}, "second": {"structure": f"pdb/{i}b.pdb"}})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    main(["--tokenizer", "foldseek", "A=foldseek-onehot", "A=foldseek-onehot", "--pairs", str(folder / "pairs.jsonl"),
          "fold_switching", "--chains", str(folder / "pdb"), "casp14", "--data", str(archive.data), "--pdb-data",
          str(archive.pdb), "--out", str(tmp_path / "codes"), "--device", "cpu"])
    report = json.loads((tmp_path / "codes.json").read_text())
    assert list(report["sensitivity"]) == ["Mine", "fold_switching"]
    assert list(report["utilisation"]["casp14"]) == ["FoldSeek", "A", "A (2)"]
    assert report["utilisation"]["casp14"]["A"] == report["utilisation"]["casp14"]["A (2)"]
    assert report["utilisation"][str(folder / "pdb")]["FoldSeek"]["chains"] == 8
    pairs = report["sensitivity"]["Mine"]["FoldSeek"]["pairs"]
    assert [pair["id"] for pair in pairs] == ["0", "1", "2", "3"]
    assert all(0 < pair["tm_score"] <= 1 for pair in pairs)
    text = (tmp_path / "codes.md").read_text()
    assert text.count("| A (2) |") == 6
    assert report["information"]["casp14"]["A"]["of"] == "FoldSeek"


@pytest.mark.parametrize(("words", "message"), [
    ([], "give --pairs or --chains"),
    (["--pairs", "apo_holo"], "StructTokenBench's sets need --data"),
])
def test_mistakes_in_flags(tmp_path, capsys, words, message):
    with pytest.raises(SystemExit):
        main(["--tokenizer", "foldseek", "--out", str(tmp_path / "x"), *words])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("words", "message"), [
    (["--pairs", "none.jsonl"], "none.jsonl"),
    (["--chains", "none"], "none: no such folder"),
    (["--chains", "pdb", "--max-length", "3"], "--chains pdb: none has at most 3 residues"),
])
def test_mistakes_in_files(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_helix(tmp_path / "pdb", "a", 5)
    with pytest.raises(SystemExit, match=f"sensitivity.py: error: .*{message}"):
        main(["--tokenizer", "foldseek", "--out", str(tmp_path / "x"), "--device", "cpu", *words])
