"""Contexts -> overlapping windows of tokens; characters <-> tokens; logits -> the best span of a window.

The procedure of BERT (arXiv 1810.04805) for SQuAD, as transformers' run_qa.py has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Window:
    """inputs: what the model reads, name -> list. offsets: (tokens, 2) characters of the context, -1 outside it."""

    inputs: dict[str, Any]
    offsets: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Span:
    """Characters `begin` to `end` of a context, and the sum of the two logits."""

    begin: int
    end: int
    score: float


def cut_windows(
    tokenizer: Any, questions: list[str], contexts: list[str], length: int, overlap: int
) -> list[list[Window]]:
    """For each question its windows of at most `length` tokens: the question, and the next part of the context.

    Two windows share `overlap` tokens of the context, or half of what there is room for beside the question. Of a
    question that takes more than half of a window the end is cut off.
    """
    room = length - tokenizer.num_special_tokens_to_add(pair=True)
    half = max(1, room // 2)
    encoded = tokenizer(
        questions, add_special_tokens=False, truncation=True, max_length=half, return_offsets_mapping=True,
        verbose=False,
    )  # fmt: skip
    kept = list(questions)
    groups: dict[int, list[int]] = {}
    for k, places in enumerate(encoded["offset_mapping"]):
        if len(places) == half:
            kept[k] = questions[k][: places[-1][1]]
        groups.setdefault(min(overlap, (room - len(places)) // 2), []).append(k)
    found: list[list[Window]] = [[] for _ in questions]
    for shared, members in groups.items():  # the library takes one overlap a call
        made = tokenizer(
            [kept[k] for k in members],
            [contexts[k] for k in members],
            truncation="only_second",
            max_length=length,
            stride=shared,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            return_attention_mask=True,
            verbose=False,
        )
        names = [name for name in made if name not in ("offset_mapping", "overflow_to_sample_mapping")]
        for j, sample in enumerate(made["overflow_to_sample_mapping"]):
            inside = np.array([part == 1 for part in made.sequence_ids(j)])
            offsets = np.where(inside[:, None], np.array(made["offset_mapping"][j]), -1).astype(np.int32)
            found[members[sample]].append(Window({name: made[name][j] for name in names}, offsets))
    return found


def find_span(offsets: np.ndarray[Any, Any], begin: int, end: int) -> tuple[int, int] | None:
    """First and last token of the characters `begin` to `end`; None if they are not wholly in the window."""
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(inside) or offsets[inside[0], 0] > begin or offsets[inside[-1], 1] < end:
        return None
    # Ends and starts of tokens never decrease, but a token may be empty, or hold the space before it.
    first = inside[np.searchsorted(offsets[inside, 1], begin, side="right")]
    last = inside[np.searchsorted(offsets[inside, 0], end, side="left") - 1]
    return (int(first), int(last)) if first <= last else None


def best_span(
    start: np.ndarray[Any, Any], end: np.ndarray[Any, Any], offsets: np.ndarray[Any, Any], n_best: int, longest: int
) -> Span | None:
    """The likeliest span of at most `longest` tokens, of the `n_best` starts and ends in the context; None if none."""
    inside = np.flatnonzero(offsets[:, 0] >= 0)
    starts, ends = (inside[np.argsort(-logits[inside], kind="stable")[:n_best]] for logits in (start, end))
    tokens = ends[None, :] - starts[:, None] + 1
    scores = np.where((tokens >= 1) & (tokens <= longest), start[starts][:, None] + end[ends][None, :], -np.inf)
    if not scores.size or scores.max() == -np.inf:
        return None
    i, j = np.unravel_index(int(scores.argmax()), scores.shape)
    return Span(int(offsets[starts[i], 0]), int(offsets[ends[j], 1]), float(scores[i, j]))
