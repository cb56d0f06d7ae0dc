"""The stand-in feature extractor: what it learns, and the contract of its file."""

import pytest
import torch

from evaluations import train_extractor


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


def test_it_learns_the_classes(extractor_file, capsys):
    path = extractor_file.parent / "again.pt"
    train_extractor.main(["--out", str(path), "--max-steps", "60", "--image-size", "16", "--device", "cpu"])
    accuracy = float(capsys.readouterr().out.split("held-out accuracy ")[1].split(";")[0])
    assert accuracy > 0.8


def test_one_class_is_refused(tmp_path):
    from PIL import Image

    for i in range(20):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    with pytest.raises(SystemExit, match="one class only"):
        train_extractor.main(["--data-path", str(tmp_path), "--out", str(tmp_path / "x.pt")])
