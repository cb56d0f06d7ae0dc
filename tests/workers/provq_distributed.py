"""What test_provq_distributed.py runs under torchrun: every scenario alone and then over all ranks, compared.

A scenario is `scenario(rank, world) -> dict of tensors and texts`: it gives each rank its share of the same data. The
result must agree between the ranks bit for bit and with the one-process result within rounding (`LOOSE`: not at all).
Usage: torchrun --nproc-per-node 2 provq_distributed.py RESULTS_FOLDER; rank r writes RESULTS_FOLDER/r.json, scenario ->
None or what went wrong.
"""

from __future__ import annotations

import datetime
import json
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import vector_quantize_pytorch as lucidrains
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from workers.provq_cases import RECIPES, quantizer
from workers.provq_codecs import STAND_INS
from workers.provq_hosts import VectorQuantizer, VectorQuantizer2

from tokenizer.provq import AdaptiveWarmup, Curriculum, EMAVectorQuantizer, ProVQ, kmeans
from tokenizer.provq_attach import attach
from tokenizer.provq_codes import DeadCodeRestart, FollowingVectorQuantizer

SCENARIOS: dict[str, Callable[[int, int], dict[str, Any]]] = {}
# Random numbers, or what a rank collects: only the ranks have to agree.
LOOSE = {"ema_restart", "dead_codes_restart", "attached_host", "synchronised_codebook_with_uneven_batches",
         "hosts_in_a_graph_that_must_not_change", "a_compiled_host"}


def scenario(function: Callable) -> Callable:
    SCENARIOS[function.__name__] = function
    return function


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _share(x: torch.Tensor, rank: int, world: int, first: float = 0.8) -> torch.Tensor:
    """Rows of this rank: an uneven contiguous split, `first` of them on rank 0."""
    if world == 1:
        return x
    cut = round(first * len(x))
    return x[:cut] if rank == 0 else x[cut:]


def _as_dict(result: Any) -> dict[str, Any]:
    return {"centroids": result.centroids, "counts": result.counts, "inertia": torch.tensor(result.inertia),
            "iterations": torch.tensor(result.iterations)}


# ----------------------------------------------------------------------------------------------------- k-means

@scenario
def kmeans_contiguous(rank: int, world: int) -> dict[str, Any]:
    return _as_dict(kmeans(_share(_normal(400, 3), rank, world), 24))


@scenario
def kmeans_by_order(rank: int, world: int) -> dict[str, Any]:
    x = _normal(400, 3)
    if world == 1:
        return _as_dict(kmeans(x, 24))
    shuffled = torch.randperm(400, generator=torch.Generator().manual_seed(5))
    mine = shuffled[:130] if rank == 0 else shuffled[130:]
    return _as_dict(kmeans(x[mine], 24, order=mine))


@scenario
def kmeans_by_order_random_start(rank: int, world: int) -> dict[str, Any]:
    return _as_dict(kmeans(_normal(401, 3)[rank::world], 24, start="random", order=torch.arange(rank, 401, world)))


@scenario
def kmeans_one_rank_without_tokens(rank: int, world: int) -> dict[str, Any]:
    return _as_dict(kmeans(_share(_normal(200, 3), rank, world, first=1.0), 16))


@scenario
def kmeans_reseeds_empty_clusters(rank: int, world: int) -> dict[str, Any]:
    x = torch.cat([torch.zeros(300, 3), 10 * _normal(30, 3)])  # a random start leaves most clusters empty
    result = kmeans(x[rank::world], 12, start="random", order=torch.arange(rank, 330, world))
    assert (result.counts > 0).all(), result.counts
    return _as_dict(result)


@scenario
def kmeans_spherical(rank: int, world: int) -> dict[str, Any]:
    return _as_dict(kmeans(_share(_normal(300, 4), rank, world), 16, spherical=True))


def _error(call: Callable[[], Any]) -> dict[str, Any]:
    try:
        call()
    except ValueError as error:
        return {"error": str(error)}
    raise AssertionError("no ValueError")


@scenario
def too_few_tokens_raise_on_all_ranks(rank: int, world: int) -> dict[str, Any]:
    x = _share(_normal(10, 3), rank, world, first=0.9)
    found = _error(lambda: kmeans(x, 11))
    assert "got 10" in found["error"], found
    kmeans(x, 10)  # neither rank has ten, both together do
    return found


