"""What loading a model adds to a process, measured in a fresh one.

python -m losparse_cli.speed.resident FOLDER DTYPE   prints the bytes as JSON
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def resident(folder: str, dtype: str) -> int | None:
    """Bytes by which a fresh process grows when it loads `folder`; None where the system does not say."""
    if not Path("/proc/self/status").is_file():
        return None
    command = [sys.executable, "-m", __name__, folder, dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"TQDM_DISABLE": "1"})
    return int(json.loads(done.stdout.splitlines()[-1])) if done.returncode == 0 else None


def _now() -> int:
    found: Any = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024


def main(folder: str, dtype: str) -> None:
    import torch
    import transformers

    from ..load import load

    transformers.utils.logging.set_verbosity_error()
    # What the first use of everything costs belongs to the libraries, not to the model.
    torch.nn.functional.linear(torch.ones(64, 64), torch.ones(64, 64))
    transformers.AutoConfig.from_pretrained(folder)
    from ..kernels.native import library

    library()
    before = _now()
    model, _ = load(folder, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
    tokens = torch.ones(1, 8, dtype=torch.long)
    with torch.inference_mode():  # weights that are mapped from their file become resident when they are used
        model(tokens, **({"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}))
    gc.collect()
    print(json.dumps(_now() - before))


if __name__ == "__main__":
    main(*sys.argv[1:])
