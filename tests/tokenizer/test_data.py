"""Crops, augmentation, replacement of unreadable images and deterministic loading: tokenizer/data.py."""

import random
import signal
import subprocess
import sys
import zlib

import numpy as np
import pytest
import torch
from image_files import encoded, picture, write_folder, write_tar, write_zip
from PIL import Image, ImageFile
from places import GOLDEN, IMAGES, ROOT, needs_images
from torchvision.transforms import functional as tv

from tokenizer import data
from tokenizer.pixels import from_uint8

NUMBERS = GOLDEN / "misc_golden.npz"


# ---------------------------------------------------------------------------------------------------------------------
# crops


@pytest.mark.parametrize("size", [40, 64, 112])
def test_center_crop_matches_llamagen(size):
    golden = np.load(NUMBERS)
    crop = np.array(data.center_crop_arr(Image.fromarray(golden["img"]), size)).astype(int)
    assert crop.shape == (size, size, 3)
    assert np.abs(crop - golden[f"center_crop_{size}"]).max() <= 1


def test_random_crop_draws_as_llamagen():
    golden = np.load(NUMBERS)
    rng = random.Random(0)
    image = Image.fromarray(golden["img"])
    crops = [np.array(data.random_crop_arr(image, 48, rng)).astype(int) for _ in range(3)]
    assert np.abs(np.stack(crops) - golden["random_crop_48_seed0_x3"]).max() <= 1
    assert np.abs(crops[0] - crops[1]).max() > 10  # so that the comparison above is about the drawn numbers


def test_normalisation_matches_llamagen():
    golden = np.load(NUMBERS)
    tensor = data.image_to_tensor(Image.fromarray(golden["center_crop_40"]))
    assert tensor.dtype == torch.float32
    assert np.array_equal(tensor.numpy(), golden["norm_40"])
    every = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    assert torch.equal(data.image_to_tensor(every), tv.normalize(tv.to_tensor(every), [0.5], [0.5]))


