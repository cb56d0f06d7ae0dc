"""Drawing codes: filters and distributions against LlamaGen's numbers and closed forms, guidance, and independence."""

import math

import pytest
import torch
from golden_fill import load_arrays
from gpt_models import tiny

from autoregressive.sampling import CompiledDecoding, SamplingConfig, draw, filter_logits, generate, uniforms
from autoregressive.sampling_config import SCHEDULES

PLAIN = SamplingConfig(cfg_scale=1)


def test_filters_are_llamagens():
    misc = load_arrays("misc_golden")
    combinations = misc["samp_combos_temp_topk_topp"].tolist()
    for (temperature, k, p), expected in zip(combinations, misc["samp_probs"], strict=True):
        before = misc["samp_logits"].clone()
        found = filter_logits(misc["samp_logits"] / temperature, int(k), p).softmax(-1)
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
        assert torch.equal(misc["samp_logits"], before)  # nothing is written into the input


def test_codes_are_drawn_with_their_probabilities():
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0]])
    grid = (torch.arange(10_000).double() + 0.5) / 10_000
    found = draw(logits.expand(10_000, -1), grid, PLAIN).bincount(minlength=4) / 10_000
    torch.testing.assert_close(found, logits[0].softmax(0).float(), atol=2e-4, rtol=0)
    assert found[2] == 0


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_codes_of_probability_zero_are_never_drawn(uniform):
    logits = torch.full((1, 6), -math.inf)
    logits[0, 2:4] = 0
    expected = 2 if uniform == 0 else 3
    assert draw(logits, torch.tensor([uniform]).double(), PLAIN).item() == expected


def test_temperature_sharpens():
    logits = torch.tensor([[0.0, 1.0]]).expand(2000, -1)
    grid = (torch.arange(2000).double() + 0.5) / 2000
    share = draw(logits, grid, SamplingConfig(temperature=0.5)).double().mean().item()
    assert share == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-3)
    assert (draw(logits, grid, SamplingConfig(temperature=0)) == 1).all()


def test_uniform_numbers_belong_to_their_seed():
    whole = uniforms([1, 2, 3], 8)
    assert torch.equal(uniforms([3, 1], 8), whole[[2, 0]])
    assert torch.equal(uniforms([1], 4), whole[:1, :4])
    assert whole.min() >= 0
    assert whole.max() < 1


@pytest.mark.parametrize("config", [
    PLAIN, SamplingConfig(cfg_scale=2), SamplingConfig(cfg_scale=2, cfg_interval=5, top_k=7, top_p=0.9),
    SamplingConfig(cfg_scale=3, cfg_schedule="linear"),
])
def test_an_image_does_not_depend_on_its_batch(config):
    model = tiny()
    labels, seeds = torch.tensor([0, 4, 2, 2]), [5, 6, 7, 8]
    together = generate(model, labels, seeds=seeds, config=config)
    assert together.shape == (4, 16)
    assert not torch.equal(together[2], together[3])  # another seed
    for i in (3, 1):
        alone = generate(model, labels[i : i + 1], seeds=seeds[i : i + 1], config=config)
        assert torch.equal(alone[0], together[i])
    order = [2, 0, 3, 1]
    assert torch.equal(generate(model, labels[order], seeds=[seeds[i] for i in order], config=config), together[order])


def test_guidance_is_the_formula():
    """Greedy codes against the whole forward pass, with the two halves combined by hand."""
    model, scale = tiny(3), 2.5
    labels, nothing = torch.tensor([1, 3]), torch.tensor([5, 5])
    codes = torch.zeros(2, 0, dtype=torch.int64)
    for t in range(16):
        c, u = (model(codes, which)[:, -1] for which in (labels, nothing))
        s = scale if t - 1 <= 6 else 1
        codes = torch.cat([codes, (u + (c - u) * s).argmax(-1)[:, None]], dim=1)
    config = SamplingConfig(cfg_scale=scale, cfg_interval=6, temperature=0)
    assert torch.equal(generate(model, labels, seeds=[0, 0], config=config), codes)
    unguided = SamplingConfig(cfg_scale=1, temperature=0)
    assert not torch.equal(generate(model, labels, seeds=[0, 0], config=unguided), codes)


