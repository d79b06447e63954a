"""Faster ways to compute what the loader computes in plain torch, where the package losparse has put some.

This file is shipped inside checkpoints and may import nothing but torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor


class Kernels(Protocol):
    """Faster ways to compute the same. Each answers None where it has none, and the plain way is taken.

    `ready` is the product of one layer, looked up beforehand: from x and the layer's parameters by name, without
    gradients, and None again where the other way has to do.
    """

    def product(
        self, x: Tensor, values: Tensor, index: Tensor, starts: Tensor | None, U: Tensor | None, V: Tensor | None,
        bias: Tensor | None, out_features: int, form: str,
    ) -> Tensor | None: ...  # fmt: skip

    def ready(
        self, values: Tensor, index: Tensor, starts: Tensor | None, U: Tensor | None, V: Tensor | None,
        bias: Tensor | None, shape: tuple[int, int], form: str,
    ) -> Callable[[Tensor, dict[str, Any]], Tensor | None] | None: ...  # fmt: skip

    def times_sparse(
        self, g: Tensor, values: Tensor, index: Tensor, starts: Tensor, shape: tuple[int, int], form: str
    ) -> Tensor | None: ...

    def spread(self, values: Tensor, index: Tensor, starts: Tensor, shape: tuple[int, int]) -> Tensor | None: ...

    def bits(self, spec: Any, index: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None: ...

    def codes(self, contexts: Any, parts: Any) -> Tensor | None: ...

    def coded(self, codes: Tensor, contexts: Any) -> Any | None: ...

    def code_bits(self, codes: Tensor) -> list[int] | None: ...

    def packed(self, codes: Tensor, bits: int, rest: int) -> Tensor | None: ...

    def unpacked(self, index: Tensor, shape: tuple[int, int], bits: int) -> Tensor | None: ...

    def looked_up(
        self, rows: Tensor, values: Tensor, index: Tensor, starts: Tensor, shape: tuple[int, int], bits: int
    ) -> Tensor | None: ...


class _Plain:
    """No faster ways: what a loader has that travels alone."""

    def product(self, *args: Any) -> None: ...

    def ready(self, *args: Any) -> None: ...

    def times_sparse(self, *args: Any) -> None: ...

    def spread(self, *args: Any) -> None: ...

    def bits(self, *args: Any) -> None: ...

    def codes(self, *args: Any) -> None: ...

    def coded(self, *args: Any) -> None: ...

    def code_bits(self, *args: Any) -> None: ...

    def packed(self, *args: Any) -> None: ...

    def unpacked(self, *args: Any) -> None: ...

    def looked_up(self, *args: Any) -> None: ...


_installed: Kernels = _Plain()


def install(kernels: Kernels | None) -> None:
    """Compute with `kernels` from now on where they can, for the layers of this copy of the code; None: plainly."""
    global _installed
    _installed = kernels or _Plain()


def kernels() -> Kernels:
    """What is installed."""
    return _installed
