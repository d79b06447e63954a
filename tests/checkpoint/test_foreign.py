"""What is no plain checkpoint is called what it is, with what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toys

import losparse_cli
from losparse_cli import Recipe
from losparse_cli.checkpoint.foreign import packing
from losparse_cli.checkpoint.source import open_checkpoint
from losparse_cli.errors import CheckpointError, SourceError, UsageError

ADAPTER = {"peft_type": "LORA", "base_model_name_or_path": "user/base"}


def refused(folder: Path, kind: type[Exception], *says: str) -> None:
    with pytest.raises(kind) as caught:
        losparse_cli.compress(folder, folder.parent / "out", Recipe(rank=4, sparsity=0.5))
    assert all(part in str(caught.value) for part in says), caught.value
    assert not (folder.parent / "out").exists()


def test_an_adapter_beside_the_weights(tmp_path: Path) -> None:
    """huggingface/peft#1381, dropbox/hqq#151."""
    model = toys.llama(tmp_path / "model")
    toys.write_json(model / "adapter_config.json", ADAPTER)
    refused(model, SourceError, "a LoRA adapter of user/base beside its weights", "merge_and_unload")


def test_an_adapter_as_the_model(tmp_path: Path) -> None:
    """ml-explore/mlx-examples#1033, jundot/omlx#1408."""
    toys.write_json(tmp_path / "adapter_config.json", ADAPTER)
    refused(tmp_path, SourceError, "a LoRA adapter of user/base, and no model", "merge_and_unload")
    with pytest.raises(SourceError, match="a LoRA adapter of user/base, and no model"):
        losparse_cli.load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    refused(tmp_path, SourceError, "a peft adapter of another model")


@pytest.mark.parametrize("config", [False, True])
def test_gguf(config: bool, tmp_path: Path) -> None:
    (tmp_path / "toy.gguf").write_bytes(b"GGUF")
    if config:
        toys.write_json(tmp_path / "config.json", {})
    refused(tmp_path, SourceError, "as GGUF (toy.gguf)", "gguf_file='toy.gguf'")
    with pytest.raises(SourceError, match="as GGUF"):
        open_checkpoint(tmp_path / "toy.gguf")


def test_weights_in_another_form_are_named(tmp_path: Path) -> None:
    toys.write_json(tmp_path / "config.json", {})
    (tmp_path / "tf_model.h5").touch()
    refused(tmp_path, SourceError, "no weights to read", "tf_model.h5")


@pytest.mark.parametrize(
    ("prefix", "wrapper"),
    [("module.", "DataParallel"), ("_orig_mod.", "torch.compile"), ("base_model.model.", "peft"),
     ("_fsdp_wrapped_module.", "FSDP")],
)  # fmt: skip
def test_names_inside_a_wrapper(prefix: str, wrapper: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = toys.llama(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, model / "model.safetensors")
    refused(model, CheckpointError, f"the wrapper of {wrapper}", f"{prefix}model.")


def test_an_adapter_that_is_not_merged(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    refused(toys.llama(tmp_path / "model", extra={name: torch.ones(2, 2)}), CheckpointError, "not merged", name)


@pytest.mark.parametrize(
    ("change", "says"),
    [({"compression_config": {"format": "pack-quantized"}}, "pack-quantized"),
     ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
     ({"quantization": {"group_size": 64, "bits": 4}}, "quantization in config.json"),
     ("quantize_config.json", "quantize_config.json"),
     ("qweight", "the tensor model.layers.0.mlp.up_proj.qweight")],
)  # fmt: skip
def test_weights_packed_by_another_tool(change: Any, says: str, tmp_path: Path) -> None:
    extra = {f"model.layers.0.mlp.up_proj.{change}": torch.ones(2, dtype=torch.int32)} if change == "qweight" else {}
    model = toys.llama(tmp_path / "model", extra=extra)
    if isinstance(change, dict):
        toys.change_json(model / "config.json", **change)
    elif not extra:
        toys.write_json(model / change, {"bits": 4})
    refused(model, UsageError, f"quantized already ({says})")
    with pytest.raises(SourceError, match="quantized already"):
        losparse_cli.inspect(model)


def test_what_is_ours_is_not_packed(compressed: Any) -> None:
    found = open_checkpoint(compressed("llama"))
    assert packing(found.config, found.entries, found.folder) is None
