"""evaluations/generation.py from the command line: all kinds of sides, processes, the cache, and garbage."""

import json
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from places import ROOT
from sklearn.datasets import load_digits
from torch import nn

from evaluations import distribution, generation, image_sets
from evaluations import features as features_module
from evaluations.protocol import differences

N, M = 520, 300  # reference and samples: three chunks and two

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")


class Thumbnail(nn.Module):
    def forward(self, x):
        small = F.adaptive_avg_pool2d(x.float().mean(1, keepdim=True) / 16, 4).flatten(1)
        return small, small[:, :6], small[:, 4:]


def digits(start, count):
    """uint8 (count, 16, 16, 3)"""
    images = (load_digits().images[start : start + count] * 15).astype(np.uint8)
    return np.repeat(np.repeat(images, 2, 1), 2, 2)[..., None].repeat(3, 3)


def features(images):
    with torch.no_grad():
        return Thumbnail()(torch.from_numpy(images).permute(0, 3, 1, 2))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("generation")
    torch.jit.script(Thumbnail()).save(str(base / "net.pt"))
    for name, images in (("reference", digits(0, N)), ("samples", digits(N, M))):
        np.savez(base / f"{name}.npz", images)
        (base / name).mkdir()
        for i, image in enumerate(images):
            Image.fromarray(image).save(base / name / f"{i:05d}.png")
    pooled, _, spatial = features(digits(0, N))
    g, s = (distribution.gaussian_statistics(part) for part in (pooled, spatial))
    np.savez(base / "statistics.npz", mu=g.mu, sigma=g.sigma, mu_s=s.mu, sigma_s=s.sigma)
    np.savez(base / "both.npz", digits(0, N), mu=g.mu + 1, sigma=g.sigma, mu_s=s.mu, sigma_s=s.sigma)
    np.savez(base / "pooled.npz", mu=g.mu, sigma=g.sigma)
    return base


def flags(base, reference, samples, out, *more):
    sides = [str(base / side) if (base / side).exists() else side for side in (reference, samples)]
    return [*sides, "--features", f"torchscript:{base / 'net.pt'}", "--device", "cpu", "--out", str(out), *more]


def report_of(base, reference, samples, out, *more):
    generation.main(flags(base, reference, samples, out, "--no-cache", *more))
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def plain(base):
    return report_of(base, "reference.npz", "samples.npz", base / "plain.json")


def test_numbers_are_those_of_the_features(plain):
    (a, _, a_s), (b, b_l, b_s) = features(digits(0, N)), features(digits(N, M))
    fid, sfid = (distribution.frechet_distance(*map(distribution.gaussian_statistics, pair))
                 for pair in ((a, b), (a_s, b_s)))
    assert plain["fid"] == pytest.approx(fid, rel=1e-6)
    assert plain["sfid"] == pytest.approx(sfid, rel=1e-6)
    assert (plain["precision"], plain["recall"]) == distribution.precision_recall(a, b)
    assert plain["inception_score"] == pytest.approx(distribution.inception_score(b_l)[0], rel=1e-6)
    assert plain["kid"] is None
    assert "1000 images" in plain["unavailable"]["kid"]
    assert (plain["num_reference"], plain["num_samples"]) == (N, M)


def same_numbers(first, second, metrics=generation.METRICS):
    for metric in metrics:
        assert first[metric] == (None if second[metric] is None else pytest.approx(second[metric], rel=1e-9)), metric


def test_folders_equal_npz_files(base, plain, tmp_path):
    folders = report_of(base, "reference", "samples.npz", tmp_path / "r.json")
    same_numbers(folders, plain)
    assert folders["protocol"]["id"] == plain["protocol"]["id"]  # the same pixels are the same reference
    samples = report_of(base, "reference", "samples", tmp_path / "r.json")
    same_numbers(samples, plain, [m for m in generation.METRICS if not m.startswith("inception")])
    # Names of files are no order of sampling.
    assert differences(samples["protocol"], plain["protocol"]) == ["inception_score"]


