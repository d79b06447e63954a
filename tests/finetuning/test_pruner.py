"""Importance, thresholds and masks against a plain computation by hand, step by step."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from losparse_cli.errors import UsageError
from losparse_cli.finetuning.layers import TrainedLinear
from losparse_cli.finetuning.pruner import Pruner, Pruning
from losparse_cli.linalg.factors import LowRankSparse

SHAPES = ((6, 10), (9, 4), (5, 7))


def layer_of(shape: tuple[int, int], pattern: str = "rows", seed: int = 0, rank: int = 0) -> TrainedLinear:
    generator = torch.Generator().manual_seed(seed)
    m, n = shape
    values = torch.randn(m * n, generator=generator)
    factors = LowRankSparse(
        torch.randn(m, rank, generator=generator), torch.randn(rank, n, generator=generator), values,
        torch.ones(m, n, dtype=torch.bool),
    )  # fmt: skip
    return TrainedLinear(factors, None, pattern=pattern, dense=True)


def whole_units(shape: tuple[int, int], pattern: str, share: float) -> int:
    m, n = shape
    count, size = {"rows": (m, n), "columns": (n, m), "unstructured": (m * n, 1)}[pattern]
    return round(share * count) * size


class ByHand:
    """What the docstrings promise, with loops and float64."""

    def __init__(self, weights: list[Tensor], pattern: str, sizes: list[int], pruning: Pruning, total: int) -> None:
        self.weights = [W.double().clone() for W in weights]
        self.pattern, self.sizes, self.how, self.total = pattern, sizes, pruning, total
        self.window: list[list[list[float]]] = [[] for _ in weights]
        self.smoothed = [[0.0] * len(self.units(W)) for W in self.weights]
        self.kept = [[True] * len(self.units(W)) for W in self.weights]

    def units(self, X: Tensor) -> list[Tensor]:
        return list({"rows": X, "columns": X.T, "unstructured": X.reshape(-1, 1)}[self.pattern])

    def watch(self, gradients: list[Tensor]) -> None:
        for k, (W, G) in enumerate(zip(self.weights, gradients, strict=True)):
            score = {
                "sensitivity": (W * G.double()).abs(), "movement": -W * G.double(), "magnitude": W.abs(),
            }[self.how.importance]  # fmt: skip
            self.window[k].append([float(unit.mean()) for unit in self.units(score)])

    def prune(self, step: int) -> None:
        before, after = self.how.initial_warmup or 0, self.how.final_warmup or 0
        final = step >= self.total - after
        if step <= before or not (final or step % self.how.every == 0):
            return
        for k, window in enumerate(self.window):
            for unit in range(len(self.kept[k])):
                mean = sum(scores[unit] for scores in window) / len(window)
                self.smoothed[k][unit] = self.how.beta * self.smoothed[k][unit] + (1 - self.how.beta) * mean
            self.window[k] = []
        left = 0.0 if final else (1 - (step - before) / (self.total - before - after)) ** 3
        full = sum(W.numel() for W in self.weights)
        budget = sum(self.sizes) + left * (full - sum(self.sizes))
        everything = [(s, k, u) for k, scores in enumerate(self.smoothed) for u, s in enumerate(scores)]
        self.kept = [[False] * len(kept) for kept in self.kept]
        if self.how.threshold == "global":
            groups = [(sorted(everything, key=lambda one: -one[0]), round(budget))]
        else:
            groups = [
                (
                    sorted((one for one in everything if one[1] == k), key=lambda one: -one[0]),
                    round((self.sizes[k] + left * (W.numel() - self.sizes[k])) / self.units(W)[0].numel())
                    * self.units(W)[0].numel(),
                )
                for k, W in enumerate(self.weights)
            ]
        for order, spare in groups:
            for _, k, unit in order:
                spare -= self.units(self.weights[k])[unit].numel()
                if spare < 0:
                    break
                self.kept[k][unit] = True
        for W, kept in zip(self.weights, self.kept, strict=True):
            for unit, alive in zip(self.units(W), kept, strict=True):
                unit *= alive  # units are views


@pytest.mark.parametrize("threshold", ["global", "layer"])
@pytest.mark.parametrize("importance", ["sensitivity", "movement", "magnitude"])
@pytest.mark.parametrize("pattern", ["rows", "columns", "unstructured"])
def test_by_hand(pattern: str, importance: str, threshold: str) -> None:
    total, pruning = 30, Pruning(importance, threshold, beta=0.7, every=4, initial_warmup=3, final_warmup=6)
    layers = [layer_of(shape, pattern, seed) for seed, shape in enumerate(SHAPES)]
    sizes = [whole_units(shape, pattern, share) for shape, share in zip(SHAPES, (0.34, 0.5, 0.2), strict=True)]
    weights = [layer.S.detach().clone() for layer in layers]
    pruner, hand = Pruner(layers, sizes, pruning, total), ByHand(weights, pattern, sizes, pruning, total)
    generator = torch.Generator().manual_seed(5)
    masks = []
    for step in range(1, total + 1):
        gradients = [torch.randn(shape, generator=generator) for shape in SHAPES]
        for layer, gradient in zip(layers, gradients, strict=True):
            assert layer.S is not None
            layer.S.grad = gradient.clone()
        pruner.watch()
        hand.watch(gradients)
        with torch.no_grad():  # an optimizer, whose gradients reach pruned entries, too
            for layer, W, gradient in zip(layers, hand.weights, gradients, strict=True):
                layer.S -= 0.3 * gradient
                W -= 0.3 * gradient.double()
        pruner.prune(step)
        hand.prune(step)
        for layer, W, kept in zip(layers, hand.weights, hand.kept, strict=True):
            assert layer.kept.tolist() == kept, step
            torch.testing.assert_close(layer.S.detach().double(), W, rtol=1e-5, atol=1e-5)
        masks.append(torch.cat([layer.kept for layer in layers]))
        assert pruner.remaining() == pytest.approx(
            sum(int(layer.kept.sum()) * layer.unit_size for layer in layers) / sum(m * n for m, n in SHAPES)
        )
    assert all(bool(mask.all()) for mask in masks[:3])
    left = sum(int((layer.S != 0).sum()) for layer in layers)
    assert left == sum(int(layer.kept.sum()) * layer.unit_size for layer in layers)
    if threshold == "layer":
        assert [int(layer.kept.sum()) * layer.unit_size for layer in layers] == sizes
    else:  # at most, and no unit more would fit
        assert sum(sizes) - max(layer.unit_size for layer in layers) < left <= sum(sizes)


def test_one_threshold_lets_layers_differ() -> None:
    important, idle = layer_of((8, 5), seed=1), layer_of((8, 5), seed=2)
    pruner = Pruner([important, idle], [20, 20], Pruning(every=1, initial_warmup=0, final_warmup=1), 3)
    for step in (1, 2, 3):
        important.S.grad = torch.ones(8, 5)
        idle.S.grad = torch.full((8, 5), 1e-6)
        pruner.watch()
        pruner.prune(step)
    assert (int(important.kept.sum()), int(idle.kept.sum())) == (8, 0)
    assert pruner.remaining() == 0.5


def test_in_the_last_phase_nothing_comes_back() -> None:
    """What is zero when gradients are taken has no importance, and masks are renewed at every step."""
    layer = layer_of((12, 6))
    pruner = Pruner([layer], [24], Pruning(every=5, beta=0.0, initial_warmup=0, final_warmup=20), 40)
    generator = torch.Generator().manual_seed(1)
    kept = []
    for step in range(1, 41):
        layer.S.grad = torch.randn(12, 6, generator=generator)
        layer.S.grad[step // 5 % 12] *= 30
        pruner.watch()
        with torch.no_grad():
            layer.S -= 0.5 * layer.S.grad
        pruner.prune(step)
        kept.append(layer.kept.clone())
    assert any(bool((b & ~a).any()) for a, b in pairwise(kept[:20]))
    assert all(torch.equal(mask, kept[20]) for mask in kept[20:])
    assert int(kept[-1].sum()) == 4


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_gradients_that_overflowed_teach_nothing(bad: float) -> None:
    """In float16 the optimizer skips such a step; one of them must not decide for all time."""
    plain, disturbed = layer_of((6, 4)), layer_of((6, 4))
    pruners = [Pruner([x], [12], Pruning(every=2, initial_warmup=0, final_warmup=2), 8) for x in (plain, disturbed)]
    generator = torch.Generator().manual_seed(3)
    for step in range(1, 9):
        gradient = torch.randn(6, 4, generator=generator)
        for layer, pruner in zip((plain, disturbed), pruners, strict=True):
            layer.S.grad = gradient.clone()
            pruner.watch()
        disturbed.S.grad[2, 1] = bad
        pruners[1].watch()
        for pruner in pruners:
            pruner.prune(step)
        assert torch.equal(plain.kept, disturbed.kept)
        assert torch.equal(plain.smoothed, disturbed.smoothed)


def test_what_has_its_size_is_left_alone() -> None:
    """Neither phases nor masks: a compressed model that is only to recover."""
    layer, low_rank = layer_of((6, 4)), layer_of((6, 4), rank=2)
    low_rank.S = None
    pruner = Pruner([layer, low_rank], [24, 0], Pruning(initial_warmup=50, final_warmup=50), 3)
    before = layer.S.detach().clone()
    for step in (1, 2, 3):
        layer.S.grad = torch.ones(6, 4)
        pruner.watch()
        pruner.prune(step)
    assert torch.equal(layer.S, before)
    assert pruner.remaining() == 1.0
    nothing = Pruner([low_rank], [0], Pruning(initial_warmup=50, final_warmup=50), 3)
    nothing.watch()
    nothing.prune(3)
    assert nothing.remaining() == 0.0


def test_a_layer_without_gradients_is_the_least_important() -> None:
    """As an expert that no token went to."""
    busy, unused = layer_of((4, 4)), layer_of((4, 4), seed=1)
    pruner = Pruner([busy, unused], [16, 0], Pruning(every=1, initial_warmup=0, final_warmup=1), 2)
    for step in (1, 2):
        busy.S.grad = torch.ones(4, 4)
        pruner.watch()
        pruner.prune(step)
    assert (int(busy.kept.sum()), int(unused.kept.sum())) == (4, 0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"importance": "taylor"}, "--importance"), ({"threshold": "row"}, "--threshold"), ({"beta": 1.0}, "--beta"),
        ({"beta": -0.1}, "--beta"), ({"beta": float("nan")}, "--beta"),
    ],
)  # fmt: skip
def test_values_that_are_none(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Pruning(**wrong)


def test_phases_left_open_are_a_tenth_and_a_third() -> None:
    schedule = Pruning().schedule(1.0, 0.1, 100)
    assert (schedule.initial_warmup, schedule.final_warmup, schedule.every) == (10, 33, 10)
    for total in range(1, 12):  # however short
        assert Pruning().schedule(1.0, 0.1, total).remaining(total) == 0.1


@pytest.mark.parametrize("pattern", ["rows", "columns", "unstructured"])
def test_a_parameter_in_parts(pattern: str, tmp_path: Any) -> None:
    """As FSDP keeps it: a DTensor whose gradient is one, too."""
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        plain, parted = layer_of((6, 4), pattern), layer_of((6, 4), pattern)
        assert parted.S is not None
        parted.S = nn.Parameter(distribute_tensor(parted.S.detach(), mesh, [Shard(0)]))
        pruning = Pruning(every=2, initial_warmup=0, final_warmup=2)
        pruners = [Pruner([layer], [12], pruning, 6) for layer in (plain, parted)]
        generator = torch.Generator().manual_seed(3)
        for step in range(1, 7):
            gradient = torch.randn(6, 4, generator=generator)
            plain.S.grad = gradient
            parted.S.grad = distribute_tensor(gradient, mesh, [Shard(0)])
            for pruner in pruners:
                pruner.watch()
                pruner.prune(step)
        assert isinstance(parted.S, DTensor)
        assert torch.equal(plain.kept, parted.kept)
        assert torch.equal(plain.S, parted.S.full_tensor())
        assert pruners[0].remaining() == pruners[1].remaining() == 0.5
    finally:
        dist.destroy_process_group()
