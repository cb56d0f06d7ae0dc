"""Damaged and hostile files: whatever a parser throws becomes one line that names the file, and nothing hangs."""

import gzip
import io
import json
import os
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from helices import write_helix

from autoregressive import code_shards
from autoregressive.code_shards import read_llamagen
from evaluations.evidence import store
from evaluations.image_sets import NpzSet
from evaluations.report_runs import read_runs
from protein import structure_io
from protein.benchmark import inert_pickle
from protein.benchmark.sensitivity import read_pairs
from protein.benchmark.tasks import read_task, task_identity
from protein.token_files import read_tokens
from scripts import make_imagenet100
from tokenizer import perceptual
from tokenizer.image_sources import open_images
from tokenizer.runtime import config
from tokenizer.runtime.checkpoint import Checkpointer, load_file
from tokenizer.runtime.mapped import map_array
from tokenizer.runtime.metrics import JsonlFile
from tokenizer.runtime.npz import Npz, map_npy, read_npy
from tokenizer.runtime.parsing import brief, parsing, read_json, read_text


def one_line(caught, path):
    """The message is a line, not too long, and starts with the file."""
    said = str(caught.value)
    assert said.startswith(str(path)), said
    assert "\n" not in said
    assert len(said) < 700


# ------------------------------------------------------------------------------------------------------ the boundary


@pytest.mark.parametrize("error", [MemoryError(), RecursionError("too deep"), OSError(22, "Invalid argument"),
                                   OverflowError("x\ny"), KeyError("a"), zipfile.BadZipFile("b"), AssertionError()])
def test_whatever_a_parser_throws_names_the_file(error):
    with pytest.raises(ValueError, match=r"^a/b\.npz: damaged \(") as caught, parsing("a/b.npz"):
        raise error
    one_line(caught, "a/b.npz")
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_no_error_passes(error):
    with pytest.raises(error), parsing("a/b.npz"):
        raise error


def test_values_are_shown_briefly():
    deep = wide = []
    for _ in range(10_000):
        deep = [deep]
    for _ in range(60):
        wide = [wide, wide]  # 2^60 lists, if anybody went through them
    values = ["x" * 10**6, 10**5000, deep, wide, {"a": [10**5000]}, [1, 2]]
    assert all(len(brief(value)) < 300 for value in values)
    assert brief([1, 2]) == "[1, 2]"
    assert brief("abc") == "'abc'"


