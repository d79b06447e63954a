"""Support of S <-> index tensors, in each of the layouts.

`encode` turns a bool matrix into a few small tensors, `decode` turns them back and checks every index on the
way. This file is shipped inside checkpoints and may import nothing but torch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .layouts import LayerSpec, candidates, column_dtype, group_rows, n_of_m, position_bits


def smallest(support: Tensor, rank: int, pattern: str) -> tuple[LayerSpec, dict[str, Tensor]]:
    """The layout that stores `support` in the fewest bytes, with its index tensors.

    support: (out, in), bool. A tie goes to the earlier of `candidates`.
    """
    m, n = support.shape
    flat = torch.nonzero(support.reshape(-1)).view(-1)
    nnz = flat.numel()
    best: tuple[int, LayerSpec, dict[str, Tensor]] | None = None
    for layout in sorted(
        candidates(pattern, (m, n), nnz), key=lambda name: _least_index_bytes(name, pattern, (m, n), nnz)
    ):
        if best is not None and best[0] <= _least_index_bytes(layout, pattern, (m, n), nnz):
            break  # nor can any later one be smaller
        spec = LayerSpec((m, n), rank, nnz, pattern, layout, group_rows(n) if layout.startswith("gaps") else 0)
        index = _encode(spec, support, flat)
        if "S_gaps" in index:
            spec = replace(spec, index_bytes=index["S_gaps"].numel())
        size = sum(tensor.numel() * tensor.itemsize for tensor in index.values())
        if best is None or size < best[0]:
            best = size, spec, index
    assert best is not None, "every pattern has a layout"
    return best[1], best[2]


def _least_index_bytes(layout: str, pattern: str, shape: tuple[int, int], nnz: int) -> int:
    """Bytes of the index without any escape: exact for all but the gap layouts, which may take more."""
    rows = group_rows(shape[1]) if layout.startswith("gaps") else 0
    stream = (-(-nnz // 2) if layout == "gaps4" else nnz) if rows else 0
    return LayerSpec(shape, 0, nnz, pattern, layout, rows, stream).nbytes(torch.uint8) - nnz


# --- encode ---------------------------------------------------------------------------------------


def encode(spec: LayerSpec, support: Tensor) -> dict[str, Tensor]:
    """Index tensors of `support` (out, in; bool) in the layout of `spec`: suffix -> contiguous tensor."""
    return _encode(spec, support, torch.nonzero(support.reshape(-1)).view(-1))


def _encode(spec: LayerSpec, support: Tensor, flat: Tensor) -> dict[str, Tensor]:
    """`encode`, with the row-major positions of the entries of S at hand."""
    m, n = spec.shape
    if spec.layout == "bitmask":
        return {"S_mask": pack_bits(support)}
    if spec.layout == "rows":
        return {"S_rows": torch.nonzero(support.any(dim=1)).view(-1).int()}
    if spec.layout == "columns":
        return {"S_columns": torch.nonzero(support.any(dim=0)).view(-1).int()}
    if spec.layout == "csr":
        return {"S_columns": (flat % n).to(column_dtype(n)), "S_offsets": _split(flat, m, n).int()}
    if spec.layout == "n:m":
        group = n_of_m(spec.pattern)[1]
        shifts = torch.arange(position_bits(group), device=flat.device)
        bits = ((flat % group)[:, None] >> shifts) & 1
        return {"S_index": pack_bits(bits.bool().view(1, -1)).view(-1)}
    return _encode_gaps(spec, flat)


def _split(flat: Tensor, groups: int, entries: int) -> Tensor:
    """Where each run of `entries` positions starts in the sorted `flat`, and where the last one ends."""
    return torch.searchsorted(flat, torch.arange(groups + 1, device=flat.device) * entries)


def _encode_gaps(spec: LayerSpec, flat: Tensor) -> dict[str, Tensor]:
    escape = 15 if spec.layout == "gaps4" else 255
    groups, entries = -(-spec.shape[0] // spec.group_rows), spec.group_rows * spec.shape[1]
    values = _split(flat, groups, entries)
    counts = torch.diff(values)
    # Entries skipped before each non-zero, counted anew in every group.
    gaps = torch.diff(flat, prepend=flat.new_full((1,), -1)) - 1
    occupied = torch.nonzero(counts).view(-1)
    first = values[occupied]
    gaps[first] = flat[first] - occupied * entries
    gaps = gaps.int()
    # A gap takes one unit (a nibble or a byte), and one escape before it for each `escape` entries.
    ends = torch.cumsum(gaps // escape + 1, 0)
    before = torch.cat((ends.new_zeros(1), ends))[values]
    units = torch.diff(before)
    if spec.layout == "gaps4":
        units = units + units % 2  # each group starts on a byte
    starts = _starts(units)
    position = ends - 1 + torch.repeat_interleave(starts[:-1] - before[:-1], counts)
    stream = torch.full((int(starts[-1]),), escape, dtype=torch.uint8, device=flat.device)
    stream[position] = (gaps % escape).to(torch.uint8)
    if spec.layout == "gaps4":
        stream, starts = stream[0::2] | stream[1::2] << 4, starts // 2
    return {"S_gaps": stream, "S_offsets": torch.stack((values, starts), dim=1).int()}


# --- decode ---------------------------------------------------------------------------------------


def decode(spec: LayerSpec, index: dict[str, Tensor]) -> Tensor:
    """The support, (out, in) bool, from the index tensors; ValueError names the first thing wrong."""
    m, n = spec.shape
    for suffix, (shape, dtype) in spec.tensor_shapes(torch.float32).items():
        if suffix.startswith("S_"):
            _require(suffix in index, f"{suffix} is missing")
            got = index[suffix]
            _require(tuple(got.shape) == shape, f"{suffix} has shape {tuple(got.shape)}, not {shape}")
            _require(got.dtype == dtype, f"{suffix} is {got.dtype}, not {dtype}")
    if spec.layout == "bitmask":
        bits = unpack_bits(index["S_mask"], -(-n // 8) * 8)
        _require(not bool(bits[:, n:].any()), "S_mask sets bits past the last column")
        support = bits[:, :n].contiguous()
        _require(int(torch.count_nonzero(support)) == spec.nnz, f"S_mask does not set {spec.nnz} bits")
        return support
    if spec.layout in ("rows", "columns"):
        axis_size, other = (m, n) if spec.layout == "rows" else (n, m)
        name = "S_rows" if spec.layout == "rows" else "S_columns"
        chosen = index[name].long()
        _require(chosen.numel() * other == spec.nnz, f"{name} does not account for {spec.nnz} values")
        _require_increasing(chosen, axis_size, name)
        line = torch.zeros(axis_size, dtype=torch.bool, device=chosen.device)
        line[chosen] = True
        return (line[:, None] if spec.layout == "rows" else line[None, :]).expand(m, n).contiguous()
    if spec.layout == "csr":
        offsets, columns = index["S_offsets"].long(), index["S_columns"].long()
        counts = _checked_counts(offsets, spec.nnz, "S_offsets")
        leaves = columns.numel() and (int(columns.min()) < 0 or int(columns.max()) >= n)
        _require(not leaves, "S_columns leaves the row")
        flat = torch.repeat_interleave(torch.arange(m, device=columns.device), counts) * n + columns
    elif spec.layout == "n:m":
        flat = _decode_n_of_m(spec, index["S_index"])
    else:
        flat = _decode_gaps(spec, index["S_gaps"], index["S_offsets"].long())
    _require_increasing(flat, m * n, "index of S")
    support = torch.zeros(m * n, dtype=torch.bool, device=flat.device)
    support[flat] = True
    return support.view(m, n)


def _decode_n_of_m(spec: LayerSpec, packed: Tensor) -> Tensor:
    (m, n), (keep, group) = spec.shape, n_of_m(spec.pattern)
    _require(n % group == 0 and spec.nnz == m * (n // group) * keep, "nnz does not match the pattern")
    width = position_bits(group)
    bits = unpack_bits(packed.view(1, -1), spec.nnz * width).view(-1, width).long()
    position = (bits << torch.arange(width, device=bits.device)).sum(dim=1)
    _require(not position.numel() or int(position.max()) < group, "S_index leaves its group")
    start = torch.arange(spec.nnz, device=bits.device) // keep * group
    return start + position


def _decode_gaps(spec: LayerSpec, stream: Tensor, offsets: Tensor) -> Tensor:
    per_byte, escape = (2, 15) if spec.layout == "gaps4" else (1, 255)
    counts = _checked_counts(offsets[:, 0], spec.nnz, "S_offsets")
    _checked_counts(offsets[:, 1], spec.index_bytes, "S_offsets")
    if per_byte == 2:
        stream = torch.stack((stream & 15, stream >> 4), dim=1).view(-1)
    ends = torch.cumsum(stream.long() + (stream != escape), 0)
    where = torch.nonzero(stream != escape).view(-1)
    _require(where.numel() == spec.nnz, f"S_gaps holds {where.numel()} values, not {spec.nnz}")
    starts = offsets[:-1, 1] * per_byte
    group = torch.repeat_interleave(torch.arange(counts.numel(), device=stream.device), counts)
    inside = (where >= starts[group]) & (where < offsets[1:, 1][group] * per_byte)
    _require(bool(inside.all()), "S_gaps and S_offsets disagree")
    base = torch.cat((ends.new_zeros(1), ends))[starts]
    position = ends[where] - 1 - base[group]
    entries = spec.group_rows * spec.shape[1]
    _require(not position.numel() or int(position.max()) < entries, "S_gaps runs past its group of rows")
    return group * entries + position


# --- shared ---------------------------------------------------------------------------------------


def pack_bits(bits: Tensor) -> Tensor:
    """Bool (m, n) -> uint8 (m, ceil(n / 8)): eight entries a byte, lowest bit first, each row padded with zeros."""
    m, n = bits.shape
    octets = torch.nn.functional.pad(bits, (0, -n % 8)).view(torch.uint8).view(m, -1, 8)
    packed = octets[..., 0].clone()
    for shift in range(1, 8):
        packed |= octets[..., shift] << shift
    return packed


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """uint8 (m, bytes) -> bool (m, n), the first n entries of each row."""
    # Eight bools of a byte at once, as one 64-bit word looked up: four times faster than testing bit by bit.
    byte, shift = torch.arange(256, device=packed.device), torch.arange(8, device=packed.device)
    octets = ((byte[:, None] >> shift) & 1).to(torch.uint8).view(torch.int64).view(-1)
    bits = octets.index_select(0, packed.reshape(-1).int()).view(torch.bool).view(packed.shape[0], -1)
    return bits if bits.shape[1] == n else bits[:, :n].contiguous()


def _starts(counts: Tensor) -> Tensor:
    """0 and the running sums: where each group starts, and where the last one ends."""
    return torch.cat((counts.new_zeros(1), torch.cumsum(counts, 0)))


def _checked_counts(offsets: Tensor, total: int, name: str) -> Tensor:
    counts = torch.diff(offsets)
    fits = int(offsets[0]) == 0 and int(offsets[-1]) == total and not bool((counts < 0).any())
    _require(fits, f"{name} does not run from 0 to {total}")
    return counts


def _require_increasing(index: Tensor, size: int, name: str) -> None:
    if index.numel():
        ordered = bool((torch.diff(index) > 0).all()) and int(index[0]) >= 0 and int(index[-1]) < size
        _require(ordered, f"{name} is not increasing inside 0..{size - 1}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
