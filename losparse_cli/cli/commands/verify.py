"""`losparse verify`: its signature, then one call."""

from __future__ import annotations

import typer

from .. import options as o


def verify(
    source: o.Source,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Check hashes, headers, config, every index and every stream of codes, without loading a model.

    [dim]losparse verify model-small[/dim]
    """
    from dataclasses import asdict

    from ...verify import verify as check
    from .. import console as c

    out = c.Console(json=json, quiet=quiet)
    with c.CountProgress(out, "Checking") as progress:
        found = check(source, progress=progress)
    out.data(asdict(found) | {"sound": found.sound})
    for problem in found.problems:
        out.complain(problem)
    if found.sound:
        hashes = f"{found.hashed} files by SHA-256" if found.hashed else "no hashes recorded"
        out.show(f"[bold green]Sound.[/] {found.layers} layers, {found.tensors} tensors, {hashes}.")
    out.flush()
    if not found.sound:
        raise typer.Exit(1)
