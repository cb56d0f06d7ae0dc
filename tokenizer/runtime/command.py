"""How the commands of this project begin and end: mistakes of users are one line, outputs are tried first.

An entry script reads its flags before it imports what is slow: torch alone takes seconds, and whoever asks for --help
or mistypes a flag need not wait for it. So its imports are two blocks, and what is between them imports no torch:

    from tokenizer.runtime.command import command, make_parser, refuse_early

    PROG = "folder/script.py"


    def parse_args(argv=None): ...


    def check(args): ...  # what else is known before any work: outputs, missing files


    if __name__ == "__main__":
        refuse_early(PROG, parse_args, check)

    import torch
    ...

    def main(argv=None):
        args = parse_args(argv)
        with command(PROG):
            check(args)
            ...

The modules that flags are made of and checked by are free of torch as well; tests/test_layering.py says which.
"""

import argparse
import io
import os
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from tokenizer.runtime import config
from tokenizer.runtime.files import require_writable
from tokenizer.runtime.ranks import is_main, started_together


class CannotContinue(RuntimeError):
    """A command met something that its user has to mend; the message says what. Shown without a traceback."""


# What flags, files and data can be wrong with. Anything else is a defect of ours and keeps its traceback.
USER_ERRORS = (ValueError, OSError, ImportError, CannotContinue, FloatingPointError)


def refuse_early(prog: str, parse: Callable[[], Any], *checks: Callable[[Any], object]) -> None:
    """Parse and check the command line before slow imports: what is refused ends the program here.

    checks: of what parse returns; their USER_ERRORS end in the line that `command` and `launch` make of them. `main`
    does all this once more, for those who call it. From here on Ctrl-C leaves no traceback. Of several processes the
    first of each machine speaks. The others end as well, in silence: not every launcher ends them, and they would wait
    for the first.
    """
    sys.excepthook = _except_ctrl_c
    with nullcontext() if _speaks() else redirect_stderr(io.StringIO()):
        try:
            parsed = parse()
            for check in checks:
                check(parsed)
        except USER_ERRORS as error:
            raise SystemExit(refusal(prog, error)) from error


def _except_ctrl_c(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    """Python ends by SIGINT after a KeyboardInterrupt that nobody catches, as it must: after a mere status of 130, a
    shell's loop over commands would go on with the next.
    """
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, value, trace)


def _speaks() -> bool:
    """The first process of each machine, since a path or a disk may be missing on one of them only."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def refusal(prog: str, error: Exception) -> str | int:
    """What SystemExit is given: a line on a process that speaks; a silent 2 on the others."""
    if not _speaks():
        return 2
    where = "" if os.environ.get("RANK", "0") == "0" else f" (on {platform.node()})"
    return f"{prog}: error: {error}{where}"


@contextmanager
def command(prog: str, *, one_process: bool = False) -> Iterator[None]:
    """The body of a script's main: USER_ERRORS end it in the line "PROG: error: ..." and status 1, without a traceback.

    one_process: the script does not share its work, and refuses to start on several processes. On the normal way out
    it leaves the process group; after an error torchrun ends the other ranks. Folders that the command has owned are
    free afterwards. What it computes in float32 is exact: no TF32.
    """
    computes = "torch" in sys.modules  # what computes has imported it by now, and what owns a folder has as well
    if computes:
        from tokenizer.runtime import distributed, lock
        from tokenizer.runtime.precision import set_tf32

        set_tf32(convolutions=False, matmul=False)
    try:
        if one_process:
            require_one_process()
        yield
    except USER_ERRORS as error:
        raise SystemExit(f"{prog}: error: {error}") from error
    finally:
        if computes:
            lock.release()
    if computes:
        distributed.finalize()


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """The mistake alone: all flags above it would hide it."""
        self.exit(2, f"usage: {self.prog} ...   (--help lists the flags)\n{self.prog}: error: {message}\n")

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def]
        """Refuses empty words, such as of a shell variable that is not set: Path("") is the current folder."""
        words = sys.argv[1:] if args is None else list(args)
        for before, word in zip(["", *words], words, strict=False):
            if not word or (word.startswith("--") and word.endswith("=")):
                flag = word.removesuffix("=") or (before if before.startswith("--") else "one argument")
                self.error(f"{flag}: the text is empty; leave it out, or for the current folder write a dot")
        return super().parse_known_args(words, namespace)


def make_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Shows the description (a script's docstring) as it is written, and takes no flag for its abbreviation."""
    return _Parser(prog=prog, description=description, allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter)


def require_one_process() -> None:
    """ValueError under torchrun with several processes, also before they have joined in a group."""
    if started_together() > 1:
        raise ValueError("runs on one process; start it with python, not torchrun")


def require_out_file(path: Path, flag: str = "--out", *, inputs: Iterable[str | Path | None] = ()) -> None:
    """Before any work, on the process that writes: ValueError unless `path` can become a file.

    inputs: what is read, which it must not replace.
    """
    if not is_main():
        return
    if path.resolve() in (Path(each).resolve() for each in inputs if each):
        raise ValueError(f"{flag} {path} is what is read, and would be lost; name another file")
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder; name a file in it")
    if path.exists() and not path.is_file():  # such as /dev/null, which a new file would replace
        raise ValueError(f"{flag} {path} is no regular file; name another")
    require_writable(path.parent, f"{flag}: folder")


def require_out_folder(path: Path, flag: str = "--out") -> None:
    """The same for a folder of files."""
    if is_main():
        require_writable(path, flag)


@contextmanager
def as_flag_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """A ValueError that names a flag and its value ends the program like the parser's own errors, with status 2."""
    try:
        yield
    except ValueError as error:
        parser.error(str(error))


def require_flags_at_least(parser: argparse.ArgumentParser, args: argparse.Namespace, low: float, names: str) -> None:
    """End with status 2, naming flag and value, for one of args among names (separated by spaces) below low.

    None passes; a number that is not finite does not. Of a list every item is checked.
    """
    with as_flag_errors(parser):
        config.require_at_least(args, low, names)


def require_flags_positive(parser: argparse.ArgumentParser, args: argparse.Namespace, names: str) -> None:
    """The same for numbers that must be above 0, such as learning rates."""
    with as_flag_errors(parser):
        config.require_positive(args, names)
