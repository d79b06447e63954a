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
    parser.add_argument("--part", default="1/1", help="2/3: the second of three parts of the types")
    parser.add_argument("--again", action="store_true", help="those that failed, too")
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
    from transformers import modeling_utils, pytorch_utils  # noqa: F401
    from transformers.models.auto import modeling_auto  # noqa: F401

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity(50)
    transformers.utils.logging.disable_progress_bar()

    from .sweep import sweep
    from .table import failed, known

    given.results.parent.mkdir(exist_ok=True)
    types = given.types or sorted(transformers.CONFIG_MAPPING.keys())
    done: set[tuple[str, str]] = set()
    if not given.types:
        part, parts = map(int, given.part.split("/"))
        lines = [line for line in known(given.results) if not (given.again and failed(line))]
        done = {(line["type"], line["class"]) for line in lines}
        types = types[part - 1 :: parts]
    for bases in (False, True):
        kept = types if bases else [t for t in types if not any(t == known_type for known_type, _ in done)]
        sweep(kept, given.results, done, bases=bases)


main()
