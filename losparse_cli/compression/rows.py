"""Embeddings and output heads in whole numbers: one step, a factor a row, a few rows in floats at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..budget.plan import LayerPlan
from ..budget.recipe import MOST_CODE_BITS
from ..linalg.error import relative_error, squared_norm
from ..linalg.factors import Decomposition, LowRankCodes
from ..linalg.integers import finest_factor, fit_rows, rounded, steps_of_width
from ..linalg.rates import SAMPLE, Curve, curve
from ..shim.streams import WIDTHS, width_of
from .coded import Coded, code_alone
from .solve import as_matrix

BLOCK = 1 << 22  # entries that are floats at a time


class RowCoder:
    """One matrix (rows, width) whose rows mean tokens; see `Coder`, of which it is the frugal kind.

    Each entry is rounded alone, to the same step everywhere, as the loss minds the rows of all tokens alike.
    """

    def __init__(self, plan: LayerPlan, stored: Tensor, device: torch.device) -> None:
        self.plans: Sequence[LayerPlan] = (plan,)
        self._stored, self._device = stored, device
        self._step = max(1, BLOCK // stored.shape[1])

    def _rows(self, begin: int) -> Tensor:
        return as_matrix(self._stored[begin : begin + self._step], self.plans[0].layer, self._device)

    def finest(self) -> list[float]:
        """log2 of the finest step that makes sense, as of `Coder`."""
        most = float(torch.stack([self._stored.amax(), -self._stored.amin()]).max())
        return [math.log2(most) - MOST_CODE_BITS if 0 < most < math.inf else 0.0]

    def curves(self) -> list[Curve]:
        """What the codes take by the step, foreseen from some of the rows."""
        m, n = self._stored.shape
        some = self._stored[:: max(1, m * n // (16 * SAMPLE))]
        return [curve(as_matrix(some, self.plans[0].layer, self._device))]

    def at(self, log_steps: Sequence[float]) -> list[Decomposition]:
        """The matrix coded with a step of 2 ** log_step."""
        (m, n), dtype, device = self._stored.shape, self._stored.dtype, self._device
        a = torch.full((m,), 2.0 ** log_steps[0], device=device).to(dtype).float().clamp_min(torch.finfo(dtype).tiny)
        columns = torch.ones(n, device=device)
        factors = torch.empty(m, dtype=dtype, device=device)
        codes = torch.empty(m, n, dtype=torch.int8, device=device)
        weight = residual = 0.0
        for begin in range(0, m, self._step):
            W = self._rows(begin)
            part = slice(begin, begin + len(W))
            if self.plans[0].width:
                a[part] = steps_of_width(W, columns, self.plans[0].width)[0].to(dtype).float()
                q = rounded(W, a[part], 0.0, self.plans[0].width)
            else:
                q = rounded(W, a[part])
            factors[part] = fit_rows(W, q, columns, None, a[part], dtype)
            if self.plans[0].width:
                factors[part].clamp_(min=finest_factor(0))
            if width_of(q) > codes.itemsize:
                codes = codes.to(WIDTHS[width_of(q)])
            codes[part] = q
            weight += squared_norm(W)
            residual += squared_norm(W - q.float() * factors[part].float()[:, None])
        empty = torch.empty(0, dtype=dtype, device=device)
        made = LowRankCodes(empty.new_empty(m, 0), empty.new_empty(0, n), factors, columns, codes)
        return [Decomposition(made, (relative_error(residual, weight),), weight, residual, log_step=log_steps[0])]


def code_rows(plan: LayerPlan, stored: Tensor, device: torch.device) -> Coded:
    """The matrix in the bits that its plan asks for. CheckpointError as `as_matrix`."""
    return code_alone(RowCoder(plan, stored, device))[0]
