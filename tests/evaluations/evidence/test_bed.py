"""A run is a function of arm, setting and seed; options act when they should; what is measured is what it says."""

import dataclasses

import numpy as np
import pytest
import scipy.linalg
import torch
from evidence_bed import HELD_OUT, SETTING, make_images, write_pictures
from image_files import encoded, picture, write_folder, write_zip
from torch.nn import functional as F

from evaluations.evidence import bed
from evaluations.evidence.arms import ARMS, Arm
from evaluations.evidence.bed import PROBE, Autoencoder, Diverged, Images, Trainer, prepare
from evaluations.evidence.setting import Setting
from evaluations.features import Extractor, Features
from tokenizer.pixels import psnr
from tokenizer.provq import Curriculum, ProVQ, VectorQuantizer
from tokenizer.runtime.seeding import fold


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("bed"))


def states(trainer):
    return trainer.model.state_dict() | trainer.provq.state_dict()


# ------------------------------------------------------------------------------------------------------- images

def test_prepared_pixels_are_those_of_the_files_and_are_decoded_once(tmp_path, monkeypatch):
    path = write_pictures(tmp_path)
    cache = prepare(path, SETTING, tmp_path / "cache")
    expected = {np.array(picture(i, 8, 8)).transpose(2, 0, 1).tobytes() for i in range(HELD_OUT + PROBE + 40)}
    assert {image.tobytes() for image in np.load(cache)} == expected
    monkeypatch.setattr(bed, "open_images", None)
    assert prepare(path, SETTING, tmp_path / "cache") == cache


@pytest.mark.parametrize("listed", [False, True])
def test_another_image_in_a_folder_or_list_is_another_array(listed, tmp_path):
    files = {f"a/{i}.png": encoded(picture(i, 8, 8)) for i in range(HELD_OUT + PROBE + 1)}
    path = write_folder(tmp_path / "images", files)
    if listed:
        path = tmp_path / "list.txt"
        path.write_text("".join(f"images/{name}\n" for name in files))
    before = np.load(prepare(path, SETTING, tmp_path / "cache"))
    assert prepare(path, SETTING, tmp_path / "cache") == prepare(path, SETTING, tmp_path / "cache")
    (tmp_path / "images" / "a" / "0.png").write_bytes(encoded(picture(999, 8, 8)))  # the folder's own time stays
    after = np.load(prepare(path, SETTING, tmp_path / "cache"))
    assert (before != after).any((1, 2, 3)).sum() == 1


