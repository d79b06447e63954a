"""What one rank has found of some layers, on all of them: as it is stored, and what is said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..checkpoint.layers import unpack_layer
from ..checkpoint.report import LayerReport
from ..linalg.factors import Decomposition
from ..parallel.group import Ranks
from ..shim.layouts import LayerSpec

Stored = tuple[LayerReport, dict[str, Tensor]]
"""The line of a layer, with its entry in config.json, and its tensors by suffix."""


def everywhere(group: Ranks, owner: int, own: Sequence[Stored]) -> list[Stored]:
    """What rank `owner` gives, on every rank; what others give is ignored."""
    said = group.agree([[report.spec.to_dict(), report.measured()] for report, _ in own])[owner]
    named = {f"{k}.{suffix}": t for k, (_, parts) in enumerate(own) for suffix, t in parts.items()}
    tensors = group.broadcast(owner, named)
    found = []
    for k, (spec, line) in enumerate(said):
        parts = {key.partition(".")[2]: t for key, t in tensors.items() if key.partition(".")[0] == str(k)}
        found.append((LayerReport.from_dict(line, LayerSpec.from_dict(spec)), parts))
    return found


def decomposition(report: LayerReport, parts: Mapping[str, Tensor], device: torch.device) -> Decomposition:
    """What was found, from what is stored of it."""
    factors = unpack_layer(report.spec, {suffix: t.to(device) for suffix, t in parts.items()})
    assert report.weight_squared is not None
    assert report.residual_squared is not None
    return Decomposition(
        factors, report.errors, report.weight_squared, report.residual_squared, report.output_errors,
        report.held_out_error, report.log_step,
    )  # fmt: skip
