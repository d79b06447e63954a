"""`losparse export`: its signature, then one call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import options as o


def export(
    source: o.Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    dense: Annotated[bool, typer.Option("--dense", help="Plain weights U V + S; the only form.")] = True,
    max_shard_size: o.MaxShardSize = "5GB",
    overwrite: o.Overwrite = False,
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Write a plain checkpoint that any engine loads, from a compressed one."""
    from ...export import export as write
    from .. import console as c

    out = c.Console(json=json, quiet=quiet)
    with c.interruptible(), c.CountProgress(out, "Exporting") as progress:
        folder = write(
            source,
            output,
            revision=revision,
            cache_dir=cache_dir,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            progress=progress,
        )
    out.data({"output": str(folder)})
    out.show(f"[bold green]Done.[/] {c.short(folder)} holds the dense model.")
    out.flush()