def test_unreadable_images_are_named(tmp_path):
    """Another would take the place of each, and be held out as well as trained on."""
    path = write_zip(tmp_path / "pictures.zip", {
        f"{i:03d}.png": encoded(picture(i, 8, 8)) if i % 100 else b"no image" for i in range(HELD_OUT + PROBE + 40)})
    with pytest.raises(ValueError, match=r"pictures.zip: 4 images cannot be read, such as 000.png; mend or remove"):
        prepare(path, SETTING, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_takes_no_file_is_named_before_images_are_decoded(tmp_path, monkeypatch):
    path = write_pictures(tmp_path)
    monkeypatch.setattr(bed, "open_images", None)
    with pytest.raises(ValueError, match=f"--cache {path}: no files can be written there"):
        prepare(path, SETTING, path)


def test_a_damaged_array_is_named(tmp_path):
    path = write_pictures(tmp_path)
    cache = prepare(path, SETTING, tmp_path / "cache")
    for content in (cache.read_bytes()[:-1], b"", b"no array"):
        cache.write_bytes(content)
        with pytest.raises(ValueError, match=f"{cache}: a damaged array of images; remove it"):
            prepare(path, SETTING, tmp_path / "cache")


def test_parts_are_apart_and_floats_span_the_pixels(images):
    parts = [images.training, images.probe, images.held_out]
    assert [len(part) for part in parts] == [40, PROBE, HELD_OUT]
    assert len(set(np.concatenate(parts))) == 40 + PROBE + HELD_OUT
    assert images.floats(images.probe).min() == -1
    assert images.floats(images.probe).max() == 1


def test_too_few_images(tmp_path):
    with pytest.raises(ValueError, match="--held-out 60 and 256 to look at, of 316 images in"):
        prepare(write_pictures(tmp_path), dataclasses.replace(SETTING, held_out=60), tmp_path)


@pytest.mark.parametrize(("values", "message"), [
    ({"steps": 0}, "--steps is 0"), ({"model": "VQ-5"}, "--model 'VQ-5' is none of small, VQ-4"),
    ({"image_size": 9}, "--image-size 9 is no multiple of 2"), ({"warmup_steps": 9}, "together at most --steps 12"),
    ({"disc_start": 13}, "--disc-start 13 must be a step of 1 to --steps 12"),
    ({"disc_start": 0}, "--disc-start 0 must"), ({"disc_start": 1}, "--image-size 8 are too small for the discrim"),
    ({"features": "5" * 64, "held_out": 1}, "--held-out 1: the rFID of --features needs at least 2 images"),
    ({"transition_steps": -1}, "must be at least 0"), ({"latents_per_code": 0}, "--latents-per-code is 0"),
])
def test_settings_refused(values, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SETTING, **values)


def test_the_small_bed():
    expected = {"num_codes": 512, "dim": 8, "model": "small", "image_size": 16, "steps": 600, "batch_size": 32,
                "warmup_steps": 200, "transition_steps": 200, "held_out": 2000}
    assert expected.items() <= dataclasses.asdict(Setting("cifar10_train.zip")).items()
    x = torch.zeros(2, 3, 16, 16)
    assert Autoencoder(Setting("x")).encode(x).shape == (2, 8, 8, 8)


# ----------------------------------------------------------------------------------------------------- training

def test_a_run_repeats_bit_for_bit_and_depends_on_the_seed(images):
    runs = [Trainer(ARMS["provq+recluster"], SETTING, seed, images) for seed in (1, 1, 2)]
    results = [run.run() for run in runs]
    torch.testing.assert_close(states(runs[0]), states(runs[1]), rtol=0, atol=0)
    assert results[0]["metrics"] == results[1]["metrics"] != results[2]["metrics"]


def test_vanilla_is_the_plain_loop(images):
    """Without options the bed trains exactly what a reader would write."""
    ours = Trainer(ARMS["vanilla"], SETTING, 3, images)
    ours.run()

    torch.manual_seed(fold(3, 0))
    model = Autoencoder(SETTING)
    torch.manual_seed(fold(3, 1))
    quantizer = VectorQuantizer(16, 8)
    provq = ProVQ(quantizer, Curriculum(0, 0))
    optimizer = torch.optim.Adam([*model.parameters(), *quantizer.parameters()], 1e-3, (0.9, 0.95))
    batches = torch.Generator().manual_seed(fold(3, 2))
    for step in range(12):
        provq.set_step(step)
        x = images.floats(images.training[torch.randint(40, (4,), generator=batches).numpy()])
        out = provq(model.encode(x))
        loss = F.mse_loss(model.decode(out.quantized), x) + out.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    provq.set_step(12)
    torch.testing.assert_close(states(ours), model.state_dict() | provq.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["provq+recluster", "provq+mix+follow", "simvq+provq", "ema+provq", "warmup"])
def test_a_shared_warm_up_is_the_same_run(name, images, tmp_path):
    alone = Trainer(ARMS[name], SETTING, 1, images)
    expected = alone.run()
    other = Trainer(ARMS["provq"], dataclasses.replace(SETTING, num_codes=8), 1, images)
    assert other.run(tmp_path)["first_step"] == 4
    assert len(list(tmp_path.iterdir())) == 1
    taken = Trainer(ARMS[name], SETTING, 1, images)
    result = taken.run(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1, "the other's warm-up was taken over"
    torch.testing.assert_close(states(taken), states(alone), rtol=0, atol=0)
    assert (result["metrics"], result["trace"]) == (expected["metrics"], expected["trace"])


@pytest.mark.parametrize(("arm", "seed"), [
    (Arm(curriculum="provq", lr=2e-3), 1), (ARMS["provq"], 2), (ARMS["l2+provq"], 1)])
def test_other_warm_ups_are_not_shared(arm, seed, images, tmp_path):
    Trainer(ARMS["provq"], SETTING, 1, images).run(tmp_path)
    after = Trainer(arm, SETTING, seed, images).run(tmp_path)["metrics"]
    assert len(list(tmp_path.iterdir())) == 2
    assert after == Trainer(arm, SETTING, seed, images).run()["metrics"]


@pytest.mark.parametrize("name", ["vanilla", "adaptive"])
def test_arms_without_that_warm_up_share_nothing(name, images, tmp_path):
    assert Trainer(ARMS[name], SETTING, 1, images).run(tmp_path)["first_step"] == 0
    assert not list(tmp_path.iterdir())


def test_codes_have_their_own_learning_rate(images):
    def rates(arm):
        trainer = Trainer(arm, SETTING, 0, images)
        codes = {id(p) for p in trainer.provq.parameters()}
        groups = trainer.optimizer.param_groups
        return [(group["lr"], {id(p) in codes for p in group["params"]}) for group in groups]

    assert rates(Arm(lr=0.5, code_lr_scale=10.0)) == [(0.5, {False}), (5.0, {True})]
    assert rates(Arm("simvq", lr=0.5)) == [(0.5, {False}), (0.5, {True})]
    assert rates(Arm("ema")) == [(1e-3, {False})]
    assert rates(Arm("fsq", code_lr_scale=10.0)) == [(1e-3, {True, False})], "projections are no codes"


def test_reclustering_happens_where_it_should(images, monkeypatch):
    happened = []

    def record(provq, latents, *, optimizers, seed):  # bound to a ProVQ
        assert len(latents) >= SETTING.latents_per_code * SETTING.num_codes
        assert optimizers
        happened.append((int(provq.step), seed))

    monkeypatch.setattr(ProVQ, "recluster", record)
    for arm in (Arm(recluster=True), Arm(curriculum="warmup", recluster_at=(5, 11)), Arm(curriculum="provq")):
        Trainer(arm, SETTING, 0, images).run()
    assert [step for step, _ in happened] == [8, 5, 11]
    assert len({seed for _, seed in happened}) == 3


@pytest.mark.parametrize(("arm", "changes", "message"), [
    (Arm(recluster_at=(12,)), {}, "re-clustering at step 12 of 12 never comes"),
    (Arm(curriculum="provq", recluster_at=(3,)), {}, "step 3 is not after the warm-up of 4 steps"),
    (Arm(curriculum="adaptive", recluster_at=(8,)), {}, "step 8 is not after the warm-up of 8 steps"),
    (ARMS["provq+recluster"], {"transition_steps": 0}, "step 4 is not after the warm-up of 4"),
    (Arm(recluster=True, recluster_at=(8,)), {}, "--recluster-at 8 is where the transition ends"),
    (ARMS["warmup"], {"warmup_steps": 12, "transition_steps": 0}, "--steps 12 end before the warm-up of 12"),
    (ARMS["adaptive"], {"transition_steps": 8}, "--steps 12 end before the warm-up of 12 steps has"),
    (ARMS["adaptive"], {"warmup_steps": 0, "transition_steps": 0}, "adaptive needs a warm-up to end"),
    (ARMS["fsq"], {"num_codes": 12}, r"need a codebook size 2\^n"),
])
def test_what_would_fail_while_it_trains_is_refused_before(arm, changes, message):
    with pytest.raises(ValueError, match=f"arm its name: .*{message}"):
        bed.require_trainable("its name", arm, dataclasses.replace(SETTING, **changes))


def test_what_can_be_trained_is_not_refused():
    for name, arm in ARMS.items():
        bed.require_trainable(name, arm, SETTING)
    for arm in (Arm(recluster_at=(0, 11)), Arm(curriculum="warmup", recluster=True, recluster_at=(5,))):
        bed.require_trainable("", arm, SETTING)


def test_codes_start_where_they_should(images):
    def first(arm):
        trainer = Trainer(arm, SETTING, 0, images)
        latents = trainer._latents(0)
        trainer._step(0)
        return trainer.reference[1], latents

    codes, latents = first(Arm(from_latents=True))
    assert all((code == latents).all(1).any() for code in codes)
    codes, _ = first(Arm())
    assert codes.abs().max() <= 1 / 16


def test_an_adaptive_warm_up_ends_by_itself(images, monkeypatch):
    setting = dataclasses.replace(SETTING, warmup_steps=6, transition_steps=5)
    scores = iter([10.0, 11.0, 11.0, 11.0, 11.0, 11.0])
    trainer = Trainer(ARMS["adaptive"], setting, 0, images)
    whole = trainer._probe
    monkeypatch.setattr(trainer, "_probe", lambda: whole() | {"psnr": next(scores, 11.0)})
    trainer.run()
    assert 0 < int(trainer.provq.warmup_end) < 12
    assert trainer.provq.stage == 3


@pytest.mark.parametrize("name", ["vanilla", "warmup+recluster", "adaptive"])
def test_divergence_is_reported(name, images):
    trainer = Trainer(dataclasses.replace(ARMS[name], lr=1e30), SETTING, 0, images)
    with pytest.raises(Diverged, match=r"not finite|the loss is"):
        trainer.run()


def after_step(trainer, step, change, monkeypatch):
    """Let the trainer's latents be changed once a step is done, for good."""
    whole = trainer._step

    def then(now):
        whole(now)
        if now == step:
            with torch.no_grad():
                change(trainer.model.before)
            trainer.model.encoder.requires_grad_(False), trainer.model.before.requires_grad_(False)

    monkeypatch.setattr(trainer, "_step", then)


@pytest.mark.parametrize("name", ["vanilla", "fsq", "adaptive"])
def test_divergence_by_the_last_step_is_reported(name, images, monkeypatch):
    trainer = Trainer(ARMS[name], SETTING, 0, images)
    after_step(trainer, 11, lambda layer: layer.weight.fill_(torch.nan), monkeypatch)
    with pytest.raises(Diverged, match="the latents are not finite at step 12"):
        trainer.run()
    assert torch.is_grad_enabled()


def test_latents_that_collapse_are_a_result_or_a_divergence(images, monkeypatch):
    def collapse(layer):
        layer.weight.zero_(), layer.bias.fill_(0.3)

    trainer = Trainer(ARMS["vanilla"], SETTING, 0, images)
    after_step(trainer, 2, collapse, monkeypatch)
    metrics = trainer.run()["metrics"]
    assert metrics["codes_used"] == 1
    assert metrics["latent_spread"] == 0
    assert "relative_error" not in metrics, "of no variance"
    trainer = Trainer(ARMS["provq"], SETTING, 0, images)
    after_step(trainer, 2, collapse, monkeypatch)
    with pytest.raises(Diverged, match="step 4: k-means: all latents are equal"):
        trainer.run()


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """Images of 16 pixels, as the discriminator needs them, and a setting with one from the 7th step on."""
    folder = tmp_path_factory.mktemp("larger")
    setting = dataclasses.replace(SETTING, image_size=16, disc_start=7)
    return setting, Images(prepare(write_pictures(folder), setting, folder / "cache"), HELD_OUT)


def test_a_discriminator_trains_from_its_first_step_on_and_moves_the_rest(larger, tmp_path):
    setting, images = larger
    alone = Trainer(ARMS["provq"], dataclasses.replace(setting, disc_start=None), 1, images)
    both = Trainer(ARMS["provq"], setting, 1, images)
    untrained = {name: value.clone() for name, value in both.discriminator.state_dict().items()}
    for step in range(6):
        alone._step(step), both._step(step)
    torch.testing.assert_close(states(alone), states(both), rtol=0, atol=0)
    torch.testing.assert_close(dict(both.discriminator.state_dict()), untrained, rtol=0, atol=0)
    alone._step(6), both._step(6)
    assert not torch.equal(alone.model.decoder.conv_out.weight, both.model.decoder.conv_out.weight)
    torch.testing.assert_close(alone.model.decoder.conv_out.weight, both.model.decoder.conv_out.weight, rtol=0.5,
                               atol=3e-3)  # one step of Adam apart
    assert not torch.equal(both.discriminator.state_dict()["main.0.weight"], untrained["main.0.weight"])

    expected = Trainer(ARMS["provq"], setting, 1, images).run()["metrics"]
    for _ in range(2):  # a warm-up without a discriminator is shared, one with it is not
        assert Trainer(ARMS["provq"], setting, 1, images).run(tmp_path)["metrics"] == expected
    early = dataclasses.replace(setting, disc_start=4)
    assert Trainer(ARMS["provq"], early, 1, images).run(tmp_path)["first_step"] == 0


# ---------------------------------------------------------------------------------------------------- measuring

def test_rfid_is_the_distance_of_features_of_reconstructions(images):
    class Means(torch.nn.Module):
        def forward(self, x):
            return x.float().mean((2, 3)) * 4

    means = Means()
    extractor = Extractor("means", "5" * 64, means, lambda pixels: Features(means(pixels)))
    setting = dataclasses.replace(SETTING, features="5" * 64)
    trainer = Trainer(ARMS["provq"], setting, 0, images, extractor)
    metrics = trainer.run()["metrics"]
    plain = Trainer(ARMS["provq"], SETTING, 0, images).run()["metrics"]
    x = images.floats(images.held_out)
    trainer.model.eval(), trainer.provq.eval()
    with torch.no_grad():
        y = trainer.model.decode(trainer.provq(trainer.model.encode(x)).quantized).clamp(-1, 1)
    sides = [((side + 1) * 127.5).round().mean((2, 3)).double().numpy() * 4 for side in (x, y)]
    mu, sigma = zip(*[(side.mean(0), np.cov(side.T)) for side in sides], strict=True)
    root = scipy.linalg.sqrtm(sigma[0] @ sigma[1]).real
    expected = ((mu[0] - mu[1]) ** 2).sum() + np.trace(sigma[0] + sigma[1] - 2 * root)
    assert metrics.pop("rfid") == pytest.approx(expected, rel=1e-3)
    assert metrics == plain
    for wrong in (None, Extractor("means", "6" * 64, means, lambda pixels: Features(means(pixels)))):
        with pytest.raises(ValueError, match="the extractor of this setting has the hash 555"):
            Trainer(ARMS["provq"], setting, 0, images, wrong)


def test_scores_are_of_all_held_out_images_whatever_the_chunks(images, monkeypatch):
    trainer = Trainer(ARMS["provq"], SETTING, 0, images)
    metrics = trainer.run()["metrics"]
    x = images.floats(images.held_out)
    trainer.model.eval(), trainer.provq.eval()
    with torch.no_grad():
        z = trainer.model.encode(x)
        out = trainer.provq(z)
        y = trainer.model.decode(out.quantized).clamp(-1, 1)
    trainer.provq.train(), trainer.model.train()
    latents = z.movedim(1, -1).reshape(-1, 8)
    error = (out.quantized.movedim(1, -1).reshape(-1, 8) - latents).square().mean()
    assert metrics["psnr"] == pytest.approx(psnr(y, x, 2.0).mean().item())
    assert metrics["codes_used"] == len(out.indices.unique()) == round(metrics["usage"] * 16)
    assert metrics["relative_error"] == pytest.approx((error / latents.var(0, unbiased=False).mean()).item(), rel=1e-4)
    assert metrics["latent_spread"] == pytest.approx(latents.var(0, unbiased=False).mean().sqrt().item(), rel=1e-4)
    monkeypatch.setattr(bed, "CHUNK", 7)
    assert trainer.score() == pytest.approx(metrics, rel=1e-5)


def test_the_trace_counts_from_the_last_k_means(images):
    trace = Trainer(ARMS["provq+recluster"], SETTING, 0, images).run()["trace"]
    at = {step: [line for line in trace if line["step"] == step] for step in (0, 4, 8, 12)}
    assert "code_spread" not in at[0][0]
    assert at[4][0]["codes_moved"] == at[4][0]["latents_moved"] == 0
    before, after = at[8]
    assert before["codes_moved"] > 0 < before["latents_moved"]
    assert after["codes_moved"] == after["latents_moved"] == 0
    assert at[12][-1]["codes_moved"] > 0


def test_a_look_does_not_change_the_run(images, monkeypatch):
    looked = Trainer(ARMS["provq+mix+follow"], SETTING, 0, images)
    looked.run()
    blind = Trainer(ARMS["provq+mix+follow"], SETTING, 0, images)
    monkeypatch.setattr(blind, "_look", lambda *_: None)
    monkeypatch.setattr(blind, "_refer", lambda: None)
    blind.run()
    torch.testing.assert_close(states(looked), states(blind), rtol=0, atol=0)


def test_images_are_shared_memory(images):
    assert isinstance(images.pixels, np.memmap)
