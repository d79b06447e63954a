"""Run the benchmarks named on the command line, or all; each prints a table in Markdown."""

from __future__ import annotations

import platform
import sys

import torch

from . import quality, sizes, speed, streaming

BENCHMARKS = {
    "startup": streaming.startup,
    "decomposition": speed.decomposition,
    "energy": speed.energy,
    "streaming": streaming.streaming,
    "sizes": sizes.sizes,
    "quality": quality.quality,
    "iterations": quality.iterations,
}


def main() -> None:
    names = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"unknown benchmark {unknown[0]!r}; choose from {', '.join(BENCHMARKS)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}", end=" ")
    print(f"{torch.backends.cpu.get_cpu_capability()}\n")
    for name in names:
        print(f"### {name}\n", flush=True)
        BENCHMARKS[name]()
        print(flush=True)


main()
