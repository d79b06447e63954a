"""Contexts that fit: close to the entropy, for whatever codes there are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from losparse_cli.checkpoint.codes import fit_contexts, stream_bytes
from losparse_cli.shim.streams import decode, encode


def codes_of(kind: str, shape: tuple[int, int], step: float) -> Tensor:
    """Weights of rows and columns that differ, over a step."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=generator)
    if kind == "laplace":
        W *= torch.empty(shape).exponential_(generator=generator).sqrt() * math.sqrt(2)
    elif kind == "student":
        W /= torch.randn(*shape, 5, generator=generator).square().mean(-1).sqrt()
    scales = [torch.exp(0.35 * torch.randn(size, generator=generator)) for size in shape]
    return (W * scales[0][:, None] * scales[1] / step).round().int()


def entropy(codes: Tensor) -> float:
    """Bits of the codes by 16 x 8 classes of rows and columns, with the classes, less what chance makes of it."""
    m, n = codes.shape
    magnitudes = codes.abs().float()
    rows = magnitudes.mean(1).argsort().argsort() * 16 // m
    columns = magnitudes.mean(0).argsort().argsort() * 8 // n
    values = codes - codes.min()
    size = int(values.max()) + 1
    counts = torch.bincount(((rows[:, None] * 8 + columns) * size + values).view(-1), minlength=128 * size)
    counts = counts.view(128, size).double()
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    bits = -(counts * torch.where(share > 0, share, 1.0).log2()).sum()
    found = int((counts > 0).sum()) - 128  # a frequency that is fitted takes half a nat off, whatever is true
    return float(bits) + found / (2 * math.log(2)) + 4 * m + 3 * n


@pytest.mark.parametrize("kind", ["gauss", "laplace", "student"])
@pytest.mark.parametrize("step", [1.5, 0.3, 0.05])
def test_streams_are_close_to_the_entropy(kind: str, step: float) -> None:
    codes = codes_of(kind, (384, 512), step)
    contexts = fit_contexts(codes)
    blob = encode(codes, contexts)
    assert torch.equal(decode(blob, (384, 512))[0].int(), codes)
    assert 8 * blob.numel() < 1.02 * entropy(codes)
    assert abs(stream_bytes(codes, contexts) / blob.numel() - 1) < 1e-3


def test_zeros_that_are_enforced() -> None:
    codes = codes_of("gauss", (256, 512), 0.2)
    for dead in (codes.view(256, -1, 4).abs().argsort(-1).argsort(-1).view(256, 512) < 2, codes.abs() < 4):
        some = codes.masked_fill(dead, 0)
        contexts = fit_contexts(some)
        assert contexts.tables
        assert 8 * encode(some, contexts).numel() < 1.05 * entropy(some)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 2), (40, 50)])
@pytest.mark.parametrize("value", [0, 1, -5, 300, -70_000, 2**31 - 1])
def test_anything_fits(shape: tuple[int, int], value: int) -> None:
    for codes in (torch.full(shape, value, dtype=torch.int32), torch.eye(*shape, dtype=torch.int32) * value):
        found, _ = decode(encode(codes, fit_contexts(codes)), shape)
        assert torch.equal(found.int(), codes)


def test_a_layer_of_zeros_takes_next_to_nothing() -> None:
    codes = torch.zeros(512, 512, dtype=torch.int8)
    contexts = fit_contexts(codes)
    assert encode(codes, contexts).numel() < 512


def test_dead_rows_and_loud_columns() -> None:
    codes = codes_of("gauss", (128, 256), 0.5)
    codes[::2] = 0
    codes[:, 7] *= 300
    contexts = fit_contexts(codes)
    found, _ = decode(encode(codes, contexts), (128, 256))
    assert torch.equal(found.int(), codes)
    assert stream_bytes(codes, contexts) < 128 * 256 * 0.35
