"""Compressed products, beside dense ones in the same run."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass

import torch

from losparse_cli.benchmark.layers import layer_speeds
from losparse_cli.benchmark.timing import copy_bandwidth
from losparse_cli.checkpoint.codes import fit_contexts
from losparse_cli.kernels import install
from losparse_cli.kernels.choice import SPREAD_ROWS
from losparse_cli.linalg.patterns import parse_pattern, select
from losparse_cli.shim.codec import smallest
from losparse_cli.shim.layouts import LayerSpec
from losparse_cli.shim.linear import LowRankSparseLinear
from losparse_cli.shim.streams import encode

from .codes import step_of

SHAPES = ((4096, 4096), (11008, 4096))
ROWS = (1, 16, 256)


@dataclass(frozen=True)
class Case:
    """floors: times faster than nn.Linear that we promise ourselves, at each of ROWS."""

    name: str
    pattern: str
    density: float
    rank: int
    floors: tuple[float, ...]


CASES = (
    Case("columns, 10 %", "columns", 0.1, 8, (6, 6, 5)),
    Case("rows, 10 %", "rows", 0.1, 8, (6, 6, 5)),
    Case("unstructured, 10 %", "unstructured", 0.1, 8, (3.5, 1.2, 0.8)),
    Case("unstructured, 50 %", "unstructured", 0.5, 64, (1.4, 0.8, 0.8)),
)
MORE = (
    Case("unstructured, 2 %", "unstructured", 0.02, 8, ()),
    Case("unstructured, 5 %", "unstructured", 0.05, 8, ()),
    Case("unstructured, 20 %", "unstructured", 0.2, 8, ()),
    Case("unstructured, 30 %", "unstructured", 0.3, 8, ()),
    Case("2:4", "2:4", 0.5, 8, ()),
)


def layer(case: Case, shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> LowRankSparseLinear:
    """A layer with random values in a random support."""
    m, n = shape
    generator = torch.Generator().manual_seed(seed)
    residual = torch.randn(m, n, generator=generator)
    unit = {"rows": n, "columns": m}.get(case.pattern, 1)
    support = select(residual, parse_pattern(case.pattern), round(case.density * m * n / unit) * unit)
    spec, index = smallest(support, case.rank, case.pattern)
    made = LowRankSparseLinear(spec, bias=False, dtype=dtype)
    with torch.no_grad():
        made.weight.copy_(residual[support])
        for name, parameter in made.named_parameters():
            if name in ("U", "V"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / n**0.25)
        for name, tensor in index.items():
            getattr(made, name).copy_(tensor)
    made.settle()
    return made


def kernels(dtype: torch.dtype = torch.bfloat16, cases: tuple[Case, ...] = (*CASES, *MORE), copies: int = 4) -> None:
    """Times faster than nn.Linear, cold: between two uses more is read than any cache holds."""
    install()
    threads, copied = torch.get_num_threads(), copy_bandwidth(torch.device("cpu"))
    kind = str(dtype).removeprefix("torch.")
    print(f"{kind}, {threads} threads; a large copy reads and writes {copied / 1e9:.0f} GB/s")
    print("\n| S, rank | out x in | rows of x | dense, ms | ours, ms | times faster | floor | of the copy's GB/s |")
    print("|---|---|---|---|---|---|---|---|")
    for case in cases:
        for shape in SHAPES:
            layers = [layer(case, shape, dtype, seed) for seed in range(copies)]
            for k, found in enumerate(layer_speeds(layers, ROWS, 7)):
                floor = f"{case.floors[k]:g}" if case.floors else ""
                print(
                    f"| {case.name}, {case.rank} | {shape[0]} x {shape[1]} | {found.rows} "
                    f"| {found.dense_milliseconds:.3f} | {found.milliseconds:.3f} | {found.speedup:.2f} | {floor} "
                    f"| {found.bandwidth / copied:.0%} |",
                    flush=True,
                )


# Bits a weight on disk, the most in memory, and floors at each of ROWS.
RATES = ((2.2, 3.2, (4.0, 1.5, 0.9)), (3.25, 4.2, (3.2, 1.4, 0.9)), (4.25, 6.1, (2.3, 1.2, 0.9)))


def coded_layer(rate: float, shape: tuple[int, int], seed: int) -> LowRankSparseLinear:
    """A layer in bfloat16 of Gaussian weights, rounded so that a code's entropy is `rate`."""
    m, n = shape
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(shape, generator=generator)
    codes = (W / step_of(W, rate)).round().int()
    blob = encode(codes, fit_contexts(codes))
    spec = LayerSpec(shape, 0, int(codes.count_nonzero()), "unstructured", "codes", index_bytes=blob.numel())
    made = LowRankSparseLinear(spec, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        made.weight.copy_(torch.rand(m, generator=generator) + 0.5)
        made.S_codes.copy_(blob)
        made.S_scale.copy_(torch.randint(120, 136, (n,), generator=generator))
    made.settle()
    return made


def kernels_codes(copies: int = 4) -> None:
    """The same for codes of Gaussian weights."""
    install()
    threads, copied = torch.get_num_threads(), copy_bandwidth(torch.device("cpu"))
    print(f"bfloat16, {threads} threads; a large copy reads and writes {copied / 1e9:.0f} GB/s")
    print(
        "\n| bits on disk | in memory | at most | out x in | rows of x | dense, ms | ours, ms | times faster | floor |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for rate, most, floors in RATES:
        for shape in SHAPES:
            layers = [coded_layer(rate, shape, seed) for seed in range(copies)]
            bits = [8 * x.index_bytes / (shape[0] * shape[1]) for x in (layer.spec for layer in layers)]
            for found, floor in zip(layer_speeds(layers, ROWS, 7), floors, strict=True):
                held = 8 * found.nbytes / (shape[0] * shape[1])
                print(
                    f"| {statistics.mean(bits):.2f} | {held:.2f} | {most:g} | {shape[0]} x {shape[1]} | {found.rows} "
                    f"| {found.dense_milliseconds:.3f} | {found.milliseconds:.3f} | {found.speedup:.2f} | {floor:g} |",
                    flush=True,
                )


def kernels_float32() -> None:
    """The same in float32, without floors."""
    kernels(torch.float32, tuple(Case(c.name, c.pattern, c.density, c.rank, ()) for c in CASES))


def ways(shape: tuple[int, int] = (4096, 4096)) -> None:
    """Milliseconds of each way, on which kernels/choice.py rests; a process each, as LOSPARSE_KERNEL is read once."""
    print(f"{shape[0]} x {shape[1]}, rank 8, bfloat16, {torch.get_num_threads()} threads; ms, the fastest in bold\n")
    print("| density | rows of x | dense | " + " | ".join(WAYS) + " |\n|---|---|---|" + "---|" * len(WAYS))
    found: dict[tuple[float, int], dict[str, float]] = {}
    for way in WAYS:
        done = subprocess.run(
            [sys.executable, "-c", f"from tests.benchmarks.kernels import one_way; one_way({shape})"],
            env=os.environ | {"LOSPARSE_KERNEL": way}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        for density, rows, ours, dense in json.loads(done.stdout.splitlines()[-1]):
            found.setdefault((density, rows), {"dense": dense})[way] = ours
    for (density, rows), times in found.items():
        if rows > SPREAD_ROWS or density < 0.09:  # it cannot, and plain torch was measured again
            del times["spread"]
        best = min(times, key=lambda way: times[way])
        shown = ["–" if w not in times else f"{times[w]:.2f}" for w in ("dense", *WAYS)]
        shown = [f"**{text}**" if w == best else text for w, text in zip(("dense", *WAYS), shown, strict=True)]
        print(f"| {density:g} | {rows} | {' | '.join(shown)} |")


WAYS = ("spread", "walk", "tile", "reference")


def one_way(shape: tuple[int, int]) -> None:
    """JSON of (density, rows, ours, dense) in milliseconds."""
    install()
    found = []
    for density in (0.05, 0.1, 0.2, 0.3, 0.5):
        case = Case("", "unstructured", density, 8, ())
        layers = [layer(case, shape, torch.bfloat16, seed) for seed in range(3)]
        speeds = layer_speeds(layers, (1, 2, 4, 8, 16, 32, 64, 256), 3)
        found += [(density, x.rows, x.milliseconds, x.dense_milliseconds) for x in speeds]
    print(json.dumps(found))
