"""Experts that lie in one tensor on disk, too, each compressed on its own and written back as they lay."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import answer, character_tokenizer, randomized
from experts import split
from safetensors.torch import load_file, save_file
from torch import Tensor
from toys import change_json

import losparse_cli
from losparse_cli.budget.recipe import Recipe
from losparse_cli.checkpoint.source import open_checkpoint
from losparse_cli.errors import CheckpointError, UsageError
from losparse_cli.inspection import DenseReport
from losparse_cli.shim.experts import SplitExperts, fused_experts
from losparse_cli.shim.linear import LowRankSparseLinear

_COMMON: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "num_experts_per_tok": 2, "num_local_experts": 5,
}  # fmt: skip
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "granite": ("GraniteMoeForCausalLM", "GraniteMoeConfig", {}),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", {"head_dim": 32, "sliding_window": 8}),
    "llama 4": ("Llama4ForCausalLM", "Llama4TextConfig", {
        "head_dim": 32, "intermediate_size_mlp": 56, "num_experts_per_tok": 1, "attention_chunk_size": 16}),
    "aria": ("AriaTextForCausalLM", "AriaTextConfig", {"moe_num_experts": 5, "moe_topk": 2}),
}  # fmt: skip
TURNED = ("gpt-oss", "llama 4", "aria")


def model_of(kind: str, **changes: Any) -> Any:
    model_class, config_class, settings = KINDS[kind]
    config = getattr(transformers, config_class)(**{**_COMMON, **settings, **changes})
    return randomized(getattr(transformers, model_class)(config)).eval()


def save(kind: str, folder: Path, **changes: Any) -> dict[str, Tensor]:
    """A toy in `folder`; its tensors as they are on disk."""
    model_of(kind, **changes).save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def of_all_experts(tensors: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in tensors.items() if tensor.dim() == 3]


def same_as_export(folder: Path, kind: str) -> Any:
    """The compressed model in `folder`, loaded, saved and loaded again; all of it what its dense export is."""
    plain = losparse_cli.export(folder, folder.with_name("plain"))
    dense = load_file(folder.with_name("dense") / "model.safetensors")
    written = load_file(plain / "model.safetensors")
    assert {name: t.shape for name, t in written.items()} == {name: t.shape for name, t in dense.items()}
    stock = getattr(transformers, KINDS[kind][0]).from_pretrained(plain)
    expected = answer(stock)
    model, _ = losparse_cli.load(folder)
    torch.testing.assert_close(answer(model), expected, rtol=1e-3, atol=1e-4)
    again = folder.with_name("again")
    model.save_pretrained(again)
    before, after = (load_file(place / "model.safetensors") for place in (folder, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert losparse_cli.verify(folder).sound
    assert losparse_cli.verify(again).sound
    losparse_cli.export(again, folder.with_name("plain-again"))
    rewritten = load_file(folder.with_name("plain-again") / "model.safetensors")
    assert all(torch.equal(written[name], rewritten[name]) for name in written)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_split_they_compute_the_same(kind: str, tmp_path: Path) -> None:
    together = of_all_experts(save(kind, tmp_path))
    model = model_of(kind)
    assert not fused_experts(model)
    expected = {shape: answer(model, batch=shape[0], length=shape[1]) for shape in ((1, 1), (3, 17))}
    ours = split(model, together)
    assert sum(isinstance(module, SplitExperts) for module in ours.modules()) == 2
    for twin in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        for (batch, length), logits in expected.items():
            torch.testing.assert_close(answer(twin, batch=batch, length=length), logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_compressed_whole_and_loaded_in_every_way(kind: str, tmp_path: Path) -> None:
    tensors = save(kind, tmp_path / "dense")
    made = losparse_cli.compress(tmp_path / "dense", tmp_path / "small", keep=0.6, values="float")
    assert sum(".experts." in layer.name for layer in made.report.layers) == 2 * 2 * 5
    assert not any("expert" in reason for reason in made.report.skipped.values())
    recorded = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert recorded["format_version"] == 4
    assert recorded["fused"].keys() == set(of_all_experts(tensors))
    assert {one["transposed"] for one in recorded["fused"].values()} == {kind in TURNED}
    model = same_as_export(tmp_path / "small", kind)
    shipped = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    torch.testing.assert_close(answer(shipped), answer(model))


@pytest.mark.parametrize(
    ("kind", "how"),
    [*((kind, "coded") for kind in KINDS), ("llama 4", "oats"), ("granite", "oats"), ("gpt-oss", "2:4")],
)
def test_calibrated(kind: str, how: str, tmp_path: Path) -> None:
    save(kind, tmp_path / "dense")
    recipe = {
        "coded": Recipe(bits=4.5),
        "oats": Recipe(keep=0.6, values="float", solver="oats"),
        "2:4": Recipe(rank=3, pattern="2:4", values="float", iterations=2),
    }[how]
    (tmp_path / "text.txt").write_text("a text of the kind that the model is to be good at, " * 30)
    calibration = losparse_cli.Calibration(str(tmp_path / "text.txt"), tokens=160, length=16)
    made = losparse_cli.compress(tmp_path / "dense", tmp_path / "small", recipe, calibration=calibration)
    experts = [layer for layer in made.report.layers if ".experts." in layer.name]
    assert len(experts) == 20
    assert all(layer.tokens is not None for layer in experts if layer.name.endswith("gate_up_proj"))
    assert torch.isfinite(answer(same_as_export(tmp_path / "small", kind))).all()


@pytest.mark.parametrize("kind", ["granite", "gpt-oss"])
def test_some_of_them_alone(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path / "dense")
    losparse_cli.compress(
        tmp_path / "dense", tmp_path / "small", Recipe(keep=0.6, values="float", targets=("*.1.*.experts.2.down_proj",))
    )
    model = same_as_export(tmp_path / "small", kind)
    ours = [name for name, module in model.named_modules() if isinstance(module, LowRankSparseLinear)]
    assert [name.rsplit(".", 3)[1:] for name in ours] == [["experts", "2", "down_proj"]]
    dense, plain = (load_file(tmp_path / name / "model.safetensors") for name in ("dense", "plain"))
    changed = [name for name in dense if not torch.equal(dense[name], plain[name])]
    assert len(changed) == 1
    differs = (dense[changed[0]] != plain[changed[0]]).flatten(1).any(1)
    assert differs.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("calibrated", [False, True])
def test_dense_experts_stay_as_they_are(calibrated: bool, tmp_path: Path) -> None:
    dense = save("gpt-oss", tmp_path / "dense")
    (tmp_path / "text.txt").write_text("a text of the kind that the model is to be good at, " * 30)
    calibration = losparse_cli.Calibration(str(tmp_path / "text.txt"), tokens=64, length=16) if calibrated else None
    losparse_cli.compress(
        tmp_path / "dense",
        tmp_path / "small",
        Recipe(keep=0.6, values="float", ignore=("*.experts.*",)),
        calibration=calibration,
    )
    small = load_file(tmp_path / "small" / "model.safetensors")
    assert all(torch.equal(dense[name], small[name]) for name in of_all_experts(dense))
    assert "fused" not in json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    model, _ = losparse_cli.load(tmp_path / "small")
    assert not any(isinstance(module, SplitExperts) for module in model.modules())
    assert torch.isfinite(answer(model)).all()


def test_files_in_which_each_matrix_is_turned(tmp_path: Path) -> None:
    """As Qwen publishes Qwen3-VL's, which transformers turns as it loads them, and does not turn back."""
    settings = {**_COMMON, "num_experts": 5, "moe_intermediate_size": 40, "head_dim": 32,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 40, "num_heads": 2, "out_hidden_size": 64,
              "num_position_embeddings": 16, "deepstack_visual_indexes": []}  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(text_config=settings, vision_config=vision)
    randomized(transformers.Qwen3VLMoeForConditionalGeneration(config)).save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "model.safetensors"
    tensors = load_file(file)
    assert len(of_all_experts(tensors)) == 4
    turned = {name: t.mT.contiguous() if t.dim() == 3 else t for name, t in tensors.items()}
    save_file(turned, file, {"format": "pt"})
    losparse_cli.compress(tmp_path / "dense", tmp_path / "small", keep=0.6, values="float")
    model, _ = losparse_cli.load(tmp_path / "small")
    plain = losparse_cli.export(tmp_path / "small", tmp_path / "plain")
    assert {name: t.shape for name, t in load_file(plain / "model.safetensors").items()} == {
        name: t.shape for name, t in turned.items()
    }
    stock = transformers.Qwen3VLMoeForConditionalGeneration.from_pretrained(plain)
    torch.testing.assert_close(answer(model), answer(stock), rtol=1e-3, atol=1e-4)


