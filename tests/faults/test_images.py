"""Images as strangers have them: damaged archives, odd folders, deep pixels, bombs, pipes, lists of other programs."""

import io
import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from image_files import TREE, encoded, picture, pixels, write_folder, write_tar, write_zip
from image_models import write_tokenizer
from PIL import Image
from places import CASES, ROOT, needs_cases
from training_runs import to_words

from autoregressive import extract_codes
from tokenizer import data, image_readers, reconstruct, train_provq
from tokenizer.data_split import open_run_split
from tokenizer.image_readers import ImageOptions, UnreadableImage, decode_image
from tokenizer.image_sources import expand_braces

QUICK = {"preset": "cifar10", "image_size": 16, "codebook_size": 4, "global_batch_size": 2, "warmup_steps": 0,
         "transition_steps": 0, "max_steps": 1, "val_size": 1, "device": "cpu"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "vq")


@pytest.fixture
def tree(tmp_path):
    return write_folder(tmp_path / "tree", TREE)


# ---------------------------------------------------------------------------------------------------------------------
# archives


@needs_cases
def test_backslashes_of_a_zip_are_slashes():
    source = data.open_images(str(CASES / "images" / "back.zip"))
    assert source.classes == ["airplane", "automobile", "bird", "cat"]
    assert np.bincount(source.labels).tolist() == [15] * 4
    assert source.name(0) == "airplane/0000.jpg"


@pytest.mark.parametrize("outer", ["", "outer\\", "C:\\data\\train\\"])
def test_a_zip_with_backslashes_equals_the_folder(tree, tmp_path, outer):
    files = {(outer + name).replace("/", "\\"): content for name, content in TREE.items()} | {"notes\\": b""}
    source, folder = data.open_images(str(write_zip(tmp_path / "x.zip", files))), data.open_images(str(tree))
    assert source.fingerprint() == folder.fingerprint()
    assert all(np.array_equal(a, b) for a, b in zip(pixels(source), pixels(folder), strict=True))


def shard(path, count=10, first=0):
    files = {}
    for i in range(first, first + count):
        files |= {f"{i}.png": encoded(picture(i)), f"{i}.cls": b"%d" % (i % 2)}
    return write_tar(path, files)


@needs_cases
@pytest.mark.parametrize("name", ["hole.tar", "zerotail.tar"])
def test_a_shard_with_a_hole_is_not_read_as_a_shorter_one(name, tmp_path):
    with pytest.raises(ValueError, match=rf"{name}: not a readable tar .*zeros at byte 10,240 end it, and 19,968"):
        data.open_images(str(CASES / "images" / name))
    shutil.copy(CASES / "images" / name, tmp_path / "1.tar")
    shard(tmp_path / "0.tar")
    with pytest.raises(ValueError, match=r"1\.tar.*1 of 2 shards are damaged, of which --max-bad-images allows 0"):
        data.open_images(str(tmp_path))
    source = data.open_images(str(tmp_path), options=ImageOptions(max_bad_images=1))
    assert [name.split("/")[0] for name in source.names] == ["0.tar"] * 10
    assert len(source.damaged) == 1
    assert "1.tar: not a readable tar archive" in data.describe_source(source)[1]


