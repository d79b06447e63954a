"""A recipe and a model -> Plan: how many columns U has in each layer, and what S keeps at last."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..budget.plan import Layer, Plan, make_plan, plan_as_stored, plan_layer
from ..budget.recipe import Recipe
from ..budget.recipe_file import RANK_CHOICES, SIZE_CHOICES
from ..budget.targets import choose
from ..checkpoint.config import layer_specs
from ..checkpoint.source import Checkpoint
from ..errors import UsageError
from ..models.skeleton import Skeleton, classify
from ..shim.layouts import LayerSpec
from .conversion import coded_modules, compressed_layers, is_coded, is_shared

DEFAULTS = {"keep_parameters": 0.2, "rank_ratio": 0.5}
"""Of a dense model. The paper has a quarter for U and V, which begin at less than they do here."""
PATTERN = "rows"
"""What S loses where there is no recipe: output neurons."""


def settle(recipe: Recipe | None, checkpoint: Checkpoint) -> Recipe:
    """What is asked of this checkpoint, before a weight is read, with DEFAULTS where a dense model's sizes are open.

    UsageError for a pattern that training cannot prune, and for what a compressed model has decided already.
    """
    recipe = recipe or Recipe(pattern=PATTERN)
    if recipe.coded:
        raise UsageError("Training prunes floats in S: leave out settings that are for whole numbers, such as bits.")
    if recipe.size is not None:
        raise UsageError("--size is of losparse compress: training has --keep or --keep-parameters.")
    recipe = replace(recipe, values="float")
    asks_ranks = _is_asked(recipe, RANK_CHOICES)
    if checkpoint.is_compressed:
        specs = [spec for spec in layer_specs(checkpoint).values() if spec.kind != "embedding"]
        if not specs:
            raise UsageError(
                f"{checkpoint.address} has no compressed layers but embeddings. Start from the dense model, or "
                "compress its layers."
            )
        coded = any(spec.layout == "codes" for spec in specs)
        if coded and _is_asked(recipe, SIZE_CHOICES):
            raise UsageError(
                f"{checkpoint.address} holds whole numbers in S, which stay as they are: leave out what asks for "
                "another size, or start from the dense model."
            )
        if coded and not recipe.targets and not recipe.ignore:
            return recipe  # ranks are those of an adapter, which is added
        if asks_ranks or recipe.targets or recipe.ignore:
            raise UsageError(
                "Ranks and layers of a compressed model stay as they are: leave out --rank, --rank-ratio, --targets "
                "and --ignore, or start from the dense model."
            )
        return recipe
    if ":" in recipe.pattern:
        raise UsageError(
            f"Training prunes neurons or single entries, and --pattern {recipe.pattern} is neither. Give rows, "
            "columns or unstructured."
        )
    changes: dict[str, Any] = {}
    if not _is_asked(recipe, SIZE_CHOICES):
        changes["keep_parameters"] = DEFAULTS["keep_parameters"]
    if not asks_ranks:
        changes["rank_ratio"] = DEFAULTS["rank_ratio"]
    return replace(recipe, **changes).settled()


def plan_dense(model: nn.Module, recipe: Recipe, dtype: torch.dtype) -> Plan:
    """Of a dense model what a settled recipe says."""
    linears, skipped = classify(model)
    kinds = Skeleton(model, linears, skipped).kinds
    chosen, skipped = choose(kinds, skipped, recipe.targets, recipe.ignore)
    layers = [_layer(name, linears[name].shape, linears[name].transposed, dtype, kinds[name]) for name in chosen]
    return make_plan(layers, skipped, recipe)


def plan_compressed(model: nn.Module, recipe: Recipe, dtype: torch.dtype, threshold: str) -> Plan:
    """Of a compressed model what there is, or what a settled recipe leaves of it; ranks and patterns stay.

    With one threshold for all only the sum counts, and earlier training has left layers of very different size; with
    one for each, a layer that is smaller already stays as it is.
    """
    own = {name: layer for name, layer in compressed_layers(model).items() if not is_shared(layer)}
    specs: dict[str, LayerSpec] = {name: layer.spec for name, layer in own.items()}
    layers = [_layer(name, spec.shape, spec.transposed, dtype) for name, spec in specs.items()]
    rows = coded_modules(model)
    skipped = {name: why for name, why in classify(model)[1].items() if name not in rows}
    present = plan_as_stored(layers, skipped, specs)
    if is_coded(model):
        return _with_adapters(present, recipe)
    if not _is_asked(recipe, SIZE_CHOICES):
        return present
    wanted = [plan_layer(p.layer, replace(recipe, rank=p.rank, pattern=p.pattern).settled()) for p in present.layers]
    if threshold == "layer":
        wanted = [w if w.nnz < p.nnz else p for w, p in zip(wanted, present.layers, strict=True)]
    now, then = (sum(p.nnz for p in plans) for plans in (present.layers, wanted))
    if then > now:
        raise UsageError(
            f"S has {now:,} entries now, and {then:,} are asked for: training a compressed model can only prune. Ask "
            "for less, or start from the dense model."
        )
    return Plan(tuple(wanted), present.skipped)


def _with_adapters(plan: Plan, recipe: Recipe) -> Plan:
    """With the ranks of adapters beside codes that have none yet; UsageError if there is none such, or room for it."""
    asked = _is_asked(recipe, RANK_CHOICES)
    if asked and all(p.rank for p in plan.layers):
        raise UsageError("Every layer has U and V already: leave out --rank and --rank-ratio.")
    most = max(min(p.layer.shape) for p in plan.layers)
    if recipe.rank is not None and recipe.rank > most:
        raise UsageError(f"--rank {recipe.rank} is more than any layer can have: the largest takes {most}.")
    found = []
    for p in plan.layers:
        m, n = p.layer.shape
        rank = round((recipe.rank_ratio or 0) * m * n / (m + n)) if recipe.rank is None else recipe.rank
        found.append(replace(p, rank=p.rank or min(rank, m, n)))
    return Plan(tuple(found), plan.skipped)


def _is_asked(recipe: Recipe, choices: tuple[str, ...]) -> bool:
    return any(getattr(recipe, name) is not None for name in choices)


def _layer(
    name: str, shape: tuple[int, int], transposed: bool, dtype: torch.dtype, kinds: tuple[str, ...] = ()
) -> Layer:
    return Layer(name, f"{name}.weight", name, (shape[0], shape[1]), dtype.itemsize, transposed, kinds)
