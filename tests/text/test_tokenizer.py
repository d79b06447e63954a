"""How many tokens a model takes, and whether it knows those of a tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import toys
import transformers
from conftest import character_tokenizer, toy_model
from torch import nn

from losparse_cli.errors import SourceError, UsageError
from losparse_cli.text.tokenizer import (
    check_tokenizer,
    check_tokens,
    frame,
    length_limit,
    load_tokenizer,
    named_length,
    positions,
    tokenize,
)

SIZES: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "d_model": 16, "num_hidden_layers": 1, "encoder_layers": 1,
    "decoder_layers": 1, "num_attention_heads": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "intermediate_size": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 40,
}  # fmt: skip


def made(kind: str, **changes: Any) -> Any:
    config = type(transformers.AutoConfig.for_model(kind))(**SIZES | changes)
    return transformers.AutoModel.from_config(config).eval()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in (
            "bert", "roberta", "camembert", "data2vec-text", "ibert", "luke", "mpnet", "xlm-roberta", "markuplm",
            "pegasus", "bart", "opt", "gpt2", "electra",
        )),
        ("esm", {"pad_token_id": 1, "mask_token_id": 2}),
        ("marian", {"pad_token_id": 59, "decoder_start_token_id": 59}),
        ("led", {"max_encoder_position_embeddings": 40, "max_decoder_position_embeddings": 20, "attention_window": 4}),
    ],
)  # fmt: skip
def test_a_model_takes_as_many_tokens_as_it_has_positions_for(kind: str, changes: dict[str, Any]) -> None:
    model = made(kind, **changes)
    limit = positions(model)
    assert limit is not None
    for length, fails in ((limit, False), (limit + 1, True)):
        ids = torch.full((1, length), 5)
        options = {"decoder_input_ids": ids[:, :2]} if model.config.is_encoder_decoder else {}
        try:
            with torch.no_grad():
                model(input_ids=ids, **options)
        except (IndexError, RuntimeError):
            assert fails, (kind, limit)
        else:
            assert not fails, (kind, limit)


def test_a_decoder_may_have_positions_of_its_own() -> None:
    model = made("led", max_encoder_position_embeddings=40, max_decoder_position_embeddings=20, attention_window=4)
    assert (positions(model), positions(model, decoder=True)) == (40, 20)


def test_a_model_that_names_no_limit(tmp_path: Path) -> None:
    model = toy_model("mamba")
    assert positions(model) is None
    assert length_limit(model, None) is None
    assert length_limit(model, 1e30) is None
    assert length_limit(model, 20) == 20


def test_what_the_tokenizer_names(tmp_path: Path) -> None:
    assert named_length(tmp_path) is None
    for content, found in (({"model_max_length": 20}, 20), ({"model_max_length": "20"}, None), ({}, None)):
        toys.write_json(tmp_path / "tokenizer_config.json", content)
        assert named_length(tmp_path) == found
    (tmp_path / "tokenizer_config.json").write_text("[")
    assert named_length(tmp_path) is None


def test_a_token_that_the_model_lacks_is_refused() -> None:
    class Silent(nn.Module):
        """As some models that read text have it: they do not say which of their tables is that of tokens."""

        config = transformers.BertConfig(vocab_size=48)

        def get_input_embeddings(self) -> Any:
            raise NotImplementedError

    for model in (toy_model("bert", vocab_size=48), Silent()):
        check_tokens(47, model)
        with pytest.raises(UsageError) as raised:
            check_tokens(48, model)
        assert str(raised.value) == (
            "The tokenizer yields token 48, and the model knows 48. Give a checkpoint with its own tokenizer."
        )
    with pytest.raises(UsageError, match=r"^The tokenizer of user/model yields token 60,"):
        check_tokens(60, toy_model("bert", vocab_size=48), "user/model")


def test_a_model_that_was_given_more_tokens_knows_them() -> None:
    model = toy_model("bert", vocab_size=48)
    model.resize_token_embeddings(64)
    model.config.vocab_size = 48  # as in a config.json that was not written again
    check_tokens(63, model)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    for refused in (lambda: check_tokenizer(tmp_path, "user/model"), lambda: load_tokenizer(tmp_path)):
        with pytest.raises(SourceError, match=r"has no tokenizer\. Copy the tokenizer files of the original model"):
            refused()
    (tmp_path / "tokenizer.json").write_text("{}")
    check_tokenizer(tmp_path)
    with pytest.raises(SourceError, match=r"^The tokenizer of .* cannot be loaded: .*\. Download it again\.$"):
        load_tokenizer(tmp_path)


def test_what_a_tokenizer_puts_around_a_text() -> None:
    assert frame(character_tokenizer()) == ([1], [])


def test_a_text_in_parts_has_the_tokens_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts end between two lines that hold something, where there are such: a blank line may be one token."""
    read: list[str] = []

    def tokenizer(text: str, **options: Any) -> Any:
        read.append(text)
        return SimpleNamespace(input_ids=[len(word) for word in re.findall(r"\n+|[^\n]+", text)])

    text = "".join(f"{'x' * (k % 7 + 1)}\n" + "\n" * (k % 2) for k in range(200))
    whole = tokenizer(text).input_ids
    monkeypatch.setattr("losparse_cli.text.tokenizer.PIECE", 40)
    for size in (1, 13, 10_000):
        read.clear()
        assert tokenize(tokenizer, (text[k : k + size] for k in range(0, len(text), size))).tolist() == whole
        assert "".join(read) == text
        assert max(map(len, read)) <= 40
    assert len(tokenize(tokenizer, [])) == 0
    assert tokenize(tokenizer, ["x" * 100]).tolist() == [40, 40, 20]
