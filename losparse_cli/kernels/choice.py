"""Which way is fastest, from measurements (docs/performance.md, `python -m tests.benchmarks kernels`).

ways:
  spread   C, AVX-512, bits: each value spread to its column in a register; costs alike for any density
  gather   C, one row of x: the values of x that S needs, one by one
  walk     C: each value times a row of xᵀ, 16 to 64 rows at once
  tile     some rows of S made dense in scratch memory, then a dense product
  block    kept rows or columns: a dense product over what is kept
  digits   C, packed codes: whole numbers times x in digits of seven bits
  triton   on a GPU, few rows: the stored form expanded in registers, with the low-rank part in the same pass
"""

from __future__ import annotations

import os

from ..errors import UsageError

WAYS = ("spread", "gather", "walk", "tile", "block", "digits", "triton")
SPREAD_ROWS = 16
"""Most rows of x that one pass of `spread` takes."""
TRITON_ROWS = 16
DENSE = {True: 10.0, False: 2.2}
"""Entries of a dense product, of 16-bit values or not, that take as long as one entry of S takes `walk`."""


def forced() -> str | None:
    """What LOSPARSE_KERNEL asks for; UsageError if there is no such thing."""
    name = os.environ.get("LOSPARSE_KERNEL") or None
    if name is not None and name not in ("reference", *WAYS):
        raise UsageError(f"LOSPARSE_KERNEL={name} is unknown. Choose from reference, {', '.join(WAYS)}.")
    return name


DIGITS_ROWS = {True: 96, False: 64}
"""Most rows of x that `digits` is taken for, where a processor multiplies bfloat16 by itself or not."""


def codes_way(rows: int, *, multiplies_half: bool) -> str:
    """The fastest for packed codes on a CPU."""
    return "digits" if rows <= DIGITS_ROWS[multiplies_half] else "tile"


def cpu_way(form: str, rows: int, out_features: int, density: float, *, native: bool, half: bool, spreads: bool) -> str:
    """The fastest on a CPU.

    rows: of x. native: whether the C code knows the dtype. half: 16-bit values. spreads: whether the processor has
    AVX-512 with VBMI2.
    """
    if form in ("rows", "columns"):
        return "block"
    if not native:
        return "tile"
    spreads = spreads and form == "bits"
    # A row of x costs `spread` about as much as 1.3 % of S cost `walk` for 16 rows.
    if spreads and rows <= SPREAD_ROWS and rows <= (3.3 + 77 * density if half else 3.3 + 40 * density):
        return "spread"
    if rows == 1:
        return "gather"
    # In units of the dense product: an entry of S costs `walk` as much as DENSE[half] entries there, and transposing x
    # as much as 16 rows of S; making S dense costs `tile` about as much as 45 rows of x.
    walked = DENSE[half] * (density + 16 / out_features)
    return "walk" if walked < 1 + 45 / rows else "tile"


def gpu_way(rows: int) -> str:
    """The way for bits on a GPU; not chosen from measurements yet."""
    return "triton" if rows <= TRITON_ROWS else "tile"
