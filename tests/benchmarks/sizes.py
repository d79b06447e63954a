"""Bytes on disk of real models, everything counted, against other layouts and the entropy bound."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from losparse_cli.budget.recipe import Recipe
from losparse_cli.checkpoint.report import LayerReport, Report
from losparse_cli.compress import compress
from losparse_cli.demo import minilm, smollm2


def sizes() -> None:
    """Rank 8, sparsity 0.9: share of the targeted layers' dense bytes."""
    print("Rank 8, sparsity 0.9: bytes of the targeted layers over their dense bytes in the stored dtype\n")
    print("| model | stored | all bitmask | all CSR, 16-bit columns | entropy bound | whole model |")
    print("|---|---|---|---|---|---|")
    for name, folder in (("SmolLM2-135M, bfloat16", smollm2()), ("all-MiniLM-L6-v2, float32", minilm())):
        with tempfile.TemporaryDirectory() as place:
            report = compress(folder, Path(place) / "out", Recipe(rank=8, sparsity=0.9)).report
        print(
            f"| {name} | **{report.bytes_after / report.bytes_before:.2%}** "
            f"| {_with_index(report, lambda x: x.shape[0] * -(-x.shape[1] // 8)):.2%} "
            f"| {_with_index(report, lambda x: 2 * x.nnz + 4 * (x.shape[0] + 1)):.2%} "
            f"| {_with_index(report, lambda x: _entropy(x.density) * x.parameters / 8):.2%} "
            f"| {report.model_bytes_after / report.model_bytes_before:.2%} |",
            flush=True,
        )


def _with_index(report: Report, index_bytes: object) -> float:
    assert callable(index_bytes)
    total = 0.0
    for layer in report.layers:
        total += layer.kept * _itemsize(layer) + index_bytes(layer)
    return total / report.bytes_before


def _itemsize(layer: LayerReport) -> int:
    return layer.bytes_before // layer.parameters


def _entropy(p: float) -> float:
    return -p * math.log2(p) - (1 - p) * math.log2(1 - p)
