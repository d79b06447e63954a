"""`losparse bench`: its signature, then one call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...errors import UsageError
from .. import options as o


def bench(
    source: o.Source,
    against: Annotated[
        str | None, typer.Option(help="The dense model to compare with: a folder or a Hub id.", show_default=False)
    ] = None,
    peer: Annotated[
        Path | None, typer.Option(help="A GGUF file to run in llama.cpp, in the same run.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(help="Prompts that the model reads at once.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt, which are random.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens that the model writes after it; 0 to only read.")] = 32,
    rows: Annotated[str, typer.Option(help="Rows of x that single layers are timed with.")] = "1,16,256",
    rounds: Annotated[int, typer.Option(help="Times that all is measured, of which the median counts.")] = 5,
    threads: o.Threads = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw how many times faster layers and models are into a .png, .svg or .html file.",
            rich_help_panel=o.SHOW,
            show_default=False,
        ),
    ] = None,
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Time a compressed model and its layers, and weigh it in memory, beside the dense model in the same run.

    [dim]losparse bench model-small --against user/model[/dim]
    """
    from .. import console as c

    out = c.Console(json=json, quiet=quiet)
    counts = _numbers(rows)
    if plot is not None:
        from ..plot import check_plot

        check_plot(plot)
    from ...bench import bench as measure
    from ..speed_tables import show_speed

    c.calm_libraries()
    with c.CountProgress(out, "Measuring") as progress:
        found = measure(
            source,
            against=against,
            peer=peer,
            batch=batch,
            prompt=prompt,
            new_tokens=new_tokens,
            rows=counts,
            rounds=rounds,
            threads=threads,
            device=device,
            dtype=dtype,
            revision=revision,
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    out.data(found.to_dict())
    show_speed(out, found)
    out.flush()
    if plot is not None:
        from ..plot import save_plot

        save_plot(found, plot)
        out.say(f"The picture is in {c.short(plot)}.")


def _numbers(text: str) -> tuple[int, ...]:
    """Each once, in the order given; UsageError if anything else stands there."""
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise UsageError(f"--rows lists whole numbers, such as 1,16,256, not {text!r}.") from error
