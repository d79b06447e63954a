"""Streams that fit: close to the entropy, for whatever codes there are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from losparse_cli.checkpoint.codes import fit_contexts, stream_bytes
from losparse_cli.checkpoint.kept import smallest_stream
from losparse_cli.shim.kept import Kept, decode, encode


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


# --- what a pattern leaves zero ----------------------------------------------------------------------


def stream_of(codes: Tensor, pattern: str) -> Tensor:
    blob = encode(codes, smallest_stream(codes, pattern))
    assert torch.equal(decode(blob, tuple(codes.shape))[0].int(), codes)
    return blob


@pytest.mark.parametrize(("pattern", "keep"), [("2:4", 2), ("1:4", 1), ("3:16", 3), ("8:16", 8)])
@pytest.mark.parametrize("step", [0.3, 0.05])
def test_groups_are_close_to_the_entropy(pattern: str, keep: int, step: float) -> None:
    codes, group = codes_of("gauss", (384, 512), step), int(pattern.partition(":")[2])
    rank = codes.view(384, -1, group).abs().argsort(-1, descending=True).argsort(-1)
    codes *= (rank < keep).view(384, 512)
    values = codes.view(384, -1, group).gather(2, rank.argsort(-1)[..., :keep].sort(-1).values).reshape(384, -1)
    mask = codes.numel() // group * math.log2(math.comb(group, keep))
    assert 8 * stream_of(codes, pattern).numel() < (1.02 + 0.0015 / step) * (entropy(values) + mask)


def test_whole_rows_and_columns_of_zeros_take_next_to_nothing() -> None:
    codes = codes_of("gauss", (384, 512), 0.3)
    few = codes[::2, ::4].clone()
    spread = torch.zeros_like(codes)
    spread[::2, ::4] = few
    size = encode(few, smallest_stream(few, "rows")).numel()
    assert stream_of(spread, "rows").numel() - size < 24 + 384 / 8 + 512 / 8 + 1
    assert isinstance(smallest_stream(spread, "unstructured"), Kept)


@pytest.mark.parametrize("pattern", ["unstructured", "rows", "columns", "2:4", "3:4"])
def test_anything_fits_without_what_is_zero(pattern: str) -> None:
    for shape in ((1, 1), (3, 4), (40, 50)):
        for codes in (torch.zeros(shape, dtype=torch.int32), torch.eye(*shape, dtype=torch.int32) * 300):
            stream_of(codes, pattern)


def test_groups_that_are_mostly_zero_anyway_are_coded_like_any_others() -> None:
    codes = codes_of("gauss", (256, 256), 6.0)
    rank = codes.view(256, -1, 4).abs().argsort(-1, descending=True).argsort(-1)
    codes *= (rank < 2).view(256, 256)
    assert not isinstance(smallest_stream(codes, "2:4"), Kept)
