"""Every architecture, end to end: compressed, loaded in each way, saved again, trained, generated from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TOYS, answer, token_batch, toy_model
from experts import split
from safetensors.torch import load_file
from torch import Tensor

import losparse_cli
from losparse_cli.shim.codec import decode
from losparse_cli.shim.layouts import LayerSpec
from losparse_cli.shim.linear import LowRankSparseLinear

AUTO = {
    "ForCausalLM": "AutoModelForCausalLM", "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering", "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
}  # fmt: skip

# What every architecture meets: unstructured S. The other patterns go round, so that each meets at least one more.
RECIPES: list[tuple[str, dict[str, Any]]] = [(name, {"rank": 4, "sparsity": 0.5}) for name in TOYS]
RECIPES += [
    (name, recipe)
    for number, name in enumerate(TOYS)
    for recipe in [
        [
            {"rank": 4, "sparsity": 0.7, "pattern": "rows"},
            {"rank": 4, "sparsity": 0.7, "pattern": "columns"},
            {"rank": 3, "pattern": "2:4"},
            {"rank": 5, "sparsity": 0.96},
            {"rank": 0, "sparsity": 0.8},
            {"rank": 4, "sparsity": 1.0},
        ][number % 6]
    ]
]
CAUSAL = [name for name, (cls, *_) in TOYS.items() if cls.endswith(("ForCausalLM", "LMHeadModel"))]
GENERATING = [*CAUSAL, "t5", "bart"]

each_recipe = pytest.mark.parametrize(
    ("name", "recipe"), RECIPES, ids=[f"{n}-{'-'.join(map(str, r.values()))}" for n, r in RECIPES]
)
each_toy = pytest.mark.parametrize("name", TOYS)


def auto_class(name: str) -> Any:
    suffix = next(s for s in AUTO if TOYS[name][0].endswith(s))
    return getattr(transformers, AUTO[suffix])


def load_checked(folder: Path, model_class: Any, **options: Any) -> Any:
    """from_pretrained, with nothing missing, unexpected or of another shape."""
    losparse_cli.register()
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), info
    return model


def stored_layers(folder: Path) -> dict[str, Tensor]:
    """Module name -> U V + S in float64, read from the files alone."""
    import json

    tensors = load_file(folder / "model.safetensors")
    modules = json.loads((folder / "config.json").read_text())["quantization_config"]["modules"]
    layers = {}
    for name, fields in modules.items():
        spec = LayerSpec.from_dict(fields)
        disk = spec.tensor or name
        part = {suffix: tensors[f"{disk}.{suffix}"] for suffix in spec.tensor_shapes(torch.float32)}
        W = torch.zeros(spec.shape, dtype=torch.float64)
        W[decode(spec, part)] = part["weight"].double()
        layers[name] = W + part["U"].double() @ part["V"].double() if spec.rank else W
    return layers


def with_weights(name: str, folder: Path) -> Any:
    """The dense toy with the stored U V + S of `folder` in place of its weights."""
    model = split(toy_model(name))
    with torch.no_grad():
        for module, W in stored_layers(folder).items():
            weight = model.get_submodule(module).weight
            weight.copy_(W.T if isinstance(model.get_submodule(module), transformers.Conv1D) else W)
    return model


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


@each_recipe
def test_outputs_are_those_of_the_dense_model_with_the_stored_weights(
    name: str, recipe: dict[str, Any], compressed: Any, tmp_path: Path
) -> None:
    folder = compressed(name, **recipe)
    model, _ = losparse_cli.load(folder)
    auto = load_checked(folder, auto_class(name))
    dense = with_weights(name, folder)
    stock = auto_class(name).from_pretrained(losparse_cli.export(folder, tmp_path / "dense"))
    layers = [m for m in model.modules() if isinstance(m, LowRankSparseLinear)]
    assert len(layers) == len(stored_layers(folder)) > 0
    assert type(model) is type(auto) is type(dense) is type(stock)
    for batch, length in ((2, 11), (1, 1), (3, 17), (2, 4)):  # one process, many shapes
        expected = answer(dense, batch=batch, length=length)
        same(answer(model, batch=batch, length=length), expected)
        assert torch.equal(answer(model, batch=batch, length=length), answer(auto, batch=batch, length=length))
        same(answer(stock, batch=batch, length=length), expected)
    original = answer(toy_model(name), batch=2, length=11)
    assert not torch.allclose(answer(model, batch=2, length=11), original, rtol=1e-3, atol=1e-4)  # it was compressed


@each_recipe
def test_saved_again_and_reloaded_it_is_the_same_bit_for_bit(
    name: str, recipe: dict[str, Any], compressed: Any, tmp_path: Path
) -> None:
    folder = compressed(name, **recipe)
    model = load_checked(folder, auto_class(name))
    model.save_pretrained(tmp_path / "again")
    again = load_checked(tmp_path / "again", auto_class(name))
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first)
    assert torch.equal(answer(model), answer(again))
    # and on disk: the same tensors, so that export and verify go on working
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert losparse_cli.verify(tmp_path / "again").sound
    exported = auto_class(name).from_pretrained(losparse_cli.export(tmp_path / "again", tmp_path / "dense"))
    same(answer(exported), answer(model))


@pytest.mark.parametrize("name", GENERATING)
@pytest.mark.parametrize("cache", [True, False], ids=["cache", "no-cache"])
def test_generates_what_the_dense_model_generates(name: str, cache: bool, compressed: Any) -> None:
    folder = compressed(name)
    model, _ = losparse_cli.load(folder)
    dense = with_weights(name, folder)
    tokens = token_batch(model, batch=2, length=7)["input_ids"]
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "use_cache": cache}
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)
    assert torch.equal(made, dense.generate(tokens, attention_mask=torch.ones_like(tokens), **options))
    assert made.shape[1] >= 9


@each_toy
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_at_load_and_afterwards(name: str, dtype: torch.dtype, compressed: Any) -> None:
    folder = compressed(name)
    full = load_checked(folder, auto_class(name))
    at_load = load_checked(folder, auto_class(name), dtype=dtype)
    afterwards = load_checked(folder, auto_class(name)).to(dtype)
    layers = [m for m in at_load.modules() if isinstance(m, LowRankSparseLinear)]
    kept = tuple(getattr(at_load, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    for module_name, module in at_load.named_modules():
        if isinstance(module, LowRankSparseLinear):
            expected = torch.float32 if module_name.rpartition(".")[2] in kept else dtype
            assert {p.dtype for p in module.parameters()} == {expected}, module_name
    assert layers
    scale = answer(full).abs().max()
    for model in (at_load, afterwards):
        got = answer(model)
        assert torch.isfinite(got).all()
        assert (got - answer(full)).abs().mean() < 0.02 * scale  # on average: a rounded router may choose otherwise
    model = load_checked(folder, auto_class(name))
    assert torch.isfinite(answer(model.half() if dtype == torch.float16 else model.bfloat16())).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_a_model_stored_in_bfloat16_stays_so(name: str, compressed: Any) -> None:
    folder = compressed(name, dtype=torch.bfloat16)
    model, _ = losparse_cli.load(folder)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    exact = with_weights(name, folder)
    assert (answer(model) - answer(exact)).abs().max() < 0.1 * answer(exact).abs().max()


@each_toy
@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"], ids=["cpu", "dict", "auto"])
def test_device_map(name: str, device_map: Any, compressed: Any) -> None:
    folder = compressed(name)
    model = load_checked(folder, auto_class(name), device_map=device_map)
    assert torch.equal(answer(model), answer(load_checked(folder, auto_class(name))))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bart", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_block_offloaded_to_disk(name: str, dtype: torch.dtype, compressed: Any, tmp_path: Path) -> None:
    folder = compressed(name)
    whole = load_checked(folder, auto_class(name), dtype=dtype)
    block = next(n for n, m in whole.named_modules() if isinstance(m, torch.nn.ModuleList)) + ".1"
    places = {block: "disk", **_beside(whole, block)}
    model = load_checked(folder, auto_class(name), dtype=dtype, device_map=places, offload_folder=tmp_path)
    assert all(p.device.type == "meta" for p in model.get_submodule(block).parameters())
    for batch, length in ((2, 9), (1, 3)):
        assert torch.equal(answer(model, batch=batch, length=length), answer(whole, batch=batch, length=length))


def _beside(model: Any, block: str) -> dict[str, str]:
    """A device map of all that lies beside `block` and beside what holds it."""
    places, path = {}, ""
    for part in block.split("."):
        holder = model.get_submodule(path)
        names = [n for n, _ in (*holder.named_children(), *holder.named_parameters(recurse=False))]
        names += [n for n, _ in holder.named_buffers(recurse=False)]
        places |= {f"{path}.{name}".lstrip("."): "cpu" for name in names if name != part}
        path = f"{path}.{part}".lstrip(".")
    return places


def test_an_automatic_device_map_counts_compressed_bytes(compressed: Any, toy: Any, tmp_path: Path) -> None:
    folder = compressed("llama", rank=4, sparsity=0.9)
    whole = load_checked(folder, auto_class("llama"))
    for limit, spills in (("240KB", False), ("110KB", True)):
        options = {"device_map": "auto", "max_memory": {"cpu": limit}}
        model = load_checked(folder, auto_class("llama"), offload_folder=tmp_path / limit, **options)
        dense = auto_class("llama").from_pretrained(toy("llama"), offload_folder=tmp_path / f"{limit}-dense", **options)
        assert "disk" in dense.hf_device_map.values()
        assert any(p.device.type == "meta" for p in model.parameters()) == spills
        assert torch.equal(answer(model), answer(whole))


HEADS = [
    ("llama", "AutoModel"), ("gpt2", "AutoModel"), ("opt", "AutoModel"), ("gemma3", "AutoModel"),
    ("mixtral", "AutoModel"), ("falcon", "AutoModelForTokenClassification"), ("bert", "AutoModel"),
    ("qwen2", "AutoModelForSequenceClassification"), ("bert-qa", "AutoModelForSequenceClassification"),
    ("bert", "AutoModelForQuestionAnswering"), ("deberta-v2", "AutoModelForTokenClassification"),
    ("t5", "AutoModel"), ("t5", "T5EncoderModel"), ("bart", "AutoModel"), ("bart", "AutoModelForCausalLM"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "head"), HEADS, ids=[f"{n}-{h}" for n, h in HEADS])
def test_another_head_keeps_the_compressed_body(
    name: str, head: str, compressed: Any, toy: Any, tmp_path: Path
) -> None:
    folder = compressed(name)
    losparse_cli.register()
    model_class = getattr(transformers, head)
    options = {"num_labels": 2} if head == "AutoModelForQuestionAnswering" else {}
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    dense, dense_info = model_class.from_pretrained(toy(name), output_loading_info=True, **options)
    # The new head's own tensors are missing, the old one's unexpected: the same as with the dense checkpoint.
    assert (info["missing_keys"], info["mismatched_keys"]) == (dense_info["missing_keys"], set())
    assert {k.rpartition(".")[0] for k in info["unexpected_keys"]} == {
        k.rpartition(".")[0] for k in dense_info["unexpected_keys"]
    }
    layers = {n for n, m in model.named_modules() if isinstance(m, LowRankSparseLinear)}
    stored = [(name, name.partition(".")[2]) for name in stored_layers(folder)]
    split(dense)
    assert len(layers) == sum(any(_has(dense, n) for n in names) for names in stored) > 0
    model.save_pretrained(tmp_path / "again")
    again = load_checked(tmp_path / "again", model_class)
    assert torch.equal(answer(model), answer(again))
    assert losparse_cli.verify(tmp_path / "again").sound
    stock = model_class.from_pretrained(losparse_cli.export(tmp_path / "again", tmp_path / "dense"))
    same(answer(stock), answer(model))


def _has(model: Any, name: str) -> bool:
    return any(module_name in (name, f"{model.base_model_prefix}.{name}") for module_name, _ in model.named_modules())


@each_toy
def test_a_training_step_moves_every_factor_and_no_zero(name: str, compressed: Any) -> None:
    model = load_checked(compressed(name), auto_class(name)).train()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LowRankSparseLinear)}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    supports = {n: m.support() for n, m in layers.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for step in range(2):
        output = model(**token_batch(model, seed=step))
        scores = (output.start_logits, output.end_logits) if hasattr(output, "start_logits") else (output.logits,)
        sum(s.float().log_softmax(-1)[..., 0].mean() for s in scores).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = dict(model.named_parameters())
    for layer_name, layer in layers.items():
        for suffix in ("U", "V", "weight"):
            assert not torch.equal(before[f"{layer_name}.{suffix}"], after[f"{layer_name}.{suffix}"]), layer_name
        assert torch.equal(layer.sparse() != 0, supports[layer_name])
