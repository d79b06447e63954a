"""Documents -> windows of tokens, of which each is predicted from those before it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UsageError
from ..text.files import pieces_of
from ..text.tokenizer import PIECE, check_tokens, frame, tokenize
from .columns import columns_of, texts
from .heads import refusals
from .paired import RESAMPLES, exponential_of_mean, over_rows
from .rows import Rows
from .task import Collate, Features, Judged, Task, scoring
from .tokens import chunks, length_of

LENGTH = 1024  # tokens of a window, if nothing else is asked for and the model takes as many


class CausalLM(Task):
    """Documents, each with the special tokens that its tokenizer adds, one after another and cut into windows.

    As in transformers' run_clm.py: windows have one length, they do not overlap, and what is left at the end is
    dropped. Scores: perplexity (the main one, smaller is better), loss in nats a token.
    """

    name = "causal-lm"
    main_score = "perplexity"
    larger_is_better = False
    scored_by = None

    @property
    def auto_class(self) -> Any:
        import transformers

        return transformers.AutoModelForCausalLM

    def check(self, rows: Rows, config: Any) -> None:
        """UsageError for a model with an encoder."""
        if config.is_encoder_decoder:
            raise UsageError(f"A {config.model_type} model has an encoder. Give another, or --task seq2seq.")

    def check_model(self, model: Any) -> None:
        """UsageError for a model that sees the tokens that it is to predict, such as BERT as it was trained."""
        known = int(model.config.get_text_config().vocab_size)
        ids = torch.arange(8, device=model.device)[None] % known
        other = ids.clone()
        other[0, -1] = (ids[0, -1] + 1) % known
        with scoring(model), refusals(model):
            before, after = (model(input_ids=x, use_cache=False).logits[0, :-1].float() for x in (ids, other))
        if not torch.allclose(before, after, rtol=1e-3, atol=1e-4 * float(before.abs().max())):
            raise UsageError(
                f"The {model.config.model_type} model sees the text that it is to predict: what it says of a token "
                "changes with those after it. Give a language model that reads from left to right."
            )

    def prepare(self, rows: Rows, tokenizer: Any, model: Any, *, training: bool) -> Features:
        """Items: windows; the row of one is that in which it begins."""
        self.check(rows, model.config)
        length = length_of(self.request.max_length, tokenizer, model, LENGTH)
        column = columns_of(self.request, rows.columns, rows.name)["text_column"]
        streams: list[np.ndarray[Any, Any]] = []
        for part in chunks(list(texts(rows.rows, column, "text_column", rows.place))):
            streams += (_tokens(text, tokenizer) for text in part)
        ends = np.cumsum([len(ids) for ids in streams])
        count = int(ends[-1]) // length
        if not count:
            raise UsageError(
                f"{rows.name} has {ends[-1]} tokens, fewer than one window of {length}. Give more text, or lower "
                "--max-length."
            )
        windows = torch.from_numpy(np.concatenate(streams)[: count * length]).view(count, length)
        items = [{"input_ids": window, "labels": window} for window in windows]
        check_tokens(int(windows.max()), model)
        return Features(items, rows, np.searchsorted(ends, np.arange(count) * length, side="right").tolist())

    def collator(self, tokenizer: Any, model: Any) -> Collate:
        def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
            ids = torch.stack([item["input_ids"] for item in items])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}

        return collate

    def say(self, model: Any, tokenizer: Any, batch: dict[str, Tensor]) -> Iterable[Any]:
        """The mean loss of each window in nats a token, float64, on the CPU."""
        logits = model(**batch, use_cache=False).logits
        # A window at a time: in float32 the logits of a large vocabulary are larger than the model's.
        for ids, rows in zip(batch["input_ids"], logits, strict=True):
            yield functional.cross_entropy(rows[:-1].float(), ids[1:], reduction="none").double().mean().cpu()

    def gather(self, said: list[Any], tokenizer: Any, features: Features) -> Tensor:
        """(windows,)"""
        return torch.stack(said)

    def judge(self, predicted: Tensor, features: Features, *, resamples: int = RESAMPLES) -> Judged:
        scores = {"perplexity": exponential_of_mean(predicted), "loss": over_rows(predicted)}
        return Judged(scores, "windows", len(predicted), torch.stack([item["input_ids"] for item in features.items]))


def _tokens(text: str, tokenizer: Any) -> np.ndarray[Any, Any]:
    """The tokens of a document, (tokens,), int64, with the special ones at its ends."""
    if len(text) <= PIECE:
        return np.array(tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"], dtype=np.int64)
    start, end = frame(tokenizer)
    return np.concatenate([start, tokenize(tokenizer, pieces_of(text)), end]).astype(np.int64)
