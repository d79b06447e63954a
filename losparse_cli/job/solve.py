"""One layer: the weight as it is stored -> U, V and S as they will be stored."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..budget.plan import Layer, LayerPlan
from ..checkpoint.report import LayerReport
from ..errors import CheckpointError
from ..linalg.alternating import decompose
from ..linalg.patterns import parse_pattern
from ..linalg.svd import seed_of
from ..shim.codec import smallest
from ..shim.layouts import LayerSpec
from .prepare import Job


def solve_layer(plan: LayerPlan, stored: Tensor, job: Job) -> tuple[LayerReport, LayerSpec, dict[str, Tensor]]:
    """U, V, S of one layer, and its tensors as they are stored, by suffix."""
    layer = plan.layer
    W = stored.to(job.device).float()
    if layer.transposed:
        W = W.T.contiguous()
    _require_finite(W, layer)
    solved = decompose(
        W,
        plan.rank,
        plan.nnz,
        parse_pattern(plan.pattern),
        scope=plan.scope,
        iterations=plan.iterations,
        exact_svd=job.recipe.exact_svd,
        seed=seed_of(job.recipe.seed, layer.name),
        dtype=stored.dtype,
    )
    factors = solved.factors
    spec, index = smallest(factors.support, factors.rank, plan.pattern)
    disk = layer.disk_module if layer.disk_module != layer.name else ""
    spec = replace(spec, transposed=layer.transposed, tensor=disk)
    tensors = {"U": factors.U, "V": factors.V} if factors.rank else {}
    tensors |= {"weight": factors.values, **index}
    report = LayerReport(
        layer.name,
        layer.shape,
        factors.rank,
        factors.nnz,
        plan.pattern,
        spec.layout,
        layer.dense_bytes,
        spec.nbytes(stored.dtype),
        solved.weight_squared,
        solved.residual_squared,
        solved.errors,
    )
    return report, spec, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


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
