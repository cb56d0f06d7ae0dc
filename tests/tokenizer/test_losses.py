"""Discriminator, perceptual distance and losses: parity with LlamaGen where it is right, and proof where it is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_fill import fill_values, load_arrays, load_shapes, sums
from torch.nn import functional as F

from tokenizer.choices import ADVERSARIAL_LOSSES
from tokenizer.discriminator import NLayerDiscriminator
from tokenizer.losses import (
    adaptive_weight,
    disc_active,
    discriminator_adversarial_loss,
    discriminator_loss,
    generator_adversarial_loss,
    generator_loss,
    reconstruction_loss,
)
from tokenizer.perceptual import LPIPS, VGG16_FILE, find_vgg_weights, normalize_channels

DISC_START, DISC_WEIGHT = 20000, 0.5


@pytest.fixture(scope="module")
def arrays():
    return load_arrays("vqloss_golden")


@pytest.fixture
def discriminator():
    module = NLayerDiscriminator()
    module.load_state_dict(module.state_dict() | fill_values(load_shapes("discriminator_keys")))
    return module


@pytest.fixture(scope="module")
def lpips(tmp_path_factory):
    """LPIPS with the golden fill; its trunk goes through a torchvision-style file, as real weights do."""
    values = fill_values(load_shapes("lpips_keys"))
    path = tmp_path_factory.mktemp("vgg") / VGG16_FILE
    trunk = {"features." + key.split(".", 2)[2]: value for key, value in values.items() if key.startswith("net.")}
    torch.save(trunk | {"classifier.6.bias": torch.zeros(1000)}, path)
    module = LPIPS(path)
    heads = {key: value for key, value in values.items() if key.startswith("lin")}
    module.load_state_dict(module.state_dict() | heads)
    return module


# ------------------------------------------------------------------------------------------------ discriminator


def test_discriminator_matches_llamagen(arrays, discriminator):
    shapes = load_shapes("discriminator_keys")
    assert {key: tuple(v.shape) for key, v in discriminator.state_dict().items()} == shapes
    assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633
    torch.testing.assert_close(sums(fill_values(shapes)), arrays["disc_param_sum_sumsq"], rtol=1e-6, atol=1e-3)
    with torch.no_grad():
        for name in ("x", "y"):
            found = discriminator.eval()(arrays[name])
            torch.testing.assert_close(found, arrays[f"disc_eval_{name}"], rtol=0, atol=1e-5)
        discriminator.train()
        for name, expected in (("x", "disc_train_x"), ("y", "disc_train_y_after_x")):
            torch.testing.assert_close(discriminator(arrays[name]), arrays[expected], rtol=0, atol=1e-5)
    for name in ("running_mean", "running_var"):
        found = discriminator.get_buffer(f"main.3.{name}")
        torch.testing.assert_close(found, arrays[f"disc_bn_{name}_after_x_then_y"], rtol=0, atol=1e-5)


def test_discriminator_init():
    torch.manual_seed(0)
    module = NLayerDiscriminator()
    weights = {key: value for key, value in module.state_dict().items() if key.endswith("weight")}
    for value in weights.values():
        assert 0.015 < value.std() < 0.025
        assert abs(value.mean() - (1.0 if value.dim() == 1 else 0.0)) < 0.01
    assert not module.main[3].bias.any()


def test_generator_pass_also_stops_synchronised_statistics():
    module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(NLayerDiscriminator())
    with module.generator_pass():
        assert not any(m.track_running_stats for m in module.main if isinstance(m, torch.nn.SyncBatchNorm))
    assert all(m.track_running_stats for m in module.main if isinstance(m, torch.nn.SyncBatchNorm))


@pytest.mark.parametrize("training", [True, False])
def test_generator_pass_leaves_the_discriminator_alone(arrays, discriminator, training):
    discriminator.train(training)
    before = {key: value.clone() for key, value in discriminator.state_dict().items()}
    with torch.no_grad():
        plain = discriminator(arrays["y"])
    discriminator.load_state_dict(before)
    y = arrays["y"].clone().requires_grad_()
    with discriminator.generator_pass():
        logits = discriminator(y)
    logits.mean().backward()  # after the context, as a training loop does
    assert torch.equal(logits, plain)
    assert y.grad.abs().max() > 0
    assert all(p.grad is None and p.requires_grad for p in discriminator.parameters())
    for key, value in discriminator.state_dict().items():
        assert torch.equal(value, before[key]), key

    discriminator(arrays["y"]).mean().backward()  # afterwards it learns again
    assert all(p.grad is not None for p in discriminator.parameters())
    moved = not torch.equal(discriminator.main[3].running_mean, before["main.3.running_mean"])
    assert moved == training


def test_generator_pass_restores_after_an_error(discriminator):
    with pytest.raises(ValueError, match="too small"), discriminator.generator_pass():
        discriminator(torch.zeros(1, 3, 16, 16))
    assert all(p.requires_grad for p in discriminator.parameters())
    assert discriminator.main[3].track_running_stats


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_discriminator_minimum_size_is_exact(n_layers):
    module = NLayerDiscriminator(1, ndf=8, n_layers=n_layers)
    side = module.min_image_size
    assert module(torch.zeros(2, 1, side, side + 1)).shape == (2, 1, 1, 1)
    with pytest.raises(RuntimeError):
        module.main(torch.zeros(2, 1, side - 1, side))  # the limit is not a matter of taste
    with pytest.raises(ValueError, match=f"n_layers={n_layers}.*at least {side}"):
        module(torch.zeros(2, 1, side - 1, side))
    with pytest.raises(ValueError, match=r"\(B, 1, H, W\)"):
        module(torch.zeros(2, 3, 64, 64))


# --------------------------------------------------------------------------------------------------- perceptual


def test_lpips_matches_llamagen(arrays, lpips):
    shapes = load_shapes("lpips_keys")
    assert {key: tuple(value.shape) for key, value in lpips.state_dict().items()} == shapes
    torch.testing.assert_close(sums(fill_values(shapes)), arrays["lpips_param_sum_sumsq"], rtol=1e-6, atol=1e-3)
    found = lpips(arrays["x"], arrays["y"])
    torch.testing.assert_close(found, arrays["lpips_filled_xy"], rtol=0, atol=1e-5)
    assert torch.equal(lpips(arrays["x"], arrays["x"]), torch.zeros(2, 1, 1, 1))


def test_lpips_is_frozen_and_deterministic_inside_a_training_module(arrays, lpips):
    host = torch.nn.Sequential(lpips)
    host.train()
    assert host.training
    assert not any(module.training for module in lpips.modules())
    y = arrays["y"][:1].clone().requires_grad_()
    first = lpips(arrays["x"][:1], y)
    assert torch.equal(first, lpips(arrays["x"][:1], y))  # Dropout would differ
    first.sum().backward()
    assert y.grad.abs().max() > 0
    assert not any(p.requires_grad for p in lpips.parameters())


def test_lpips_stays_in_float32_under_autocast(arrays, lpips):
    x, y = arrays["x"][:1, :, :32, :32], arrays["y"][:1, :, :32, :32]
    expected = lpips(x, y)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lpips(x, y)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_lpips_channels_and_sizes(arrays, lpips):
    x, y = arrays["x"][:1, :1, :32, :32], arrays["y"][:1, :1, :32, :32]
    assert torch.equal(lpips(x, y), lpips(x.repeat(1, 3, 1, 1), y.repeat(1, 3, 1, 1)))
    with pytest.raises(ValueError, match="1 or 3"):
        lpips(torch.zeros(1, 4, 32, 32), torch.zeros(1, 4, 32, 32))
    with pytest.raises(ValueError, match="equal shapes"):
        lpips(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 16, 16))
    assert lpips(torch.zeros(1, 3, 16, 16), torch.ones(1, 3, 16, 16)).isfinite()
    with pytest.raises(ValueError, match="at least 16"):
        lpips(torch.zeros(1, 3, 15, 16), torch.zeros(1, 3, 15, 16))


def test_normalisation_has_a_finite_gradient_at_zero_features():
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]]).view(2, 2, 1, 1)
    plain = x.clone().requires_grad_()
    (plain / (plain.square().sum(1, keepdim=True).sqrt() + 1e-10)).sum().backward()
    assert plain.grad[1].isnan().all()  # the usual formula: the data of this test triggers the bug
    safe = x.clone().requires_grad_()
    out = normalize_channels(safe)
    out.sum().backward()
    assert safe.grad.isfinite().all()
    torch.testing.assert_close(out.detach()[0].flatten(), torch.tensor([0.6, 0.8]))
    assert not out[1].any()
    torch.testing.assert_close(safe.grad[0], plain.grad[0])


def test_lpips_gradient_survives_dead_features(arrays, lpips):
    state = {key: value.clone() for key, value in lpips.net.state_dict().items()}
    dead = {key: torch.zeros_like(value) for key, value in state.items() if key.startswith("slice5.28")}
    lpips.net.load_state_dict(state | dead)  # relu5_3 is all zero everywhere, for both images
    try:
        y = arrays["y"][:1].clone().requires_grad_()
        lpips(arrays["x"][:1], y).sum().backward()
    finally:
        lpips.net.load_state_dict(state)
    assert y.grad.isfinite().all()
    assert y.grad.any()


def test_lpips_heads_are_the_published_ones(lpips, tmp_path):
    trunk = {"features." + key.split(".", 1)[1]: value for key, value in lpips.net.state_dict().items()}
    torch.save(trunk, tmp_path / VGG16_FILE)
    heads = {key: value for key, value in LPIPS(tmp_path / VGG16_FILE).state_dict().items() if key.startswith("lin")}
    assert all((value >= 0).all() for value in heads.values())  # trained under that constraint
    assert not any(torch.equal(value, lpips.state_dict()[key]) for key, value in heads.items())
    published = _published_heads()
    assert set(published) == set(heads)
    assert all(torch.equal(published[key], heads[key]) for key in heads)


def _published_heads():
    import lpips

    path = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    return torch.load(path, map_location="cpu", weights_only=True)


def test_missing_vgg_weights_are_explained_and_never_downloaded(tmp_path, monkeypatch):
    def no_download(*_args, **_kwargs):
        raise AssertionError("tried to download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_download)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_download)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / VGG16_FILE
    for path, place in ((None, cached), (tmp_path / "mine.pth", tmp_path / "mine.pth")):
        with pytest.raises(FileNotFoundError) as caught:
            LPIPS(path)
        for part in (str(place), VGG16_FILE, "--lpips-vgg-weights PATH"):
            assert part in str(caught.value)
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert find_vgg_weights(None) == cached


def test_wrong_vgg_files_are_named(tmp_path):
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(ValueError, match=r"text.pth is not a readable"):
        LPIPS(tmp_path / "text.pth")
    torch.save({"features.0.weight": torch.zeros(64, 1, 3, 3)}, tmp_path / "small.pth")
    with pytest.raises(ValueError, match=r"small.pth .*features.0.weight \(64, 3, 3, 3\), features.0.bias \(64,\)"):
        LPIPS(tmp_path / "small.pth")


# ------------------------------------------------------------------------------------------------------- losses


def test_logit_losses_match_llamagen(arrays):
    real, fake = arrays["logits_real"], arrays["logits_fake"]
    for kind, name in (("hinge", "hinge_d"), ("vanilla", "vanilla_d")):
        torch.testing.assert_close(discriminator_adversarial_loss(real, fake, kind), arrays[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(generator_adversarial_loss(fake, "hinge"), arrays["hinge_g"], rtol=0, atol=1e-6)


def test_non_saturating_has_its_arguments_the_right_way_round(arrays):
    real, fake = arrays["logits_real"], arrays["logits_fake"].clone().requires_grad_()
    bce = F.binary_cross_entropy_with_logits
    swapped = 0.5 * (bce(torch.ones_like(real), real) + bce(torch.zeros_like(fake), fake))
    torch.testing.assert_close(swapped.detach(), arrays["nonsat_d_as_written"])  # the golden value is the buggy one
    assert not torch.autograd.grad(swapped, fake)[0].any()  # and tells the discriminator nothing about fakes
    torch.testing.assert_close(bce(torch.ones_like(fake), fake).detach(), arrays["nonsat_g_as_written"])

    ours = discriminator_adversarial_loss(real, fake, "non-saturating")
    expected = 0.5 * (bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake)))
    torch.testing.assert_close(ours, expected)
    assert abs(ours - arrays["nonsat_d_as_written"]) > 0.01
    assert (torch.autograd.grad(ours, fake)[0] > 0).all()  # descending it lowers every fake logit
    generator = generator_adversarial_loss(fake, "non-saturating")
    torch.testing.assert_close(generator, bce(fake, torch.ones_like(fake)))
    assert abs(generator - arrays["nonsat_g_as_written"]) > 0.1


@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_generator_losses_push_fake_logits_up(kind):
    fake = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    assert (torch.autograd.grad(generator_adversarial_loss(fake, kind), fake)[0] < 0).all()


@pytest.mark.parametrize("kind", ADVERSARIAL_LOSSES)
def test_discriminator_losses_separate_and_saturate_only_when_won(kind):
    real, fake = torch.tensor([0.3], requires_grad=True), torch.tensor([0.2], requires_grad=True)
    grads = torch.autograd.grad(discriminator_adversarial_loss(real, fake, kind), (real, fake))
    assert grads[0] < 0 < grads[1]
    won = discriminator_adversarial_loss(torch.tensor([20.0]), torch.tensor([-20.0]), kind)
    torch.testing.assert_close(won, torch.tensor(0.0), rtol=0, atol=1e-6)


def test_disc_active_counts_like_llamagen():
    # LlamaGen numbers steps from 1, a loop here from 0: step number 20000 is step 19999.
    assert not disc_active(DISC_START - 2, DISC_START)
    assert disc_active(DISC_START - 1, DISC_START)
    assert disc_active(0, 0)
    assert disc_active(0, 1)
    assert not disc_active(0, 2)


def test_losses_are_float32_and_unknown_kinds_are_listed():
    x, y = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8).bfloat16()
    assert reconstruction_loss(x, y, "l1").dtype == torch.float32
    torch.testing.assert_close(reconstruction_loss(x, y, "l2"), (x - y.float()).square().mean())
    for call in (
        lambda: reconstruction_loss(x, y, "l3"),
        lambda: generator_adversarial_loss(y, "l3"),
        lambda: discriminator_adversarial_loss(y, y, "l3"),
    ):
        with pytest.raises(ValueError, match="'l3'; choose one of"):
            call()


def _reconstruct(arrays):
    """The golden's one-layer decoder: (reconstruction, its weight)."""
    features = torch.randn(2, 8, 64, 64, generator=torch.Generator().manual_seed(8))
    torch.testing.assert_close(features.flatten()[:8], arrays["last_feat_seed8_first8"])
    weight = arrays["last_w"].clone().requires_grad_()
    x_hat = F.conv2d(features, weight, arrays["last_b"], padding=1)
    torch.testing.assert_close(x_hat.detach(), arrays["rec"], rtol=0, atol=1e-5)
    return x_hat, weight


