"""llama.cpp beside the models under measurement, in a process of its own, with a GGUF file.

python -m losparse_cli.benchmark.peer FILE THREADS CONTEXT   answers each line of JSON with one
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, MissingExtraError, SourceError

FIRST_TOKEN = 10  # what comes before may be special
MAGIC = b"GGUF"


class Peer:
    """One GGUF file under measurement; like a `generation.Runner` it is run in turn. To be closed."""

    def __init__(self, path: Path, prompt: int, new_tokens: int, threads: int) -> None:
        """Checks the file alone: SourceError or CheckpointError, MissingExtraError without xllamacpp."""
        if not path.is_file():
            raise SourceError(f"There is no file {path}. Give --peer a model as GGUF.")
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise CheckpointError(f"{path} is no GGUF file. Give --peer a model that llama.cpp can read.")
        if importlib.util.find_spec("xllamacpp") is None:
            raise MissingExtraError("xllamacpp", "bench", "bench --peer")
        self.path, self.prompt, self.new_tokens, self.threads = path, prompt, new_tokens, threads
        self.prefills: list[float] = []
        self.steps: list[float] = []
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Load the model; CheckpointError if llama.cpp cannot."""
        room = self.prompt + self.new_tokens + 8
        command = [sys.executable, "-m", __name__, str(self.path), str(self.threads), str(room)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._heard()

    def once(self, *, kept: bool = True) -> None:
        """As `Runner.once`."""
        assert self._process is not None
        assert self._process.stdin is not None
        tokens = [FIRST_TOKEN + (7919 * k) % 100 for k in range(self.prompt)]
        self._process.stdin.write(json.dumps({"prompt": tokens, "n_predict": self.new_tokens + 1}) + "\n")
        self._process.stdin.flush()
        found = self._heard()
        if kept:
            self.prefills.append(found["prompt_per_second"])
            self.steps.append(found["predicted_per_second"])

    def _heard(self) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise CheckpointError(f"llama.cpp cannot run {self.path}. Check the file with llama.cpp itself.")
        return json.loads(line)

    @property
    def prefill(self) -> float:
        """Tokens of the prompt a second."""
        return statistics.median(self.prefills)

    @property
    def decode(self) -> float | None:
        """New tokens a second."""
        return statistics.median(self.steps) if self.new_tokens else None

    @property
    def nbytes(self) -> int:
        """Of the file."""
        return self.path.stat().st_size

    @property
    def resident(self) -> int | None:
        """Bytes of the process now, its caches included; None where the system does not say."""
        assert self._process is not None
        status = Path(f"/proc/{self._process.pid}/status")
        found = re.search(r"^VmRSS:\s+(\d+) kB", status.read_text(), re.MULTILINE) if status.is_file() else None
        return int(found[1]) * 1024 if found else None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.kill()
            self._process.wait()
            assert self._process.stdout is not None
            self._process.stdout.close()


def main(path: str, threads: str, room: str) -> None:
    import xllamacpp

    answers = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)  # llama.cpp tells a great deal
    settings = xllamacpp.CommonParams()
    settings.model.path = path
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = int(threads)
    settings.n_ctx, settings.n_parallel = int(room), 1
    server = xllamacpp.Server(settings)
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line) | {"temperature": 0, "cache_prompt": False, "ignore_eos": True}
        found = server.handle_completions(asked)
        found = found if isinstance(found, dict) else json.loads(found)
        print(json.dumps(found["timings"]), file=answers, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
