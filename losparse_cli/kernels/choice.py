"""Which way is fastest, from measurements (docs/performance.md, `python -m tests.benchmarks kernels`).

ways:
  spread   C, AVX-512, bits: each value spread to its column in a register; costs alike for any density
  gather   C, one row of x: the values of x that S needs, one by one
  walk     C: each value times a row of xᵀ, 16 to 64 rows at once
  tile     some rows of S made dense in scratch memory, then a dense product
  block    kept rows or columns: a dense product over what is kept
  triton   on a GPU, few rows: the stored form expanded in registers, with the low-rank part in the same pass
  semi     on a GPU, 2:4: torch's semi-structured product, from a second copy of S; only where it is asked for
"""

from __future__ import annotations

import os

WAYS = ("spread", "gather", "walk", "tile", "block", "triton", "semi")
SPREAD_ROWS = 16
"""Most rows of x that one pass of `spread` takes."""
TRITON_ROWS = 16


def forced() -> str | None:
    """What LOSPARSE_KERNEL asks for; ValueError if there is no such thing."""
    name = os.environ.get("LOSPARSE_KERNEL") or None
    if name is not None and name not in ("reference", *WAYS):
        raise ValueError(f"LOSPARSE_KERNEL={name} is unknown; choose from reference, {', '.join(WAYS)}")
    return name


def cpu_way(form: str, rows: int, density: float, *, native: bool, half: bool, spreads: bool) -> str | None:
    """The fastest on a CPU; None for the reference.

    rows: of x. native: whether sparse.c was compiled and knows the dtype. half: 16-bit values. spreads: whether the
    processor has AVX-512 with VBMI2.
    """
    if form in ("rows", "columns"):
        return "block"
    if not native:
        return "tile"
    spreads = spreads and form == "bits"
    if spreads and rows <= SPREAD_ROWS and rows <= (3.3 + 77 * density if half else 3.3 + 40 * density):
        return "spread"
    if rows == 1 and not spreads:
        return "gather"
    # Beyond this density the dense product, at the speed of the whole register, overtakes one value after the other.
    return "walk" if density <= (0.12 if half else 0.3) or (rows <= SPREAD_ROWS and density <= 0.2) else "tile"


def gpu_way(rows: int) -> str:
    """The way for bits on a GPU; not chosen from measurements yet."""
    return "triton" if rows <= TRITON_ROWS else "tile"
