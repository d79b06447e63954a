"""Which windows are held out, what repeats itself, and what is said of too little text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from losparse_cli.text.request import Calibration
from losparse_cli.text.sample import account, doubts, hold_out, repeated_share, strangeness
from losparse_cli.text.windows import Windows

ASKED = Calibration("some/folder/text.txt", tokens=16384, length=128)


def random_windows(count: int, length: int = 128) -> Windows:
    return Windows(torch.randint(500, (count, length), generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize(("count", "held"), [(1, 0), (2, 1), (16, 1), (39, 1), (40, 2), (128, 6)])
def test_a_twentieth_is_held_out_evenly_and_at_least_one_of_two(count: int, held: int) -> None:
    windows = replace(random_windows(count), target_ids=torch.arange(count)[:, None])
    kept, out = hold_out(windows)
    assert (len(kept.ids), len(out.ids)) == (count - held, held)
    assert kept.target_ids is not None
    assert out.target_ids is not None
    places = out.target_ids[:, 0].tolist()
    assert sorted([*kept.target_ids[:, 0].tolist(), *places]) == list(range(count))
    assert kept.target_ids[:, 0].tolist() == sorted(kept.target_ids[:, 0].tolist())
    for k, place in enumerate(places):  # the middle of its part
        assert k * count / held <= place <= (k + 1) * count / held
    assert torch.equal(out.ids, windows.ids[places])


def test_of_a_text_that_repeats_itself_nothing_is_held_out() -> None:
    sentence = torch.randint(500, (23,), generator=torch.Generator().manual_seed(3))
    repeated = Windows(sentence.repeat(200)[: 32 * 128].view(32, 128))
    kept, out = hold_out(repeated)
    assert torch.equal(kept.ids, repeated.ids)
    assert len(out.ids) == 0
    assert repeated_share(repeated) > 0.95
    assert any("repeats itself: 99%" in sentence for sentence in doubts(ASKED, repeated))
    assert repeated_share(random_windows(32)) == 0
    assert not any("repeats" in sentence for sentence in doubts(ASKED, random_windows(32)))


def test_a_text_that_the_model_does_not_know_is_strange() -> None:
    assert strangeness(None) == strangeness(2.51) == strangeness(3.82) == ()  # an encyclopedia, a design document
    [sentence] = strangeness(5.14)  # random letters
    assert "its perplexity is 171, where" in sentence
    assert "1,000,000,000" in strangeness(1e6)[0]
    windows = random_windows(128)
    assert account(ASKED, windows, 5.14)["warnings"] == [*doubts(ASKED, windows), sentence]


def test_windows_too_short_for_a_sequence_count_as_different() -> None:
    short = Windows(torch.ones(8, 10, dtype=torch.long))
    assert repeated_share(short) == 0
    assert len(hold_out(short)[1].ids) == 1


@pytest.mark.parametrize(
    ("count", "tokens", "said"),
    [(32, 65536, "Give more text."), (32, 4096, "Raise --calibration-tokens."), (64, 65536, None), (128, 16384, None)],
)
def test_few_tokens_are_warned_of_with_what_would_help(count: int, tokens: int, said: str | None) -> None:
    found = doubts(replace(ASKED, tokens=tokens), random_windows(count))
    assert [sentence.endswith(said or "") for sentence in found] == [True] * (said is not None)


def test_few_tokens_are_warned_of_before_there_is_any_text() -> None:
    assert len(doubts(replace(ASKED, tokens=4096), None)) == 1
    assert doubts(ASKED, None) == ()


def test_the_account_counts_what_is_there() -> None:
    windows = random_windows(32)
    found = account(replace(ASKED, tokens=65536), windows)
    assert {name: found[name] for name in ("tokens", "tokens_used", "windows", "held_out", "length")} == {
        "tokens": 65536, "tokens_used": 4096, "windows": 32, "held_out": 1, "length": 128,
    }  # fmt: skip
    assert found["sha256"] == windows.digest()
    assert len(found["warnings"]) == 1
    assert "tokens_used" not in account(ASKED, None)
