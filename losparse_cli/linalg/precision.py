"""The fastest float32 products that are still float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

FLOAT32_ERROR = 5e-6
"""Relative error of a product of 512 x 512 below which it was not computed in a narrower type."""


@contextmanager
def fast_float32() -> Iterator[None]:
    """Within it, float32 products on a CPU go through oneDNN if that computes them in float32.

    torch takes MKL's unless narrower types are allowed, and MKL's are less than half as fast on some processors. With
    them allowed oneDNN uses bfloat16 where the processor multiplies it much faster: then this does nothing.
    """
    before = _products().fp32_precision
    if _onednn_is_exact():
        _products().fp32_precision = "bf16"
    try:
        yield
    finally:
        _products().fp32_precision = before


def _products() -> Any:
    return torch.backends.mkldnn.matmul  # type: ignore[attr-defined] # torch declares it at run time


@cache
def _onednn_is_exact() -> bool:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(512, 512, generator=generator) for _ in range(2))
    exact = A.double() @ B.double()
    before = _products().fp32_precision
    _products().fp32_precision = "bf16"
    try:
        error = torch.linalg.vector_norm(A @ B - exact) / torch.linalg.vector_norm(exact)
    finally:
        _products().fp32_precision = before
    return bool(error < FLOAT32_ERROR)
