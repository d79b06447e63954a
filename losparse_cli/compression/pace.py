"""How long layers take without text: parts of two sizes of the largest layer are solved, and all others lie on that
line; where these are nearly one size, all layers take as long."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..budget.plan import LayerPlan, code_overhead, count_nnz
from ..checkpoint.reader import TORCH_DTYPES
from ..errors import LosparseError
from .coded import Coder, Ledger
from .plan import Job
from .rows import code_rows
from .solve import encode, solve_layer

SIZES = (128, 384)
"""Rows and columns of the parts, at most."""
ROUNDS = 3


def seconds_alone(job: Job) -> tuple[float, float, float]:
    """Seconds that all layers of the job take without text: at least, about and at most, as paces go now."""
    found = [0.0] * ROUNDS
    layers = job.scheduled().plan.layers
    for rows in (False, True):  # which are coded otherwise
        plans = [plan for plan in layers if bool(plan.layer.rows) == rows]
        if plans:
            found = [total + more for total, more in zip(found, _of_kind(job, plans), strict=True)]
    return found[0], found[ROUNDS // 2], found[-1]


def _of_kind(job: Job, plans: Sequence[LayerPlan]) -> list[float]:
    """Of plans that one pace fits, rising."""
    largest = max(plans, key=lambda plan: plan.nnz)
    small, large = (_part(largest, size) for size in SIZES)
    few, many, all_of_them = small.layer.weights, large.layer.weights, sum(plan.layer.weights for plan in plans)
    _seconds(job, small)  # what is made once
    found = []
    for _ in range(ROUNDS):
        least, most = _seconds(job, small), _seconds(job, large)
        if many < 2 * few:  # two points so close make a line of noise, and in layers so small the weights hardly count
            found.append(most * len(plans))
            continue
        rate = max(0.0, most - least) / (many - few)
        found.append(max(0.0, least - rate * few) * len(plans) + rate * all_of_them)
    return sorted(found)


def _part(plan: LayerPlan, size: int) -> LayerPlan:
    """The plan for a corner of the layer, as dense, and in proportion of as low a rank and as many bits."""
    m, n = plan.layer.shape
    layer = replace(plan.layer, shape=(min(m, size), min(n, size)))
    share = layer.weights / plan.layer.weights
    rank = min(plan.rank, max(1, round(plan.rank * (m + n) * share / sum(layer.shape))))
    codes = (plan.expected_bytes - code_overhead(plan.layer, plan.rank)) * share
    return replace(
        plan,
        layer=layer,
        rank=rank,
        nnz=count_nnz(layer.shape, plan.nnz / plan.layer.weights, plan.pattern, plan.scope),
        expected_bytes=round(codes) + code_overhead(layer, rank),
    )


def _seconds(job: Job, plan: LayerPlan) -> float:
    """That such a layer of random weights takes."""
    dtype = TORCH_DTYPES[job.source.entries[plan.layer.tensor].dtype]
    shape = plan.layer.shape[::-1] if plan.layer.transposed else plan.layer.shape
    stored = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    begun = time.perf_counter()
    try:
        if plan.layer.rows:
            code_rows(plan, stored, job.device)
        elif plan.bits:
            another = replace(plan, layer=replace(plan.layer, name=""))  # the last of a ledger is solved more often
            Ledger((plan, another)).code(Coder([plan], [stored], None, [None], job.recipe.seed, job.device))
        else:
            encode(plan, solve_layer(plan, stored, job.recipe, job.device), stored.dtype)
    except LosparseError:
        pass  # a corner may be too small for as few bits: it has taken its time all the same
    return time.perf_counter() - begun
