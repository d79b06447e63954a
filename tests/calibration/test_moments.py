"""Second moments of what layers are fed, against sums over the very inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import token_batch, toy_model
from torch import Tensor, nn
from transformers import Conv1D

from losparse_cli.calibration.moments import Moments, gather_moments
from losparse_cli.errors import CheckpointError
from losparse_cli.models.blocks import Call, find_blocks, holding


class Attention(nn.Module):
    """q, k and v are fed the very same tensor, o another, `spare` none, `again` twice a call."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, 4, bias=False) for _ in range(3))
        self.copy = nn.Linear(width, 4, bias=False)
        self.o = nn.Linear(4, width, bias=False)
        self.spare = nn.Linear(width, width)
        self.again = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.q(x) * self.k(x) + self.v(x) + self.copy(x.clone())
        return self.again(self.again(self.o(mixed)))


LAYERS = ["q", "k", "v", "copy", "o", "spare", "again"]


def calls_of(*shapes: tuple[int, ...], seed: int = 0) -> list[Call]:
    generator = torch.Generator().manual_seed(seed)
    return [Call((torch.randn(*shape, generator=generator),), {}) for shape in shapes]


def brute_force(block: nn.Module, layers: list[str], calls: list[Call]) -> dict[str, tuple[Tensor, int]]:
    """Layer -> mean of x xᵀ in float64 and the number of tokens, one token at a time."""
    rows: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        block.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: rows[name].extend(args[0].reshape(-1, args[0].shape[-1]).double())
        )
        for name in layers
    ]
    with torch.no_grad():
        for call in calls:
            block(*call.args, **call.kwargs)
    for hook in hooks:
        hook.remove()
    return {name: (sum(torch.outer(x, x) for x in xs) / len(xs), len(xs)) for name, xs in rows.items() if xs}


def by_layer(found: list[Moments]) -> dict[str, Moments]:
    return {name: moments for moments in found for name in moments.layers}


def test_moments_are_means_over_all_tokens_of_all_batches() -> None:
    block = Attention()
    calls = calls_of((2, 5, 6), (3, 2, 6), (1, 1, 6))
    expected = brute_force(block, LAYERS, calls)
    found = by_layer(gather_moments(block, LAYERS, calls))
    assert found.keys() == expected.keys() == set(LAYERS) - {"spare"}  # which no text reaches
    for name, (H, tokens) in expected.items():
        assert found[name].tokens == tokens
        assert found[name].H.dtype == torch.float32
        torch.testing.assert_close(found[name].H.double(), H, rtol=1e-5, atol=1e-6)
    assert found["q"].tokens == 17
    assert found["again"].tokens == 34


def test_layers_share_only_what_is_the_very_same_tensor() -> None:
    found = gather_moments(Attention(), LAYERS, calls_of((2, 5, 6), (2, 5, 6)))
    assert [moments.layers for moments in found] == [("q", "k", "v"), ("copy",), ("o",), ("again",)]
    # Asked for in another order, or in part, they share all the same.
    found = gather_moments(Attention(), ["v", "o", "q"], calls_of((2, 5, 6)))
    assert sorted(sorted(moments.layers) for moments in found) == [["o"], ["q", "v"]]


def test_a_layer_that_is_reached_by_a_later_batch_alone() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.sometimes = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.sometimes(x) + self.always(x) if len(x) > 2 else self.always(x)

    block, calls = Sometimes(), calls_of((2, 6), (5, 6), (1, 6))
    expected = brute_force(block, ["always", "sometimes"], calls)
    found = by_layer(gather_moments(block, ["always", "sometimes"], calls))
    for name, (H, tokens) in expected.items():
        assert found[name].tokens == tokens
        torch.testing.assert_close(found[name].H.double(), H, rtol=1e-5, atol=1e-6)


def test_outputs_are_handed_on_and_nothing_is_left_behind() -> None:
    block, calls = Attention(), calls_of((2, 5, 6), (1, 3, 6))
    outputs: list[Any] = []
    gather_moments(block, LAYERS, calls, on_output=outputs.append)
    assert all(torch.equal(output, block(*call.args)) for output, call in zip(outputs, calls, strict=True))
    assert not any(output.requires_grad for output in outputs)
    assert not any(module._forward_pre_hooks for module in block.modules())
    with pytest.raises(ZeroDivisionError):
        gather_moments(block, LAYERS, calls, on_output=lambda _: 1 / 0)
    assert not any(module._forward_pre_hooks for module in block.modules())


def test_what_comes_after_the_last_layer_runs_once_where_nobody_asks_for_it() -> None:
    class Tail(nn.Sequential):
        ran = 0

        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            self.ran += 1
            return y

    calls = calls_of((2, 6), (3, 6), (1, 6))
    block = Tail(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    (first, second) = gather_moments(block, ["0", "2"], calls)
    assert (block.ran, first.tokens, second.tokens) == (1, 6, 6)
    expected = brute_force(block, ["0", "2"], calls)
    torch.testing.assert_close(second.H.double(), expected["2"][0], rtol=1e-5, atol=1e-6)
    block = Tail(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    gather_moments(block, ["0", "2"], calls, on_output=lambda _: None)
    assert block.ran == 3


@pytest.mark.parametrize("n", [5, 384, 700, 1000])
def test_moments_are_symmetric_to_the_last_bit(n: int) -> None:
    x = torch.randn(40, n, generator=torch.Generator().manual_seed(n))
    (found,) = gather_moments(nn.Sequential(nn.Linear(n, 2)), ["0"], [Call((part,), {}) for part in x.split(16)])
    assert torch.equal(found.H, found.H.T)
    torch.testing.assert_close(found.H.double(), x.double().T @ x.double() / 40, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_inputs_that_are_not_finite_name_the_layer(value: float) -> None:
    block, calls = Attention(), calls_of((2, 5, 6))
    with torch.no_grad():
        block.o.weight[2, 1] = value
    with pytest.raises(CheckpointError, match="What again is fed"):
        gather_moments(block, LAYERS, calls)


def test_half_precision_inputs_are_summed_in_float32() -> None:
    block = nn.Sequential(nn.Linear(4, 4, bias=False)).bfloat16()
    x = torch.full((3000, 4), 1.0, dtype=torch.bfloat16)  # a bfloat16 sum of ones ends at 256
    (found,) = gather_moments(block, ["0"], [Call((x,), {})])
    assert torch.equal(found.H, torch.ones(4, 4))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_layers_of_a_model(name: str) -> None:
    """GPT-2's are Conv1D, whose inputs are those of a linear layer all the same."""
    model = toy_model(name)
    kind = Conv1D if name == "gpt2" else nn.Linear
    layers = [n for n, module in model.named_modules() if isinstance(module, kind) and ".1." in n]
    (block,) = holding(find_blocks(model, layers), layers)
    calls: list[Call] = []
    hook = model.get_submodule(block).register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(Call(args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        for seed in range(2):
            model(input_ids=token_batch(model, seed=seed)["input_ids"], use_cache=False)
    hook.remove()
    inside = [layer.removeprefix(f"{block}.") for layer in layers]
    expected = brute_force(model.get_submodule(block), inside, calls)
    found = gather_moments(model.get_submodule(block), inside, calls)
    assert len(found) == 4
    for layer, (H, tokens) in expected.items():
        moments = by_layer(found)[layer]
        assert moments.tokens == tokens == 2 * 2 * 11
        torch.testing.assert_close(moments.H.double(), H, rtol=1e-4, atol=1e-6)
