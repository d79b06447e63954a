"""A file, a Hub dataset -> documents: what there is to read, and why it cannot be read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .files import JSON_SUFFIXES, LIMIT, json_rows, parquet_file, read_text
from .hub import open_hub

STREAM_LIMIT = 16 << 20
"""Characters of a dataset that are fetched over the network; of a file, LIMIT."""
SELF = "self"

_FILES = (*JSON_SUFFIXES, ".parquet", ".txt", ".md", ".csv", ".tsv", ".gz", ".zip", ".cor")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")


@dataclass(frozen=True)
class Documents:
    """texts: none of them blank. targets: what a model with a decoder is to say to each, None without a field."""

    texts: list[str]
    targets: list[str] | None = None


def kind_of(source: str) -> str:
    """text, lines, parquet, hub or self; UsageError if `source` is none of them. Files come before datasets."""
    if source == SELF:
        return SELF
    path = Path(source).expanduser()
    if path.is_dir():
        raise UsageError(f"The calibration text {source} is a folder. Give a file in it.")
    suffix = path.suffix.lower()
    if path.exists():
        return "lines" if suffix in JSON_SUFFIXES else "parquet" if suffix == ".parquet" else "text"
    if _HUB_NAME.fullmatch(source) and suffix not in _FILES:
        return "hub"
    raise UsageError(
        f"There is no file {source} to calibrate with. Check the path, or give a Hub dataset such as user/name, or "
        "the word self."
    )


def read_documents(
    source: str, *, field: str = "text", target_field: str | None = None, split: str = "train", seed: int = 0
) -> Documents:
    """The documents of a file or a Hub dataset, in the order they lie in; a text file is one.

    Of a large source only the first 64 MiB of text are read, of a Hub dataset 16 MiB, from shards in an order drawn
    by `seed`. UsageError for a field or split that is not there, or if there is no text; SourceError for a file or
    dataset that cannot be read; MissingExtraError without the packages that read it.
    """
    kind = kind_of(source)
    path = Path(source).expanduser()
    if kind == "text":
        text = read_text(path, LIMIT)
        if not text.strip():
            raise UsageError(f"The calibration text {path} is empty. Give a file with text.")
        return Documents([text])
    fields = [field] if target_field is None else [field, target_field]
    if kind == "hub":
        return _collect(_hub_rows(source, fields, split, seed), source, fields, STREAM_LIMIT)
    if kind == "parquet":
        return _collect(_parquet_rows(path, fields), source, fields, LIMIT)
    rows = ((f"{path}, {what} {number}", row) for what, number, row in json_rows(path))
    return _collect(rows, source, fields, LIMIT)


Rows = Iterator[tuple[str, dict[str, Any]]]
"""(where it lies, the row)."""


def _collect(rows: Rows, source: str, fields: list[str], limit: int) -> Documents:
    columns: list[list[str]] = [[] for _ in fields]
    size = 0
    for where, row in rows:
        found = [_text_of(row, field, option, where) for field, option in zip(fields, _OPTIONS, strict=False)]
        if all(text.strip() for text in found):
            for column, text in zip(columns, found, strict=True):
                column.append(text)
                size += len(text)
            if size >= limit:
                break
    if not columns[0]:
        raise UsageError(f"{source} holds no text in the field {' or '.join(map(repr, fields))}. Give another source.")
    return Documents(columns[0], columns[1] if len(columns) > 1 else None)


_OPTIONS = ("--calibration-field", "--calibration-target-field")


def _text_of(row: dict[str, Any], field: str, option: str, where: str) -> str:
    if field not in row:
        raise UsageError(f"{where} has no field {field!r}, but {', '.join(row) or 'none'}. Name one with {option}.")
    value = row[field]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UsageError(
            f"The field {field!r} of {where} holds {_KINDS.get(type(value), type(value).__name__)}, not text. Name a "
            f"field of text with {option}."
        )
    return value


_KINDS: dict[type, str] = {
    list: "a list", dict: "an object", int: "a number", float: "a number", bool: "true or false", bytes: "bytes"
}  # fmt: skip


# --- where rows come from ---------------------------------------------------------------------------


def _parquet_rows(path: Path, fields: list[str]) -> Rows:
    with parquet_file(path, "datasets") as file:
        names = file.schema_arrow.names
        for field, option in zip(fields, _OPTIONS, strict=False):
            if field not in names:
                raise UsageError(f"{path} has no column {field!r}, but {', '.join(names)}. Name one with {option}.")
        for batch in file.iter_batches(batch_size=256, columns=fields):
            for row in batch.to_pylist():
                yield str(path), row


def _hub_rows(source: str, fields: list[str], split: str, seed: int) -> Rows:
    name, _, config = source.partition(":")
    choose = "Choose with --calibration-split, or a configuration as user/name:config."
    with open_hub(source, split, choose=choose, file_too=True) as datasets:
        # From version 4 on no dataset can bring code; before, one that does is refused without a question.
        options = {"trust_remote_code": False} if int(datasets.__version__.split(".")[0]) < 4 else {}
        stream = datasets.load_dataset(name, config or None, split=split, streaming=True, **options)
        # Shards in an order of their own, so that it is not always the beginning that is read; no rows are held back.
        stream = stream.shuffle(seed=seed, buffer_size=1)
        for row in stream:
            yield source, row
