"""Faster ways to compute the product of shim.operator, by device, form of S, density, dtype and rows of x.

`install` puts them in the shim's place. LOSPARSE_KERNEL names one that is to be taken wherever it can
be: `reference` (plain torch) or a name of `choice.WAYS`.
"""

from __future__ import annotations

from ..shim import installed
from .choice import forced
from .dispatch import Kernels

__all__ = ["install"]


def install() -> None:
    """Compute, read and write compressed layers with the kernels from now on; safe to call again.

    UsageError if LOSPARSE_KERNEL names none.
    """
    asked, current = forced(), installed.kernels()
    if asked == "reference":
        installed.install(None)
    elif not isinstance(current, Kernels) or current.forced != asked:
        installed.install(Kernels())
