"""Reconstruction and conversion from the command line, on a tokenizer trained in a few steps."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from digit_runs import train_on_digits, write_digits
from PIL import Image

from tokenizer import reconstruct, train_provq
from tokenizer.pretrained import load_tokenizer, to_llamagen_state_dict

COUNT = 20


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder with a codebook, and a folder of pictures."""
    base = tmp_path_factory.mktemp("reconstruct")
    train_on_digits(base / "run", "--codebook-size", "300", "--ema", "--ema-decay", "0.5")
    write_digits(base / "pictures", COUNT, (20, 18))
    return base


def test_writes_pictures_codes_and_metrics(trained, tmp_path):
    reconstruct.main([str(trained / "run"), str(trained / "pictures"), "--out", str(tmp_path), "--max-pictures", "3"])
    codes = np.load(tmp_path / "codes.npy")
    assert codes.shape == (COUNT, 4, 4)
    assert codes.dtype == np.uint16
    assert [Image.open(p).size for p in sorted((tmp_path / "pictures").iterdir())] == [(32, 16)] * 3
    assert (tmp_path / "names.txt").read_text().splitlines()[0].endswith("000.png")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["images"] == COUNT
    assert metrics["usage"] == pytest.approx(len(np.unique(codes)) / 300)
    model = load_tokenizer(trained / "run")
    decoded = model.decode_code(torch.from_numpy(codes[:1].astype(np.int64)))
    written = np.asarray(Image.open(tmp_path / "pictures" / "000000_000.png").convert("L"))[:, 16:]
    expected = ((decoded[0, 0] + 1) / 2 * 255 + 0.5).clamp(0, 255).to(torch.uint8).numpy()
    np.testing.assert_array_equal(written, expected)


