"""A model cut before its output head gives the logits that it gives whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from conftest import VOCABULARY, token_batch, toy_model

from losparse_cli.models.head import Head

LANGUAGE = ("llama", "qwen2", "gemma3", "gpt2", "opt", "falcon", "mamba", "mixtral", "t5", "bart")


def small(kind: str, **changes: Any) -> Any:
    """A model of a class that does something to its logits."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2, **changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def check(model: Any) -> Head:
    inputs = {name: ids for name, ids in token_batch(model).items() if name != "attention_mask"}
    model.config.use_cache = False
    head = Head(model, inputs)
    assert head.module is not None
    with torch.no_grad():
        whole = model(**inputs).logits
        states = head.states(inputs)
        parts = [head.logits(rows) for rows in states.flatten(0, 1).split(5)]
    torch.testing.assert_close(torch.cat(parts).view(whole.shape), whole)
    torch.testing.assert_close(model(**inputs).logits, whole)  # nothing is left in its place
    return head


@pytest.mark.parametrize("name", LANGUAGE)
def test_every_toy(name: str) -> None:
    check(toy_model(name))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Gemma2", {"head_dim": 16, "final_logit_softcapping": 0.05}),
        ("Cohere", {"logit_scale": 0.0625}),
        ("Granite", {"logits_scaling": 3.0}),
    ],
)
def test_what_is_done_to_logits_afterwards(kind: str, changes: dict[str, Any]) -> None:
    model = small(kind, **changes)
    head = check(model)
    states = head.states({"input_ids": torch.tensor([[3, 4, 5]])})[0].detach()
    ours = head.logits_of_another(states, model.lm_head.weight, None)
    assert not torch.allclose(ours, model.lm_head(states), rtol=1e-3)
    torch.testing.assert_close(ours, head.logits(states))


def test_gradients_go_on_into_the_model() -> None:
    model = toy_model("llama")
    head = Head(model, {"input_ids": torch.tensor([[3, 4]])})
    head.states({"input_ids": torch.tensor([[3, 4, 5]])}).sum().backward()
    assert bool(model.model.layers[0].mlp.up_proj.weight.grad.any())


@pytest.mark.parametrize("name", ["bert", "bert-qa"])
def test_models_without_a_head_over_a_vocabulary(name: str) -> None:
    assert Head(toy_model(name), {"input_ids": torch.tensor([[3, 4]])}).module is None
