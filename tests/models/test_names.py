"""Names on disk <-> names in memory: what the loader will do, predicted, and then done."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TOYS, answer, toy_model
from safetensors.torch import load_file, save_file

import losparse_cli
from losparse_cli.models.names import NameMap
from losparse_cli.shim.linear import LowRankSparseLinear


def renamed(folder: Path, place: Path, rename: Any, **config: Any) -> Path:
    """A dense checkpoint with every tensor renamed, and config.json changed."""
    place.mkdir()
    tensors = {rename(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    (place / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))
    return place


def compress_and_load(folder: Path, place: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The compressed model, its loading info, and the modules of its config.json."""
    recipe = losparse_cli.Recipe(rank=4, sparsity=0.5)
    losparse_cli.compress(folder, place, recipe)
    losparse_cli.register()
    config = json.loads((place / "config.json").read_text())
    model_class = getattr(transformers, config["architectures"][0])
    model, info = model_class.from_pretrained(place, output_loading_info=True)
    return model, info, config["quantization_config"]["modules"]


@pytest.mark.parametrize("name", TOYS)
def test_every_tensor_on_disk_is_placed(name: str, toy: Any) -> None:
    tensors = list(load_file(toy(name) / "model.safetensors"))
    model = toy_model(name)
    names = NameMap(model, tensors)
    placed = set(names.disk) | names.converted
    tied = {key for key, value in model.all_tied_weights_keys.items()}
    assert placed <= set(model.state_dict())
    assert {n for n, _ in model.named_parameters()} - placed <= tied
    assert sorted(t for found in names.disk.values() for t in found) == sorted(
        t for t in tensors if not any(part in t for part in ("experts",))
    )
    for parameter, found in names.disk.items():
        if parameter.endswith(".weight") and model.get_parameter(parameter).dim() == 2:
            module = names.disk_module(parameter.removesuffix(".weight"), found[0])
            assert module == found[0].removesuffix(".weight")


def test_a_base_model_on_disk_under_a_head(toy: Any, tmp_path: Path) -> None:
    """BertModel's weights, whose names lack the prefix, and a config that asks for a classifier."""
    base = transformers.AutoModel.from_pretrained(toy("bert"))
    base.save_pretrained(tmp_path / "base")
    source = renamed(tmp_path / "base", tmp_path / "source", str, architectures=["BertForSequenceClassification"])
    model, info, modules = compress_and_load(source, tmp_path / "out")
    _, dense_info = transformers.BertForSequenceClassification.from_pretrained(source, output_loading_info=True)
    assert info == dense_info  # the classifier is new in both, and nothing else is
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert set(modules) == {n for n, m in model.named_modules() if isinstance(m, LowRankSparseLinear)}
    assert all(name == f"bert.{fields['tensor']}" for name, fields in modules.items())
    body, _ = losparse_cli.load(tmp_path / "out", model_class=transformers.AutoModel)
    exported = transformers.AutoModel.from_pretrained(losparse_cli.export(tmp_path / "out", tmp_path / "dense"))
    torch.testing.assert_close(answer(body), answer(exported), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.bert(torch.arange(9)[None])[0], body(torch.arange(9)[None])[0])
    # Saved under the head, the names carry the prefix; the record follows.
    model.save_pretrained(tmp_path / "again")
    assert losparse_cli.verify(tmp_path / "again").sound
    again, _ = losparse_cli.load(tmp_path / "again")
    assert torch.equal(answer(again), answer(model))


def test_a_prefix_on_disk_that_memory_lacks(toy: Any, tmp_path: Path) -> None:
    source = renamed(toy("gpt2"), tmp_path / "source", str, architectures=["GPT2Model"])
    model, info, modules = compress_and_load(source, tmp_path / "out")
    assert not info["missing_keys"]
    assert set(modules) == {n for n, m in model.named_modules() if isinstance(m, LowRankSparseLinear)}
    assert all(fields["tensor"] == f"transformer.{name}" for name, fields in modules.items())
    exported = transformers.GPT2Model.from_pretrained(losparse_cli.export(tmp_path / "out", tmp_path / "dense"))
    torch.testing.assert_close(answer(model), answer(exported), rtol=1e-4, atol=1e-5)


