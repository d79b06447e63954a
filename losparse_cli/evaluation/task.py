"""A model and the rows of a task -> its scores, beside the dense model's, with standard errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.source import Checkpoint
from ..errors import UsageError
from ..load import load
from ..models.device import find_device, memory_errors, release
from ..parallel.group import Ranks, ranks
from ..progress import Progress, listener
from ..tasks.kinds import open_task
from ..tasks.paired import RESAMPLES, Estimate
from ..tasks.request import TaskRequest, make_task
from ..tasks.rows import Rows, read_rows
from ..tasks.task import Judged
from .figures import plain
from .models import DTYPES, check_batch_size, check_choice, dtype_of, open_models


@dataclass(frozen=True)
class TaskProtocol:
    """How a TaskEvaluation came about.

    data: the file or dataset. unit, units: what standard errors count as independent, rows or windows, and how many.
    bootstrapped: the scores whose standard errors come from `resamples` resamples of the rows, drawn by `seed`.
    """

    task: str
    data: str
    unit: str
    units: int
    batch_size: int
    device: str
    dtype: str
    seed: int
    resamples: int
    bootstrapped: tuple[str, ...]

    def __str__(self) -> str:
        """The protocol in a sentence, for beneath a table."""
        said = (
            f"{self.units:,} {self.unit} of {self.data}, {self.batch_size} at once, {self.dtype} on {self.device}; "
            f"standard errors count {self.unit} as independent"
        )
        if self.bootstrapped:
            names = " and ".join(self.bootstrapped)
            said += f", those of {names} by a bootstrap of {self.resamples:,} resamples of the {self.unit} (seed "
            said += f"{self.seed})"
        return said + "."


@dataclass(frozen=True)
class TaskEvaluation:
    """Scores of one model on the rows of a task, and beside a dense one.

    nbytes: of all tensors on disk. scores: by name, the main one first; shares and correlations as fractions of 1,
    loss in nats a token. differences: of ours less dense, with the paired standard error; None without a dense model.
    """

    model: str
    nbytes: int
    main_score: str
    protocol: TaskProtocol
    scores: dict[str, Estimate]
    dense: str | None = None
    dense_nbytes: int | None = None
    dense_scores: dict[str, Estimate] | None = None
    differences: dict[str, Estimate] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: a figure that is not finite is None."""
        return {key: plain(value) for key, value in asdict(self).items()}


def evaluate_task(
    source: str | Path,
    request: TaskRequest | Mapping[str, Any],
    *,
    against: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 32,
    revision: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> TaskEvaluation:
    """Scores of the model `source` on the validation rows of `request`; with `against`, of that dense model too.

    The models run one after the other, and are never both in memory. Of several processes each asks them about its
    share of the rows. Standard errors count rows (of causal-lm,
    windows) as independent, and pair them in the difference. Scores that belong to no single row (f1 and matthews of
    classes, pearson, spearman) have theirs from a bootstrap over rows, seeded by the request. `dtype` is auto (as
    stored), float32 or bfloat16; `revision` is that of `source`.

    UsageError on a model without a trained head for the task, rows that do not fit it, and models that do not belong
    together; SourceError and CheckpointError on what cannot be read; MissingExtraError without the packages that
    compute scores.
    """
    group, request = ranks(), make_task(request)
    told = listener(progress if group.rank == 0 else None)
    check_choice("--dtype", dtype, DTYPES)
    check_batch_size(batch_size)
    place = find_device(device)
    open_task(request)  # a missing package is said before anything is read
    ours, dense = open_models(source, against, revision=revision, cache_dir=cache_dir)
    rows = read_rows(request, "validation")
    run = _Run(request, rows, place, DTYPES[dtype], batch_size, trust_remote_code, told, group)
    mine, main_score, precision = run.judge(ours)
    release(place)
    protocol = TaskProtocol(
        request.task, rows.name, mine.unit, mine.units, batch_size, str(place), precision, request.seed, RESAMPLES,
        tuple(name for name, score in mine.scores.items() if not score.by_row),
    )  # fmt: skip
    scores = {name: score.estimate() for name, score in mine.scores.items()}
    if dense is None:
        return TaskEvaluation(ours.address, ours.nbytes, main_score, protocol, scores)
    theirs, *_ = run.judge(dense)
    release(place)
    _check_alike(mine, theirs, ours, dense)
    return TaskEvaluation(
        ours.address, ours.nbytes, main_score, protocol, scores, dense.address, dense.nbytes,
        {name: theirs.scores[name].estimate() for name in scores},
        {name: score.less(theirs.scores[name]).estimate() for name, score in mine.scores.items()},
    )  # fmt: skip


@dataclass(frozen=True)
class _Run:
    request: TaskRequest
    rows: Rows
    device: torch.device
    dtype: torch.dtype | None
    batch_size: int
    trust_remote_code: bool
    told: Progress
    group: Ranks

    def judge(self, checkpoint: Checkpoint) -> tuple[Judged, str, str]:
        """(scores, the main one, dtype); the model is gone afterwards."""
        task = open_task(self.request)
        options = {"trust_remote_code": True} if self.trust_remote_code else {}
        head = task.head(checkpoint.address, trained=True)
        model, tokenizer = load(
            checkpoint.folder, model_class=head, dtype=self.dtype or "auto", need_tokenizer=True, **options
        )
        task.check_model(model)
        task.check(self.rows, model.config)
        features = task.prepare(self.rows, tokenizer, model, training=False)
        self.told.phase(checkpoint.name)
        self.told.start("rows", len(features))
        heard = 0

        def hear(done: int, total: int) -> None:
            nonlocal heard
            self.told.advance("rows", done - heard, checkpoint.name)
            heard = done

        with memory_errors("Lower --batch-size."):
            predicted = task.predict(
                model.to(self.device), tokenizer, features, batch_size=self.batch_size, device=self.device,
                on_batch=hear, group=self.group,
            )  # fmt: skip
            judged = task.judge(predicted, features)
        return judged, task.main_score, dtype_of(model)


def _check_alike(mine: Judged, theirs: Judged, ours: Checkpoint, dense: Checkpoint) -> None:
    """UsageError if the two were asked different things, so that rows cannot be paired."""
    if mine.truth is None or theirs.truth is None:
        return
    same = mine.truth.dtype == theirs.truth.dtype and torch.equal(mine.truth, theirs.truth)
    if not same:
        what = "cut the text into different tokens" if mine.unit == "windows" else "number the labels differently"
        raise UsageError(
            f"{ours.address} and {dense.address} {what}. Give the dense model that the first was made from."
        )