def damaged(good: bytes, kind: str) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(good)) as archive:
        headers = [info.offset for info in archive]
        end = archive.offset
    middle = headers[len(headers) // 2]
    header = bytearray(good[middle : middle + 512])
    if kind == "negative size":
        header[124:136] = b"\xff" * 10 + b"\xfe\x00"
        header[148:156] = b"        "
        header[148:156] = b"%06o\0 " % sum(header)
    return {
        "cut at a header": good[:middle],
        "cut in a header": good[: middle + 200],
        "cut in data": good[: middle + 700],
        "no end marker": good[:end],
        "a broken header": good[: middle + 5] + b"\xff" + good[middle + 6 :],
        "zeros in the middle": good[:middle] + bytes(1024) + good[middle + 1024 :],
        "zeros from the middle": good[:middle] + bytes(len(good) + 10240 - middle),
        "all zeros": bytes(len(good) + 10240),
        "negative size": good[:middle] + bytes(header) + good[middle + 512 :],
        "joined with cat": good + good,
        "empty": b"",
    }[kind]


@pytest.mark.parametrize("kind", ["cut at a header", "cut in a header", "cut in data", "no end marker",
                                  "a broken header", "zeros in the middle", "zeros from the middle", "all zeros",
                                  "negative size", "joined with cat", "empty"])
def test_a_damaged_tar_is_named(tmp_path, kind):
    content = damaged(shard(tmp_path / "good.tar").read_bytes(), kind)
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(ValueError, match=r"bad\.tar: not a readable tar archive"):
        data.open_images(str(tmp_path / "bad.tar"))
    source = data.open_images(str(tmp_path / "{good,bad}.tar"), options=ImageOptions(max_bad_images=1))
    assert (len(source), len(source.damaged)) == (10, 1)


@pytest.mark.parametrize("size", [512, 1024, 10240, 65536, 2**20])
def test_padding_of_any_writer_is_no_damage(tmp_path, size):
    content = shard(tmp_path / "x.tar").read_bytes()
    with tarfile.open(tmp_path / "x.tar") as archive:
        archive.getmembers()
        end = archive.offset
    marker = 512 if size == 512 else 1024
    (tmp_path / "y.tar").write_bytes(content[:end] + bytes(marker + -(end + marker) % size))
    assert len(data.open_images(str(tmp_path / "y.tar"))) == 10


def test_damaged_shards_count_as_unreadable_images(tmp_path, capsys):
    (tmp_path / "x").mkdir()
    for i in range(3):
        shard(tmp_path / "x" / f"{i}.tar", 10, 10 * i)
    whole = (tmp_path / "x" / "1.tar").read_bytes()
    (tmp_path / "x" / "1.tar").write_bytes(whole[:5000])
    words = QUICK | {"data_path": tmp_path / "x", "results_dir": tmp_path / "run"}
    with pytest.raises(SystemExit, match=r"--data-path: .*1\.tar.*--max-bad-images allows 0"):
        train_provq.main(to_words(words | {"max_bad_images": 0}))
    train_provq.main(to_words(words | {"max_bad_images": 1}))
    assert "left out a damaged shard: " in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["training_images"], summary["unreadable_images"]) == (19, 1)
    with pytest.raises(SystemExit, match=r"1\.tar"):
        extract_codes.main(to_words({"vq_ckpt": tmp_path / "run", "device": "cpu", "max_bad_images": 0}))
    (tmp_path / "x" / "1.tar").write_bytes(whole)  # and a run is not resumed with other images
    with pytest.raises(SystemExit, match="its data have changed"):
        train_provq.main(to_words(words | {"max_steps": 2}))


@pytest.mark.parametrize(("content", "said"), [(b"[" * 100_000, "is not JSON"), (b'{"cls": 1e400}', "no integer"),
                                               (b'{"cls": 1099511627776}', "label 1099511627776 is not in")])
def test_labels_of_shards_are_checked(tmp_path, content, said):
    path = write_tar(tmp_path / "x.tar", {"0.png": encoded(picture(0)), "0.json": content})
    with pytest.raises(ValueError, match=said):
        data.open_images(str(path))


def test_damaged_zips_are_named(tmp_path):
    good = write_zip(tmp_path / "good.zip", TREE).read_bytes()
    directory = good.index(b"PK\x01\x02")
    rng = random.Random(0)
    for i in range(200):
        content = bytearray(good)
        for _ in range(1 + i % 4):
            content[rng.randrange(directory, len(good))] = rng.randrange(256)
        (tmp_path / "bad.zip").write_bytes(content)
        try:
            source = data.open_images(str(tmp_path / "bad.zip"))
        except ValueError as error:
            assert "bad.zip" in str(error)  # noqa: PT017
            continue
        for place in range(len(source)):
            try:
                source.read(place)
            except UnreadableImage:
                continue


# ---------------------------------------------------------------------------------------------------------------------
# folders


