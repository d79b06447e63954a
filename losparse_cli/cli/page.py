"""One HTML file: a picture, and the figures of every layer in a table that can be sorted. Nothing is fetched."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from ..benchmark.report import BenchReport
from ..checkpoint.report import Report
from . import speed_figure
from .console import clean
from .figures import headline, layer_errors

if TYPE_CHECKING:
    from ..inspection import DenseReport

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 1.5rem auto; max-width: 72rem;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }
figure { margin: 1rem 0; }
svg { width: 100%; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding: .3rem 0; }
th, td { padding: .2rem .5rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
thead th { vertical-align: bottom; white-space: normal; }
th[scope=row], .text { text-align: left; font-weight: normal; }
th:first-child { position: sticky; left: 0; padding-left: 0; background: #fff; }
button { font: inherit; font-weight: 600; border: 0; padding: 0; background: none; color: inherit; cursor: pointer;
  text-align: inherit; }
[aria-sort=ascending] button::after { content: " ▲"; }
[aria-sort=descending] button::after { content: " ▼"; }
"""

SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.closest("th"), body = head.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") === "ascending";
  const key = row => row.cells[head.cellIndex].dataset.value;
  const compare = (a, b) => a === "" || b === "" ? (a === "") - (b === "")
    : (isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", {numeric: true}) : a - b) * (down ? -1 : 1);
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
});
"""


@dataclass(frozen=True)
class Cell:
    """shown: as read. value: as sorted, "" for what is unknown, which stays at the end."""

    shown: str
    value: str
    is_text: bool = False


def page(report: Report | DenseReport | BenchReport, svg: str) -> str:
    """The file's text, with `svg` (an SVG file) in it and a row for every layer, or for all that was timed."""
    what = "Every layer."
    if isinstance(report, BenchReport):
        name, totals = speed_figure.headline(report)
        heads, rows = _speed_rows(report)
        what = "Every shape of layer, at each number of rows of x."
    else:
        name, totals = headline(report)
        heads, rows = _compressed_rows(report) if isinstance(report, Report) else _dense_rows(report)
    # Only this one script may run, and nothing may be loaded, even if a name should slip through unescaped.
    allowed = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    columns = "".join(
        f'<th scope="col"{_side(cell)}><button type="button">{escape(head)}</button></th>'
        for head, cell in zip(heads, rows[0] if rows else [Cell("", "")] * len(heads), strict=True)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(name)}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escape(name)}</h1>
<p>{escape(totals)}</p>
<figure role="img" aria-label="The figures of the table below, drawn">
{svg[svg.index("<svg") :].strip()}
</figure>
<div class="wide">
<table>
<caption>{what} A click on a heading sorts by it.</caption>
<thead><tr>{columns}</tr></thead>
<tbody>
{"".join(_row(cells) for cells in rows)}</tbody>
</table>
</div>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _row(cells: Sequence[Cell]) -> str:
    first, *others = cells
    text = f'<tr><th scope="row" data-value="{escape(first.value)}">{escape(first.shown)}</th>'
    for cell in others:
        text += f'<td{_side(cell)} data-value="{escape(cell.value)}">{escape(cell.shown)}</td>'
    return f"{text}</tr>\n"


def _side(cell: Cell) -> str:
    return ' class="text"' if cell.is_text else ""


def _compressed_rows(report: Report) -> tuple[list[str], list[list[Cell]]]:
    """What matters most comes first, for a narrow window shows no more."""
    caption, errors = layer_errors(report.layers)
    heads = ["layer", caption, "share", "bits", "bytes after", "bytes before", "shape", "rank", "non-zeros", "density"]
    rows = [
        [
            _text(layer.name), Cell("unknown", "") if error is None else Cell(f"{error:.4f}", repr(error)),
            _share(layer.bytes_after / max(1, layer.bytes_before)), Cell(f"{layer.bits:.3f}", repr(layer.bits)),
            _count(layer.bytes_after),
            _count(layer.bytes_before), _shape(layer.shape), _count(layer.spec.rank), _count(layer.spec.nnz),
            _share(layer.density), _text(layer.spec.pattern), _text(layer.spec.layout),
        ]
        for layer, error in zip(report.layers, errors, strict=True)
    ]  # fmt: skip
    return [*heads, "pattern", "layout"], rows


def _dense_rows(report: DenseReport) -> tuple[list[str], list[list[Cell]]]:
    ranks = sorted({rank for layer in report.layers for rank in layer.energy})
    rows = [
        [
            _text(layer.name), _shape(layer.shape), _count(layer.nbytes),
            _text("yes" if layer.reason is None else f"no: {layer.reason}"),
            *(_share(layer.energy[rank]) if rank in layer.energy else Cell("", "") for rank in ranks),
        ]
        for layer in report.layers
    ]  # fmt: skip
    return ["layer", "shape", "bytes", "compress?", *(f"rank {rank}" for rank in ranks)], rows


def _speed_rows(report: BenchReport) -> tuple[list[str], list[list[Cell]]]:
    heads = ["shape", "layers", "rank", "density", "pattern", "index", "rows of x", "dense ms", "compressed ms"]
    rows = [
        [
            _shape(x.shape), _count(x.count), _count(x.rank), _share(x.density), _text(x.pattern), _text(x.form),
            _count(x.rows), _milliseconds(x.dense_milliseconds), _milliseconds(x.milliseconds),
            Cell(speed_figure.times(x.speedup), repr(x.speedup)), _count(x.dense_nbytes), _count(x.nbytes),
            _share(x.bandwidth / report.copy_bandwidth),
        ]
        for x in report.layers
    ]  # fmt: skip
    return [*heads, "times faster", "bytes, dense", "bytes, compressed", "share of copy speed"], rows


def _milliseconds(value: float) -> Cell:
    return Cell(f"{value:.4f}", repr(value))


def _text(text: str) -> Cell:
    return Cell(clean(text, 200), clean(text, 200), is_text=True)


def _shape(shape: tuple[int, int] | None) -> Cell:
    return Cell("-", "") if shape is None else Cell(f"{shape[0]} × {shape[1]}", str(shape[0] * shape[1]))


def _count(value: int) -> Cell:
    return Cell(f"{value:,}", str(value))


def _share(value: float) -> Cell:
    return Cell(f"{value:.1%}", repr(value))
