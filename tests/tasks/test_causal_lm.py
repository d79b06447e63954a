"""Documents in windows, and the loss per token."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import LENGTH, VOCABULARY, character_tokenizer, toy_model

from losparse_cli.errors import UsageError
from losparse_cli.tasks import causal_lm
from losparse_cli.tasks.kinds import open_task
from tests.finetuning.learners import words_tokenizer
from tests.tasks.made import CPU, Says, bare, request_of, rows_of

TEXTS = ["abcdefghijklm", "", "nop", "qrstuvwxyz" * 3]


def task_of(**options: Any) -> Any:
    return open_task(request_of("causal-lm", **options))


def features_of(task: Any, model: Any, training: bool = False) -> Any:
    rows = rows_of(*({"text": text} for text in TEXTS))
    return task.prepare(rows, character_tokenizer(), model, training=training)


def test_documents_are_packed_and_the_tail_is_dropped() -> None:
    features = features_of(task_of(max_length=10), toy_model("llama"))
    tokenizer = character_tokenizer()
    stream = "".join(f"<s>{text}" for text in TEXTS)
    found = "".join(tokenizer.decode(item["input_ids"]) for item in features.items)
    assert stream.startswith(found)
    assert len(features) == 5  # of 14 + 1 + 4 + 31 tokens
    assert [len(item["input_ids"]) for item in features.items] == [10] * 5
    assert features.where == [0, 0, 3, 3, 3]  # the third begins with the last document's second token
    assert tokenizer.decode(features[2]["input_ids"][:1]) == "q"


@pytest.mark.parametrize("frame", ["<s> $A", "$A </s>", "$A", "<s> $A </s>"])
def test_a_long_document_is_read_in_pieces(frame: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens are those of the whole, with the special ones at its ends alone."""
    words, tokenizer = words_tokenizer(frame), None
    texts = ["w1 w2\nw3\n\nw4 w5 w6\nkey w7\n", "w8 w9\n", "w1 " * 30]
    rows = rows_of(*({"text": text} for text in texts))
    config = toy_model("llama").config
    whole = task_of(max_length=8).prepare(rows, words, bare(config), training=True)
    calls: list[int] = []

    class Watching(type(words)):  # type: ignore[misc]
        def __call__(self, text: str, **options: Any) -> Any:
            calls.append(len(text))
            return super().__call__(text, **options)

    tokenizer = Watching(tokenizer_object=words.backend_tokenizer)
    monkeypatch.setattr(causal_lm, "PIECE", 12)
    monkeypatch.setattr("losparse_cli.text.tokenizer.PIECE", 12)
    cut = task_of(max_length=8).prepare(rows, tokenizer, bare(config), training=True)
    assert [item["input_ids"].tolist() for item in cut.items] == [item["input_ids"].tolist() for item in whole.items]
    assert cut.where == whole.where
    assert max(calls) <= 12


@pytest.mark.parametrize(("name", "reads_on"), [("llama", False), ("gpt2", False), ("bert", True)])
def test_a_model_that_sees_what_it_is_to_predict_is_refused(name: str, reads_on: bool) -> None:
    model = toy_model(name)
    if reads_on:
        model = transformers.BertLMHeadModel(model.config)
        with pytest.raises(UsageError, match="The bert model sees the text that it is to predict"):
            task_of().check_model(model)
        model = transformers.BertLMHeadModel(transformers.BertConfig(**model.config.to_dict() | {"is_decoder": True}))
    task_of().check_model(model)


def test_a_window_that_begins_with_a_document_is_of_that_row() -> None:
    rows = rows_of(*({"text": "abcdefghi"} for _ in range(3)))
    features = task_of(max_length=10).prepare(rows, character_tokenizer(), toy_model("llama"), training=True)
    assert features.where == [0, 1, 2]


def test_a_window_is_as_long_as_the_model_takes_at_most() -> None:
    model = toy_model("llama")
    features = features_of(task_of(), model)
    assert [len(item["input_ids"]) for item in features.items] == [LENGTH]
    with pytest.raises(UsageError) as raised:
        features_of(task_of(max_length=LENGTH + 1), model)
    assert str(raised.value) == (
        "A llama model of 48 tokens at most cannot read --max-length 49. Give 48 or less, or leave it out."
    )


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    model = Says(lambda ids, mask: SimpleNamespace(logits=torch.zeros(*ids.shape, VOCABULARY)))
    task = task_of(max_length=10)
    found = task.score(model, character_tokenizer(), features_of(task, model), batch_size=2, device=CPU)
    assert found == pytest.approx({"loss": math.log(VOCABULARY), "perplexity": VOCABULARY})


def test_a_hopeless_model_has_an_infinite_one() -> None:
    def say(ids: Any, mask: Any) -> Any:
        return SimpleNamespace(logits=torch.nn.functional.one_hot(torch.zeros_like(ids), VOCABULARY) * 1e4)

    model, task = Says(say), task_of(max_length=10)
    found = task.score(model, character_tokenizer(), features_of(task, model), batch_size=2, device=CPU)
    assert found == {"loss": 1e4, "perplexity": math.inf}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_loss_is_the_models_own(name: str) -> None:
    model, tokenizer, task = toy_model(name), character_tokenizer(), task_of(max_length=10)
    features = features_of(task, model, training=True)
    batch = task.collator(tokenizer, model)(features.items)
    assert {n: tuple(t.shape) for n, t in batch.items()} == {
        "input_ids": (5, 10), "attention_mask": (5, 10), "labels": (5, 10)
    }  # fmt: skip
    losses = task.predict(model, tokenizer, features, batch_size=2, device=CPU)
    with torch.no_grad():
        assert losses.mean().item() == pytest.approx(model(**batch).loss.item(), abs=1e-5)
        alone = [model(**task.collator(tokenizer, model)([item])).loss for item in features.items]
    torch.testing.assert_close(losses.float(), torch.stack(alone), atol=1e-5, rtol=1e-5)


def test_too_little_text_and_an_encoder_are_refused() -> None:
    model = toy_model("llama")
    with pytest.raises(UsageError) as raised:
        task_of().prepare(rows_of({"text": "abc"}), character_tokenizer(), model, training=True)
    assert str(raised.value) == (
        "rows.jsonl has 4 tokens, fewer than one window of 48. Give more text, or lower --max-length."
    )
    with pytest.raises(UsageError) as raised:
        task_of().check(rows_of({"text": "abc"}), toy_model("t5").config)
    assert str(raised.value) == "A t5 model has an encoder. Give another, or --task seq2seq."
    with pytest.raises(UsageError, match=r"holds a list, not text"):
        task_of().prepare(rows_of({"text": ["a"]}), character_tokenizer(), model, training=True)
