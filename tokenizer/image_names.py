"""Names of images as lines of text, in files (names.txt, lists of images) and in messages.

A name may be any bytes but "/" and 0. Python holds bytes that are no UTF-8 as surrogates, which neither print nor
encode, and a newline would make two lines of one. So there is one way to write a name, and it loses nothing: a plain
name as it is, any other with a backslash in front, its backslashes doubled and the bytes in question as `\\xe9`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from tokenizer.runtime.files import atomic_write_text

# What ends a line somewhere, moves a cursor, or is half of a character.
_SPECIAL = r"\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff"
_NOT_PLAIN = re.compile(rf"\A\\|\A\s|\s\Z|[{_SPECIAL}]")
_ESCAPE = re.compile(rf"\\|\A\s|\s\Z|[{_SPECIAL}]")
_ESCAPED = re.compile(r"\\(?:[^\\]|\\\\|\\x[0-9a-f]{2})*")


def to_line(name: str) -> str:
    """A name without what does not belong in a line; `from_line` gives it back."""
    if not _NOT_PLAIN.search(name):
        return name

    def escape(match: re.Match[str]) -> str:
        if match[0] == "\\":
            return "\\\\"
        return "".join(f"\\x{byte:02x}" for byte in match[0].encode("utf-8", "surrogateescape"))

    return "\\" + _ESCAPE.sub(escape, name)


def from_line(line: str) -> str:
    """The name that `to_line` wrote. Any other line is a name itself, as in older files."""
    if not _ESCAPED.fullmatch(line):
        return line

    def unescape(match: re.Match[bytes]) -> bytes:
        return b"\\" if match[0] == b"\\\\" else bytes.fromhex(match[0][2:].decode())

    raw = re.sub(rb"\\\\|\\x[0-9a-f]{2}", unescape, line[1:].encode("utf-8", "surrogateescape"))
    name = raw.decode("utf-8", "surrogateescape")
    return name if to_line(name) == line else line


def write_names(path: Path, names: Iterable[str]) -> None:
    """A name per line, atomically."""
    atomic_write_text(path, "".join(f"{to_line(name)}\n" for name in names))


def read_names(path: Path) -> list[str]:
    """What `write_names` wrote. Lines end at "\\n" alone, and bytes that are no UTF-8 are kept as surrogates."""
    lines = path.read_bytes().decode("utf-8", "surrogateescape").split("\n")[:-1]
    return [from_line(line) for line in lines]
