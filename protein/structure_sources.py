"""Where chains come from: structure files, folders and .tar archives of them, Foldcomp databases, and caches.

Every kind is a list of `Source`s, one for each file, member, entry or cached chain. A list is cheap; reading is done in
its order by any number of processes, a few ahead of the reader, so memory does not grow with the list.

An entry that a folder or archive has in several formats is read once: as .bcif, .cif, .mmcif, .pdb, .ent or .pdb1,
whichever comes first, and not compressed if both are there.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import re
import tarfile
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

from protein.reading_flags import require_structures
from protein.structure_cache import MANIFEST, StructureSet, read_cache
from protein.structure_io import (
    EXTENSIONS,
    Chain,
    Filtered,
    StructureWarning,
    file_stem,
    mask_plddt,
    read_content,
    read_structure,
)
from tokenizer.runtime.command import CannotContinue
from tokenizer.runtime.parsing import parsing, read_text, require_file

_PREFERRED = (".bcif", ".cif", ".mmcif", ".pdb", ".ent", ".pdb1")
_TOGETHER = 16  # sources that a process reads at a time
_NAMED = 20     # of many complaints


@dataclass(frozen=True)
class Source:
    """One thing to read. name: of its chains. kind: file, tar, foldcomp or cache. chains: ids to read; None: all."""

    name: str
    path: Path
    kind: str = "file"
    member: str = ""  # of a .tar: its name
    offset: int = 0   # of a .tar: where the member's bytes begin; else number of the entry or chain
    size: int = 0     # bytes, as far as known
    chains: tuple[str, ...] | None = None

    @property
    def place(self) -> str:
        """How messages name it."""
        return f"{self.path}/{self.member}" if self.kind in ("tar", "foldcomp") else str(self.path)


class Reading(NamedTuple):
    """What one source gave. failure: why it gave no chain. filtered: a filter left it out; it is not at fault."""

    source: Source
    chains: list[Chain]
    notes: list[str]
    failure: str = ""
    filtered: bool = False


# ---------------------------------------------------------------------------------------------------------------------
# lists


def find_structures(folder: str | Path) -> list[Path]:
    """Structure files in a folder and its subfolders, sorted by name, one of each entry (see the head of this file).

    Hidden files and folders are skipped. StructureWarning: entries in several formats. Raises FileNotFoundError, and
    ValueError when there are none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found: dict[str, list[Path]] = {}
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in files:
            if not file.startswith(".") and is_structure(file):
                path = Path(root, file)
                found.setdefault(structure_name(path, folder), []).append(path)
    if not found:
        raise ValueError(f"{folder}: no structure files ({' '.join(EXTENSIONS)}, also with .gz)")
    chosen = _one_format(folder, found, key=str)
    return [chosen[name] for name in sorted(chosen)]


def is_structure(name: str) -> bool:
    return name.lower().removesuffix(".gz").endswith(EXTENSIONS)


def structure_name(path: Path, folder: Path) -> str:
    """Chain.name of a file found in a folder: its path from there, without extension."""
    return (path.parent.relative_to(folder) / file_stem(path)).as_posix()


def _one_format(place: Path, found: Mapping[str, list[Any]], key: Callable[[Any], str]) -> dict[str, Any]:
    """Of each name the item whose file name, by key, comes first in _PREFERRED."""
    def rank(item: Any) -> tuple[int, bool, str]:
        name = key(item).lower()
        plain = name.removesuffix(".gz")
        return next(i for i, e in enumerate(_PREFERRED) if plain.endswith(e)), name != plain, name

    chosen = {name: min(items, key=rank) for name, items in found.items()}
    several = [name for name, items in found.items() if len(items) > 1]
    if several:
        one = chosen[several[0]]
        others = ", ".join(Path(key(item)).name for item in found[several[0]] if item is not one)
        warnings.warn(f"{place}: several formats of {len(several)} entries; {Path(key(one)).name}, for one, is read, "
                      f"and not {others}", StructureWarning, stacklevel=3)
    return chosen