def test_fused_files_of_a_model_whose_experts_mostly_lie_one_by_one(tmp_path: Path) -> None:
    """transformers reads both, and Qwen publishes some of its models so."""
    config = transformers.Qwen3MoeConfig(**{**_COMMON, "num_experts": 5, "moe_intermediate_size": 40, "head_dim": 32})
    model = randomized(transformers.Qwen3MoeForCausalLM(config)).eval()
    model.save_pretrained(tmp_path / "dense", save_original_format=False)
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    assert len(of_all_experts(dense)) == 4
    made = losparse_cli.compress(tmp_path / "dense", tmp_path / "small", Recipe(targets=("*.experts.*.down_proj",)))
    assert len(made.report.layers) == 10
    KINDS["qwen3"] = "Qwen3MoeForCausalLM", "", {}
    same_as_export(tmp_path / "small", "qwen3")
    del KINDS["qwen3"]


def test_a_pickled_checkpoint(tmp_path: Path) -> None:
    tensors = save("gpt-oss", tmp_path / "dense")
    losparse_cli.compress(tmp_path / "dense", tmp_path / "small", keep=0.6, values="float")
    (tmp_path / "dense" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "dense" / "pytorch_model.bin")
    losparse_cli.compress(tmp_path / "dense", tmp_path / "other", keep=0.6, values="float")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "other"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_saved_under_another_head(tmp_path: Path) -> None:
    save("granite", tmp_path / "dense")
    losparse_cli.compress(tmp_path / "dense", tmp_path / "small", keep=0.6, values="float")
    losparse_cli.register()
    transformers.AutoModel.from_pretrained(tmp_path / "small").save_pretrained(tmp_path / "base")
    plain = losparse_cli.export(tmp_path / "base", tmp_path / "plain")
    whole = load_file(losparse_cli.export(tmp_path / "small", tmp_path / "whole") / "model.safetensors")
    found = load_file(plain / "model.safetensors")
    assert found.keys() == {name.removeprefix("model.") for name in whole if name != "lm_head.weight"}
    assert all(torch.equal(found[name], whole[f"model.{name}"]) for name in found)


