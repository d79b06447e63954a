"""What `bench` found as tables a person reads at a glance."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from .columns import Column, show_columns
from .console import Console, size
from .speed_figure import index, setting, times

if TYPE_CHECKING:
    from ..benchmark.report import BenchReport, LayerSpeed


def show_speed(out: Console, report: BenchReport) -> None:
    """Where it was measured, then the layers by shape and rows of x, then the models."""
    beside = "" if report.against is None else f" [dim]beside[/] [bold]{escape(report.against)}[/]"
    out.show(f"[bold]{escape(report.name)}[/]{beside}")
    out.show(setting(report), style="dim", markup=False)
    if report.busy:
        said = (
            f"The machine was busy (load {report.load:.1f}), so short times mean little: measure again when it rests."
        )
        out.show(said, style="yellow")
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
    measured: list[tuple[str, Callable[[LayerSpeed], str]]] = [
        ("rows\nof x", lambda x: str(x.rows)),
        ("dense\nms", lambda x: _milliseconds(x.dense_milliseconds)),
        ("compressed\nms", lambda x: _milliseconds(x.milliseconds)),
        ("times\nfaster", lambda x: _ratio(x.speedup)),
        ("bits a\nweight", lambda x: f"{x.bits:.2f}"),
        ("of copy\nspeed", lambda x: f"{x.bandwidth / report.copy_bandwidth:.0%}"),
    ]
    cases = [x for group in report.shapes for x in group]
    firsts = {id(group[0]) for group in report.shapes}  # what a shape's cases share is shown in the first

    def once(value: Callable[[LayerSpeed], str]) -> list[str]:
        return [value(x) if id(x) in firsts else "" for x in cases]

    shown = [Column(head, once(value), left=head == "index") for head, value in columns[1:] if head not in constant]
    shown += [Column(head, [value(x) for x in cases]) for head, value in measured]
    if constant:
        out.show("\nLayers: " + ", ".join(f"{head} {value}" for head, value in constant.items()), style="dim")
    show_columns(out, "shape", once(columns[0][1]), shown)


def _show_models(out: Console, report: BenchReport) -> None:
    rows: tuple[tuple[str, str, Callable[[Any], str], str], ...] = (
        ("prefill, tokens/s", "prefill", _rate, "prefill_speedup"),
        ("decode, tokens/s", "decode", _rate, "decode_speedup"),
        ("bytes on disk", "disk", size, "disk_share"),
        ("bytes of parameters and buffers", "tensors", size, "tensors_share"),
        ("resident memory", "resident", size, "resident_share"),
        ("bytes that a token reads", "token_bytes", size, "token_share"),
    )
    models = [model for model in (report.dense, report.compressed, report.peer) if model is not None]
    captions, lines = [], []
    for caption, name, shown, ratio in rows:
        values = [getattr(model, name) for model in models]
        if all(value is None for value in values):
            continue
        cells = ["-" if value is None else shown(value) for value in values]
        for other, ratios in ((report.dense, report.ratios), (report.peer, report.peer_ratios)):
            if other is not None:
                over = ratios[ratio]
                cells.append("-" if over is None else _ratio(over) if ratio.endswith("speedup") else f"{over:.1%}")
        captions.append(caption)
        lines.append(cells)
    others = [name for name, model in (("dense", report.dense), ("llama.cpp", report.peer)) if model is not None]
    heads = [*others[: report.dense is not None], "compressed", *others[report.dense is not None :]]
    heads += [f"over\n{name}" for name in others]
    show_columns(out, "model", captions, [Column(head, [line[i] for line in lines]) for i, head in enumerate(heads)])

    if report.compressed is not None and report.compressed.plain is not None:
        out.show(f"Written in transformers' own loop, because {report.compressed.plain}.", style="dim", markup=False)


def _ratio(value: float) -> str:
    """Times faster; what is slower stands out."""
    return f"[green]{times(value)}[/]" if value >= 1 else f"[red]{times(value)}[/]"


def _milliseconds(value: float) -> str:
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _rate(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