def list_sources(paths: Sequence[Path], ids: Path | None = None) -> list[Source]:
    """Files, folders, .tar archives, Foldcomp databases and caches -> what they hold, in that order.

    ids: a file of the names to keep, one a line: NAME, NAME_CHAIN, or NAME CHAIN.

    FileNotFoundError: no such file or folder. ValueError: nothing in a folder or archive, names that occur twice,
    ids that do not occur.
    """
    sources: list[Source] = []
    for path in paths:
        require_structures([path])
        if (path / MANIFEST).exists():
            names = _cache(path)
            sources += [Source(name, path, "cache", chain_id, i, chains=None)
                        for i, (name, chain_id) in enumerate(zip(names.names, names.chain_ids, strict=True))]
        elif path.is_dir():
            sources += [Source(structure_name(file, path), file, size=file.stat().st_size)
                        for file in find_structures(path)]
        elif path.name.lower().endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")):
            raise ValueError(f"{path}: only plain .tar archives are read where they are; unpack this one")
        elif path.suffix.lower() == ".tar":
            sources += _tar_members(path)
        elif path.with_name(path.name + ".index").exists() and path.with_name(path.name + ".dbtype").exists():
            sources += _foldcomp_entries(path)
        else:
            sources.append(Source(structure_name(path, path.parent), path, size=path.stat().st_size))
    seen: dict[str, dict[str | None, Source]] = {}  # by name, and in caches, which list chains, by chain
    twice = []
    for source in sources:
        known = seen.setdefault(source.name, {})
        chain = source.member if source.kind == "cache" else None
        other = next(iter(known.values()), None) if chain is None or None in known else known.get(chain)
        known.setdefault(chain, source)
        if other is not None:
            twice.append(f"{other.place} and {source.place} would both be called {source.name}")
    if twice:
        raise ValueError(f"{'; '.join(twice[:_NAMED])}; read them separately" + _more(len(twice)))
    return sources if ids is None else _only(sources, ids)


def _more(count: int) -> str:
    return f" ({count} in all)" if count > _NAMED else ""


def _only(sources: Sequence[Source], ids: Path) -> list[Source]:
    """The sources, and of them the chains, that a file of ids names, in the sources' order."""
    names = {source.name for source in sources}
    wanted: dict[str, set[str] | None] = {}
    unknown = []
    for line in read_text(ids).splitlines():
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        name, chain = words[0], words[1] if len(words) > 1 else None
        if chain is None and name not in names:
            name, _, chain = name.rpartition("_")
        if name not in names or len(words) > 2:
            unknown.append(line.strip())
        elif chain is None or wanted.get(name, set()) is None:
            wanted[name] = None
        else:
            chosen = wanted.setdefault(name, set())
            assert chosen is not None
            chosen.add(chain)
    if unknown:
        raise ValueError(f"--ids {ids}: {len(unknown)} of its lines name nothing that is there: "
                         f"{', '.join(unknown[:_NAMED])}" + _more(len(unknown)))
    if not wanted:
        raise ValueError(f"--ids {ids}: names nothing")
    kept = []
    for source in sources:
        chains = wanted.get(source.name, set())
        if source.kind == "cache":
            if chains is None or source.member in chains:
                kept.append(source)
        elif chains is None or chains:
            kept.append(replace(source, chains=None if chains is None else tuple(sorted(chains))))
    return kept


