"""The door to transformers: config, registration, which layers are swapped, what is saved, Trainer."""

from __future__ import annotations

import copy
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import answer, token_batch, toy_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

import losparse_cli
from losparse_cli.shim.layouts import FORMAT_VERSION, LayerSpec
from losparse_cli.shim.linear import LowRankSparseLinear
from losparse_cli.shim.quantizer import (
    METHOD,
    LosparseConfig,
    LosparseQuantizationConfig,
    LosparseQuantizer,
    install_layers,
    register,
    write_loader,
)

ENTRY = {"shape": [68, 68], "rank": 2, "nnz": 68, "pattern": "rows", "layout": "rows"}
SHIPPED = (
    "losparse_codec.py",
    "losparse_embedding.py",
    "losparse_layouts.py",
    "losparse_linear.py",
    "losparse_loader.py",
    "losparse_quantizer.py",
    "losparse_stored.py",
    "losparse_streams.py",
    "losparse_tables.py",
)


def spec_for(module: nn.Module, rank: int = 2) -> LayerSpec:
    """One row of S kept."""
    m, n = module.weight.shape
    return LayerSpec((m, n), rank, n, "rows", "rows")


# --- config and registration ------------------------------------------------------------------------


def test_config_round_trips_with_keys_that_it_does_not_know() -> None:
    fields = {
        "quant_method": METHOD,
        "format_version": FORMAT_VERSION,
        "modules": {"a.b": ENTRY},
        "skipped": {"c": "embedding"},
    }
    fields |= {"from_the_future": {"x": [1]}}
    config = LosparseQuantizationConfig.from_dict(fields)
    assert json.loads(json.dumps(config.to_dict())) == fields
    assert LosparseQuantizationConfig.from_dict(config.to_dict()).to_dict() == fields
    assert config.specs() == {"a.b": LayerSpec((68, 68), 2, 68, "rows", "rows")}


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, None, str(FORMAT_VERSION)])
def test_another_format_version_is_refused_with_the_remedy(version: Any) -> None:
    with pytest.raises(ValueError, match=r"format version.*pip install --upgrade losparse"):
        LosparseQuantizationConfig(modules={}, format_version=version)


def test_a_wrong_entry_is_refused_with_the_name_of_its_layer() -> None:
    config = LosparseQuantizationConfig(modules={"fine": ENTRY, "model.layers.3.q": {**ENTRY, "rank": 99}})
    with pytest.raises(ValueError, match=r"model\.layers\.3\.q.*impossible"):
        config.specs()


def test_register_is_idempotent_and_keeps_who_came_first(monkeypatch: pytest.MonkeyPatch) -> None:
    register()
    register()
    assert AUTO_QUANTIZER_MAPPING[METHOD] is LosparseQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] is LosparseQuantizationConfig
    assert AutoHfQuantizer.supports_quant_method({"quant_method": METHOD})
    other = type("Other", (LosparseQuantizer,), {})
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, METHOD, other)
    register()
    assert AUTO_QUANTIZER_MAPPING[METHOD] is other


def test_the_auto_config_is_the_models_own(compressed: Any) -> None:
    folder = compressed("qwen2")
    assert type(LosparseConfig.from_pretrained(folder)) is transformers.Qwen2Config
    config, unused = LosparseConfig.from_pretrained(folder, return_unused_kwargs=True, nonsense=1)
    assert isinstance(config, transformers.Qwen2Config)
    assert unused == {"nonsense": 1}


# --- which layers are swapped -----------------------------------------------------------------------


def test_install_swaps_the_named_layers_and_nothing_else() -> None:
    model = toy_model("llama", dtype=torch.bfloat16).to(torch.bfloat16)
    before = {name: type(module) for name, module in model.named_modules()}
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    specs = {name: spec_for(model.get_submodule(name)) for name in names}
    assert install_layers(model, specs) == {name: name for name in names}
    for name, module in model.named_modules():
        assert type(module) is (LowRankSparseLinear if name in names else before[name]), name
    for name in names:
        layer = model.get_submodule(name)
        assert layer.spec is specs[name]
        assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
        assert not layer.training
        assert layer.bias is None


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "bert"])
def test_install_keeps_bias_device_and_mode(name: str) -> None:
    model = toy_model(name).to("meta").train()
    linears = {n: m for n, m in model.named_modules() if type(m) in (nn.Linear, transformers.Conv1D) and ".0." in n}
    shapes = {
        n: m.weight.shape[::-1] if isinstance(m, transformers.Conv1D) else m.weight.shape for n, m in linears.items()
    }
    install_layers(model, {n: LayerSpec(tuple(s), 1, 0, "unstructured", "rows") for n, s in shapes.items()})
    for n, dense in linears.items():
        layer = model.get_submodule(n)
        assert (layer.out_features, layer.in_features) == tuple(shapes[n])
        assert (layer.bias is None) == (dense.bias is None)
        assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"meta"}
        assert layer.training


