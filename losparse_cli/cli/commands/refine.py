"""`losparse refine`: its signature, then one call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import options as o


def refine(
    source: o.Source,
    against: Annotated[
        str | None,
        typer.Option(help="The dense model, a folder or Hub id.", show_default="the Hub model it was made from"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write.", show_default="./<name>-refined")
    ] = None,
    calibration: o.CalibrationSource = None,
    calibration_tokens: o.CalibrationTokens = None,
    calibration_length: o.CalibrationLength = None,
    calibration_field: o.CalibrationField = None,
    calibration_image_field: o.CalibrationImageField = None,
    calibration_target_field: o.CalibrationTargetField = None,
    calibration_split: o.CalibrationSplit = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="blocks: match each block, codes included; model: match what the whole model predicts.",
            show_default="model for whole numbers, else blocks",
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(help="Of --objective model, what moves.", show_default="scales,norms,lowrank"),
    ] = None,
    refine_minutes: o.RefineMinutes = None,
    refine_steps: o.RefineSteps = None,
    refine_lr: o.RefineRate = None,
    refine_tokens: o.RefineTokens = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--gradient-checkpointing",
            help=f"Of --objective model: {o.REFINE_CHECKPOINTING}",
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help=f"Of --objective model: {o.REFINE_PRECISION}", show_default="auto")
    ] = None,
    device: o.Device = "auto",
    max_shard_size: o.MaxShardSize = "5GB",
    memory_limit: o.MemoryLimit = None,
    resume: o.Resume = "auto",
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Train a compressed model to match its dense one, as a whole or block by block; its size stays.

    [dim]losparse refine model-small --against user/model --calibration text.txt --refine-minutes 20[/dim]
    """
    from ...errors import UsageError

    if calibration is None:
        raise UsageError("losparse refine trains on text: add --calibration FILE, or --calibration self.")
    from ...compression.request import make_calibration
    from ...refine import make_refinement, prepare_refinement

    how = make_refinement(
        objective,
        minutes=refine_minutes,
        steps=refine_steps,
        lr=refine_lr,
        tokens=refine_tokens,
        train=train,
        gradient_checkpointing=gradient_checkpointing,
        precision=precision,
    )
    text = make_calibration(
        {
            "source": calibration,
            "tokens": calibration_tokens,
            "length": calibration_length,
            "field": calibration_field,
            "image_field": calibration_image_field,
            "target_field": calibration_target_field,
            "split": calibration_split,
        }
    )
    from ...compress import run
    from ...parallel.group import agreed, ranks
    from ...refinement.run import run_model
    from .. import console as c
    from .. import summary as s
    from ..refinement_progress import RefinementProgress

    assert text is not None, "its source was given"
    group = ranks()
    out = c.Console(json=json and group.rank == 0, quiet=quiet or group.rank > 0)
    c.calm_libraries()
    with out.status(f"Reading {source}"):
        job = agreed(
            group,
            lambda: prepare_refinement(
                source,
                output,
                calibration=text,
                refinement=how,
                against=against,
                device=device,
                revision=revision,
                cache_dir=cache_dir,
                trust_remote_code=trust_remote_code,
                max_shard_size=max_shard_size,
                memory_limit=memory_limit,
                plan_only=dry_run,
            ),
        )
    if dry_run:
        from ...refinement.forecast import forecast_refinement

        s.show_refinement_plan(out, forecast_refinement(job, resume=resume, overwrite=overwrite), group.size)
        return
    if job.towards is None:
        with c.interruptible(), c.LayerProgress(out) as layers:
            result = run(job, resume=resume, overwrite=overwrite, progress=layers)
        s.show_result(out, result)
    else:
        with c.interruptible(), RefinementProgress(out) as progress:
            refined = run_model(job, resume=resume, overwrite=overwrite, progress=progress)
        s.show_refined(out, refined)
    out.flush()
