"""TopoDisc: a 2-D diagnostic of premature discretization (section 3 and Figures 2 and 3 of the paper).

A filled disk and the outline of a triangle around it are autoencoded through a 2-D vector-quantized latent. Everything
that quantizes is `tokenizer/provq.py` itself: each seed owns a real `ProVQ` module. Only the autoencoders are batched:
the S networks of S seeds are one stack of matrix products, which are nearly all of the time. Nothing couples two seeds
(the loss is a sum over seeds, Adam works per element), so training them together is training them one by one.

    report = diagnose(lambda num_codes, dim: MyQuantizer(num_codes, dim), seeds=8)   # your own quantizer
    report.summary["methods"]["provq"]["improvement_triangle_pct"], report.runs["provq"].meters["inward_bend"]

Sizes: S seeds, N = disk_points + outline_points points, D = 2, K codes, L logged epochs.
"""

import itertools
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from synthetic import meters
from synthetic.settings import CURRICULA, FOLLOW, Setting, parse_method
from tokenizer import code_meter, provq
from tokenizer.provq_codes import FollowingVectorQuantizer
from tokenizer.runtime.config import to_dict
from tokenizer.runtime.over_seeds import mean_interval
from tokenizer.runtime.pool import process_pool

DIM = 2  # data and latents are both points of the plane
EDGE_POINTS = 50  # points per edge of the noise-free outline whose latent image is metered and drawn
QuantizerFactory = Callable[[int, int], nn.Module]  # (num_codes, dim) -> module with VectorQuantizer's methods


class Arm(NamedTuple):
    """A quantizer on a curriculum."""

    quantizer: QuantizerFactory
    curriculum: str  # a name in CURRICULA
    recluster: bool = False  # k-means again after warm-up and transition, in a curriculum without them as well


def make_curriculum(name: str, setting: Setting) -> provq.Curriculum:
    """One of CURRICULA with the setting's lengths."""
    warm, soft = CURRICULA[name]
    return provq.Curriculum(setting.warmup_epochs * warm, setting.transition_epochs * soft,
                            loss_floor=setting.loss_floor)


def make_arm(method: str, setting: Setting) -> Arm:
    """The arm called QUANTIZER, QUANTIZER+CURRICULUM ("ema", "simvq+provq") or as one of ALIASES, with "+recluster" at
    its end or not. ValueError: none."""
    quantizer, curriculum, recluster = parse_method(method)

    def make(num_codes: int, dim: int) -> nn.Module:
        if quantizer == FOLLOW:
            return FollowingVectorQuantizer(num_codes, dim, beta=setting.beta)
        return provq.make_quantizer(quantizer, num_codes, dim, beta=setting.beta)

    return Arm(make, curriculum, recluster)


# ------------------------------------------------------------------------------------------------------- data

def corners(setting: Setting) -> Tensor:
    """Corners of the polygon, counter-clockwise from the top: (sides, 2) float32."""
    angle = math.pi / 2 + 2 * math.pi * torch.arange(setting.sides) / setting.sides
    return setting.outline_radius * torch.stack([angle.cos(), angle.sin()], dim=1)


def make_points(setting: Setting, seed: int) -> Tensor:
    """The data set of a seed: (N, 2) float32, the disk's points first, uniform in area and in outline length."""
    generator = torch.Generator().manual_seed(seed)
    radius = setting.disk_radius * torch.rand(setting.disk_points, generator=generator).sqrt()
    angle = 2 * math.pi * torch.rand(setting.disk_points, generator=generator)
    disk = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    place = setting.sides * torch.rand(setting.outline_points, 1, generator=generator)  # edge number + share of it
    edge = place.long().clamp(max=setting.sides - 1)[:, 0]
    ends = corners(setting)
    outline = torch.lerp(ends[edge], ends[(edge + 1) % setting.sides], place - edge[:, None])
    points = torch.cat([disk, outline])
    return points + setting.noise * torch.randn(points.shape, generator=generator)


def make_edges(setting: Setting) -> Tensor:
    """EDGE_POINTS points in order along each edge, corners included: (sides, EDGE_POINTS, 2) for `edge_bending`."""
    ends = corners(setting)[:, None]
    return torch.lerp(ends, ends.roll(-1, 0), torch.linspace(0, 1, EDGE_POINTS)[:, None])


# ---------------------------------------------------------------------------------------------------- networks

def make_mlp(width: int) -> nn.Sequential:
    """2-H-H-2 with ReLU: an encoder, or a decoder."""
    return nn.Sequential(nn.Linear(DIM, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, DIM))


