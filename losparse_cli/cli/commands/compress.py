"""`losparse compress`: its signature, then one call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...budget.recipe import EMBEDDING_BITS, MOST_BITS, Recipe
from .. import options as o


def compress(
    model: o.Source,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write.", show_default="./<name>-losparse")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Columns of U, rows of V.", rich_help_panel=o.SIZE, show_default=False)
    ] = None,
    rank_ratio: Annotated[
        float | None,
        typer.Option(
            help="Share of the kept parameters in U and V.",
            rich_help_panel=o.SIZE,
            show_default=o.by_calibration("rank_ratio"),
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Share of S that is zero; of whole numbers beside --bits or --value-bits.",
            rich_help_panel=o.SIZE,
            show_default=False,
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="Most that the whole result folder takes, such as 90MB: settles --bits, or of floats --keep.",
            rich_help_panel=o.SIZE,
            show_default=False,
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            help="Stored bytes of the compressed layers, embeddings and heads aside, over their dense bytes, every "
            f"index counted; whole numbers use {MOST_BITS:g} bits a weight of it at most.",
            rich_help_panel=o.SIZE,
            show_default=o.by_calibration("keep"),
        ),
    ] = None,
    keep_parameters: Annotated[
        float | None,
        typer.Option(help="(r(m+n) + nnz) / mn, as papers count.", rich_help_panel=o.SIZE, show_default=False),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            help="Bits that a weight takes on disk, everything counted, with whole numbers in S.",
            rich_help_panel=o.SIZE,
            show_default=o.by_calibration("bits", "codes"),
        ),
    ] = None,
    value_bits: Annotated[
        float | None,
        typer.Option(
            help="Bits of each value that --sparsity or N:M leaves, in place of --bits.",
            rich_help_panel=o.SIZE,
            show_default="as --bits",
        ),
    ] = None,
    grid: Annotated[
        str | None,
        typer.Option(
            help="int4 or int8: whole numbers of that width, which losparse export --gguf and --compressed-tensors "
            "hand to other engines as they are.",
            rich_help_panel=o.SIZE,
            show_default=False,
        ),
    ] = None,
    values: Annotated[
        str | None,
        typer.Option(
            help="What S holds: codes (whole numbers) or float.",
            rich_help_panel=o.SIZE,
            show_default="codes, unless what is asked needs floats",
        ),
    ] = None,
    embedding_bits: Annotated[
        str | None,
        typer.Option(
            help="With whole numbers in S, bits a weight of embeddings and output heads; none leaves them dense.",
            rich_help_panel=o.SIZE,
            show_default=f"{EMBEDDING_BITS:g}; none with --targets",
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="Where S may be non-zero: unstructured, rows, columns, or N:M (N non-zeros in every M).",
            rich_help_panel=o.SIZE,
            show_default=Recipe.pattern,
        ),
    ] = None,
    threshold_scope: Annotated[
        str | None,
        typer.Option(
            help="Largest entries of each row, or of the matrix.",
            rich_help_panel=o.SIZE,
            show_default=o.by_calibration("threshold_scope"),
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            help="Passes of the solver over a layer; the paper makes one, of magnitude.",
            rich_help_panel=o.SIZE,
            show_default=o.ITERATIONS,
        ),
    ] = None,
    targets: o.Targets = None,
    ignore: o.Ignore = None,
    solver: Annotated[
        str | None,
        typer.Option(
            help="Of codes feedback or rounding; of floats admm, oats or magnitude.",
            rich_help_panel=o.TEXT,
            show_default=o.by_calibration("solver"),
        ),
    ] = None,
    sensitivity: Annotated[
        str | None,
        typer.Option(
            help="on: codes are finer where the loss minds more; off.",
            rich_help_panel=o.TEXT,
            show_default="on with text",
        ),
    ] = None,
    sensitivity_file: Annotated[
        Path | None,
        typer.Option(
            help="Keeps what --sensitivity on measures: runs of other sizes read it, and need not measure it.",
            rich_help_panel=o.TEXT,
            show_default=False,
        ),
    ] = None,
    calibration: o.CalibrationSource = None,
    calibration_tokens: o.CalibrationTokens = None,
    calibration_length: o.CalibrationLength = None,
    calibration_field: o.CalibrationField = None,
    calibration_image_field: o.CalibrationImageField = None,
    calibration_target_field: o.CalibrationTargetField = None,
    calibration_split: o.CalibrationSplit = None,
    allocate: Annotated[
        str | None,
        typer.Option(
            help="uniform, or error: sizes by what each layer's error does to the model's output.",
            rich_help_panel=o.TEXT,
            show_default=Recipe.allocate,
        ),
    ] = None,
    refine: Annotated[
        str | None,
        typer.Option(
            help="blocks: train each block, codes included, to match the dense one; model: train factors and norms "
            "to predict what the dense model does; both; off.",
            rich_help_panel=o.TEXT,
            show_default="off",
        ),
    ] = None,
    refine_minutes: o.RefineMinutes = None,
    refine_steps: o.RefineSteps = None,
    refine_lr: o.RefineRate = None,
    refine_tokens: o.RefineTokens = None,
    refine_precision: Annotated[
        str | None,
        typer.Option(help=f"Of --refine model: {o.REFINE_PRECISION}", rich_help_panel=o.TEXT, show_default="auto"),
    ] = None,
    refine_gradient_checkpointing: Annotated[
        bool | None,
        typer.Option(
            "--refine-gradient-checkpointing",
            help=f"Of --refine model: {o.REFINE_CHECKPOINTING}",
            rich_help_panel=o.TEXT,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of these settings, also per layer; flags win.", rich_help_panel=o.SIZE, show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of all that is random: what is drawn from the text, text of --calibration self, the SVD.",
            rich_help_panel=o.RUN,
            show_default=str(Recipe.seed),
        ),
    ] = None,
    device: o.RecipeDevice = None,
    max_shard_size: o.RecipeShardSize = None,
    memory_limit: o.MemoryLimit = None,
    part: Annotated[
        str | None,
        typer.Option(
            help="K/N, such as 2/3: without text, the second of three parts, which losparse join makes one.",
            rich_help_panel=o.RUN,
            show_default="all",
        ),
    ] = None,
    resume: o.Resume = "auto",
    overwrite: o.Overwrite = False,
    dry_run: o.DryRun = False,
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(help="Upload the result to this repository.", rich_help_panel=o.HUB, show_default=False),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push-to-hub: a private repository.", rich_help_panel=o.HUB)
    ] = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Compress a model: each targeted weight becomes U V + S.

    [dim]losparse compress user/model --calibration text.txt --bits 3.25[/dim]
    """
    from ...compression.request import make_request
    from ...errors import UsageError

    if private and not push_to_hub:
        raise UsageError("--private says how to create a repository: add --push-to-hub REPO, or leave it out.")
    flags = {
        "rank": rank,
        "rank_ratio": rank_ratio,
        "sparsity": sparsity,
        "size": size,
        "keep": keep,
        "keep_parameters": keep_parameters,
        "bits": bits,
        "value_bits": value_bits,
        "grid": grid,
        "values": values,
        "embedding_bits": o.number_or_word(embedding_bits),
        "pattern": pattern,
        "threshold_scope": threshold_scope,
        "iterations": iterations,
        "solver": solver,
        "sensitivity": sensitivity,
        "allocate": allocate,
        "seed": seed,
        "targets": tuple(targets or ()),
        "ignore": tuple(ignore or ()),
    }
    # Contradictions are reported before anything heavy is imported.
    request = make_request(
        recipe,
        flags,
        calibration={
            "source": calibration,
            "tokens": calibration_tokens,
            "length": calibration_length,
            "field": calibration_field,
            "image_field": calibration_image_field,
            "target_field": calibration_target_field,
            "split": calibration_split,
        },
        refinement={
            "mode": refine,
            "minutes": refine_minutes,
            "steps": refine_steps,
            "lr": refine_lr,
            "tokens": refine_tokens,
            "gradient_checkpointing": refine_gradient_checkpointing,
            "precision": refine_precision,
        },
        device=device,
        memory_limit=memory_limit,
        max_shard_size=max_shard_size,
        part=part,
        sensitivity_file=sensitivity_file,
    )
    if part is not None and push_to_hub:
        raise UsageError("--push-to-hub uploads a whole result, and --part makes a part of one: join the parts first.")
    if push_to_hub:
        from ...push import check_repository

        check_repository(push_to_hub)
    from ...compress import run
    from ...compression.plan import prepare
    from ...parallel.group import agreed, ranks
    from .. import console as c
    from .. import summary as s

    group = ranks()
    out = c.Console(json=json and group.rank == 0, quiet=quiet or group.rank > 0)
    if request.calibration is not None:
        c.calm_libraries()
    with out.status(f"Reading {model}"):
        job = agreed(
            group,
            lambda: prepare(
                model,
                output,
                request,
                revision=revision,
                cache_dir=cache_dir,
                trust_remote_code=trust_remote_code,
                plan_only=dry_run,
            ),
        )
    if dry_run:
        from ...compression.estimate import forecast

        s.show_plan(out, forecast(job, resume=resume, overwrite=overwrite), group.size)
        return
    with c.interruptible(), c.LayerProgress(out) as progress:
        result = run(job, resume=resume, overwrite=overwrite, progress=progress)
    if job.part is not None:
        s.show_part(out, result, job.part)
    else:
        s.show_result(out, result)
    if push_to_hub and group.rank == 0:
        from .push import upload

        upload(out, result.output, push_to_hub, private)
    out.flush()