def _tar_members(path: Path) -> list[Source]:
    """The structure files of an archive, such as AlphaFold DB's (which hold each prediction twice). Of members of one
    name the last counts, as when it is unpacked: archives are brought up to date by appending.
    """
    require_file(path)
    found: dict[str, dict[str, Source]] = {}
    with parsing(path, "cannot be read as a .tar archive"), tarfile.open(path, "r:") as archive:
        for member in archive:
            name = member.name.removeprefix("./")
            if member.isfile() and is_structure(name) and not Path(name).name.startswith("."):
                label = structure_name(Path(name), Path())
                found.setdefault(label, {})[name] = Source(label, path, "tar", name, member.offset_data, member.size)
    if not found:
        raise ValueError(f"{path}: no structure files in it ({' '.join(EXTENSIONS)}, also with .gz)")
    chosen = _one_format(path, {label: [*members.values()] for label, members in found.items()},
                         key=lambda source: source.member)
    return [chosen[name] for name in sorted(chosen)]


def _foldcomp_entries(path: Path) -> list[Source]:
    entries: list[Source] = []
    rows = read_text(path.with_name(path.name + ".index")).splitlines()
    lookup = path.with_name(path.name + ".lookup")
    with parsing(path, "its .index or .lookup is damaged"):
        names = dict(line.split("\t")[:2] for line in read_text(lookup).splitlines()) if lookup.exists() else {}
        for i, row in enumerate(rows):
            key, _, size = row.split("\t")
            name = re.sub(r"\.(pdb|cif|fcz)(\.gz)?$", "", names.get(key, key))
            entries.append(Source(name, path, "foldcomp", name, i, int(size)))
    _foldcomp(path)  # that the package is there
    return entries


@functools.lru_cache(maxsize=4)
def _foldcomp(path: Path) -> Any:
    try:
        import foldcomp
    except ImportError as error:
        raise ImportError(f"{path} is a Foldcomp database; pip install foldcomp to read it") from error
    return foldcomp.open(str(path))


@functools.lru_cache(maxsize=4)
def _cache(path: Path) -> StructureSet:
    return read_cache(path)


def digest(sources: Iterable[Source]) -> str:
    """64 hex digits of what is listed: names, chains and sizes, not where it lies."""
    sha256 = hashlib.sha256()
    for source in sources:
        sha256.update(repr((source.name, source.kind, source.member, source.size, source.chains)).encode())
    return sha256.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# reading


def read_source(source: Source, options: Mapping[str, Any]) -> Reading:
    """Never fails for what a file is wrong with. options: of read_structure; a cache has been read with its own."""
    try:
        with collected() as notes:
            chains = _read(source, dict(options))
    except Filtered as error:
        return Reading(source, [], [], str(error), filtered=True)
    except (ValueError, OSError) as error:
        return Reading(source, [], [], str(error))
    return Reading(source, chains, notes)


def _read(source: Source, options: dict[str, Any]) -> list[Chain]:
    if source.chains is not None:
        options["chains"] = source.chains
    if source.kind == "file":
        return read_structure(source.path, name=source.name, **options)
    if source.kind == "tar":
        return read_content(source.path / source.member, lambda _: _member(source), name=source.name, **options)
    if source.kind == "foldcomp":
        with parsing(source.place, "cannot be read from its Foldcomp database"):
            _, text = _foldcomp(source.path)[source.offset]
        return read_content(Path(f"{source.place}.pdb"), lambda _: text.encode(), name=source.name, **options)
    unused = [name for name, value in options.items()
              if name in ("model", "altloc", "plddt_from", "max_resolution", "max_r_free")
              and value not in (None, 1, "first", "b_factor")]
    if unused:
        raise ValueError(f"{source.path} is a cache; pass --{unused[0].replace('_', '-')} to prepare_structures.py")
    chain = _cache(source.path).chain(source.offset)
    wanted = options.get("chains")
    if wanted is not None and chain.chain_id not in wanted:
        raise Filtered(f"{source.path}: chain {chain.label} is not among those asked for")
    if options.get("min_plddt") is not None:
        try:
            chain = mask_plddt(chain, options["min_plddt"])
        except ValueError as error:
            raise ValueError(f"{source.path}: {error}") from error
    if not chain.mask.any():
        raise Filtered(f"{source.path}: chain {chain.label} has no residue with N, CA and C (and a sufficient pLDDT)")
    return [chain]