# -------------------------------------------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("content", [
    b"[" * 200_000, b'{"a":' * 200_000, b"\xff\xfe{", b"", b"{", b'{"a": ' + b"9" * 10_000 + b"}", b"nul", b"\0" * 100,
    b"[1]",
], ids=["lists", "objects", "no UTF-8", "empty", "cut", "digits", "word", "zeros", "no object"])
def test_configurations_that_are_no_json(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        config.load(path)
    one_line(caught, path)


def test_pipes_and_folders_are_no_configurations(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match=r"pipe.json: is a pipe, socket or device; name a file"):
        config.load(tmp_path / "pipe.json")
    with pytest.raises(ValueError, match="is a folder"):
        config.load(tmp_path)
    with pytest.raises(ValueError, match=r"none.json: no such file"):
        config.load(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")


# ------------------------------------------------------------------------------------------------- files of torch.save


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "0000001.pt"
    torch.save({"step": 1, "model": {"w": torch.arange(2000.0)}}, path)
    return path


def test_a_checkpoint_damaged_in_the_middle_is_named_and_the_older_one_used(tmp_path, checkpoint, capsys):
    whole = checkpoint.read_bytes()
    newest = tmp_path / "0000002.pt"
    newest.write_bytes(whole[:1000] + whole[1100:])  # zipfile seeks to before the start: OSError without a path
    with pytest.raises(ValueError, match=r"0000002.pt: damaged, or not a checkpoint \(") as caught:
        load_file(newest)
    one_line(caught, newest)
    assert Checkpointer(tmp_path).load_latest()["step"] == 1
    assert "0000002.pt" in capsys.readouterr().out


def test_records_that_inflate_are_refused(tmp_path, checkpoint):
    with zipfile.ZipFile(checkpoint) as archive:
        content = {info.filename: archive.read(info) for info in archive.infolist()}
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    with pytest.raises(ValueError, match=r"its records are compressed or overlap, .* save it again") as caught:
        load_file(packed)
    one_line(caught, packed)


def test_pipes_are_no_checkpoints(tmp_path):
    os.mkfifo(tmp_path / "a.pt")
    with pytest.raises(ValueError, match="is a pipe"):
        load_file(tmp_path / "a.pt")


def test_cuts_and_flips_of_a_checkpoint(tmp_path, checkpoint):
    """Each gives one line, or what was saved: torch pads records, and not every byte means something."""
    whole, draw, path = checkpoint.read_bytes(), np.random.default_rng(0), tmp_path / "x.pt"
    refused = []
    for _ in range(150):
        data = bytearray(whole)
        start, kind = int(draw.integers(len(data))), draw.integers(4)
        if kind == 0:
            del data[start : start + int(draw.integers(1, 200))]
        elif kind == 1:
            data[start] ^= 1 << int(draw.integers(8))
        elif kind == 2:
            data[start : start + 100] = bytes(len(data[start : start + 100]))
        else:
            data = data[:start]
        path.write_bytes(data)
        try:
            state = load_file(path)
        except ValueError as error:
            refused.append(str(error))
        else:
            assert set(state) == {"step", "model"}
    assert len(refused) > 100
    assert all(said.startswith(str(path)) and "\n" not in said for said in refused)


# -------------------------------------------------------------------------------------------------------- npz files


def header(shape, descr="<f8", fortran=False, version=1):
    file = io.BytesIO()
    write = np.lib.format.write_array_header_1_0 if version == 1 else np.lib.format.write_array_header_2_0
    write(file, {"descr": descr, "fortran_order": fortran, "shape": shape})
    return file.getvalue()


def npz(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return path


@pytest.mark.parametrize("data", [
    b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff{", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f8'(((",
    b"\x93NUMPY\x09\x00", b"\x93NUMPY\x01\x00\x06\x00" + b"(" * 6, b"\x93NUMPY\x01\x00\x50\x00" + b"-" * 80,
    header((3,), "|O"), header((3,), [("a", "<f8")]), header((-5, 8)),
    header((10**30,)), header((3,), "<M8[s]"), header((2.5,)),
], ids=["empty", "magic", "short", "tokens", "version", "nested", "signs", "objects", "fields", "negative", "huge",
        "dates", "fraction"])
def test_headers_that_lie(tmp_path, data):
    path = npz(tmp_path / "a.npz", x=data)
    with Npz(path) as file, pytest.raises(ValueError, match=r"a.npz: x is ") as caught:
        file.array("x")
    one_line(caught, path)


def test_more_than_is_there_is_not_allocated(tmp_path):
    path = npz(tmp_path / "a.npz", x=header((2**44,)) + bytes(80))
    said = r"x is cut short: float64 \(17592186044416,\) has 140737488355328 bytes, 80 are there"
    with Npz(path) as file, pytest.raises(ValueError, match=said):
        file.array("x")


def test_a_damaged_shape_does_not_end_an_array_early(tmp_path):
    """The checksum is compared at the end only: 2 of 3 numbers would be read, and believed."""
    path = npz(tmp_path / "a.npz", x=header((2,)) + bytes(24), arr_0=header((2, 8, 8, 3), "|u1") + bytes(3 * 192))
    with Npz(path) as file, pytest.raises(ValueError, match=r"x is longer than its header says: float64 \(2,\)"):
        file.array("x")
    with pytest.raises(ValueError, match=r"arr_0 is longer than its header says: uint8 \(2, 8, 8, 3\)"):
        NpzSet(path)
    np.savez(tmp_path / "b.npz", x=np.arange(10_000.0))
    content = (tmp_path / "b.npz").read_bytes()
    (tmp_path / "b.npz").write_bytes(content.replace(np.float64(9000).tobytes(), np.float64(3).tobytes()))
    with Npz(tmp_path / "b.npz") as file, pytest.raises(ValueError, match=r"x is damaged \(.*CRC"):
        file.array("x")


def test_arrays_are_read_alone_and_as_they_were(tmp_path):
    arrays = {"a": np.arange(24.0).reshape(2, 3, 4), "f": np.asfortranarray(np.arange(6).reshape(2, 3)),
              "t": np.array(["x", "yz"]), "e": np.zeros((0, 3)), "s": np.float32(4)}
    np.savez_compressed(tmp_path / "a.npz", broken=1, **arrays)
    with Npz(tmp_path / "a.npz") as file:
        assert file.names == {"broken", *arrays}
        for name, array in arrays.items():
            found = file.array(name)
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert np.array_equal(found, array)
        assert [part.tolist() for part in file.rows("t", 1)] == [["x"], ["yz"]]


@pytest.mark.parametrize(("members", "said"), [
    ({"arr_0": header((-5, 8, 8, 3), "|u1")}, "arr_0 is no array of numpy's"),
    ({"arr_0": header((5, 0, 8, 3), "|u1")}, "arr_0 must be uint8"),
    ({"arr_0": header((1, 10**6, 10**6, 3), "|u1")}, "images of 1000000x1000000 pixels; at most 2048"),
    ({"arr_0": header((10**9, 8, 8, 3), "|u1") + bytes(1000)}, "arr_0 ends before image 5"),
    ({"arr_0": header((10**7, 64, 64, 3), "|u1", fortran=True)}, "arr_0 ends before image 0"),
    ({"mu": header((10**9,)), "sigma": header((1, 1))}, r"mu \(1000000000,\) is no statistics of at most 8192"),
    ({"mu": header((3,)) + bytes(24), "sigma": header((3, 10**6))}, r"sigma \(3, 1000000\) is no statistics"),
    ({"mu": header((3,)) + bytes(24), "sigma": header((3, 3))}, "sigma is cut short"),
    ({"mu": header((2,), "<c16") + bytes(32), "sigma": header((2, 2))}, "mu must hold floating-point numbers"),
])
def test_image_sets_that_lie(tmp_path, members, said):
    path = npz(tmp_path / "a.npz", **members)
    with pytest.raises(ValueError, match=said) as caught:
        NpzSet(path)
    one_line(caught, path)


def test_statistics_alone_have_no_chunks(tmp_path):
    np.savez(tmp_path / "a.npz", mu=np.zeros(2), sigma=np.eye(2))
    assert list(NpzSet(tmp_path / "a.npz").chunks(lambda _: True)) == []


def test_what_nobody_asked_for_is_not_read(tmp_path):
    """A damaged member beside the images, and one that would inflate to a terabyte."""
    path = npz(tmp_path / "a.npz", arr_0=header((2, 8, 8, 3), "|u1") + bytes(384), other=header((2**37,)) + bytes(8),
               more=b"junk")
    assert NpzSet(path).count == 2
    tokens = {"tokens": np.array([1, 2]), "offsets": np.array([0, 2]), "names": np.array(["x"])}
    np.savez(tmp_path / "t.npz", **tokens)
    with zipfile.ZipFile(tmp_path / "t.npz", "a") as archive:
        archive.writestr("other.npy", header((2**37,)))
    (chain,) = read_tokens(tmp_path / "t.npz")
    assert chain.tokens.tolist() == [1, 2]


@pytest.mark.parametrize("data", [
    b"", b"\x93NUMPY", header((3,)), header((2**44,)) + bytes(80), header((-3,)) + bytes(24),
    b"PK\x05\x06" + bytes(18), header((3,), "|O") + bytes(24), b"\x93NUMPY\x01\x00\x06\x00" + b"(" * 6,
], ids=["empty", "magic", "cut", "huge", "negative", "zip", "objects", "nested"])
def test_arrays_of_code_folders_and_caches(tmp_path, data):
    path = tmp_path / "a.npy"
    path.write_bytes(data)
    readers = [map_npy, read_npy, code_shards.load_array, lambda p: map_array(p, (3,), "<f8", "make it again")]
    for read in readers:
        with pytest.raises(ValueError, match=r"a\.npy") as caught:
            read(path)
        one_line(caught, path)
    np.save(path, np.arange(3.0))
    assert read_npy(path).tolist() == map_npy(path).tolist() == [0, 1, 2]
    assert read_npy(path).flags.writeable


def test_damaged_vgg_weights_are_named(tmp_path, checkpoint):
    whole = checkpoint.read_bytes()
    path = tmp_path / "vgg.pth"
    for data in (whole[:1000] + whole[1100:], whole[: len(whole) // 2], b"\x80\x02.", b""):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"vgg.pth is not a readable weight file") as caught:
            perceptual._trunk_state(path, {"slice1.0.weight": torch.zeros(1)})
        one_line(caught, path)


# --------------------------------------------------------------------------------------------------- benchmark tasks


@pytest.mark.parametrize("change", [
    {"chain": [1]}, {"chain": {"a": 1}}, {"chain": 5}, {"structure": [1]}, {"id": {"a": 1}}, {"split": [1]},
    {"labels": [10**400] * 3}, {"labels": [2**40] * 3}, {"labels": [1e39] * 3}, {"labels": {"a": 1}}, {"residues": 5},
], ids=lambda change: str(change)[:30])
@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_rows_of_tasks_of_the_wrong_type(tmp_path, change, kind):
    write_helix(tmp_path, "one", 3)
    path = tmp_path / "t.jsonl"
    rows = [{"task": "toy", "kind": kind}, *({"id": "a", "split": split, "structure": "one.pdb", "labels": [0, 1, 0]}
                                             for split in ("train", "valid", "test"))]
    rows[1] |= change
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if kind == "regression" and change == {"labels": [2**40] * 3}:
        assert read_task(path).splits["train"][0].labels.tolist() == [2.0**40] * 3
        return
    with pytest.raises(ValueError, match=r"t\.jsonl") as caught:
        read_task(path)
    one_line(caught, path)


@pytest.mark.parametrize("line", ["[" * 100_000, "3", "null", "{", '{"id": ' + "9" * 10_000 + "}"])
def test_lines_that_are_no_row_of_a_task(tmp_path, line):
    path = tmp_path / "t.jsonl"
    path.write_text('{"task": "toy", "kind": "binary"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"t.jsonl, line 2: ") as caught:
        read_task(path)
    one_line(caught, path)


@pytest.mark.parametrize("label", [2**63, 10**400, [1], None, True])
def test_classes_that_are_none(tmp_path, label):
    write_helix(tmp_path, "one", 3)
    path = tmp_path / "t.jsonl"
    rows = [{"task": "toy", "kind": "classification"}, {"id": "a", "split": "train", "structure": "one.pdb",
                                                        "label": label}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"t.jsonl") as caught:
        read_task(path)
    one_line(caught, path)


# ------------------------------------------------------------------------------------------------- gzipped structures


def test_structures_that_inflate_without_end(tmp_path, monkeypatch):
    """Only as much is inflated as is read; before, 1.8 GB of a PDB file took 5.2 GB."""
    path = tmp_path / "bomb.pdb.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        for _ in range(64):
            file.write(bytes(2**20))
    monkeypatch.setattr(structure_io, "MAX_INFLATED", 2**20)
    tracemalloc.start()
    with pytest.raises(ValueError, match="inflates to more than 1048576 bytes; gunzip it yourself") as caught:
        structure_io.read_structure(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    one_line(caught, path)
    assert peak < 2**24
    os.mkfifo(tmp_path / "pipe.pdb")
    with pytest.raises(ValueError, match="is a pipe"):
        structure_io.read_structure(tmp_path / "pipe.pdb")


# -------------------------------------------------------------------------------------------------------- token files


@pytest.mark.parametrize("change", [
    {"chain": [1]}, {"chain": {"a": 1}}, {"sequence": 5}, {"numbers": {"a": 1}}, {"numbers": [[1], 2]},
    {"tokenizer": 1}, {"tokens": [True, 1]}, {"tokens": [2**40, 1]}, {"tokens": [-(10**4000), 1]},
    {"numbers": [10**4000, 1]}, {"tokens": None}, {"tokens": "12"}, {"name": ["x"]}, {"name": ""},
    {"numbers": [1.5, 2]}, {"numbers": ["1" * 10**4, 2]},
], ids=lambda change: str(change)[:30])
def test_values_of_the_wrong_type(tmp_path, change):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"name": "x", "tokens": [1, 2]} | change) + "\n")
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: ") as caught:
        read_tokens(path)
    one_line(caught, path)


@pytest.mark.parametrize("line", ["[" * 100_000, "3", "null", '"x"', "{", "[]", '{"tokens": ' + "9" * 10_000 + "}"])
def test_lines_that_are_no_chain(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"name": "x", "tokens": [1, 2]}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: ") as caught:
        read_tokens(path)
    one_line(caught, path)


def test_only_ends_of_lines_end_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"name": "x\u2028y\x85z", "tokens": [1]}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_tokens(path)[0].name == "x\u2028y\x85z"


@pytest.mark.parametrize(("change", "said"), [
    ({"sequences": np.array(["A" * 5000])}, "sequences <U5000 .*: its texts are too long for chains of 2 residues"),
    ({"names": header((1,), "<U1") + b"\xff\xff\xff\xff"}, "names is damaged"),
    ({"names": header((1,), "<U100000000")}, "names <U100000000 .* too long"),
    ({"tokens": header((2**40,), "<i4")}, "more than 268435456 residues"),
    ({"tokens": header((2,), "<i4") + b"\0\0\0\0"}, "tokens is cut short"),
    ({"tokens": np.array([2**63 + 1, 1], dtype=np.uint64)}, "entry 0: token 9223372036854775809 is no code"),
    ({"offsets": np.array([0, 2**64 - 1], dtype=np.uint64)}, "offsets do not cut 2 tokens"),
    ({"names": header((10**12,), "<U1")}, "offsets do not cut 2 tokens into 1000000000000 chains"),
])
def test_token_arrays_that_lie(tmp_path, change, said):
    arrays = {"tokens": np.array([1, 2]), "offsets": np.array([0, 2]), "names": np.array(["x"])} | change
    members = {}
    for name, array in arrays.items():
        file = io.BytesIO()
        if isinstance(array, np.ndarray):
            np.save(file, array)
        members[name] = file.getvalue() or array
    path = npz(tmp_path / "a.npz", **members)
    with pytest.raises(ValueError, match=said) as caught:
        read_tokens(path)
    one_line(caught, path)


# ------------------------------------------------------------------------------------ what damaging at random has found


@pytest.mark.parametrize("read", [
    read_text, read_task, task_identity, make_imagenet100.read_classes, store.read, inert_pickle.load_file,
    read_pairs, lambda path: map_array(path, (3,), "<i8", "make it again"),
], ids=["text", "tasks", "identities", "classes", "evidence", "pickles", "pairs", "arrays"])
def test_text_that_is_none_and_pipes_are_named(tmp_path, read):
    path = tmp_path / "a.file"
    path.write_bytes(b"\x80\x04\xff\xfe{")
    with pytest.raises(ValueError, match=r"a\.file") as caught:
        read(path)
    assert "\n" not in str(caught.value)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=r"a\.file.* pipe"):
        read(path)


def test_nested_lines_of_logs_and_tasks(tmp_path):
    path, deep = tmp_path / "a.jsonl", "[" * 100_000
    path.write_text(f'{{"step": 1}}\n{{"step": {deep}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 2: not a JSON object with a step") as caught:
        JsonlFile(path, resume_step=3)
    one_line(caught, path)
    with pytest.raises(ValueError, match=r"x, line 3: not JSON"):
        config.parse_object(deep, "x, line 3")
    path.write_text('{"step": null}\n')
    with pytest.raises(ValueError, match=r"line 1: not a JSON object with a step"):
        JsonlFile(path, resume_step=3)


def test_messages_are_short_however_long_a_line_is(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    path = tmp_path / "list.csv"
    for content in ("a.png,0\na.png,0" + "y" * 50_000 + "\n", "z" * 50_000 + "\n"):
        path.write_text(content)
        with pytest.raises((ValueError, FileNotFoundError), match=r"list.csv, line") as caught:
            open_images(str(path))
        assert len(str(caught.value)) < 1500
    path = tmp_path / "a.fasta"
    for content in (f">x numbers=1{'y' * 50_000}\n5\n", f">{'x' * 50_000}\n5\n"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"a.fasta, line 2: chain ") as caught:
            read_tokens(path)
        one_line(caught, path)


def test_labels_beyond_int32_in_llamagens_folders(tmp_path):
    for kind, value in (("codes", np.zeros((1, 1, 4), int)), ("labels", np.array([2**62]))):
        (tmp_path / f"a_{kind}").mkdir()
        np.save(tmp_path / f"a_{kind}" / "0.npy", value)
    with pytest.raises(ValueError, match=r"a_labels/0.npy has the label 4611686018427387904; labels count from 0"):
        read_llamagen(tmp_path, 8)


def test_a_zip_with_a_wrong_checksum_is_no_pickle(checkpoint):
    content = bytearray(checkpoint.read_bytes())
    content[content.index(b"data.pkl") + 100] ^= 1
    checkpoint.write_bytes(content)
    with pytest.raises(ValueError, match=r"0000001.pt: damaged, or no ") as caught:
        inert_pickle.load_file(checkpoint)
    one_line(caught, checkpoint)


@pytest.mark.parametrize("rows", [np.zeros(2, np.float16), np.array([0, 1], bool)])
def test_snapshots_whose_rows_are_no_numbers_of_codes(tmp_path, rows):
    (tmp_path / "latents").mkdir()
    (tmp_path / "config.json").write_text("[" * 100_000)
    (tmp_path / "metrics.jsonl").write_text("[" * 100_000 + '\n{"step": 1}\n')
    np.savez(tmp_path / "latents" / "0000001_x.npz", step=1, stage=1, latents=np.zeros((3, 2)), codes=np.zeros((2, 2)),
             code_rows=rows, counts=np.zeros(4, int))
    with zipfile.ZipFile(tmp_path / "latents" / "0000002_y.npz", "w") as archive:
        for name in ("step", "stage", "latents", "codes", "code_rows", "counts"):
            archive.writestr(f"{name}.npy", b"")  # numpy then gives bytes
    for name in ("summary.json", "validation.jsonl", "grid.png", "latents/0000003_z.npz"):
        os.mkfifo(tmp_path / name)
    run = read_runs([tmp_path])[0]
    assert not run.snapshots
    assert "0000001_x.npz is damaged" in " ".join(run.notes)
    assert "config.json cannot be read (RecursionError)" in " ".join(run.notes)
    assert len(run.metrics) == 1
