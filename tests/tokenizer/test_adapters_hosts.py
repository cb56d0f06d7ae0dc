"""README's recipes for other repositories, followed literally; and those repositories themselves, from their checkouts.

What is on the registry always runs. PROVQ_HOSTS=FOLDER (see workers/provq_hosts.py) adds the repositories that are not.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from places import ROOT
from torch import Tensor, nn
from workers.provq_codecs import ResidualVectorQuantization
from workers.provq_hosts import CHECKOUTS, ORIGINALS, STAND_INS, EMACodebook

SECTION = (ROOT / "tokenizer" / "README.md").read_text().split("## Put ProVQ into your own code")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", SECTION, re.DOTALL)
PATCHES = dict(re.findall(r"`([\w/]+\.py)`:\n\n```diff\n(.*?)```", SECTION, re.DOTALL))
FILES = {"LlamaGen": "tokenizer/tokenizer_image/vq_train.py", "taming-transformers": "taming/models/vqgan.py",
         "SimVQ": "taming/models/vq.py"}


def hunks(patch: str) -> Iterator[tuple[str, list[str]]]:
    """(line of the host, lines to put after it) of each hunk of a README patch."""
    for hunk in patch.split("@@\n"):
        context, *added = hunk.splitlines()
        assert [context[0], *{line[0] for line in added}] == [" ", "+"], hunk
        yield context[1:], [line[1:] for line in added]


def apply(patch: str, source: str) -> str:
    """source after the patch; each hunk goes to the first such line after the hunk before."""
    lines, position = source.splitlines(), 0
    for context, added in hunks(patch):
        position = lines.index(context, position) + 1
        lines[position:position] = added
        position += len(added)
    return "\n".join(lines) + "\n"


# ----------------------------------------------------------------------------------------------------- always runs

def test_every_repository_has_its_recipe_of_at_most_six_lines():
    assert sorted(PATCHES) == sorted(FILES.values())
    for patch in PATCHES.values():
        added = [line for _, lines in hunks(patch) for line in lines]
        assert len(added) <= 6
        for call in ("from provq_attach import", "attach(", "set_step(", "maybe_init_codebook("):
            assert sum(call in line for line in added) == 1, (call, added)


class _Line(nn.Module):
    """Rows of a table, for the recipe of callables."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(512, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.cdist(x, self.table).argmin(-1)
        return x + (self.table[index] - x).detach(), index, (self.table[index] - x).square().mean()


def _copy_into(folder: Path) -> None:
    for path in (ROOT / "tokenizer").glob("provq*.py"):
        shutil.copy(path, folder)


def _recipes() -> list[str]:
    return [block for language, block in BLOCKS if language == "python"]


@pytest.mark.parametrize("number", range(len(_recipes())))
def test_a_recipe_trains_through_all_stages(number, monkeypatch, tmp_path):
    """The block as it stands in the README, except that the stages last 4 and 2 steps and K is 64."""
    recipe = _recipes()[number]
    monkeypatch.syspath_prepend(str(tmp_path))
    _copy_into(tmp_path)
    for name in ("provq", "provq_attach", "provq_hosts", "provq_packages"):
        sys.modules.pop(name, None)
    torch.manual_seed(0)
    rows, images = "DIVEQ" in recipe, "VectorQuantizer(" in recipe or "adapt(" in recipe
    codebook = EMACodebook(64, 8).train()
    levels = ResidualVectorQuantization(num_quantizers=2, dim=8, codebook_size=64)
    codec = SimpleNamespace(quantizer=SimpleNamespace(vq=levels))
    encoder = nn.Conv2d(3, 8, 4, 4) if images else nn.Linear(6, 8)
    decoder = nn.ConvTranspose2d(8, 3, 4, 4) if images else nn.Linear(8, 6)
    x = torch.randn(8, 3, 16, 16) if images else torch.randn(128, 6) if rows else torch.randn(4, 32, 6)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    names = {"encoder": encoder, "decoder": decoder, "x": x, "max_steps": 9, "codebook": codebook, "quantizer": _Line(),
             "codec": codec,
             "optimizer": torch.optim.Adam(parameters, 1e-2), "reconstruction_loss": nn.functional.mse_loss,
             "batches": [torch.randn_like(x) for _ in range(5)], "torch": torch}
    stages = []

    def end_of_step(names: dict) -> None:
        names["optimizer"].zero_grad()
        names["loss"].backward()
        names["optimizer"].step()
        stages.append(names["provq"].stage)

    code = re.sub(r"warmup_steps=[\d_]+, transition_steps=[\d_]+", "warmup_steps=4, transition_steps=2", recipe)
    code = re.sub(r"num_codes=16384|(codebook_size|num_embeddings)=512",
                  lambda match: match[0].split("=")[0] + "=64", code)
    assert "=4, transition_steps=2" in code
    if "for step" not in code:  # "then as for a tokenizer of your own"
        code += _recipes()[0].split("transition_steps=20_000))\n")[1]
    names["end_of_step"] = end_of_step
    exec(compile(code.rstrip() + "\n    end_of_step(globals())\n", f"README recipe {number}", "exec"), names)
    assert stages == [1, 1, 1, 1, 2, 2, 3, 3, 3]
    assert names["provq"].usage()["usage"] > 0
    assert names["provq"].has_codebook
    assert torch.isfinite(names["loss"])


