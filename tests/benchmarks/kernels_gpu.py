"""Compressed products on a GPU beside cuBLAS, in CUDA graphs: what the device takes, without Python's part."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from losparse_cli.kernels import gpu as triton_kernels
from losparse_cli.kernels import install

from .kernels import RATES, Case, coded_layer, layer

SHAPES = ((4096, 4096), (11008, 4096))
ROWS = (1, 16, 256)
CASES = (
    Case("columns, 10 %", "columns", 0.1, 8, ()),
    Case("unstructured, 10 %, rank 8", "unstructured", 0.1, 8, ()),
    Case("unstructured, 50 %, rank 64", "unstructured", 0.5, 64, ()),
)
COLD_BYTES = 1 << 28
"""Read between two uses of a layer, several times what a GPU's last cache holds."""


def gpu(rounds: int = 20) -> None:
    """Microseconds a product in bfloat16, the layers cold."""
    if not torch.cuda.is_available():
        print("no CUDA device: not measured")
        return
    install()
    device = torch.device("cuda")
    found = "Triton found" if triton_kernels.available(device) else "no Triton: plain torch"
    print(f"{torch.cuda.get_device_name(device)}, {found}; median of {rounds}, CUDA graphs\n")
    print("| layer | S | rows of x | cuBLAS, µs | compressed, µs | ratio | error |\n|---|---|---|---|---|---|---|")
    for m, n in SHAPES:
        dense = nn.Linear(n, m, bias=False, dtype=torch.bfloat16, device=device).requires_grad_(False)
        xs = [torch.randn(rows, n, device=device).bfloat16() for rows in ROWS]
        theirs = [_microseconds(_copies(dense), x, rounds) for x in xs]
        made = [(case.name, layer(case, (m, n), torch.bfloat16)) for case in CASES]
        made += [(f"codes, {rate:g} bits", coded_layer(rate, (m, n), 0)) for rate, _, _ in RATES]
        for name, one in made:
            ours = one.to(device).requires_grad_(False)
            W, many = ours.dense(), _copies(ours)
            for x, slow in zip(xs, theirs, strict=True):
                exact, fast = x.float() @ W.T, _microseconds(many, x, rounds)
                error = float((ours(x).float() - exact).norm() / exact.norm())
                print(
                    f"| {m} x {n} | {name} | {x.shape[0]} | {slow:.1f} | {fast:.1f} | {slow / fast:.2f}x | "
                    f"{error:.1e} |",
                    flush=True,
                )


def _copies(module: nn.Module) -> list[nn.Module]:
    """As many as make COLD_BYTES together."""
    tensors: list[Tensor] = [*module.parameters(), *module.buffers()]
    return [copy.deepcopy(module) for _ in range(-(-COLD_BYTES // sum(t.nbytes for t in tensors)))]


def _microseconds(modules: Sequence[Callable[[Tensor], Tensor]], x: Tensor, rounds: int) -> float:
    """One product of one of the modules, all of which are in the graph once."""
    graph, event = torch.cuda.CUDAGraph(), torch.cuda.Event
    with torch.inference_mode():
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for module in modules:
                module(x)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(graph):
            for module in modules:
                module(x)
    times: list[float] = []
    for _ in range(rounds + 3):
        begin: Any = event(enable_timing=True)
        end: Any = event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[3:]) / len(modules) * 1e3


if __name__ == "__main__":
    gpu()
