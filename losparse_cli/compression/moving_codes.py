"""Whole numbers that move while their block is matched, within the bytes they had.

Each code is what a latent number rounds to, and hands its gradient on to that as if nothing were rounded
(straight-through estimation, Bengio et al., arXiv:1308.3432). Latents begin as what the solver rounded, errors of
earlier columns included, so that of many equally good roundings those nearest to another one go first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..budget.plan import LayerPlan
from ..budget.recipe import GRIDS, recipe_of
from ..budget.recipe_file import read_recipe
from ..checkpoint.source import Checkpoint
from ..linalg.factors import LowRankCodes
from ..linalg.integers import in_width, limits, of_entries, shorter, storable, thresholds

CODE_RATE = 10.0
"""Of the learning rate: what a latent number moves, in steps between codes."""
TRIES = 8


@dataclass(frozen=True)
class Rounding:
    """How the codes of a layer came about.

    latent: (m, n), float32, what they were rounded from, in their steps. width: bits that hold each, 0 for any. sparse:
    whether those that are zero stay so. fits: whether a layer takes no more bytes than it may.
    """

    latent: Tensor
    width: int
    sparse: bool
    fits: Callable[[LowRankCodes], bool]


class MovingCodes(nn.Module):
    """The weight of a linear layer as a function of U, V, factors of rows, and codes.

    Parameters: latent (m, n); change (m,), of the row factors, as a share of them; U and V where there are any.
    """

    columns: Tensor
    rows: Tensor
    above: Tensor | None
    unit: Tensor
    allowed: Tensor | None

    def __init__(self, factors: LowRankCodes, made: Rounding, transposed: bool) -> None:
        super().__init__()
        self.started, self.made, self.transposed = factors, made, transposed
        codes = factors.codes
        unit = factors.columns.new_ones(1)
        if factors.runs is not None:
            unit = of_entries(factors.runs, codes.shape[1])
        self.register_buffer("unit", unit)
        self.register_buffer("columns", factors.columns.clone())
        self.register_buffer("rows", factors.rows.float().clone())
        self.register_buffer("above", None if made.width else thresholds(codes))
        self.register_buffer("allowed", codes != 0 if made.sparse else None)
        self.change = nn.Parameter(torch.zeros_like(self.rows))
        # Row factors were fitted after rounding, so that some latents would round to other codes now.
        settled = torch.where(self.rounded(made.latent) == codes, made.latent, codes.float())
        self.latent = nn.Parameter(settled.contiguous())
        self.U = nn.Parameter(factors.U.float().clone()) if factors.rank else None
        self.V = nn.Parameter(factors.V.float().clone()) if factors.rank else None

    @property
    def trained(self) -> list[tuple[nn.Parameter, float]]:
        """Parameters, and of what share of the learning rate each is."""
        low_rank = [(one, 1.0) for one in (self.U, self.V) if one is not None]
        return [(self.latent, CODE_RATE), (self.change, 1.0), *low_rank]

    def rounded(self, latent: Tensor) -> Tensor:
        """The codes, float32."""
        above = self.above
        codes = in_width(latent, self.made.width, self.unit) if above is None else shorter(latent, above)
        return codes if self.allowed is None else codes * self.allowed

    def forward(self) -> Tensor:
        codes: Tensor = _Rounded.apply(self.latent, self)  # type: ignore[no-untyped-call]
        W: Tensor = codes * self.columns * (self.rows * (1 + self.change))[:, None]
        if self.U is not None and self.V is not None:
            W = torch.addmm(W, self.U, self.V)
        return W.T if self.transposed else W

    @torch.no_grad()
    def factors(self) -> LowRankCodes:
        """As they are stored, within the bytes that the layer may take: of codes that grew those that are the least
        sure of it go back, as many as need be."""
        started, latent = self.started, self.latent.detach()
        rows = self.rows * (1 + self.change.detach())
        if self.made.width:
            run = 0 if started.runs is None else started.codes.shape[1] // started.runs.shape[1]
            rows = storable(rows, started.rows.dtype, run)
        found = replace(started, rows=rows.to(started.rows.dtype))
        if self.U is not None and self.V is not None:
            found = replace(found, U=self.U.detach().to(started.U.dtype), V=self.V.detach().to(started.V.dtype))
        codes = self.rounded(latent).int()  # those read from a file are no wider than they had to be
        moved = replace(found, codes=codes)
        if self.made.fits(moved):
            return moved
        grew = codes.abs() > started.codes.abs()
        sure = (latent - self.made.latent).abs()
        least, most = 0.0, float(sure[grew].max()) if bool(grew.any()) else 0.0
        best = found  # with the codes it had, which fit
        for _ in range(TRIES):
            middle = (least + most) / 2
            some = replace(found, codes=torch.where(grew & (sure < middle), started.codes, codes))
            if self.made.fits(some):
                best, most = some, middle
            else:
                least = middle
        return best

    @torch.no_grad()
    def settle(self, factors: LowRankCodes) -> None:
        """Compute with these from here on."""
        self.latent.copy_(factors.codes)
        self.rows.copy_(factors.rows)
        self.change.zero_()
        for mine, stored in ((self.U, factors.U), (self.V, factors.V)):
            if mine is not None:
                mine.copy_(stored)


class _Rounded(torch.autograd.Function):
    """The codes of latent numbers, with a derivative of one."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, form: MovingCodes) -> Tensor:
        return form.rounded(latent)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def made_with(start: Checkpoint, plan: LayerPlan, factors: LowRankCodes) -> tuple[int, bool]:
    """Width of a layer's codes in a checkpoint, and whether zeros among them are of a pattern.

    By what its report says was asked for; without one by what the codes are, so that nothing is lost that they have.
    """
    said = start.report().get("recipe")
    if said:
        asked = recipe_of(read_recipe(said), {}).for_layer(plan.layer.name, plan.layer.kinds)
        return GRIDS.get(asked.grid or "", 0), plan.pattern != "unstructured" or asked.sparsity is not None
    least, most = limits(8)
    if factors.runs is not None:
        return 4, True
    narrow = least <= int(factors.codes.min()) and int(factors.codes.max()) <= most
    return 8 if narrow and bool((factors.columns == 1).all()) else 0, True
