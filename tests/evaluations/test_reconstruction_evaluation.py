"""evaluations/reconstruction.py: its numbers against independent computations, processes, crops and missing weights."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from digit_runs import train_on_digits, write_digits
from PIL import Image
from places import ROOT
from scipy.linalg import sqrtm
from torch import nn

from evaluations import reconstruction
from evaluations.protocol import differences
from tokenizer import pixels, train_provq
from tokenizer.data import center_crop_arr, image_to_tensor
from tokenizer.pretrained import load_tokenizer

COUNT = 260  # more than one chunk


class Thumbnail(nn.Module):
    """Pooled features: the mean of each 4 x 4 field."""

    def forward(self, x):
        return F.adaptive_avg_pool2d(x.float().mean(1), 4).flatten(1)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run, pictures, and a stand-in extractor."""
    base = tmp_path_factory.mktemp("evaluation")
    train_on_digits(base / "run")
    torch.jit.script(Thumbnail()).save(str(base / "thumbnail.pt"))
    write_digits(base / "pictures", COUNT, (40, 34))
    return base


def flags(base, out, *more):
    return ["--vq-ckpt", str(base / "run"), "--features", f"torchscript:{base / 'thumbnail.pt'}", "--no-cache",
            "--device", "cpu", "--out", str(out), *map(str, more)]


def report_of(base, out, *more):
    reconstruction.main(flags(base, out, *more))
    return json.loads(out.read_text())


def compute(base, size, size_eval):
    """The same numbers, one image at a time with other libraries."""
    model = load_tokenizer(base / "run")
    psnr, ssim, codes, features = [], [], [], ([], [])
    for path in sorted((base / "pictures").iterdir()):
        original = Image.open(path).convert("L")
        x = image_to_tensor(center_crop_arr(original, size))[None]
        with torch.no_grad():
            z = model.encode_latents(x)
            indices = model.quantize.encode(z)
            x_hat = model.decode_code(indices)
        reference = image_to_tensor(center_crop_arr(original, size_eval))[None]
        if size != size_eval:
            x, x_hat = (F.interpolate(t, (size_eval, size_eval), mode="bicubic") for t in (x, x_hat))
        decoded = (x_hat * 127.5 + 128).clamp(0, 255).to(torch.uint8)
        first, second = ((x + 1) / 2)[0, 0].double().numpy(), decoded[0, 0].double().numpy() / 255
        psnr.append(-10 * np.log10(((first - second) ** 2).mean()))
        ssim.append(float(pixels.ssim(torch.from_numpy(second)[None, None], torch.from_numpy(first)[None, None], 1.0)))
        codes.append(indices.flatten())
        for part, picture in zip(features, (((reference + 1) * 127.5).round(), decoded), strict=True):
            part.append(Thumbnail()(picture.expand(-1, 3, -1, -1))[0].double().numpy())
    a, b = (np.stack(part) for part in features)
    ca, cb = np.cov(a.T), np.cov(b.T)
    counts = torch.cat(codes).bincount(minlength=64).double()
    p = counts[counts > 0] / counts.sum()
    codebook = model.quantize.codebook().detach().double()
    return {
        "rfid": ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real),
        "psnr": np.mean(psnr), "ssim": np.mean(ssim), "perplexity": float((-(p * p.log()).sum()).exp()),
        "usage": len(p) / 64, "code_distance": torch.pdist(codebook).mean().item(),
    }


@pytest.mark.parametrize(("size", "size_eval"), [(16, 16), (24, 16)])
def test_numbers_are_those_of_other_libraries(base, tmp_path, size, size_eval):
    report = report_of(base, tmp_path / "r.json", "--data-path", base / "pictures", "--image-size", size,
                       "--image-size-eval", size_eval, "--batch-size", 7)
    expected = compute(base, size, size_eval)
    for metric, value in expected.items():
        assert report[metric] == pytest.approx(value, rel=2e-4), metric
    assert report["num_images"] == COUNT
    assert report["lpips"] is None
    assert "--lpips-vgg-weights" in report["unavailable"]["lpips"]


def test_two_processes_give_the_numbers_of_one(base, tmp_path):
    more = ["--data-path", base / "pictures", "--batch-size", 16]
    one = report_of(base, tmp_path / "one.json", *more)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "evaluations" / "reconstruction.py"), *flags(base, tmp_path / "two.json", *more)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    two = json.loads((tmp_path / "two.json").read_text())
    assert one["protocol"] == two["protocol"]
    for metric in reconstruction.METRICS:
        assert one[metric] == (None if metric == "lpips" else pytest.approx(two[metric], rel=1e-12))


def test_a_run_is_scored_on_what_it_held_out(base):
    reconstruction.main(flags(base, base / "x.json")[:-2])
    report = json.loads((base / "run" / "evaluation" / "reconstruction.json").read_text())
    summary = json.loads((base / "run" / "summary.json").read_text())
    assert (report["num_images"], report["step"]) == (16, summary["step"])
    for metric in ("psnr", "ssim", "perplexity", "usage", "code_distance"):
        assert report[metric] == pytest.approx(summary[metric], rel=1e-4)


