"""Codes on disk: extraction against the tokenizer, resume, processes, views, LlamaGen's folders, and garbage."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from places import ROOT
from sklearn.datasets import load_digits
from torchvision.transforms import TenCrop

from autoregressive import convert_codes, extract_codes, train_c2i
from autoregressive.code_shards import file_hash, open_codes
from tokenizer import train_provq
from tokenizer.data import center_crop_arr, image_to_tensor
from tokenizer.pretrained import load_tokenizer, save_pretrained, tokenizer_hash
from tokenizer.runtime.command import CannotContinue
from tokenizer.runtime.seeding import StepSampler

COUNT = 600  # three shards


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run on 600 pictures of ten classes."""
    base = tmp_path_factory.mktemp("codes")
    digits = load_digits()
    for i in range(COUNT):
        folder = base / "pictures" / str(digits.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((digits.images[i] * 15).astype(np.uint8)).resize((20, 18)).save(folder / f"{i:04d}.png")
    words = ("--preset cifar10 --image-size 16 --image-channels 1 --codebook-size 300 --global-batch-size 16 "
             "--max-steps 6 --warmup-steps 2 --transition-steps 2 --val-size 16 --kmeans-batches 4").split()
    words += ["--device", "cpu", "--data-path", str(base / "pictures")]
    train_provq.main([*words, "--results-dir", str(base / "run")])
    return base


def flags(base, out, *more):
    return ["--vq-ckpt", str(base / "run"), "--code-path", str(out), "--device", "cpu", "--batch-size", "50", *more]


@pytest.fixture(scope="module")
def codes(base):
    extract_codes.main(flags(base, base / "codes"))
    return base / "codes"


def content(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def test_codes_are_the_tokenizers(base, codes):
    manifest = json.loads((codes / "manifest.json").read_text())
    assert (manifest["num_images"], manifest["views"], manifest["num_tokens"]) == (COUNT, 2, 16)
    assert sorted(p.name for p in codes.glob("codes-*")) == [f"codes-0000{i}-of-00003.npy" for i in range(3)]
    assert np.load(codes / "codes-00000-of-00003.npy").dtype == np.uint16
    names = (codes / "names.txt").read_text().splitlines()
    labels = np.load(codes / "labels.npy")
    model = load_tokenizer(base / "run")
    data = open_codes(str(codes))
    assert data.tokenizer_hash == tokenizer_hash(model)
    for i in (0, 255, 256, 599):
        picture = Image.open(base / "pictures" / names[i])
        x = image_to_tensor(center_crop_arr(picture.convert("L"), 16))[None]
        for view, crop in enumerate((x, x.flip(-1))):
            with torch.no_grad():
                expected = model.quantize.encode(model.encode_latents(crop)).flatten()
            assert data.files[0].codes(i, view).tolist() == expected.tolist()
        assert labels[i] == int(names[i].split("/")[0])


def test_ten_crops_are_torchvisions(base, tmp_path):
    more = ("--ten-crop", "--crop-range", "1.5", "--data-path", str(base / "pictures" / "3"))
    extract_codes.main(flags(base, tmp_path / "ten", *more))
    data = open_codes(str(tmp_path / "ten"))
    assert data.views == 10
    model = load_tokenizer(base / "run")
    name = (tmp_path / "ten" / "names.txt").read_text().splitlines()[1]
    picture = center_crop_arr(Image.open(base / "pictures" / "3" / name).convert("L"), 24)
    crops = torch.stack([image_to_tensor(crop) for crop in TenCrop(16)(picture)])
    with torch.no_grad():
        expected = model.quantize.encode(model.encode_latents(crops)).flatten(1)
    found = [data.files[0].codes(1, view).tolist() for view in range(10)]
    assert found == expected.tolist()


def test_two_processes_write_the_same_folder(base, codes, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "autoregressive" / "extract_codes.py"), *flags(base, tmp_path / "two")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    assert content(tmp_path / "two") == content(codes)


def test_the_compiled_encoder_gives_the_same_codes(base, codes, tmp_path, monkeypatch):
    real, graphs = torch.compile, []

    def backend(graph, _):  # traced and guarded as ever, but not translated to machine code, which takes half a minute
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f: real(f, backend=backend))
    torch.compiler.reset()
    extract_codes.main(flags(base, tmp_path / "compiled", "--compile", "--batch-size", "200"))
    assert len(graphs) == 1  # of two shards whose last batches are smaller, and one that is smaller than a batch
    assert content(tmp_path / "compiled") == content(codes)


def test_an_interrupted_extraction_continues(base, codes, tmp_path, monkeypatch):
    out = tmp_path / "codes"
    real, calls = extract_codes.extract_shard, []

    def stop_at_second(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(extract_codes, "extract_shard", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            extract_codes.main(flags(base, out))
    with pytest.raises(ValueError, match="not finished"):
        open_codes(str(out))
    with pytest.raises(SystemExit, match=r"made otherwise .*views: 2 there, 1 now"):
        extract_codes.main(flags(base, out, "--no-flip"))
    calls.clear()
    monkeypatch.setattr(extract_codes, "extract_shard", lambda *a, **kw: calls.append(1) or real(*a, **kw))
    extract_codes.main(flags(base, out))
    assert len(calls) == 2  # the first shard was kept
    assert content(out) == content(codes)
    extract_codes.main(flags(base, out))  # complete: nothing to do
    assert len(calls) == 2


def test_a_folder_begun_by_an_older_version_is_finished_as_it_was(base, codes, tmp_path):
    """Its manifest does not say how many images a shard has: more than now."""
    assert json.loads((codes / "manifest.json").read_text())["shard_images"] == 256
    assert [extract_codes.images_per_shard(n, most) for n, most in ((10, 4096), (10**6, 4096), (10**6, 65536))] == [
        256, 4096, 31250]
    out = tmp_path / "codes"
    shutil.copytree(codes, out)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["shard_images"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / SHARDS[1]).unlink()
    extract_codes.main(flags(base, out))
    assert json.loads((out / "manifest.json").read_text()) == manifest  # a GPT's run knows its codes by it
    assert (out / SHARDS[1]).read_bytes() == (codes / SHARDS[1]).read_bytes()


SHARDS = [f"codes-0000{i}-of-00003.npy" for i in range(3)]


@pytest.mark.parametrize(("name", "data", "made"), [
    (SHARDS[1], None, 1), (SHARDS[2], b"cut", 1), ("labels.npy", None, 0), ("names.txt", b"x\n", 0),
])
def test_a_finished_folder_is_mended(base, codes, tmp_path, monkeypatch, capsys, name, data, made):
    out = tmp_path / "codes"
    shutil.copytree(codes, out)
    if data is None:
        (out / name).unlink()
    else:
        (out / name).write_bytes(data)
    real, calls = extract_codes.extract_shard, []
    monkeypatch.setattr(extract_codes, "extract_shard", lambda *a, **kw: calls.append(1) or real(*a, **kw))
    extract_codes.main(flags(base, out))
    assert f"missing or damaged, made again: {name}" in capsys.readouterr().out
    assert len(calls) == made
    assert content(out) == content(codes)
    extract_codes.main(flags(base, out))
    assert "is complete" in capsys.readouterr().out


def test_a_changed_code_is_found_where_images_were_left_out(base, tmp_path):
    (tmp_path / "some").mkdir()
    for i, path in enumerate(sorted((base / "pictures").rglob("*.png"))[:300]):
        (tmp_path / "some" / path.name).write_bytes(b"junk" if i in (4, 290) else path.read_bytes())
    out, more = tmp_path / "codes", ("--data-path", str(tmp_path / "some"))
    extract_codes.main(flags(base, out, *more))
    before = content(out)
    array = np.load(out / "codes-00001-of-00002.npy")
    np.save(out / "codes-00001-of-00002.npy", array ^ 1)
    extract_codes.main(flags(base, out, *more))
    assert content(out) == before


def test_unreadable_images_are_left_out(base, tmp_path, capsys):
    (tmp_path / "some").mkdir()
    for i, path in enumerate(sorted((base / "pictures" / "1").iterdir())[:10]):
        (tmp_path / "some" / path.name).write_bytes(b"junk" if i == 4 else path.read_bytes())
    more = ("--data-path", str(tmp_path / "some"))
    extract_codes.main(flags(base, tmp_path / "codes", *more))
    assert "left out an image that cannot be read" in capsys.readouterr().out
    assert len(open_codes(str(tmp_path / "codes"))) == 9
    assert len((tmp_path / "codes" / "names.txt").read_text().splitlines()) == 9
    with pytest.raises(SystemExit, match="unreadable images"):
        extract_codes.main(flags(base, tmp_path / "other", *more, "--max-bad-images", "0"))


def test_views_are_a_function_of_seed_epoch_and_image(codes):
    data = open_codes(str(codes))
    train = data.subset(range(100), seed=1)
    drawn = [[train[(epoch, i)]["codes"].tolist() for i in range(100)] for epoch in range(2)]
    assert drawn[0] == [train[(0, i)]["codes"].tolist() for i in range(100)]
    assert drawn[0] != drawn[1]
    mirrored = sum(codes != data.files[0].codes(i, 0).tolist() for i, codes in enumerate(drawn[0]))
    assert 30 < mirrored < 70
    first = data.subset([5, 7], seed=None)
    assert first[(3, 1)]["codes"].tolist() == data.files[0].codes(7, 0).tolist()
    assert first[1]["index"] == 7
    keys = next(iter(StepSampler(len(train), 4, seed=0)))
    assert all(train[key]["label"] == train.labels[train[key]["index"]] for key in keys)


def test_llamagens_folders_are_read_and_converted(codes, tmp_path):
    convert_codes.main([str(codes), str(tmp_path / "theirs"), "--to-llamagen", "imagenet16"])
    (tmp_path / "named_codes").symlink_to(tmp_path / "theirs")  # the folder of pairs may be called ..._codes itself
    assert len(open_codes(str(tmp_path / "named_codes"), 300)) == 600
    one = np.load(tmp_path / "theirs" / "imagenet16_codes" / "7.npy")
    assert (one.shape, one.dtype) == ((1, 2, 16), np.int64)
    theirs, ours = open_codes(str(tmp_path / "theirs"), 300), open_codes(str(codes))
    convert_codes.main([str(tmp_path / "theirs"), str(tmp_path / "back"), "--codebook-size", "300"])
    back = open_codes(str(tmp_path / "back"))
    for other in (theirs, back):
        assert other.labels.tolist() == ours.labels.tolist()
        assert all((other.files[0].codes(i, v) == ours.files[0].codes(i, v)).all() for i in (0, 599) for v in (0, 1))
        assert other.tokenizer_hash == ""
        other.require_like(ours)
    both = open_codes(f"{codes},{tmp_path / 'back'}")
    assert both.views == 4
    with pytest.raises(ValueError, match="give the right --codebook-size"):
        open_codes(str(tmp_path / "theirs"), 4)
    for kind, wrong, said in (("labels", np.array([-3]), "3.npy has the label -3"),
                              ("labels", np.array([3.0]), "3.npy holds float64, expected whole numbers"),
                              ("codes", np.zeros((1, 2, 16)), "3.npy holds float64, expected whole numbers")):
        file = tmp_path / "theirs" / f"imagenet16_{kind}" / "3.npy"
        before = file.read_bytes()
        np.save(file, wrong)
        with pytest.raises(SystemExit, match=said):
            convert_codes.main([str(tmp_path / "theirs"), str(tmp_path / "no"), "--codebook-size", "300"])
        file.write_bytes(before)
    np.save(tmp_path / "theirs" / "imagenet16_codes" / "3.npy", np.zeros((1, 1, 16), np.int64))
    with pytest.raises(ValueError, match=r"3.npy has shape"):
        open_codes(str(tmp_path / "theirs"), 300)
    with pytest.raises(SystemExit, match="exists already"):
        convert_codes.main([str(codes), str(tmp_path / "back"), "--to-llamagen", "x"])


@pytest.mark.parametrize(("used", "noted"), [(64, True), (900, False)])
def test_a_collapsed_codebook_is_noted(tmp_path, capsys, used, noted):
    rng = np.random.default_rng(0)
    for kind in ("codes", "labels"):
        (tmp_path / f"imagenet16_{kind}").mkdir()
    for image in range(150):
        np.save(tmp_path / "imagenet16_codes" / f"{image}.npy", rng.integers(used, size=(1, 1, 16)))
        np.save(tmp_path / "imagenet16_labels" / f"{image}.npy", np.array([image % 10]))
    train_c2i.main(["--code-path", str(tmp_path), "--codebook-size", "1024", "--preset", "digits", "--vq-ckpt", "none",
                    "--val-size", "10", "--device", "cpu", "--dry-run"])
    said = re.search(r"note: .*: (\d+) of 1,024 codes occur in 2,240 tokens: the tokenizer has collapsed, or --",
                     capsys.readouterr().err)
    assert bool(said) == noted
    assert not said or said[1] == "64"


@pytest.mark.parametrize("flag", ["--num-classes", "--codebook-size"])
def test_nothing_counts_as_no_number(tmp_path, capsys, flag):
    with pytest.raises(SystemExit):
        convert_codes.main([str(tmp_path), str(tmp_path / "out"), flag, "0"])
    assert f"{flag} is 0; it must be at least 1" in capsys.readouterr().err


def test_damaged_folders_are_named(codes, tmp_path):
    def copy(name):
        folder = tmp_path / name
        folder.mkdir()
        for file, data in content(codes).items():
            (folder / file).write_bytes(data)
        return folder

    cut = copy("cut")
    (cut / "codes-00001-of-00003.npy").write_bytes((cut / "codes-00001-of-00003.npy").read_bytes()[:500])
    with pytest.raises(ValueError, match=r"codes-00001-of-00003.npy: damaged, cut short, or no .npy file"):
        open_codes(str(cut))
    longer = copy("longer")
    with (longer / "codes-00001-of-00003.npy").open("ab") as file:
        file.write(b"more")
    with pytest.raises(ValueError, match=r"codes-00001-of-00003.npy is longer than its header says"):
        open_codes(str(longer))
    gone = copy("gone")
    (gone / "codes-00002-of-00003.npy").unlink()
    with pytest.raises(ValueError, match=r"codes-00002-of-00003.npy is missing"):
        open_codes(str(gone))
    shape = copy("shape")
    np.save(shape / "labels.npy", np.zeros(3, np.int32))
    with pytest.raises(ValueError, match=r"labels.npy holds int32 \(3,\), the manifest says int32 \(600,\)"):
        open_codes(str(shape))
    large = copy("large")
    array = np.load(large / "codes-00000-of-00003.npy")
    array[4, 0, 3] = 300
    np.save(large / "codes-00000-of-00003.npy", array)
    with pytest.raises(CannotContinue, match="the codebook has 300"):
        _ = open_codes(str(large))[4]
    manifest = json.loads((large / "manifest.json").read_text())
    damage = open_codes(str(large)).files[0].damage
    assert "codes-00000-of-00003.npy is not the file that the manifest describes" in damage()[0]
    assert damage(lambda number: number > 0) == []
    manifest["shards"][0]["sha256"] = file_hash(large / "codes-00000-of-00003.npy")
    (large / "manifest.json").write_text(json.dumps(manifest))
    assert "codes up to 300, the codebook has 300" in open_codes(str(large)).files[0].damage()[0]
    classes = copy("classes")
    np.save(classes / "labels.npy", np.full(COUNT, -3, np.int32))
    with pytest.raises(ValueError, match=r"labels.npy spans \[-3, -3\], the manifest says 10 classes"):
        open_codes(str(classes))
    keys = copy("keys")
    manifest = json.loads((keys / "manifest.json").read_text())
    del manifest["views"]
    (keys / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="'views' is missing"):
        open_codes(str(keys))
    for path in ("/no/such/folder", str(tmp_path)):
        with pytest.raises(ValueError, match=r"extract_codes.py"):
            open_codes(path)


def test_the_hash_tells_tokenizers_apart(base, tmp_path):
    model = load_tokenizer(base / "run")
    assert tokenizer_hash(load_tokenizer(save_pretrained(model, tmp_path / "hf"))) == tokenizer_hash(model)
    before = tokenizer_hash(model)
    with torch.no_grad():
        model.post_quant_conv.bias[0] += 1e-6
    assert tokenizer_hash(model) != before


@pytest.mark.parametrize(("more", "said"), [
    (["--image-size", "18"], "--image-size 18 must be a multiple of 4"),
    (["--data-path", "/no/such/place"], "/no/such/place"),
    (["--data-path", "digits", "--flip"], "mirror"),
    (["--vq-ckpt", "/no/run"], "/no/run"),
])
def test_mistakes_are_named_before_anything_is_written(base, tmp_path, more, said):
    with pytest.raises(SystemExit) as caught:
        extract_codes.main([*flags(base, tmp_path / "codes"), *more])
    assert said in str(caught.value)
    assert not (tmp_path / "codes").exists()


def test_other_files_stay(base, tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(SystemExit, match="holds other files"):
        extract_codes.main(flags(base, tmp_path))
    assert (tmp_path / "mine.txt").read_text() == "precious"
