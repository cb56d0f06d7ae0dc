"""tmp"""
from __future__ import annotations
import contextlib,functools,multiprocessing,os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from protein.structure_io import EXTENSIONS, Chain, _stem, read_structure
# ---------------------------------------------------------------------------------------------------------------------
# folders


class Failure(NamedTuple):
    path: Path
    reason: str  # starts with the path


class FolderContents(NamedTuple):
    """chains: of all readable files, in the order of the files' names; failures: the files that gave none."""

    chains: list[Chain]
    failures: list[Failure]


def find_structures(folder: str | Path) -> list[Path]:
    """Structure files in a folder and its subfolders, sorted by path. Hidden files and folders are skipped.

    Raises FileNotFoundError, and ValueError when there are none or two differ in the extension only.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    names: dict[str, Path] = {}
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for file in files:
            base = file.lower().removesuffix(".gz")
            if not file.startswith(".") and base.endswith(EXTENSIONS):
                path = Path(root, file)
                same = names.setdefault(structure_name(path, folder), path)
                if same != path:
                    raise ValueError(f"{path} and {same} would have the same name; keep one of them")
    if not names:
        raise ValueError(f"{folder}: no structure files ({' '.join(EXTENSIONS)}, also with .gz)")
    return [names[name] for name in sorted(names)]


def structure_name(path: Path, folder: Path) -> str:
    """Chain.name of a file found in a folder: its path from there, without extension."""
    return (path.parent.relative_to(folder) / _stem(path)).as_posix()


def iterate_folder(
    folder: str | Path, *, max_failures: int = 0, num_workers: int = 0, **options: Any
) -> Iterator[list[Chain] | Failure]:
    """One entry per file of `find_structures`, in its order: chains, or why there are none.

    max_failures: how many are tolerated; 0 stops at the first. num_workers: processes that read; 0: this one.
    options: of `read_structure`. Raises ValueError with the first 20 reasons when there are more failures.
    """
    folder = Path(folder)
    paths = find_structures(folder)
    read = functools.partial(_read_or_fail, folder=folder, options=options)
    failures: list[Failure] = []
    with contextlib.ExitStack() as stack:
        if num_workers:
            # Not fork: the caller may have threads, which a forked child would find in the middle of something.
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(num_workers))
            results: Iterator[list[Chain] | Failure] = pool.imap(read, paths, chunksize=16)
        else:
            results = map(read, paths)
        for result in results:
            if isinstance(result, Failure):
                failures.append(result)
                if len(failures) > max_failures:
                    reasons = "; ".join(failure.reason for failure in failures[:20])
                    raise ValueError(f"{len(failures)} unreadable structure file(s), {max_failures} are tolerated: "
                                     f"{reasons}")
            yield result


def _read_or_fail(path: Path, folder: Path, options: dict[str, Any]) -> list[Chain] | Failure:
    try:
        return read_structure(path, name=structure_name(path, folder), **options)
    except (ValueError, OSError) as error:
        return Failure(path, str(error))


def read_folder(folder: str | Path, *, max_failures: int = 0, num_workers: int = 0, **options: Any) -> FolderContents:
    """All chains of a folder's structure files. Arguments and errors: `iterate_folder`."""
    contents = FolderContents([], [])
    for result in iterate_folder(folder, max_failures=max_failures, num_workers=num_workers, **options):
        if isinstance(result, Failure):
            contents.failures.append(result)
        else:
            contents.chains.extend(result)
    return contents


