"""What a run will take: disk, peak memory, and time from a measured speed of products."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..budget.quality import doubt_of_bits, doubt_of_share
from ..calibration.sensitivity import LOGITS
from ..checkpoint.config import layer_specs
from ..checkpoint.output import check_space, free_bytes
from ..checkpoint.workfolder import WorkFolder
from ..linalg.precision import fast_float32
from ..models.route import Flow
from ..text.documents import SELF
from ..text.sample import HELD_OUT, account, doubts, hold_out
from ..text.windows import Sample
from .fingerprint import fingerprint
from .footprint import footprint
from .foreseen import SENSITIVITY_TOKENS, check_known
from .pace import seconds_alone
from .plan import RESIDENT_BASE, Job
from .request import passing
from .rounds import copies_held, moment_bytes, rounds
from .schedule import Schedule
from .solve import effort

# Measured on SmolLM2-135M, two cores: time of the whole over that of its products alone at full speed.
FORWARD_OVERHEAD, TRAINING_OVERHEAD = 1.6, 1.6
GENERATION_OVERHEAD = 8  # a token at a time is bound by memory: measured against the same products for a whole window
GENERATION_BYTES = 1 << 30  # keys and values of the windows that are written side by side
SOLVER_COPIES = 9  # float32 matrices of the weight's shape that the solver holds at once
BACKWARD_COPIES = 60  # of what flows into a block, that one batch takes inside it with gradients
LOSS_COPIES = 6  # of the logits that are computed at a time
STATE_BYTES = 16  # of each number that is trained: itself, the best so far and Adam's two moments
BLOCK_WIDTHS = 30  # of what flows through a block, that it leaves behind for the way back
TRAINED_COPIES = 9  # of what is trained: as it was, as it is and its best state, gradients, Adam's two moments
BURSTS, BURST_SECONDS = 7, 0.01
UNSTEADY = 1.25  # of the second fastest burst's speed and the second slowest's; alone on a machine it is below 1.1
MATCHING_COPIES = 5  # of the block: U V + S, S, its mask, Adam's two moments; and gradients that wait to be summed


@dataclass(frozen=True)
class Estimate:
    """fixed_bytes: all but activations. activation_bytes: what flows between blocks. seconds: on this device.
    training_bytes: while the whole model is trained, when nothing of the above is held; 0 where it is not. recomputes:
    whether its blocks run again on the way back; otherwise_bytes: if they did not, or did.
    timed_seconds: of those, what was asked for in minutes, and takes as long however many processes share it.

    least_seconds, most_seconds: at the fastest and the slowest that the device was while it was measured. busy: whether
    other work runs on it, so that `seconds` may be far off.
    """

    fixed_bytes: int
    activation_bytes: int
    seconds: float
    least_seconds: float
    most_seconds: float
    busy: bool
    training_bytes: int = 0
    timed_seconds: float = 0.0
    recomputes: bool = False
    otherwise_bytes: int = 0

    def training(self) -> dict[str, Any]:
        """What training the whole model takes, as JSON; {} where nothing is trained so."""
        if not self.training_bytes:
            return {}
        both = {self.recomputes: self.training_bytes, not self.recomputes: self.otherwise_bytes}
        return {
            "training": {
                "gradient_checkpointing": self.recomputes,
                "peak_memory_bytes": both[False],
                "checkpointed_memory_bytes": both[True],
            }
        }

    @property
    def peak_bytes(self) -> int:
        return max(self.fixed_bytes + self.activation_bytes, self.training_bytes)


@dataclass(frozen=True)
class Forecast:
    """What a job will do and need. made: what is written. space: bytes of disk that it takes until its result is there
    alone. free_bytes: on that disk.

    finished: its result is there already, so that there is nothing to do.
    """

    job: Job
    made: Schedule
    space: int
    free_bytes: int
    need: Estimate
    finished: bool

    @property
    def disk_bytes(self) -> int:
        """Most that the result takes."""
        return footprint(self.job.source, self.made, self.job.recipe)

    @property
    def peak_bytes(self) -> int:
        """Of memory."""
        return self.need.peak_bytes

    @property
    def warnings(self) -> tuple[str, ...]:
        """What bodes ill, a sentence each."""
        job, plan, calibrated = self.job, self.made.plan, self.job.calibration is not None
        found = list(plan.notes)
        if job.recipe.size is not None and not job.source.files:
            told = "those on the Hub are not here yet: the run has as many bytes less for its layers as they take."
            found.append(f"--size {job.recipe.size} holds the files beside the weights, too, and {told}")
        if job.calibration is not None:
            found += (*doubts(job.calibration, job.windows), *job.route.notes)
        if job.recipe.coded:
            cost = doubt_of_bits(plan.bits, calibrated=calibrated, grid=job.recipe.grid)
        else:
            cost = doubt_of_share(plan.kept_parameters, calibrated=calibrated)
        return (*found, cost) if cost else tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; sizes in bytes."""
        job, plan = self.job, self.made.plan
        return {
            "output": str(job.output),
            "recipe": job.recipe.to_dict(),
            "targeted_bytes": plan.dense_bytes,
            "expected_bytes": plan.expected_bytes,
            "bound_bytes": plan.bound_bytes,
            "model_bytes": job.source.nbytes,
            "disk_bytes": self.disk_bytes,
            "working_bytes": self.space,
            "free_bytes": self.free_bytes,
            "peak_memory_bytes": self.peak_bytes,
            "seconds": self.need.seconds,
            "least_seconds": self.need.least_seconds,
            "most_seconds": self.need.most_seconds,
            "busy": self.need.busy,
            **self.need.training(),
            "warnings": list(self.warnings),
            "calibration": account(job.calibration, job.windows) if job.calibration else None,
            "blocks": list(job.blocks),
            "shards": [shard.file for shard in self.made.shards],
            "layers": [
                {"name": p.layer.name, "shape": p.layer.shape, "rank": p.rank, "nnz": p.nnz, "pattern": p.pattern,
                 "bits": p.bits, "expected_bytes": p.expected_bytes, "bound_bytes": p.bound_bytes}
                for p in plan.layers
            ],
            "skipped": plan.skipped,
        }  # fmt: skip


