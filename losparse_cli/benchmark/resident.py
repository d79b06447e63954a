"""What loading a model adds to a process, measured in a fresh one.

python -m losparse_cli.benchmark.resident FOLDER DTYPE [trust]   prints the bytes as JSON
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ..models.reading import input_embeddings, output_embeddings

STATUS = Path("/proc/self/status")


def tensor_bytes(model: Any) -> int:
    """Bytes of parameters and buffers."""
    return sum(_sizes(model).values())


def token_bytes(model: Any) -> int | None:
    """Those that each new token reads: all but embeddings that are looked up alone. None of a model with experts."""
    if any("expert" in name for name, value in model.config.get_text_config().to_dict().items() if value):
        return None
    embeddings, head = input_embeddings(model), output_embeddings(model)
    kept = {} if head is None else _sizes(head)
    owner = getattr(head, "_owner", ())
    kept |= _sizes(owner[0]) if owner else {}
    looked_up = {} if embeddings is None else _sizes(embeddings)
    return sum(size for address, size in _sizes(model).items() if address not in looked_up.keys() - kept.keys())


def _sizes(model: Any) -> dict[int, int]:
    """By address: tied weights are one tensor. Not by storage: those that are mapped share that of their whole file."""
    return {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}


def resident(folder: str | Path, dtype: str, trust_remote_code: bool = False) -> int | None:
    """Bytes by which a fresh process grows when it loads `folder` and uses it; None where the system does not say."""
    if not STATUS.is_file():
        return None
    command = [sys.executable, "-m", __name__, str(folder), dtype, *(["trust"] if trust_remote_code else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"TQDM_DISABLE": "1"})
    return int(json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else None


def _now() -> int:
    found: Any = re.search(r"^VmRSS:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    return int(found[1]) * 1024


def main(folder: str, dtype: str, trust: str = "") -> None:
    import torch
    import transformers

    from ..load import load
    from .generation import Runner

    transformers.utils.logging.set_verbosity_error()
    _warm_up(folder, bool(trust))
    gc.collect()
    before = _now()
    options = {"trust_remote_code": True} if trust else {}
    model, _ = load(folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype), **options)
    # Weights that are mapped from their file become resident when they are used.
    Runner(model, 1, 8, 0).once()
    gc.collect()
    print(json.dumps(_now() - before))


def _warm_up(folder: str, trust: bool) -> None:
    """What the first use of everything costs belongs to the libraries, not to the model."""
    import transformers

    from ..kernels.native import library
    from ..load import load

    library()
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust)
    for name in config.architectures or ():
        getattr(transformers, name, None)  # which imports the code of the model
    tiny = transformers.LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    with tempfile.TemporaryDirectory(prefix="losparse-bench-") as place:
        transformers.LlamaForCausalLM(tiny).save_pretrained(place)
        model, _ = load(place)
        model(model.dummy_inputs["input_ids"] % 16)


if __name__ == "__main__":
    main(*sys.argv[1:])
