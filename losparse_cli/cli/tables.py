"""Reports as tables a person reads at a glance, as CSV, or as JSON."""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.markup import escape

from ..errors import UsageError
from .columns import Column, show_columns
from .console import Console, clean, size

if TYPE_CHECKING:
    from ..checkpoint.report import LayerReport, Report
    from ..inspection import DenseLayer, DenseReport

BLOCKS = " ▏▎▍▌▋▊▉█"
SPARKS = "▁▂▃▄▅▆▇█"
HEADS = {"held_out_error": "held-out error", "output_error": "in-sample error", "relative_error": "error"}
SORTED_BY = {"bytes": "after"}
"""Order -> head of its column, where they differ."""


class Group:
    """Layers shown in one line: a block, a kind, or a single layer. measure: which error is shown."""

    def __init__(self, name: str, layers: Sequence[LayerReport], measure: str) -> None:
        from ..checkpoint.report import error_of

        self.name, self.layers = name, layers
        self.before = sum(x.bytes_before for x in layers)
        self.after = sum(x.bytes_after for x in layers)
        self.share = self.after / max(1, self.before)
        self.nnz = sum(x.spec.nnz for x in layers)
        self.density = self.nnz / max(1, sum(x.parameters for x in layers))
        self.bits = 8 * self.after / max(1, sum(x.parameters for x in layers))
        self.error = error_of(layers, measure)


SORTS: dict[str, Callable[[Group], float]] = {
    "name": lambda group: 0,  # the order of the model, which a stable sort keeps
    "error": lambda group: -(group.error or 0.0),
    "bytes": lambda group: -group.after,
    "share": lambda group: -group.share,
    "rank": lambda group: -max(x.spec.rank for x in group.layers),
    "nnz": lambda group: -group.nnz,
    "density": lambda group: -group.density,
    "bits": lambda group: -group.bits,
}
DENSE_SORTS: dict[str, Callable[[Sequence[DenseLayer]], float]] = {
    "name": lambda layers: 0,
    "bytes": lambda layers: -sum(x.nbytes for x in layers),
}


def check_sort(sort: str) -> None:
    if sort not in SORTS:
        raise UsageError(f"--sort is one of {', '.join(SORTS)}, not {sort!r}.")


def show_report(
    out: Console, report: Report | DenseReport, *, every_layer: bool, sort: str, as_csv: bool, as_json: bool,
    spectra: bool = True,
) -> None:  # fmt: skip
    """Print a report in the form asked for; UsageError for an order that it does not have.

    spectra: whether a table shows those of a dense model, which takes a line for every layer.
    """
    from ..checkpoint.report import Report as Compressed
    from ..checkpoint.report import telling_error

    if isinstance(report, Compressed):
        measure = telling_error(report.layers)
        if sort == "error" and all(getattr(x, measure) is None for x in report.layers):
            raise UsageError(
                f"--sort error is for what compress made: of the layers of {report.name} no error is recorded. Sort by "
                f"one of {', '.join(name for name in SORTS if name != 'error')}."
            )
        ordered = sorted(report.layers, key=lambda x: SORTS[sort](Group(x.name, [x], measure)))
        if as_json:
            out.data({"name": report.name} | replace(report, layers=tuple(ordered)).to_dict())
        elif as_csv:
            _write_csv(ordered)
        else:
            _show_compressed(out, report, every_layer, sort, measure)
        return
    if sort not in DENSE_SORTS:
        raise UsageError(f"--sort {sort} is for compressed checkpoints; a dense one has {' and '.join(DENSE_SORTS)}.")
    layers = sorted(report.layers, key=lambda x: DENSE_SORTS[sort]([x]))
    if as_json:
        out.data(replace(report, layers=tuple(layers)).to_dict())
    elif as_csv:
        _write_dense_csv(layers)
    else:
        _show_dense(out, report, every_layer, sort, spectra)


