"""Options of the trainers that are not in the paper: exact on resume, without effect when off, refused by name."""

import json

import numpy as np
import pytest
import torch
import training_runs
from test_train_provq import STEPS, TRANSITION, WARMUP, flags
from training_runs import NO_KMEANS, Killed, assert_same_run, kill_at_step, rows

from tokenizer import train_config, train_provq
from tokenizer.code_meter import PaceMeter
from tokenizer.curriculum_config import CurriculumConfig, pace_flag
from tokenizer.pretrained import load_tokenizer, save_pretrained, to_llamagen_state_dict, tokenizer_hash
from tokenizer.provq_codes import DeadCodeRestart
from tokenizer.runtime.checkpoint import load_file
from tokenizer.runtime.optim import learning_rate, scale_learning_rate, set_learning_rate

TABLE = "quantize.quantizer.embedding.weight"


def checkpoint(run_dir, step):
    return load_file(run_dir / "checkpoints" / f"{step:07d}.pt")


# ------------------------------------------------------------------------------------------- learning rate of codes

def test_scaled_parameters_have_groups_of_their_own_and_schedules_keep_the_ratio():
    a, b, c = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    groups = [{"params": [a, b], "weight_decay": 0.5}, {"params": [c], "weight_decay": 0.0}]
    assert scale_learning_rate(groups, [b], 1.0, 0.1) is groups
    optimizer = torch.optim.AdamW(scale_learning_rate(groups, [b], 10.0, 0.1), lr=0.1)
    found = [(len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [(1, 0.1, 0.5), (1, 1.0, 0.5), (1, 0.1, 0.0)]
    assert optimizer.param_groups[1]["params"][0] is b
    cfg = CurriculumConfig()
    object.__setattr__(cfg, "lr", 0.1)
    for name, value in {"lr_warmup_steps": 4, "lr_schedule": "cosine", "min_lr": 0.01, "max_steps": 20}.items():
        object.__setattr__(cfg, name, value)
    for step in (0, 3, 10, 19):
        lr = learning_rate(cfg, step)
        set_learning_rate(optimizer, lr)
        assert [g["lr"] for g in optimizer.param_groups] == [lr, 10 * lr, lr]


@pytest.mark.parametrize(("quantizer", "moved"), [("vq", TABLE), ("simvq", "quantize.quantizer.map.weight")])
def test_codes_alone_move_at_the_scaled_rate(tmp_path, quantizer, moved):
    """Adam's first step is the learning rate: that of the codes comes right after k-means has made it forget."""
    for scale in (1, 10):
        train_provq.main(flags(tmp_path / str(scale), quantizer=quantizer, codebook_lr_scale=scale, keep_checkpoints=99,
                               max_steps=WARMUP + TRANSITION + 1, max_grad_norm=0))
    steps, others = {}, {}
    for scale in (1, 10):
        after = checkpoint(tmp_path / str(scale), WARMUP + 1)
        state = after["optimizer"]["state"]
        rates = {group["lr"] for group in after["optimizer"]["param_groups"]}
        assert rates == {1e-3, scale * 1e-3}
        assert sum(entry["step"] == 1 for entry in state.values()) == (1 if quantizer == "vq" else 2)
        steps[scale] = after["model"][moved]
        others[scale] = after["model"]["quant_conv.weight"]
    assert torch.equal(others[1], others[10])
    if quantizer == "simvq":  # both start from the identity
        ratio = (steps[10] - torch.eye(8)) / (steps[1] - torch.eye(8))
        torch.testing.assert_close(ratio, torch.full((8, 8), 10.0), rtol=1e-2, atol=0)
    else:
        assert not torch.equal(steps[1], steps[10])


def test_a_scaled_run_resumes_exactly(tmp_path, monkeypatch):
    train_provq.main(flags(tmp_path / "a", codebook_lr_scale=10))
    words = flags(tmp_path / "b", codebook_lr_scale=10)
    kill_at_step(monkeypatch, train_provq.main, train_provq.Trainer, words, WARMUP + 2)
    train_provq.main(words)
    assert_same_run(tmp_path / "a", tmp_path / "b", STEPS)


# ------------------------------------------------------------------------------------------------- k-means once more

END = WARMUP + TRANSITION


@pytest.fixture(scope="module")
def reclustered(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("reclustered")
    train_provq.main([*flags(run_dir, ema=True, recluster=True, keep_checkpoints=99), "--recluster-at", "6", "10"])
    return run_dir


def test_codes_are_centroids_again_and_adam_and_the_average_start_over(reclustered):
    for step in (6, END, 10):
        assert (reclustered / "latents" / f"{step:07d}_codebook_reclustered.npz").exists()
        before, after = checkpoint(reclustered, step), checkpoint(reclustered, step + 1)
        steps = {key: entry["step"] for key, entry in after["optimizer"]["state"].items()}
        assert [int(count) for count in steps.values()].count(1) == 1, "only the table's state is new"
        assert (after["model"][TABLE] - before["model"][TABLE]).abs().max() > 0.01
        # The average took the centroids over, so one step of averaging later it is one update of Adam away from them.
        assert (after["ema"][TABLE] - after["model"][TABLE]).abs().max() <= 1.001e-3
    assert len(list((reclustered / "latents").glob("*reclustered*"))) == 3


@pytest.mark.parametrize("at", [END - 1, END, END + 1])
def test_a_kill_around_the_second_k_means_changes_nothing(reclustered, tmp_path, monkeypatch, at):
    words = [*flags(tmp_path, ema=True, recluster=True, keep_checkpoints=99), "--recluster-at", "6", "10"]
    kill_at_step(monkeypatch, train_provq.main, train_provq.Trainer, words, at)
    train_provq.main(words)
    assert_same_run(reclustered, tmp_path, STEPS)


def test_a_kill_within_the_second_k_means_changes_nothing(reclustered, tmp_path, monkeypatch):
    words = [*flags(tmp_path, ema=True, recluster=True, keep_checkpoints=99), "--recluster-at", "6", "10"]
    save = train_provq.Trainer.save_boundary

    def die(self, step, name, stage):
        if step == END and name == "codebook_reclustered":
            raise Killed
        save(self, step, name, stage)

    with monkeypatch.context() as patch:
        patch.setattr(train_provq.Trainer, "save_boundary", die)
        with pytest.raises(Killed):
            train_provq.main(words)
    train_provq.main(words)
    assert_same_run(reclustered, tmp_path, STEPS)


def test_two_processes_and_accumulation_recluster_like_one(tmp_path):
    common = {"recluster": True, "max_steps": END + 2, "keep_checkpoints": 99, "val_every": 100, "ckpt_every": 1}
    variants = {"one": {}, "parts": {"gradient_accumulation_steps": 2}, "two": {}}
    for name, changes in variants.items():
        process = training_runs.start(train_provq.__file__, flags(tmp_path / name, **common, **changes),
                                      processes=2 if name == "two" else None)
        out, _ = process.communicate()
        assert process.returncode == 0, out
        assert "codebook reclustered at step 8" in out
    for name in ("parts", "two"):
        for row, other in zip(rows(tmp_path / "one"), rows(tmp_path / name), strict=True):
            for key in ("loss", "commit_loss", "codebook_loss"):
                assert other[key] == pytest.approx(row[key], rel=1e-4, abs=1e-5), (name, row["step"], key)
        codes = [checkpoint(tmp_path / n, END + 1)["model"][TABLE] for n in ("one", name)]
        torch.testing.assert_close(codes[0], codes[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [
    {"quantizer": "ema"}, {"quantizer": "simvq"}, {"quantizer": "aminoaseed", "warmup_steps": 0},
    {"codebook_init": "none", "mixed_precision": "bf16"}, {"adaptive_warmup_patience": 1, "val_every": 1},
], ids=lambda changes: "-".join(map(str, changes.values())))
def test_every_quantizer_reclusters(tmp_path, changes, capsys):
    changes = {"warmup_steps": 3, "transition_steps": 3} | changes
    train_provq.main(flags(tmp_path, max_steps=8, recluster=True, **changes))
    said = capsys.readouterr().out
    assert said.count("codebook reclustered at step") == 1
    warmup = json.loads((tmp_path / "summary.json").read_text())["warmup_steps"]
    assert f"codebook reclustered at step {warmup + 3}: {{'inertia'" in said


@pytest.mark.parametrize(("changes", "said"), [
    ({"codebook_lr_scale": 0}, "--codebook-lr-scale is 0.0; it must be positive"),
    ({"codebook_lr_scale": 2, "quantizer": "ema"}, "--codebook-lr-scale 2.0: no optimizer trains the codes of"),
    ({"recluster": True, "transition_steps": 0}, "--transition-steps 0; give --recluster-at STEP"),
    ({"recluster_at": 4}, "--recluster-at 4 is not after --warmup-steps 4"),
    ({"recluster_at": 12}, "--recluster-at 12 never comes, --max-steps 12"),
    ({"codebook_follow": True, "quantizer": "simvq"}, "follow is True; it has an effect with --quantizer vq only"),
    ({"codebook_follow": True, "codebook_l2_norm": True}, "--codebook-l2-norm gives them unit norm"),
    ({"codebook_restart_below": 1}, "--codebook-restart-below is 1.0; it must be below 1"),
    ({"recluster": True, "max_steps": 8}, "--recluster comes after step 8, --max-steps 8: the run ends there"),
    ({"recluster_at": 8, "recluster": True}, "--recluster-at 8 is the end of the transition, where --recluster is"),
    ({"codebook_restart_below": 2, "quantizer": "ema"}, "--codebook-restart-below is 2.0; it must be at most 1"),
])
def test_refused_by_name(tmp_path, capsys, changes, said):
    with pytest.raises(SystemExit) as stopped:
        train_provq.main(flags(tmp_path / "run", **changes))
    assert said in f"{stopped.value} {capsys.readouterr().err}"
    assert not (tmp_path / "run").exists()


def test_steps_that_repeat_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="--recluster-at 9 10 9 names a step twice"):
        train_provq.main([*flags(tmp_path / "run"), "--recluster-at", "9", "10", "9"])


def test_a_run_that_stops_before_may_ask_for_it(tmp_path):
    train_provq.main(flags(tmp_path, recluster=True, stop_after="transition"))
    train_provq.main(flags(tmp_path, recluster=True))
    assert (tmp_path / "latents" / f"{END:07d}_codebook_reclustered.npz").exists()


# ------------------------------------------------------------------------------ codes that follow, codes that restart

FOLLOWING = {"codebook_follow": True, "recluster": True, "ema": True}
RESTARTING = {"codebook_restart_below": 0.9, "ema": True}


@pytest.fixture(scope="module", params=["follow", "restart", "simvq"])
def optional(request, tmp_path_factory):
    """A run with an option, and its command."""
    changes = {"follow": FOLLOWING, "restart": RESTARTING, "simvq": RESTARTING | {"quantizer": "simvq"}}[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeadCodeRestart.__init__, "__kwdefaults__", {"every": 3})
        train_provq.main(flags(folder / "whole", **changes))
        yield request.param, folder / "whole", changes


def test_optional_codes_resume_exactly(optional, tmp_path, monkeypatch):
    """Killed in the first step after k-means, whose codes are placed but do not follow yet; and between restarts."""
    _, whole, changes = optional
    for at in (WARMUP + 1, WARMUP + 3):
        words = flags(tmp_path / str(at), **changes)
        kill_at_step(monkeypatch, train_provq.main, train_provq.Trainer, words, at)
        train_provq.main(words)
        assert_same_run(whole, tmp_path / str(at), STEPS)


def test_the_average_is_of_the_same_codes(optional):
    """Codes of an average in other units, or from before a restart, would be far from those of the model."""
    _, whole, _ = optional
    models = [load_tokenizer(whole, weights=name) for name in ("model", "ema")]
    one, other = (model.quantize.codebook().detach() for model in models)
    spread = one.std(0).mean()
    assert (one - other).abs().max() < 0.2 * spread


def test_following_and_restarted_tokenizers_export_as_plain_ones(optional, tmp_path):
    name, whole, _ = optional
    model = load_tokenizer(whole)
    exported = load_tokenizer(save_pretrained(model, tmp_path / "export"))
    assert (exported.config.quantizer, exported.config.codebook_follow) == ("vq", False)
    assert exported.config.codebook_restart_below == 0
    assert tokenizer_hash(exported) == tokenizer_hash(model)
    assert torch.equal(exported.quantize.codebook(), model.quantize.codebook())
    assert set(to_llamagen_state_dict(model)) == set(to_llamagen_state_dict(exported))
    x = torch.rand(4, model.config.image_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    tokens = model.encode(x)
    assert torch.equal(exported.encode(x), tokens)
    assert torch.equal(exported.decode_code(tokens), model.decode_code(tokens))
    if name == "follow":
        assert model.config.codebook_follow
        assert int(model.quantize.quantizer.state) == model.quantize.quantizer.FOLLOWING


def test_codes_restart_in_a_run(tmp_path, monkeypatch):
    happened = []
    step = DeadCodeRestart.step

    def record(self, *args):
        self.every = 2
        happened.append(step(self, *args))
        return happened[-1]

    monkeypatch.setattr(DeadCodeRestart, "step", record)
    train_provq.main(flags(tmp_path, codebook_restart_below=0.9, mixed_precision="bf16", gradient_accumulation_steps=2))
    assert len(happened) == STEPS
    assert sum(happened[:WARMUP]) == 0, "there are no codes in the warm-up"
    assert sum(happened) > 0


def test_two_processes_follow_like_one(tmp_path):
    common = {"codebook_follow": True, "max_steps": WARMUP + 4, "transition_steps": 2, "val_every": 100}
    for processes in (None, 2):
        process = training_runs.start(train_provq.__file__, flags(tmp_path / str(processes), **common),
                                      processes=processes)
        out, _ = process.communicate()
        assert process.returncode == 0, out
    states = [checkpoint(tmp_path / name, WARMUP + 3)["model"] for name in ("None", "2")]
    for name in (TABLE, "quantize.quantizer.mean", "quantize.quantizer.spread"):
        torch.testing.assert_close(states[0][name], states[1][name], atol=2e-4, rtol=1e-4)


# -------------------------------------------------------------------------------------------------------------- pace

PACE = {"latent_spread", "code_spread", "latents_moved", "codes_moved"}


def test_rows_show_the_pace_from_k_means_on(reclustered):
    log = rows(reclustered)
    assert [PACE <= row.keys() for row in log] == [False] * WARMUP + [True] * (STEPS - WARMUP)
    assert not any(PACE & row.keys() for row in log[:WARMUP])
    for row in log[WARMUP:]:
        assert 0 < row["codes_moved"] < 2e-3, "a step of Adam, not the k-means before it"
        assert 0 < row["latents_moved"]
    snapshot = np.load(reclustered / "latents" / f"{WARMUP:07d}_codebook_initialised.npz")
    assert log[WARMUP]["code_spread"] == pytest.approx(snapshot["codes"].std(0).mean(), rel=0.2)
    events = b"".join(path.read_bytes() for path in (reclustered / "tensorboard").iterdir())
    assert all(name.encode() in events for name in PACE)


def test_a_plain_quantizer_shows_its_pace_from_the_start(tmp_path):
    train_provq.main(flags(tmp_path, max_steps=3, warmup_steps=0, transition_steps=0, **NO_KMEANS))
    log = rows(tmp_path)
    assert {"latent_spread", "code_spread"} <= log[0].keys()
    assert PACE <= log[1].keys()


def test_advice_is_given_once_also_over_a_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(PaceMeter, "CONTRACTED", 1.0)  # whatever moves is advised
    words = flags(tmp_path)
    kill_at_step(monkeypatch, train_provq.main, train_provq.Trainer, words, WARMUP + 3)
    train_provq.main(words)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("advice: ")]
    assert len(said) == 1
    assert "since k-means the spread of the latents went from" in said[0]
    assert "--codebook-lr-scale 10, in another --results-dir" in said[0]


def test_no_advice_while_the_cure_is_to_come(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(PaceMeter, "CONTRACTED", 1.0)
    train_provq.main(flags(tmp_path, recluster_at=STEPS - 2))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("advice: ")]
    assert [line.split(":")[1] for line in said] == [f" step {STEPS - 1}"]


@pytest.mark.parametrize(("changes", "flag"), [
    ({}, "--codebook-lr-scale 10"),
    ({"quantizer": "ema"}, "--codebook-ema-decay 0.9"),
    ({"codebook_lr_scale": 10}, "--recluster"),
    ({"codebook_lr_scale": 10, "recluster": True}, "--recluster-at 10"),
    ({"codebook_lr_scale": 10, "recluster_at": 8}, "--recluster-at 10"),
    ({"codebook_lr_scale": 10, "recluster_at": 10}, "--recluster"),
    ({"codebook_lr_scale": 10, "recluster": True, "recluster_at": 10}, "--lr 0.0005"),
    ({"codebook_lr_scale": 10, "transition_steps": 8}, "--lr 0.0005"),
    ({"codebook_lr_scale": 10, "transition_steps": 0}, "--recluster-at 8"),
    ({"codebook_lr_scale": 10, "transition_steps": 0, "max_steps": 5}, "--lr 0.0005"),
    ({"codebook_lr_scale": 10, "transition_steps": 0, "warmup_steps": 0, "codebook_init": "kmeans"},
     "--recluster-at 4"),
])
def test_what_is_advised_can_be_done(tmp_path, changes, flag):
    words = flags(tmp_path, **changes)
    cfg = train_config.parse_config(words)
    train_config.check(cfg, 1)
    assert pace_flag(cfg) == flag
    train_config.check(train_config.parse_config([*words, *flag.split()]), 1)


def test_a_run_from_before_these_options_goes_on(straight_of_old, tmp_path):
    """Its checkpoints know neither their settings nor the pace."""
    train_provq.main(flags(straight_of_old))
    log = rows(straight_of_old)
    assert len(log) == STEPS
    assert "latents_moved" in log[-1]
    train_provq.main(flags(tmp_path))
    assert [row["loss"] for row in rows(tmp_path)] == [row["loss"] for row in log]


@pytest.fixture
def straight_of_old(tmp_path):
    folder = tmp_path / "old"
    train_provq.main(flags(folder, max_steps=END))
    for path in (folder / "checkpoints").glob("*.pt"):
        state = load_file(path)
        for name in ("codebook_lr_scale", "recluster", "recluster_at", "codebook_follow"):
            del state["config"][name]
        state.pop("restart", None)
        if "drift" in state:
            state["drift"] = {name: state["drift"][name] for name in ("code", "latent")}
        torch.save(state, path)
    return folder
