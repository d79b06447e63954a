"""Dense models whose experts are split, as references for compressed ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from losparse_cli.shim.experts import fused_experts, split_experts


def split(model: Any, together: Iterable[str] = ()) -> Any:
    """The model itself, with its experts' values in layers of their own; together: tensors on disk of all experts."""
    fused = fused_experts(model, together)
    values = {name: dict(model.get_submodule(name).named_parameters()) for name in fused}
    split_experts(model, fused)
    with torch.no_grad():
        for name, ((gate, up, down), _) in fused.items():
            form = model.get_submodule(name).form
            for number in range(form.count):
                expert = model.get_submodule(f"{name}.{number}")
                first, second = (values[name][key][number] for key in (form.first, "down_proj"))
                if form.turned:
                    first, second = first.T, second.T
                parts = {gate: first[: len(first) // 2], up: first[len(first) // 2 :]} if gate else {up: first}
                for matrix, value in (parts | {down: second}).items():
                    expert.get_submodule(matrix).weight.copy_(value)
    return model
