"""LowRankSparseLinear against nn.Linear with U V + S as its weight: outputs, gradients, moves and copies."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losparse_cli.shim.codec import decode, encode, smallest
from losparse_cli.shim.layouts import candidates
from losparse_cli.shim.linear import LowRankSparseLinear

PATTERNS = ("bitmask", "csr", "gaps4", "gaps8", "rows", "columns", "n:m")
SHAPES = ((19, 28), (5, 8), (1, 12), (16, 4))  # (out, in)


def layer_of(
    layout: str, shape: tuple[int, int] = (19, 28), rank: int = 3, bias: bool = True, density: float = 0.3,
    dtype: torch.dtype = torch.float64, seed: int = 0,
) -> LowRankSparseLinear:  # fmt: skip
    """A random layer in one of the layouts; `density` does not count for n:m, which is 2:4."""
    from dataclasses import replace

    random = torch.Generator().manual_seed(seed)
    m, n = shape
    pattern = {"rows": "rows", "columns": "columns", "n:m": "2:4"}.get(layout, "unstructured")
    if layout == "n:m":
        support = (torch.rand(m, n // 4, 4, generator=random).argsort(-1) < 2).view(m, n)
    elif layout in ("rows", "columns"):
        line = torch.rand((m, 1) if layout == "rows" else (1, n), generator=random) < density
        support = line.expand(m, n).contiguous()
    else:
        support = torch.rand(m, n, generator=random) < density
    spec, index = smallest(support, rank, pattern)
    if layout in candidates(pattern, shape, spec.nnz):
        spec = replace(spec, layout=layout, group_rows=4 if layout.startswith("gaps") else 0)
        index = encode(spec, support)
        spec = replace(spec, index_bytes=index["S_gaps"].numel() if "S_gaps" in index else 0)
    layer = LowRankSparseLinear(spec, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random, dtype=torch.float64))
    layer.load_state_dict({**layer.state_dict(), **index})
    return layer


def parts(layer: LowRankSparseLinear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U, V, S and the support, dense and detached, without a method of the layer's but `support`."""
    m, n = layer.spec.shape
    empty = layer.weight.detach().new_zeros
    U = empty(m, 0) if layer.U is None else layer.U.detach().clone()
    V = empty(0, n) if layer.V is None else layer.V.detach().clone()
    support = layer.support()
    S = empty(m, n)
    S[support] = layer.weight.detach()
    return U, V, S, support


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("layout", PATTERNS)
def test_output_is_that_of_the_dense_layer(layout: str, density: float, rank: int, bias: bool) -> None:
    for shape in SHAPES:
        layer = layer_of(layout, shape, min(rank, *shape), bias, density)
        U, V, S, support = parts(layer)
        W = U @ V + S
        assert int(support.sum()) == layer.spec.nnz
        assert torch.equal(layer.sparse(), S)
        torch.testing.assert_close(layer.dense(), W.float(), rtol=1e-5, atol=1e-5)
        assert layer.dense().dtype == torch.float32
        for leading in ((), (1,), (7,), (2, 3), (0,), (4, 0)):
            x = torch.randn(*leading, shape[1], dtype=torch.float64)
            torch.testing.assert_close(layer(x), F.linear(x, W, layer.bias), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("layout", PATTERNS)
def test_gradients_are_the_dense_ones_at_the_stored_entries(layout: str, rank: int) -> None:
    layer = layer_of(layout, rank=rank)
    U, V, S, support = parts(layer)
    dense = [tensor.requires_grad_() for tensor in (U, V, S)]
    bias = layer.bias.detach().clone().requires_grad_()
    x = torch.randn(3, 5, 28, dtype=torch.float64, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    layer(x).pow(2).sum().backward()
    F.linear(twin, dense[0] @ dense[1] + dense[2], bias).pow(2).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(layer.bias.grad, bias.grad)
    torch.testing.assert_close(layer.weight.grad, S.grad[support])  # row-major, as it is stored
    assert layer.weight.grad.abs().min() > 0
    if rank:
        torch.testing.assert_close(layer.U.grad, U.grad)
        torch.testing.assert_close(layer.V.grad, V.grad)


@pytest.mark.parametrize("layout", PATTERNS)
def test_gradcheck(layout: str) -> None:
    layer = layer_of(layout, (5, 8), rank=2)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    parameters = dict(layer.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *parameters.values()))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("layout", PATTERNS)
def test_zeros_of_s_stay_zero_in_training(layout: str, optimizer: Any) -> None:
    layer = layer_of(layout, dtype=torch.float32)
    support, before = layer.support(), {n: p.detach().clone() for n, p in layer.named_parameters()}
    steps = optimizer(layer.parameters(), lr=0.01, weight_decay=0.3)
    for seed in range(4):
        x = torch.randn(6, 28, generator=torch.Generator().manual_seed(seed))
        layer(x).pow(2).mean().backward()
        steps.step()
        steps.zero_grad()
    assert all((p != before[name]).all() for name, p in layer.named_parameters())
    assert torch.equal(layer.sparse() != 0, support)


@pytest.mark.slow
def test_learns_what_a_dense_layer_of_that_form_can() -> None:
    teacher, student = (
        layer_of("bitmask", seed=1, dtype=torch.float32),
        layer_of("bitmask", seed=1, dtype=torch.float32),
    )
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    x = torch.randn(256, 28, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)

    def loss() -> Tensor:
        return (student(x) - teacher(x)).pow(2).mean()

    start = float(loss().detach())
    for _ in range(300):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < 1e-3 * start


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", PATTERNS)
def test_precision_follows_the_parameters(layout: str, dtype: torch.dtype) -> None:
    exact = layer_of(layout)
    layer = copy.deepcopy(exact).to(dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert {n: b.dtype for n, b in layer.named_buffers()} == {n: b.dtype for n, b in exact.named_buffers()}
    x = torch.randn(4, 28)
    y = layer(x.to(dtype))
    assert y.dtype == dtype
    error = (y.double() - exact(x.double())).abs().max() / exact(x.double()).abs().max()
    assert error < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("layout", PATTERNS)
def test_autocast(layout: str) -> None:
    layer = layer_of(layout, dtype=torch.float32)
    x = torch.randn(4, 28, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    y.float().sum().backward()
    assert layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), layer(x).float(), rtol=0.05, atol=0.3)


@pytest.mark.parametrize("layout", PATTERNS)
def test_a_new_index_is_seen_after_loading_and_moving(layout: str) -> None:
    layer, other = layer_of(layout, seed=0), layer_of(layout, seed=0)
    x = torch.randn(2, 28, dtype=torch.float64)
    layer(x)  # the index has been read
    old = layer.support()
    # Another support of as many entries and bytes: this one with its rows or its columns in reverse.
    others = [encode(layer.spec, s) for s in (old.flip(0), old.flip(1).contiguous()) if not torch.equal(s, old)]
    shapes = {n: t.shape for n, t in layer.state_dict().items() if n.startswith("S_")}
    index = next(i for i in others if {n: t.shape for n, t in i.items()} == shapes and _holds(layer, i))
    layer.load_state_dict({**layer.state_dict(), **index})
    assert not torch.equal(layer.support(), other.support())
    U, V, S, _ = parts(layer)
    torch.testing.assert_close(layer(x), F.linear(x, U @ V + S, layer.bias))
    empty = LowRankSparseLinear(layer.spec, bias=True, device="meta", dtype=torch.float64).to_empty(device="cpu")
    with torch.no_grad():
        for name, tensor in other.state_dict().items():  # filled in place, as by FSDP
            empty.state_dict()[name].copy_(tensor)
    assert torch.equal(empty(x), other(x))
    moved = layer.to("meta").to_empty(device="cpu")
    moved.load_state_dict(other.state_dict())
    assert torch.equal(moved(x), other(x))


def _holds(layer: LowRankSparseLinear, index: dict[str, Tensor]) -> bool:
    try:
        return int(decode(layer.spec, index).sum()) == layer.spec.nnz
    except ValueError:  # a group of 2:4 may not be read backwards
        return False


@pytest.mark.parametrize("layout", PATTERNS)
def test_copies_and_state_survive(layout: str) -> None:
    layer = layer_of(layout)
    x = torch.randn(2, 28, dtype=torch.float64)
    expected = layer(x)
    names = {"bias", *layer.spec.tensor_shapes(torch.float64)}
    assert set(layer.state_dict()) == names
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    fresh = LowRankSparseLinear(layer.spec, bias=True, dtype=torch.float64)
    fresh.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), torch.load(saved, weights_only=False), fresh):
        assert torch.equal(twin(x), expected)
        assert set(twin.state_dict()) == names
    with torch.no_grad():
        fresh.weight.zero_()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("layout", PATTERNS)
