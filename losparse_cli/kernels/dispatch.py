"""What the shim calls: each product goes the way that `choice` names, or back to plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..shim.layouts import LayerSpec, n_of_m, position_bits
from ..shim.packed import bits_of, form_of, packed_bytes, rest_of
from ..shim.streams import Contexts, Parts
from . import cpu, gpu, gpu_codes, streams
from .choice import DIGITS_ROWS, codes_way, cpu_way, forced, gpu_way
from .choice import SPREAD_ROWS as MOST_FEW
from .native import LEVELS, Layer, Library, library
from .ready import Ready

WIDEST = 1 << 16
"""Columns that sparse.c can number."""
AVX512 = LEVELS.index("AVX-512")
AVX512_BF16 = LEVELS.index("AVX-512 with bfloat16")
MOST_DESCRIBED = 50_000


class Kernels:
    """See shim.installed.Kernels; every method answers None where plain torch has to do."""

    def __init__(self) -> None:
        self.forced = forced()
        self._described: dict[tuple[Any, ...], Layer] = {}

    def product(
        self, x: Tensor, values: Tensor, index: Tensor, starts: Tensor | None, U: Tensor | None, V: Tensor | None,
        bias: Tensor | None, out_features: int, form: str,
    ) -> Tensor | None:  # fmt: skip
        if not (plain(x) and plain(values) and x.dtype == values.dtype and values.numel() and x.numel()):
            return None
        if x.device.type == "cpu":
            found = self._on_cpu(x, values, index, starts, U, V, bias, out_features, form)
            if found is not None:
                return found
        if any(t is not None and (t.dtype, t.device) != (x.dtype, x.device) for t in (values, U, V, bias)):
            return None
        flat = x.reshape(-1, x.shape[-1])
        if form in ("rows", "columns"):
            return _shaped(cpu.block(flat, values, index, U, V, bias, out_features, form), x)
        if x.device.type == "cpu":
            return None
        return _shaped(self._on_gpu(flat, values, index, starts, U, V, bias, out_features, form), x)

    def ready(
        self, values: Tensor, index: Tensor, starts: Tensor | None, U: Tensor | None, V: Tensor | None,
        bias: Tensor | None, shape: tuple[int, int], form: str,
    ) -> Ready | None:  # fmt: skip
        code = library()
        if code is None or values.device.type != "cpu" or shape[1] >= WIDEST or not values.numel():
            return None
        layer = self.described(values, index, starts, U, V, bias, shape, form)
        if layer is None or layer.dtype < 0:
            return None
        density, half = values.numel() / (shape[0] * shape[1]), values.itemsize == 2
        if bits_of(form):
            most = max(DIGITS_ROWS.values())
            rows = [rows > 0 and self._codes_way(code, rows) == "digits" for rows in range(most + 1)]
        else:
            structured = form in ("rows", "columns")
            rows = [
                rows > 0 and (structured or self._way(code, layer, form, rows, density, half) in ("spread", "gather"))
                for rows in range(MOST_FEW + 1)
            ]
        parameters = {"weight": values, "U": U, "V": V, "bias": bias}
        addresses = {name: t.data_ptr() for name, t in parameters.items() if t is not None}
        return Ready(code, layer, form, values.dtype, addresses, rows)

    def _way(self, code: Library, layer: Layer, form: str, rows: int, density: float, half: bool) -> str:
        spreads = code.level >= AVX512
        return self.forced or cpu_way(form, rows, layer.m, density, native=layer.dtype >= 0, half=half, spreads=spreads)

    def _on_cpu(
        self, x: Tensor, values: Tensor, index: Tensor, starts: Tensor | None, U: Tensor | None, V: Tensor | None,
        bias: Tensor | None, m: int, form: str,
    ) -> Tensor | None:  # fmt: skip
        code, n = library(), x.shape[-1]
        if code is None or n >= WIDEST:
            return None
        layer = self.described(values, index, starts, U, V, bias, (m, n), form)
        if layer is None:
            return None
        if not x.is_contiguous():
            x = x.contiguous()
        rows = x.numel() // n
        if bits_of(form):
            return self._coded(code, layer, x, rows, values, U, V, bias)
        if form in ("rows", "columns"):
            return cpu.few_of_block(code, layer, x, rows, form) if rows <= MOST_FEW and layer.dtype >= 0 else None
        way = self._way(code, layer, form, rows, values.numel() / (m * n), values.itemsize == 2)
        if way in ("spread", "gather") and layer.dtype >= 0:
            return cpu.few(code, layer, x, rows)
        if way not in ("walk", "tile"):
            return None
        work = cpu.walk if way == "walk" and layer.dtype >= 0 else cpu.tile
        return _shaped(work(code, layer, x.view(rows, n), U, V, bias), x)

    def _coded(
        self, code: Library, layer: Layer, x: Tensor, rows: int, values: Tensor, U: Tensor | None, V: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        if layer.dtype < 0:
            return None
        way = self._codes_way(code, rows)
        if way == "digits":
            return cpu.digits(code, layer, x, rows)
        if way != "tile":
            return None
        dtype = _multiplied(code, x.dtype)
        return _shaped(cpu.tile_of_codes(code, layer, x.view(rows, layer.n), values, U, V, bias, dtype), x)

    def times_sparse(
        self, g: Tensor, values: Tensor, index: Tensor, starts: Tensor, shape: tuple[int, int], form: str
    ) -> Tensor | None:
        code = library()
        fits = plain(g) and g.device.type == "cpu" and g.dtype == values.dtype and g.numel()
        if code is None or not (bits_of(form) and fits):
            return None
        layer = self.described(values, index, starts, None, None, None, shape, form)
        if layer is None or layer.dtype < 0:
            return None
        return cpu.times_codes(code, layer, g, _multiplied(code, g.dtype))

    def _codes_way(self, code: Library, rows: int) -> str:
        return self.forced or codes_way(rows, multiplies_half=code.level >= AVX512_BF16)

    def described(
        self, values: Tensor, index: Tensor, starts: Tensor | None, U: Tensor | None, V: Tensor | None,
        bias: Tensor | None, shape: tuple[int, int], form: str,
    ) -> Layer | None:  # fmt: skip
        """The layer as sparse.c sees it; looking at each tensor costs more than a small layer's product.

        Known again by where its tensors lie and how large they are, which is all that sparse.c goes by.
        """
        key = (
            values.data_ptr(), values.numel(), values.dtype, index.data_ptr(),
            0 if starts is None else starts.data_ptr(),
            0 if U is None else U.data_ptr(), 0 if V is None else V.data_ptr(), 0 if U is None else U.shape[1],
            0 if bias is None else bias.data_ptr(), shape, form, index.numel(),
        )  # fmt: skip
        layer = self._described.get(key)
        if layer is None:
            tensors = [t for t in (values, index, starts, U, V, bias) if t is not None]
            if not all(plain(t) and t.is_contiguous() and t.device.type == "cpu" for t in tensors):
                return None
            if any(t is not None and t.dtype != values.dtype for t in (U, V, bias)) or values.itemsize not in (2, 4):
                return None
            if not _belong_together(values, index, starts, U, V, bias, shape, form):
                return None
            layer = cpu.describe(values, index, starts, U, V, bias, shape, form)
            if len(self._described) >= MOST_DESCRIBED:
                self._described.clear()
            self._described[key] = layer
        return layer

    def _on_gpu(
        self, x: Tensor, values: Tensor, index: Tensor, starts: Tensor | None, U: Tensor | None, V: Tensor | None,
        bias: Tensor | None, m: int, form: str,
    ) -> Tensor | None:  # fmt: skip
        bits, way, shape = bits_of(form), self.forced or gpu_way(x.shape[0]), (m, x.shape[1])
        if starts is None or not (bits or form == "bits") or way not in ("triton", "tile"):
            return None
        stored = [t for t in (values, index, starts, U, V, bias) if t is not None]
        if not all(_for_triton(t, x.device) for t in stored) or x.dtype not in gpu.DTYPES:
            return None
        if bits and not _belong_together(values, index, starts, U, V, bias, shape, form):
            return None
        is_few = way == "triton" and x.shape[0] <= gpu.SLOTS
        operands = (x.contiguous(), values, index, starts, U, V, bias)
        if bits:
            return gpu.attempt(gpu_codes.few if is_few else gpu_codes.many, *operands, shape, bits)
        return gpu.attempt(gpu.few if is_few else gpu.many, *operands, *shape)

    def spread(self, values: Tensor, index: Tensor, starts: Tensor, shape: tuple[int, int]) -> Tensor | None:
        code, form = library(), "bits" if starts.dim() == 1 else "gaps"
        if values.is_cuda and form == "bits" and values.dtype in gpu.DTYPES and gpu.available(values.device):
            return gpu.attempt(gpu.dense, values, index, starts, *shape)
        if code is None or values.device.type != "cpu" or shape[1] >= WIDEST:
            return None
        layer = self.described(values, index, starts, None, None, None, shape, form)
        return None if layer is None else cpu.dense(code, layer, values.new_empty(shape))

    def bits(self, spec: LayerSpec, index: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        code = library()
        tensors = list(index.values())
        if code is None or not all(plain(t) and t.device.type == "cpu" and t.is_contiguous() for t in tensors):
            return None
        for suffix, (shape, dtype) in spec.tensor_shapes(torch.float32).items():
            if suffix in index and (tuple(index[suffix].shape) != shape or index[suffix].dtype != dtype):
                return None  # the plain way says what is wrong
        if spec.layout == "bitmask":
            starts = cpu.starts_of_bits(code, index["S_mask"], spec.shape, spec.nnz)
            return None if starts is None else (index["S_mask"], starts)
        if spec.layout in ("gaps4", "gaps8"):
            per_byte = 2 if spec.layout == "gaps4" else 1
            return cpu.bits_of_gaps(
                code, index["S_gaps"], index["S_offsets"], spec.group_rows, spec.shape, spec.nnz, per_byte
            )
        if spec.layout == "n:m":
            keep, group = n_of_m(spec.pattern)
            return cpu.bits_of_groups(code, index["S_index"], keep, group, position_bits(group), spec.shape)
        return None

    def codes(self, contexts: Contexts, parts: Parts) -> Tensor | None:
        code = library()
        if code is None or not all(plain(t) and t.device.type == "cpu" for t in (parts.words, contexts.rows)):
            return None
        return streams.decode(code, contexts, parts)

    def coded(self, codes: Tensor, contexts: Contexts) -> Parts | None:
        code = library()
        return None if code is None or not plain(codes) else streams.encode(code, codes, contexts)

    def code_bits(self, codes: Tensor) -> list[int] | None:
        code = library()
        if code is None or not (_on_cpu(codes) or _for_triton(codes, codes.device)):
            return None
        return cpu.code_bits(code, codes.cpu())

    def packed(self, codes: Tensor, bits: int, rest: int) -> Tensor | None:
        code = library()
        index = None if code is None else cpu.packed(code, codes.cpu(), bits, rest)
        return None if index is None else index.to(codes.device)

    def unpacked(self, index: Tensor, shape: tuple[int, int], bits: int) -> Tensor | None:
        code = library()
        return None if code is None or not _on_cpu(index) else cpu.unpacked(code, index, shape, bits)

    def looked_up(
        self, rows: Tensor, values: Tensor, index: Tensor, starts: Tensor, shape: tuple[int, int], bits: int
    ) -> Tensor | None:
        code, dtype = library(), values.dtype
        if dtype in gpu.DTYPES and all(_for_triton(t, values.device) for t in (values, index, starts)):
            numbers = rows.to(torch.int64).flatten()
            made = gpu.attempt(gpu_codes.rows_of, numbers, values, index, starts, shape, bits)
            return None if made is None else made.view(*rows.shape, shape[1])
        if code is None or not (_on_cpu(rows) and rows.dtype == torch.int64):
            return None
        values = values if dtype in cpu.DTYPES else values.float()
        layer = self.described(values, index, starts, None, None, None, shape, form_of(bits))
        if layer is None:
            return None
        found = cpu.rows_of_codes(code, layer, rows, 0, values.new_empty(rows.numel(), shape[1]))
        return None if found is None else found.view(*rows.shape, shape[1]).to(dtype)


def _multiplied(code: Library, dtype: torch.dtype) -> torch.dtype:
    """What this processor multiplies numbers of this dtype in."""
    return dtype if code.level >= AVX512_BF16 else torch.float32


def plain(tensor: Tensor) -> bool:
    """Whether this is an ordinary tensor with memory of its own, outside any tracing."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and torch._C._get_tracing_state() is None
    )