def test_inspected_dense(tmp_path: Path) -> None:
    save("gpt-oss", tmp_path / "dense")
    report = losparse_cli.inspect(tmp_path / "dense", spectrum=True)
    assert isinstance(report, DenseReport)
    shapes = {layer.name: layer.shape for layer in report.layers if ".experts." in layer.name}
    assert shapes["model.layers.1.mlp.experts.4.gate_up_proj"] == (80, 64)
    assert shapes["model.layers.1.mlp.experts.4.down_proj"] == (64, 40)
    assert all(layer.energy for layer in report.layers if layer.name in shapes)
    assert report.parameters == open_checkpoint(tmp_path / "dense").elements


# --- what is wrong with them --------------------------------------------------------------------------

UP = "model.layers.0.block_sparse_moe.input_linear.weight"


def without(tensors: dict[str, Tensor]) -> None:
    del tensors[UP]


def fewer(tensors: dict[str, Tensor]) -> None:
    tensors[UP] = tensors[UP][:4].clone()


def narrow(tensors: dict[str, Tensor]) -> None:
    tensors[UP] = tensors[UP][..., :-1].clone()


def damaged(tensors: dict[str, Tensor]) -> None:
    tensors[UP][3, 7, 2] = float("nan")


def packed(tensors: dict[str, Tensor]) -> None:
    tensors[UP] = tensors[UP].to(torch.float8_e4m3fn)