def test_inference_mode_first_and_training_after(layout: str) -> None:
    layer, fresh = layer_of(layout), layer_of(layout)
    x = torch.randn(2, 28, dtype=torch.float64)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    fresh(x).sum().backward()
    assert torch.equal(layer.weight.grad, fresh.weight.grad)


DAMAGED = [
    ("bitmask", "S_mask", lambda t: t ^ 1), ("csr", "S_columns", lambda t: t * 0), ("gaps4", "S_gaps", lambda t: t * 0),
    ("gaps8", "S_offsets", lambda t: t * 0), ("rows", "S_rows", lambda t: t * 0), ("rows", "S_rows", lambda t: t + 19),
    ("columns", "S_columns", lambda t: t * 0), ("columns", "S_columns", lambda t: t - 28),
    ("n:m", "S_index", lambda t: t * 0),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "name", "change"), DAMAGED)
def test_a_damaged_index_is_refused_and_never_computed_with(layout: str, name: str, change: Any) -> None:
    layer = layer_of(layout)
    index = change(getattr(layer, name).long()).to(getattr(layer, name).dtype)
    layer.load_state_dict({**layer.state_dict(), name: index})
    for use in (lambda: layer(torch.randn(2, 28, dtype=torch.float64)), layer.support, layer.sparse, layer.dense):
        with pytest.raises(ValueError, match=r"S_|index of S"):
            use()


