"""Per command: its signature, then one call. Heavy imports happen inside the bodies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .app import app


@app.command()
def compress(
    model: o.Source,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to write.", show_default="./<name>-losparse")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Columns of U, rows of V.", rich_help_panel=o.SIZE, show_default=False)
    ] = None,
    rank_ratio: Annotated[
        float | None,
        typer.Option(help="Share of the kept parameters in U and V.", rich_help_panel=o.SIZE, show_default="0"),
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of S that is zero.", rich_help_panel=o.SIZE, show_default=False)
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            help="Stored bytes of the compressed layers over their dense bytes, every index counted.",
            rich_help_panel=o.SIZE,
            show_default="0.85",
        ),
    ] = None,
    keep_parameters: Annotated[
        float | None,
        typer.Option(help="(r(m+n) + nnz) / mn, as papers count.", rich_help_panel=o.SIZE, show_default=False),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="Where S may be non-zero: unstructured, rows, columns, or N:M (N non-zeros in every M).",
            rich_help_panel=o.SIZE,
            show_default="unstructured",
        ),
    ] = None,
    threshold_scope: Annotated[
        str | None,
        typer.Option(
            help="Largest entries of each row, or of the matrix.", rich_help_panel=o.SIZE, show_default="matrix"
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            help="Alternations between U V and S; 1 is the paper's one pass.", rich_help_panel=o.SIZE, show_default="4"
        ),
    ] = None,
    exact_svd: Annotated[
        bool | None,
        typer.Option("--exact-svd", help="LAPACK's SVD instead of a randomized one.", rich_help_panel=o.SIZE),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(help="Glob of module names to compress; repeatable.", rich_help_panel=o.SIZE, show_default="all"),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            help="Glob of module names to leave dense; repeatable.", rich_help_panel=o.SIZE, show_default=False
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="YAML file of these settings, also per glob; flags win.", rich_help_panel=o.SIZE, show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of the randomized SVD.", rich_help_panel=o.RUN, show_default="0")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.", rich_help_panel=o.RUN)] = "auto",
    max_shard_size: o.MaxShardSize = "5GB",
    resume: Annotated[
        str, typer.Option(help="Go on with a killed run: auto, required or never.", rich_help_panel=o.RUN)
    ] = "auto",
    overwrite: o.Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan and what it needs; write nothing.", rich_help_panel=o.RUN)
    ] = False,
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(help="Upload the result to this repository.", rich_help_panel=o.HUB, show_default=False),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push-to-hub: a private repository.", rich_help_panel=o.HUB)
    ] = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Compress a model: each targeted weight becomes U V + S.

    [dim]losparse compress user/model --rank 8 --sparsity 0.9[/dim]
    """
    from ..budget.recipe import make_recipe
    from ..errors import UsageError

    if private and not push_to_hub:
        raise UsageError("--private says how to create a repository: add --push-to-hub REPO, or leave it out.")
    flags = {
        "rank": rank,
        "rank_ratio": rank_ratio,
        "sparsity": sparsity,
        "keep": keep,
        "keep_parameters": keep_parameters,
        "pattern": pattern,
        "threshold_scope": threshold_scope,
        "iterations": iterations,
        "exact_svd": exact_svd or None,
        "seed": seed,
        "targets": tuple(targets or ()),
        "ignore": tuple(ignore or ()),
    }
    resolved = make_recipe(flags, recipe)  # contradictions are reported before anything heavy is imported
    if push_to_hub:
        from ..push import check_repository

        check_repository(push_to_hub)
    from ..compress import run
    from ..job.prepare import prepare
    from . import console as c

    out = c.Console(json=json, quiet=quiet)
    with out.status(f"Reading {model}"):
        job = prepare(
            model,
            output,
            resolved,
            device=device,
            revision=revision,
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
            max_shard_size=max_shard_size,
            plan_only=dry_run,
        )
    if dry_run:
        c.show_plan(out, job)
        return
    with c.interruptible(), c.LayerProgress(out) as progress:
        result = run(job, resume=resume, overwrite=overwrite, progress=progress)
    c.show_result(out, result)
    if push_to_hub:
        _push(out, result.output, push_to_hub, private)
    out.flush()


