"""How long an input may be, and how batches are padded."""

from __future__ import annotations

from typing import Any

import pytest
import transformers
from conftest import LENGTH, character_tokenizer, toy_model

from losparse_cli.errors import UsageError
from losparse_cli.tasks.tokens import check_items, length_of, pad, settle_padding
from tests.tasks.made import bare, encoder_tokenizer


def test_the_length_is_the_least_of_what_limits_it() -> None:
    tokenizer, model = character_tokenizer(), bare(transformers.BertConfig(max_position_embeddings=40))
    assert length_of(None, tokenizer, model, 30) == 30
    assert length_of(None, tokenizer, model, 50) == 40
    tokenizer.model_max_length = 20
    assert length_of(None, tokenizer, model, 30) == 20
    assert length_of(20, tokenizer, model, 5) == 20
    with pytest.raises(UsageError) as raised:
        length_of(21, tokenizer, model, 30)
    assert str(raised.value) == (
        "A bert model of 20 tokens at most cannot read --max-length 21. Give 20 or less, or leave it out."
    )


def test_a_model_without_positions_has_no_limit() -> None:
    assert length_of(4000, character_tokenizer(), toy_model("t5"), 30) == 4000


@pytest.mark.parametrize(("known", "token"), [(None, "</s>"), (3, "<unk>")])
def test_a_tokenizer_without_padding_is_given_one(known: int | None, token: str) -> None:
    tokenizer = character_tokenizer()
    tokenizer.pad_token = None
    config = transformers.LlamaConfig(pad_token_id=known)
    settle_padding(tokenizer, config)
    assert tokenizer.pad_token == token
    assert config.pad_token_id == tokenizer.pad_token_id


def test_the_config_pads_as_the_tokenizer_does() -> None:
    config = transformers.LlamaConfig(pad_token_id=5)
    settle_padding(character_tokenizer(), config)
    assert config.pad_token_id == 0


def test_a_tokenizer_with_nothing_to_pad_with_is_refused() -> None:
    tokenizer = character_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.unk_token = None
    with pytest.raises(UsageError) as raised:
        settle_padding(tokenizer, transformers.LlamaConfig())
    assert str(raised.value) == (
        "The tokenizer has neither a padding token nor an end token. Add pad_token to its tokenizer_config.json."
    )


def test_a_padding_token_that_the_model_lacks_is_refused() -> None:
    """As fine-tunes have it that added one to the tokenizer alone: on a GPU its index would end the process."""
    tokenizer = character_tokenizer()
    known = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    settle_padding(tokenizer, transformers.LlamaConfig(vocab_size=known + 1))
    with pytest.raises(UsageError) as raised:
        settle_padding(tokenizer, transformers.LlamaConfig(vocab_size=known))
    assert str(raised.value) == (
        f"The tokenizer pads with [PAD], token {known}, and the model knows {known} tokens. Name one that it knows as "
        "pad_token in tokenizer_config.json, such as the end token."
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("model", "segments"), [("bert", True), ("llama", False)])
def test_batches_are_padded_on_the_right(side: str, model: str, segments: bool, capsys: Any) -> None:
    tokenizer = encoder_tokenizer(side)
    items = [{**tokenizer("a", "b"), "labels": 1}, {**tokenizer("a", "bc"), "labels": 0}]
    batch = pad(tokenizer, toy_model(model), items)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert batch["input_ids"][0].tolist() == [*items[0]["input_ids"], 0]
    assert ("token_type_ids" in batch) == segments
    assert not segments or batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1]]
    assert set(batch) <= {"input_ids", "attention_mask", "token_type_ids"}
    assert "padding" not in capsys.readouterr().err


def test_a_model_with_one_kind_of_segment_is_given_none() -> None:
    tokenizer = encoder_tokenizer()
    model = toy_model("bert", type_vocab_size=1)
    batch = pad(tokenizer, model, [dict(tokenizer("a", "b"))])
    model(**batch)
    assert "token_type_ids" not in batch


def test_a_token_that_the_model_lacks_is_refused() -> None:
    model = bare(transformers.BertConfig(vocab_size=LENGTH))
    check_items([{"input_ids": [LENGTH - 1], "labels": [LENGTH]}, {"input_ids": [], "labels": []}], model)
    with pytest.raises(UsageError, match="yields token 48, and the model knows 48"):
        check_items([{"input_ids": [1, LENGTH]}], model)
    with pytest.raises(UsageError, match="yields token 48, and the model knows 48"):
        check_items([{"input_ids": [1], "labels": [LENGTH]}], model, "labels")