def test_the_inception_score_does_not_depend_on_names(base, tmp_path):
    """Class folders list class by class: ten parts of them would each hold one class."""
    images = load_digits()
    rows = [i for digit in range(6) for i in np.flatnonzero(images.target == digit)[:100]]
    array = np.concatenate([digits(i, 1) for i in rows])
    for i, image in zip(rows, array, strict=True):
        folder = tmp_path / "classes" / str(images.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{i:04d}.png")
    np.savez(tmp_path / "sorted.npz", array)
    np.savez(tmp_path / "mixed.npz", array[np.random.default_rng(0).permutation(len(array))])
    reports = {name: report_of(base, "reference.npz", str(tmp_path / name), tmp_path / "r.json")
               for name in ("classes", "sorted.npz", "mixed.npz")}
    scores = {name: report["inception_score"] for name, report in reports.items()}
    assert scores["classes"] == pytest.approx(scores["mixed.npz"], rel=0.03)
    assert scores["sorted.npz"] < 0.9 * scores["mixed.npz"]
    warned = {name: [w for w in r["protocol"]["warnings"] if "sorted" in w] for name, r in reports.items()}
    assert [name for name, found in warned.items() if found] == ["sorted.npz"]
    assert f"{scores['classes']:.4g}" in warned["sorted.npz"][0]  # what it would be


def test_folders_of_sample_c2i_are_no_samples(base, tmp_path):
    out = tmp_path / "samples" / "cfg-2"
    shutil.copytree(base / "samples", out / "images")
    Image.new("RGB", (16, 16)).save(out / "grid.png")
    (out / "settings.json").write_text("{}")
    for folder in (out, out.parent):
        for sides in (("reference.npz", str(folder)), (str(folder), "samples.npz")):
            with pytest.raises(SystemExit, match=r"cfg-2/samples.npz"):
                generation.main(flags(base, *sides, tmp_path / "r.json", "--no-cache"))
    assert report_of(base, "reference.npz", str(out / "images"), tmp_path / "r.json")["num_samples"] == M


@pytest.fixture
def as_inception(monkeypatch):
    """Stored statistics are of the stand-in's features, as ADM's are of Inception's."""
    def named(spec, _weights=None):
        extractor = features_module.open_extractor(spec)
        extractor.widths = {"pooled": 16, "spatial": 12}
        return extractor

    monkeypatch.setattr(image_sets, "open_extractor", named)


@pytest.mark.usefixtures("as_inception")
def test_stored_statistics_are_used(base, plain, tmp_path):
    statistics = report_of(base, "statistics.npz", "samples.npz", tmp_path / "a.json")
    same_numbers(statistics, plain, ("fid", "sfid", "inception_score"))
    assert statistics["precision"] is statistics["recall"] is None
    assert statistics["num_reference"] == 0
    pooled = report_of(base, "pooled.npz", "samples", tmp_path / "b.json")
    assert pooled["sfid"] is None
    assert "spatial features or statistics of: reference" in pooled["unavailable"]["sfid"]
    both = report_of(base, "both.npz", "samples", tmp_path / "c.json")
    assert both["fid"] > plain["fid"] + 1  # the shifted mean, as ADM's evaluator would take it
    same_numbers(both, plain, ("sfid", "precision", "recall"))
    assert len({r["protocol"]["id"] for r in (plain, statistics, pooled, both)}) == 4


@pytest.mark.usefixtures("as_inception")
def test_statistics_of_another_width_are_refused_before_anything_is_computed(base, tmp_path, monkeypatch):
    np.savez(tmp_path / "wide.npz", digits(0, 20), mu=np.zeros(2048), sigma=np.eye(2048))
    monkeypatch.setattr(image_sets.Extractor, "forward", None)
    for sides in ((str(tmp_path / "wide.npz"), "samples.npz"), ("reference.npz", str(tmp_path / "wide.npz"))):
        with pytest.raises(SystemExit, match=r"wide.npz: the pooled statistics have 2048 dimensions, .* 16"):
            generation.main(flags(base, *sides, tmp_path / "r.json", "--no-cache"))


def test_other_features_do_not_meet_inceptions_statistics(base, plain, tmp_path):
    both = report_of(base, "both.npz", "samples.npz", tmp_path / "r.json")
    same_numbers(both, plain)
    assert both["protocol"]["id"] == plain["protocol"]["id"]
    assert any("both.npz stores statistics of Inception's" in w for w in both["protocol"]["warnings"])
    with pytest.raises(SystemExit, match=r"statistics.npz holds Inception's statistics without images"):
        report_of(base, "statistics.npz", "samples.npz", tmp_path / "s.json")


def test_sides_are_not_exchanged(base, plain, tmp_path):
    other = report_of(base, "samples.npz", "reference.npz", tmp_path / "r.json")
    assert (other["precision"], other["recall"]) == (plain["recall"], plain["precision"])
    assert other["inception_score"] != plain["inception_score"]


def test_the_embedded_digits_against_themselves(base, tmp_path):
    report = report_of(base, "digits", "digits", tmp_path / "r.json", "--image-size", "16")
    assert report["fid"] == pytest.approx(0, abs=1e-6)
    assert (report["precision"], report["recall"]) == (1, 1)
    assert report["kid"] < 0  # an unbiased estimate of 0, from images that occur on both sides


def test_two_processes_give_the_numbers_of_one(base, plain, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(ROOT / "evaluations" / "generation.py"),
               *flags(base, "reference", "samples.npz", tmp_path / "r.json", "--no-cache")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, result.stderr
    two = json.loads((tmp_path / "r.json").read_text())
    assert all(two[metric] == plain[metric] for metric in generation.METRICS)
    assert two["protocol"]["id"] == plain["protocol"]["id"]


def test_the_cache_is_used_and_checked(base, plain, tmp_path, monkeypatch, capsys):
    words = flags(base, "reference.npz", "samples.npz", tmp_path / "r.json", "--cache-dir", str(tmp_path / "cache"))
    generation.main(words)
    first = (tmp_path / "r.json").read_text()
    files = sorted((tmp_path / "cache").rglob("*.npz"))
    assert len(files) == 3 + 2 + 4  # chunks, and two Gaussians of either side

    def nothing(*_args):
        raise AssertionError("computed again")

    with monkeypatch.context() as patch:
        patch.setattr("evaluations.features.Extractor.forward", nothing)
        patch.setattr(image_sets, "gaussian_statistics", nothing)
        generation.main(words)
    assert (tmp_path / "r.json").read_text() == first
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    generation.main(words)
    assert capsys.readouterr().err.count("computing again") == len(files)
    assert (tmp_path / "r.json").read_text() == first
    same_numbers(json.loads(first), plain)


def test_without_weights_the_report_says_why(base, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    out = tmp_path / "r.json"
    sides = [str(base / name) for name in ("reference.npz", "samples.npz")]
    with pytest.raises(SystemExit) as caught:
        generation.main([*sides, "--out", str(out), "--device", "cpu", "--no-cache"])
    assert caught.value.code == 1
    report = json.loads(out.read_text())
    assert all(report[metric] is None for metric in generation.METRICS)
    assert "--inception-weights" in report["unavailable"]["fid"]
    assert report["num_samples"] == M
    with pytest.raises(SystemExit, match=r"mine.pth"):
        generation.main([*sides, "--inception-weights", str(tmp_path / "mine.pth")])


def cut(path, base):
    path.write_bytes((base / "samples.npz").read_bytes()[:5000])


def damaged(path, _base):
    """A whole archive whose array is shorter than its header says."""
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (9, 16, 16, 3)})
        file.write(b"0" * 2000)


def deflated(path, _base):
    """A compressed array whose first byte is no block of deflate's; the zip's directory is whole."""
    np.savez_compressed(path, digits(0, 20))
    data = bytearray(path.read_bytes())
    data[30 + sum(int.from_bytes(data[i : i + 2], "little") for i in (26, 28))] = 0xFF
    path.write_bytes(data)


def header(path, _base):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", b"no array at all")


def test_a_single_image_costs_its_own_metrics_only(base, tmp_path):
    """Before: the whole report, and the message named no side."""
    np.savez(tmp_path / "one.npz", digits(0, 1))
    words = flags(base, "reference.npz", str(tmp_path / "one.npz"), tmp_path / "r.json", "--no-cache")
    with pytest.raises(SystemExit) as caught:  # none of its metrics can be had
        generation.main(words)
    assert caught.value.code == 1
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["unavailable"]["fid"] == "needs at least 2 images, or statistics, of: samples"
    assert report["unavailable"]["precision"].startswith("needs more than 3 images")
    assert (report["num_reference"], report["num_samples"]) == (N, 1)
    other = report_of(base, str(tmp_path / "one.npz"), "samples.npz", tmp_path / "r.json")
    assert other["inception_score"] > 1
    assert other["unavailable"]["sfid"] == "needs at least 2 images, or statistics, of: reference"


def test_arrays_in_fortrans_order_are_the_same_images(base, plain, tmp_path):
    np.savez(tmp_path / "f.npz", np.asfortranarray(digits(N, M)))
    report = report_of(base, "reference.npz", str(tmp_path / "f.npz"), tmp_path / "r.json")
    same_numbers(report, plain)
    assert report["protocol"]["samples"]["sha256"] == plain["protocol"]["samples"]["sha256"]


def test_large_arrays_in_fortrans_order_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sets, "MAX_FORTRAN", 1000)
    np.savez(tmp_path / "f.npz", np.asfortranarray(digits(0, 2)))
    with pytest.raises(ValueError, match=r"f.npz: arr_0 is stored in Fortran's order, .*ascontiguousarray\(arr_0\)"):
        image_sets.NpzSet(tmp_path / "f.npz")


