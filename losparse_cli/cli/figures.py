"""The pictures: error and bytes by block and kind of a compressed checkpoint, spectra by kind of a dense one.

Stacks of blocks stand side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from ..checkpoint.report import LayerReport, Report, error_of, error_range, telling_error
from ..errors import UsageError
from .console import clean, size
from .places import Place, places

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..inspection import DenseLayer, DenseReport

# Okabe and Ito's palette without its yellow, which white paper swallows. Markers repeat what the colours say.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333")
MARKERS = "osD^vPX"
OTHER = "#999999"
# Beyond the colours, kinds are dashed and hatched; beyond that, eyes no longer tell them apart.
MOST_KINDS = 2 * len(COLOURS)
ERRORS = {
    "held_out_error": "held-out output",
    "output_error": "in-sample output",
    "relative_error": "weight",
}
CUT = 1.5  # times the highest block, beyond which bars outside blocks are cut
TITLE_WIDTH = 105  # letters that the narrowest picture holds in a line


@dataclass(frozen=True)
class Style:
    """How a kind looks in every panel."""

    label: str
    colour: str
    marker: str
    dashed: bool = False

    def line(self) -> dict[str, Any]:
        return {"color": self.colour, "linestyle": (0, (4, 1.5)) if self.dashed else "-", "linewidth": 1.5}

    def bar(self, *, pale: bool = False) -> dict[str, Any]:
        """pale: how the dense size is shown, beside what is left of it."""
        mixed = [1 - 0.4 * (1 - int(self.colour[i : i + 2], 16) / 255) for i in (1, 3, 5)]
        hatch = "////" if self.dashed else None
        return {"facecolor": mixed if pale else self.colour, "edgecolor": "white", "hatch": hatch, "linewidth": 0}


def figure(report: Report | DenseReport, *, titled: bool = True) -> Figure:
    """The picture of a report; UsageError if there is nothing in it to draw. Its size is in inches at 10 points.

    titled: False where the headline stands beside it.
    """
    return _compressed_figure(report, titled) if isinstance(report, Report) else _dense_figure(report, titled)


# --- what is said -------------------------------------------------------------------------------------


def headline(report: Report | DenseReport) -> tuple[str, str]:
    """The model's name, and its totals in one line."""
    if isinstance(report, Report):
        share = report.bytes_after / max(1, report.bytes_before)
        whole = report.model_bytes_after / max(1, report.model_bytes_before)
        made_from = clean(report.source.get("name") or "")
        caption, _ = layer_errors(report.layers)
        span = error_range(report.layers, telling_error(report.layers))
        return clean(report.name or made_from or "compressed model"), (
            (f"Made from {made_from}. " if report.name and made_from else "")
            + f"Compressed layers: {share:.1%} of their bytes are left{_bits(report)}; they hold "
            f"{report.targeted_share:.1%} of all parameters. Whole model: {whole:.1%} of "
            f"{size(report.model_bytes_before)}."
            + (f" Single layers have a {caption} of {span[0]:.3f} to {span[1]:.3f}." if span else "")
        )
    count = sum(layer.reason is None for layer in report.layers)
    share = report.targeted_parameters / max(1, report.parameters)
    return clean(report.name), f"Dense: {count} layers would be compressed, {share:.1%} of all parameters."


def _bits(report: Report) -> str:
    """Bits a weight, where S is whole numbers."""
    if not report.coded:
        return ""
    aside = "" if report.embedding_bits is None else f" and {report.embedding_bits:.2f} of embeddings and heads"
    return f", {report.bits:.2f} bits a weight{aside}"


def layer_errors(layers: Sequence[LayerReport]) -> tuple[str, list[float | None]]:
    """What the errors are that say most about these layers, and one for each."""
    measure = telling_error(layers)
    return f"relative error of {ERRORS[measure]}", [_finite(error_of([layer], measure)) for layer in layers]


def _finite(error: float | None) -> float | None:
    """A report may hold anything that JSON does, infinity among it, and no axis reaches there."""
    return error if error is not None and math.isfinite(error) else None


# --- styles ----------------------------------------------------------------------


def styles(nbytes: Mapping[str, int]) -> dict[str, Style]:
    """Kind -> style, in the order given; past MOST_KINDS the smallest share one, at the end."""
    kept = set(nbytes)
    if len(nbytes) > MOST_KINDS:
        kept = set(sorted(nbytes, key=lambda kind: -nbytes[kind])[: MOST_KINDS - 1])
    found = {
        kind: Style(clean(kind, 30), COLOURS[i % len(COLOURS)], MARKERS[i % len(COLOURS)], i >= len(COLOURS))
        for i, kind in enumerate(kind for kind in nbytes if kind in kept)
    }
    other = Style(f"{len(nbytes) - len(kept)} other kinds", OTHER, ".")
    return found | {kind: other for kind in nbytes if kind not in kept}


# --- a compressed checkpoint ----------------------------------------------------------------------------


