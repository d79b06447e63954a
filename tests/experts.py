"""Dense models whose experts are split, as references for compressed ones."""

from __future__ import annotations

from typing import Any

import torch

from losparse_cli.shim.experts import fused_experts, split_experts


def split(model: Any) -> Any:
    """The model itself, with its experts' values in layers of their own."""
    fused = fused_experts(model)
    values = {name: dict(model.get_submodule(name).named_parameters()) for name in fused}
    split_experts(model, fused)
    with torch.no_grad():
        for name, (gate, up, down) in fused.items():
            for number in range(model.get_submodule(name).count):
                expert = model.get_submodule(f"{name}.{number}")
                first = values[name]["gate_up_proj" if gate else "up_proj"][number]
                parts = {gate: first[: len(first) // 2], up: first[len(first) // 2 :]} if gate else {up: first}
                for matrix, value in (parts | {down: values[name]["down_proj"][number]}).items():
                    expert.get_submodule(matrix).weight.copy_(value)
    return model
