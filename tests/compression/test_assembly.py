"""A skeleton filled part by part holds what from_pretrained loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TOYS, answer, character_tokenizer, toy_model
from experts import split
from safetensors.torch import load_file, save_file

from losparse_cli.checkpoint.source import open_checkpoint
from losparse_cli.compression.assembly import Assembly
from losparse_cli.errors import CheckpointError
from losparse_cli.models.blocks import find_blocks, holding
from losparse_cli.models.skeleton import build_skeleton


def assembly_of(folder: Path) -> Assembly:
    checkpoint = open_checkpoint(folder)
    skeleton = build_skeleton(folder, checkpoint.config)
    return Assembly(skeleton.model, checkpoint, torch.device("cpu"))


def names_of(assembly: Assembly) -> list[str]:
    return [name for name, _ in assembly.model.named_parameters()]


def same_tensors(ours: Any, theirs: Any) -> None:
    """Parameters and buffers bit for bit, those too that no file holds."""
    for kind in ("named_parameters", "named_buffers"):
        found, expected = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (ours, theirs))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == (torch.float32 if tensor.is_floating_point() else tensor.dtype), name
            assert torch.equal(found[name], tensor.to(found[name].dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", TOYS)
def test_a_filled_skeleton_is_what_from_pretrained_loads(name: str, dtype: torch.dtype, toy: Any) -> None:
    folder = toy(name, dtype=dtype)
    assembly = assembly_of(folder)
    assembly.load(names_of(assembly))
    model_class = getattr(transformers, TOYS[name][0])
    same_tensors(assembly.model, split(model_class.from_pretrained(folder, dtype=torch.float32)))
    assert not any(tensor.is_meta for tensor in (*assembly.model.parameters(), *assembly.model.buffers()))
    if dtype == torch.float32:
        torch.testing.assert_close(answer(assembly.model), answer(toy_model(name)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])
def test_in_parts_and_dropped_again(name: str, toy: Any) -> None:
    assembly = assembly_of(toy(name))
    model = assembly.model
    expected = dict(split(toy_model(name)).named_parameters())
    layers = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.count(".") > 1]
    for block in holding(find_blocks(model, layers), layers):
        names = [f"{block}.{n}" for n, _ in model.get_submodule(block).named_parameters()]
        assert all(model.get_parameter(n).is_meta for n in names)
        before = {id(model.get_parameter(n)) for n in names}
        assembly.load(names)
        assembly.load(names)  # what is there already is left alone
        assert all(torch.equal(model.get_parameter(n), expected[n]) for n in names)
        assert {n for n, p in model.named_parameters() if not p.is_meta} == set(names)
        assembly.drop(names)
        assert {id(model.get_parameter(n)) for n in names} == before  # the very ones, so that it can be loaded again
        assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "gpt2", "bart", "t5"])
def test_tied_weights_stay_tied(name: str, toy: Any) -> None:
    assembly = assembly_of(toy(name))
    head, embedding = assembly.model.get_output_embeddings(), assembly.model.get_input_embeddings()
    expected = toy_model(name)
    tied = expected.get_output_embeddings().weight is expected.get_input_embeddings().weight
    assert tied
    every = dict(assembly.model.named_parameters(remove_duplicate=False))
    for asked in (n for n, p in every.items() if p is embedding.weight):
        assembly.load([asked])
        assert head.weight is assembly.model.get_input_embeddings().weight
        assert not head.weight.is_meta
        assembly.drop([n for n, p in assembly.model.named_parameters(remove_duplicate=False) if not p.is_meta])
        assert head.weight.is_meta


def test_experts_as_they_are_published(toy: Any, tmp_path: Path) -> None:
    """The files of Mixtral hold an expert a tensor; transformers' model holds all of a layer in one, ours does not."""
    folder = toy("mixtral")
    stored = load_file(folder / "model.safetensors")
    assert sum(".experts." in name for name in stored) == 2 * 5 * 3
    assembly = assembly_of(folder)
    one = "model.layers.1.mlp.experts.3.w2.weight"
    assembly.load([one])
    assert torch.equal(assembly.model.get_parameter(one), stored[one.replace(".mlp.", ".block_sparse_moe.")])
    assert assembly.model.get_parameter(one.replace("w2", "w1")).is_meta
    # Every expert in its place: more of them than ten, whose names sort otherwise than their numbers.
    many = toy("mixtral", num_local_experts=12)
    larger = assembly_of(many)
    larger.load(names_of(larger))
    model = transformers.MixtralForCausalLM.from_pretrained(many)
    torch.testing.assert_close(answer(larger.model), answer(model), rtol=1e-5, atol=1e-6)
    same_tensors(larger.model, split(model))


def test_a_missing_tensor_is_named(toy: Any, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    toy_model("llama").save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assembly = assembly_of(folder)
    assembly.load(["model.layers.0.input_layernorm.weight"])
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.input_layernorm\.weight is missing"):
        assembly.load(["model.layers.1.input_layernorm.weight"])


def test_spread_over_files_and_under_another_prefix(tmp_path: Path) -> None:
    model = toy_model("llama")
    model.save_pretrained(tmp_path / "many", max_shard_size="60kB")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 3
    assembly = assembly_of(tmp_path / "many")
    assembly.load(names_of(assembly))
    same_tensors(assembly.model, model)
    bert = toy_model("bert")
    bert.save_pretrained(tmp_path / "bert")
    tensors = load_file(tmp_path / "bert" / "model.safetensors")
    without = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    save_file(without, tmp_path / "bert" / "model.safetensors", {"format": "pt"})
    bare = assembly_of(tmp_path / "bert")
    bare.load(names_of(bare))
    same_tensors(bare.model, bert)


def test_the_parameter_of_a_tensor_and_back(toy: Any) -> None:
    assembly = assembly_of(toy("mixtral"))
    norm = "model.layers.0.input_layernorm.weight"
    assert assembly.parameter(norm) == norm
    expert = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
    assert assembly.parameter(expert) == "model.layers.0.mlp.experts.3.w1.weight"
    assert assembly.parameter("no.such.tensor") is None
    assert torch.equal(assembly.read(norm), load_file(toy("mixtral") / "model.safetensors")[norm])


def test_parameters_made_by_a_constructor_that_knows_no_meta_device(tmp_path: Path) -> None:
    """XLNet writes nn.Parameter(torch.FloatTensor(...)), which no context moves to the meta device."""
    settings: dict[str, Any] = {"vocab_size": 101, "d_model": 66, "n_layer": 2, "n_head": 3, "d_inner": 99}
    model = transformers.XLNetLMHeadModel(transformers.XLNetConfig(**settings))
    model.save_pretrained(tmp_path)
    assembly = assembly_of(tmp_path)
    assembly.load(names_of(assembly))
    same_tensors(assembly.model, model)
