"""Classes that a model would be sampled for and has never seen, and what else decides the class of an image."""

import json
import shutil

import numpy as np
import pytest
from image_files import encoded, picture, write_folder, write_tar
from image_models import CODES, write_gpt, write_tokenizer
from places import CASES, needs_cases
from training_runs import to_words

from autoregressive import convert_codes, extract_codes, sample_c2i, train_c2i
from autoregressive.code_shards import open_codes
from autoregressive.pretrained import load_gpt
from evaluations import train_extractor
from tokenizer import data, train_provq
from tokenizer.image_readers import ImageOptions
from tokenizer.runtime.checkpoint import load_file


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "vq")


def write_list(folder, labels):
    """A list of one picture per label."""
    write_folder(folder, {f"{i:02d}.png": encoded(picture(i)) for i in range(len(labels))})
    (folder / "list.txt").write_text("".join(f"{i:02d}.png\t{label}\n" for i, label in enumerate(labels)))
    return folder / "list.txt"


def extract(tokenizer, images, out, *more):
    extract_codes.main(["--vq-ckpt", str(tokenizer), "--data-path", str(images), "--code-path", str(out), "--device",
                        "cpu", *more])
    return out


# ---------------------------------------------------------------------------------------------------------------------
# what a source says of its classes


def test_folders_say_how_many_images_a_class_has(tmp_path):
    files = {f"{name}/{i}.png": encoded(picture(i)) for name, count in (("cat", 3), ("dog", 2)) for i in range(count)}
    source = data.open_images(str(write_folder(tmp_path / "x", files)))
    assert data.describe_source(source) == ["5 images in 2 classes: cat 3, dog 2"]
    many = {f"{c:02d}/{i}.png": encoded(picture(i)) for c in range(30) for i in range(1 + (c == 7))}
    source = data.open_images(str(write_folder(tmp_path / "y", many)))
    assert data.describe_source(source) == ["31 images in 30 classes, 1 (00) to 2 (07) in each"]


def test_labels_with_gaps_are_named(tmp_path):
    source = data.open_images(str(write_list(tmp_path / "x", [1, 2, 3])))
    assert data.describe_source(source) == ["3 images in 3 classes: 1 1, 2 1, 3 1; no images in 1 of 4 classes (0)"]
    remapped = data.open_images(str(tmp_path / "x" / "list.txt"), options=ImageOptions(remap_labels=True))
    assert (remapped.labels.tolist(), remapped.classes) == ([0, 1, 2], ["1", "2", "3"])
    image = encoded(picture(0))
    shard = write_tar(tmp_path / "s.tar", {"a.png": image, "a.cls": b"0", "b.png": image, "b.cls": b"999999"})
    source = data.open_images(str(shard))
    assert "no images in 999,998 of 1,000,000 classes (1, 2, 3, 4, 5, ...)" in data.describe_source(source)[0]
    remapped = data.open_images(str(shard), options=ImageOptions(remap_labels=True))
    assert (remapped.labels.tolist(), remapped.classes) == ([0, 1], ["0", "999999"])


def test_training_a_tokenizer_says_it_and_goes_on(tmp_path, capsys):
    words = {"preset": "cifar10", "image_size": 16, "codebook_size": 4, "global_batch_size": 2, "warmup_steps": 0,
             "transition_steps": 0, "max_steps": 1, "val_size": 1, "device": "cpu",
             "data_path": write_list(tmp_path / "x", [1, 2, 3] * 4), "results_dir": tmp_path / "run"}
    train_provq.main(to_words(words | {"dry_run": True}))
    said = capsys.readouterr()
    json.loads(said.out)
    assert "training images: 12 images in 3 classes: 1 4, 2 4, 3 4; no images in 1 of 4 classes (0)" in said.err
    train_provq.main(to_words(words))
    assert "training images: 12 images in 3 classes" in capsys.readouterr().out


@pytest.mark.parametrize("labels", [[1, 2, 3], [0, 999999]])
def test_codes_of_classes_without_images_are_refused(tokenizer, tmp_path, labels):
    images = write_list(tmp_path / "x", labels)
    with pytest.raises(SystemExit, match=r"no images in .* classes .*--remap-labels"):
        extract(tokenizer, images, tmp_path / "codes")
    assert not (tmp_path / "codes").exists()
    codes = open_codes(str(extract(tokenizer, images, tmp_path / "codes", "--remap-labels")))
    assert (codes.num_classes, codes.labels.tolist()) == (len(labels), list(range(len(labels))))


