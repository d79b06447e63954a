"""Codes of which a pattern left some rows or columns: in memory, too, nothing is held of the others."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from products import TOLERANCE, needs_compiler
from torch import Tensor

from losparse_cli.shim import installed, kept, linear, operator, streams
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
    return S if layer.U is None or layer.V is None else S + layer.U.double() @ layer.V.double()


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


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(("pattern", "count"), [("rows", 40), ("columns", 70), ("rows", M)])
@pytest.mark.parametrize("rows", ["many", "few"])
def test_gradients_are_those_of_the_dense_weight(
    pattern: str, count: int, rank: int, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether factors of rows come after the product, or in it as in an output head."""
    monkeypatch.setattr(linear, "MOST_ROWS", 8 if rows == "few" else 0)
    layer = layer_of(pattern, count, rank=rank)
    assert layer._trains_rows(torch.float32) == (rows == "few")
    x = torch.randn(5, N, requires_grad=True)
    target = torch.randn(5, M)
    y = layer(x)
    (y * target).sum().backward()
    with torch.no_grad():
        whole = F.linear(x.double(), dense_of(layer), layer.bias.double())
        torch.testing.assert_close(y.double(), whole, rtol=1e-4, atol=1e-3)
        expected = target.double() @ dense_of(layer)
        codes = layer.codes * column_factors(layer._starts).double()
        of_rows = ((target.double().T @ x.double()) * codes).sum(1)
    torch.testing.assert_close(x.grad, expected.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.weight.grad, of_rows.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, target.sum(0))
    if rank:
        assert layer.V is not None
        torch.testing.assert_close(layer.V.grad, layer.U.T @ target.T @ x, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_factors_of_rows_costs_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of("rows", M)
    monkeypatch.setattr(operator, "_values_of_outer", lambda *arguments: pytest.fail("gᵀ x is not needed"))
    layer(torch.randn(5, N)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("trained", [(), ("bias",), ("weight",), ("U",), ("V",)], ids=str)
def test_what_flowed_in_is_kept_for_the_way_back_where_it_is_needed(trained: tuple[str, ...]) -> None:
    layer = layer_of("rows", M).requires_grad_(False)
    for name in trained:
        getattr(layer, name).requires_grad_()
    x, kept_ones = torch.randn(5, N, requires_grad=True), list[int]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept_ones.append(t.data_ptr()) or t, lambda t: t):
        y = layer(x)
    assert (x.data_ptr() in kept_ones) == (trained in (("U",), ("V",)))
    y.sum().backward()
    torch.testing.assert_close(x.grad, dense_of(layer).sum(0).float().expand(5, N), rtol=1e-4, atol=1e-4)


def test_small_changes_of_the_factors_of_rows_are_felt_in_training() -> None:
    """Below what bfloat16 resolves, about one in 256."""
    layer = layer_of("rows", M, rank=0)
    layer.bias = None
    x = torch.randn(64, N, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        before = layer(x)
        with torch.no_grad():
            layer.weight.mul_(1 + 2**-10)
        after = layer(x)
    assert before.dtype == torch.bfloat16
    before, after = before.detach(), after.detach()
    assert float(after.float().abs().sum() / before.float().abs().sum()) == pytest.approx(1 + 2**-10, abs=2**-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.int64])
@pytest.mark.parametrize("trains", [False, True])
def test_another_dtype_is_refused_in_training_as_without(trains: bool, dtype: torch.dtype) -> None:
    layer = layer_of("rows", M, rank=0)
    layer.bias = None
    with torch.set_grad_enabled(trains), pytest.raises(RuntimeError):
        layer(torch.ones(130, N).to(dtype))


@pytest.mark.parametrize("autocast", [False, True])
def test_float16_is_too_narrow_for_products_without_factors(autocast: bool) -> None:
    layer = layer_of("rows", M, rank=0, dtype=torch.float32 if autocast else torch.float16)
    with torch.no_grad():
        layer.weight.mul_(2**-13)
        layer.bias.zero_()
    x = torch.randn(64, N, generator=torch.Generator().manual_seed(0)) * 2**12
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        y = layer(x.to(layer.weight.dtype))
    (y.float() * 2**-12).sum().backward()
    assert y.isfinite().all()
    assert layer.weight.grad.isfinite().all()


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
