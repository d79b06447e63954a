"""Products with codes in few bits against float64, in every instruction set, and what surrounds them."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import arm
import pytest
import torch
import torch.nn.functional as F
from products import TOLERANCE, coded, needs_compiler
from torch import Tensor

from losparse_cli import kernels
from losparse_cli.kernels import cpu, dispatch, native
from losparse_cli.shim import kept, operator
from losparse_cli.shim.layouts import column_factors

pytestmark = pytest.mark.usefixtures("installed_kernels")
SIZES = [(1, 1), (7, 13), (16, 64), (1, 576), (130, 1537), (257, 32)]


def close(y: Tensor, x: Tensor, W: Tensor, bias: Tensor | None) -> bool:
    expected = F.linear(x.double(), W, None if bias is None else bias.double()).detach()
    norm = expected.norm() if y.numel() > 8 else (x.double().abs() @ W.abs().T).norm()
    assert y.shape == expected.shape
    return float((y.double() - expected).norm() / norm) < TOLERANCE[y.dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("way", ["digits", "tile", "reference", None])
def test_every_way_is_the_product(way: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if way:
        monkeypatch.setenv("LOSPARSE_KERNEL", way)
    kernels.install()
    for k, (shape, bits) in enumerate(itertools.product(SIZES, range(2, 9))):
        layer, W = coded(shape, bits, rank=k % 3 * 4, bias=k % 2 == 0, dtype=dtype)
        for rows in (1, 2, 17, 70):
            x = torch.randn(rows, shape[1]).to(dtype)
            with torch.no_grad():
                assert close(layer(x), x, W, layer.bias)


def test_every_instruction_set_is_the_product(instructions: str) -> None:
    for bits, dtype, rows in itertools.product(range(2, 9), (torch.bfloat16, torch.float32), (1, 5, 33, 90)):
        layer, W = coded((70, 333), bits, dtype=dtype)
        assert layer.form == f"codes{bits}"
        x = torch.randn(rows, 333).to(dtype)
        with torch.no_grad():
            assert close(layer(x), x, W, None)
    if instructions in arm.LEVELS:
        assert native.library().calls["coded"]  # type: ignore[union-attr]


@needs_compiler
@pytest.mark.parametrize("entries", [1000, cpu.CODED_ENTRIES], ids=["tiles", "whole"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_products_in_tiles_and_the_way_back(dtype: torch.dtype, entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CODED_ENTRIES", entries)
    for k, bits in enumerate(range(2, 9)):
        layer, W = coded((70, 333), bits, rank=k % 2 * 4, bias=k % 3 == 0, dtype=dtype)
        x = torch.randn(2, 90, 333).to(dtype)
        with torch.inference_mode():  # in which nothing may be made that is changed afterwards
            y = layer(x)
        assert close(y.clone().view(180, 70), x.view(180, 333), W, layer.bias)
        leaf, target = x.clone().requires_grad_(), torch.randn(90, 2, 70).to(dtype).transpose(0, 1)
        layer(leaf).backward(target)
        assert leaf.grad is not None
        assert close(leaf.grad.view(180, 333), target.reshape(180, 70), W.T, None)


@pytest.mark.parametrize("way", ["reference", None])
def test_many_tiles_round_no_more_than_one(way: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors that multiply bfloat16 themselves, and in plain torch."""
    if way:
        monkeypatch.setenv("LOSPARSE_KERNEL", way)
    kernels.install()
    monkeypatch.setattr(dispatch, "_multiplied", lambda code, dtype: dtype)
    layer, W = coded((2048, 64), 4, dtype=torch.bfloat16)
    target, errors = torch.randn(70, 2048).bfloat16(), list[float]()
    for entries in (1 << 22, 2048):
        monkeypatch.setattr(cpu, "CODED_ENTRIES", entries)
        monkeypatch.setattr(operator, "BLOCK", entries)
        x = torch.randn(70, 64).bfloat16().requires_grad_()
        layer(x).backward(target)
        expected = target.double() @ W
        errors.append(float((x.grad.double() - expected).norm() / expected.norm()))  # type: ignore[union-attr]
    assert errors[1] < 1.5 * errors[0]


@needs_compiler
def test_what_is_kept_for_tiles_lies_where_the_kernels_run() -> None:
    """Whatever device torch makes tensors on otherwise."""
    layer, W = coded((70, 333), 4)
    x = torch.randn(90, 333)
    cpu._kept.__dict__.clear()
    with torch.device("meta"), torch.no_grad():
        assert close(layer(x), x, W, None)