def test_an_extraction_from_before_is_still_complete(tokenizer, tmp_path, capsys, monkeypatch):
    images = write_list(tmp_path / "x", [1, 2, 3])
    with monkeypatch.context() as patch:
        patch.setattr(extract_codes, "require_no_empty_class", lambda *_: None)
        extract(tokenizer, images, tmp_path / "codes")
    extract(tokenizer, images, tmp_path / "codes")
    assert "is complete" in capsys.readouterr().out


def test_a_classifier_is_not_trained_on_classes_without_images(tmp_path):
    images = write_list(tmp_path / "x", [1, 2] * 8)
    words = ["--data-path", str(images), "--out", str(tmp_path / "features.pt"), "--max-steps", "1", "--device", "cpu"]
    with pytest.raises(SystemExit, match=r"no images in 1 of 3 classes \(0\).*--remap-labels"):
        train_extractor.main(words)
    train_extractor.main([*words, "--remap-labels"])


def test_folders_without_images(tokenizer, tmp_path):
    tree = write_folder(tmp_path / "x", {f"{name}/{i}.png": encoded(picture(i)) for name in "ac" for i in range(2)})
    for name in ("lost+found", ".hidden", "System Volume Information"):
        (tree / name).mkdir()
    assert data.open_images(str(tree)).classes == ["a", "c"]
    (tree / "b").mkdir()
    with pytest.raises(ValueError, match="no images in the class folder 'b'"):
        data.open_images(str(tree))
    with pytest.raises(SystemExit, match="no images in the class folder 'b'"):
        extract(tokenizer, tree, tmp_path / "codes")
    assert open_codes(str(extract(tokenizer, tree, tmp_path / "codes", "--remap-labels"))).num_classes == 2


def test_an_empty_folder_of_an_archive_is_named(tmp_path):
    tree = write_folder(tmp_path / "x", {f"{name}/{i}.png": encoded(picture(i)) for name in "ac" for i in range(2)})
    (tree / "b").mkdir()
    for kind in ("tar", "zip"):
        source = data.open_images(shutil.make_archive(str(tmp_path / "made"), kind, tmp_path, "x"))
        assert source.classes == ["a", "c"]
        assert source.notes == ["folders without images are no classes: b"]


# ---------------------------------------------------------------------------------------------------------------------
# samples of several images


@needs_cases
def test_a_sample_with_several_images_is_refused_or_chosen_from():
    path = str(CASES / "images" / "multi.tar")
    with pytest.raises(ValueError, match=r"0\.input\.jpg, 0\.target\.jpg.*--image-key input\.jpg"):
        data.open_images(path)
    source = data.open_images(path, options=ImageOptions(image_key="target.jpg"))
    assert list(source.names) == [f"multi.tar/{i}.target.jpg" for i in range(6)]
    assert source.labels.tolist() == [1] * 6
    with pytest.raises(ValueError, match=r"0\.input\.jpg has no mask\.png; --image-key must name what all samples"):
        data.open_images(path, options=ImageOptions(image_key="mask.png"))


def test_which_image_of_a_sample(tmp_path):
    image, other = encoded(picture(0)), encoded(picture(1))
    plain = {"0.jpg": image, "0.seg.png": other, "0.cls": b"0"}  # jpg is the image, whatever has more in its name
    assert list(data.open_images(str(write_tar(tmp_path / "a.tar", plain))).names) == ["a.tar/0.jpg"]
    for files, said in (
        ({"0.jpg": image, "0.png": other, "0.cls": b"0"}, r"2 images in one sample \(0\.jpg, 0\.png\)"),
        ({"0.jpg": image, "0.cls": b"0", "1.seg.png": other, "1.cls": b"0"}, r"1\.seg\.png is the only image of its"),
    ):
        with pytest.raises(ValueError, match=said):
            data.open_images(str(write_tar(tmp_path / "b.tar", files)))
    one = {f"{i}.v2.png": image for i in range(2)} | {f"{i}.cls": b"%d" % i for i in range(2)}
    source = data.open_images(str(write_tar(tmp_path / "c.tar", one)))
    assert (list(source.names), source.labels.tolist()) == (["c.tar/0.v2.png", "c.tar/1.v2.png"], [0, 1])
    pairs = {"0.in.png": image, "0.out.png": other}  # without labels it may be a folder of pictures as well
    assert len(data.open_images(str(write_tar(tmp_path / "d.tar", pairs)))) == 2
    chosen = data.open_images(str(tmp_path / "d.tar"), options=ImageOptions(image_key="OUT.png"))
    assert np.array_equal(np.array(chosen.read(0)), np.array(picture(1)))


