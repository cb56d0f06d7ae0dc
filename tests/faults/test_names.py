"""Names of images that are no UTF-8, end a line, or look like the way such names are written."""

import json
import os
import shutil

import numpy as np
import pytest
from image_files import encoded, picture, write_folder, write_tar
from image_models import write_tokenizer
from training_runs import to_words

from autoregressive import extract_codes
from autoregressive.code_shards import open_codes
from scripts import make_imagenet100
from tokenizer import data, reconstruct, train_provq
from tokenizer.image_names import from_line, read_names, to_line, write_names
from tokenizer.image_readers import UnreadableImage
from tokenizer.runtime.checkpoint import load_file

LATIN = os.fsdecode(b"caf\xe9.png")
ODD = [LATIN, "two\nlines.png", "carriage\rreturn.png", "escape\x1b[31m.png", "\u2028.png", "tab\t1.png", " space.png",
       "\\back.png", "\\caf\\xe9.png", "in\\side.png", "next\x85line.png", "é.png"]
PLAIN = ["a/b.png", "with space, comma.png", "é/ü 1.png", "日本.png", 'quote".png', "in\\side.png", "#1.png",
         "{0..9}.png"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "vq")


@pytest.fixture
def pictures(tmp_path):
    return write_folder(tmp_path / "pictures", {name: encoded(picture(i)) for i, name in enumerate(ODD)})


def test_ordinary_names_are_written_as_ever(tmp_path):
    write_names(tmp_path / "names.txt", PLAIN)
    assert (tmp_path / "names.txt").read_bytes() == "".join(f"{name}\n" for name in PLAIN).encode()
    assert read_names(tmp_path / "names.txt") == PLAIN


def test_odd_names_come_back_from_one_line_each(tmp_path):
    write_names(tmp_path / "names.txt", ODD)
    text = (tmp_path / "names.txt").read_text(encoding="utf-8")
    assert len(text.splitlines()) == len(ODD)
    assert text.splitlines()[0] == r"\caf\xe9.png"
    assert read_names(tmp_path / "names.txt") == ODD
    for byte in range(1, 256):
        name = os.fsdecode(bytes([byte]) + b"x" + bytes([byte]))
        assert from_line(to_line(name)) == name
        assert to_line(name).isprintable()


@pytest.mark.parametrize("line", [r"\new.png", r"\data\1.png", r"\x4", "\\", r"\\server\x.png", r"\\", r"a\\b.png"])
def test_lines_of_older_files_are_names_themselves(line):
    """A name that began with a backslash was written as it is."""
    assert from_line(line) == line
    assert from_line(to_line(line)) == line


def test_extraction_keeps_them_and_recognises_its_folder(tokenizer, pictures, tmp_path, capsys):
    words = to_words({"vq_ckpt": tokenizer, "data_path": pictures, "code_path": tmp_path / "codes", "device": "cpu"})
    extract_codes.main(words)
    assert sorted(read_names(tmp_path / "codes" / "names.txt")) == sorted(ODD)
    assert len(open_codes(str(tmp_path / "codes"))) == len(ODD)
    before = (tmp_path / "codes" / "names.txt").read_bytes()
    capsys.readouterr()
    extract_codes.main(words)
    assert "is complete" in capsys.readouterr().out
    (tmp_path / "codes" / "names.txt").unlink()
    extract_codes.main(words)
    assert (tmp_path / "codes" / "names.txt").read_bytes() == before


def test_a_folder_from_before_is_complete(tokenizer, tmp_path, capsys):
    write_folder(tmp_path / "pictures", {name: encoded(picture(i)) for i, name in enumerate(["ü 1.png", "tab\t1.png"])})
    words = to_words({"vq_ckpt": tokenizer, "data_path": tmp_path / "pictures", "code_path": tmp_path / "codes",
                      "device": "cpu"})
    extract_codes.main(words)
    before = "tab\t1.png\nü 1.png\n".encode()
    (tmp_path / "codes" / "names.txt").write_bytes(before)
    capsys.readouterr()
    extract_codes.main(words)
    assert "is complete" in capsys.readouterr().out
    assert (tmp_path / "codes" / "names.txt").read_bytes() == before


