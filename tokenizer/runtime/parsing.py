"""Files of strangers, read: whatever a parser throws at a damaged one becomes one line that names the file.

Parsers do not document what they raise. A header of numpy's that lies raises tokenize.TokenError or MemoryError, nested
JSON RecursionError, a cut archive OSError without a path. So nothing is enumerated: there is one boundary around each.
"""

import json
import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAX_JSON = 2**28  # bytes of a file that are parsed; as Python objects they take ten times as many


@contextmanager
def parsing(where: str | Path, what: str = "damaged") -> Iterator[None]:
    """ValueError "WHERE: WHAT (reason)" for any Exception inside, MemoryError and RecursionError among them.

    Only a parser's call belongs inside: a defect of ours would be taken for one of the file.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{where}: {what} ({reason(error)})") from error


def reason(error: BaseException) -> str:
    """What an exception says, in one line."""
    lines = str(error).strip().splitlines()
    said = lines[0][:300] if lines else ""
    if isinstance(error, (ValueError, OSError)) and said:
        return said
    kind = type(error).__name__
    kind = f"{type(error).__module__}.{kind}" if kind.islower() else kind  # zlib.error
    return f"{kind}: {said}" if said else kind


def brief(value: Any) -> str:
    """A value of a file as messages show it. Short, however long, deep or large the value is."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (str, bytes)) and len(value) > 100:
        return f"{value[:100]!r}..."
    if value is None or isinstance(value, (str, bytes, int, float)):
        return repr(value)
    try:
        return _SHORT.repr(value)
    except Exception:  # an object of a file, such as a list that holds a number of too many digits
        return f"a {type(value).__name__}"


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2


def require_file(path: str | Path, what: str = "file") -> None:
    """FileNotFoundError, and ValueError for what is no regular file: a pipe or a device may never end."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such {what}")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe, socket or device"
        raise ValueError(f"{path}: is {kind}; name a file")


def read_text(path: str | Path) -> str:
    """The text of a file, line ends as they are. FileNotFoundError; ValueError naming the file: no file, no UTF-8."""
    require_file(path)
    with parsing(path, "cannot be read"):
        return Path(path).read_bytes().decode("utf-8")


def text_lines(path: str | Path, errors: str = "strict") -> Iterator[tuple[str, str]]:
    """("PATH, line N", the line without its end) of a text of any length.

    errors: as of bytes.decode; "replace" for old data bases with a letter here and there that is no UTF-8. Raises
    FileNotFoundError, and ValueError naming the file: no regular file, no UTF-8.
    """
    require_file(path)
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            with parsing(where, "cannot be read"):
                text = line.decode("utf-8", errors)
            yield where, text.rstrip("\r\n")


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. FileNotFoundError; ValueError naming the file, and the line where it is not JSON."""
    path = Path(path)
    require_file(path)
    with parsing(path, "cannot be read"):
        content = path.read_bytes() if path.stat().st_size <= MAX_JSON else None
    if content is None:
        raise ValueError(f"{path}: more than {MAX_JSON} bytes of JSON (parsing.MAX_JSON)")
    with parsing(path, "cannot be read"):
        text = content.decode("utf-8")
    return from_json(text, path, lines=True)


def from_json(text: str, where: str | Path, *, lines: bool = False) -> Any:
    """The value that a text holds. ValueError, starting with where, and with lines its number: no JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f", line {error.lineno}" if lines else ""
        raise ValueError(f"{where}{place}: not JSON ({error.msg})") from error
    except Exception as error:  # see the head of this file
        raise ValueError(f"{where}: not JSON ({reason(error)})") from error
