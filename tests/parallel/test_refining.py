"""A model that several ranks refine as a whole: the files of one process, through kills, and within the time."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toys
from processes import assert_done, by_one, killed_at, ran
from terminal import done

from losparse_cli import Recipe, compress

TEXT = " ".join(f"Sentence {k} of the text says that {k * k % 97} is not {k}." for k in range(300))
READS = ("--calibration", "text.txt", "--calibration-tokens", "1280", "--calibration-length", "32")
STEPS = ("--refine-steps", "6", "--refine-lr", "3e-3")
REPORT = "losparse_report.json"


@pytest.fixture(scope="module")
def dense(toy: Callable[..., Path]) -> Path:
    return toy("llama", tokenizer=True)


@pytest.fixture(scope="module")
def place(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, a compressed model, and what one process refines it to."""
    folder = tmp_path_factory.mktemp("refining")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    compress(dense, folder / "small", Recipe(rank=2, bits=3.0))
    by_one(*refining(dense), cwd=folder)
    return folder


@pytest.fixture
def cwd(place: Path, tmp_path: Path) -> Path:
    shutil.copy(place / "text.txt", tmp_path)
    shutil.copytree(place / "small", tmp_path / "small")
    return tmp_path


def refining(dense: Path) -> tuple[object, ...]:
    return ("refine", "small", "--against", dense, *READS, *STEPS)


def known(folder: Path) -> dict[str, Any]:
    """Digests of all files, and in place of the report's what it says, without times."""
    report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    report["refinement"]["looks"] = [[step, lost] for step, _, lost in report["refinement"]["looks"]]
    del report["refinement"]["seconds"], report["fingerprint"]
    return toys.digests(folder) | {REPORT: report}


@pytest.mark.parametrize("size", [2, 4])
def test_the_files_are_those_of_one_process(size: int, dense: Path, place: Path, cwd: Path) -> None:
    assert_done(ran(size, *refining(dense), "-o", "out", cwd=cwd), "Done")
    assert known(cwd / "out") == known(place / "alone")
    before, after = toys.digests(cwd / "small"), toys.digests(cwd / "out")
    assert before["model.safetensors"] != after["model.safetensors"]
    assert sorted(path.name for path in cwd.iterdir()) == ["out", "small", "text.txt"]


@pytest.mark.parametrize("name", ["t5", "mixtral"])
def test_other_architectures(name: str, toy: Callable[..., Path], cwd: Path) -> None:
    command = ("compress", toy(name, tokenizer=True), *READS, "--bits", "4", "--refine", "model", "--refine-steps", "3")
    by_one(*command, cwd=cwd)
    assert_done(ran(2, *command, "-o", "out", cwd=cwd), "Done")
    assert known(cwd / "out") == known(cwd / "alone")


def test_a_text_of_fewer_batches_than_ranks(dense: Path, cwd: Path) -> None:
    command = tuple("256" if word == "1280" else word for word in refining(dense))
    by_one(*command, cwd=cwd)
    assert_done(ran(3, *command, "-o", "out", cwd=cwd), "Done")
    assert known(cwd / "out") == known(cwd / "alone")


# A rank ends in one of its passes, or when the dense model is asked.
def in_pass(number: int) -> str:
    return killed_at("losparse_cli.refinement.training.Training", "_gradient", number)


