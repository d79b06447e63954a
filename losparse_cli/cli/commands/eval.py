"""`losparse eval`: its signature, then one call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import options as o
from ..app import app


@app.command(name="eval")
def eval_(
    source: o.Source,
    text: Annotated[Path, typer.Option(help="UTF-8 file to measure on.", show_default=False)],
    against: Annotated[
        str | None, typer.Option(help="The dense model to compare with: a folder or a Hub id.", show_default=False)
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens in a window; of an encoder, the most of a line.")] = 512,
    stride: Annotated[
        int | None,
        typer.Option(help="New tokens in a window, which alone are predicted.", show_default="windows are disjoint"),
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows, or an encoder's lines, to measure; 0 for all.")] = 32,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=o.RUN)] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32 or bfloat16.", rich_help_panel=o.RUN)] = "auto",
    memory: Annotated[
        str,
        typer.Option(
            help="With --against: hold both models together, or apart, with the first one's predictions in a "
            "temporary folder; auto asks whether they fit.",
            rich_help_panel=o.RUN,
        ),
    ] = "auto",
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Measure a model on a text: perplexity, and its distance from the dense model, with standard errors.

    [dim]losparse eval model-small --against user/model --text news.txt[/dim]
    """
    from ...evaluate import evaluate, read_text
    from .. import console as c
    from .. import tables

    out = c.Console(json=json, quiet=quiet)
    c.calm_libraries()
    content = read_text(text)
    with c.CountProgress(out, "Evaluating") as progress:
        found = evaluate(
            source,
            content,
            against=against,
            length=length,
            stride=stride,
            windows=windows,
            device=device,
            dtype=dtype,
            memory=memory,
            revision=revision,
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
            on_window=progress.advance,
        )
    out.data(found.to_dict())
    tables.show_evaluation(out, found)
    out.flush()
