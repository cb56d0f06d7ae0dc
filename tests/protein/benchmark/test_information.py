"""protein/benchmark/information.py: bits that one tokenizer's tokens say about another's."""

import numpy as np
import pytest
from places import PROTEINS, needs_proteins

from protein.benchmark.baselines import open_tokenizer
from protein.benchmark.information import mutual_information
from protein.structure_io import read_structure


def test_of_copies_independent_and_merged_tokens():
    rng = np.random.default_rng(0)
    one = [rng.integers(4, size=20_000), rng.integers(4, size=20_000)]
    found = mutual_information(one, [3 - tokens for tokens in one])
    assert found["entropy"] == pytest.approx(2, abs=1e-3)
    assert found["share"] == pytest.approx(1, abs=1e-3)
    other = [rng.integers(500, size=20_000) for _ in one]
    found = mutual_information(one, other)
    assert found["information"] == pytest.approx(0, abs=0.004)
    assert found["uncorrected"] > 0.02  # what counting alone would say of tokens that know nothing
    merged = mutual_information(one, [tokens // 2 for tokens in one])
    assert merged["information"] == pytest.approx(1, abs=1e-3)


def test_residues_without_a_token_do_not_count():
    one, other = np.array([0, 1, 0, 1, 3]), np.array([5, 6, 5, 6, -1])
    assert mutual_information([one], [other])["residues"] == 4
    assert mutual_information([one], [other])["uncorrected"] == pytest.approx(1)
    with pytest.raises(ValueError, match="no residue has a token of both"):
        mutual_information([one], [np.full(5, -1)])
    with pytest.raises(ValueError, match="chains of other lengths"):
        mutual_information([one], [other[:4]])


@needs_proteins
def test_foldseek_knows_itself():
    paths = sorted((PROTEINS / "structures").glob("*_u.pdb.gz"))[:3]
    chains = [chain for path in paths for chain in read_structure(path)]
    tokens = open_tokenizer("foldseek", None).encode(chains)
    found = mutual_information(tokens, open_tokenizer("foldseek-onehot", None).encode(chains))
    assert found["share"] == pytest.approx(1, abs=0.02)
    assert 3 < found["entropy"] < np.log2(20)
