"""How the commands of this project begin and end: mistakes of users are one line, outputs are tried first."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizer.runtime import distributed, lock
from tokenizer.runtime.checkpoint import require_writable
from tokenizer.runtime.config import flag_name


class CannotContinue(RuntimeError):
    """A command met something that its user has to mend; the message says what. Shown without a traceback."""


# What flags, files and data can be wrong with. Anything else is a defect of ours and keeps its traceback.
USER_ERRORS = (ValueError, OSError, ImportError, CannotContinue, FloatingPointError)


@contextmanager
def command(prog: str) -> Iterator[None]:
    """The body of a script's main: USER_ERRORS end it in the line "PROG: error: ..." and status 1, without a traceback.

    On the normal way out it leaves the process group; after an error torchrun ends the other ranks. Folders that the
    command has owned are free afterwards.
    """
    try:
        yield
    except USER_ERRORS as error:
        raise SystemExit(f"{prog}: error: {error}") from error
    finally:
        lock.release()
    distributed.finalize()


def require_one_process() -> None:
    """ValueError under torchrun with several processes."""
    if distributed.world_size() > 1:
        raise ValueError("runs on one process; start it with python, not torchrun")


def require_out_file(path: Path, flag: str = "--out") -> None:
    """Before any work, on the process that writes: ValueError unless `path` can become a file."""
    if not distributed.is_main():
        return
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder; name a file in it")
    require_writable(path.parent, f"{flag}: folder")


def require_out_folder(path: Path, flag: str = "--out") -> None:
    """The same for a folder of files."""
    if distributed.is_main():
        require_writable(path, flag)


def require_flags_at_least(parser: argparse.ArgumentParser, args: argparse.Namespace, low: float, names: str) -> None:
    """End with status 2, naming flag and value, for one of args among names (separated by spaces) below low.

    None passes; a number that is not finite does not.
    """
    for name in names.split():
        value = getattr(args, name)
        if value is not None and not low <= value < float("inf"):
            parser.error(f"{flag_name(name)} is {value}; it must be at least {low}")
