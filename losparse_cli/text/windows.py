"""Text -> tokens -> windows, all of one length."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from ..errors import UsageError
from .documents import SELF, Documents, read_documents
from .request import Calibration, settle
from .tokenizer import check_tokens, frame, load_tokenizer, read_tokens

__all__ = ["Calibration", "Sample", "Windows", "pack", "pack_pairs", "read_windows", "settle"]

LONG = 4 << 20  # characters of a text, the only one, of which only pieces are tokenized
LONG_ROW = 64  # the same of one document among others, for each token of a window: about sixteen windows
PIECE = 8  # characters of such a piece for each token of a window: about two windows
GAP = "\n\n"  # between two documents
SEQUENCE = 16  # tokens; two texts of people hardly ever share a sequence as long, of characters neither


class Sample(Protocol):
    """What a model is calibrated with, unit by unit: windows of text, or rows of images and text (`inputs.Inputs`).

    name: of the units, in the plural. length: tokens of a unit, at most. seen: tokens of what the model reads first.
    tokens: all of them. nbytes: in memory.
    """

    @property
    def name(self) -> str: ...
    @property
    def length(self) -> int: ...
    @property
    def seen(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

    def __len__(self) -> int:
        """Units."""

    def digest(self) -> str:
        """SHA-256 of all that the model is given."""

    def take(self, numbers: Sequence[int]) -> Self:
        """The units of these numbers, in this order; there may be none."""

    def together(self, size: int) -> list[range]:
        """Numbers of the units of each of `batches`."""

    def batches(self, size: int, device: torch.device | None = None) -> list[dict[str, Tensor]]:
        """Keyword arguments for the model, up to `size` units at a time, on `device` (None: where they are)."""

    def said(self, size: int) -> list[Tensor | None]:
        """Of each of `batches`, which tokens are text: (units, tokens); None where all are, or none is a token."""

    def kinds(self) -> list[tuple[dict[str, Tensor], float, float]]:
        """A unit of each kind that goes another way through the model, beside which text alone is nothing new; and for
        each token of all, how many of its length those of its kind would be, and how many they are."""

    def pieces(self) -> Tensor:
        """A number for each of the pieces by which it is judged whether something was there before."""


@dataclass(frozen=True)
class Windows:
    """Token windows of equal length. ids: (windows, length), int64.

    target_ids: for encoder-decoder models what the decoder reads, (windows, target length), or None.
    """

    ids: Tensor
    target_ids: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.ids.shape[1]

    @property
    def predicted(self) -> int:
        """Tokens of a window that a language model predicts."""
        return (self.ids if self.target_ids is None else self.target_ids).shape[1]

    @property
    def tokens(self) -> int:
        """All of them, those that a decoder reads too."""
        return self.ids.numel() + (0 if self.target_ids is None else self.target_ids.numel())

    @property
    def seen(self) -> int:
        """Those that an encoder, or a model without one, reads."""
        return self.ids.numel()

    @property
    def nbytes(self) -> int:
        """In memory."""
        return 8 * self.tokens

    @property
    def name(self) -> str:
        """Of the units."""
        return "windows"

    def __len__(self) -> int:
        return len(self.ids)

    def digest(self) -> str:
        """SHA-256 of the tokens."""
        parts = [self.ids] if self.target_ids is None else [self.ids, self.target_ids]
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()

    def take(self, numbers: Sequence[int]) -> Windows:
        """Those of these numbers, in this order; there may be none."""
        targets = self.target_ids
        chosen = torch.tensor(numbers, dtype=torch.long)
        return Windows(self.ids[chosen], None if targets is None else targets[chosen])

    def together(self, size: int) -> list[range]:
        """So many windows in a row."""
        return [range(start, min(start + size, len(self))) for start in range(0, len(self), size)]

    def batches(self, size: int, device: torch.device | None = None) -> list[dict[str, Tensor]]:
        """Keyword arguments for the model, `size` windows at a time, on `device` (None: where they are)."""
        return [{name: ids.to(device) for name, ids in batch.items()} for batch in self._batches(size)]

    def said(self, size: int) -> list[Tensor | None]:
        """All tokens are text."""
        return [None] * -(-len(self) // size)

    def kinds(self) -> list[tuple[dict[str, Tensor], float, float]]:
        """None but text alone."""
        return []

    def pieces(self) -> Tensor:
        """A number for each sequence of 16 tokens within a window, none in shorter ones; equal ones have the same."""
        if self.length < SEQUENCE:
            return self.ids.new_zeros(0)
        weights = torch.randint(1 << 62, (SEQUENCE,), generator=torch.Generator().manual_seed(0)) | 1
        return (self.ids.unfold(1, SEQUENCE, 1) * weights).sum(-1).flatten()  # modulo 2**64

    def _batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        for numbers in self.together(size):
            part = slice(numbers.start, numbers.stop)
            batch = {"input_ids": self.ids[part]}
            if self.target_ids is not None:
                batch["decoder_input_ids"] = self.target_ids[part]
            yield batch


# --- the windows ------------------------------------------------------------------------------------


def read_windows(
    calibration: Calibration, model: Any, folder: Path, seed: int, *, trust_remote_code: bool = False
) -> Windows | None:
    """The windows of a settled `calibration`, cut by the tokenizer in `folder`; None if they are yet to be generated.

    `model` needs no weights. UsageError if there is not enough text, SourceError if text or tokenizer cannot be read.
    """
    assert calibration.length is not None
    if calibration.source == SELF:
        return None
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    documents = read_documents(
        calibration.source,
        field=calibration.field or "text",
        target_field=calibration.target_field,
        split=calibration.split or "train",
        seed=seed,
    )
    seq2seq = bool(model.config.is_encoder_decoder)
    close = seq2seq or not model.can_generate()
    cut: dict[str, Any] = {"length": calibration.length, "tokens": calibration.tokens, "seed": seed}
    if documents.targets is None:
        ids = pack(tokenizer, list(_pieces(documents.texts, calibration.length)), **cut, close=close)
        windows = Windows(ids, _shifted(ids, _decoder_start(model)) if seq2seq else None)
    else:
        ids, target_ids = pack_pairs(tokenizer, documents, **cut)
        windows = Windows(ids, _shifted(target_ids, _decoder_start(model)))
    largest = max(int(ids.max()) for ids in (windows.ids, windows.target_ids) if ids is not None)
    check_tokens(largest, model, folder)
    return windows


def pack(tokenizer: Any, documents: list[str], *, length: int, tokens: int, seed: int, close: bool) -> Tensor:
    """Windows of `length` tokens, about `tokens` in all: (windows, length), drawn without repetition by `seed`.

    One document is cut into disjoint windows, of which some are drawn. Of several, as many as are needed are taken in
    an order drawn by `seed`, joined by blank lines, and then cut. Every window begins with the tokenizer's own first
    tokens, and, with `close`, ends with its last ones, as an encoder is used to. UsageError if there is not enough
    text for one.
    """
    before, after = frame(tokenizer)
    after = after if close else []
    inner = length - len(before) - len(after)
    wanted = max(1, round(tokens / length))
    order = _order(len(documents), seed)
    stream, _ = _join(tokenizer, [documents[k] for k in order], enough=wanted * inner)
    available = _available(stream, inner, length)
    if len(documents) > 1:
        available = min(available, wanted)  # the last one, which may be long, gets no more than its turn
    wanted = min(available, wanted)
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values
    rows = torch.tensor(stream[: available * inner]).view(available, inner)[chosen]
    return _framed(before, rows, after)


def pack_pairs(tokenizer: Any, documents: Documents, *, length: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Windows of the texts, and for each one of the targets: (windows, length), (windows, target length).

    Texts are packed as in `pack`, targets in the same order, and a window of targets begins at the place in its
    document where the window of text begins in its own. All have the mean length of what there is, `length` at most.
    """
    assert documents.targets is not None
    before, after = frame(tokenizer)
    inner = length - len(before) - len(after)
    order = _order(len(documents.texts), seed)
    wanted = max(1, round(tokens / length))
    stream, starts = _join(tokenizer, [documents.texts[k] for k in order], enough=wanted * inner)
    count = min(_available(stream, inner, length), wanted)
    used = [documents.targets[k] for k in order[: len(starts) - 1]]
    targets, places = _join(tokenizer, used, target=True)
    short = min(inner, len(targets) // count)
    if short < 1:
        raise UsageError(
            f"The targets have {len(targets)} tokens for {count} windows of text. Name another field with "
            "--calibration-target-field, or leave it out."
        )
    rows = []
    for window in range(count):
        k = bisect_right(starts, window * inner) - 1
        share = (window * inner - starts[k]) / (starts[k + 1] - starts[k])
        begin = min(places[k] + int(share * (places[k + 1] - places[k])), len(targets) - short)
        rows.append(targets[begin : begin + short])
    ids = torch.tensor(stream[: count * inner]).view(count, inner)
    return _framed(before, ids, after), _framed(before, torch.tensor(rows), after)


def _order(count: int, seed: int) -> list[int]:
    found: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return found


def _join(
    tokenizer: Any, documents: list[str], *, enough: int | None = None, target: bool = False
) -> tuple[list[int], list[int]]:
    """Tokens of the documents, one after another until there are `enough`; and where each begins, and the last ends."""
    stream: list[int] = []
    starts = [0]
    for number, document in enumerate(documents):
        text = document if number == len(documents) - 1 else document + GAP
        given = {"text_target": text} if target else {"text": text}
        stream += read_tokens(tokenizer, **given, add_special_tokens=False, verbose=False)
        starts.append(len(stream))
        if enough is not None and len(stream) >= enough:
            break
    return stream, starts


def _available(stream: list[int], inner: int, length: int) -> int:
    available = len(stream) // inner if inner > 0 else 0
    if not available:
        raise UsageError(
            f"The calibration text has {len(stream)} tokens, fewer than one window of {length}. Give more text, or "
            "lower --calibration-length."
        )
    return available


def _framed(before: list[int], rows: Tensor, after: list[int]) -> Tensor:
    first, last = (torch.tensor(part).expand(len(rows), len(part)).long() for part in (before, after))
    return torch.cat((first, rows, last), dim=1)


def _pieces(documents: list[str], length: int) -> Iterator[str]:
    """The documents; in place of a long one pieces of it, cut at the end of a line or a word if there is one.

    So windows come from all of a text that would take minutes to tokenize as a whole, and from more than one book.
    """
    limit, size = LONG if len(documents) == 1 else LONG_ROW * length, PIECE * length
    for text in documents:
        if len(text) <= limit:
            yield text
            continue
        begin = 0
        while begin < len(text):
            end = begin + size
            if end < len(text):
                half = begin + size // 2
                end = 1 + max(text.rfind("\n", half, end), text.rfind(" ", half, end)) or end
            piece = text[begin:end].strip()
            if piece:
                yield piece
            begin = end


def _shifted(ids: Tensor, start: int) -> Tensor:
    """What a decoder reads that is to say `ids`."""
    return torch.cat((torch.full_like(ids[:, :1], start), ids[:, :-1]), dim=1)


def _decoder_start(model: Any) -> int:
    for settings in (model.config, getattr(model, "generation_config", None)):
        for name in ("decoder_start_token_id", "bos_token_id"):
            found = getattr(settings, name, None)
            if isinstance(found, int):
                return found
    raise UsageError(
        f"config.json of {type(model).__name__} names no token that its decoder begins with. Add "
        "decoder_start_token_id, or compress without --calibration."
    )
