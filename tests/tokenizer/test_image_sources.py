"""What a data path may be, and how stored pictures are decoded: tokenizer/{image_sources,image_readers}.py."""

import gzip
import hashlib
import io
import json
import pickle
import shutil
import tarfile
import urllib.error
import zipfile

import numpy as np
import pytest
import torchvision
from image_files import NO_IMAGES, TREE, encoded, picture, pixels, write_folder, write_tar, write_zip
from PIL import Image
from places import IMAGES, needs_images

from tokenizer import data, image_readers
from tokenizer.image_sources import expand_braces

# ---------------------------------------------------------------------------------------------------------------------
# decoding


def stored_image(mode: str) -> bytes:
    image = picture(1)
    if mode == "P":  # palette with one alpha value per colour: Pillow warns when this is converted directly
        return encoded(image.quantize(8), transparency=bytes(range(0, 160, 20)))
    if mode == "CMYK":
        return encoded(image.convert("CMYK"), "JPEG", quality=95)
    if mode == "RGBA":
        return encoded(picture(1, mode="RGBA"))
    return encoded(image.convert(mode))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_the_asked_channels(mode, channels):
    image = image_readers.decode_image(stored_image(mode), channels)
    assert image.mode == {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    assert image.size == (20, 16)
    assert np.array(image)[..., :3].std() > 5  # a picture, not a constant
    if channels == 4 and mode not in ("LA", "P", "RGBA"):
        assert (np.array(image)[..., 3] == 255).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_not_clipped(kind):
    values = np.linspace(0, 65535, 320).round().astype(np.uint16).reshape(16, 20)
    if kind == "PPM":
        content = b"P5 20 16 65535\n" + values.astype(">u2").tobytes()
    else:
        content = encoded(Image.fromarray(values), kind)
    for channels in (1, 3):
        got = np.array(image_readers.decode_image(content, channels)).reshape(16, 20, channels)
        assert np.array_equal(got, np.rint(values / 257)[..., None].repeat(channels, -1))


def test_float_pixels_need_the_unit_range():
    unit = np.linspace(0, 1, 320, dtype=np.float32).reshape(16, 20)
    got = np.array(image_readers.decode_image(encoded(Image.fromarray(unit), "TIFF"), 1))
    assert np.array_equal(got, np.rint(unit * 255))
    with pytest.raises(data.UnreadableImage, match=r"mode F with values in \[0, 2\]"):
        image_readers.decode_image(encoded(Image.fromarray(unit * 2), "TIFF"), 1)


# ---------------------------------------------------------------------------------------------------------------------
# sources


@pytest.fixture
def tree(tmp_path):
    return write_folder(tmp_path / "tree", TREE)


def test_folder_order_is_torchvisions(tree):
    source = data.open_images(str(tree))
    reference = torchvision.datasets.ImageFolder(str(tree))
    assert [str(tree / source.name(i)) for i in range(len(source))] == [path for path, _ in reference.samples]
    assert source.labels.tolist() == reference.targets
    assert source.classes == reference.classes
    assert all(np.array_equal(a, np.array(b)) for a, (b, _) in zip(pixels(source), reference, strict=True))
    whole_paths = sorted(TREE)
    assert [source.name(i) for i in range(len(source))] != whole_paths  # the tree tells the two orders apart


@pytest.mark.parametrize("outer", ["", "./", "outer/", "data/train/"])
@pytest.mark.parametrize("kind", ["tar", "stored.zip", "deflated.zip"])
def test_archives_equal_the_folder(tree, tmp_path, outer, kind):
    files = {outer + name: content for name, content in (TREE | NO_IMAGES).items()}
    if kind == "tar":
        archive = write_tar(tmp_path / "images.tar", files)
    else:
        method = zipfile.ZIP_STORED if kind.startswith("stored") else zipfile.ZIP_DEFLATED
        archive = write_zip(tmp_path / "images.zip", files, method)
    source, reference = data.open_images(str(archive)), data.open_images(str(tree))
    assert list(source.names) == list(reference.names)
    assert source.labels.tolist() == reference.labels.tolist()
    assert source.classes == reference.classes
    assert source.fingerprint() == reference.fingerprint()
    assert all(np.array_equal(a, b) for a, b in zip(pixels(source), pixels(reference), strict=True))


def test_fingerprint_ignores_location_and_notices_changes(tree, tmp_path):
    first = data.open_images(str(tree)).fingerprint()
    moved = shutil.copytree(tree, tmp_path / "elsewhere" / "moved")
    assert data.open_images(str(moved)).fingerprint() == first
    (moved / "a" / "zz.png").write_bytes(encoded(picture(5, 21, 16)))
    more = data.open_images(str(moved)).fingerprint()
    (moved / "a" / "zz.png").rename(moved / "b" / "zz.png")
    renamed = data.open_images(str(moved)).fingerprint()
    assert len({first, more, renamed}) == 3


def test_flat_sources_are_one_class(tmp_path):
    files = {f"{i}.png": encoded(picture(i)) for i in range(3)}
    folder = write_folder(tmp_path / "flat", files)
    for path in (folder, write_tar(tmp_path / "flat.tar", files), write_zip(tmp_path / "flat.zip", files)):
        source = data.open_images(str(path))
        assert (len(source), set(source.labels), len(source.classes)) == (3, {0}, 1)
    single = data.open_images(str(write_tar(tmp_path / "one.tar", {f"cat/{n}": c for n, c in files.items()})))
    assert single.classes == ["cat"]  # the only folder is a class, not an outer folder


def test_tar_links_and_replaced_members(tmp_path):
    path = write_tar(tmp_path / "x.tar", {"a/1.png": encoded(picture(0)), "b/1.png": encoded(picture(1))})
    with tarfile.open(path, "a") as archive:
        for name, kind, target in [("c/h.png", tarfile.LNKTYPE, "a/1.png"), ("c/s.png", tarfile.SYMTYPE, "../b/1.png")]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            archive.addfile(info)
        newer = encoded(picture(9))
        info = tarfile.TarInfo("b/1.png")
        info.size = len(newer)
        archive.addfile(info, io.BytesIO(newer))
    source = data.open_images(str(path))
    assert list(source.names) == ["a/1.png", "b/1.png", "c/h.png", "c/s.png"]
    for got, seed in zip(pixels(source), [0, 9, 0, 1], strict=True):
        assert np.array_equal(got, np.array(picture(seed)))


def test_wrong_paths_name_themselves_and_what_is_accepted(tmp_path):
    (tmp_path / "empty").mkdir()
    write_tar(tmp_path / "none.tar", {"a/x.txt": b"text"})
    (tmp_path / "x.parquet").write_bytes(b"data")
    (tmp_path / "broken.zip").write_bytes(b"PK not really")
    (tmp_path / "broken.tar").write_bytes(b"no tar" * 200)
    (tmp_path / "cut.tar").write_bytes(write_tar(tmp_path / "whole.tar", TREE).read_bytes()[:3000])
    with pytest.raises(FileNotFoundError, match=r"nowhere.*Accepted.*\.tar"):
        data.open_images(str(tmp_path / "nowhere"))
    for name, message in [
        ("empty", "no images.*Accepted"),
        ("none.tar", "no images.*Accepted"),
        ("x.parquet", r"extension \.parquet is not known.*Accepted"),
        ("broken.zip", "not a readable zip"),
        ("broken.tar", "not a readable tar"),
        ("cut.tar", "not a readable tar"),
    ]:
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            data.open_images(str(tmp_path / name))
    with pytest.raises(ValueError, match="channels 2"):
        data.open_images(None, channels=2)


@pytest.mark.parametrize("name", ["images.tar.gz", "images.tgz", "images.tar"])
def test_compressed_tar_says_how_to_fix_it(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(write_tar(tmp_path / "plain", TREE).read_bytes()))
    with pytest.raises(ValueError, match=r"cannot be read in place.*gunzip -k"):
        data.open_images(str(tmp_path / name))


def test_unclear_classes_are_refused(tree):
    (tree / "void").mkdir()
    with pytest.raises(ValueError, match="class folder 'void'"):
        data.open_images(str(tree))
    (tree / "void").rmdir()
    (tree / "stray.png").write_bytes(TREE["a/z.png"])
    with pytest.raises(ValueError, match=r"stray\.png\) lie beside 8 images"):
        data.open_images(str(tree))


def test_zip_checksum_is_verified(tmp_path):
    path = write_zip(
        tmp_path / "x.zip", {"a/0.ppm": b"P6 4 4 255\n" + bytes(48), "a/1.ppm": b"P6 4 4 255\n" + bytes(48)}
    )
    content = path.read_bytes()
    path.write_bytes(content.replace(bytes(48), bytes(47) + b"\1", 1))
    source = data.open_images(str(path))
    with pytest.raises(data.UnreadableImage, match=r"a/0\.ppm.*checksum"):
        source.read(0)
    assert np.array(source.read(1)).max() == 0


# ---------------------------------------------------------------------------------------------------------------------
# WebDataset


def test_brace_expansion():
    assert expand_braces("x-{098..101}.tar") == [f"x-{i}.tar" for i in ("098", "099", "100", "101")]
    assert expand_braces("{a,b}/{0..1}") == ["a/0", "a/1", "b/0", "b/1"]
    with pytest.raises(ValueError, match="backwards"):
        expand_braces("{3..1}")


def shard_files(shard: int, label: str) -> dict[str, bytes]:
    """Four samples in an order that is not alphabetical, each of another kind; labels 3, 2, 1, 0."""
    files = {}
    for i, kind in zip((3, 2, 1, 0), ("jpg", "jpeg", "png", "webp"), strict=True):
        content = encoded(picture(10 * shard + i), {"jpg": "JPEG"}.get(kind, kind.upper()))
        files |= {f"n/{shard}{i}.seg.png": b"another view", f"n/{shard}{i}.{kind}": content}
        if label == "cls":
            files[f"n/{shard}{i}.cls"] = f"{i}\n".encode()
        elif label:
            files[f"n/{shard}{i}.json"] = json.dumps({"caption": "x", label: i}).encode()
    return files


@pytest.mark.parametrize("label", ["cls", "json cls", "json label", ""])
def test_webdataset_shards(tmp_path, label):
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        write_tar(folder / f"train-{shard:03d}.tar", shard_files(shard, label.removeprefix("json ")))
    pattern = data.open_images(str(folder / "train-{000..002}.tar"))
    assert len(pattern) == 12
    assert pattern.labels.tolist() == ([3, 2, 1, 0] * 3 if label else [0] * 12)
    assert pattern.classes == (["0", "1", "2", "3"] if label else ["0"])
    assert [pattern.name(i) for i in (0, 11)] == ["train-000.tar/n/03.jpg", "train-002.tar/n/20.webp"]
    for index, seed in [(2, 1), (6, 11), (10, 21)]:  # the PNGs are lossless
        assert np.array_equal(np.array(pattern.read(index)), np.array(picture(seed)))
    whole = data.open_images(str(folder))
    assert whole.fingerprint() == pattern.fingerprint()
    two = data.open_images(str(folder / "train-{002,000}.tar"))
    assert two.name(0) == "train-002.tar/n/23.jpg"
    if label:
        assert data.open_images(str(folder / "train-001.tar")).labels.tolist() == [3, 2, 1, 0]
    with pytest.raises(FileNotFoundError, match=r"2 of 5 shards do not exist, the first is .*train-003\.tar"):
        data.open_images(str(folder / "train-{000..004}.tar"))


def test_metadata_in_class_folders_does_not_make_a_webdataset(tree, tmp_path):
    folder = data.open_images(str(tree))
    metadata = {"a/z.json": b'{"camera": 3}', "a/Z.json": b"[1]"}
    source = data.open_images(str(write_tar(tmp_path / "x.tar", TREE | metadata)))
    assert source.classes == folder.classes == ["a", "a-b", "b"]
    assert source.fingerprint() == folder.fingerprint()
    labelled = {f"{name.rpartition('.')[0]}.cls": b"5" for name in TREE}
    assert set(data.open_images(str(write_tar(tmp_path / "y.tar", TREE | labelled))).labels) == {5}
    with pytest.raises(ValueError, match="give all images a label or none"):
        data.open_images(str(write_tar(tmp_path / "z.tar", TREE | {"a/z.json": b'{"label": 3}'})))


def test_webdataset_labels_are_validated(tmp_path):
    image = encoded(picture(0))
    for extra, message in [
        ({"b.cls": b"cat"}, r"b\.cls holds b'cat'"),
        ({"b.cls": b"-1"}, r"b\.png: label -1"),
        ({"b.json": b'{"cls": "3"}'}, r"b\.json has the label '3'"),
        ({"b.json": b"{"}, r"b\.json is not JSON"),
        ({}, r"b\.png: no label"),
    ]:
        path = write_tar(tmp_path / "s.tar", {"a.png": image, "a.cls": b"1", "b.png": image} | extra)
        with pytest.raises(ValueError, match=message):
            data.open_images(str(path))


def test_more_shards_than_open_files(tmp_path, monkeypatch):
    monkeypatch.setattr(image_readers, "_MAX_OPEN_FILES", 2)
    for shard in range(5):
        write_tar(tmp_path / f"{shard}.tar", {f"{shard}.png": encoded(picture(shard)), f"{shard}.cls": b"0"})
    source = data.open_images(str(tmp_path))
    for i in (0, 3, 1, 4, 0, 2, 2, 3):
        assert np.array_equal(np.array(source.read(i)), np.array(picture(i)))
        assert len(source.reader.open) <= 2


# ---------------------------------------------------------------------------------------------------------------------
# lists, CIFAR-10, digits


@pytest.mark.parametrize(("separator", "suffix"), [("\t", "txt"), (",", "csv"), (", ", "txt"), (None, "txt")])
def test_list_of_files(tree, tmp_path, separator, suffix):
    (tree / "a" / "with,comma 1.png").write_bytes(encoded(picture(77)))
    names = ["b/9.png", "a/with,comma 1.png", "a/z.png", "b/9.png"]
    lines = [n if separator is None else f"{n}{separator}{i % 3}" for i, n in enumerate(names)]
    (tree / f"list.{suffix}").write_text("\n".join(lines) + "\n\n", encoding="utf-8-sig")
    source = data.open_images(str(tree / f"list.{suffix}"))
    assert list(source.names) == names
    assert source.labels.tolist() == ([0] * 4 if separator is None else [0, 1, 2, 0])
    assert np.array_equal(np.array(source.read(1)), np.array(picture(77)))
    moved = shutil.copytree(tree, tmp_path / "moved")
    (moved / "absolute.txt").write_text("\n".join(str(moved / line) for line in lines))
    assert data.open_images(str(moved / "absolute.txt")).fingerprint() == source.fingerprint()


def test_list_errors_name_the_line(tree):
    for text, kind, message in [
        ("a/z.png\nb/none.png\n", FileNotFoundError, r"line 2: no file .*none\.png"),
        ("a/z.png\t1\nb/9.png\n", ValueError, "line 2: no label"),
        ("a/z.png\t-2\n", ValueError, "line 1: label -2"),
        ("list.txt\n", ValueError, r"line 1: list\.txt is none of"),
        ("\n", ValueError, "list is empty"),
    ]:
        (tree / "list.txt").write_text(text)
        with pytest.raises(kind, match=message):
            data.open_images(str(tree / "list.txt"))


def test_cifar10_folder(tmp_path, monkeypatch):
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    rng = np.random.default_rng(0)
    stored = rng.integers(0, 256, (5, 4, 3072), dtype=np.uint8)
    sums = []
    for i in range(5):
        (batches / f"data_batch_{i + 1}").write_bytes(pickle.dumps({"data": stored[i], "labels": [i, 9, i, 0]}))
    (batches / "test_batch").write_bytes(pickle.dumps({"data": stored[0], "labels": [0] * 4}))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class{i}" for i in range(10)]}))
    with pytest.raises(ValueError, match="cifar-10-batches-py is incomplete or damaged"):
        data.open_images(str(tmp_path))  # these are not the published files
    cifar = torchvision.datasets.CIFAR10
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in batches.iterdir()}
    monkeypatch.setattr(cifar, "train_list", [[n, sums[n]] for n, _ in cifar.train_list])
    monkeypatch.setattr(cifar, "test_list", [[n, sums[n]] for n, _ in cifar.test_list])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": sums["batches.meta"]})
    source = data.open_images(str(tmp_path))
    assert (len(source), len(source.classes)) == (20, 10)
    assert source.labels[4:8].tolist() == [1, 9, 1, 0]
    assert np.array_equal(np.array(source.read(5)), stored[1, 1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert data.default_augment(source, 32) == "flip"


def test_cifar10_download_failure_is_explained(tmp_path, monkeypatch):
    def unreachable(*_args, **_options):
        raise urllib.error.URLError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torchvision.datasets.cifar, "download_and_extract_archive", unreachable)
    with pytest.raises(
        FileNotFoundError, match=r"could not download CIFAR-10 into .*data .*no network.*give that folder"
    ):
        data.open_images("cifar10")


def test_digits():
    source = data.open_images(None, channels=1)
    assert (len(source), source.classes) == (1797, [str(i) for i in range(10)])
    image = np.array(source.read(0))
    assert image.shape == (8, 8)
    assert (image.min(), image.max()) == (0, 239)  # 15 of 16, so the scale is fixed and not per picture
    assert data.default_augment(source, 32) == "none"
    for augment in ("flip", "crop-flip"):
        with pytest.raises(ValueError, match="mirror"):
            data.ImageDataset(source, 32, augment=augment)
    item = data.ImageDataset(source, 32)[0, 5]
    assert item["image"].shape == (1, 32, 32)
    assert (item["label"], item["index"], item["bad"]) == (5, 5, [])


@pytest.mark.parametrize("kind", ["folder", "tar", "zip", "digits"])
def test_sources_survive_pickling(tree, tmp_path, kind):
    path = {
        "folder": lambda: tree,
        "tar": lambda: write_tar(tmp_path / "x.tar", TREE),
        "zip": lambda: write_zip(tmp_path / "x.zip", TREE),
        "digits": lambda: None,
    }[kind]()
    source = data.open_images(path if path is None else str(path))
    before = np.array(source.read(3))  # opens the file, whose descriptor must not travel
    copy = pickle.loads(pickle.dumps(source))
    if kind in ("tar", "zip"):
        assert (len(source.reader.open), len(copy.reader.open)) == (1, 0)
    assert np.array_equal(np.array(copy.read(3)), before)
    assert copy.fingerprint() == source.fingerprint()
    with pytest.raises(IndexError):
        copy.read(len(copy))


# ---------------------------------------------------------------------------------------------------------------------
# real pictures


@needs_images
def test_real_cifar10_zip():
    source = data.open_images(str(IMAGES / "cifar10_train.zip"))
    assert len(source) == 50000
    assert np.bincount(source.labels).tolist() == [5000] * 10
    assert (source.classes[0], source.classes[-1]) == ("airplane", "truck")
    assert (source.name(0), source.name(49999)) == ("airplane/0000.jpg", "truck/4999.jpg")
    with zipfile.ZipFile(IMAGES / "cifar10_train.zip") as archive:
        for i in (0, 12345, 49999):
            expected = Image.open(io.BytesIO(archive.read(source.name(i)))).convert("RGB")
            assert np.array_equal(np.array(source.read(i)), np.array(expected))
    assert data.default_augment(source, 32) == "flip"
    assert len(pickle.dumps(source)) < 5_000_000  # the index is packed
