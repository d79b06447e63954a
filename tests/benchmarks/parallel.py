"""One compression by one process and by two, of one thread each: how much sooner, and where the rest goes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from losparse_cli.demo import smollm2

from ..toys import digests
from .results import LENGTH, Options, add_result, results_of

RUNS: dict[str, tuple[str, ...]] = {
    "coded@3.25": ("--bits", "3.25"),
    "admm@0.5": ("--keep", "0.5", "--values", "float"),
}
SIZES = (1, 2)
MORE = (8, 64)
"""Numbers of ranks for which a time is foreseen."""


def parallel(options: Options, rows: Sequence[str] = ()) -> None:
    """Each of RUNS, or those named, in one process of one thread and in two, in turn."""
    dense = options.model or smollm2()
    text = options.calibration()
    for row in list(rows) or [row for row in RUNS if row not in results_of(options, "parallel")]:
        found, files = {}, []
        for size in SIZES:
            output = options.folder / f"parallel-{size}" / "out"
            shutil.rmtree(output.parent, ignore_errors=True)
            more = [f"--targets={layer}" for layer in options.targets().get("targets", ())]
            words = ["--calibration", text.source, "--calibration-tokens", str(text.tokens), *RUNS[row], *more]
            _run(size, [str(dense), "-o", str(output), "--calibration-length", str(LENGTH), *words])
            found[str(size)] = json.loads((output / "losparse_timing.json").read_text())
            files.append(digests(output))
        add_result(options, "parallel", row, {"sizes": found, "same": all(one == files[0] for one in files)})
        print(f"{row}: done", flush=True)
    _print_table(results_of(options, "parallel"))


def _run(size: int, arguments: Sequence[str]) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command = [*(command if size > 1 else [sys.executable]), "-m", "losparse_cli", "compress", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([*command, "--quiet", "--overwrite"], check=True, env=environment)


def _print_table(found: dict[str, dict[str, Any]]) -> None:
    foreseen = "".join(f" {size} ranks, foreseen |" for size in MORE)
    print(f"| run | 1 rank, s | 2 ranks, s | faster | waiting, s | GB each | files |{foreseen}")
    print(f"|---|---:|---:|---:|---:|---:|---|{'---:|' * len(MORE)}")
    for row, line in found.items():
        one, two = (line["sizes"][str(size)]["run"]["seconds"] for size in SIZES)
        ranks = line["sizes"]["2"]["ranks"]
        waited = " and ".join(f"{seconds:.0f}" for seconds in ranks["waited_seconds"])
        peaks = [line["sizes"]["1"]["run"]["peak_memory_bytes"], *ranks["peak_memory_bytes"]]
        memory = " ".join(f"{peak / 1e9:.2f}" for peak in peaks)
        # What is not shared takes as long with any number of ranks: of two times it is what is left (Amdahl).
        shared = 2 * (one - two)
        more = "".join(f" {one - shared + shared / size:.0f} s |" for size in MORE)
        same = "equal" if line["same"] else "DIFFERENT"
        print(f"| {row} | {one:.0f} | {two:.0f} | {one / two:.2f} | {waited} | {memory} | {same} |{more}")
