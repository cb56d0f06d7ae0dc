"""The stand-in feature extractor: what it learns, and the contract of its file."""

import os
import subprocess
import sys
import zipfile

import pytest
import torch
from PIL import Image
from places import ROOT

from evaluations import train_extractor
from evaluations.features import open_extractor


@pytest.fixture(scope="module")
def extractor_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("extractor") / "digits.pt"
    train_extractor.main(["--out", str(path), "--max-steps", "30", "--image-size", "16", "--device", "cpu"])
    return path


@pytest.mark.filterwarnings("ignore:.torch.jit.load. is deprecated")
def test_file_keeps_the_contract(extractor_file):
    module = torch.jit.load(str(extractor_file))
    images = torch.randint(0, 256, (3, 3, 20, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pooled, logits, spatial = module(images)
    assert (pooled.shape, logits.shape, spatial.shape) == ((3, 256), (3, 10), (3, 512))
    assert {t.dtype for t in (pooled, logits, spatial)} == {torch.float32}
    assert not module.training  # an image's features do not depend on the batch
    torch.testing.assert_close(module(images[1:2])[0], pooled[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.torch.jit.(load|save). is deprecated")
def test_file_names_no_path_of_the_machine_and_its_digest_only_what_it_computes(extractor_file, tmp_path):
    with zipfile.ZipFile(extractor_file) as archive:
        text = b"".join(archive.read(name) for name in archive.namelist())
    assert str(ROOT).encode() not in text
    assert sys.prefix.encode() not in text
    program = ("import sys, torch; from evaluations.train_extractor import Extractor, torchscript; "
               "model = Extractor(16, 10).eval(); model.load_state_dict(torch.jit.load(sys.argv[1]).state_dict()); "
               "open(sys.argv[2], 'wb').write(torchscript(model))")
    digests = set()  # of processes of their own, as TorchScript numbers the classes of one
    for hash_seed in ("1", "2"):  # another order of a class's constants
        out = tmp_path / f"of{hash_seed}.pt"
        subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(extractor_file), str(out)], cwd=ROOT,
                       env={**os.environ, "PYTHONHASHSEED": hash_seed}, check=True)
        digests.add(open_extractor(f"torchscript:{out}").sha256)
    assert len(digests) == 1
    other = tmp_path / "other.pt"
    model = torch.jit.load(str(out))
    with torch.no_grad():
        model.head.bias[0] += 1e-3
    torch.jit.save(model, str(other))
    assert open_extractor(f"torchscript:{other}").sha256 not in digests


def test_it_learns_the_classes(extractor_file, capsys):
    path = extractor_file.parent / "again.pt"
    train_extractor.main(["--out", str(path), "--max-steps", "60", "--image-size", "16", "--device", "cpu"])
    accuracy = float(capsys.readouterr().out.split("held-out accuracy ")[1].split(";")[0])
    assert accuracy > 0.8


def pictures(folder, count):
    for i in range(count):
        (folder / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(folder / str(i % 2) / f"{i}.png")


def test_few_images_are_refused(tmp_path):
    pictures(tmp_path / "few", 9)
    with pytest.raises(SystemExit, match="few: 9 images; at least 10"):
        train_extractor.main(["--data-path", str(tmp_path / "few"), "--out", str(tmp_path / "x.pt")])


def test_unreadable_images_are_tolerated_as_asked(tmp_path):
    pictures(tmp_path / "some", 40)
    for i in (0, 9, 20):
        (tmp_path / "some" / str(i % 2) / f"{i}.png").write_bytes(b"junk")
    words = ["--data-path", str(tmp_path / "some"), "--out", str(tmp_path / "x.pt"), "--image-size", "8", "--max-steps",
             "5", "--batch-size", "8", "--device", "cpu"]
    with pytest.raises(SystemExit, match="raise --max-bad-images"):
        train_extractor.main([*words, "--max-bad-images", "0"])
    train_extractor.main([*words, "--max-bad-images", "3"])


@pytest.mark.parametrize("out", ["", "file/x.pt"])
def test_an_impossible_output_is_named_before_training(tmp_path, monkeypatch, out):
    (tmp_path / "file").write_text("precious")
    monkeypatch.setattr(train_extractor, "train", None)
    with pytest.raises(SystemExit, match="--out"):
        train_extractor.main(["--out", str(tmp_path / out), "--device", "cpu"])


def test_one_class_is_refused(tmp_path):
    for i in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    with pytest.raises(SystemExit, match="one class only"):
        train_extractor.main(["--data-path", str(tmp_path), "--out", str(tmp_path / "x.pt")])
