"""What a refinement will do and need, before it is begun."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..checkpoint.output import check_space, free_bytes
from ..checkpoint.workfolder import WorkFolder
from ..compression.estimate import Estimate, estimate, space_needed
from ..compression.fingerprint import fingerprint
from ..compression.plan import Job
from ..text.sample import account, doubts
from .run import check_moving


@dataclass(frozen=True)
class RefinementForecast:
    """disk_bytes: of the result, and of what lies beside it until it is whole. free_bytes: on that disk.

    finished: the result is there already, so that there is nothing to do.
    """

    job: Job
    disk_bytes: int
    free_bytes: int
    need: Estimate
    finished: bool

    @property
    def warnings(self) -> tuple[str, ...]:
        """What bodes ill, a sentence each."""
        assert self.job.calibration is not None
        return (*doubts(self.job.calibration, self.job.windows), *self.job.route.notes)

    def to_dict(self) -> dict[str, Any]:
        """JSON form; sizes in bytes."""
        job = self.job
        assert job.start is not None
        assert job.calibration is not None
        return {
            "output": str(job.output),
            "source": job.start.address,
            "against": job.source.address,
            "objective": "blocks" if job.towards is None else "model",
            "settings": asdict(job.towards or job.refinement),  # type: ignore[arg-type]
            "layers": [p.layer.name for p in job.plan.layers if not p.layer.rows],
            "blocks": list(job.blocks),
            "calibration": account(job.calibration, job.windows),
            "disk_bytes": self.disk_bytes,
            "free_bytes": self.free_bytes,
            "peak_memory_bytes": self.need.peak_bytes,
            "seconds": self.need.seconds,
            "least_seconds": self.need.least_seconds,
            "most_seconds": self.need.most_seconds,
            "busy": self.need.busy,
            **self.need.training(),
            "warnings": list(self.warnings),
        }


def forecast_refinement(job: Job, *, resume: str = "auto", overwrite: bool = False) -> RefinementForecast:
    """What a job of `prepare_refinement` will do and need; raises what would keep it from being carried out, as far as
    can be known before: as `compression.estimate.forecast`, and UsageError for what `--train` cannot move."""
    work = WorkFolder(job.output, fingerprint(job), resume=resume, overwrite=overwrite, reads=job.reads)
    work.check()
    if job.towards is not None:
        check_moving(job)
    disk, free = space_needed(job), free_bytes(job.output)
    if not work.finished and not work.path.is_dir():  # else a part of it is written
        check_space(work.path, disk)
    return RefinementForecast(job, disk, free, estimate(job, job.windows), work.finished)