def forecast(job: Job, *, resume: str = "auto", overwrite: bool = False) -> Forecast:
    """What `job` will do and need; raises what would keep it from being carried out, as far as can be known before.

    UsageError, OutputError and ResumeError as WorkFolder and `check_space`.
    """
    work = WorkFolder(job.output, fingerprint(job), resume=resume, overwrite=overwrite, reads=job.reads)
    work.check()
    if not work.finished:  # else nothing is read
        check_known(job)
    made = job.scheduled()
    space, free = space_needed(job), free_bytes(job.output)
    if not work.finished and not work.path.is_dir():  # else a part of it is written
        check_space(work.path, space)
    need = estimate(job, job.windows) if job.calibration is not None else _estimate_alone(job)
    return Forecast(job, made, space, free, need, work.finished)


def space_needed(job: Job) -> int:
    """Bytes of disk that a run takes until its result is there alone.

    Where it trains the whole model, these are the compressed model that it starts from, what the teacher says, and two
    states, of which the older goes when the newer is whole.
    """
    if job.start is not None:
        result = job.start.nbytes
    else:
        made = job.scheduled()
        result = made.plan.expected_bytes + made.copied_bytes
    if job.towards is None:
        return result
    assert job.calibration is not None, "a request that is to train has text"
    tokens = job.windows.tokens if job.windows is not None else job.calibration.tokens
    teacher = 4 * job.hidden_size * (tokens + (job.source.vocabulary or 0))
    states = 2 * STATE_BYTES * _trained(job, job.towards.train)
    return result + teacher + states + (result if job.start is None else 0)


def _trained(job: Job, parts: Collection[str]) -> int:
    """Numbers of the layers that training moves; norms are few beside them."""
    if job.start is not None:
        layers = [spec for spec in layer_specs(job.start).values() if spec.kind != "embedding"]
        sizes = [(one.shape, one.rank, one.nnz, one.layout == "codes") for one in layers]
    else:
        sizes = [(p.layer.shape, p.rank, p.nnz, p.bits > 0) for p in job.plan.layers if not p.layer.rows]
    found = 0
    for shape, rank, nnz, coded in sizes:
        found += (rank * sum(shape) if "lowrank" in parts else 0) + (shape[0] if coded else nnz) * ("scales" in parts)
    return found


def _estimate_alone(job: Job) -> Estimate:
    """Of a job without text, in which nothing flows between blocks."""
    least, about, most = seconds_alone(job)
    return Estimate(job.peak_memory, 0, about, least, most, _is_busy(job.device))


