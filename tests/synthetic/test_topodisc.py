"""TopoDisc: its data, meters, training, report and command line."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from synthetic import meters, run_topodisc, tuning
from synthetic.settings import CURRICULA, FINAL_SEEDS, Setting
from synthetic.topodisc import (
    EDGE_POINTS,
    METERS,
    Run,
    StackedMLP,
    corners,
    diagnose,
    improvement,
    make_arm,
    make_curriculum,
    make_edges,
    make_mlp,
    make_points,
    summarise,
    table,
    train,
    train_jobs,
)
from tokenizer import provq
from tokenizer.provq_codes import FollowingVectorQuantizer
from tokenizer.runtime.over_seeds import mean_interval

TINY = Setting(
    disk_points=40, outline_points=30, num_codes=8, width=16, epochs=30, warmup_epochs=8, transition_epochs=12)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors this small only lose by a second thread, and a lot when the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------- data

def distance_to_segment(points, a, b):
    t = ((points - a) @ (b - a) / (b - a).square().sum()).clamp(0, 1)
    return (points - torch.lerp(a, b, t[:, None])).norm(dim=1)


@pytest.mark.parametrize(("sides", "disk_radius", "outline_radius"), [(3, 1.0, 2.0), (5, 0.3, 1.5)])
def test_data_lie_where_they_should(sides, disk_radius, outline_radius):
    setting = Setting(disk_points=4000, outline_points=3000, sides=sides, disk_radius=disk_radius,
                      outline_radius=outline_radius)
    points = make_points(setting, seed=0)
    disk, outline = points[:4000].norm(dim=1) / disk_radius, points[4000:]
    assert points.shape == (7000, 2)
    assert points.dtype == torch.float32
    assert disk.max() <= 1 + 1e-6
    # Uniform in area: P(radius <= r) = r^2. The Kolmogorov distance of 4000 points is below 0.026 in 99 % of draws.
    assert (disk.sort().values.square() - torch.linspace(0, 1, 4000)).abs().max() < 0.026
    ends = corners(setting)
    torch.testing.assert_close(ends.norm(dim=1), torch.full((sides,), outline_radius))
    to_edges = torch.stack([distance_to_segment(outline, ends[e], ends[(e + 1) % sides]) for e in range(sides)])
    assert to_edges.min(0).values.max() < 1e-5
    share = torch.bincount(to_edges.argmin(0), minlength=sides) / 3000
    assert (share - 1 / sides).abs().max() < 0.035


def test_the_default_triangle_is_drawn_around_the_disk():
    setting = Setting()
    assert (setting.disk_points, setting.outline_points, setting.sides) == (400, 275, 3)
    ends = corners(setting)
    for a, b in zip(ends, ends.roll(-1, 0), strict=True):
        assert distance_to_segment(torch.zeros(1, 2), a, b).item() == pytest.approx(setting.disk_radius, rel=1e-5)


def test_data_depend_on_the_seed_alone_and_noise_is_added():
    clean, noisy = Setting(), Setting(noise=0.1)
    assert torch.equal(make_points(clean, 3), make_points(clean, 3))
    assert not torch.equal(make_points(clean, 3), make_points(clean, 4))
    added = make_points(noisy, 3) - make_points(clean, 3)
    assert added.std().item() == pytest.approx(0.1, rel=0.1)


def test_edges_run_in_order_from_corner_to_corner():
    edges = make_edges(Setting())
    ends = corners(Setting())
    assert edges.shape == (3, EDGE_POINTS, 2)
    torch.testing.assert_close(edges[:, 0], ends)
    torch.testing.assert_close(edges[:, -1], ends.roll(-1, 0))
    assert meters.edge_bending(edges) == pytest.approx((0, 1), abs=1e-6)


@pytest.mark.parametrize(("wrong", "message"), [
    ({"sides": 2}, "--sides"), ({"lr": 0.0}, "--lr"), ({"noise": -1.0}, "--noise"), ({"width": 0}, "--width"),
    ({"num_codes": 676}, "--num-codes 676"), ({"epochs": 300}, "--epochs 300"), ({"loss_floor": 2.0}, "--loss-floor"),
    ({"warmup_epochs": -1}, "--warmup-epochs is -1"),
])
def test_settings_that_cannot_be_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message):
        Setting(**wrong)


# ------------------------------------------------------------------------------------------------------ meters

def test_gap_is_the_share_of_variance_that_quantization_loses():
    latents = torch.tensor([[0.0, 0], [2, 0], [10, 0], [12, 0]])  # variance 26, within the pairs 1
    assert meters.quantization_gap(latents, torch.tensor([[1.0, 0], [11, 0]])) == pytest.approx(1 / 26)
    assert meters.quantization_gap(latents, latents) == 0
    assert meters.quantization_gap(latents, latents.mean(0, keepdim=True)) == pytest.approx(1)
    assert meters.quantization_gap(latents, torch.tensor([[6.0, 26]])) == pytest.approx(27)
    assert meters.quantization_gap(torch.zeros(4, 2), torch.zeros(1, 2)) == 0


def test_closing_says_who_moves_and_how_far():
    torch.manual_seed(0)
    latents, codes = torch.randn(200, 3), torch.randn(7, 3)
    index = provq.nearest_code(latents, codes)
    gap = codes[index] - latents
    assert meters.closing(latents, codes, latents + 0.3 * gap, codes) == pytest.approx((0.3, 0), abs=1e-5)
    assert meters.closing(latents, codes, latents - 0.3 * gap, codes) == pytest.approx((-0.3, 0), abs=1e-5)
    assert meters.closing(latents, codes, latents, codes) == (0, 0)
    # One Lloyd step by hand: the codes go to the means of their latents, and what is left of the gap is what it lost.
    means = torch.stack([latents[index == k].mean(0) for k in range(7)])
    moved = meters.closing(latents, codes, latents, means)
    left = (latents - means[index]).square().sum() / gap.square().sum()
    assert moved.contraction == 0
    assert moved.pursuit == pytest.approx(1 - left.item(), abs=1e-5)
    # A latent and its only code that meet halfway; a shift of everything is what codes give and latents take away.
    z, e = torch.tensor([[1.0, 0]]), torch.tensor([[0.0, 0]])
    assert meters.closing(z, e, torch.tensor([[0.5, 0]]), torch.tensor([[0.5, 0]])) == (0.5, 0.5)
    assert meters.closing(z, e, z + 1, e + 1) == (-1, 1)


def triangle(depth, points=2001):
    """Edges of the default triangle with parabolic dents of that depth, in edge lengths, towards the centre."""
    ends = corners(Setting()).double()
    t = torch.linspace(0, 1, points, dtype=torch.float64)[:, None]
    chord = ends.roll(-1, 0) - ends
    inward = -(ends + ends.roll(-1, 0)) / (ends + ends.roll(-1, 0)).norm(dim=1, keepdim=True)
    dent = depth * chord.norm(dim=1)[:, None, None] * 4 * t * (1 - t)  # (3, points, 1)
    return torch.lerp(ends[:, None], ends.roll(-1, 0)[:, None], t) + dent * inward[:, None]


@pytest.mark.parametrize("depth", [0.1, -0.1, 0.02])
def test_bending_of_parabolic_edges(depth):
    a = 4 * abs(depth)  # arc length of a parabola of depth a / 4 over a chord of 1
    arc = 0.5 * math.sqrt(1 + a * a) + math.asinh(a) / (2 * a)
    bending = meters.edge_bending(triangle(depth))
    assert bending.inward == pytest.approx(2 / 3 * depth, rel=1e-3)
    assert bending.kept == pytest.approx(1 / arc, rel=1e-5)


def test_bending_ignores_affine_maps_and_works_in_any_dimension():
    into_5d = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert meters.edge_bending(triangle(0) @ into_5d + 3) == pytest.approx((0, 1), abs=1e-9)
    rotated = torch.linalg.qr(into_5d.t()).Q.t()  # orthonormal rows: lengths stay
    assert meters.edge_bending(triangle(0.1) @ rotated) == pytest.approx(meters.edge_bending(triangle(0.1)))
    assert meters.edge_bending(torch.zeros(3, 9, 2)) == (0, 0)
    there_and_back = torch.tensor([[[0.0, 0], [1, 0], [0, 0]]])
    assert meters.edge_bending(there_and_back).kept == 0
    with pytest.raises(ValueError, match="edges must be"):
        meters.edge_bending(torch.zeros(9, 2))


def test_spread_is_the_rms_radius():
    assert meters.spread(torch.tensor([[3.0, 4], [-3, -4]]) + 100) == pytest.approx(5)


# ---------------------------------------------------------------------------------------------------- training

def test_a_stack_of_networks_is_the_networks():
    torch.manual_seed(0)
    networks = [make_mlp(16) for _ in range(3)]
    x = torch.randn(3, 50, 2)
    expected = torch.stack([network(part) for network, part in zip(networks, x, strict=True)])
    torch.testing.assert_close(StackedMLP(networks)(x), expected)


def test_workers_change_nothing():
    jobs = [("vanilla", TINY), ("provq", dataclasses.replace(TINY, lr=1e-2))]
    alone, pool = (list(train_jobs(jobs, range(2), log_every=10, workers=workers)) for workers in (1, 2))
    for one, other in zip(alone, pool, strict=True):
        assert (one.seeds, one.epochs) == (other.seeds, other.epochs)
        torch.testing.assert_close(one.codes, other.codes, rtol=0, atol=0)
        torch.testing.assert_close(one.meters, other.meters, rtol=0, atol=0, equal_nan=True)


def train_one_plainly(method, setting, seed):
    """The loop of provq.py's docstring for one seed, with plain networks: latents and codes at the end."""
    points, arm = make_points(setting, seed), make_arm(method, setting)
    torch.manual_seed(seed)
    encoder, decoder = make_mlp(setting.width), make_mlp(setting.width)
    quantizer = provq.ProVQ(arm.quantizer(setting.num_codes, 2), make_curriculum(arm.curriculum, setting))
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters(), *quantizer.parameters()], setting.lr)
    for epoch in range(setting.epochs):
        quantizer.set_step(epoch)
        z = encoder(points)
        if quantizer.needs_init:
            quantizer.init_codebook(z.detach(), seed=seed, optimizers=[optimizer])
        out = quantizer(z)
        loss = (decoder(out.quantized) - points).square().mean() + out.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    quantizer.set_step(setting.epochs)
    return encoder(points).detach(), quantizer.codebook().detach()


