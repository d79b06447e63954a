"""Compression with calibration text: one block of the model at a time, each fed what the ones before it now give."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..budget.plan import LayerPlan
from ..calibration.activations import Activations
from ..calibration.moments import gather_moments
from ..checkpoint.layers import unpack_layer
from ..checkpoint.reader import FLOATING, TORCH_DTYPES
from ..checkpoint.report import LayerReport
from ..checkpoint.writer import ShardWriter, tensor_part
from ..linalg.error import relative_error, squared_norm
from ..linalg.factors import Decomposition, LowRankSparse
from ..linalg.precision import fast_float32
from ..linalg.svd import seed_of
from ..models.blocks import Call, Relay, block_of, hidden_states, run_block, with_hidden_states
from ..models.device import available
from ..models.skeleton import empty_model
from ..shim.layouts import LayerSpec
from ..training.reconstruction import match_block
from .assembly import Assembly
from .estimate import estimate
from .prepare import Job
from .solve import as_matrix, encode_layer, solve_layer, solve_layers


class Progress(Protocol):
    """What a caller may watch. Bytes are of the dense model."""

    def phase(self, text: str) -> None: ...
    def layer(self, report: LayerReport) -> None: ...
    def advance(self, nbytes: int) -> None: ...


class CalibratedRun:
    """The blocks of one job, solved and written in turn; those that `writer` holds already are only run."""

    def __init__(self, job: Job, writer: ShardWriter, progress: Progress | None) -> None:
        assert job.calibration is not None
        assert job.windows is not None
        self.job, self.writer, self.progress = job, writer, progress
        model = empty_model(job.source.folder, job.source.config, trust_remote_code=job.trust_remote_code)
        self.assembly = Assembly(model, job.source, job.device)
        self.model = self.assembly.model
        self._files = {file.path: file for file in job.source.files}
        need = estimate(job)
        limit = job.memory_limit if job.memory_limit is not None else available(job.device) * 3 // 4
        self._activations = Activations(writer.folder, max(0, limit - need.fixed_bytes))
        for module in self.model.modules():
            if hasattr(module, "config"):
                module.config.use_cache = False  # a cache would let every batch attend to the ones before it

    def run(self) -> None:
        job = self.job
        assert job.calibration is not None
        assert job.windows is not None
        outside = [n for n, _ in self.model.named_parameters() if block_of(n, job.blocks) is None]
        first = min(units.start for units in job.blocks.values())
        for number in range(self.writer.done, first):
            self._copy(number)
        self.assembly.load(self._needed(outside))
        batches = [
            {name: ids.to(job.device) for name, ids in batch.items()}
            for batch in job.windows.batches(job.calibration.batch)
        ]
        with fast_float32(), Relay(self.model, list(job.blocks), batches) as relay:
            for name, calls in relay:
                self._block(name, calls)

    def _needed(self, outside: Sequence[str]) -> list[str]:
        """Parameters outside the blocks that run before the last block: all but the output head's own."""
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        own = {id(p) for p in head.parameters()} if head is not None else set()
        inputs = self.model.get_input_embeddings()
        own -= {id(p) for p in inputs.parameters()}
        return [n for n in outside if id(self.model.get_parameter(n)) not in own]

    def _block(self, name: str, calls: list[Call]) -> None:
        units = self.job.blocks[name]
        block = self.model.get_submodule(name)
        parameters = [f"{name}.{n}" if name else n for n, _ in block.named_parameters()]
        self.assembly.load(parameters)
        if self.writer.done < units.stop:
            self._solve(name, block, calls)
        else:
            self._restore(name, block)
        last = name == list(self.job.blocks)[-1]
        with torch.no_grad():
            for call in calls if not last else ():
                output = run_block(block, call)
                call.output = with_hidden_states(output, self._activations.keep(hidden_states(output)))
                self._activations.release()
        self.assembly.drop(parameters)

    def _plans(self, name: str) -> dict[str, LayerPlan]:
        """Layer's name inside the block -> its plan."""
        prefix = f"{name}." if name else ""
        plans = (plan for _, plan in self.job.units[slice(*_bounds(self.job.blocks[name]))] if plan is not None)
        return {plan.layer.name.removeprefix(prefix): plan for plan in plans}

    def _solve(self, name: str, block: nn.Module, calls: list[Call]) -> None:
        job, recipe = self.job, self.job.recipe
        plans = self._plans(name)
        self._say(f"{name or 'model'}: calibrating")
        begun = time.monotonic()
        targets: list[Tensor] = []

        def keep_target(output: Any) -> None:
            if job.refinement is not None:
                targets.append(self._activations.keep(hidden_states(output)))
            self._activations.release()

        moments = gather_moments(block, list(plans), calls, on_output=keep_target)
        solved: dict[str, Decomposition] = {}
        encoded: dict[str, tuple[Any, Any, Any]] = {}

        def keep(inside: str, one: Decomposition) -> None:
            solved[inside] = one
            encoded[inside] = encode_layer(plans[inside], one, stored[inside].dtype)
            if self.progress is not None:
                self.progress.layer(encoded[inside][0])

        stored = {inside: self.assembly.read(plan.layer.tensor) for inside, plan in plans.items()}
        while moments:
            group = moments.pop()
            self._say(f"{name or 'model'}: solving {', '.join(n.rpartition('.')[2] for n in group.layers)}")
            members = [plans[inside] for inside in group.layers]
            found = solve_layers(members, [stored[n] for n in group.layers], group.H, recipe, job.device)
            for inside, one in zip(group.layers, found, strict=True):
                keep(inside, one)
        for inside, plan in plans.items():
            if inside not in solved:  # the text never reached it
                keep(inside, solve_layer(plan, stored[inside], recipe, job.device))
        for inside, one in solved.items():
            _set_weight(block.get_submodule(inside), one.factors.dense(), plans[inside])
        norms = self._norms(name, block) if job.refinement is not None else {}
        summary: dict[str, Any] = {}
        if job.refinement is not None:
            summary = self._match(name, block, calls, targets, solved, encoded, plans, stored, norms)
        seconds = time.monotonic() - begun
        by_plan = {plan.layer.tensor: inside for inside, plan in plans.items()}
        for number in job.blocks[name]:
            entry, layer_plan = job.units[number]
            if layer_plan is None:
                if entry.name in norms:
                    value = self.model.get_parameter(norms[entry.name]).to(TORCH_DTYPES[entry.dtype])
                    self.writer.append([tensor_part(entry.name, value.cpu().contiguous())])
                    self._advance(entry.nbytes)
                else:
                    self._copy(number)
                continue
            report, spec, tensors = encoded[by_plan[entry.name]]
            parts = [tensor_part(f"{layer_plan.layer.disk_module}.{suffix}", t) for suffix, t in tensors.items()]
            stats = {"spec": spec.to_dict(), **report.to_dict()}
            if summary:
                stats, summary = stats | {"block": summary}, {}  # once a block, with its first layer
            self.writer.append(parts, stats, seconds / len(plans))
            self._advance(entry.nbytes)

    def _norms(self, name: str, block: nn.Module) -> dict[str, str]:
        """Tensor on disk -> the one-dimensional parameter of the block that it is, by its name in the model."""
        found = {}
        for number in self.job.blocks[name]:
            entry, _ = self.job.units[number]
            parameter = self.assembly.parameter(entry.name)
            if parameter is not None and len(entry.shape) == 1 and entry.dtype in FLOATING:
                found[entry.name] = parameter
        return found

    def _match(
        self,
        name: str,
        block: nn.Module,
        calls: list[Call],
        targets: list[Tensor],
        solved: dict[str, Decomposition],
        encoded: dict[str, tuple[Any, Any, Any]],
        plans: dict[str, LayerPlan],
        stored: dict[str, Tensor],
        norms: dict[str, str],
    ) -> dict[str, Any]:
        refinement = self.job.refinement
        assert refinement is not None
        prefix = f"{name}." if name else ""
        matched = match_block(
            block,
            calls,
            targets,
            {inside: one.factors for inside, one in solved.items()},
            {
                parameter.removeprefix(prefix): TORCH_DTYPES[self.job.source.entries[tensor].dtype]
                for tensor, parameter in norms.items()
            },
            refinement,
            transposed={inside: plan.layer.transposed for inside, plan in plans.items()},
            seed=seed_of(self.job.recipe.seed, name),
            on_step=lambda step, loss: self._say(f"{name}: matching {step}/{refinement.steps}, loss {loss:.4f}"),
        )
        self._say(f"{name}: matched, {matched.loss_before:.4f} -> {matched.loss_after:.4f}")
        for inside, factors in matched.factors.items():
            W = as_matrix(stored[inside], plans[inside].layer, self.job.device)
            E = W - factors.dense()
            residual = squared_norm(E)
            one = replace(
                solved[inside],
                factors=factors,
                residual_squared=residual,
                errors=(*solved[inside].errors, relative_error(residual, solved[inside].weight_squared)),
            )
            encoded[inside] = encode_layer(plans[inside], one, stored[inside].dtype)
            _set_weight(block.get_submodule(inside), factors.dense(), plans[inside])
        return {"block": name, "loss_before": matched.loss_before, "loss_after": matched.loss_after}

    def _restore(self, name: str, block: nn.Module) -> None:
        """Give the block the weights that were written for it in an earlier run."""
        plans = self._plans(name)
        by_tensor = {plan.layer.tensor: inside for inside, plan in plans.items()}
        for number in self.job.blocks[name]:
            entry, plan = self.job.units[number]
            if plan is None:
                parameter = self.assembly.parameter(entry.name)
                if parameter is not None and self.job.refinement is not None:
                    value = self.writer.read(number)[entry.name]
                    self.model.get_parameter(parameter).data.copy_(value)
                continue
            spec = LayerSpec.from_dict(self.writer.stats(number)["spec"])
            tensors = {name.rpartition(".")[2]: t.to(self.job.device) for name, t in self.writer.read(number).items()}
            factors = LowRankSparse(*unpack_layer(spec, tensors))
            _set_weight(block.get_submodule(by_tensor[entry.name]), factors.dense(), plan)

    def _copy(self, number: int) -> None:
        entry, _ = self.job.units[number]
        self.writer.append([(entry.name, entry.dtype, entry.shape, self._files[entry.path].chunks(entry))])
        self._advance(entry.nbytes)

    def _say(self, text: str) -> None:
        if self.progress is not None:
            self.progress.phase(text)

    def _advance(self, nbytes: int) -> None:
        if self.progress is not None:
            self.progress.advance(nbytes)


def _bounds(numbers: range) -> tuple[int, int]:
    return numbers.start, numbers.stop


def _set_weight(linear: Any, W: Tensor, plan: LayerPlan) -> None:
    with torch.no_grad():
        linear.weight.copy_(W.T if plan.layer.transposed else W)
