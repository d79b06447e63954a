"""Contexts with tables as often as each code came: what the densities do not fit, as a gap beside enforced zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from ..shim.streams import Contexts, width_of
from ..shim.tables import TOTAL, TOTAL_BITS, Table
from .counts import best_classes, bin_widths, by_class, by_table, counts_in, joint_counts, merged, stream_bits

STORED_WIDEST = 255
ROUNDS = 2
LENT, PRIOR = 0.25, 0.02
"""Of the counts of a table what those beside it are lent, and what each magnitude counts that has not come yet."""

Fit = tuple[float, Contexts]
"""Bits of codes and header, and contexts, of one row a lane."""


def with_own_tables(codes: Tensor, bins: Tensor, flipped: Tensor, densities: Fit) -> Fit:
    """Contexts with stored tables for codes (m, n), or by densities where those are no worse.

    bins: of the codes, flipped: the same transposed.
    """
    rows, columns = densities[1].rows, densities[1].columns
    first = _Tables(codes, rows, columns).best()
    if first[0] >= densities[0]:
        return densities
    for _ in range(ROUNDS):
        rows = _classes(counts_in(bins, columns), rows)
        columns = _classes(counts_in(flipped, rows), columns)
    suited = _Tables(codes, rows - rows.min(), columns - columns.min()).descent()
    return min(densities, first, suited, key=lambda fit: fit[0])


class _Tables:
    """Tables for codes (m, n) by these classes, or by what is left of them without their lowest bits."""

    def __init__(self, codes: Tensor, rows: Tensor, columns: Tensor) -> None:
        self._rows, self._columns, self._width = rows, columns, width_of(codes)
        self._joint, self._widest = joint_counts(codes, rows, columns)

    def fit(self, shift: tuple[int, int], *, mirrored: bool = True) -> Fit:
        """shift: how many bits the classes of rows lose, and those of columns. mirrored: whether the same frequency
        serves a code and its negative."""
        rows, columns = self._rows >> shift[0], self._columns >> shift[1]
        counts = merged(self._joint, *shift)
        lines = by_table(counts)[: int(rows.max()) + int(columns.max()) + 1]
        tables = _frequencies(lines, self._widest, self._width, mirrored=mirrored)
        found = Contexts(rows, columns, 1, tables=tables)
        return stream_bits(counts, self._widest, found, self._width) + 8 * found.header_bytes(), found

    def best(self) -> Fit:
        """Of some, with tables of either kind."""
        fits = {k: self.fit((k, k)) for k in range(5)}
        k = min(fits, key=lambda k: fits[k][0])
        return min(fits[k], self.fit((k, k), mirrored=False), key=lambda fit: fit[0])

    def descent(self) -> Fit:
        """From all bits of the classes on, until a bit less of either or of both is no better."""
        shift, best = (0, 0), self.fit((0, 0))
        while True:
            down, right = shift
            fits = {
                one: self.fit(one)
                for one in ((down + 1, right), (down, right + 1), (down + 1, right + 1))
                if max(one) <= 4
            }
            following = min(fits, key=lambda one: fits[one][0], default=None)
            if following is None or fits[following][0] >= best[0]:
                return best
            shift, best = following, fits[following]


def _classes(counts: Tensor, classes: Tensor) -> Tensor:
    """The class of each row that makes the fewest bits by the frequencies that the present classes come to."""
    held = by_table(by_class(counts, classes))
    around = torch.nn.functional.pad(held, (0, 0, 1, 1))
    held = held + LENT * (around[:-2] + around[2:]) + PRIOR * bin_widths()[: held.shape[1]]
    return best_classes(counts, torch.log2(held.sum(1, keepdim=True)) - torch.log2(held), int(classes.max()) + 1)


def _frequencies(counts: Tensor, widest: int, width: int, *, mirrored: bool) -> tuple[Table, ...]:
    """Of each table, from its counts (tables, 2K + 3) of -K - 1..K + 1, K = widest; a code that came once goes by the
    escape.

    mirrored: the same for a code and its negative.
    """
    whole = counts.sum(1)
    inner = counts[:, 1:-1] + counts[:, 1:-1].flip(1) if mirrored else counts[:, 1:-1].clone()
    inner[inner * (TOTAL_BITS + 8 * width) < 40] = 0
    if widest > STORED_WIDEST:
        inner = inner[:, widest - STORED_WIDEST : widest + STORED_WIDEST + 1]
    K = inner.shape[1] // 2
    kept = ((inner > 0) * (torch.arange(2 * K + 1) - K).abs()).amax(1).tolist()
    inside = inner.sum(1)
    some = (whole > 0) & (inside > 0)
    beyond = (whole - inside // (1 + mirrored)).double() / whole.clamp(min=1) * TOTAL
    escape = beyond.round().long().clamp(1, TOTAL // 2)
    shares = inner.double() / inside.clamp(min=1)[:, None] * (TOTAL - escape)[:, None]
    f = torch.where(inner > 0, shares.round().clamp(min=1), 0.0).long()
    over = f.sum(1) - (TOTAL - escape)
    lines = torch.arange(len(f))
    while bool((over > 0).any()):
        at = f.argmax(1)
        other = 2 * K - at if mirrored else at
        sides = 1 + (at != other).long()
        most = (f[lines, at] // 2).clamp(min=1)
        change = torch.where(over > 0, torch.minimum(-(-over // sides), most), 0)
        f[lines, at] -= change
        f[lines, other] -= torch.where(at != other, change, 0)
        over -= change * sides
    # What is left over: of mirrored ones without a zero the escape has a bit more than it needs.
    top = torch.full_like(over, K) if mirrored else f.argmax(1)
    f[lines, top] -= torch.where(f[lines, top] > 0, over, 0)
    return tuple(
        tuple(line[K - k : K + k + 1]) if one else (TOTAL - 1,)
        for line, k, one in zip(f.tolist(), kept, some.tolist(), strict=True)
    )
