"""The structure trainer end to end: stages, exact resume, process-count invariance, options, and mistakes of users."""

import gzip
import json
import shutil
from dataclasses import replace

import pytest
import torch
import training_runs
from helices import helix
from places import PROTEINS, ROOT, needs_proteins
from training_runs import NO_KMEANS, rows, to_words

from protein import train_provq
from protein.structure_data import collate
from protein.structure_io import read_structure, write_structure
from protein.train_config import PRESETS, check, parse_config
from tokenizer.provq import Curriculum
from tokenizer.runtime.checkpoint import load_file

SCRIPT = ROOT / "protein" / "train_provq.py"

WARMUP, TRANSITION, STEPS = 3, 3, 9
MODEL = {"encoder_width": 32, "encoder_heads": 4, "decoder_width": 32, "decoder_heads": 2, "decoder_layers": 1,
         "codebook_embed_dim": 8, "codebook_size": 16}
TINY = MODEL | {"ideal_chains": 24, "max_length": 32, "global_batch_size": 4, "max_steps": STEPS,
                "warmup_steps": WARMUP, "transition_steps": TRANSITION, "log_every": 1, "val_every": 3, "val_size": 5,
                "ckpt_every": 1, "kmeans_batches": 2, "kmeans_iters": 5, "lr_warmup_steps": 2, "val_fraction": 0.25,
                "device": "cpu"}


def flags(run_dir, **changes):
    idle = {"data_path": "ideal_chains", "val_path": "val_fraction"}  # flag -> what it leaves without effect
    left_out = {name: None for flag, name in idle.items() if flag in changes}
    return to_words(TINY | {"results_dir": run_dir} | left_out | changes)


def assert_same_run(a, b):
    training_runs.assert_same_run(a, b, STEPS)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """An uninterrupted run that goes through all stages, with an EMA."""
    run_dir = tmp_path_factory.mktemp("straight")
    train_provq.main(flags(run_dir, ema=True))
    return run_dir


def test_a_run_goes_through_all_stages_and_leaves_its_files(straight):
    log = rows(straight)
    assert [row["step"] for row in log] == list(range(1, STEPS + 1))
    curriculum = Curriculum(WARMUP, TRANSITION, loss_floor=1.0)
    for row in log:
        step = row["step"] - 1
        assert (row["stage"], row["alpha"], row["omega"]) == (
            curriculum.stage(step), curriculum.alpha(step), curriculum.omega(step))
        assert (row["usage"] is None) == (row["stage"] == 1)
    assert [row["lr"] for row in log[:3]] == pytest.approx([5e-4, 1e-3, 1e-3])
    summary = json.loads((straight / "summary.json").read_text())
    last = rows(straight, "validation.jsonl")[-1]
    assert summary["stage"] == 3
    assert {"data_fingerprint", "val_fingerprint"} == summary["inputs"].keys()
    assert summary["rmsd"] == last["rmsd"]
    assert {"lddt", "tm", "usage", "perplexity", "normalized_perplexity", "code_distance"} <= last.keys()
    assert 0 <= last["lddt"] <= 1
    assert 0 < last["tm"] <= 1
    boundaries = sorted(p.name for p in (straight / "structures").iterdir())
    assert len(boundaries) == 4  # end of stage 1, k-means, end of stage 2, final
    for path in (straight / "structures" / boundaries[-1]).iterdir():
        (chain,) = read_structure(path)
        assert chain.mask.all()


def test_best_is_the_best_model_with_codes(straight):
    discrete = [row for row in rows(straight, "validation.jsonl") if row["step"] > WARMUP]
    best = load_file(straight / "checkpoints" / "best.pt")
    assert best["validation"]["rmsd"] == min(row["rmsd"] for row in discrete)


@pytest.mark.parametrize("at", [WARMUP - 1, WARMUP, WARMUP + 1, WARMUP + TRANSITION - 1, WARMUP + TRANSITION])
def test_resume_is_exact_from_every_stage(straight, tmp_path, monkeypatch, at):
    words = flags(tmp_path, ema=True)
    training_runs.kill_at_step(monkeypatch, train_provq.main, train_provq.Trainer, words, at)
    train_provq.main(words)
    assert_same_run(straight, tmp_path)


