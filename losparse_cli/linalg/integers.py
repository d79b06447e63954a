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
SHARES = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.72, 0.64)
"""Of the step at which the largest code is the largest entry, those that are tried: finer ones cut it off."""
MOST_RUN = 15
"""The largest multiple of a row's step that a run of its columns may have: such codes of 4 bits still fit into 8."""
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


def column_metric(H: Tensor, grid: Tensor, damping: float = DAMPING) -> Metric:
    """The metric of columns of a second moment H (n, n).

    grid: rising, the column factors that can be stored. ValueError if H, damped, is singular still.
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
    columns[order] = nearest(c / scale, grid)
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
    runs: Tensor | None = None,
) -> Tensor:
    """q, (m, n), int32: W (m, n, float32) rounded to multiples of a_i c_j, each column's error handed on to later ones.

    support: (m, n), bool: where q may be other than zero, None for everywhere. width: bits that hold every q, as a
    two's complement; 0 for any. runs: (m, n / run), the whole numbers that codes of runs of columns are multiples of,
    which then have that width beside them.
    """
    m, n = W.shape
    order, R = metric.order, metric.R
    steps = metric.columns[order]
    left = W.T[order].contiguous()  # columns of W lie together
    slope = _slope((left / steps[:, None]).pow_(2).mean(0) / a.square(), weight)
    allowed = None if support is None else support.T[order]
    codes = torch.empty(n, m, dtype=torch.int32, device=W.device)
    scale = torch.ones(1, m, device=W.device) if runs is None else runs.T.float().contiguous()
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


def rounded(W: Tensor, a: Tensor, weight: float = CODE_WEIGHT, width: int = 0, runs: Tensor | None = None) -> Tensor:
    """q, (m, n), int32: W rounded to multiples of a_i, each entry alone; width, runs: as of `code`."""
    X = W / a[:, None]
    if runs is not None:
        return in_width(X, width, of_entries(runs, W.shape[1])).int()
    q = _rounded(X.T, _slope(X.pow(2).mean(1), weight)).T
    return (q.clamp_(*limits(width)) if width else q).int()


def unrounded(W: Tensor, q: Tensor, a: Tensor, metric: Metric | None, columns: Tensor) -> Tensor:
    """What `code` rounded to q (m, n), in steps a_i c_j: the entries of W with what columns before handed on to them.

    a: (m,), row factors. columns: c, (n,). metric: None where each entry was rounded by itself.
    """
    steps = a[:, None] * columns
    E = torch.addcmul(W, q.to(W.dtype), steps, value=-1)
    if metric is not None:
        # `code` takes error_j = (left_j - step q_j) / R_jj and hands error_j R_jk on to later k: so error R = E.
        order, R = metric.order, metric.R
        errors = torch.linalg.solve_triangular(R, E[:, order].contiguous(), upper=True, left=False)
        E[:, order] = errors.mul_(R.diagonal())
    return E.div_(steps).add_(q)


def thresholds(q: Tensor, weight: float = CODE_WEIGHT) -> Tensor:
    """How far above a half the threshold between two codes of each row of q (m, n) lies, for each 2 |q| + 1: (m, 1)."""
    return _slope(q.float().square().mean(1, keepdim=True), weight)


def shorter(u: Tensor, above: Tensor) -> Tensor:
    """u (m, n) as whole numbers, the shorter of two by the `thresholds` that are given."""
    return _rounded(u, above)


def of_entries(runs: Tensor, n: int) -> Tensor:
    """The whole number of each entry's run, (m, n), float32, from those of runs, (m, n / run)."""
    return runs.float().repeat_interleave(n // runs.shape[1], 1)


def in_width(u: Tensor, width: int, unit: Tensor) -> Tensor:
    """u (m, n) as the nearest multiples of `unit`, one or one for each entry, that numbers of `width` bits can say."""
    return (u / unit).round_().clamp_(*limits(width)).mul_(unit)


def limits(width: int) -> tuple[int, int]:
    """The least and the largest whole number of so many bits, as a two's complement."""
    return -(1 << width - 1), (1 << width - 1) - 1


def steps_of_width(W: Tensor, weights: Tensor, width: int, run: int = 0) -> tuple[Tensor, Tensor | None]:
    """Steps at which whole numbers of `width` bits come nearest to W (m, n): a, (m,), and runs, (m, n / run), int8.

    weights: (n,), what a squared error in each column counts. run: columns whose step is a whole number times that of
    their row, negative where that puts their largest entry where there is one number more; 0 for a step a row, and
    runs are None then. Steps are 16-bit floats of any kind, also times those whole numbers.
    """
    m, n = W.shape
    least, most = limits(width)
    parts = W.view(m, -1, run or n)
    each = weights.view(1, -1, run or n)
    largest = parts.gather(2, parts.abs().argmax(2, keepdim=True))[..., 0] / least
    sign = torch.where(largest < 0, -1.0, 1.0)
    a = short(largest.abs().amax(1) / MOST_RUN).clamp_min(finest_factor(run))
    best, error = torch.ones_like(largest), torch.full_like(largest, math.inf)
    for share in SHARES:
        step = largest.abs() * share
        if run:
            multiple = sign * (step / a[:, None]).round_().clamp_(1, MOST_RUN)
            step = multiple * a[:, None]
        else:
            multiple = step = step.clamp_min(finest_factor(run))
        q = (parts / step[..., None]).round_().clamp_(least, most)
        found = q.mul_(step[..., None]).sub_(parts).square_().mul_(each).sum(2)
        best = torch.where(found < error, multiple, best)
        error = torch.minimum(found, error)
    return (a, best.to(torch.int8)) if run else (best[:, 0], None)


def finest_factor(run: int) -> float:
    """The least factor of a row that is exact in 16-bit floats: of four binary digits with runs, else of eight."""
    return 2.0**-20 if run else 2.0**-16


def storable(a: Tensor, dtype: torch.dtype, run: int) -> Tensor:
    """Factors of rows (m,) in `dtype` that other engines' formats can store as well, float32; run: as of the codes."""
    return (short(a) if run else a.to(dtype).half().float()).clamp_min(finest_factor(run))


def short(a: Tensor) -> Tensor:
    """The nearest numbers of four binary digits, which times another of four are 16-bit floats of any kind."""
    mantissa, exponent = torch.frexp(a)
    return torch.ldexp((mantissa * 16).round() / 16, exponent)


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
