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
from pathlib import Path
from typing import Any

import pytest
import torch
from products import coded
from torch import Tensor

from losparse_cli.kernels import dispatch, gpu, gpu_codes, install
from losparse_cli.kernels.native import library
from losparse_cli.shim import installed, operator
from losparse_cli.shim.codec import pack_bits
from losparse_cli.shim.packed import bits_of

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
CODED = [
    # bits, (out, in), rank, bias, dtype; of wide ones a few codes do not fit
    (2, (7, 40), 0, False, torch.float32),
    (2, (33, 1040), 8, True, torch.bfloat16),
    (3, (13, 100), 0, True, torch.float16),
    (3, (40, 576), 70, False, torch.float32),
    (4, (40, 576), 8, True, torch.bfloat16),
    (5, (17, 333), 0, False, torch.float32),
    (6, (9, 64), 3, True, torch.bfloat16),
    (7, (40, 576), 0, True, torch.float16),
    (8, (33, 1040), 8, False, torch.float32),
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
    assert ran.stdout.count("ok ") == len(CASES) + (0 if library() is None else len(CODED))


def interpret() -> None:
    """`few`, `many` and `dense` for all CASES; what the process above runs."""
    assert gpu.available(torch.device("cpu"))
    torch.set_num_threads(1)
    install()
    for bits, shape, rank, bias, dtype in CODED if library() is not None else ():
        interpret_codes(bits, shape, rank, bias, dtype)
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
        chosen = dispatch.Kernels()._on_gpu(x, *parts, m, "bits")
        assert chosen is not None
        assert torch.equal(chosen, gpu.few(x, *parts, m, n))
        turned = dispatch.Kernels()._on_gpu(x.T.contiguous().T, *parts, m, "bits")
        assert turned is not None
        assert torch.equal(chosen, turned)
        assert dispatch.Kernels()._on_gpu(x, *parts, m, "gaps") is None
        assert parts[5] is None or torch.equal(parts[5], before)
        print(f"ok {m} x {n}, {rows} rows: {time.perf_counter() - started:.1f} s")


def interpret_codes(bits: int, shape: tuple[int, int], rank: int, bias: bool, dtype: torch.dtype) -> None:
    """`few`, `many` and `rows_of` of gpu_codes, for one of CODED."""
    started = time.perf_counter()
    module, _ = coded(shape, bits, rank=rank, bias=bias, dtype=dtype)
    index, starts = module._index_and_starts()
    assert bits_of(module.form) == bits
    assert starts is not None
    parts = tuple(
        t if t is None else t.detach() for t in (module.weight, index, starts, module.U, module.V, module.bias)
    )
    W = module.dense().double()
    installed.install(None)
    plainly = operator.rows_of_codes(slice(None), module.weight.detach(), index, starts, shape, module.form)
    install()
    S = gpu_codes.rows_of(slice(None), *parts[:3], shape, bits)
    assert S.dtype == dtype
    # The interpreter rounds to bfloat16 towards zero.
    torch.testing.assert_close(S, plainly, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)
    wanted = torch.randint(0, shape[0], (2, 5))
    numbers = wanted.int() if bits % 2 else wanted
    found = operator.rows_of_codes(numbers, module.weight.detach(), index, starts, shape, module.form)
    assert torch.equal(found, S[wanted])
    gpu.TILE_BYTES = 5 * shape[1] * S.element_size()
    for rows in (1, 3, 16):
        x = torch.randn(rows, shape[1]).to(dtype)
        exact = x.double() @ W.T + (0 if module.bias is None else module.bias.double())
        for work in (gpu_codes.few, gpu_codes.many):
            y = work(x, *parts, shape, bits)
            assert y.dtype == dtype
            assert float((y.double() - exact).norm() / exact.norm()) < TOLERANCE[dtype], (work, bits, shape, rows)
        chosen = dispatch.Kernels()._on_gpu(x, *parts, shape[0], module.form)
        assert chosen is not None
        assert torch.equal(chosen, gpu_codes.few(x, *parts, shape, bits))
        assert dispatch.Kernels()._on_gpu(x, *parts[:1], index[1:], *parts[2:], shape[0], module.form) is None
    print(f"ok {bits} bits, {shape}: {time.perf_counter() - started:.1f} s")


@pytest.mark.parametrize("name", ["one", "some", "rows_of"])
def test_kernels_for_codes_compile_for_a_gpu_and_stay_in_registers(name: str, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    backends = pytest.importorskip("triton.backends.compiler")
    from losparse_cli.kernels import gpu_triton_codes

    dump = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump"), None)
    if dump is None:
        pytest.skip("this Triton brings no tool that tells what a kernel uses")
    kernel: Any = getattr(gpu_triton_codes, name)
    known = {"BITS": 5, "REST": True, "BIAS": True, "LISTED": True, "RANK": 32, "RANKS": 1, "SLOTS": 16, "EXACT": False}
    known |= {"R": 16, "LINES": 4, "BLOCKS": 32} if name == "some" else {"R": 8, "LINES": 8, "BLOCKS": 16}
    kinds = {"index": "*u8", "scale": "*u8", "factors": "*fp32", "rest": "*i32", "wanted": "*i64"}
    kinds |= dict.fromkeys(("x", "values", "U", "t", "bias", "y", "S"), "*bf16")
    arguments = kernel.arg_names
    made = triton.compile(
        triton.compiler.ASTSource(
            kernel,
            signature={a: "constexpr" if a in known else kinds.get(a, "i32") for a in arguments},
            constexprs={(k,): known[a] for k, a in enumerate(arguments) if a in known},
            attrs={(k,): [["tt.divisibility", 16]] for k, a in enumerate(arguments) if a in kinds or a == "n"},
        ),
        target=backends.GPUTarget("cuda", 90, 32),
    )
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    told = subprocess.run([dump, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    assert int(told.split("STACK:")[1].split()[0]) <= 32, told  # bytes that registers did not hold
    assert "v4" in made.asm["ptx"]  # codes are read 16 bytes at a time


def test_without_triton_nothing_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not gpu.available(torch.device("cpu"))
    monkeypatch.setattr(gpu, "kernels", lambda: None)
    assert not gpu.available(torch.device("cuda"))


def test_triton_that_fails_is_left_alone(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*_: object) -> Tensor:
        raise ValueError("no such processor\nand much else")

    monkeypatch.setattr(gpu, "few", fails)
    monkeypatch.setattr(gpu, "_failed", False)
    _, parts = layer(3, 8, 0.5, 0, False, torch.float32)
    with caplog.at_level(logging.WARNING, "losparse"):
        assert gpu.attempt(gpu.few, torch.ones(1, 8), *parts, 3, 8) is None
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
    attempt = gpu.attempt
    monkeypatch.setattr(dispatch.gpu, "attempt", lambda work, *given: taken.append(work) or attempt(work, *given))
    for many in (x, x.repeat(20, 1)):
        y = operator.product(many[None], *parts, m, "bits")[0]
        assert error(y, many, S, parts) < TOLERANCE[dtype]
    assert taken == [gpu.few, gpu.many]
    assert gpu.available(x.device)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CODED)
def test_codes_on_a_gpu(case: tuple[int, tuple[int, int], int, bool, torch.dtype]) -> None:
    bits, shape, rank, bias, dtype = case
    install()
    on_cpu, W = coded(shape, bits, rank=rank, bias=bias, dtype=dtype)
    module = on_cpu.to("cuda")
    assert bits_of(module.form) == bits
    exact = W.cuda()
    for rows in (1, 7, 300):
        x = torch.randn(rows, shape[1], device="cuda").to(dtype)
        with torch.no_grad():
            y = module(x)
        expected = x.double() @ exact.T + (0 if module.bias is None else module.bias.double())
        assert float((y.double() - expected).norm() / expected.norm()) < TOLERANCE[dtype]
    assert gpu.available(x.device)


if __name__ == "__main__":
    interpret()