def _show_compressed(out: Console, report: Report, every_layer: bool, sort: str, measure: str) -> None:
    from ..checkpoint.report import error_range, text_used

    def group(name: str, layers: Sequence[LayerReport]) -> Group:
        return Group(name, layers, measure)

    whole = [group("all", report.inner)]
    aside = [x for x in report.layers if x.aside]
    if report.embedding_bits is not None:  # which have bits of their own, and would blur those that were asked for
        whole.append(group("aside", aside))
    footer = f"{len(whole[0].layers)} layers" + (f"\n{_aside(aside)}" if len(whole) > 1 else "")

    def total(of: Callable[[Group], str]) -> str:
        return "\n".join(of(g) for g in whole)

    blocks = [group(name, layers) for name, layers in _by_block(report.layers).items()]
    groups = [group(x.name, [x]) for x in report.layers] if every_layer else blocks
    groups = sorted(groups, key=SORTS[sort])
    largest = max((g.error or 0.0 for g in groups), default=0.0) or 1.0
    columns = [
        Column("shape", [_one(f"{x.shape[0]} x {x.shape[1]}" for x in g.layers) for g in groups], goes=7),
        Column("rank", [_range([x.spec.rank for x in g.layers]) for g in groups], goes=6),
        Column("nnz", [f"{g.nnz:,}" for g in groups], total(lambda g: f"{g.nnz:,}"), goes=1),
        Column("density", [f"{g.density:.3f}" for g in groups], total(lambda g: f"{g.density:.3f}"), goes=4),
        Column("pattern", [_one(x.spec.pattern for x in g.layers) for g in groups], left=True, goes=5),
        Column("layout", [_one(x.spec.layout for x in g.layers) for g in groups], left=True, goes=3),
        Column("bits", [f"{g.bits:.2f}" for g in groups], total(lambda g: f"{g.bits:.2f}"), goes=8),
        Column("before", [size(g.before) for g in groups], total(lambda g: size(g.before)), goes=2),
        Column("after", [size(g.after) for g in groups], total(lambda g: size(g.after))),
        Column(
            "share",
            [f"{g.share:5.1%} [cyan]{_bar(g.share)}[/]" for g in groups],
            total(lambda g: f"{g.share:5.1%}"),
            left=True,
        ),
    ]
    if any(g.error is not None for g in groups):
        errors = ["-" if g.error is None else f"{g.error:.3f} [red]{_bar(g.error / largest)}[/]" for g in groups]
        of_all = total(lambda g: "-" if g.error is None else f"{g.error:.3f}")
        columns.append(Column(HEADS[measure], errors, of_all, left=True))
    if not every_layer:
        columns = columns[1:]
    # What is the same in every line is said once, above the table, so that the rest fits a terminal.
    same = [
        column for column in columns
        if column.head in ("shape", "rank", "density", "pattern", "layout") and len(groups) > 2
        and len(set(column.cells)) == 1
    ]  # fmt: skip
    _print_title(out, report.name, report.source.get("name"))
    if same:
        out.show("   ".join(f"{column.head} {column.cells[0]}" for column in same), style="dim")
    shown = [replace(x, goes=0) if x.head == SORTED_BY.get(sort, sort) else x for x in columns if x not in same]
    head = "layer" if every_layer else "block"
    show_columns(out, head, [g.name for g in groups], shown, footer=footer)
    span = error_range(report.layers, measure)
    if span is not None and len(report.layers) > 1:
        known = [block.error for block in blocks if block.error is not None]  # of embeddings it may not be
        line = f"{_sparkline(known)}  " if len(known) > 1 else ""
        out.show(f"error by depth  {line}single layers {span[0]:.3f} to {span[1]:.3f}")
    out.show(
        f"whole model     {size(report.model_bytes_before)} -> {size(report.model_bytes_after)}  "
        f"({report.model_bytes_after / max(1, report.model_bytes_before):.1%})"
    )
    out.show(
        f"parameters      {report.targeted_share:.1%} of all are in these layers; "
        f"{report.kept_parameters:.1%} of those are kept"
    )
    if report.calibration:
        out.show(f"text            {escape(clean(text_used(report.calibration), 200))}")
    if report.skipped:
        out.show(f"left dense      {escape(_reasons(report.skipped))}")


def _aside(layers: Sequence[LayerReport]) -> str:
    """Embeddings and heads, counted."""
    heads = sum(x.head for x in layers)
    counts = ((len(layers) - heads, "embedding"), (heads, "head"))
    return ", ".join(f"{count} {name}{'s' * (count > 1)}" for count, name in counts if count)


def _print_title(out: Console, name: str, source: object) -> None:
    """The checkpoint, and below it what it was made from."""
    made_from = clean(source or "")
    out.show(f"[bold]{escape(clean(name or made_from or 'compressed model'))}[/]")
    if name and made_from:
        out.show(f"made from {escape(made_from)}", style="dim")


