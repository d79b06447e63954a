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
from ..parallel.shares import share, spread
from ..progress import Progress
from ..shim.layouts import LayerSpec
from ..text.sample import hold_out
from ..text.windows import Sample
from .assembly import activations_of, calibration_model, parameters_outside, run_calls
from .block import Batches, Block
from .plan import Job
from .schedule import Schedule
from .steps import Steps
from .team import Team


class CalibratedRun:
    """The blocks of one job, solved and written in turn; those that are there already are only run.

    windows: the text, which ranks share out. made: what is written. writer: of the first rank. team: the ranks.
    fixed_bytes: of memory that is needed beside activations. steps: of codes.
    """

    def __init__(
        self,
        job: Job,
        windows: Sample,
        made: Schedule,
        writer: ShardWriter | None,
        team: Team,
        told: Progress,
        fixed_bytes: int,
        steps: Steps,
    ) -> None:
        self.steps, self.group = steps, team.group
        self.job, self.made, self.writer, self.told = job, made, writer, told
        assert job.calibration is not None
        size, device = job.calibration.batch, job.device
        self._batches: list[dict[str, Tensor]] = []
        self._first: list[int] = []  # number of the first batch here among all that are seen, and that are held out
        self._places: list[tuple[int, int]] = []  # of batches that are seen, the steps of matching that they are for
        for part in hold_out(windows):
            if job.refinement is None:
                every, places = part.batches(size, device), []
            else:  # one by one, and in an order in which every rank has a share of each step
                together = part.together(size)
                places = spread([len(one) for one in together])
                every = part.take([together[step][place] for step, place in places]).batches(1, device)
            mine = share(len(every), self.group.rank, self.group.size)
            self._places += places[mine.start : mine.stop]
            self._first.append(mine.start)
            self._batches += every[mine.start : mine.stop]
            self._held_out = len(mine)
        self._done = int(team.said(0 if writer is None else writer.done))
        self.assembly = calibration_model(job)
        self.model = self.assembly.model
        self._copied = job.start or job.source
        self._activations = activations_of(job, team.folder, fixed_bytes)

    def run(self) -> None:
        job = self.job
        self.assembly.load(parameters_outside(self.model, job.route))
        self._outside(range(min(numbers.start for numbers in job.blocks.values())))
        batches = self._batches
        # Where blocks are matched, the dense model's own stream runs along: it is what they are matched to.
        streams = 2 if job.refinement is not None else 1
        blocks = job.solved_blocks
        remedy = "Lower --calibration-tokens or --calibration-length, or set --memory-limit; what is finished is kept."
        relay = Relay(self.model, blocks, batches * streams, job.route.optional)
        with memory_errors(remedy), fast_float32(), relay:
            for name, calls in relay:
                block = self._block_named(name)
                if block.plans:
                    self._block(block, calls[: len(batches)], calls[len(batches) :], last=name == blocks[-1])
                else:
                    self._pass(block, calls)
        for name in list(job.blocks)[len(blocks) :]:
            self._outside(job.blocks[name])

    def _block_named(self, name: str, numbers: range | None = None) -> Block:
        return Block(name, self.job, self.made, self.assembly, self.told.phase, self.steps, self.group, numbers)

    def _outside(self, numbers: range) -> None:
        """What text does not reach, or is not compressed: layers are solved without data, one at a time."""
        for number in numbers:
            if self.made.units[number][1] is None:
                if number >= self._done:
                    self._copy(number)
                continue
            begun = time.monotonic()
            layer = self._block_named("", range(number, number + 1))
            if number < self._done:
                self._restore(layer)
                continue
            if self.job.start is not None:
                layer.start_from(self.job.start, Batches(), Batches(), self.told.layer)
            else:
                layer.solve(Batches(), Batches(), self.told.layer)
            self._write(layer, {}, time.monotonic() - begun)

    def _restore(self, block: Block) -> None:
        """What an earlier run has written, which the first rank alone can read."""
        written = [n for n in block.numbers if self.made.units[n][1] or self.made.units[n][0].name in block.norms]
        stats = [] if self.writer is None else [self.writer.stats(n) for n in written]
        stats = self.group.agree(stats)[0]
        tensors: dict[int, dict[str, Tensor]] = {}
        for number in written:
            own = {} if self.writer is None else self.writer.read(number)
            tensors[number] = self.group.broadcast(0, own)
        specs = {n: LayerSpec.from_dict(line["spec"]) for n, line in zip(written, stats, strict=True) if "spec" in line}
        for line in stats:
            if line.get("log_step") is not None:
                self.steps.spend(LayerReport.from_dict(line, LayerSpec.from_dict(line["spec"])))
        block.restore(tensors, specs)

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
        if self._done < block.numbers.stop:
            solved_with = len(calls) - self._held_out
            seen, unseen = Batches(calls[:solved_with], self._first[0]), Batches(calls[solved_with:], self._first[1])
            if self.job.start is not None:
                block.start_from(self.job.start, seen, unseen, self.told.layer)
            else:
                block.solve(seen, unseen, self.told.layer)
            summary = {}
            if self.job.refinement is not None:
                there = [k for k, call in enumerate(calls) if not call.absent]
                summary = block.match(
                    [calls[k] for k in there],
                    [hidden_states(dense[k].output) for k in there],
                    [self._places[k] for k in there if k < solved_with],
                )
            self._write(block, summary, time.monotonic() - begun)
        else:
            self._restore(block)
        if not last:
            run_calls(block.module, calls, self._activations)
        self.assembly.drop(parameters)

    def _write(self, block: Block, summary: dict[str, Any], seconds: float) -> None:
        if self.writer is None:
            return
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
            each = seconds / len(block.plans) if plan is not None else 0.0
            self.writer.append([tensor_part(name, tensor) for name, tensor in tensors.items()], stats, each)
            self.told.advance("bytes", entry.nbytes)

    def _copy(self, number: int) -> None:
        if self.writer is None:
            return
        name = self.made.units[number][0].name
        entry = self._copied.entries[name]
        self.writer.append([(name, entry.dtype, entry.shape, self.job.copied(self._copied, name))])
        self.told.advance("bytes", entry.nbytes)
