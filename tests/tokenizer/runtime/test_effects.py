"""Flags that do nothing in the combination they are given in: refused by name, unless they say what holds anyway."""

import json
from dataclasses import fields

import pytest
from digit_runs import train_on_digits
from training_runs import rows, to_words

from autoregressive import train_config as gpts
from protein import train_config as structures
from tokenizer import train_config as images
from tokenizer import train_provq

MODULES = {"images": images, "structures": structures, "gpts": gpts}


def test_the_tables_name_fields_and_every_trainer_has_the_common_rows():
    named = {name: {field.name for field in fields(module.TrainConfig)} for name, module in MODULES.items()}
    for module in MODULES.values():
        assert module.EFFECTS.keys() <= set().union(*named.values())
        assert {"ema_decay", "min_lr"} <= module.EFFECTS.keys()
    assert images.EFFECTS.keys() - {"min_lr"} <= named["images"]  # whose rate is constant
    assert structures.EFFECTS.keys() <= named["structures"]
    assert gpts.EFFECTS.keys() <= named["gpts"]


NOT = "has no effect"
VANILLA = {"warmup_steps": 0, "transition_steps": 0}
REFUSED = [
    ("images", {"ema_decay": 0.5}, f"--ema-decay 0.5 {NOT} without an average of the weights: add --ema, or "),
    ("structures", {"ema_decay": 0.5}, "add --ema"),
    ("gpts", {"ema_decay": 0.5}, "add --ema"),
    ("structures", {"min_lr": 0.0, "lr_schedule": "constant"}, f"--min-lr 0.0 {NOT} with --lr-schedule constant: "),
    ("gpts", {"preset": "c2i", "min_lr": 1e-5}, f"--min-lr 1e-05 {NOT} with --lr-schedule constant"),
    ("gpts", {"preset": "c2i", "sample_cfg_scale": 4}, f"--sample-cfg-scale 4.0 {NOT} where no pictures are drawn: "),
    ("gpts", {"sample_every": 0, "sample_cfg_scale": 4}, f"--sample-cfg-scale 4.0 {NOT} where no pictures are drawn: "),
    ("gpts", {"preset": "c2i", "sample_every": 9}, f"--sample-every 9 {NOT} without the tokenizer of the codes: give "),
    ("gpts", {"vq_ckpt": "none", "vq_weights": "ema"}, f"--vq-weights ema {NOT} without the tokenizer of the codes: "),
    ("gpts", {"preset": "c2i", "codebook_l2_norm": True}, f"--codebook-l2-norm {NOT} without the tokenizer"),
    ("gpts", {"preset": "c2i", "other_tokenizer": True}, f"--other-tokenizer {NOT} with neither --vq-ckpt nor --init-"),
    ("gpts", {"dropout_p": 0.2, "drop_path_rate": 0.1}, f"--dropout-p 0.2 {NOT} with --drop-path-rate above 0, which"),
    ("images", {"disc_adaptive_weight": True}, f"--disc-adaptive-weight {NOT} without a discriminator: give --disc-w"),
    ("images", {"disc_loss": "vanilla"}, f"--disc-loss vanilla {NOT} without a discriminator"),
    ("images", {"disc_start": 9}, f"--disc-start 9 {NOT} without a discriminator"),
    ("images", {"low_precision_norms": True}, f"--low-precision-norms {NOT} with --mixed-precision none: leave it out"),
    ("images", {"lpips_vgg_weights": "x.pth"}, f"--lpips-vgg-weights x.pth {NOT} with --perceptual-weight 0"),
    ("images", {"reconstruction_loss": "l1", "reconstruction_weight": 0}, f"--reconstruction-loss l1 {NOT} with --rec"),
    ("images", {"bit_depth": 12}, f"--bit-depth 12 {NOT} on the digits, which are no files: give --data-path, or "),
    ("images", {"transition_steps": 0, "transition": "linear"}, f"--transition linear {NOT} with --transition-steps 0"),
    ("structures", {"transition_steps": 0, "loss_lambda": 0.5}, f"--loss-lambda 0.5 {NOT} with --transition-steps 0"),
    ("images", {"codebook_init": "none", "kmeans_batches": 2}, f"--kmeans-batches 2 {NOT} without k-means: give "),
    ("images", VANILLA | {"kmeans_start": "random"}, f"--kmeans-start random {NOT} without k-means"),
    ("images", {"codebook_init": "latents", "kmeans_iters": 5}, f"--kmeans-iters 5 {NOT} without k-means"),
    ("structures", {"quantizer": "fsq", "kmeans_iters": 5}, f"--kmeans-iters 5 {NOT} without k-means"),
    ("structures", VANILLA | {"kmeans_iters": 5}, f"--kmeans-iters 5 {NOT} without k-means"),
    ("structures", {"data_path": "x", "ideal_chains": 9}, f"--ideal-chains 9 {NOT} with --data-path, which has the "),
    ("structures", {"data_path": "x", "val_path": "y", "val_fraction": 0.5}, f"--val-fraction 0.5 {NOT} with --val"),
    ("structures", {"data_path": "x", "val_path": "y", "clusters": "c"}, f"--clusters c {NOT} with --val-path and"),
    ("structures", {"min_plddt": 70}, f"--min-plddt 70.0 {NOT} on generated backbones: give --data-path, or "),
    ("structures", {"max_bad_structures": 3}, f"--max-bad-structures 3 {NOT} on generated backbones"),
]