@pytest.mark.parametrize(("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 4)])
def test_small_images_are_enlarged(mode, channels):
    image = picture(0, 8, 12, mode)
    if mode == "RGBA":
        image.putalpha(255)
    tensor = data.image_to_tensor(data.center_crop_arr(image, 32))
    assert tensor.shape == (channels, 32, 32)
    assert tensor.min() >= -1
    assert tensor.max() <= 1
    expected = image.resize((32, 48), Image.Resampling.BICUBIC).crop((0, 8, 32, 40))
    assert np.array_equal(np.array(data.center_crop_arr(image, 32)), np.array(expected))


def test_crop_at_equal_size_changes_nothing():
    image = picture(0, 32, 32)
    assert np.array_equal(np.array(data.center_crop_arr(image, 32)), np.array(image))


# ---------------------------------------------------------------------------------------------------------------------
# dataset


@pytest.fixture
def crops(tmp_path):
    """An open tar of 12 noise pictures of 80 x 60 and other sizes."""
    files = {f"{i % 3}/{i:02d}.png": encoded(picture(i, 80 - i, 60 + i)) for i in range(12)}
    return data.open_images(str(write_tar(tmp_path / "crops.tar", files)))


def test_augmentation_depends_on_seed_epoch_and_index_only(crops):
    dataset = data.ImageDataset(crops, 32, augment="crop-flip", seed=1)
    first = dataset[4, 7]
    random.seed(5)
    torch.manual_seed(5)
    dataset[3, 7]
    assert torch.equal(dataset[4, 7]["image"], first["image"])
    assert not torch.equal(dataset[5, 7]["image"], first["image"])
    assert not torch.equal(data.ImageDataset(crops, 32, augment="crop-flip", seed=2)[4, 7]["image"], first["image"])
    subset = data.ImageDataset(crops, 32, augment="crop-flip", seed=1, indices=[2, 7])
    assert torch.equal(subset[4, 1]["image"], first["image"])
    assert subset[4, 1]["index"] == 7


def test_flip_policy_mirrors_about_half(crops):
    dataset = data.ImageDataset(crops, 32, augment="flip", seed=0)
    plain = data.ImageDataset(crops, 32)[0]["image"]
    flips = []
    for epoch in range(200):
        image = dataset[epoch, 0]["image"]
        flips.append(torch.equal(image, plain.flip(-1)))
        assert flips[-1] or torch.equal(image, plain)
    assert 60 < sum(flips) < 140


def test_transform_matches_torchvision(crops):
    image = from_uint8(data.ImageDataset(crops, 32)[2]["image"])
    expected = tv.normalize(tv.to_tensor(data.center_crop_arr(crops.read(2), 32)), [0.5] * 3, [0.5] * 3)
    assert torch.equal(image, expected)


def test_default_augment_depends_on_the_image_size(crops):
    assert data.default_augment(crops, 32) == "crop-flip"
    assert data.default_augment(crops, 70) == "flip"


def test_default_augment_goes_by_most_images(tmp_path):
    large, small = encoded(picture(0, 64, 64)), encoded(picture(0, 16, 16))
    files = {f"{i:03d}.png": large for i in range(130)} | {"000.png": small, "001.png": b"broken"}
    source = data.open_images(str(write_folder(tmp_path / "large", files)))
    assert data.default_augment(source, 32) == "crop-flip"
    files = {f"{i:03d}.png": small for i in range(130)} | {"000.png": large}
    assert data.default_augment(data.open_images(str(write_folder(tmp_path / "small", files))), 32) == "flip"


@pytest.mark.parametrize(
    "options", [{"augment": "mirror"}, {"indices": []}, {"indices": [12]}, {"indices": [-1]}, {"image_size": 0}]
)
def test_wrong_dataset_options(crops, options):
    with pytest.raises(ValueError, match=r"augment|subset|image size"):
        data.ImageDataset(crops, **{"image_size": 32} | options)


def bomb() -> bytes:
    """A PNG whose header promises 20,000 x 20,000 pixels."""
    content = bytearray(encoded(picture(0)))
    content[16:24] = (20000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


def damaged_tiff() -> bytes:
    """A TIFF that calls its number of pixels a text: Pillow compares it with numbers and raises TypeError."""
    content = encoded(picture(0, 8, 8), "TIFF")
    return content[:72] + b"\2" + content[73:]


def damaged(kind: str) -> bytes:
    whole = encoded(picture(3, 64, 64), "JPEG")
    return {
        "truncated": whole[: len(whole) // 2],
        "truncated-png": encoded(picture(3, 64, 64))[:-800],
        "empty": b"",
        "text": b"<html>404 not found</html>",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "bomb": bomb(),
        "elongated": encoded(Image.new("L", (60000, 1))),
        "tiff": damaged_tiff(),
        "float": encoded(Image.fromarray(np.full((8, 8), 7.0, np.float32)), "TIFF"),
    }[kind]


@pytest.mark.parametrize(
    "kind", ["truncated", "truncated-png", "empty", "text", "postscript", "bomb", "elongated", "tiff", "float"]
)
def test_unreadable_image_is_replaced_and_reported(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as some other library may have done
    good = {f"{c}/0.png": encoded(picture(i, 64, 64)) for i, c in enumerate("abd")}
    folder = write_folder(tmp_path / "x", good | {"c/0.jpg": damaged(kind)})
    dataset = data.ImageDataset(data.open_images(str(folder)), 64, augment="crop-flip", seed=3)
    item = dataset[1, 2]
    assert (item["bad"], item["index"], item["label"]) == (["c/0.jpg"], 2, 3)
    assert torch.equal(item["image"], dataset[1, 2]["image"])
    assert dataset[1, 3]["bad"] == []
    plain = data.ImageDataset(data.open_images(str(folder)), 64, indices=[0, 2])[0, 1]  # wraps, and stays in the subset
    assert torch.equal(plain["image"], data.image_to_bytes(picture(0, 64, 64)))
    batch = next(iter(data.make_loader(dataset, [[(0, 2), (0, 0), (1, 2)]])))
    assert batch["bad"] == ["c/0.jpg", "c/0.jpg"]


def test_only_image_formats_are_decoded(tmp_path):
    source = data.open_images(str(write_folder(tmp_path, {"a.jpg": damaged("postscript")})))
    with pytest.raises(data.UnreadableImage, match=r"a\.jpg: none of JPEG PNG"):  # not handed to an interpreter
        source.read(0)


def test_nothing_readable_raises(tmp_path):
    dataset = data.ImageDataset(data.open_images(str(write_folder(tmp_path, {"a.png": b"", "b.png": b"x"}))), 32)
    with pytest.raises(RuntimeError, match=r"2 images in a row .* b\.png to a\.png"):
        dataset[0, 1]
    with pytest.raises(ValueError, match=r"none of 2 images .* a\.png"):
        data.default_augment(dataset.source, 32)


def test_bad_image_counter():
    counter = data.BadImageCounter(2)
    counter.add([])
    counter.add(["x.png", "y.png"])
    counter.add(["x.png"])
    with pytest.raises(RuntimeError, match=r"3 unreadable images, 2 are tolerated: x\.png, y\.png, z\.png\. "):
        counter.add(["z.png"])
    with pytest.raises(RuntimeError, match=r"b29 and 10 more"):
        data.BadImageCounter(0).add(f"b{i}" for i in range(10, 40))
    with pytest.raises(ValueError, match="negative"):
        data.BadImageCounter(-1)


# ---------------------------------------------------------------------------------------------------------------------
# loading


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_batches_do_not_depend_on_workers(tmp_path, kind):
    files = {f"{i % 3}/{i:02d}.png": encoded(picture(i, 80 - i, 60 + i)) for i in range(12)} | {"1/04.png": b"broken"}
    path = tmp_path / f"x.{kind}"
    source = data.open_images(str(write_tar(path, files) if kind == "tar" else write_zip(path, files)))
    source.read(0)  # the parent's descriptor is open when the workers are forked
    dataset = data.ImageDataset(source, 32, augment="crop-flip", seed=9)
    keys = [[(epoch, (5 * i + b) % 12) for b in range(3)] for epoch in range(2) for i in range(4)]
    expected = list(data.make_loader(dataset, keys, num_workers=0))
    loader = data.make_loader(dataset, keys, num_workers=2)
    for _ in range(2):  # the second time with the same, persistent workers
        got = list(loader)
        assert len(got) == len(expected) == 8
        for a, b in zip(got, expected, strict=True):
            assert all(torch.equal(a[k], b[k]) for k in ("image", "label", "index"))
            assert a["bad"] == b["bad"]
    assert any(batch["bad"] == ["1/04.png"] for batch in expected)
    assert expected[0]["image"].shape == (3, 3, 32, 32)
    assert expected[0]["image"].dtype == torch.uint8
    assert expected[0]["label"].dtype == expected[0]["index"].dtype == torch.int64


LEAVE = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in a shell's background is started without
sys.path.insert(0, {root!r})
from tokenizer.data import make_loader
first = iter(make_loader(range(100), [[i] for i in range(100)], num_workers=2, collate=list))
other = iter(make_loader(range(100), [[i] for i in range(100)], num_workers=1, collate=list))
next(first), next(other)
{how}
"""


@pytest.mark.parametrize(("how", "status"), [
    ("raise RuntimeError('diverged')", 1),
    ("os.kill(os.getpid(), signal.SIGINT)", -signal.SIGINT),
    ("sys.exit(3)", 3),
])
def test_a_program_that_ends_early_does_not_wait_for_its_workers(how, status):
    root = str(ROOT)
    done = subprocess.run([sys.executable, "-c", LEAVE.format(root=root, how=how)], timeout=60, text=True,
                          capture_output=True, check=False)
    assert done.returncode in (status, 128 + abs(status)), done.stderr
    assert "DataLoader worker" not in done.stderr


def test_negative_workers_are_refused(crops):
    with pytest.raises(ValueError, match="num_workers -1"):
        data.make_loader(data.ImageDataset(crops, 32), [[0]], num_workers=-1)


def test_split_holdout():
    train, held_out = data.split_holdout(1000, 100, seed=0)
    assert sorted([*train, *held_out]) == list(range(1000))
    assert (len(held_out), held_out.tolist()) == (100, sorted(held_out))
    assert np.array_equal(data.split_holdout(1000, 100, seed=0)[1], held_out)
    other = data.split_holdout(1000, 100, seed=1)[1]
    assert len(set(held_out) & set(other)) < 40
    assert abs(held_out.mean() - 500) < 120  # spread over the whole range, not its end
    assert len(data.split_holdout(5, 0, seed=0)[1]) == 0
    for size in (-1, 5, 6):
        with pytest.raises(ValueError, match=f"hold out {size} of 5"):
            data.split_holdout(5, size, seed=0)


@needs_images
def test_real_imagenet_tar():
    source = data.open_images(str(IMAGES / "imagenet_sample.tar"))
    assert (len(source), len(source.classes)) == (807, 807)
    assert source.classes[source.label(500)] == source.name(500).split("/")[0]
    dataset = data.ImageDataset(source, 256, augment=data.default_augment(source, 256))
    assert dataset.augment == "crop-flip"
    for batch in data.make_loader(dataset, [[(0, i) for i in range(s, s + 8)] for s in (0, 400, 799)]):
        assert batch["image"].shape == (8, 3, 256, 256)
        assert from_uint8(batch["image"]).std() > 0.2
        assert batch["bad"] == []
