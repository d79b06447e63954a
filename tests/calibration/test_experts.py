"""Second moments of experts: each sees a part of what all are fed, and none is left without."""

from __future__ import annotations

import pytest
import torch
from conftest import toy_model
from experts import split
from torch import Tensor

from losparse_cli.calibration import moments
from losparse_cli.calibration.moments import gather_moments
from losparse_cli.models.blocks import Call
from losparse_cli.models.experts import expert_layers
from losparse_cli.shim.experts import SplitExperts

LAYERS = [f"{number}.{matrix}" for number in range(5) for matrix in ("w1", "w3", "w2")]


class Block(torch.nn.Module):
    def __init__(self, mlp: SplitExperts) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, *args: Tensor) -> Tensor:
        y: Tensor = self.mlp(*args)
        return y


@pytest.fixture
def experts() -> SplitExperts:
    model = split(toy_model("mixtral"))
    found = next(module for module in model.modules() if isinstance(module, SplitExperts))
    return found.float()


def calls(experts: torch.nn.Module, index: list[list[int]]) -> tuple[Tensor, list[Call]]:
    torch.manual_seed(1)
    x, chosen = torch.randn(len(index), 72), torch.tensor(index)
    return x, [Call((x, chosen, torch.full(chosen.shape, 0.5)), {})]


def second_moment(x: Tensor) -> Tensor:
    return x.T @ x


def test_layers_that_are_the_same_of_each(experts: SplitExperts) -> None:
    block = Block(experts)
    first, second = expert_layers(block, [f"mlp.{layer}" for layer in LAYERS if layer != "3.w1"])
    assert (first.owner, second.owner) == ("mlp", "")
    assert first.layers["mlp.0.w1"] == ("mlp.0.w1", "mlp.0.w3")
    assert first.layers["mlp.3.w3"] == ("mlp.3.w3",)
    assert second.layers == {f"mlp.{number}.w2": (f"mlp.{number}.w2",) for number in range(5)}
    assert expert_layers(block, ["mlp"]) == []


def test_an_expert_sees_its_own_tokens_and_a_part_of_all(experts: SplitExperts) -> None:
    block = Block(experts)
    x, given = calls(experts, [[0, 1], [0, 1], [0, 2], [2, 0]] * 20)
    names = [f"mlp.{layer}" for layer in LAYERS]
    found = {group.layers: group for group in gather_moments(block, names, given)}
    common = second_moment(x) / len(x)
    for number, own in ((0, x), (1, x.view(20, 4, 72)[:, :2].reshape(-1, 72)), (4, x[:0])):
        group = found[f"mlp.{number}.w1", f"mlp.{number}.w3"]
        more = moments.SHARED * 72
        expected = (second_moment(own) + more * common) / (len(own) + more)
        torch.testing.assert_close(group.H, expected, rtol=1e-4, atol=1e-5)
        assert group.tokens == len(own)
    assert ("mlp.0.w2",) in found  # what these are fed nobody else knows: without tokens there is nothing
    assert ("mlp.4.w2",) not in found
    alone = {group.layers: group for group in gather_moments(block, names, given, share=False)}
    torch.testing.assert_close(alone["mlp.0.w1", "mlp.0.w3"].H, common, rtol=1e-4, atol=1e-5)
    assert ("mlp.4.w1", "mlp.4.w3") not in alone
    even, own = found["mlp.1.w2",].H, alone["mlp.1.w2",].H
    more = moments.EVEN * 80
    expected = (40 * own + more * own.diagonal().mean() * torch.eye(80)) / (40 + more)
    torch.testing.assert_close(even, expected, rtol=1e-4, atol=1e-6)


def test_in_parts_it_is_the_same(experts: SplitExperts) -> None:
    block = Block(experts)
    _, given = calls(experts, [[0, 1], [0, 3], [3, 2]] * 10)
    names = [f"mlp.{layer}" for layer in LAYERS]
    whole = {group.layers: group.H for group in gather_moments(block, names, given)}
    parts = [group for k in range(0, 15, 3) for group in gather_moments(block, names[k : k + 3], given)]
    assert {group.layers for group in parts} == whole.keys()
    assert all(torch.equal(group.H, whole[group.layers]) for group in parts)
