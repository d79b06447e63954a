"""W ≈ a cᵀ ∘ q with whole numbers q: one pass of error feedback, in the metric of the model's loss.

An error E of a layer costs, to second order, ½ Σ_i g_i E_i H E_iᵀ nats a token: H is the second moment of what the
layer is fed, g_i the Fisher information of its output i. High-rate theory asks for equal distortion everywhere in that
metric, so the step of the entry i, j is Δ c_j / √g_i with c_j = R_jj, where RᵀR = H⁻¹ and R is upper triangular in the
order in which columns are rounded: how much of an error in column j no later column can mend. One Δ serves the whole
model.

The pass is GPTQ's (Frantar et al., arXiv:2210.17323), which is Babai's nearest plane (arXiv:2507.18553); the column
factors are WaterSIC's (arXiv:2603.04956).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

DAMPING = 0.01
"""Of the mean of the diagonal of H, added to it."""
CODE_WEIGHT = 0.05
"""How much of a step the threshold between two whole numbers moves for each bit that the larger one costs more."""
LAST_THRESHOLD = 0.66
BLOCK = 128  # columns whose errors are handed on together
STEPS_AN_OCTAVE = 4
NARROWEST_OCTAVES = {4: 1.5, 8: 0.5}
"""Bits of a code -> octaves that the largest code may be below a row's largest entry."""
FINEST_FACTOR = 2.0**-14
"""Below which 16-bit floats lose digits, and rows have nothing to say."""
MOST_SHIFT = 3
"""Octaves between the finest and the coarsest step of a row, where runs of its columns have steps of their own."""
LEAST_SENSITIVITY = 1e-3
"""Of its layer's mean, below which no row's sensitivity is believed."""


@dataclass(frozen=True)
class Metric:
    """Of columns. order: (n,), in which they are rounded, by falling H_jj. R: (n, n), upper triangular in that order,
    float32. columns: c, (n,), float32, in the layer's own order, whose typical size is 1. scale: R_jj over c_j."""

    order: Tensor
    R: Tensor
    columns: Tensor
    scale: float


def column_metric(H: Tensor, grid: Tensor, damping: float = DAMPING, tied: Tensor | None = None) -> Metric:
    """The metric of columns of a second moment H (n, n).

    grid: rising, the column factors that can be stored. tied: (n,), equal numbers for columns that must have one factor
    between them, None where each has its own. ValueError if H, damped, is singular still.
    """
    diagonal = H.diagonal().double()
    mean = float(diagonal.mean())
    order = diagonal.argsort(descending=True, stable=True)
    # Of H = J L Lᵀ J with J that turns the order round, R = J L⁻¹ J: half the work of a factor of the inverse.
    turned = order.flip(0)
    damped = H.double()[turned][:, turned]
    damped.diagonal().add_(damping * mean if mean > 0 else 1.0)
    L, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise ValueError("singular")
    eye = torch.eye(len(L), dtype=L.dtype, device=L.device)
    R = torch.linalg.solve_triangular(L, eye, upper=False).flip(0, 1).float().contiguous()
    c = R.diagonal()
    scale = float(c.log().mean().exp())
    columns = torch.empty_like(c)
    columns[order] = c / scale
    if tied is not None:
        tied = tied.to(c.device)
        logs = torch.zeros(int(tied.max()) + 1, device=c.device).index_add_(0, tied, columns.log())
        columns = (logs / torch.bincount(tied))[tied].exp()
    columns = nearest(columns, grid)
    return Metric(order, R, columns, scale)


def nearest(c: Tensor, grid: Tensor) -> Tensor:
    """The entry of the rising `grid` that is nearest to each of c by its ratio."""
    logs = grid.to(c.device).log2()
    return grid.to(c.device)[torch.bucketize(c.log2(), (logs[1:] + logs[:-1]) / 2)]


def row_steps(g: Tensor) -> Tensor:
    """1 / √g_i, (m,), for g that is zero or nearly so in some rows."""
    mean = float(g.mean())
    return torch.ones_like(g) if mean <= 0 else g.clamp_min(mean * LEAST_SENSITIVITY).rsqrt()


