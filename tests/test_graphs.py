"""What torch.compile makes of the models: one graph per stage without a break, and none when alpha moves or a last
batch is smaller."""

import copy
from functools import partial

import pytest
import torch
from code_files import write_codes
from digit_runs import write_digits
from fake_cuda import fake_cuda
from fake_trainers import SMALL_IMAGES, image_trainer
from gpt_models import TINY, tiny
from image_models import TINY_VQ4
from training_runs import rows, to_words

from autoregressive import train_c2i
from autoregressive.gpt import NextCodeLoss
from tokenizer import train_provq, vq_model
from tokenizer.pixels import from_uint8
from tokenizer.provq import Curriculum, ProVQ, VectorQuantizer
from tokenizer.quantizers import build_restart
from tokenizer.train_config import PRESETS, TrainConfig
from tokenizer.vq_model import VQModel, VQModelConfig

WARMUP, TRANSITION = 2, 3


class Graphs:
    """A backend that counts and runs the graphs eagerly."""

    def __init__(self):
        torch.compiler.reset()
        self.count = 0

    def __call__(self, graph, _):
        self.count += 1
        return graph.forward


@pytest.fixture
def _small(monkeypatch):
    """Tracing takes seconds per layer."""
    monkeypatch.setitem(vq_model.ARCHITECTURES, "VQ-4", TINY_VQ4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_one_graph_for_batches_of_any_size(stage):
    """As for a linear layer: one for the first number of tokens, one for all others."""
    model = ProVQ(VectorQuantizer(16, 4), Curriculum(9, 9), channel_dim=-1)
    model.set_step({1: 0, 2: 9, 3: 18}[stage])
    if model.needs_init:
        model.init_codebook(torch.randn(64, 4))
    graphs, eager = Graphs(), copy.deepcopy(model)
    compiled = torch.compile(model, backend=graphs)
    for count in range(64, 76):
        x = torch.randn(2, count, 4)
        torch.testing.assert_close(compiled(x).quantized, eager(x).quantized)
    assert graphs.count == 2


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("options", [
    {}, {"quantizer": "ema", "codebook_restart_below": 0.1}, {"quantizer": "simvq"}, {"codebook_follow": True},
    {"codebook_l2_norm": True, "rotation": True, "codebook_restart_below": 0.1},
], ids=str)
def test_one_graph_per_stage(options):
    cfg = TrainConfig(vq_model="VQ-4", image_size=16, codebook_size=32, dropout_p=0.1, **options)
    model = VQModel(VQModelConfig.from_dict(vars(cfg)), Curriculum(WARMUP, TRANSITION))
    restart = build_restart(cfg, model.quantize.quantizer)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    graphs = Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    counts, x = [], torch.randn(2, 3, 16, 16)
    for step in range(WARMUP + TRANSITION + 2):
        model.quantize.set_step(step)
        if model.quantize.needs_init:
            model.quantize.init_codebook(torch.randn(64, 8), optimizers=[optimizer])
        with torch.autocast("cpu", torch.bfloat16):
            x_hat, out = compiled(x)
        (x_hat.float().square().mean() + out.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        if restart:
            restart.step([optimizer])
        model.quantize.set_step(step + 1)
        counts.append(graphs.count)
    assert counts == [1, 1, 2, 2, 2, 3, 3]
    assert model.quantize.usage()["counts"].sum() > 0


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("options", [{}, {"quantizer": "simvq", "low_precision_norms": True}], ids=str)
def test_one_graph_per_stage_on_a_gpu(options):
    """Which searches codes in other ways than a CPU, and has settings of its own that a graph must not touch."""
    with fake_cuda() as fake:
        trainer, graphs = image_trainer(fake, **SMALL_IMAGES, **options), Graphs()
        compiled, quantize = torch.compile(trainer.raw, fullgraph=True, backend=graphs), trainer.raw.quantize
        for number in range(4):
            quantize.set_step(number)
            quantize._initialised = number > 0
            with trainer.autocast():
                x_hat, _ = compiled(fake.empty(2, 3, 32, 32))
            assert x_hat.is_cuda
            assert graphs.count == min(number + 1, 3)


def test_a_gpt_with_its_loss_is_one_graph():
    model, graphs = tiny(token_dropout_p=0.1), Graphs()
    loss = NextCodeLoss(model.train())
    compiled = torch.compile(loss, fullgraph=True, backend=graphs)
    for seed in range(3):
        codes = torch.randint(0, TINY.vocab_size, (2, TINY.block_size), generator=torch.Generator().manual_seed(seed))
        torch.manual_seed(0)
        found = compiled(codes, torch.tensor([1, 2]))
        torch.manual_seed(0)
        for one, other in zip(found, loss(codes, torch.tensor([1, 2])), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert graphs.count == 1


def run_compiled(main, run_dir, monkeypatch, **settings):
    """A run with --compile, to its end -> how many graphs it made."""
    graphs = Graphs()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", partial(torch.compile, backend=graphs, fullgraph=True))
        main(to_words({"results_dir": run_dir, "compile": True, "device": "cpu", "log_every": 100} | settings))
    assert rows(run_dir)[-1]["step"] == settings["max_steps"]
    return graphs.count


@pytest.fixture
def image_run(tmp_path, _small):
    """Seven steps over 20 images by 6, so that epochs end within batches; validation on 8, by 6 and 2."""
    for name, count in (("train", 20), ("val", 8)):
        write_digits(tmp_path / name, count, (16, 16))
    return train_provq.main, tmp_path / "run", {
        "data_path": tmp_path / "train", "val_path": tmp_path / "val", "vq_model": "VQ-4", "image_size": 16,
        "codebook_size": 16, "global_batch_size": 6, "max_steps": 7, "warmup_steps": 2, "transition_steps": 3,
        "val_every": 2, "kmeans_batches": 2, "disc_weight": 0, "perceptual_weight": 0, "augment": "none",
        "num_workers": 0, "mixed_precision": "none"}


def test_a_run_of_the_tokenizer_makes_a_graph_per_stage(image_run, monkeypatch):
    main, run_dir, settings = image_run
    assert run_compiled(main, run_dir, monkeypatch, **settings) == 3
    assert {row["images"] for row in rows(run_dir, "validation.jsonl")} == {8}


def test_a_graph_more_is_caught(image_run, monkeypatch):
    """Validation through the compiled model, whose last batch is smaller."""
    main, run_dir, settings = image_run

    def faulty(self, model):
        self.model.eval()
        for batch in self._val_batches():
            self.model(from_uint8(batch["image"]))
        return validate(self, model)

    validate = train_provq.Trainer.evaluate
    monkeypatch.setattr(train_provq.Trainer, "evaluate", faulty)
    short = {"max_steps": 1, "warmup_steps": 0, "transition_steps": 0, "kmeans_batches": None}
    assert run_compiled(main, run_dir, monkeypatch, **settings | short) > 1


def test_a_run_of_a_gpt_makes_one_graph(tmp_path, monkeypatch):
    write_codes(tmp_path / "codes", images=20)
    settings = {"preset": "digits", "vq_ckpt": "none", "code_path": tmp_path / "codes", "global_batch_size": 6,
                "max_steps": 5, "val_size": 2, "val_every": 2, "sample_every": 0}
    assert run_compiled(train_c2i.main, tmp_path / "run", monkeypatch, **settings) == 1


def test_a_break_is_found():
    class Broken(torch.nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x + 1

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(Broken(), fullgraph=True, backend=Graphs())(torch.ones(2))


def test_imagenet_presets_compile():
    assert {name: preset.get("compile", False) for name, preset in PRESETS.items()} == {
        "digits": False, "cifar10": False, "imagenet256": True, "imagenet384": True}
