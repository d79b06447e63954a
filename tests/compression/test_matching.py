"""A block matched to its dense self: lower loss, the same supports, and nothing else touched."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from conftest import token_batch, toy_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import Conv1D

from losparse_cli.compression.matching import Matched, match_block
from losparse_cli.compression.request import OF_CODES, OF_FLOATS, Matching, Refinement
from losparse_cli.errors import UsageError
from losparse_cli.linalg.alternating import decompose
from losparse_cli.linalg.factors import LowRankSparse
from losparse_cli.linalg.patterns import Pattern
from losparse_cli.models.blocks import Call, find_blocks, hidden_states, holding, run_block

QUICK = Matching(steps=20, lr=1e-3)


@dataclass
class Scene:
    """A dense block, what it is called with and returns, and coarse factors of its layers."""

    name: str
    dtype: torch.dtype = torch.float32
    block: Any = None
    calls: list[Call] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    layers: dict[str, LowRankSparse] = field(default_factory=dict)
    norms: dict[str, torch.dtype] = field(default_factory=dict)
    transposed: dict[str, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        model = toy_model(self.name)
        inside = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and ".0." in n]
        (place,) = holding(find_blocks(model, inside), inside)
        self.block = model.get_submodule(place).requires_grad_(False)
        hook = self.block.register_forward_pre_hook(
            lambda _, args, kwargs: self.calls.append(Call(args, kwargs)), with_kwargs=True
        )
        with torch.no_grad():
            for seed in range(4):
                model(input_ids=token_batch(model, 4, 24, seed=seed)["input_ids"], use_cache=False)
            hook.remove()
            self.targets = [hidden_states(run_block(self.block, call)).clone() for call in self.calls]
        for layer in inside:
            name = layer.removeprefix(f"{place}.")
            linear = self.block.get_submodule(name)
            self.transposed[name] = isinstance(linear, Conv1D)
            W = linear.weight.T.contiguous() if self.transposed[name] else linear.weight
            self.layers[name] = decompose(
                W, 4, W.shape[0] * 16, Pattern("unstructured"), scope="row", dtype=self.dtype
            ).factors
        self.norms = {n: self.dtype for n, p in self.block.named_parameters() if p.dim() == 1}
        with torch.no_grad():
            for name in self.norms:
                parameter = self.block.get_parameter(name)
                parameter.copy_(parameter.to(self.dtype))

    def match(self, refinement: Matching = QUICK, **options: Any) -> Matched:
        norms = options.pop("norms", self.norms)
        return match_block(
            self.block, self.calls, self.targets, self.layers, norms, refinement, transposed=self.transposed, **options
        )

    @torch.no_grad()
    def loss(self, layers: dict[str, LowRankSparse]) -> float:
        """Of the block with these factors as its weights, by their definition."""
        before = {name: parameter.clone() for name, parameter in self.block.named_parameters()}
        for name, factors in layers.items():
            W = factors.dense()
            self.block.get_parameter(f"{name}.weight").copy_(W.T if self.transposed[name] else W)
        lost = changed = 0.0
        for call, target in zip(self.calls, self.targets, strict=True):
            each = target.double().square().sum(-1)
            lost += float(
                ((hidden_states(run_block(self.block, call)) - target).double().square().sum(-1) / each).sum()
            )
            changed += float(((target - call.args[0]).double().square().sum(-1) / each).sum())
        for name in layers:
            self.block.get_parameter(f"{name}.weight").copy_(before[f"{name}.weight"])
        return lost / changed


def state(block: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in block.named_parameters()}


def same_factors(a: LowRankSparse, b: LowRankSparse) -> bool:
    return all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("U", "V", "values", "support"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_loss_falls_and_the_supports_stay(name: str, dtype: torch.dtype) -> None:
    scene = Scene(name, dtype)
    before, started = state(scene.block), deepcopy(scene.layers)
    expected = scene.loss(scene.layers)
    matched = scene.match()
    assert all(same_factors(scene.layers[n], started[n]) for n in started)  # what was given is left alone
    assert matched.loss_before == pytest.approx(expected, rel=1e-4)
    assert matched.loss_after < 0.9 * matched.loss_before
    # With the norms that were left in the block: the loss that is told is that of what will be stored.
    assert matched.loss_after == pytest.approx(scene.loss(matched.factors), rel=1e-4)
    assert matched.factors.keys() == scene.layers.keys()
    for layer, factors in matched.factors.items():
        start = scene.layers[layer]
        assert factors.U.dtype == factors.V.dtype == factors.values.dtype == dtype
        assert (factors.rank, factors.nnz) == (start.rank, start.nnz)
        assert torch.equal(factors.support, start.support)
        assert not any(x.requires_grad for x in (factors.U, factors.V, factors.values))
        for part in ("U", "V", "values"):
            assert not torch.equal(getattr(factors, part), getattr(start, part)), (layer, part)
    after = state(scene.block)
    assert after.keys() == before.keys()
    assert {n for n in after if not torch.equal(after[n], before[n])} <= set(scene.norms)
    assert any(not torch.equal(after[n], before[n]) for n in scene.norms)
    assert all(torch.equal(after[n], after[n].to(dtype).float()) for n in scene.norms)  # rounded as they are stored
    assert not any(parametrize.is_parametrized(module) for module in scene.block.modules())
    assert not any(parameter.requires_grad for parameter in scene.block.parameters())


def test_only_the_norms_that_are_listed_are_trained() -> None:
    scene = Scene("llama")
    before = state(scene.block)
    scene.match(norms={"input_layernorm.weight": torch.float32})
    after = state(scene.block)
    assert [n for n in after if not torch.equal(after[n], before[n])] == ["input_layernorm.weight"]
    scene = Scene("llama")
    matched = scene.match(norms={})
    assert matched.loss_after < matched.loss_before
    assert all(torch.equal(tensor, before[n]) for n, tensor in state(scene.block).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("lr", [0.99, 1e-30])
def test_what_does_not_help_leaves_the_start(lr: float, dtype: torch.dtype) -> None:
    """Steps so large that they harm, or so small that they change nothing."""
    scene = Scene("llama", dtype)
    before, start = state(scene.block), deepcopy(scene.layers)
    matched = scene.match(Matching(steps=8, lr=lr))
    assert matched.loss_after == matched.loss_before > 0
    assert all(same_factors(matched.factors[n], start[n]) for n in start)
    assert all(torch.equal(tensor, before[n]) for n, tensor in state(scene.block).items())
    assert not any(parametrize.is_parametrized(module) for module in scene.block.modules())


def test_an_error_on_the_way_leaves_the_blocks_weights() -> None:
    scene = Scene("llama")
    before = state(scene.block)

    def fail(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scene.match(on_step=fail)
    after = state(scene.block)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in after if n not in scene.norms)
    assert not any(parameter.requires_grad for parameter in scene.block.parameters())


def test_the_same_seed_gives_the_same_bits() -> None:
    results = []
    for seed in (1, 1, 2):
        scene = Scene("llama")
        results.append((scene.match(seed=seed), state(scene.block)))
    (first, norms), (second, same), (other, _) = results
    assert (first.loss_before, first.loss_after) == (second.loss_before, second.loss_after)
    assert all(same_factors(first.factors[n], second.factors[n]) for n in first.factors)
    assert all(torch.equal(norms[n], same[n]) for n in norms)
    assert first.loss_after != other.loss_after  # whose batches come in another order
    # What others drew from torch's own generator, or how autograd was set, does not matter.
    torch.manual_seed(7)
    with torch.no_grad():
        third = Scene("llama").match(seed=1)
    assert third.loss_after == first.loss_after


def test_every_step_is_told() -> None:
    told: list[tuple[int, float]] = []
    scene = Scene("llama")
    matched = scene.match(on_step=lambda step, loss: told.append((step, loss)))
    assert [step for step, _ in told] == list(range(1, QUICK.steps + 1))
    assert all(0 < loss < 3 * matched.loss_before for _, loss in told)


def test_layers_without_a_low_rank_part_and_without_entries() -> None:
    scene = Scene("llama")
    for k, (name, factors) in enumerate(scene.layers.items()):
        W = factors.dense()
        rank, nnz = (0, W.shape[0] * 20) if k % 2 else (6, 0)
        scene.layers[name] = decompose(W, rank, nnz, Pattern("unstructured"), scope="row").factors
    matched = scene.match()
    assert matched.loss_after < matched.loss_before
    for name, factors in matched.factors.items():
        assert (factors.rank, factors.nnz) == (scene.layers[name].rank, scene.layers[name].nnz)
        assert torch.equal(factors.support, scene.layers[name].support)


def test_a_perfect_start_is_kept() -> None:
    scene = Scene("llama")
    for name in scene.layers:
        W = scene.block.get_parameter(f"{name}.weight").detach()
        everywhere = torch.ones(W.shape, dtype=torch.bool)
        scene.layers[name] = LowRankSparse(
            W.new_zeros(len(W), 0), W.new_zeros(0, W.shape[1]), W.reshape(-1), everywhere
        )
    matched = scene.match()
    assert matched.loss_before < 1e-10
    assert matched.loss_after <= matched.loss_before


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"steps": -1}, {"lr": 0.0}, {"lr": 1e3}, {"lr": -1e-3}, {"lr": float("nan")}]
)
def test_numbers_that_train_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="--refine-"):
        Refinement(**wrong)


def test_what_is_not_said_is_what_suits_the_layers() -> None:
    assert Refinement().settled(coded=False) == OF_FLOATS
    assert Refinement().settled(coded=True) == OF_CODES
    assert Refinement(steps=7).settled(coded=True) == Matching(7, OF_CODES.lr)


def test_what_is_held_out_is_measured_and_trains_nothing() -> None:
    first, second = Scene("llama"), Scene("llama")
    with torch.no_grad():  # other targets for the last call
        second.targets[-1].mul_(1.5)
    a, b = first.match(held_out=1), second.match(held_out=1)
    assert all(same_factors(a.factors[layer], b.factors[layer]) for layer in a.factors)
    assert (a.loss_before, a.loss_after) == (b.loss_before, b.loss_after)
    assert a.held_out_before is not None
    assert a.held_out_after is not None
    assert 0 < a.held_out_after < a.held_out_before
    assert a.held_out_before != b.held_out_before
    assert Scene("llama").match().held_out_before is None