def code(
    W: Tensor,
    metric: Metric,
    a: Tensor,
    support: Tensor | None = None,
    weight: float = CODE_WEIGHT,
    width: int = 0,
    shifts: Tensor | None = None,
) -> Tensor:
    """q, (m, n), int32: W (m, n, float32) rounded to multiples of a_i c_j, each column's error handed on to later ones.

    support: (m, n), bool: where q may be other than zero, None for everywhere. width: bits that hold every q, as a two's
    complement; 0 for any. shifts: (m, runs), the powers of two that codes of runs of columns are multiples of, each of
    which then has that width beside it.
    """
    m, n = W.shape
    order, R = metric.order, metric.R
    steps = metric.columns[order]
    left = W.T[order].contiguous()  # columns of W lie together
    slope = _slope((left / steps[:, None]).pow_(2).mean(0) / a.square(), weight)
    allowed = None if support is None else support.T[order]
    codes = torch.empty(n, m, dtype=torch.int32, device=W.device)
    scale = torch.ones(1, m, device=W.device) if shifts is None else shifts.T.float().exp2()
    run = (torch.arange(n, device=W.device) * len(scale) // n)[order].tolist()
    inverse = 1 / (a * scale)
    diagonal = R.diagonal().tolist()
    for begin in range(0, n, BLOCK):
        end = min(n, begin + BLOCK)
        errors = torch.empty(end - begin, m, device=W.device)
        for j in range(begin, end):
            step = float(steps[j])
            q = _rounded(left[j] * (inverse[run[j]] / step), slope)
            if width:
                q.clamp_(*limits(width)).mul_(scale[run[j]])
            if allowed is not None:
                q *= allowed[j]
            codes[j] = q
            error = torch.addcmul(left[j], q, a, value=-step, out=errors[j - begin]).div_(diagonal[j])
            if j + 1 < end:
                left[j + 1 : end].addr_(R[j, j + 1 : end], error, alpha=-1)
        if end < n:
            left[end:].addmm_(R[begin:end, end:].T, errors, alpha=-1)
    q = torch.empty_like(codes)
    q[order] = codes
    return q.T.contiguous()


def rounded(W: Tensor, a: Tensor, weight: float = CODE_WEIGHT, width: int = 0, shifts: Tensor | None = None) -> Tensor:
    """q, (m, n), int32: W rounded to multiples of a_i, each entry alone; width, shifts: as of `code`."""
    X = W / a[:, None]
    if shifts is not None:
        scale = shifts.float().exp2().repeat_interleave(W.shape[1] // shifts.shape[1], 1)
        return (X / scale).round_().clamp_(*limits(width)).mul_(scale).int()
    q = _rounded(X.T, _slope(X.pow(2).mean(1), weight)).T
    return (q.clamp_(*limits(width)) if width else q).int()


def limits(width: int) -> tuple[int, int]:
    """The least and the largest whole number of so many bits, as a two's complement."""
    return -(1 << width - 1), (1 << width - 1) - 1


def in_runs(codes: Tensor, run: int = 0) -> tuple[Tensor, Tensor]:
    """Numbers (m, runs, run), int32, and powers of two (m, runs), whose products are codes (m, n): as small as can be.

    run: columns that share a power; 0 for whole rows, whose power is 1.
    """
    m, n = codes.shape
    numbers = codes.int().view(m, -1, run or n)
    if not run:
        return numbers, torch.ones(m, 1, dtype=torch.int32, device=codes.device)
    bits = numbers.abs()
    while bits.shape[2] > 1:  # those that any number of the run has; a run is a power of two long
        half = bits.shape[2] // 2
        bits = bits[..., :half] | bits[..., half:]
    any_of = bits[..., 0]
    power = torch.where(any_of > 0, any_of & -any_of, 1)
    return numbers // power[..., None], power


def steps_of_width(X: Tensor, width: int, run: int = 0) -> tuple[Tensor, Tensor]:
    """a, (m,), and shifts, (m, runs), int32: steps a_i 2^shift at which whole numbers of `width` bits come nearest to X.

    X: (m, n). run: columns that have a shift of their own, 0 for none but zero. The largest entries may be cut off where
    that makes the others finer.
    """
    m, n = X.shape
    whole = (X.abs().amax(1) / limits(width)[1]).clamp_min(FINEST_FACTOR * 2.0 ** (MOST_SHIFT + 1))
    runs, octaves = (-(-n // run), MOST_SHIFT + 1) if run else (1, NARROWEST_OCTAVES[width])
    padded = torch.nn.functional.pad(X, (0, runs * (run or n) - n)).view(m, runs, -1)
    steps = [whole * 2.0 ** (-k / STEPS_AN_OCTAVE) for k in range(int(octaves * STEPS_AN_OCTAVE) + 1)]
    errors = torch.empty(len(steps), m, runs, device=X.device)
    for k, step in enumerate(steps):
        a = step[:, None, None]
        errors[k] = (padded / a).round_().clamp_(*limits(width)).mul_(a).sub_(padded).square_().sum(2)
    # For a base, the steps are those that are octaves above it.
    least, best = torch.full((m,), math.inf, device=X.device), torch.zeros(m, dtype=torch.long, device=X.device)
    shifts = torch.zeros(m, runs, dtype=torch.int32, device=X.device)
    for base in range(len(steps)):
        above = errors[base % STEPS_AN_OCTAVE : base + 1 : STEPS_AN_OCTAVE] if run else errors[base : base + 1]
        found, which = above.min(0)
        total = found.sum(1)
        better = total < least
        least = torch.where(better, total, least)
        best = torch.where(better, base, best)
        shifts = torch.where(better[:, None], (len(above) - 1 - which).int(), shifts)
    return torch.stack(steps)[best, torch.arange(m, device=X.device)], shifts


def _slope(mean_square: Tensor, weight: float) -> Tensor:
    """What the threshold above q moves for each 2 q + 1: bits of a Gaussian's codes rise by their squares."""
    return weight / (2 * math.log(2) * mean_square.clamp_min(0.05))


def _rounded(x: Tensor, slope: Tensor) -> Tensor:
    """To whole numbers; to the smaller of two while that is nearer by less than its shorter code is worth."""
    size = x.abs()
    below = size.floor()
    threshold = torch.addcmul(slope + 0.5, slope, below, value=2).clamp_max_(LAST_THRESHOLD)
    return below.add_(size.sub_(below) >= threshold).copysign_(x)


def fit_rows(W: Tensor, q: Tensor, columns: Tensor, H: Tensor | None, a: Tensor, dtype: torch.dtype) -> Tensor:
    """a, (m,), in `dtype`: the row factors of least error of the output under H, or of the weights without one."""
    scaled = q.float() * columns
    weighted = scaled if H is None else scaled @ H
    above, below = (weighted * W).sum(1), (weighted * scaled).sum(1)
    return torch.where(below > 0, above / below.clamp_min(1e-38), a).to(dtype)
