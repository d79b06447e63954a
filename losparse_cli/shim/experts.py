"""Experts that transformers fuses into three-dimensional parameters, as one linear layer a matrix again.

Most checkpoints store experts one by one, and transformers merges them when it loads a model; others hold all of a
layer in one tensor on disk, too. What is fused cannot be a compressed layer: so the fused module is replaced by one
that holds linear layers, named as they are on disk, or as the fused parameter with the expert's number before it, and
the rules that merge are left out. Found by structure: a class that transformers made take any implementation of
experts, or one that is called with nothing but what each expert is fed.

This file is shipped inside checkpoints and may import nothing but torch and transformers.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    Transpose,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

Names = tuple[str | None, str, str]
"""What the matrices of an expert are called: gate (None if there is none, or it is one matrix with up), up, down."""
DECORATED = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "_apply_gate")
"""What transformers gives a class that takes any implementation of experts."""


@dataclass(frozen=True)
class Form:
    """How a fused module holds its experts. first: its parameter before the activation. hidden, width: sizes of what an
    expert is fed, and of what is between its matrices. turned: each matrix lies as (in, out). sorted: it is called with
    what each expert is fed, of one after the other, and not with what routes."""

    first: str
    count: int
    hidden: int
    width: int
    turned: bool
    sorted: bool

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of an expert's matrix for each of the parameters."""
        rows = 2 * self.width if self.first == "gate_up_proj" else self.width
        return {self.first: (rows, self.hidden), "down_proj": (self.hidden, self.width)}


class Expert(nn.Module):
    """The matrices of one expert; it computes nothing by itself."""


class SplitExperts(nn.Module):
    """Called as the fused module that it replaces; its experts are children 0, 1, ..., each with its linear layers.

    The layers are on the device and in the dtype of the fused parameters, and hold no values of theirs; biases stay
    what they are, one parameter for all experts. stored: fused parameter -> the tensor on disk that holds it for all
    experts; {} where they lie there one by one.
    """

    def __init__(self, fused: Any, names: Names, stored: Mapping[str, str]) -> None:
        super().__init__()
        form = form_of(fused)
        assert form is not None, "others are never split"
        # What the class's own gate may ask for, as limits of its activation.
        for key, value in vars(fused).items():
            if not key.startswith("_") and key != "training":
                setattr(self, key, value)
        for key, child in fused.named_children():
            self.add_module(key, child)
        self.kind = type(fused)
        self.form, self.names, self.stored = form, names, dict(stored)
        self.count = form.count
        gate, up, down = names
        self.shapes: dict[str, tuple[int, ...]] = {}
        for key, value in fused.named_parameters(recurse=False):
            if value.dim() == 3:
                self.shapes[key] = tuple(value.shape)
            else:
                self.register_parameter(key, value)
        like = {"bias": False, "device": fused.down_proj.device, "dtype": fused.down_proj.dtype}
        rows = form.shapes[form.first][0] // (1 if gate is None else 2)  # of one matrix
        for number in range(self.count):
            expert = Expert()
            for name, (m, n) in (
                (gate, (rows, form.hidden)),
                (up, (rows, form.hidden)),
                (down, form.shapes["down_proj"]),
            ):
                if name is not None:
                    expert.add_module(name, nn.Linear(n, m, **like))
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
        first = torch.cat([getattr(expert, name)(x) for name in (gate, up) if name is not None], -1)
        bias = getattr(fused, f"{self.form.first}_bias", None)
        if bias is not None:
            first = first + bias[number]
        y: Tensor = getattr(expert, down)(self._between(first))
        bias = getattr(fused, "down_proj_bias", None)
        if bias is not None:
            y = y + bias[number]
        return fused.post_expert_norm(y) if getattr(fused, "has_post_expert_norm", False) else y

    def _between(self, x: Tensor) -> Tensor:
        """What an expert's second matrix is fed, from what its first ones give."""
        fused: Any = self
        if self.form.first != "gate_up_proj":
            y: Tensor = fused.act_fn(x)
        elif self.form.sorted:
            gate, up = x.chunk(2, dim=-1)
            y = up * fused.act_fn(gate)
        else:
            y = self.kind._apply_gate(self, x)
        return y