def test_unreadable_images_are_left_out_or_stop_it(base, tmp_path):
    shutil.copytree(base / "pictures", tmp_path / "some")
    (tmp_path / "some" / "007.png").write_bytes(b"junk")
    shutil.copytree(base / "pictures", tmp_path / "fewer")
    (tmp_path / "fewer" / "007.png").unlink()
    with pytest.raises(SystemExit, match=r"007.png"):
        report_of(base, tmp_path / "a.json", "--data-path", tmp_path / "some")
    more = ("--image-size", 24, "--image-size-eval", 16)
    some = report_of(base, tmp_path / "a.json", "--data-path", tmp_path / "some", "--max-bad-images", 1, *more)
    fewer = report_of(base, tmp_path / "b.json", "--data-path", tmp_path / "fewer", *more)
    assert some["unreadable_images"] == ["007.png"]
    assert some["num_images"] == COUNT - 1
    for metric in ("rfid", "psnr", "ssim", "perplexity", "usage"):
        assert some[metric] == pytest.approx(fewer[metric], rel=1e-5)


def test_protocols_tell_what_may_be_compared(base, tmp_path):
    more = ("--data-path", base / "pictures")
    first = report_of(base, tmp_path / "a.json", *more)["protocol"]
    renamed = tmp_path / "elsewhere"
    shutil.copytree(base / "pictures", renamed)
    assert not differences(first, report_of(base, tmp_path / "b.json", "--data-path", renamed)["protocol"])
    other = report_of(base, tmp_path / "c.json", *more, "--max-images", 20)["protocol"]
    assert differences(first, other) == ["reference.count", "reference.sha256"]
    other = report_of(base, tmp_path / "d.json", *more, "--image-size", 24, "--image-size-eval", 16)["protocol"]
    assert differences(first, other) == ["compared", "encoded"]  # the references are the same crops


@pytest.mark.parametrize(("more", "said"), [
    (["--data-path", "/no/such/place"], "/no/such/place"),
    (["--image-size", "18", "--data-path", "digits"], "--image-size 18 must be a multiple of 4"),
    (["--inception-weights", "/no/inception.pth", "--features", "inception"], "/no/inception.pth"),
    (["--lpips-vgg-weights", "/no/vgg.pth"], "/no/vgg.pth"),
    (["--features", "torchscript:/no/net.pt"], "/no/net.pt"),
    (["--vq-ckpt", "/no/run"], "/no/run"),
    (["--codebook-l2-norm"], "codebook_l2_norm"),
])
def test_mistakes_are_named(base, tmp_path, more, said):
    out = tmp_path / "r.json"
    with pytest.raises(SystemExit) as caught:
        reconstruction.main([*flags(base, out), *more])
    assert said in str(caught.value)
    assert not out.exists()


def test_a_run_whose_data_changed_is_refused(base, tmp_path):
    shutil.copytree(base / "pictures", tmp_path / "data")
    words = ("--preset cifar10 --image-size 16 --image-channels 1 --codebook-size 64 --global-batch-size 16 "
             "--max-steps 2 --warmup-steps 0 --transition-steps 0 --val-size 16").split()
    words += ["--device", "cpu", "--data-path", str(tmp_path / "data")]
    train_provq.main([*words, "--results-dir", str(tmp_path / "run")])
    more = ["--vq-ckpt", str(tmp_path / "run"), "--features", f"torchscript:{base / 'thumbnail.pt'}", "--no-cache",
            "--device", "cpu", "--out", str(tmp_path / "r.json")]
    reconstruction.main(more)
    (tmp_path / "data" / "007.png").unlink()
    (tmp_path / "r.json").unlink()
    with pytest.raises(SystemExit, match="has changed since"):
        reconstruction.main(more)
    assert not (tmp_path / "r.json").exists()


@pytest.mark.parametrize("out", ["", "file/r.json"])
def test_an_impossible_output_is_named_before_anything_is_computed(base, tmp_path, monkeypatch, out):
    (tmp_path / "file").write_text("precious")
    monkeypatch.setattr(reconstruction, "evaluate", None)
    with pytest.raises(SystemExit, match="--out"):
        reconstruction.main(flags(base, tmp_path / out))


def test_a_file_needs_images(base, tmp_path):
    best = next((base / "run" / "checkpoints").glob("*.pt"))
    with pytest.raises(SystemExit, match="give --data-path"):
        reconstruction.main(["--vq-ckpt", str(best), "--out", str(tmp_path / "r.json")])


def test_without_any_weights_the_rest_comes_out(base, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    reconstruction.main(["--vq-ckpt", str(base / "run"), "--device", "cpu", "--out", str(tmp_path / "r.json")])
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["rfid"] is report["lpips"] is None
    assert set(report["unavailable"]) == {"rfid", "lpips"}
    assert report["psnr"] > 0
