"""A file -> its text, whole or piece by piece; and why it cannot be read."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import SourceError, UsageError

LIMIT = 64 << 20
"""Bytes of a text, or of a line of JSON, that are read: more is not needed for a fair draw."""
PIECE = 1 << 20  # bytes that are read at once


def find_file(file: str | Path, option: str, instead: str = "") -> Path:
    """The path of a file; UsageError if it is none. option: what named it. instead: what else may be given."""
    path = Path(file).expanduser()
    if path.is_dir():
        raise UsageError(f"{option} {file} is a folder. Give a file in it.")
    if not path.exists():
        raise UsageError(f"There is no file {file}. Check {option}{instead}.")
    return path


def read_text(path: Path, limit: int = -1) -> str:
    """The text of a UTF-8 file, with line ends as \\n: of its first `limit` bytes, or all.

    SourceError if it cannot be read, or is no text.
    """
    with open_file(path) as file:
        raw = file.read(limit)
        whole = not file.read(1)
    return decode(raw, str(path), whole).replace("\r\n", "\n")


def read_pieces(path: Path) -> Iterator[str]:
    """The text that `read_text` reads, a mebibyte at a time, so that none is held that is not asked for."""
    decoder, held, begin = codecs.getincrementaldecoder("utf-8-sig")(), "", 0
    with open_file(path) as file:
        while True:
            raw = file.read(PIECE)
            text = held + decode(raw, str(path), not raw, decoder, begin)
            held = "\r" if raw and text.endswith("\r") else ""  # half of a line end
            if text.removesuffix(held):
                yield text.removesuffix(held).replace("\r\n", "\n")
            if not raw:
                return
            begin += len(raw)


def pieces_of(text: str | Path) -> Iterator[str]:
    """A text, or that of a file, in pieces."""
    if isinstance(text, Path):
        return read_pieces(text)
    return (text[begin : begin + PIECE] for begin in range(0, len(text), PIECE))


def lines_of(pieces: Iterable[str]) -> Iterator[str]:
    """The lines of a text that comes in pieces, each with its end; one that never ends is cut."""
    rest = ""
    for piece in pieces:
        *lines, rest = io.StringIO(rest + piece, newline="")
        yield from lines
        if len(rest) > LIMIT:
            yield rest
            rest = ""
    if rest:
        yield rest


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """The file, to be read; SourceError if the system does not let us."""
    try:
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error


def decode(raw: bytes, where: str, whole: bool = True, decoder: Any = None, begin: int = 0) -> str:
    """The text without a byte order mark; where it is not `whole`, without a character cut through at its end.

    decoder: what keeps such a character for the next call, with `begin`, the place of `raw` in its file.
    """
    decoder = decoder or codecs.getincrementaldecoder("utf-8-sig")()
    begin -= len(decoder.getstate()[0])
    try:
        text: str = decoder.decode(raw, whole)
    except UnicodeDecodeError as error:
        place = begin + error.start
        raise SourceError(f"{where} is not UTF-8 text (at byte {place}). Convert it, or give another.") from error
    if "\0" in text:
        raise SourceError(f"{where} holds NUL bytes, so it is not text. Give a UTF-8 text file.")
    return text