@app.command()
def inspect(
    source: o.Source,
    layers: Annotated[bool, typer.Option("--layers", help="A line for every layer, not every block.")] = False,
    sort: Annotated[
        str, typer.Option(help="Order of the lines: name, error, bytes, share, rank, nnz or density.")
    ] = "name",
    spectrum: Annotated[
        bool, typer.Option("--spectrum", help="Dense folder: energy that rank 8, 16, 32, ... captures.")
    ] = False,
    csv: Annotated[
        bool, typer.Option("--csv", help="Print a CSV line for every layer.", rich_help_panel=o.SHOW)
    ] = False,
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    trust_remote_code: o.TrustRemoteCode = False,
    json: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Show what a compressed checkpoint holds, or what compress would do to a dense one."""
    from ..inspection import inspect as look
    from . import console as c
    from . import tables

    out = c.Console(json=json or csv)
    tables.check_sort(sort)
    with out.status(f"Reading {source}") as status:
        report = look(
            source,
            spectrum=spectrum,
            revision=revision,
            cache_dir=cache_dir,
            trust_remote_code=trust_remote_code,
            on_layer=lambda name, count: status.update(f"Spectrum of {name} (of {count} layers)"),
        )
    tables.show_report(out, report, every_layer=layers, sort=sort, as_csv=csv, as_json=json)
    out.flush()


@app.command()
def export(
    source: o.Source,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.", show_default=False)],
    dense: Annotated[bool, typer.Option("--dense", help="Plain weights U V + S; the only form so far.")] = False,
    max_shard_size: o.MaxShardSize = "5GB",
    overwrite: o.Overwrite = False,
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Write a plain checkpoint that any engine loads, from a compressed one."""
    from ..errors import UsageError

    if not dense:
        raise UsageError("Say which form to export: add --dense for plain weights U V + S.")
    from ..export import export as write
    from . import console as c

    out = c.Console(quiet=quiet)
    with c.interruptible(), c.CountProgress(out, "Exporting") as progress:
        folder = write(
            source,
            output,
            revision=revision,
            cache_dir=cache_dir,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            on_tensor=progress.advance,
        )
    out.say(f"[bold green]Done.[/] {c.short(folder)} holds the dense model.")


@app.command()
def verify(
    source: o.Source,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Check hashes, headers, index, config and every index range, without loading a model."""
    from dataclasses import asdict

    from ..verify import verify as check
    from . import console as c

    out = c.Console(json=json, quiet=quiet)
    with c.CountProgress(out, "Checking") as progress:
        found = check(source, on_layer=progress.advance)
    out.data(asdict(found) | {"sound": found.sound})
    for problem in found.problems:
        out.complain(problem)
    if found.sound:
        hashes = f"{found.hashed} files by SHA-256" if found.hashed else "no hashes recorded"
        out.say(f"[bold green]Sound.[/] {found.layers} layers, {found.tensors} tensors, {hashes}.")
    out.flush()
    if not found.sound:
        raise typer.Exit(1)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A compressed checkpoint.", show_default=False)],
    repository: Annotated[str, typer.Argument(help="Hub id, such as user/name.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Verify a compressed checkpoint and upload it to the Hub in one commit."""
    from . import console as c

    _push(c.Console(quiet=quiet), folder, repository, private)


def _push(out: object, folder: Path, repository: str, private: bool) -> None:
    from ..push import push as upload
    from . import console as c

    assert isinstance(out, c.Console)
    with out.status(f"Uploading to {repository}"):
        address = upload(folder, repository, private=private)
    out.data({"repository": address})
    out.say(f"[bold green]Pushed.[/] {address}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the two results.")] = Path("losparse-demo"),
    debug: o.Debug = False,
) -> None:
    """Compress a small real model two ways, and compare bytes, perplexity and a sentence with dense."""
    from ..demo import demo as show
    from . import console as c
    from . import tables

    out = c.Console()
    c.calm_libraries()
    rows = show(
        output,
        on_step=lambda message: out.say(f"[bold]{message}[/]"),
        on_report=lambda report: tables.show_report(
            out, report, every_layer=False, sort="name", as_csv=False, as_json=False
        ),
    )
    tables.show_comparison(out, rows)