@pytest.mark.parametrize(  # LlamaGen's step numbers; before disc_start "adaptive" is "default"
    ("case", "number"),
    [("default", DISC_START - 1), ("default", DISC_START), ("adaptive", DISC_START), ("l1", DISC_START)],
)
def test_whole_losses_match_llamagen(arrays, discriminator, lpips, case, number):
    x_hat, weight = _reconstruct(arrays)
    active = disc_active(number - 1, DISC_START)
    discriminator.train()
    found = generator_loss(
        arrays["x"], x_hat, reconstruction="l1" if case == "l1" else "l2", perceptual=lpips,
        discriminator=discriminator if active else None, disc_weight=DISC_WEIGHT,
        adaptive_layer=weight if case == "adaptive" else None,
    )
    codebook_losses = 0.11 + 0.07  # constants of the golden; in training they are ProVQOutput.loss
    expected = arrays[f"vqloss_{case}_gen_{number}"]
    torch.testing.assert_close(found.total.detach() + codebook_losses, expected, rtol=0, atol=1e-5)
    grad = torch.autograd.grad(found.total, weight)[0]
    torch.testing.assert_close(grad, arrays[f"vqloss_{case}_gradlast_{number}"], rtol=0, atol=1e-5)
    torch.testing.assert_close(found.terms["perceptual"], arrays["vqloss_lpips"], rtol=0, atol=1e-5)
    assert not any(value.requires_grad for value in found.terms.values())
    if case != "l1":
        torch.testing.assert_close(found.terms["reconstruction"], arrays["vqloss_rec_mse"], rtol=0, atol=1e-5)
    if not active:
        assert "adversarial" not in found.terms
        assert arrays[f"vqloss_{case}_disc_{number}"] == 0
        return
    torch.testing.assert_close(found.terms["adversarial"], arrays["vqloss_g_adv"], rtol=0, atol=1e-5)
    if case == "adaptive":
        assert abs(found.terms["adaptive_weight"] - arrays["vqloss_adaptive_w"]) < 1e-4
    assert all(p.grad is None for p in discriminator.parameters())
    loss = discriminator_loss(discriminator, arrays["x"], x_hat, weight=DISC_WEIGHT)
    torch.testing.assert_close(loss.total.detach(), arrays[f"vqloss_{case}_disc_{number}"], rtol=0, atol=1e-5)
    loss.total.backward()
    assert all(p.grad is not None for p in discriminator.parameters())
    assert weight.grad is None  # the reconstruction was detached


def test_adaptive_weight_is_clamped_and_detached():
    layer = torch.ones(3, requires_grad=True)
    weight = adaptive_weight(3.0 * layer.sum(), 2.0 * layer.sum(), layer)
    torch.testing.assert_close(weight, torch.tensor(3.0 * 3**0.5 / (2.0 * 3**0.5 + 1e-4)))
    assert not weight.requires_grad
    assert adaptive_weight(1e6 * layer.sum(), 0.0 * layer.sum(), layer) == 1e4


def test_weights_scale_their_terms(arrays, lpips):
    x, y = arrays["x"], arrays["y"]
    found = generator_loss(x, y, reconstruction_weight=2.0, perceptual=lpips, perceptual_weight=3.0)
    expected = 2.0 * found.terms["reconstruction"] + 3.0 * found.terms["perceptual"]
    torch.testing.assert_close(found.total, expected)
    assert set(generator_loss(x, y).terms) == {"reconstruction"}
