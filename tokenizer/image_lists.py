"""Lists of images: a text file with a path per line, or with paths and labels in columns."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenizer.image_classes import EXTENSIONS, named_classes, numbered_classes
from tokenizer.image_names import from_line, to_line
from tokenizer.image_readers import FileImages, ImageOptions, ImageSource
from tokenizer.runtime.parsing import brief

# Titles of columns, in lower case without "_", "-" and spaces.
_PATHS = ("path", "filepath", "imagepath", "imgpath", "file", "filename", "image", "imagename", "img", "imagefile")
_LABELS = ("label", "labels", "class", "classid", "classname", "classlabel", "labelid", "labelname", "target",
           "category", "cls", "y")
_LONGEST = 400  # characters of a name in a message
_LABELLED = re.compile(r"(.*?)\s*[\t,]\s*(-?[0-9]+)", re.DOTALL)


class _Row(NamedTuple):
    line: int
    name: str          # as the list has it
    label: str | None


class _Columns(NamedTuple):
    """What a header says."""

    separator: str
    width: int
    path: int
    label: int | None


def open_list(path: Path, channels: int, options: ImageOptions) -> ImageSource:
    """A .txt or .csv list. ValueError and FileNotFoundError name the list and the line."""
    rows = list(_rows(path))
    if not rows:
        raise ValueError(f"data path {path}: the list is empty; write one image path per line")
    where = [f"data path {path}, line {row.line}" for row in rows]
    labels, classes = _classes(rows, where, options)
    # An absolute path in the list becomes relative, so that moving list and images together changes nothing.
    names = [os.path.relpath(name, path.parent) if os.path.isabs(name) else name for _, name, _ in rows]
    return FileImages(path.parent, [Path(name).as_posix() for name in names], labels, classes, channels)


def _classes(rows: list[_Row], where: list[str], options: ImageOptions) -> tuple[np.ndarray, list[str]]:
    """Labels that are all numbers are taken as they are, others number the sorted names, as class folders do."""
    numbers = [None if row.label is None else _number(row.label) for row in rows]
    words = [i for i, row in enumerate(rows) if row.label is not None and numbers[i] is None]
    if not words:
        return numbered_classes(numbers, lambda i: where[i], options.remap_labels)
    for i, row in enumerate(rows):
        if row.label is None:
            raise ValueError(f"{where[i]}: no label, though others have one; give all images a label or none")
        if numbers[i] is not None:
            word = brief(rows[words[0]].label)
            raise ValueError(f"{where[words[0]]}: the label {word} is no number, though others are, such as "
                             f"{row.label} in line {row.line}")
    return named_classes([row.label or "" for row in rows])


def _number(label: str) -> int | None:
    return int(label) if re.fullmatch(r"[+-]?[0-9]{1,18}", label) else None


def _rows(path: Path) -> Iterator[_Row]:
    """Images of the list, under names that exist. ValueError, FileNotFoundError."""
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content:
        raise ValueError(f"data path {path}: a list of images must be UTF-8 text; this is UTF-16, or no text")
    folder = path.parent
    columns: _Columns | None = None
    first = True
    # Bytes that are no UTF-8 stay what they are, because names may be anything.
    for number, raw in enumerate(re.split(r"\r\n|\n|\r", content.decode("utf-8", "surrogateescape")), start=1):
        line = raw.strip()
        if not line:
            continue
        where = f"data path {path}, line {number}"
        readings = _readings(line) if columns is None else [_from_columns(line, columns, where)]
        found = next(((name, label) for written, label in readings if (name := _find(folder, written))), None)
        header = _header(line) if first and found is None else None
        first = False
        if header is not None:
            columns = header
            continue
        if found is None:
            raise _not_found(folder, readings[0][0], where)
        if not found[0].lower().endswith(EXTENSIONS):
            raise ValueError(f"{where}: {_shown(found[0])} is none of {' '.join(EXTENSIONS)}")
        yield _Row(number, *found)


def _find(folder: Path, name: str) -> str | None:
    """The name under which the file exists: as image_names writes it, as it is, or with Windows' backslashes."""
    for candidate in (from_line(name), name, name.replace("\\", "/")):
        if candidate and os.path.isfile(folder / candidate):
            return candidate
    return None


def _shown(name: str) -> str:
    """A name as messages have it, however long the line is."""
    line = to_line(name)
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def _not_found(folder: Path, name: str, where: str) -> Exception:
    if os.path.exists(folder / name):
        return ValueError(f"{where}: {_shown(str(folder / name))} is no regular file")
    return FileNotFoundError(f"{where}: no file {_shown(str(folder / name))} (paths count from the list's folder; a "
                             "line is PATH, PATH,LABEL or PATH<tab>LABEL, or has the columns that a first line names, "
                             "such as path,label)")


def _readings(line: str) -> list[tuple[str, str | None]]:
    """(path, label) that a line without a header may mean, the likeliest first. Paths may hold commas and quotes."""
    numbered = _LABELLED.fullmatch(line)
    found: list[tuple[str, str | None]] = [(numbered[1], numbered[2])] if numbered else []
    found.append((line, None))
    for separator in ("\t", ","):
        fields = _fields(line, separator) if '"' in line else []
        if 1 <= len(fields) <= 2:
            found.append((fields[0], (fields[1] if len(fields) == 2 else "") or None))
        name, _, label = line.rpartition(separator)
        if name:
            found.append((name.strip(), label.strip() or None))
    return found


def _fields(line: str, separator: str) -> list[str]:
    """Cells of a line of CSV; none if its quotes do not match."""
    reader = csv.reader([line], delimiter=separator, strict=True, skipinitialspace=True)
    try:
        return [cell.strip() for cell in next(reader)]
    except csv.Error:
        return []


def _header(line: str) -> _Columns | None:
    """The columns that a first line names, if it does."""
    separator = next(s for s in ("\t", ";", ",") if s in line or s == ",")
    titles = [re.sub(r"[\s_-]", "", cell).lower() for cell in _fields(line, separator)]
    path, label = (
        next((titles.index(title) for title in known if title in titles), None) for known in (_PATHS, _LABELS)
    )
    return None if path is None else _Columns(separator, len(titles), path, label)


def _from_columns(line: str, columns: _Columns, where: str) -> tuple[str, str | None]:
    fields = _fields(line, columns.separator)
    if len(fields) != columns.width:
        raise ValueError(f"{where}: {len(fields)} columns, the first line names {columns.width}; quote what holds a "
                         f"{columns.separator!r}")
    return fields[columns.path], (None if columns.label is None else fields[columns.label]) or None
