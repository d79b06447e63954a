"""Kernels for GPUs against products in float64: in Triton's interpreter, and on a CUDA device where there is one.

The interpreter is another Triton altogether, chosen when it is imported, so these tests run once more in a process of
their own, where its environment variable is set.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
import time

import pytest
import torch
from torch import Tensor

from losparse_cli.kernels import dispatch, gpu, install
from losparse_cli.shim import operator
from losparse_cli.shim.codec import pack_bits

TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}
CASES = [
    # out, in, rows of x, density, rank, bias, dtype
    (1, 7, 1, 0.5, 0, False, torch.float32),
    (1, 1, 1, 1.0, 0, True, torch.bfloat16),
    (7, 1, 3, 1.0, 8, True, torch.float32),
    (7, 13, 3, 0.1, 8, True, torch.bfloat16),
    (13, 7, 16, 0.5, 0, True, torch.float16),
    (13, 1000, 1, 0.1, 8, True, torch.bfloat16),
    (13, 1000, 3, 0.5, 8, False, torch.float32),
    (13, 1000, 16, 1.0, 0, False, torch.bfloat16),
    (13, 1001, 16, 0.1, 8, True, torch.float32),
    (100, 64, 2, 0.5, 70, True, torch.float16),
    (33, 2064, 1, 0.001, 70, True, torch.float32),
    (33, 2064, 16, 0.001, 8, False, torch.float16),
    (7, 576, 1, 0.5, 8, True, torch.float32),
    (64, 576, 16, 0.5, 8, True, torch.bfloat16),
]


def layer(
    m: int, n: int, density: float, rank: int, bias: bool, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """S, and what the operator takes: values, index, starts, U, V, bias. What pads a row's bits is set, as junk."""
    random = torch.Generator().manual_seed(m * n)
    where = torch.rand(m, n, generator=random) < density
    where[-1, -1] = True
    counts = where.sum(1)
    S = (torch.randn(m, n, generator=random) * where).to(dtype)
    bits = pack_bits(where)
    if n % 8:
        bits[:, -1] |= 255 << n % 8 & 255
    parts = (
        S[where],
        bits,
        torch.cat((counts.new_zeros(1), counts.cumsum(0))).int(),
        torch.randn(m, rank, generator=random).to(dtype) if rank else None,
        (torch.randn(rank, n, generator=random) / n**0.5).to(dtype) if rank else None,
        torch.randn(m, generator=random).to(dtype) if bias else None,
    )
    return S.to(device), tuple(part if part is None else part.to(device) for part in parts)


def error(y: Tensor, x: Tensor, S: Tensor, parts: tuple[Tensor | None, ...]) -> float:
    """Relative to the product in float64."""
    _, _, _, U, V, bias = parts
    exact = x.double() @ S.double().T
    if U is not None and V is not None:
        exact = exact + x.double() @ V.double().T @ U.double().T
    if bias is not None:
        exact = exact + bias.double()
    return float((y.double() - exact).norm() / exact.norm())


def test_in_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed; its interpreter needs no GPU: pip install triton")
    ran = subprocess.run(
        [sys.executable, __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("ok ") == len(CASES)


def interpret() -> None:
    """`few`, `many` and `dense` for all CASES; what the process above runs."""
    assert gpu.available(torch.device("cpu"))
    torch.set_num_threads(1)
    for m, n, rows, density, rank, bias, dtype in CASES:
        started = time.perf_counter()
        S, parts = layer(m, n, density, rank, bias, dtype)
        values, index, starts = parts[:3]
        before = torch.empty(0) if parts[5] is None else parts[5].clone()
        x = torch.randn(rows, n, generator=torch.Generator().manual_seed(rows)).to(dtype)
        assert torch.equal(gpu.dense(values, index, starts, m, n), S)
        gpu.TILE_BYTES = 5 * n * x.element_size()  # several tiles, the last one smaller
        for work in (gpu.few, gpu.many):
            y = work(x, *parts, m, n)
            assert y.shape == (rows, m)
            assert y.dtype == dtype
            assert error(y, x, S, parts) < TOLERANCE[dtype], (work.__name__, m, n, rows, density, rank, bias, dtype)
        chosen = dispatch.Kernels()._sparse_on_gpu(x, *parts, m, "bits")
        assert chosen is not None
        assert torch.equal(chosen, gpu.few(x, *parts, m, n))
        turned = dispatch.Kernels()._sparse_on_gpu(x.T.contiguous().T, *parts, m, "bits")
        assert turned is not None
        assert torch.equal(chosen, turned)
        assert dispatch.Kernels()._sparse_on_gpu(x, *parts, m, "gaps") is None
        assert parts[5] is None or torch.equal(parts[5], before)
        print(f"ok {m} x {n}, {rows} rows: {time.perf_counter() - started:.1f} s")


def test_without_triton_nothing_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not gpu.available(torch.device("cpu"))
    monkeypatch.setattr(gpu, "_kernels", lambda: None)
    assert not gpu.available(torch.device("cuda"))


def test_triton_that_fails_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: object) -> Tensor:
        raise ValueError("no such processor\nand much else")

    monkeypatch.setattr(gpu, "few", fails)
    monkeypatch.setattr(gpu, "_failed", False)
    _, parts = layer(3, 8, 0.5, 0, False, torch.float32)
    with caplog.at_level(logging.WARNING, "losparse"):
        assert gpu.product("triton", torch.ones(1, 8), *parts, 3, 8) is None
    assert [record.message for record in caplog.records] == [
        "Compressed layers run on slower kernels, because Triton failed: no such processor"
    ]
    assert not gpu.available(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case: tuple[int, int, int, float, int, bool, torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
    m, n, rows, density, rank, bias, dtype = case
    install()
    S, parts = layer(m, n, density, rank, bias, dtype, "cuda")
    x = torch.randn(rows, n, device="cuda").to(dtype)
    taken = []
    product = gpu.product
    monkeypatch.setattr(dispatch.gpu, "product", lambda *given: taken.append(given[0]) or product(*given))
    for many in (x, x.repeat(20, 1)):
        y = operator.product(many[None], *parts, m, "bits")[0]
        assert error(y, many, S, parts) < TOLERANCE[dtype]
    assert taken == ["triton", "tile"]
    assert gpu.available(x.device)


if __name__ == "__main__":
    interpret()
