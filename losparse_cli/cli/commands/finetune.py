"""`losparse finetune`: its signature, then one call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import options as o

TRAIN, PRUNE, DISTILL = "Training", "Pruning", "Distillation"


def finetune(
    source: o.Source,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write.", show_default="./<name>-finetuned")
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="Settings of the paper by name, such as mnli, squad or xsum; flags win.", show_default=False),
    ] = None,
    objective: Annotated[
        str, typer.Option(help="task: its loss, with labels. distill: the distance from a teacher alone.")
    ] = "task",
    task: o.Task = None,
    train_file: o.TrainFile = None,
    validation_file: o.ValidationFile = None,
    dataset_name: o.DatasetName = None,
    dataset_config_name: o.DatasetConfigName = None,
    train_split: o.TrainSplit = None,
    validation_split: o.ValidationSplit = None,
    text_column: o.TextColumn = None,
    text_pair_column: o.TextPairColumn = None,
    label_column: o.LabelColumn = None,
    question_column: o.QuestionColumn = None,
    context_column: o.ContextColumn = None,
    answers_column: o.AnswersColumn = None,
    summary_column: o.SummaryColumn = None,
    source_prefix: o.SourcePrefix = None,
    max_length: o.MaxLength = None,
    max_target_length: o.MaxTargetLength = None,
    doc_stride: o.DocStride = None,
    n_best: o.NBest = None,
    max_answer_length: o.MaxAnswerLength = None,
    num_beams: o.NumBeams = None,
    max_train_samples: o.MaxTrainSamples = None,
    max_validation_samples: o.MaxValidationSamples = None,
    rank: Annotated[
        int | None, typer.Option(help="Columns of U; 0 for S alone.", rich_help_panel=o.SIZE, show_default=False)
    ] = None,
    rank_ratio: Annotated[
        float | None,
        typer.Option(help="Share of the kept parameters in U and V.", rich_help_panel=o.SIZE, show_default="0.5"),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of S that is pruned; 1 for U V alone.", rich_help_panel=o.SIZE, show_default=False),
    ] = None,
    keep_parameters: Annotated[
        float | None,
        typer.Option(help="(r(m+n) + nnz) / mn, as papers count.", rich_help_panel=o.SIZE, show_default="0.2"),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="What S loses: rows (output neurons), columns (input neurons), or unstructured.",
            rich_help_panel=o.SIZE,
            show_default="rows",
        ),
    ] = None,
    targets: o.Targets = None,
    ignore: o.Ignore = None,
    low_rank_init: Annotated[
        str | None,
        typer.Option(
            help="How U and V begin: nearest to the layers' outputs on training data, or to their weights, as the "
            "paper has it.",
            rich_help_panel=o.SIZE,
            show_default="outputs",
        ),
    ] = None,
    importance: Annotated[
        str | None,
        typer.Option(
            help="sensitivity |w ∂L/∂w|, movement −w ∂L/∂w, or magnitude |w|.",
            rich_help_panel=PRUNE,
            show_default="sensitivity",
        ),
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(
            help="global: one for all S of the model; layer: one for each.",
            rich_help_panel=PRUNE,
            show_default="global",
        ),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(help="Smoothing of importance over windows.", rich_help_panel=PRUNE, show_default="0.85"),
    ] = None,
    prune_every: Annotated[
        int | None,
        typer.Option(
            help="Steps of a window, after which masks are renewed.", rich_help_panel=PRUNE, show_default="10"
        ),
    ] = None,
    initial_warmup_steps: Annotated[
        int | None,
        typer.Option(help="Steps before pruning begins.", rich_help_panel=PRUNE, show_default="a tenth of all"),
    ] = None,
    final_warmup_steps: Annotated[
        int | None,
        typer.Option(help="Steps after the target is reached.", rich_help_panel=PRUNE, show_default="a third of all"),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            help="Dense model to learn from: a folder or Hub id.",
            rich_help_panel=DISTILL,
            show_default="with distill: the model it was made from",
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Of the softened predictions.", rich_help_panel=DISTILL, show_default="2")
    ] = None,
    distill_weight: Annotated[
        float | None,
        typer.Option(help="Of the divergence from the teacher.", rich_help_panel=DISTILL, show_default="1"),
    ] = None,
    hidden_weight: Annotated[
        float | None,
        typer.Option(help="Of the distance of hidden states.", rich_help_panel=DISTILL, show_default="0"),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Passes over the data.", rich_help_panel=TRAIN, show_default="3")
    ] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Optimizer steps, in place of --epochs.", rich_help_panel=TRAIN)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its peak.", rich_help_panel=TRAIN, show_default="5e-5")
    ] = None,
    lr_scheduler: Annotated[
        str | None,
        typer.Option(
            help="linear, cosine, constant or constant_with_warmup.", rich_help_panel=TRAIN, show_default="linear"
        ),
    ] = None,
    warmup_steps: Annotated[
        float | None,
        typer.Option(
            help="In which the learning rate rises; below 1 a share of all.", rich_help_panel=TRAIN, show_default="0.1"
        ),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Examples of a pass on one device.", rich_help_panel=TRAIN, show_default="32")
    ] = None,
    eval_batch_size: Annotated[
        int | None, typer.Option(help="The same when scoring.", rich_help_panel=TRAIN, show_default="32")
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option(help="Passes of a step.", rich_help_panel=TRAIN, show_default="1")
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing", help="Less memory, more time.", rich_help_panel=TRAIN),
    ] = None,
    group_by_length: Annotated[
        bool | None,
        typer.Option("--group-by-length", help="Batches of like length, to save padding.", rich_help_panel=TRAIN),
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Of AdamW.", rich_help_panel=TRAIN, show_default="0")
    ] = None,
    max_grad_norm: Annotated[
        float | None, typer.Option(help="To which gradients are clipped.", rich_help_panel=TRAIN, show_default="1")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="auto (bfloat16 where it is fast), float32, bfloat16 or float16; weights and optimizer stay float32.",
            rich_help_panel=TRAIN,
            show_default="auto",
        ),
    ] = None,
    save_steps: Annotated[
        int | None,
        typer.Option(help="Steps between two saved states.", rich_help_panel=TRAIN, show_default="an epoch"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of order, dropout and a new head.", rich_help_panel=o.RUN, show_default="42")
    ] = None,
    device: o.Device = "auto",
    max_shard_size: o.MaxShardSize = "5GB",
    resume: o.Resume = "auto",
    overwrite: o.Overwrite = False,
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Train U, V and S on a task, S losing its least important neurons on the way.

    A dense model begins lossless and ends at --keep-parameters; a compressed one keeps its S, or loses more.

    [dim]losparse finetune user/model --task text-classification --train-file train.csv --validation-file dev.csv[/dim]
    """
    from ...budget.recipe import make_recipe
    from ...finetuning.recipes import settings

    given = settings(recipe, {name: value for name, value in locals().items() if value is not None})
    sizes = ("rank", "rank_ratio", "sparsity", "keep_parameters", "pattern")
    size = make_recipe(
        {name: given.get(name) for name in sizes}
        | {"pattern": given.get("pattern", "rows"), "targets": tuple(targets or ()), "ignore": tuple(ignore or ())}
    )
    request = o.task_request(given, objective=objective)
    from ...finetune import run
    from ...finetuning.prepare import prepare_finetuning
    from ...finetuning.pruner import Pruning
    from ...finetuning.request import Finetuning
    from ...parallel.launch import is_first
    from .. import console as c
    from .. import summary as s
    from ..training_progress import TrainingProgress

    pruning = {"importance": "importance", "threshold": "threshold", "beta": "beta", "prune_every": "every",
               "initial_warmup_steps": "initial_warmup", "final_warmup_steps": "final_warmup"}  # fmt: skip
    how = Finetuning(
        **{name: given[name] for name in Finetuning.__dataclass_fields__ if name in given and name != "pruning"},
        pruning=Pruning(**{field: given[name] for name, field in pruning.items() if name in given}),
    )
    out = c.Console(json=json, quiet=quiet or not is_first())
    c.calm_libraries()
    with c.interruptible(), TrainingProgress(out) as progress:
        training = prepare_finetuning(
            source,
            output,
            task=request,
            how=how,
            recipe=size,
            device=device,
            overwrite=overwrite,
            revision=revision,
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
            max_shard_size=max_shard_size,
            progress=progress,
        )
        progress.introduce(training)
        result = run(training, resume=resume, overwrite=overwrite, progress=progress)
    s.show_finetuned(out, result)
    out.flush()
