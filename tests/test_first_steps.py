"""Every default runs: first steps of the three trainers in their precisions and parallel modes, eager and compiled."""

import subprocess
import sys

import pytest
from code_files import write_codes
from places import WORKERS
from training_runs import rows

sys.path.insert(0, str(WORKERS))
import first_steps


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """{case: loss of each step, of images without the adversarial one} of all cases, in one program."""
    folder = tmp_path_factory.mktemp("first")
    write_codes(folder / "codes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               str(WORKERS / "first_steps.py"), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr[-5000:]
    return {name: [row.get("recon_loss", row["loss"]) for row in rows(folder / name)]
            for name, *_ in first_steps.cases(folder)}


def test_compiled_steps_are_the_eager_ones(losses):
    compiled = [name for name in losses if name.endswith("-compile")]
    assert len(compiled) == 3
    for name in compiled:
        assert losses[name] == pytest.approx(losses[name.replace("compile", "eager")], rel=3e-2), name


@pytest.mark.parametrize("precision", ["none", "bf16"])
def test_sharded_steps_are_the_replicated_ones(losses, precision):
    tolerance = 1e-5 if precision == "none" else 1e-2
    expected = losses[f"gpt-{precision}-ddp-eager"]
    assert losses[f"gpt-{precision}-fsdp-eager"] == pytest.approx(expected, rel=tolerance)
    if precision == "bf16":
        assert losses["gpt-bf16-fsdp-checkpointing"] == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("change", ["ddp-to-fsdp", "fsdp-to-ddp"])
def test_copies_go_on_as_shards_and_back(losses, change):
    """Checkpoints of copies are those of one process."""
    assert losses[f"gpt-none-{change}"] == pytest.approx(losses["gpt-none-ddp-eager"], rel=1e-5)


def test_precision_changes_rounding_only(losses):
    for name, precisions in {"images-{}-ddp-stages": ("bf16", "fp16"), "gpt-{}-ddp-eager": ("bf16", "fp16"),
                             "structures-{}-ddp-stages": ("bf16",)}.items():
        full = losses[name.format("none")]
        for precision in precisions:
            low = losses[name.format(precision)]
            assert low == pytest.approx(full, rel=0.15), name  # codes that lie near flip
            assert low != full, f"{name}: {precision} changed nothing"
