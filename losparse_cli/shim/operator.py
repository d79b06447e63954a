"""The product of a compressed layer as one operator of torch, y = x Vᵀ Uᵀ + x Sᵀ + b, with its gradients.

S is held in one of FORMS, whatever layout it was stored in. The computations here are plain torch and work anywhere;
`installed` holds faster ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .codec import unpack_bits
from .installed import kernels
from .layouts import column_factors
from .packed import FEWEST, MOST, best_bits, bits_of, form_of, unfit, unpack

FORMS = ("bits", "gaps", "rows", "columns", "codes", *map(form_of, range(FEWEST, MOST + 1)))
"""What `index` holds, for values of S in row-major order:

bits: (out, ceil(in / 8)), uint8: one bit an entry, lowest first. `starts`: (out + 1,), int32: where each row's values
    begin.
gaps: uint8, one for each value: the entries skipped before it; 255 skips 255 and has no value; counted anew in every
    row. `starts`: (2, out + 1), int32: where each row's values begin, and its gaps.
rows, columns: int32, the rows or columns that are kept; no `starts`.
codes: (out, in), whole numbers, of which `values` holds the factor of each row. `starts`: (in,), uint8: what is stored
    of the factors of the columns.
codes2 to codes8: the same in so many bits each (`packed`), uint8.
codes4@rows100, codes4@columns100: as codes4 those of 100 rows or columns, beside which all are zero; uint8. Which they
    are stands before, int32, and for columns what is stored of their factors, filled up to a multiple of 64 bytes.
"""

BLOCK = 1 << 22
"""Entries of a matrix of codes, such as an output head's, that are floats at a time."""


# --- the operator -----------------------------------------------------------------------------------

# Every copy of this file has its own operators: the package's, and one in each checkpoint whose code is run.
_copy = "" if __name__.startswith("losparse_cli.") else f"_{zlib.crc32(__name__.encode()):08x}"
NAMESPACE = f"losparse{_copy}"
_S = "Tensor values, Tensor index, Tensor? starts, Tensor? U, Tensor? V"


@torch.library.custom_op(
    f"{NAMESPACE}::linear",
    mutates_args=(),
    schema=f"(Tensor x, {_S}, Tensor? bias, int out_features, str form) -> Tensor",
)
def _linear(
    x: Tensor, values: Tensor, index: Tensor, starts: Tensor | None, U: Tensor | None, V: Tensor | None,
    bias: Tensor | None, out_features: int, form: str,
) -> Tensor:  # fmt: skip
    y = kernels().product(x, values, index, starts, U, V, bias, out_features, form)
    return reference(x, values, index, starts, U, V, bias, out_features, form) if y is None else y


@_linear.register_fake
def _(
    x: Tensor, values: Tensor, index: Tensor, starts: Tensor | None, U: Tensor | None, V: Tensor | None,
    bias: Tensor | None, out_features: int, form: str,
) -> Tensor:  # fmt: skip
    # Where the values are: x beside weights that have no memory gives no numbers either.
    return values.new_empty((*x.shape[:-1], out_features), dtype=x.dtype)