def test_sigkill_then_the_same_command(straight, tmp_path):
    process = training_runs.start(SCRIPT, flags(tmp_path, ema=True))
    training_runs.wait_for_row(tmp_path, 5, process)
    process.kill()
    process.wait()
    assert not (tmp_path / "summary.json").exists()
    out, _ = training_runs.start(SCRIPT, flags(tmp_path, ema=True)).communicate()
    assert "resuming" in out
    assert_same_run(straight, tmp_path)


def uneven_chains(folder):
    """Of 8 to 86 residues; of every fifth one no two neighbours are whole, of others no letter is known: they have no
    directions and no inverse folding.
    """
    folder.mkdir()
    for i in range(24):
        length = round(8 * 1.109**i)
        chain = helix(f"{i}abc", length, seed=i, sequence="X" * length if i % 5 == 1 else None)
        if i % 5 == 0:
            chain.coords[::2, 0] = float("nan")
        write_structure(folder / f"{i}abc.cif", chain)
    return {"data_path": folder, "preset": "ideal", "max_length": 96, "min_length": 4}


def test_two_processes_train_like_one(tmp_path):
    """One has the short chains of each batch, the other the long ones: means of each would not be the batch's."""
    common = uneven_chains(tmp_path / "chains")
    for processes in (1, 2):
        process = training_runs.start(SCRIPT, flags(tmp_path / str(processes), **common), processes=processes)
        out, _ = process.communicate()
        assert process.returncode == 0, out
    # Until a latent lies between two codes and rounding decides: then the runs part.
    for one, two in zip(rows(tmp_path / "1")[:WARMUP + 1], rows(tmp_path / "2")[:WARMUP + 1], strict=True):
        for key in ("loss", "distance_loss", "direction_loss", "binned_distance_loss", "inverse_folding_loss",
                    "commit_loss", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-3), (one["step"], key)
    first = [rows(tmp_path / n)[WARMUP] for n in "12"]  # right after k-means, which saw the tokens in one order
    assert first[0]["commit_loss"] > 0
    assert first[0]["perplexity"] == pytest.approx(first[1]["perplexity"], rel=1e-6)
    one, two = (rows(tmp_path / n, "validation.jsonl")[0] for n in "12")
    assert one["chains"] == two["chains"] == 5
    assert one["rmsd"] == pytest.approx(two["rmsd"], rel=1e-3)


def test_gradient_accumulation_is_the_same_step(tmp_path):
    for parts in (1, 4):
        train_provq.main(flags(tmp_path / str(parts), gradient_accumulation_steps=parts, max_length=24, min_length=24))
    # Until a latent lies between two codes and rounding decides: then the runs part.
    for one, four in zip(rows(tmp_path / "1")[:WARMUP + 1], rows(tmp_path / "4")[:WARMUP + 1], strict=True):
        for key in ("loss", "distance_loss", "inverse_folding_loss", "commit_loss", "grad_norm"):
            assert four[key] == pytest.approx(one[key], rel=1e-3, abs=1e-5), (one["step"], key)


def test_the_quantizers_loss_is_a_mean_over_tokens_however_they_are_divided(tmp_path):
    """Two short chains and two of five times their length, in one batch and in two."""
    found = []
    for parts in (1, 2):
        trainer = train_provq.Trainer(train_provq.parse_config(flags(
            tmp_path / str(parts), gradient_accumulation_steps=parts, warmup_steps=0, transition_steps=0,
            codebook_init="none", max_length=40, **NO_KMEANS)), torch.device("cpu"))
        trainer.raw.train()
        items = [trainer.train_set[i] for i in range(4)]
        for item in items[:2]:
            for name in ("coords", "residue_index", "sequence"):
                item[name] = item[name][:8]
        halves = [collate(items)] if parts == 1 else [collate(items[:2]), collate(items[2:])]
        found.append(trainer.train_step(iter(halves), 0))
    one, two = found
    assert one["commit_loss"] > 0
    for key in ("loss", "commit_loss", "codebook_loss", "distance_loss", "grad_norm"):
        assert two[key].item() == pytest.approx(one[key].item(), rel=1e-4), key