def _compressed_figure(report: Report, titled: bool) -> Figure:
    """Errors above, bytes below, over the same blocks."""
    from matplotlib.figure import Figure
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    where = places([layer.name for layer in report.layers])
    columns = _columns(where)
    looks = _looks(where, [layer.bytes_before for layer in report.layers])
    measure = telling_error(report.layers)
    caption, errors = layer_errors(report.layers)
    # One mark: the layers of a style in a block, which are several where there are experts.
    marks: dict[Style, dict[float, list[LayerReport]]] = {}
    for layer, place in zip(report.layers, where, strict=True):
        x = columns[place.stack, place.block]
        marks.setdefault(looks[place.kind], {}).setdefault(x, []).append(layer)
    marks = {style: marks[style] for style in dict.fromkeys(looks.values())}

    figure = Figure(figsize=(min(15.0, max(9.5, 5 + 0.09 * len(columns))), 7.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    starts = {(stack, block is None): columns[stack, block] for stack, block in reversed(columns)}
    floor: dict[tuple[float, int], float] = {}
    handles: list[tuple[Any, str]] = []
    for i, (style, members) in enumerate(marks.items()):
        points: list[tuple[float, float]] = []
        for x in sorted(members):
            error = _finite(error_of(members[x], measure))
            if points and any(points[-1][0] < start <= x for start in starts.values()):
                points.append((x, float("nan")))  # no line leads from one stack to the next
            points.append((x, float("nan") if error is None else error))
            for side, name in enumerate(("before", "after")):
                height = sum(getattr(layer, f"bytes_{name}") for layer in members[x])
                bottom = floor.get((x, side), 0.0)
                floor[x, side] = bottom + height
                look = style.bar(pale=not side)
                bars = below.bar(x - 0.19 + 0.38 * side, height, width=0.36, bottom=bottom, **look)
                bars[0].set_gid(f"bytes-{name}-{i}-{x:g}")
        marker = {"marker": style.marker, "markersize": 4.5 if len(columns) <= 40 else 2.5}
        (line,) = above.plot(*zip(*points, strict=True), **style.line(), **marker)
        line.set_gid(f"error-{i}")
        handles.append(((line, Patch(**style.bar())), style.label))
    grey = Style("", "#555555", "")
    handles += [(Patch(**grey.bar(pale=True)), "left bar: dense"), (Patch(**grey.bar()), "right bar: compressed")]

    above.set_ylabel(caption)
    above.set_ylim(0, 1.08 * (max((error for error in errors if error is not None), default=0.0) or 1.0))
    if all(error is None for error in errors):
        above.text(0.5, 0.5, "No errors were recorded.", transform=above.transAxes, ha="center", color="#555555")
        above.set_yticks([])
    below.set_ylabel("bytes in all layers of a block")
    below.yaxis.set_major_formatter(lambda value, _: size(value) if value >= 0 else "")
    below.set_xlabel("block")
    _cut_outside(below, columns, floor)
    _label_blocks(above, below, columns)
    # The words are set afterwards: a legend leaves out those that begin with an underscore.
    legend = figure.legend(
        [handle for handle, _ in handles], [str(i) for i in range(len(handles))], loc="outside right center",
        frameon=False, fontsize=9, handler_map={tuple: HandlerTuple(ndivide=None)},
    )  # fmt: skip
    for text, (_, label) in zip(legend.get_texts(), handles, strict=True):
        text.set_text(label)
    _finish(figure, (above, below), _title(report) if titled else [])
    return figure


def _cut_outside(
    axes: Axes, columns: Mapping[tuple[str, int | None], float], heights: Mapping[tuple[float, int], float]
) -> None:
    """Blocks fill the panel: bars outside them, of embeddings mostly, may be many times as high, and are cut then.

    heights: (x, 0 of the dense model or 1) -> bytes.
    """
    inside = [heights.get((x, 0), 0.0) for (_, block), x in columns.items() if block is not None]
    top = CUT * max(inside, default=0.0)
    cut = {x for (_, block), x in columns.items() if block is None and heights.get((x, 0), 0.0) > top}
    if not top or not cut:
        return
    axes.set_ylim(0, top)
    before, after = (size(sum(heights.get((x, side), 0.0) for x in cut)) for side in (0, 1))
    axes.text(
        min(cut) - 0.6, 0.97 * top, f"cut: {before} dense,\n{after} compressed", ha="right", va="top", fontsize=9,
        color="#555555",
    )  # fmt: skip


def _columns(where: Sequence[Place]) -> dict[tuple[str, int | None], float]:
    """(stack, block) -> x: blocks of a stack in order, an empty column between stacks, layers outside them last."""
    blocks: dict[tuple[bool, str], set[int | None]] = {}
    for place in where:
        blocks.setdefault((place.block is None, place.stack), set()).add(place.block)
    found: dict[tuple[str, int | None], float] = {}
    x = 0.0
    for outside, stack in sorted(blocks, key=lambda key: key[0]):
        for block in sorted(blocks[outside, stack], key=lambda block: block or 0):
            found[stack, block] = x
            x += 1
        x += 1
    return found


def _looks(where: Sequence[Place], nbytes: Sequence[int]) -> dict[str, Style]:
    totals: dict[str, int] = {}
    for place, n in zip(where, nbytes, strict=True):
        totals[place.kind] = totals.get(place.kind, 0) + n
    if not totals:
        raise UsageError("There is nothing to draw: the model has no layer that can be compressed.")
    return styles(totals)


def _label_blocks(above: Axes, below: Axes, columns: Mapping[tuple[str, int | None], float]) -> None:
    """Numbers under the blocks, as many as there is room for; names over the stacks, if there are several."""
    last = max(columns.values())
    step = next((step for step in (1, 2, 5, 10, 20, 50) if last / step <= 24), 100)
    ticks = {x: str(block) for (_, block), x in columns.items() if block is not None and block % step == 0}
    ticks |= {x: "outside\nblocks" for (_, block), x in columns.items() if block is None}
    below.set_xticks(list(ticks), list(ticks.values()))
    below.set_xlim(-0.8, last + 0.8)
    stacks = list(dict.fromkeys(stack for stack, block in columns if block is not None))
    if len(stacks) < 2:
        return
    for stack in stacks:
        inside = [x for (name, block), x in columns.items() if name == stack and block is not None]
        if min(inside):
            for axes in (above, below):
                axes.axvline(min(inside) - 1, color="#bbbbbb", linewidth=0.8)
        room = int(100 * len(inside) / (last + 1))
        above.text(
            (min(inside) + max(inside)) / 2, 1.02, clean(stack or "blocks", max(8, room)),
            transform=above.get_xaxis_transform(), ha="center", va="bottom", fontsize=9, color="#555555",
        )  # fmt: skip


# --- a dense checkpoint -----------------------------------------------------------------------------------


def _dense_figure(report: DenseReport, titled: bool) -> Figure:
    """Energy against rank: a panel for each kind, with the other kinds' medians in grey to compare with."""
    import numpy as np
    from matplotlib.figure import Figure

    layers = [layer for layer in report.layers if layer.curve]
    where = places([layer.name for layer in layers])
    looks = _looks(where, [layer.nbytes for layer in layers])
    members: dict[Style, list[DenseLayer]] = {style: [] for style in looks.values()}
    for layer, place in zip(layers, where, strict=True):
        members[looks[place.kind]].append(layer)

    across = min(4, len(members))
    down = -(-len(members) // across)
    figure = Figure(figsize=(max(7.0, 2.5 * across), 4.6 if down == 1 else 1.2 + 2.4 * down), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flatten()
    for i, (style, group) in enumerate(members.items()):
        ranks = np.array(sorted({rank for layer in group for rank in layer.curve}))
        # Past its own full rank a layer has nothing left to capture: its last value holds.
        energies = np.array([np.interp(ranks, list(x.curve), list(x.curve.values())) for x in group])
        middle = np.median(energies, axis=0)
        for k, axes in enumerate(panels[: len(members)]):
            if k != i:
                axes.plot(ranks, middle, color="#cccccc", linewidth=0.9, zorder=1)
        own = panels[i]
        band = own.fill_between(ranks, energies.min(0), energies.max(0), color=style.colour, alpha=0.25, linewidth=0)
        band.set_gid(f"band-{i}")
        (line,) = own.plot(ranks, middle, color=style.colour, linewidth=1.8, zorder=2)
        line.set_gid(f"energy-{i}")
        even = float(np.median([m * n / (m + n) for m, n in (x.shape for x in group if x.shape)]))
        own.plot([even], [np.interp(even, ranks, middle)], "o", color=style.colour, markeredgecolor="white", zorder=3)
        own.set_title(style.label, fontsize=10, loc="left")
    for axes in panels[len(members) :]:
        axes.set_visible(False)
    first = panels[0]
    first.set_xscale("log", base=2)
    first.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    first.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    first.set_xlim(left=1)
    first.set_ylim(0, 1.03)
    for k, axes in enumerate(panels[: len(members)]):
        axes.tick_params(labelbottom=k + across >= len(members))  # the last of its column, where rows are ragged
    figure.supxlabel("rank", fontsize=10)
    figure.supylabel("share of ‖W‖² in the best matrix of that rank", fontsize=10)
    key = "Line: median of the layers. Band: least to most. Dot: rank at which U V is as large as W."
    _finish(figure, panels, [*(_title(report) if titled else []), key])
    return figure


def _title(report: Report | DenseReport) -> list[str]:
    """Name and totals, in lines that the picture is wide enough for."""
    name, totals = headline(report)
    return [name, *wrap(totals, TITLE_WIDTH)]


def _finish(figure: Figure, panels: Iterable[Axes], lines: Sequence[str]) -> None:
    """Title and grid."""
    if lines:
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=10)
    for axes in panels:
        axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
