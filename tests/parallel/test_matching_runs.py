"""Blocks that several ranks match: the files of one process, whatever their number, and through kills."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import sighted
import toys
from processes import assert_done, by_one, killed_at, ran
from terminal import done

TEXT = " ".join(f"Sentence {k} of the text says that {k * k % 97} is not {k}." for k in range(300))
READS = ("--calibration", "text.txt", "--calibration-tokens", "512", "--calibration-length", "32")
CODES, FLOATS = ("--bits", "3"), ("--keep", "0.5", "--iterations", "4")
BLOCKS = ("--refine", "blocks", "--refine-steps", "6", "--refine-lr", "1e-3")


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


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


@pytest.mark.parametrize("options", [CODES, ("--keep", "0.5")], ids=["codes", "floats"])
def test_a_checkpoint_that_is_matched_later(options: tuple[str, ...], toy: Callable[..., Path], cwd: Path) -> None:
    dense = toy("llama", tokenizer=True)
    done("compress", dense, *options, "-o", "small", cwd=cwd)
    command = ("refine", "small", "--against", dense, "--objective", "blocks", *READS, *BLOCKS[2:])
    expected = by_one(*command, cwd=cwd)
    assert_done(ran(2, *command, "-o", "out", cwd=cwd))
    assert toys.digests(cwd / "out") == expected
    assert toys.digests(cwd / "small")["model.safetensors"] != expected["model.safetensors"]


# In one of the steps of the second block.
ENDS = killed_at("losparse_cli.compression.matching._Student", "step", 9)


def test_a_killed_run_goes_on_with_another_number_of_ranks(toy: Callable[..., Path], cwd: Path) -> None:
    command = ("compress", toy("llama", tokenizer=True), *CODES, *READS, *BLOCKS)
    expected = by_one(*command, cwd=cwd)
    begun = time.monotonic()
    ended = ran(2, *command, "-o", "out", cwd=cwd, before={1: ENDS})
    assert time.monotonic() - begun < 60
    assert ended[1].code == -signal.SIGKILL
    assert ended[0].code == 1
    assert "Rank 1 of 2 ended before the run did. What is finished is kept" in ended[0].err
    ended = ran(4, *command, "-o", "out", "--resume", "required", cwd=cwd)
    assert_done(ended)
    assert "Going on after layer 7 of 14." in ended[0].err
    assert toys.digests(cwd / "out") == expected


def test_blocks_and_then_the_whole_model(toy: Callable[..., Path], cwd: Path) -> None:
    """No time for a step of the latter, so that minutes mean the same to all."""
    both = ("--refine", "both", "--refine-minutes", "1e-6", "--refine-steps", "6", "--refine-tokens", "1024")
    command = ("compress", toy("llama", tokenizer=True), *CODES, *READS, *both)
    expected = by_one(*command, cwd=cwd)
    assert_done(ran(2, *command, "-o", "out", cwd=cwd))
    assert toys.digests(cwd / "out")["model.safetensors"] == expected["model.safetensors"]


def test_rows_of_which_some_go_past_a_tower(tmp_path: Path, cwd: Path) -> None:
    pytest.importorskip("PIL")
    dense = sighted.write(sighted.llava, tmp_path / "dense")
    rows = sighted.rows(tmp_path / "rows", 8, alone=(0, 3, 5, 6))
    command = ("compress", dense, "--bits", "5", "--targets", r"re:.*\.0\.", "--calibration", rows, *BLOCKS)
    expected = by_one(*command, cwd=cwd)
    assert_done(ran(2, *command, "-o", "out", cwd=cwd))
    assert toys.digests(cwd / "out") == expected
