"""How far U V + S is from W."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_norm(A: Tensor) -> float:
    """Squared Frobenius norm, each row in float32 and the sum over rows in float64."""
    # A pairwise float32 sum per row is accurate to 1e-6; a float64 copy of the matrix would cost 2x memory.
    return float(torch.linalg.vector_norm(A, dim=-1).double().square().sum())


def output_squared(E: Tensor, H: Tensor) -> float:
    """tr(E H Eᵀ): the mean over tokens of ‖E x‖², for the second moment H of the inputs x. E: (m, n), H: (n, n)."""
    return max(0.0, float(torch.linalg.vecdot(E @ H, E).double().sum()))


def relative_error(residual_squared: float, weight_squared: float) -> float:
    """‖W − U V − S‖_F / ‖W‖_F from the two squared norms; 0 for a zero weight."""
    return (max(0.0, residual_squared) / weight_squared) ** 0.5 if weight_squared > 0 else 0.0


def output_error(E: Tensor, W: Tensor, H: Tensor) -> float | None:
    """sqrt(tr(E H Eᵀ) / tr(W H Wᵀ)), None if W makes nothing of inputs of second moment H."""
    total = output_squared(W, H)
    return relative_error(output_squared(E, H), total) if total > 0 else None
