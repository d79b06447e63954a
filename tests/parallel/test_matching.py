"""Blocks that several ranks match: the files of one process, whatever their number, and through kills."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sighted
import toys
from processes import ran
from terminal import Ended, done

TEXT = " ".join(f"Sentence {k} of the text says that {k * k % 97} is not {k}." for k in range(300))
READS = ("--calibration", "text.txt", "--calibration-tokens", "512", "--calibration-length", "32")
CODES, FLOATS = ("--bits", "3"), ("--keep", "0.5", "--iterations", "4")
BLOCKS = ("--refine", "blocks", "--refine-steps", "6", "--refine-lr", "1e-3")


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def by_one(*command: object, cwd: Path) -> dict[str, str]:
    """Digests of what one process makes of it."""
    done(*command, "-o", "out", cwd=cwd)
    (cwd / "out").rename(cwd / "alone")
    return toys.digests(cwd / "alone")


def assert_done(ended: list[Ended]) -> None:
    assert [one.code for one in ended] == [0] * len(ended), "\n".join(one.err for one in ended)
    assert all(one.out == "" and one.err == "" for one in ended[1:])
    assert "Done." in ended[0].out


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [("llama", 2, CODES), ("llama", 4, FLOATS), ("mixtral", 3, CODES), ("t5", 2, FLOATS)],
    ids=["codes", "floats", "experts", "encoder and decoder"],
)
def test_the_files_are_those_of_one_process(
    name: str, size: int, options: tuple[str, ...], toy: Callable[..., Path], cwd: Path
) -> None:
    command = ("compress", toy(name, tokenizer=True), *options, *READS, *BLOCKS)
    expected = by_one(*command, cwd=cwd)
    assert_done(ran(size, *command, "-o", "out", cwd=cwd))
    assert toys.digests(cwd / "out") == expected
    assert sorted(path.name for path in cwd.iterdir()) == ["alone", "out", "text.txt"]
