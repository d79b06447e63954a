"""Products with packed codes on a GPU: the kernels of `gpu_triton_codes` expand them in registers.

`few` reads each stored byte once and does all of the product in one pass, but for V x. `many` makes some rows of S
dense in scratch memory and leaves their product to torch. Tensors are contiguous, on one device, of one of gpu.DTYPES,
but for index and scale, which are uint8.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shim.layouts import COLUMN_FACTORS
from ..shim.packed import LINE, packed_bytes, rest_of
from . import gpu
from .cpu import low_rank


def few(
    x: Tensor, values: Tensor, index: Tensor, scale: Tensor, U: Tensor | None, V: Tensor | None, bias: Tensor | None,
    shape: tuple[int, int], bits: int,
) -> Tensor:  # fmt: skip
    """x: (rows, n), 1 to gpu.SLOTS rows -> (rows, m)."""
    m, n = shape
    rows, rank, lines = x.shape[0], 0 if U is None else U.shape[1], -(-n // LINE)
    y = x.new_empty(rows, m)
    t = x if V is None else F.linear(x, V)
    rest, count = _rest(index, shape, bits)
    # What is absent is never read, but a kernel wants an address.
    operands = (
        x, values, index, scale, _factors(x.device), rest, x if U is None else U, t, x if bias is None else bias, y,
        m, n, lines, rank, count,
    )  # fmt: skip
    known: dict[str, Any] = {"BIAS": bias is not None, "BITS": bits, "REST": count > 0}
    with gpu.on(x.device):
        if rows == 1:
            _kernels().one[(-(-m // 8),)](*operands, **known, R=8, RANK=64, RANKS=-(-rank // 64), **_steps(lines, 8))
        else:
            exact = gpu.INTERPRETED or x.dtype == torch.float32  # the interpreter multiplies bfloat16 as whole numbers
            _kernels().some[(-(-m // 16),)](
                *operands, rows, **known, R=16, RANK=32, RANKS=-(-rank // 32), SLOTS=gpu.SLOTS, EXACT=exact,
                **_steps(lines, 2 if x.dtype == torch.float32 else 4),
            )  # fmt: skip
    return y


def rows_of(
    rows: Tensor | slice, values: Tensor, index: Tensor, scale: Tensor, shape: tuple[int, int], bits: int,
    scratch: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rows of S, (rows, n), in memory of their own or in that of `scratch`: those numbered, int64, or of a slice."""
    m, n = shape
    start, stop, _ = rows.indices(m) if isinstance(rows, slice) else (0, rows.numel(), 1)
    S = values.new_empty(stop - start, n) if scratch is None else scratch[: stop - start]
    rest, count = _rest(index, shape, bits)
    lines, listed = -(-n // LINE), isinstance(rows, Tensor)
    if S.numel():
        with gpu.on(values.device):
            _kernels().rows_of[(-(-S.shape[0] // 8),)](
                rows if listed else index, values, index, scale, _factors(values.device), rest, S, start, stop, m, n,
                lines, count, LISTED=listed, BITS=bits, REST=count > 0, R=8, **_steps(lines, 8),
            )  # fmt: skip
    return S


def many(
    x: Tensor, values: Tensor, index: Tensor, scale: Tensor, U: Tensor | None, V: Tensor | None, bias: Tensor | None,
    shape: tuple[int, int], bits: int,
) -> Tensor:  # fmt: skip
    """x: (rows, n) -> (rows, m), with at most gpu.TILE_BYTES of S dense at a time."""
    m, n = shape
    y = low_rank(x, U, V, bias, m)
    scratch = x.new_empty(min(m, max(1, gpu.TILE_BYTES // (n * x.element_size()))), n)
    for begin in range(0, m, len(scratch)):
        tile = rows_of(slice(begin, begin + len(scratch)), values, index, scale, shape, bits, scratch)
        y[:, begin : begin + len(tile)].addmm_(x, tile.T)
    return y


def _kernels() -> Any:
    return gpu.kernels("gpu_triton_codes")


@cache
def _factors(device: torch.device) -> Tensor:
    return COLUMN_FACTORS.to(device)


def _rest(index: Tensor, shape: tuple[int, int], bits: int) -> tuple[Tensor, int]:
    """What lies beside the strips, and how many codes that is of."""
    count = rest_of(index, shape, bits)
    return (index[packed_bytes(shape, bits, 0) :].view(torch.int32) if count else index), count


def _steps(lines: int, most: int) -> dict[str, Any]:
    """How a row of strips is gone through, `most` lines at a time or fewer."""
    step = min(most, 1 << (lines - 1).bit_length())
    return {"LINES": step, "BLOCKS": -(-lines // step)}
