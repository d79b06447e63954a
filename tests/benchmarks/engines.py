"""Files for llama.cpp: what it computes from them beside our loader, and beside its own Q4_0 of the same model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losparse_cli.budget.recipe import Recipe
from losparse_cli.checkpoint.source import open_checkpoint
from losparse_cli.compress import compress
from losparse_cli.demo import encyclopedia_text
from losparse_cli.export import export_gguf
from losparse_cli.exporting.gguf import GgufWriter
from losparse_cli.load import load
from losparse_cli.progress import Progress
from tests.llama_cpp import LlamaCpp

from .permuted import dense_model
from .results import Options

TOKENS, WINDOWS = 512, 8
ROWS = ("int4", "int8", "int4, float32 products", "Q4_0", "Q8_0")


def gguf(options: Options, rows: Sequence[str] = ()) -> None:
    """Perplexity of each row in llama.cpp, and of its checkpoint in our loader, float32, on held-out text."""
    dense = dense_model(options)
    print("| file | MB | perplexity, llama.cpp | our loader | ratio | top token equal | top two apart by 0.1 |")
    print("|---|---|---|---|---|---|---|")
    folder = Path(tempfile.mkdtemp(prefix="losparse-gguf-"))
    try:
        for row in rows or ROWS:
            print(f"| {row} | {' | '.join(_row(options, row, dense, folder))} |", flush=True)
    finally:
        shutil.rmtree(folder)


def _row(options: Options, row: str, dense: Path, folder: Path) -> list[str]:
    grid, _, more = row.partition(", ")
    path = folder / f"{row}.gguf"
    if row.startswith("Q"):
        GgufWriter(open_checkpoint(dense), row.lower()).write(path, None, Progress())
        ours = dense
    else:
        ours = folder / grid
        if not ours.exists():
            compress(dense, ours, Recipe(grid=grid), calibration=options.calibration())
        path = export_gguf(ours, path, kind="f32" if more else "auto").path
    model, tokenizer = load(ours, dtype=torch.float32)
    ids = tokenizer(encyclopedia_text()[1], return_tensors="pt").input_ids[0, : TOKENS * WINDOWS].view(-1, TOKENS)
    losses: list[list[float]] = [[], []]
    equal: list[Tensor] = []
    clear: list[Tensor] = []
    with LlamaCpp(path) as engine, torch.no_grad():
        for window in ids:
            both: list[Any] = [engine.logits(window.tolist()), model(window[None]).logits[0].float()]
            for logits, found in zip(both, losses, strict=True):
                found.append(float(torch.nn.functional.cross_entropy(logits[:-1], window[1:])))
            equal.append(both[0].argmax(-1) == both[1].argmax(-1))
            first, second = both[1].topk(2).values.unbind(-1)
            clear.append(first - second > 0.1)
    theirs, own = (float(torch.tensor(found).mean().exp()) for found in losses)
    same, apart = torch.cat(equal), torch.cat(clear)
    size = f"{path.stat().st_size / 1e6:.1f}"
    compared = row.startswith("Q")  # with the dense model, from which it differs
    return [
        size, f"{theirs:.3f}", f"{own:.3f}{' (dense)' if compared else ''}", f"{theirs / own:.4f}",
        f"{float(same.float().mean()):.1%}", f"{float(same[apart].float().mean()):.1%}",
    ]  # fmt: skip
