"""Streams of codes: bytes against the entropy, and how fast they are written and read."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from losparse_cli import kernels
from losparse_cli.budget.plan import count_nnz, mask_bits
from losparse_cli.checkpoint.codes import fit_contexts, stream_bytes
from losparse_cli.checkpoint.kept import smallest_stream
from losparse_cli.demo import smollm2
from losparse_cli.linalg.patterns import parse_pattern, select
from losparse_cli.shim import installed
from losparse_cli.shim.kept import decode as decode_codes
from losparse_cli.shim.kept import encode as encode_codes
from losparse_cli.shim.streams import decode, encode

BITS = (1.5, 2.5, 4.25, 8.0)
RANDOM = (
    ("Gauss", 192, 576), ("Gauss", 1536, 576), ("Laplace", 1536, 576), ("Student", 1536, 576), ("Gauss", 4096, 4096),
)  # fmt: skip


PATTERNS = (
    ("unstructured", 0.5), ("unstructured", 0.75), ("unstructured", 0.9), ("2:4", 0.5), ("1:4", 0.75), ("rows", 0.5),
    ("columns", 0.5),
)  # fmt: skip
LAYERS = ("self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj")


def codes() -> None:
    """Random weights of rows and columns that differ, and some layers of SmolLM2, at steps of several bits."""
    print(
        "Excess over the entropy by 16 x 8 classes of rows and columns, these included, in per cent; M codes a second\n"
    )
    print(
        "| weights | bits | excess | corrected | classes, header | states | estimate | fit, s | write | read | torch |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for name, W in _weights():
        for bits in BITS:
            q = (W / step_of(W, bits)).round().int()
            print("| " + " | ".join([name, f"{bits}", *_row(q)]) + " |", flush=True)
    kernels.install()
    zeros()


def zeros() -> None:
    """Some layers of SmolLM2 of which a pattern keeps the largest entries, at steps of 2 and of 4 bits for each."""
    print(
        "\nExcess in per cent at 2 and 4 bits a kept value: over the entropy of all codes if unstructured, else over "
        "that of the kept ones and the logarithm of how many supports there are\n"
    )
    layers = dict(_layers())
    print(f"| zeros | {' | '.join(name for name in layers)} |")
    print("|---|" + "---|" * len(layers))
    for pattern, sparsity in PATTERNS:
        cells = [", ".join(_excess(W, pattern, sparsity, bits) for bits in (2.0, 4.0)) for W in layers.values()]
        print(f"| {pattern}, {sparsity:.0%} | {' | '.join(cells)} |", flush=True)


def _excess(W: Tensor, pattern: str, sparsity: float, bits: float) -> str:
    shape = (W.shape[0], W.shape[1])
    nnz = count_nnz(shape, 1 - sparsity, pattern, "matrix")
    support = select(W, parse_pattern(pattern), nnz)
    mask = mask_bits(shape, nnz, pattern, "matrix")
    width = nnz // int(support.any(1).sum())

    def bound(q: Tensor) -> float:
        return _entropy(q)[1] if pattern == "unstructured" else _entropy(q[support].view(-1, width))[1] + mask

    low, high = math.log2(float(W[support].std())) - 8, math.log2(float(W[support].std())) + 3
    for _ in range(12):
        middle = (low + high) / 2
        q = (W / 2**middle).round().int() * support
        low, high = (middle, high) if bound(q) > bits * nnz + mask else (low, middle)
    q = (W / 2**high).round().int() * support
    stream = encode_codes(q, smallest_stream(q, pattern))
    assert torch.equal(decode_codes(stream, shape)[0].int(), q)
    return f"{100 * (8 * stream.numel() / bound(q) - 1):+.2f}"


def _row(q: Tensor) -> list[str]:
    kernels.install()
    fit, contexts = _timed(lambda: fit_contexts(q))
    write, stream = _timed(lambda: encode(q, contexts))
    read, (found, _) = _timed(lambda: decode(stream, (q.shape[0], q.shape[1])))
    assert torch.equal(found.int(), q)
    plain = math.inf
    if q.numel() < 1 << 22:
        installed.install(None)
        plain, _ = _timed(lambda: decode(stream, (q.shape[0], q.shape[1])), 1)
    size, states = stream.numel(), 4 * -(-q.shape[0] // contexts.lane_rows)
    bound, corrected = _entropy(q)
    millions = q.numel() / 1e6
    return [
        f"{100 * (8 * size / bound - 1):+.2f}", f"{100 * (8 * size / corrected - 1):+.2f}",
        f"{100 * (contexts.header_bytes() - states) / size:.2f}", f"{100 * states / size:.2f}",
        f"{100 * (stream_bytes(q, contexts) / size - 1):+.3f}", f"{fit:.3f}", f"{millions / write:.0f}",
        f"{millions / read:.0f}", f"{millions / plain:.1f}" if plain < math.inf else "",
    ]  # fmt: skip


def _timed(work: Callable[[], Any], times: int = 3) -> tuple[float, Any]:
    """The least processor time of some runs, and what the last one gave."""
    least, result = math.inf, None
    for _ in range(times):
        begun = time.process_time()
        result = work()
        least = min(least, time.process_time() - begun)
    return least, result


def _weights() -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for kind, m, n in RANDOM:
        W = torch.randn(m, n, generator=generator)
        if kind == "Laplace":
            W *= torch.empty(m, n).exponential_(generator=generator).mul_(2).sqrt_()
        elif kind == "Student":
            W /= torch.randn(m, n, 5, generator=generator).square().mean(-1).sqrt()
        rows, columns = (torch.exp(0.35 * torch.randn(size, generator=generator)) for size in (m, n))
        yield f"{kind}, {m} x {n}", W * rows[:, None] * columns
    yield from _layers()


def _layers() -> Iterator[tuple[str, Tensor]]:
    with safe_open(smollm2() / "model.safetensors", "pt") as file:
        for layer in LAYERS:
            yield f"SmolLM2, {layer}", file.get_tensor(f"model.layers.9.{layer}.weight").float()


def step_of(W: Tensor, bits: float) -> float:
    """The step at which the codes of W have this entropy, taken together."""
    W = W.reshape(-1)[:: max(1, W.numel() >> 19)]
    low, high = 1e-4 * float(W.std()), 20 * float(W.std())
    for _ in range(25):
        step = math.sqrt(low * high)
        counts = torch.unique((W / step).round(), return_counts=True)[1] / W.numel()
        low, high = (step, high) if -float((counts * counts.log2()).sum()) > bits else (low, step)
    return step


def _entropy(q: Tensor) -> tuple[float, float]:
    """Bits by classes, which are quantiles of the mean magnitude; and with half a nat for each frequency fitted."""
    (m, n), magnitudes = q.shape, q.abs().float()
    rows = magnitudes.mean(1).argsort().argsort() * 16 // m
    columns = magnitudes.mean(0).argsort().argsort() * 8 // n
    size = int(q.max() - q.min()) + 1
    places = (rows[:, None] * 8 + columns) * size + (q - q.min())
    counts = torch.bincount(places.view(-1), minlength=128 * size).view(128, size).double()
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    bits = 4 * m + 3 * n - float((counts * torch.where(share > 0, share, 1.0).log2()).sum())
    return bits, bits + (int((counts > 0).sum()) - 128) / (2 * math.log(2))
