"""Sweep over the types named on the command line, or over all that have no result yet; then the table in docs."""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / ".cache" / "zoo.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("types", nargs="*", help="model types, as config.json names them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="types at a time")
    parser.add_argument("--again", action="store_true", help="those that failed or were not tried, too")
    parser.add_argument("--results", type=Path, default=RESULTS)
    given = parser.parse_args()
    home = tempfile.TemporaryDirectory(prefix="losparse-zoo-home-")
    os.environ |= {
        "HF_HOME": home.name, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
        "LOSPARSE_KERNEL": "reference",
    }  # fmt: skip

    import warnings

    import torch
    import transformers
    from torch.utils.serialization import config  # noqa: F401
    from transformers import conversion_mapping, modeling_utils, processing_utils, pytorch_utils  # noqa: F401
    from transformers.models.auto import modeling_auto  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()

    from .sweep import short, sweep
    from .table import OPEN, known, outcome, write_page

    given.results.parent.mkdir(exist_ok=True)
    types = given.types or sorted(transformers.CONFIG_MAPPING.keys())
    lines = [] if given.types else known(given.results)
    done = {(line["type"], line["class"]) for line in lines if not (given.again and outcome(line) in OPEN)}
    jobs = []
    for job in range(given.jobs):
        if (child := os.fork()) == 0:
            sweep(types[job :: given.jobs], given.results, done)
            os._exit(0)
        jobs.append(child)
    for child in jobs:
        os.waitpid(child, 0)
    lines = known(given.results)
    missing = set(transformers.CONFIG_MAPPING.keys()) - {line["type"] for line in lines}
    if missing:
        print(
            f"docs/architectures.md stays as it is: {given.results} lacks {len(missing)} types. make test-zoo has all."
        )
    else:
        write_page(lines, ROOT / "docs" / "architectures.md")
    failed = [line for line in lines if outcome(line) == "fails"]
    for line in failed:
        print(f"{line['type']}, {line['class']}: {short(line)}")
    raise SystemExit(1 if failed else 0)


main()