def _show_dense(out: Console, report: DenseReport, every_layer: bool, sort: str, spectra: bool) -> None:
    ranks = sorted({r for x in report.layers for r in x.energy if r >= 8}) if spectra else []
    members: dict[Any, list[DenseLayer]] = {}
    for x in report.layers:
        kind = re.sub(r"\.\d+(?=\.)", ".*", x.name), x.shape, x.reason
        members.setdefault(x.name if every_layer or ranks else kind, []).append(x)
    groups = sorted(members.values(), key=DENSE_SORTS[sort])
    firsts = [group[0] for group in groups]
    columns = [
        Column("shape", ["-" if x.shape is None else f"{x.shape[0]} x {x.shape[1]}" for x in firsts], goes=2),
        Column("bytes", [size(sum(x.nbytes for x in group)) for group in groups], goes=1 if sort == "name" else 0),
        Column(
            "compress?",
            [_whether(x) for x in firsts],
            left=True, goes=3 if ranks else 0, wraps=True,
        ),
        *(
            Column(f"rank {r}", [f"{x.energy[r]:.1%}" if r in x.energy else "" for x in firsts], goes=goes)
            for r, goes in zip(ranks, (4, 0, 5, 0, 6, 0), strict=False)
        ),
    ]  # fmt: skip
    names = [re.sub(r"\.\d+(?=\.)", ".*", group[0].name) if len(group) > 1 else group[0].name for group in groups]
    counts = [f" ({len(group)})" if len(group) > 1 else "" for group in groups]
    out.show(f"[bold]{escape(clean(report.name))}[/]   dense")
    show_columns(out, "layer", names, columns, after=counts)
    chosen = [x for x in report.layers if x.reason is None]
    out.show(
        f"{len(chosen)} layers would be compressed: {report.targeted_parameters / max(1, report.parameters):.1%} of "
        f"{report.parameters:,} parameters, {size(sum(x.nbytes for x in chosen))} of {size(report.model_bytes)}"
    )


def _whether(layer: DenseLayer) -> str:
    """Whether it would be compressed, and why not."""
    if layer.reason is not None:
        return f"[dim]no: {escape(layer.reason)}[/]"
    return "[green]yes[/]" + (", in whole numbers" if layer.rows else "")


def _write_csv(layers: Sequence[LayerReport]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(
        ["layer", "out_features", "in_features", "rank", "nnz", "density", "pattern", "layout", "bits",
         "bytes_before", "bytes_after", "relative_error", "output_error", "held_out_error"]
    )  # fmt: skip
    for x in layers:
        s = x.spec
        writer.writerow(
            [x.name, *x.shape, s.rank, s.nnz, f"{x.density:.6g}", s.pattern, s.layout, f"{x.bits:.6g}",
             x.bytes_before, x.bytes_after,
             "" if x.relative_error is None else f"{x.relative_error:.6g}",
             "" if x.output_error is None else f"{x.output_error:.6g}",
             "" if x.held_out_error is None else f"{x.held_out_error:.6g}"]
        )  # fmt: skip


def _write_dense_csv(layers: Sequence[DenseLayer]) -> None:
    writer = csv.writer(sys.stdout, lineterminator="\n")
    ranks = sorted({r for x in layers for r in x.energy})
    writer.writerow(["layer", "out_features", "in_features", "bytes", "reason", *(f"energy_{r}" for r in ranks)])
    for x in layers:
        writer.writerow(
            [x.name, *(x.shape or ("", "")), x.nbytes, x.reason or "", *(x.energy.get(r, "") for r in ranks)]
        )


def _by_block(layers: Sequence[LayerReport]) -> dict[str, list[LayerReport]]:
    """Layers of one repeated block together: the name up to and with its first number."""
    groups: dict[str, list[LayerReport]] = {}
    for layer in layers:
        match = re.match(r"(.*?\.\d+)\.", layer.name)
        groups.setdefault(match[1] if match else layer.name, []).append(layer)
    return groups


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
    return "".join(SPARKS[round((v - low) / scale * 7)] for v in means)


def _reasons(skipped: dict[str, str]) -> str:
    counts: dict[str, int] = {}
    for reason in skipped.values():
        counts[reason] = counts.get(reason, 0) + 1
    return ", ".join(f"{count} x {reason}" for reason, count in counts.items())