class StackedMLP(nn.Module):
    """S networks of `make_mlp` as one: x (S, N, 2) -> (S, N, 2), each batch entry through its own weights."""

    def __init__(self, networks: Sequence[nn.Sequential]):
        super().__init__()
        layers = [[layer for layer in network if isinstance(layer, nn.Linear)] for network in networks]
        by_depth = list(zip(*layers, strict=True))
        self.weights = nn.ParameterList(torch.stack([m.weight.detach().t() for m in same]) for same in by_depth)
        self.biases = nn.ParameterList(torch.stack([m.bias.detach()[None] for m in same]) for same in by_depth)

    def forward(self, x: Tensor) -> Tensor:
        for depth, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            # relu_: nobody else reads a product, and its gradient does not need it
            x = torch.baddbmm(bias, x.relu_() if depth else x, weight)  # (S, N, in) @ (S, in, out)
        return x


# ---------------------------------------------------------------------------------------------------- training

class Run(NamedTuple):
    """One arm, S seeds. Entries of a seed depend on the setting and that seed alone."""

    seeds: list[int]
    epochs: list[int]  # (L,) what is logged at epoch t is the state after t optimizer steps; the last is the end
    meters: dict[str, Tensor]  # name in METERS -> (L, S) float64; NaN where a meter has no meaning yet
    points: Tensor  # (S, N, 2) the data
    latents: Tensor  # (L, S, N, 2) of the data, as the quantizer compares them with codes
    edges: Tensor  # (L, S, sides, EDGE_POINTS, 2) latents of make_edges()
    codes: Tensor  # (L, S, K, 2)

    def final(self, meter: str) -> np.ndarray:
        """The values at the end of training, (S,) float64."""
        return self.meters[meter][-1].numpy()


# Logged meters and what they are; the ones over an interval compare with the previous logged epoch.
METERS = {
    "disk_mse": "mean squared error per coordinate of the disk's points, as deployed (discrete once there are codes)",
    "triangle_mse": "the same for the outline's points",
    "gap": "meters.quantization_gap",
    "contraction": "meters.closing: share of the gap closed by latents, per epoch",
    "pursuit": "meters.closing: share of the gap closed by codes, per epoch",
    "code_drift": "code_meter.drift of the codes, per epoch",
    "latent_drift": "code_meter.drift of the latents, per epoch",
    "latent_spread": "meters.spread of the latents",
    "code_spread": "meters.spread of the codes",
    "inward_bend": "meters.edge_bending: mean inward offset of the outline's latent image, in edge lengths",
    "outline_kept": "meters.edge_bending: chords / arcs of the outline's latent image",
    "effective_rank": "code_meter.effective_rank of the latents",
    "codes_used": "codes that are the nearest one of some point",
    "perplexity": "exp(entropy) of the codes of all points",
}


class _Seeds:
    """The networks, quantizers and data of S seeds, built so that a seed is the same in whatever company."""

    def __init__(self, arm: Arm, setting: Setting, seeds: Sequence[int]):
        curriculum = make_curriculum(arm.curriculum, setting)
        networks, self.quantizers = [], []
        for seed in seeds:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)  # networks first: all arms of a seed start from the same ones
                networks.append((make_mlp(setting.width), make_mlp(setting.width)))
                self.quantizers.append(provq.ProVQ(arm.quantizer(setting.num_codes, DIM), curriculum))
        self.encoder = StackedMLP([encoder for encoder, _ in networks])
        self.decoder = StackedMLP([decoder for _, decoder in networks])
        self.points = torch.stack([make_points(setting, seed) for seed in seeds])  # (S, N, 2)
        self.edges = make_edges(setting)
        self.disk_points = setting.disk_points

    def parameters(self) -> list[nn.Parameter]:
        modules = (self.encoder, self.decoder, *self.quantizers)
        return [p for module in modules for p in module.parameters()]

    @torch.no_grad()
    def snapshot(self, latents: Tensor) -> dict[str, Tensor]:
        """What a logged epoch keeps. Quantizers in eval(): discrete as soon as there is a codebook."""
        for quantizer in self.quantizers:
            quantizer.eval()
        outs = [quantizer(z) for quantizer, z in zip(self.quantizers, latents, strict=True)]
        for quantizer in self.quantizers:
            quantizer.train()

        def comparable(z: Tensor) -> Tensor:  # with codes: unit vectors where the quantizer is one of directions
            return torch.stack([q.quantizer.latent(part) for q, part in zip(self.quantizers, z, strict=True)])

        error = (self.decoder(torch.stack([out.quantized for out in outs])) - self.points).square().mean(2)  # (S, N)
        images = self.encoder(self.edges.flatten(0, 1).expand(len(outs), -1, -1))
        return {
            "latents": comparable(latents),
            "codes": torch.stack([quantizer.codebook().detach() for quantizer in self.quantizers]),
            "edges": comparable(images).unflatten(1, self.edges.shape[:2]),
            "disk_mse": error[:, : self.disk_points].mean(1),
            "triangle_mse": error[:, self.disk_points :].mean(1),
        }


