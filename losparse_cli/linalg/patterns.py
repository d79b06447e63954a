"""Which entries of S may be non-zero, and how the largest ones are found without a full sort.

- `unstructured`: any entry; the k largest of the matrix, or of each row;
- `rows`, `columns`: whole output or input neurons, by their norm (LoSparse, section 3.2);
- `N:M`: N non-zeros in every M consecutive entries of a row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pattern:
    """A pattern of S: kind is `unstructured`, `rows`, `columns` or `n:m` (then with n and m)."""

    kind: str
    n: int = 0
    m: int = 0

    def __str__(self) -> str:
        return f"{self.n}:{self.m}" if self.kind == "n:m" else self.kind


def parse_pattern(text: str) -> Pattern:
    """Pattern from `unstructured`, `rows`, `columns` or `N:M`; ValueError with the choices otherwise."""
    if text in ("unstructured", "rows", "columns"):
        return Pattern(text)
    match = re.fullmatch(r"(\d{1,2}):(\d{1,2})", text)
    if match and 0 < int(match[1]) < int(match[2]) <= 16:
        return Pattern("n:m", int(match[1]), int(match[2]))
    raise ValueError(
        f"unknown pattern {text!r}; choose unstructured, rows, columns or N:M with N < M <= 16, such as 2:4"
    )


def select(A: Tensor, pattern: Pattern, nnz: int, scope: str = "matrix") -> Tensor:
    """The support of the `nnz` entries of A to keep: bool, (m, n), exactly `nnz` True.

    A: (m, n), floating. `nnz` must be a number that the pattern can keep: whole rows or columns, a whole
    number a row for scope `row`, N of every M (ValueError otherwise). Ties go to the lowest index.
    """
    m, n = A.shape
    if not 0 <= nnz <= m * n:
        raise ValueError(f"nnz {nnz} is outside 0..{m * n}")
    if nnz == m * n:
        return torch.ones(m, n, dtype=torch.bool, device=A.device)
    if pattern.kind in ("rows", "columns"):
        axis, other = (1, n) if pattern.kind == "rows" else (0, m)
        if nnz % other:
            raise ValueError(f"nnz {nnz} is no whole number of {pattern.kind} of a {m} x {n} matrix")
        keep = largest(torch.linalg.vector_norm(A, dim=axis), nnz // other)
        mask = keep[:, None] if pattern.kind == "rows" else keep[None, :]
        return mask.expand(m, n).contiguous()
    if pattern.kind == "n:m":
        mask = _select_n_of_m(A.abs(), pattern.n, pattern.m)
        if int(torch.count_nonzero(mask)) != nnz:
            raise ValueError(f"pattern {pattern} does not keep {nnz} entries of a {m} x {n} matrix")
        return mask
    if scope == "row":
        if nnz % m:
            raise ValueError(f"nnz {nnz} is no whole number a row of a {m} x {n} matrix")
        return _largest_per_row(A.abs(), nnz // m)
    return largest(A.abs().view(-1), nnz).view(m, n)


def largest(a: Tensor, k: int) -> Tensor:
    """True at the k largest entries of the non-negative vector `a`; ties go to the lowest index.

    Two passes and no sort: a strided sample brackets the k-th largest, and only what falls inside the
    bracket is looked at again (Floyd and Rivest, "Expected time bounds for selection", 1975).
    """
    size = a.numel()
    if k <= 0:
        return torch.zeros(size, dtype=torch.bool, device=a.device)
    if k >= size:
        return torch.ones(size, dtype=torch.bool, device=a.device)
    lo, hi = _bracket(a, k)
    above = a > hi
    need = k - int(torch.count_nonzero(above))
    inside = torch.nonzero((a >= lo) & (a <= hi)).view(-1)
    if not 0 < need <= inside.numel():  # the sample misled: structured data, or many equal values
        inside = torch.arange(size, device=a.device)
        above, need = torch.zeros_like(above), k
    candidates = a[inside]
    threshold = torch.kthvalue(candidates, candidates.numel() - need + 1).values
    larger = inside[candidates > threshold]
    above[larger] = True
    above[inside[candidates == threshold][: need - larger.numel()]] = True
    return above


def _bracket(a: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Two values between which the k-th largest of `a` lies, but for an unlucky sample."""
    size = a.numel()
    if size <= 1 << 16:
        return a.amin(), a.amax()
    # An odd stride near size / 65536 visits all columns of a matrix whose width is a power of two.
    sample = a[:: (size >> 16) | 1].sort(descending=True).values
    count = sample.numel()
    position, slack = k / size * count, 4.0 * (count * (k / size) * (1 - k / size)) ** 0.5 + 4.0
    first, last = int(position - slack), int(position + slack)
    hi = sample[first] if first >= 0 else a.amax()
    lo = sample[last] if last < count else a.amin()
    return lo, hi


def _largest_per_row(a: Tensor, k: int) -> Tensor:
    """True at the k largest of each row; ties go to the lowest column."""
    m, n = a.shape
    if k == 0:
        return torch.zeros(m, n, dtype=torch.bool, device=a.device)
    threshold = torch.topk(a, k, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    mask = a > threshold
    ties = a == threshold
    missing = k - mask.sum(dim=1, keepdim=True)
    mask |= ties & (torch.cumsum(ties, dim=1) <= missing)
    return mask


def _select_n_of_m(a: Tensor, n_keep: int, group: int) -> Tensor:
    m, n = a.shape
    tail = n % group
    head = a[:, : n - tail].reshape(-1, group)
    parts = [_largest_per_row(head, n_keep).view(m, n - tail)]
    if tail:
        parts.append(_largest_per_row(a[:, n - tail :], min(n_keep, tail)))
    return torch.cat(parts, dim=1)
