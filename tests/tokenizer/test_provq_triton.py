"""The search as one kernel: under Triton's interpreter here, on a GPU where there is one; and who asks for it."""

import os
import subprocess
import sys

import pytest
import torch
from places import ROOT

from tokenizer import curriculum, provq, train_provq

triton = pytest.importorskip("triton", reason="Triton comes with torch for Linux")


def test_it_finds_what_float64_finds():
    done = subprocess.run([sys.executable, ROOT / "tests" / "workers" / "triton_cases.py", "200"], text=True,
                          capture_output=True, env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("200 ")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("tokens", "codes", "channels"), [(8192, 65536, 8), (1000, 262_144, 8), (77, 5000, 64),
                                                           (1, 70_001, 17), (4096, 131_072, 256)])
def test_on_a_gpu_it_finds_what_the_blocks_find(tokens, codes, channels):
    from tokenizer import provq_triton

    generator = torch.Generator().manual_seed(0)
    x, table = (torch.randn(n, channels, generator=generator).cuda() for n in (tokens, codes))
    table[codes // 2 :: 5] = table[3].clone()
    squares = table.square().sum(1)
    value, index = provq_triton.nearest(x, table, squares)
    wanted, where = provq._search_blocks(x, table)
    distance = (x - table[index]).square().sum(1)
    assert bool((distance <= wanted * (1 + 1e-4) + 1e-4).all())
    assert bool(((value + x.square().sum(1) - wanted).abs() <= 1e-3 * (1 + wanted)).all())
    assert (index == where).double().mean() > 0.999  # rounding decides between two that are nearly equally near


@pytest.fixture(autouse=True)
def search_as_it_was():
    """provq.py's search as it was, afterwards."""
    before = provq.fused_search
    yield
    provq.fused_search = before


@pytest.mark.parametrize(("how", "device"), [("blocks", "cpu"), ("blocks", "cuda"), ("auto", "cpu")])
def test_without_a_gpu_or_a_wish_blocks_are_searched(how, device):
    provq.fused_search = lambda *_: "found"
    curriculum.choose_code_search(how, torch.device(device))
    assert provq.fused_search(None, None, None) is None


@pytest.mark.parametrize(("how", "codes", "used"), [("auto", 65_535, False), ("auto", 65_536, True),
                                                    ("triton", 2, True)])
def test_on_gpus_the_kernel_is_picked_by_the_number_of_codes(monkeypatch, how, codes, used):
    from tokenizer import provq_triton

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(provq_triton, "nearest", lambda *_: "found")
    curriculum.choose_code_search(how, torch.device("cuda"))

    class OnGPU(torch.Tensor):
        is_cuda = True

    x, table = torch.zeros(3, 2).as_subclass(OnGPU), torch.zeros(codes, 2)
    assert provq.fused_search(x, table, table[:, 0]) == ("found" if used else None)
    assert provq.fused_search(x.double(), table.double(), table[:, 0]) is None
    assert provq.fused_search(torch.zeros(3, 2), table, table[:, 0]) is None


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="--code-search triton is a kernel for GPUs, and --device is cpu; leave it"):
        curriculum.choose_code_search("triton", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    from tokenizer import provq_triton
    with pytest.raises(RuntimeError, match="needs a GPU"):
        provq_triton.use_triton_search()
    monkeypatch.setitem(sys.modules, "tokenizer.provq_triton", None)
    monkeypatch.delattr("tokenizer.provq_triton")
    with pytest.raises(ValueError, match=r"--code-search auto needs Triton, .*--code-search blocks"):
        curriculum.choose_code_search("auto", torch.device("cuda"))


@pytest.mark.parametrize("words", [["--code-search", "triton"], ["--code-search", "auto", "--quantizer", "fsq",
                                                                "--codebook-size", "512", "--codebook-embed-dim", "3",
                                                                "--warmup-steps", "0", "--transition-steps", "0"]])
def test_the_trainer_refuses_before_anything_is_read(tmp_path, words):
    with pytest.raises(SystemExit, match="--code-search"):
        train_provq.main(["--preset", "digits", "--device", "cpu", "--results-dir", str(tmp_path / "run"), *words])
    assert not (tmp_path / "run").exists()