def test_a_choice_that_means_nothing_is_said(tmp_path):
    folder = write_folder(tmp_path / "x", {"0.png": encoded(picture(0)), "0.cls": b"3"})
    source = data.open_images(str(folder), options=ImageOptions(image_key="jpg"))
    assert "1 .cls files are not read" in source.notes[0]
    assert "--image-key jpg is about WebDataset shards" in source.notes[1]


@pytest.mark.parametrize(("options", "said"), [
    ({"image_key": "cls"}, "--image-key cls"), ({"image_key": ""}, "--image-key"),
    ({"bit_depth": 7}, "--bit-depth is 7"), ({"bit_depth": 17}, "--bit-depth is 17"),
    ({"max_image_mb": 0}, "--max-image-mb is 0"),
])
def test_flags_out_of_range_are_named(tokenizer, tmp_path, capsys, options, said):
    with pytest.raises(ValueError, match=said):
        ImageOptions(**options)
    with pytest.raises(SystemExit) as stopped:
        train_provq.main(to_words({"results_dir": tmp_path / "run", "data_path": tmp_path, "device": "cpu"} | options))
    assert said in f"{stopped.value} {capsys.readouterr().err}"
    with pytest.raises(SystemExit) as stopped:
        extract(tokenizer, "digits", tmp_path / "codes", *to_words(options))
    assert said in f"{stopped.value} {capsys.readouterr().err}"
    assert not any((tmp_path / name).exists() for name in ("run", "codes"))


def test_the_choice_of_a_run_is_its_evaluations(tmp_path):
    image = encoded(picture(0))
    files = {f"{i}.{kind}.png": image for i in range(20) for kind in ("in", "out")}
    shard = write_tar(tmp_path / "s.tar", files | {f"{i}.cls": b"0" for i in range(20)})
    words = {"preset": "cifar10", "image_size": 16, "codebook_size": 4, "global_batch_size": 2, "warmup_steps": 0,
             "transition_steps": 0, "max_steps": 1, "val_size": 1, "device": "cpu",
             "data_path": shard, "results_dir": tmp_path / "run"}
    with pytest.raises(SystemExit, match=r"--data-path: .*--image-key in\.png"):
        train_provq.main(to_words(words))
    train_provq.main(to_words(words | {"image_key": "out.png"}))
    extract_codes.main(["--vq-ckpt", str(tmp_path / "run"), "--device", "cpu"])
    assert (tmp_path / "run" / "codes" / "names.txt").read_text().startswith("s.tar/0.out.png\n")


# ---------------------------------------------------------------------------------------------------------------------
# a GPT and its classes


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    """A GPT's run on codes with labels 1 and 3 of 4: LlamaGen's layout, which extract_codes.py has not checked."""
    base = tmp_path_factory.mktemp("gpt")
    extract(tokenizer, write_list(base / "x", [0, 1] * 20), base / "codes")
    convert_codes.main([str(base / "codes"), str(base / "theirs"), "--to-llamagen", "x16"])
    for path in (base / "theirs" / "x16_labels").iterdir():
        np.save(path, np.load(path) * 2 + 1)
    train_c2i.main(to_words({
        "code_path": base / "theirs", "codebook_size": CODES, "gpt_model": "GPT-tiny", "max_steps": 2, "val_size": 2,
        "global_batch_size": 4, "mixed_precision": "none", "device": "cpu", "--no-compile": True,
        "results_dir": base / "run", "vq_ckpt": tokenizer, "class_dropout_prob": 0,
    }))
    return base / "run"


def test_a_run_records_the_classes_that_it_trained(trained, tmp_path):
    assert load_file(trained / "checkpoints" / "0000002.pt")["trained_classes"] == [1, 3]
    loaded = load_gpt(trained)
    assert loaded.trained_classes == [1, 3]
    sample_c2i.main(["--gpt-ckpt", str(trained), "--device", "cpu", "--export-hf", str(tmp_path / "hf")])
    assert load_gpt(tmp_path / "hf").trained_classes == [1, 3]


def test_the_trainer_says_what_it_trains(tokenizer, trained, tmp_path, capsys):
    words = to_words({"code_path": trained.parent / "theirs", "codebook_size": CODES, "gpt_model": "GPT-tiny",
                      "max_steps": 2, "global_batch_size": 4, "device": "cpu", "results_dir": tmp_path / "run",
                      "vq_ckpt": tokenizer, "class_dropout_prob": 0, "dry_run": True})
    train_c2i.main(words)
    said = capsys.readouterr()
    json.loads(said.out)
    assert "no images in 2 of 4 classes (0, 2)" in said.err
    assert "pictures are drawn as with --sample-cfg-scale 1" in said.err


