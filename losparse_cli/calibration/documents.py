"""A file, a Hub dataset -> documents: what there is to read, and why it cannot be read."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LosparseError, MissingExtraError, SourceError, UsageError

LIMIT = 64 << 20
"""Bytes of a text file, characters of rows, that are read: more is not needed for a fair draw."""
STREAM_LIMIT = 16 << 20
"""The same of a dataset that is fetched over the network."""
SELF = "self"

_LINES = (".jsonl", ".json", ".ndjson")
_FILES = (*_LINES, ".parquet", ".txt", ".md", ".csv", ".tsv", ".gz", ".zip", ".cor")
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
        return "lines" if suffix in _LINES else "parquet" if suffix == ".parquet" else "text"
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
    if kind == "text":
        return Documents([_read_text(Path(source).expanduser())])
    fields = [field] if target_field is None else [field, target_field]
    if kind == "hub":
        return _collect(_hub_rows(source, fields, split, seed), source, fields, STREAM_LIMIT)
    path = Path(source).expanduser()
    rows = _json_rows(path) if kind == "lines" else _parquet_rows(path, fields)
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


# --- files ------------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    with open(path, "rb") as file:
        raw = file.read(LIMIT)
        whole = not file.read(1)
    text = _decode(raw.removeprefix(codecs.BOM_UTF8), str(path), whole)
    if not text.strip():
        raise UsageError(f"The calibration text {path} is empty. Give a file with text.")
    return text.replace("\r\n", "\n")


def _decode(raw: bytes, where: str, whole: bool = True) -> str:
    """The text; where it is not `whole`, without a character that is cut through at its end."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(raw, whole)
    except UnicodeDecodeError as error:
        raise SourceError(f"{where} is not UTF-8 text (at byte {error.start}). Convert it, or give another.") from error
    if "\0" in text:
        raise SourceError(f"{where} holds NUL bytes, so it is not text. Give a UTF-8 text file.")
    return text


def _json_rows(path: Path) -> Rows:
    with open(path, "rb") as file:
        for number, raw in enumerate(iter(lambda: file.readline(LIMIT), b""), 1):
            where = f"{path}, line {number}"
            line = _decode(raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw, where)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = str(error).partition(":")[0]
                raise SourceError(
                    f"{where} is not valid JSON ({reason}). Give a file with one object a line."
                ) from error
            if not isinstance(row, dict):
                raise SourceError(f"{where} is no JSON object. Give a file with one object a line.")
            yield where, row


def _parquet_rows(path: Path, fields: list[str]) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise MissingExtraError("pyarrow", "datasets", f"Reading {path}") from error
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for field, option in zip(fields, _OPTIONS, strict=False):
                if field not in names:
                    raise UsageError(f"{path} has no column {field!r}, but {', '.join(names)}. Name one with {option}.")
            for batch in file.iter_batches(batch_size=256, columns=fields):
                for row in batch.to_pylist():
                    yield str(path), row
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = str(error).splitlines()[0].rstrip(".")
        raise SourceError(f"{path} cannot be read as Parquet ({reason}). Write or download it again.") from error


# --- the Hub ----------------------------------------------------------------------------------------


def _hub_rows(source: str, fields: list[str], split: str, seed: int) -> Rows:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("datasets", "datasets", f"There is no file {source}, and a Hub dataset") from error
    name, _, config = source.partition(":")
    # From version 4 on no dataset can bring code; before, one that does is refused without a question.
    options = {"trust_remote_code": False} if int(datasets.__version__.split(".")[0]) < 4 else {}
    with _hub_errors(source, split):
        stream = datasets.load_dataset(name, config or None, split=split, streaming=True, **options)
        # Shards in an order of their own, so that it is not always the beginning that is read; no rows are held back.
        stream = stream.shuffle(seed=seed, buffer_size=1)
        for row in stream:
            yield source, row


@contextmanager
def _hub_errors(source: str, split: str) -> Iterator[None]:
    from datasets.exceptions import DatasetNotFoundError

    try:
        yield
    except LosparseError:
        raise
    except DatasetNotFoundError as error:
        raise SourceError(
            f"There is no file {source}, and no dataset of that name on the Hub that you can see. Check the spelling; "
            "if it is private or gated, log in with: hf auth login"
        ) from error
    except ValueError as error:  # the split or the configuration, and which there are
        reason = " ".join(str(error).split()).rstrip(".")
        raise UsageError(
            f"The dataset {source} cannot be read with the split {split!r}: {reason}. Choose with "
            "--calibration-split, or a configuration as user/name:config."
        ) from error
    except Exception as error:
        kind = type(error).__module__.partition(".")[0]
        if isinstance(error, ConnectionError | TimeoutError) or kind in ("huggingface_hub", "httpx", "requests"):
            raise SourceError(
                f"There is no file {source}, and the Hub cannot be reached to read a dataset of that name. Check the "
                "path and the network, or unset HF_HUB_OFFLINE."
            ) from error
        reason = (" ".join(str(error).split()) or type(error).__name__).rstrip(".")
        raise SourceError(f"The dataset {source} cannot be read: {reason}. Give another, or a file.") from error
