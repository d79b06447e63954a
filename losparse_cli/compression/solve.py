"""Weights as they are stored -> U, V and S as they will be stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..budget.plan import Layer, LayerPlan
from ..budget.recipe import Recipe
from ..checkpoint.layers import encode_layer
from ..checkpoint.report import LayerReport
from ..errors import CheckpointError
from ..linalg.admm import solve
from ..linalg.alternating import decompose, decompose_scaled
from ..linalg.factors import Decomposition
from ..linalg.patterns import parse_pattern
from ..linalg.svd import seed_of

# Measured on SmolLM2-135M, two cores: time of the whole over that of its products alone at full speed.
SOLVER_OVERHEAD = 2.2
FEEDBACK_OVERHEAD = 6  # column by column, which no product is as slow as
JOINT_STEPS = 120  # of ADMM, before what is sparse is rounded to whole numbers
POLISH = 45  # products with H besides those of the iterations


def effort(plan: LayerPlan, recipe: Recipe) -> float:
    """Flops of solving a layer for what it is fed, weighted with their overhead; without text hardly any."""
    m, n = plan.layer.shape
    found = float(m * n)
    if plan.bits and recipe.solver == "feedback":
        found += FEEDBACK_OVERHEAD * 2 * m * n * n
    rounds_sparse = plan.bits and plan.sparse and recipe.solver == "feedback"
    if recipe.solver == "admm" or rounds_sparse:
        steps = JOINT_STEPS if rounds_sparse else plan.iterations
        found += SOLVER_OVERHEAD * (2 * m * n * n * (steps + POLISH) + 2 * n**3 * steps / 5)
    return found


def as_matrix(stored: Tensor, layer: Layer, device: torch.device) -> Tensor:
    """The weight, (out, in), in float32 on `device`; CheckpointError if a value is not finite."""
    W = stored.to(device).float()
    if layer.transposed:
        W = W.T.contiguous()
    _require_finite(W, layer)
    return W


def solve_layer(plan: LayerPlan, stored: Tensor, recipe: Recipe, device: torch.device) -> Decomposition:
    """U, V and S of one layer without data."""
    return decompose(
        as_matrix(stored, plan.layer, device),
        plan.rank,
        plan.nnz,
        parse_pattern(plan.pattern),
        scope=plan.scope,
        iterations=plan.iterations,
        seed=seed_of(recipe.seed, plan.layer.name),
        dtype=stored.dtype,
    )


def solve_layers(
    plans: Sequence[LayerPlan], stored: Sequence[Tensor], H: Tensor, recipe: Recipe, device: torch.device
) -> list[Decomposition]:
    """U, V and S of layers that are fed the same inputs, of second moment H (in, in), by the recipe's solver."""
    if recipe.solver == "magnitude" or not bool(H.any()):  # inputs that are all zero tell nothing
        return [solve_layer(plan, W, recipe, device) for plan, W in zip(plans, stored, strict=True)]
    weights = [as_matrix(W, plan.layer, device) for plan, W in zip(plans, stored, strict=True)]
    if recipe.solver == "oats":
        return [
            decompose_scaled(
                W,
                H,
                plan.rank,
                plan.nnz,
                parse_pattern(plan.pattern),
                scope=plan.scope,
                iterations=plan.iterations,
                dtype=as_stored.dtype,
            )
            for plan, W, as_stored in zip(plans, weights, stored, strict=True)
        ]
    return solve_jointly(plans, weights, H, [plan.iterations for plan in plans], [W.dtype for W in stored])


def solve_jointly(
    plans: Sequence[LayerPlan],
    weights: Sequence[Tensor],
    H: Tensor,
    steps: Sequence[int],
    dtypes: Sequence[torch.dtype],
) -> list[Decomposition]:
    """U, V and S of each of `weights` (out, in), float32, by so many steps of ADMM, in the dtype it is to be stored in;
    those that are asked for alike go side by side."""
    found: list[Decomposition | None] = [None] * len(plans)
    alike: dict[tuple[str, str, int, torch.dtype], list[int]] = {}
    for k, (plan, count, dtype) in enumerate(zip(plans, steps, dtypes, strict=True)):
        alike.setdefault((plan.pattern, plan.scope, count, dtype), []).append(k)
    for (pattern, scope, count, dtype), members in alike.items():
        solved = solve(
            [weights[k] for k in members],
            H,
            [(plans[k].rank, plans[k].nnz) for k in members],
            parse_pattern(pattern),
            scope=scope,
            steps=count,
            dtype=dtype,
        )
        for k, one in zip(members, solved, strict=True):
            found[k] = one
    return [one for one in found if one is not None]


def encode(plan: LayerPlan, solved: Decomposition, dtype: torch.dtype) -> tuple[LayerReport, dict[str, Tensor]]:
    """The layer's line of the report, with its entry in config.json, and its tensors as stored, by suffix."""
    spec, tensors = encode_layer(plan, solved.factors)
    report = LayerReport(
        plan.layer.name,
        spec,
        plan.layer.dense_bytes,
        spec.nbytes(dtype),
        solved.weight_squared,
        solved.residual_squared,
        solved.errors,
        solved.output_errors,
        solved.held_out_error,
        solved.log_step,
        head=plan.layer.rows == "head",
    )
    return report, tensors


def _require_finite(W: Tensor, layer: Layer) -> None:
    if torch.isfinite(torch.linalg.vector_norm(W)):  # NaN and infinity survive a norm
        return
    wrong = torch.nonzero(~torch.isfinite(W))
    if len(wrong):
        row, column = wrong[0].tolist()
        raise CheckpointError(
            f"{layer.tensor} holds {W[row, column].item()} at row {row}, column {column} ({len(wrong)} such values). "
            f"Repair the checkpoint, or leave the layer out with --ignore '{layer.name}'."
        )
    raise CheckpointError(
        f"{layer.tensor} holds values as large as {float(W.abs().max()):.3g}, whose squares overflow float32. Repair "
        f"the checkpoint, or leave the layer out with --ignore '{layer.name}'."
    )
