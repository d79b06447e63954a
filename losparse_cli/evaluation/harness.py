"""A model and names of tasks -> what EleutherAI's evaluation harness (lm_eval) says, beside the dense model."""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import importlib.metadata
import io
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.source import Checkpoint
from ..errors import MissingExtraError, SourceError, UsageError, reason_of
from ..load import load
from ..models.device import find_device, memory_errors, release
from ..parallel.group import require_alone
from ..progress import Progress, listener
from ..text.tokenizer import positions
from .figures import plain
from .harness_scores import RESAMPLES, SEED, Estimates, differences, estimates
from .models import DTYPES, check_batch_size, check_choice, dtype_of, open_models

_LEFT_OUT = ("get_git_commit_hash", "add_env_info")
"""Of the harness's report: it asks git about the folder one happens to be in, which complains aloud where there is
nothing to say, and pip about every package, for seconds."""


@dataclass(frozen=True)
class HarnessProtocol:
    """How a HarnessEvaluation came about.

    documents, shots: by task, how many were scored, and how many examples came before each. limit: of documents.
    harness: the version of lm_eval.
    """

    documents: dict[str, int]
    shots: dict[str, int]
    limit: int | None
    batch_size: int
    device: str
    dtype: str
    harness: str

    def __str__(self) -> str:
        """The protocol in a sentence, for beneath a table."""
        counts = [f"{name} {count:,} ({self.shots.get(name, 0)}-shot)" for name, count in self.documents.items()]
        few = [*counts[:6], f"{len(counts) - 6} more"] if len(counts) > 7 else counts
        return (
            f"lm_eval {self.harness}; documents: {', '.join(few)}; {self.batch_size} at once, {self.dtype} on "
            f"{self.device}; standard errors count documents as independent."
        )


@dataclass(frozen=True)
class HarnessEvaluation:
    """What the harness says of one model, and beside a dense one.

    nbytes: of all tensors on disk. differences: of ours less dense, paired by document; the error is None where the
    harness does not say what a score was of each document. Those are None without a dense model.
    """

    model: str
    nbytes: int
    protocol: HarnessProtocol
    scores: Estimates
    dense: str | None = None
    dense_nbytes: int | None = None
    dense_scores: Estimates | None = None
    differences: Estimates | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: a figure that is not finite is None."""
        return {key: plain(value) for key, value in asdict(self).items()}


def evaluate_harness(
    source: str | Path,
    tasks: Sequence[str] | str,
    *,
    path: str | Path | None = None,
    limit: int | None = None,
    against: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 8,
    revision: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    bars: bool = False,
    progress: Progress | None = None,
) -> HarnessEvaluation:
    """The harness's `tasks`, names or patterns such as mmlu_*, on the language model `source`; and on `against`.

    path: a folder with definitions of tasks (YAML), which come before the harness's own; files that they name lie
    where they say from here, or from that folder. limit: documents of each task. The models run one after the other,
    and are never both in memory; `progress` hears the name of each before it runs, and `bars` lets the harness show
    how far it is, on standard error.

    MissingExtraError without lm_eval; UsageError with several processes, on a task that is not known, a definition that
    the harness refuses, and a model that writes no text; SourceError on what cannot be read.
    """
    require_alone("The evaluation harness")
    told = listener(progress)
    for package in ("lm_eval", "accelerate"):  # of which the harness says that it may do without the second
        if find_spec(package) is None:
            raise MissingExtraError(package, "lm-eval", "The evaluation harness")
    check_choice("--dtype", dtype, DTYPES)
    check_batch_size(batch_size)
    if limit is not None and limit < 1:
        raise UsageError(f"--lm-eval-limit is a whole number >= 1, not {limit}.")
    folder = None if path is None else Path(path).expanduser().resolve()
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--lm-eval-path {path} is no folder. Give the one with the definitions of tasks (YAML).")
    place = find_device(device)
    manager, names = find_tasks([tasks] if isinstance(tasks, str) else tasks, folder)
    ours, dense = open_models(source, against, revision=revision, cache_dir=cache_dir)
    run = _Run(manager, names, folder, limit, place, DTYPES[dtype], batch_size, trust_remote_code, bars)
    told.phase(ours.name)
    mine, precision = run.results(ours)
    release(place)
    protocol = HarnessProtocol(
        {name: count["effective"] for name, count in mine["n-samples"].items()},
        {name: mine["n-shot"].get(name) or 0 for name in mine["n-samples"]},
        limit, batch_size, str(place), precision, importlib.metadata.version("lm_eval"),
    )  # fmt: skip
    if dense is None:
        return HarnessEvaluation(ours.address, ours.nbytes, protocol, estimates(mine))
    told.phase(dense.name)
    theirs, _ = run.results(dense)
    release(place)
    with _quiet():
        gaps = differences(mine, theirs)
    return HarnessEvaluation(
        ours.address, ours.nbytes, protocol, estimates(mine), dense.address, dense.nbytes, estimates(theirs), gaps
    )


def find_tasks(asked: Sequence[str], folder: Path | None) -> tuple[Any, list[str]]:
    """The harness's TaskManager, and the names that were asked for; UsageError, with like names, for an unknown one."""
    from lm_eval.tasks import TaskManager

    wanted = [name for name in (part.strip() for part in asked) if name]
    if not wanted:
        raise UsageError("--lm-eval names no task. Give names with commas between them, such as arc_easy,hellaswag.")
    # There are thousands of the harness's own, which take seconds to look through.
    for defaults in (False, True) if folder is not None else (True,):
        with _quiet():
            manager = TaskManager(include_path=None if folder is None else str(folder), include_defaults=defaults)
        known = manager.all_tasks
        found = {name: [name] if name in known else fnmatch.filter(known, name) for name in wanted}
        if all(found.values()):
            break
    for name, matches in found.items():
        if not matches:
            near = difflib.get_close_matches(name, known, n=3)
            remedy = f"Did you mean {', '.join(near)}?" if near else "Check the name."
            where = "" if folder is None else f", and {folder} defines none either"
            own = " Your own come with --lm-eval-path FOLDER." if folder is None else ""
            raise UsageError(f"The harness has no task {name!r}{where}. {remedy}{own}")
    return manager, list(dict.fromkeys(name for matches in found.values() for name in matches))


