"""`losparse push`: its signature, then one call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import options as o


def push(
    folder: Annotated[Path, typer.Argument(help="A compressed checkpoint.", show_default=False)],
    repository: Annotated[str, typer.Argument(help="Hub id, such as user/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Verify a compressed checkpoint and upload it to the Hub in one commit.

    [dim]losparse push model-small user/model-small[/dim]
    """
    from .. import console as c

    out = c.Console(json=json, quiet=quiet)
    upload(out, folder, repository, private)
    out.flush()


def upload(out: object, folder: Path, repository: str, private: bool) -> None:
    from ...push import push as send
    from .. import console as c

    assert isinstance(out, c.Console)
    with out.status(f"Uploading to {repository}"):
        address = send(folder, repository, private=private)
    out.data({"repository": address})
    out.show(f"[bold green]Pushed.[/] {address}")