@pytest.mark.parametrize("changes", [
    {"quantizer": "aminoaseed"},
    {"quantizer": "aminoaseed", "warmup_steps": 0, "transition_steps": 0, "kmeans_iters": None},
    {"quantizer": "ema", "codebook_restart_below": 0.5},
    {"codebook_follow": True, "recluster": True, "codebook_lr_scale": 5, "ema": True, "codebook_restart_below": 0.5},
    {"warmup_steps": 0, "transition_steps": 0, "losses_as_coded": True, "kmeans_iters": None},
    {"mixed_precision": "bf16", "num_workers": 1, "overlong": "drop", "max_length": 90},
    {"inverse_folding_weight": 0, "lr_schedule": "constant"},
    {"codebook_l2_norm": True, "rotation": True},
], ids=lambda changes: "-".join(map(str, changes.values())))
def test_options_train_to_the_end(tmp_path, changes):
    train_provq.main(flags(tmp_path, **({"max_steps": 6, "warmup_steps": 2, "transition_steps": 2} | changes)))
    assert rows(tmp_path)[-1]["step"] == 6
    assert rows(tmp_path)[-1]["usage"] > 0


@pytest.mark.parametrize(("grid", "channels"), [("fsq", 2), ("lfq", 4)])
def test_codes_on_a_grid_train_and_nothing_places_them(tmp_path, capsys, grid, channels):
    words = {"quantizer": grid, "codebook_embed_dim": channels, "max_steps": 3, "warmup_steps": 1,
             "transition_steps": 1} | NO_KMEANS
    train_provq.main(flags(tmp_path, **words))
    assert json.loads((tmp_path / "config.json").read_text())["codebook_init"] == "none"
    assert [row["stage"] for row in rows(tmp_path)] == [1, 2, 3]
    assert rows(tmp_path)[-1]["usage"] > 0
    said = fails(flags(tmp_path / "other", **words, codebook_init="kmeans"), capsys)
    assert f"--codebook-init: the codes of --quantizer {grid} lie on a fixed grid" in said


def test_training_learns(tmp_path):
    train_provq.main(flags(tmp_path, max_steps=40, warmup_steps=40, transition_steps=0, log_every=40, val_every=40,
                           ckpt_every=40, lr=3e-3, stop_after="warmup"))
    first = rows(tmp_path, "validation.jsonl")[0]
    train_provq.main(flags(tmp_path / "none", max_steps=1, warmup_steps=1, transition_steps=0, lr=1e-9, min_lr=0,
                           stop_after="warmup"))
    assert first["lddt"] > rows(tmp_path / "none", "validation.jsonl")[0]["lddt"] + 0.05


def test_adaptive_warmup_ends_early(tmp_path, monkeypatch):
    scores = iter([1.0, 0.9, 0.95, 0.91] + [2.0] * 9)
    evaluate = train_provq.Trainer.evaluate
    monkeypatch.setattr(train_provq.Trainer, "evaluate",
                        lambda self, model: evaluate(self, model) | {"rmsd": next(scores)})
    train_provq.main(flags(tmp_path, max_steps=12, warmup_steps=12, transition_steps=2, val_every=1, ckpt_every=12,
                           adaptive_warmup_patience=2))
    assert json.loads((tmp_path / "summary.json").read_text())["warmup_steps"] == 4
    assert [row["stage"] for row in rows(tmp_path)] == [1] * 4 + [2] * 2 + [3] * 6


