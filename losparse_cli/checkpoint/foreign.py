"""What lies in a folder in place of plain weights, or beside them, and what to do about it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, SourceError

ADAPTER = "adapter_config.json"

WRAPPERS = {
    "_orig_mod.": "torch.compile", "module.": "DataParallel", "base_model.model.": "peft",
    "_fsdp_wrapped_module.": "FSDP", "_checkpoint_wrapped_module.": "activation checkpointing",
}  # fmt: skip
"""What a wrapper puts before each name of the model inside it -> the wrapper."""

# Files that packers write beside the weights; keys of config.json, at any depth; last parts of tensors' names.
PACKED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json", "quanto_qmap.json")
PACKED_KEYS = ("quantization_config", "compression_config", "quantization")
PACKED_TENSORS = (
    "qweight", "qzeros", "g_idx", "weight_packed", "weight_scale_inv", "absmax", "SCB", "gate_up_proj_blocks",
)  # fmt: skip

DEQUANTIZED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""Methods that transformers turns back into floats as it loads a model -> the class of their settings."""

VARIANT = re.compile(
    r"(?:model|pytorch_model)\.([^.]+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)"
    r"|(?:model\.safetensors|pytorch_model\.bin)\.index\.([^.]+)\.json"
)


def no_model(folder: Path) -> SourceError:
    """Why a folder without config.json is no model, by what it holds instead."""
    if (folder / ADAPTER).is_file():
        kind, base = _adapter(folder)
        return SourceError(
            f"{folder} holds {kind} of {base}, and no model. Lay it over that model with peft, merge it "
            "(merge_and_unload), save the result with save_pretrained, and give that folder."
        )
    gguf = _gguf(folder)
    if gguf is not None:
        return SourceError(gguf)
    return SourceError(
        f"{folder} has no config.json, so it is no transformers checkpoint. Give the folder that `save_pretrained` "
        "wrote."
    )


def no_weights(folder: Path, expected: str) -> SourceError:
    """Why a folder with config.json has no weights to read, by the files that it holds."""
    gguf = _gguf(folder)
    if gguf is not None:
        return SourceError(gguf)
    endings = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx", ".ot", ".tflite", ".pt", ".pth", ".ckpt")
    others = sorted(path.name for path in folder.iterdir() if path.name.lower().endswith(endings))
    there = f" What is there ({', '.join(others[:3])}) it does not read." if others else ""
    return SourceError(
        f"{folder} has no {expected}: there are no weights to read.{there} If they are in another form, load the model "
        "in transformers and save it with save_pretrained first."
    )


def check_adapter(folder: Path) -> None:
    """SourceError if an adapter lies beside the weights: transformers lays it over them where peft is installed."""
    if (folder / ADAPTER).is_file():
        kind, base = _adapter(folder)
        raise SourceError(
            f"{folder} holds {kind} of {base} beside its weights, which transformers lays over them where peft is "
            "installed. Merge it first (merge_and_unload of peft, then save_pretrained), or take adapter_config.json "
            "and adapter_model.* out of the folder."
        )


def check_names(place: str, names: Collection[str]) -> None:
    """CheckpointError if tensors are named as inside a wrapper: transformers would find none of them."""
    for prefix, wrapper in WRAPPERS.items():
        inside = f".{prefix}"
        first = next((n for n in names if inside in n or n.startswith(prefix)), "") if prefix[0] == "_" else ""
        if not first and names and all(name.startswith(prefix) for name in names):
            first = next(iter(names))
        if first:
            raise CheckpointError(
                f"{place} was saved inside the wrapper of {wrapper}: the tensor {first} has {prefix!r} in its name, "
                "and transformers would not find it. Save the model inside it with save_pretrained, or take "
                f"{prefix!r} out of the names."
            )
    lora = next((name for name in names if ".base_layer." in name or ".lora_A." in name), None)
    if lora is not None:
        raise CheckpointError(
            f"{place} holds an adapter that is not merged: the tensor {lora}. Merge it (merge_and_unload of peft), and "
            "save the model again with save_pretrained."
        )


def packing(config: Mapping[str, Any], names: Collection[str], folder: Path) -> str | None:
    """How another tool has packed the weights, as far as config.json, files or tensors tell; None if they are plain."""
    for key, value in _announced(config):
        if value.get("quant_method") == "losparse":
            continue
        method = value.get("quant_method") or value.get("format")
        return str(method) if method else f"{key} in config.json"
    file = next((name for name in PACKED_FILES if (folder / name).is_file()), None)
    if file is not None:
        return file
    tensor = next((name for name in names if name.rpartition(".")[2] in PACKED_TENSORS), None)
    return None if tensor is None else f"the tensor {tensor}"


def floats_again(packing: str, config: Mapping[str, Any], address: str) -> str:
    """What to do about weights that another tool has packed so; address: of their model."""
    if packing.endswith("_blocks"):  # as save_pretrained calls the floats that it made of MXFP4
        return (
            "Start from the unquantized checkpoint. Where these are floats again, transformers has saved them under "
            "names that it does not find: save them with save_pretrained(FOLDER, save_original_format=False)."
        )
    if packing not in DEQUANTIZED:
        return "Start from the unquantized checkpoint."
    [architecture, *_] = config.get("architectures") or ["AutoModel"]
    return (
        "Start from the unquantized checkpoint, or make it one in bfloat16: "
        f"transformers.{architecture}.from_pretrained({address!r}, dtype='bfloat16', "
        f"quantization_config=transformers.{DEQUANTIZED[packing]}(dequantize=True))"
        ".save_pretrained('FOLDER', save_original_format=False)"
    )


def only_variant(place: str, names: Collection[str]) -> str | None:
    """The variant under whose name all weights lie; None if some lie under their plain names, or none do.

    SourceError if there are several variants and no plain weights.
    """
    stems = ("model.safetensors", "pytorch_model.bin")
    if any(plain in names for stem in stems for plain in (stem, f"{stem}.index.json")):
        return None
    found = sorted({match[1] or match[2] for match in map(VARIANT.fullmatch, names) if match})
    if len(found) > 1:
        raise SourceError(
            f"{place} has weights of several variants ({', '.join(found)}) and none without. Keep one of them in a "
            "folder of its own."
        )
    return found[0] if found else None


def _announced(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            if key in PACKED_KEYS:
                yield key, value
            else:
                yield from _announced(value)


def _adapter(folder: Path) -> tuple[str, str]:
    """("a LORA adapter", its base model) of a folder, as far as its adapter_config.json can be read."""
    try:
        content = json.loads((folder / ADAPTER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = {}
    fields = content if isinstance(content, dict) else {}
    kind = {"LORA": "LoRA"}.get(str(fields.get("peft_type")), str(fields.get("peft_type") or "peft"))
    return f"a {kind} adapter", str(fields.get("base_model_name_or_path") or "another model")


def _gguf(folder: Path) -> str | None:
    names = sorted(path.name for path in folder.iterdir() if path.suffix.lower() == ".gguf")
    if not names:
        return None
    return (
        f"{folder} holds its weights as GGUF ({names[0]}), which losparse does not read. Load them in transformers "
        f"with from_pretrained({str(folder)!r}, gguf_file={names[0]!r}), and save them with save_pretrained."
    )
