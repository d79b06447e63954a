"""What calibrated compression costs a model, beside published methods and quantization; one JSON line a result."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losparse_cli.budget.plan import plan_layer
from losparse_cli.budget.recipe import Recipe
from losparse_cli.calibration.moments import gather_moments
from losparse_cli.compress import plan, run
from losparse_cli.compression.assembly import Assembly
from losparse_cli.compression.request import Refinement
from losparse_cli.demo import encyclopedia_text, minilm, smollm2
from losparse_cli.evaluate import evaluate
from losparse_cli.export import export
from losparse_cli.linalg.admm import solve
from losparse_cli.linalg.error import output_squared
from losparse_cli.linalg.factors import Decomposition
from losparse_cli.linalg.patterns import Pattern
from losparse_cli.linalg.precision import fast_float32
from losparse_cli.load import load
from losparse_cli.models.blocks import Relay, block_of, run_block
from losparse_cli.models.skeleton import empty_model
from losparse_cli.text.windows import Calibration, read_windows, settle

from .peers import PEERS, peer, quantize
from .results import LENGTH, Options, add_result, measured, results_of

RANK_RATIO = 0.2  # of every method, so that all keep the same
HALF = Recipe(keep_parameters=0.5, rank_ratio=RANK_RATIO)
UNSTRUCTURED = Pattern("unstructured")

METHODS = ("oats", "hassle", "basil", "admm", "admm-matrix", "admm+blocks", "admm+error", "self")
ROWS = (
    "dense",
    *(f"{method}@{size}" for size in (0.7, 0.5) for method in METHODS),
    *(f"{method}@r8s90" for method in ("magnitude", "oats", "admm", "admm+blocks")),
    *(f"magnitude@{size}" for size in (0.7, 0.5)),
    *(f"keep@{size}" for size in (0.8, 0.7, 0.6, 0.5)),
)
# Bits, and entries of a group, 0 for whole rows.
QUANTIZED = {"int8": (8, 0), "int4": (4, 0), "int4, groups of 64": (4, 64), "int4, groups of 32": (4, 32)}
EMBEDDINGS = ("oats", "admm", "admm+blocks", "codes@3.25")


def _each(options: Options, bench: str, named: Sequence[str], known: Iterable[str]) -> list[str]:
    """The rows to run: those named; otherwise all that have no result yet."""
    return list(named) or [row for row in known if row not in results_of(options, bench)]


def _compressed(
    options: Options,
    row: str,
    dense: Path,
    recipe: Recipe,
    calibration: Calibration | None,
    refinement: Refinement | None = None,
) -> tuple[Path, dict[str, Any]]:
    """The dense form of the result, which is faster to measure and the same but for a rounding; and its figures."""
    output, plain = (options.folder / f"{kind}-{row.replace('/', '-')}" for kind in ("out", "plain"))
    job = plan(dense, output, recipe, calibration=calibration, refinement=refinement)
    result = run(job, resume="never", overwrite=True)
    begun = time.monotonic()
    export(output, plain, overwrite=True)
    shutil.rmtree(output)
    report = result.report
    return plain, {
        "seconds": result.seconds,
        "export_seconds": time.monotonic() - begun,
        "layer_bytes": report.bytes_after,
        "dense_layer_bytes": report.bytes_before,
        "kept_parameters": report.kept_parameters,
        "blocks": list(report.blocks),
    }


# --- whole models -----------------------------------------------------------------------------------


def calibrated(options: Options, rows: Sequence[str] = ()) -> None:
    """SmolLM2 compressed in every way of ROWS, or those named, measured on two texts against dense."""
    for row in _each(options, "calibrated", rows, ROWS):
        add_result(options, "calibrated", row, _row(options, row))
        print(f"{row}: done", flush=True)
    _print_table(options, list(results_of(options, "calibrated").values()))


def _row(options: Options, row: str) -> dict[str, Any]:
    dense = smollm2()
    if row == "dense":
        return {"texts": measured(options, dense, None)}
    method, _, size = row.partition("@")
    method, *extras = method.split("+")
    if method not in (*PEERS, "admm", "admm-matrix", "oats-fast", "self", "keep") or set(extras) - {"blocks", "error"}:
        raise SystemExit(f"unknown row {row!r}; rows look like {', '.join(ROWS[:4])}, {ROWS[-1]}")
    if size == "r8s90":
        recipe = Recipe(rank=8, sparsity=0.9)
    elif method == "keep":  # all else by default
        recipe = Recipe(keep=float(size), values="float")
    else:  # without data, all is best spent on S
        recipe = Recipe(keep_parameters=float(size), rank_ratio=0.0 if method == "magnitude" else RANK_RATIO)
    recipe = replace(recipe, **options.targets())
    if method == "admm-matrix":
        recipe = replace(recipe, threshold_scope="matrix")
    if method == "oats-fast":
        recipe = replace(recipe, solver="oats")
    if "error" in extras:
        recipe = replace(recipe, allocate="error")
    calibration = None if method == "magnitude" else options.calibration("self" if method == "self" else "")
    refinement = Refinement() if "blocks" in extras else None
    if method in PEERS and calibration is not None:
        with peer(method):
            folder, figures = _compressed(options, row, dense, recipe, calibration, refinement)
    else:
        folder, figures = _compressed(options, row, dense, recipe, calibration, refinement)
    begun = time.monotonic()
    texts = measured(options, folder, dense)
    shutil.rmtree(folder)
    return figures | {"texts": texts, "measuring_seconds": time.monotonic() - begun}


def _print_table(options: Options, lines: Sequence[dict[str, Any]]) -> None:
    """Gap: log-perplexity above dense, and beside it the share of OATS's at the same size."""
    by_row = {line["row"]: line for line in lines}
    print(f"SmolLM2-135M-Instruct, {options.windows} windows of {LENGTH} tokens each; float32", end="")
    if "dense" in by_row:
        texts = by_row["dense"]["texts"].items()
        print("; dense:", ", ".join(f"{name} {found['perplexity']['value']:.2f}" for name, found in texts), end="")
    print("\n\n| row | bytes | parameters | seconds |", end="")
    for name in options.texts:
        print(f" {name}: gap | of OATS's | KL | top-1 |", end="")
    print("\n|---|---|---|---|" + "---|---|---|---|" * len(options.texts))
    for row, line in by_row.items():
        if row == "dense":
            continue
        share = line["layer_bytes"] / line["dense_layer_bytes"]
        kept, seconds = line.get("kept_parameters"), line.get("seconds")
        print(f"| {row} | {share:.1%} | {f'{kept:.1%}' if kept else '–'} ", end="")
        print(f"| {f'{seconds:.0f}' if seconds else '–'} |", end="")
        size = row.partition("@")[2]
        for name, found in line["texts"].items():
            gap = found["log_difference"]
            peer_row = by_row.get(f"oats@{size}") or by_row.get(f"oats-fast@{size}") or {}
            other = peer_row.get("texts", {}).get(name)
            ratio = f"{gap['value'] / other['log_difference']['value']:.2f}" if other and size else "–"
            error = f" ± {gap['error']:.4f}" if gap["error"] is not None else ""
            print(f" {gap['value']:.4f}{error} | {ratio} ", end="")
            print(f"| {found['kl']['value']:.4f} | {found['agreement']['value']:.1%} |", end="")
        print()


