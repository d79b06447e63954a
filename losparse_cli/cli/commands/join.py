"""`losparse join`: its signature, then one call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import options as o


def join(
    parts: Annotated[list[Path], typer.Argument(help="The folders of all parts, in any order.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    resume: o.Resume = "auto",
    overwrite: o.Overwrite = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Make one checkpoint of the parts that `losparse compress --part 1/3` and the others wrote.

    [dim]losparse join part-1 part-2 part-3 -o model-small[/dim]
    """
    from ...join import join as make
    from .. import console as c
    from .. import summary as s

    out = c.Console(json=json, quiet=quiet)
    with c.interruptible(), c.CountProgress(out, "Joining") as progress:
        result = make(parts, output, resume=resume, overwrite=overwrite, progress=progress)
    s.show_joined(out, result)
    out.flush()
