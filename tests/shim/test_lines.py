"""Codes of which a pattern left some rows or columns: in memory, too, nothing is held of the others."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from products import TOLERANCE, needs_compiler
from torch import Tensor

from losparse_cli.shim import installed, kept, streams
from losparse_cli.shim.layouts import LayerSpec, column_factors
from losparse_cli.shim.linear import LowRankSparseLinear

pytestmark = [pytest.mark.usefixtures("installed_kernels"), needs_compiler]
M, N = 96, 160


def layer_of(pattern: str, count: int, *, rank: int = 3, dtype: torch.dtype = torch.float32) -> LowRankSparseLinear:
    """Settled, with `count` rows or columns that are not zero, but for zeros among their codes."""
    axis = 0 if pattern == "rows" else 1
    generator = torch.Generator().manual_seed(count)
    codes = torch.randint(-7, 8, (M, N), generator=generator)
    codes.index_fill_(axis, torch.randperm((M, N)[axis], generator=generator)[count:], 0)
    zero = streams.Contexts(torch.zeros(M).byte(), torch.zeros(N).byte(), 1, 20, 1, 4)
    lines = codes.any(1 - axis)
    part = codes[lines] if axis == 0 else codes[:, lines]
    contexts = streams.Contexts(zero.rows[: len(part)], zero.columns[: part.shape[1]], 1, 20, 1, 4)
    stream = kept.encode(codes, kept.Kept(contexts, pattern == "rows", pattern == "columns"))
    spec = LayerSpec((M, N), rank, int(codes.count_nonzero()), pattern, "codes", index_bytes=stream.numel())
    layer = LowRankSparseLinear(spec, bias=True, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        layer.weight.copy_(torch.rand(M, generator=generator) + 0.5)
        layer.S_codes.copy_(stream)
        layer.S_scale.copy_(torch.randint(100, 140, (N,), generator=generator))
    layer.codes, layer.stream = codes, stream  # type: ignore[assignment]
    layer.settle()
    return layer


def dense_of(layer: LowRankSparseLinear) -> Tensor:
    S = layer.codes * column_factors(layer._starts).double() * layer.weight.double()[:, None]  # type: ignore[operator, arg-type]
    assert layer.U is not None
    assert layer.V is not None
    return S + layer.U.double() @ layer.V.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("pattern", "count"), [("rows", 40), ("rows", 1), ("columns", 80), ("columns", 7)])
def test_products_gradients_and_what_is_stored_again(pattern: str, count: int, dtype: torch.dtype) -> None:
    layer = layer_of(pattern, count, dtype=dtype)
    assert layer.form == f"codes4@{pattern}{count}"
    W = dense_of(layer)
    for shape in ((N,), (1, N), (2, 3, N), (130, N), (0, N)):
        x = torch.randn(shape).to(dtype)
        with torch.no_grad():
            expected = F.linear(x.double(), W, layer.bias.double())
            y = layer(x)
        assert y.shape == expected.shape
        assert y.dtype == dtype
        assert float((y.double() - expected).norm()) <= TOLERANCE[dtype] * float(expected.norm())
    torch.testing.assert_close(layer.dense().double(), W, rtol=1e-4, atol=1e-4)
    assert torch.equal(layer.support(), layer.codes != 0)
    assert torch.equal(layer.state_dict()["S_codes"], layer.stream)
    again = copy.deepcopy(layer)
    again.load_state_dict(layer.state_dict())
    again.settle()
    assert again.form == layer.form
    assert torch.equal(again._index, layer._index)


@pytest.mark.parametrize(("pattern", "count"), [("rows", 40), ("columns", 70)])
def test_gradients_are_those_of_the_dense_weight(pattern: str, count: int) -> None:
    layer = layer_of(pattern, count)
    x = torch.randn(5, N, requires_grad=True)
    target = torch.randn(5, M)
    (layer(x) * target).sum().backward()
    with torch.no_grad():
        expected = target.double() @ dense_of(layer)
        codes = layer.codes * column_factors(layer._starts).double()
        of_rows = ((target.double().T @ x.double()) * codes).sum(1)
    torch.testing.assert_close(x.grad, expected.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, of_rows.float(), rtol=1e-4, atol=1e-4)
    assert layer.V is not None
    assert layer.V.grad is not None


def test_memory_is_that_of_the_lines_that_are_kept() -> None:
    few, all_of_them = layer_of("columns", 16), layer_of("columns", N)
    assert all_of_them.form == "codes4"
    assert few._index.numel() < 0.25 * all_of_them._index.numel()
    assert layer_of("rows", 90).form == "codes4"  # too many to be worth the detour


def test_without_kernels_codes_stay_as_they_are() -> None:
    with_them = layer_of("rows", 30)
    installed.install(None)
    plainly = layer_of("rows", 30)
    assert plainly.form == "codes"
    x = torch.randn(4, N)
    torch.testing.assert_close(with_them(x), plainly(x), rtol=1e-4, atol=1e-4)  # of a form that is there already, too


def test_torch_compile_sees_through_it() -> None:
    layer = layer_of("columns", 40)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, N)
    torch.testing.assert_close(compiled(x), layer(x))