def quantization(options: Options, rows: Sequence[str] = ()) -> None:
    """The same layers rounded to 8 and 4 bits by torchao, measured alike."""
    if importlib.util.find_spec("torchao") is None:
        print("torchao is not installed, so nothing is quantized. Install it with: pip install 'losparse[bench]'")
        return
    dense = smollm2()
    layers = [p for p in plan(dense, recipe=Recipe(**options.targets())).plan.layers if not p.layer.rows]
    for row in _each(options, "quantization", rows, QUANTIZED):
        model, tokenizer = load(dense, dtype=torch.float32)
        bits, group = QUANTIZED[row]
        begun = time.monotonic()
        nbytes = quantize(model, [p.layer.name for p in layers], bits, group)
        seconds = time.monotonic() - begun
        folder = options.folder / "quantized"
        model.save_pretrained(folder)  # in float32: rounding once more would be unfair to 8 bits
        tokenizer.save_pretrained(folder)
        texts = measured(options, folder, dense)
        shutil.rmtree(folder)
        figures = {"seconds": seconds, "layer_bytes": nbytes, "texts": texts}
        figures["dense_layer_bytes"] = sum(p.layer.dense_bytes for p in layers)
        add_result(options, "quantization", row, figures)
        print(f"{row}: done", flush=True)
    _print_table(options, list(results_of(options, "quantization").values()))


