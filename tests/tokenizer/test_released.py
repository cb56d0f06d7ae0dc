"""The models of tokenizer/pretrained/: they are what they were, found by name, and as good as their page says."""

import hashlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
from image_models import write_gpt, write_tokenizer
from places import IMAGES, ROOT, needs_images
from safetensors.torch import load_file

from autoregressive.pretrained import recorded_tokenizer
from scripts import release
from tokenizer import hub, provq
from tokenizer.data import center_crop_arr, image_to_tensor, split_holdout
from tokenizer.image_sources import open_images
from tokenizer.pretrained import load_tokenizer, tokenizer_hash
from tokenizer.stored import RELEASED

SHA256 = {
    "cifar10-vq4": "b8e90afd5314d35ee692fde4683c58caddb4d5c2295d794a13ad434315ac2300",
    "digits-gpt": "f2beda416843b659095d5ae4bb90ca2eb5e623c70089586a6858d14aa558366a",
    "digits-vq": "127c286fd8ccb98e5f8de9b034f3dd6ddb50bdf92960ba8b91a3aaf7723af964",
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_they_are_what_they_were():
    assert hub.released() == sorted(SHA256)
    files = {name: RELEASED / name / "model.safetensors" for name in SHA256}
    assert {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()} == SHA256
    assert sum(file.stat().st_size for file in RELEASED.rglob("*.*")) < 8e6


def psnr_and_usage(name, source, indices, count):
    """Means over images, as tokenizer/validation.py has them."""
    tokenizer = provq.load(name)
    x = torch.stack([image_to_tensor(center_crop_arr(source.read(int(i)), 32)) for i in indices[:count]])
    codes = tokenizer.encode(x, value_range=(-1, 1))
    error = ((tokenizer.model.decode_code(codes).clamp(-1, 1) - x) / 2).square().mean((1, 2, 3))
    return -10 * error.log10().mean().item(), len(codes.unique()) / tokenizer.num_codes


def row(name):
    """PSNR that the page names."""
    found = re.search(rf"^\| `{name}` \|.*\| ([\d.]+) \| [\d.]+ \| 100 % \|$", (RELEASED / "README.md").read_text(),
                      re.MULTILINE)
    assert found, name
    return float(found[1])


def test_digits_are_as_good_as_the_page_says():
    psnr, usage = psnr_and_usage("digits-vq", open_images(None, channels=1), split_holdout(1797, 297, 0)[1], 297)
    assert psnr == pytest.approx(row("digits-vq"), abs=0.02)
    assert usage == 1


@needs_images
def test_cifar10_is_as_good_as_the_page_says():
    source = open_images(str(IMAGES / "cifar10_train.zip"), channels=3)
    psnr, usage = psnr_and_usage("cifar10-vq4", source, split_holdout(50_000, 1000, 0)[1], 200)
    assert psnr == pytest.approx(row("cifar10-vq4"), abs=0.4)  # 200 of the 1,000
    assert usage > 0.95


def test_a_wrong_name_gets_the_right_ones(tmp_path):
    with pytest.raises(FileNotFoundError, match="no model at cifar10-vq; released are cifar10-vq4, digits-gpt, digits"):
        provq.load("cifar10-vq")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at digits-vq; the released one is in .*digits-vq$"):
        load_tokenizer("digits-vq")  # as commands do
    (tmp_path / "digits-vq").mkdir()  # what is here comes first
    with pytest.raises(FileNotFoundError, match="digits-vq holds neither"):
        provq.load("digits-vq")


def test_the_front_pages_lines_run_on_a_fresh_clone(tmp_path):
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(from tokenizer import provq .*?)```", page, re.DOTALL)[1]
    (tmp_path / "synthetic" / "figures").mkdir(parents=True)
    shutil.copy(ROOT / "synthetic" / "figures" / "demo.png", tmp_path / "synthetic" / "figures")
    done = subprocess.run([sys.executable, "-c", f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}"],
                          cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("*.png")} == {"decoded.png", "three.png"}


def test_releasing_rounds_and_pairs(tmp_path):
    write_tokenizer(tmp_path / "run")
    release.main(["run", "--name", "small-vq", "--folder", str(tmp_path / "released")])
    released = tmp_path / "released" / "small-vq"
    state = load_file(released / "model.safetensors")
    assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float16}
    original, rounded = provq.load("run"), provq.load(released)
    assert tokenizer_hash(original.model) != tokenizer_hash(rounded.model)
    assert torch.allclose(original.codebook(), rounded.codebook(), atol=1e-3)
    assert not torch.equal(original.codebook(), rounded.codebook())
    write_gpt(tmp_path / "gpt", released)
    release.main(["gpt", "--name", "small-gpt", "--tokenizer", "small-vq", "--folder", str(tmp_path / "released")])
    assert recorded_tokenizer(tmp_path / "released" / "small-gpt") == {"vq_ckpt": str(released)}
    assert len(provq.load(tmp_path / "released" / "small-gpt").sample([0, 1], n=1)) == 2
    with pytest.raises(SystemExit, match="no model at nowhere"):
        release.main(["nowhere", "--name", "x", "--folder", str(tmp_path / "released")])
