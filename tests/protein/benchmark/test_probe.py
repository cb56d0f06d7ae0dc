"""The probe: metrics against numbers worked out by hand, padding-free batches against padded ones, training."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helices import helix
from torch import nn
from torch.nn import functional as F

from protein.benchmark import probe as probes
from protein.benchmark.probe import Probe, ProbeConfig, measures, probe_data, probe_loss, train_probe
from protein.benchmark.tasks import Example

CPU = torch.device("cpu")


def array(*values):
    return np.array(values, dtype=np.float32)


# ---------------------------------------------------------------------------------------------------------- metrics

def test_auroc_is_the_fraction_of_ordered_pairs():
    """Positives 0.8, 0.4; negatives 0.1, 0.4, 0.9: of 6 pairs 0.8 wins 2, 0.4 wins 1 and ties 1."""
    assert probes.auroc(array(0.8, 0.4, 0.1, 0.4, 0.9), array(1, 1, 0, 0, 0)) == pytest.approx(3.5 / 6)
    assert math.isnan(probes.auroc(array(0.8, 0.4), array(1, 1)))


def test_rank_correlation_is_of_average_ranks():
    """Ranks 1 2.5 2.5 4 against 2 1 3 4: products of deviations 3, squares 4.5 and 5."""
    assert probes.rank_correlation(array(1, 5, 5, 9), array(0.2, 0.1, 0.3, 7)) == pytest.approx(3 / math.sqrt(4.5 * 5))
    assert probes.rank_correlation(array(1, 2, 3), array(1, 10, 100)) == pytest.approx(1)
    assert math.isnan(probes.rank_correlation(array(1, 1, 1), array(1, 2, 3)))


def test_macro_f1_is_over_the_classes_that_occur():
    """Labels 0 0 1 2, predictions 0 1 1 3. F1: 2/3, 2/3, 0, and 0 of class 3 (predicted only); 4 does not count."""
    scores = np.eye(5, dtype=np.float32)[[0, 1, 1, 3]]
    assert probes.macro_f1(scores, np.array([0, 0, 1, 2])) == pytest.approx((2 / 3 + 2 / 3) / 4)


def test_the_number_as_coded_averages_batches_of_any_size_and_class():
    """A perfect predictor. Batches: both classes (AUROC 1, F1 1), no positive (0, 0), one positive residue (0, 1)."""
    batches = [(array(2, -1, 3, -2), array(1, 0, 1, 0)), (array(-3, -4), array(0, 0)), (array(5), array(1))]
    found = measures(batches, "binary")
    assert found["pooled"] == (1.0, 1.0)
    assert found["as coded"] == pytest.approx((1 / 3, 2 / 3))


def test_f1_as_coded_takes_logits_within_0_and_1_for_probabilities():
    assert probes._binary_f1(array(0.4, 0.9), array(0, 1)) == 1.0
    assert probes._binary_f1(array(0.4, 0.9, -1), array(0, 1, 0)) == pytest.approx(2 / 3)  # now 0.4 is positive


def test_macro_f1_as_coded_averages_batches():
    """The second batch lacks class 1, so its score is over one class less."""
    batches = [(np.eye(2)[[0, 1]], np.array([0, 0])), (np.eye(2)[[0, 0]], np.array([0, 0]))]
    found = measures(batches, "classification")
    assert found["pooled"][0] == pytest.approx((6 / 7 + 0) / 2)
    assert found["as coded"][0] == pytest.approx(((2 / 3 + 0) / 2 + 1) / 2)


def test_regression_is_pooled_in_both_protocols():
    batches = [(array(1, 2), array(1, 2)), (array(3, 4), array(4, 3))]
    for found in measures(batches, "regression").values():
        assert found == pytest.approx((0.8, 0.8))


# ------------------------------------------------------------------------------------------------- data and the model

def examples(kind, lengths=(7, 3, 5), seed=0):
    rng = np.random.default_rng(seed)
    out = []
    for i, length in enumerate(lengths):
        labels = rng.integers(0, 2, length).astype(np.float32) if kind == "binary" else rng.normal(size=length)
        if kind == "classification":
            labels = np.full(length, i % 3, dtype=np.float32)
            labels[0] = np.nan  # not part of the domain
        elif length > 3:
            labels[2] = np.nan
        out.append(Example(str(i), helix(str(i), length), labels.astype(np.float32)))
    return out


def tokens_of(found, codes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(-1, codes, len(e.chain)) for e in found]


def padded_reference(probe, found, tokens, kind):
    """The same probe on padded batches with masks, loss included; as StructTokenBench arranges it."""
    rows = [(t[e.labelled] if kind == "classification" else t, e) for t, e in zip(tokens, found, strict=True)]
    width = max(len(row) for row, _ in rows)
    ids = torch.full((len(rows), width), -1)
    labels = torch.full((len(rows), width), torch.nan)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (row, e) in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row), True
        labels[i, : len(row)] = torch.from_numpy(e.labels[e.labelled] if kind == "classification" else e.labels)
    x = probe.norm(probe.codes[ids] + probe.position.weight[:width])
    if kind == "classification":
        logits = probe.head((x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True))
        return logits, F.cross_entropy(logits, labels[:, 0].long())
    logits = probe.head(x).squeeze(-1)
    known = ~labels.isnan()
    p, y = logits[known], labels[known]
    if kind == "regression":
        return p, ((p - y) ** 2).mean()
    weights = torch.ones_like(y) * len(y) / (len(y) - y.sum()) * 0.5
    weights[y == 1] = len(y) / y.sum() * 0.5
    return p, nn.BCEWithLogitsLoss(weight=weights)(p, y)


@pytest.mark.parametrize("kind", ["binary", "regression", "classification"])
def test_flat_batches_equal_padded_ones(kind):
    torch.manual_seed(0)
    found = examples(kind)
    tokens = tokens_of(found, 11)
    data = probe_data(found, tokens, kind)
    probe = Probe(torch.randn(11, 6), 3 if kind == "classification" else 1, hidden=8, dropout=0.1, positions=9,
                  pool=kind == "classification").eval()
    *inputs, labels = probes._batch(data, [0, 1, 2])
    logits = probe(*inputs)
    expected, loss = padded_reference(probe, found, tokens, kind)
    got = logits if kind == "classification" else logits.squeeze(1)[~labels.isnan()]
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(probe_loss(logits, labels, kind), loss)


def test_both_classes_weigh_the_same():
    """One positive among four: weights 2 and 2/3; all logits 0, so every residue costs log 2."""
    logits, labels = torch.zeros(4, 1), torch.tensor([1.0, 0, 0, 0])
    assert probe_loss(logits, labels, "binary").item() == pytest.approx((2 + 3 * 2 / 3) / 4 * math.log(2))
    assert probe_loss(logits, torch.zeros(4), "binary").item() == pytest.approx(0.5 * math.log(2))
    assert probe_loss(logits, torch.ones(4), "binary").item() == pytest.approx(0.5 * math.log(2))


def test_codes_are_frozen_and_no_token_is_zero():
    probe = Probe(torch.ones(2, 4), 1, hidden=8, dropout=0, positions=9, pool=False)
    assert "codes" not in dict(probe.named_parameters())
    assert torch.equal(probe.codes[-1], torch.zeros(4))


def test_weight_decay_spares_biases_and_the_layer_norm():
    probe = Probe(torch.ones(2, 4), 1, hidden=8, dropout=0, positions=9, pool=False)
    decayed, plain = (group["params"] for group in probes._optimizer(probe, 1.0, ProbeConfig()).param_groups)
    assert [p.shape for p in decayed] == [(9, 4), (8, 4), (1, 8)]
    assert [p.shape for p in plain] == [(4,), (4,), (8,), (1,)]


def test_schedule():
    """200 steps up, a tenth of the steps level, half a cosine over the rest, cut off at a tenth."""
    factor = ProbeConfig().learning_rate_factor
    assert [factor(s) for s in (0, 100, 200, 1199)] == [0, 0.5, 1, 1]
    middle = 1200 + (10000 - 1200) // 2
    assert factor(middle) == pytest.approx(0.5)
    assert factor(9999) == 0.1
    assert all(factor(s + 1) <= factor(s) for s in range(200, 9999, 50))


# --------------------------------------------------------------------------------------------------------- training

def synthetic(kind, chains, seed, codes=12):
    """Labels that the tokens decide: token >= 9, token value, or the token that most residues of the chain have."""
    rng = np.random.default_rng(seed)
    found, tokens = [], []
    for i in range(chains):
        length = int(rng.integers(12, 25))
        row = rng.integers(0, codes, length)
        if kind == "classification":
            row[: length // 2] = i % 3
            labels = np.full(length, i % 3)
        else:
            labels = row >= 9 if kind == "binary" else row
        found.append(Example(str(i), helix(str(i), length), labels.astype(np.float32)))
        tokens.append(row)
    return probe_data(found, tokens, kind)


def splits(kind):
    return {"train": synthetic(kind, 40, 0), "valid": synthetic(kind, 9, 1), "test": synthetic(kind, 12, 2)}


SHORT = ProbeConfig(max_steps=60, warmup_steps=5, hidden=32)


@pytest.mark.parametrize("kind", ["binary", "regression", "classification"])
def test_training_finds_what_tokens_decide(kind):
    codebook = 3 * torch.eye(12)
    best = train_probe(splits(kind), codebook, 3, replace(SHORT, max_steps=150), 0.01, 0, CPU)
    assert best["pooled"]["tests"]["test"] > 0.9
    assert best["pooled"]["valid"] > 0.9
    assert 0 < best["pooled"]["step"] <= 150
    if kind == "binary":  # each batch of 8 has both classes here, and the last one of 4 too
        assert best["as coded"]["tests"]["test"] > 0.9
    if kind == "regression":
        assert best["as coded"] == best["pooled"]


def test_the_seed_decides_everything():
    runs = [train_probe(splits("binary"), torch.eye(12), 0, SHORT, 1e-3, seed, CPU) for seed in (0, 0, 1)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def _probe():
    torch.manual_seed(0)
    return Probe(torch.eye(12), 1, hidden=8, dropout=0, positions=30, pool=False)


def test_predictions_do_not_depend_on_the_batch_size():
    data = splits("binary")["test"]
    rows = [np.concatenate([scores for scores, _ in probes.predict(_probe(), data, size, CPU)]) for size in (1, 5, 12)]
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-6)
    np.testing.assert_allclose(rows[0], rows[2], atol=1e-6)


def test_each_protocol_tests_the_step_it_chose(monkeypatch):
    """Validation scores rise and fall, for the protocols at different times: their test numbers are of those steps."""
    scores = iter([(0.1, 0.9), (0.9, 0.2), (0.5, 0.3)])
    real, steps = probes.measures, []

    def scripted(batches, kind):
        found = real(batches, kind)
        try:
            pooled, coded = next(scores)
        except StopIteration:
            return found
        steps.append(found)
        return {"pooled": (pooled, pooled), "as coded": (coded, coded)}

    monkeypatch.setattr(probes, "measures", scripted)
    data = splits("binary")
    data["test"] = data["valid"]  # so that the numbers at the chosen steps are known
    cfg = ProbeConfig(max_steps=15, warmup_steps=1, hidden=32)
    best = train_probe(data, torch.eye(12), 0, cfg, 0.01, 0, CPU)
    assert (best["pooled"]["step"], best["as coded"]["step"]) == (10, 5)
    assert best["pooled"]["tests"]["test"] == steps[1]["pooled"][0]
    assert best["as coded"]["tests"]["test"] == steps[0]["as coded"][0]
    assert steps[0]["pooled"] != steps[1]["pooled"]
