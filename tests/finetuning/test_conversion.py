"""Taken apart and put together again: for every architecture the model says the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TOYS, answer, toy_model
from torch import Tensor, nn
from transformers import Conv1D

import losparse_cli
from losparse_cli.budget.plan import Layer, LayerPlan, plan_layer
from losparse_cli.budget.recipe import Recipe
from losparse_cli.checkpoint.layers import encode_layer
from losparse_cli.finetuning.conversion import compressed_layers, finish, start_compressed, start_dense, trained_layers
from losparse_cli.linalg.factors import LowRankSparse
from losparse_cli.models.skeleton import classify
from losparse_cli.shim.layouts import LayerSpec
from losparse_cli.shim.linear import LowRankSparseLinear

CPU = torch.device("cpu")


def taken_apart(name: str, pattern: str = "rows", rank: int = 4, **options: Any) -> Any:
    model, nnz = toy_model(name), options.pop("nnz", 1)
    plans = [
        plan_of(linear.name, linear.shape, linear.transposed, rank, pattern) for linear in classify(model)[0].values()
    ]
    start_dense(model, [replace(plan, nnz=nnz) for plan in plans], device=CPU, **options)
    return model


def plan_of(name: str, shape: Any, transposed: bool, rank: int, pattern: str = "rows") -> LayerPlan:
    return plan_layer(
        Layer(name, f"{name}.weight", name, shape, 4, transposed),
        Recipe(rank=rank, sparsity=0.5, pattern=pattern).settled(),
    )


def put_together(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, LayerSpec]:
    specs: dict[str, LayerSpec] = {}

    def encode(name: str, factors: LowRankSparse) -> tuple[LayerSpec, dict[str, Tensor]]:
        trained = trained_layers(model)[name]
        layer = Layer(name, f"{name}.weight", name, trained.shape, dtype.itemsize, trained.transposed)
        plan = replace(plan_layer(layer, Recipe(rank=1, sparsity=0.5).settled()), pattern=trained.pattern)
        specs[name], tensors = encode_layer(plan, factors)
        return specs[name], tensors

    finish(model, dtype, encode)
    return specs


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_with_what_layers_are_fed_outputs_are_nearer(name: str) -> None:
    """And still nothing is lost, and a layer whose inputs are unknown, or always zero, begins as ever."""
    dense, plain = toy_model(name), taken_apart(name)
    names = list(classify(dense)[0])
    X = {n: torch.randn(64, layer.in_features) * torch.arange(1, layer.in_features + 1).float().pow(-1)
         for n, layer in trained_layers(plain).items()}  # fmt: skip
    moments = {n: x.T @ x / len(x) for n, x in X.items()}
    unknown, dead = names[:2]
    del moments[unknown]
    moments[dead].zero_()
    model = taken_apart(name, moments=moments)
    same(answer(model), answer(dense))
    for n, layer in trained_layers(model).items():
        ours, theirs = (float((X[n] @ part.S.detach().T).square().sum()) for part in (layer, trained_layers(plain)[n]))
        if n in (unknown, dead):
            assert ours == theirs
        else:
            assert ours < 0.95 * theirs, n


@pytest.mark.parametrize(
    ("name", "pattern"),
    [(name, "rows") for name in TOYS]
    + [(name, pattern) for name in ("llama", "gpt2", "bart") for pattern in ("columns", "unstructured")],
)
def test_nothing_is_lost_of_a_dense_model(name: str, pattern: str) -> None:
    dense, model = toy_model(name), taken_apart(name, pattern)
    linears = classify(dense)[0]
    layers = trained_layers(model)
    assert layers.keys() == linears.keys()
    for layer_name, layer in layers.items():
        weight = dense.get_submodule(layer_name).weight.detach()
        W = weight.T if isinstance(dense.get_submodule(layer_name), Conv1D) else weight
        assert layer.transposed == isinstance(dense.get_submodule(layer_name), Conv1D) == linears[layer_name].transposed
        torch.testing.assert_close(layer.weight.detach(), W, rtol=1e-5, atol=1e-6)
        # U V is the best of its rank: what S holds has the norm of the singular values that are left.
        left = torch.linalg.svdvals(W.double())[4:].square().sum().sqrt()
        assert float(torch.linalg.vector_norm(layer.S.detach())) == pytest.approx(float(left), rel=0.05)
        assert all(p.requires_grad for p in layer.parameters())
    assert not model.training
    same(answer(model), answer(dense))
    # Half of the units go, as training would have it, and the model is written without them.
    with torch.no_grad():
        for layer in layers.values():
            layer.kept[::2] = False
            layer.S *= layer.mask()
    expected = answer(model)
    assert not torch.allclose(expected, answer(dense), rtol=1e-3, atol=1e-4)
    specs = put_together(model)
    same(answer(model), expected)
    assert specs.keys() == linears.keys()
    for layer_name, spec in specs.items():
        found = model.get_submodule(layer_name)
        assert isinstance(found, LowRankSparseLinear)
        m, n = spec.shape
        if pattern != "unstructured":
            assert spec.layout == pattern
            assert found.weight.numel() == ((m // 2) * n if pattern == "rows" else (n // 2) * m)


@pytest.mark.parametrize("recipe", [
    {"rank": 4, "sparsity": 0.6, "pattern": "rows"}, {"rank": 0, "sparsity": 0.6, "pattern": "columns"},
    {"rank": 3, "sparsity": 0.5}, {"rank": 3, "pattern": "2:4"}, {"rank": 4, "sparsity": 1.0},
], ids=["rows", "columns-itp", "unstructured", "2:4", "low-rank"])  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "bart", "t5"])
def test_a_compressed_model_is_what_it_was(name: str, recipe: dict[str, Any], compressed: Any) -> None:
    folder: Path = compressed(name, **recipe)
    model, _ = losparse_cli.load(folder)
    supports = {n: layer.support().clone() for n, layer in compressed_layers(model).items()}
    dense = {n: layer.dense() for n, layer in compressed_layers(model).items()}
    expected = answer(model)
    start_compressed(model)
    same(answer(model), expected)
    layers = trained_layers(model)
    assert layers.keys() == supports.keys()
    for layer_name, layer in layers.items():
        torch.testing.assert_close(layer.weight.detach(), dense[layer_name], rtol=1e-5, atol=1e-6)
        assert (0 if layer.S is None else layer.S.numel()) == int(supports[layer_name].sum())
    # Training moves values; the support stays.
    answered = model(**batch_of(model))
    outputs = answered.logits if hasattr(answered, "logits") else answered.start_logits
    outputs.square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    moved = answer(model)
    assert not torch.allclose(moved, expected, rtol=1e-3, atol=1e-4)
    put_together(model)
    same(answer(model), moved)
    for layer_name, layer in compressed_layers(model).items():
        assert torch.equal(layer.support(), supports[layer_name])


def batch_of(model: Any) -> dict[str, Tensor]:
    from conftest import token_batch

    return token_batch(model)


@pytest.mark.parametrize("bias", [True, False])
def test_with_and_without_biases(bias: bool) -> None:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(12, 10, bias=bias)])

        def forward(self, x: Tensor) -> Tensor:
            return self.layers[0](x)

    model, x = Toy(), torch.randn(3, 12)
    before = model(x)
    start_dense(model, [plan_of("layers.0", (10, 12), False, 2)], device=CPU)
    same(model(x), before)
    put_together(model)
    same(model(x), before)
    assert (model.layers[0].bias is None) == (not bias)


def test_low_rank_alone_and_s_alone() -> None:
    model = taken_apart("bert", nnz=0)
    for layer in trained_layers(model).values():
        assert layer.S is None
        assert layer.U.shape[1] == 4
    expected = answer(model)
    specs = put_together(model)
    assert all(spec.nnz == 0 for spec in specs.values())
    same(answer(model), expected)
    model = taken_apart("bert", rank=0)
    assert all(layer.U is layer.V is None for layer in trained_layers(model).values())
    same(answer(model), answer(toy_model("bert")))


def test_a_layer_of_which_nothing_is_left() -> None:
    """One threshold for all may take all of a layer's S, also where there is no U V."""
    model = taken_apart("bert", rank=0)
    first = next(iter(trained_layers(model).values()))
    with torch.no_grad():
        first.kept.zero_()
        first.S.zero_()
    expected = answer(model)
    put_together(model)
    same(answer(model), expected)


def test_the_seed_decides() -> None:
    a, b = taken_apart("llama"), taken_apart("llama")
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("name", ["llama", "gemma3", "t5"])
def test_in_a_smaller_dtype_it_is_the_model_that_will_be_loaded(name: str, tmp_path: Path) -> None:
    """Tables that are not stored, such as those of rotary positions, stay as precise as from_pretrained has them."""
    model = taken_apart(name)
    put_together(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    plain = toy_model(name).to(torch.bfloat16)
    plain.save_pretrained(tmp_path / "plain")
    loaded = type(plain).from_pretrained(tmp_path / "plain")
    stored = set(loaded.state_dict())
    ours = dict(model.named_buffers())
    for buffer_name, buffer in loaded.named_buffers():
        if buffer_name not in stored:
            assert torch.equal(ours[buffer_name].to(buffer.dtype), buffer), buffer_name
