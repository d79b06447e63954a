"""Evaluations as tables: figures with standard errors, dense beside compressed, and the protocol beneath."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.markup import escape
from rich.table import Table

from .console import Console, size

if TYPE_CHECKING:
    from ..evaluate import Evaluation, HarnessEvaluation, TaskEvaluation
    from ..evaluation.scores import Estimate


def show_evaluation(out: Console, found: Evaluation) -> None:
    """Each figure with its standard error, bytes, and the protocol beneath."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for head in ("", "value", "std. error"):
        table.add_column(head, justify="left" if not head else "right", no_wrap=True)
    share = "" if found.dense_nbytes is None else f" ({found.nbytes / found.dense_nbytes:.1%} of dense)"
    table.add_row(f"bytes{share}", size(found.nbytes), "")
    if found.dense_nbytes is not None:
        table.add_row("bytes, dense", size(found.dense_nbytes), "")
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
            table.add_row(name, format(estimate.value, shape), error)
    against = f"   against {escape(found.dense)}" if found.dense else ""
    out.out.print(f"[bold]{escape(found.model)}[/]   {found.kind}{against}")
    out.table(table)
    out.out.print(str(found.protocol), style="dim")
    if found.kind == "seq2seq":
        out.out.print("The encoder reads each window, and the decoder predicts it again.", style="dim")


def show_task_evaluation(out: Console, found: TaskEvaluation) -> None:
    """Each score, the main one first and bold; beside a dense model its score and the difference."""
    table = _beside(found.dense is not None)
    _bytes(table, found.nbytes, found.dense_nbytes)
    for name in found.scores:
        _row(table, [escape(name)], name, found.scores, found.dense_scores, found.differences,
             style="bold" if name == found.main_score else "")  # fmt: skip
    _print(out, table, found.model, found.protocol.task, found.dense, str(found.protocol))


def show_harness_evaluation(out: Console, found: HarnessEvaluation) -> None:
    """The same of every task of the harness."""
    table = _beside(found.dense is not None, "task", "score")
    _bytes(table, found.nbytes, found.dense_nbytes, before=[""])
    for task, scores in found.scores.items():
        for k, name in enumerate(scores):
            dense, differences = (
                None if part is None else part.get(task, {}) for part in (found.dense_scores, found.differences)
            )
            _row(table, ["" if k else escape(task), escape(name)], name, scores, dense, differences)
    _print(out, table, found.model, "evaluation harness", found.dense, str(found.protocol))


def _beside(comparing: bool, *heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for head in heads or ("",):
        table.add_column(head, no_wrap=True)
    for head in ("this", "dense", "difference") if comparing else ("value",):
        table.add_column(head, justify="right", no_wrap=True)
        table.add_column("std. error", justify="right", no_wrap=True)
    return table


def _bytes(table: Table, nbytes: int, dense: int | None, before: list[str] | None = None) -> None:
    compared = [] if dense is None else [size(dense), "", f"{nbytes / dense:.1%} of dense", ""]
    table.add_row(*(before or []), "bytes", size(nbytes), "", *compared)


def _row(
    table: Table, head: list[str], name: str, scores: Mapping[str, Estimate], dense: Mapping[str, Estimate] | None,
    differences: Mapping[str, Estimate] | None, style: str = "",
) -> None:  # fmt: skip
    cells = _cells(scores[name])
    if dense is not None and differences is not None:
        cells += [*_cells(dense.get(name)), *_cells(differences.get(name), "+")]
    table.add_row(*head, *cells, style=style)


def _cells(estimate: Estimate | None, sign: str = "") -> list[str]:
    """A figure and its error to four decimals; of one above ten, to four digits."""
    if estimate is None:
        return ["-", "-"]
    large = not abs(estimate.value) < 10
    value = format(estimate.value, f"{sign}.4g" if large else f"{sign}.4f")
    return [value, "-" if estimate.error is None else format(estimate.error, ".2g" if large else ".4f")]


def _print(out: Console, table: Table, model: str, what: str, dense: str | None, protocol: str) -> None:
    against = f"   against {escape(dense)}" if dense else ""
    out.out.print(f"[bold]{escape(model)}[/]   {what}{against}")
    out.table(table)
    out.out.print(escape(protocol), style="dim")
