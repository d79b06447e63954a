"""Bits a weight against what they cost a language model: whole numbers in S beside rounding and llama.cpp's formats.

The models are permuted first (permuted.py).
"""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from losparse_cli.budget.recipe import Recipe
from losparse_cli.compress import compress, plan
from losparse_cli.linalg.groups import round_groups
from losparse_cli.load import load
from losparse_cli.text.windows import read_windows, settle
from tests.llama_cpp import shared_library

from .peers import gptq_solver, solved_by
from .permuted import dense_model
from .results import LENGTH, Options, add_result, measured, results_of

OURS = tuple(f"losparse@{bits}" for bits in (4.25, 3.25, 2.5, 1.8))
WITHOUT_TEXT = tuple(f"without-text@{bits}" for bits in (5.25, 4.25))
TRAINED = ("trained@3.25", "trained@2.5", "trained@1.8")
"""Compressed like OURS, and then for MINUTES towards the whole dense model, at no byte more. In no run unless named."""
MATCHED = ("matched@3.25", "both@3.25")
"""Each block matched to the dense one as it is compressed; and then trained like TRAINED. In no run unless named."""
MINUTES = 60
GRIDS = ("grid@int4", "grid@int8")
"""What `losparse export --gguf` hands to llama.cpp as Q4_0 and Q8_0, at so many bits there. In no run unless named."""
GGML = ("Q4_0", "Q4_K", "IQ4_XS", "Q3_K", "IQ3_S", "IQ3_XXS", "Q2_K", "IQ2_S", "IQ2_XXS")
"""Of llama.cpp, each with an importance matrix. Rows are padded to a block's 256 entries, and that is not counted."""
GPTQ = ("gptq@4", "gptq@3")
"""Each with a scale and a zero point for GROUP entries of a row, which are counted, with the text that OURS have."""
GROUP = 64
ROWS = ("dense", *OURS, *WITHOUT_TEXT, "rounding@4", *GPTQ, *GGML)


def bits(options: Options, rows: Sequence[str] = ()) -> None:
    """A permuted model in every way of ROWS, or those named, measured on two texts against dense."""
    dense = dense_model(options)
    bench = "bits" if options.model is None else f"bits {dense.name}"
    for row in list(rows) or [row for row in ROWS if row not in results_of(options, bench)]:
        found = _row(options, row, dense)
        if found is not None:
            add_result(options, bench, row, found)
            print(f"{row}: done", flush=True)
    _print_table(dense.name, list(results_of(options, bench).values()))


