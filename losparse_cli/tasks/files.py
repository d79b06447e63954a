"""A file of rows -> its table: JSON lines, a JSON array, CSV, TSV, Parquet, or a text that is one row."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, SourceError, UsageError


@dataclass(frozen=True)
class Table:
    """columns: all names, in order of appearance. numbers: of the rows, counted from 1."""

    columns: tuple[str, ...]
    rows: list[dict[str, Any]]
    numbers: list[int]


def read_table(file: str, option: str) -> Table:
    """The table in `file`, read as its suffix says; `option` is the one that named it, for messages.

    UsageError if there is no such file, or if it is empty or has no header; SourceError if it cannot be read.
    """
    path = Path(file).expanduser()
    if path.is_dir():
        raise UsageError(f"{option} {file} is a folder. Give a file in it.")
    if not path.exists():
        raise UsageError(f"There is no file {file}. Check {option}, or give --dataset-name for a dataset of the Hub.")
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path)
    text = _text(path)
    if not text.strip():
        raise UsageError(f"{file} is empty. Give a file with rows as {option}.")
    if suffix == ".txt":
        return Table(("text",), [{"text": text}], [1])
    if suffix in (".csv", ".tsv"):
        return _csv(text, file, "\t" if suffix == ".tsv" else ",")
    return _json_array(text, file) if text.lstrip().startswith("[") else _json_lines(text, file)


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(
            f"{path} is not UTF-8 text (at byte {error.start}). Convert it, or correct its suffix."
        ) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
    if "\0" in text:
        raise SourceError(f"{path} holds NUL bytes, so it is not text. Convert it, or correct its suffix.")
    return text


def _json_lines(text: str, file: str) -> Table:
    rows, numbers = [], []
    for number, line in enumerate(text.split("\n"), 1):  # other line ends may stand inside a string
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = str(error).partition(":")[0]
            raise SourceError(
                f"{file}, line {number} is not valid JSON ({reason}). Give one object a line, or an array of objects."
            ) from error
        if not isinstance(row, dict):
            raise SourceError(f"{file}, line {number} is no JSON object. Give one object a line.")
        rows.append(row)
        numbers.append(number)
    return Table(_names(rows), rows, numbers)


def _json_array(text: str, file: str) -> Table:
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"{file} is not valid JSON ({error}). Give an array of objects, or one object a line."
        ) from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise SourceError(f"{file}, row {number} is no JSON object. Give an array of objects.")
    return Table(_names(rows), rows, list(range(1, len(rows) + 1)))


def _names(rows: list[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for row in rows for name in row))


def _csv(text: str, file: str, delimiter: str) -> Table:
    # A field may hold a whole document; the library's own limit is there against a quote that is never closed.
    csv.field_size_limit(1 << 30)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(line for line in reader if line)
        _check_header(header, file)
        rows = []
        for number, line in enumerate((line for line in reader if line), 1):
            if len(line) != len(header):
                raise SourceError(
                    f"{file}, row {number} (until line {reader.line_num}) has {len(line)} fields, and the header "
                    f"{len(header)}. Put fields that hold {'tabs' if delimiter == chr(9) else 'commas'} in quotes."
                )
            rows.append({name: value for name, value in zip(header, line, strict=True) if name})
    except csv.Error as error:
        raise SourceError(f"{file}, line {reader.line_num} cannot be read as CSV ({error}). Correct it.") from error
    return Table(tuple(name for name in header if name), rows, list(range(1, len(rows) + 1)))


def _check_header(header: list[str], file: str) -> None:
    """A column without a name is fine, as it is how pandas writes its index; numbers and repetitions are of data."""
    twice = next((name for name in header if name and header.count(name) > 1), None)
    numbers = next((name for name in header if _is_number(name)), None)
    if twice is None and numbers is None and any(header):
        return
    what = "no name" if not any(header) else f"{twice!r} twice" if twice is not None else f"the number {numbers}"
    raise UsageError(
        f"{file} has no header row: in its first line stands {what}. Begin it with the names of the columns."
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parquet(path: Path) -> Table:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "train", f"Reading {path}") from error
    try:
        table = parquet.read_table(path)
        rows = table.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SourceError(f"{path} cannot be read as Parquet ({reason}). Write or download it again.") from error
    return Table(tuple(table.column_names), rows, list(range(1, len(rows) + 1)))
