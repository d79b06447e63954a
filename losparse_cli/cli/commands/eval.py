"""`losparse eval`: its signature, what may be asked together, then one call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ...errors import UsageError, flag
from ...parallel.launch import is_first
from ...tasks.request import TaskRequest
from .. import options as o

if TYPE_CHECKING:
    from ...evaluate import Evaluation, HarnessEvaluation, TaskEvaluation

HARNESS = "Evaluation harness"

_MODES = {"text": "--text FILE", "task": "--task TASK", "lm_eval": "--lm-eval TASKS"}
_OF = {
    "length": ("text",),
    "stride": ("text",),
    "windows": ("text",),
    "memory": ("text",),
    "batch_size": ("task", "lm_eval"),
    "lm_eval_path": ("lm_eval",),
    "lm_eval_limit": ("lm_eval",),
    **{name: ("task",) for name in TaskRequest.__dataclass_fields__ if name != "task"},
}
"""Option -> what it belongs to; others belong to all."""
_INSTEAD = {
    ("length", "task"): "Give --max-length, the tokens of an input.",
    ("windows", "task"): "Give --max-validation-samples, for the unit is a row.",
    ("windows", "lm_eval"): "Give --lm-eval-limit.",
    ("memory", "task"): "The models run one after the other: leave it out.",
    ("memory", "lm_eval"): "The models run one after the other: leave it out.",
    ("max_validation_samples", "lm_eval"): "Give --lm-eval-limit.",
    ("max_validation_samples", "text"): "Give --windows.",
}


def eval_(
    source: o.Source,
    text: Annotated[Path | None, typer.Option(help="UTF-8 file to measure perplexity on.", show_default=False)] = None,
    task: o.Task = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            help="Tasks of the evaluation harness (lm_eval), with commas between them.",
            rich_help_panel=HARNESS,
            show_default=False,
        ),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="The dense model to compare with: a folder or a Hub id.", show_default=False)
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(
            help="Tokens in a window of --text; of an encoder, the most of a line.",
            show_default="512, or what the model takes",
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="New tokens in a window, which alone are predicted.", show_default="windows are disjoint"),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(help="Windows, or an encoder's lines, to measure; 0 for all.", show_default="32"),
    ] = None,
    validation_file: o.ValidationFile = None,
    dataset_name: o.DatasetName = None,
    dataset_config_name: o.DatasetConfigName = None,
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
    max_validation_samples: o.MaxValidationSamples = None,
    lm_eval_path: Annotated[
        Path | None,
        typer.Option(
            help="Folder with definitions of tasks (YAML) of your own.", rich_help_panel=HARNESS, show_default=False
        ),
    ] = None,
    lm_eval_limit: Annotated[
        int | None,
        typer.Option(help="Score so many documents of each task.", rich_help_panel=HARNESS, show_default="all"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Rows, or the harness's requests, at once.",
            rich_help_panel=o.RUN,
            show_default="32; with --lm-eval 8",
        ),
    ] = None,
    record: Annotated[
        bool, typer.Option("--record", help="Keep the figures in the checkpoint's folder, and show them on its card.")
    ] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Of rows that are drawn, and of resamples for standard errors.",
            rich_help_panel=o.RUN,
            show_default="42",
        ),
    ] = None,
    device: o.Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32 or bfloat16.", rich_help_panel=o.RUN)] = "auto",
    memory: Annotated[
        str | None,
        typer.Option(
            help="With --text and --against: hold both models together, or apart, with the first one's predictions in "
            "a temporary folder; auto asks whether they fit.",
            rich_help_panel=o.RUN,
            show_default="auto",
        ),
    ] = None,
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Measure a model, beside the dense one: perplexity on a text, scores of a task, or the evaluation harness.

    Give exactly one of --text, --task and --lm-eval. Every figure comes with its standard error.

    [dim]losparse eval model-small --against user/model --text news.txt[/dim]

    [dim]losparse eval model-small --against user/model --task text-classification --validation-file dev.csv[/dim]
    """
    given = {name: value for name, value in locals().items() if value is not None}
    mode = _mode(given)
    if record:
        from ...evaluate import require_recordable

        require_recordable(Path(source).expanduser())
    found: Evaluation | TaskEvaluation | HarnessEvaluation
    from .. import console as c
    from .. import evaluation_tables as tables

    out = c.Console(json=json and is_first(), quiet=quiet or not is_first())
    c.calm_libraries()
    shared: dict[str, Any] = {
        "against": against, "device": device, "dtype": dtype, "revision": revision, "cache_dir": cache_dir,
        "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    own = {name: given[name] for name in ("length", "stride", "windows", "memory", "batch_size") if name in given}
    if mode == "text":
        from ...evaluate import evaluate

        with c.CountProgress(out, "Evaluating") as progress:
            found = evaluate(source, given["text"], progress=progress, **shared, **own)
        tables.show_evaluation(out, found)
        on = Path(given["text"]).name
    elif mode == "task":
        if not {"validation_file", "dataset_name"} & given.keys():
            raise UsageError("--task needs rows to score on. Give --validation-file, or --dataset-name.")
        request = o.task_request(given)
        from ...evaluate import evaluate_task

        with c.CountProgress(out, "Scoring") as progress:
            found = evaluate_task(source, request, progress=progress, **shared, **own)
        tables.show_task_evaluation(out, found)
        on = f"{request.task} ({request.dataset_name or Path(given['validation_file']).name})"
    else:
        from ...evaluate import evaluate_harness

        shown = out.err.is_terminal and not out.quiet  # the harness's own bars: how far it is, nobody else knows
        found = evaluate_harness(
            source,
            given["lm_eval"].split(","),
            path=lm_eval_path,
            limit=lm_eval_limit,
            bars=shown,
            progress=c.Phases(out) if shown else None,
            **shared,
            **own,
        )
        tables.show_harness_evaluation(out, found)
        on = f"lm_eval {given['lm_eval']}"
    out.data(found.to_dict())
    if record and is_first():
        from ...evaluate import keep

        keep(source, on, found)
        out.say("Kept in the folder, and shown on its card.")
    out.flush()


def _mode(given: dict[str, Any]) -> str:
    """What to measure on; UsageError if that is not one thing, or if an option belongs to another."""
    modes = [name for name in _MODES if name in given]
    if len(modes) != 1:
        said = "nothing" if not modes else " and ".join(map(flag, modes))
        raise UsageError(f"Say what to measure on: give exactly one of {', '.join(_MODES.values())}, not {said}.")
    mode = modes[0]
    for name in given:
        users = _OF.get(name, (mode,))
        if mode not in users:
            instead = _INSTEAD.get((name, mode), "Leave it out.")
            raise UsageError(f"{flag(name)} is of {' and '.join(map(flag, users))}, not of {flag(mode)}. {instead}")
    return mode
