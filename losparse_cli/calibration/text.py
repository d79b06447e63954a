"""Text in a file -> windows of tokens, all of one length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError


@dataclass(frozen=True)
class Calibration:
    """What text was asked for. source: a file. tokens: about how many to use. length: tokens of a window."""

    source: str
    tokens: int = 32768
    length: int = 512
    batch: int = 8


@dataclass(frozen=True)
class Windows:
    """Token windows of equal length. ids: (windows, length), int64. target_ids: for encoder-decoder models, or None."""

    ids: Tensor
    target_ids: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.ids.numel() + (0 if self.target_ids is None else self.target_ids.numel())

    def digest(self) -> str:
        """SHA-256 of the tokens."""
        parts = [self.ids] if self.target_ids is None else [self.ids, self.target_ids]
        return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()

    def batches(self, size: int) -> list[dict[str, Tensor]]:
        """Keyword arguments for the model, `size` windows at a time."""
        return list(self._batches(size))

    def _batches(self, size: int) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self.ids), size):
            batch = {"input_ids": self.ids[start : start + size]}
            if self.target_ids is not None:
                batch["decoder_input_ids"] = self.target_ids[start : start + size]
            yield batch


def read_windows(calibration: Calibration, model: Any, folder: Path, seed: int) -> Windows:
    """The windows that `calibration` asks for, cut by the tokenizer in `folder`; `model` needs no weights."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    documents = [Path(calibration.source).read_text(encoding="utf-8")]
    seq2seq = model.config.is_encoder_decoder
    close = seq2seq or not model.can_generate()
    ids = pack(tokenizer, documents, length=calibration.length, tokens=calibration.tokens, seed=seed, close=close)
    if not seq2seq:
        return Windows(ids)
    start = model.config.decoder_start_token_id
    return Windows(ids, torch.cat((torch.full_like(ids[:, :1], start), ids[:, :-1]), dim=1))


def frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens with which the tokenizer begins and ends a text."""
    plain, framed = (
        tokenizer("a", return_tensors="pt", add_special_tokens=special).input_ids[0].tolist()
        for special in (False, True)
    )
    for start in range(len(framed) - len(plain) + 1):
        if framed[start : start + len(plain)] == plain:
            return framed[:start], framed[start + len(plain) :]
    return [], []


def pack(tokenizer: Any, documents: list[str], *, length: int, tokens: int, seed: int, close: bool) -> Tensor:
    """Windows of `length` tokens, about `tokens` in all: (windows, length), drawn without repetition by `seed`.

    The documents are joined and cut into disjoint windows. Every window begins with the tokenizer's own first
    tokens, and, with `close`, ends with its last ones, as an encoder is used to. UsageError if there is not enough
    text for one.
    """
    before, after = frame(tokenizer)
    after = after if close else []
    inner = length - len(before) - len(after)
    stream: list[int] = []
    for document in documents:
        stream += tokenizer(document, add_special_tokens=False, verbose=False).input_ids
    available = len(stream) // inner if inner > 0 else 0
    if not available:
        raise UsageError(
            f"The calibration text has {len(stream)} tokens, fewer than one window of {length}. Give more text, or "
            "lower --calibration-length."
        )
    wanted = min(available, max(1, round(tokens / length)))
    chosen = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values
    rows = torch.tensor(stream[: available * inner]).view(available, inner)[chosen]
    framed = [torch.tensor(part).expand(wanted, len(part)) for part in (before, after)]
    return torch.cat((framed[0].long(), rows, framed[1].long()), dim=1)
