"""Experts that transformers fuses into three-dimensional parameters, as one linear layer a matrix again.

A checkpoint stores experts one by one, and transformers merges them when it loads a model. What is merged cannot be a
compressed layer: so the merged module is replaced by one that holds linear layers, named as they are on disk, and the
rules that merge are left out. Found by structure: a class that transformers made take any implementation of experts.

This file is shipped inside checkpoints and may import nothing but torch and transformers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import MergeModulelist, WeightConverter, rename_source_key

Names = tuple[str | None, str, str]
"""What the matrices of an expert are called: gate (None if there is none), up and down."""


class Expert(nn.Module):
    """The matrices of one expert; it computes nothing by itself."""


class SplitExperts(nn.Module):
    """Called as the fused module that it replaces; its experts are children 0, 1, ..., each with its linear layers.

    The layers are on the device and in the dtype of the fused parameters, and hold no values of theirs.
    """

    def __init__(self, fused: Any, names: Names) -> None:
        super().__init__()
        # What the class's own gate may ask for, as limits of its activation.
        for key, value in vars(fused).items():
            if not key.startswith("_") and key != "training":
                setattr(self, key, value)
        for key, child in fused.named_children():
            self.add_module(key, child)
        self.kind = type(fused)
        self.names = names
        gate, up, down = names
        self.count, hidden, width = fused.down_proj.shape
        self.shapes = {key: tuple(value.shape) for key, value in fused.named_parameters()}
        like = {"bias": False, "device": fused.down_proj.device, "dtype": fused.down_proj.dtype}
        for number in range(self.count):
            expert = Expert()
            for name, shape in ((gate, (hidden, width)), (up, (hidden, width)), (down, (width, hidden))):
                if name is not None:
                    expert.add_module(name, nn.Linear(*shape, **like))
            self.add_module(str(number), expert)
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (tokens, hidden); top_k_index and top_k_weights (tokens, k) -> (tokens, hidden)."""
        result = torch.zeros_like(hidden_states)
        order = torch.argsort(top_k_index.reshape(-1), stable=True)
        tokens, weights = order // top_k_index.shape[-1], top_k_weights.reshape(-1)[order]
        counts = torch.bincount(top_k_index.reshape(-1), minlength=self.count).tolist()
        begin = 0
        for number, count in enumerate(counts[: self.count]):
            if count:
                some = tokens[begin : begin + count]
                y = self._expert(number, hidden_states[some]) * weights[begin : begin + count, None]
                result.index_add_(0, some, y.to(result.dtype))
            begin += count
        return result

    def _expert(self, number: int, x: Tensor) -> Tensor:
        fused: Any = self  # with what the class that was replaced had
        expert = fused.get_submodule(str(number))
        gate, up, down = self.names
        both = [getattr(expert, name)(x) for name in (gate, up) if name is not None]
        inner = fused.act_fn(both[0]) if gate is None else self.kind._apply_gate(self, torch.cat(both, -1))
        y: Tensor = getattr(expert, down)(inner)
        return y


def fused_experts(model: Any) -> dict[str, Names]:
    """Fused modules that can be split -> what their matrices are called on disk, after transformers' renamings."""
    found: dict[str, Names] = {}
    mergers: list[Any] | None = None
    for name, module in model.named_modules():
        if not _can_be_split(module):
            continue
        if mergers is None:
            mergers = [entry for entry in get_model_conversion_mapping(model) or () if _merges(entry)]
        first = f"{name}.gate_up_proj" if module.has_gate else f"{name}.up_proj"
        into, down = _sources(mergers, name, first), _sources(mergers, name, f"{name}.down_proj")
        if len(into) == (2 if module.has_gate else 1) and len(down) == 1:
            found[name] = (*into, *down) if module.has_gate else (None, *into, *down)  # type: ignore[assignment]
    return found


def split_experts(model: Any, fused: dict[str, Names]) -> None:
    """Put split experts, without values, in the place of fused ones, in every one of `fused`."""
    for name, names in fused.items():
        model.set_submodule(name, SplitExperts(model.get_submodule(name), names))


@contextmanager
def as_if_fused(model: Any) -> Iterator[None]:
    """For a model's own initialization, which may ask experts for the parameters that they had: empty ones."""
    given: list[tuple[Any, str]] = []
    for module in model.modules():
        if isinstance(module, SplitExperts):
            for key, shape in module.shapes.items():
                parameter = nn.Parameter(torch.empty(shape, device="meta"), requires_grad=False)
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
                module.register_parameter(key, parameter)
                given.append((module, key))
    try:
        yield
    finally:
        for module, key in given:
            delattr(module, key)


def without_merging(conversions: Collection[Any], model: Any) -> list[Any]:
    """transformers' rules for loading `model`, less those that merge what is split in it."""
    split = [(name, module) for name, module in model.named_modules() if isinstance(module, SplitExperts)]
    if not split:
        return list(conversions)
    name, module = split[0]
    every = [f"{name}.0.{matrix}.weight" for matrix in module.names if matrix is not None]
    return [
        entry
        for entry in conversions
        if not (_merges(entry) and any(rename_source_key(key, [], [entry])[1] is not None for key in every))
    ]


def _can_be_split(module: nn.Module) -> bool:
    """Whether its parameters are one matrix an expert, and nothing else, as `SplitExperts` multiplies with them."""
    if not all(
        hasattr(module, key) for key in ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
    ):
        return False
    settings: Any = module
    if settings.has_bias or settings.is_transposed or not settings.is_concatenated:
        return False
    if getattr(settings, "has_post_expert_norm", False):
        return False
    shapes = {key: value.shape for key, value in module.named_parameters()}
    first = "gate_up_proj" if settings.has_gate else "up_proj"
    if (
        set(shapes) != {first, "down_proj"}
        or list(module.buffers())
        or any(len(shape) != 3 for shape in shapes.values())
    ):
        return False
    count, hidden, width = shapes["down_proj"]
    return shapes[first] == (count, (2 if settings.has_gate else 1) * width, hidden)


def _merges(entry: Any) -> bool:
    return isinstance(entry, WeightConverter) and any(isinstance(step, MergeModulelist) for step in entry.operations)


def _sources(mergers: list[Any], module: str, parameter: str) -> tuple[str, ...]:
    """What the matrices are called that are merged into a fused `parameter`."""
    for merger in mergers:
        names = [pattern.removesuffix(".weight").rpartition(".")[2] for pattern in _patterns(merger)]
        renamed = [rename_source_key(f"{module}.0.{name}.weight", [], [merger]) for name in names]
        if all(key == parameter and pattern is not None for key, pattern in renamed):
            return tuple(names)
    return ()


def _patterns(merger: Any) -> Iterator[str]:
    found = merger._original_source_patterns
    yield from [found] if isinstance(found, str) else found
