"""Whole numbers of a fixed width: what is stored is what was asked, whatever the layers, and comes back as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from terminal import losparse

from losparse_cli.budget.recipe import Recipe
from losparse_cli.checkpoint.config import layer_specs, layer_tensors
from losparse_cli.checkpoint.layers import numbers_of, read_layer
from losparse_cli.checkpoint.source import open_checkpoint
from losparse_cli.compress import compress
from losparse_cli.errors import LosparseError, UsageError
from losparse_cli.linalg.factors import LowRankCodes
from losparse_cli.linalg.integers import code, column_metric, limits, rounded, short, steps_of_width
from losparse_cli.load import load
from losparse_cli.shim.layouts import over_runs, times_runs
from losparse_cli.verify import verify

WHOLE_RUNS = {"hidden_size": 64, "intermediate_size": 96}
"""Widths that are made of runs of 32 columns."""


def codes_of(folder: Path) -> dict[str, tuple[LowRankCodes, torch.Tensor]]:
    """Layer -> its factors, and its numbers without what runs are multiplied by."""
    checkpoint = open_checkpoint(folder)
    found = {}
    for name, spec in layer_specs(checkpoint).items():
        factors = read_layer(checkpoint, name, spec, layer_tensors(checkpoint, name, spec))
        assert isinstance(factors, LowRankCodes)
        found[name] = factors, numbers_of(factors)
    return found


@pytest.mark.parametrize("more", [{}, {"rank": 3}, {"sparsity": 0.4}])
@pytest.mark.parametrize("grid", ["int4", "int8"])
@pytest.mark.parametrize("text", [False, True])
def test_every_number_has_its_width(
    grid: str, more: dict[str, Any], text: bool, toy: Callable[..., Path], tmp_path: Path
) -> None:
    words = tmp_path / "text.txt"
    words.write_text("the quick brown fox jumps over the lazy dog, and again " * 60)
    given = {"source": str(words), "tokens": 512, "length": 32} if text else None
    out = compress(
        toy("llama", tokenizer=True, **WHOLE_RUNS), tmp_path / "out", Recipe(grid=grid, **more), calibration=given
    ).output
    least, most = limits(4 if grid == "int4" else 8)
    layers = codes_of(out)
    for name, (factors, numbers) in layers.items():
        assert bool((factors.columns == 1).all()), name
        assert least <= int(numbers.amin()) < 0 < int(numbers.amax()) <= most, name
        assert (factors.runs is not None) == (grid == "int4" and numbers.shape[1] % 32 == 0), name
        if factors.runs is not None:
            assert bool((factors.runs != 0).all())
            exact = factors.rows.float()[:, None] * factors.runs
            assert torch.equal(exact.bfloat16().float(), exact)  # 16-bit floats of either kind
            assert torch.equal(exact.half().float(), exact)
        if "sparsity" in more:
            zeros, n = numbers == 0, numbers.shape[1]
            assert int(zeros.sum(1).amin()) >= n - round(0.6 * n) if text else float(zeros.float().mean()) > 0.399
    assert len(layers) == 7 * 2
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said["format_version"] == (3 if grid == "int4" else 2)
    assert verify(out).sound


def test_what_was_loaded_is_saved_again_bit_by_bit(toy: Callable[..., Path], tmp_path: Path) -> None:
    out = compress(toy("llama", **WHOLE_RUNS), tmp_path / "out", Recipe(grid="int4", rank=2)).output
    model, _ = load(out)
    model.save_pretrained(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load(tmp_path / "again")[0](ids).logits)


@pytest.mark.parametrize("run", [0, 32])
@pytest.mark.parametrize("width", [4, 8])
def test_no_step_among_those_tried_is_better(width: int, run: int) -> None:
    """By weighted squares, for each run: checked against all whole numbers that its step may be."""
    generator = torch.Generator().manual_seed(width + run)
    W = torch.randn(5, 96, generator=generator) * torch.rand(5, 1, generator=generator).add(0.1)
    weights = torch.rand(96, generator=generator)
    a, runs = steps_of_width(W, weights, width, run)
    least, most = limits(width)

    def error(step: torch.Tensor) -> torch.Tensor:
        parts = W.view(5, -1, run or 96)
        q = (parts / step[..., None]).round().clamp(least, most)
        return ((q * step[..., None] - parts).square() * weights.view(1, -1, run or 96)).sum(2)

    if not run:
        assert runs is None
        largest = W.abs().amax(1) / -least
        assert bool((error(a[:, None])[:, 0] <= error(largest[:, None])[:, 0] * (1 + 1e-5)).all())
        return
    assert runs is not None
    assert torch.equal(short(a), a)
    found = error(a[:, None] * runs)
    every = torch.stack([error((a * k)[:, None].expand(-1, 3)) for k in (*range(-15, 0), *range(1, 16))])
    assert float((found / every.amin(0).clamp_min(1e-9)).log().mean()) < 0.1  # a dozen of thirty were tried


def test_errors_are_handed_on_within_the_width() -> None:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(400, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    H, W = X.T @ X / 400, torch.randn(24, 64, generator=generator)
    a, runs = steps_of_width(W, H.diagonal(), 4, 32)
    assert runs is not None
    metric = column_metric(H, torch.ones(1))
    q = code(W, metric, a, None, 0.0, 4, runs)
    numbers = over_runs(q, runs)
    assert torch.equal(times_runs(numbers, runs).int(), q)
    assert -8 <= int(numbers.amin()) < int(numbers.amax()) <= 7

    def error(q: torch.Tensor) -> float:
        E = W - a[:, None] * q
        return float(((E @ H) * E).sum())

    assert error(q) < 0.6 * error(rounded(W, a, 0.0, 4, runs))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"grid": "int5"}, "--grid is int4 or int8, not 'int5'"),
        ({"grid": "int4", "bits": 4.0}, "--bits and --grid contradict each other"),
        ({"grid": "int4", "sensitivity": "on"}, "--sensitivity on makes codes of some rows finer"),
        ({"grid": "int4", "embedding_bits": 6.0}, "keeps embeddings on int8"),
        ({"grid": "int4", "values": "float"}, "--grid is for whole numbers in S"),
    ],
)
def test_what_contradicts_a_grid(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as raised:
        Recipe(**fields)
    assert said in str(raised.value)


def test_a_plan_says_what_a_weight_takes_at_most(toy: Callable[..., Path], tmp_path: Path) -> None:
    model = toy("llama", **WHOLE_RUNS)
    planned = losparse("compress", model, "-o", tmp_path / "out", "--grid", "int4", "--dry-run", "--json")
    forecast = json.loads(planned.out)
    made = compress(model, tmp_path / "out", grid="int4")
    assert made.report.bytes_after <= forecast["expected_bytes"]
    assert {4 < layer["bits"] < 7 for layer in forecast["layers"]} == {True}


@pytest.mark.parametrize("size", [1.0, 1e-3])
@pytest.mark.parametrize("width", [4, 8])
def test_small_weights_lose_no_more(width: int, size: float) -> None:
    W = torch.randn(16, 96, generator=torch.Generator().manual_seed(0)) * size
    a, runs = steps_of_width(W, torch.ones(96), width, 32 if width == 4 else 0)
    E = W - a[:, None] * rounded(W, a, 0.0, width, runs)
    assert float(E.norm() / W.norm()) < (0.11 if width == 4 else 0.01)


def test_runs_that_are_zero_or_missing_are_told(toy: Callable[..., Path], tmp_path: Path) -> None:
    out = compress(toy("llama", **WHOLE_RUNS), tmp_path / "out", Recipe(grid="int4")).output
    tensors = load_file(out / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.S_runs"
    save_file(tensors | {name: torch.zeros_like(tensors[name])}, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(LosparseError, match="S_runs holds a zero"):
        load(out)
    assert not verify(out).sound
    del tensors[name]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(LosparseError, match="S_runs"):
        load(out)


@pytest.mark.parametrize("text", [False, True])
def test_some_layers_on_a_grid(text: bool, toy: Callable[..., Path], tmp_path: Path) -> None:
    words = tmp_path / "text.txt"
    words.write_text("the quick brown fox jumps over the lazy dog, and again " * 60)
    given = {"source": str(words), "tokens": 512, "length": 32} if text else None
    recipe = {"bits": 6.0, "layers": {"*.k_proj": {"grid": "int4"}}}
    out = compress(toy("llama", tokenizer=True, **WHOLE_RUNS), tmp_path / "out", recipe, calibration=given).output
    runs = {name.rpartition(".")[2] for name, (factors, _) in codes_of(out).items() if factors.runs is not None}
    assert runs == {"k_proj"}
