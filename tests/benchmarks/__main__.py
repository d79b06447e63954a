"""Run the benchmarks named on the command line, or all short ones; each prints a table in Markdown.

Those of LONG take options, and words after their name are rows: calibrated admm@0.5 oats@0.5 --small."""

from __future__ import annotations

import argparse
import platform
from pathlib import Path

import torch

from . import (
    bits,
    calibrated,
    codes,
    engines,
    experts,
    kernels,
    kernels_gpu,
    models,
    parallel,
    parallel_forecast,
    quality,
    sizes,
    speed,
    streaming,
    training,
)
from .results import Options

BENCHMARKS = {
    "startup": streaming.startup,
    "decomposition": speed.decomposition,
    "energy": speed.energy,
    "streaming": streaming.streaming,
    "sizes": sizes.sizes,
    "codes": codes.codes,
    "quality": quality.quality,
    "iterations": quality.iterations,
    "kernels": kernels.kernels,
    "kernels-codes": kernels.kernels_codes,
    "kernels-float32": kernels.kernels_float32,
    "ways": kernels.ways,
    "models": models.models,
    "models-codes": models.models_codes,
    "models-experts": models.models_experts,
    "gpu": kernels_gpu.gpu,
}
LONG = {
    "experts": experts.experts,
    "parallel": parallel.parallel,
    "parallel-forecast": parallel_forecast.parallel_forecast,
    "gguf": engines.gguf,
    "layer-errors": calibrated.layer_errors,
    "bits": bits.bits,
    "bits-picture": bits.bits_picture,
    "calibrated": calibrated.calibrated,
    "quantization": calibrated.quantization,
    "embedding": calibrated.embedding,
    "picture": calibrated.picture,
    "polarity": training.polarity,
    "training-picture": training.training_picture,
    "stages": training.stages,
    "training-speed": training.training_speed,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"{', '.join((*BENCHMARKS, *LONG))}, or a row of the one before")
    parser.add_argument("--small", action="store_true", help="two blocks and a few windows, to see that it works")
    parser.add_argument("--every", type=int, default=1, help="layer-errors: every n-th block")
    parser.add_argument("--results", type=Path, help="file that results are appended to, and tables are made from")
    parser.add_argument("--model", type=Path, help="bits, gguf: gemma3, or a dense folder as it stands, not smollm2")
    given = parser.parse_intermixed_args()
    options = Options(given.small, given.every, given.results, given.model)
    chosen: list[tuple[str, list[str]]] = []
    for word in given.names or list(BENCHMARKS):
        if word in BENCHMARKS or word in LONG:
            chosen.append((word, []))
        elif chosen and chosen[-1][0] in LONG:
            chosen[-1][1].append(word)
        else:
            parser.error(f"unknown benchmark {word!r}; choose from {', '.join((*BENCHMARKS, *LONG))}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}", end=" ")
    print(f"{torch.backends.cpu.get_cpu_capability()}\n")
    for name, rows in chosen:
        print(f"### {name}\n", flush=True)
        if name in LONG:
            LONG[name](options, rows)
        else:
            BENCHMARKS[name]()
        print(flush=True)


main()