class SortedExperts(SplitExperts):
    """Of Llama 4, whose router scales what experts are fed, to zero where a token is not theirs."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """hidden_states (experts · tokens, hidden), the first expert's before the second's -> the same shape."""
        result = torch.zeros_like(hidden_states)
        fed = hidden_states.view(self.count, -1, hidden_states.shape[-1])
        for number, x in enumerate(fed):
            some = x.any(-1).nonzero()[:, 0]
            if len(some):  # without biases nothing comes of nothing
                result.view_as(fed)[number, some] = self._expert(number, x[some]).to(result.dtype)
        return result


def form_of(module: nn.Module) -> Form | None:
    """How a module holds fused experts; None if it is none that `SplitExperts` computes the same as."""
    shapes = {key: tuple(value.shape) for key, value in module.named_parameters(recurse=False)}
    first = "gate_up_proj" if "gate_up_proj" in shapes else "up_proj"
    if list(module.buffers()) or not all(len(shapes.get(key, ())) == 3 for key in (first, "down_proj")):
        return None
    settings: Any = module
    normed, biased, one_by_one = False, False, False
    if all(hasattr(module, key) for key in DECORATED):
        if settings.has_gate != (first == "gate_up_proj"):
            return None
        normed, biased = bool(getattr(settings, "has_post_expert_norm", False)), settings.has_bias
        turned = bool(settings.is_transposed)
    elif first == "gate_up_proj" and hasattr(module, "act_fn") and _is_fed_alone(type(module)):
        turned, one_by_one = shapes[first][1] == shapes["down_proj"][2], True
    else:
        return None
    inside = {key for key, _ in module.named_parameters()} - set(shapes)
    if not all(normed and key.startswith("post_expert_norm.") for key in inside):
        return None
    count, *sizes = shapes["down_proj"]
    width, hidden = sizes if turned else reversed(sizes)
    form = Form(first, count, hidden, width, turned, one_by_one)
    expected: dict[str, tuple[int, ...]] = {}
    for key, (m, n) in form.shapes.items():
        expected[key] = (count, n, m) if turned else (count, m, n)
        if biased:
            expected[f"{key}_bias"] = (count, m)
    return form if shapes == expected else None


def fused_experts(model: Any, tensors: Iterable[str] = ()) -> dict[str, tuple[Names, dict[str, str]]]:
    """Fused modules that can be split -> what their matrices are called after transformers' renamings, and, where all
    experts lie in one tensor on disk, which one that is by parameter.

    tensors: those on disk that may be such.
    """
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {parameter.rpartition(".")[0] for parameter in (*ties, *ties.values())}
    forms = {
        name: form
        for name, module in model.named_modules()
        if name not in tied and (form := form_of(module)) is not None
    }
    if not forms:
        return {}
    mapping = list(get_model_conversion_mapping(model) or ())
    together = _together(model, forms, mapping, tensors)
    mergers = [entry for entry in mapping if _merges(entry)]
    found: dict[str, tuple[Names, dict[str, str]]] = {}
    for name, form in forms.items():
        if together.get(name, {}).keys() == form.shapes.keys():
            found[name] = (None, form.first, "down_proj"), together[name]
            continue
        settings: Any = model.get_submodule(name)
        if form.sorted or form.turned or settings.has_bias or not settings.is_concatenated:
            continue
        into, down = _sources(mergers, name, f"{name}.{form.first}"), _sources(mergers, name, f"{name}.down_proj")
        if len(into) == (2 if settings.has_gate else 1) and len(down) == 1:
            found[name] = (*into, *down) if settings.has_gate else (None, *into, *down), {}  # type: ignore[assignment]
    return found


def split_experts(model: Any, fused: Mapping[str, tuple[Names, Mapping[str, str]]]) -> None:
    """Put split experts, without values, in the place of fused ones, in every one of `fused`."""
    for name, (names, stored) in fused.items():
        module = model.get_submodule(name)
        form = form_of(module)
        kind = SortedExperts if form is not None and form.sorted else SplitExperts
        model.set_submodule(name, kind(module, names, stored))


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


def _is_fed_alone(kind: type[nn.Module]) -> bool:
    """Whether the module is called with nothing but what its experts are fed."""
    return list(inspect.signature(kind.forward).parameters) == ["self", "hidden_states"]


def _together(
    model: Any, forms: Mapping[str, Form], mapping: Collection[Any], tensors: Iterable[str]
) -> dict[str, dict[str, str]]:
    """Fused module -> parameter of it -> the tensor on disk that holds it for all experts."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state = dict.fromkeys(model.state_dict(), True)
    found: dict[str, dict[str, str]] = {}
    for tensor in tensors:
        name, pattern = rename_source_key(tensor, renamings, converters, model.base_model_prefix, state)
        module, _, parameter = name.rpartition(".")
        if module not in forms or parameter not in forms[module].shapes:
            continue
        steps = [entry.operations for entry in converters if pattern in entry.source_patterns]
        if all(len(one) == 1 and isinstance(one[0], Transpose) for one in steps):
            found.setdefault(module, {})[parameter] = tensor
    return found


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
