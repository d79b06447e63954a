"""Windows over contexts, and the way from characters to tokens and back, for every place an answer may have."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
import pytest
from conftest import character_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from losparse_cli.tasks.spans import best_span, cut_windows, find_span
from tests.tasks.made import encoder_tokenizer

LETTERS = string.ascii_letters * 4


def word_tokenizer() -> Any:
    """Words are tokens, and a token holds the space before it, as in the vocabularies of GPT-2 and Llama."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[^ ]+"), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<unk>")


def test_windows_overlap_by_the_stride_and_cover_the_context() -> None:
    # Room of 12 tokens: 3 special ones, 2 of the question, 7 of the context, of which two windows share 3.
    (windows,) = cut_windows(encoder_tokenizer(), ["qq"], [LETTERS[:17]], 12, 3)
    parts = [(int(w.offsets[4, 0]), int(w.offsets[-2, 1])) for w in windows]
    assert parts == [(0, 7), (4, 11), (8, 15), (12, 17)]
    tokenizer = encoder_tokenizer()
    assert [tokenizer.decode(w.inputs["input_ids"]) for w in windows][1] == "<s>qq</s>efghijk</s>"
    for window in windows:
        outside = window.offsets[:, 0] < 0
        assert np.flatnonzero(outside).tolist() == [0, 1, 2, 3, len(outside) - 1]
        assert (window.offsets[outside] == -1).all()
        assert set(window.inputs) == {"input_ids", "token_type_ids", "attention_mask"}


def test_long_questions_lose_their_end_and_the_overlap_shrinks() -> None:
    windows = cut_windows(encoder_tokenizer(), ["x" * 50, "a", ""], [LETTERS, "bcd", ""], 23, 200)
    first, short, empty = windows
    assert [w.inputs["input_ids"][1:12] for w in first] == [[encoder_tokenizer()("x").input_ids[1]] * 10 + [2]] * len(
        first
    )
    assert first[1].offsets[12, 0] == 5  # 10 of the context, half of them shared
    assert first[-1].offsets[-2, 1] == len(LETTERS)
    assert [len(part) for part in (short, empty)] == [1, 1]
    assert (empty[0].offsets < 0).all()
    assert max(len(w.inputs["input_ids"]) for w in first) == 23


@given(st.data())
def test_every_answer_that_fits_into_a_window_is_found(data: st.DataObject) -> None:
    side = data.draw(st.sampled_from(["left", "right"]))
    tokenizer = data.draw(st.sampled_from([encoder_tokenizer(side), character_tokenizer()]))
    context = LETTERS[: data.draw(st.integers(1, 90))]
    length, overlap = data.draw(st.integers(16, 60)), data.draw(st.integers(0, 40))
    question = "q" * data.draw(st.integers(0, 30))
    (windows,) = cut_windows(tokenizer, [question], [context], length, overlap)
    begin = data.draw(st.integers(0, len(context) - 1))
    end = data.draw(st.integers(begin + 1, len(context)))
    fitting = 0
    for window in windows:
        inside = np.flatnonzero(window.offsets[:, 0] >= 0)
        fits = window.offsets[inside[0], 0] <= begin and end <= window.offsets[inside[-1], 1]
        found = find_span(window.offsets, begin, end)
        assert (found is not None) == fits
        if found is None:
            continue
        fitting += 1
        logits = np.zeros((2, len(window.offsets)), dtype=np.float32)
        logits[0, found[0]] = logits[1, found[1]] = 5
        span = best_span(*logits, window.offsets, 20, len(context))
        assert span is not None
        assert (span.begin, span.end, span.score) == (begin, end, 10)
    room = length - tokenizer.num_special_tokens_to_add(pair=True)
    shared = min(overlap, (room - min(len(question), room // 2)) // 2)
    if end - begin <= shared:  # whatever is no longer than the overlap lies in some window as a whole
        assert fitting


def test_words_with_the_space_before_them() -> None:
    context = "It is a very blue house"
    (windows,) = cut_windows(word_tokenizer(), ["What ?"], [context], 40, 5)
    begin = context.index("very blue")
    found = find_span(windows[0].offsets, begin, begin + len("very blue"))
    assert found == (5, 6)
    assert find_span(windows[0].offsets, 1, 4) == (2, 3)  # from within a word into another
    assert find_span(windows[0].offsets, begin, len(context) + 1) is None


def test_the_best_span_obeys_its_limits() -> None:
    offsets = np.array([[-1, -1], [0, 1], [1, 2], [2, 3], [3, 4], [-1, -1]], dtype=np.int32)
    start = np.array([99, 1, 5, 0, 4, 99], dtype=np.float32)
    end = np.array([99, 9, 0, 0, 3, 99], dtype=np.float32)
    best = best_span(start, end, offsets, 20, 30)
    assert best is not None
    assert (best.begin, best.end, best.score) == (0, 1, 10)  # not 5 + 9, whose end comes before its start
    assert best_span(start, end, offsets, 1, 30) is None  # the best start and the best end do not go together
    end[1] = 0
    long, short = best_span(start, end, offsets, 20, 3), best_span(start, end, offsets, 20, 2)
    assert long is not None
    assert short is not None
    assert ((long.begin, long.end), (short.begin, short.end)) == ((1, 4), (3, 4))
    assert best_span(start, end, np.full_like(offsets, -1), 20, 30) is None


@pytest.mark.parametrize("overlap", [0, 1, 5])
def test_without_overlap_an_answer_across_a_border_is_nowhere(overlap: int) -> None:
    (windows,) = cut_windows(encoder_tokenizer(), ["q"], [LETTERS[:40]], 16, overlap)
    edge = int(windows[0].offsets[-2, 1])
    found = [find_span(w.offsets, edge - 2, edge + 2) for w in windows]
    assert any(found) == (overlap >= 4)
