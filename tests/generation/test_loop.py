"""`decode` writes what transformers' own loop writes, or leaves it to that."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from products import needs_compiler
from torch import Tensor
from transformers import DynamicCache

import losparse_cli
from losparse_cli import LosparseError, Recipe, decode
from losparse_cli.errors import UsageError
from losparse_cli.generation import loop
from tests.generation.test_decoder import known

pytestmark = [needs_compiler, pytest.mark.usefixtures("installed_kernels")]
PROMPTS = torch.randint(3, 100, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("loop")
    made = losparse_cli.compress(known("llama", folder / "dense"), folder / "small", Recipe(bits=4.0)).output
    return losparse_cli.load(made)[0]


def both(model: Any, ids: Tensor = PROMPTS, seed: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
    """What each of the two loops writes."""
    options = {"max_new_tokens": 20, "attention_mask": torch.ones_like(ids), **options}
    found = []
    for custom in (decode, None):
        torch.manual_seed(seed)
        found.append(model.generate(ids, custom_generate=custom, **options))
    return found[0], found[1]


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9},
        {"do_sample": True, "top_k": 0, "eos_token_id": list(range(40, 60))},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": False, "max_new_tokens": 1},
        {"do_sample": False, "num_beams": 2},
        {"do_sample": False, "use_cache": False},
        {"do_sample": False, "cache_implementation": "static"},
    ],
)
def test_the_same_tokens(model: Any, options: dict[str, Any]) -> None:
    ours, theirs = both(model, **options)
    assert torch.equal(ours, theirs)


def test_it_is_the_decoder_that_writes(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = loop.Decoder.__call__
    monkeypatch.setattr(loop.Decoder, "__call__", lambda self, tokens: (calls.append(1), plain(self, tokens))[1])
    both(model, do_sample=False)
    assert len(calls) == 19  # the first token is the prompt's


@pytest.mark.parametrize("options", [{"return_dict_in_generate": True}, {"num_beams": 2}, {"use_cache": False}])
def test_what_it_leaves_to_transformers(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(loop.Decoder, "__call__", None)
    with caplog.at_level(logging.INFO, "losparse"):
        model.generate(PROMPTS, custom_generate=decode, max_new_tokens=3, do_sample=False, **options)
    assert "transformers' own loop writes, because" in caplog.text


def test_padded_prompts(model: Any) -> None:
    ids, mask = PROMPTS.clone(), torch.ones_like(PROMPTS)
    ids[1, :3], mask[1, :3] = 0, 0
    ours, theirs = both(model, ids, attention_mask=mask, do_sample=False)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [{"position_ids": 3 * torch.arange(7).expand(2, 7)}, {"attention_mask": torch.full((2, 7), 2)}],
    ids=["positions", "mask"],
)
def test_positions_of_another_kind(model: Any, options: dict[str, Any]) -> None:
    ours, theirs = both(model, do_sample=False, **options)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4, "do_sample": False}, "Contrastive search needs a loop of its own"),
        ({"dola_layers": "high", "do_sample": False}, "Dola generation needs a loop of its own"),
    ],
)
def test_ways_to_write_that_it_does_not_know(model: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        model.generate(PROMPTS, custom_generate=decode, max_new_tokens=3, **options)


def test_a_streamer_beside_beams(model: Any) -> None:
    streaming = partial(decode, streamer=object())
    with pytest.raises(UsageError, match="one beam"):
        model.generate(PROMPTS, custom_generate=streaming, max_new_tokens=3, num_beams=2, do_sample=False)


def test_a_window_that_was_changed_after_a_proof(tmp_path: Path) -> None:
    model, _ = losparse_cli.load(known("qwen3_moe", tmp_path / "dense"))
    both(model, do_sample=False)
    model.config.sliding_window = 4
    ours, theirs = both(model, do_sample=False)
    assert torch.equal(ours, theirs)


def test_a_cache_of_the_caller_is_filled(model: Any) -> None:
    filled = []
    for custom in (decode, None):
        past = DynamicCache(config=model.config)
        model.generate(
            PROMPTS, custom_generate=custom, past_key_values=past, max_new_tokens=5, do_sample=False, eos_token_id=None
        )
        filled.append(past.get_seq_length())
    assert filled[0] == filled[1]


def test_what_changes_after_a_proof_is_seen(model: Any) -> None:
    both(model, do_sample=False)
    handle = model.model.layers[1].register_forward_hook(lambda module, arguments, output: output + 1)
    ours, theirs = both(model, do_sample=False)
    handle.remove()
    assert torch.equal(ours, theirs)


def test_kernels_need_not_be_installed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from losparse_cli.shim import installed

    installed.install(None)
    told: list[str] = []
    model.generate(PROMPTS, custom_generate=partial(decode, on_plain=told.append), max_new_tokens=3, do_sample=False)
    assert told == []


def test_a_streamer_hears_each_token(model: Any) -> None:
    class Ear:
        def __init__(self) -> None:
            self.heard: list[int] = []
            self.ended = False

        def put(self, value: Tensor) -> None:
            self.heard += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    ear = Ear()
    ids = PROMPTS[:1]
    written = model.generate(
        ids, custom_generate=partial(decode, streamer=ear), streamer=ear, max_new_tokens=6, do_sample=False
    )
    assert ear.heard == written[0].tolist()
    assert ear.ended


def test_a_step_that_is_wrong_is_found_and_left_out(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = loop.Decoder.__call__
    monkeypatch.setattr(loop, "_proven", set())
    monkeypatch.setattr(loop.Decoder, "__call__", lambda self, tokens: plain(self, tokens) * 1.1)
    with caplog.at_level(logging.WARNING, "losparse"):
        ours, theirs = both(model, do_sample=False)
    assert torch.equal(ours, theirs)
    assert "does not compute what LlamaForCausalLM does" in caplog.text


@pytest.mark.parametrize(("wrong", "left_out"), [(3, False), (8, True)])
def test_a_mixture_of_experts_may_choose_others_for_some_steps(
    wrong: int, left_out: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    mixture, _ = losparse_cli.load(known("mixtral", tmp_path))
    plain, steps = loop.Decoder.__call__, iter(range(100))
    monkeypatch.setattr(
        loop.Decoder, "__call__", lambda self, tokens: plain(self, tokens) * (1.1 if next(steps) < wrong else 1.0)
    )
    with caplog.at_level(logging.WARNING, "losparse"):
        ours, theirs = both(mixture, do_sample=False)
    assert torch.equal(ours, theirs)
    assert ("does not compute what MixtralForCausalLM does" in caplog.text) == left_out
    assert next(steps) == (8 if left_out else 19)  # of 20 tokens the first comes with the prompt


def test_numbers_that_are_none_are_an_error(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    both(model, do_sample=False)  # proven
    monkeypatch.setattr(loop.Decoder, "__call__", lambda self, tokens: None)
    with pytest.raises(LosparseError, match="after 8 tokens is no number"):
        both(model, do_sample=False)


def test_reasons_are_told(tmp_path: Path) -> None:
    dense, _ = losparse_cli.load(known("qwen3", tmp_path / "dense"))
    assert loop.why_not(dense) is None
    assert "float64" in str(loop.why_not(dense.double()))
