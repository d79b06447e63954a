"""LoRA of peft over compressed layers: huggingface/peft#2607 and #1097, vllm-project/llm-compressor#952."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOYS, answer, token_batch

import losparse_cli
from losparse_cli.shim.linear import LowRankSparseLinear

peft = pytest.importorskip("peft")

LAYERS = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"], "bert": ["query", "dense"], "t5": ["q", "wo"]}


def over(model: Any, targets: Any, **settings: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=3, **settings))


def compressed_inside(model: Any) -> dict[str, LowRankSparseLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LowRankSparseLinear)}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("everything", [False, True], ids=["named", "all-linear"])
def test_an_adapter_is_trained_saved_and_laid_over_again(
    name: str, everything: bool, compressed: Any, tmp_path: Path
) -> None:
    model, _ = losparse_cli.load(compressed(name))
    before, layers = answer(model), compressed_inside(model)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters()}
    tuned = over(model, "all-linear" if everything else LAYERS[name])
    assert torch.equal(answer(tuned), before)  # an adapter begins with nothing
    taken = {m.base_layer for m in tuned.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert taken & set(layers.values())
    assert not everything or set(layers.values()) <= taken
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    for seed in range(2):  # A gets no gradient before B has moved
        tuned(**token_batch(tuned, seed=seed))[0].float().log_softmax(-1)[..., 0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = answer(tuned.eval())
    assert not torch.allclose(after, before, atol=1e-3)
    kept = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in tuned.named_parameters()}
    assert all(torch.equal(kept[n], p) for n, p in frozen.items())
    tuned.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(losparse_cli.load(compressed(name))[0], tmp_path / "adapter")
    assert torch.equal(answer(again.eval()), after)
    assert torch.equal(answer(tuned.unload()), before)


@pytest.mark.slow
def test_it_lies_over_whole_numbers_which_stay(compressed: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"bits": 6.0, "embedding_bits": 6.0, "vocab_size": 1100}
    model, _ = losparse_cli.load(compressed("llama", **options), dtype=torch.float32)
    layers = compressed_inside(model)
    assert {layer.spec.layout for layer in layers.values()} == {"codes"}
    before, dense = answer(model), {name: layer.dense().clone() for name, layer in layers.items()}
    tuned = over(model, "all-linear")
    assert torch.equal(answer(tuned), before)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=1.0)
    for seed in range(2):
        tuned(**token_batch(tuned, seed=seed))[0].log_softmax(-1)[..., 0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    after = answer(tuned.eval())
    assert not torch.allclose(after, before, atol=1e-3)
    assert all(torch.equal(layer.dense(), dense[name]) for name, layer in layers.items())
    tuned.save_pretrained(tmp_path / "adapter")
    again = losparse_cli.load(compressed("llama", **options), dtype=torch.float32)[0]
    assert torch.equal(answer(peft.PeftModel.from_pretrained(again, tmp_path / "adapter").eval()), after)
    plain, _ = losparse_cli.load(
        losparse_cli.export(compressed("llama", **options), tmp_path / "dense"), dtype=torch.float32
    )
    merged = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(answer(merged), after, rtol=1e-3, atol=1e-4)


def test_it_merges_into_the_dense_export(compressed: Any, tmp_path: Path) -> None:
    """Into compressed layers it does not: they have no entry for each weight."""
    tuned = over(losparse_cli.load(compressed("llama"))[0], ["q_proj"], init_lora_weights=False)
    expected = answer(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    dense, _ = losparse_cli.load(losparse_cli.export(compressed("llama"), tmp_path / "dense"))
    merged = peft.PeftModel.from_pretrained(dense, tmp_path / "adapter").merge_and_unload()
    torch.testing.assert_close(answer(merged), expected, rtol=2e-4, atol=2e-5)
    with pytest.raises(RuntimeError):
        tuned.merge_and_unload()
    assert TOYS["llama"][0] == type(merged).__name__
