"""Text from files: a whole file, or one column of a table."""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from smoothquant_kernels.errors import SmoothQuantError

_TEXT = "text"
_SEPARATED = {".csv": ",", ".tsv": "\t"}
_Rows = tuple[list[str], list[list[Any]]]  # the columns' names, and the values row by row


def read_utf8(path: Path) -> str:
    """The text of a file, without a byte order mark.

    Raises:
        SmoothQuantError: the file cannot be read or is not UTF-8 text.
    """
    try:
        text = path.read_text(encoding="utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise SmoothQuantError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it first."
        ) from error
    except OSError as error:
        raise SmoothQuantError(f"{path} cannot be read: {error.strerror}.") from error
    if "\0" in text:
        raise SmoothQuantError(
            f"{path} is not text (it holds null bytes); give a file of UTF-8 text."
        )
    return text


def is_table(path: Path) -> bool:
    """Whether the file's name says that it holds rows and columns."""
    return path.suffix.lower() in _READERS


def read_table(path: Path, column: str | None = None) -> list[str]:
    """The texts of one column of a table, row by row, without rows that have no value.

    Args:
        path: a file for which `is_table` holds.
        column: the name of the column. None: "text", or the only column, which needs no name.

    Raises:
        SmoothQuantError: the file is damaged, it has no such column, or a value is not text.
    """
    columns, rows = _READERS[path.suffix.lower()](path)
    if not columns:
        raise SmoothQuantError(f"There is no text in {path}.")
    separated = path.suffix.lower() in _SEPARATED
    if column is None and separated and len(columns) == 1 and _is_row(columns[0], rows):
        columns, rows = [_TEXT], [columns, *rows]
    name = column or next((c for c in columns if c.strip().lower() == _TEXT), None)
    if name is None and len(columns) == 1:
        name = columns[0]
    if name is None or name not in columns:
        names = ", ".join(textwrap.shorten(c, 40, placeholder="...") for c in columns)
        raise SmoothQuantError(
            f'{path} has no column "{column or _TEXT}", only {names}; '
            f"name the one that holds the text, as in {path.name}:COLUMN (its first row names the columns)."
        )
    at = columns.index(name)
    texts = []
    for number, row in enumerate(rows, start=1):
        value = row[at] if at < len(row) else None
        if value is None:
            continue
        if not isinstance(value, str):
            raise SmoothQuantError(
                f'{path}, row {number}: "{name}" is of type {type(value).__name__}, not text.'
            )
        texts.append(value)
    return texts


def _is_row(first: str, rows: list[list[Any]]) -> bool:
    """Whether the first line of a single column is a text. A name is "text", or one word above longer texts."""
    if first.strip().lower() == _TEXT:
        return False
    return len(first.split()) != 1 or all(len(str(v).split()) < 2 for row in rows for v in row)


def _read_separated(path: Path, delimiter: str) -> _Rows:
    reader = csv.reader(io.StringIO(read_utf8(path), newline=""), delimiter=delimiter, strict=True)
    old = csv.field_size_limit(2**31 - 1)  # texts may exceed csv's default limit for a field
    try:
        rows = [row for row in reader if row]
    except csv.Error as error:
        raise SmoothQuantError(f"{path}, line {reader.line_num}, is damaged: {error}.") from error
    finally:
        csv.field_size_limit(old)
    return (rows[0], list(rows[1:])) if rows else ([], [])


def _read_jsonl(path: Path) -> _Rows:
    objects = []
    # splitlines() would also split at U+2028, which JSON strings may contain unescaped.
    for number, line in enumerate(read_utf8(path).split("\n"), start=1):
        if line.strip():
            objects.append(_json(path, line, f", line {number},"))
    return _from_objects(path, objects)


def _read_json(path: Path) -> _Rows:
    value = _json(path, read_utf8(path), "")
    if isinstance(value, dict):  # {"column": [values]}, or {"data": [rows]}
        lists = {k: v for k, v in value.items() if isinstance(v, list)}
        if len(lists) == 1 and all(isinstance(v, dict) for v in next(iter(lists.values()))):
            value = next(iter(lists.values()))
        elif lists and len({len(v) for v in lists.values()}) == 1:
            return list(lists), [list(row) for row in zip(*lists.values(), strict=True)]
    if not isinstance(value, list):
        raise SmoothQuantError(f"{path} is no list of rows; give a .jsonl file or a text file.")
    return _from_objects(path, value)


def _json(path: Path, text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise SmoothQuantError(f"{path}{where} is not JSON: {error.msg}.") from error


def _from_objects(path: Path, objects: Sequence[Any]) -> _Rows:
    if objects and all(isinstance(o, str) for o in objects):
        return ["text"], [[o] for o in objects]
    for number, o in enumerate(objects, start=1):
        if not isinstance(o, dict):
            raise SmoothQuantError(
                f"{path}, row {number}, is of type {type(o).__name__}, not an object with a text."
            )
    columns = list(dict.fromkeys(key for o in objects for key in o))
    return columns, [[o.get(c) for c in columns] for o in objects]


def _read_parquet(path: Path) -> _Rows:
    try:
        parquet = import_module("pyarrow.parquet")
    except ImportError as error:
        raise SmoothQuantError(
            f"To read {path}, run `pip install pyarrow`, or give a .csv or .jsonl file."
        ) from error
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError, RuntimeError) as error:  # the bases of pyarrow's errors
        reason = " ".join(str(error).split())[:200]
        raise SmoothQuantError(f"{path} cannot be read: {reason}") from error
    columns = [table.column(i).to_pylist() for i in range(table.num_columns)]
    return list(table.column_names), [list(row) for row in zip(*columns, strict=True)]


_READERS: dict[str, Callable[[Path], _Rows]] = {
    suffix: partial(_read_separated, delimiter=delimiter)
    for suffix, delimiter in _SEPARATED.items()
} | {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".parquet": _read_parquet,
}