def test_schedules():
    constant, linear, cosine = (SamplingConfig(cfg_scale=3, cfg_schedule=schedule) for schedule in SCHEDULES)
    assert [constant.scale(t, 4) for t in range(4)] == [3] * 4
    assert [linear.scale(t, 4) for t in range(4)] == [1.5, 2, 2.5, 3]
    assert cosine.scale(3, 4) == pytest.approx(3)
    assert cosine.scale(1, 4) == pytest.approx(1 + (1 - math.cos(math.pi / 8)))
    rising = [cosine.scale(t, 64) for t in range(64)]
    assert rising == sorted(rising)
    cut = SamplingConfig(cfg_scale=3, cfg_interval=1)
    assert [cut.scale(t, 5) for t in range(5)] == [3, 3, 3, 1, 1]  # LlamaGen: the first code, then decode steps 0 and 1


def test_one_code_can_be_asked_for():
    model = tiny()
    whole = generate(model, torch.tensor([1]), seeds=[0], config=PLAIN)
    assert torch.equal(generate(model, torch.tensor([1]), seeds=[0], config=PLAIN, num_codes=1), whole[:, :1])


def test_a_masked_step_changes_nothing():
    """The path of compiled steps: fixed lengths, of which positions to come are hidden."""
    model, config = tiny(), SamplingConfig(cfg_scale=2, cfg_interval=5)
    labels, seeds = torch.tensor([1, 2, 3]), [1, 2, 3]
    plain = generate(model, labels, seeds=seeds, config=config)
    assert torch.equal(generate(model, labels, seeds=seeds, config=config, compiled=model.decode), plain)


def test_compiled_steps_keep_their_caches_and_hide_what_is_in_them(monkeypatch):
    """CUDA graphs need them where they were; the codes of an earlier call must not show."""
    real, graphs = torch.compile, []
    backend = lambda graph, _: graphs.append(1) or graph.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda f, **options: real(f, backend=backend, **options))
    model, config = tiny(), SamplingConfig(cfg_scale=2, cfg_interval=5)
    decoding = CompiledDecoding(model)
    for seeds in ([1, 2, 3], [4, 5, 6]):
        labels = torch.tensor(seeds) % 5
        plain = generate(model, labels, seeds=seeds, config=config)
        assert torch.equal(generate(model, labels, seeds=seeds, config=config, compiled=decoding), plain)
    assert len(decoding._caches) == 1
    assert len(graphs) == 2  # with guidance and without
    cache = decoding.cache(model, 6)
    assert cache.first(3)[0][0] is cache.first(3)[0][0]
    assert {part._dynamo_static_input_type for layer in cache.layers for part in layer} == {"unguarded"}


def test_progress_is_reported():
    steps = []
    generate(tiny(), torch.tensor([1]), seeds=[0], config=PLAIN, num_codes=3, progress=steps.append)
    assert steps == [1, 2, 3]


@pytest.mark.parametrize(("changes", "said"), [
    ({"cfg_scale": 0.5}, "--cfg-scale is 0.5"), ({"cfg_interval": -2}, "--cfg-interval"), ({"top_k": -1}, "--top-k"),
    ({"top_p": 0}, "--top-p is 0"), ({"temperature": -1}, "--temperature"), ({"cfg_schedule": "x"}, "--cfg-schedule"),
    ({"cfg_power": 0}, "--cfg-power"), ({"cfg_scale": math.nan}, "--cfg-scale is nan"),
])
def test_settings_out_of_range_are_named(changes, said):
    with pytest.raises(ValueError, match=said):
        SamplingConfig(**changes)


def test_requests_that_cannot_be_met_are_named():
    model = tiny()
    for labels, seeds, count, said in (
        ([9], [0], None, "model has classes 0 to 4"), ([1, 2], [0], None, "1 seeds for 2 images"),
        ([1], [0], 17, "an image has 16"), ([], [], None, "int64"),
    ):
        with pytest.raises(ValueError, match=said):
            generate(model, torch.tensor(labels), seeds=seeds, config=PLAIN, num_codes=count)
    with pytest.raises(ValueError, match="call eval"):
        generate(model.train(), torch.tensor([1]), seeds=[0], config=PLAIN)