def fails(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        train_provq.main(words)
    assert stopped.value.code not in (0, None)
    return f"{stopped.value} {capsys.readouterr().err}"


@pytest.mark.parametrize(("changes", "said"), [
    ({"global_batch_size": 9, "gradient_accumulation_steps": 2}, "--global-batch-size 9 must be a multiple of 2"),
    ({"max_length": 5}, "--max-length 5 is below --min-length 10"),
    ({"data_path": "/no/such/place"}, "--data-path: /no/such/place: no such"),
    ({"data_path": str(SCRIPT)}, "is a file; name the folder"),
    ({"val_path": "/no/such/place"}, "--val-path needs --data-path"),
    ({"val_fraction": 0}, "--val-fraction above 0"),
    ({"codebook_size": 4096}, "raise --kmeans-batches"),
    ({"decoder_heads": 3}, "--decoder-heads 3"),
    ({"quantizer": "vqq"}, "'vqq' is not one of"),
    ({"lr": 0}, "--lr is 0.0"),
    ({"sample_by": "cluster"}, "--sample-by cluster needs --clusters"),
    ({"clusters": "x.tsv"}, "--clusters needs --data-path"),
    ({"plddt_from": "qa_metric"}, "changes nothing without --min-plddt"),
    ({"min_plddt": -1, "data_path": "x"}, "--min-plddt is -1"),
    ({"min_length": 400, "max_length": 500}, "none of 24 chains is left"),
    ({f"{name}_weight": 0 for name in ("distance", "direction", "binned_distance", "binned_direction",
                                       "inverse_folding")}, "are all 0: nothing would be learned"),
])
def test_mistakes_are_named_before_anything_is_written(tmp_path, capsys, changes, said):
    run_dir = tmp_path / "run"
    assert said in fails(flags(run_dir, **changes), capsys)
    assert not run_dir.exists()


def test_another_experiment_cannot_resume_a_run(straight, capsys):
    assert "quantizer: 'vq' there, 'aminoaseed' now" in fails(flags(straight, ema=True, quantizer="aminoaseed"), capsys)


def test_a_run_from_before_the_newer_flags_resumes(straight, tmp_path, capsys):
    """Settings that its checkpoint does not know had their defaults; another value is another run, and is named."""
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / f"{STEPS:07d}.pt").unlink()
    newest = tmp_path / "run" / "checkpoints" / f"{STEPS - 1:07d}.pt"
    state = load_file(newest)
    newer = {"clusters", "sample_by", "min_plddt", "plddt_from", "codebook_lr_scale", "codebook_follow",
             "codebook_restart_below", "recluster", "recluster_at", "tf32"}
    assert newer <= state["config"].keys()
    state["config"] = {name: value for name, value in state["config"].items() if name not in newer}
    del state["restart"]
    torch.save(state, newest)
    assert "codebook_lr_scale: 1.0 there, 5.0 now" in fails(
        flags(tmp_path / "run", ema=True, codebook_lr_scale=5), capsys)
    train_provq.main(flags(tmp_path / "run", ema=True))
    assert_same_run(straight, tmp_path / "run")