def _is_busy(device: torch.device) -> bool:
    """Whether other work runs; a command that came before this one may still count as one process a core."""
    return device.type == "cpu" and os.getloadavg()[0] > UNSTEADY * (os.cpu_count() or 1)


def estimate(job: Job, windows: Sample | None) -> Estimate:
    """Peak resident bytes and seconds of a calibrated job; windows: its text, None if it is not there yet."""
    assert job.calibration is not None
    assert job.calibration.length is not None
    hidden = job.hidden_size
    tokens = windows.tokens if windows is not None else job.calibration.tokens
    units = job.scheduled().units
    length = job.calibration.length if windows is None else windows.length
    batch = job.calibration.batch * length
    inside = set(job.unreached).union(*(set(numbers) for numbers in job.blocks.values()))
    outside = sum(e.elements for k, e in enumerate(job.entries) if k not in inside)
    sizes = {name: sum(job.entries[k].elements for k in numbers) for name, numbers in job.blocks.items()}
    widest = max(sizes.values())
    flows = {name: job.route.flows.get(name, Flow(size, hidden)) for name, size in sizes.items()}
    used = outside + sum(flow.products for flow in flows.values())  # weights that a token is multiplied with
    wide = max(flow.width for flow in flows.values())  # numbers that flow for a token, where they are most
    solves = job.start is None  # else layers are those of a compressed checkpoint
    known = job.sensitivity_file is not None and job.sensitivity_file.exists()
    felt = min(tokens, SENSITIVITY_TOKENS) if solves and job.recipe.sensitivity == "on" and not known else 0
    held_out = windows is None or len(hold_out(windows)[1]) > 0
    together = 1 if job.refinement is not None else job.calibration.batch  # windows in a pass through a block
    batches = -(-(len(windows) if windows is not None else job.calibration.windows) // together)
    unseen = -(-batches // HELD_OUT) if held_out else 0
    copies = copies_held(batches, unseen)
    # What codes that are there already would have been rounded from is found by what their layers are fed.
    relocates = not solves and job.refinement is not None and bool(job.recipe.coded)
    seen_copies = copies_held(batches, 0)
    moments = solver = 0
    work = 0.0  # flops, weighted with their overhead
    solved, room = job.solved_blocks, job.memory // 2
    for name, numbers in job.blocks.items():
        plans = [plan for k in numbers if (plan := units[k][1]) is not None]
        products = flows[name].products
        often = products / max(1, sizes[name])  # vectors that a layer sees for each token, on average
        # Of what it is solved with, and of what is held out.
        here = {plan.layer.name: plan for plan in plans}
        made = rounds(here, room, copies) if solves else [list(here)]
        held_moments = (sum(moment_bytes(here[layer]) for layer in layers) for layers in made)
        needed = int((copies if solves else held_out * copies_held(unseen, 0)) * max(held_moments, default=0))
        if relocates and here:  # of what is held out at once, and of the rest in rounds
            made = rounds(here, room, seen_copies)
            needed += int(seen_copies * max(sum(moment_bytes(here[layer]) for layer in layers) for layers in made))
            squares = sum(plan.layer.shape[1] ** 2 for plan in plans)
            work += FORWARD_OVERHEAD * 2 * tokens * squares * often
        if solves or job.refinement is not None:
            moments = max(moments, needed)
        for plan in plans if solves else ():
            m, n = plan.layer.shape
            # Two matrices are often solved side by side: gate and up, or k and v.
            solver = max(solver, 4 * (2 * SOLVER_COPIES * m * n + 4 * n * n))
            work += effort(plan, job.recipe)
            work += FORWARD_OVERHEAD * 2 * n * n * tokens * often
        passes = int(job.towards is not None)  # what the dense model says is asked of all blocks
        if solves or job.refinement is not None:
            passes += len(made) * bool(plans) + (name in solved)
        work += FORWARD_OVERHEAD * 2 * passes * products * tokens
        # Forwards, and backwards, for which it runs forwards again.
        work += FORWARD_OVERHEAD * 2 * 4 * products * felt
        if job.refinement is not None and plans:
            work += TRAINING_OVERHEAD * 6 * products * batch * job.refinement.steps
    matching = MATCHING_COPIES + job.calibration.batch.bit_length()
    training = matching * 4 * widest if job.refinement is not None else 0
    left = 4 * together * length * 16 * wide  # what one pass leaves behind inside a block
    given = windows.nbytes if windows is not None else 0
    fixed = RESIDENT_BASE + given + 4 * (outside + widest) + moments + max(solver, training + left)
    if solves:  # rows of embeddings are coded while the weights that lie outside blocks are there
        fixed = max(fixed, RESIDENT_BASE + given + 4 * outside + job.plan.row_workspace_bytes)
    if felt:
        backward = BACKWARD_COPIES * 4 * batch * wide + _loss_bytes(job, batch)
        fixed = max(fixed, RESIDENT_BASE + 4 * (outside + widest) + backward)
        work += FORWARD_OVERHEAD * 2 * 3 * outside * felt
    if windows is None and job.calibration.source == SELF:  # before the rest all of the model, with keys and values
        fixed = max(fixed, RESIDENT_BASE + job.source.nbytes + GENERATION_BYTES)
        work += FORWARD_OVERHEAD * GENERATION_OVERHEAD * 2 * used * tokens
    held = 3 if job.refinement is not None else 2
    biases = 4 * job.bias_heads * job.calibration.length**2 * batches * (held - 1)
    carried = 4 * tokens * wide * held + biases
    if felt:  # what every block returned waits for the way back
        carried = max(carried, 4 * felt * (sum(flow.width for flow in flows.values()) + held * wide))
    speeds = _speeds(job.device)
    slow, middle, fast = speeds[1], statistics.median(speeds), speeds[-2]
    busy = _is_busy(job.device) or fast > UNSTEADY * slow
    whole, recomputed = (_training_bytes(job, tokens, again) for again in (False, True))
    again = job.towards is not None and (job.towards.gradient_checkpointing or whole > job.memory)
    about, least, most = (work / speed + _training_seconds(job, used, speed, again) for speed in (middle, fast, slow))
    bound = None if job.towards is None else job.towards.seconds
    timed = bound if bound is not None and _training_seconds(job, used, middle, again) == bound else 0.0
    trained, otherwise = (recomputed, whole) if again else (whole, recomputed)
    return Estimate(round(fixed), round(carried), about, least, most, busy, trained, timed, again, otherwise)


def _training_seconds(job: Job, used: float, speed: float, again: bool) -> float:
    """Of training the whole model: until its time or its steps are up. used: weights that a token is multiplied with.
    again: whether blocks run twice."""
    how = job.towards
    if how is None:
        return 0.0
    # Codes stand still, so that backwards takes no more products than forwards.
    step = TRAINING_OVERHEAD * (6 if again else 4) * used * how.tokens / speed
    return min(how.seconds or math.inf, math.inf if how.steps is None else how.steps * step)


def _training_bytes(job: Job, tokens: int, again: bool) -> int:
    """Of memory, while the whole model is trained: its weights, codes in a byte and the rest as floats, what moves,
    what it leaves for the way back, and what the dense one said. again: whether blocks run twice, and leave what flows
    into them."""
    if job.towards is None:
        return 0
    coded = [p.layer.weights for p in job.plan.layers if p.bits]
    weights = 4 * job.parameters - 3 * sum(coded) + 4 * max(coded, default=0)  # of which one is unfolded at a time
    assert job.calibration is not None
    assert job.calibration.length is not None
    together = passing(job.calibration.length) * job.calibration.length
    widths = len(job.blocks) + BLOCK_WIDTHS if again else len(job.blocks) * BLOCK_WIDTHS
    left = 4 * together * job.hidden_size * widths + TRAINED_COPIES * 4 * _trained(job, job.towards.train)
    return RESIDENT_BASE + weights + left + _loss_bytes(job, together) + 4 * tokens * job.hidden_size


def _loss_bytes(job: Job, tokens: int) -> int:
    """Of memory, for the loss of so many tokens at once."""
    return LOSS_COPIES * min(LOGITS, 4 * tokens * (job.source.vocabulary or LOGITS))


def _speeds(device: torch.device) -> list[float]:
    """Flops a second of float32 products of 1024 x 1024, of several bursts, rising."""
    A = torch.randn(1024, 1024, device=device)
    with fast_float32():
        A @ A
        return sorted(_burst(A) for _ in range(BURSTS))


def _burst(A: Tensor) -> float:
    begun, count = time.perf_counter(), 0
    while count < 1 or time.perf_counter() - begun < BURST_SECONDS:
        A @ A
        count += 1
    if A.is_cuda:
        torch.cuda.synchronize(A.device)
    return count * 2 * len(A) ** 3 / (time.perf_counter() - begun)