def _row(options: Options, row: str, dense: Path) -> dict[str, Any] | None:
    if row == "dense":
        return {"texts": measured(options, dense, None)}
    method, _, size = row.partition("@")
    output = options.folder / f"out-{row}"
    if method in ("losparse", "without-text", "trained", "matched", "both", "grid"):
        text = None if method == "without-text" else options.calibration()
        budget: dict[str, Any] = {"grid": size} if method == "grid" else {"bits": float(size)}
        recipe = Recipe(**budget, **options.targets())
        how: Any = {"trained": "model", "matched": "blocks", "both": "both"}.get(method)
        if how in ("model", "both"):
            how = {"mode": how, "minutes": MINUTES}
        made = compress(dense, output, recipe, calibration=text, refinement=how, resume="never", overwrite=True)
        texts = measured(options, output, dense)
        shutil.rmtree(output)
        found = {"bits": made.report.bits, "seconds": made.seconds, "peak": made.took.peak_bytes, "texts": texts}
        return found | ({"refinement": made.report.refinement} if made.report.refinement else {})
    if method == "gptq":
        wide = int(size)
        with solved_by(gptq_solver(wide, GROUP), row):
            # Floats of half the entries are what is planned; all of them are what is stored.
            recipe = Recipe(rank=0, sparsity=0.5, values="float", threshold_scope="row", **options.targets())
            made = compress(dense, output, recipe, calibration=options.calibration(), resume="never", overwrite=True)
        texts = measured(options, output, dense)
        shutil.rmtree(output)
        return {"bits": wide + (16 + wide) / GROUP, "seconds": made.seconds, "texts": texts}
    if method == "rounding":
        return _quantized(options, row, dense, lambda W, importance: round_groups(W, int(size)))
    missing = [name for name in ("xllamacpp", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"{row}: left out, for {' and '.join(missing)} is not installed: pip install {' '.join(missing)}")
        return None
    return _quantized(options, row, dense, lambda W, importance: ggml(W, importance, row))


def _quantized(
    options: Options, row: str, dense: Path, change: Callable[[Tensor, Tensor], tuple[Tensor, float]]
) -> dict[str, Any]:
    """Every layer changed by itself: (m, n) weight, (n,) mean squares of its inputs -> another weight, bits of one."""
    model, tokenizer = load(dense, dtype=torch.float32)
    planned = plan(dense, recipe=Recipe(**options.targets())).plan.layers
    layers = [p.layer.name for p in planned if not p.layer.rows]
    importance = _mean_squares(options, dense, model, layers)
    used = count = 0.0
    with torch.no_grad():
        for name in layers:
            weight = model.get_submodule(name).weight
            changed, width = change(weight.detach(), importance[name])
            weight.copy_(changed)
            used, count = used + width * weight.numel(), count + weight.numel()
    folder = options.folder / f"plain-{row}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts = measured(options, folder, dense)
    shutil.rmtree(folder)
    return {"bits": used / count, "texts": texts}


def _mean_squares(options: Options, dense: Path, model: Any, layers: Sequence[str]) -> dict[str, Tensor]:
    """Layer -> mean squares of its inputs, on a quarter of the text that the others are calibrated with."""
    windows = read_windows(settle(options.calibration(), model, dense), model, dense, 0)
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, torch.zeros(())) + args[0].flatten(0, -2).square().sum(0)

        return hook

    hooks = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in layers]
    ids = windows.ids[: max(1, len(windows.ids) // 4)]
    with torch.no_grad():
        for part in ids.split(4):
            model(part, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    return {name: total / ids.numel() for name, total in sums.items()}


# --- llama.cpp ---------------------------------------------------------------------------------------


@cache
def _library() -> Any:
    """llama.cpp's quantizers, from the wheel `xllamacpp`."""
    library = shared_library()
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def ggml(W: Tensor, importance: Tensor, kind: str) -> tuple[Tensor, float]:
    """What a format of llama.cpp makes of W, and its nominal bits a weight."""
    import gguf
    import numpy as np

    number = gguf.GGMLQuantizationType[kind]
    block, nbytes = gguf.GGML_QUANT_SIZES[number]
    m, n = W.shape
    wide = -(-n // block) * block
    source, weight = np.zeros((m, wide), np.float32), np.full(wide, 1e-8, np.float32)
    source[:, :n], weight[:n] = W.numpy(), importance.clamp_min(1e-8).numpy()
    made = np.zeros(m * wide // block * nbytes, np.uint8)
    pointers = [array.ctypes.data_as(ctypes.c_void_p) for array in (source, made, weight)]
    sizes = [ctypes.c_int64(value) for value in (0, m, wide)]
    _library().ggml_quantize_chunk(ctypes.c_int(int(number)), pointers[0], pointers[1], *sizes, pointers[2])
    read = gguf.quants.dequantize(made.reshape(m, -1), number)[:, :n]
    return torch.from_numpy(np.ascontiguousarray(read)).float(), 8 * nbytes / block


# --- what is shown -----------------------------------------------------------------------------------


SERIES: tuple[tuple[str, Callable[[str], bool], str, str, str], ...] = (
    # label, rows, colour (Okabe and Ito's, which the colour-blind tell apart), marker, line
    ("losparse", lambda row: row.startswith("losparse@"), "#0072B2", "o", "-"),
    ("losparse, no text", lambda row: row.startswith("without-text@"), "#CC79A7", "D", "-"),
    ("llama.cpp, importance matrix", lambda row: row in GGML, "#D55E00", "^", ""),
    ("rounding in groups of 32", lambda row: row.startswith("rounding@"), "#000000", "x", ""),
)


def bits_picture(options: Options, arguments: Sequence[str] = ()) -> None:
    """docs/bits.svg, or the file named: bits a weight of the layers against the gap in log-perplexity."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"svg.hashsalt": "losparse", "font.size": 10}  # the same file from the same results
    figure, axes = plt.subplots(figsize=(7.2, 4.6))
    lines = results_of(options, "bits")
    for label, chosen, colour, marker, joined in SERIES:
        points = sorted(
            (line["bits"], row, line["texts"]["encyclopedia"]["log_difference"])
            for row, line in lines.items()
            if chosen(row)
        )
        if not points:
            continue
        x, y, errors = [p[0] for p in points], [p[2]["value"] for p in points], [p[2]["error"] or 0 for p in points]
        axes.errorbar(
            x, y, errors, label=label, color=colour, marker=marker, linestyle=joined, markersize=6, linewidth=1.5,
            capsize=2,
        )  # fmt: skip
        if not joined:
            below = False
            for place, height, (_, row, _) in zip(x, y, points, strict=True):
                name = row.partition("@")[0] if row in GGML else "4 bits"
                below = x.count(place) > 1 and not below  # two of the same bits may lie on one another
                axes.annotate(name, (place, height), (5, -11 if below else 4), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.set_xlabel("bits a weight of the compressed layers, everything counted (llama.cpp: nominal)")
    axes.set_ylabel("log-perplexity above dense, nats ± standard error", fontsize=9)
    axes.set_title("SmolLM2-135M-Instruct, permuted, on held-out encyclopedia text (lower left is better)", fontsize=10)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    path = Path(arguments[0]) if arguments else Path(__file__).parents[2] / "docs" / "bits.svg"
    figure.savefig(path, metadata={"Date": None})
    print(f"wrote {path}")


def _print_table(model: str, lines: Sequence[dict[str, Any]]) -> None:
    """Gap: log-perplexity above dense, with its paired standard error."""
    texts = next((line["texts"] for line in lines), {})
    print(f"{model}, windows of {LENGTH} tokens; gap in log-perplexity above dense\n")
    print(f"| row | bits a weight | {' | '.join(texts)} | seconds | memory |")
    print("|---|---|" + "---|" * len(texts) + "---|---|")
    for line in lines:
        gaps = []
        for found in line["texts"].values():
            gap = found.get("log_difference")
            value = found["perplexity"]["value"]
            gaps.append(f"{value:.2f}" if gap is None else f"{gap['value']:.3f} ± {gap['error'] or 0:.3f}")
        took = f"{line['seconds']:.0f}" if "seconds" in line else ""
        memory = f"{line['peak'] / 1e9:.2f} GB" if "peak" in line else ""
        width = f"{line['bits']:.2f}" if "bits" in line else ""
        print(f"| {line['row']} | {width} | {' | '.join(gaps)} | {took} | {memory} |")
