"""Layers as an engine wants them: one below the other, and for each rank its rows or columns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from losparse_cli.budget.plan import Layer, LayerPlan
from losparse_cli.checkpoint.layers import encode_layer
from losparse_cli.linalg.factors import LowRankCodes, LowRankSparse
from losparse_cli.linalg.patterns import parse_pattern, select
from losparse_cli.serving.parts import Part, Ranges, layers, product
from losparse_cli.shim.layouts import COLUMN_FACTORS, LayerSpec

PATTERNS = ("unstructured", "rows", "columns", "2:4")
KINDS = ("codes", "dense", *PATTERNS)


def stored(kind: str, m: int, n: int, rank: int, seed: int = 0) -> tuple[LayerSpec | None, dict[str, Tensor], Tensor]:
    """Spec and tensors by suffix of a random layer, as a checkpoint holds them, and its dense weight."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    W = random(m, n)
    if kind == "dense":
        return None, {"weight": W}, W
    U, V = random(m, rank), random(rank, n)
    plan = LayerPlan(
        Layer("layer", "layer.weight", "layer", (m, n), 4), rank, m * n // 2, "unstructured", "matrix", 1, 0, 0
    )
    factors: Any
    if kind == "codes":
        # The same columns for every layer of the same width, as layers that read the same input have them.
        columns = COLUMN_FACTORS[torch.arange(n) % 24 + 116]
        factors = LowRankCodes(U, V, random(m).abs(), columns, (3 * W).round().int())
    else:
        support = select(W, parse_pattern(kind), m * n // 2, "matrix")
        factors = LowRankSparse(U, V, W[support], support)
        plan = LayerPlan(plan.layer, rank, m * n // 2, kind, "matrix", 1, 0, 0)
    spec, tensors = encode_layer(plan, factors)
    return spec, tensors, factors.dense()


def part(name: str, kind: str, m: int, n: int, rank: int, **share: Any) -> tuple[Part, Tensor]:
    spec, tensors, W = stored(kind, m, n, rank, len(name))
    made = Part(name, spec, **share)
    for suffix, tensor in tensors.items():
        made.take(suffix, tensor)
    return made, W


def cut(size: int, rank: int, ranks: int) -> tuple[int, int]:
    return rank * size // ranks, (rank + 1) * size // ranks


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_share_rows_give_the_whole(kind: str, rank: int, ranks: int) -> None:
    x, found = torch.randn(5, 24), []
    for k in range(ranks):
        one, W = part("q", kind, 16, 24, rank, rows=[cut(16, k, ranks)])
        found.append(product(layers([one], torch.float32, torch.device("cpu")), x))
    torch.testing.assert_close(torch.cat(found, -1), x @ W.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_that_share_columns_sum_to_the_whole(kind: str, rank: int, ranks: int) -> None:
    x, found = torch.randn(5, 24), torch.zeros(5, 16)
    for k in range(ranks):
        one, W = part("o", kind, 16, 24, rank, columns=cut(24, k, ranks))
        own = x[:, slice(*cut(24, k, ranks))]
        found += product(layers([one], torch.float32, torch.device("cpu")), own)
    torch.testing.assert_close(found, x @ W.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("second", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_layers_one_below_the_other(first: str, second: str) -> None:
    """Of unequal ranks, sizes and kinds; of one kind they become one layer."""
    x = torch.randn(2, 7, 24)
    (q, Q), (k, K) = part("q", first, 16, 24, 2), part("kk", second, 8, 24, 0 if second == "dense" else 3)
    made = layers([q, k], torch.float32, torch.device("cpu"))
    assert len(made) == (1 if first == second or {first, second} <= set(PATTERNS) else 2)
    torch.testing.assert_close(product(made, x), x @ torch.cat((Q, K)).T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["codes", "unstructured"])
def test_a_layer_that_is_fused_on_disk(kind: str) -> None:
    """Its rows of q, k and v lie apart, and a rank has some of each."""
    x, rows = torch.randn(3, 24), [(4, 8), (10, 12), (14, 16)]
    one, W = part("qkv", kind, 16, 24, 2, rows=rows)
    found = product(layers([one], torch.float32, torch.device("cpu")), x)
    torch.testing.assert_close(found, x @ torch.cat([W[a:b] for a, b in rows]).T, rtol=1e-4, atol=1e-4)


def test_what_is_missing_or_too_much_is_named() -> None:
    spec, tensors, _ = stored("codes", 16, 24, 0)

    def arrived(*suffixes: str, rows: Ranges | None = None) -> Part:
        one = Part("model.layers.3.q_proj", spec, rows)
        for suffix in suffixes:
            one.take(suffix, tensors[suffix])
        return one

    with pytest.raises(ValueError, match=r"hold no model.layers.3.q_proj.S_scale"):
        arrived("weight", "S_codes").factors(torch.float32)
    with pytest.raises(ValueError, match=r"q_proj.weight twice"):
        arrived("weight", "weight")
    with pytest.raises(ValueError, match=r"q_proj.S_mask, of which config.json says nothing"):
        Part("q_proj", spec).take("S_mask", torch.zeros(1))
    damaged = arrived("weight", "S_codes", "S_scale")
    damaged.tensors["S_codes"][-3] ^= 1
    with pytest.raises(ValueError, match=r"Layer model.layers.3.q_proj cannot be read"):
        damaged.factors(torch.float32)
    short = arrived("weight", "S_codes", "S_scale")
    short.tensors["weight"] = short.tensors["weight"][:-1]
    with pytest.raises(ValueError, match=r"q_proj.weight has shape \(15,\) in the weights and \(16,\)"):
        short.factors(torch.float32)
