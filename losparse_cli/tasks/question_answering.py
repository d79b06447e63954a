"""Questions about contexts -> answers that stand in them, as in SQuAD."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from . import metrics
from .columns import columns_of, texts
from .paired import RESAMPLES, over_rows
from .rows import Rows
from .spans import Window, best_span, cut_windows, find_span
from .task import Collate, Features, Judged, Task
from .tokens import LABELS, check_items, chunks, length_of, pad, settle_padding

LENGTH = 384  # tokens of a question and a part of its context, as is usual for SQuAD


class QuestionAnswering(Task):
    """The question comes first, then its context, in as many windows as it takes; the best span of all is the answer.

    Answers are {"text": [...], "answer_start": [...]} or a list of {"text", "answer_start"}, answer_start in
    characters of the context. Where some row has none (SQuAD 2), the model may answer nothing: it does if the first
    token is likelier than any span. Scores: f1 (the main one), exact_match.
    """

    name = "question-answering"
    main_score = "f1"

    @property
    def auto_class(self) -> Any:
        import transformers

        return transformers.AutoModelForQuestionAnswering

    def check(self, rows: Rows, config: Any) -> None:
        self.answers(rows)

    def answers(self, rows: Rows) -> list[list[tuple[str, int]]]:
        """(text, first character) of every right answer of every row; UsageError, naming the row, for another form."""
        column = self._columns(rows)["answers_column"]
        found = []
        for k, row in enumerate(rows.rows):
            pairs = _pairs(row[column])
            if pairs is None:
                raise UsageError(
                    f'{rows.place(k)} has no answers in {column!r} as SQuAD has them. Give {{"text": [...], '
                    '"answer_start": [...]}, or name another column with --answers-column.'
                )
            found.append(pairs)
        return found

    def prepare(self, rows: Rows, tokenizer: Any, model: Any, *, training: bool) -> Features:
        if not tokenizer.is_fast:
            raise UsageError(
                f"{type(tokenizer).__name__} does not say where in a text its tokens lie, and question-answering needs "
                "that. Give a model with a fast tokenizer (tokenizer.json)."
            )
        answers = self.answers(rows)
        settle_padding(tokenizer, model.config)
        length = length_of(self.request.max_length, tokenizer, model, LENGTH)
        columns = self._columns(rows)
        questions, contexts = (
            list(texts(rows.rows, columns[field], field, rows.place)) for field in ("question_column", "context_column")
        )
        items: list[dict[str, Any]] = []
        where: list[int] = []
        offsets: list[np.ndarray[Any, Any]] = []
        for part in chunks(range(len(rows))):
            cut = slice(part[0], part[-1] + 1)
            windows = cut_windows(tokenizer, questions[cut], contexts[cut], length, self.request.doc_stride)
            for k, own in zip(part, windows, strict=True):
                for window in own:
                    items.append(window.inputs)
                    where.append(k)
                    if training:
                        label = _label(window, answers[k], contexts[k], rows, k, tokenizer)
                        window.inputs.update(zip(LABELS[1:], label, strict=True))
                    else:
                        offsets.append(window.offsets)
        check_items(items, model)
        return Features(items, rows, where, tuple(offsets))

    def collator(self, tokenizer: Any, model: Any) -> Collate:
        settle_padding(tokenizer, model.config)

        def collate(items: list[dict[str, Any]]) -> dict[str, Tensor]:
            labels = {name: torch.tensor([item[name] for item in items]) for name in LABELS if name in items[0]}
            return {**pad(tokenizer, model, items), **labels}

        return collate

    def say(self, model: Any, tokenizer: Any, batch: dict[str, Tensor]) -> Iterable[Any]:
        """(start, end) logits of each item, each (tokens,), float32, without padding."""
        output, lengths = model(**batch), batch["attention_mask"].sum(1).tolist()
        starts, ends = output.start_logits.float().cpu().numpy(), output.end_logits.float().cpu().numpy()
        for start, end, length in zip(starts, ends, lengths, strict=True):
            yield start[:length], end[:length]

    def gather(self, said: list[Any], tokenizer: Any, features: Features) -> list[str]:
        """The answer to every row; of features that were not prepared for training."""
        may_be_none = not all(self.answers(features.rows))
        contexts = [row[self._columns(features.rows)["context_column"]] or "" for row in features.rows.rows]
        best = [("", -np.inf)] * len(features.rows)
        none = [np.inf] * len(features.rows)
        for item, row, offsets, (start, end) in zip(
            features.items, features.where, features.offsets, said, strict=True
        ):
            first = null_position(item["input_ids"], tokenizer)
            none[row] = min(none[row], float(start[first] + end[first]))
            span = best_span(start, end, offsets, self.request.n_best, self.request.max_answer_length)
            if span is not None and span.score > best[row][1]:
                best[row] = contexts[row][span.begin : span.end].strip(), span.score
        return [
            "" if may_be_none and null > score else text for (text, score), null in zip(best, none, strict=True)
        ]  # fmt: skip

    def judge(self, predicted: list[str], features: Features, *, resamples: int = RESAMPLES) -> Judged:
        answers = [[text for text, _ in pairs] for pairs in self.answers(features.rows)]
        scores = {name: over_rows(values) for name, values in metrics.squad(predicted, answers).items()}
        return Judged(scores, "rows", len(answers))

    def _columns(self, rows: Rows) -> dict[str, str]:
        return columns_of(self.request, rows.columns, rows.name)


def null_position(ids: list[int], tokenizer: Any) -> int:
    """Where a model says that there is no answer: at the class token, else the start token, else the first."""
    for token in (tokenizer.cls_token_id, tokenizer.bos_token_id):
        if token is not None and token in ids:
            return ids.index(token)
    return 0


def _pairs(value: Any) -> list[tuple[str, int]] | None:
    if isinstance(value, list) and all(isinstance(answer, dict) for answer in value):
        value = {key: [answer.get(key) for answer in value] for key in ("text", "answer_start")}
    if not isinstance(value, dict):
        return None
    found, starts = value.get("text"), value.get("answer_start")
    if not isinstance(found, list) or not isinstance(starts, list) or len(found) != len(starts):
        return None
    if not all(isinstance(text, str) for text in found) or not all(type(start) is int for start in starts):
        return None
    return list(zip(found, starts, strict=True))


def _label(
    window: Window, pairs: list[tuple[str, int]], context: str, rows: Rows, k: int, tokenizer: Any
) -> tuple[int, int]:
    """First and last token of the first answer, or of none where it lies outside the window."""
    first = null_position(window.inputs["input_ids"], tokenizer)
    if not pairs:
        return first, first
    text, begin = pairs[0]
    if not text or begin < 0 or context[begin : begin + len(text)] != text:
        raise UsageError(
            f"{rows.place(k)} has the answer {text[:40]!r}, which does not stand at character {begin} of its context. "
            "Correct answer_start, or leave the row out."
        )
    return find_span(window.offsets, begin, begin + len(text)) or (first, first)