def _for_triton(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device == device and gpu.available(device) and plain(tensor) and tensor.is_contiguous()


def _on_cpu(tensor: Tensor) -> bool:
    return plain(tensor) and tensor.device.type == "cpu" and tensor.is_contiguous()


def _belong_together(
    values: Tensor, index: Tensor, starts: Tensor | None, U: Tensor | None, V: Tensor | None, bias: Tensor | None,
    shape: tuple[int, int], form: str,
) -> bool:  # fmt: skip
    """Whether all sizes are those of a layer of this shape: the C code trusts them, plain torch says what is wrong."""
    m, n = shape
    rank = 0 if U is None else U.shape[1]
    if (U is None) != (V is None) or (U is not None and U.shape != (m, rank)):
        return False
    if (V is not None and V.shape != (rank, n)) or (bias is not None and bias.shape != (m,)):
        return False
    bits = bits_of(form)
    if bits:
        fits = index.dtype == torch.uint8 and index.numel() == packed_bytes(shape, bits, rest_of(index, shape, bits))
        return fits and starts is not None and starts.shape == (n,) and values.shape == (m,)
    if form in ("rows", "columns"):
        return values.numel() == index.numel() * (n if form == "rows" else m)
    if starts is None or starts.shape != ((m + 1,) if form == "bits" else (2, m + 1)):
        return False
    return form == "gaps" or index.shape == (m, -(-n // 8))


def _shaped(y: Tensor | None, x: Tensor) -> Tensor | None:
    """y (rows, out) with the leading sizes of x; no view, because the operator's output may be changed in place."""
    if y is None or x.dim() == 2:
        return y
    shaped: Tensor = torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[-1]))
    return shaped