# --- one run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    manager: Any
    tasks: list[str]
    folder: Path | None
    limit: int | None
    device: torch.device
    dtype: torch.dtype | None
    batch_size: int
    trust_remote_code: bool
    bars: bool

    def results(self, checkpoint: Checkpoint) -> tuple[dict[str, Any], str]:
        """What simple_evaluate returns, and the model's dtype; the model is gone afterwards."""
        from lm_eval.models.huggingface import HFLM

        options = {"trust_remote_code": True} if self.trust_remote_code else {}
        model, tokenizer = load(checkpoint.folder, dtype=self.dtype or "auto", need_tokenizer=True, **options)
        if not model.can_generate():
            raise UsageError(
                f"{checkpoint.address} predicts no next token, so the harness cannot ask it. Give a language model, "
                "or score it with --task."
            )
        with _quiet(self.bars), memory_errors("Lower --batch-size."):
            lm = HFLM(
                pretrained=model.to(self.device), tokenizer=tokenizer, batch_size=self.batch_size,
                max_length=positions(model),
            )  # fmt: skip
            return self._ask(lm), dtype_of(model)

    def _ask(self, lm: Any) -> dict[str, Any]:
        from datasets.exceptions import DatasetsError
        from jinja2 import TemplateError

        asked = ", ".join(self.tasks)
        # The harness looks for files that a definition names where a command runs; most lie beside the definition.
        places = [None] if self.folder is None else [None, self.folder]
        for place in places:
            try:
                with contextlib.nullcontext() if place is None else contextlib.chdir(place):
                    return self._evaluate(lm)
            except (OSError, DatasetsError) as error:
                if place is places[-1] or not isinstance(error, FileNotFoundError):
                    raise SourceError(
                        f"The harness cannot read the data of {asked}: {_reason(error)}. Check the network, or the "
                        "files that the definition names."
                    ) from error
            except (ValueError, KeyError, TypeError, TemplateError) as error:
                raise UsageError(
                    f"The harness refuses {asked}: {_reason(error)}. Name other tasks, or correct the definition."
                ) from error
        raise AssertionError("the last place returns or raises")

    def _evaluate(self, lm: Any) -> dict[str, Any]:
        from lm_eval import simple_evaluate

        os.environ.setdefault("DISABLE_MULTIPROC", "1")  # it would fork a process with threads for few resamples
        found: dict[str, Any] = simple_evaluate(
            lm, tasks=list(self.tasks), task_manager=self.manager, limit=self.limit, batch_size=self.batch_size,
            bootstrap_iters=RESAMPLES, log_samples=True, random_seed=SEED, numpy_random_seed=SEED,
            torch_random_seed=SEED, fewshot_random_seed=SEED,
        )  # fmt: skip
        return found


def _reason(error: Exception) -> str:
    said = reason_of(error)
    return said if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {said}"


@contextlib.contextmanager
def _quiet(bars: bool = False) -> Iterator[None]:
    """Without what the harness says, but for its bars if they are asked for."""
    import datasets
    from lm_eval import evaluator

    logger = logging.getLogger("lm_eval")
    level, shown = logger.level, datasets.is_progress_bar_enabled()
    left_out = {name: getattr(evaluator, name) for name in _LEFT_OUT if hasattr(evaluator, name)}
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    for name in left_out:
        setattr(evaluator, name, lambda *arguments: None)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))  # that is for results
            if not bars:
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, function in left_out.items():
            setattr(evaluator, name, function)
        logger.setLevel(level)
        if shown:
            datasets.enable_progress_bars()