def without_any(tensors: dict[str, Tensor]) -> None:
    for name in of_all_experts(tensors):
        del tensors[name]


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (
            without,
            CheckpointError,
            r"The tensor model\.layers\.0\.\S*\.experts\.gate_up_proj .*is missing",
        ),
        (without_any, CheckpointError, r"The tensor model\.layers\.0\.\S*\.gate_up_proj is missing"),
        (fewer, CheckpointError, r"input_linear.*\[4, 80, 64\].*\[5, 80, 64\], of 5 experts"),
        (narrow, CheckpointError, r"input_linear.*\[5, 80, 63\].*\[5, 80, 64\]"),
        (damaged, CheckpointError, r"layers\.0\.\S*\.experts\.3\.gate_up_proj.* nan at row 7, column 2"),
        (packed, UsageError, r"input_linear.*F8_E4M3.*quantized already"),
    ],
)
def test_tensors_that_are_wrong(
    change: Callable[[dict[str, Tensor]], None], error: type[Exception], said: str, tmp_path: Path
) -> None:
    tensors = save("granite", tmp_path / "dense")
    change(tensors)
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    with pytest.raises(error, match=said):
        losparse_cli.compress(tmp_path / "dense", tmp_path / "small", keep=0.6)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("ignored", [(), ("*.experts.*",), ("*.experts.3.*",)])
def test_what_is_no_number_in_a_matrix_that_stays_dense(ignored: tuple[str, ...], tmp_path: Path) -> None:
    tensors = save("gpt-oss", tmp_path / "dense")
    tensors["model.layers.0.mlp.experts.down_proj"][3, 7, 2] = float("nan")
    save_file(tensors, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    recipe = Recipe(keep=0.6, targets=("*.q_proj", "*.experts.1.*"), ignore=ignored)
    if "*.experts.3.*" in ignored:
        losparse_cli.compress(tmp_path / "dense", tmp_path / "small", recipe)
        return
    with pytest.raises(CheckpointError, match=r"experts\.down_proj(\[3\])? in .* holds nan at \["):
        losparse_cli.compress(tmp_path / "dense", tmp_path / "small", recipe)


def test_a_configuration_with_other_experts_than_the_result(tmp_path: Path) -> None:
    save("granite", tmp_path / "dense")
    losparse_cli.compress(tmp_path / "dense", tmp_path / "small", keep=0.6, values="float")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    for count in (4, 6):
        (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"num_local_experts": count}))
        with pytest.raises(CheckpointError, match=rf"config\.json asks for {count} experts"):
            losparse_cli.export(tmp_path / "small", tmp_path / "plain")


def test_a_damaged_record_of_them(tmp_path: Path) -> None:
    save("granite", tmp_path / "dense")
    losparse_cli.compress(tmp_path / "dense", tmp_path / "small", keep=0.6, values="float")
    path = tmp_path / "small" / "config.json"
    whole = json.loads(path.read_text())
    name, fields = next(iter(whole["quantization_config"]["fused"].items()))
    for wrong, said in (
        ({name: {}}, "damaged list 'fused'"),
        ({name: fields | {"count": "5"}}, "damaged list 'fused'"),
        ([name], "damaged list 'fused'"),
        ({name: fields | {"count": 6}}, r"experts\.5\.gate_up_proj"),
    ):
        config = json.loads(json.dumps(whole))
        config["quantization_config"]["fused"] = wrong
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=said):
            losparse_cli.export(tmp_path / "small", tmp_path / "plain")


def test_gpt_oss_as_it_is_published(tmp_path: Path) -> None:
    """In MXFP4, blocks of 32 inputs with two to a byte: refused with what makes it bfloat16, which does."""
    packed = save("gpt-oss", tmp_path / "dense", intermediate_size=64)
    for name in of_all_experts(packed):
        count, inputs, outputs = packed.pop(name).shape
        blocks = (count, outputs, inputs // 32)
        packed[f"{name}_blocks"] = torch.arange(256, dtype=torch.uint8)[torch.randint(256, (*blocks, 16))]
        packed[f"{name}_scales"] = torch.full(blocks, 125, dtype=torch.uint8)
    save_file(packed, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    change_json(tmp_path / "dense" / "config.json", quantization_config={"quant_method": "mxfp4"})
    with pytest.raises(UsageError, match=r"quantized already \(mxfp4\).*make it one in bfloat16: ") as raised:
        losparse_cli.compress(tmp_path / "dense", tmp_path / "small")
    said = str(raised.value).partition("bfloat16: ")[2].replace("'FOLDER'", repr(str(tmp_path / "floats")))
    eval(said, {"transformers": transformers})
    job = losparse_cli.plan(tmp_path / "floats", tmp_path / "small")
    assert sum(".experts." in plan.layer.name for plan in job.plan.layers) == 20
