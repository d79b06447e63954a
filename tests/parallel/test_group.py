"""What ranks say, sum and hand to each other; and what becomes of the others when one ends."""

from __future__ import annotations

import os
import re
import signal
import time
from typing import Any

import pytest
import torch
from processes import together

from losparse_cli.errors import CheckpointError, RankError, UsageError
from losparse_cli.parallel.group import Alone, agreed, ranks
from losparse_cli.parallel.shares import share
from losparse_cli.parallel.tree import TreeSum

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="ranks are forked")


def summed(leaves: int, owner: int) -> list[float] | None:
    """Of leaves of many sizes; leaf 5 is missing."""
    group = ranks()
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(leaves, 7, generator=generator) * 10.0 ** torch.randint(
        -5, 6, (leaves, 1), generator=generator
    )
    mine = share(leaves, group.rank, group.size)
    tree = TreeSum(mine.start)
    for leaf in mine:
        if leaf != 5:
            tree.add(leaf, values[leaf].clone())
    total = group.sum_to(owner, tree)
    return None if total is None else total.tolist()


@pytest.mark.parametrize("size", [2, 4])
def test_sums_are_those_of_one_process(size: int) -> None:
    alone = summed(13, 0)
    for owner in range(size):
        found = together(size, lambda rank, owner=owner: summed(13, owner))  # type: ignore[misc]
        assert found == [alone if rank == owner else None for rank in range(size)]


TENSORS = {
    "half": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "codes": torch.arange(-3, 3, dtype=torch.int8),
    "indices": torch.tensor([0, 65535], dtype=torch.uint16),
    "bits": torch.tensor([True, False]),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "turned": torch.arange(6.0).view(2, 3).T,
}


def heard(source: int) -> list[Any]:
    group = ranks()
    found = group.broadcast(source, TENSORS if group.rank == source else {"of nobody": torch.ones(1)})
    same = [torch.equal(found[name], one) and found[name].dtype == one.dtype for name, one in TENSORS.items()]
    said = group.agree({"rank": group.rank, "share": 0.1 + group.rank, "none": None})
    return [list(found) == list(TENSORS), all(same), said]


def test_every_rank_hears_the_same() -> None:
    expected = [{"rank": rank, "share": 0.1 + rank, "none": None} for rank in range(3)]
    assert together(3, lambda rank: heard(1)) == [[True, True, expected]] * 3


def test_one_process_says_and_hears_the_same() -> None:
    alone = Alone()
    assert alone.agree((1, {"a": None})) == [[1, {"a": None}]]
    assert alone.broadcast(0, TENSORS).keys() == TENSORS.keys()
    assert alone.sum_to(0, TreeSum()) is None


# --- where ranks fail -----------------------------------------------------------------------------


def failing(rank: int) -> None:
    group = ranks()

    def work() -> int:
        if rank == 1:
            raise UsageError("There is no folder 'x'.")
        return rank

    agreed(group, work)


def test_all_end_with_the_sentence_of_the_one_that_fails() -> None:
    found = together(2, failing)
    assert found == ["RankError: Rank 1 of 2: There is no folder 'x'.", "UsageError: There is no folder 'x'."]


def test_what_all_agree_on_goes_on() -> None:
    assert agreed(Alone(), lambda: 5) == 5
    with pytest.raises(UsageError, match="so"):
        agreed(Alone(), lambda: (_ for _ in ()).throw(UsageError("so")))


def refusing(rank: int) -> Any:
    """Rank 1 finds something wrong while rank 0 is at work."""
    try:
        with ranks().at_work():
            if rank == 1:
                raise CheckpointError("The tensor x is missing.")
            time.sleep(30)
    except CheckpointError as error:
        return [str(error), error.told]


def test_what_one_rank_finds_wrong_is_said_by_the_first() -> None:
    assert together(2, refusing) == [
        ["Rank 1 of 2: The tensor x is missing.", False], ["The tensor x is missing.", False]
    ]  # fmt: skip


def threads(rank: int) -> None:
    torch.set_num_threads(1 + rank)
    ranks()


def test_ranks_of_other_threads_are_refused() -> None:
    said = (
        "UsageError: Rank 1 computes with 2 threads, and rank 0 with 1: results would differ. Set OMP_NUM_THREADS to "
        "the same number for all."
    )
    assert together(2, threads) == [said, said]


def left_behind(rank: int, waits: bool) -> Any:
    """Rank 1 is killed, while the others wait for it, or are at work."""
    group = ranks()
    group.agree(None)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begun = time.monotonic()
    try:
        with group.at_work():
            if waits:
                group.agree(None)
            while time.monotonic() < begun + 30:
                sum(range(1000))
    except RankError as error:
        return [str(error), time.monotonic() - begun < 15, error.told]
    return "nobody noticed"


@pytest.mark.parametrize("waits", [True, False], ids=["waiting", "at work"])
def test_a_rank_that_is_killed_ends_the_others_with_its_number(waits: bool) -> None:
    found = together(3, lambda rank: left_behind(rank, waits))
    assert found[1] == "signal -9"
    for rank in (0, 2):
        sentence, soon, told = found[rank]
        if rank == 0:  # which keeps what the others can look up
            assert sentence.startswith("Rank 1 of 3 ended before the run did. What is finished is kept")
        assert re.match(r"Ranks? .*\b1 of 3 ended", sentence)
        assert soon
        assert not told or rank == 2  # one of them says it


def interrupted(rank: int) -> str:
    """Rank 0 waits for one that is at work, and a person has enough."""
    group = ranks()
    if rank == 1:
        time.sleep(2.5)
        return "done"
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    signal.alarm(1)
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        group.agree(None)
    return "at once" if time.monotonic() < begun + 2 else "late"


def test_a_rank_that_waits_can_be_interrupted() -> None:
    assert together(2, interrupted)[0] == "at once"