@scenario
def one_rank_with_nan_raises_on_all_ranks(rank: int, world: int) -> dict[str, Any]:
    x = _normal(40, 3)
    x[-1, 0] = torch.nan  # the last rank's
    found = _error(lambda: kmeans(_share(x, rank, world), 4))
    assert "1 non-finite" in found["error"], found
    return found


@scenario
def a_wrong_order_raises_on_all_ranks(rank: int, world: int) -> dict[str, Any]:
    return _error(lambda: kmeans(_normal(20, 3), 8, order=torch.zeros(20, dtype=torch.int64) + 0 * rank * world))


@scenario
def init_codebook_errors_on_all_ranks(rank: int, world: int) -> dict[str, Any]:
    model = ProVQ(quantizer("vq"), Curriculum(1, 1))
    model.set_step(1)
    x = _normal(40, 4)
    found = _error(lambda: model.init_codebook(_share(x[:12], rank, world)))
    assert model.needs_init, "a failed call must not pass for done"
    model.init_codebook(_share(x, rank, world))
    return {**found, "codebook": model.codebook().detach()}


# ----------------------------------------------------------------------------------------- usage, EMA, observe

@scenario
def usage_sums_over_ranks(rank: int, world: int) -> dict[str, Any]:
    model = ProVQ(quantizer("vq"), Curriculum(0, 0))
    for seed in range(2):
        model(_share(_normal(50, 4, seed=seed), rank, world))
    usage = model.usage()
    assert usage["counts"].sum() == 100
    assert model.usage()["counts"].sum() == 0
    return {"counts": usage["counts"], "usage": torch.tensor(usage["usage"]),
            "perplexity": torch.tensor(usage["perplexity"])}


def _ema(recipe: str, rank: int, world: int) -> dict[str, Any]:
    model = ProVQ(quantizer(recipe), Curriculum(0, 3))
    codes = []
    for step in range(5):
        model.set_step(step)
        for part in _normal(60, 4, seed=step).split(20):
            model(_share(part, rank, world))
        model.set_step(step + 1)
        codes.append(model.codebook())
    return {"codes": torch.stack(codes)}


@scenario
def ema_update(rank: int, world: int) -> dict[str, Any]:
    return _ema("ema", rank, world)


@scenario
def ema_l2_update(rank: int, world: int) -> dict[str, Any]:
    return _ema("ema-l2", rank, world)


