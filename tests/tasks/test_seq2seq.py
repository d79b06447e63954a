"""Texts written for texts: what the model reads, what it is to say, and how what it writes is scored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import character_tokenizer, toy_model
from tokenizers import processors

from losparse_cli.errors import UsageError
from losparse_cli.tasks.kinds import open_task
from tests.tasks.made import CPU, Says, bare, encoder_tokenizer, request_of, rows_of

ROWS = rows_of(*({"document": f"doc {'x' * k}", "summary": "word" * k} for k in (3, 1, 4, 2)))


def task_of(task: str = "summarization", **options: Any) -> Any:
    return open_task(request_of(task, **options))


def ending_tokenizer(side: str = "right") -> Any:
    """As T5 has it: a text ends with a token and begins with none."""
    made = character_tokenizer()
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 2)]
    )
    made.padding_side = side
    return made


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_batch_is_padded_and_shifted(name: str, side: str) -> None:
    model, tokenizer = toy_model(name), ending_tokenizer(side)
    task = task_of(source_prefix="sum: ", max_target_length=9, max_length=12)
    features = task.prepare(ROWS, tokenizer, model, training=True)
    batch = task.collator(tokenizer, model)(features.items)
    texts = tokenizer.batch_decode(batch["input_ids"])
    assert texts == ["sum: doc xx</s>", "sum: doc x</s><pad>", "sum: doc xx</s>", "sum: doc xx</s>"]
    labels = batch["labels"]
    assert [tokenizer.decode(row[row >= 0]) for row in labels] == [
        "wordword</s>", "word</s>", "wordword</s>", "wordword</s>"
    ]  # fmt: skip
    assert (labels == -100).sum(1).tolist() == [0, 4, 0, 0]
    start = model.config.decoder_start_token_id
    shifted = torch.cat((torch.full((4, 1), start), labels[:, :-1].masked_fill(labels[:, :-1] == -100, 0)), 1)
    assert batch["decoder_input_ids"].tolist() == shifted.tolist()
    assert torch.isfinite(model(**batch).loss)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_what_is_written_is_that_of_each_text_alone(name: str, capsys: Any) -> None:
    model, tokenizer, task = toy_model(name), ending_tokenizer("left"), task_of(max_target_length=7, num_beams=3)
    features = task.prepare(ROWS, tokenizer, model, training=False)
    found = task.predict(model, tokenizer, features, batch_size=3, device=CPU)
    for item, text in zip(features.items, found, strict=True):
        ids = torch.tensor([item["input_ids"]])
        alone = model.generate(input_ids=ids, num_beams=3, do_sample=False, max_new_tokens=7)
        assert tokenizer.decode(alone[0], skip_special_tokens=True) == text
    assert any(found)
    assert "max_new_tokens" not in capsys.readouterr().err


def test_a_decoder_writes_no_more_than_it_has_positions_for() -> None:
    model, tokenizer, task = Writes({3: "x"}), encoder_tokenizer(), task_of()
    model.config.is_encoder_decoder = True
    rows = rows_of({"document": "a", "summary": "b" * 60})
    features = task.prepare(rows, tokenizer, model, training=True)
    task.predict(model, tokenizer, features, batch_size=4, device=CPU)
    assert model.asked[0]["max_new_tokens"] == model.config.max_position_embeddings - 1  # it begins with one more
    assert len(features[0]["labels"]) == model.config.max_position_embeddings


class Writes(Says):
    """Writes the texts for inputs of so many tokens."""

    def __init__(self, texts: dict[int, str]) -> None:
        super().__init__(lambda ids, mask: None)
        self.texts, self.asked = texts, []  # type: ignore[var-annotated]

    def generate(self, input_ids: Any, attention_mask: Any, **options: Any) -> Any:
        assert torch.is_inference_mode_enabled()
        self.asked.append(options)
        tokenizer = encoder_tokenizer()
        return tokenizer(
            [self.texts[int(n)] for n in attention_mask.sum(1)], padding=True, return_tensors="pt"
        ).input_ids


@pytest.mark.parametrize("name", ["summarization", "seq2seq"])
def test_scores(name: str) -> None:
    tokenizer, task = encoder_tokenizer(), task_of(name, num_beams=5, max_target_length=11)
    rows = rows_of({"text": "a", "summary": "the cat sat"}, {"text": "ab", "summary": "a dog"})
    model = Writes({3: "the cat sat ", 4: "a cat"})
    model.config.is_encoder_decoder = True
    features = task.prepare(rows, tokenizer, model, training=False)
    found = task.score(model, tokenizer, features, batch_size=1, device=CPU)
    expected = {"rouge1": 0.75, "rouge2": 0.5, "rougeL": 0.75, "rougeLsum": 0.75}
    assert found == pytest.approx(expected | ({"exact_match": 0.5} if name == "seq2seq" else {}))
    assert model.asked[0]["num_beams"] == 5
    assert model.asked[0]["max_new_tokens"] == 11


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(UsageError) as raised:
        task_of().check(ROWS, toy_model("llama").config)
    assert str(raised.value) == ("A llama model has no decoder beside an encoder. Give another, or --task causal-lm.")
    config = toy_model("t5").config
    with pytest.raises(UsageError) as raised:
        task_of().check(rows_of({"document": "a", "summary": "b"}, {"document": "a", "summary": None}), config)
    assert str(raised.value) == (
        "rows.jsonl, row 2 has no text to write. Leave it out, or choose with --summary-column."
    )
    with pytest.raises(UsageError) as raised:
        task_of().prepare(rows_of({"document": 3, "summary": "b"}), ending_tokenizer(), bare(config), training=True)
    assert str(raised.value) == (
        "The column 'document' of rows.jsonl, row 1 holds a number, not text. Name a column of text with --text-column."
    )
    with pytest.raises(UsageError, match=r"--max-length 49\. Give 48 or less"):
        task_of(max_length=49).prepare(ROWS, ending_tokenizer(), toy_model("bart"), training=True)
