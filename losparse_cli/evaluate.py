"""A model and a text -> how well it does, and how far it is from the dense model, with standard errors."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .checkpoint.measured import record, require_recordable
from .checkpoint.source import Checkpoint
from .errors import OutputError, UsageError, write_errors
from .evaluation.figures import Evaluation, Protocol, with_figures
from .evaluation.harness import HarnessEvaluation, evaluate_harness
from .evaluation.models import DTYPES, check_choice, dtype_of, fit_together, open_models
from .evaluation.scores import Scores, Sums, Vector, compare, embed, exponential, score
from .evaluation.task import TaskEvaluation, evaluate_task
from .evaluation.windows import Cut, Line, Window, cut, lines
from .load import load
from .models.device import find_device, release
from .models.reading import TEXT_MODELS, cannot_be_run, require_text
from .parallel.group import Ranks, ranks
from .parallel.shares import share
from .progress import Progress, listener
from .tasks.paired import Estimate
from .text.files import find_file, read_pieces
from .text.request import LENGTH
from .text.tokenizer import check_tokens, length_limit

MEMORY = ("auto", "together", "apart")
FILE_NAME = re.compile(r"^\S+\.[A-Za-z]\w{0,5}$|\.(txt|text|md|jsonl?|csv|tsv|parquet)$", re.IGNORECASE)
"""A line that ends as a file's name does, and holds no space or ends as texts do."""

