"""A compressed checkpoint -> plain weights that any engine loads, or files in which engines keep its whole numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from safetensors.torch import save_file

from .checkpoint.config import dense_config, layer_specs
from .checkpoint.output import output_path, whole_file
from .checkpoint.source import open_checkpoint
from .checkpoint.writer import write_json
from .errors import UsageError
from .exporting.dense import dense_units
from .exporting.folder import write_folder
from .exporting.gguf import GgufFile, GgufWriter
from .exporting.packed import packed_checkpoint
from .progress import Progress, listener


def export(
    source: str | Path,
    output: Path,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write the dense form of a compressed checkpoint to `output`, and return that folder.

    Each layer is U V + S, summed in float32 and rounded once to the stored dtype. One layer is in memory at
    a time; a killed export goes on where it was. CheckpointError if a layer holds what is no number, or config.json
    asks for other experts than there are.
    """
    told = listener(progress)
    checkpoint = open_checkpoint(source, revision=revision, cache_dir=cache_dir)
    output = output_path(output)
    write_folder(
        checkpoint,
        dense_units(checkpoint),
        dense_config(checkpoint.config),
        output,
        "dense",
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        told=told,
    )
    return output


def export_gguf(
    source: str | Path,
    output: str | Path,
    *,
    kind: str = "auto",
    revision: str | None = None,
    cache_dir: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> GgufFile:
    """Write a compressed checkpoint as the GGUF file `output` for llama.cpp, and U V beside it where they stand alone.

    kind: auto, by which layers of `--grid` arrive exactly as they are and others in 16-bit floats; or f32, f16, bf16,
    q8_0 or q4_0 for all of them. UsageError for an architecture that llama.cpp does not know, and MissingExtraError
    without `gguf`. CheckpointError if a layer holds what is no number.
    """
    told = listener(progress)
    checkpoint = open_checkpoint(source, revision=revision, cache_dir=cache_dir)
    output = output_path(output)
    if output.suffix != ".gguf":
        raise UsageError(f"--output {output} is to be a file whose name ends in .gguf.")
    adapter = output.with_name(f"{output.stem}-lora.gguf")
    layer_specs(checkpoint)  # a dense model is llama.cpp's own converter's to read
    writer = GgufWriter(checkpoint, kind)
    reads = [checkpoint.folder]
    with whole_file(output, overwrite=overwrite, reads=reads) as model:
        if writer.has_adapter:
            with whole_file(adapter, overwrite=overwrite, reads=reads) as beside:
                made = writer.write(model, beside, told)
        else:
            made = writer.write(model, None, told)
            if overwrite:  # one of what was there before is none of this model
                adapter.unlink(missing_ok=True)
    return replace(made, path=output, adapter=adapter if writer.has_adapter else None)


ADAPTER = "adapter"


@dataclass(frozen=True)
class PackedFolder:
    """output: of the model. adapter: the folder of U V as PEFT's LoRA, None without any. layers: how many keep their
    whole numbers. doubts: what engines may stumble over, a sentence each."""

    output: Path
    adapter: Path | None
    layers: int
    doubts: tuple[str, ...] = ()


def export_packed(
    source: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> PackedFolder:
    """Write a checkpoint of `--grid` as `pack-quantized` of compressed-tensors, which vLLM, SGLang and transformers
    read; and U V, where there are some, as an adapter of PEFT in its folder `adapter`.

    UsageError that names a layer which the format cannot hold; CheckpointError if one holds what is no number.
    """
    told = listener(progress)
    checkpoint = open_checkpoint(source, revision=revision, cache_dir=cache_dir)
    output = output_path(output)
    made = packed_checkpoint(checkpoint)

    def write_adapter(folder: Path) -> None:
        if made.adapter:
            (folder / ADAPTER).mkdir(exist_ok=True)
            save_file(made.adapter, folder / ADAPTER / "adapter_model.safetensors", {"format": "pt"})
            write_json(folder / ADAPTER / "adapter_config.json", made.adapter_config)

    write_folder(
        checkpoint,
        made.units,
        made.config,
        output,
        "pack-quantized",
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        told=told,
        beside=write_adapter,
    )
    return PackedFolder(output, output / ADAPTER if made.adapter else None, made.layers, made.doubts)