def sample(trained, tokenizer, out, *more):
    sample_c2i.main(["--gpt-ckpt", str(trained), "--vq-ckpt", str(tokenizer), "--num-samples", "6", "--device", "cpu",
                     "--batch-size", "4", "--out", str(out), "--cfg-scale", "1", *more])
    return out


def test_only_trained_classes_are_sampled(trained, tokenizer, tmp_path):
    out = sample(trained, tokenizer, tmp_path / "out")
    assert np.load(out / "labels.npy").tolist() == [1, 3] * 3
    with pytest.raises(SystemExit, match=r"--classes 0,1: .* had no training image of class 0; .* 2 of 4"):
        sample(trained, tokenizer, tmp_path / "no", "--classes", "0,1")
    assert not (tmp_path / "no").exists()


def test_models_from_before_sample_all_classes(tokenizer, tmp_path):
    write_gpt(tmp_path / "gpt", tokenizer)
    description = json.loads((tmp_path / "gpt" / "config.json").read_text())
    assert description.pop("trained_classes") is None
    (tmp_path / "gpt" / "config.json").write_text(json.dumps(description))
    assert np.load(sample(tmp_path / "gpt", tokenizer, tmp_path / "out") / "labels.npy").tolist() == [0, 1, 2, 3, 4, 0]
    for wrong in ([], [5], ["1"], 3):
        (tmp_path / "gpt" / "config.json").write_text(json.dumps(description | {"trained_classes": wrong}))
        with pytest.raises(ValueError, match="trained_classes must be numbers from 0 to 4"):
            load_gpt(tmp_path / "gpt")


def test_guidance_needs_a_class_none_that_was_trained(trained, tokenizer, tmp_path):
    for more in (["--cfg-scale", "3"], ["--cfg-scale", "1.5", "--cfg-schedule", "linear"]):
        with pytest.raises(SystemExit, match=r"--cfg-scale (3|1\.5): .*--class-dropout-prob 0.*pass --cfg-scale 1"):
            sample(trained, tokenizer, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("classes", ["²", "٣", "1,", "-1", "1;2", "9" * 5000])
def test_numbers_of_classes_are_plain(tokenizer, tmp_path, classes):
    write_gpt(tmp_path / "gpt", tokenizer)
    with pytest.raises(SystemExit, match=r"--classes .*: give numbers from 0 to 4, comma-separated"):
        sample(tmp_path / "gpt", tokenizer, tmp_path / "out", f"--classes={classes}")


def test_no_classes_are_named(tokenizer, tmp_path, capsys):
    with pytest.raises(SystemExit):
        sample(write_gpt(tmp_path / "gpt", tokenizer), tokenizer, tmp_path / "out", "--classes=")
    assert "--classes: the text is empty" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_samples_grows(tokenizer, tmp_path):
    gpt = write_gpt(tmp_path / "gpt", tokenizer)
    straight = sample(gpt, tokenizer, tmp_path / "straight", "--num-samples", "10")
    out = sample(gpt, tokenizer, tmp_path / "out")
    first = {path.name: path.read_bytes() for path in (out / "images").iterdir()}
    assert len(first) == 6
    sample(gpt, tokenizer, out, "--num-samples", "10")
    pictures = {path.name: path.read_bytes() for path in (out / "images").iterdir()}
    assert pictures == {path.name: path.read_bytes() for path in (straight / "images").iterdir()}
    assert first.items() <= pictures.items()
    with np.load(out / "samples.npz") as one, np.load(straight / "samples.npz") as other:
        assert np.array_equal(one["arr_0"], other["arr_0"])
        assert len(one["arr_0"]) == 10
    assert json.loads((out / "settings.json").read_text()) == json.loads((straight / "settings.json").read_text())
    with pytest.raises(SystemExit, match="num_samples: 10 there, 6 now"):
        sample(gpt, tokenizer, out)
    with pytest.raises(SystemExit, match="temperature"):
        sample(gpt, tokenizer, out, "--num-samples", "12", "--temperature", "0.5")


def test_files_that_are_no_numbers_are_no_codes(trained, tmp_path):
    theirs = shutil.copytree(trained.parent / "theirs", tmp_path / "theirs")
    (theirs / "x16_codes" / "².npy").write_bytes(b"")
    assert len(open_codes(str(theirs), CODES)) == 40