def test_links_that_lead_back_are_not_followed(tree):
    plain = data.open_images(str(tree))
    (tree / "a" / "up").symlink_to("..")
    (tree / "b" / "down").symlink_to("../a")
    (tree / "up").symlink_to("..")
    (tree / "a" / "self").symlink_to("self")
    source = data.open_images(str(tree))
    assert source.fingerprint() == plain.fingerprint()
    assert source.notes == ["3 links to folders that are read under another name, or that hold the data path, are not "
                            "followed: a/up, b/down, up"]


def test_each_real_folder_is_read_once(tree, tmp_path):
    elsewhere = write_folder(tmp_path / "elsewhere", {"deep/1.png": TREE["a/z.png"], "0.png": TREE["a/Z.png"]})
    plain = len(data.open_images(str(tree)))
    (tree / "0").symlink_to("a")  # sorted before it
    (tree / "z").symlink_to(elsewhere)
    (tree / "zz").symlink_to(elsewhere / "deep")
    (elsewhere / "back").symlink_to(tree)
    source = data.open_images(str(tree))
    assert source.classes == ["a", "a-b", "b", "z"]
    assert len(source) == plain + 2
    assert source.notes[0].endswith(": 0, z/back, zz")


def test_a_folder_of_links_is_a_folder(tree, tmp_path):
    (tmp_path / "links").mkdir()
    for name in ("a", "b", "a-b"):
        (tmp_path / "links" / name).symlink_to(tree / name)
    source = data.open_images(str(tmp_path / "links"))
    assert (source.fingerprint(), source.notes) == (data.open_images(str(tree)).fingerprint(), [])


def test_a_folder_that_cannot_be_listed_is_named(tree, monkeypatch):
    real = os.scandir

    def scandir(path):
        if str(path).endswith(("/a-b", "lost+found")):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    (tree / "lost+found").mkdir()
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(ValueError, match=r"the folder a-b cannot be listed \(Permission denied\)"):
        data.open_images(str(tree))
    shutil.rmtree(tree / "a-b")
    assert data.open_images(str(tree)).classes == ["a", "b"]


def test_pipes_sockets_and_links_to_nothing(tree):
    plain = data.open_images(str(tree)).fingerprint()
    os.mkfifo(tree / "a" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tree / "b" / "socket.png"))
        (tree / "b" / "zero.png").symlink_to("/dev/zero")
        source = data.open_images(str(tree))
        assert source.fingerprint() == plain
        assert source.notes == ["3 pipes, sockets or devices are left out: a/pipe.png, b/socket.png, b/zero.png"]
    (tree / "a" / "gone.png").symlink_to("nowhere")
    source = data.open_images(str(tree))
    with pytest.raises(UnreadableImage, match=r"a/gone\.png: .*No such file"):
        source.read(list(source.names).index("a/gone.png"))


def test_what_becomes_a_pipe_is_unreadable(tree):
    source = data.open_images(str(tree))
    place = list(source.names).index("a/z.png")
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), lambda path: path.mkdir()):
        (tree / "a" / "z.png").unlink()
        make(tree / "a" / "z.png")
        with pytest.raises(UnreadableImage, match=r"a/z\.png"):
            source.read(place)
        if (tree / "a" / "z.png").is_dir():
            break


