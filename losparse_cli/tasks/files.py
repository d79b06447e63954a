"""A file of rows -> its table: JSON lines, a JSON array, CSV, TSV, Parquet, or a text that is one row."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SourceError, UsageError
from ..text.files import json_rows, parquet_file, read_text


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
    if suffix not in (".txt", ".csv", ".tsv"):
        return _json(path)
    text = read_text(path)
    if not text.strip():
        raise UsageError(f"{file} is empty. Give a file with rows as {option}.")
    if suffix == ".txt":
        return Table(("text",), [{"text": text}], [1])
    return _csv(text, file, "\t" if suffix == ".tsv" else ",")


def _json(path: Path) -> Table:
    found = list(json_rows(path))
    rows, numbers = [row for _, _, row in found], [number for _, number, _ in found]
    return Table(tuple(dict.fromkeys(name for row in rows for name in row)), rows, numbers)


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
    with parquet_file(path, "train") as file:
        table = file.read()
        rows = table.to_pylist()
    return Table(tuple(table.column_names), rows, list(range(1, len(rows) + 1)))