@needs_compiler
def test_the_way_back_needs_no_dense_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = coded((64, 128), 4)
    monkeypatch.setattr(operator, "sparse", lambda *arguments: pytest.fail("a tile at a time is enough"))
    x = torch.randn(5, 128, requires_grad=True)
    layer.requires_grad_(False)(x).sum().backward()
    assert x.grad is not None


def test_the_worst_sums_do_not_overflow(instructions: str) -> None:
    """Largest codes times largest digits, all of one sign, over as many columns as there may be."""
    columns = 640 if instructions in arm.LEVELS else 65535  # emulated, all would take minutes
    for bits in range(2, 9):
        layer, _ = coded((8, columns), bits)
        for q in (-(1 << bits - 1), (1 << bits - 1) - 1):
            codes = torch.full((8, columns), q)
            index = kernels.dispatch.Kernels().packed(codes.to(torch.int16), bits, 0)
            layer._index, layer._form, layer._ready = index, f"codes{bits}", None
            x = torch.ones(2, columns)
            with torch.no_grad():
                assert close(layer(x), x, codes * column_factors(layer._starts) * layer.weight.double()[:, None], None)


@pytest.mark.usefixtures("instructions")
def test_numbers_that_are_none_stay_so() -> None:
    layer, _ = coded((16, 64), 4)
    for wrong in (float("nan"), float("inf")):
        x = torch.randn(3, 64)
        x[1, 5] = wrong
        with torch.no_grad():
            y = layer(x)
        assert y[[0, 2]].isfinite().all()
        assert not y[1].isfinite().any()
    with torch.no_grad():
        assert torch.equal(layer(torch.zeros(2, 64)), torch.zeros(2, 16))
        assert layer(torch.zeros(0, 64)).shape == (0, 16)
        assert layer(torch.full((1, 64), 1e-42)).isfinite().all()
        assert layer(torch.full((1, 64), 1e30)).isfinite().all()
    with pytest.raises(RuntimeError, match="63 features"):
        layer(torch.zeros(2, 63))


@needs_compiler
def test_gradients_are_those_of_the_dense_product() -> None:
    layer, W = coded((24, 40), 4, rank=3, bias=True)
    x = torch.randn(5, 40, requires_grad=True)
    layer(x).square().sum().backward()
    y = F.linear(x.detach().double(), W, layer.bias.double())
    torch.testing.assert_close(x.grad.double(), 2 * y.detach() @ W, rtol=1e-4, atol=1e-3)
    S = (W - layer.U.double() @ layer.V.double()) / layer.weight.double()[:, None]
    expected = ((2 * y.T @ x.detach().double()) * S).sum(1).detach()
    torch.testing.assert_close(layer.weight.grad.double(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.usefixtures("instructions")
def test_what_is_stored_again_is_what_was_read() -> None:
    for bits in (2, 4, 8):
        layer, _ = coded((33, 65), bits)
        state = layer.state_dict()
        codes, _ = kept.decode(state["S_codes"], (33, 65))
        again = copy.deepcopy(layer)
        again.load_state_dict(state)
        assert again.form == "codes"
        assert torch.equal(again.state_dict()["S_codes"], state["S_codes"])
        again.settle()
        assert again.form == layer.form == f"codes{bits}"
        assert torch.equal(again.dense(), layer.dense())
        assert int(codes.count_nonzero()) == layer.spec.nnz == int(layer.support().sum())


@pytest.mark.parametrize("way", ["reference", None])
def test_of_a_wide_head_some_rows_are_floats_at_a_time(way: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards and backwards, with gradients of the factors of its rows."""
    if way:
        monkeypatch.setenv("LOSPARSE_KERNEL", way)
    kernels.install()
    layer, W = coded((700, 48), 5)
    plain, asked = operator.rows_of_codes, list[int]()

    def watched(rows: slice, *arguments: Any) -> Tensor:
        found = plain(rows, *arguments)
        asked.append(found.numel())
        return found

    monkeypatch.setattr(operator, "BLOCK", 4800)
    monkeypatch.setattr(operator, "rows_of_codes", watched)
    x, target = torch.randn(9, 48, requires_grad=True), torch.randn(9, 700)
    assert not layer._trains_rows(torch.float32)
    layer(x).backward(target)
    assert x.grad is not None
    assert layer.weight.grad is not None
    assert close(x.grad, target, W.T, None)
    of_rows = ((target.double().T @ x.detach().double()) * W).sum(1) / layer.weight.detach().double()
    torch.testing.assert_close(layer.weight.grad.double(), of_rows, rtol=1e-4, atol=1e-4)
    assert asked
    assert max(asked) <= 4800
