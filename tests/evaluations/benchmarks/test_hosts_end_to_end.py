"""The benchmark of hosts end to end: bare is the host alone, the command goes on, RESULTS has its table."""

import json

import pytest
import torch
from places import ROOT

from evaluations.benchmarks import hosts_end_to_end, made_sound
from tokenizer.provq_attach import Curriculum, detach

PACKAGES = {"image": "diffusers", "codec": "encodec", "protein": "esm"}
COMMAND = ["--steps", "6", "--image-size", "8", "--batch-size", "8", "--val-size", "20", "--max-images", "40",
           "--sounds", "20", "--stretches", "1"]
RESULTS = ROOT / "evaluations" / "results" / "hosts.json"
every_host = pytest.mark.parametrize("name", hosts_end_to_end.HOSTS)


def _run(host, curriculum, seed):
    errors = dict.fromkeys(hosts_end_to_end.HOSTS[host].errors, 20.0 + seed + (curriculum == "+ ProVQ"))
    return {"host": host, "curriculum": curriculum, "seed": seed, **errors, "codes": [3, 4], "perplexity": [2.0, 3.0]}


@every_host
def test_bare_is_the_host_alone(name, monkeypatch):
    pytest.importorskip(PACKAGES[name])
    monkeypatch.setattr(hosts_end_to_end, "open_structures", lambda *_, **__: _backbones())
    args = hosts_end_to_end.parse_args([*COMMAND, "--steps", "3"])
    data, held_out = hosts_end_to_end.HOSTS[name].load(args)
    assert len(data)
    assert len(held_out)
    attached = hosts_end_to_end.train(args, name, Curriculum(0, 0), 0, data)

    torch.manual_seed(0)
    alone = hosts_end_to_end.HOSTS[name](data)
    with torch.no_grad():
        alone.start(data[torch.randperm(len(data))[: args.batch_size]])
    optimizer, batches = torch.optim.Adam(alone.parameters(), args.lr), torch.Generator().manual_seed(0)
    for _ in range(3):
        x = data[torch.randint(len(data), (8,), generator=batches)]
        y, loss, _ = alone(x)
        optimizer.zero_grad()
        (alone.objective(y, x) + loss).backward()
        optimizer.step()
    torch.testing.assert_close(detach(attached).state_dict(), alone.state_dict(), rtol=0, atol=0)


def _backbones():
    from protein.structure_data import open_structures

    return open_structures(None, ideal_chains=12)


@every_host
def test_the_command_goes_on_where_it_was(name, tmp_path, capsys, monkeypatch):
    pytest.importorskip(PACKAGES[name])
    monkeypatch.setattr(hosts_end_to_end, "open_structures", lambda *_, **__: _backbones())
    out = tmp_path / "hosts.json"
    command = [*COMMAND, "--hosts", name, "--out", str(out), "--seeds"]
    hosts_end_to_end.main([*command, "0"])
    first = json.loads(out.read_text())["runs"]
    hosts_end_to_end.main([*command, "0", "1"])
    runs = json.loads(out.read_text())["runs"]
    assert runs[:2] == first
    assert [(run["curriculum"], run["seed"]) for run in runs] == [
        ("bare", 0), ("+ ProVQ", 0), ("bare", 1), ("+ ProVQ", 1)]
    assert all(len(run["codes"]) == (4 if name == "codec" else 1) and min(run["codes"]) >= 1 for run in runs)
    assert "| + ProVQ |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="name another file"):
        hosts_end_to_end.main([*command, "0", "--lr", "0.1"])


def test_the_table_pairs_seeds():
    runs = [_run("image", label, seed) for label in ("bare", "+ ProVQ") for seed in (0, 1, 2)]
    table = hosts_end_to_end.markdown([*runs, _run("image", "bare", 7), _run("codec", "bare", 0)], "image").splitlines()
    assert table[2] == "| bare | 21.00 ± 1.00 | 3 ± 0, 4 ± 0 |  |"
    assert table[3] == "| + ProVQ | 22.00 ± 1.00 | 3 ± 0, 4 ± 0 | +1.00 [+1.00, +1.00] |"


def test_results_have_the_table_of_the_runs():
    runs, text = json.loads(RESULTS.read_text())["runs"], (ROOT / "RESULTS.md").read_text()
    assert len(runs) == 18
    for name in hosts_end_to_end.HOSTS:
        assert hosts_end_to_end.markdown(runs, name) in text


def test_sounds_are_windows_of_full_scale():
    x = made_sound.sounds(8, 0)
    assert x.shape == (8, 1, made_sound.SOUND_LENGTH)
    torch.testing.assert_close(x.abs().amax(-1), torch.ones(8, 1))
    sine = torch.sin(torch.arange(2048) * 2 * torch.pi / 8)[None, None]
    for spectrum in made_sound.log_spectra(sine):
        assert spectrum.max().item() == pytest.approx(0, abs=0.02)
        assert spectrum.min().item() == pytest.approx(-2, abs=0.02)


@pytest.mark.parametrize(("flags", "message"), [
    (["--steps", "2"], "--steps is 2; it must be at least 3"),
    (["--sounds", "0"], "--sounds is 0; it must be at least 1"),
    (["--hosts", "video"], "invalid choice: 'video'"),
])
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        hosts_end_to_end.parse_args(flags)
    assert message in capsys.readouterr().err
