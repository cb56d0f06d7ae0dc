"""The image trainer end to end: stages, exact resume, process-count invariance, options, and mistakes of users."""

import json
import os
import shutil
import signal

import pytest
import torch
import training_runs
from image_models import TINY_VQ4
from PIL import Image
from places import IMAGES, ROOT, needs_images
from training_runs import NO_KMEANS, Killed, rows, to_words

from tokenizer import train_provq, vq_model
from tokenizer.data_split import open_run_split
from tokenizer.provq import Curriculum
from tokenizer.runtime import distributed
from tokenizer.runtime.checkpoint import load_file
from tokenizer.train_config import PRESETS, TrainConfig, check, parse_config

SCRIPT = ROOT / "tokenizer" / "train_provq.py"
ROW_KEYS = {"step", "stage", "alpha", "omega", "loss", "recon_loss", "commit_loss", "perplexity", "usage",
            "samples_per_second"}

WARMUP, TRANSITION, STEPS = 4, 4, 12
TINY = {"image_size": 16, "codebook_size": 16, "global_batch_size": 8, "max_steps": STEPS, "warmup_steps": WARMUP,
        "transition_steps": TRANSITION, "log_every": 1, "val_every": 4, "val_size": 16, "ckpt_every": 1,
        "kmeans_batches": 2, "kmeans_iters": 5, "device": "cpu"}


def flags(run_dir, **changes):
    return to_words(TINY | {"results_dir": run_dir} | changes)