def embedding(options: Options, rows: Sequence[str] = ()) -> None:
    """all-MiniLM-L6-v2 at half the parameters, and in codes: cosine of its vectors to those of the dense model."""
    dense, count = minilm(), 16 if options.small else 256
    sentences = [s for s in re.split(r"(?<=[.!?])\s+", encyclopedia_text()[1]) if 40 <= len(s) <= 400]
    text = "\n".join(sentences[:: len(sentences) // count][:count])
    for row in _each(options, "embedding", rows, EMBEDDINGS):
        method, _, extra = row.partition("+")
        method, _, bits = method.partition("@")
        recipe = replace(Recipe(bits=float(bits)) if bits else HALF, **options.targets("encoder.layer.[01].*"))
        calibration = replace(options.calibration(), length=128)  # near what it embeds, and it takes no more than 512
        given = (options, f"embedding-{row}", dense, recipe, calibration, Refinement() if extra else None)
        if method in PEERS:
            with peer(method):
                folder, figures = _compressed(*given)
        else:
            folder, figures = _compressed(*given)
        found = evaluate(folder, text, against=dense, windows=count, dtype="float32").to_dict()
        shutil.rmtree(folder)
        add_result(options, "embedding", row, figures | {"cosine": found["cosine"]})
        print(f"{row}: done", flush=True)
    print(f"all-MiniLM-L6-v2, {count} held-out sentences, kept parameters 50 %, or codes of so many bits\n")
    print("| method | bytes | seconds | cosine to dense | 1 - cosine, of OATS's |\n|---|---|---|---|---|")
    kept = results_of(options, "embedding")
    for row, line in kept.items():
        cosine, other = line["cosine"], kept.get("oats")
        ratio = f"{(1 - cosine['value']) / (1 - other['cosine']['value']):.2f}" if other else "–"
        print(f"| {row} | {line['layer_bytes'] / line['dense_layer_bytes']:.1%} | {line['seconds']:.0f} ", end="")
        print(f"| {cosine['value']:.5f} ± {cosine['error']:.5f} | {ratio} |")


# --- single layers ----------------------------------------------------------------------------------


def _ours(scope: str) -> Callable[..., Decomposition]:
    def solve_one(W: Tensor, H: Tensor, rank: int, nnz: int) -> Decomposition:
        return solve([W], H, [(rank, nnz)], UNSTRUCTURED, scope=scope)[0]

    return solve_one


SOLVERS: dict[str, tuple[Callable[..., Decomposition], str]] = {
    "oats": (PEERS["oats"], "row"),
    "hassle": (PEERS["hassle"], "row"),
    "basil": (PEERS["basil"], "row"),
    "admm": (_ours("row"), "row"),
    "admm-matrix": (_ours("matrix"), "matrix"),
}
SETTINGS = {
    "50 %": HALF,
    "20 %": replace(HALF, keep_parameters=0.2),
    "rank 8, sparsity 0.9": Recipe(rank=8, sparsity=0.9),
}


def layer_errors(options: Options, methods: Sequence[str] = ()) -> None:
    """tr(E H Eᵀ) / tr(W H Wᵀ) with H of held-out text, each layer solved by itself in the dense model."""
    job = plan(smollm2(), recipe=replace(HALF, **options.targets()), calibration=options.calibration())
    assert job.windows is not None
    model = empty_model(job.source.folder, job.source.config)
    held_out = read_windows(settle(options.held_out(), model, job.source.folder), model, job.source.folder, seed=0)
    assert held_out is not None
    assembly = Assembly(model, job.source, job.device)
    model.config.use_cache = False
    first, second = job.windows.batches(8), held_out.batches(8)
    outside = [n for n, _ in model.named_parameters() if block_of(n, job.blocks) is None]
    assembly.load(outside)
    plans = {p.layer.name: p.layer for p in job.plan.layers}
    with fast_float32(), Relay(model, list(job.blocks), [*first, *second]) as relay:
        for number, (name, calls) in enumerate(relay):
            block = model.get_submodule(name)
            parameters = [f"{name}.{n}" for n, _ in block.named_parameters()]
            assembly.load(parameters)
            if number % options.every == 0:
                layers = [layer.removeprefix(f"{name}.") for layer in plans if layer.startswith(f"{name}.")]
                seen = gather_moments(block, layers, calls[: len(first)])
                unseen = {one.layers: one.H for one in gather_moments(block, layers, calls[len(first) :])}
                for one in seen:
                    for layer in one.layers:
                        W = block.get_submodule(layer).weight.detach()
                        full = plans[f"{name}.{layer}"]
                        for label, recipe in SETTINGS.items():
                            for method in methods or SOLVERS:
                                solver, scope = SOLVERS[method]
                                chosen = replace(recipe, threshold_scope=scope).settled(calibrated=True)
                                sizes = plan_layer(full, chosen)
                                begun = time.monotonic()
                                found = solver(W, one.H, sizes.rank, sizes.nnz)
                                seconds = time.monotonic() - begun
                                H = unseen[one.layers]
                                error = output_squared(W - found.factors.dense(), H) / output_squared(W, H)
                                row = f"{label} | {method} | {full.name}"
                                add_result(options, "layer-errors", row, {"error": error, "seconds": seconds})
                print(f"{name}: done", flush=True)
            with torch.no_grad():
                for call in calls:
                    call.output = run_block(block, call)
            assembly.drop(parameters)
    _print_errors(results_of(options, "layer-errors"))


def _print_errors(kept: dict[str, dict[str, Any]]) -> None:
    table: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row, line in kept.items():
        label, method, layer = row.split(" | ")
        table.setdefault((label, method), {})[layer] = line
    print("| kept | method | layers | held-out error, mean | of OATS's | geometric mean of ratios | seconds a layer |")
    print("|---|---|---|---|---|---|---|")
    for (label, method), found in table.items():
        oats = table.get((label, "oats"), {})
        both = [layer for layer in found if layer in oats]
        mean = sum(line["error"] for line in found.values()) / len(found)
        ratio = geometric = "–"
        if both:
            ours, theirs = ([part[layer]["error"] for layer in both] for part in (found, oats))
            ratio = f"{sum(ours) / sum(theirs):.3f}"
            logs = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
            geometric = f"{math.exp(sum(logs) / len(logs)):.3f}"
        seconds = sum(line["seconds"] for line in found.values()) / len(found)
        print(f"| {label} | {method} | {len(found)} | {mean:.5f} | {ratio} | {geometric} | {seconds:.1f} |")


# --- the picture ------------------------------------------------------------------------------------


SERIES: tuple[tuple[str, str, Callable[[str], bool], str, str], ...] = (
    # label, bench, rows, colour (Okabe and Ito's, which the colour-blind tell apart), marker
    ("losparse", "calibrated", lambda row: re.match(r"(admm|keep)@", row) is not None, "#0072B2", "o"),
    ("losparse, blocks matched", "calibrated", lambda row: row.startswith("admm+blocks@"), "#009E73", "s"),
    ("HASSLE-free", "calibrated", lambda row: row.startswith("hassle@"), "#E69F00", "v"),
    ("OATS", "calibrated", lambda row: re.match(r"oats(-fast)?@", row) is not None, "#D55E00", "^"),
    ("no data (magnitude)", "calibrated", lambda row: row.startswith("magnitude@"), "#CC79A7", "D"),
    ("quantized, rounded to nearest", "quantization", lambda row: True, "#000000", "x"),
)


def picture(options: Options, arguments: Sequence[str] = ()) -> None:
    """docs/quality.svg, or the file named: bytes of the layers against the gap in log-perplexity."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "losparse", "font.size": 10}  # the same file from the same results
    figure, axes = plt.subplots(figsize=(7.2, 4.6))
    floor, title = 1e-3, "encyclopedia"
    for label, bench, chosen, colour, marker in SERIES:
        lines = [line for row, line in results_of(options, bench).items() if chosen(row) and row != "dense"]
        points = sorted(
            (
                100 * line["layer_bytes"] / line["dense_layer_bytes"],
                line["texts"][title]["log_difference"],
                line["row"],
            )
            for line in lines
        )
        if not points:
            continue
        x, y = [p[0] for p in points], [max(floor, p[1]["value"]) for p in points]
        joined = "" if bench == "quantization" else "-"
        errors = [p[1]["error"] or 0 for p in points]
        below = [min(error, value - 0.7 * floor) for value, error in zip(y, errors, strict=True)]
        axes.errorbar(
            x, y, (below, errors), label=label, color=colour, marker=marker, linestyle=joined,
            markersize=6, linewidth=1.5, capsize=2,
        )  # fmt: skip
        if bench == "quantization":
            for k, (place, height, (*_, row)) in enumerate(zip(x, y, points, strict=True)):
                axes.annotate(
                    row if height > floor else f"{row} (at most)",
                    (place, height),
                    (5, -9 if k % 3 == 2 else 4),  # beside the point, and not through the name of the one before
                    textcoords="offset points",
                    fontsize=8,
                )
    axes.set_yscale("log")
    axes.set_xlim(0, 100)
    axes.set_xlabel("bytes of the compressed layers, % of bfloat16, every index and scale counted")
    axes.set_ylabel("log-perplexity above dense, nats ± standard error", fontsize=9)
    axes.set_title("SmolLM2-135M-Instruct on held-out encyclopedia text (lower left is better)", fontsize=10)
    axes.grid(True, which="major", alpha=0.3)
    axes.set_ylim(bottom=0.7 * floor)
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    figure.tight_layout()
    path = Path(arguments[0]) if arguments else Path(__file__).parents[2] / "docs" / "quality.svg"
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}")
