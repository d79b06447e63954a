"""`losparse export`: its signature, then one call."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import options as o

if TYPE_CHECKING:
    from ...export import PackedFolder
    from ...exporting.gguf import GgufFile
    from ..console import Console


def export(
    source: o.Source,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write, or the file of --gguf.", show_default=False)
    ],
    dense: Annotated[
        bool, typer.Option("--dense", help="Plain weights U V + S, which any engine loads: the default.")
    ] = False,
    gguf: Annotated[
        bool,
        typer.Option("--gguf", help="One file for llama.cpp, in which what --grid made arrives exactly."),
    ] = False,
    compressed_tensors: Annotated[
        bool,
        typer.Option(
            "--compressed-tensors",
            help="A folder as pack-quantized, which vLLM, SGLang and transformers read; of what --grid made.",
        ),
    ] = False,
    gguf_type: Annotated[
        str,
        typer.Option(help="With --gguf: auto (exact, or else 16-bit floats), f32, f16, bf16, q8_0 or q4_0."),
    ] = "auto",
    max_shard_size: o.MaxShardSize = "5GB",
    overwrite: o.Overwrite = False,
    revision: o.Revision = None,
    cache_dir: o.CacheDir = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Write a compressed checkpoint for other engines: plain weights, or its whole numbers as they know them.

    [dim]losparse export model-small -o model-dense[/dim]

    [dim]losparse export model-small --gguf -o model.gguf[/dim]
    """
    from ...errors import UsageError
    from ...export import export as write
    from ...export import export_gguf, export_packed
    from .. import console as c

    if gguf_type != "auto" and not gguf:
        raise UsageError(f"--gguf-type {gguf_type} is of a file for llama.cpp: add --gguf, or leave it out.")
    forms = {"--dense": dense, "--gguf": gguf, "--compressed-tensors": compressed_tensors}
    asked = [option for option, given in forms.items() if given]
    if len(asked) > 1:
        raise UsageError(f"{' and '.join(asked)} are different forms: give one of them.")
    out = c.Console(json=json, quiet=quiet)
    with c.interruptible(), c.CountProgress(out, "Exporting") as progress:
        where: dict[str, Any] = {
            "revision": revision, "cache_dir": cache_dir, "overwrite": overwrite, "progress": progress,
        }  # fmt: skip
        if gguf:
            file = export_gguf(source, output, kind=gguf_type, **where)
        elif compressed_tensors:
            packed = export_packed(source, output, max_shard_size=max_shard_size, **where)
        else:
            folder = write(source, output, max_shard_size=max_shard_size, **where)
    if gguf:
        _show_gguf(out, file)
    elif compressed_tensors:
        _show_packed(out, packed)
    else:
        out.data({"output": str(folder)})
        out.show(f"[bold green]Done.[/] {c.short(folder)} holds the dense model.")
    out.flush()


def _show_packed(out: Console, made: PackedFolder) -> None:
    """What the folder holds, and how U V are loaded beside it."""
    from .. import console as c

    for doubt in made.doubts:
        out.warn(doubt)
    out.data(
        {"output": str(made.output), "adapter": made.adapter and str(made.adapter), "layers": made.layers,
         "doubts": list(made.doubts)}
    )  # fmt: skip
    folder = c.short(made.output)
    out.show(
        f"[bold green]Done.[/] {folder} holds {made.layers} layers as pack-quantized. Serve it: vllm serve {folder}"
    )
    if made.adapter is not None:
        adapter = c.short(made.adapter)
        out.show(
            f"U V are the adapter {adapter}: vllm serve {folder} --enable-lora --lora-modules uv={adapter}", whole=True
        )


def _show_gguf(out: Console, made: GgufFile) -> None:
    """What the file holds, and whether that is what the checkpoint holds."""
    from .. import console as c

    for doubt in made.doubts:
        out.warn(doubt)
    out.data(
        {"output": str(made.path), "adapter": made.adapter and str(made.adapter), "exact": made.exact,
         "nearly": made.nearly, "requantized": made.rounded, "floats": made.floats, "type": made.kind,
         "doubts": list(made.doubts)}
    )  # fmt: skip
    layers = [f"{made.exact} exactly as they are"] if made.exact else []
    layers += [f"{made.nearly} with factors rounded to 16 bits"] if made.nearly else []
    layers += [f"{made.rounded} rounded again, to {made.kind}"] if made.rounded else []
    layers += [f"{made.floats} as {made.kind}"] if made.floats else []
    out.show(
        f"[bold green]Done.[/] {c.short(made.path)} ({c.size(made.path.stat().st_size)}) is for llama.cpp; of its "
        f"matrices {', '.join(layers)}."
    )
    if made.floats and not (made.exact or made.nearly):
        out.show(
            "In floats it is as large as the dense model. What compress makes with --grid int4 or int8 goes into such "
            "a file in 4 or 8 bits as it is."
        )
    beside = "" if made.adapter is None else f" --lora {c.short(made.adapter)}"
    out.show(f"Run it: llama-server -m {c.short(made.path)}{beside}", whole=True)
