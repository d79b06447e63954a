"""Text of files, whole and piece by piece."""

from __future__ import annotations

from pathlib import Path

import pytest

from losparse_cli.errors import SourceError, UsageError
from losparse_cli.text import files
from losparse_cli.text.files import find_file, lines_of, read_pieces, read_text


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_pieces_are_the_text(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\ntwo é\n\r\rthree 日本\r\n\r".encode())
    monkeypatch.setattr(files, "PIECE", size)
    found = list(read_pieces(path))
    assert all(found)
    assert "".join(found) == read_text(path) == "one\ntwo é\n\r\rthree 日本\n\r"
    assert list(lines_of(found)) == ["one\n", "two é\n", "\r", "\r", "three 日本\n", "\r"]


@pytest.mark.parametrize("size", [1, 2, 3, 1000])
def test_what_is_no_text_is_found_where_it_is(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    monkeypatch.setattr(files, "PIECE", size)
    for content, says in (("aé".encode() + b"ab\xff", r"at byte 5"), (b"abcd\xc3", r"at byte 4"), (b"abc\0", "NUL")):
        path.write_bytes(content)
        with pytest.raises(SourceError, match=says):
            list(read_pieces(path))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--text .* is a folder\. Give a file in it\.$"):
        find_file(tmp_path, "--text")
    with pytest.raises(UsageError, match=r"^There is no file absent\. Check --text, or give another\.$"):
        find_file("absent", "--text", ", or give another")
