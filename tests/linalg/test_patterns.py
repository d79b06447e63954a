"""Which entries of S are kept: exactly as many as asked, the largest, ties by lowest index."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from losparse_cli.linalg.patterns import Pattern, largest, parse_pattern, select

UNSTRUCTURED = Pattern("unstructured")


def reference(a: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest by a full stable sort."""
    mask = torch.zeros(a.numel(), dtype=torch.bool)
    mask[torch.sort(a, descending=True, stable=True).indices[:k]] = True
    return mask


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 3.0]), min_size=1, max_size=60), st.integers(0, 60))
def test_largest_agrees_with_a_stable_sort_under_ties(values: list[float], k: int) -> None:
    a = torch.tensor(values)
    k = min(k, len(values))
    assert torch.equal(largest(a, k), reference(a, k))


@pytest.mark.parametrize("k", [1, 1000, 50_000, 199_999, 299_998, 299_999])
@pytest.mark.parametrize("kind", ["gaussian", "constant", "few values", "sorted", "one spike a stride", "heavy tail"])
def test_largest_is_exact_where_sampling_is_used(kind: str, k: int) -> None:
    size = 300_000
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(size, generator=generator).abs()
    if kind == "constant":
        a = torch.ones(size)
    elif kind == "few values":
        a = (a * 2).floor()
    elif kind == "sorted":
        a = a.sort().values
    elif kind == "one spike a stride":  # all that the sample sees is unlike the rest
        a[:: (size >> 16) | 1] += 100
    elif kind == "heavy tail":
        a = a.pow(20)
    assert torch.equal(largest(a, k), reference(a, k))


def test_unstructured_keeps_exactly_the_largest_magnitudes() -> None:
    A = torch.randn(70, 90, generator=torch.Generator().manual_seed(1))
    mask = select(A, UNSTRUCTURED, 630)
    assert int(mask.sum()) == 630
    assert A.abs()[mask].min() >= A.abs()[~mask].max()


def test_row_scope_keeps_the_same_number_in_every_row() -> None:
    A = torch.randn(31, 47, generator=torch.Generator().manual_seed(2))
    A[3] = 1.0  # ties
    mask = select(A, UNSTRUCTURED, 31 * 9, "row")
    assert (mask.sum(dim=1) == 9).all()
    assert mask[3, :9].all()
    for row, kept in zip(A.abs(), mask, strict=True):
        assert row[kept].min() >= row[~kept].max()


@pytest.mark.parametrize(("kind", "axis"), [("rows", 1), ("columns", 0)])
def test_whole_neurons_are_kept_by_norm(kind: str, axis: int) -> None:
    A = torch.randn(24, 40, generator=torch.Generator().manual_seed(3))
    size, other = (24, 40) if kind == "rows" else (40, 24)
    mask = select(A, Pattern(kind), 5 * other)
    lines = mask.any(dim=axis)
    assert torch.equal(lines, mask.all(dim=axis))
    assert int(lines.sum()) == 5
    norms = A.norm(dim=axis)
    assert norms[lines].min() >= norms[~lines].max()
    assert size == lines.numel()


@pytest.mark.parametrize("columns", [64, 66, 67])
def test_n_of_m_keeps_the_n_largest_of_every_m(columns: int) -> None:
    A = torch.randn(10, columns, generator=torch.Generator().manual_seed(4))
    tail = columns % 4
    mask = select(A, parse_pattern("2:4"), 10 * (columns // 4 * 2 + min(2, tail)))
    groups = mask[:, : columns - tail].reshape(-1, 4)
    assert (groups.sum(dim=1) == 2).all()
    magnitudes = A.abs()[:, : columns - tail].reshape(-1, 4)
    lowest_kept = magnitudes.masked_fill(~groups, torch.inf).amin(dim=1)
    highest_left = magnitudes.masked_fill(groups, -1).amax(dim=1)
    assert (lowest_kept >= highest_left).all()


def test_impossible_counts_and_patterns_are_refused() -> None:
    A = torch.ones(6, 8)
    for pattern, nnz, scope in (
        (UNSTRUCTURED, 49, "matrix"),
        (UNSTRUCTURED, -1, "matrix"),
        (UNSTRUCTURED, 7, "row"),
        (Pattern("rows"), 7, "matrix"),
        (Pattern("columns"), 7, "matrix"),
        (Pattern("n:m", 2, 4), 7, "matrix"),
    ):
        with pytest.raises(ValueError, match=r"nnz|pattern"):
            select(A, pattern, nnz, scope)
    for text in ("blocks", "4:2", "2:2", "0:4", "2:32", "2:", ""):
        with pytest.raises(ValueError, match="unknown pattern"):
            parse_pattern(text)
    assert str(parse_pattern("2:4")) == "2:4"