@torch.library.custom_op(
    f"{NAMESPACE}::linear_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? x, int in_features, {_S}, bool[] wanted, str form) -> Tensor[]",
)
def _linear_backward(
    grad: Tensor, x: Tensor | None, in_features: int, values: Tensor, index: Tensor, starts: Tensor | None,
    U: Tensor | None, V: Tensor | None, wanted: list[bool], form: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of x, values, U, V and bias, those of them that are wanted; S is made dense for a moment at most.

    x: None where it is not needed, for x and the bias.
    """
    shape = (grad.shape[-1], in_features)
    g, flat = grad.reshape(-1, shape[0]), None if x is None else x.reshape(-1, in_features)
    for_x, for_values, for_U, for_V, for_bias = wanted
    found: list[Tensor] = []
    if for_x:
        found.append(_times_sparse(g, values, index, starts, shape, form))
    if for_values and flat is not None:
        found.append(_values_of_outer(g, flat, index, starts, values.numel(), form))
    if U is not None and V is not None:
        inner = g @ U
        if for_x:
            found[0] = found[0] + inner @ V
        if for_U and flat is not None:
            found.append(g.T @ F.linear(flat, V))
        if for_V and flat is not None:
            found.append(inner.T @ flat)
    if for_x:
        found[0] = found[0].reshape(*grad.shape[:-1], in_features)
    if for_bias:
        found.append(g.sum(0))
    return found


@_linear_backward.register_fake
def _(
    grad: Tensor, x: Tensor | None, in_features: int, values: Tensor, index: Tensor, starts: Tensor | None,
    U: Tensor | None, V: Tensor | None, wanted: list[bool], form: str,
) -> list[Tensor]:  # fmt: skip
    made = [grad.new_empty((*grad.shape[:-1], in_features))] if wanted[0] else []
    made += [torch.empty_like(t) for t, w in zip((values, U, V), wanted[1:4], strict=True) if w and t is not None]
    return [*made, grad.new_empty(grad.shape[-1])] if wanted[4] else made


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, index, starts, U, V, _, _, form = inputs
    ctx.form, ctx.in_features = form, x.shape[-1]
    ctx.wanted = [ctx.needs_input_grad[k] for k in (0, 1, 4, 5, 6)]
    # Of frozen weights nothing is kept that flowed in, as of a dense layer.
    ctx.save_for_backward(x if any(ctx.wanted[1:4]) else None, values, index, starts, U, V)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, *parts = ctx.saved_tensors
    found = iter(_linear_backward(grad, x, ctx.in_features, *parts, ctx.wanted, ctx.form))
    x, values, U, V, bias = (next(found) if wanted else None for wanted in ctx.wanted)
    return x, values, None, None, U, V, bias, None, None


_linear.register_autograd(_backward, setup_context=_keep)


def product(
    x: Tensor, values: Tensor, index: Tensor, starts: Tensor | None, U: Tensor | None, V: Tensor | None,
    bias: Tensor | None, out_features: int, form: str,
) -> Tensor:  # fmt: skip
    """x: (..., in) -> (..., out); values: (nnz,); U (out, rank), V (rank, in) or both None; bias (out,) or None.

    The operator itself costs tens of microseconds, so without gradients a kernel is called past it where it can be.
    """
    if "@" in form:
        part = _product_of_lines(x, values, index, starts, out_features, form)
        if U is not None and V is not None:
            part = part + F.linear(F.linear(x, V), U)
        return part if bias is None else part + bias
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
        y = kernels().product(x, values, index, starts, U, V, bias, out_features, form)
        if y is not None:
            return y
    return _linear(x, values, index, starts, U, V, bias, out_features, form)  # type: ignore[no-any-return]


def _product_of_lines(
    x: Tensor, values: Tensor, index: Tensor, starts: Tensor | None, out_features: int, form: str
) -> Tensor:
    """Of S alone, by the product with the lines that are kept."""
    which, lines, scale, codes, inner = _lines(index, form)
    if which == "rows":
        y = product(x, values.index_select(0, lines), codes, starts, None, None, None, len(lines), inner)
        return y.new_zeros(*x.shape[:-1], out_features).index_copy(-1, lines.long(), y)
    return product(x.index_select(-1, lines), values, codes, scale, None, None, None, out_features, inner)


def _lines(index: Tensor, form: str) -> tuple[str, Tensor, Tensor, Tensor, str]:
    """Whether rows or columns are kept, their numbers, factors of columns, their codes, and the form of these."""
    inner, _, rest = form.partition("@")
    which = "rows" if rest.startswith("rows") else "columns"
    count = int(rest.removeprefix(which))
    head = _head_bytes(count, which)
    return which, index[: 4 * count].view(torch.int32), index[4 * count : 5 * count], index[head:], inner


def _head_bytes(count: int, which: str) -> int:
    return -(-count * (4 if which == "rows" else 5) // 64) * 64


# --- in plain torch ---------------------------------------------------------------------------------


def reference(
    x: Tensor, values: Tensor, index: Tensor, starts: Tensor | None, U: Tensor | None, V: Tensor | None,
    bias: Tensor | None, out_features: int, form: str,
) -> Tensor:  # fmt: skip
    """As `product`, in operations of torch that any device has."""
    n = x.shape[-1]
    if values.numel() == 0:
        y = x.new_zeros(*x.shape[:-1], out_features)
    elif form == "columns":
        y = F.linear(x.index_select(-1, index), values.view(out_features, -1))
    elif form == "rows":
        part = F.linear(x, values.view(-1, n))
        y = part.new_zeros(*x.shape[:-1], out_features).index_copy(-1, index.long(), part)
    elif form.startswith("codes") and out_features * n > BLOCK:
        shape = (out_features, n)
        parts = (rows_of_codes(rows, values, index, starts, shape, form) for rows in _pieces(shape))
        y = torch.cat([F.linear(x, S) for S in parts], -1)
    else:
        y = F.linear(x, sparse(values, index, starts, (out_features, n), form))
    if U is not None and V is not None:
        y = y + F.linear(F.linear(x, V), U)
    return y if bias is None else y + bias


def sparse(values: Tensor, index: Tensor, starts: Tensor | None, shape: tuple[int, int], form: str) -> Tensor:
    """S as a dense (out, in) matrix."""
    if form in ("bits", "gaps") and starts is not None:
        S = kernels().spread(values, index, starts, shape)
        if S is not None:
            return S
    if form.startswith("codes"):
        return rows_of_codes(slice(None), values, index, starts, shape, form)
    where = support(index, starts, shape, form)
    return torch.zeros_like(where, dtype=values.dtype).masked_scatter(where, values)


def support(index: Tensor, starts: Tensor | None, shape: tuple[int, int], form: str) -> Tensor:
    """Where S holds entries: (out, in), bool."""
    m, n = shape
    if form.startswith("codes"):
        return codes_of(index, shape, form) != 0
    if form == "bits":
        return unpack_bits(index, n)
    if form == "gaps":
        assert starts is not None, "gaps come with where rows start"
        skipped = index.long()
        ends = torch.cumsum(skipped + (index != 255), 0)
        bytes_in_row = torch.diff(starts[1].long())
        row = torch.repeat_interleave(torch.arange(m, device=index.device), bytes_in_row)
        before = torch.cat((ends.new_zeros(1), ends))[starts[1, :-1].long()]
        flat = (row * n + ends - 1 - before[row])[index != 255]
    else:
        line = torch.zeros(m if form == "rows" else n, dtype=torch.bool, device=index.device)
        line[index.long()] = True
        return (line[:, None] if form == "rows" else line[None, :]).expand(m, n).contiguous()
    where = torch.zeros(m * n, dtype=torch.bool, device=index.device)
    where[flat] = True
    return where.view(m, n)


def codes_of(index: Tensor, shape: tuple[int, int], form: str) -> Tensor:
    """The codes of an index in any of their forms, (out, in)."""
    if "@" in form:
        which, lines, _, part, inner = _lines(index, form)
        inside = (len(lines), shape[1]) if which == "rows" else (shape[0], len(lines))
        some = codes_of(part, inside, inner)
        return some.new_zeros(shape).index_copy(0 if which == "rows" else 1, lines.long(), some)
    bits = bits_of(form)
    if not bits:
        return index
    found = kernels().unpacked(index, shape, bits)
    return unpack(index, shape, bits) if found is None else found


def rows_of_codes(
    rows: Tensor | slice, values: Tensor, index: Tensor, starts: Tensor | None, shape: tuple[int, int], form: str
) -> Tensor:
    """Some rows of S, dense, by their numbers: in the sizes of `rows` and (in,) more. Of a slice none is gathered."""
    assert starts is not None, "codes come with the factors of columns"
    bits = bits_of(form)
    if bits:
        rows = torch.arange(shape[0], device=index.device)[rows] if isinstance(rows, slice) else rows
        found = kernels().looked_up(rows, values, index, starts, shape, bits)
        if found is not None:
            return found
        codes = unpack(index, shape, bits, rows)
    else:
        codes = codes_of(index, shape, form)[rows]
    return (codes.float() * column_factors(starts)).mul_(values[rows].float()[..., None]).to(values.dtype)


def held(codes: Tensor, scale: Tensor | None = None, lines: tuple[str, ...] = ()) -> tuple[Tensor, str]:
    """Codes (out, in) in as few bits as nearly all need, where there are kernels that compute with them so, and that is
    smaller; else as they are, which plain torch multiplies with sooner. And the form's name.

    lines: `rows`, `columns` or both, where a pattern has left only some; then without the others if those are fewer by
    half. scale: what is stored of the factors of the columns.
    """
    sizes = dict(zip(("rows", "columns"), codes.shape, strict=True))
    wanted = codes != 0 if lines else codes
    kept = {which: wanted.any(int(which == "rows")).nonzero()[:, 0] for which in lines}
    which = min(kept, key=lambda which: len(kept[which]) / sizes[which], default="")
    if which and 0 < 2 * len(kept[which]) <= sizes[which] and scale is not None:
        chosen = kept[which]
        index, form = _held(codes.index_select(int(which == "columns"), chosen), MOST)
        if bits_of(form):
            head = index.new_zeros(_head_bytes(len(chosen), which))
            head[: 4 * len(chosen)] = chosen.int().view(torch.uint8)
            if which == "columns":
                head[4 * len(chosen) : 5 * len(chosen)] = scale[chosen]
            return torch.cat((head, index)), f"{form}@{which}{len(chosen)}"
    return _held(codes, codes.itemsize)


def _held(codes: Tensor, width: int) -> tuple[Tensor, str]:
    """Codes in few bits, if that is less than a third more than so many bytes each."""
    m, n = codes.shape
    counts = kernels().code_bits(codes)
    bits = 0 if counts is None else best_bits((m, n), counts, width)
    if counts is None or not bits:
        return codes, form_of(0)
    index = kernels().packed(codes, bits, unfit(counts, bits))
    return (codes, form_of(0)) if index is None else (index, form_of(bits))


def _times_sparse(
    g: Tensor, values: Tensor, index: Tensor, starts: Tensor | None, shape: tuple[int, int], form: str
) -> Tensor:
    """g (tokens, out) S -> (tokens, in)."""
    if values.numel() == 0:
        return g.new_zeros(g.shape[0], shape[1])
    if form == "rows":
        return g.index_select(1, index) @ values.view(-1, shape[1])
    if form == "columns":
        part = g @ values.view(shape[0], -1)
        return part.new_zeros(g.shape[0], shape[1]).index_copy(1, index.long(), part)
    if form.startswith("codes") and starts is not None:
        found = kernels().times_sparse(g, values, index, starts, shape, form)
        for rows in _pieces(shape) if found is None else ():
            S = rows_of_codes(rows, values, index, starts, shape, form)
            part = g[:, rows] @ S
            wide = torch.promote_types(g.dtype, torch.float32)  # in which no piece is rounded once more
            found = part if found is None else found.to(wide).add_(part)
        assert found is not None, "a layer has rows"
        return found.to(g.dtype)
    return g @ sparse(values, index, starts, shape, form)


def _pieces(shape: tuple[int, int]) -> Iterator[slice]:
    """Rows of a matrix of codes, some at a time, that are floats of BLOCK entries at most where a row has no more."""
    m, n = shape
    step = max(1, BLOCK // n)
    return (slice(begin, min(begin + step, m)) for begin in range(0, m, step))


def _values_of_outer(g: Tensor, x: Tensor, index: Tensor, starts: Tensor | None, nnz: int, form: str) -> Tensor:
    """Gradients of the values: entries of gᵀ x, (out, in), where S has entries; of codes those of the rows' factors."""
    if nnz == 0:
        return g.new_empty(0)
    if form == "rows":
        return (g.index_select(1, index).T @ x).reshape(-1)
    if form == "columns":
        return (g.T @ x.index_select(1, index)).reshape(-1)
    if form.startswith("codes"):
        shape, ones = (g.shape[1], x.shape[1]), torch.ones(g.shape[1], device=g.device)
        pieces = ((rows, rows_of_codes(rows, ones, index, starts, shape, form)) for rows in _pieces(shape))
        return torch.cat([((g[:, rows].T @ x) * C).sum(1) for rows, C in pieces]).to(g.dtype)
    return (g.T @ x)[support(index, starts, (g.shape[1], x.shape[1]), form)]