BROKEN = {
    "deflated": (deflated, r"deflated.npz: arr_0 is no array of numpy's \(.*invalid block type"),
    "header": (header, r"header.npz: arr_0 is no array of numpy's"),
    "scalar": (lambda path, _: np.savez(path, mu=np.float64(3), sigma=np.eye(3)), r"scalar.npz: .* do not fit"),
    "nan": (lambda path, _: np.savez(path, mu=np.full(3, np.nan), sigma=np.eye(3)), r"nan.npz: mu has values that are"),
    "objects": (lambda path, _: np.savez(path, mu=np.array([None]), sigma=np.eye(1)), r"objects.npz: mu is no array"),
    "cut": (cut, r"cut.npz: damaged, or no .npz file"),
    "damaged": (damaged, "arr_0 ends before image 2"),
    "float": (lambda path, _: np.savez(path, np.zeros((5, 8, 8, 3))), r"arr_0 must be uint8 \(N, H, W, 3\)"),
    "grey": (lambda path, _: np.savez(path, np.zeros((5, 8, 8), np.uint8)), "arr_0 must be uint8"),
    "keys": (lambda path, _: np.savez(path, images=np.zeros(3)), "keys.npz"),
    "shapes": (lambda path, _: np.savez(path, mu=np.zeros(4), sigma=np.eye(3)), "do not fit together"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_named(base, tmp_path, kind):
    make, said = BROKEN[kind]
    make(tmp_path / f"{kind}.npz", base)
    with pytest.raises(SystemExit, match=said):
        generation.main(flags(base, str(tmp_path / f"{kind}.npz"), "samples.npz", tmp_path / "r.json", "--no-cache"))
    assert not (tmp_path / "r.json").exists()


def test_pictures_must_have_one_size(base, tmp_path):
    (tmp_path / "mixed").mkdir()
    for i in range(12):
        Image.new("RGB", (8, 8) if i else (16, 16), (20 * i, 0, 0)).save(tmp_path / "mixed" / f"{i}.png")
    words = flags(base, "reference.npz", str(tmp_path / "mixed"), tmp_path / "r.json", "--no-cache")
    with pytest.raises(SystemExit, match="give --image-size"):
        generation.main(words)
    generation.main([*words, "--image-size", "16"])
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["num_samples"] == 12
    (tmp_path / "mixed" / "3.png").write_bytes(b"junk")
    with pytest.raises(SystemExit, match=r"mixed: 3.png cannot be read; .* replace or remove it"):
        generation.main([*words, "--image-size", "16"])


@pytest.mark.parametrize(("more", "said"), [
    (["--image-size", "0"], "--image-size is 0"), (["--num-workers", "-1"], "--num-workers is -1"),
])
def test_flags_are_checked(base, tmp_path, capsys, more, said):
    with pytest.raises(SystemExit):
        generation.main(flags(base, "digits", "digits", tmp_path / "r.json", *more))
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("out", ["", "file/r.json"])
def test_an_impossible_output_is_named_before_anything_is_computed(base, tmp_path, monkeypatch, out):
    (tmp_path / "file").write_text("precious")
    monkeypatch.setattr(generation, "evaluate", None)
    with pytest.raises(SystemExit, match="--out"):
        generation.main(flags(base, "reference.npz", "samples.npz", tmp_path / out))


def test_the_report_goes_beside_the_samples(tmp_path, capsys):
    """Not into the folder that the command was started in, where the next one would replace it."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "samples.npz").touch()
    for samples, out in (("pictures", "pictures/metrics.json"), ("samples.npz", "samples.metrics.json")):
        assert generation.parse_args(["digits", str(tmp_path / samples)]).out == tmp_path / out
    with pytest.raises(SystemExit):
        generation.parse_args(["digits", "digits"])
    assert "--out: name a file for the report; digits is no folder or file" in capsys.readouterr().err


def test_missing_files_are_named(base, tmp_path):
    for missing in ("/no/such.npz", "/no/such/folder"):
        with pytest.raises(SystemExit, match=missing):
            generation.main(flags(base, "digits", missing, tmp_path / "r.json"))


def test_samples_that_are_not_there_are_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        generation.main(["digits", str(tmp_path / "none.npz")])
    assert "none.npz: no such file or folder" in capsys.readouterr().err