def train(arm: Arm, setting: Setting, seeds: Sequence[int], *, log_every: int = 10) -> Run:
    """Train one arm for every seed, side by side; log at epochs 0, log_every, ... and at the end.

    The loop is that of tokenizer/provq.py's docstring. ValueError: no seeds, log_every < 1.
    """
    if not len(seeds) or log_every < 1:
        raise ValueError(f"need at least one seed and log_every >= 1, got {len(seeds)} seeds and {log_every}")
    state = _Seeds(arm, setting, seeds)
    optimizer = torch.optim.Adam(state.parameters(), lr=setting.lr, foreach=True)
    epochs, log = [], []
    for epoch in range(setting.epochs + 1):
        for quantizer in state.quantizers:
            quantizer.set_step(epoch)
        latents = state.encoder(state.points)  # (S, N, 2)
        for seed, quantizer, z in zip(seeds, state.quantizers, latents, strict=True):
            if quantizer.needs_init:
                quantizer.init_codebook(z.detach(), seed=seed, optimizers=[optimizer])
            elif arm.recluster and epoch == setting.warmup_epochs + setting.transition_epochs:
                quantizer.recluster(z.detach(), seed=seed, optimizers=[optimizer])
        if epoch % log_every == 0 or epoch == setting.epochs:
            epochs.append(epoch)
            log.append(state.snapshot(latents))
        if epoch == setting.epochs:
            break
        outs = [quantizer(z) for quantizer, z in zip(state.quantizers, latents.unbind(0), strict=True)]
        restored = state.decoder(torch.stack([out.quantized for out in outs]))
        # A sum over seeds, not a mean: each seed's gradient is that of its own loss, whatever their number.
        loss = (restored - state.points).square().mean((1, 2)).sum() + torch.stack([out.loss for out in outs]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    first_codes = next(i for i, epoch in enumerate(epochs) if epoch >= state.quantizers[0].curriculum.warmup_steps)
    values = [_measure(log, epochs, i, s, first_codes) for i in range(len(log)) for s in range(len(seeds))]
    return Run(
        seeds=list(seeds), epochs=epochs,
        meters={name: torch.tensor([v[name] for v in values], dtype=torch.float64).view(len(log), len(seeds))
                for name in METERS},
        points=state.points,
        **{name: torch.stack([entry[name] for entry in log]) for name in ("latents", "edges", "codes")},
    )


def train_jobs(
    jobs: Sequence[tuple[str, Setting]], seeds: Sequence[int], *, log_every: int, workers: int = 1,
) -> Iterator[Run]:
    """`train` for each (method, setting), in order, `workers` at a time in processes of one thread each.

    Workers are for several jobs on an idle machine: two threads on one small product mostly wait for each other.
    """
    if workers <= 1 or len(jobs) == 1:
        yield from (train(make_arm(*job), job[1], seeds, log_every=log_every) for job in jobs)
        return
    with process_pool(min(workers, len(jobs)), _use_one_thread) as pool:
        yield from map(pickle.loads, pool.map(_train_pickled, *zip(*jobs, strict=True),
                                              itertools.repeat(list(seeds)), itertools.repeat(log_every)))


def _use_one_thread() -> None:
    torch.set_num_threads(1)


def _train_pickled(method: str, setting: Setting, seeds: list[int], log_every: int) -> bytes:
    # Bytes, because a tensor would return through /dev/shm, which containers keep small.
    return pickle.dumps(train(make_arm(method, setting), setting, seeds, log_every=log_every))


def _measure(log: list[dict[str, Tensor]], epochs: list[int], i: int, s: int, first_codes: int) -> dict[str, float]:
    """All METERS of logged epoch number i and seed number s. Before entry first_codes the codes mean nothing."""
    now = {name: value[s] for name, value in log[i].items()}
    bending = meters.edge_bending(now["edges"])
    values = dict.fromkeys(METERS, math.nan) | {
        "disk_mse": now["disk_mse"].item(),
        "triangle_mse": now["triangle_mse"].item(),
        "latent_spread": meters.spread(now["latents"]),
        "inward_bend": bending.inward,
        "outline_kept": bending.kept,
        "effective_rank": code_meter.effective_rank(code_meter.second_moments(now["latents"])),
    }
    if i > 0:
        before, interval = {name: value[s] for name, value in log[i - 1].items()}, epochs[i] - epochs[i - 1]
        values["latent_drift"] = code_meter.drift(before["latents"], now["latents"]) / interval
    if i >= first_codes:
        counts = torch.bincount(provq.nearest_code(now["latents"], now["codes"]), minlength=len(now["codes"]))
        values |= {"gap": meters.quantization_gap(now["latents"], now["codes"]),
                   "code_spread": meters.spread(now["codes"]),
                   "codes_used": float((counts > 0).sum()),
                   "perplexity": provq.code_statistics(counts)["perplexity"]}
    if i > first_codes:
        closing = meters.closing(before["latents"], before["codes"], now["latents"], now["codes"])
        values |= {"code_drift": code_meter.drift(before["codes"], now["codes"]) / interval,
                   "contraction": closing.contraction / interval, "pursuit": closing.pursuit / interval}
    return values


# ------------------------------------------------------------------------------------------------------ report

BOOTSTRAP = 10_000  # resamples of an improvement's interval


class Report(NamedTuple):
    """What a comparison of arms found."""

    summary: dict[str, Any]  # what summary.json holds; see `summarise`
    runs: dict[str, Run]


def improvement(baseline: np.ndarray, arm: np.ndarray) -> tuple[float, list[float]]:
    """100 (1 - mean arm / mean baseline) in %, and its 95 % interval; both (S,), the same seeds in the same order.

    Percentile bootstrap, paired: a resample draws seeds, each with its baseline and its arm. Always the same draws.
    """
    draws = np.random.default_rng(0).integers(len(arm), size=(BOOTSTRAP, len(arm)))
    resampled = 100 * (1 - arm[draws].mean(1) / baseline[draws].mean(1))
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(100 * (1 - arm.mean() / baseline.mean())), [float(low), float(high)]


def summarise(runs: Mapping[str, Run], config: Mapping[str, Any], baseline: str) -> dict[str, Any]:
    """{"config", "methods"}, JSON-able. Of each method at the end of training: disk_mse and triangle_mse as by
    `mean_interval`, their `improvement` over the baseline in %, with intervals, and mean codes_used and perplexity.

    ValueError: fewer than two seeds (no interval), arms on different seeds (no pairing).
    """
    reference = runs[baseline]
    if len(reference.seeds) < 2:
        raise ValueError(f"need at least 2 seeds for an interval, got {len(reference.seeds)}")
    methods: dict[str, Any] = {}
    for name, run in runs.items():
        if run.seeds != reference.seeds:
            raise ValueError(f"{name} and {baseline} have different seeds: improvements are paired by seed")
        entry: dict[str, Any] = {}
        for part in ("disk", "triangle"):
            entry[f"{part}_mse"] = mean_interval(run.final(f"{part}_mse"))
        for part in ("disk", "triangle"):
            value, interval = improvement(reference.final(f"{part}_mse"), run.final(f"{part}_mse"))
            entry |= {f"improvement_{part}_pct": value, f"improvement_{part}_ci95": interval}
        entry |= {name: float(run.final(name).mean()) for name in ("codes_used", "perplexity")}
        methods[name] = entry
    return {"config": {**config, "baseline": baseline}, "methods": methods}


def table(summary: Mapping[str, Any]) -> str:
    """The methods of a summary as aligned text, one line each; [..] are 95 % intervals."""
    lines = [f"{'method':<14} {'disk MSE':>9} {'outline MSE':>11} {'disk gain, %':>22} {'outline gain, %':>22} "
             f"{'codes':>6} {'perplexity':>10}"]
    for name, m in summary["methods"].items():
        gains = ["{:+.1f} [{:+.1f}, {:+.1f}]".format(m[f"improvement_{part}_pct"], *m[f"improvement_{part}_ci95"])
                 if name != summary["config"]["baseline"] else "-" for part in ("disk", "triangle")]
        lines.append(f"{name:<14} {m['disk_mse']['mean']:>9.5f} {m['triangle_mse']['mean']:>11.5f} {gains[0]:>22} "
                     f"{gains[1]:>22} {m['codes_used']:>6.1f} {m['perplexity']:>10.1f}")
    return "\n".join(lines)


def diagnose(
    quantizer_factory: QuantizerFactory, setting: Setting | None = None, *, seeds: int = 8,
    curricula: Sequence[str] = ("plain", "soft", "warmup", "provq"), log_every: int = 10,
) -> Report:
    """Does this quantizer discretize too early? The report of run_topodisc.py, for any quantizer.

    quantizer_factory(num_codes, 2) returns a new module with the methods of `provq.VectorQuantizer` (forward, codebook,
    set_codebook_, latent, lookup, num_codes, dim); it is called once per seed and curriculum under that seed.
    Improvements are over the first of curricula. ValueError: an unknown curriculum. TypeError: a missing method.
    """
    unknown = [name for name in curricula if name not in CURRICULA]
    if unknown or not curricula:
        raise ValueError(f"curricula must name some of {', '.join(CURRICULA)}, got {', '.join(curricula) or 'none'}")
    setting = setting or Setting()
    runs = {name: train(Arm(quantizer_factory, name), setting, range(seeds), log_every=log_every) for name in curricula}
    return Report(summarise(runs, {**to_dict(setting), "seeds": seeds}, curricula[0]), runs)
