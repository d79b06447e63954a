"""The product on a CPU: sparse.c for bits and gaps, and dense products over what is kept.

Every function takes x (rows, in) and gives (rows, out), contiguous.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shim.packed import bits_of, packed_bytes, rest_of
from .native import Layer, Library, library

DTYPES = {torch.bfloat16: 0, torch.float32: 1}
"""What sparse.c computes in, by its number; it can expand any dtype of 2 or 4 bytes."""
WHOLE = 2
"""Codes as they are, by its number in codes.h."""
TILE_ENTRIES = 1 << 22
"""Entries of S that are dense at a time: 8 MiB in bfloat16, which stay in the last cache."""
CODED_ENTRIES = 1 << 21
"""The same of codes, which are dense sooner."""
LARGE_PAGE = 1 << 21
SERIAL_ENTRIES = 1 << 21
"""Entries of S times rows of x and two more, below which one thread is done (in about 20 microseconds) before others
would help."""


def low_rank(x: Tensor, U: Tensor | None, V: Tensor | None, bias: Tensor | None, out_features: int) -> Tensor:
    """x Vᵀ Uᵀ + bias, or zeros."""
    if U is not None and V is not None:
        return F.linear(F.linear(x, V), U, bias)
    if bias is not None:
        return bias.repeat(x.shape[0], 1)  # its own memory: others add to it
    return x.new_zeros(x.shape[0], out_features)


def block(
    x: Tensor, values: Tensor, index: Tensor, U: Tensor | None, V: Tensor | None, bias: Tensor | None,
    out_features: int, form: str,
) -> Tensor:  # fmt: skip
    """Kept rows or columns of S: one dense product over what is kept."""
    n = x.shape[1]
    if form == "columns":
        y = F.linear(x.index_select(1, index), values.view(out_features, -1), bias)
        if U is not None and V is not None:
            y.addmm_(F.linear(x, V), U.T)
        return y
    y = low_rank(x, U, V, bias, out_features)
    part, code = F.linear(x, values.view(-1, n)), library()
    if code is None or x.device.type != "cpu" or x.dtype not in DTYPES:
        return y.index_add_(1, index, part)
    code.add_columns(
        y.data_ptr(), part.data_ptr(), index.data_ptr(), x.shape[0], out_features, index.numel(), DTYPES[x.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return y


def few(code: Library, layer: Layer, x: Tensor, rows: int) -> Tensor | None:
    """`spread` or `gather`: everything in one call, for x of any shape. None if it cannot."""
    y = x.new_empty((*x.shape[:-1], layer.m))
    failed = code.few(layer, x.data_ptr(), y.data_ptr(), rows, few_threads(layer, rows, "bits"), code.level)
    return None if failed else y


def few_of_block(code: Library, layer: Layer, x: Tensor, rows: int, form: str) -> Tensor | None:
    """`block` for few rows of x: everything in one call, for x of any shape. None if it cannot."""
    y = x.new_empty((*x.shape[:-1], layer.m))
    threads = few_threads(layer, rows, form)
    failed = code.block(layer, form == "rows", x.data_ptr(), y.data_ptr(), rows, threads, code.level)
    return None if failed else y


def walk(
    code: Library, layer: Layer, x: Tensor, U: Tensor | None, V: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """S value by value, added to the rest of the sum."""
    y = low_rank(x, U, V, bias, layer.m)
    failed = code.walk(
        layer, x.data_ptr(), y.data_ptr(), x.shape[0], few_threads(layer, x.shape[0], "bits"), code.level
    )
    return None if failed else y


def tile(
    code: Library, layer: Layer, x: Tensor, U: Tensor | None, V: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """Some rows of S dense at a time; with U V in them where x has so many rows that this is less work."""

    def fill(W: Tensor, begin: int) -> bool:
        end, threads = begin + len(W), torch.get_num_threads()
        return not code.expand(layer, W.data_ptr(), begin, end, W.itemsize, threads, code.level)

    return _tiled(layer, x, U, V, bias, TILE_ENTRIES, fill)


def _tiled(
    layer: Layer, x: Tensor, U: Tensor | None, V: Tensor | None, bias: Tensor | None, entries: int,
    fill: Callable[[Tensor, int], bool],
) -> Tensor | None:  # fmt: skip
    """fill: puts the rows of S from a number on into a dense tile of so many entries; whether it could."""
    rows, m, n = x.shape[0], layer.m, layer.n
    merged = U is None or (4 * layer.rank <= rows and n <= 2 * rows)
    y = x.new_empty(rows, m) if merged else low_rank(x, U, V, bias, m)
    for here, W in _tiles(layer, entries, x.dtype):
        if not fill(W, here.start):
            return None
        if not merged:
            y[:, here] += F.linear(x, W)
            continue
        if U is not None and V is not None:
            W.addmm_(U[here], V)
        part = F.linear(x, W, None if bias is None else bias[here])
        if len(W) == m:
            return part
        y[:, here] = part
    return y


_kept = threading.local()


def _tiles(layer: Layer, entries: int, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Some rows of a layer in turn, and a tile for them, with anything in it: all of them in the same memory, which
    each thread keeps, for fresh pages cost as much as what is put there."""
    m, n = layer.m, layer.n
    step = min(max(1, entries // n), m)
    size = step * n * dtype.itemsize
    memory: Tensor | None = getattr(_kept, "memory", None)
    if memory is None or memory.numel() < size:
        with torch.inference_mode(False):  # or it could not be changed outside again
            memory = _kept.memory = torch.empty(size, dtype=torch.uint8, device="cpu")
    scratch = memory[:size].view(dtype).view(step, n)
    for begin in range(0, m, step):
        end = min(begin + step, m)
        yield slice(begin, end), scratch[: end - begin]


def dense(code: Library, layer: Layer, S: Tensor) -> Tensor | None:
    """S (out, in), filled."""
    failed = code.expand(layer, S.data_ptr(), 0, layer.m, S.itemsize, torch.get_num_threads(), code.level)
    return None if failed else S


def digits(code: Library, layer: Layer, x: Tensor, rows: int) -> Tensor | None:
    """S of packed codes times whole numbers, everything in one call, for x of any shape. None if it cannot."""
    y = x.new_empty((*x.shape[:-1], layer.m))
    threads = few_threads(layer, rows, "codes")
    failed = code.coded(layer, x.data_ptr(), y.data_ptr(), rows, digits_of(layer), threads, code.level)
    return None if failed else y


def digits_of(layer: Layer) -> int:
    """Of x, 7 bits each: as exact as its dtype and more."""
    return 2 if layer.dtype == DTYPES[torch.bfloat16] else 3


def tile_of_codes(
    code: Library, layer: Layer, x: Tensor, values: Tensor, U: Tensor | None, V: Tensor | None, bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | None:  # fmt: skip
    """Some rows of codes dense at a time, in the dtype that this processor multiplies fastest. Factors stay beside them
    in bfloat16, where codes are exact and their products with factors are not; in float32 they are in the tile, which
    spares two passes over what flows."""
    if dtype == torch.float32:

        def fill(W: Tensor, begin: int) -> bool:
            return rows_of_codes(code, layer, None, begin, W) is not None

        U, V, bias = (t if t is None else t.to(dtype) for t in (U, V, bias))
        found = _tiled(layer, x.to(dtype), U, V, bias, CODED_ENTRIES, fill)
        return None if found is None else found.to(x.dtype)
    alone = U is None and bias is None
    y = x.new_empty(x.shape[0], layer.m) if alone else low_rank(x, U, V, bias, layer.m)
    wide = torch.empty_like(x, dtype=dtype)
    threads = torch.get_num_threads()
    if code.scale(layer, x.data_ptr(), x.shape[0], DTYPES[dtype], wide.data_ptr(), threads, code.level):
        return None
    for here, W in _tiles(layer, CODED_ENTRIES, dtype):
        if rows_of_codes(code, layer, None, here.start, W, scaled=False) is None:
            return None
        part, into = F.linear(wide, W), y[:, here]
        if alone:
            torch.mul(part, values[here], out=into)
        else:
            into.addcmul_(part.to(y.dtype), values[here])
    return y


def times_codes(code: Library, layer: Layer, g: Tensor, dtype: torch.dtype) -> Tensor | None:
    """g (rows, out) S -> (rows, in), for the way back: some rows of S dense at a time, in this dtype."""
    wide, found = g.to(dtype), None
    for here, S in _tiles(layer, CODED_ENTRIES, dtype):
        if rows_of_codes(code, layer, None, here.start, S) is None:
            return None
        part = wide[:, here] @ S
        found = part if found is None else found.float().add_(part)  # in bfloat16 each tile would be rounded once more
    return None if found is None else found.to(g.dtype)


def rows_of_codes(
    code: Library, layer: Layer, rows: Tensor | None, first: int, out: Tensor, *, scaled: bool = True
) -> Tensor | None:
    """Rows of S, by their numbers or from `first` on, into `out`; codes where that is int32, or not `scaled`."""
    failed = code.rows_of_codes(
        layer, None if rows is None else rows.data_ptr(), first, out.shape[0], DTYPES.get(out.dtype, WHOLE), scaled,
        out.data_ptr(), 1 if out.numel() < SERIAL_ENTRIES // 16 else torch.get_num_threads(), code.level,
    )  # fmt: skip
    return None if failed else out


def code_bits(code: Library, codes: Tensor) -> list[int]:
    """How many codes take how many bits, as shim.packed counts them."""
    counts = torch.empty(9, dtype=torch.int64)
    code.code_bits(codes.data_ptr(), codes.numel(), codes.itemsize, counts.data_ptr(), torch.get_num_threads())
    return counts.tolist()


def packed(code: Library, codes: Tensor, bits: int, rest: int) -> Tensor | None:
    """The index of codes (m, n) in so many bits each."""
    m, n = codes.shape
    index = _at_a_large_page(code, packed_bytes((m, n), bits, rest))
    layer = Layer(index=index.data_ptr(), m=m, n=n, bits=bits, rest=rest)
    failed = code.pack_codes(layer, codes.data_ptr(), codes.itemsize, torch.get_num_threads(), code.level)
    return None if failed else index


def _at_a_large_page(code: Library, size: int) -> Tensor:
    """So many bytes, where they are many beginning at a page of 2 MiB; what is before takes no memory."""
    if size < 2 * LARGE_PAGE:
        return torch.empty(size, dtype=torch.uint8)
    memory = torch.empty(size + LARGE_PAGE, dtype=torch.uint8)
    begin = -memory.data_ptr() % LARGE_PAGE
    code.large_pages(memory.data_ptr(), memory.numel(), begin, size)
    return memory[begin : begin + size]


def unpacked(code: Library, index: Tensor, shape: tuple[int, int], bits: int) -> Tensor | None:
    """Its codes again, int32."""
    m, n = shape
    rest = rest_of(index, shape, bits)
    layer = Layer(index=index.data_ptr(), m=m, n=n, bits=bits, rest=rest)
    return rows_of_codes(code, layer, None, 0, torch.empty(m, n, dtype=torch.int32))


def describe(
    values: Tensor, index: Tensor, starts: Tensor | None, U: Tensor | None, V: Tensor | None, bias: Tensor | None,
    shape: tuple[int, int], form: str,
) -> Layer:  # fmt: skip
    """The layer as sparse.c sees it; valid as long as the tensors are."""

    def address(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    m, n = shape
    begin = address(starts)
    kept = starts is None
    return Layer(
        values.data_ptr(), 0 if kept else index.data_ptr(), begin, begin + 4 * (m + 1) if form == "gaps" else 0,
        address(U), address(V), address(bias), m, n, 0 if U is None else U.shape[1], DTYPES.get(values.dtype, -1),
        index.data_ptr() if kept else 0, index.numel() if kept else 0, bits_of(form),
        rest_of(index, shape, bits_of(form)) if bits_of(form) else 0,
    )  # fmt: skip


def bits_of_gaps(
    code: Library, stream: Tensor, offsets: Tensor, group_rows: int, shape: tuple[int, int], nnz: int, per_byte: int
) -> tuple[Tensor, Tensor] | None:
    """Bits and where rows start from a gap layout; None if the index is damaged."""
    bits, starts = _empty_bits(shape)
    damaged = code.bits_of_gaps(
        stream.data_ptr(), stream.numel(), offsets.data_ptr(), group_rows, *shape, nnz, per_byte,
        bits.data_ptr(), starts.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return None if damaged else (bits, starts)


def bits_of_groups(
    code: Library, packed: Tensor, keep: int, group: int, width: int, shape: tuple[int, int]
) -> tuple[Tensor, Tensor] | None:
    """The same from layout n:m."""
    bits, starts = _empty_bits(shape)
    damaged = code.bits_of_groups(
        packed.data_ptr(), keep, group, width, *shape, bits.data_ptr(), starts.data_ptr(), torch.get_num_threads()
    )
    return None if damaged else (bits, starts)


def starts_of_bits(code: Library, bits: Tensor, shape: tuple[int, int], nnz: int) -> Tensor | None:
    """Where rows start in a bitmask; None if it is damaged."""
    starts = torch.empty(shape[0] + 1, dtype=torch.int32)
    return None if code.starts_of_bits(bits.data_ptr(), *shape, nnz, starts.data_ptr()) else starts


def _empty_bits(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    m, n = shape
    return torch.zeros(m, -(-n // 8), dtype=torch.uint8), torch.empty(m + 1, dtype=torch.int32)


def few_threads(layer: Layer, rows: int, form: str) -> int:
    """How many threads `few`, or with the form rows or columns `few_of_block`, is worth."""
    structured = form in ("rows", "columns")
    work = 8 * layer.kept_count * layer.m if structured else layer.m * layer.n
    return 1 if work * (rows + 2) < SERIAL_ENTRIES else torch.get_num_threads()
