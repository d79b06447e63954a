"""Compression without data: read ahead, solve, and write behind, one layer in memory between them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from ..checkpoint.journal import Unit
from ..checkpoint.writer import ShardWriter, tensor_part
from ..progress import Progress
from .coded import Coder, Ledger
from .plan import Job
from .rows import code_rows
from .schedule import Schedule
from .solve import encode, solve_layer


def compress_stream(job: Job, made: Schedule, writer: ShardWriter, told: Progress) -> None:
    """Write every unit of `made` that `writer` does not hold yet: solved alone, or copied."""
    files = {file.path: file for file in job.source.files}
    ledgers = _ledgers(made)
    for number, (_, plan) in enumerate(made.units[: writer.done]):
        if plan is not None:
            ledgers[number].spend(plan, writer.stats(number)["bytes_after"])
    todo = list(enumerate(made.units))[writer.done :]
    upcoming = iter([entry for _, (entry, plan) in todo if plan is not None])

    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as pen:

        def read_next() -> Future[Tensor] | None:
            entry = next(upcoming, None)
            return None if entry is None else reader.submit(files[entry.path].read, entry)

        ahead: Future[Tensor] | None = read_next()
        behind: Future[Unit] | None = None
        for number, (entry, plan) in todo:
            stats, seconds = None, 0.0
            if plan is None:
                pieces = _watched(job.copied(job.source, entry.name), told)
                parts: Any = [(entry.name, entry.dtype, entry.shape, pieces)]
            else:
                assert ahead is not None, "one read is submitted for each layer"
                begun = time.monotonic()
                stored, ahead = ahead.result(), read_next()
                if plan.layer.rows:
                    one = code_rows(plan, stored, job.device)
                    report, tensors = one.report, one.tensors
                elif plan.bits:
                    one = ledgers[number].code(Coder([plan], [stored], None, [None], job.recipe.seed, job.device))
                    report, tensors = one.report, one.tensors
                else:
                    report, tensors = encode(plan, solve_layer(plan, stored, job.recipe, job.device), stored.dtype)
                parts = [tensor_part(f"{plan.layer.disk_module}.{suffix}", t) for suffix, t in tensors.items()]
                stats = {"spec": report.spec.to_dict(), **report.measured()}
                seconds = time.monotonic() - begun
                told.layer(report)
                told.advance("bytes", entry.nbytes)
            if behind is not None:
                behind.result()  # a unit that could not be written ends the run before the next is begun
            behind = pen.submit(writer.append, parts, stats, seconds)
        if behind is not None:
            behind.result()


def _ledgers(made: Schedule) -> list[Ledger]:
    """Unit -> the ledger of its section."""
    found: list[Ledger] = []
    for section in made.sections:
        plans = (plan for _, plan in made.units[section.start : section.stop] if plan is not None and plan.bits)
        found += [Ledger(plan for plan in plans if not plan.width and not plan.layer.rows)] * len(section)
    return found


def _watched(pieces: Iterator[bytes], told: Progress) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        told.advance("bytes", len(piece))
