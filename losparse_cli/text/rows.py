"""A file -> rows, one by one: JSON lines, a JSON array, CSV, TSV, Parquet, or a text that is one row."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import MissingExtraError, SourceError, UsageError, reason_of
from .files import LIMIT, decode, lines_of, open_file, read_pieces, read_text

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
ROW_SUFFIXES = (*JSON_SUFFIXES, ".csv", ".tsv", ".parquet")
"""Of files that hold rows; every other file is a text."""

Row = tuple[str, int, dict[str, Any]]
"""(where it lies, its number, counted from 1, name -> value)."""


def read_file(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """The rows of a file, read as its suffix says and as they are asked for; a text that is not blank is one.

    columns: those that will be looked at, so that others may be left out; None for all. UsageError for a table without
    a header; SourceError for what cannot be read; MissingExtraError without the package that reads it.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _parquet(path, columns)
    elif suffix in JSON_SUFFIXES:
        yield from _json(path)
    elif suffix in ROW_SUFFIXES:
        yield from _table(path, "\t" if suffix == ".tsv" else ",")
    else:
        text = read_text(path)
        if text.strip():
            yield f"{path}, row 1", 1, {"text": text}


def value_of(row: dict[str, Any], column: str, option: str, where: str) -> Any:
    """What a row has in a column; UsageError if it has none. `option` is the one that names the column."""
    if column not in row:
        names = ", ".join(row) or "nothing"
        raise UsageError(f"{where} has no {column!r}, but {names}. Complete it, or name another column with {option}.")
    return row[column]


def text_of(row: dict[str, Any], column: str, option: str, where: str) -> str:
    """The text that a row has in a column, "" for null; UsageError for any other value, or if there is none."""
    value = value_of(row, column, option, where)
    if value is not None and not isinstance(value, str):
        kind = _KINDS.get(type(value), type(value).__name__)
        raise UsageError(
            f"The column {column!r} of {where} holds {kind}, not text. Name a column of text with {option}."
        )
    return value or ""


_KINDS: dict[type, str] = {
    list: "a list", dict: "an object", int: "a number", float: "a number", bool: "true or false", bytes: "bytes"
}  # fmt: skip


# --- JSON -------------------------------------------------------------------------------------------


def _json(path: Path) -> Iterator[Row]:
    """Of JSON lines, where the number is that of the line, or of an array."""
    with open_file(path) as file:
        begun = False
        for number, raw in enumerate(iter(lambda: file.readline(LIMIT), b""), 1):
            if not raw.removeprefix(codecs.BOM_UTF8).strip():
                continue
            if not begun and raw.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                rows = _parsed(decode(raw + file.read(), str(path)), str(path), "an array of objects")
                for k, row in enumerate(rows, 1):
                    yield f"{path}, row {k}", k, _object(row, f"{path}, row {k}", "an array of objects")
                return
            begun, where = True, f"{path}, line {number}"
            row = _parsed(decode(raw, where), where, "one object a line")
            yield where, number, _object(row, where, "one object a line")


def _parsed(text: str, where: str, wanted: str) -> Any:
    try:
        found = json.loads(text)
        return _whole(found) if "\\ud" in text.lower() else found
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if wanted == "one object a line":  # its place is the line
            reason = reason.partition(":")[0]
        raise SourceError(f"{where} is not valid JSON ({reason}). Give {wanted}.") from error


def _whole(value: Any) -> Any:
    """With the replacement character where half of a surrogate pair stands, as in text cut inside an emoji.

    JSON allows it, and tokenizers do not.
    """
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_whole(item) for item in value]
    return {_whole(key): _whole(item) for key, item in value.items()} if isinstance(value, dict) else value


def _object(row: Any, where: str, wanted: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise SourceError(f"{where} is no JSON object. Give {wanted}.")
    return row


# --- CSV, TSV ---------------------------------------------------------------------------------------


def _table(path: Path, delimiter: str) -> Iterator[Row]:
    # A field may hold a whole document; the library's own limit is there against a quote that is never closed.
    csv.field_size_limit(1 << 30)
    reader = csv.reader(lines_of(read_pieces(path)), delimiter=delimiter, strict=True)
    try:
        header = next((line for line in reader if len(line) > 1 or "".join(line).strip()), None)
        if header is None:
            return
        _check_header(header, path)
        for number, line in enumerate((line for line in reader if line), 1):
            if len(line) != len(header):
                raise SourceError(
                    f"{path}, row {number} (until line {reader.line_num}) has {len(line)} fields, and the header "
                    f"{len(header)}. Put fields that hold {'tabs' if delimiter == chr(9) else 'commas'} in quotes."
                )
            row = {name: value for name, value in zip(header, line, strict=True) if name}
            yield f"{path}, row {number}", number, row
    except csv.Error as error:
        raise SourceError(f"{path}, line {reader.line_num} cannot be read as CSV ({error}). Correct it.") from error


def _check_header(header: list[str], path: Path) -> None:
    """A column without a name is fine, as it is how pandas writes its index; numbers and repetitions are of data."""
    twice = next((name for name in header if name and header.count(name) > 1), None)
    numbers = next((name for name in header if _is_number(name)), None)
    if twice is None and numbers is None and any(header):
        return
    what = "no name" if not any(header) else f"{twice!r} twice" if twice is not None else f"the number {numbers}"
    raise UsageError(
        f"{path} has no header row: in its first line stands {what}. Begin it with the names of the columns."
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# --- Parquet ----------------------------------------------------------------------------------------


def _parquet(path: Path, columns: Sequence[str] | None) -> Iterator[Row]:
    with _parquet_file(path) as file:
        # Where one is missing, all are read, so that whoever looks for it can say which there are.
        known = columns is not None and set(columns) <= set(file.schema_arrow.names)
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=list(columns or ()) if known else None):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}, row {number}", number, row


@contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    """The file as a pyarrow.parquet.ParquetFile; what cannot be read in it, within, is a SourceError."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "datasets", f"Reading {path}") from error
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError(
            f"{path} cannot be read as Parquet ({reason_of(error)}). Write or download it again."
        ) from error