__all__ = [
    "Evaluation",
    "HarnessEvaluation",
    "Perplexity",
    "TaskEvaluation",
    "evaluate",
    "evaluate_harness",
    "evaluate_task",
    "keep",
    "perplexity",
    "require_recordable",
]


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood a token, in nats; tokens counts predictions."""

    value: float
    tokens: int
    length: int


def evaluate(
    source: str | Path,
    text: str | Path,
    *,
    against: str | Path | None = None,
    length: int | None = None,
    stride: int | None = None,
    windows: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    memory: str = "auto",
    revision: str | None = None,
    cache_dir: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Evaluation:
    """Perplexity of a language model on `text`; with `against`, its distance from that dense model too.

    text: itself, or a UTF-8 file (a Path, or the name of one), of which no more is read than is needed. Windows of
    `length` tokens (default: 512, or what the model takes) are cut as `losparse_cli.evaluation.windows.cut` says:
    `windows` of them (0: all), `stride` new tokens each (default: they are disjoint). A model with an encoder and a
    decoder reads a window and predicts it again. A model that predicts no next token is compared by its vectors of the
    first `windows` lines, and needs `against`.

    Of several processes each looks at its share of the windows, and all return the same. Standard errors count
    windows, or lines, as independent, not tokens; with a single one they are None. `memory`
    says whether both models are held at once ("together"), or the dense one runs first and leaves its predictions in
    a temporary folder, two bytes for each token and vocabulary entry ("apart"); "auto" asks whether they fit. `dtype`
    is auto (as stored), float32 or bfloat16. `revision` is that of `source`.

    UsageError on a text that is not there or shorter than a window, options that contradict the model, or models of
    different vocabularies; SourceError if text or checkpoint cannot be read, or has no tokenizer; OutputError if the
    temporary folder is too small.
    """
    group = ranks()
    told = listener(progress if group.rank == 0 else None)
    check_choice("--dtype", dtype, DTYPES)
    check_choice("--memory", memory, MEMORY)
    if memory != "auto" and against is None:
        raise UsageError(f"--memory {memory} is about two models. Add --against DENSE, or leave it out.")
    place = find_device(device)
    text = _file_or_text(text)
    ours, dense = open_models(source, against, revision=revision, cache_dir=cache_dir)
    if dense is None:
        memory = "alone"
    else:
        ours.check_vocabulary(dense)
        if memory == "auto":
            logits = (length or LENGTH) * (ours.vocabulary or 0)
            memory = "together" if fit_together((dense, ours), DTYPES[dtype], logits, place) else "apart"
        memory = group.agree(memory)[0]
    request = _Request(text, length, stride, windows, place, DTYPES[dtype], trust_remote_code)
    with group.at_work():
        subject, sums = _run(request, ours, dense, memory, told, group)
    protocol = Protocol(
        subject.length, subject.cut.stride, len(sums), sum(s.tokens for s in sums), subject.cut.before, str(place),
        subject.dtype, memory,
    )  # fmt: skip
    base = Evaluation(ours.address, subject.kind, ours.nbytes, protocol)
    if dense is not None:
        base = replace(base, dense=dense.address, dense_nbytes=dense.nbytes)
    return with_figures(base, sums)


def keep(folder: str | Path, on: str, found: Evaluation | TaskEvaluation | HarnessEvaluation) -> None:
    """Keep figures beside the checkpoint in `folder` that they were measured of, and show them on its card.

    on: what they were measured on, such as a file's name. Raises as `checkpoint.measured.record`.
    """
    # What is kept goes wherever the checkpoint goes, and there folders of this machine say nothing.
    found = replace(found, model="", dense=found.dense and _without_folders(found.dense))
    if isinstance(found, TaskEvaluation):
        found = replace(found, protocol=replace(found.protocol, data=_without_folders(found.protocol.data)))
    record(Path(folder).expanduser(), on, str(found.protocol), found.to_dict())


def _without_folders(name: str) -> str:
    """The last part of a path that is there; a Hub id as it is."""
    return Path(name).name if Path(name).exists() else name


def perplexity(
    model: Any,
    tokenizer: Any,
    text: str | Path,
    *,
    length: int = 512,
    windows: int = 8,
) -> Perplexity:
    """Perplexity of a causal language model on the first `windows` disjoint windows of `length` tokens of `text`.

    Every window starts with the special tokens that the tokenizer begins a text with, which are not predicted; if
    there are none, its first token is not. UsageError if the text is shorter than one window.
    """
    total, predicted = 0.0, 0
    units = cut(tokenizer, text, length=length, count=windows).units
    for window in units:
        assert isinstance(window, Window)
        total -= float(score(model, window).likelihood.double().sum())
        predicted += window.scored
    return Perplexity(exponential(Estimate(total / predicted, None)).value, predicted, length)


def _file_or_text(text: str | Path) -> str | Path:
    """The file that `text` names, or the text that it is; what looks like a file's name is meant as one.

    UsageError if there is no such file, or nothing in it; SourceError if what comes first in it is unreadable.
    """
    short = isinstance(text, str) and len(text) < 4096 and "\n" not in text and "\0" not in text
    if isinstance(text, str) and not (short and (FILE_NAME.search(text) or os.path.isfile(os.path.expanduser(text)))):
        return text
    text = Path(os.path.expanduser(text))
    if not any(piece.strip() for piece in read_pieces(find_file(text, "--text"))):
        raise UsageError(f"{text} is empty. Give a file with text.")
    return text


# --- one run --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Request:
    text: str | Path
    length: int | None
    stride: int | None
    count: int
    device: torch.device
    dtype: torch.dtype | None
    trust_remote_code: bool

    def subject(self, checkpoint: Checkpoint, comparing: bool) -> _Subject:
        """The loaded model, with the text cut for it."""
        options = {"trust_remote_code": True} if self.trust_remote_code else {}
        model, tokenizer = load(checkpoint.folder, dtype=self.dtype or "auto", need_tokenizer=True, **options)
        kind, name = _kind(model, checkpoint.address), checkpoint.address
        limit = length_limit(model, tokenizer.model_max_length) or self.length or LENGTH
        length = self.length or min(LENGTH, limit)
        if kind == "encoder":
            if not comparing:
                raise UsageError(
                    f"{name} predicts no next token, so it has no perplexity. Add --against DENSE to compare the two."
                )
            if self.stride is not None:
                raise UsageError(f"{name} reads whole lines, which have no --stride. Leave it out.")
            length = min(length, limit)
            found = lines(tokenizer, self.text, length=length, count=self.count)
        else:
            if length > limit:
                raise UsageError(f"{name} takes at most {limit} tokens. Give --length {limit} or less.")
            found = cut(
                tokenizer, self.text, length=length, stride=self.stride, count=self.count, seq2seq=kind == "seq2seq"
            )
        check_tokens(max(int(unit.ids.max()) for unit in found.units), model, name)
        return _Subject(checkpoint.name, kind, model.to(self.device), found, length, dtype_of(model))


@dataclass(frozen=True)
class _Subject:
    name: str
    kind: str
    model: Any
    cut: Cut
    length: int
    dtype: str

    def predict(self, unit: Window | Line) -> Scores | Vector:
        with cannot_be_run(self.name, TEXT_MODELS):
            return score(self.model, unit) if isinstance(unit, Window) else embed(self.model, unit)


def _run(
    request: _Request, ours: Checkpoint, dense: Checkpoint | None, memory: str, told: Progress, group: Ranks
) -> tuple[_Subject, list[Sums]]:
    """Our model, loaded, and the sums of every unit; each rank finds those of its share."""
    with tempfile.TemporaryDirectory(prefix="losparse-eval-") as name:
        folder = Path(name)
        reference = None if dense is None else request.subject(dense, True)
        kind, shared = (reference.kind, reference.cut) if reference is not None else (None, None)
        if reference is not None and memory == "apart":
            _keep(reference, folder, told, share(len(reference.cut.units), group.rank, group.size))
            reference = None
            release(request.device)
        subject = request.subject(ours, dense is not None)
        if dense is not None and shared is not None and (kind != subject.kind or not subject.cut.same(shared)):
            what = "are models of two kinds" if kind != subject.kind else "cut the text into different tokens"
            raise UsageError(
                f"{ours.address} and {dense.address} {what}. Give the dense model that the first was made from."
            )
        sums: list[Sums] = []
        units = subject.cut.units
        here = share(len(units), group.rank, group.size)
        if memory != "apart":
            told.start("windows", len(here))
        for k in here:
            unit = units[k]
            mine = subject.predict(unit)
            theirs: Scores | Vector | None = None
            if reference is not None:
                theirs = reference.predict(unit)
            elif dense is not None:
                theirs = type(mine).read(folder / str(k), request.device)
                (folder / str(k)).unlink()
            sums.append(compare(mine, theirs))
            told.advance("windows", name=subject.name)
    return subject, [Sums(**one) for its in group.agree([asdict(one) for one in sums]) for one in its]


def _keep(subject: _Subject, folder: Path, told: Progress, here: range) -> None:
    """The model's predictions for these units, in a file each."""
    told.start("windows", 2 * len(here))  # and as many of ours
    for k in here:
        with write_errors(folder):
            subject.predict(subject.cut.units[k]).save(folder / str(k))
        if k == here.start:
            needed, free = (len(here) - 1) * (folder / str(k)).stat().st_size, shutil.disk_usage(folder).free
            if needed > free:
                raise OutputError(
                    f"The dense model's predictions take {needed / 1e9:.1f} GB more in {folder.parent}, where "
                    f"{free / 1e9:.1f} GB are free. Set TMPDIR to a larger place, or give fewer --windows."
                )
        told.advance("windows", name=subject.name)


# --- what is refused ------------------------------------------------------------------------------


def _kind(model: Any, name: str) -> str:
    """causal, seq2seq or encoder; UsageError if the model reads no text."""
    require_text(model, name, TEXT_MODELS)
    if not model.can_generate():
        return "encoder"
    return "seq2seq" if model.config.is_encoder_decoder else "causal"
