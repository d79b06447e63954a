"""A file -> its text, or its rows one by one; and why it cannot be read."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import MissingExtraError, SourceError

LIMIT = 64 << 20
"""Bytes of a text, or of a line of JSON, that are read: more is not needed for a fair draw."""
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")


def read_text(path: Path, limit: int = -1) -> str:
    """The text of a UTF-8 file, with line ends as \\n: of its first `limit` bytes, or all.

    SourceError if it cannot be read, or is no text.
    """
    with _open(path) as file:
        raw = file.read(limit)
        whole = not file.read(1)
    return _decode(raw, str(path), whole).replace("\r\n", "\n")


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error


def _decode(raw: bytes, where: str, whole: bool = True) -> str:
    """The text without a byte order mark; where it is not `whole`, without a character cut through at its end."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(raw, whole)
    except UnicodeDecodeError as error:
        raise SourceError(f"{where} is not UTF-8 text (at byte {error.start}). Convert it, or give another.") from error
    if "\0" in text:
        raise SourceError(f"{where} holds NUL bytes, so it is not text. Give a UTF-8 text file.")
    return text


def json_rows(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """("line", number, row) of JSON lines, read as they are asked for; ("row", number, row) of an array.

    Numbers count from 1. SourceError if something in it is no object, or not JSON.
    """
    with _open(path) as file:
        begun = False
        for number, raw in enumerate(iter(lambda: file.readline(LIMIT), b""), 1):
            if not raw.removeprefix(codecs.BOM_UTF8).strip():
                continue
            if not begun and raw.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                rows = _parsed(_decode(raw + file.read(), str(path)), str(path), "an array of objects")
                for k, row in enumerate(rows, 1):
                    yield "row", k, _object(row, f"{path}, row {k}", "an array of objects")
                return
            begun, where = True, f"{path}, line {number}"
            row = _parsed(_decode(raw, where), where, "one object a line")
            yield "line", number, _object(row, where, "one object a line")


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


@contextmanager
def parquet_file(path: Path, extra: str) -> Iterator[Any]:
    """The file as a pyarrow.parquet.ParquetFile; what cannot be read in it, within, is a SourceError.

    MissingExtraError, with the name of the `extra`, without pyarrow.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", extra, f"Reading {path}") from error
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SourceError(f"{path} cannot be read as Parquet ({reason}). Write or download it again.") from error