def test_holds_no_more_than_a_bit_an_entry_beside_what_is_stored() -> None:
    for layout in PATTERNS:
        layer = layer_of(layout, (64, 160), dtype=torch.bfloat16)
        layer(torch.randn(2, 160, dtype=torch.bfloat16))
        stored = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
        held = [t for t in vars(layer).values() if isinstance(t, Tensor)]
        extra = sum(t.untyped_storage().nbytes() for t in held if t.untyped_storage().data_ptr() not in stored)
        assert extra <= (0 if layout in ("bitmask", "rows", "columns") else 64 * 160 // 8), layout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", PATTERNS)
def test_on_a_gpu_it_is_the_same_layer(layout: str) -> None:
    layer = layer_of(layout)
    twin = copy.deepcopy(layer).cuda()
    x = torch.randn(5, 28, dtype=torch.float64)
    layer(x).pow(2).sum().backward()
    twin(x.cuda()).pow(2).sum().backward()
    torch.testing.assert_close(twin(x.cuda()).cpu(), layer(x))
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.grad.cpu(), layer.get_parameter(name).grad)
    assert torch.equal(twin.support().cpu(), layer.support())
    back = twin.cpu()
    assert torch.equal(back(x), layer(x))
    encoded = encode(layer.spec, layer.support().cuda())
    assert all(torch.equal(encoded[name].cpu(), buffer) for name, buffer in layer.named_buffers())


def test_says_what_it_is() -> None:
    text = repr(layer_of("gaps4"))
    for fact in ("in_features=28", "out_features=19", "rank=3", "layout=gaps4", "bias=True"):
        assert fact in text
    assert isinstance(layer_of("gaps4"), nn.Module)
