"""Option types that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..budget.recipe import DEFAULT_ITERATIONS, MANY_ITERATIONS, MANY_KEPT, Recipe
from ..errors import UsageError
from ..tasks.request import TaskRequest

if TYPE_CHECKING:
    pass

SIZE, TEXT, RUN, HUB, SHOW = "Size", "Calibration", "Run", "Hub", "Output"
DATA = "Data"

Source = Annotated[str, typer.Argument(help="A folder, or a Hub id such as user/name.", show_default=False)]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub model.", rich_help_panel=HUB, show_default=False)
]
CacheDir = Annotated[
    Path | None, typer.Option(help="Where Hub downloads are kept.", rich_help_panel=HUB, show_default=False)
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the model's own Python code.", rich_help_panel=HUB)
]
MaxShardSize = Annotated[str, typer.Option(help="Largest weight file to write.", rich_help_panel=RUN)]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show the plan and what it needs; write nothing.", rich_help_panel=RUN)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.", rich_help_panel=RUN)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to standard output.", rich_help_panel=SHOW)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=SHOW)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=SHOW)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=RUN)]
Threads = Annotated[
    int | None,
    typer.Option(help="Threads that torch computes with.", rich_help_panel=RUN, show_default="those of torch"),
]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16 or float16.", rich_help_panel=RUN)]
RecipeDevice = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=RUN, show_default="auto")
]
RecipeShardSize = Annotated[
    str | None, typer.Option(help="Largest weight file to write.", rich_help_panel=RUN, show_default="5GB")
]
"""Options that a recipe may hold, too, so that they tell whether they were given."""
Resume = Annotated[str, typer.Option(help="Go on with a killed run: auto, required or never.", rich_help_panel=RUN)]
MemoryLimit = Annotated[
    str | None,
    typer.Option(
        help="Such as 8GB: calibration keeps its activations in files beyond it.",
        rich_help_panel=RUN,
        show_default="3/4 of what is free",
    ),
]


def number_or_word(text: str | None) -> float | str | None:
    """The number that an option was given, or the word."""
    try:
        return None if text is None else float(text)
    except ValueError:
        return text


def by_calibration(name: str, values: str = "float") -> str:
    """The default of a field of the recipe for S of such values: without calibration text, and with it."""
    recipe = Recipe(values=values)
    plain, calibrated = (getattr(recipe.settled(calibrated=text), name) for text in (False, True))
    return f"{'of floats ' if values == 'float' else ''}{plain}; with --calibration {calibrated}"


ITERATIONS = ", ".join(f"{solver} {count}" for solver, count in DEFAULT_ITERATIONS.items()) + (
    f", or {MANY_ITERATIONS} where {MANY_KEPT:g} or more is kept"
)
NAMES = "by name (q_proj), glob, class (Linear) or re:EXPRESSION; with commas, or repeated."
Targets = Annotated[
    list[str] | None, typer.Option(help=f"Layers to compress, {NAMES}", rich_help_panel=SIZE, show_default="all")
]
Ignore = Annotated[
    list[str] | None, typer.Option(help=f"Layers to leave dense, {NAMES}", rich_help_panel=SIZE, show_default=False)
]

CalibrationSource = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help="Text to calibrate with: a file (plain text, .jsonl, .csv, .tsv, .parquet), a Hub dataset (user/name or "
        "user/name:config), or the word self: a language model writes its own. Rows of JSON may name images.",
        rich_help_panel=TEXT,
        show_default=False,
    ),
]
CalibrationTokens = Annotated[
    int | None, typer.Option(help="About how many tokens.", rich_help_panel=TEXT, show_default="65536")
]
CalibrationLength = Annotated[
    int | None,
    typer.Option(
        help="Tokens of a window; of a row in a file with images, at most.",
        rich_help_panel=TEXT,
        show_default="512, 2048 with images, or what the model takes",
    ),
]
CalibrationField = Annotated[
    str | None, typer.Option(help="Field or column with the text.", rich_help_panel=TEXT, show_default="text")
]
CalibrationImageField = Annotated[
    str | None,
    typer.Option(
        help="Field with the path of an image, or a list of them, within the folder of a file of rows.",
        rich_help_panel=TEXT,
        show_default="image, of JSON",
    ),
]
CalibrationTargetField = Annotated[
    str | None,
    typer.Option(
        help="Of an encoder-decoder model: field with what it is to say.",
        rich_help_panel=TEXT,
        show_default="the text itself",
    ),
]
CalibrationSplit = Annotated[
    str | None, typer.Option(help="Split of a Hub dataset.", rich_help_panel=TEXT, show_default="train")
]
RefineSteps = Annotated[
    int | None,
    typer.Option(
        help="Batches that a block is trained on; steps of a whole model.",
        rich_help_panel=TEXT,
        show_default="192 of floats, 48 of whole numbers; as many as there is time for",
    ),
]
RefineMinutes = Annotated[
    float | None,
    typer.Option(help="How long a whole model is trained.", rich_help_panel=TEXT, show_default="20"),
]
RefineTokens = Annotated[
    int | None,
    typer.Option(help="Tokens of a step of a whole model.", rich_help_panel=TEXT, show_default="1024"),
]
REFINE_CHECKPOINTING = "less memory, more time, the same result; done anyway where memory is short."
REFINE_PRECISION = "auto (bfloat16 where it is fast), float32 or bfloat16; loss and what is trained stay float32."
RefineRate = Annotated[
    float | None,
    typer.Option(
        help="Learning rate at its peak.", rich_help_panel=TEXT, show_default="5e-4; of blocks of whole numbers 1e-3"
    ),
]

Task = Annotated[
    str | None,
    typer.Option(
        help="text-classification, question-answering, summarization, seq2seq or causal-lm.",
        rich_help_panel=DATA,
        show_default=False,
    ),
]


def _data(kind: Any, text: str, default: str | bool = False) -> Any:
    return Annotated[kind, typer.Option(help=text, rich_help_panel=DATA, show_default=default)]


TrainFile = _data(str | None, "Rows to train on: .jsonl, .json, .csv, .tsv, .parquet; of causal-lm .txt, too.")
ValidationFile = _data(str | None, "Rows to score on.")
DatasetName = _data(str | None, "Dataset of the Hub, in place of files.")
DatasetConfigName = _data(str | None, "Its configuration.")
TrainSplit = _data(str | None, "Its split to train on.", TaskRequest.train_split)
ValidationSplit = _data(str | None, "Its split to score on.", TaskRequest.validation_split)
TextColumn = _data(str | None, "Column with the text.", "by its usual names")
TextPairColumn = _data(str | None, "Column with a second text.", "by its usual names")
LabelColumn = _data(str | None, "Column with labels, or with numbers to predict.", "label")
QuestionColumn = _data(str | None, "Column with questions.", "question")
ContextColumn = _data(str | None, "Column with the texts that hold the answers.", "context")
AnswersColumn = _data(str | None, "Column with answers, in SQuAD's form.", "answers")
SummaryColumn = _data(str | None, "Column with what is to be written.", "by its usual names")
SourcePrefix = _data(str | None, "Put before every text, as T5 wants it.")
MaxLength = _data(int | None, "Tokens of an input.", "by the task")
MaxTargetLength = _data(int | None, "Tokens of what is written.", str(TaskRequest.max_target_length))
DocStride = _data(int | None, "Tokens that two windows of a context share.", str(TaskRequest.doc_stride))
NBest = _data(int | None, "Starts and ends of answers that are combined.", str(TaskRequest.n_best))
MaxAnswerLength = _data(int | None, "Tokens of an answer.", str(TaskRequest.max_answer_length))
NumBeams = _data(int | None, "Of the search by which text is written.", str(TaskRequest.num_beams))
MaxTrainSamples = _data(int | None, "Train on so many rows.", "all")
MaxValidationSamples = _data(int | None, "Score on so many rows.", "all")


def task_request(given: dict[str, Any], *, objective: str = "task") -> TaskRequest:
    """What --task and the options of its data ask for; UsageError if they contradict one another."""
    from ..tasks.request import TASKS

    fields = {name: given[name] for name in TaskRequest.__dataclass_fields__ if given.get(name) is not None}
    if "task" not in fields:
        if objective != "distill":
            raise UsageError(f"Say what to learn: add --task, one of {', '.join(TASKS)}.")
        fields["task"] = "causal-lm"  # the predictions of a language model on plain text
    return TaskRequest(**fields)
