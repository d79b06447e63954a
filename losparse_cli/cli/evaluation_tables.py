"""Evaluations as tables: figures with standard errors, dense beside compressed, and the protocol beneath."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape

from .columns import Column, show_columns
from .console import Console, size

if TYPE_CHECKING:
    from ..evaluate import Evaluation, HarnessEvaluation, TaskEvaluation
    from ..tasks.paired import Estimate


def show_evaluation(out: Console, found: Evaluation) -> None:
    """Each figure with its standard error, bytes, and the protocol beneath."""
    share = "" if found.dense_nbytes is None else f" ({found.nbytes / found.dense_nbytes:.1%} of dense)"
    rows = [(f"bytes{share}", size(found.nbytes), "")]
    if found.dense_nbytes is not None:
        rows.append(("bytes, dense", size(found.dense_nbytes), ""))
    for name, estimate, shape in (
        ("perplexity", found.perplexity, ".4g"),
        ("perplexity, dense", found.dense_perplexity, ".4g"),
        ("log-perplexity, difference to dense", found.log_difference, "+.4f"),
        ("KL(dense || this), nats a token", found.kl, ".4f"),
        ("same likeliest token", found.agreement, ".2%"),
        ("cosine to dense", found.cosine, ".5f"),
    ):
        if estimate is not None:
            error = "-" if estimate.error is None else format(estimate.error, shape.lstrip("+").replace("4g", "2g"))
            rows.append((name, format(estimate.value, shape), error))
    names, values, errors = zip(*rows, strict=True)
    _print_title(out, found.model, found.kind, found.dense)
    show_columns(out, "", names, [Column("value", values), Column("std. error", errors)])
    out.show(str(found.protocol), style="dim")
    if found.kind == "seq2seq":
        out.show("The encoder reads each window, and the decoder predicts it again.", style="dim")


def show_task_evaluation(out: Console, found: TaskEvaluation) -> None:
    """Each score, the main one first and bold; beside a dense model its score and the difference."""
    rows = [_bytes(found.nbytes, found.dense_nbytes)]
    rows += [_cells(name, found.scores, found.dense_scores, found.differences) for name in found.scores]
    _print_title(out, found.model, found.protocol.task, found.dense)
    show_columns(out, "", ["bytes", *found.scores], _columns(rows), bold=found.main_score)
    out.show(escape(str(found.protocol)), style="dim")


def show_harness_evaluation(out: Console, found: HarnessEvaluation) -> None:
    """The same of every task of the harness."""
    tasks, scores, rows = [""], ["bytes"], [_bytes(found.nbytes, found.dense_nbytes)]
    for task, estimates in found.scores.items():
        dense, differences = (
            None if part is None else part.get(task, {}) for part in (found.dense_scores, found.differences)
        )
        tasks += [task, *[""] * (len(estimates) - 1)]
        scores += [escape(name) for name in estimates]
        rows += [_cells(name, estimates, dense, differences) for name in estimates]
    _print_title(out, found.model, "evaluation harness", found.dense)
    show_columns(out, "task", tasks, [Column("score", scores, left=True, wraps=True), *_columns(rows)])
    out.show(escape(str(found.protocol)), style="dim")


def _columns(rows: Sequence[Sequence[str]]) -> list[Column]:
    """A value and its standard error in each row; beside a dense model its own and the difference, too."""
    heads = ("this", "dense", "difference") if len(rows[0]) > 2 else ("value",)
    both = (head for name in heads for head in (name, "std.\nerror"))
    return [Column(head, cells) for head, cells in zip(both, zip(*rows, strict=True), strict=True)]


def _bytes(nbytes: int, dense: int | None) -> list[str]:
    return [size(nbytes), ""] + ([] if dense is None else [size(dense), "", f"{nbytes / dense:.1%} of dense", ""])


def _cells(
    name: str, scores: Mapping[str, Estimate], dense: Mapping[str, Estimate] | None,
    differences: Mapping[str, Estimate] | None,
) -> list[str]:  # fmt: skip
    cells = _figure(scores[name])
    if dense is not None and differences is not None:
        cells += [*_figure(dense.get(name)), *_figure(differences.get(name), "+")]
    return cells


def _figure(estimate: Estimate | None, sign: str = "") -> list[str]:
    """A figure and its error to four decimals; of one above ten, to four digits."""
    if estimate is None:
        return ["-", "-"]
    large = not abs(estimate.value) < 10
    value = format(estimate.value, f"{sign}.4g" if large else f"{sign}.4f")
    return [value, "-" if estimate.error is None else format(estimate.error, ".2g" if large else ".4f")]


def _print_title(out: Console, model: str, what: str, dense: str | None) -> None:
    against = f"   against {escape(dense)}" if dense else ""
    out.show(f"[bold]{escape(model)}[/]   {what}{against}")
