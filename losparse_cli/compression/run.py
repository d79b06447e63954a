"""A planned job, carried out: by one process or several, whole or a part of it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

from ..checkpoint.fingerprint import digest
from ..checkpoint.finish import read_report
from ..checkpoint.output import PARTS, check_space, working_folder
from ..checkpoint.part import read_part
from ..checkpoint.report import Report
from ..checkpoint.writer import ShardWriter
from ..errors import write_errors
from ..models.device import peak_memory
from ..parallel.group import Alone, Ranks
from ..progress import Progress, Within
from ..text.sample import doubts, strangeness
from .calibrated import CalibratedRun
from .closing import Took, finish_part, finish_whole, hashed_here, report_of_part, source_hashes, write_timing
from .decisions import allocated_plan, kept_text, own_text
from .estimate import estimate
from .fingerprint import fingerprint
from .joining import check_parts, join_into
from .parts import Part
from .plan import Job
from .schedule import Schedule
from .steps import Steps, foreseen_steps
from .stream import compress_stream
from .team import begin, in_its_share, reported, require_seen, require_windows


@dataclass(frozen=True)
class Result:
    """output: the finished folder. report: of all of it, or of a part's layers alone. took: time and memory. resumed:
    units found finished.

    needs_package: True if only a machine with losparse installed can load it (see `write_config`).
    """

    output: Path
    report: Report
    took: Took
    resumed: int
    needs_package: bool

    @property
    def seconds(self) -> float:
        return self.took.seconds


def run_whole(job: Job, group: Ranks, resume: str, overwrite: bool, told: Progress) -> Result:
    """A run, or a part of one without text, whose text the ranks share."""
    begun, mark = time.monotonic(), fingerprint(job)
    job = in_its_share(group, job)
    with ExitStack() as stack:
        team = begin(stack, job, group, mark, resume, overwrite)
        work = team.work
        if team.said(work is not None and work.finished):
            return found_finished(job)
        windows = kept_text(job, team)
        # Before the model's own text is written, which may be what takes the most memory.
        need = estimate(job, windows) if job.calibration is not None else None
        if job.calibration is not None and windows is None:
            windows = own_text(job, team, told)
        for sentence in doubts(job.calibration, windows) if job.calibration is not None else ():
            told.warn(sentence)
        made = job.scheduled(allocated_plan(job, windows, team, told))
        for sentence in made.plan.notes:
            told.warn(sentence)
        steps = Steps((), {})
        if windows is not None and need is not None:
            assert job.calibration is not None
            require_windows(group, windows, job.calibration)
            steps = foreseen_steps(job, made.plan, windows, team, told, need.fixed_bytes)
        for sentence in strangeness(steps.nats):
            told.warn(sentence)
        if work is None:  # of another rank than the first, which has a share of the text, and writes nothing
            assert windows is not None
            assert need is not None
            CalibratedRun(job, windows, made, None, team, told, need.fixed_bytes, steps).run()
            group.agree([group.waited, peak_memory()])
            return _of_the_first(job, group, None)
        writer = ShardWriter(work.path, made.shards, work.journal, job.blocks.values())
        resumed = writer.done
        check_space(work.path, made.plan.expected_bytes + made.copied_bytes - writer.nbytes)
        _start(job, made, resumed, told)
        stop = Event()
        with ThreadPoolExecutor(1, "hash") as hasher:
            try:
                hashes = hasher.submit(source_hashes, job.source, hashed_here(job), stop)
                if need is None or windows is None:
                    compress_stream(job, made, writer, told)
                else:
                    CalibratedRun(job, windows, made, writer, team, told, need.fixed_bytes, steps).run()
                of_ranks = group.agree([group.waited, peak_memory()])
                writer.finish()
                if job.part is None:
                    report = finish_whole(job, made, windows, work, hashes.result(), digest(mark), steps.nats)
                else:
                    report = finish_part(job, writer, work, hashes.result(), digest(mark))
                took = Took(time.monotonic() - begun, peak_memory(), need)
                write_timing(work.path, work.journal.units, took, of_ranks)
            finally:
                stop.set()  # an error is told at once, not after the rest of the source has been read
        work.publish()
    return _of_the_first(job, group, Result(job.output, report, took, resumed, _needs_package(job)))


def _of_the_first(job: Job, group: Ranks, result: Result | None) -> Result:
    """The result of the first rank, on all of them."""
    report = reported(group, None if result is None else result.report)
    said = group.agree(None if result is None else [result.took.seconds, result.resumed])[0]
    if result is not None:
        return result
    seconds, resumed = said
    return Result(job.output, report, Took(seconds, peak_memory(), None), resumed, _needs_package(job))


def run_in_parts(job: Job, group: Ranks, resume: str, overwrite: bool, told: Progress) -> Result:
    """A run without text: each rank does some of its sections, as parts, and the first one joins all of them."""
    begun, mark, made = time.monotonic(), fingerprint(job), job.scheduled()
    count, resumed = len(made.sections), 0
    with ExitStack() as stack:
        team = begin(stack, job, group, mark, resume, overwrite)
        work = team.work
        if team.said(work is not None and work.finished):
            return found_finished(job)
        place = working_folder(job.output) / PARTS
        if work is not None:
            with write_errors(place):
                place.mkdir(exist_ok=True)
        remedy = "without text they share a folder. Do --part K/N on each machine, and losparse join in the end."
        require_seen(group, place, remedy)
        mine = made.cut(group.size)[group.rank]
        here = [unit for k in mine for unit in made.units[made.sections[k].start : made.sections[k].stop]]
        told.start("layers", sum(plan is not None for _, plan in here))
        told.start("bytes", sum(entry.nbytes for entry, _ in here))
        for number in mine:
            part = replace(job, part=Part(number + 1, count), output=place / str(number + 1))
            resumed += run_whole(part, Alone(), "auto", False, Within(told)).resumed
        resumed = sum(group.agree(resumed))
        of_ranks = group.agree([group.waited, peak_memory()])
        if work is None:
            return _of_the_first(job, group, None)
        report = join_into(work, check_parts([place / str(number + 1) for number in range(count)]), Within(told))
        took = Took(time.monotonic() - begun, peak_memory(), None)
        write_timing(work.path, work.journal.units, took, of_ranks)
        work.publish()
    return _of_the_first(job, group, Result(job.output, report, took, resumed, _needs_package(job)))


def found_finished(job: Job) -> Result:
    if job.part is not None:
        part = read_part(job.output)
        assert part is not None, "a part that is whole says so"
        report, done = report_of_part(job, part.units), len(part.units)
    else:
        found = read_report(job.output)
        assert found is not None, "a result that is whole has one"
        report, done = found, len(job.entries)
    return Result(job.output, report, Took(0.0, 0, None), done, _needs_package(job))


def _needs_package(job: Job) -> bool:
    return "AutoConfig" in (job.source.config.get("auto_map") or {})


def _start(job: Job, made: Schedule, resumed: int, told: Progress) -> None:
    for sentence in job.route.notes if not resumed else ():
        told.tell(sentence)
    finished = made.units[:resumed]
    layers = sum(plan is not None for _, plan in finished)
    if layers:
        told.tell(f"Going on after layer {layers} of {len(made.plan.layers)}.")
    told.start("layers", len(made.plan.layers), layers)
    total = sum(entry.nbytes for entry, _ in made.units)
    told.start("bytes", total, sum(entry.nbytes for entry, _ in finished))
