"""Texts -> texts, by a model with an encoder and a decoder: summaries and whatever else is written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..errors import UsageError
from ..text.tokenizer import positions
from . import metrics
from .columns import columns_of, texts
from .paired import RESAMPLES, over_rows
from .request import TaskRequest
from .rows import Rows
from .task import Collate, Features, Judged, Task
from .tokens import IGNORED, check_items, chunks, length_of, pad, settle_padding

LENGTH = 1024  # tokens of a text, if nothing else is asked for and the model takes as many


class Seq2Seq(Task):
    """summarization and seq2seq. Scores: rougeL (the main one), rouge1, rouge2, rougeLsum; of seq2seq exact_match too.

    exact_match: the share of texts that are the same, but for white space at either end.
    """

    main_score = "rougeL"
    scored_by = "rouge_score"

    def __init__(self, request: TaskRequest) -> None:
        super().__init__(request)
        self.name = request.task

    @property
    def auto_class(self) -> Any:
        import transformers

        return transformers.AutoModelForSeq2SeqLM

    def check(self, rows: Rows, config: Any) -> None:
        """UsageError for a model that is no encoder-decoder, and for a row with nothing to write."""
        if not config.is_encoder_decoder:
            raise UsageError(
                f"A {config.model_type} model has no decoder beside an encoder. Give another, or --task causal-lm."
            )
        for k, target in enumerate(self.targets(rows)):
            if not target.strip():
                raise UsageError(
                    f"{rows.place(k)} has no text to write. Leave it out, or choose with --summary-column."
                )

    def targets(self, rows: Rows) -> list[str]:
        """What is to be written for every row."""
        return self._texts(rows, "summary_column")

    def prepare(self, rows: Rows, tokenizer: Any, model: Any, *, training: bool) -> Features:
        self.check(rows, model.config)
        settle_padding(tokenizer, model.config)
        length = length_of(self.request.max_length, tokenizer, model, LENGTH)
        written = min(self.request.max_target_length, positions(model, decoder=True) or self.request.max_target_length)
        sources = [self.request.source_prefix + text for text in self._texts(rows, "text_column")]
        targets = self.targets(rows)
        items: list[dict[str, Any]] = []
        for part in chunks(range(len(rows))):
            cut = slice(part[0], part[-1] + 1)
            options = {"truncation": True, "verbose": False}
            made = tokenizer(sources[cut], max_length=length, return_attention_mask=True, **options)
            labels = tokenizer(text_target=targets[cut], max_length=written, **options)
            items += (
                {name: made[name][k] for name in made} | {"labels": label}
                for k, label in enumerate(labels["input_ids"])
            )
        for k, item in enumerate(items):
            if not item["input_ids"]:
                raise UsageError(f"{rows.place(k)} has no text. Leave the row out.")
        check_items(items, model)
        check_items(items, model, "labels")
        return Features(items, rows, list(range(len(items))))

    def collator(self, tokenizer: Any, model: Any) -> Collate:
        settle_padding(tokenizer, model.config)
        # For a trainer that smooths labels, and so keeps them from the model.
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)

        def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
            written = [torch.tensor(item["labels"]) for item in items]
            labels = pad_sequence(written, batch_first=True, padding_value=IGNORED)
            decoder = {} if shift is None else {"decoder_input_ids": shift(labels=labels)}
            return {**pad(tokenizer, model, items), "labels": labels, **decoder}

        return collate

    def say(self, model: Any, tokenizer: Any, batch: dict[str, Tensor]) -> Iterable[Any]:
        """What the model writes for each row."""
        limit = positions(model, decoder=True)
        # The token that a decoder begins with takes a place, too.
        tokens = min(self.request.max_target_length, self.request.max_target_length if limit is None else limit - 1)
        read = {name: tensor for name, tensor in batch.items() if name != "decoder_input_ids"}
        ids = model.generate(
            **read, num_beams=self.request.num_beams, do_sample=False, max_new_tokens=tokens, max_length=None
        )
        written: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
        return written

    def judge(self, predicted: list[str], features: Features, *, resamples: int = RESAMPLES) -> Judged:
        targets = self.targets(features.rows)
        values = metrics.rouge(predicted, targets)
        if self.name == "seq2seq":
            same = [text.strip() == target.strip() for text, target in zip(predicted, targets, strict=True)]
            values["exact_match"] = torch.tensor(same)
        return Judged({name: over_rows(each) for name, each in values.items()}, "rows", len(targets))

    def _texts(self, rows: Rows, field: str) -> list[str]:
        column = columns_of(self.request, rows.columns, rows.name)[field]
        return list(texts(rows.rows, column, field, rows.place))
