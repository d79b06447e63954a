"""What decides a result, so that a run goes on with its own work and with no other's."""

from __future__ import annotations

import platform
from dataclasses import asdict
from typing import Any

import torch

from .. import __version__
from ..checkpoint.fingerprint import companion_states, digest, file_states
from ..models.device import chosen_precision
from .plan import Job
from .request import ModelRefinement


def _deciding(how: ModelRefinement, device: torch.device) -> dict[str, Any]:
    """Its settings, decided, but for what takes other memory and time to the same end."""
    found = asdict(how) | {"precision": chosen_precision(how.precision, device)}
    return {name: value for name, value in found.items() if name != "gradient_checkpointing"}


def fingerprint(job: Job) -> dict[str, Any]:
    """What must be equal for a journal to be continued; JSON."""
    import safetensors
    import transformers

    made = job.scheduled()
    plan = [
        [e.name, e.dtype, e.shape, p and [p.rank, p.nnz, p.pattern, p.scope, p.iterations, p.bits]]
        for e, p in made.units
    ]
    part = {} if job.part is None else {"part": str(job.part)}
    return part | {
        "losparse": __version__,
        "torch": torch.__version__,
        "processor": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(job.device) if job.device.type == "cuda" else "cpu",
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
        "companions": digest(companion_states(job.source)),
        "source": job.source.commit or file_states(job.source),
        "start": job.start and (job.start.commit or file_states(job.start)),
        "config": digest(job.source.config),
        "recipe": job.recipe.to_dict(),
        "calibration": job.calibration and asdict(job.calibration),
        "refinement": job.refinement and asdict(job.refinement),
        "towards": job.towards and _deciding(job.towards, job.device),
        "text": job.windows and job.windows.digest(),
        "plan": digest([plan, [[s.file, s.header] for s in made.shards]]),
    }