ENDS_EARLY = """
import os, signal
from losparse_cli.refinement import teacher
teacher._asked = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_goes_on_with_other_numbers_of_ranks(dense: Path, place: Path, cwd: Path) -> None:
    """Of two the second ends while the dense model is asked; of four the third, of two the first in later steps."""
    command = (*refining(dense), "-o", "out")
    for size, rank, before in ((2, 1, ENDS_EARLY), (4, 2, in_pass(3)), (2, 0, in_pass(7))):
        begun = time.monotonic()
        ended = ran(size, *command, cwd=cwd, before={rank: before})
        assert time.monotonic() - begun < 60
        assert ended[rank].code == -signal.SIGKILL
        others = [one for number, one in enumerate(ended) if number != rank]
        assert {one.code for one in others} == {1}
        said = [one.err for one in others if one.err]
        assert f"Rank {rank} of {size} ended before the run did. What is finished is kept" in said[0]
        assert all("Rank" not in one for one in said[1:])
        assert not (cwd / "out").exists()
    ended = ran(4, *command, "--resume", "required", cwd=cwd)
    assert_done(ended, "Done")
    assert "At first" not in ended[0].err
    assert known(cwd / "out") == known(place / "alone")
    again = ran(2, *command, "--json", cwd=cwd)
    assert json.loads(again[0].out)["seconds"] == 0
    assert [one.code for one in again] == [0, 0]
    assert again[1].out == ""


def test_one_process_goes_on_where_two_were_killed(dense: Path, place: Path, cwd: Path) -> None:
    command = (*refining(dense), "-o", "out")
    assert ran(2, *command, cwd=cwd, before={0: in_pass(8)})[0].code == -signal.SIGKILL
    assert "At first" not in done(*command, cwd=cwd).err
    assert known(cwd / "out") == known(place / "alone")


def test_compressing_and_refining_in_one_go(dense: Path, cwd: Path) -> None:
    command = ("compress", dense, *READS, "--bits", "3", "--refine", "model", *STEPS)
    by_one(*command, cwd=cwd)
    ended = ran(2, *command, "-o", "out", cwd=cwd, before={1: in_pass(5)})
    assert "Rank 1 of 2 ended before the run did." in ended[0].err
    assert_done(ran(4, *command, "-o", "out", cwd=cwd), "Done")
    assert known(cwd / "out") == known(cwd / "alone")


# The second rank's clock runs ahead: only the first one's counts.
AHEAD = """
from losparse_cli.refinement import training
from types import SimpleNamespace
ticks = iter(range(0, 10**9, 3600))
training.time = SimpleNamespace(monotonic=lambda: float(next(ticks)))
"""


def test_the_first_rank_says_when_time_is_up(dense: Path, cwd: Path) -> None:
    command = ("refine", "small", "--against", dense, *READS, "--refine-minutes", "0.1", "-o", "out")
    begun = time.monotonic()
    ended = ran(2, *command, "--json", cwd=cwd, before={1: AHEAD})
    assert [one.code for one in ended] == [0, 0], ended
    assert time.monotonic() - begun < 60
    assert json.loads(ended[0].out)["steps"] > 1


# What one rank computes is no number: it ends the training of all.
BROKEN = """
from losparse_cli.refinement import training
plain, calls = training.divergence, 0
def broken(*arguments, gradients):
    global calls
    calls += gradients
    lost, slope = plain(*arguments, gradients=gradients)
    return (float("nan") if gradients and calls > 4 else lost), slope
training.divergence = broken
"""


def test_a_loss_that_is_no_number_on_one_rank_ends_the_training_of_all(dense: Path, cwd: Path) -> None:
    ended = ran(2, *refining(dense), "-o", "out", cwd=cwd, before={1: BROKEN})
    assert [one.code for one in ended] == [0, 0], ended
    assert "where training ends" in ended[0].err
    assert json.loads((cwd / "out" / REPORT).read_text())["refinement"]["steps"] == 2


WRONG: dict[str, tuple[int, tuple[object, ...], dict[int, str], str, int]] = {
    "more ranks than passes": (
        4, ("--refine-tokens", "512"), {},
        "of each step, 8 at a time: that is work for 2. Start 2, or raise --refine-tokens to 1024.", 2,
    ),
    "other steps": (
        2, (), {1: "import sys; sys.argv[sys.argv.index('--refine-steps') + 1] = '7'"},
        "Rank 1 is at another run than rank 0 (different: --refine-steps 6, now 7)", 2,
    ),
    "nothing to move": (2, ("--train", "nothing"), {}, "--train lists some of", 2),
    "no dense model": (2, ("--against", "nowhere"), {}, "There is no folder nowhere", 1),
    "no dense model of one rank": (
        2, (), {1: "import sys; sys.argv[sys.argv.index('--against') + 1] = 'nowhere'"},
        "Rank 1 of 2: There is no folder nowhere", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_ranks_cannot_do_together_is_one_sentence(case: str, dense: Path, cwd: Path) -> None:
    size, more, before, says, code = WRONG[case]
    ended = ran(size, *refining(dense), *more, "-o", "out", cwd=cwd, before=before)
    assert says in ended[0].complaint
    assert {one.code for one in ended} == {code}
    assert all(one.err == "" for one in ended[1:])
    assert sorted(path.name for path in cwd.iterdir()) == ["small", "text.txt"]


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ("training.divergence = lambda *a, gradients: (float('nan'), None)", "gives no numbers on its text"),
        ("run._moving = lambda *a: {}", "has nothing that --train"),
    ],
)
def test_what_all_ranks_find_wrong_is_said_once(broken: str, says: str, dense: Path, cwd: Path) -> None:
    before = f"from losparse_cli.refinement import run, training; {broken}"
    ended = ran(2, *refining(dense), "-o", "out", cwd=cwd, before={0: before, 1: before})
    assert says in ended[0].complaint
    assert ended[1].err == ""
    assert sorted(path.name for path in cwd.iterdir()) == ["small", "text.txt"]


def test_a_dry_run_says_what_the_ranks_take(dense: Path, cwd: Path) -> None:
    ended = ran(2, *refining(dense), "-o", "out", "--dry-run", cwd=cwd)
    assert [one.code for one in ended] == [0, 0], ended
    assert "Ranks    2, each about" in ended[0].out
    assert ended[1].out == ""
    assert sorted(path.name for path in cwd.iterdir()) == ["small", "text.txt"]
