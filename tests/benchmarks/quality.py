"""What data-free compression costs a language model, and how the defaults were chosen."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from losparse_cli.budget.recipe import Recipe
from losparse_cli.compress import compress
from losparse_cli.demo import news_text, smollm2
from losparse_cli.evaluate import perplexity
from losparse_cli.load import load


def _row(name: str, recipe: Recipe | None, *, timed: bool = False, windows: int = 8) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder, cells = smollm2(), "| 100 % | 100 % | 0 "
        if recipe is not None:
            start = time.perf_counter()
            report = compress(folder, Path(place) / "out", recipe).report
            seconds = time.perf_counter() - start
            folder = Path(place) / "out"
            cells = f"| {report.bytes_after / report.bytes_before:.1%} | {report.kept_parameters:.1%} "
            cells += f"| {report.relative_error or 0:.4f} " + (f"| {seconds:.1f} " if timed else "")
        model, tokenizer = load(folder)
        measured = perplexity(model, tokenizer, news_text(), windows=windows)
    print(f"| {name} {cells}| {measured.value:.4g} |", flush=True)


HEAD = "| setting | bytes | parameters | relative error | perplexity |\n|---|---|---|---|---|"
TIMED_HEAD = "| setting | bytes | parameters | relative error | seconds | perplexity |\n|---|---|---|---|---|---|"


def quality() -> None:
    """Perplexity of SmolLM2 on news text at several sizes and splits between U V and S."""
    print("SmolLM2-135M-Instruct, 300 news articles, 8 windows of 512 tokens, no token added\n")
    print(HEAD)
    _row("dense", None)
    _row("--bits 8", Recipe(bits=8, embedding_bits="none"))
    for keep in (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6):
        _row(f"--keep {keep}", Recipe(keep=keep, values="float"))
    _row("--keep 0.85 --threshold-scope row", Recipe(keep=0.85, threshold_scope="row"))
    _row("--keep 0.75 --threshold-scope row", Recipe(keep=0.75, threshold_scope="row"))
    for ratio in (0.02, 0.05, 0.2):
        _row(f"--keep 0.85 --rank-ratio {ratio}", Recipe(keep=0.85, rank_ratio=ratio))
    _row("--keep 0.85 --pattern columns", Recipe(keep=0.85, pattern="columns"))
    _row("--keep 0.85 --pattern rows", Recipe(keep=0.85, pattern="rows"))
    _row("--keep 0.85 --pattern 2:4", Recipe(keep=0.85, pattern="2:4"))
    _row("--rank 8 --sparsity 0.9", Recipe(rank=8, sparsity=0.9))


def iterations() -> None:
    """Relative error, perplexity and seconds against the number of alternations."""
    print(TIMED_HEAD)
    for n in (1, 2, 4, 8):
        _row(f"--rank 8 --sparsity 0.9 --iterations {n}", Recipe(rank=8, sparsity=0.9, iterations=n), timed=True)
    for n in (1, 2, 4, 8):
        _row(
            f"--keep 0.85 --rank-ratio 0.05 --iterations {n}",
            Recipe(keep=0.85, rank_ratio=0.05, iterations=n),
            timed=True,
        )
