"""`losparse generate`: its signature, then one call."""

from __future__ import annotations

from typing import Annotated

import typer

from ...errors import UsageError
from .. import options as o

CHOICE = "Choice of tokens"


def generate(
    source: o.Source,
    prompt: Annotated[
        str | None,
        typer.Argument(help="A message to answer, or with --raw a text to go on from; else standard input's.",
                       show_default=False),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="What the model is told before the message.", show_default=False)
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Go on from the prompt as it is, in no chat's format.")] = False,
    new_tokens: Annotated[int, typer.Option(help="Most tokens to write.")] = 512,
    temperature: Annotated[
        float | None,
        typer.Option(help="0 for the likeliest token.", rich_help_panel=CHOICE, show_default="the checkpoint's"),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Share of probability that is drawn from.", rich_help_panel=CHOICE,
                     show_default="the checkpoint's"),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Tokens that are drawn from.", rich_help_panel=CHOICE, show_default="the checkpoint's"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the random choice.", rich_help_panel=CHOICE, show_default=False)
    ] = None,
    threads: o.Threads = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:  # fmt: skip
    """Let a model, compressed or dense, answer a prompt, and say how fast it was.

    [dim]losparse generate model-small "Why is the sky blue?"[/dim]
    """
    import io
    import sys

    from rich.markup import escape

    from .. import console as c

    out = c.Console(json=json, quiet=quiet)
    if prompt is None:
        if sys.stdin.isatty():
            raise UsageError('Give a prompt: losparse generate MODEL "Why is the sky blue?"')
        prompt = sys.stdin.buffer.read().decode(errors="surrogateescape")
    c.calm_libraries()
    with out.status(f"Loading {source}"):
        from ...generate import generate as write
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a letter shows another
    begun = False

    def hear(text: str) -> None:
        nonlocal begun
        begun = True
        sys.stdout.write(text)
        sys.stdout.flush()

    found = write(
        source,
        prompt,
        system=system,
        raw=raw,
        new_tokens=new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        threads=threads,
        device=device,
        dtype=dtype,
        revision=revision,
        cache_dir=cache_dir,
        trust_remote_code=trust_remote_code,
        on_text=None if json else hear,
    )
    if begun:
        sys.stdout.write("\n")
    out.data(found.to_dict())
    pace = "" if found.decode is None else f" at {found.decode:.0f} a second"
    out.say(
        f"[dim]{found.tokens} tokens{pace}; {found.prompt_tokens} of the prompt at {found.prefill:.0f} a second.[/]"
    )
    if found.plain is not None:
        out.say(f"[dim]transformers' own loop wrote them, because {escape(found.plain)}.[/]")
    out.flush()
