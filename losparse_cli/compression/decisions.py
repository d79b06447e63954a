"""What a calibrated run decides before its first layer, and keeps for a run that goes on with it."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from ..checkpoint.journal import Journal
from ..checkpoint.output import ALLOCATION, GENERATED
from ..checkpoint.source import read_json
from ..checkpoint.writer import write_json
from ..errors import CheckpointError, write_errors
from ..load import load
from ..models.device import release
from ..text.generated import generate_text, kept_windows, write_windows
from ..text.windows import Windows
from .allocation import Allocation, allocate_by_error
from .plan import Job, replan


class Progress(Protocol):
    """What a caller may watch."""

    def phase(self, text: str) -> None: ...
    def allocated(self, decided: Allocation) -> None: ...


def kept_text(job: Job, work: Path, journal: Journal) -> Windows | None:
    """The text that the model wrote for itself before this run was killed; without it nothing that was done counts."""
    if job.calibration is None or job.windows is not None:
        return None
    kept = kept_windows(job.calibration, work / GENERATED)
    if kept is None:
        with write_errors(work):
            journal.keep(0)
    return kept


def own_text(job: Job, work: Path, progress: Progress | None) -> Windows:
    """Text that the model writes for itself, kept so that a run that goes on sees the same; see `generate_text`."""
    assert job.calibration is not None

    def say(done: int, total: int) -> None:
        if progress is not None:
            progress.phase(f"generating text: {done:,} of {total:,} tokens")

    options = {"trust_remote_code": True} if job.trust_remote_code else {}
    model, tokenizer = load(job.source.folder, dtype="auto", **options)
    windows = generate_text(job.calibration, model, tokenizer, seed=job.recipe.seed, device=job.device, on_tokens=say)
    del model
    release(job.device)
    with write_errors(work):
        write_windows(windows, work / GENERATED)
    return windows


def allocated(job: Job, work: Path, journal: Journal, progress: Progress | None) -> Job:
    """The job with its budget allocated by error; what was decided is kept for a run that goes on with this one, and
    without it nothing that was done counts."""
    path = work / ALLOCATION
    if path.is_file():
        try:
            return replan(job, job.recipe.with_overrides(read_json(path)["layers"]))
        except (CheckpointError, KeyError, TypeError, ValueError):
            path.unlink()
    with write_errors(work):
        journal.keep(0)
    decided = allocate_by_error(job, progress.phase if progress is not None else lambda text: None)
    with write_errors(work):
        part = path.with_name(path.name + ".part")
        write_json(part, {"layers": decided.layers, "gain": decided.gain})
        part.replace(path)
    if progress is not None:
        progress.allocated(decided)
    return replan(job, job.recipe.with_overrides(decided.layers))