# ------------------------------------------------------------------------------------------------- from checkouts

needs_checkouts = pytest.mark.skipif(CHECKOUTS is None, reason="PROVQ_HOSTS names no folder of checkouts")


@needs_checkouts
@pytest.mark.parametrize("repository", FILES)
def test_the_recipe_fits_the_repository(repository):
    path = CHECKOUTS / repository / FILES[repository]
    if not path.exists():
        pytest.skip(f"no {path}")
    patched = apply(PATCHES[FILES[repository]], path.read_text())
    compile(patched, str(path), "exec")
    assert patched.index("attach(") < patched.index(".set_step(")


@needs_checkouts
@pytest.mark.parametrize("name", ORIGINALS)
def test_a_stand_in_is_its_original(name):
    """Same weights, same latents: same indices, outputs, losses and gradients, in training and in eval()."""
    twin = {"original-llamagen-entropy": "llamagen-euclidean"}.get(name, name.removeprefix("original-"))
    original = ORIGINALS[name].make()
    stand_in = STAND_INS[twin].make()
    if "1d" in name:
        stand_in.legacy = True
    state = {k: v for k, v in original.state_dict().items() if k != "codebook_used"}
    spread = {k: torch.randn(v.shape) if k.endswith(("weight", "embeddings", "embed_avg")) else v
              for k, v in state.items()}
    for module in (original, stand_in):
        for key, value in module.state_dict().items():
            if key in spread:
                value.copy_(spread[key])
        if hasattr(module, "codebook_used"):
            module.show_usage = False
    assert list(state) == [k for k in stand_in.state_dict() if k != "codebook_used"]
    for training in (True, False):
        results = []
        for module in (original.train(training), stand_in.train(training)):
            z = ORIGINALS[name].z().requires_grad_()
            out = module(z)
            flat = [t for t in _flat(out) if isinstance(t, Tensor)]
            sum(t.sum() for t in flat if t.requires_grad).backward()
            results.append([*flat, z.grad])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5)
    for key, value in original.state_dict().items():
        if key in spread:
            torch.testing.assert_close(stand_in.state_dict()[key], value, rtol=1e-4, atol=1e-5)


def _flat(out) -> list:
    return [leaf for item in out for leaf in (_flat(item) if isinstance(item, tuple) else [item])]


