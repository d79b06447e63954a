"""`losparse demo`: its signature, then one call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from .. import options as o


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("losparse-demo"),
    debug: o.Debug = False,
) -> None:
    """Compress a small real model to 4.25 and 3.25 bits a weight, beside dense and plain rounding to 4 bits."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read where torch imports tqdm; of unpacking, which has its own bar
    from ...demo import demo as show
    from .. import console as c
    from .. import tables
    from ..comparison import show_comparison
    from ..summary import minutes

    out = c.Console()
    c.calm_libraries()

    def say(message: str, left: float | None) -> None:
        out.say(f"[bold]{message}[/]" + (f" (about {minutes(left)} left in all)" if left is not None else ""))

    rows = show(
        output,
        on_step=say,
        watch=lambda: c.LayerProgress(out),
        on_report=lambda report: tables.show_report(
            out, report, every_layer=False, sort="name", as_csv=False, as_json=False
        ),
    )
    show_comparison(out, rows)
