"""`losparse generate` and `losparse_cli.generate`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from terminal import done

import losparse_cli
from losparse_cli.errors import UsageError


@pytest.fixture(scope="module")
def folder(compressed: Callable[..., Path]) -> Path:
    return compressed("llama", tokenizer=True, bits=4.0)


def test_text_comes_in_pieces_and_whole(folder: Path) -> None:
    heard: list[str] = []
    found = losparse_cli.generate(folder, "abc", new_tokens=20, seed=3, temperature=1.0, on_text=heard.append)
    assert "".join(heard) == found.text
    assert 0 < found.tokens <= 20
    assert found.prompt_tokens == 4  # the start token, too
    assert found.prefill > 0


def test_a_seed_says_which_text(folder: Path) -> None:
    model, tokenizer = losparse_cli.load(folder)
    options: dict[str, Any] = {"tokenizer": tokenizer, "new_tokens": 12, "temperature": 1.0}
    state = torch.random.get_rng_state()
    first, again, other = (losparse_cli.generate(model, "abc", seed=seed, **options).text for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_likeliest_is_what_transformers_writes(folder: Path) -> None:
    model, tokenizer = losparse_cli.load(folder)
    ids = tokenizer("xyz", return_tensors="pt")["input_ids"]
    expected = tokenizer.decode(
        model.generate(ids, max_new_tokens=15, do_sample=False)[0, 4:], skip_special_tokens=True
    )
    assert losparse_cli.generate(folder, "xyz", new_tokens=15, temperature=0).text.strip() == expected.strip()


def test_a_template_makes_a_chat(folder: Path) -> None:
    model, tokenizer = losparse_cli.load(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    plain = losparse_cli.generate(model, "abc", tokenizer=tokenizer, raw=True, new_tokens=2)
    chat = losparse_cli.generate(model, "abc", tokenizer=tokenizer, system="be", new_tokens=2)
    assert plain.prompt_tokens == 4
    assert chat.prompt_tokens >= len("s:be u:abc a:")
    with pytest.raises(UsageError, match="--raw asks for none"):
        losparse_cli.generate(model, "abc", tokenizer=tokenizer, raw=True, system="be")
    tokenizer.chat_template = "{{ raise_exception('no such role') }}"
    with pytest.raises(UsageError, match=r"no such role.*--raw"):
        losparse_cli.generate(model, "abc", tokenizer=tokenizer)


def test_no_more_than_the_model_has_places_for(folder: Path) -> None:
    assert losparse_cli.generate(folder, "abc", new_tokens=400, temperature=0).tokens <= 48 - 4
    with pytest.raises(UsageError, match=r"has 61 tokens, and .* takes 47"):
        losparse_cli.generate(folder, "a" * 60)


def test_other_models_write_too(compressed: Callable[..., Path]) -> None:
    found = losparse_cli.generate(compressed("gpt2", tokenizer=True), "abc", new_tokens=5, temperature=0)
    assert found.tokens <= 5
    assert found.plain == "models of type gpt2 are not known to it"
    assert (
        losparse_cli.generate(compressed("t5", tokenizer=True), "abc", new_tokens=5, temperature=0).prompt_tokens == 4
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": " \n"}, "prompt is empty"),
        ({"new_tokens": 0}, "--new-tokens must be at least 1, not 0"),
        ({"temperature": float("nan")}, "--temperature is 0, or a number from"),
        ({"temperature": 1e-45}, "--temperature is 0, or a number from"),
        ({"prompt": "abc \udcff"}, "no UTF-8"),
        ({"threads": 100_000}, "--threads is at most 1024"),
        ({"top_p": 0.0}, "--top-p lies above 0"),
        ({"top_k": 0}, "--top-k must be at least 1"),
        ({"threads": 0}, "--threads must be at least 1"),
        ({"dtype": "int8"}, "--dtype is one of"),
        ({"seed": 1 << 70}, "--seed .* is no seed"),
    ],
)
def test_values_out_of_range(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        losparse_cli.generate(folder, **{"prompt": "abc", **options})


def test_models_that_write_nothing(compressed: Callable[..., Path], folder: Path) -> None:
    with pytest.raises(UsageError, match="BertForSequenceClassification, which writes no text"):
        losparse_cli.generate(compressed("bert", tokenizer=True), "abc")
    with pytest.raises(UsageError, match="Give the tokenizer"):
        losparse_cli.generate(losparse_cli.load(folder)[0], "abc")


def test_what_a_checkpoint_asks_for_beside_tokens(folder: Path) -> None:
    model, tokenizer = losparse_cli.load(folder)
    options: dict[str, Any] = {"tokenizer": tokenizer, "new_tokens": 6, "temperature": 0}
    expected = losparse_cli.generate(model, "abc", **options)
    assert expected.plain is None
    model.generation_config.return_dict_in_generate = True
    model.generation_config.num_return_sequences = 2
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert losparse_cli.generate(model, "abc", **options).text == expected.text
    model.generation_config.stop_strings = ["~~~~"]
    found = losparse_cli.generate(model, "abc", **options)
    assert found.text == expected.text
    assert found.plain == "its texts end at certain strings"
    model.generation_config.stop_strings, model.generation_config.cache_implementation = None, "static"
    assert losparse_cli.generate(model, "abc", **options).plain == "another cache is used"


def test_whoever_hears_the_text_fails_in_his_own_words(folder: Path) -> None:
    def hear(text: str) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        losparse_cli.generate(folder, "abc", new_tokens=20, temperature=0, on_text=hear)


def test_the_beginning_of_a_decoder_is_no_token(compressed: Callable[..., Path]) -> None:
    model, tokenizer = losparse_cli.load(compressed("t5", tokenizer=True))
    model.generation_config.eos_token_id = None
    assert losparse_cli.generate(model, "abc", tokenizer=tokenizer, new_tokens=5, temperature=0).tokens == 5


def test_bytes_that_are_no_text_and_letters_that_cannot_be_shown(folder: Path) -> None:
    command = [sys.executable, "-m", "losparse_cli", "generate", str(folder), "--new-tokens", "3"]
    found = subprocess.run(command, input=b"abc \xff", capture_output=True, check=False)
    assert found.returncode == 2
    assert b"no UTF-8" in found.stderr


def test_the_command(folder: Path) -> None:
    command = ("generate", folder, "abc", "--new-tokens", "5", "--temperature", "0")
    data = json.loads(done(*command, "--json").out)
    assert data["tokens"] <= 5
    spoken = done(*command)
    assert spoken.out == data["text"] + "\n"
    assert "a second" in spoken.err


def test_the_prompt_may_come_from_standard_input(folder: Path) -> None:
    command = [sys.executable, "-m", "losparse_cli", "generate", str(folder), "--new-tokens", "3", "--json"]
    found = subprocess.run(command, input="abcd", capture_output=True, text=True, check=True)
    assert json.loads(found.stdout)["prompt_tokens"] == 5