@scenario
def ema_restart(rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(rank)  # ranks draw different numbers and must still take the same codes
    bare = EMAVectorQuantizer(16, 4, decay=0.5, restart_below=0.9)
    bare.set_codebook_(100 + _normal(16, 4))
    for seed in range(3):
        bare(_share(_normal(60, 4, seed=seed), rank, world, first=0.5))
        bare.update_()
    assert (bare.codebook().norm(dim=1) < 20).sum() > 8, "dead codes restarted"
    late = EMAVectorQuantizer(16, 4, decay=0.5, restart_below=0.9)  # a first batch that is masked on rank 0
    late.set_codebook_(100 + _normal(16, 4))
    late(10 + _share(_normal(60, 4), rank, world, first=0.0 if world > 1 else 1.0))
    late.update_()
    restarted = late.codebook()[late.codebook().norm(dim=1) < 50]
    assert len(restarted) >= 15 // world  # each rank has latents for its share of them, or the share waits
    assert restarted.norm(dim=1).min() > 10, "none at the origin, where no latent is"
    return {"codes": torch.stack([bare.codebook(), late.codebook()])}


@scenario
def following_codes(rank: int, world: int) -> dict[str, Any]:
    """Fresh, following and placed; in one step rank 1 has no tokens, in another nobody has."""
    torch.manual_seed(0)
    bare = FollowingVectorQuantizer(16, 4, decay=0.5)
    codes = []
    for step in range(6):
        if step == 2:
            placed = kmeans(_share(_normal(200, 4), rank, world), 16)
            bare.set_codebook_(placed.centroids, placed.counts)
        if step != 3:
            for part in (step + 2.0 * _normal(60, 4, seed=step)).split(20):
                bare(_share(part, rank, world, first=1.0 if step == 4 else 0.8))
        bare.update_()
        codes.append(bare.codebook().detach())
    assert bare.state == bare.FOLLOWING
    return {"codes": torch.stack(codes), "mean": bare.mean, "spread": bare.spread}


@scenario
def recluster(rank: int, world: int) -> dict[str, Any]:
    model = ProVQ(quantizer("vq"), Curriculum(1, 1))
    model.set_step(1)
    model.init_codebook(_share(_normal(90, 4), rank, world))
    optimizer = torch.optim.Adam(model.parameters())
    order = torch.arange(rank, 100, world)
    info = model.recluster(_normal(100, 4, seed=3)[order], order=order, optimizers=[optimizer], seed=5)
    assert info["tokens"] == 100
    return {"codes": model.codebook().detach()}


@scenario
def dead_codes_restart(rank: int, world: int) -> dict[str, Any]:
    torch.manual_seed(rank)
    model = quantizer("vq")
    with torch.no_grad():
        model.embedding.weight[8:] += 100.0
    restart = DeadCodeRestart(model, 0.1, every=2)
    for seed in range(2):
        model(_share(_normal(60, 4, seed=seed), rank, world, first=0.5))
        state = restart.state_dict()
        assert state["counts"].sum() == 60 * (seed + 1), "of all ranks"
        restarted = restart.step()
    assert restarted == 8
    assert model.codebook().norm(dim=1).max() < 20
    return {"codes": model.codebook().detach(), "counts": state["counts"]}


@scenario
def observe_decides_alike(rank: int, world: int) -> dict[str, Any]:  # noqa: ARG001
    # Rank 1 sees scores that never stop improving: rank 0's decide.
    model = ProVQ(quantizer("vq"), Curriculum(100, 5), adaptive=AdaptiveWarmup(patience=2))
    ended = []
    for step, score in enumerate([5.0, 4.0, 4.5, 4.6, 4.7]):
        model.set_step(step)
        ended.append(model.observe(score if rank == 0 else -float(step)))
    return {"ended": torch.tensor(ended), "warmup_end": model.warmup_end, "step": model.step}


@scenario
def observe_nan_raises_on_all_ranks(rank: int, world: int) -> dict[str, Any]:
    model = ProVQ(quantizer("vq"), Curriculum(100, 5), adaptive=AdaptiveWarmup())
    return _error(lambda: model.observe(torch.nan if rank == 0 else float(world)))


# ----------------------------------------------------------------------------------- DistributedDataParallel

class _Tokenizer(nn.Module):
    def __init__(self, recipe: str):
        super().__init__()
        torch.manual_seed(1)
        self.encoder = nn.Conv2d(3, 4, 4, 4)
        self.provq = ProVQ(quantizer(recipe), Curriculum(2, 2, loss_floor=0.5))
        self.decoder = nn.ConvTranspose2d(4, 3, 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.provq(self.encoder(x))
        return (self.decoder(out.quantized) - x).square().mean() + out.loss


def _ddp(recipe: str, rank: int, world: int) -> dict[str, Any]:
    """Six steps through all stages, without find_unused_parameters; gradients of every step and the last codes."""
    inner = _Tokenizer(recipe)
    model = inner if world == 1 else DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
    gradients = []
    for step in range(6):
        inner.provq.set_step(step)
        x = _share(_normal(4, 3, 16, 16, seed=step), rank, world, first=0.5)  # equal shares: a mean of means
        if inner.provq.needs_init:
            with torch.no_grad():
                inner.provq.init_codebook(inner.encoder(x).movedim(1, -1).reshape(-1, 4), optimizers=[optimizer])
        optimizer.zero_grad()
        model(x).backward()
        assert all(p.grad is not None for p in inner.parameters())
        gradients.append(torch.cat([p.grad.flatten() for p in inner.parameters()]))
        optimizer.step()
    inner.provq.set_step(6)
    usage = inner.provq.usage()
    assert usage["counts"].sum() == 4 * 4 * 16, "four discrete steps of four images of 16 tokens"
    return {"gradients": torch.stack(gradients), "codes": inner.provq.codebook().detach(), "counts": usage["counts"]}


for _recipe in RECIPES:
    SCENARIOS[f"ddp_{_recipe}"] = lambda rank, world, recipe=_recipe: _ddp(recipe, rank, world)


@scenario
def attached_host(rank: int, world: int) -> dict[str, Any]:
    """A host's own loop under DistributedDataParallel, without find_unused_parameters, through all stages."""
    torch.manual_seed(1)
    quantize = VectorQuantizer(16, 4, 0.25, 0.0, l2_norm=True, show_usage=False)

    class Host(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.quantize, self.decoder = nn.Conv2d(3, 4, 4, 4), quantize, nn.ConvTranspose2d(4, 3, 4, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
            z, losses, _ = self.quantize(self.encoder(x))
            return self.decoder(z), losses

    inner = Host()
    provq = attach(inner.quantize, Curriculum(3, 2))
    model = inner if world == 1 else DistributedDataParallel(inner)
    optimizer = torch.optim.Adam(inner.parameters(), lr=0.01)
    for step in range(7):
        provq.set_step(step)
        info = provq.maybe_init_codebook(optimizers=[optimizer])
        if info:
            assert info["tokens"] == 256, "full, after the first two calls"
        x = _share(_normal(8, 3, 16, 16, seed=step), rank, world, first=0.5)
        y, (codebook, commit, entropy, _) = model(x)
        optimizer.zero_grad()
        ((y - x).square().mean() + codebook + commit + entropy).backward()
        assert all(p.grad is not None for p in inner.parameters())
        optimizer.step()
    assert provq.usage()["counts"].sum() == 4 * 8 * 16, "four discrete steps of eight images of 16 tokens"
    return dict(inner.state_dict())


@scenario
def synchronised_codebook_with_uneven_batches(rank: int, world: int) -> dict[str, Any]:
    """The host adds up what all ranks saw; its running means must start alike, though the last batches differ."""
    torch.manual_seed(1)
    module = lucidrains.VectorQuantize(4, 8, sync_codebook=world > 1).train()
    provq = attach(module, Curriculum(3, 2))
    for step in range(7):
        provq.set_step(step)
        provq.maybe_init_codebook()
        module(_share(_normal(30, 4, seed=step), rank, world)[None])
    return {"codes": module.codebook, "sizes": module._codebook.cluster_size}


class _Around(nn.Module):
    """Any host of tokens whose first return values are quantized and a loss."""

    def __init__(self, quantize: nn.Module, dim: int = 4):
        super().__init__()
        torch.manual_seed(1)
        self.encoder, self.quantize, self.decoder = nn.Conv2d(3, dim, 4, 4), quantize, nn.ConvTranspose2d(dim, 3, 4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.encoder(x)
        out = self.quantize(z.flatten(2) if isinstance(self.quantize, AUDIO) else z)
        losses = out[3:] if isinstance(self.quantize, AUDIO) else out[1:2]
        return (self.decoder(out[0].reshape(z.shape)) - x).square().mean() + sum(losses)


AUDIO = type(STAND_INS["dac-residual"].make())


def _loop(inner: _Around, model: nn.Module, optimizer: Any, rank: int, world: int, curriculum: Curriculum) -> Any:
    """The attached host's codes as k-means sets them, and parameters after two forwards a step through all stages."""
    provq, found = inner.quantize.provq, {}
    for step in range(curriculum.warmup_steps + curriculum.transition_steps + 2):
        provq.set_step(step)
        if provq.maybe_init_codebook(optimizers=[optimizer]):
            parts = provq.quantizer.parts()
            assert all(p not in optimizer.state for part in parts for p in part.codebook_parameters())
            found["set"] = torch.cat([part.table().detach().clone() for part in parts])
        x = _share(_normal(8, 3, 16, 16, seed=step), rank, world, first=0.5)
        loss = model(x) + model(0.5 * x)
        provq.set_step(step + 1) if provq.stage == 2 else None  # before backward, which needs the old alpha
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert provq.stage == 3
    return found | dict(inner.named_parameters())


@scenario
def hosts_in_a_graph_that_must_not_change(rank: int, world: int) -> dict[str, Any]:
    """DistributedDataParallel remembers the first step's, a warm-up's: which parameters it used, in which order."""
    found = {}
    makes = {"taming": lambda: _Around(VectorQuantizer2(8, 4, 0.25)),
             "dac": lambda: _Around(STAND_INS["dac-residual"].make(), 6),
             "ibq": lambda: _Around(STAND_INS["ibq"].make())}
    for name, make in makes.items():
        inner, curriculum = make(), Curriculum(2, 2)
        attach(inner.quantize, curriculum)
        model = inner if world == 1 else DistributedDataParallel(inner, static_graph=True)
        optimizer = torch.optim.Adam(inner.parameters(), lr=0.01)
        found |= {f"{name} {k}": v for k, v in _loop(inner, model, optimizer, rank, world, curriculum).items()}
    return found


@scenario
def a_compiled_host(rank: int, world: int) -> dict[str, Any]:
    """The compiler around DistributedDataParallel gives what it gives without one."""
    found = []
    for compiled in (False, True):
        inner, curriculum = _Around(VectorQuantizer2(8, 4, 0.25)), Curriculum(2, 3)
        torch.manual_seed(2)
        attach(inner.quantize, curriculum)
        model: Any = inner if world == 1 else DistributedDataParallel(inner)
        model = torch.compile(model, backend="eager") if compiled else model
        optimizer = torch.optim.Adam(inner.parameters(), lr=0.01)
        found.append(_loop(inner, model, optimizer, rank, world, curriculum))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, msg=key)
    return found[1]


@scenario
def parameters_that_a_host_leaves_idle_are_named(rank: int, world: int) -> dict[str, Any]:  # noqa: ARG001
    """In the warm-up all have a gradient; DistributedDataParallel would find the first without one long after."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attach(lucidrains.LatentQuantize(levels=[5, 4], dim=6), Curriculum(2, 2))
        attach(VectorQuantizer2(8, 4, 0.25), Curriculum(2, 2))
        attach(VectorQuantizer(16, 4, 0.25, 0.0, l2_norm=True, show_usage=True), Curriculum(2, 2))
    said = [str(each.message) for each in caught]
    assert len(said) == (world > 1), said
    assert world == 1 or "leaves values_per_latent.0, values_per_latent.1 without a gradient" in said[0], said
    return {}


@scenario
def a_sharded_optimizer_forgets_the_codes(rank: int, world: int) -> dict[str, Any]:
    inner = _Around(VectorQuantizer2(8, 4, 0.25))
    provq = attach(inner.quantize, Curriculum(2, 2))
    sharded = world > 1
    optimizer: Any = (ZeroRedundancyOptimizer(inner.parameters(), torch.optim.Adam) if sharded
                      else torch.optim.Adam(inner.parameters()))
    for step in range(3):
        provq.set_step(step)
        x = _normal(8, 3, 16, 16, seed=step)
        if provq.maybe_init_codebook(optimizers=[optimizer]):
            state = optimizer.optim.state if sharded else optimizer.state
            assert inner.quantize.embedding.weight not in state, rank
            assert state, "and nothing else"
        else:
            inner(x).backward()
            optimizer.step()
    return {}


@scenario
def sharded_codes_are_refused_before_the_warm_up(rank: int, world: int) -> dict[str, Any]:  # noqa: ARG001
    inner = _Around(VectorQuantizer2(8, 4, 0.25))
    attach(inner.quantize, Curriculum(2, 2))
    plain = nn.Sequential(ProVQ(quantizer("vq"), Curriculum(2, 2)))
    if world > 1:
        for handle, module in ((inner.quantize.provq, inner), (plain[0], plain)):
            handle.set_step(0)
            fully_shard(module, mesh=init_device_mesh("cpu", (world,)))
            with pytest.raises(RuntimeError, match="codes are sharded"):
                handle.set_step(1)
    return {}


# ------------------------------------------------------------------------------------------------------- runner

def _compare(name: str, alone: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    for key, value in ranks[0].items():
        for other in ranks[1:]:
            same = torch.equal(other[key], value) if isinstance(value, torch.Tensor) else other[key] == value
            assert same, f"{key} differs between ranks: {value} and {other[key]}"
        if name in LOOSE:
            continue
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, alone[key], rtol=1e-4, atol=2e-6, msg=lambda m, k=key: f"{k}: {m}")
        else:
            assert value == alone[key], (value, alone[key])


def main() -> None:
    torch.set_num_threads(1)
    alone: dict[str, Any] = {}
    results: dict[str, str | None] = {}
    for name, run in SCENARIOS.items():
        try:
            alone[name] = run(0, 1)
        except Exception:
            results[name] = f"alone: {traceback.format_exc()}"
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=20))  # a rank that waits alone is an error
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world == 2, world
    for name, run in SCENARIOS.items():
        if name in results:
            continue
        try:
            mine: Any = run(rank, world)
        except Exception:
            mine = traceback.format_exc()
        ranks: list[Any] = [None] * world
        dist.all_gather_object(ranks, mine)
        failed = [r for r in ranks if isinstance(r, str)]
        try:
            if failed:
                results[name] = failed[0]
            else:
                _compare(name, alone[name], ranks)
                results[name] = None
        except AssertionError as error:
            results[name] = str(error)
    (Path(sys.argv[1]) / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