def test_unreadable_images_are_left_out_of_everything(trained, tmp_path, capsys):
    shutil.copytree(trained / "pictures", tmp_path / "some")
    (tmp_path / "some" / "001.png").write_bytes(b"junk")
    for images, out in ((trained / "pictures", "all"), (tmp_path / "some", "rest")):
        reconstruct.main([str(trained / "run"), str(images), "--out", str(tmp_path / out)])
    assert "left out an image that cannot be read: 001.png" in capsys.readouterr().out
    whole = np.load(tmp_path / "all" / "codes.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "rest" / "codes.npy"), np.delete(whole, 1, axis=0))
    assert "001.png" not in (tmp_path / "rest" / "names.txt").read_text()
    assert json.loads((tmp_path / "rest" / "metrics.json").read_text())["images"] == COUNT - 1


def test_a_single_image(trained, tmp_path, monkeypatch):
    reconstruct.main([str(trained / "run"), str(trained / "pictures"), "--out", str(tmp_path / "all")])
    monkeypatch.chdir(trained / "pictures")
    for i, image in enumerate((trained / "pictures" / "003.png", "003.png")):
        reconstruct.main([str(trained / "run"), str(image), "--out", str(tmp_path / f"{i}")])
        codes = np.load(tmp_path / f"{i}" / "codes.npy")
        np.testing.assert_array_equal(codes, np.load(tmp_path / "all/codes.npy")[3:4])
        assert (tmp_path / f"{i}" / "names.txt").read_text() == "003.png\n"
        assert len(list((tmp_path / f"{i}" / "pictures").iterdir())) == 1
    (tmp_path / "bad.png").write_bytes(b"junk")
    (tmp_path / "text.doc").write_text("no image")
    for name, said in (("bad.png", "cannot be read, from bad.png"), ("text.doc", "the extension .doc is not known")):
        with pytest.raises(SystemExit, match=said):
            reconstruct.main([str(trained / "run"), str(tmp_path / name), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_batch_size_changes_nothing(trained, tmp_path):
    for size in ("1", "7"):
        reconstruct.main([str(trained / "run"), str(trained / "pictures"), "--out", str(tmp_path / size),
                          "--batch-size", size])
    one, seven = (json.loads((tmp_path / size / "metrics.json").read_text()) for size in ("1", "7"))
    np.testing.assert_array_equal(np.load(tmp_path / "1/codes.npy"), np.load(tmp_path / "7/codes.npy"))
    assert one == pytest.approx(seven, rel=1e-5)


def test_exports_reconstruct_alike(trained, tmp_path):
    reconstruct.main([str(trained / "run"), "--export-hf", str(tmp_path / "hf"),
                      "--export-llamagen", str(tmp_path / "vq.pt")])
    llamagen = torch.load(tmp_path / "vq.pt", weights_only=True)["model"]
    assert llamagen["quantize.codebook_used"].shape == (65536,)
    for name, path in (("run", trained / "run"), ("hf", tmp_path / "hf"), ("pt", tmp_path / "vq.pt")):
        words = ["--no-codebook-l2-norm"] if name == "pt" else []
        words += ["--out", str(tmp_path / name), "--image-size", "16"]
        reconstruct.main([str(path), str(trained / "pictures"), *words])
    metrics = [(tmp_path / name / "metrics.json").read_text() for name in ("run", "hf", "pt")]
    assert metrics[0] == metrics[1] == metrics[2]


def test_llamagen_files_with_their_pickled_namespace_load(trained, tmp_path):
    state = to_llamagen_state_dict(load_tokenizer(trained / "run"))
    torch.save({"model": state, "args": argparse.Namespace(lr=1.0), "steps": 5}, tmp_path / "old.pt")
    reconstruct.main([str(tmp_path / "old.pt"), str(trained / "pictures"), "--out", str(tmp_path / "out"),
                      "--image-size", "16"])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["images"] == COUNT


@pytest.mark.parametrize(("words", "said"), [
    (["{run}"], "nothing to do"),
    (["{run}", "{pictures}", "--image-size", "18"], "--image-size 18 must be a multiple of 4"),
    (["{run}", "/no/such/images"], "/no/such/images"),
    (["/no/such/ckpt", "{pictures}"], "/no/such/ckpt"),
    (["{garbage}", "{pictures}"], "garbage.pt"),
    (["{run}", "{pictures}", "--batch-size", "0"], "--batch-size is 0"),
    (["{run}", "--export-hf", "{run}"], "name a new folder for the export"),
    (["{run}", "{pictures}", "--export-hf", "{run}"], "name a new folder for the export"),
    (["{run}", "{pictures}", "--max-images", "0"], "--max-images is 0"),
])
def test_mistakes_are_named(trained, tmp_path, capsys, words, said):
    (tmp_path / "garbage.pt").write_bytes(b"\0" * 1000)
    before = (trained / "run" / "config.json").read_bytes()
    places = {"run": trained / "run", "pictures": trained / "pictures", "garbage": tmp_path / "garbage.pt"}
    with pytest.raises(SystemExit) as stopped:
        reconstruct.main([word.format(**places) for word in words] + ["--out", str(tmp_path / "out")])
    assert said in f"{stopped.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()
    assert (trained / "run" / "config.json").read_bytes() == before
    assert not (trained / "run" / "model.safetensors").exists()


def test_the_output_folder_is_tried_first(trained, tmp_path, monkeypatch):
    words = [str(trained / "run"), str(trained / "pictures"), "--out"]
    reconstruct.main([*words, str(tmp_path / "new" / "er"), "--max-pictures", "0"])
    assert np.load(tmp_path / "new" / "er" / "codes.npy").shape == (COUNT, 4, 4)
    monkeypatch.setattr(reconstruct.pretrained, "load_tokenizer", None)  # not reached
    (tmp_path / "file").write_text("")
    for out in ("/proc/nope", tmp_path / "file" / "x", tmp_path / "file"):
        with pytest.raises(SystemExit, match=f"--out {out}: no files can be written there"):
            reconstruct.main([*words, str(out)])


def test_a_tokenizer_in_its_warmup_is_refused(trained, tmp_path):
    words = ["--image-size", "16", "--codebook-size", "16", "--global-batch-size", "16", "--val-size", "16"]
    words += ["--max-steps", "1", "--stop-after", "warmup", "--device", "cpu"]
    train_provq.main([*words, "--results-dir", str(tmp_path / "early")])
    with pytest.raises(SystemExit, match="warm-up"):
        reconstruct.main([str(tmp_path / "early"), str(trained / "pictures"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("words", [[], ["--max-images", "2"]])
def test_no_readable_image_is_an_error(trained, tmp_path, words):
    (tmp_path / "junk").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "junk" / name).write_bytes(b"junk")
    Image.new("L", (16, 16)).save(tmp_path / "junk" / "c.png")
    if not words:
        (tmp_path / "junk" / "c.png").unlink()
    with pytest.raises(SystemExit, match=r"can(not)? be read"):
        reconstruct.main([str(trained / "run"), str(tmp_path / "junk"), "--out", str(tmp_path / "out"), *words])
    assert not (tmp_path / "out").exists()