def test_mixtral_as_it_was_published(toy: Any, tmp_path: Path) -> None:
    """One tensor an expert under block_sparse_moe on disk, fused under mlp in memory."""
    tensors = list(load_file(toy("mixtral") / "model.safetensors"))
    assert any(name.endswith("block_sparse_moe.experts.4.w2.weight") for name in tensors)
    names = NameMap(toy_model("mixtral"), tensors)
    assert {"model.layers.0.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj"} <= names.converted
    assert names.disk["model.layers.0.mlp.gate.weight"] == ["model.layers.0.block_sparse_moe.gate.weight"]
    model, info, modules = compress_and_load(toy("mixtral"), tmp_path / "out")
    assert not any(info.values())
    assert {name.split(".")[3] for name in modules} == {"self_attn", "mlp"}
    assert len(modules) == 2 * (4 + 5 * 3)
    copied = load_file(tmp_path / "out" / "model.safetensors")
    assert copied["model.layers.0.block_sparse_moe.experts.4.w2.weight"].dim() == 1
    dense = load_file(toy("mixtral") / "model.safetensors")
    assert all(torch.equal(copied[name], dense[name]) for name in dense if copied[name].dim() == dense[name].dim())
    assert isinstance(model.model.layers[0].self_attn.q_proj, LowRankSparseLinear)
    assert isinstance(model.model.layers[0].mlp.experts.get_submodule("4.w2"), LowRankSparseLinear)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision-language model, on disk under names of long ago: language_model.model.layers..."""
    text = transformers.LlamaConfig(
        vocab_size=101, hidden_size=68, intermediate_size=131, num_hidden_layers=2, num_attention_heads=2
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=64, intermediate_size=99, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(vision_config=vision.to_dict(), text_config=text.to_dict(), image_token_index=100)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llava") / "llava"
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_a_vision_language_model_with_names_of_long_ago(llava: Path, tmp_path: Path) -> None:
    assert any(name.startswith("language_model.model.layers.") for name in load_file(llava / "model.safetensors"))
    model, info, modules = compress_and_load(llava, tmp_path / "out")
    assert not any(info.values())
    assert modules["model.language_model.layers.0.mlp.up_proj"]["tensor"] == "language_model.model.layers.0.mlp.up_proj"
    towers = {name.split(".")[1] for name in modules}
    assert towers == {"language_model", "vision_tower"}
    tokens = torch.arange(3, 12)[None]
    exported = type(model).from_pretrained(losparse_cli.export(tmp_path / "out", tmp_path / "dense"))
    torch.testing.assert_close(model(tokens).logits, exported(tokens).logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "again")
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys()
        == load_file(tmp_path / "out" / "model.safetensors").keys()
    )
    assert losparse_cli.verify(tmp_path / "again").sound
    again, _ = losparse_cli.load(tmp_path / "again")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_a_layer_whose_factors_the_loader_would_rename_stays_dense(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    module = "model.layers.0.self_attn.q_proj"
    assert NameMap(toy_model("llama"), []).disk_module(module, f"{module}.weight") == module
    # A tensor whose module is called otherwise on disk is written under the name in memory.
    assert NameMap(toy_model("llama"), []).disk_module(module, "somewhere.else.weight") == module
    known = conversion_mapping.get_model_conversion_mapping

    def rename_to(target: str) -> None:
        renaming = WeightRenaming(source_patterns=r"q_proj\.V$", target_patterns=target)
        conversions = lambda *a, **k: [*known(*a, **k), renaming]  # noqa: E731
        monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", conversions)

    rename_to("q_proj.value")  # which no model has: the loader tries again without renaming
    assert NameMap(toy_model("llama"), []).disk_module(module, f"{module}.weight") == module
    rename_to("q_proj.weight")
    assert NameMap(toy_model("llama"), []).disk_module(module, f"{module}.weight") is None
    report = losparse_cli.compress(toy("llama"), tmp_path / "out", losparse_cli.Recipe(rank=4, sparsity=0.5)).report
    assert report.skipped[module] == "transformers would rename its factors at load"
    assert len(report.layers) == 12


def test_unknown_tensors_are_placed_nowhere() -> None:
    names = NameMap(toy_model("llama"), ["model.layers.7.self_attn.q_proj.weight", "nonsense"])
    assert "model.layers.0.self_attn.q_proj.weight" not in names.disk
    assert set(names.disk) == {
        "model.layers.7.self_attn.q_proj.weight",
        "nonsense",
    }  # as they stand: no parameter's name
    assert not names.converted
