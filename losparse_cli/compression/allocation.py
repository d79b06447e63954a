"""`--allocate error`: each layer's size and split from coarse solves, checked against the uniform plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..budget.allocate import REACH, Curve, allocate
from ..budget.plan import Layer, plan_layer
from ..budget.recipe import Recipe
from ..budget.recipe_file import RANK_CHOICES, SIZE_CHOICES
from ..budget.targets import matches
from ..calibration.moments import gather_moments
from ..errors import UsageError
from ..linalg.factors import Decomposition
from ..linalg.precision import fast_float32
from ..models.blocks import Relay, block_of
from ..models.device import available
from ..text.windows import Sample
from .assembly import Assembly, calibration_model, parameters_outside
from .plan import Job
from .solve import solve_layers

COARSE_STEPS = 15
SPLITS = (0.05, 0.2)
"""Shares of the low-rank part that are tried at the uniform size."""
WINDOWS, JUDGES = 16, 4
"""Windows whose moments the curves are measured on, and further ones on which the model's output is judged: as many to
weigh blocks by, and as many again to check the plan on. With less text each part is a third of it."""


@dataclass(frozen=True)
class Allocation:
    """What was decided.

    layers: name -> fields of the recipe, {} where the uniform plan stays. gain: KL divergence from the dense model of
    the allocated plan over that of the uniform one, both solved coarsely, on windows that nothing else was measured on;
    the uniform plan stays if it is not below 1. None if nothing was checked: because the model does not fit in memory
    whole, and then all blocks weigh alike, too, or because there are fewer than three windows.
    """

    layers: dict[str, dict[str, float]]
    gain: float | None


def allocate_by_error(job: Job, windows: Sample, on_phase: Callable[[str], None] = lambda text: None) -> Allocation:
    """Size and split of each layer by measured errors, or nothing where the uniform plan is as good."""
    recipe = job.recipe
    field = "keep" if recipe.keep is not None else "keep_parameters"
    survey = _Survey(job, windows, field, getattr(recipe, field), on_phase)
    if not survey.plans:  # the recipe names the size of every layer
        return Allocation({}, None)
    survey.run()
    shares = allocate(survey.curves, survey.keep)
    layers = {name: {field: round(share, 4), "rank_ratio": survey.split[name]} for name, share in shares.items()}
    if survey.whole is None or not survey.may_check:
        return Allocation(layers, None)
    gain = survey.compare(shares)
    return Allocation(layers if gain < 1 else {}, gain)


def names_size(recipe: Recipe, layer: Layer) -> bool:
    """Whether the recipe asks for a size, a rank or a pattern of this layer by name: then it stays as asked."""
    return any(
        matches(target, layer.name, layer.kinds) and {*RANK_CHOICES, *SIZE_CHOICES, "pattern"} & dict(fields).keys()
        for target, fields in recipe.overrides
    )


class _Survey:
    """One pass over the dense blocks: error curves of their layers, and what each block's error does to the output."""

    def __init__(self, job: Job, windows: Sample, field: str, keep: float, on_phase: Callable[[str], None]) -> None:
        self.job, self.field, self.keep, self._say = job, field, keep, on_phase
        count = len(windows)
        each = min(JUDGES, count // 3)
        self.may_check = each > 0
        self._measured = windows.take(range(min(WINDOWS, count - 2 * each)))
        self._weighing = windows.take(range(count - 2 * each, count - each)) if self.may_check else self._measured
        self._checking = windows.take(range(count - each, count))
        self.plans = {plan.layer.name: plan for plan in job.plan.layers if not names_size(job.recipe, plan.layer)}
        self.curves: dict[str, Curve] = {}
        self.split: dict[str, float] = {}
        self._coarse: dict[str, Tensor] = {}  # layer -> its weight at the uniform size, coarsely solved
        self._moments: dict[str, Tensor] = {}
        self.whole = self._whole_model()

    def _whole_model(self) -> Assembly | None:
        """The model with all its weights, if it fits beside what else is needed."""
        if 3 * 4 * self.job.parameters > available(self.job.device):
            return None
        assembly = calibration_model(self.job)
        assembly.load([name for name, _ in assembly.model.named_parameters()])
        return assembly

    def _recipe(self, share: float, split: float) -> Recipe:
        size: dict[str, Any] = {self.field: share}
        return replace(self.job.recipe, **size, rank_ratio=split, iterations=COARSE_STEPS, overrides=())

    def run(self) -> None:
        job = self.job
        assembly = self.whole or calibration_model(self.job)
        dense = self._outputs(self._weighing) if self.whole is not None else None
        blocks = job.solved_blocks
        model = assembly.model
        plans = self.plans
        if self.whole is None:
            assembly.load(parameters_outside(model, self.job.route))
        relay = Relay(model, blocks, self._measured.batches(4, job.device), job.route.optional)
        with fast_float32(), relay:
            for number, (name, calls) in enumerate(relay):
                self._say(f"allocating: measuring block {number + 1} of {len(blocks)}")
                block = model.get_submodule(name)
                prefix = f"{name}." if name else ""
                parameters = [f"{prefix}{n}" for n, _ in block.named_parameters()]
                assembly.load(parameters)
                inside = [n.removeprefix(prefix) for n in plans if block_of(n, [name]) == name]
                outputs: list[Any] = []
                calls = [call for call in calls if not call.absent]
                for group in gather_moments(block, inside, calls, on_output=outputs.append):
                    layers = [plans[prefix + n].layer for n in group.layers]
                    self._measure(layers, group.H, assembly)
                for call, output in zip(calls, outputs, strict=True):
                    call.output = output
                if self.whole is None:
                    assembly.drop(parameters)
        if dense is not None:
            self._weigh(dense)

    def _measure(self, layers: Sequence[Layer], H: Tensor, assembly: Assembly) -> None:
        stored = [assembly.read(layer.tensor) for layer in layers]
        given = self.job.recipe.rank_ratio
        splits = SPLITS if given in SPLITS else (given or 0.0,)

        def solved(share: float, split: Sequence[float]) -> list[Decomposition]:
            plans = [plan_layer(layer, self._recipe(share, s)) for layer, s in zip(layers, split, strict=True)]
            return solve_layers(plans, stored, H, self.job.recipe, self.job.device)

        tried = [solved(self.keep, [split] * len(layers)) for split in splits]
        best = [min(range(len(splits)), key=lambda s: _error(tried[s][k])) for k in range(len(layers))]
        split = [splits[s] for s in best]
        low, high = self._least(layers, split), min(1.0, self.keep + REACH)
        ends = solved(low, split), solved(high, split)
        for k, layer in enumerate(layers):
            middle = tried[best[k]][k]
            errors = (_error(ends[0][k]), _error(middle), _error(ends[1][k]))
            size = layer.dense_bytes if self.field == "keep" else layer.shape[0] * layer.shape[1]
            self.curves[layer.name] = Curve(size, (low, self.keep, high), errors, 1.0)
            self.split[layer.name] = split[k]
            if self.whole is not None:
                self._coarse[layer.name] = middle.factors.dense().to(torch.bfloat16)
                self._moments[layer.name] = H

    def _least(self, layers: Sequence[Layer], split: Sequence[float]) -> float:
        """The smallest share, within reach, that leaves something of each of the layers."""
        low = max(0.02, self.keep - REACH)
        for share in (low + (self.keep - low) * k / 4 for k in range(4)):
            try:
                for layer, s in zip(layers, split, strict=True):
                    plan_layer(layer, self._recipe(share, s))
            except UsageError:
                continue
            return share
        return self.keep

    def _outputs(self, windows: Sample) -> list[Tensor]:
        """What the whole model gives on these windows now: log-probabilities, or hidden states without a head."""
        assert self.whole is not None
        found = []
        with torch.no_grad(), fast_float32():
            for batch in windows.batches(1, self.job.device):
                output = self.whole.model(**batch)
                logits = getattr(output, "logits", None)
                if logits is not None and logits.dim() == 3:
                    found.append(torch.log_softmax(logits[0].float(), dim=-1))
                else:
                    found.append(output[0].float()[None])  # never two-dimensional, as log-probabilities are
        return found

    def _distance(self, dense: Sequence[Tensor], windows: Sample) -> float:
        """Mean KL divergence a token to the dense model, or the mean squared distance of hidden states."""
        total = 0.0
        for a, b in zip(dense, self._outputs(windows), strict=True):
            if a.dim() == 2:
                total += float((a.exp() * (a - b)).sum(-1).mean())
            else:
                total += float((a - b).square().mean())
        return total / len(dense)

    def _set(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Put these weights into the whole model; returns those that were there."""
        assert self.whole is not None
        transposed = {plan.layer.name: plan.layer.transposed for plan in self.job.plan.layers}
        before = {}
        for name, W in weights.items():
            parameter = self.whole.model.get_submodule(name).weight
            before[name] = parameter.data.T.clone() if transposed[name] else parameter.data.clone()
            parameter.data.copy_(W.T if transposed[name] else W)
        return before

    def _weigh(self, dense: Sequence[Tensor]) -> None:
        """Give every block's layers the weight: divergence with that block alone compressed, over its errors."""
        inside = ([n for n in self.curves if block_of(n, [block]) == block] for block in self.job.blocks)
        names = list(filter(None, inside))
        for number, members in enumerate(names):
            self._say(f"allocating: weighing block {number + 1} of {len(names)}")
            before = self._set({name: self._coarse[name] for name in members})
            divergence = self._distance(dense, self._weighing)
            self._set(before)
            error = sum(self.curves[name].error[1] for name in members)
            for name in members:
                self.curves[name] = replace(self.curves[name], weight=max(divergence, 1e-9) / max(error, 1e-12))

    def compare(self, shares: dict[str, float]) -> float:
        """Divergence of the allocated plan over that of the uniform one, both solved coarsely."""
        assert self.whole is not None
        self._say("allocating: checking against the uniform plan")
        dense = self._outputs(self._checking)
        kept = self._set(self._coarse)
        uniform = self._distance(dense, self._checking)
        layers = {plan.layer.name: plan.layer for plan in self.job.plan.layers}
        for name, share in shares.items():
            plan = plan_layer(layers[name], self._recipe(share, self.split[name]))
            stored = self.whole.read(layers[name].tensor)
            (one,) = solve_layers([plan], [stored], self._moments[name], self.job.recipe, self.job.device)
            self._set({name: one.factors.dense()})
        allocated = self._distance(dense, self._checking)
        self._set(kept)
        return allocated / max(uniform, 1e-12)


def _error(solved: Decomposition) -> float:
    return solved.output_errors[-1] ** 2 if solved.output_errors else solved.residual_squared / solved.weight_squared
