"""Where text goes in a model, found without weights: the order of its blocks, and why some cannot be run apart."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import peculiar
import pytest
import sighted
import torch
import transformers
from conftest import toy_model
from torch import nn

from losparse_cli.errors import UsageError
from losparse_cli.models.route import Flow, Route, find_route
from losparse_cli.models.skeleton import classify
from losparse_cli.shim.experts import fused_experts, split_experts
from losparse_cli.text.inputs import Inputs


def route_of(make: Callable[[], Any]) -> Route:
    model = make().to("meta").eval()
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    route = find_route(model, classify(model)[0])
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == before
    return route


def test_blocks_in_the_order_of_their_calls() -> None:
    assert route_of(lambda: toy_model("llama")) == Route(("model.layers.0", "model.layers.1"))
    parts = ("encoder", "encoder", "decoder", "decoder")
    expected = tuple(f"{part}.block.{k}" for part, k in zip(parts, (0, 1, 0, 1), strict=True))
    assert route_of(lambda: toy_model("t5")) == Route(expected)


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_no_product_is_computed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a model looks at values zeros flow through it, and products would take those of billions minutes."""
    monkeypatch.setattr(
        nn.Linear, "forward", lambda self, x: pytest.fail("a product") if x.device.type == "cpu" else x @ self.weight.T
    )
    assert len(route_of(lambda: toy_model(name)).blocks) > 1


@pytest.mark.parametrize("make", [peculiar.gemma3, peculiar.paligemma], ids=["gemma3", "paligemma"])
def test_a_tower_is_never_reached_by_text(make: Callable[[], Any]) -> None:
    """ModelCloud/GPTQModel#1303, vllm-project/llm-compressor#2039."""
    route = route_of(make)
    assert route.blocks == ("model.language_model.layers.0", "model.language_model.layers.1")
    assert route.unreached == ("model.vision_tower.encoder.layers.0", "model.vision_tower.encoder.layers.1")
    assert not route.why
    assert "compressed without it" in route.notes[0]


def test_blocks_of_a_tower_without_a_layer_to_compress_are_not_spoken_of() -> None:
    model = peculiar.gemma3()
    parts = ("language_model.layers", "vision_tower.encoder.layers.1")
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and any(part in n for part in parts)]
    route = find_route(model, layers)
    assert len(route.unreached) == 2
    assert route.blind == ("model.vision_tower.encoder.layers.1",)
    assert "more" not in route.notes[0]


def test_layers_that_are_entries_of_a_list_are_no_blocks() -> None:
    assert route_of(peculiar.gemma3n) == Route(tuple(f"model.layers.{k}" for k in range(4)))


def taken(block: nn.Module) -> int:
    """Weights of a block's matrices, of its experts those of two."""
    found = 0
    for name, parameter in block.named_parameters():
        number = re.search(r"experts\.(\d+)\.", name)
        found += parameter.numel() * (parameter.dim() == 2 and (number is None or int(number[1]) < 2))
    return found


@pytest.mark.parametrize("name", ["llama", "bart", "gpt2", "mixtral"])
def test_what_a_token_takes(name: str) -> None:
    model = toy_model(name).to("meta").eval()
    split_experts(model, fused_experts(model))
    route = find_route(model, classify(model)[0])
    expected = {name: Flow(taken(model.get_submodule(name)), model.config.hidden_size) for name in route.blocks}
    assert route.flows == expected


def test_what_a_token_takes_where_there_are_images() -> None:
    """A tower sees five vectors of 48 numbers an image, one of which is in each of two rows of 10 and 70 tokens."""
    model = sighted.llava()[0].to("meta").eval()
    short, long = (torch.full((1, length), 5) for length in (10, 70))
    for ids in (short, long):
        ids[:, 2:6] = sighted.IMAGE
    seen = {"pixel_values": torch.zeros(1, 3, 16, 16)}
    kinds = Inputs(({"input_ids": short} | seen, {"input_ids": long} | seen, {"input_ids": long}), (10, 70, 70)).kinds()
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "layers" in name]
    route = find_route(model, layers, kinds)
    assert len(route.optional) == 3
    for name, flow in route.flows.items():
        vectors, width = (2 * 5 / 150, 48) if name in route.optional else (1, 64)
        assert flow.products == pytest.approx(vectors * taken(model.get_submodule(name)))
        assert flow.width == pytest.approx(vectors * width)


def test_what_a_token_takes_of_experts_in_one_tensor() -> None:
    model = toy_model("mixtral").to("meta").eval()
    together = find_route(model, classify(model)[0]).flows
    split_experts(model, fused_experts(model))
    apart = find_route(model, classify(model)[0]).flows
    assert together.keys() == apart.keys()
    assert all(together[block].products == pytest.approx(apart[block].products) for block in apart)


def albert() -> Any:
    settings: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    return transformers.AlbertModel(transformers.AlbertConfig(**settings, num_attention_heads=2, embedding_size=16))


class Peeking(nn.Module):
    """Runs a part of its second block without the block."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.PretrainedConfig(is_encoder_decoder=False)
        self.words = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> Any:
        return self.layers[1][0](self.layers[0](self.words(input_ids)))


def test_why_a_model_has_to_be_one_block() -> None:
    for make, why in (
        (peculiar.rwkv, "changes weights of its blocks itself"),
        (albert, "calls the same block for several of its layers"),
    ):
        route = route_of(make)
        assert route.blocks == ("",)
        assert why in route.why
    model = Peeking().to("meta")
    assert "runs parts of layers.1 by themselves" in find_route(model, ["layers.0.0", "layers.1.0"]).why
    assert "no repeated blocks" in find_route(model, ["layers.9"]).why


def test_text_that_does_not_do() -> None:
    with pytest.raises(UsageError, match=r"CLIPModel cannot be run on text alone"):
        route_of(peculiar.clip)
    model = peculiar.gemma3().to("meta").eval()
    tower = [name for name in classify(model)[0] if "vision_tower" in name]
    with pytest.raises(UsageError, match=r"Text reaches none of the layers"):
        find_route(model, tower)


class Caching(nn.Module):
    """Cannot make the cache that its configuration asks for, as BLT."""

    def __init__(self) -> None:
        super().__init__()
        self.config = transformers.LlamaConfig(num_hidden_layers=2)
        self.words = nn.Embedding(9, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.config.use_cache:
            raise AttributeError("no number of layers")
        x: torch.Tensor = self.words(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def test_no_cache_is_asked_for() -> None:
    model = Caching().to("meta")
    assert find_route(model, {"layers.0.0", "layers.1.0"}) == Route(("layers.0", "layers.1"))
    assert model.config.use_cache
