"""Compression with calibration text: one block of the model at a time, each fed what the ones before it now give."""

from __future__ import annotations

import time
from typing import Any

from torch import Tensor

from ..checkpoint.report import LayerReport
from ..checkpoint.writer import ShardWriter, tensor_part
from ..linalg.precision import fast_float32
from ..models.blocks import Call, Relay, hidden_states
from ..models.device import memory_errors
from ..progress import Progress
from ..shim.layouts import LayerSpec
from ..text.sample import hold_out
from ..text.windows import Windows
from .assembly import activations_of, calibration_model, parameters_outside, run_calls
from .block import Block
from .plan import Job
from .schedule import Schedule
from .steps import Steps


class CalibratedRun:
    """The blocks of one job, solved and written in turn; those that `writer` holds already are only run.

    windows: the text. made: what is written. fixed_bytes: of memory that is needed beside activations. steps: of codes.
    """

    def __init__(
        self,
        job: Job,
        windows: Windows,
        made: Schedule,
        writer: ShardWriter,
        told: Progress,
        fixed_bytes: int,
        steps: Steps,
    ) -> None:
        self.steps = steps
        self.job, self.made, self.writer, self.told = job, made, writer, told
        assert job.calibration is not None
        seen, unseen = (part.batches(job.calibration.batch, job.device) for part in hold_out(windows))
        self._batches, self._held_out = [*seen, *unseen], len(unseen)
        self.assembly = calibration_model(job)
        self.model = self.assembly.model
        self._copied = job.start or job.source
        self._activations = activations_of(job, writer.folder, fixed_bytes)

    def run(self) -> None:
        job = self.job
        self.assembly.load(parameters_outside(self.model, job.route))
        self._outside(range(min(numbers.start for numbers in job.blocks.values())))
        batches = self._batches
        # Where blocks are matched, the dense model's own stream runs along: it is what they are matched to.
        streams = 2 if job.refinement is not None else 1
        blocks = job.solved_blocks
        remedy = "Lower --calibration-tokens or --calibration-length, or set --memory-limit; what is finished is kept."
        with memory_errors(remedy), fast_float32(), Relay(self.model, blocks, batches * streams) as relay:
            for name, calls in relay:
                block = Block(name, job, self.made, self.assembly, self.told.phase, self.steps)
                if block.plans:
                    self._block(block, calls[: len(batches)], calls[len(batches) :], last=name == blocks[-1])
                else:
                    self._pass(block, calls)
        for name in list(job.blocks)[len(blocks) :]:
            self._outside(job.blocks[name])

    def _outside(self, numbers: range) -> None:
        """What text does not reach, or is not compressed: layers are solved without data, one at a time."""
        for number in numbers:
            if self.made.units[number][1] is None:
                if number >= self.writer.done:
                    self._copy(number)
                continue
            begun = time.monotonic()
            layer = Block(
                "", self.job, self.made, self.assembly, self.told.phase, self.steps, range(number, number + 1)
            )
            if number < self.writer.done:
                self._restore(layer)
                continue
            if self.job.start is not None:
                layer.start_from(self.job.start, (), self.told.layer)
            else:
                layer.solve((), (), self.told.layer)
            self._write(layer, {}, time.monotonic() - begun)

    def _restore(self, block: Block) -> None:
        specs = {n: self.writer.stats(n).get("spec") for n in block.numbers}
        for stats in map(self.writer.stats, block.numbers):
            if stats.get("log_step") is not None:
                self.steps.spend(LayerReport.from_dict(stats, LayerSpec.from_dict(stats["spec"])))
        tensors = {n: self.writer.read(n) for n in block.numbers}
        block.restore(tensors, {n: LayerSpec.from_dict(spec) for n, spec in specs.items() if spec is not None})

    def _pass(self, block: Block, calls: list[Call]) -> None:
        """A block of which nothing is compressed."""
        parameters = block.parameters()
        self.assembly.load(parameters)
        run_calls(block.module, calls, self._activations)
        self.assembly.drop(parameters)
        self._outside(block.numbers)

    def _block(self, block: Block, calls: list[Call], dense: list[Call], *, last: bool) -> None:
        """calls: with what the compressed blocks before gave. dense: with what the dense ones gave, or none."""
        begun = time.monotonic()
        parameters = block.parameters()
        self.assembly.load(parameters)
        run_calls(block.module, dense, self._activations)
        if self.writer.done < block.numbers.stop:
            solved_with = len(calls) - self._held_out
            if self.job.start is not None:
                block.start_from(self.job.start, calls[solved_with:], self.told.layer)
            else:
                block.solve(calls[:solved_with], calls[solved_with:], self.told.layer)
            summary = {}
            if self.job.refinement is not None:
                summary = block.match(calls, [hidden_states(call.output) for call in dense], self._held_out)
            self._write(block, summary, time.monotonic() - begun)
        else:
            self._restore(block)
        if not last:
            run_calls(block.module, calls, self._activations)
        self.assembly.drop(parameters)

    def _write(self, block: Block, summary: dict[str, Any], seconds: float) -> None:
        inside = {plan.layer.tensor: layer for layer, plan in block.plans.items()}
        for number in block.numbers:
            entry, plan = self.made.units[number]
            if plan is None and (entry.name not in block.norms or self.job.refinement is None):
                self._copy(number)
                continue
            stats: dict[str, Any] | None = None
            if plan is None:
                tensors: dict[str, Tensor] = {entry.name: block.norm(entry.name)}
            else:
                report, parts = block.encode(inside[entry.name])
                tensors = {f"{plan.layer.disk_module}.{suffix}": tensor for suffix, tensor in parts.items()}
                stats = {"spec": report.spec.to_dict(), **report.measured()}
                if summary:
                    stats["block"], summary = summary, {}  # once a block, with its first layer
            share = seconds / len(block.plans) if plan is not None else 0.0
            self.writer.append([tensor_part(name, tensor) for name, tensor in tensors.items()], stats, share)
            self.told.advance("bytes", entry.nbytes)

    def _copy(self, number: int) -> None:
        name = self.made.units[number][0].name
        entry = self._copied.entries[name]
        self.writer.append([(name, entry.dtype, entry.shape, self.job.copied(self._copied, name))])
        self.told.advance("bytes", entry.nbytes)
