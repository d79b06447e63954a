"""Reports as tables a person reads at a glance, as CSV, or as JSON."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.markup import escape
from rich.table import Table

from ..errors import UsageError
from .console import Console, size

if TYPE_CHECKING:
    from ..checkpoint.report import LayerReport, Report
    from ..demo import Measured
    from ..evaluation.scores import Estimate
    from ..inspection import DenseReport

BLOCKS = " ▏▎▍▌▋▊▉█"
SPARKS = "▁▂▃▄▅▆▇█"

SORTS: dict[str, Callable[[Any], Any]] = {
    "name": lambda group: 0,  # the order of the model, which a stable sort keeps
    "error": lambda group: -(group.output_error or group.error or 0.0),
    "bytes": lambda group: -group.after,
    "share": lambda group: -group.after / max(1, group.before),
    "rank": lambda group: -max(x.spec.rank for x in group.layers),
    "nnz": lambda group: -sum(x.spec.nnz for x in group.layers),
    "density": lambda group: -group.density,
}


class Group:
    """Layers shown in one line: a block, a kind, or a single layer."""

    def __init__(self, name: str, layers: Sequence[LayerReport]) -> None:
        from ..checkpoint.report import mean_output_error, total_error

        self.name, self.layers = name, layers
        self.before = sum(x.bytes_before for x in layers)
        self.after = sum(x.bytes_after for x in layers)
        self.density = sum(x.spec.nnz for x in layers) / max(1, sum(x.parameters for x in layers))
        self.error = total_error(layers)
        self.output_error = mean_output_error(layers)


def check_sort(sort: str) -> None:
    if sort not in SORTS:
        raise UsageError(f"--sort is one of {', '.join(SORTS)}, not {sort!r}.")


def show_report(
    out: Console, report: Report | DenseReport, *, every_layer: bool, sort: str, as_csv: bool, as_json: bool
) -> None:
    """Print a report in the form asked for."""
    from ..checkpoint.report import Report as Compressed

    if as_json:
        out.data(report.to_dict())
    elif as_csv:
        _write_csv(report)
    elif isinstance(report, Compressed):
        _show_compressed(out, report, every_layer, sort)
    else:
        _show_dense(out, report, every_layer)


def _show_compressed(out: Console, report: Report, every_layer: bool, sort: str) -> None:
    groups = [Group(x.name, [x]) for x in report.layers] if every_layer else _by_block(report.layers)
    groups.sort(key=SORTS[sort])
    whole = Group("all", report.layers)
    # With calibration text it is the outputs' error that was minimised, and that says something.
    by_output = whole.output_error is not None
    errors = [g.output_error if by_output else g.error for g in groups]
    largest = max((error or 0.0 for error in errors), default=0.0) or 1.0
    columns: list[tuple[str, Callable[[Group], str], str]] = [
        ("shape", lambda g: _one(f"{x.shape[0]} x {x.shape[1]}" for x in g.layers), ""),
        ("rank", lambda g: _range([x.spec.rank for x in g.layers]), ""),
        ("nnz", lambda g: f"{sum(x.spec.nnz for x in g.layers):,}", f"{sum(x.spec.nnz for x in report.layers):,}"),
        ("density", lambda g: f"{g.density:.3f}", f"{whole.density:.3f}"),
        ("pattern", lambda g: _one(x.spec.pattern for x in g.layers), ""),
        ("layout", lambda g: _one(x.spec.layout for x in g.layers), ""),
        ("before", lambda g: size(g.before), size(whole.before)),
        ("after", lambda g: size(g.after), size(whole.after)),
    ]
    # What is the same in every line is said once, above the table, so that the rest fits a terminal.
    rows = {head: [value(g) for g in groups] for head, value, _ in columns}
    constant = {head: cells[0] for head, cells in rows.items() if len(groups) > 2 and len(set(cells)) == 1}
    for head in ("before", "nnz", "after") + (() if every_layer else ("shape",)):
        constant.pop(head, None)
    if not every_layer:
        columns = [column for column in columns if column[0] != "shape"]
    out.out.print(f"[bold]{escape(str(report.source.get('name') or 'compressed model'))}[/]", end="")
    out.out.print("".join(f"   {head} {value}" for head, value in constant.items()), style="dim")

    table = Table(box=box.SIMPLE_HEAD, show_footer=True, padding=(0, 1), pad_edge=False)
    table.add_column("layer" if every_layer else "block", footer=f"{len(report.layers)} layers", overflow="fold")
    shown = [column for column in columns if column[0] not in constant]
    for head, _, footer in shown:
        table.add_column(
            head, footer=footer, justify="left" if head in ("pattern", "layout") else "right", no_wrap=True
        )
    table.add_column("share", footer=f"{whole.after / max(1, whole.before):5.1%}", no_wrap=True)
    total = whole.output_error if by_output else whole.error
    head = "output error" if by_output else "error"
    table.add_column(head, footer="-" if total is None else f"{total:.3f}", no_wrap=True)
    for i, (g, value) in enumerate(zip(groups, errors, strict=True)):
        share = g.after / max(1, g.before)
        error = "-" if value is None else f"{value:.3f} [red]{_bar(value / largest)}[/]"
        cells = [rows[head][i] for head, _, _ in shown]
        table.add_row(escape(g.name), *cells, f"{share:5.1%} [cyan]{_bar(share)}[/]", error)
    out.table(table)
    if total is not None and len(report.layers) > 1:
        depth = [(x.output_error if by_output else x.relative_error) or 0.0 for x in report.layers]
        out.out.print(f"error by depth  {_sparkline(depth)}")
    out.out.print(
        f"whole model     {size(report.model_bytes_before)} -> {size(report.model_bytes_after)}  "
        f"({report.model_bytes_after / max(1, report.model_bytes_before):.1%})"
    )
    out.out.print(
        f"parameters      {report.targeted_share:.1%} of all are in these layers; "
        f"{report.kept_parameters:.1%} of those are kept"
    )
    if report.skipped:
        out.out.print(f"left dense      {_reasons(report.skipped)}")


def _show_dense(out: Console, report: DenseReport, every_layer: bool) -> None:
    out.out.print(f"[bold]{escape(report.name)}[/]   dense", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
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


def show_comparison(out: Console, rows: Sequence[Measured]) -> None:
    """Dense beside compressed: bytes, perplexity and its distance from dense's, time, and what the model says."""
    from ..demo import WINDOWS

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for head in ("", "layers", "model", "perplexity", "log gap", "took"):
        table.add_column(head, justify="left" if not head else "right", no_wrap=True)
    dense, ours = rows[0], rows[-1]
    for row in rows:
        table.add_row(
            row.name,
            f"{size(row.layer_bytes)} {row.layer_bytes / dense.layer_bytes:4.0%}",
            size(row.model_bytes),
            _with_error(row.perplexity, ".1f" if row.perplexity.value < 1e4 else ".2g"),
            _with_error(row.gap, ".3f") if row.gap is not None else "",
            f"{row.seconds:.0f} s" if row.seconds else "",
            style="bold" if row is ours else "",
        )
    out.table(table)
    for row in rows:
        out.out.print(f"[bold]{row.name}[/] says: {escape(row.sentence)}")
    out.out.print(
        "\nLog gap: log-perplexity above that of dense; ± one standard error. The text is the"
        f"\nfirst {WINDOWS} of README's 32 windows; with its longer calibration losparse comes closer,"
        "\nand with --refine blocks closer still."
        f"\nGo on with: losparse inspect {ours.folder} --layers"
    )


