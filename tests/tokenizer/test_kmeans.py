"""Nearest codes, k-means and the usage statistics of provq.py against closed forms and brute force."""

import itertools
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from places import ROOT

from tokenizer import provq
from tokenizer.provq import code_statistics, kmeans, nearest_code


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _brute(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return (x.double()[:, None] - codes.double()[None]).square().sum(-1).argmin(1)


def _blobs(per_blob: int = 40, blobs: int = 12, dim: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of well separated blobs, and the blob of each token."""
    centres = 100.0 * torch.tensor(list(itertools.product(range(3), repeat=dim)), dtype=torch.float32)[:blobs]
    label = torch.arange(blobs).repeat_interleave(per_blob)
    return centres[label] + 0.1 * _normal(len(label), dim, seed=seed), label


# ------------------------------------------------------------------------------------------------ nearest_code

@pytest.mark.parametrize(("n", "k", "d"), [(1, 1, 1), (500, 7, 2), (300, 64, 8), (64, 1000, 16), (600, 999, 5),
                                           (1025, 257, 3), (70, 20011, 8), (129, 9000, 4)])
def test_nearest_code_agrees_with_float64_brute_force(n, k, d):
    x, codes = _normal(n, d), _normal(k, d, seed=1)
    assert torch.equal(nearest_code(x, codes), _brute(x, codes))


def test_nearest_code_of_no_tokens():
    found = nearest_code(torch.zeros(0, 4), _normal(8, 4))
    assert found.shape == (0,)
    assert found.dtype == torch.int64


def test_nearest_code_stays_float32_under_autocast():
    codes = torch.linspace(-1, 1, 400)[:, None].repeat(1, 2)  # spacing 0.005: bfloat16 cannot tell neighbours apart
    x = codes + 0.001
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.mm(x, x.t()).dtype == torch.bfloat16, "the premise: autocast is on"
        assert torch.equal(nearest_code(x, codes), torch.arange(400))


@pytest.mark.parametrize("offset", [0.0, 1000.0, -3000.0])
def test_nearest_code_survives_a_common_offset(offset):
    codes = offset + 0.1 * torch.stack(torch.meshgrid(torch.arange(20.0), torch.arange(20.0), indexing="ij"), -1)
    codes = codes.reshape(-1, 2)
    x = codes + 0.02
    assert torch.equal(nearest_code(x, codes), torch.arange(400))


@pytest.mark.parametrize("apart", [10.0, 100.0, 1000.0])
def test_codes_in_clusters_far_apart(apart):
    """Their middle is in none of them: what float32 can tell apart is what the docstring says, and float64 all."""
    side = torch.tensor([-apart / 2, apart / 2])
    codes = _normal(512, 8) + side.repeat(256)[:, None]
    x = _normal(3000, 8, seed=1) + side.repeat(1500)[:, None]
    distances = torch.cdist(x.double(), codes.double()).square()
    chosen = distances.gather(1, nearest_code(x, codes)[:, None])[:, 0]
    assert ((chosen - distances.amin(1)) <= 2e-6 * 8 * (apart + 6) ** 2).all()
    assert torch.equal(nearest_code(x.double(), codes.double()), distances.argmin(1))


def test_k_means_warns_where_float32_cannot_tell_codes_apart():
    for apart, tells in ((1.0, False), (30.0, False), (3000.0, True)):
        x = _normal(2000, 8) + torch.tensor([-apart / 2, apart / 2]).repeat(1000)[:, None]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kmeans(x, 64, iters=2)
        assert [str(w.message)[:37] for w in caught] == ["tokens lie in clusters hundreds of ti"] * tells
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kmeans(_normal(5, 3), 5), kmeans(_normal(50, 3), 1), kmeans(1e4 + _normal(500, 1), 100)  # no sign of clusters


def test_nearest_code_keeps_float64():
    codes = torch.tensor([[1.0], [1.0 + 1e-9]], dtype=torch.float64)
    assert nearest_code(codes, codes).tolist() == [0, 1]
    assert nearest_code(codes, codes.float()).tolist() == [0, 0]  # in float32 both codes are 1


def test_ties_go_to_the_lowest_index():
    corners = torch.tensor([[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]])  # small integers: no rounding at all
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    assert nearest_code(x, corners).tolist() == [0, 2, 1, 3]
    assert nearest_code(x, corners.repeat(8, 1)).tolist() == [0, 2, 1, 3]
    assert nearest_code(torch.zeros(50, 3), torch.zeros(32, 3)).eq(0).all()


def test_blocks_change_nothing(monkeypatch):
    x, codes = _normal(301, 8), _normal(50, 8, seed=1)
    whole = nearest_code(x, codes)
    for elements in (1, 50, 150, 50 * 301):
        monkeypatch.setattr(provq, "CPU_SEARCH_ELEMENTS", elements)
        assert torch.equal(nearest_code(x, codes), whole), elements


@pytest.mark.parametrize("elements", [2**8, 2**19])  # the codes in pieces, and all of a row's at once
def test_of_equal_codes_in_any_group_the_first_wins(monkeypatch, elements):
    monkeypatch.setattr(provq, "CPU_SEARCH_ELEMENTS", elements)
    codes = _normal(300, 5)
    x = codes + 0.01 * _normal(300, 5, seed=1)
    x = x.repeat(7, 1)
    assert torch.equal(nearest_code(x, codes.repeat(3, 1)), torch.arange(300).repeat(7))
    assert torch.equal(nearest_code(torch.zeros(1000, 2), torch.zeros(1000, 2)), torch.zeros(1000).long())


@pytest.mark.parametrize("elements", [2**8, 2**19])
@pytest.mark.parametrize("codes", [200, 1000])
def test_a_code_or_a_token_that_is_no_number_is_seen(monkeypatch, codes, elements):
    monkeypatch.setattr(provq, "CPU_SEARCH_ELEMENTS", elements)
    x, table = _normal(1500, 4), _normal(codes, 4, seed=1)
    x[3] = math.nan
    distance, index = provq._search(x, table)
    assert distance.isnan().nonzero().tolist() == [[3]]
    assert index[3] == 0
    table[70, 1] = table[150, 2] = math.nan
    assert provq._search(x, table)[0].isnan().all()
    for search in (provq._search_whole, provq._search_groups):
        value, index = search(x[4:], table, table.square().sum(1))
        assert value.isnan().all()
        assert index.eq(70).all()


@pytest.mark.parametrize("elements", [2**8, 2**19])
@pytest.mark.parametrize("codes", [64, 1000])
def test_a_code_at_infinity_is_never_the_nearest(monkeypatch, codes, elements):
    monkeypatch.setattr(provq, "CPU_SEARCH_ELEMENTS", elements)
    x, table = _normal(1500, 4), _normal(codes, 4, seed=1)
    kept = torch.arange(codes) > 9
    table[5], table[7, 2], table[9, :2] = math.inf, -math.inf, torch.tensor([math.inf, -math.inf])
    table[[0, 1, 2, 3, 4, 6, 8]] = 1e6
    assert torch.equal(nearest_code(x, table), 10 + torch.cdist(x.double(), table[kept].double()).argmin(1))
    assert nearest_code(x, torch.full((codes, 4), math.inf)).lt(codes).all()


@pytest.mark.parametrize("no_grad", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("tokens", "shares"), [(30000, 3), (15000, 2), (500, 1)])
def test_threads_share_the_tokens_and_change_nothing(monkeypatch, no_grad, tokens, shares):
    before, blocks, seen = torch.get_num_threads(), provq._search_blocks, []

    def watched(x, codes):
        seen.append((len(x), torch.get_num_threads()))
        return blocks(x, codes)

    x, codes = _normal(tokens, 4).requires_grad_(), _normal(2100, 4, seed=1).requires_grad_()
    try:
        torch.set_num_threads(1)
        alone = nearest_code(x, codes)
        torch.set_num_threads(3)
        monkeypatch.setattr(provq, "_search_blocks", watched)
        with no_grad():
            assert torch.equal(nearest_code(x, codes), alone)
            assert len(seen) == shares
            assert sum(n for n, _ in seen) == tokens
            assert {threads for _, threads in seen} == {1}, "no block is shared: threads would wait for one another"
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert torch.equal(nearest_code(x, codes), alone)
        assert torch.get_num_threads() == 3, "the caller's number"
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone[::9], torch.cdist(x.detach()[::9].double(), codes.detach().double()).argmin(1))


@pytest.mark.parametrize("k", [100, 1000])
def test_a_compiled_search_is_one_graph_with_the_same_result(k):
    x, codes = _normal(3000, 4), _normal(k, 4, seed=1)
    compiled = torch.compile(nearest_code, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, codes), nearest_code(x, codes))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
def test_search_and_kmeans_never_hold_the_distance_matrix():
    # 65536 x 16384 distances are 4 GiB in float32; the whole process must stay under 2 GB. That takes more than
    # blocks: a small result that outlives its 2 MiB block can pin the freed memory behind it.
    # The peak is read from the process itself: getrusage would report the peak of the process that started it.
    script = ("import re, sys, torch; sys.path.insert(0, sys.argv[1]); from tokenizer import provq\n"
              "x = torch.randn(65536, 8)\n"
              "result = provq.kmeans(x, 16384, iters=0, start='random')\n"
              "assert len(provq.nearest_code(x[:16384], result.centroids)) == 16384\n"
              "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])")
    done = subprocess.run([sys.executable, "-c", script, str(ROOT)], capture_output=True, text=True, timeout=120,
                          check=True)
    assert int(done.stdout) * 1024 < 2e9


# ----------------------------------------------------------------------------------------------------- k-means

@pytest.mark.parametrize("seed", range(5))
def test_separated_blobs_are_recovered_exactly(seed):
    x, label = _blobs()
    result = kmeans(x, 12, seed=seed)
    means = torch.stack([x[label == b].double().mean(0) for b in range(12)]).float()
    order = nearest_code(means, result.centroids)
    assert sorted(order.tolist()) == list(range(12))
    torch.testing.assert_close(result.centroids[order], means, rtol=1e-6, atol=1e-5)
    assert result.counts.tolist() == [40] * 12


def test_the_result_is_a_fixed_point_with_its_own_counts_and_inertia():
    x = _normal(600, 3)
    result = kmeans(x, 8, iters=500)
    assert result.iterations < 500
    index = _brute(x, result.centroids)
    means = torch.stack([x[index == k].double().mean(0) for k in range(8)])
    torch.testing.assert_close(result.centroids.double(), means, rtol=1e-6, atol=1e-6)
    assert torch.equal(result.counts, torch.bincount(index, minlength=8))
    assert result.counts.dtype == torch.int64
    assert result.centroids.dtype == torch.float32
    assert result.inertia == pytest.approx((x - result.centroids[index]).square().sum(1).mean().item(), rel=1e-5)


def test_counts_and_inertia_belong_to_the_returned_centroids_when_iterations_run_out():
    x = _normal(600, 3)
    result = kmeans(x, 20, iters=1)
    index = _brute(x, result.centroids)
    assert result.iterations == 1
    assert torch.equal(result.counts, torch.bincount(index, minlength=20))
    assert result.inertia == pytest.approx((x - result.centroids[index]).square().sum(1).mean().item(), rel=1e-5)


def test_inertia_falls_with_iterations():
    x = _normal(800, 4)
    inertia = [kmeans(x, 16, iters=n, start="random").inertia for n in (0, 1, 2, 5, 20)]
    assert all(a > b for a, b in itertools.pairwise(inertia))


@pytest.mark.parametrize("start", ["kmeans++", "random"])
def test_zero_iterations_return_distinct_tokens(start):
    x = _normal(100, 3)
    result = kmeans(x, 10, iters=0, start=start)
    rows = [(x == c).all(1).nonzero().tolist() for c in result.centroids]
    assert all(len(r) == 1 for r in rows)
    assert len({r[0][0] for r in rows}) == 10
    assert result.iterations == 0


def test_empty_clusters_move_to_far_tokens():
    # A random start takes nearly all its seeds from the 500 equal tokens, so that most clusters begin empty.
    far = 10.0 * _normal(20, 3)
    x = torch.cat([torch.zeros(500, 3), far])
    start = kmeans(x, 8, iters=0, start="random")
    assert (start.counts == 0).sum() >= 5, "the premise: empty clusters"
    result = kmeans(x, 8, iters=1, start="random")  # one iteration: without the move, six codes would share a place
    assert (result.counts > 0).all()
    assert result.inertia < 0.5 * start.inertia


def test_ties_among_far_tokens_follow_order():
    axes = 8.0 * torch.cat([torch.eye(6), -torch.eye(6)])  # all equally far from the zeros
    x = torch.cat([torch.zeros(200, 6), axes])
    straight = kmeans(x, 8, iters=1, start="random")
    for seed in range(4):
        shuffle = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        shuffled = kmeans(x[shuffle], 8, iters=1, start="random", order=shuffle)
        assert torch.equal(shuffled.centroids, straight.centroids)


def test_fewer_distinct_tokens_than_codes():
    x = torch.eye(3).repeat(10, 1)
    for start in ("kmeans++", "random"):
        result = kmeans(x, 8, start=start)
        assert result.centroids.isfinite().all()
        assert result.inertia == 0.0
        assert sorted(result.counts.tolist()) == [0] * 5 + [10] * 3
        assert result.iterations < 20


def test_as_many_tokens_as_codes():
    x = _normal(16, 3)
    result = kmeans(x, 16)
    assert result.counts.tolist() == [1] * 16
    assert sorted(result.centroids.tolist()) == sorted(x.tolist())


def test_spherical_clusters_by_angle():
    directions = F.normalize(_normal(6, 4, seed=3), dim=1)
    label = torch.arange(6).repeat(50)
    length = 0.1 + 100 * torch.rand(300, 1, generator=torch.Generator().manual_seed(1))  # must not matter
    x = length * F.normalize(directions[label] + 0.01 * _normal(300, 4), dim=1)
    result = kmeans(x, 6, spherical=True)
    torch.testing.assert_close(result.centroids.norm(dim=1), torch.ones(6))
    assert ((directions @ result.centroids.t()).amax(1) > 0.999).all()
    assert result.counts.tolist() == [50] * 6
    assert result.inertia < 0.01


def test_a_seed_reproduces_and_leaves_the_global_generator_alone():
    x = _normal(500, 3)
    before = torch.get_rng_state()
    first, again, other = kmeans(x, 16, seed=1), kmeans(x, 16, seed=1), kmeans(x, 16, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.centroids, again.centroids)
    assert not torch.equal(first.centroids, other.centroids)


@pytest.mark.parametrize("start", ["kmeans++", "random"])
def test_order_makes_the_storage_order_irrelevant(start):
    x = _normal(500, 3)
    shuffle = torch.randperm(500, generator=torch.Generator().manual_seed(9))
    straight = kmeans(x, 16, start=start)
    shuffled = kmeans(x[shuffle], 16, start=start, order=shuffle)
    torch.testing.assert_close(shuffled.centroids, straight.centroids, rtol=1e-6, atol=1e-6)
    assert torch.equal(shuffled.counts, straight.counts)
    unordered = kmeans(x[shuffle], 16, start=start)
    assert not torch.allclose(unordered.centroids, straight.centroids), "the premise: storage order matters without it"


def test_kmeans_plus_plus_starts_better_than_random():
    x, _ = _blobs(blobs=20)
    for iters in (0, 10):
        careful = [kmeans(x, 20, iters=iters, seed=s).inertia for s in range(5)]
        blind = [kmeans(x, 20, iters=iters, seed=s, start="random").inertia for s in range(5)]
        assert sum(careful) < 0.1 * sum(blind)


def test_kmeans_plus_plus_in_blocks_is_distributed_as_one_by_one():
    # Four seeds of five points. Drawn one by one, the set that leaves point i out has a probability that can be summed
    # over all orders of drawing; blocks of 1, 2 and more candidates must give the same.
    points = torch.tensor([[0.0], [1.0], [2.5], [6.0], [6.5]])
    exact = dict.fromkeys(range(5), 0.0)
    for order in itertools.permutations(range(5), 4):
        probability, nearest = 1 / 5, (points[:, 0] - points[order[0], 0]).square().double()
        for k in order[1:]:
            probability *= float(nearest[k] / nearest.sum())
            nearest = torch.minimum(nearest, (points[:, 0] - points[k, 0]).square().double())
        exact[(set(range(5)) - set(order)).pop()] += probability
    generator, runs = torch.Generator().manual_seed(0), 1500
    seeds = torch.stack([provq._kmeans_plus_plus(points, 4, generator)[:, 0] for _ in range(runs)])
    for left, probability in exact.items():
        share = (~(seeds == points[left, 0]).any(1)).double().mean().item()
        assert abs(share - probability) < 5 * math.sqrt(probability * (1 - probability) / runs) + 1e-9, left


def test_kmeans_plus_plus_searches_a_few_times_for_many_codes(monkeypatch):
    calls, search = [], provq._search
    monkeypatch.setattr(provq, "_search", lambda *args: calls.append(1) or search(*args))
    seeds = provq._kmeans_plus_plus(_normal(5000, 4), 1200, torch.Generator().manual_seed(0))
    assert len(seeds.unique(dim=0)) == 1200
    assert len(calls) < 30


def test_half_precision_tokens():
    x, _ = _blobs()
    result = kmeans(x.bfloat16(), 12)
    torch.testing.assert_close(result.centroids, kmeans(x.bfloat16().float(), 12).centroids)


def test_kmeans_is_float32_under_autocast():
    x = _normal(2000, 8) + 5
    plain = kmeans(x, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = kmeans(x, 32)
    assert torch.equal(under.centroids, plain.centroids)
    assert under.inertia == plain.inertia


@pytest.mark.parametrize(("x", "options", "message"), [
    (torch.zeros(5), {}, r"\(N, D\)"),
    (torch.zeros(5, 2, dtype=torch.int64), {}, "int64"),
    (torch.zeros(3, 2), {}, "4 tokens over all ranks, got 3"),
    (torch.tensor([[math.nan, 0.0]]).repeat(9, 1), {}, "9 non-finite"),
    (torch.tensor([[math.inf, 0.0]]).repeat(9, 1), {}, "non-finite"),
    (torch.zeros(9, 2), {"start": "median"}, "median"),
    (torch.zeros(9, 2), {"iters": -1}, "iters"),
    (torch.zeros(9, 2), {"order": torch.zeros(9, dtype=torch.int64)}, "order"),
])
def test_kmeans_errors(x, options, message):
    with pytest.raises(ValueError, match=message):
        kmeans(x, 4, **options)


def test_kmeans_refuses_no_codes():
    with pytest.raises(ValueError, match="num_codes"):
        kmeans(torch.zeros(9, 2), 0)


@pytest.mark.parametrize("order", [torch.arange(8), torch.arange(1, 10), torch.arange(9) - 1])
def test_a_wrong_order_is_a_value_error(order):
    with pytest.raises(ValueError, match="order"):
        kmeans(_normal(9, 2), 4, order=order)


# -------------------------------------------------------------------------------------------------- statistics

def test_code_statistics_closed_forms():
    assert code_statistics(torch.zeros(8, dtype=torch.int64)) == {"usage": 0.0, "perplexity": 0.0}
    assert code_statistics(torch.tensor([0, 7, 0, 0])) == {"usage": 0.25, "perplexity": pytest.approx(1.0)}
    assert code_statistics(torch.full((8,), 3)) == {"usage": 1.0, "perplexity": pytest.approx(8.0)}
    skewed = code_statistics(torch.tensor([1, 3, 0, 0]))
    assert skewed["usage"] == 0.5
    assert skewed["perplexity"] == pytest.approx(math.exp(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75))))
