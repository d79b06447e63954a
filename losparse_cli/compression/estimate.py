"""What a calibrated run will take: peak memory, and time from a measured speed of products."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from ..linalg.precision import fast_float32
from .plan import RESIDENT_BASE, Job

# Measured on SmolLM2-135M, two cores: time of the whole over that of its products alone at full speed.
SOLVER_OVERHEAD, FORWARD_OVERHEAD, TRAINING_OVERHEAD = 2.2, 1.6, 1.6
GENERATION_OVERHEAD = 8  # a token at a time is bound by memory: measured against the same products for a whole window
GENERATION_BYTES = 1 << 30  # keys and values of the windows that are written side by side
POLISH = 45  # products with H besides those of the iterations
SOLVER_COPIES = 9  # float32 matrices of the weight's shape that the solver holds at once
TRAINING_COPIES = 8  # of the block: U V + S, S, its mask, gradients, Adam's two moments, and the weights put aside


@dataclass(frozen=True)
class Estimate:
    """fixed_bytes: all but activations. activation_bytes: what flows between blocks. seconds: on this device."""

    fixed_bytes: int
    activation_bytes: int
    seconds: float

    @property
    def peak_bytes(self) -> int:
        return self.fixed_bytes + self.activation_bytes


def estimate(job: Job) -> Estimate:
    """Peak resident bytes and seconds of a calibrated job."""
    assert job.calibration is not None
    assert job.calibration.length is not None
    hidden = job.hidden_size
    tokens = job.windows.tokens if job.windows is not None else job.calibration.tokens
    batch = job.calibration.batch * job.calibration.length
    inside = set().union(*(set(units) for units in job.blocks.values()))
    outside = sum(e.elements for k, (e, _) in enumerate(job.units) if k not in inside)
    widest = max(sum(job.units[k][0].elements for k in units) for units in job.blocks.values())
    moments = solver = 0
    work = 0.0  # flops, weighted with their overhead
    for units in job.blocks.values():
        plans = [plan for k in units if (plan := job.units[k][1]) is not None]
        moments = max(moments, sum(4 * plan.layer.shape[1] ** 2 for plan in plans))
        block = 0
        for plan in plans:
            m, n = plan.layer.shape
            block += m * n
            # Two matrices are often solved side by side: gate and up, or k and v.
            solver = max(solver, 4 * (2 * SOLVER_COPIES * m * n + 4 * n * n))
            if job.recipe.solver == "admm":
                steps = plan.iterations
                work += SOLVER_OVERHEAD * (2 * m * n * n * (steps + POLISH) + 2 * n**3 * steps / 5)
            work += FORWARD_OVERHEAD * 2 * n * n * tokens
        work += FORWARD_OVERHEAD * 2 * 2 * block * tokens
        if job.refinement is not None:
            work += TRAINING_OVERHEAD * 6 * block * batch * job.refinement.steps
    training = TRAINING_COPIES * 4 * widest if job.refinement is not None else 0
    passing = 4 * batch * 16 * hidden  # what one batch leaves behind inside a block
    fixed = RESIDENT_BASE + 4 * (outside + widest) + moments + max(solver, training + passing)
    if (
        job.windows is None
    ):  # the model writes the text itself: all of it in memory, with keys and values, before the rest
        fixed = max(fixed, RESIDENT_BASE + sum(entry.nbytes for entry, _ in job.units) + GENERATION_BYTES)
        work += FORWARD_OVERHEAD * GENERATION_OVERHEAD * 2 * job.parameters * tokens
    held = 3 if job.refinement is not None else 2
    return Estimate(fixed, 4 * tokens * hidden * held, work / _speed(job.device))


def _speed(device: torch.device) -> float:
    """Flops a second of float32 products of 1024 x 1024, measured now."""
    A = torch.randn(1024, 1024, device=device)
    with fast_float32():
        A @ A
        begun, count = time.perf_counter(), 0
        while count < 3 or time.perf_counter() - begun < 0.05:
            A @ A
            count += 1
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return count * 2 * 1024**3 / (time.perf_counter() - begun)