def test_reconstruction_keeps_them(tokenizer, pictures, tmp_path):
    long = "l" * 251 + ".png"
    (pictures / long).write_bytes(encoded(picture(50)))
    reconstruct.main([str(tokenizer), str(pictures), "--out", str(tmp_path / "out"), "--device", "cpu"])
    assert sorted(read_names(tmp_path / "out" / "names.txt")) == sorted([*ODD, long])
    written = [path.name for path in (tmp_path / "out" / "pictures").iterdir()]
    assert len(written) == len(ODD) + 1
    assert all(name.isprintable() for name in written)
    assert np.load(tmp_path / "out" / "codes.npy").shape == (len(ODD) + 1, 4, 4)


@pytest.mark.parametrize("command", ["extract", "reconstruct"])
def test_an_unreadable_one_is_named_in_a_line(tokenizer, pictures, tmp_path, capsys, command):
    for name in (LATIN, "two\nlines.png"):
        (pictures / name).write_bytes(b"junk")
    words = ["--device", "cpu"]
    main = {"extract": extract_codes.main, "reconstruct": reconstruct.main}[command]
    words += (["--vq-ckpt", str(tokenizer), "--data-path", str(pictures), "--code-path", str(tmp_path / "out")]
              if command == "extract" else [str(tokenizer), str(pictures), "--out", str(tmp_path / "out")])
    main(words)
    out = capsys.readouterr().out.splitlines()
    assert r"left out an image that cannot be read: \caf\xe9.png" in out
    assert r"left out an image that cannot be read: \two\x0alines.png" in out
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(SystemExit, match=r"\\caf\\xe9\.png") as stopped:
        main([*words, "--max-bad-images", "1"])
    assert "\n" not in str(stopped.value)
    str(stopped.value).encode()


def test_training_counts_and_resumes_them(tmp_path, capsys):
    files = {f"{i:02d}.png": encoded(picture(i)) for i in range(24)}
    folder = write_folder(tmp_path / "pictures", files | {LATIN: b"junk", "two\nlines.png": b"junk"})
    words = {"preset": "cifar10", "image_size": 16, "codebook_size": 16, "global_batch_size": 8, "warmup_steps": 0,
             "transition_steps": 0, "val_size": 2, "ckpt_every": 4, "device": "cpu", "data_path": folder,
             "results_dir": tmp_path / "run"}
    train_provq.main(to_words(words | {"max_steps": 4}))
    assert r"skipped an image that cannot be read: \two\x0alines.png" in capsys.readouterr().err
    train_provq.main(to_words(words | {"max_steps": 6}))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["unreadable_images"] == 2
    assert set(load_file(tmp_path / "run" / "checkpoints" / "0000006.pt")["unreadable"]) == {LATIN, "two\nlines.png"}


def test_readers_name_them_in_one_line(tmp_path):
    source = data.open_images(str(write_tar(tmp_path / "x.tar", {"two\nlines.png": b"junk", LATIN: b"junk"})))
    assert sorted(source.names) == sorted([LATIN, "two\nlines.png"])
    for i in range(2):
        with pytest.raises(UnreadableImage) as caught:
            source.read(i)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("suffix", ["txt", "csv"])
def test_lists_name_them(pictures, suffix):
    """As to_line writes them, and where a line can hold them also as they are."""
    path = pictures / f"list.{suffix}"
    path.write_text("".join(f"{to_line(name)}\t{i}\n" for i, name in enumerate(ODD)))
    source = data.open_images(str(path))
    assert list(source.names) == ODD
    assert source.labels.tolist() == list(range(len(ODD)))
    path.write_bytes(b"caf\xe9.png\t1\n\\back.png\t0\n")
    assert list(data.open_images(str(path)).names) == [LATIN, "\\back.png"]


def test_imagenet100_lists_them(tmp_path):
    for part in ("train", "val"):
        for name in ("n01", "n02"):
            write_folder(tmp_path / part / name, {odd: encoded(picture(i)) for i, odd in enumerate(ODD)})
            os.mkfifo(tmp_path / part / name / "pipe.png")
    (tmp_path / "classes").write_text("n01\nn02\n")
    make_imagenet100.main(["--imagenet", str(tmp_path), "--classes", str(tmp_path / "classes"), "--out",
                           str(tmp_path / "lists"), "--test-images", "4"])
    source = data.open_images(str(tmp_path / "lists" / "test.txt"))
    assert len(source) == 4 + 2 * len(ODD)
    assert source.classes == ["0", "1"]
    assert {os.path.basename(name) for name in source.names} <= {*ODD}