def test_names_are_found_with_and_without_the_base_prefix() -> None:
    whole, base = toy_model("llama"), toy_model("llama").model
    name = "model.layers.0.self_attn.q_proj"
    spec = spec_for(whole.get_submodule(name))
    assert install_layers(base, {name: spec}) == {"layers.0.self_attn.q_proj": name}
    assert install_layers(whole, {"layers.0.self_attn.q_proj": spec}) == {name: "layers.0.self_attn.q_proj"}
    # One that this model does not have is left out, as long as another is found.
    more = {"layers.1.self_attn.q_proj": spec, "encoder.layers.0.q": spec}
    assert install_layers(whole, more) == {"model.layers.1.self_attn.q_proj": "layers.1.self_attn.q_proj"}


def test_install_refuses_a_model_that_it_does_not_fit() -> None:
    model = toy_model("llama")
    spec = LayerSpec((68, 60), 2, 0, "unstructured", "rows")
    with pytest.raises(ValueError, match=r"q_proj is \(68, 68\).*\(68, 60\)"):
        install_layers(model, {"model.layers.0.self_attn.q_proj": spec})
    for absent in (
        "transformer.h.0.attn.c_attn",
        "model.norm",
        "model.layers.0",
        "",
    ):  # a norm and a block are no layers
        with pytest.raises(ValueError, match="None of the 1 compressed layers"):
            install_layers(model, {absent: spec})
    assert install_layers(model, {}) == {}


# --- from_pretrained --------------------------------------------------------------------------------


def altered(folder: Path, place: Path, change: Any = None, tensors: Any = None) -> Path:
    """A copy of a compressed folder with its config or tensors changed in place."""
    shutil.copytree(folder, place)
    config = json.loads((place / "config.json").read_text())
    if change is not None:
        change(config)
    (place / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        content = load_file(place / "model.safetensors")
        tensors(content)
        save_file(content, place / "model.safetensors", metadata={"format": "pt"})
    return place


Q = "model.layers.0.self_attn.q_proj"

WRONG = "mismatch|belong together"
REFUSED = [
    ("newer", lambda c: c["quantization_config"].update(format_version=FORMAT_VERSION + 1), None,
     f"format version {FORMAT_VERSION + 1}"),
    ("rank", lambda c: c["quantization_config"]["modules"][Q].update(rank=-1), None, f"{Q}.*impossible"),
    ("shape", lambda c: c["quantization_config"]["modules"][Q].update(shape=[68, 60]), None, "do not belong together"),
    ("other-rank", lambda c: c["quantization_config"]["modules"][Q].update(rank=5), None, WRONG),
    ("other-nnz", lambda c: c["quantization_config"]["modules"][Q].update(nnz=1000), None, WRONG),
    ("short-values", None, lambda t: t.update({f"{Q}.weight": t[f"{Q}.weight"][:-1].clone()}), WRONG),
    ("no-U", None, lambda t: t.pop(f"{Q}.U"), f"no {Q}.U"),
    ("no-values", None, lambda t: t.pop(f"{Q}.weight"), f"no {Q}.weight"),
    ("transposed-U", None, lambda t: t.update({f"{Q}.U": t[f"{Q}.U"].T.contiguous()}), WRONG),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "tensors", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)
def test_a_checkpoint_that_contradicts_itself_does_not_load(
    change: Any, tensors: Any, message: str, compressed: Any, tmp_path: Path
) -> None:
    folder = altered(compressed("llama"), tmp_path / "altered", change, tensors)
    with pytest.raises((ValueError, RuntimeError), match=message):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("gone", [True, False], ids=["missing", "zeros"])
def test_a_damaged_index_is_refused_by_name(gone: bool, compressed: Any, tmp_path: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        index = next(name for name in tensors if name.startswith(f"{Q}.S_"))
        tensors[index] = torch.zeros_like(tensors[index])
        if gone:
            del tensors[index]

    folder = altered(compressed("llama"), tmp_path / "a", None, damage)
    with pytest.raises(ValueError, match=rf"index of layer {Q} cannot be read: .*(S_|index of S)"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_a_loaded_model_is_an_ordinary_one(compressed: Any) -> None:
    model, _ = losparse_cli.load(compressed("llama"))
    assert not model.is_quantized
    assert all(p.is_floating_point() and p.requires_grad for p in model.parameters())
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_serializable()
    stored = sum(t.numel() * t.itemsize for t in load_file(compressed("llama") / "model.safetensors").values())
    assert model.get_memory_footprint() == stored + sum(b.nbytes for _, b in model.named_non_persistent_buffers())


# --- saved again ------------------------------------------------------------------------------------


def test_saving_carries_on_the_loader_and_the_record(compressed: Any, tmp_path: Path) -> None:
    folder = altered(compressed("llama"), tmp_path / "a", lambda c: c["quantization_config"].update(note="kept"))
    model, _ = losparse_cli.load(folder)
    model.save_pretrained(tmp_path / "again")
    before, after = (json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "again"))
    assert after["quantization_config"] == before["quantization_config"]
    assert after["quantization_config"]["note"] == "kept"
    assert after["auto_map"] == before["auto_map"]
    for name in SHIPPED:
        assert (tmp_path / "again" / name).read_bytes() == (compressed("llama") / name).read_bytes()


def test_the_loader_is_written_alike_from_a_shipped_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import losparse_cli.shim.loader as module

    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    write_loader(tmp_path / "first")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "first" / "losparse_loader.py"))
    write_loader(tmp_path / "second")
    for name in SHIPPED:
        text = (tmp_path / "first" / name).read_text()
        assert (tmp_path / "second" / name).read_text() == text
        assert "\nfrom ." not in text.replace("\nfrom .losparse_", "")