@pytest.mark.parametrize(("stage", "end"), [("warmup", WARMUP), ("transition", WARMUP + TRANSITION)])
def test_a_run_that_ends_with_a_stage_has_the_schedule_of_the_whole(straight, tmp_path, capsys, stage, end):
    """Its learning rates fall to --min-lr at --max-steps, where a straight run's do: continued, it is that run."""
    train_provq.main(flags(tmp_path / "run", ema=True, stop_after=stage))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == end
    assert json.loads((tmp_path / "run" / "config.json").read_text())["max_steps"] == STEPS
    assert rows(tmp_path / "run") == rows(straight)[:end]
    train_provq.main(flags(tmp_path / "run", ema=True))
    assert_same_run(straight, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == STEPS
    assert f"is at step {STEPS}, beyond step {end} of --stop-after" in fails(
        flags(tmp_path / "run", ema=True, stop_after=stage), capsys)


def test_the_length_stays_where_the_schedule_depends_on_it(straight, tmp_path, capsys):
    said = fails(flags(straight, ema=True, max_steps=STEPS + 1), capsys)
    assert f"max_steps: {STEPS} there, {STEPS + 1} now" in said
    assert "With --lr-schedule cosine the learning rate of every step depends on the planned length" in said
    assert "Use its settings to resume it, or use another --results-dir" in said
    constant = {"lr_schedule": "constant", "min_lr": None, "stop_after": "warmup"}
    train_provq.main(flags(tmp_path / "run", **constant))
    train_provq.main(flags(tmp_path / "run", **constant | {"stop_after": None, "max_steps": STEPS + 1}))
    assert rows(tmp_path / "run")[-1]["step"] == STEPS + 1


def test_epochs_and_steps_of_one_length_are_one_run(tmp_path):
    """2 epochs of 18 chains in batches of 4 are the same 9 steps: what schedules depend on is the length alone."""
    train_provq.main(flags(tmp_path / "run", max_steps=None, epochs=2, stop_after="warmup"))
    train_provq.main(flags(tmp_path / "run"))
    assert rows(tmp_path / "run")[-1]["step"] == STEPS


def test_structures_that_are_read_otherwise_are_other_data(straight, capsys, monkeypatch):
    """The files may be the same: reading them changes with versions, and the message must not blame the files alone."""
    monkeypatch.setattr(train_provq.StructureSet, "fingerprint", lambda _: "e7ca")
    assert "Restore the data, or the version that read them" in fails(flags(straight, ema=True), capsys)


def test_unreadable_structures_are_skipped_up_to_a_limit(straight, tmp_path, capsys):
    folder = tmp_path / "structures"
    folder.mkdir()
    targets = sorted(straight.glob("structures/*/*_target.cif"))[:4]
    for i, path in enumerate(targets * 3):
        write_structure(folder / f"{i:02d}.pdb", read_structure(path)[0])
    (folder / "bad.pdb.gz").write_bytes(gzip.compress((folder / "00.pdb").read_bytes())[:-40])
    words = {"data_path": folder, "preset": "ideal", "max_steps": 6, "val_size": 2}
    train_provq.main(flags(tmp_path / "ok", max_bad_structures=1, **words))
    assert "bad.pdb.gz" in capsys.readouterr().out
    assert "bad.pdb.gz" in fails(flags(tmp_path / "strict", max_bad_structures=0, **words), capsys)


def test_examples_never_end_a_run(tmp_path, capsys):
    """Crops without a whole residue have nothing to show, and residues may be numbered beyond what PDB holds."""
    folder = tmp_path / "structures"
    folder.mkdir()
    for i in range(8):
        chain = helix(f"{i}abc", 60, seed=i, numbers=[n if n < 12 or i % 2 else n + 10_000 for n in range(60)])
        chain.coords[12:] += 50  # a break: numbers count over it
        if i % 2:
            chain.coords[12:, [0, 2]] = float("nan")
        write_structure(folder / f"{i}abc.cif", chain)
    train_provq.main(flags(tmp_path / "run", data_path=folder, preset="ideal", max_length=20, max_steps=4,
                           warmup_steps=2, transition_steps=0, val_fraction=0.5, val_size=0))
    assert "(decoded) has no atoms to write" in capsys.readouterr().out
    decoded = [read_structure(path)[0] for path in (tmp_path / "run").glob("structures/*_final/*_decoded.cif")]
    assert max(chain.residue_numbers.max() for chain in decoded) > 10_000


def test_validation_chains_that_show_nothing_are_refused(tmp_path, capsys):
    """Their RMSD is unknown, which no log can hold: the first validation would end the run."""
    folder = tmp_path / "structures"
    folder.mkdir()
    for i in range(4):
        chain = helix(f"{i}abc", 400, seed=i)
        chain.coords[10:, 0] = float("nan")
        write_structure(folder / f"{i}abc.cif", chain)
    assert "validation could measure nothing" in fails(
        flags(tmp_path / "run", data_path=folder, preset="ideal", max_length=10, val_size=1, codebook_size=1), capsys)
    assert not (tmp_path / "run").exists()


def test_the_codebook_starts_from_enough_latents(tmp_path, capsys):
    """Masked residues give none: a batch may hold fewer latents than it has residues, and than its chains' mean."""
    folder = tmp_path / "structures"
    folder.mkdir()
    for i in range(16):
        chain = helix(f"{i}abc", 60, seed=i)
        chain.coords[10 if i else 60 :, [0, 2]] = float("nan")
        write_structure(folder / f"{i}abc.cif", chain)
    words = {"data_path": folder, "preset": "ideal", "max_length": 60, "max_steps": 4, "warmup_steps": 2,
             "transition_steps": 0, "val_path": folder, "val_size": 2, "global_batch_size": 1, "kmeans_batches": 1,
             "global_seed": 1}
    assert "would start from 13 latents for --codebook-size 14" in fails(
        flags(tmp_path / "early", codebook_size=14, **words), capsys)
    train_provq.main(flags(tmp_path / "run", codebook_size=13, **words))
    assert "note: the codebook starts from 20 latents of 2 batches; 1 held too few for 13 codes" in \
        capsys.readouterr().out


def test_defaults_are_the_papers_recipe():
    cfg = parse_config(["--preset", "paper", "--data-path", "somewhere"])
    paper = {"warmup_steps": 20_000, "transition_steps": 10_000, "transition": "cosine", "loss_lambda": 1.0,
             "global_batch_size": 32, "codebook_size": 512, "codebook_embed_dim": 1024, "max_steps": 108_530,
             "lr_warmup_steps": 5426, "lr": 1e-4, "min_lr": 1e-5, "beta1": 0.9, "beta2": 0.98, "weight_decay": 0.01,
             "commit_loss_beta": 0.25, "max_grad_norm": 1.0, "mixed_precision": "none", "max_length": 512,
             "encoder_width": 1024, "encoder_heads": 128, "decoder_layers": 8, "decoder_width": 1024}
    assert {name: getattr(cfg, name) for name in paper} == paper
    for name in PRESETS:
        check(parse_config(["--preset", name, "--data-path", "x"]), 1)
    assert parse_config([]).preset == "ideal"
    assert cfg.codebook_init == "kmeans"
    assert parse_config(["--warmup-steps", "0"]).codebook_init == "latents"  # as StructTokenBench
    assert parse_config(["--data-path", "x"]).preset == "small"


@needs_proteins
def test_real_structures(tmp_path):
    folder = tmp_path / "structures"
    folder.mkdir()
    for path in sorted((PROTEINS / "structures").iterdir())[:12]:
        (folder / path.name).symlink_to(path)
    train_provq.main(flags(tmp_path / "run", data_path=folder, preset="ideal", max_steps=6, warmup_steps=2,
                           transition_steps=2))
    assert rows(tmp_path / "run")[-1]["stage"] == 3


@needs_proteins
def test_clusters_and_plddt(tmp_path, capsys):
    """A cluster is held out as a whole, an epoch has one chain of each; B-factors, up to 100, stand for pLDDT here."""
    folder = tmp_path / "structures"
    folder.mkdir()
    paths = sorted((PROTEINS / "structures").iterdir())[:12]
    for path in paths:
        chains = [replace(chain, bfactors=chain.bfactors.clip(max=100)) for chain in read_structure(path)]
        write_structure(folder / path.name.removesuffix(".gz"), chains)
    names = [path.name.removesuffix(".pdb.gz") for path in paths]  # bound and unbound forms alternate
    # foldseek's own names, which may have extensions; the last pair is not listed.
    lines = [f"{names[i // 4 * 4]}.pdb.gz\t{name}.pdb.gz" for i, name in enumerate(names[:10])]
    (tmp_path / "x_cluster.tsv").write_text("\n".join(lines))
    common = {"data_path": folder, "preset": "ideal", "max_steps": 3, "warmup_steps": 1, "transition_steps": 1,
              "val_every": 3}
    train_provq.main(flags(tmp_path / "run", **common, clusters=tmp_path / "x_cluster.tsv", sample_by="cluster",
                           min_plddt=0.5))
    said = capsys.readouterr().out
    assert "--clusters: 5 clusters; 2 of 11 chains are not listed" in said  # one has B-factors of 0 only
    settings = train_provq.parse_config(flags(tmp_path / "other", **common, clusters=tmp_path / "x_cluster.tsv",
                                              sample_by="cluster"))
    trainer = object.__new__(train_provq.Trainer)
    trainer._open_data(settings)
    structures = trainer.train_set.structures
    of = dict(zip(names, [i // 4 if i < 10 else i for i in range(12)], strict=True))
    train, held_out = ({of[structures.names[i]] for i in part.indices} for part in (trainer.train_set, trainer.val_set))
    assert not train & held_out
    assert len(trainer.train_set) == len(train) < len(trainer.train_set.indices)
    for epoch in range(4):
        drawn = [of[structures.names[trainer.train_set.index(epoch, i)]] for i in range(len(train))]
        assert sorted(drawn) == sorted(train)
    assert len({trainer.train_set.index(epoch, 0) for epoch in range(20)}) > 1
    item = trainer.train_set[0, 1]
    assert len(item["sequence"]) == trainer.train_set.length(0, 1)
