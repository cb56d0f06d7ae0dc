"""The command that trains every host: bare is the host alone, it goes on, and its file makes the tables."""

import json

import pytest
import torch
from places import ROOT

from evaluations.benchmarks import bare_and_attached
from evaluations.evidence import hosts as tables
from scripts import train_hosts
from tokenizer import provq_attach
from tokenizer.provq_attach import ADAPTERS, Curriculum, adapt, detach

COMMAND = ["--steps", "6", "--image-size", "8", "--batch-size", "16", "--val-size", "20", "--max-images", "40",
           "--sounds", "12"]
RESULTS = ROOT / "evaluations" / "results" / "every-host.json"


def _kinds() -> set[str]:
    provq_attach._companions()
    return {kind for kind, adapter in ADAPTERS.items() if not hasattr(adapter, "refused")}


def test_every_host_that_is_not_refused_has_a_quantizer():
    assert set(train_hosts.every_host()) == _kinds()
    for kind, host in train_hosts.every_host().items():
        adapter = adapt(host.make(), check=False)
        assert type(adapter) is ADAPTERS[kind], kind
        assert set(host.losses or ()) <= set(adapter.losses_at), kind


@pytest.mark.parametrize("kind", ["esm", "diveq", "lucidrains-latent", "encodec", "dac-residual"])
def test_bare_is_the_host_alone(kind):
    args = train_hosts.parse_args([*COMMAND, "--steps", "3"])
    host = train_hosts.every_host()[kind]
    data = train_hosts.load(args, host.data)[0]
    attached = train_hosts.train(args, host, Curriculum(0, 0), 0, data)

    torch.manual_seed(0)
    alone = train_hosts.Model(host, data.shape[1])
    if host.start:
        with torch.no_grad():
            host.start(alone.adapter[0], alone.tokens(data[torch.randperm(len(data))[:16]]))
    optimizer, batches = torch.optim.Adam(alone.parameters(), args.lr), torch.Generator().manual_seed(0)
    for _ in range(3):
        x = data[torch.randint(len(data), (16,), generator=batches)]
        y, loss, _ = alone(x)
        optimizer.zero_grad()
        (train_hosts.OBJECTIVES[host.data](y, x) + loss).backward()
        optimizer.step()
    torch.testing.assert_close(detach(attached).state_dict(), alone.state_dict(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:k-means")
def test_the_command_goes_on_where_it_was(tmp_path, capsys):
    out = tmp_path / "hosts.json"
    command = [*COMMAND, "--hosts", "taming", "--out", str(out), "--seeds"]
    train_hosts.main([*command, "0"])
    first = json.loads(out.read_text())["runs"]
    train_hosts.main([*command, "0", "1"])
    document = json.loads(out.read_text())
    assert document["runs"][:2] == first
    assert [(run["curriculum"], run["seed"]) for run in document["runs"]] == [
        ("bare", 0), ("+ ProVQ", 0), ("bare", 1), ("+ ProVQ", 1)]
    assert all(1 <= run["codes"] <= 64 and run["error"] > 0 for run in document["runs"])
    assert document["hosts"]["taming"]["codes"] == 64
    assert capsys.readouterr().out.splitlines()[-2] == tables.markdown(document, "images").splitlines()[-1]
    with pytest.raises(SystemExit, match="name another file"):
        train_hosts.main([*command, "0", "--lr", "0.1"])
    with pytest.raises(SystemExit, match="--hosts var is none of llamagen, "):
        train_hosts.main([*COMMAND, "--hosts", "var"])
    document["hosts"]["taming"]["source"] = "9.9"
    out.write_text(json.dumps(document))
    with pytest.raises(SystemExit, match=r"its runs of taming are of .*9\.9"):
        train_hosts.main([*command, "0"])


def test_the_table_pairs_seeds():
    about = {"source": "1.0", "data": "sound", "codes": 64}
    runs = [{"host": "a", "curriculum": label, "seed": seed, "codes": 10 * seed, "error": 2.5}
            for label, seeds in (("bare", (1, 2, 3)), ("+ ProVQ", (1, 3))) for seed in seeds]
    document = {"hosts": {"a": about, "b": {**about, "data": "images"}}, "runs": runs}
    assert tables.markdown(document, "sound").splitlines()[2:] == [
        "| `a` | 1.0 | 64 | 20 ± 14 | 20 ± 14 | 2.50 ± 0.00 | 2.50 ± 0.00 |"]
    with pytest.raises(ValueError, match="no seed of b has both"):
        tables.markdown(document, "images")


def test_results_have_every_host_in_three_seeds():
    document = json.loads(RESULTS.read_text())
    assert set(document["hosts"]) == _kinds()
    wanted = {(kind, label, seed) for kind in document["hosts"]
              for label in (bare_and_attached.BARE, bare_and_attached.ATTACHED) for seed in range(3)}
    found = [(run["host"], run["curriculum"], run["seed"]) for run in document["runs"]]
    assert len(found) == len(set(found))
    assert set(found) == wanted
    text = (ROOT / "RESULTS.md").read_text()
    for data in tables.ERRORS:  # what it says is what document.py writes: tests/evaluations/evidence
        assert f"<!-- hosts: every-host.json --data {data} -->" in text


@pytest.mark.parametrize(("flags", "message"), [
    (["--steps", "2"], "--steps is 2; it must be at least 3"),
    (["--image-size", "10"], "--image-size 10 must be a multiple of 4"),
])
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        train_hosts.parse_args(flags)
    assert message in capsys.readouterr().err
