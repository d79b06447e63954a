"""The picture of `bench`: how many times faster each shape of layer is, and the model's speed and bytes beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import UsageError
from .console import clean
from .figures import COLOURS, OTHER, Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..benchmark.report import BenchReport, LayerSpeed

FASTER, SMALLER = Style("", COLOURS[-1], ""), Style("", OTHER, "")
MODEL_BARS = (
    ("prefill_speedup", "prefill\nspeed", FASTER),
    ("decode_speedup", "decode\nspeed", FASTER),
    ("disk_share", "bytes\non disk", SMALLER),
    ("tensors_share", "bytes of\ntensors", SMALLER),
    ("resident_share", "resident\nbytes", SMALLER),
)


def headline(report: BenchReport) -> tuple[str, str]:
    """The model's name, and where and how it was measured."""
    beside = "" if report.against is None else f" beside {clean(report.against, 50)}"
    return f"{clean(report.name, 50)}{beside}", setting(report)


def setting(report: BenchReport) -> str:
    """Device, dtype, threads, speed of memory, and what the model was given, in one line."""
    threads = f"{report.threads} thread{'s' * (report.threads > 1)}"
    given = f"batch {report.batch}, prompt {report.prompt}, {report.new_tokens} new tokens"
    return (
        f"{clean(report.device)} ({clean(report.processor)}), {clean(report.dtype)}, {threads}, "
        f"copy {report.copy_bandwidth / 1e9:.1f} GB/s; {given}"
    )


def times(value: float) -> str:
    """1.25x, of three digits; below 1 is slower."""
    return f"{value:.2f}x" if value < 9.995 else f"{value:.1f}x" if value < 99.95 else f"{value:.0f}x"


def index(x: LayerSpeed) -> str:
    """The form of the index, with the pattern where the form does not tell it."""
    return x.form if x.pattern in ("unstructured", "rows", "columns") else f"{clean(x.pattern, 20)} {x.form}"


def figure(report: BenchReport, *, titled: bool = True) -> Figure:
    """The picture; UsageError if there is nothing in the report to draw. Its size is in inches at 10 points.

    titled: False where the headline stands beside it.
    """
    from matplotlib.figure import Figure

    if not report.layers:
        raise UsageError("There is nothing to draw: no layer was timed.")
    bars = [(name, label, style) for name, label, style in MODEL_BARS if report.ratios[name] is not None]
    slanted = len(report.shapes) > 5
    left = min(12.0, max(4.5, 1.5 + 1.1 * len(report.shapes)))
    right = 1.0 + 0.8 * len(bars) if bars else 0.0
    figure = Figure(figsize=(max(8.0, left + right), 6.0 if slanted else 4.8), layout="constrained")
    if bars:
        layers, models = figure.subplots(1, 2, width_ratios=(left, right))
        _draw_models(models, report, bars)
    else:
        layers = figure.subplots()
    _draw_layers(layers, report, slanted)
    for i, axes in enumerate(figure.axes):
        axes.axhline(1, color="#333333", linewidth=1.0).set_gid(f"even-{i}")
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if titled:
        name, (where, given) = headline(report)[0], setting(report).rsplit("; ", 1)
        figure.suptitle(f"{name}\n{where}\n{given}", x=0.01, ha="left", fontsize=10)
    return figure


def _draw_layers(axes: Axes, report: BenchReport, slanted: bool) -> None:
    """Bars by shape, and within a shape by rows of x."""
    rows = list(dict.fromkeys(x.rows for x in report.layers))
    styles = {
        count: Style(f"{count} row{'s' * (count > 1)} of x", COLOURS[i % len(COLOURS)], "", bool(i // len(COLOURS) % 2))
        for i, count in enumerate(rows)
    }
    width = 0.8 / len(rows)
    for i, cases in enumerate(report.shapes):
        for x in cases:
            k = rows.index(x.rows)
            middle = i + (k - (len(rows) - 1) / 2) * width
            (bar,) = axes.bar(middle, x.speedup, width=0.94 * width, **styles[x.rows].bar())
            bar.set_gid(f"speedup-{i}-{k}")
            bar.set_label(styles[x.rows].label if i == 0 else "_")
    axes.set_xticks(
        range(len(report.shapes)),
        [_caption(cases[0], ", " if slanted else "\n") for cases in report.shapes],
        rotation=45 if slanted else 0,
        ha="right" if slanted else "center",
        rotation_mode="anchor" if slanted else "default",
    )
    axes.set_xlim(-0.6, len(report.shapes) - 0.4)
    axes.set_ylim(0, 1.1 * max(1.0, *(x.speedup for x in report.layers)))
    axes.set_ylabel("times faster than nn.Linear")
    axes.set_xlabel("shape of layer (out × in)")
    axes.legend(frameon=False, fontsize=9, ncols=min(4, len(rows)), loc="lower left", bbox_to_anchor=(0, 1))


def _draw_models(axes: Axes, report: BenchReport, bars: list[tuple[str, str, Style]]) -> None:
    """Compressed over dense: speed, of which more is better, and bytes, of which less is."""
    values = [report.ratios[name] or 0.0 for name, _, _ in bars]
    for i, ((name, _, style), value) in enumerate(zip(bars, values, strict=True)):
        (bar,) = axes.bar(i, value, width=0.7, **style.bar())
        bar.set_gid(f"model-{name}")
        clear = {"facecolor": "white", "linewidth": 0, "pad": 1}
        said = times(value) if style is FASTER else f"{value:.0%}"
        axes.annotate(
            said, (i, value), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=9, bbox=clear
        )
    axes.set_xticks(range(len(bars)), [label for _, label, _ in bars], fontsize=9)
    axes.set_ylim(0, 1.15 * max(1.0, *values))
    axes.set_ylabel("compressed model / dense model")


def _caption(x: LayerSpeed, between: str) -> str:
    return f"{x.shape[0]} × {x.shape[1]}{between}{index(x)}"