def _with_error(estimate: Estimate, shape: str) -> str:
    error = "" if estimate.error is None else f" ± {estimate.error:{shape}}"
    return f"{estimate.value:{shape}}{error}"


def _write_csv(report: Report | DenseReport) -> None:
    from ..checkpoint.report import Report as Compressed

    writer = csv.writer(sys.stdout, lineterminator="\n")
    if isinstance(report, Compressed):
        writer.writerow(
            ["layer", "out_features", "in_features", "rank", "nnz", "density", "pattern", "layout", "bytes_before",
             "bytes_after", "relative_error", "output_error"]
        )  # fmt: skip
        for x in report.layers:
            writer.writerow(
                [x.name, *x.shape, x.spec.rank, x.spec.nnz, f"{x.density:.6g}", x.spec.pattern, x.spec.layout,
                 x.bytes_before, x.bytes_after,
                 "" if x.relative_error is None else f"{x.relative_error:.6g}",
                 "" if x.output_error is None else f"{x.output_error:.6g}"]
            )  # fmt: skip
        return
    ranks = sorted({r for x in report.layers for r in x.energy})
    writer.writerow(["layer", "out_features", "in_features", "bytes", "reason", *(f"energy_{r}" for r in ranks)])
    for y in report.layers:
        writer.writerow(
            [y.name, *(y.shape or ("", "")), y.nbytes, y.reason or "", *(y.energy.get(r, "") for r in ranks)]
        )


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


def _bar(share: float, width: int = 6) -> str:
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    return "█" * (eighths // 8) + (BLOCKS[eighths % 8] if eighths % 8 else "")


def _sparkline(values: Sequence[float], width: int = 40) -> str:
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