@pytest.mark.parametrize(("trainer", "given", "said"), REFUSED, ids=[
    f"{trainer}-{'-'.join(given)}" for trainer, given, _ in REFUSED])
def test_what_nothing_would_come_of_is_refused(tmp_path, trainer, given, said):
    with pytest.raises(ValueError, match=NOT) as refused:
        MODULES[trainer].parse_config(to_words(given | {"results_dir": tmp_path / "run"}))
    assert said in str(refused.value)
    assert str(refused.value).endswith("leave it out")


@pytest.mark.parametrize(("trainer", "given"), [
    ("images", {"ema_decay": 0.5, "ema": True}), ("images", {"ema_decay": 0.9999}),  # what holds anyway
    ("images", {"disc_start": 9, "disc_weight": 0.5}), ("images", {"--no-disc-adaptive-weight": True}),
    ("images", VANILLA | {"kmeans_iters": 5, "recluster_at": 9}), ("images", {"recluster": True, "kmeans_batches": 2}),
    ("images", {"codebook_init": "none", "kmeans_iters": 5, "recluster": True}),
    ("images", {"codebook_init": "latents", "kmeans_batches": 2}), ("structures", VANILLA | {"kmeans_batches": 2}),
    ("structures", VANILLA | {"quantizer": "fsq", "kmeans_batches": 8}),  # the preset's
    ("images", VANILLA | {"loss_lambda": 1}),  # stage 3 weighs the loss so
    ("images", {"stop_after": "warmup", "kmeans_iters": 5}),  # continued it comes to k-means
    ("images", {"low_precision_norms": True, "mixed_precision": "bf16"}),
    ("images", {"data_path": "x", "bit_depth": 12}),
    ("structures", {"data_path": "x", "clusters": "c"}), ("gpts", {"preset": "c2i", "sample_every": 0}),
    ("gpts", {"sample_cfg_scale": 4, "vq_weights": "model"}), ("gpts", {"min_lr": 1e-5}),
    ("gpts", {"preset": "c2i", "init_from": "x", "other_tokenizer": True}),
])
def test_what_has_an_effect_or_says_what_holds_anyway_passes(tmp_path, trainer, given):
    MODULES[trainer].parse_config(to_words(given | {"results_dir": tmp_path / "run"}))


def test_a_constant_rate_may_be_below_the_one_that_others_fall_to(tmp_path):
    def check(**words):
        words = {"preset": "ideal", "results_dir": tmp_path / "run"} | words
        structures.check(structures.parse_config(to_words(words)), 1)

    check(lr=5e-5, lr_schedule="constant")  # the preset's --min-lr is 1e-4
    with pytest.raises(ValueError, match=r"^--lr is 5e-05 with --min-lr 0.0001; lr must not be below min_lr$"):
        check(lr=5e-5)
    with pytest.raises(ValueError, match=r"^--lr is 0.0; it must be positive$"):
        check(lr=0, lr_schedule="constant")


def test_a_file_of_settings_is_named_with_its_idle_ones(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"disc_loss": "vanilla", "ema_decay": 0.5, "ema": True}))
    with pytest.raises(ValueError, match=f"^{file}: --disc-loss vanilla has no effect without a discriminator"):
        images.parse_config(["--config", str(file)])
    with pytest.raises(ValueError, match=r"^--ema-decay 0.25 has no effect"):
        images.parse_config(["--config", str(file), "--disc-weight", "1", "--ema-decay", "0.25", "--no-ema"])


def test_a_run_that_an_earlier_version_let_begin_resumes_by_its_command(tmp_path, monkeypatch):
    words = "--codebook-init none --kmeans-iters 5 --ema-decay 0.5 --disc-loss vanilla".split()
    with monkeypatch.context() as earlier:
        earlier.setattr(images, "require_effects", lambda *_: None)
        train_on_digits(tmp_path / "run", *words, "--max-steps", "5")
    train_on_digits(tmp_path / "run", *words)
    assert rows(tmp_path / "run")[-1]["step"] == 6
    with pytest.raises(SystemExit, match=r"train_provq.py: error: --ema-decay 0.25 has no effect"):
        train_on_digits(tmp_path / "run", *words, "--ema-decay", "0.25")
    with pytest.raises(SystemExit, match="error: --kmeans-iters 5 has no effect"):
        train_provq.main(["--results-dir", str(tmp_path / "new"), *words])
