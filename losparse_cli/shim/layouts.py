"""The layouts in which the support of S can lie: what each stores, and in how many bytes (docs/format.md).

The values of S are stored in row-major order, so a layout only has to say *where* they are; but for `codes`, where S is
whole numbers times a factor of their row and one of their column. This file is shipped inside checkpoints and may
import nothing but torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

FORMAT_VERSION = 4
"""The newest. A checkpoint is written in the oldest version that can hold it (`format_version`)."""

INDEX_TENSORS = {
    "bitmask": ("S_mask",),
    "csr": ("S_columns", "S_offsets"),
    "gaps4": ("S_gaps", "S_offsets"),
    "gaps8": ("S_gaps", "S_offsets"),
    "rows": ("S_rows",),
    "columns": ("S_columns",),
    "n:m": ("S_index",),
    "codes": ("S_codes", "S_scale"),
}
"""Layout -> suffixes of its index tensors, in the order in which they are stored."""

COLUMN_FACTORS = torch.tensor([math.ldexp(2 ** (k % 8 / 8), k // 8 - 16) for k in range(256)])
"""Of layout `codes`: the factors that a column can have, powers of the eighth root of 2 around 1; codes do the rest."""

KINDS = ("", "embedding")
GROUP_ENTRIES = 8192  # entries of S between two offsets of a gap layout: 8 bytes of index each


@dataclass(frozen=True)
class LayerSpec:
    """What `config.json` records of one compressed layer; loading derives nothing.

    shape: (out_features, in_features). index_bytes: bytes of `S_gaps` or `S_codes`, for the layouts that have them.
    group_rows: rows of S between two offsets of a gap layout. transposed: the dense tensor lies on disk
    as (in, out), as in GPT-2's Conv1D. tensor: module name on disk, where it differs from that in memory. kind:
    `embedding` for the rows of an embedding, empty for a linear layer. run: columns of `codes` that have a whole number
    of their own in each row, `S_runs`, which their codes are multiplied by; 0 without.
    """

    shape: tuple[int, int]
    rank: int
    nnz: int
    pattern: str
    layout: str
    group_rows: int = 0
    index_bytes: int = 0
    transposed: bool = False
    tensor: str = ""
    kind: str = ""
    run: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON form, without the fields that keep their default."""
        defaults = {"group_rows": 0, "index_bytes": 0, "transposed": False, "tensor": "", "kind": "", "run": 0}
        fields = {k: v for k, v in asdict(self).items() if k not in defaults or v != defaults[k]}
        return fields | {"shape": list(self.shape)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LayerSpec:
        """Raises ValueError that names what is missing or out of range; unknown keys are ignored."""
        try:
            m, n = fields["shape"]
            known = {name: fields[name] for name in cls.__dataclass_fields__ if name in fields}
            spec = cls(**known | {"shape": (m, n)})
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"incomplete layer entry {fields!r} ({error!r})") from error
        whole = (m, n, spec.rank, spec.nnz, spec.group_rows, spec.index_bytes, spec.run)
        text = (spec.pattern, spec.layout, spec.tensor, spec.kind)
        types = [*(type(x) is int for x in whole), *(type(x) is str for x in text), type(spec.transposed) is bool]
        if not all(types):
            raise ValueError(f"a value of the wrong type in layer entry {fields!r}")
        if spec.layout not in INDEX_TENSORS:
            raise ValueError(f"unknown layout {spec.layout!r}; this version knows {sorted(INDEX_TENSORS)}")
        if spec.kind not in KINDS:
            raise ValueError(f"unknown kind {spec.kind!r} of layer; this version knows {sorted(KINDS)}")
        if not spec._is_possible():
            raise ValueError(f"impossible layer entry {fields!r}")
        return spec

    def _is_possible(self) -> bool:
        m, n = self.shape
        if not (m > 0 and n > 0 and 0 <= self.rank <= min(m, n) and 0 <= self.nnz <= m * n and self.index_bytes >= 0):
            return False
        if self.kind == "embedding" and (self.layout != "codes" or self.rank or self.transposed):
            return False
        if self.run < 0 or (self.run and (self.layout != "codes" or self.kind or n % self.run)):
            return False
        if self.layout == "n:m":
            keep, group = n_of_m(self.pattern)
            return n % group == 0 and self.nnz == m * (n // group) * keep
        if self.layout in ("rows", "columns"):
            return self.nnz % (n if self.layout == "rows" else m) == 0
        if self.layout == "codes":
            return self.index_bytes > 0
        return not self.layout.startswith("gaps") or self.group_rows > 0

    def tensor_shapes(self, dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Suffix -> (shape, dtype) of every tensor of this layer but the bias, in storage order."""
        m, n = self.shape
        tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if self.rank:
            tensors["U"], tensors["V"] = ((m, self.rank), dtype), ((self.rank, n), dtype)
        tensors["weight"] = ((m if self.layout == "codes" else self.nnz,), dtype)
        if self.layout == "bitmask":
            tensors["S_mask"] = ((m, -(-n // 8)), torch.uint8)
        elif self.layout == "csr":
            tensors["S_columns"] = ((self.nnz,), column_dtype(n))
            tensors["S_offsets"] = ((m + 1,), torch.int32)
        elif self.layout in ("gaps4", "gaps8"):
            tensors["S_gaps"] = ((self.index_bytes,), torch.uint8)
            tensors["S_offsets"] = ((-(-m // self.group_rows) + 1, 2), torch.int32)
        elif self.layout == "rows":
            tensors["S_rows"] = ((self.nnz // n,), torch.int32)
        elif self.layout == "columns":
            tensors["S_columns"] = ((self.nnz // m,), torch.int32)
        elif self.layout == "codes":
            tensors["S_codes"] = ((self.index_bytes,), torch.uint8)
            tensors["S_scale"] = ((n,), torch.uint8)
            if self.run:
                tensors["S_runs"] = ((m, n // self.run), torch.int8)
        else:
            keep, group = n_of_m(self.pattern)
            bits = m * (n // group) * keep * position_bits(group)
            tensors["S_index"] = ((-(-bits // 8),), torch.uint8)
        return tensors

    def nbytes(self, dtype: torch.dtype) -> int:
        """Stored bytes of U, V and S, every index counted, the bias not."""
        sizes = self.tensor_shapes(dtype).values()
        return sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in sizes)


def column_factors(indices: torch.Tensor) -> torch.Tensor:
    """c, (in,), float32, from `S_scale`: which of COLUMN_FACTORS each is."""
    return COLUMN_FACTORS.to(indices.device)[indices.long()]


def times_runs(codes: torch.Tensor, runs: torch.Tensor) -> torch.Tensor:
    """Codes (m, n), each times the number of its row and run in `runs` (m, n / run), in the narrowest dtype.

    ValueError if one of these is zero, of which nothing could be made again.
    """
    if not bool(runs.all()):
        raise ValueError("S_runs holds a zero")
    m, n = codes.shape
    product = (codes.short().view(m, runs.shape[1], -1) * runs[..., None].short()).view(m, n)
    largest = int(product.abs().amax()) if product.numel() else 0
    return product.to(torch.int8) if largest < 128 else product


def over_runs(codes: torch.Tensor, runs: torch.Tensor) -> torch.Tensor:
    """What `times_runs` made these codes from, int8."""
    m, n = codes.shape
    return (codes.short().view(m, runs.shape[1], -1) // runs[..., None].short()).to(torch.int8).view(m, n)


def format_version(specs: Iterable[LayerSpec], *, fused: bool = False) -> int:
    """The oldest version of the format that can hold these layers; fused: some are parts of a tensor of all experts."""
    if fused:
        return 4
    return max((3 if spec.run else 2 if spec.layout == "codes" else 1 for spec in specs), default=1)


def column_dtype(in_features: int) -> torch.dtype:
    """The narrowest dtype that holds every column index."""
    return torch.uint16 if in_features <= 1 << 16 else torch.int32


def group_rows(in_features: int) -> int:
    """Rows between two offsets of a gap layout: enough that offsets cost little, at least 4."""
    return max(4, -(-GROUP_ENTRIES // in_features))


def n_of_m(pattern: str) -> tuple[int, int]:
    """(N, M) of the pattern `N:M`: N non-zeros in every M entries."""
    keep, _, group = pattern.partition(":")
    if not (keep.isdecimal() and group.isdecimal() and 0 < int(keep) <= int(group)):
        raise ValueError(f"layout n:m needs a pattern N:M, not {pattern!r}")
    return int(keep), int(group)


def position_bits(group: int) -> int:
    """Bits of a position inside a group of `group` entries."""
    return max(1, (group - 1).bit_length())


def candidates(pattern: str, shape: tuple[int, int], nnz: int) -> tuple[str, ...]:
    """The layouts that can hold an S of this pattern."""
    if nnz == 0:
        return ("rows",)  # no rows: an index of no bytes
    if pattern in ("rows", "columns"):
        return (pattern,)
    if nnz >= 1 << 30:
        return ("bitmask",)  # the others keep 32-bit offsets
    choices = ("bitmask", "gaps4", "gaps8", "csr")
    if ":" in pattern and shape[1] % n_of_m(pattern)[1] == 0:
        return ("n:m", *choices)
    return choices


def bound_index_bytes(layout: str, pattern: str, shape: tuple[int, int], nnz: int) -> int:
    """Most bytes that the index of this layout can take, whatever the support."""
    m, n = shape
    worst = 0
    if layout.startswith("gaps"):
        rows = group_rows(n)
        groups, escape = -(-m // rows), 15 if layout == "gaps4" else 255
        units = nnz + m * n // escape  # each escape skips `escape` entries
        worst = -(-(units + groups) // 2) if layout == "gaps4" else units  # each group starts on a byte
        spec = LayerSpec(shape, 0, nnz, pattern, layout, rows, worst)
    else:
        spec = LayerSpec(shape, 0, nnz, pattern, layout)
    return spec.nbytes(torch.uint8) - nnz


def expected_index_bytes(layout: str, pattern: str, shape: tuple[int, int], nnz: int) -> float:
    """Mean bytes of the index when the support is spread evenly at random."""
    if not layout.startswith("gaps"):
        return bound_index_bytes(layout, pattern, shape, nnz)
    m, n = shape
    escape, unit = (15, 0.5) if layout == "gaps4" else (255, 1.0)
    skip = (1 - nnz / (m * n)) ** escape
    groups = -(-m // group_rows(n))
    return unit * nnz * (1 + skip / max(1 - skip, 1e-9)) + 8 * (groups + 1) + groups * 0.25
