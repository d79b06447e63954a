"""One run on several ranks: the files of one process, whatever their number, through kills, and one sentence where it
fails."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sighted
import toys
from processes import assert_done, killed_at, ran
from terminal import done, signalled_after

TEXT = ("--calibration", "text.txt", "--calibration-tokens", "512", "--calibration-length", "32")
CASES: dict[str, tuple[str, int, tuple[object, ...]]] = {
    "codes": ("llama", 2, ("--bits", "4", *TEXT)),
    "codes, four": ("llama", 4, ("--bits", "4", *TEXT)),
    "experts": ("mixtral", 4, ("--bits", "4", *TEXT)),
    "floats": ("llama", 4, ("--keep", "0.5", "--iterations", "5", *TEXT)),
    "experts of floats": ("mixtral", 2, ("--keep", "0.6", "--iterations", "4", *TEXT)),
    "encoder and decoder": ("t5", 2, ("--bits", "5", *TEXT)),
    "encoder": ("bert", 2, ("--grid", "int4", *TEXT)),
    "own text": ("gpt2", 2, ("--bits", "4", "--calibration", "self", *TEXT[2:])),
    "sizes by error": ("llama", 2, ("--allocate", "error", "--keep", "0.6", "--iterations", "5", *TEXT)),
    "no text": ("llama", 2, ("--bits", "4", "--max-shard-size", "50kB")),
    "no text, floats": ("gpt2", 4, ("--rank", "4", "--sparsity", "0.6")),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text."""
    folder = tmp_path_factory.mktemp("runs")
    chance = random.Random(0)
    words = ["".join(chance.choice("abcdefghijklmnop") for _ in range(chance.randint(2, 7))) for _ in range(60)]
    (folder / "text.txt").write_text(" ".join(chance.choice(words) for _ in range(900)), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def alone(toy: Callable[..., Path], place: Path) -> Callable[[str, tuple[object, ...]], dict[str, str]]:
    """alone(model, options) -> digests of what one process makes of it."""
    made: dict[str, dict[str, str]] = {}

    def digests(name: str, options: tuple[object, ...]) -> dict[str, str]:
        key = repr((name, options))
        if key not in made:
            done("compress", toy(name, tokenizer=True), "-o", "out", *options, cwd=place)
            made[key] = toys.digests(place / "out")
            shutil.rmtree(place / "out")
        return made[key]

    return digests


def in_folder(place: Path, tmp_path: Path) -> Path:
    shutil.copy(place / "text.txt", tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_the_files_are_those_of_one_process(case: str, toy: Any, alone: Any, place: Path, tmp_path: Path) -> None:
    name, size, options = CASES[case]
    cwd = in_folder(place, tmp_path)
    assert_done(ran(size, "compress", toy(name, tokenizer=True), "-o", "out", *options, cwd=cwd))
    assert toys.digests(cwd / "out") == alone(name, options)
    assert sorted(path.name for path in cwd.iterdir()) == ["out", "text.txt"]


def test_sensitivities_of_several_ranks_serve_any_number(toy: Any, alone: Any, place: Path, tmp_path: Path) -> None:
    """Two measure them; three, and one, make other sizes of them, measuring nothing."""
    cwd = in_folder(place, tmp_path)
    command = ("compress", toy("llama", tokenizer=True), *TEXT, "--sensitivity-file", "known.safetensors", "--bits")
    assert_done(ran(2, *command, "5", "-o", "first", cwd=cwd))
    known = (cwd / "known.safetensors").read_bytes()
    ended = ran(3, *command, "4", "-o", "second/out", cwd=cwd)
    assert_done(ended)
    assert "sensitivity:" not in ended[0].err
    assert toys.digests(cwd / "second/out") == alone("llama", CASES["codes"][2])
    done(*command, "4", "-o", "third/out", cwd=cwd)
    assert toys.digests(cwd / "third/out") == toys.digests(cwd / "second/out")
    assert (cwd / "known.safetensors").read_bytes() == known
    (cwd / "known.safetensors").write_bytes(known[:-1])
    ended = ran(2, *command, "6", "-o", "fourth", cwd=cwd)
    assert [one.code for one in ended] == [2, 2]
    assert "known.safetensors holds no sensitivities" in ended[0].complaint
    assert ended[1].err == ""
    assert not list(cwd.glob("fourth*"))


def test_rows_of_which_some_go_past_a_tower(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    dense = sighted.write(sighted.llava, tmp_path / "dense")
    rows = sighted.rows(tmp_path / "rows", 8, alone=(0, 3, 5, 6))
    options = ("--bits", "5", "--targets", r"re:.*\.0\.", "--calibration", rows)
    for cwd in (tmp_path / "one", tmp_path / "two"):
        cwd.mkdir()
    done("compress", dense, "-o", "out", *options, cwd=tmp_path / "one")
    assert_done(ran(2, "compress", dense, "-o", "out", *options, cwd=tmp_path / "two"))
    assert toys.digests(tmp_path / "two" / "out") == toys.digests(tmp_path / "one" / "out")


@pytest.mark.parametrize("case", ["codes", "no text"])
def test_a_killed_run_goes_on_with_other_numbers_of_ranks(
    case: str, toy: Any, alone: Any, place: Path, tmp_path: Path
) -> None:
    """Of two the first is killed; then of three another one; four end it."""
    name, _, options = CASES[case]
    cwd = in_folder(place, tmp_path)
    command = ("compress", toy(name, tokenizer=True), "-o", "out", *options)
    ended = ran(2, *command, cwd=cwd, before={0: signalled_after(9)})
    assert ended[0].code == -signal.SIGKILL
    assert ended[1].complaint.startswith("Rank 0 of 2 ended before the run did. What is finished is kept")
    begun = time.monotonic()
    ended = ran(3, *command, cwd=cwd, before={1: LOST if case == "codes" else signalled_after(4)})
    assert time.monotonic() - begun < 60
    assert ended[1].code == -signal.SIGKILL
    assert "Rank 1 of 3 ended before the run did." in ended[0].err
    assert ended[0].code == ended[2].code == 1
    assert not (cwd / "out").exists()
    ended = ran(4, *command, "--resume", "required", cwd=cwd)
    assert_done(ended)
    assert ("Going on after layer" in ended[0].err) == (case == "codes")
    assert toys.digests(cwd / "out") == alone(name, options)


LOST = killed_at("losparse_cli.compression.block.Block", "_solve", 2)


def test_one_process_goes_on_where_two_were_killed(toy: Any, alone: Any, place: Path, tmp_path: Path) -> None:
    name, _, options = CASES["codes"]
    cwd = in_folder(place, tmp_path)
    command = ("compress", toy(name, tokenizer=True), "-o", "out", *options)
    assert ran(2, *command, cwd=cwd, before={0: signalled_after(14)})[0].code == -signal.SIGKILL
    assert "Going on after layer 7 of 14." in done(*command, cwd=cwd).err
    assert toys.digests(cwd / "out") == alone(name, options)


def test_the_same_command_again_does_nothing(toy: Any, place: Path, tmp_path: Path) -> None:
    name, size, options = CASES["codes"]
    cwd = in_folder(place, tmp_path)
    command = ("compress", toy(name, tokenizer=True), "-o", "out", *options)
    done(*command, cwd=cwd)
    before = {path: path.stat().st_mtime_ns for path in (cwd / "out").iterdir()}
    for again in (ran(size, *command, cwd=cwd), ran(4, *command, "--json", cwd=cwd)):
        assert all(one.code == 0 for one in again)
    assert json.loads(again[0].out)["seconds"] == 0
    assert {path: path.stat().st_mtime_ns for path in (cwd / "out").iterdir()} == before


def test_an_interruption_leaves_what_is_finished(toy: Any, alone: Any, place: Path, tmp_path: Path) -> None:
    name, _, options = CASES["codes"]
    cwd = in_folder(place, tmp_path)
    command = ("compress", toy(name, tokenizer=True), "-o", "out", *options)
    ended = ran(2, *command, cwd=cwd, before={0: signalled_after(10, signal.SIGINT)})
    assert ended[0].code == 130
    assert "Interrupted. What is finished is kept" in ended[0].err
    assert ended[1].code == 1
    assert_done(ran(2, *command, "--resume", "required", cwd=cwd))
    assert toys.digests(cwd / "out") == alone(name, options)


def test_a_dry_run_says_what_the_ranks_take(toy: Any, place: Path, tmp_path: Path) -> None:
    cwd = in_folder(place, tmp_path)
    ended = ran(2, "compress", toy("llama", tokenizer=True), "-o", "out", *CASES["codes"][2], "--dry-run", cwd=cwd)
    assert [one.code for one in ended] == [0, 0]
    assert "Ranks    2, each about" in ended[0].out
    assert "Nothing was written." in ended[0].out
    assert ended[1].out == ""
    assert sorted(path.name for path in cwd.iterdir()) == ["text.txt"]


# --- what is refused ------------------------------------------------------------------------------

THREADS = "import torch; torch.set_num_threads(2)"
OTHER_TORCH = "import torch; torch.__version__ = '1.0'"
OTHER_RECIPE = "import sys; sys.argv[sys.argv.index('--bits') + 1] = '5'"
NO_SOURCE = "import sys; sys.argv[2] = 'nowhere'"
WRONG: dict[str, tuple[int, tuple[object, ...], dict[int, str], str, int]] = {
    "threads": (2, (), {1: THREADS}, "Rank 1 computes with 2 threads, and rank 0 with 1", 2),
    "torch": (2, (), {1: OTHER_TORCH}, "Rank 1 runs torch 1.0, and rank 0", 2),
    "recipe": (2, (), {1: OTHER_RECIPE}, "Rank 1 is at another run than rank 0 (different: --bits 4.0, now 5.0)", 2),
    "no source": (2, (), {1: NO_SOURCE}, "Rank 1 of 2: There is no folder nowhere", 1),
    "more ranks than text": (3, ("--calibration-tokens", "256"), {}, "3 processes share 8 windows of text, 4 at", 2),
    "a part": (2, ("--part", "1/2"), {}, "--part divides what is compressed without text", 2),
    "refining": (2, ("--refine", "model", "--refine-tokens", "64"), {}, "share the 2 windows of each step", 2),
    "a contradiction": (2, ("--keep", "0.5"), {}, "--keep and --bits contradict each other", 2),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_ranks_cannot_do_together_is_one_sentence(case: str, toy: Any, place: Path, tmp_path: Path) -> None:
    size, more, before, says, code = WRONG[case]
    cwd = in_folder(place, tmp_path)
    options = (*CASES["codes"][2], *more)
    ended = ran(size, "compress", toy("llama", tokenizer=True), "-o", "out", *options, cwd=cwd, before=before)
    assert says in ended[0].complaint
    assert {one.code for one in ended} == {code}
    assert all(one.err == "" for one in ended[1:])
    assert sorted(path.name for path in cwd.iterdir()) == ["text.txt"]


@pytest.mark.parametrize(
    ("size", "options", "says"),
    [
        (2, ("--bits", "4", "--part", "1/2"), "they divide the run themselves"),
        (9, ("--bits", "4"), "14 layers without text are work for 8 processes at most, not 9. Start 8."),
    ],
    ids=["a part", "more ranks than sections"],
)
def test_the_same_without_text(size: int, options: tuple[str, ...], says: str, toy: Any, tmp_path: Path) -> None:
    ended = ran(size, "compress", toy("llama"), "-o", "out", *options, cwd=tmp_path)
    assert says in ended[0].complaint
    assert all(one.err == "" for one in ended[1:])
    assert not list(tmp_path.iterdir())


def test_what_one_rank_finds_wrong_leaves_nothing(toy: Any, place: Path, tmp_path: Path) -> None:
    """A weight that is damaged where one rank alone solves for it."""
    cwd = in_folder(place, tmp_path)
    options = CASES["codes"][2]
    command = ("compress", toy("llama", tokenizer=True), "-o", "out", *options)
    ended = ran(2, *command, cwd=cwd, before={1: DAMAGED})
    assert ended[0].complaint == "Rank 1 of 2: The tensor x is damaged. Repair it."
    assert ended[1].code == 1
    assert sorted(path.name for path in cwd.iterdir()) == ["text.txt"]


DAMAGED = """
from losparse_cli.compression import block
from losparse_cli.errors import CheckpointError
def damaged(self, *arguments):
    raise CheckpointError("The tensor x is damaged. Repair it.")
block.Block._solve = damaged
"""


def test_another_command_says_that_it_runs_alone(compressed: Any, tmp_path: Path) -> None:
    ended = ran(2, "bench", compressed("llama", tokenizer=True), cwd=tmp_path)
    assert "runs in one process, and 2 were started. Start it without torchrun." in ended[0].complaint
    assert ended[1].err == ""


# --- eval -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["together", "apart"])
def test_an_evaluation_is_that_of_one_process(memory: str, toy: Any, compressed: Any, place: Path) -> None:
    dense, folder = toy("llama", tokenizer=True), compressed("llama", tokenizer=True)
    command = ("eval", folder, "--against", dense, "--text", "text.txt", "--length", "24", "--windows", "7")
    command = (*command, "--memory", memory, "--json")
    expected = json.loads(done(*command, cwd=place).out)
    for size in (2, 4):
        ended = ran(size, *command, cwd=place)
        assert [one.code for one in ended] == [0] * size, ended
        assert json.loads(ended[0].out) == expected
        assert all(one.out == "" for one in ended[1:])


def test_scores_of_a_task_are_those_of_one_process(toy: Any, compressed: Any, tmp_path: Path) -> None:
    rows = [{"sentence": "abc " * (1 + k % 5), "label": k % 3} for k in range(11)]
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = ("eval", compressed("bert", tokenizer=True), "--against", toy("bert", tokenizer=True), "--task",
               "text-classification", "--validation-file", "dev.jsonl", "--batch-size", "2", "--json")  # fmt: skip
    expected = json.loads(done(*command, cwd=tmp_path).out)
    ended = ran(2, *command, cwd=tmp_path)
    assert [one.code for one in ended] == [0, 0], ended
    assert json.loads(ended[0].out) == expected


def test_torchrun_itself(toy: Any, alone: Any, place: Path, tmp_path: Path) -> None:
    """The command as a person types it; and a rank that dies ends the other one, by its name."""
    import subprocess
    import sys

    from terminal import bare_environment

    name, _, options = CASES["codes"]
    cwd = in_folder(place, tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "losparse_cli", "compress", str(toy(name, tokenizer=True)), "-o", "out"]
    ended = subprocess.run(
        [*command, *map(str, options)], cwd=cwd, env=bare_environment(tmp_path), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert toys.digests(cwd / "out") == alone(name, options)
