"""Every kind of input of the project: a small valid one, and what the entry scripts read it with, in this process."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gpt_models import TINY as TINY_GPT
from gpt_models import tiny
from helices import helix, write_helix
from image_files import encoded, picture, write_folder, write_tar, write_zip
from image_models import write_gpt, write_tokenizer
from mini_archive import MiniArchive, processed_row, save_processed
from mutations import ODD, Canary, change_value
from places import ROOT
from sklearn.datasets import load_digits
from structure_files import peptide, save_structure
from structure_models import SMALL, build
from torch import nn
from training_runs import to_words

from autoregressive import convert_codes, extract_codes, train_c2i
from autoregressive import train_config as gpt_config
from autoregressive.code_shards import open_codes
from autoregressive.gpt import GPT
from autoregressive.gpt_config import GPT_PRESETS
from autoregressive.pretrained import load_gpt
from evaluations import generation, report
from evaluations.distribution import gaussian_statistics
from evaluations.evidence import store
from protein import train_config as protein_config
from protein import train_provq as train_protein
from protein.benchmark import train_task
from protein.benchmark.released_tasks import list_files, read_released
from protein.benchmark.task_archives import Archive, read_raw
from protein.benchmark.tasks import load_prepared, read_task, save_prepared, task_identity
from protein.pretrained import load_structure_tokenizer
from protein.pretrained import save_pretrained as save_structure_tokenizer
from protein.structure_cache import write_cache
from protein.structure_data import open_structures
from protein.structure_io import read_structure
from protein.structure_sources import find_structures
from protein.token_files import TokenChain, read_tokens, write_tokens
from scripts import compare_runs, make_imagenet100
from tokenizer import train_config, train_provq
from tokenizer.data import BadImageCounter, ImageDataset, describe_source
from tokenizer.image_sources import open_images
from tokenizer.pretrained import load_tokenizer, to_llamagen_state_dict
from tokenizer.runtime import lock
from tokenizer.runtime.command import CannotContinue
from tokenizer.vq_model import VQModel, VQModelConfig

VQ = VQModelConfig("VQ-4", image_size=16, codebook_size=32, codebook_embed_dim=4)
STEPS = 6
EVENTS = {"max_steps": STEPS, "log_every": 1, "val_every": 3, "ckpt_every": 3, "device": "cpu"}
CURRICULUM = {"warmup_steps": 2, "transition_steps": 2, "kmeans_batches": 2, "kmeans_iters": 5, "codebook_size": 16}
IMAGE = EVENTS | CURRICULUM | {"image_size": 16, "global_batch_size": 8, "val_size": 16, "ema": True}
PROTEIN = EVENTS | CURRICULUM | {
    "encoder_width": 32, "encoder_heads": 4, "decoder_width": 32, "decoder_heads": 2, "decoder_layers": 1,
    "codebook_embed_dim": 8, "ideal_chains": 24, "max_length": 32, "global_batch_size": 4, "val_size": 5,
    "lr_warmup_steps": 2}


@dataclasses.dataclass(frozen=True)
class Kind:
    """write: makes the valid input in an empty folder. read: takes that folder, raises, or returns how many parts of
    the input it left out. files: of those that are damaged. flags: whether errors may name a flag, not a file.
    values: see mutations.damage.
    """

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], object]
    files: str = "**/*"
    flags: bool = False
    values: Callable[[Path, object, Path], str] | None = None


# -------------------------------------------------------------------------------------------------------------- images


def _pictures():
    files = {f"{'cat' if i % 2 else 'dog'}/{i}.{kind.lower()}": encoded(picture(i), kind)
             for i, kind in enumerate(["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PNG", "JPEG"])}
    files["cat/grey.png"] = encoded(picture(9, mode="L"), "PNG")
    return files | {"dog/progressive.jpeg": encoded(picture(10), "JPEG", progressive=True)}


def _small(folder, count=6, prefix=""):
    return {f"{folder}{i % 2}/{prefix}{i}.png": encoded(picture(i), "PNG") for i in range(count)}


def _samples(start, count):
    return {f"{i}.{ext}": content for i in range(start, start + count)
            for ext, content in (("png", encoded(picture(i), "PNG")), ("cls", str(i % 2).encode()))}


def _shards(folder):
    for number in range(2):
        write_tar(folder / f"{number:05d}.tar", _samples(4 * number, 4))


def _list(name):
    def write(folder):
        write_folder(folder, {f"{i}.png": encoded(picture(i), "PNG") for i in range(4)})
        comma = "," if name.endswith("csv") else "\t"
        (folder / name).write_text("".join(f"{i}.png{comma}{i % 2}\n" for i in range(4)))
    return write


def images(path: Path) -> int:
    """All images of a source, as a training or an extraction that allows some bad ones."""
    source = open_images(str(path))
    describe_source(source)
    dataset, bad = ImageDataset(source, 8), BadImageCounter(5)
    for i in range(len(dataset)):
        item = dataset[i]
        assert item["image"].shape == (3, 8, 8)
        bad.add(item["bad"])
    return len(bad.names) + len(source.notes)


def _imagenet(folder):
    (folder / "classes.txt").write_text("a0\nb0\nb1\n")
    write_folder(folder, {f"{split}/{name}/{i}.JPEG": b"" for split in ("train", "val") for name in ("a0", "b0", "b1")
                          for i in range(2)})


# ------------------------------------------------------------------------------------------------- models and runs


def _saved(make):
    return lambda folder: torch.save(make(), folder / "model.pt")


def _gpt_state():
    return {"model": tiny().state_dict(), "ema": None, "gpt": dataclasses.asdict(TINY_GPT),
            "config": {"tokenizer_hash": ""}, "step": 3}


def _gpt_of_llamagen():
    """Without a word about its size."""
    config = dataclasses.replace(GPT_PRESETS["GPT-tiny"], vocab_size=20, block_size=16, num_classes=5)
    return {"model": GPT(config).state_dict()}


def _train_image(folder):
    train_provq.main(to_words(IMAGE | {"results_dir": folder / "run"}))


def _train_protein(folder):
    train_protein.main(to_words(PROTEIN | {"results_dir": folder / "run"}))


def _codes(folder):
    train_provq.main(to_words(IMAGE | {"results_dir": folder / "vq", "max_steps": STEPS}))
    extract_codes.main(["--vq-ckpt", str(folder / "vq"), "--device", "cpu"])


def _gpt_words(folder):
    return to_words(EVENTS | {"preset": "digits", "code_path": folder / "vq" / "codes", "vq_ckpt": folder / "vq",
                              "global_batch_size": 8, "lr_warmup_steps": 2, "sample_every": 0, "val_size": 16,
                              "results_dir": folder / "run"})


def _train_gpt(folder):
    _codes(folder)
    train_c2i.main(_gpt_words(folder))


def resume(main, words):
    """A finished run once more: it is resumed at its end, or from before what is damaged."""
    def read(folder):
        main(words(folder))
    return read


def _flags(parse, check, settings):
    def write(folder):
        (folder / "settings.json").write_text(json.dumps(settings))

    def read(folder):
        check(parse(["--config", str(folder / "settings.json"), "--results-dir", str(folder / "run")]), 1)
    return write, read


def codes(folder: Path) -> None:
    """As train_c2i.py opens them."""
    dataset = open_codes(str(folder))
    for files in dataset.files:
        damage = files.damage()
        if damage:
            raise CannotContinue(damage[0])
    for i in range(0, len(dataset), 100):
        dataset[i]


def _shards_alone(folder):
    _codes(folder)
    vq = folder / "vq"
    for path in (vq / "codes").iterdir():
        path.rename(folder / path.name)
    for path in sorted(vq.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    vq.rmdir()


def _llamagen_codes(folder):
    rng = np.random.default_rng(0)
    for kind in ("codes", "labels"):
        (folder / f"digits_{kind}").mkdir()
    for i in range(4):
        np.save(folder / "digits_codes" / f"{i}.npy", rng.integers(0, 32, (1, 2, 16)))
        np.save(folder / "digits_labels" / f"{i}.npy", np.array([i % 2]))


def _convert(folder):
    convert_codes.main([str(folder), str(folder / "out"), "--codebook-size", "32"])


# --------------------------------------------------------------------------------------------------------- evaluations


class Thumbnail(nn.Module):
    def forward(self, x):
        small = nn.functional.adaptive_avg_pool2d(x.float().mean(1, keepdim=True) / 16, 4).flatten(1)
        return small, small[:, :6], small[:, 4:]


def _digits(start, count):
    return np.repeat((load_digits().images[start : start + count] * 15).astype(np.uint8)[..., None], 3, 3)


def _sets(folder):
    torch.jit.script(Thumbnail()).save(str(folder / "net.pt"))
    np.savez(folder / "samples.npz", _digits(0, 30))
    pooled, _, spatial = Thumbnail()(torch.from_numpy(_digits(30, 40)).permute(0, 3, 1, 2))
    g, s = gaussian_statistics(pooled), gaussian_statistics(spatial)
    np.savez(folder / "reference.npz", _digits(30, 40), mu=g.mu, sigma=g.sigma, mu_s=s.mu, sigma_s=s.sigma)


def _generation(folder):
    generation.main([str(folder / "reference.npz"), str(folder / "samples.npz"), "--features",
                     f"torchscript:{folder / 'net.pt'}", "--device", "cpu", "--no-cache", "--out",
                     str(folder / "out.json")])


def _keep_features(folder):
    generation.main([str(folder / "reference.npz"), str(folder / "samples.npz"), "--features",
                     f"torchscript:{folder / 'net.pt'}", "--device", "cpu", "--cache-dir", str(folder / "cache"),
                     "--out", str(folder / "out.json")])


def _report(folder):
    report.main([str(folder / "run"), "--out", str(folder / "report.html")])


def _compare(folder):
    compare_runs.main([str(folder / "run"), "--picture", str(folder / "figure.png")])


def _evidence(folder):
    lines = (ROOT / "evaluations" / "results" / "core-512.jsonl").read_text().splitlines()[:4]
    (folder / "results.jsonl").write_text("\n".join(lines) + "\n")


# ------------------------------------------------------------------------------------------------------------- protein


def _chains():
    return [helix(f"{i + 1}abc", 8 + i, seed=i) for i in range(4)]


def _tokens(name):
    def write(folder):
        numbers = tuple("123456")
        chains = [TokenChain(f"{i}abc", "A", np.arange(6) + i, "ACDEFG", numbers, "") for i in range(3)]
        write_tokens(folder / name, chains)
    return write


def _structure(name):
    return lambda folder: save_structure(folder, peptide("ALA", "GLY", "SER", "TRP", "ALA"), name)


def _structures(folder):
    for i in range(3):
        save_structure(folder, peptide(*["ALA"] * (8 + i)), f"{i + 1}abc{('.pdb', '.cif', '.bcif')[i]}")


def _read_structures(folder):
    return len(find_structures(folder)) - len(open_structures(folder, max_bad=1))


def _cache(folder):
    write_cache(folder / "cache", _chains(), {})
    for path in (folder / "cache").iterdir():
        path.rename(folder / path.name)
    (folder / "cache").rmdir()


def _read_cache(folder):
    found = open_structures(folder)
    for i in range(len(found)):
        found[i].coords.sum()


def _task(kind):
    def write(folder):
        write_helix(folder / "pdb", "one", 5, numbers=[7, 8, 8, 9, 11], codes=["", "", "A", "", ""])
        labels = {"label": "a"} if kind == "classification" else {"labels": [0, 1, None, 1, 0]}
        rows = [{"task": "toy", "kind": kind}]
        rows += [{"id": "a", "split": split, "structure": "pdb/one.pdb", "chain": "A",
                  "residues": ["7", "8", "8A", "9", "11"]} | labels for split in ("train", "valid", "test", "other")]
        (folder / "task.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return write


def _read_task(folder):
    task_identity(folder / "task.jsonl")
    return sum(read_task(folder / "task.jsonl").filtered().left_out.values())


def _lists(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mini_archive.write_structure", lambda *_: None)  # lists have their own coordinates
        mini = MiniArchive(folder)
    mini.local.mkdir(parents=True)
    archive = Archive.open(mini.root, None)
    for name in ("BindInt", "BindShake", "Homo"):
        files = list_files(archive, name)
        for k, path in enumerate(files.values()):
            save_processed(path, [processed_row(name, i) for i in range(k, 12, len(files))])


def _damage_list(path, rng, canary):
    """A value of an entry, or of its chain."""
    task = "Homo" if "homology" in str(path) else "BindShake" if "shake" in str(path) else "BindInt"
    rows = [processed_row(task, i) for i in range(3)]
    row = rng.choice(rows)
    row["pdb_chain"] = chain = dataclasses.replace(row["pdb_chain"])
    if rng.random() < 0.5:
        field = rng.choice([f.name for f in dataclasses.fields(chain)])
        value = getattr(chain, field)
        array = np.asarray(value)
        arrays = [array[:-1], array[None], array.astype("S3"), array] if array.ndim else []
        object.__setattr__(chain, field, rng.choice([*ODD, *arrays * 5, Canary(canary)]))
        done = f"{field} = {str(getattr(chain, field))[:40]!r}"
    else:
        done = change_value(rows, rng, [*ODD, *[Canary(canary)] * 10, np.zeros(3), np.array("x"), b"x"])
    save_processed(path, rows)
    return done


def _read_lists(folder):
    archive = Archive.open(folder / "struct_token_bench_release_data", None)
    for name in ("BindInt", "BindShake", "Homo"):
        read_released(archive, name)


RAW = {"BindInt": "interpro", "BindBio": "biolip", "BindShake": "proteinshake", "Ept": "epitopes",
       "FlexRMSF": "atlas", "Homo": "homology"}  # task -> the raw files that it is read from


def _raw_files(folder):
    mini = MiniArchive(folder)
    for source in RAW.values():
        getattr(mini, source)()


def _read_raw_files(folder):
    archive = Archive.open(folder / "struct_token_bench_release_data", folder / "pdb_data" / "mmcif_files")
    for name in RAW:
        read_raw(archive, name)


def _prepared(folder):
    _task("binary")(folder)
    save_prepared(read_task(folder / "task.jsonl"), folder / "task.npz", "the source")


def _read_prepared(folder):
    assert load_prepared(folder / "task.npz", "the source") is not None


def _probe(folder):
    _task("binary")(folder)
    _read_probe(folder)


def _read_probe(folder):
    train_task.main(["--task", str(folder / "task.jsonl"), "--tokenizer", "foldseek", "--results-dir",
                     str(folder / "out"), "--max-steps", "2", "--warmup-steps", "1", "--seeds", "1",
                     "--learning-rates", "0.01", "--device", "cpu"])


KINDS = {kind.name: kind for kind in [
    Kind("image folder", lambda folder: write_folder(folder, _pictures()), images),
    Kind("image zip", lambda folder: write_zip(folder / "images.zip", _pictures()), lambda f: images(f / "images.zip")),
    Kind("image tar", lambda folder: write_tar(folder / "images.tar", _small("c")), lambda f: images(f / "images.tar")),
    Kind("WebDataset shards", _shards, images),
    Kind("image list .txt", _list("list.txt"), lambda f: images(f / "list.txt"), "list.txt"),
    Kind("image list .csv", _list("list.csv"), lambda f: images(f / "list.csv"), "list.csv"),
    Kind("ImageNet-100 classes", _imagenet, lambda f: make_imagenet100.read_classes(f / "classes.txt"), "classes.txt"),
    *(Kind(f"--config of {name}", *_flags(parse, check, settings), flags=True) for name, parse, check, settings in (
        ("tokenizer/train_provq.py", train_config.parse_config, train_config.check, IMAGE),
        ("autoregressive/train_c2i.py", gpt_config.parse_config, gpt_config.check, EVENTS | {"code_path": "x"}),
        ("protein/train_provq.py", protein_config.parse_config, protein_config.check, PROTEIN))),
    Kind("tokenizer checkpoint", _saved(lambda: {"model": VQModel(VQ).state_dict(), "config": VQ.to_dict(), "step": 3}),
         lambda f: load_tokenizer(f / "model.pt")),
    Kind("tokenizer of LlamaGen", _saved(lambda: {"model": to_llamagen_state_dict(VQModel(VQ))}),
         lambda f: load_tokenizer(f / "model.pt")),
    Kind("tokenizer export", lambda f: write_tokenizer(f / "export"), lambda f: load_tokenizer(f / "export")),
    Kind("GPT checkpoint", _saved(_gpt_state), lambda f: load_gpt(f / "model.pt")),
    Kind("GPT of LlamaGen", _saved(_gpt_of_llamagen), lambda f: load_gpt(f / "model.pt", num_codes=16)),
    Kind("GPT export", lambda f: (write_tokenizer(f / "vq"), write_gpt(f / "export", f / "vq")),
         lambda f: load_gpt(f / "export"), "export/*"),
    Kind("structure tokenizer checkpoint", _saved(lambda: {"model": build().state_dict(), "config": SMALL.to_dict()}),
         lambda f: load_structure_tokenizer(f / "model.pt")),
    Kind("structure tokenizer export", lambda f: save_structure_tokenizer(build(), f / "export"),
         lambda f: load_structure_tokenizer(f / "export")),
    Kind("run of tokenizer/train_provq.py", _train_image,
         resume(train_provq.main, lambda f: to_words(IMAGE | {"results_dir": f / "run"})), "run/**/*.[jp]*"),
    Kind("run of autoregressive/train_c2i.py", _train_gpt, resume(train_c2i.main, _gpt_words), "run/**/*.[jp]*"),
    Kind("run of protein/train_provq.py", _train_protein,
         resume(train_protein.main, lambda f: to_words(PROTEIN | {"results_dir": f / "run"})), "run/**/*.[jp]*"),
    Kind("code shards", _shards_alone, codes),
    Kind("codes of LlamaGen", _llamagen_codes, _convert),
    Kind("image sets and statistics", _sets, _generation),
    Kind("features that are kept", lambda f: (_sets(f), _keep_features(f)), _keep_features, "cache/**/*.npz"),
    Kind("runs of report.py", _train_image, _report, "run/*[!0-9]*/*.[jnp]*"),
    Kind("runs of compare_runs.py", _train_image, _compare, "run/*.json*"),
    Kind("results of the evidence bed", _evidence, lambda f: store.read(f / "results.jsonl")),
    *(Kind(f"tokens {ext}", _tokens(f"a{ext}"), lambda f, ext=ext: read_tokens(f / f"a{ext}"))
      for ext in (".fasta", ".jsonl", ".npz")),
    *(Kind(f"structure {ext}", _structure(f"test{ext}"), lambda f, ext=ext: read_structure(f / f"test{ext}"))
      for ext in (".pdb", ".cif", ".bcif", ".pdb.gz", ".cif.gz")),
    Kind("structure folder", _structures, _read_structures),
    Kind("structure cache", _cache, _read_cache),
    Kind("binary task .jsonl", _task("binary"), _read_task),
    Kind("classification task .jsonl", _task("classification"), _read_task),
    Kind("lists of StructTokenBench", _lists, _read_lists, "**/processed*", values=_damage_list),
    Kind("raw files of StructTokenBench", _raw_files, _read_raw_files, "struct*/**/*.*"),
    Kind("prepared task", _prepared, _read_prepared, "task.npz"),
    Kind("results of train_task.py", _probe, _read_probe, "out/**/*.[jn]*"),
]}


def released() -> None:
    """What a command has locked."""
    with contextlib.suppress(OSError):
        lock.release()

