"""Tokens of many structures: shards that appear whole, one after another, and a manifest when all are there.

    OUT/settings.json               what tokens depend on: tokenizer, structures, flags; whoever goes on has the same
    OUT/shard-00000.npz             of structures 0 to shard_size - 1 of the list; or .jsonl, .fasta, see token_files.py
    OUT/shard-00000.embeddings.npz  of the same chains, if asked for; or .safetensors, see write_embeddings
    OUT/shard-00000.json            its chains and residues, and what was left out and why; written after the others
    OUT/manifest.json               all of that in one; written last

Shards are places in the list of structures, so any number of processes may begin, and any other go on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protein.language import Vocabulary
from protein.token_files import FORMATS, TokenChain, read_tokens, write_tokens
from tokenizer.runtime import config, distributed, lock
from tokenizer.runtime.files import atomic_write, atomic_write_json
from tokenizer.runtime.npz import Npz
from tokenizer.runtime.parsing import parsing, require_file

SETTINGS, MANIFEST = "settings.json", "manifest.json"


def shard_name(number: int) -> str:
    return f"shard-{number:05d}"


def open_shards(folder: Path, settings: Mapping[str, Any], *, flag: str = "--out") -> None:
    """Begin a folder of shards, or go on with one. Collective.

    ValueError on all ranks: other files lie there, it was begun with other settings (each is named), or another
    process is writing it.
    """
    complaint = None
    if distributed.is_main():
        if (folder / SETTINGS).exists():
            changed = config.diff(config.load(folder / SETTINGS), dict(settings))
            if changed:
                told = "; ".join(f"{name}: {old!r}, now {new!r}" for name, old, new in changed)
                complaint = f"{flag} {folder} was begun with other settings ({told}); name a new folder"
        elif not lock.is_unused(folder):
            complaint = f"{flag} {folder} holds other files; name a new folder"
    (complaint, *_) = distributed.gather_objects(complaint)
    if complaint:
        raise ValueError(complaint)
    lock.own(folder, flag)
    if distributed.is_main() and not (folder / SETTINGS).exists():
        atomic_write_json(folder / SETTINGS, dict(settings))
    distributed.wait_for_all()


def read_record(folder: Path, number: int) -> dict[str, Any] | None:
    """What a finished shard says of itself; None: there is none yet."""
    path = folder / f"{shard_name(number)}.json"
    return config.load(path) if path.exists() else None


def write_shard(folder: Path, number: int, kind: str, entries: Sequence[TokenChain], record: Mapping[str, Any],
                vectors: Sequence[npt.NDArray[np.float32]] | None = None, embedding_kind: str = ".npz") -> None:
    """kind: of FORMATS. vectors: float32 (L, D) of each entry. A shard without chains is its record alone."""
    name = shard_name(number)
    if entries:
        write_tokens(folder / f"{name}{kind}", entries)
        if vectors is not None:
            write_embeddings(folder / f"{name}.embeddings{embedding_kind}",
                             [(entry.name, entry.chain) for entry in entries], vectors)
    counts = {"chains": len(entries), "residues": sum(len(entry.tokens) for entry in entries)}
    atomic_write_json(folder / f"{name}.json", {**counts, **record})


def finish_shards(folder: Path, count: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest of `count` finished shards and return it. One process."""
    records = [read_record(folder, number) for number in range(count)]
    absent = [shard_name(number) for number, record in enumerate(records) if record is None]
    if absent:
        raise ValueError(f"{folder}: {', '.join(absent[:20])} is missing; do the processes see one file system?")
    found = [record for record in records if record is not None]
    manifest = {**settings, "chains": sum(r["chains"] for r in found), "residues": sum(r["residues"] for r in found),
                "left_out": [reason for r in found for reason in r["left_out"]],
                "filtered": sum(r["filtered"] for r in found),
                "shards": [{"name": shard_name(i), "chains": r["chains"], "residues": r["residues"]}
                           for i, r in enumerate(found)]}
    atomic_write_json(folder / MANIFEST, manifest)
    return manifest


def token_files(path: Path) -> list[Path]:
    """A token file, or the shards of a folder in their order. ValueError: a folder that is not complete."""
    if not path.is_dir():
        return [path]
    if not (path / MANIFEST).exists():
        raise ValueError(f"{path}: no {MANIFEST}; a folder of tokens has one when encode.py is through: run it again")
    manifest = config.load(path / MANIFEST)
    kind, shards = manifest.get("format"), manifest.get("shards")
    if kind not in FORMATS or not isinstance(shards, list) or not all(
            isinstance(shard, dict) and isinstance(shard.get("name"), str) for shard in shards):
        raise ValueError(f"{path / MANIFEST}: not what encode.py wrote")
    return [path / f"{Path(shard['name']).name}{kind}" for shard in shards if shard.get("chains")]