def test_another_head_is_recorded_as_what_it_is(compressed: Any, tmp_path: Path) -> None:
    base = transformers.AutoModel.from_pretrained(compressed("llama"))
    base.save_pretrained(tmp_path / "base")
    decoder = transformers.AutoModelForCausalLM.from_pretrained(compressed("bart"))
    decoder.save_pretrained(tmp_path / "decoder")
    for model, folder in ((base, "base"), (decoder, "decoder")):
        modules = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]["modules"]
        assert set(modules) == {n for n, m in model.named_modules() if isinstance(m, LowRankSparseLinear)}
    full = json.loads((compressed("bart") / "config.json").read_text())["quantization_config"]["modules"]
    assert 0 < len(modules) < len(full)


def test_copies_of_a_model_save_themselves(compressed: Any, tmp_path: Path) -> None:
    model, _ = losparse_cli.load(compressed("gpt2"))
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    for number, twin in enumerate((copy.deepcopy(model), torch.load(saved, weights_only=False))):
        with torch.no_grad():
            twin.transformer.wte.weight.add_(1)
        twin.save_pretrained(tmp_path / str(number))
        assert all((tmp_path / str(number) / name).is_file() for name in SHIPPED)  # pytorch/pytorch#51216
        again, _ = losparse_cli.load(tmp_path / str(number))
        assert torch.equal(again.transformer.wte.weight, twin.transformer.wte.weight)
        assert not torch.equal(again.transformer.wte.weight, model.transformer.wte.weight)


def test_pushing_while_saving_uploads_the_loader_too(compressed: Any, tmp_path: Path) -> None:
    model, _ = losparse_cli.load(compressed("llama"))
    pushed: list[Any] = []
    model.push_to_hub = lambda repository, **options: pushed.append((repository, options))
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, repo_id="me/mine", token="t", private=True)
    assert pushed == [("me/mine", {"token": "t", "private": True})]
    assert (tmp_path / "mine" / "losparse_quantizer.py").is_file()
    model.save_pretrained(tmp_path / "local")
    assert len(pushed) == 1


# --- training ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_trainer_trains_saves_and_resumes(compressed: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, _ = losparse_cli.load(compressed("bert"))
    rows = token_batch(model, batch=8, length=9)
    examples = [
        {"input_ids": rows["input_ids"][i], "attention_mask": rows["attention_mask"][i], "labels": torch.tensor(i % 3)}
        for i in range(8)
    ]
    settings = transformers.TrainingArguments(
        str(tmp_path / "run"), per_device_train_batch_size=4, max_steps=4, save_steps=2, learning_rate=1e-2,
        weight_decay=0.1, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    supports = {n: m.support() for n, m in model.named_modules() if isinstance(m, LowRankSparseLinear)}
    transformers.Trainer(model, settings, train_dataset=examples).train()
    for name, support in supports.items():
        layer = model.get_submodule(name)
        assert torch.equal(layer.sparse() != 0, support)
        assert all(not torch.equal(p, before[f"{name}.{suffix}"]) for suffix, p in layer.named_parameters())
    assert (tmp_path / "run" / "checkpoint-2" / "losparse_quantizer.py").is_file()
    again, _ = losparse_cli.load(tmp_path / "run" / "checkpoint-2")
    transformers.Trainer(again, settings, train_dataset=examples).train(str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(answer(again.eval()), answer(model.eval()))


def test_gradient_checkpointing_changes_no_gradient(compressed: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        model, _ = losparse_cli.load(compressed("llama"))
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        tokens = token_batch(model)
        model(**tokens, labels=tokens["input_ids"]).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


def test_the_models_own_initialization_sees_dense_layers(compressed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blt's asks `down_proj.weight` of its feed-forward module for its second dimension."""
    seen = []
    original = transformers.LlamaPreTrainedModel._init_weights

    def reads_shapes(self: Any, module: nn.Module) -> None:
        if hasattr(module, "down_proj"):
            seen.append(tuple(module.down_proj.weight.shape))
        original(self, module)

    monkeypatch.setattr(transformers.LlamaPreTrainedModel, "_init_weights", reads_shapes)
    expected = answer(losparse_cli.load(compressed("llama"))[0])
    assert seen == [(68, 131)] * 2
    model, _ = losparse_cli.load(compressed("llama"))
    assert torch.equal(answer(model), expected)
    assert "initialize_weights" not in vars(model)
    assert torch.equal(answer(copy.deepcopy(model)), expected)