@needs_checkouts
def test_llamagens_model_is_reproduced_by_the_inner_quantizer_alone(tmp_path):
    """Its own VQModel, in a process of its own (it is called tokenizer, too): train, save, load into the unmodified."""
    if not (CHECKOUTS / "LlamaGen").exists():
        pytest.skip("no LlamaGen")
    _copy_into(tmp_path)
    (tmp_path / "run.py").write_text("""
import torch
from provq_attach import Curriculum, attach, host_state_dict
from tokenizer.tokenizer_image.vq_model import ModelArgs, VQModel
torch.manual_seed(0)
def make():
    return VQModel(ModelArgs(codebook_size=32, encoder_ch_mult=[1], decoder_ch_mult=[1], z_channels=32))
model = make().train()
provq = attach(model.quantize, Curriculum(warmup_steps=2, transition_steps=2))
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
x = torch.randn(2, 3, 8, 8)
for step in range(6):
    provq.set_step(step)
    provq.maybe_init_codebook(optimizers=[optimizer])
    y, losses = model(x)
    loss = (y - x).square().mean() + sum(losses[:3])
    optimizer.zero_grad(); loss.backward(); optimizer.step()
alone = make()
alone.load_state_dict(host_state_dict(model.state_dict()))
model.eval(), alone.eval()
assert torch.equal(model(x)[0], alone(x)[0])
indices = model.encode(x)[2][2]
torch.testing.assert_close(model.decode_code(indices, (2, 8, 8, 8)), model(x)[0], rtol=1e-3, atol=1e-4)
assert provq.stage == 3 and provq.usage()["usage"] > 0.1
""")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{CHECKOUTS / 'LlamaGen'}"}
    done = subprocess.run([sys.executable, str(tmp_path / "run.py")], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


DRIVER = """
import sys, types, torch
from unittest import mock

class Module(torch.nn.Module):  # as much of a LightningModule as these models call
    log = log_dict = lambda self, *words, **options: None
    manual_backward = lambda self, loss: loss.backward()
    optimizers = lambda self: self.trainer.optimizers

lightning = types.SimpleNamespace(LightningModule=Module)
sys.modules.update({"pytorch_lightning": lightning, "lightning": lightning,
                    "main": types.SimpleNamespace(instantiate_from_config=lambda made: made)})
from patched import VQModel
from taming.modules.vqvae import quantize

class Loss(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.discriminator = torch.nn.Conv2d(3, 1, 1)

    def forward(self, codes, *words, last_layer, split):
        optimizer, y, x = words[-2], words[-3], words[-4]
        losses = (y - x).square().mean() + codes, self.discriminator(y.detach()).mean()
        return losses[optimizer], {}

torch.manual_seed(0)
net = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, resolution=16, in_channels=3, out_ch=3, z_channels=8)
simvq = SIMVQ
make = ((lambda: VQModel(net, Loss(), quantize.SimVQ(32, 8), scheduler_type="None")) if simvq else
        (lambda: VQModel({**net, "attn_resolutions": [], "double_z": False}, Loss(), 32, 8)))
model = make().train()
generator = [p for name, p in model.named_parameters() if not name.startswith("loss.")]
first, second = torch.optim.Adam(generator, 1e-3), torch.optim.Adam(model.loss.parameters(), 1e-3)
model.trainer = types.SimpleNamespace(optimizers=[first, second], profiler=mock.Mock())
stages, model.codebook_count = [], [0] * 32
for model.global_step in range(9):
    batch = {"image": torch.randn(2, 16, 16, 3)}
    if simvq:
        model.training_step(batch, model.global_step)
    else:
        for n, optimizer in enumerate((first, second)):
            loss = model.training_step(batch, model.global_step, n)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    stages.append(model.quantize.provq.stage)
assert stages == [1] * 4 + [2] * 2 + [3] * 3, stages
assert model.quantize.provq.usage()["usage"] > 0.1
from provq_attach import detach, host_state_dict
state, x = host_state_dict(model.state_dict()), torch.randn(2, 3, 16, 16)
alone = detach(make()).eval()
alone.codebook_count = [0] * 32
alone.load_state_dict(state)
assert torch.equal(model.eval()(x)[0], alone(x)[0])
"""


@needs_checkouts
@pytest.mark.parametrize("repository", ["taming-transformers", "SimVQ"])
def test_the_patched_model_trains_through_all_stages(repository, tmp_path):
    """The file with the recipe's lines in it, except that the stages last 4 and 2 steps; its own training_step."""
    path = CHECKOUTS / repository / FILES[repository]
    if not path.exists():
        pytest.skip(f"no {path}")
    _copy_into(tmp_path)
    patched = apply(PATCHES[FILES[repository]], path.read_text())
    short = patched.replace("warmup_steps=50_000, transition_steps=20_000", "warmup_steps=4, transition_steps=2")
    assert short != patched
    (tmp_path / "patched.py").write_text(short)
    (tmp_path / "run.py").write_text(DRIVER.replace("SIMVQ", str(repository == "SimVQ")))
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{CHECKOUTS / repository}"}
    done = subprocess.run([sys.executable, str(tmp_path / "run.py")], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
