"""What all tasks have in common: how batches pass through a model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from losparse_cli.tasks.kinds import open_task
from tests.tasks.made import CPU, Says, bare, encoder_tokenizer, request_of, rows_of


def test_scoring_leaves_modes_as_they_were_and_tells_how_far_it_is() -> None:
    lengths = []

    def say(ids: Any, mask: Any) -> Any:
        lengths.append(mask.sum(1).tolist())
        return SimpleNamespace(logits=torch.stack((ids.sum(1), mask.sum(1)), 1).float())

    task: Any = open_task(request_of("text-classification"))
    model, tokenizer = Says(say).train(), encoder_tokenizer()
    model.inner.eval()  # frozen in the midst of training
    rows = rows_of(*({"text": "ab" * k, "label": k % 2} for k in (3, 1, 4, 2, 5)))
    features = task.prepare(rows, tokenizer, model, training=False)
    told: list[tuple[int, int]] = []
    task.score(model, tokenizer, features, batch_size=2, device=CPU, on_batch=lambda *step: told.append(step))
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert lengths == [[12, 10], [8, 6], [4]]  # the longest first, so that memory runs out at once or never
    assert model.training
    assert not model.inner.training
    with pytest.raises(RuntimeError, match="broken"):
        task.predict(Says(_fail).train(), tokenizer, features, batch_size=2, device=CPU)
    assert not torch.is_inference_mode_enabled()


def _fail(*_: Any) -> Any:
    raise RuntimeError("broken")


def test_the_callers_autocast_is_honoured() -> None:
    seen = []

    def say(ids: Any, mask: Any) -> Any:
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        seen.append(product.dtype)
        return SimpleNamespace(logits=product[:1].expand(len(ids), 2))

    task: Any = open_task(request_of("text-classification"))
    model, tokenizer = Says(say), encoder_tokenizer()
    features = task.prepare(rows_of({"text": "a", "label": 1}), tokenizer, model, training=False)
    with torch.autocast("cpu", torch.bfloat16):
        logits = task.predict(model, tokenizer, features, batch_size=1, device=CPU)
    assert (seen, logits.dtype) == ([torch.bfloat16], torch.float32)


def test_features_serve_as_a_dataset() -> None:
    task = open_task(request_of("text-classification"))
    rows = rows_of({"text": "a", "label": 1}, {"text": "bc", "label": 0})
    config = transformers.BertConfig(vocab_size=101)
    features = task.prepare(rows, encoder_tokenizer(), bare(config), training=True)
    loader = torch.utils.data.DataLoader(features, batch_size=2, collate_fn=lambda items: items)
    assert [item["labels"] for batch in loader for item in batch] == [1, 0]
    assert set(features[0]) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert (len(features), features.where) == (2, [0, 1])
