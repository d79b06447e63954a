"""Reports as tables a person reads at a glance, as CSV, or as JSON."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from ..errors import UsageError
from .console import Console, size

if TYPE_CHECKING:
    from ..checkpoint.report import LayerReport, Report
    from ..inspection import DenseReport

BLOCKS = " ▏▎▍▌▋▊▉█"
SPARKS = "▁▂▃▄▅▆▇█"

SORTS: dict[str, Callable[[Any], Any]] = {
    "name": lambda group: 0,  # the order of the model, which a stable sort keeps
    "error": lambda group: -(group.error or 0.0),
    "bytes": lambda group: -group.after,
    "share": lambda group: -group.after / max(1, group.before),
    "rank": lambda group: -max(x.rank for x in group.layers),
    "nnz": lambda group: -sum(x.nnz for x in group.layers),
    "density": lambda group: -group.density,
}


class Group:
    """Layers shown in one line: a block, a kind, or a single layer."""

    def __init__(self, name: str, layers: Sequence[LayerReport]) -> None:
        from ..checkpoint.report import total_error

        self.name, self.layers = name, layers
        self.before = sum(x.bytes_before for x in layers)
        self.after = sum(x.bytes_after for x in layers)
        self.density = sum(x.nnz for x in layers) / max(1, sum(x.parameters for x in layers))
        self.error = total_error(layers)


def check_sort(sort: str) -> None:
    if sort not in SORTS:
        raise UsageError(f"--sort is one of {', '.join(SORTS)}, not {sort!r}.")


def show_report(
    out: Console, report: Report | DenseReport, *, every_layer: bool, sort: str, as_csv: bool, as_json: bool
) -> None:
    """Print a report in the form asked for."""
    from ..checkpoint.report import Report as Compressed

    compressed = isinstance(report, Compressed)
    if as_json:
        out.data(report.to_dict())
    elif as_csv:
        _write_csv(report)
    elif compressed:
        _show_compressed(out, report, every_layer, sort)
    else:
        _show_dense(out, report, every_layer)


def _show_compressed(out: Console, report: Report, every_layer: bool, sort: str) -> None:
    groups = [Group(x.name, [x]) for x in report.layers] if every_layer else _by_block(report.layers)
    groups.sort(key=SORTS[sort])
    table = Table(title=escape(str(report.source.get("name") or "")), title_justify="left", show_footer=True)
    whole = Group("all", report.layers)
    known = whole.error is not None
    total = [f"{len(report.layers)} layers", "", "", f"{sum(x.nnz for x in report.layers):,}", f"{whole.density:.3f}",
             "", "", size(whole.before), size(whole.after), f"{whole.after / max(1, whole.before):.1%}",
             f"{whole.error:.3f}" if known else "-"]  # fmt: skip
    heads = ("layer" if every_layer else "block", "shape", "rank", "nnz", "density", "pattern", "layout", "before",
             "after", "share", "error")  # fmt: skip
    for head, foot in zip(heads, total, strict=True):
        left = head in ("layer", "block", "pattern", "layout", "share", "error")
        table.add_column(head, footer=foot, justify="left" if left else "right", no_wrap=True)
    largest = max((g.error or 0.0 for g in groups), default=1.0) or 1.0
    for g in groups:
        share = g.after / max(1, g.before)
        error = "-" if g.error is None else f"{g.error:.3f} [red]{_bar(g.error / largest)}[/]"
        table.add_row(
            escape(g.name), _one(f"{x.shape[0]} x {x.shape[1]}" for x in g.layers), _range([x.rank for x in g.layers]),
            f"{sum(x.nnz for x in g.layers):,}", f"{g.density:.3f}", _one(x.pattern for x in g.layers),
            _one(x.layout for x in g.layers), size(g.before), size(g.after), f"{share:5.1%} [cyan]{_bar(share)}[/]", error,
        )  # fmt: skip
    out.table(table)
    if known and len(report.layers) > 1:
        out.out.print(f"error by depth  {_sparkline([x.relative_error or 0.0 for x in report.layers])}")
    out.out.print(
        f"whole model  {size(report.model_bytes_before)} -> {size(report.model_bytes_after)} "
        f"({report.model_bytes_after / max(1, report.model_bytes_before):.1%}); {report.targeted_share:.1%} of all parameters "
        f"are in these layers, {report.kept_parameters:.1%} of them kept"
    )
    if report.skipped:
        out.out.print(f"left dense   {_reasons(report.skipped)}")


def _show_dense(out: Console, report: DenseReport, every_layer: bool) -> None:
    table = Table(title=f"{escape(report.name)} (dense)", title_justify="left")
    ranks = sorted({r for x in report.layers for r in x.energy if r >= 8})
    for head in ("layer", "shape", "bytes", "compress?"):
        table.add_column(head, justify="left" if head in ("layer", "compress?") else "right")
    for r in ranks:
        table.add_column(f"rank {r}", justify="right")
    if every_layer or ranks:
        rows = [(x.name, [x]) for x in report.layers]
    else:
        kinds: dict[str, list[Any]] = {}
        for x in report.layers:
            kind = re.sub(r"\.\d+(?=\.)", ".*", x.name)
            kinds.setdefault(f"{kind}|{x.shape}|{x.reason}", []).append(x)
        rows = [(key.partition("|")[0], members) for key, members in kinds.items()]
    for name, members in rows:
        first = members[0]
        shape = "-" if first.shape is None else f"{first.shape[0]} x {first.shape[1]}"
        verdict = "[green]yes[/]" if first.reason is None else f"[dim]no: {escape(first.reason)}[/]"
        count = f" ({len(members)})" if len(members) > 1 else ""
        energy = [f"{first.energy[r]:.1%}" if r in first.energy else "" for r in ranks]
        table.add_row(escape(name) + count, shape, size(sum(x.nbytes for x in members)), verdict, *energy)
    out.table(table)
    chosen = [x for x in report.layers if x.reason is None]
    out.out.print(
        f"{len(chosen)} layers would be compressed: {report.targeted_parameters / max(1, report.parameters):.1%} of "
        f"{report.parameters:,} parameters, {size(sum(x.nbytes for x in chosen))} of {size(report.model_bytes)}"
    )


def _write_csv(report: Report | DenseReport) -> None:
    from ..checkpoint.report import Report as Compressed

    writer = csv.writer(sys.stdout, lineterminator="\n")
    if isinstance(report, Compressed):
        writer.writerow(
            ["layer", "out_features", "in_features", "rank", "nnz", "density", "pattern", "layout", "bytes_before",
             "bytes_after", "relative_error"]
        )  # fmt: skip
        for x in report.layers:
            writer.writerow(
                [x.name, *x.shape, x.rank, x.nnz, f"{x.density:.6g}", x.pattern, x.layout, x.bytes_before, x.bytes_after,
                 "" if x.relative_error is None else f"{x.relative_error:.6g}"]
            )  # fmt: skip
        return
    ranks = sorted({r for x in report.layers for r in x.energy})
    writer.writerow(["layer", "out_features", "in_features", "bytes", "reason", *(f"energy_{r}" for r in ranks)])
    for y in report.layers:
        writer.writerow([y.name, *(y.shape or ("", "")), y.nbytes, y.reason or "", *(y.energy.get(r, "") for r in ranks)])


def _by_block(layers: Sequence[LayerReport]) -> list[Group]:
    """Layers of one repeated block together: the name up to and with its first number."""
    groups: dict[str, list[LayerReport]] = {}
    for layer in layers:
        match = re.match(r"(.*?\.\d+)\.", layer.name)
        groups.setdefault(match[1] if match else layer.name, []).append(layer)
    return [Group(name, members) for name, members in groups.items()]


def _one(values: Any) -> str:
    found = list(dict.fromkeys(values))
    return found[0] if len(found) == 1 else f"{len(found)} kinds"


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}-{high}"


def _bar(share: float, width: int = 8) -> str:
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    return "█" * (eighths // 8) + (BLOCKS[eighths % 8] if eighths % 8 else "")


def _sparkline(values: Sequence[float], width: int = 64) -> str:
    step = max(1, -(-len(values) // width))
    means = [sum(values[i : i + step]) / len(values[i : i + step]) for i in range(0, len(values), step)]
    low, high = min(means), max(means)
    scale = (high - low) or 1.0
    marks = "".join(SPARKS[round((v - low) / scale * 7)] for v in means)
    return f"{marks}  {low:.3f} to {high:.3f}"


def _reasons(skipped: dict[str, str]) -> str:
    counts: dict[str, int] = {}
    for reason in skipped.values():
        counts[reason] = counts.get(reason, 0) + 1
    return ", ".join(f"{count} x {reason}" for reason, count in counts.items())