@pytest.mark.parametrize("name", ["x.txt", "x.tar", "x.zip", "x.csv"])
def test_a_pipe_is_no_data_path(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is a pipe, socket or device"):
        data.open_images(str(tmp_path / name))
    with pytest.raises(ValueError, match="/dev/zero is a pipe, socket or device"):
        data.open_images("/dev/zero")
    folder = tmp_path / "shards"
    folder.mkdir()
    os.mkfifo(folder / "0.tar")
    with pytest.raises(FileNotFoundError, match=r"0\.tar"):
        data.open_images(str(folder))
    (tmp_path / "list.csv").write_text(f"{name}\n")
    with pytest.raises(ValueError, match=f"line 1: .*{name} is no regular file"):
        data.open_images(str(tmp_path / "list.csv"))


def test_an_empty_path_is_not_the_current_folder(tokenizer, tmp_path, capsys):
    for path in ("", " "):
        with pytest.raises(ValueError, match="the data path is empty"):
            data.open_images(path)
    words = QUICK | {"results_dir": tmp_path / "run"}
    for flag, more in (("--data-path", {}), ("--val-path", {"data_path": tmp_path})):
        with pytest.raises(SystemExit) as stopped:
            train_provq.main([*to_words(words | more), flag, ""])
        said = f"{stopped.value} {capsys.readouterr().err}"
        assert flag in said
        assert "empty" in said
    with pytest.raises(SystemExit):
        extract_codes.main([*to_words({"vq_ckpt": tokenizer, "code_path": tmp_path / "c"}), "--data-path", ""])
    assert "--data-path: the text is empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        reconstruct.main([str(tokenizer), "", "--export-hf", str(tmp_path / "hf")])
    assert "one argument: the text is empty" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


@pytest.mark.usefixtures("tree")
def test_a_relative_path_holds_from_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = QUICK | {"data_path": "tree", "val_path": "tree", "results_dir": "runs/x"}
    train_provq.main(to_words(words))
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    assert len(open_run_split(tmp_path / "runs" / "x").source) == len(TREE)
    path = tmp_path / "runs" / "x" / "config.json"
    older = json.loads(path.read_text()) | {"data_path": "tree", "val_path": "tree"}
    path.write_text(json.dumps(older))
    assert len(open_run_split(tmp_path / "runs" / "x").source) == len(TREE)
    extract_codes.main(["--vq-ckpt", "../runs/x", "--device", "cpu"])
    assert (tmp_path / "runs" / "x" / "codes" / "manifest.json").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# deep pixels


def png_16(values, colour_type):
    """values (H, W) or (H, W, C) uint16; colour_type of PNG: 0 grey, 2 RGB, 4 grey and alpha, 6 RGBA."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def tiff_16(values, compression, order):
    """values (H, W, 3) uint16 in two strips. compression 1: none, 8: deflate. order: "<" or ">"."""
    strips = [half.astype(f"{order}u2").tobytes() for half in np.array_split(values, 2)]
    strips = [zlib.compress(strip) if compression == 8 else strip for strip in strips]
    height, width = values.shape[:2]
    start = 8 + sum(map(len, strips))  # of the directory, then three arrays
    after = start + 2 + 9 * 12 + 4
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, after), (259, 3, 1, compression), (262, 3, 1, 2),
               (273, 4, 2, after + 6), (277, 3, 1, 3), (278, 3, 1, height // 2), (279, 4, 2, after + 14)]
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        short = kind == 3 and count == 1
        directory += struct.pack(f"{order}HHI", tag, kind, count)
        directory += struct.pack(f"{order}HH", value, 0) if short else struct.pack(f"{order}I", value)
    arrays = struct.pack(f"{order}3H", 16, 16, 16) + struct.pack(f"{order}2I", 8, 8 + len(strips[0]))
    arrays += struct.pack(f"{order}2I", *map(len, strips))
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}I", start) + b"".join(strips) + directory + bytes(4) + arrays


TWELVE = np.linspace(0, 4095, 320).round().astype(np.uint16)
DEEP = {
    "grey.png": png_16(TWELVE.reshape(16, 20), 0),
    "grey.tif": encoded(Image.fromarray(TWELVE.reshape(16, 20)), "TIFF"),
    "colour.png": png_16(np.stack([TWELVE.reshape(16, 20)] * 3, -1), 2),
    "alpha.png": png_16(np.stack([TWELVE.reshape(16, 20)] * 3 + [np.full((16, 20), 65535, np.uint16)], -1), 6),
    **{f"{order}{compression}.tif": tiff_16(np.stack([TWELVE.reshape(16, 20)] * 3, -1), compression, order)
       for order in "<>" for compression in (1, 8)},
}


@pytest.mark.parametrize("name", DEEP)
def test_12_bits_in_16_are_noticed_and_can_be_read(tmp_path, name):
    expected = np.rint(TWELVE / 4095 * 255).astype(np.uint8).reshape(16, 20)
    folder = write_folder(tmp_path / "x", {name: DEEP[name], f"1{name}": DEEP[name]})
    source = data.open_images(str(folder))
    assert np.array(source.read(0)).max() <= 16  # nearly black, as the file says
    assert "values up to 4095" in data.describe_source(source)[1]
    assert "pass --bit-depth 12" in data.describe_source(source)[1]
    source = data.open_images(str(folder), options=ImageOptions(bit_depth=12))
    assert np.array_equal(np.array(source.read(0)), expected[..., None].repeat(3, -1))
    assert len(data.describe_source(source)) == 1
    with pytest.raises(UnreadableImage, match=r"values in \[0, 4095\], expected \[0, 1023\]"):
        decode_image(DEEP[name], 3, ImageOptions(bit_depth=10))


def test_16_bits_in_16_stay_as_they_are(tmp_path):
    values = np.linspace(0, 65535, 320).round().astype(np.uint16).reshape(16, 20)
    folder = write_folder(tmp_path / "x", {"g.png": png_16(values, 0), "c.png": png_16(np.stack([values] * 3, -1), 2),
                                           "8.png": encoded(picture(0)), "broken.png": b"junk"})
    source = data.open_images(str(folder))
    assert data.describe_source(source) == ["4 images in one class"]
    assert np.array_equal(np.array(source.read(2)), (values >> 8).astype(np.uint8)[..., None].repeat(3, -1))
    dark = np.full((16, 20, 2), 200, np.uint16)
    with pytest.raises(UnreadableImage, match="--bit-depth below 16 is not possible"):
        decode_image(png_16(dark, 4), 3, ImageOptions(bit_depth=12))


def test_the_depth_is_another_experiment_and_kept_by_the_run(tmp_path):
    folder = write_folder(tmp_path / "x", {f"{i}.png": DEEP["grey.png"] for i in range(12)})
    words = QUICK | {"data_path": folder, "results_dir": tmp_path / "run", "bit_depth": 12}
    train_provq.main(to_words(words))
    assert np.array(open_run_split(tmp_path / "run").source.read(0)).max() == 255
    with pytest.raises(SystemExit, match="bit_depth: 12 there, 16 now"):
        train_provq.main(to_words(words | {"bit_depth": 16, "max_steps": 2}))


# ---------------------------------------------------------------------------------------------------------------------
# bombs, and noise


def test_a_deflated_member_is_not_inflated_beyond_the_limit(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(3 * 2**20))
        archive.writestr("small.png", encoded(picture(0)))
    source = data.open_images(str(tmp_path / "x.zip"), options=ImageOptions(max_image_mb=2))
    with pytest.raises(UnreadableImage, match=r"bomb\.png: 3 MiB, --max-image-mb allows 2"):
        source.read(0)
    source.read(1)


def test_files_and_members_beyond_the_limit_are_not_read(tmp_path):
    large = bytes(2**20 + 1)
    limited = ImageOptions(max_image_mb=1)
    for path in (write_folder(tmp_path / "x", {"0.png": large}), write_tar(tmp_path / "x.tar", {"0.png": large})):
        with pytest.raises(UnreadableImage, match=r"0\.png: 1 MiB, --max-image-mb allows 1"):
            data.open_images(str(path), options=limited).read(0)
    with open(tmp_path / "x" / "0.png", "wb") as file:
        file.truncate(2**42)  # of nothing
    with pytest.raises(UnreadableImage, match="4,194,304 MiB, --max-image-mb allows 512"):
        data.open_images(str(tmp_path / "x")).read(0)
    shard = write_tar(tmp_path / "y.tar", {"0.png": encoded(picture(0)), "0.json": b" " * (2**24 + 1)})
    with pytest.raises(ValueError, match="too many for a label"):
        data.open_images(str(shard))


@pytest.mark.filterwarnings("error")
def test_pixels_beyond_the_limit_are_not_decoded():
    bomb = encoded(Image.new("1", (20_000, 9_000)))
    with pytest.raises(UnreadableImage, match=r"20000x9000 pixels, --max-image-mb allows 178,956,970 of them"):
        decode_image(bomb, 1)
    small = encoded(Image.new("L", (700, 700)))
    with pytest.raises(UnreadableImage, match="700x700 pixels"):
        decode_image(small, 3, ImageOptions(max_image_mb=1))
    assert decode_image(encoded(Image.new("1", (13_000, 7_000))), 1).size == (13_000, 7_000)  # Pillow would warn


def test_braces_have_a_limit():
    for pattern in ("x{0..999999999}.tar", "{0..99999}{0,1}", "{a,b}" * 40, "{0..999999999999999999}"):
        with pytest.raises(ValueError, match="shards; at most 100,000 can be read"):
            expand_braces(pattern)
    assert len(expand_braces("{00000..99999}.tar")) == 100_000
    with pytest.raises(FileNotFoundError, match="1 of 1 shards do not exist"):
        data.open_images("/nowhere/{0.." + "9" * 5000 + "}.tar")


def test_libtiff_writes_nothing_to_the_terminal(tmp_path):
    rng = random.Random(0)
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits", "group4"):
        image = picture(0, 200, 200).convert("1" if compression == "group4" else "RGB")
        good = encoded(image, "TIFF", compression=compression)
        (tmp_path / f"{compression}_good.tif").write_bytes(good)
        for i in range(6):
            content = bytearray(good)
            for _ in range(20):
                content[rng.randrange(8, len(good))] = rng.randrange(256)
            (tmp_path / f"{compression}_{i}.tif").write_bytes(content)
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
            "from tokenizer.data import open_images, UnreadableImage\n"
            f"source = open_images({str(tmp_path)!r})\n"
            "for i in range(len(source)):\n"
            "    try:\n        source.read(i)\n        print(source.name(i))\n"
            "    except UnreadableImage as error:\n        assert str(error).startswith(source.name(i))\n"
            "print('mine', file=sys.stderr)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "mine\n"
    assert len([name for name in done.stdout.split() if name.endswith("_good.tif")]) == 5


def test_what_others_say_meanwhile_is_passed_on(capfd):
    with image_readers._libtiff_aside() as said:
        os.write(2, b"someone: else\nFax4Decode: Bad code word at line 1.\n_TIFFVSetField: tempfile.tif: Bad value.\n")
    assert capfd.readouterr().err == "someone: else\n"
    assert said == ["Fax4Decode: Bad code word at line 1.", "_TIFFVSetField: tempfile.tif: Bad value."]


def test_half_a_fax_is_no_picture():
    """libtiff fills the lines that it cannot decode, and reports success."""
    content = bytearray(encoded(picture(0, 200, 200).convert("1"), "TIFF", compression="group4"))
    content[6000:6040] = b"\xff" * 40
    with pytest.raises(UnreadableImage, match="Fax4Decode"):
        decode_image(bytes(content), 1)


# ---------------------------------------------------------------------------------------------------------------------
# lists of other programs


LISTS = {
    "header": ("path,label\na/z.png,1\nb/9.png,0\n", [1, 0]),
    "columns in another order": ("id,Label,File Name,split\n7,0,a/z.png,val\n8,1,b/9.png,train\n", [0, 1]),
    "quotes": ('"a/z.png","1"\n"b/9.png",0\n', [1, 0]),
    "quotes and header": ('"image","class"\r\n"a/z.png","1"\r\n"b/9.png","0"\r\n', [1, 0]),
    "class names": ("a/z.png,tabby cat\nb/9.png,dog\n", [1, 0]),
    "class names after tabs": ("a/z.png\ttabby, cat\nb/9.png\tdog\n", [1, 0]),
    "names in columns": ("filename;category\na/z.png;zebra\nb/9.png;ape\n", [1, 0]),
    "header alone": ("image\na/z.png\nb/9.png\n", [0, 0]),
    "backslashes": ("a\\z.png,1\n.\\b\\9.png,0\n", [1, 0]),
    "old Macintosh": ("a/z.png,1\rb/9.png,0\r", [1, 0]),
}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("suffix", ["csv", "txt"])
def test_lists_as_people_have_them(tree, kind, suffix):
    text, labels = LISTS[kind]
    (tree / f"list.{suffix}").write_bytes(text.encode("utf-8-sig"))
    source = data.open_images(str(tree / f"list.{suffix}"))
    assert list(source.names) == ["a/z.png", "b/9.png"]
    assert source.labels.tolist() == labels
    if "names" in kind:
        assert source.classes[1] in ("tabby cat", "tabby, cat", "zebra")


def test_quoted_commas(tree):
    (tree / "with, 1.png").write_bytes(TREE["a/z.png"])
    quoted = '"with, 1.png",1\na/z.png,0\n'
    for text in (quoted, quoted.replace('"', ""), f"file,label\n{quoted}"):
        (tree / "list.csv").write_text(text)
        source = data.open_images(str(tree / "list.csv"))
        assert (source.name(0), source.labels.tolist()) == ("with, 1.png", [1, 0])
    (tree / "list.csv").write_text("with, 1.png\na/z.png\n")
    assert data.open_images(str(tree / "list.csv")).labels.tolist() == [0, 0]


@pytest.mark.parametrize(("text", "said"), [
    ("a/z.png,1\nb/9.png,cat\n", r"line 2: the label 'cat' is no number, though others are, such as 1 in line 1"),
    ("a/z.png,cat\nb/9.png,\n", "line 2: no label"),
    ("path,label\na/z.png,1,2\n", "line 2: 3 columns, the first line names 2"),
    ("path,label\na/none.png,1\n", r"line 2: no file .*none\.png"),
    ("nothing,known\na/z.png,1\n", r"line 1: no file .*such as path,label"),
    ("path,label\n", "the list is empty"),
    ('"a/z.png,1\n', "line 1: no file"),
    ("a/z.png,1\n\0", "must be UTF-8 text"),
])
def test_mistakes_in_lists_are_named(tree, text, said):
    (tree / "list.csv").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        data.open_images(str(tree / "list.csv"))
    (tree / "list.csv").write_bytes("a/z.png,1\n".encode("utf-16"))
    with pytest.raises(ValueError, match="must be UTF-8 text"):
        data.open_images(str(tree / "list.csv"))


# ---------------------------------------------------------------------------------------------------------------------
# where reconstructions go


@pytest.fixture
def flat(tmp_path):
    return write_folder(tmp_path / "flat", {f"{i}.png": encoded(picture(i)) for i in range(6)})


def reconstructed(tokenizer, images, out, *more):
    reconstruct.main([str(tokenizer), str(images), "--out", str(out), "--device", "cpu", *more])
    return sorted(path.name for path in (out / "pictures").iterdir())


def test_reconstructions_do_not_go_among_images(tokenizer, flat, tmp_path):
    for out in (flat, tmp_path):
        with pytest.raises(SystemExit, match=f"--out {out} holds other files, such as .*; name a new folder"):
            reconstructed(tokenizer, flat, out)
    assert sorted(path.name for path in flat.iterdir()) == [f"{i}.png" for i in range(6)]


def test_a_rerun_leaves_no_old_pictures(tokenizer, flat, tmp_path):
    out = tmp_path / "out"
    assert len(reconstructed(tokenizer, flat, out)) == 6
    first = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    with pytest.raises(SystemExit, match=r"made otherwise .*images: 6 there, 3 now"):
        reconstructed(tokenizer, flat, out, "--max-images", "3")
    (flat / "2.png").write_bytes(b"junk")
    (out / "pictures" / "mine.png").write_bytes(b"precious")
    assert reconstructed(tokenizer, flat, out) == [*(f"{i:06d}_{i}.png" for i in (0, 1, 3, 4, 5)), "mine.png"]
    (flat / "2.png").write_bytes(encoded(picture(2)))
    reconstructed(tokenizer, flat, out)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == first


def test_an_export_may_lie_beside(tokenizer, flat, tmp_path):
    words = ["--export-hf", str(tmp_path / "both")]
    for _ in range(2):
        assert len(reconstructed(tokenizer, flat, tmp_path / "both", *words)) == 6
