"""The form in which a layer is trained: the same product, the same gradients, and factors that fit its masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from losparse_cli.finetuning.layers import TrainedLinear
from losparse_cli.linalg.factors import LowRankSparse

M, N = 9, 7
FORMS = [(pattern, dense) for pattern in ("rows", "columns", "unstructured") for dense in (True, False)]


def factors_of(pattern: str, rank: int, dense: bool, seed: int = 0) -> LowRankSparse:
    generator = torch.Generator().manual_seed(seed)
    support = torch.ones(M, N, dtype=torch.bool)
    if not dense:
        kept = {"rows": [1, 4, 8], "columns": [0, 5]}
        if pattern == "unstructured":
            support = torch.rand(M, N, generator=generator) < 0.3
        else:
            support = torch.zeros(M, N, dtype=torch.bool)
            (support if pattern == "rows" else support.T)[kept[pattern]] = True
    U, V = torch.randn(M, rank, generator=generator), torch.randn(rank, N, generator=generator)
    return LowRankSparse(U, V, torch.randn(int(support.sum()), generator=generator), support)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(("pattern", "dense"), FORMS)
def test_the_product_and_its_gradients(pattern: str, dense: bool, rank: int, bias: bool) -> None:
    factors = factors_of(pattern, rank, dense)
    b = torch.randn(M) if bias else None
    layer = TrainedLinear(factors, b, pattern=pattern, dense=dense)
    U, V, S = (x.clone().requires_grad_() for x in (factors.U, factors.V, factors.sparse()))
    x, probe = torch.randn(2, 5, N), torch.randn(2, 5, M)
    expected = F.linear(x, U @ V + S, b)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.weight, U @ V + S)
    (layer(x) * probe).sum().backward()
    (expected * probe).sum().backward()
    assert S.grad is not None
    if rank:
        torch.testing.assert_close(layer.U.grad, U.grad)
        torch.testing.assert_close(layer.V.grad, V.grad)
    else:
        assert layer.U is layer.V is None
    units = {"rows": S.grad, "columns": S.grad.T, "unstructured": S.grad.reshape(-1, 1)}[pattern]
    alive = {"rows": factors.support.any(1), "columns": factors.support.any(0)}.get(pattern, factors.support.flatten())
    torch.testing.assert_close(layer.mean_of_units(layer.S.grad), units[alive].mean(1))
    assert len(layer.kept) == int(alive.sum())
    assert (layer.bias is None) == (not bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("pattern", "dense"), FORMS)
def test_there_and_back(pattern: str, dense: bool, dtype: torch.dtype) -> None:
    factors = factors_of(pattern, 3, dense)
    layer = TrainedLinear(factors, None, pattern=pattern, dense=dense)
    again = layer.factors(dtype)
    for part in ("U", "V", "values"):
        assert torch.equal(getattr(again, part), getattr(factors, part).to(dtype))
    assert torch.equal(again.support, factors.support)


@pytest.mark.parametrize(("pattern", "dense"), FORMS)
def test_what_is_pruned_is_not_written(pattern: str, dense: bool) -> None:
    factors = factors_of(pattern, 2, dense)
    layer = TrainedLinear(factors, None, pattern=pattern, dense=dense)
    with torch.no_grad():
        layer.kept[1::2] = False
        layer.S *= layer.mask()
        found = layer.factors(torch.float32)
        assert found.nnz == int(layer.kept.sum()) * layer.unit_size < factors.nnz
        assert bool((factors.support | ~found.support).all())  # within what was there
        torch.testing.assert_close(found.dense(), layer.weight)
    if pattern == "rows":
        assert set(found.support.sum(1).tolist()) == {0, N}
    if pattern == "columns":
        assert set(found.support.sum(0).tolist()) == {0, M}


def test_without_s() -> None:
    support = torch.zeros(M, N, dtype=torch.bool)
    U, V = torch.randn(M, 2), torch.randn(2, N)
    layer = TrainedLinear(LowRankSparse(U, V, torch.zeros(0), support), None, pattern="rows", dense=False)
    assert layer.S is None
    x = torch.randn(4, N)
    torch.testing.assert_close(layer(x), x @ (U @ V).T)
    torch.testing.assert_close(layer.weight, U @ V)
    found = layer.factors(torch.float32)
    assert (found.nnz, found.rank) == (0, 2)
    assert not found.support.any()


def test_what_was_given_is_left_alone() -> None:
    factors, bias = factors_of("rows", 2, True), torch.ones(M)
    kept: list[Tensor] = [x.clone() for x in (factors.U, factors.V, factors.values, bias)]
    layer = TrainedLinear(factors, bias, pattern="rows", dense=True)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 1
    assert all(torch.equal(a, b) for a, b in zip((factors.U, factors.V, factors.values, bias), kept, strict=True))
