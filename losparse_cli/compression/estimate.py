"""What a run will take: disk, peak memory, and time from a measured speed of products."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..budget.quality import doubt_of_bits, doubt_of_share
from ..checkpoint.output import check_space, free_bytes
from ..checkpoint.workfolder import WorkFolder
from ..linalg.precision import fast_float32
from ..text.sample import account, doubts
from ..text.windows import Sample
from .fingerprint import fingerprint
from .footprint import footprint
from .foreseen import check_known
from .needs import Extent, Reading, needs, trained, training_bytes, training_seconds
from .pace import seconds_alone
from .plan import Job
from .schedule import Schedule

STATE_BYTES = 16  # of each number that is trained: itself, the best so far and Adam's two moments
BURSTS, BURST_SECONDS = 7, 0.01
UNSTEADY = 1.25  # of the second fastest burst's speed and the second slowest's; alone on a machine it is below 1.1


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
    states = 2 * STATE_BYTES * trained(job, job.towards.train)
    return result + teacher + states + (result if job.start is None else 0)


def _estimate_alone(job: Job) -> Estimate:
    """Of a job without text, in which nothing flows between blocks."""
    least, about, most = seconds_alone(job)
    return Estimate(job.peak_memory, 0, about, least, most, _is_busy(job.device))


def _is_busy(device: torch.device) -> bool:
    """Whether other work runs; a command that came before this one may still count as one process a core."""
    return device.type == "cpu" and os.getloadavg()[0] > UNSTEADY * (os.cpu_count() or 1)


def estimate(job: Job, windows: Sample | None) -> Estimate:
    """Peak resident bytes and seconds of a calibrated job; windows: its text, None if it is not there yet."""
    reading, extent = Reading.of(job, windows), Extent.of(job)
    need = needs(job, reading, extent)
    speeds = _speeds(job.device)
    slow, middle, fast = speeds[1], statistics.median(speeds), speeds[-2]
    busy = _is_busy(job.device) or fast > UNSTEADY * slow
    whole, recomputed = (training_bytes(job, reading.tokens, again) for again in (False, True))
    again = job.towards is not None and (job.towards.gradient_checkpointing or whole > job.memory)
    about, least, most = (
        need.work / speed + training_seconds(job, extent.used, speed, again) for speed in (middle, fast, slow)
    )
    bound = None if job.towards is None else job.towards.seconds
    timed = bound if bound is not None and training_seconds(job, extent.used, middle, again) == bound else 0.0
    chosen, otherwise = (recomputed, whole) if again else (whole, recomputed)
    return Estimate(round(need.fixed), round(need.carried), about, least, most, busy, chosen, timed, again, otherwise)


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
