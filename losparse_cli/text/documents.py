"""A file, a Hub dataset -> documents: what there is to read, and why it cannot be read."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .files import LIMIT, find_file, read_text
from .hub import open_dataset
from .rows import ROW_SUFFIXES, read_file, text_of

STREAM_LIMIT = 16 << 20
"""Characters of a dataset that are fetched over the network; of a file, LIMIT."""
SELF = "self"

_FILES = (*ROW_SUFFIXES, ".txt", ".md", ".gz", ".zip", ".cor")
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:[\w.-]+)?")


@dataclass(frozen=True)
class Documents:
    """texts: none of them blank. targets: what a model with a decoder is to say to each, None without a field."""

    texts: list[str]
    targets: list[str] | None = None


def kind_of(source: str) -> str:
    """text, rows, hub or self; UsageError if `source` is none of them. Files come before datasets."""
    if source == SELF:
        return SELF
    suffix = Path(source).suffix.lower()
    if _HUB_NAME.fullmatch(source) and suffix not in _FILES and not Path(source).expanduser().exists():
        return "hub"
    find_file(source, "--calibration", ", or give a Hub dataset such as user/name, or the word self")
    return "rows" if suffix in ROW_SUFFIXES else "text"


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
    if kind == "rows":
        return _collect(((where, row) for where, _, row in read_file(path, fields)), source, fields, LIMIT)
    name, _, config = source.partition(":")
    choose = "Choose with --calibration-split, or a configuration as user/name:config."
    with open_dataset(name, config or None, split, choose=choose, streaming=True, file_too=True) as stream:
        # Shards in an order of their own, so that it is not always the beginning that is read; no rows are held back.
        stream = stream.shuffle(seed=seed, buffer_size=1)
        return _collect(((source, row) for row in stream), source, fields, STREAM_LIMIT)


_OPTIONS = ("--calibration-field", "--calibration-target-field")


def _collect(rows: Iterable[tuple[str, dict[str, Any]]], source: str, fields: list[str], limit: int) -> Documents:
    """Of rows, each with where it lies, the texts; until there are `limit` characters."""
    columns: list[list[str]] = [[] for _ in fields]
    size = 0
    for where, row in rows:
        found = [text_of(row, field, option, where) for field, option in zip(fields, _OPTIONS, strict=False)]
        if all(text.strip() for text in found):
            for column, text in zip(columns, found, strict=True):
                column.append(text)
                size += len(text)
            if size >= limit:
                break
    if not columns[0]:
        raise UsageError(f"{source} holds no text in the field {' or '.join(map(repr, fields))}. Give another source.")
    return Documents(columns[0], columns[1] if len(columns) > 1 else None)
