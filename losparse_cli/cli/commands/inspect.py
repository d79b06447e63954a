"""`losparse inspect`: its signature, then one call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import options as o


def inspect(
    source: o.Source,
    layers: Annotated[bool, typer.Option("--layers", help="A line for every layer, not every block.")] = False,
    sort: Annotated[
        str, typer.Option(help="Order of the lines: name, error, bytes, share, rank, nnz, density or bits.")
    ] = "name",
    spectrum: Annotated[
        bool, typer.Option("--spectrum", help="Dense folder: energy that rank 8, 16, 32, ... captures.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw errors and bytes, or the spectra of a dense folder, into a .png, .svg or .html file.",
            rich_help_panel=o.SHOW,
            show_default=False,
        ),
    ] = None,
    csv: Annotated[
        bool, typer.Option("--csv", help="Print a CSV line for every layer.", rich_help_panel=o.SHOW)
    ] = False,
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Show what a compressed checkpoint holds, or what compress would do to a dense one.

    [dim]losparse inspect model-small --layers --sort error[/dim]

    [dim]losparse inspect model --spectrum[/dim]
    """
    from ...inspection import inspect as look
    from .. import console as c
    from .. import tables
    from ..plot import check_plot, save_plot

    out = c.Console(json=json or csv)
    tables.check_sort(sort)
    if plot is not None:
        check_plot(plot)
    with c.CountProgress(out, f"Reading {source}") as progress:
        report = look(
            source,
            spectrum=None if plot is not None and not spectrum else spectrum,
            revision=revision,
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    # Spectra that only the picture needs leave the table as short as it is without one.
    tables.show_report(out, report, every_layer=layers, sort=sort, as_csv=csv, as_json=json, spectra=spectrum)
    out.flush()
    if plot is not None:
        save_plot(report, plot)
        out.say(f"The picture is in {c.short(plot)}.")
