"""Files that appear whole: written beside their final name, and renamed when all bytes are on disk. No torch."""

import contextlib
import errno
import json
import os
import re
import secrets
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

_TEMPORARY = re.compile(r"\..*\.([^.]+)-(\d+)-[0-9a-f]{8}\.tmp")  # host and process
_HOST = re.sub(r"[^\w-]", "_", socket.gethostname())[:64]
_FORGOTTEN_AFTER = 3600  # seconds: a temporary file of another host, whose processes cannot be asked for
_ATTEMPTS = 20           # while other processes try the same folder


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Create or replace `path` with what write(file) writes; a reader sees the old bytes or all of the new ones.

    The temporary file is in the same folder (a rename is atomic only within one file system), under a name that no
    other process uses. OSError: see `located`.
    """
    path = Path(path)
    begin = os.fsdecode(os.fsencode(path.name)[:100])  # names have at most 255 bytes
    temporary = path.with_name(f".{begin}.{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with located(path):
            with open(temporary, "xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def located(path: str | Path) -> Iterator[None]:
    """An OSError inside that names no file, or a temporary one, names path; on a full disk also the free space.

    So does one that a library has buried under a RuntimeError of its own, as torch.save does.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        found: BaseException | None = error
        while found is not None and not isinstance(found, OSError):
            found = found.__cause__ or found.__context__
        if found is None or (found.filename is not None and not is_temporary(Path(str(found.filename)).name)):
            raise
        if found.errno is None:  # NumPy's "100 requested and 3 written"
            raise OSError(f"{path}: {found}{_free_space(Path(path).parent)}") from error
        full = found.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"{found.strerror}{_free_space(Path(path).parent) if full else ''}"
        raise OSError(found.errno, reason, str(path)) from error


def _free_space(folder: Path) -> str:
    try:
        disk = os.statvfs(folder)
    except OSError:  # gone: then its space is the smaller problem
        return ""
    files = ", no more files" if disk.f_files and not disk.f_favail else ""
    return f" ({disk.f_bavail * disk.f_frsize / 1e6:.1f} MB free{files})"


def is_temporary(name: str) -> bool:
    """Whether a file has a name that `atomic_write` gives to unfinished ones."""
    return _TEMPORARY.fullmatch(name) is not None


def remove_temporaries(folder: Path, names: Iterable[str]) -> None:
    """Remove those among the names in folder that `atomic_write` began in a process that is no more."""
    for name in names:
        match = _TEMPORARY.fullmatch(name)
        with contextlib.suppress(FileNotFoundError):
            if match and (_is_dead(int(match[2])) if match[1] == _HOST else
                          time.time() - (folder / name).stat().st_mtime > _FORGOTTEN_AFTER):
                (folder / name).unlink()


def _is_dead(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's
        return False
    return False


def atomic_write_text(path: str | Path, text: str) -> None:
    """`atomic_write` of UTF-8 text."""
    atomic_write(path, lambda file: file.write(text.encode("utf-8")))


def atomic_write_json(path: str | Path, value: Any) -> None:
    """`atomic_write` of anything that JSON holds; NaN and infinities become Python's own words for them."""
    atomic_write_text(path, json.dumps(value, indent=1) + "\n")


def sync_folder(folder: Path) -> None:
    """Make a rename or a new name in this folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def require_writable(folder: str | Path, what: str) -> None:
    """Raise ValueError, starting with what (a flag), unless files can be written to folder. Leaves nothing behind.

    The folder and its parents need not exist. Tried, not asked: root may write where the file system takes nothing.
    """
    folder = Path(folder)
    for attempt in range(_ATTEMPTS):
        created: list[Path] = []
        try:
            created = [parent for parent in (folder, *folder.parents) if not parent.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return
        except OSError as error:
            if isinstance(error, FileNotFoundError) and attempt < _ATTEMPTS - 1:
                continue  # another process that tries the same has just removed the folder
            fix = "name another folder"
            raise ValueError(f"{what} {folder}: no files can be written there ({error}); {fix}") from error
        finally:
            for parent in created:
                with contextlib.suppress(OSError):  # never made, or in use by now
                    parent.rmdir()