def _member(source: Source) -> bytes:
    with source.path.open("rb") as file:
        file.seek(source.offset)
        return file.read(source.size)


@contextmanager
def collected() -> Iterator[list[str]]:
    """StructureWarnings inside, as texts; they are there when it ends. Other warnings go their way."""
    notes: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", StructureWarning)
        yield notes
    for warning in caught:
        if issubclass(warning.category, StructureWarning):
            notes.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _read_some(sources: list[Source], options: Mapping[str, Any]) -> list[Reading]:
    return [read_source(source, options) for source in sources]


def read_sources(sources: Iterable[Source], *, num_workers: int = 0, **options: Any) -> Iterator[Reading]:
    """What each source gives, in order. num_workers: processes that read, a few ahead of the reader; 0: this one.

    options: of read_structure.
    """
    if not num_workers:
        yield from (read_source(source, options) for source in sources)
        return
    left = iter(sources)
    pending: deque[Future[list[Reading]]] = deque()
    with ExitStack() as stack:
        # Not fork: the caller may have threads, which a forked child would find in the middle of something.
        pool = stack.enter_context(ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")))
        stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        while True:
            while len(pending) < 2 * num_workers + 1 and (some := list(itertools.islice(left, _TOGETHER))):
                pending.append(pool.submit(_read_some, some, options))
            if not pending:
                return
            try:
                found = pending.popleft().result()
            except BrokenProcessPool as error:
                raise CannotContinue("a process that reads structures has died, for want of memory perhaps; start "
                                     "again with fewer --num-workers") from error
            yield from found


def reading_workers(count: int, asked: int | None, processes: int = 1) -> int:
    """--num-workers of a command: what was asked for; else the cores, shared by the processes of this machine, unless
    there is so little to read that starting them takes longer.
    """
    if asked is not None:
        return asked
    return max(1, (os.cpu_count() or 1) // processes) if count > 200 else 0


# ---------------------------------------------------------------------------------------------------------------------
# folders


class Failure(NamedTuple):
    path: Path
    reason: str  # starts with the path


class FolderContents(NamedTuple):
    """chains: of all readable files, in the order of the files' names; failures: the files that gave none."""

    chains: list[Chain]
    failures: list[Failure]


def iterate_folder(
    folder: str | Path, *, max_failures: int = 0, num_workers: int = 0, **options: Any
) -> Iterator[list[Chain] | Failure]:
    """One entry per file of `find_structures`, in its order: chains, or why there are none.

    max_failures: how many are tolerated; 0 stops at the first. num_workers: processes that read; 0: this one.
    options: of `read_structure`; what its filters leave out is no failure. Raises ValueError with the first 20 reasons
    when there are more failures. StructureWarnings are those of the files.
    """
    folder = Path(folder)
    sources = [Source(structure_name(path, folder), path) for path in find_structures(folder)]
    failures: list[Failure] = []
    for reading in read_sources(sources, num_workers=num_workers, **options):
        for note in reading.notes:
            warnings.warn(note, StructureWarning, stacklevel=2)
        if not reading.failure:
            yield reading.chains
            continue
        failure = Failure(reading.source.path, reading.failure)
        if not reading.filtered:
            failures.append(failure)
            if len(failures) > max_failures:
                reasons = "; ".join(failure.reason for failure in failures[:_NAMED])
                raise ValueError(f"{len(failures)} unreadable structure file(s), {max_failures} are tolerated: "
                                 f"{reasons}")
        yield failure


def read_folder(folder: str | Path, *, max_failures: int = 0, num_workers: int = 0, **options: Any) -> FolderContents:
    """All chains of a folder's structure files. Arguments and errors: `iterate_folder`."""
    contents = FolderContents([], [])
    for result in iterate_folder(folder, max_failures=max_failures, num_workers=num_workers, **options):
        if isinstance(result, Failure):
            contents.failures.append(result)
        else:
            contents.chains.extend(result)
    return contents
