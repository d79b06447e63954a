"""What `bench` found as tables a person reads at a glance."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from .console import Console, size
from .speed_figure import index, setting, times

if TYPE_CHECKING:
    from ..benchmark.report import BenchReport, LayerSpeed

PADDINGS = ((0, 1), (0, 1, 0, 0), (0, 0))
"""Room around columns: the first that fits the terminal is taken."""


def show_speed(out: Console, report: BenchReport) -> None:
    """Where it was measured, then the layers by shape and rows of x, then the models."""
    beside = "" if report.against is None else f" [dim]beside[/] [bold]{escape(report.against)}[/]"
    out.out.print(f"[bold]{escape(report.name)}[/]{beside}")
    out.out.print(setting(report), style="dim", markup=False)
    if report.busy:
        said = (
            f"The machine was busy (load {report.load:.1f}), so short times mean little: measure again when it rests."
        )
        out.out.print(said, style="yellow")
    _show_layers(out, report)
    _show_models(out, report)


def _show_layers(out: Console, report: BenchReport) -> None:
    columns: list[tuple[str, Callable[[LayerSpeed], str]]] = [
        ("shape", lambda x: f"{x.shape[0]} x {x.shape[1]}"),
        ("layers", lambda x: str(x.count)),
        ("rank", lambda x: str(x.rank)),
        ("density", lambda x: f"{x.density:.3f}"),
        ("index", index),
    ]
    # What is the same in every line is said once, above the table, so that the rest fits a terminal.
    constant = {
        head: value(report.layers[0])
        for head, value in columns[2:]
        if len({value(x) for x in report.layers}) == 1 and report.layers
    }
    columns = [column for column in columns if column[0] not in constant]
    table = _table()
    for head, _ in columns:
        table.add_column(head, justify="left" if head == "index" else "right", no_wrap=True)
    for head in ("rows\nof x", "dense\nms", "compressed\nms", "times\nfaster", "of copy\nspeed"):
        table.add_column(head, justify="right", no_wrap=True)
    for cases in report.shapes:  # what they share is shown in the first
        shown = [value for _, value in columns]
        for x in cases:
            table.add_row(
                *(value(x) for value in shown) if shown else [""] * len(columns),
                str(x.rows), _milliseconds(x.dense_milliseconds), _milliseconds(x.milliseconds),
                _ratio(x.speedup), f"{x.bandwidth / report.copy_bandwidth:.0%}",
            )  # fmt: skip
            shown = []
    if constant:
        out.out.print("\nLayers: " + ", ".join(f"{head} {value}" for head, value in constant.items()), style="dim")
    _show(out, table)


def _show_models(out: Console, report: BenchReport) -> None:
    rows: tuple[tuple[str, str, Callable[[Any], str], str], ...] = (
        ("prefill, tokens/s", "prefill", _rate, "prefill_speedup"),
        ("decode, tokens/s", "decode", _rate, "decode_speedup"),
        ("bytes on disk", "disk", size, "disk_share"),
        ("bytes of parameters and buffers", "tensors", size, "tensors_share"),
        ("resident memory", "resident", size, "resident_share"),
    )
    table = _table()
    table.add_column("model")
    for head in (*(("dense",) if report.dense else ()), "compressed", *(("",) if report.dense else ())):
        table.add_column(head, justify="right", no_wrap=True)
    for caption, name, shown, ratio in rows:
        models = [model for model in (report.dense, report.compressed) if model is not None]
        values = [getattr(model, name) for model in models]
        if all(value is None for value in values):
            continue
        cells = ["-" if value is None else shown(value) for value in values]
        if report.dense is not None:
            over = report.ratios[ratio]
            cells.append("-" if over is None else _ratio(over) if ratio.endswith("speedup") else f"{over:.1%}")
        table.add_row(caption, *cells)
    _show(out, table)


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False)


def _show(out: Console, table: Table) -> None:
    for padding in PADDINGS:
        table.padding, table.show_edge = padding, padding != PADDINGS[-1]
        if table.__rich_measure__(out.out, out.out.options.update(width=1000)).maximum <= out.out.width:
            break
    out.table(table)


def _ratio(value: float) -> str:
    """Times faster; what is slower stands out."""
    return f"[green]{times(value)}[/]" if value >= 1 else f"[red]{times(value)}[/]"


def _milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _rate(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
