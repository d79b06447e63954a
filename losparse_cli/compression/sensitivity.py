"""How much the loss minds an error in each output of each layer, for a job: its model filled a block at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..calibration.moments import Fed
from ..calibration.sensitivity import Sensitivity, SensitivityRun
from ..linalg.precision import fast_float32
from ..models.blocks import block_of
from ..models.device import memory_errors
from ..parallel.group import Ranks
from ..parallel.shares import deal, share
from ..progress import Progress
from ..text.windows import Sample
from .assembly import activations_of, calibration_model, parameters_by_block
from .plan import Job


def measure_sensitivity(
    job: Job,
    windows: Sample,
    told: Progress,
    group: Ranks,
    *,
    folder: Path,
    fixed_bytes: int = 0,
    on_forward: Callable[[str, list[Fed]], None] = lambda block, found: None,
    on_backward: Callable[[str, dict[str, Sensitivity]], None] = lambda block, found: None,
    on_text: Callable[[float, int], None] = lambda nats, tokens: None,
    state: Path | None = None,
) -> dict[str, Sensitivity]:
    """Layer -> Fisher information of its outputs on `windows`, of the layers that the job is to compress.

    group: ranks that share the windows out. folder: for files of activations that do not fit in memory. fixed_bytes: of
    memory that is needed beside them. on_forward, on_backward, on_text: hear a block's second moments, what was found,
    and the loss of the text that is this rank's. state: file that says how far the backward pass is. See
    `SensitivityRun`.
    """
    assert job.calibration is not None
    assembly = calibration_model(job)
    model, blocks = assembly.model, list(job.blocks)
    parameters, outside = parameters_by_block(model, job.route)
    assembly.load(outside)
    layers: dict[str, list[str]] = {block: [] for block in blocks}
    for plan in job.plan.layers:
        if not plan.layer.rows and (block := block_of(plan.layer.name, blocks)) is not None:
            layers[block].append(plan.layer.name.removeprefix(f"{block}." if block else ""))
    batches = windows.batches(job.calibration.batch, job.device)
    said = windows.said(job.calibration.batch)
    mine = share(len(batches), group.rank, group.size)
    remedy = "Lower --calibration-tokens or --calibration-length, or set --memory-limit."
    with memory_errors(remedy), fast_float32():
        return SensitivityRun(
            model,
            layers,
            batches[mine.start : mine.stop],
            load=lambda block: assembly.load(parameters[block]),
            drop=lambda block: assembly.drop(parameters[block]),
            activations=activations_of(job, folder, fixed_bytes),
            seed=job.recipe.seed,
            on_forward=on_forward,
            on_backward=on_backward,
            on_text=on_text,
            say=told.phase,
            state=state,
            optional=job.route.optional,
            said=said[mine.start : mine.stop],
            group=group,
            first=mine.start,
            owners=lambda found: deal([fed.width**3 for fed in found], group.size),
        ).run()