def iterate_tokens(paths: Sequence[Path]) -> Iterator[list[TokenChain]]:
    """The chains of token files and folders, one file or shard at a time. Errors: token_files, read_tokens."""
    for path in paths:
        for file in token_files(path):
            yield read_tokens(file)


def vocabulary_of(paths: Sequence[Path], num_codes: int | None) -> Vocabulary:
    """The words of token files and folders; num_codes: K, which only folders record.

    ValueError: nobody says K, or tokens of several tokenizers.
    """
    said, hashes = set() if num_codes is None else {num_codes}, set()
    for path in paths:
        if path.is_dir():
            token_files(path)
            said.add(int(config.load(path / MANIFEST)["codes"]))
    for part in iterate_tokens(paths):
        hashes |= {chain.tokenizer for chain in part}
    if len(said) != 1:
        told = ", ".join(map(str, sorted(said))) or "nothing"
        raise ValueError(f"--num-codes: the number of the tokenizer's codes is not clear ({told}); give it, once")
    if len(hashes) > 1:
        raise ValueError(f"{', '.join(map(str, paths))}: tokens of {len(hashes)} tokenizers ("
                         f"{', '.join(sorted(h[:8] or 'unknown' for h in hashes))}) are different languages")
    return Vocabulary(said.pop(), hashes.pop())


def join_shards(folder: Path, count: int, kind: str, out: Path) -> None:
    """All shards as one token file; text is copied, .npz held in memory. ValueError: there are no chains."""
    parts = [part for part in (folder / f"{shard_name(i)}{kind}" for i in range(count)) if part.exists()]
    if not parts:
        raise ValueError(f"{out}: no chains to write")
    out.parent.mkdir(parents=True, exist_ok=True)
    if kind == ".npz":
        write_tokens(out, [chain for part in parts for chain in read_tokens(part)])
        return

    def copy(file: Any) -> None:
        for part in parts:
            with part.open("rb") as source:
                shutil.copyfileobj(source, file)

    atomic_write(out, copy)


# ---------------------------------------------------------------------------------------------------------------------
# embeddings


def write_embeddings(path: Path, labels: Sequence[tuple[str, str]], vectors: Sequence[npt.NDArray[np.float32]]) -> None:
    """Vectors (L, D) of the residues of each (name, chain id) as one array, .npz or .safetensors, atomically.

    embeddings float32 (residues, D), NaN for residues without a token; offsets int64 (n + 1,): chain i has rows
    offsets[i] to offsets[i + 1]; names and chains, n texts: arrays of .npz, JSON in the metadata of .safetensors.
    """
    arrays: dict[str, Any] = {
        "embeddings": np.concatenate(list(vectors)),
        "offsets": np.cumsum([0, *(len(rows) for rows in vectors)]).astype(np.int64)}
    names, chains = [name for name, _ in labels], [chain for _, chain in labels]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        atomic_write(path, lambda file: np.savez(file, names=np.array(names), chains=np.array(chains), **arrays))
        return
    from safetensors.numpy import save

    atomic_write(path, lambda file: file.write(save(
        arrays, metadata={"names": json.dumps(names), "chains": json.dumps(chains)})))


def read_embeddings(path: Path) -> dict[tuple[str, str], npt.NDArray[np.float32]]:
    """(name, chain id) -> float32 (L, D). FileNotFoundError; ValueError naming the file: damaged, of another kind."""
    require_file(path)
    if path.suffix == ".npz":
        with Npz(path) as file:
            absent = [key for key in ("embeddings", "offsets", "names", "chains") if key not in file.names]
            if absent:
                raise ValueError(f"{path}: no array {absent[0]}; not what encode.py --embeddings wrote")
            rows, offsets, names, chains = (file.array(key) for key in ("embeddings", "offsets", "names", "chains"))
    else:
        from safetensors import safe_open

        with parsing(path, "cannot be read as .safetensors"), safe_open(str(path), framework="np") as tensors:
            rows, offsets = tensors.get_tensor("embeddings"), tensors.get_tensor("offsets")
            names, chains = (json.loads(tensors.metadata()[key]) for key in ("names", "chains"))
    if len(offsets) != len(names) + 1 or len(names) != len(chains) or offsets[-1] != len(rows):
        raise ValueError(f"{path}: offsets do not cut {len(rows)} rows into {len(names)} chains")
    return {(str(name), str(chain)): rows[start:end]
            for name, chain, start, end in zip(names, chains, offsets[:-1], offsets[1:], strict=True)}
