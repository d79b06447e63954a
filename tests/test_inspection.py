"""Reports come from headers, config and report; errors only from what was measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from safetensors.torch import load_file

from losparse_cli.budget.recipe import Recipe
from losparse_cli.checkpoint.report import Report
from losparse_cli.compress import compress
from losparse_cli.errors import SourceError, UsageError
from losparse_cli.inspection import DenseReport, inspect
from tests.hearing import Hearing

MEASURED = ("weight_squared", "residual_squared", "errors")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("inspect")
    compress(toys.llama(place / "model"), place / "out", Recipe(rank=4, sparsity=0.8))
    return place


def test_a_compressed_checkpoint_reports_what_was_written(place: Path) -> None:
    found = inspect(place / "out")
    assert isinstance(found, Report)
    assert found.name == "out"
    recorded = json.loads((place / "out" / "losparse_report.json").read_text())
    assert json.loads(json.dumps(found.to_dict())) == recorded


def test_sizes_are_those_of_the_files(place: Path) -> None:
    found = inspect(place / "out")
    assert isinstance(found, Report)
    before, after = (load_file(place / name / "model.safetensors") for name in ("model", "out"))
    assert found.model_bytes_before == sum(tensor.numel() * tensor.itemsize for tensor in before.values())
    assert found.model_bytes_after == sum(tensor.numel() * tensor.itemsize for tensor in after.values())
    assert found.parameters == sum(tensor.numel() for tensor in before.values())
    for layer in found.layers:
        parts = {name: tensor for name, tensor in after.items() if name.startswith(f"{layer.name}.")}
        assert layer.bytes_after == sum(tensor.numel() * tensor.itemsize for tensor in parts.values())
        assert layer.bytes_before == before[f"{layer.name}.weight"].numel() * 2
        assert layer.spec.nnz == parts[f"{layer.name}.weight"].numel()
        assert layer.kept == layer.spec.nnz + layer.spec.rank * sum(layer.shape)


def test_without_a_report_sizes_stay_and_errors_are_unknown(place: Path, tmp_path: Path) -> None:
    import shutil

    bare = shutil.copytree(place / "out", tmp_path / "bare", ignore=shutil.ignore_patterns("losparse_report.json"))
    full, found = inspect(place / "out"), inspect(bare)
    assert isinstance(full, Report)
    assert isinstance(found, Report)
    assert found.relative_error is None
    assert (found.parameters, found.model_bytes_before) == (full.parameters, full.model_bytes_before)
    for layer, known in zip(found.layers, full.layers, strict=True):
        without = {key: value for key, value in known.to_dict().items() if key not in MEASURED}
        assert {key: value for key, value in layer.to_dict().items() if key not in MEASURED} == without
        assert layer.relative_error is None


def test_weights_are_not_read(place: Path, tmp_path: Path) -> None:
    """Holes in place of the data give the same report."""
    import shutil

    hollow = shutil.copytree(place / "out", tmp_path / "hollow")
    path = hollow / "model.safetensors"
    size, start = path.stat().st_size, toys.read_header(path)[1]
    os.truncate(path, start)
    os.truncate(path, size)
    full, found = inspect(place / "out"), inspect(hollow)
    assert found == full


def test_a_dense_model_lists_every_linear_layer(place: Path) -> None:
    found = inspect(place / "model")
    assert isinstance(found, DenseReport)
    chosen = [layer for layer in found.layers if layer.reason is None]
    assert len(chosen) == 28
    reasons = {layer.name: layer.reason for layer in found.layers if layer.reason}
    assert reasons.keys() == {"model.embed_tokens", "lm_head"}
    assert reasons["model.embed_tokens"] == "too small to matter: fewer than 65,536 entries"
    shapes = {layer.name: layer.shape for layer in chosen}
    assert shapes["model.layers.0.mlp.gate_proj"] == (136, 64)
    assert found.targeted_parameters == sum(m * n for m, n in shapes.values() if m and n)
    assert all(layer.energy == {} for layer in found.layers)


def test_embeddings_of_a_dense_model_are_compressed_too_in_whole_numbers(toy: Any) -> None:
    found = inspect(toy("llama", vocab_size=1100), spectrum=True)
    assert isinstance(found, DenseReport)
    rows = [layer for layer in found.layers if layer.rows]
    assert [layer.name for layer in rows] == ["model.embed_tokens", "lm_head"]
    assert all(layer.reason is None and not layer.energy for layer in rows)
    assert found.targeted_parameters == sum(m * n for x in found.layers if not x.reason for m, n in [x.shape or (0, 0)])


def test_a_linked_folder_goes_by_the_name_that_was_given(place: Path, tmp_path: Path) -> None:
    (tmp_path / "given").symlink_to(place / "out")
    assert inspect(tmp_path / "given").name == "given"
    assert inspect(f"{tmp_path}/given/").name == "given"
    assert inspect(place / "model" / ".." / "out").name == "out"


def test_the_spectrum_is_that_of_the_weights(place: Path) -> None:
    heard = Hearing()
    found = inspect(place / "model", spectrum=True, progress=heard)
    assert isinstance(found, DenseReport)
    assert heard.totals == heard.done == {"layers": 28}
    weights = load_file(place / "model" / "model.safetensors")
    for layer in found.layers:
        if layer.reason is None:
            squares = torch.linalg.svdvals(weights[f"{layer.name}.weight"].double()).square()
            for rank, energy in layer.energy.items():
                assert energy == pytest.approx(float(squares[:rank].sum() / squares.sum()), abs=1e-5)
            assert max(layer.energy) <= min(layer.shape or ())


def test_what_cannot_be_inspected(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--spectrum is for dense checkpoints"):
        inspect(place / "out", spectrum=True)
    with pytest.raises(SourceError, match="no folder"):
        inspect(tmp_path / "absent")
    quantized = toys.llama(tmp_path / "quantized", quantization_config={"quant_method": "gptq"})
    with pytest.raises(SourceError, match="quantized already"):
        inspect(quantized)