def assert_same_run(a, b):
    training_runs.assert_same_run(a, b, STEPS)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run that goes through all stages, with an EMA."""
    run_dir = tmp_path_factory.mktemp("straight")
    train_provq.main(flags(run_dir, ema=True))
    return run_dir


def test_a_run_goes_through_all_stages_and_leaves_its_files(straight):
    log = rows(straight, timings=True)
    assert [row["step"] for row in log] == list(range(1, STEPS + 1))
    assert all(row.keys() >= ROW_KEYS for row in log)
    curriculum = Curriculum(WARMUP, TRANSITION)
    for row in log:
        step = row["step"] - 1
        assert (row["stage"], row["alpha"], row["omega"]) == (
            curriculum.stage(step), curriculum.alpha(step), curriculum.omega(step))
        assert (row["usage"] is None) == (row["perplexity"] is None) == (row["stage"] == 1)
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["step"] == STEPS
    assert {"data_fingerprint", "val_fingerprint"} == summary["inputs"].keys()
    assert summary["stage"] == 3
    assert {"psnr", "ssim", "usage", "perplexity", "code_distance", "effective_rank"} <= summary.keys()
    assert summary["psnr"] == rows(straight, "validation.jsonl")[-1]["psnr"]
    assert len(list((straight / "images").glob("*.png"))) == 4  # end of stage 1, k-means, end of stage 2, final
    assert json.loads((straight / "config.json").read_text())["codebook_size"] == 16
    assert (straight / "checkpoints" / "best.pt").exists()
    assert list((straight / "tensorboard").iterdir())


def test_steps_exchange_no_objects(tmp_path, monkeypatch):
    """Of a step, ranks agree on one number of the host. Objects, which wait for all ranks, are for rows and folders."""
    step, gathered, agreed = [0], [], []
    train_step, any_rank = train_provq.Trainer.train_step, distributed.any_rank
    monkeypatch.setattr(train_provq.Trainer, "train_step",
                        lambda self, batches, number: step.append(number + 1) or train_step(self, batches, number))
    monkeypatch.setattr(distributed, "gather_objects", lambda value: gathered.append(step[-1]) or [value])
    monkeypatch.setattr(distributed, "any_rank", lambda flag: agreed.append(step[-1]) or any_rank(flag))
    train_provq.main(flags(tmp_path, log_every=4, val_every=100, ckpt_every=100, max_steps=6, warmup_steps=0,
                           transition_steps=0, **NO_KMEANS))
    assert {2, 3, 5}.isdisjoint(gathered)
    assert 4 in gathered  # a row
    assert [agreed.count(number) for number in (2, 3, 5)] == [1, 1, 1]


def test_the_warm_up_has_no_numbers_of_codes(tmp_path, capsys):
    """0 would say that codes are dead. The first row is there at once, whatever --log-every."""
    train_provq.main(flags(tmp_path, log_every=6))
    out = capsys.readouterr().out
    assert "step 1/12 stage 1 " in out
    assert out.count("usage - perplexity - ") == 1
    assert "validation at step 4: " in out
    assert "usage - perplexity -\n" in out
    log, validations = rows(tmp_path), rows(tmp_path, "validation.jsonl")
    assert [(row["step"], row["usage"] is None) for row in log] == [(1, True), (6, False), (12, False)]
    names = ("usage", "perplexity", "code_distance", "quantization_error")
    assert [{row[name] is None for name in names} for row in validations] == [{True}, {False}, {False}]


def test_best_is_the_best_model_with_codes(straight):
    discrete = [row for row in rows(straight, "validation.jsonl") if row["step"] > WARMUP]
    best = load_file(straight / "checkpoints" / "best.pt")
    assert best["step"] == max(discrete, key=lambda row: row["psnr"])["step"]
    assert best["validation"]["psnr"] == max(row["psnr"] for row in discrete)


@pytest.mark.parametrize("at", [WARMUP - 1, WARMUP, WARMUP + 1, WARMUP + TRANSITION - 1, WARMUP + TRANSITION])
def test_resume_is_exact_from_every_stage(straight, tmp_path, monkeypatch, at):
    words = flags(tmp_path, ema=True)
    training_runs.kill_at_step(monkeypatch, train_provq.main, train_provq.Trainer, words, at)
    train_provq.main(words)
    assert_same_run(straight, tmp_path)


def test_resume_between_checkpoints_and_log_rows(tmp_path, monkeypatch):
    """Sparse checkpoints that fall between log rows: sums since the last row are state too."""
    sparse = {"ckpt_every": 5, "log_every": 3, "quantizer": "ema", "codebook_restart_below": 0.5}
    train_provq.main(flags(tmp_path / "a", **sparse))
    save_examples = train_provq.Trainer.save_examples

    def die(self, model, stem):
        if stem.startswith("0000008"):
            raise Killed
        save_examples(self, model, stem)

    monkeypatch.setattr(train_provq.Trainer, "save_examples", die)
    with pytest.raises(Killed):
        train_provq.main(flags(tmp_path / "b", **sparse))
    monkeypatch.undo()
    train_provq.main(flags(tmp_path / "b", **sparse))
    assert_same_run(tmp_path / "a", tmp_path / "b")


def run(words, **kwargs):
    return training_runs.start(SCRIPT, words, **kwargs)


def test_sigkill_then_the_same_command(straight, tmp_path):
    process = run(flags(tmp_path, ema=True))
    training_runs.wait_for_row(tmp_path, 6, process)
    process.kill()
    process.wait()
    assert not (tmp_path / "summary.json").exists()
    out, _ = run(flags(tmp_path, ema=True)).communicate()
    assert "resuming" in out
    assert_same_run(straight, tmp_path)


def test_sigterm_saves_and_exits_cleanly(tmp_path):
    process = run(flags(tmp_path, max_steps=2000, ckpt_every=100_000, val_every=100_000))
    training_runs.wait_for_row(tmp_path, 3, process)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    saved = [int(p.stem) for p in (tmp_path / "checkpoints").glob("0*.pt")]
    assert len(saved) == 1
    assert rows(tmp_path)[-1]["step"] == saved[0]


def test_sigterm_to_the_whole_group_with_data_workers(tmp_path):
    """As torchrun and Slurm send it: also to the processes that load data."""
    words = flags(tmp_path, max_steps=5000, ckpt_every=100_000, val_every=100_000, num_workers=2)
    process = run(words, processes=1, start_new_session=True)
    training_runs.wait_for_row(tmp_path, 3, process)
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert "stopped by a signal" in out
    assert [int(p.stem) for p in (tmp_path / "checkpoints").glob("0*.pt")] == [rows(tmp_path)[-1]["step"]]


def test_two_processes_with_a_discriminator_and_accumulation(tmp_path):
    words = flags(tmp_path, max_steps=5, warmup_steps=1, transition_steps=2, image_size=32, disc_weight=0.5,
                  disc_start=2, gradient_accumulation_steps=2, quantizer="ema", ema=True)
    out, _ = (process := run(words, processes=2)).communicate()
    assert process.returncode == 0, out
    assert rows(tmp_path)[-1]["disc_loss"] > 0


def test_fp16_survives_an_overflow(tmp_path):
    train_provq.main(flags(tmp_path, mixed_precision="fp16", reconstruction_weight=100))
    log = rows(tmp_path)
    assert log[0]["grad_norm"] == 0  # skipped
    assert log[-1]["loss_scale"] < log[0]["loss_scale"]
    assert log[-1]["grad_norm"] > 0  # and then not
    assert log[-1]["recon_loss"] < 0.8 * log[0]["recon_loss"]


def test_two_processes_train_like_one(tmp_path):
    common = {"max_steps": 20, "warmup_steps": 6, "transition_steps": 7, "ckpt_every": 6, "keep_checkpoints": 9}
    for processes in (1, 2):
        out, _ = (process := run(flags(tmp_path / str(processes), **common), processes=processes)).communicate()
        assert process.returncode == 0, out
    for one, two in zip(rows(tmp_path / "1"), rows(tmp_path / "2"), strict=True):
        for key in ("loss", "recon_loss", "commit_loss", "codebook_loss"):
            assert two[key] == pytest.approx(one[key], abs=1e-5), (one["step"], key)
        assert one["usage"] == two["usage"]
    # The first rows after k-means already depend on every centroid; the codebook itself, just after its first step:
    codes = [load_file(tmp_path / n / "checkpoints" / "0000012.pt")["model"]["quantize.quantizer.embedding.weight"]
             for n in "12"]
    torch.testing.assert_close(codes[0], codes[1], atol=1e-4, rtol=0)
    one, two = (rows(tmp_path / n, "validation.jsonl")[-1] for n in "12")
    assert one["psnr"] == pytest.approx(two["psnr"], abs=1e-3)
    assert one["images"] == two["images"] == 16


def test_gradient_accumulation_is_the_same_step(tmp_path):
    for parts in (1, 4):
        train_provq.main(flags(tmp_path / str(parts), gradient_accumulation_steps=parts))
    for one, four in zip(rows(tmp_path / "1"), rows(tmp_path / "4"), strict=True):
        for key in ("loss", "recon_loss", "commit_loss", "codebook_loss", "grad_norm"):
            assert four[key] == pytest.approx(one[key], rel=1e-4, abs=1e-6), (one["step"], key)
        assert one["usage"] == four["usage"]
        assert one["perplexity"] is four["perplexity"] is None or (
            one["perplexity"] == pytest.approx(four["perplexity"], rel=1e-6))


@pytest.mark.parametrize("changes", [
    {"quantizer": "simvq"},
    {"quantizer": "aminoaseed", "warmup_steps": 0, "transition_steps": 0, "kmeans_iters": None},
    {"codebook_l2_norm": True, "warmup_steps": 0, "transition_steps": 0} | NO_KMEANS,
    {"rotation": True, "transition": "hard"},
    {"mixed_precision": "bf16", "codebook_init": "none"} | NO_KMEANS,
    {"mixed_precision": "fp16", "reconstruction_loss": "l1"},
    {"image_channels": 3, "num_workers": 1, "dropout_p": 0.1},
], ids=lambda changes: "-".join(map(str, changes.values())))
def test_options_train_to_the_end(tmp_path, changes):
    train_provq.main(flags(tmp_path, **({"max_steps": 6, "warmup_steps": 2, "transition_steps": 2} | changes)))
    assert rows(tmp_path)[-1]["step"] == 6
    assert rows(tmp_path)[-1]["usage"] > 0


@pytest.mark.parametrize("options", [
    {"disc_loss": "hinge"},
    {"disc_loss": "non-saturating", "disc_adaptive_weight": True, "gradient_accumulation_steps": 2},
], ids=["hinge", "adaptive"])
def test_the_discriminator_starts_at_its_step(tmp_path, options):
    train_provq.main(flags(tmp_path, image_size=32, disc_weight=0.5, disc_start=6, keep_checkpoints=99, **options))
    assert [("disc_loss" in row) for row in rows(tmp_path)] == [row["step"] >= 6 for row in rows(tmp_path)]
    before, start, after = (load_file(tmp_path / "checkpoints" / f"{n:07d}.pt")["discriminator"] for n in (1, 5, 6))
    assert all(torch.equal(before[key], start[key]) for key in before)
    assert not torch.equal(start["main.0.weight"], after["main.0.weight"])


def test_adaptive_warmup_ends_early_and_survives_a_resume(tmp_path, monkeypatch):
    scores = iter([1.0, 0.9, 0.95, 0.91, 2.0, 2.0])  # at steps 2, 4, ...: the third in a row without a better one is 10
    validate = train_provq.validate
    monkeypatch.setattr(train_provq, "validate", lambda *args: validate(*args) | {"mse": next(scores)})
    words = flags(tmp_path, max_steps=16, warmup_steps=16, transition_steps=3, val_every=2, ckpt_every=10,
                  adaptive_warmup_patience=3)
    with pytest.raises(StopIteration):  # at step 14, after the checkpoint of step 10 that holds the decision
        train_provq.main(words)
    monkeypatch.undo()
    train_provq.main(words)
    assert json.loads((tmp_path / "summary.json").read_text())["warmup_steps"] == 10
    assert [row["stage"] for row in rows(tmp_path)] == [1] * 10 + [2] * 3 + [3] * 3


def test_compiled_training_matches_eager(tmp_path, monkeypatch):
    monkeypatch.setitem(vq_model.ARCHITECTURES, "VQ-4", TINY_VQ4)  # a C++ compiler takes seconds per layer
    short = {"max_steps": 3, "warmup_steps": 0, "transition_steps": 0, "val_every": 100} | NO_KMEANS
    train_provq.main(flags(tmp_path / "eager", **short))
    train_provq.main(flags(tmp_path / "compiled", compile=True, **short))
    for one, other in zip(rows(tmp_path / "eager"), rows(tmp_path / "compiled"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)


def fails(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_provq.main(words)
    assert stopped.value.code not in (0, None)
    return f"{stopped.value} {capsys.readouterr().err}"


@pytest.mark.parametrize(("changes", "said"), [
    ({"global_batch_size": 9, "gradient_accumulation_steps": 2}, "--global-batch-size 9 must be a multiple of 2"),
    ({"image_size": 18}, "--image-size 18 must be a multiple of 4"),
    ({"max_steps": 0}, "--max-steps is 0"),
    ({"epochs": 3}, "one of --max-steps and --epochs"),
    ({"quantiser": "vq"}, "did you mean --quantizer"),
    ({"quantizer": "vqq"}, "'vqq' is not one of"),
    ({"lr": "fast"}, "'fast' is not a finite number"),
    ({"loss_lambda": 2}, "--loss-lambda is 2.0; it must lie in [0, 1]"),
    ({"data_path": "/no/such/place", "preset": "cifar10"}, "/no/such/place"),
    ({"data_path": "/no/such/place", "image_size": 256}, "/no/such/place"),  # not the LPIPS weights of its preset
    ({"perceptual_weight": 1, "lpips_vgg_weights": "/no/vgg.pth"}, "--perceptual-weight 0"),
    ({"codebook_size": 4096, "kmeans_batches": 2}, "raise --kmeans-batches"),
    ({"augment": "flip"}, "digit"),
    ({"val_size": 1797}, "hold out"),
    ({"commit_loss_beta": -1}, "--commit-loss-beta is -1"),
    ({"val_path": "/no/such/val"}, "--val-path: "),
    ({"disc_weight": 1}, "--image-size 16 is too small"),
    ({"preset": "imagenet256"}, "needs --data-path"),
    ({"preset": "cifar10"}, "--preset cifar10 needs --data-path: a folder with cifar-10-batches-py, or the word"),
    ({"results_dir": "/proc/nope", "dry_run": True}, "--results-dir /proc/nope: no files can be written there"),
    ({"results_dir": f"{__file__}/x"}, "test_train_provq.py/x: no files can be written there"),
])
def test_mistakes_are_named_before_anything_is_written(tmp_path, capsys, changes, said):
    run_dir = tmp_path / "run"
    assert said in fails(flags(run_dir, **changes), capsys)
    assert not run_dir.exists()


def test_another_experiment_cannot_resume_a_run(straight, capsys):
    before = (straight / "metrics.jsonl").read_bytes()
    message = fails(flags(straight, ema=True, lr=0.5), capsys)
    assert "lr: 0.001 there, 0.5 now" in message
    assert "--results-dir" in message
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_can_be_run_again_and_extended(straight, tmp_path):
    train_provq.main(flags(tmp_path, ema=True, max_steps=10))
    before = rows(tmp_path)
    train_provq.main(flags(tmp_path, ema=True, max_steps=10))
    assert rows(tmp_path) == before
    with pytest.raises(SystemExit, match="is at step 10, beyond --max-steps 9"):
        train_provq.main(flags(tmp_path, ema=True, max_steps=9))
    train_provq.main(flags(tmp_path, ema=True, code_search="auto"))  # how codes are found is the machine's matter
    assert rows(tmp_path) == rows(straight)


def test_what_cannot_be_resumed_is_not_replaced(straight, tmp_path, capsys):
    shutil.copytree(straight, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").glob("0*.pt"):
        path.unlink()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    for words in (flags(tmp_path / "run", ema=True), flags(tmp_path / "run", lr=0.5)):
        assert "would replace its summary.json and best.pt. Use another --results-dir" in fails(words, capsys)
    (tmp_path / "run" / "summary.json").unlink()
    for words in (flags(tmp_path / "run", ema=True), flags(tmp_path / "run", lr=0.5)):
        assert "would replace its best.pt" in fails(words, capsys)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_run_killed_before_its_first_checkpoint_starts_over(straight, tmp_path, monkeypatch):
    def kill():
        raise Killed

    words = flags(tmp_path, ema=True, ckpt_every=100)
    usage = train_provq.code_usage
    with monkeypatch.context() as patch:
        patch.setattr(train_provq, "code_usage", lambda row: kill() if row["step"] == 9 else usage(row))
        with pytest.raises(Killed):
            train_provq.main(words)
    assert (tmp_path / "checkpoints" / "best.pt").exists()
    train_provq.main(words)
    assert_same_run(straight, tmp_path)


def test_a_damaged_log_is_named(straight, tmp_path):
    shutil.copytree(straight, tmp_path / "run")
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write("junk\n")
    with pytest.raises(SystemExit, match=rf"metrics.jsonl, line {STEPS + 1}: not a JSON object"):
        train_provq.main(flags(tmp_path / "run", ema=True, max_steps=STEPS + 1))


@pytest.mark.parametrize("changes", [
    {"log_every": 1}, {"log_every": 100, "ckpt_every": 100, "val_every": 2},
    {"log_every": 100, "ckpt_every": 2, "val_every": 100}, {"log_every": 100, "ckpt_every": 100, "val_every": 100},
])
def test_divergence_ends_in_one_line(tmp_path, changes):
    with pytest.raises(SystemExit, match=r"step \d+.*diverged: lower --lr \(it is 1e\+30\), in another"):
        train_provq.main(flags(tmp_path, lr=1e30, **changes))


def test_a_collapsed_encoder_ends_in_one_line(tmp_path, monkeypatch):
    encode = vq_model.Encoder.forward
    monkeypatch.setattr(vq_model.Encoder, "forward", lambda self, x: 0.0 * encode(self, x))
    with pytest.raises(SystemExit, match=rf"step {WARMUP}: k-means: all latents are equal \(a collapsed encoder.*"
                                         r"lower --lr \(it is .*\), or mend the data, in another --results-dir$"):
        train_provq.main(flags(tmp_path))


@pytest.mark.parametrize("processes", [None, 2])
def test_divergence_with_data_workers_ends_the_program(tmp_path, processes):
    process = run(flags(tmp_path, lr=1e30, num_workers=1), processes=processes)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert out.count("train_provq.py: error: ") == 1
    assert "lower --lr" in out


def test_changed_data_are_noticed(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(40):
        Image.new("RGB", (16, 16), (i * 6, 0, 0)).save(folder / f"{i:02d}.png")
    words = flags(tmp_path / "run", data_path=folder, preset="cifar10", val_size=4, max_steps=1,
                  stop_after="warmup")
    train_provq.main(words)
    assert "--augment auto: flip" in capsys.readouterr().out
    split = open_run_split(tmp_path / "run")
    assert len(split.val_indices) == 4
    shutil.copy(folder / "00.png", folder / "000.png")
    with pytest.raises(ValueError, match=r"images has changed since .*run was trained on it \(data_fingerprint"):
        open_run_split(tmp_path / "run")
    assert "its data have changed since; data_fingerprint" in fails(words, capsys)


def test_unreadable_images_are_skipped_up_to_a_limit(tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(40):
        Image.new("RGB", (16, 16), (i * 6, 0, 0)).save(folder / f"{i:02d}.png")
    (folder / "07.png").write_bytes(b"not an image")
    words = {"data_path": folder, "preset": "cifar10", "val_size": 4, "max_steps": 8}
    train_provq.main(flags(tmp_path / "ok", max_bad_images=1, **words))
    assert "07.png" in capsys.readouterr().err
    assert json.loads((tmp_path / "ok" / "summary.json").read_text())["unreadable_images"] == 1
    with pytest.raises(SystemExit, match=r"07\.png.*--max-bad-images"):
        train_provq.main(flags(tmp_path / "strict", max_bad_images=0, **words))


def test_defaults_are_the_papers_recipe():
    cfg = parse_config(["--data-path", "somewhere"])
    assert cfg.preset == "imagenet256"
    paper = {"vq_model": "VQ-16", "image_size": 256, "codebook_size": 16384, "codebook_embed_dim": 8,
             "global_batch_size": 128, "warmup_steps": 50_000, "transition_steps": 20_000, "transition": "cosine",
             "loss_lambda": 0.5, "commit_loss_beta": 0.25, "lr": 1e-4, "beta1": 0.9, "beta2": 0.95,
             "max_grad_norm": 1.0, "quantizer": "vq", "codebook_l2_norm": False, "disc_start": 20_000,
             "disc_weight": 0.5}
    assert {name: getattr(cfg, name) for name in paper} == paper
    check(cfg, 8)


def test_presets_and_explicit_flags():
    assert parse_config([]).preset == "digits"
    assert parse_config(["--lr", "0.5"]).lr == 0.5
    assert parse_config(["--epochs", "2"]).max_steps is None  # replaces the preset's length
    assert parse_config(["--preset", "cifar10"]).data_path is None
    cfg = parse_config(["--data-path", "digits"])  # a word, as for extract_codes.py and the evaluations
    assert (cfg.preset, cfg.data_path) == ("digits", None)
    assert parse_config(["--data-path", "digits", "--preset", "cifar10"]).data_path == os.path.abspath("digits")
    for name in PRESETS:
        check(parse_config(["--preset", name, "--data-path", "x"]), 1)
    assert isinstance(parse_config([]), TrainConfig)


@needs_images
def test_real_images_from_a_zip_and_a_tar(tmp_path):
    train_provq.main(flags(tmp_path / "zip", data_path=IMAGES / "cifar10_train.zip", preset="cifar10", image_size=32,
                           codebook_size=32, val_size=32))
    assert json.loads((tmp_path / "zip" / "summary.json").read_text())["training_images"] == 50_000 - 32
    train_provq.main(flags(tmp_path / "tar", data_path=IMAGES / "imagenet_sample.tar", preset="cifar10", image_size=64,
                           codebook_size=32, val_size=8, max_steps=6, warmup_steps=2, transition_steps=2))
    assert rows(tmp_path / "tar")[-1]["stage"] == 3
