"""Finished parts of a run -> one checkpoint, the same as the undivided run makes; nothing is computed again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .checkpoint.finish import read_report
from .checkpoint.output import output_path
from .checkpoint.report import Report
from .checkpoint.workfolder import WorkFolder
from .compression.closing import Took, write_timing
from .compression.joining import check_parts, join_into, run_of
from .models.device import peak_memory
from .progress import Progress, listener


@dataclass(frozen=True)
class Joined:
    """output: the finished folder. parts: that it was made of. seconds: 0 where it was found finished."""

    output: Path
    report: Report
    parts: int
    seconds: float


def join(
    parts: Sequence[str | Path],
    output: str | Path,
    *,
    resume: str = "auto",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Joined:
    """Make one checkpoint in `output` of the folders that every part of a run wrote, in any order.

    Byte for byte it is what the undivided run writes, where all were computed alike (processor, threads, device). It
    appears whole or not at all. UsageError if parts are missing, given twice, unfinished or of different runs;
    CheckpointError for one that is damaged; OutputError and ResumeError as `compress`.
    """
    begun, told, place = time.monotonic(), listener(progress), output_path(output)
    found = check_parts([output_path(part) for part in parts])
    reads = [part.folder for part in found]
    with WorkFolder(place, run_of(found), resume=resume, overwrite=overwrite, reads=reads) as work:
        if work.finished:
            report = read_report(place)
            assert report is not None, "a result that is whole has one"
            return Joined(place, report, len(found), 0.0)
        report = join_into(work, found, told)
        took = Took(time.monotonic() - begun, peak_memory(), None)
        write_timing(work.path, work.journal.units, took)
        work.publish()
    return Joined(place, report, len(found), took.seconds)
