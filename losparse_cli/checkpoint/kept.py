"""Whether zeros that a pattern leaves are best left out of the stream of a layer's codes (shim/kept.py writes it)."""

from __future__ import annotations

from torch import Tensor

from ..shim.kept import HEADER, Kept, groups, lines_of
from ..shim.layouts import n_of_m
from ..shim.streams import Contexts
from .codes import fit_contexts, stream_bytes

WORTH = 1 / 64
"""Share of rows or of columns that are all zero, from which it is tried to leave them out."""


def smallest_stream(codes: Tensor, pattern: str) -> Contexts | Kept:
    """How codes (m, n) of any whole dtype, zero by this pattern, take the fewest bytes."""
    codes = codes.cpu()
    plain, sparse = fit_contexts(codes), left_out(codes, pattern)
    return plain if sparse is None or sparse[1] >= stream_bytes(codes, plain) else sparse[0]


def left_out(codes: Tensor, pattern: str) -> tuple[Kept, int] | None:
    """How codes on the CPU are written without the zeros of this pattern, and about how many bytes that takes.

    None where the pattern leaves nothing out.
    """
    if ":" in pattern:
        keep, group = n_of_m(pattern)
        if codes.shape[1] % group:
            return None
        kept, places = groups(codes, keep, group)
        of_places = fit_contexts(places)
        how, beside = Kept(fit_contexts(kept), group=(keep, group), places=of_places), stream_bytes(places, of_places)
    else:
        rows, columns = (float((codes.any(axis) == 0).float().mean()) > WORTH for axis in (1, 0))
        if not (rows or columns) or not bool(codes.any()):
            return None
        kept, *_ = lines_of(codes, rows, columns)
        how = Kept(fit_contexts(kept), rows, columns)
        beside = sum(-(-size // 8) for size, some in zip(codes.shape, (rows, columns), strict=True) if some)
    return how, HEADER.size + beside + stream_bytes(kept, how.codes)
