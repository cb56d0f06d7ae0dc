"""The ImageNet-100 split on a miniature ImageNet."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from places import ROOT

from scripts import make_imagenet100
from tokenizer.image_sources import open_images

CLASSES = ["n03", "n01", "n02"]


@pytest.fixture
def imagenet(tmp_path):
    """Four classes, one of them not on the list; 6 training and 2 validation images each."""
    for split, count in (("train", 6), ("val", 2)):
        for wnid in (*CLASSES, "n00"):
            folder = tmp_path / "imagenet" / split / wnid
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((8, 8, 3), i, dtype=np.uint8)).save(folder / f"{wnid}_{split}_{i}.JPEG")
    (tmp_path / "classes.txt").write_text("# a list\n" + "".join(f"{name} some words\n" for name in CLASSES))
    return tmp_path


def make(folder, *flags, out="lists"):
    make_imagenet100.main(["--imagenet", str(folder / "imagenet"), "--classes", str(folder / "classes.txt"),
                           "--out", str(folder / out), "--test-images", "6", *flags])
    return {name: open_images(str(folder / out / f"{name}.txt")) for name in ("train", "val", "test")}


def names(source):
    return {Path(source.name(i)).name for i in range(len(source))}


def test_split_is_disjoint_balanced_and_readable(imagenet):
    lists = make(imagenet)
    assert [len(lists[name]) for name in ("train", "val", "test")] == [12, 6, 12]
    assert names(lists["train"]).isdisjoint(names(lists["test"]))
    assert names(lists["val"]) < names(lists["test"])
    held_out = [label for i, label in enumerate(lists["test"].labels) if "train" in lists["test"].name(i)]
    assert np.bincount(held_out).tolist() == [2, 2, 2]
    for source in lists.values():
        assert source.read(0).size == (8, 8)
        for i in range(len(source)):  # labels count the sorted ids, as ImageFolder's
            assert sorted(CLASSES)[source.label(i)] in source.name(i)
    protocol = json.loads((imagenet / "lists" / "protocol.json").read_text())
    assert protocol["images"] == {"train": 12, "val": 6, "test": 12}


def test_split_depends_on_the_seed_and_on_nothing_else_in_the_folder(imagenet):
    first = names(make(imagenet)["test"])
    assert names(make(imagenet, out="again")["test"]) == first
    assert names(make(imagenet, "--seed", "1", out="other")["test"]) != first
    assert names(make(imagenet, "--keep-in-train", out="all")["train"]) > first - names(make(imagenet)["val"])
    # A new image may displace a chosen one, but never two others.
    Image.new("RGB", (8, 8)).save(imagenet / "imagenet" / "train" / "n01" / "n01_train_9.JPEG")
    assert len(first - names(make(imagenet, out="more")["test"])) <= 1


def test_lists_below_a_link_lead_to_the_images(imagenet):
    (imagenet / "deep" / "er").mkdir(parents=True)
    (imagenet / "link").symlink_to(imagenet / "deep" / "er")
    (imagenet / "imagenet" / "train" / "n01" / "._n01_train_0.JPEG").write_bytes(b"a Mac's")
    source = make(imagenet, out="link/lists")["train"]
    assert len(source) == 12
    assert source.read(0).size == (8, 8)


@pytest.mark.parametrize("out", ["file", "file/lists"])
def test_an_impossible_output_is_named(imagenet, out):
    (imagenet / "file").write_text("precious")
    with pytest.raises(SystemExit, match=r"--out .*file"):
        make(imagenet, out=out)
    assert (imagenet / "file").read_text() == "precious"


@pytest.mark.parametrize(("change", "message"), [
    (lambda p: (p / "classes.txt").write_text("n01\nn01\n"), "n01 occurs twice"),
    (lambda p: (p / "classes.txt").write_text("\n"), "no class in it"),
    (lambda p: (p / "classes.txt").write_text("n01\nn99\nn02\n"), "no folder in .*such as n99"),
    (lambda p: (p / "classes.txt").write_text("n01\n../n02\nn03\n"), "no folder name"),
    (lambda p: (p / "classes.txt").write_text("n01\nn02\nn03\nn00\n"), "multiple of the 4 classes"),
    (lambda p: [f.unlink() for f in (p / "imagenet" / "train" / "n02").glob("*_[1-5].JPEG")], "but n02 has 1 images"),
    (lambda p: [f.unlink() for f in (p / "imagenet" / "val" / "n02").iterdir()], "no images in .*n02"),
    (lambda p: (p / "classes.txt").unlink(), "classes.txt"),
])
def test_bad_input_is_named(imagenet, change, message):
    change(imagenet)
    with pytest.raises(SystemExit, match=message):
        make(imagenet)
    assert not (imagenet / "lists").exists()


def test_launcher_runs_from_anywhere(imagenet):
    command = ["bash", str(ROOT / "scripts" / "make_imagenet100.sh"), "--imagenet", "imagenet", "--classes",
               "classes.txt", "--out", "lists", "--test-images", "3"]
    run = subprocess.run(command, cwd=imagenet, env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
                         capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "test.txt 9 images" in run.stdout
