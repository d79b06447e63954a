"""Text -> windows of tokens, or lines of tokens, by a protocol that two models share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from ..errors import UsageError
from ..text.files import lines_of, pieces_of
from ..text.tokenizer import frame, read_tokens, tokenize

# A token stands for fewer characters than this in any common text: enough of a long file is read, and not all.
CHARACTERS_A_TOKEN = 16


@dataclass(frozen=True)
class Window:
    """What a model sees at once. ids: (tokens,), int64. first: index of the first token that is predicted.

    source: for a model with an encoder, what the encoder reads, (tokens,); None otherwise.
    """

    ids: Tensor
    first: int
    source: Tensor | None = None

    @property
    def scored(self) -> int:
        return self.ids.numel() - self.first


@dataclass(frozen=True)
class Line:
    """A line of text for an encoder. inputs: what its tokenizer yields, each (1, tokens)."""

    inputs: dict[str, Tensor]

    @property
    def ids(self) -> Tensor:
        return self.inputs["input_ids"][0]

    @property
    def scored(self) -> int:
        return self.ids.numel()


@dataclass(frozen=True)
class Cut:
    """Units of a text. before: the special tokens that begin every window. stride: new tokens a window; 0 of lines."""

    units: Sequence[Window | Line]
    before: tuple[int, ...]
    stride: int

    def same(self, other: Cut) -> bool:
        """Whether two tokenizers made the same of the text."""
        return len(self.units) == len(other.units) and all(
            torch.equal(mine.ids, yours.ids) for mine, yours in zip(self.units, other.units, strict=True)
        )


@dataclass(frozen=True)
class _Windows(Sequence[Window]):
    """Windows that are cut when they are asked for. ids: of the text, (tokens,), int32; `step` of them apart."""

    ids: Tensor
    number: int
    before: list[int]
    after: list[int]
    inner: int
    step: int
    seq2seq: bool

    def __len__(self) -> int:
        return self.number

    @overload
    def __getitem__(self, k: int) -> Window: ...
    @overload
    def __getitem__(self, k: slice) -> list[Window]: ...
    def __getitem__(self, k: int | slice) -> Window | list[Window]:
        if isinstance(k, slice):
            return [self[one] for one in range(*k.indices(self.number))]
        k = range(self.number)[k]
        head, tail = (torch.tensor(part, dtype=torch.int64) for part in (self.before, self.after))
        tokens = torch.cat((head, self.ids[k * self.step : k * self.step + self.inner].long()))
        new = len(head) if k == 0 else tokens.numel() - self.step
        source = torch.cat((tokens, tail)) if self.seq2seq else None
        return Window(tokens, new if self.seq2seq else max(1, new), source)


def cut(
    tokenizer: Any, text: str | Path, *, length: int, stride: int | None = None, count: int = 0, seq2seq: bool = False
) -> Cut:
    """The first `count` windows of `length` tokens of `text`, all of them if `count` is 0.

    Of a file no more is read and tokenized than that takes; all of it is tokenized as `tokenize` says.
    If the tokenizer begins a text with special tokens, every window begins with them: they count towards `length`,
    are context, and are never predicted. If it adds none, none is added, and the first token of the text's first
    window is not predicted for want of context. Windows start `stride` tokens of text apart (default: they are
    disjoint); in an overlap only the tokens that no window before has shown are predicted. A model with an encoder
    reads the window there and predicts it again.

    UsageError if the text is shorter than one window, or if the lengths contradict one another.
    """
    before, after = frame(tokenizer)
    inner = length - len(before) - (len(after) if seq2seq else 0)
    if inner < 2:
        raise UsageError(f"--length {length} leaves no room for text. Give at least {length - inner + 2}.")
    step = inner if stride is None else stride
    if not 1 <= step <= inner:
        raise UsageError(f"--stride is 1 to {inner}, the tokens of text in a window of {length}, not {step}.")
    _check_count(count)
    ids = _tokens(tokenizer, text, inner + step * (count - 1) if count else None)
    found = 1 + (ids.numel() - inner) // step if ids.numel() >= inner else 0
    if not found:
        raise UsageError(
            f"The text has {ids.numel()} tokens, fewer than one window of {length}. Give a longer text, or a smaller "
            "--length."
        )
    windows = _Windows(ids, min(count or found, found), before, after, inner, step, seq2seq)
    return Cut(windows, tuple(before), step)


def lines(tokenizer: Any, text: str | Path, *, length: int, count: int = 0) -> Cut:
    """The first `count` lines of `text` that are not blank (0: all), each cut to `length` tokens."""
    _check_count(count)
    special = sum(map(len, frame(tokenizer)))
    if length <= special:
        raise UsageError(f"--length {length} leaves no room for text. Give at least {special + 1}.")
    found = filter(None, map(str.strip, lines_of(pieces_of(text))))
    inputs = [
        dict(tokenizer(line, return_tensors="pt", truncation=True, max_length=length))
        for line in islice(found, count or None)
    ]
    if not inputs:
        raise UsageError("The text has no line that is not blank. Give a file with text.")
    return Cut(tuple(map(Line, inputs)), tuple(frame(tokenizer)[0]), 0)


def _check_count(count: int) -> None:
    if count < 0:
        raise UsageError(f"--windows is a number of windows, or 0 for all, not {count}.")


def _tokens(tokenizer: Any, text: str | Path, enough: int | None) -> Tensor:
    """Tokens of the text, (tokens,), int32; with `enough`, at least so many of its beginning if it has them."""
    pieces = pieces_of(text)
    if enough is None:
        found = tokenize(tokenizer, pieces)
        return torch.frombuffer(found, dtype=torch.int32) if found else torch.empty(0, dtype=torch.int32)
    part, wanted, whole = "", CHARACTERS_A_TOKEN * (enough + CHARACTERS_A_TOKEN), False
    while True:
        while len(part) < wanted and not whole:
            piece = next(pieces, None)
            part, whole = part + (piece or ""), piece is None
        ids = read_tokens(tokenizer, text=part[:wanted], add_special_tokens=False, verbose=False)
        # Where the text was cut through a word its last tokens are wrong, so that a few must be left over.
        if len(ids) >= enough + CHARACTERS_A_TOKEN or (whole and len(part) <= wanted):
            return torch.tensor(ids, dtype=torch.int32)
        wanted *= 2