METHODS = ["vanilla", "soft", "warmup", "provq", "ema+provq", "simvq+soft"]


@pytest.mark.parametrize("method", METHODS)
def test_seeds_side_by_side_train_as_one_by_one(method):
    seeds = [5, 2, 9]
    together = train(make_arm(method, TINY), TINY, seeds)
    for s, seed in enumerate(seeds):
        alone = train(make_arm(method, TINY), TINY, [seed])
        # Bit for bit on one machine; room for rounding where a BLAS chooses its kernel by the size of the batch.
        for name in ("latents", "edges", "codes"):
            torch.testing.assert_close(getattr(alone, name)[:, 0], getattr(together, name)[:, s], rtol=1e-4, atol=1e-5)


@pytest.fixture
def _float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# In float64: k-means leaves gradients of 0 to the codes, and of their float32 rounding Adam would make steps of lr.
@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_plain_loop_with_plain_networks(method):
    run = train(make_arm(method, TINY), TINY, [5, 2])
    for s, seed in enumerate(run.seeds):
        latents, codes = train_one_plainly(method, TINY, seed)
        torch.testing.assert_close(run.latents[-1, s], latents, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(run.codes[-1, s], codes, rtol=1e-6, atol=1e-7)


def test_arms_of_a_seed_differ_by_their_curriculum_only():
    runs = {method: train(make_arm(method, TINY), TINY, [0, 1], log_every=4) for method in ("vanilla", "soft", "provq")}
    for name in ("points", "latents", "edges", "codes"):
        first = [getattr(run, name) if name == "points" else getattr(run, name)[0] for run in runs.values()]
        assert torch.equal(first[0], first[1])
        assert torch.equal(first[0], first[2])
    assert runs["provq"].epochs == [0, 4, 8, 12, 16, 20, 24, 28, 30]
    assert set(runs["provq"].meters) == set(METERS)
    has_codes = runs["provq"].meters["gap"].isfinite().all(1)
    assert has_codes.tolist() == [False, False, True, True, True, True, True, True, True], "codes exist from epoch 8 on"
    assert runs["vanilla"].meters["gap"].isfinite().all()
    for run in runs.values():
        end = {name: run.final(name) for name in METERS}
        assert all(np.isfinite(values).all() for values in end.values())
        for s in range(2):
            z, codes = run.latents[-1, s], run.codes[-1, s]
            assert end["codes_used"][s] == len(provq.nearest_code(z, codes).unique())
            assert end["latent_spread"][s] == pytest.approx(meters.spread(z))
            closing = meters.closing(run.latents[-2, s], run.codes[-2, s], z, codes)
            assert end["contraction"][s] == pytest.approx(closing.contraction / 2)  # epochs 28 to 30
            assert end["pursuit"][s] == pytest.approx(closing.pursuit / 2)


class Foreign(nn.Module):
    """A quantizer of somebody else: four codes at fixed places, nothing trained."""

    def __init__(self, num_codes, dim):
        super().__init__()
        self.num_codes, self.dim = num_codes, dim
        self.register_buffer("codes", torch.zeros(num_codes, dim))

    def codebook(self):
        return self.codes

    def set_codebook_(self, centroids, counts=None):
        assert int(counts.sum()) == TINY.disk_points + TINY.outline_points
        self.codes.copy_(centroids)

    def latent(self, x):
        return x

    def lookup(self, indices):
        return self.codes[indices]

    def forward(self, x):
        indices = provq.nearest_code(x, self.codes)
        commit = (x - self.codes[indices]).square().mean()
        return provq.Quantized(self.codes[indices] + x - x.detach(), indices, {"commit": commit})


def test_diagnose_takes_a_quantizer_of_somebody_else():
    report = diagnose(Foreign, TINY, seeds=2)
    assert list(report.summary["methods"]) == list(report.runs) == list(CURRICULA)
    # All its codes are one point until k-means places them: only the arms with a warm-up have a codebook.
    assert report.summary["methods"]["plain"]["codes_used"] == report.summary["methods"]["soft"]["codes_used"] == 1
    assert report.summary["methods"]["provq"]["codes_used"] > 5
    assert "provq" in table(report.summary)
    directions = diagnose(lambda k, d: provq.VectorQuantizer(k, d, l2_norm=True), TINY, seeds=2, curricula=["provq"])
    run = directions.runs["provq"]
    for points in (run.latents, run.edges, run.codes[-1]):
        torch.testing.assert_close(points.norm(dim=-1), torch.ones(points.shape[:-1]))
    with pytest.raises(ValueError, match="curricula must name"):
        diagnose(Foreign, TINY, curricula=["hard"])
    with pytest.raises(TypeError, match="Linear lacks"):
        diagnose(nn.Linear, TINY)


def test_unknown_methods_are_refused_with_a_list():
    for method in ("vq-gan", "vq+hard", "vanilla+soft", "provq+recluster+recluster", "+recluster", ""):
        with pytest.raises(ValueError, match=r"unknown method.*vanilla.*simvq.*provq"):
            make_arm(method, TINY)
    assert make_arm("simvq+provq", TINY).curriculum == "provq"
    assert isinstance(make_arm("ema", TINY).quantizer(8, 2), provq.EMAVectorQuantizer)
    assert make_arm("vanilla", Setting(beta=0.5)).quantizer(8, 2).beta == 0.5


def test_reclustering_sets_the_codes_once_where_the_transition_ends(monkeypatch):
    calls = []
    whole = provq.ProVQ.recluster

    def record(self, latents, **options):
        calls.append((int(self.step), len(latents)))
        return whole(self, latents, **options)

    monkeypatch.setattr(provq.ProVQ, "recluster", record)
    points, when = TINY.disk_points + TINY.outline_points, TINY.warmup_epochs + TINY.transition_epochs
    for method in ("provq+recluster", "vanilla+recluster", "ema+warmup+recluster"):
        again = train(make_arm(method, TINY), TINY, [0, 1], log_every=1)
        assert calls == [(when, points)] * 2
        calls.clear()
        once = train(make_arm(method.removesuffix("+recluster"), TINY), TINY, [0, 1], log_every=1)
        torch.testing.assert_close(again.codes[:when], once.codes[:when], rtol=0, atol=0)
        assert not torch.equal(again.codes[when], once.codes[when])
        assert again.meters["gap"][when].mean() < once.meters["gap"][when].mean()
        assert not calls


def test_codes_that_follow_keep_the_spread_of_latents():
    run = train(make_arm("follow", TINY), TINY, [0], log_every=1)
    spreads = run.meters["code_spread"] / run.meters["latent_spread"]
    assert (spreads[3:] > 0.3).all(), "codes that are drawn narrow start as a speck"
    assert isinstance(make_arm("follow+provq", TINY).quantizer(8, 2), FollowingVectorQuantizer)


def test_the_curriculum_frees_the_triangle():
    """The finding, at a small seed count and a quarter of the default network's width."""
    setting = Setting(width=32)
    runs = {name: train(make_arm(name, setting), setting, range(3), log_every=50) for name in ("vanilla", "provq")}
    summary = summarise(runs, {}, "vanilla")
    gained = summary["methods"]["provq"]
    assert gained["improvement_triangle_pct"] > tuning.PAPER_TRIANGLE_PCT
    assert gained["improvement_triangle_ci95"][0] > 0
    middle = runs["vanilla"].epochs.index(200)
    closing = {name: runs["vanilla"].meters[name][middle].mean() for name in ("contraction", "pursuit", "inward_bend")}
    assert closing["contraction"] > 2 * closing["pursuit"] > 0, "the deadlock: latents close the gap, codes do not"
    assert closing["inward_bend"] > 0.02 > abs(runs["provq"].meters["inward_bend"][middle].mean())


# ------------------------------------------------------------------------------------------------------ report

def fake_run(disk, triangle, seeds=None):
    used = [8.0] * len(disk)
    values = {"disk_mse": disk, "triangle_mse": triangle, "codes_used": used, "perplexity": [n / 2 for n in used]}
    logged = {name: torch.tensor([value], dtype=torch.float64) for name, value in values.items()}
    return Run(list(seeds or range(len(disk))), [0], logged, *[torch.empty(0)] * 4)


def test_mean_interval_is_students():
    found = mean_interval(np.array([1.0, 2, 3, 4]))
    half = 3.182446 * math.sqrt(5 / 3) / 2  # t(0.975, 3 degrees of freedom)
    assert found["mean"] == 2.5
    assert found["std"] == pytest.approx(math.sqrt(5 / 3))
    assert found["ci95"] == pytest.approx([2.5 - half, 2.5 + half], rel=1e-6)


def test_improvement_is_paired_by_seed():
    hard, easy = np.array([1.0, 2, 4, 8, 16, 32]), np.array([1.0, 2, 4, 8, 16, 32]) * 0.8
    assert improvement(hard, easy) == (pytest.approx(20), pytest.approx([20, 20])), "seeds differ, the ratio does not"
    value, (low, high) = improvement(hard, easy[::-1].copy())
    assert value == pytest.approx(20)
    assert low < -50 < 20 < high
    rng = np.random.default_rng(1)
    baseline, arm = 1 + 0.1 * rng.standard_normal(400), 0.5 + 0.1 * rng.standard_normal(400)
    _, (low, high) = improvement(baseline, arm)
    delta = 100 * 0.1 * math.sqrt((1 + 0.25) / 400)  # first-order error of the ratio of two independent means
    assert (high - low) / 2 == pytest.approx(1.96 * delta, rel=0.1)


def test_summary_has_the_documented_shape():
    runs = {"vanilla": fake_run([2.0, 4], [1.0, 1]), "provq": fake_run([1.0, 2], [2.0, 2])}
    summary = json.loads(json.dumps(summarise(runs, {"lr": 1.0}, "vanilla")))
    assert summary["config"] == {"lr": 1.0, "baseline": "vanilla"}
    entry = summary["methods"]["provq"]
    assert entry["disk_mse"]["mean"] == 1.5
    assert set(entry["triangle_mse"]) == {"mean", "std", "ci95"}
    assert (entry["improvement_disk_pct"], entry["improvement_triangle_pct"]) == (50, -100)
    assert entry["improvement_disk_ci95"] == [50, 50]
    assert (entry["codes_used"], entry["perplexity"]) == (8, 4)
    assert summary["methods"]["vanilla"]["improvement_disk_pct"] == 0
    with pytest.raises(ValueError, match="different seeds"):
        summarise({**runs, "soft": fake_run([1.0, 2], [1.0, 2], seeds=[0, 7])}, {}, "vanilla")
    with pytest.raises(ValueError, match="at least 2 seeds"):
        summarise({"vanilla": fake_run([1.0], [1.0])}, {}, "vanilla")


def test_the_scan_picks_each_best_and_the_papers_view():
    def cell(method, lr, disk, triangle, num_codes=8):
        return {"method": method, "lr": lr, "width": 4, "num_codes": num_codes,
                "disk_mse": [disk], "triangle_mse": [triangle]}

    cells = [cell("vanilla", 1.0, 10, 10), cell("soft", 1.0, 9, 9), cell("provq", 1.0, 8, 5),  # as the paper reports
             cell("vanilla", 2.0, 6, 8), cell("soft", 2.0, 5, 7), cell("provq", 2.0, 5, 5),  # and with a better vanilla
             cell("vanilla", 3.0, 4, 4), cell("soft", 3.0, 5, 3), cell("provq", 3.0, 3, 2),  # soft loses on the disk
             cell("vanilla", 4.0, 3, math.nan), cell("soft", 4.0, 3, 3), cell("provq", 4.0, 2.9, 2.9),  # diverged
             cell("vanilla", 3.0, 1, 1, num_codes=16), cell("soft", 3.0, 1, 1, 16), cell("provq", 3.0, 1, 1, 16)]
    assert tuning.best(cells[:12], "vanilla")["lr"] == 3
    assert tuning.best(cells, "vanilla")["num_codes"] == 16
    assert [view["lr"] for view in tuning.paper_views(cells)] == [2, 1]
    assert tuning.paper_views(cells)[0]["provq_triangle_pct"] == pytest.approx(37.5)


# -------------------------------------------------------------------------------------------------- command line

FLAGS = ["--disk-points", "40", "--outline-points", "30", "--num-codes", "8", "--width", "16", "--epochs", "20",
         "--warmup-epochs", "5", "--transition-epochs", "5", "--log-every", "5"]


def test_the_command_writes_numbers_and_pictures(tmp_path, capsys):
    run_topodisc.main([*FLAGS, "--methods", "vanilla", "soft", "provq", "ema+warmup", "--seeds", "2", "--tuned",
                       "--tune-lr", "1e-3", "1e-2", "--tune-width", "16", "--tune-codes", "4", "--tune-seeds", "2",
                       "--workers", "1", "--out", str(tmp_path)])
    assert {p.name for p in tmp_path.iterdir()} == {
        "summary.json", "meters.json", "figure2.png", "figure3.png", "meters.png", "dynamics.gif",
        "scan.json", "summary_tuned.json", "figure2_tuned.png", "learning_rate.png"}
    summary, tuned = (json.loads((tmp_path / name).read_text()) for name in ("summary.json", "summary_tuned.json"))
    assert list(summary["methods"]) == ["vanilla", "soft", "provq", "ema+warmup"]
    assert summary["config"]["seeds"] == 2
    assert summary["config"]["num_codes"] == 8
    cells = json.loads((tmp_path / "scan.json").read_text())
    assert len(cells["scan"]) == 2 * 2 * 4
    assert len(cells["finals"]) == 2 * 4
    assert {len(cell["disk_mse"]) for cell in cells["finals"]} == {FINAL_SEEDS * 2}
    assert {cell["num_codes"] for cell in cells["finals"]} == {8}
    best = tuning.best(cells["finals"], "provq")
    assert tuned["config"]["tuned"]["provq"] == {"lr": best["lr"], "width": 16}
    logged = json.loads((tmp_path / "meters.json").read_text())
    assert logged["epochs"] == [0, 5, 10, 15, 20]
    assert set(logged["methods"]["provq"]) == set(METERS)
    assert logged["methods"]["provq"]["gap"][0] == [None, None]
    with Image.open(tmp_path / "dynamics.gif") as gif:
        assert gif.n_frames == 5
        assert gif.size[0] == 800
    assert "ema+warmup" in capsys.readouterr().out


IDLE = "has no effect"


@pytest.mark.parametrize("words", [
    ["--tune-seeds", "2", "--tuned"], ["--tune-seeds", "8"],  # what holds anyway
    ["--methods", "vanilla", "ema+provq", "--loss-floor", "0.1"], ["--methods", "ema", "--loss-floor", "1"],
    ["--methods", "vanilla", "--warmup-epochs", "0", "--transition-epochs", "0", "--epochs", "100"],
])
def test_flags_that_have_an_effect_or_say_what_holds_anyway_pass(words):
    run_topodisc.parse_config(words)


@pytest.mark.parametrize(("words", "message"), [
    (["--methods", "vanila"], "unknown method 'vanila'"), (["--methods", "soft", "soft"], "--methods names one twice"),
    (["--seeds", "1"], "--seeds"), (["--log-every", "0"], "--log-every is 0"), (["--tune-lr", "0"], "--tune-lr"),
    (["--tune-codes", "999"], "--tune-codes 999"), (["--workers", "-1"], "--workers"),
    (["--epoch", "100"], "--epochs"),
    (["--tune-lr", "0.1"], f"--tune-lr 0.1 {IDLE} without the fair view: add --tuned, or leave it out"),
    (["--tune-width", "8", "16"], f"--tune-width 8 16 {IDLE}"), (["--tune-codes", "8"], f"--tune-codes 8 {IDLE}"),
    (["--tune-seeds", "2"], f"--tune-seeds 2 {IDLE}"),
    (["--methods", "vanilla", "ema", "--loss-floor", "0.1"], f"--loss-floor 0.1 {IDLE} where no arm has a transition: "
     "add one such as provq to --methods, or leave it out"),
    (["--methods", "simvq+warmup", "vanilla+recluster", "--loss-floor", "0.1"], f"--loss-floor 0.1 {IDLE}"),
    (["--transition-epochs", "0", "--loss-floor", "0.1"], f"--loss-floor 0.1 {IDLE}"),
])
def test_mistakes_end_the_command_before_any_work(words, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run_topodisc.main([*words, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
