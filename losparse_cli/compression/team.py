"""The ranks of one run: the first has the work folder and writes, the others hear of it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any, TypeVar

from torch import Tensor

from ..checkpoint.fingerprint import identity
from ..checkpoint.journal import differences
from ..checkpoint.report import Report
from ..checkpoint.workfolder import WorkFolder
from ..errors import UsageError
from ..parallel.group import Ranks, agreed, said_once
from ..progress import Progress
from ..shim.layouts import LayerSpec
from ..text.request import Calibration
from ..text.sample import hold_out
from ..text.windows import Sample, Windows
from .plan import Job
from .request import ModelRefinement, passing

T = TypeVar("T")
OF_A_MACHINE = ("processor", "device")


@dataclass(frozen=True)
class Team:
    """group: the ranks. work: of the first rank alone."""

    group: Ranks
    work: WorkFolder | None

    @property
    def folder(self) -> Path:
        """Where this rank may keep files while it works."""
        return self.work.path if self.work is not None else Path(gettempdir())

    def said(self, value: Any) -> Any:
        """A JSON value of the first rank, on all of them."""
        return self.group.agree(value)[0]

    def heard(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the first rank, on all of them."""
        return self.group.broadcast(0, tensors)

    def recalled(self, recall: Callable[[WorkFolder], T | None]) -> tuple[bool, T | None]:
        """Whether the first rank recalls a decision, and what it is there; where it fails, all end."""
        found = agreed(self.group, lambda: None if self.work is None else recall(self.work))
        return bool(self.said(found is not None)), found


def begin(stack: ExitStack, job: Job, group: Ranks, mark: dict[str, Any], resume: str, overwrite: bool) -> Team:
    """The ranks, the first of them with the folder in which the result grows."""

    def begun() -> WorkFolder | None:
        if group.rank:
            return None
        folder = WorkFolder(job.output, mark, resume=resume, overwrite=overwrite, reads=job.reads)
        return stack.enter_context(folder)

    return Team(group, agreed(group, begun))


def reported(group: Ranks, report: Report | None) -> Report:
    """The report that the first rank has, on all of them."""
    specs = {} if report is None else {layer.name: layer.spec.to_dict() for layer in report.layers}
    said = group.agree([None if report is None else report.to_dict(), specs] if group.size > 1 else None)[0]
    if report is not None:
        return report
    fields, specs = said
    return Report.from_dict(fields, {name: LayerSpec.from_dict(spec) for name, spec in specs.items()}, "rank 0")


def require_seen(group: Ranks, place: Path, remedy: str) -> None:
    """UsageError unless all ranks see the folder that the first one has made."""
    group.agree(None)  # it is made
    if not all(group.agree(place.is_dir())):
        raise said_once(group, UsageError(f"Not all processes see {place.parent}: {remedy}"))


def require_alike(group: Ranks, mark: dict[str, Any], told: Progress) -> None:
    """UsageError if a rank is at another run than the first, by their fingerprints."""
    marks = group.agree(identity(mark))
    for rank, other in enumerate(marks):
        ours, its = ({k: v for k, v in one.items() if k not in OF_A_MACHINE} for one in (marks[0], other))
        different = differences(ours, its)
        if different:
            raise said_once(
                group,
                UsageError(
                    f"Rank {rank} is at another run than rank 0 (different: {', '.join(different)}). Give all ranks "
                    "the same model, options and versions."
                ),
            )
        unlike = [key for key in OF_A_MACHINE if other.get(key) != marks[0].get(key)]
        if unlike:
            told.warn(
                f"Rank {rank} runs on another {' and '.join(unlike)} than rank 0: the result is as good, but not byte "
                "for byte that of one process."
            )


def in_its_share(group: Ranks, job: Job) -> Job:
    """The job with the memory that each rank may take: of what is free on its device, as much as the others there."""
    if group.size == 1:
        return job
    here = [socket.gethostname(), str(job.device)]
    sharers = group.agree(here).count(here)
    room = job.memory if job.memory_limit is not None else job.memory // sharers
    return replace(job, memory_limit=min(group.agree(room)))


def require_shared(group: Ranks, job: Job) -> None:
    """UsageError for what several processes do not do together, or for more of them than there is work for."""
    if group.size == 1:
        return
    wrong = None
    if job.part is not None:
        wrong = (
            "--part is for processes that know nothing of each other, and these were started together: leave it out, "
            "and they divide the run themselves."
        )
    elif job.calibration is None:
        made = job.scheduled()
        if group.size > len(made.sections):
            wrong = (
                f"{len(made.plan.layers)} layers without text are work for {len(made.sections)} processes at most, not "
                f"{group.size}. Start {len(made.sections)}."
            )
    elif job.windows is not None:
        trained = job.start is not None and job.refinement is None
        wrong = None if trained else _too_few(group, job.windows, job.calibration)
        wrong = wrong or _too_small(group, job.windows, job.towards)
    if wrong:
        raise said_once(group, UsageError(wrong))


def require_windows(group: Ranks, windows: Sample, calibration: Calibration) -> None:
    """UsageError if there are not as many batches of text as ranks."""
    wrong = _too_few(group, windows, calibration)
    if wrong:
        raise said_once(group, UsageError(wrong))


def _too_small(group: Ranks, windows: Sample, how: ModelRefinement | None) -> str | None:
    """What is wrong with the steps of a training that ranks share."""
    if how is None or not isinstance(windows, Windows):
        return None
    each, together = how.windows(windows.predicted), passing(windows.length)
    passes = -(-each // together)
    if group.size <= passes:
        return None
    return (
        f"{group.size} processes share the {each} windows of each step, {together} at a time: that is work for "
        f"{passes}. Start {passes}, or raise --refine-tokens to {group.size * together * windows.predicted}."
    )


def _too_few(group: Ranks, windows: Sample, calibration: Calibration) -> str | None:
    batches = len(hold_out(windows)[0].batches(calibration.batch))
    if group.size <= batches:
        return None
    return (
        f"{group.size} processes share {len(windows)} windows of text, {calibration.batch} at a time: that is work "
        f"for {batches}. Start {batches}, or raise --calibration-tokens."
    )
