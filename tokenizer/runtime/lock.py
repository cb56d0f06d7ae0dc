"""One folder, one owner: a lock that ends with the process that holds it, however that ends.

`own` locks FOLDER/.lock (flock) until `release` or the end of the process. The kernel drops the lock of a process that
was killed, so there is nothing to clean up by hand; the file itself means nothing, and may be copied with the folder.
Readers do not look at it. All ranks of one torchrun are one owner: rank 0 holds the lock for them.

Across the nodes of a network file system the lock works where flock does: on NFS with its lock manager (the default;
Linux turns flock into a lock of the server), on Lustre mounted with `flock`. Mounted with `nolock`, `local_lock=flock`
or `localflock` it excludes the processes of one node only. Where flock is not supported at all, `own` says so and goes
on: nothing then keeps a second owner out.
"""

import atexit
import fcntl
import json
import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from tokenizer.runtime import distributed
from tokenizer.runtime.files import is_temporary, located, remove_temporaries

LOCK_FILE = ".lock"
_PATIENCE = 2.0  # seconds for another process to write down who it is, or to remove what it has just created


@dataclass
class _Held:
    descriptor: int      # of the lock file; closing it drops the lock
    folder: int          # descriptor of its folder, which may have been renamed
    created: list[Path]  # folders that were not there before, the innermost first


_held: dict[Path, _Held] = {}


def own(folder: str | Path, flag: str) -> None:
    """Make this process, or all ranks of this torchrun, the only one that writes to `folder`, which need not exist.

    Collective. Temporary files that a killed owner left there go. Owning a folder again changes nothing.

    ValueError on all ranks, starting with flag and folder: another process owns it (its host and process id are named),
    or no lock file can be written.
    """
    folder = Path(folder)
    refusal: str | None = None
    if distributed.is_main() and folder.resolve() not in _held:
        try:
            with located(folder / LOCK_FILE):
                refusal = _lock(folder)
        except OSError as error:
            refusal = f"cannot be locked ({error}); name another folder"
    (refusal, *_) = distributed.gather_objects(refusal)
    if refusal:
        raise ValueError(f"{flag} {folder} {refusal}")


def release(folder: str | Path | None = None) -> None:
    """Give up a folder, or all that this process owns: lock files go, and folders that `own` made if they are empty."""
    owned = list(_held) if folder is None else [path for path in _held if path == Path(folder).resolve()]
    for held in map(_held.pop, owned):
        with suppress(OSError):  # gone with its folder, or replaced
            if os.stat(LOCK_FILE, dir_fd=held.folder).st_ino == os.fstat(held.descriptor).st_ino:
                os.unlink(LOCK_FILE, dir_fd=held.folder)
        os.close(held.descriptor)
        os.close(held.folder)
        for parent in held.created:
            with suppress(OSError):  # in use by now
                parent.rmdir()


def is_unused(folder: Path) -> bool:
    """Whether folder is absent, or holds nothing but what a killed owner leaves before it has written anything."""
    return not folder.exists() or all(p.name == LOCK_FILE or is_temporary(p.name) for p in folder.iterdir())


def _lock(folder: Path) -> str | None:
    """None: it is ours now. Else why not."""
    deadline = time.monotonic() + _PATIENCE
    created: list[Path] = []
    while True:
        late = time.monotonic() > deadline
        created += [parent for parent in (folder, *folder.parents) if not parent.exists() and parent not in created]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # another process removed the folder that it had created
            if late:
                raise
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(descriptor, 4096)
            os.close(descriptor)
            if owner or late:
                return _in_use(owner)
            time.sleep(0.05)
            continue
        except OSError as error:
            print(f"note: {folder}: this file system has no locks ({error}); nothing keeps a second process from "
                  "writing there as well", file=sys.stderr)
        if not _is_current(descriptor, folder / LOCK_FILE):  # its last owner removed it before we had it
            os.close(descriptor)
            continue
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        _held[folder.resolve()] = _Held(descriptor, os.open(folder, os.O_RDONLY | os.O_CLOEXEC), created)
        _remove_leftovers(folder)
        return None


def _is_current(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.stat(path).st_ino == os.fstat(descriptor).st_ino
    return False


def _in_use(owner: bytes) -> str:
    try:
        found = json.loads(owner)
        who = f"process {found['pid']} on {found['host']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        who = "another process"
    copies = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if copies != "1" and "RANK" not in os.environ:
        return (f"is in use by {who}: srun has started this command {copies} times, each of them for itself; let it "
                "start one torchrun per node instead")
    return f"is in use by {who}; wait for it or end it, or name another folder"


def _remove_leftovers(folder: Path) -> None:
    """In folder and below, but not where somebody else may be the owner."""
    for path, subfolders, files in os.walk(folder):
        if path != str(folder) and LOCK_FILE in files:
            subfolders.clear()
        else:
            remove_temporaries(Path(path), files)


def _forget() -> None:
    """A lock belongs to all processes that have its file open: a data-loading process must not outlive its owner."""
    for held in _held.values():
        os.close(held.descriptor)
        os.close(held.folder)
    _held.clear()


os.register_at_fork(after_in_child=_forget)
atexit.register(release)
