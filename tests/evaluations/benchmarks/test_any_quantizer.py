"""The benchmark around other packages' quantizers: bare is really bare, and the command runs on the digits."""

import json

import pytest
import torch

from evaluations.benchmarks import any_quantizer
from tokenizer.provq_attach import Curriculum, detach

COMMAND = ["--image-size", "8", "--steps", "6", "--val-size", "50", "--max-images", "60", "--batch-size", "8"]


@pytest.mark.parametrize("name", any_quantizer.QUANTIZERS)
def test_bare_is_the_quantizer_alone(name):
    args = any_quantizer.parse_args([*COMMAND, "--steps", "3"])
    images = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    attached = any_quantizer.train(args, name, Curriculum(0, 0), 0, images)

    torch.manual_seed(0)
    alone = any_quantizer.Autoencoder(any_quantizer.QUANTIZERS[name](), 1, flat=name == "diveq")
    optimizer, batches = torch.optim.Adam(alone.parameters(), args.lr), torch.Generator().manual_seed(0)
    for _ in range(3):
        x = images[torch.randint(16, (8,), generator=batches)]
        reconstruction, loss, _ = alone(x)
        optimizer.zero_grad()
        (torch.nn.functional.mse_loss(reconstruction, x) + loss).backward()
        optimizer.step()
    torch.testing.assert_close(detach(attached).state_dict(), alone.state_dict(), rtol=0, atol=0)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "runs.jsonl"
    any_quantizer.main([*COMMAND, "--quantizers", "ema", "fsq", "--seeds", "0", "1", "--out", str(out)])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| ema", "| fsq"))]
    assert [row.split(" | ")[:2] for row in rows] == [["| ema", "bare"], ["| ema", "+ ProVQ"], ["| fsq", "bare"],
                                                      ["| fsq", "+ ProVQ"]]
    runs = [json.loads(line) for line in out.read_text().splitlines()]
    expected = [(name, seed) for name in ("ema", "ema", "fsq", "fsq") for seed in (0, 1)]
    assert [(run["quantizer"], run["seed"]) for run in runs] == expected
    assert all(0 < run["psnr"] < 40 and 1 <= run["perplexity"] <= run["codes"] <= 256 for run in runs)
    with pytest.raises(SystemExit):
        any_quantizer.main([*COMMAND, "--out", str(out)])


@pytest.mark.parametrize(("flags", "message"), [
    (["--steps", "2"], "--steps is 2; it must be at least 3"),
    (["--image-size", "9"], "multiple of 2"),
    (["--batch-size", "0"], "--batch-size is 0; it must be at least 1"),
    (["--seeds", "0", "-1"], "--seeds is -1; it must be at least 0"),
    (["--lr", "nan"], "--lr is nan; it must be positive"),
    (["--loss-floor", "nan"], "--loss-floor nan must lie in [0, 1]"),
    (["--quantizers", "vq"], "invalid choice: 'vq'"),
])
def test_bad_flags(flags, message, capsys):
    with pytest.raises(SystemExit):
        any_quantizer.parse_args(flags)
    assert message in capsys.readouterr().err
